"""The rows of a run on a terminal."""

from __future__ import annotations

from typing import Iterator, Sequence

from kernelgen.core.table import table
from kernelgen.measure.suite import Row, Suite
from kernelgen.measure.summary import findings, speedups


def results(suite: Suite, rows: Sequence[Row], peers: Sequence[str], width: int | None) -> list[str]:
    """One line a row where ``width`` allows; times of peers as a multiple of ours are in the last columns of our rows."""
    numbers = ("T", "µs", "p10-p90", "floor/µs", "host µs", "error", *(f"× {peer}" for peer in peers))
    against = {peer: {id(row): times for row, times in speedups(suite, rows, peer)} for peer in peers}
    lines = []
    for row in rows:
        times = [against[peer].get(id(row)) for peer in peers]
        lines.append([*_cells(suite, row), *("" if t is None else f"{t:.2f}" for t in times)])
    head = ("cell", "T", "impl", "variant", *numbers[1:])
    return ["µs a call, by CUDA-graph replay", *table(lines, head, width, numbers)]


def summary(suite: Suite, rows: Sequence[Row], peers: Sequence[str]) -> Iterator[str]:
    """One line a peer, one for what is compared with others of ours, and one for what failed."""
    for line in findings(suite, rows, peers):
        yield line.replace("*", "")
    failed = sum(bool(row["failed"]) for row in rows)
    if failed:
        yield f"{failed} of {len(rows)} rows failed and do not count"


def _cells(suite: Suite, row: Row) -> list[str]:
    cell = " ".join(filter(None, [suite.label(row), suite.part(row)]))
    head = [cell, str(row["tokens"]), row["impl"], row["variant"].removeprefix(f"{suite.name}_")]
    error = "" if row["error"] is None else f"{row['error']:.1e}"
    if row["failed"]:
        return [*head, "failed", "", "", "", error]
    if row["us"] is None:
        return [*head, "", "", "", "", error]
    fraction = f"{row['floor_us'] / row['us']:.2f}" if row["us"] else ""
    spread = f"{row['us_p10']:.2f}-{row['us_p90']:.2f}"
    return [*head, f"{row['us']:.2f}", spread, fraction, f"{row['host_us']:.1f}", error]
