"""The result of a run: one JSON document that grows row by row and that a later run goes on with."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from pathlib import Path
from typing import Any, Callable, Iterable

from kernelgen.core.diagnostics import failure, os_failure
from kernelgen.core.read import parse_json, read_file
from kernelgen.core.write import replace_file
from kernelgen.measure import suites
from kernelgen.measure.suite import Cell, Row, Suite

SCHEMA_VERSION = 2
# What has to agree for rows of two runs to stand in one document.
_SAME_MACHINE = ("gpu", "sms")
_SAME_VERSIONS = ("torch", "triton", "vllm", "sglang")

Key = tuple[Any, ...]

_TEXT, _NUMBER, _NONE = (str,), (int, float), (type(None),)
# What the fields of a row are.
_TIMES = ("us", "us_p10", "us_p90", "floor_us", "host_us")
_KINDS: dict[str, tuple[type, ...]] = {"model": _TEXT, "site": _TEXT, "tokens": (int,), "impl": _TEXT, "variant": _TEXT}
_KINDS |= {"failed": _TEXT + _NONE, "error": _NUMBER + _NONE, **dict.fromkeys(_TIMES, _NUMBER + _NONE)}


@dataclasses.dataclass
class Document:
    """``rows`` in the order of measuring; a row with ``failed`` set has no time and counts nowhere.

    Units: us, us_p10, us_p90 (over replays), floor_us and host_us in microseconds a call; ``error`` relative;
    ``bytes`` and ``flops`` a call; ceilings in GB/s (read + written) and TFLOP/s.
    """

    suite: Suite
    machine: dict[str, Any]
    versions: dict[str, str]
    ceilings: dict[str, float] = dataclasses.field(default_factory=dict)
    rows: list[Row] = dataclasses.field(default_factory=list)

    def __post_init__(self) -> None:
        self._done = {self.key(row) for row in self.rows}

    def key(self, row: Row) -> Key:
        """What identifies a row."""
        return (*(row[name] for name in self.suite.columns), row["impl"])

    def has(self, cell: Cell, impl: str) -> bool:
        """Whether the row is there, measured or failed."""
        return self.key({**cell.columns(), "impl": impl}) in self._done

    def of(self, cells: Iterable[Cell], impls: Iterable[str]) -> list[Row]:
        """The rows of these, in the order of measuring."""
        wanted = {self.key({**c.columns(), "impl": i}) for c, i in itertools.product(cells, impls)}
        return [row for row in self.rows if self.key(row) in wanted]

    def add(self, row: Row) -> None:
        """Append a row."""
        self.rows.append(row)
        self._done.add(self.key(row))

    def forget(self, which: Callable[[Row], bool]) -> None:
        """Drop rows, so that they are measured again."""
        self.rows = [row for row in self.rows if not which(row)]
        self.__post_init__()

    def as_json(self) -> dict[str, Any]:
        """The fields of the file."""
        head = {"schema_version": SCHEMA_VERSION, "suite": self.suite.name, "machine": self.machine, "versions": self.versions}
        return {**head, "ceilings": self.ceilings, "rows": self.rows}

    def text(self) -> str:
        """The document as JSON, one row a line."""
        head = self.as_json()
        rows = ",\n".join("  " + json.dumps(row, allow_nan=False) for row in head.pop("rows"))
        body = json.dumps(head, indent=1)[:-2]
        return f'{body},\n "rows": [\n{rows}\n ]\n}}\n'

    def save(self, path: Path) -> None:
        """Write the document in one step: a reader or a kill never sees half of it.

        Raises:
            Failure: it cannot be written.
        """
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            replace_file(path, self.text())
        except OSError as error:
            raise os_failure(error, path) from error


def load(path: Path) -> Document:
    """Read a document.

    Raises:
        Failure: the file cannot be read, or is no document of this version.
    """
    try:
        data = parse_json(read_file(path))
        if data["schema_version"] != SCHEMA_VERSION:
            message = f"schema_version {data['schema_version']}, wanted {SCHEMA_VERSION}"
            raise failure("KG072", str(path), message, "measure again, or use the kernelgen that wrote it")
        if data["suite"] not in suites.names():
            raise failure("KG072", str(path), f"no such suite: {data['suite']}", f"known: {', '.join(suites.names())}")
        suite = suites.find(data["suite"])
        for number, row in enumerate(data["rows"], 1):
            _check(row, f"row {number}")
        if not all(type(value) in _NUMBER for value in data["ceilings"].values()):
            raise ValueError("a ceiling that is no number")
        return Document(suite, dict(data["machine"]), dict(data["versions"]), dict(data["ceilings"]), list(data["rows"]))
    except OSError as error:
        raise os_failure(error, path) from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        hint = "name a file that kernelgen bench --out wrote"
        raise failure("KG072", str(path), f"not a result of this benchmark: {error!r}", hint) from error


def _check(row: Row, what: str) -> None:
    """Raises ValueError or KeyError where a field is not what it is in every row."""
    for name, kinds in _KINDS.items():
        if type(row[name]) not in kinds:
            raise ValueError(f"{what}: {name} is {row[name]!r}")
    if row["us"] is not None and not (math.isfinite(row["us"]) and row["us"] >= 0 and row["floor_us"] is not None):
        raise ValueError(f"{what}: {row['us']} us, floor_us {row['floor_us']}")


def resume(path: Path | None, suite: Suite, machine: dict[str, Any], versions: dict[str, str]) -> Document:
    """The document at ``path`` to go on with, or an empty one; None: of rows that are not kept.

    Raises:
        Failure: it cannot be read or made, or is of another suite, kind of machine or versions.
    """
    if path is None:
        return Document(suite, machine, versions)
    if not path.exists():
        try:  # better now than when the first row is there
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise os_failure(error, path) from error
        return Document(suite, machine, versions)
    document = load(path)
    if document.suite.name != suite.name:
        raise failure("KG072", str(path), f"results of {document.suite.name}, not of {suite.name}", "use another --out")
    for names, old, new in ((_SAME_MACHINE, document.machine, machine), (_SAME_VERSIONS, document.versions, versions)):
        for name in names:
            if name in old and name in new and old[name] != new[name]:
                message = f"measured with {name} {old[name]}, here it is {new[name]}"
                raise failure("KG072", str(path), message, "use another --out")
        old.update(new)
    return document
