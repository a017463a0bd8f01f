"""Tables for a reader: columns where there is room for them, else as much of their order as a narrow terminal can show."""

from __future__ import annotations

import itertools
import shutil
import sys
import textwrap
from typing import Container, Sequence

_GAP = "  "
_NARROWEST = 24  # columns in which text is still worth wrapping


def terminal_width() -> int | None:
    """Of what stdout is shown on; None where it goes elsewhere, and is not cut."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None


def inline(value: object) -> str:
    """A value in one line."""
    if isinstance(value, dict):
        return ", ".join(f"{key}={inline(item)}" for key, item in value.items())
    if isinstance(value, (list, tuple)):
        return " ".join(map(str, value))
    return str(value)


def table(
    rows: Sequence[Sequence[str]], head: Sequence[str] = (), width: int | None = None, numbers: Container[str] = ()
) -> list[str]:
    """The lines of a table of at most ``width`` columns; those called as in ``numbers`` are aligned on the right.

    What is too wide has its last column wrapped; where the others leave too little room for that, the cells of a row follow
    one another, and the names of the columns stand in front of them.
    """
    every = [head, *rows] if head else rows
    columns = list(itertools.zip_longest(*every, fillvalue=""))
    widths = [max(map(len, column)) for column in columns]
    *others, last = widths or [0]
    right = {i for i, name in enumerate(head) if name in numbers}
    indent = sum(others) + len(_GAP) * len(others)
    if width is None or indent + last <= width:
        return [_aligned(row, widths, right) for row in every]
    if width - indent >= _NARROWEST:
        return list(itertools.chain.from_iterable(_wrapped_last(row, widths, right, width - indent) for row in every))
    return list(itertools.chain.from_iterable(_flowing(row, head, width) for row in rows))


def _aligned(row: Sequence[str], widths: Sequence[int], right: Container[int]) -> str:
    cells = enumerate(zip(row, widths, strict=False))
    return _GAP.join(cell.rjust(width) if i in right else cell.ljust(width) for i, (cell, width) in cells).rstrip()


def _wrapped_last(row: Sequence[str], widths: Sequence[int], right: Container[int], room: int) -> list[str]:
    if len(row) < len(widths):
        return [_aligned(row, widths, right)]
    first, *more = textwrap.wrap(row[-1], room) or [""]
    indent = " " * (sum(widths[:-1]) + len(_GAP) * (len(widths) - 1))
    return [_aligned([*row[:-1], first], widths, right), *(indent + line for line in more)]


def _flowing(row: Sequence[str], head: Sequence[str], width: int) -> list[str]:
    names = [f"{name}: " if i and name else "" for i, name in enumerate(head)] or [""]
    cells = [f"{name}{cell}" for name, cell in itertools.zip_longest(names, row, fillvalue="") if cell]
    # a cell is not torn apart where it fits a line
    text = _GAP.join(cell.replace(" ", "\N{NO-BREAK SPACE}") if len(cell) <= width - 4 else cell for cell in cells)
    lines = textwrap.wrap(text, width, subsequent_indent="    ", break_on_hyphens=False)
    return [line.replace("\N{NO-BREAK SPACE}", " ") for line in lines]
