"""Figures over the rows of a document: speed-ups over a peer, and their mean."""

from __future__ import annotations

import math
from typing import Any, Sequence

from kernelgen.measure.document import Key, row_key

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


def quantised(row: Row) -> list[str]:
    """What is FP8 in ``row``: w8 and a8 with the kind of their scales."""
    named = (("w8", row["quant"]), ("a8", row["act"]))
    return [f"{what}{scales}" for what, scales in named if scales != "none"]


def over_16_bit(rows: Sequence[Row]) -> dict[Key, float]:
    """How many times as fast each FP8 row of ours is as the same cell of 16-bit operands, by the key of the row."""
    ours = {row_key(row): row for row in rows if row["impl"] == OURS and counts(row)}
    faster = {}
    for key, row in ours.items():
        plain = ours.get(row_key({**row, "quant": "none", "act": "none"}))
        if plain is not None and plain is not row:
            faster[key] = float(plain["us"] / row["us"])
    return faster


def geomean(values: Sequence[float]) -> float:
    """The geometric mean of positive values."""
    return math.exp(sum(math.log(v) for v in values) / len(values))
