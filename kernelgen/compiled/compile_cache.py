"""What was measured in earlier runs, kept in the user's cache folder: a line of JSON for each compiled kernel.

Lines are appended as results come, so an interrupted run loses none, processes may write at the same time, and the file of
another machine is taken in by appending it. Not being able to read or write it costs time, nothing else.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json

import triton

from kernelgen.compiled.resources import RULES, Usage
from kernelgen.core import locate
from kernelgen.core.diagnostics import Failure
from kernelgen.core.read import parse_json, read_file
from kernelgen.core.write import replace_file

_MOST = 50_000  # lines


class Remembered:
    """The usages that are remembered for this version of Triton, by digest."""

    def __init__(self) -> None:
        self.file = locate.cache_folder() / f"usage-{triton.__version__}-{RULES}.jsonl"
        self.usages: dict[str, Usage] = {}
        lines: list[str] = []
        with contextlib.suppress(OSError, UnicodeDecodeError, Failure):
            lines = read_file(self.file).decode().splitlines(keepends=True)
        for line in lines:
            with contextlib.suppress(ValueError, TypeError):
                digest, fields = parse_json(line)
                self.usages[digest] = _usage(**fields)
        if len(lines) > _MOST:
            self._replace(lines[-_MOST // 2 :])

    def add(self, digest: str, usage: Usage) -> None:
        """Take in what was compiled."""
        self.usages[digest] = usage
        line = json.dumps([digest, dataclasses.asdict(usage)]) + "\n"
        with contextlib.suppress(OSError):
            self.file.parent.mkdir(parents=True, exist_ok=True)
            with open(self.file, "ab", buffering=0) as file:
                file.write(line.encode())

    def _replace(self, lines: list[str]) -> None:
        with contextlib.suppress(OSError):
            replace_file(self.file, "".join(lines))


def _usage(registers: int, spill_bytes: int, shared_bytes: int, instructions: dict[str, int]) -> Usage:
    counts = {"registers": registers, "spill_bytes": spill_bytes, "shared_bytes": shared_bytes, **instructions}
    if not all(type(count) is int and count >= 0 for count in counts.values()):
        raise ValueError("not a usage")
    return Usage(registers, spill_bytes, shared_bytes, instructions)
