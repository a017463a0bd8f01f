"""Figures over the rows of a document: speed-ups over a peer, and their mean."""

from __future__ import annotations

import math
from typing import Any, Sequence

from kernelgen.bench.document import row_key

OURS = "kernelgen"
Row = dict[str, Any]


def counts(row: Row) -> bool:
    """Whether the row holds a time of a right result."""
    return row["failed"] is None and bool(row["us"])


def speedup(rows: Sequence[Row], row: Row, peer: str) -> float | None:
    """How many times as long ``peer`` takes for the cell of ``row``; None where it was not measured."""
    if not counts(row):
        return None
    wanted = row_key({**row, "impl": peer})
    other = next((r for r in rows if row_key(r) == wanted and counts(r)), None)
    return None if other is None else float(other["us"] / row["us"])


def speedups(rows: Sequence[Row], peer: str) -> list[tuple[Row, float]]:
    """(our row, speed-up) of every cell that both were measured on."""
    by_key = {row_key(r): r for r in rows if counts(r)}
    pairs = []
    for row in by_key.values():
        other = by_key.get(row_key({**row, "impl": peer}))
        if row["impl"] == OURS and other is not None:
            pairs.append((row, float(other["us"] / row["us"])))
    return pairs


def geomean(values: Sequence[float]) -> float:
    """The geometric mean of positive values."""
    return math.exp(sum(math.log(v) for v in values) / len(values))
