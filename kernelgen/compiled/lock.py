"""The lock: what every kernel used when a person last accepted it, for each version of Triton.

A JSON file with one line a kernel and probe, so that a change reads well in a diff and a finding can name its line. Kernels
that differ by name alone share the line of the first of them. A line has the figures of each target that there are some for:
as many as it takes to the last that is not zero.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Collection, Iterable, Iterator, Mapping, NamedTuple

from kernelgen.core.diagnostics import Diagnostic, Failure, failure, os_failure
from kernelgen.core.model import Location
from kernelgen.core.read import parse_json, read_file
from kernelgen.core.targets import TARGETS
from kernelgen.core.write import replace_file

FILE = "kernels.lock"  # beside the folder generated
SCHEMA_VERSION = 3
COLUMNS = ("registers", "shared_bytes", "spill_bytes")


class Row(NamedTuple):
    """What one line of the lock is about."""

    variant: str
    kernel: str
    probe: str

    def __str__(self) -> str:
        return " ".join(self)


Figures = dict[str, list[int]]  # target -> value of each column
Section = dict[Row, Figures]


class Lock:
    """The sections of a lock file, by version of Triton; empty where there is no file.

    Raises:
        Failure: the file is there and is no lock; exit code 2.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self.sections: dict[str, Section] = {}
        self._text = ""
        try:
            self._text = read_file(file).decode()
            self.sections = _parse(parse_json(self._text))
        except FileNotFoundError:
            pass
        except OSError as error:
            raise os_failure(error, file) from None
        except ValueError as error:
            raise _unreadable(file, str(error)) from None

    def place(self, triton: str, row: Row) -> Location:
        """Where the line of ``row`` stands in the section of that version, else the file as a whole."""
        is_section = False
        for number, line in enumerate(self._text.split("\n"), 1):
            if line.startswith('  "'):
                is_section = line.startswith(f'  "{triton}"')
            elif is_section and line.startswith(f'    "{row}"'):
                return Location(str(self.file), number)
        return Location(str(self.file))

    def write(self) -> None:
        """Replace the file as one step."""
        try:
            replace_file(self.file, _text(self.sections))
        except OSError as error:
            raise os_failure(error, self.file) from None


_ACCEPT = "if this is meant, accept it with kernelgen compile --update"


def drift(lock: Lock, triton: str, now: Section) -> Iterator[Diagnostic]:
    """Figures of ``now`` that are not those of the lock for that version of Triton."""
    section = lock.sections.get(triton, {})
    for row, figures in now.items():
        was = section.get(row, {})
        changes = [
            f"{target} {column} {before} -> {after}"
            for target, values in figures.items()
            for column, before, after in zip(COLUMNS, was.get(target, values), values, strict=True)
            if before != after
        ]
        if changes:
            about = f"{row.variant}: kernel {row.kernel} on probe {row.probe}"
            message = f"{about}: {', '.join(changes)}"
            yield Diagnostic("KG054", lock.place(triton, row), message, _ACCEPT)


def coverage(
    lock: Lock,
    triton: str,
    known: Collection[tuple[Row, str]],
    wanted: Iterable[tuple[Row, str]],
    complete: bool,
) -> Iterator[Diagnostic]:
    """Rows and targets of ``wanted`` that the lock lacks, and, where ``known`` are all, those it has too many."""
    file = Location(str(lock.file))
    section = lock.sections.get(triton)
    if section is None:
        message = f"there are no figures for triton {triton}"
        yield Diagnostic("KG055", file, message, "add them with kernelgen compile --update")
        return
    missing: dict[Row, list[str]] = {}
    for row, target in wanted:
        if target not in section.get(row, {}):
            missing.setdefault(row, []).append(target)
    for row, targets in missing.items():
        message = f"{row}: no figures for {', '.join(targets)}"
        yield Diagnostic("KG055", file, message, _ACCEPT)
    if not complete:
        return
    for row, figures in section.items():
        gone = [target for target in figures if (row, target) not in known]
        if gone:
            message = f"{row}: there is no such kernel for {', '.join(gone)} any more"
            yield Diagnostic("KG055", lock.place(triton, row), message, _ACCEPT)


def _text(sections: Mapping[str, Section]) -> str:
    blocks = []
    for version in sorted(sections):
        lines = [
            f"    {json.dumps(str(row))}: {_entries(figures)}"
            for row, figures in sorted(sections[version].items())
        ]
        blocks.append(f"  {json.dumps(version)}: {{\n" + ",\n".join(lines) + "\n  }")
    head = [
        f'"schema_version": {SCHEMA_VERSION}',
        f'"columns": {json.dumps(COLUMNS)}',
        '"triton": ',
    ]
    return "{\n" + ",\n".join(head) + "{\n" + ",\n".join(blocks) + "\n}\n}\n"


def _entries(figures: Figures) -> str:
    """The figures of the targets that there are, without the zeros at the end."""
    entries = {}
    for target in (target for target in TARGETS if target in figures):
        values = list(figures[target])
        while len(values) > 1 and not values[-1]:
            values.pop()
        entries[target] = values
    return json.dumps(entries)


def _parse(document: Any) -> dict[str, Section]:
    if not isinstance(document, dict) or document.get("schema_version") != SCHEMA_VERSION:
        raise ValueError(f"wanted schema_version {SCHEMA_VERSION}")
    if document.get("columns") != list(COLUMNS):
        raise ValueError(f"wanted the columns {', '.join(COLUMNS)}")
    sections = document.get("triton")
    if not isinstance(sections, dict):
        raise ValueError("wanted the figures of each version of Triton")
    return {version: _section(lines) for version, lines in sections.items()}


def _section(lines: Any) -> Section:
    if not isinstance(lines, dict):
        raise ValueError("wanted the lines of a version of Triton")
    section: Section = {}
    for line, entries in lines.items():
        parts = line.split(" ")
        if len(parts) != len(Row._fields) or not _is_sound(entries):
            raise ValueError(f"the line {line!r} is not of the form that kernelgen writes")
        count = len(COLUMNS)
        section[Row(*parts)] = {target: [*values, *[0] * count][:count] for target, values in entries.items()}
    return section


def _is_sound(entries: Any) -> bool:
    if not isinstance(entries, dict):
        return False
    return all(
        isinstance(values, list) and 0 < len(values) <= len(COLUMNS) and set(map(type, values)) == {int}
        for values in entries.values()
    )


def _unreadable(file: Path, reason: str) -> Failure:
    hint = "restore it, or remove it and run kernelgen compile --update"
    return failure("KG053", str(file), f"not a lock: {reason}", hint)
