"""Every measurement of a search, one JSON line each, beside the file that comes of them: what resuming reads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Mapping, NamedTuple

from kernelgen.core.diagnostics import failure, os_failure
from kernelgen.core.read import parse_json, read_file
from kernelgen.core.write import replace_file
from kernelgen.measure.tune.problem import Problem
from kernelgen.measure.tune.search import Found
from kernelgen.measure.tune.space import Candidate, Space

SCHEMA_VERSION = 1
_ANEW = "use another --out, or delete the file"
_SAME = ("device", "torch", "triton")  # what has to agree for times to be compared


class Measured(NamedTuple):
    """One result; ``failed`` says why there is no time."""

    problem: Problem
    candidate: Candidate
    us: float | None
    final: bool
    failed: str | None = None


Key = tuple[Any, ...]


def key(problem: Mapping[str, Any]) -> Key:
    """What identifies a problem."""
    return tuple(problem.values())


class State:
    """The measurements so far; an empty ``path`` keeps them in memory alone."""

    def __init__(self, path: Path, space: Space, head: Mapping[str, str]) -> None:
        """Go on with the file at ``path``, or begin it.

        Raises:
            Failure: it was measured on another device or with other versions, or cannot be read or written.
        """
        self.problems: dict[Key, Problem] = {}
        self._found: dict[Key, Found] = {}
        self._space = space
        try:
            lines = read_file(path).decode(errors="replace").splitlines() if path.exists() else []
            kept = [json.dumps({"schema_version": SCHEMA_VERSION, **head})]
            kept += self._read(path, lines, head)
            path.parent.mkdir(parents=True, exist_ok=True)
            # Written anew: a kill may have left half a line.
            replace_file(path, "\n".join(kept) + "\n")
            self._file = path.open("a", encoding="utf-8")
        except OSError as error:
            raise os_failure(error, path) from error

    def found(self, problem: Problem) -> Found:
        """What is known of ``problem``."""
        return self._found.get(key(problem), Found())

    def add(self, results: list[Measured]) -> None:
        """Take in results; they are on disk when this returns."""
        for result in results:
            self._take(result)
            named = self._space.named(result.candidate)
            line: dict[str, Any] = {
                "problem": result.problem,
                "schedule": result.candidate.schedule,
            }
            line |= {"config": named, "us": result.us, "final": result.final}
            if result.failed is not None:
                line["failed"] = result.failed
            self._file.write(json.dumps(line) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()

    def _read(self, path: Path, lines: list[str], head: Mapping[str, str]) -> list[str]:
        """The lines that hold, but for the first."""
        if not lines:
            return []
        try:
            first = parse_json(lines[0])
            if first["schema_version"] != SCHEMA_VERSION:
                message = f"schema_version {first['schema_version']}, wanted {SCHEMA_VERSION}"
                raise failure("KG072", str(path), message, _ANEW)
        except (ValueError, KeyError, TypeError) as error:
            raise failure("KG072", str(path), f"not a state of kernelgen tune: {error!r}", _ANEW) from error
        for name in _SAME:
            if first.get(name) != head.get(name):
                was, now = first.get(name), head.get(name)
                raise failure("KG072", str(path), f"measured with {name} {was}, here it is {now}", _ANEW)
        kept = []
        for text in lines[1:]:
            try:
                line = parse_json(text)
                candidate = Candidate(line["schedule"], tuple(line["config"].values()))
                result = Measured(line["problem"], candidate, line["us"], line["final"])
            except (ValueError, KeyError, TypeError, AttributeError):
                continue  # half a line
            # What the spec does not declare any more is measured no more.
            names = self._space.tunables.get(candidate.schedule, {})
            if tuple(line["config"]) == tuple(names) and self._space.declares(candidate):
                self._take(result)
                kept.append(text)
        return kept

    def _take(self, result: Measured) -> None:
        self.problems[key(result.problem)] = result.problem
        found = self._found.setdefault(key(result.problem), Found())
        if not result.final:
            found.rough[result.candidate] = result.us
        elif result.us is not None:
            found.final[result.candidate] = result.us
