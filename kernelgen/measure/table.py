"""The rows of a run on a terminal."""

from __future__ import annotations

from typing import Iterator, Sequence

from rich.table import Table

from kernelgen.measure.suite import Row, Suite
from kernelgen.measure.summary import findings, speedups


def results(suite: Suite, rows: Sequence[Row], peers: Sequence[str]) -> Table:
    """One line a row; times of peers as a multiple of ours are in the last columns of our rows."""
    table = Table(title="µs a call, by CUDA-graph replay", title_justify="left")
    table.add_column("cell", no_wrap=True, max_width=56)
    table.add_column("T", no_wrap=True, justify="right")
    table.add_column("impl", no_wrap=True)
    table.add_column("variant", no_wrap=True, max_width=24)
    for name in ("µs", "p10-p90", "floor/µs", "host µs", "error"):
        table.add_column(name, justify="right", no_wrap=True)
    for peer in peers:
        table.add_column(f"× {peer}", justify="right", no_wrap=True)
    against = {peer: {id(row): times for row, times in speedups(suite, rows, peer)} for peer in peers}
    for row in rows:
        times = [against[peer].get(id(row)) for peer in peers]
        table.add_row(*_cells(suite, row), *("" if t is None else f"{t:.2f}" for t in times))
    return table


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
