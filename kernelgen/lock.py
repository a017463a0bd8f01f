"""The lock: what every kernel used when a person last accepted it, for each version of Triton.

A JSON file with one line a kernel and probe, so that a change reads well in a diff and a finding can name its line.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, Mapping, NamedTuple

from kernelgen.diagnostics import Failure, failure, os_failure
from kernelgen.model import Location

FILE = "kernels.lock"  # beside the folder generated
SCHEMA_VERSION = 1
COLUMNS = ("registers", "spill_bytes", "shared_bytes")


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
            self._text = file.read_text("utf-8")
            self.sections = _parse(json.loads(self._text))
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
        part = self.file.with_name(f"{self.file.name}.{os.getpid()}")
        try:
            part.write_text(_text(self.sections), "utf-8")
            part.replace(self.file)
        except OSError as error:
            part.unlink(missing_ok=True)
            raise os_failure(error, self.file) from None


def _text(sections: Mapping[str, Section]) -> str:
    blocks = []
    for version in sorted(sections):
        lines = [
            f"    {json.dumps(str(row))}: {json.dumps(figures)}"
            for row, figures in sorted(sections[version].items())
        ]
        blocks.append(f"  {json.dumps(version)}: {{\n" + ",\n".join(lines) + "\n  }")
    head = f'"schema_version": {SCHEMA_VERSION},\n"columns": {json.dumps(COLUMNS)},\n"triton": '
    return "{\n" + head + "{\n" + ",\n".join(blocks) + "\n}\n}\n"


def _parse(document: Any) -> dict[str, Section]:
    if not isinstance(document, dict) or document.get("schema_version") != SCHEMA_VERSION:
        raise ValueError(f"wanted a document of schema_version {SCHEMA_VERSION}")
    if document.get("columns") != list(COLUMNS):
        raise ValueError(f"wanted the columns {', '.join(COLUMNS)}")
    return {version: _section(lines) for version, lines in document["triton"].items()}


def _section(lines: Mapping[str, Any]) -> Section:
    section: Section = {}
    for line, figures in lines.items():
        parts = line.split(" ")
        sound = all(
            isinstance(values, list) and list(map(type, values)) == [int] * len(COLUMNS)
            for values in figures.values()
        )
        if len(parts) != len(Row._fields) or not sound:
            raise ValueError(f"the line {line!r} is not of the form that kernelgen writes")
        section[Row(*parts)] = figures
    return section


def _unreadable(file: Path, reason: str) -> Failure:
    hint = "restore it, or remove it and run kernelgen compile --update"
    return failure("KG053", str(file), f"not a lock: {reason}", hint)
