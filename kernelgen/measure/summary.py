"""Figures over the rows of a document: speed-ups over a peer, what rows are beside others of ours, and means."""

from __future__ import annotations

import math
from typing import Iterator, Sequence

from kernelgen.measure.document import Key
from kernelgen.measure.suite import OURS, Row, Suite


def counts(row: Row) -> bool:
    """Whether the row holds a time of a right result."""
    return row["failed"] is None and bool(row["us"])


def by_key(suite: Suite, rows: Sequence[Row]) -> dict[Key, Row]:
    """The rows that count, by what identifies them."""
    return {key(suite, row): row for row in rows if counts(row)}


def key(suite: Suite, row: Row, **changes: object) -> Key:
    """What identifies a row, or the one that differs from it in ``changes``."""
    changed = {**row, **changes}
    return (*(changed[name] for name in suite.columns), changed["impl"])


def speedups(suite: Suite, rows: Sequence[Row], peer: str) -> Iterator[tuple[Row, float]]:
    """(our row, how many times as long ``peer`` takes) of every cell that both were measured on."""
    known = by_key(suite, rows)
    for row in known.values():
        other = known.get(key(suite, row, impl=peer))
        if row["impl"] == OURS and other is not None:
            yield row, float(other["us"] / row["us"])


def beside(suite: Suite, rows: Sequence[Row]) -> Iterator[tuple[Row, float]]:
    """(our row, how many times as long the one takes that it is compared with) of every row that has such a one."""
    if suite.beside is None:
        return
    known = by_key(suite, rows)
    for row in known.values():
        other = known.get(key(suite, row, **suite.beside[1]))
        if row["impl"] == OURS and other is not None and other is not row:
            yield row, float(other["us"] / row["us"])


def parts(suite: Suite) -> list[str]:
    """What tables are apart by."""
    return [""] if suite.split is None else list(suite.split[1].values())


def spread(label: str, times: Sequence[float]) -> str:
    """How many times as fast, in words."""
    cells = f"over {len(times)} cell" + ("s" if len(times) > 1 else "")
    return f"{label}: **{geomean(times):.2f} ×** geomean, {min(times):.2f} to {max(times):.2f} {cells}"


def geomean(values: Sequence[float]) -> float:
    """The geometric mean of positive values."""
    return math.exp(sum(math.log(v) for v in values) / len(values))


def findings(suite: Suite, rows: Sequence[Row], peers: Sequence[str]) -> Iterator[str]:
    """A line for each peer and part of the tables, and for what rows are beside others of ours."""
    for peer in peers:
        for part in parts(suite):
            times = [t for row, t in speedups(suite, rows, peer) if suite.part(row) == part]
            if times:
                yield spread(", ".join(filter(None, [peer, part])), times)
    kinds: dict[str, list[float]] = {}
    for row, times_of in beside(suite, rows):
        kinds.setdefault(suite.kind(row), []).append(times_of)
    for kind, times in kinds.items():
        assert suite.beside is not None
        yield spread(f"{kind} against {suite.beside[0]}", times)
