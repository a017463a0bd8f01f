"""The rows of a run on a terminal."""

from __future__ import annotations

from typing import Any, Sequence

from rich.console import Console
from rich.table import Table

from kernelgen.measure.summary import geomean, quantised, speedup, speedups


def results(rows: Sequence[dict[str, Any]], peers: Sequence[str]) -> Table:
    """One line a row; times of peers as a multiple of ours are in the last columns of our rows."""
    table = Table(title="µs a call, by CUDA-graph replay", title_justify="left")
    for name in ("model", "site", "rank", "T", "batch", "impl"):
        table.add_column(name, no_wrap=True)
    table.add_column("variant", no_wrap=True, max_width=20)
    for name in ("µs", "p10-p90", "floor/µs", "host µs", "error"):
        table.add_column(name, justify="right", no_wrap=True)
    for peer in peers:
        table.add_column(f"× {peer}", justify="right", no_wrap=True)
    for row in rows:
        table.add_row(*_cells(row), *(_times(rows, row, peer) for peer in peers))
    return table


def summary(console: Console, rows: Sequence[dict[str, Any]], peers: Sequence[str]) -> None:
    """One line a peer and one for what failed."""
    for peer in peers:
        for add in (True, False):
            times = [t for row, t in speedups(rows, peer) if row["add"] == add]
            if times:
                console.print(
                    f"× {peer}, {'add' if add else 'set'}: geomean {geomean(times):.2f}, "
                    f"{min(times):.2f} to {max(times):.2f} over {len(times)} cells"
                )
    failed = [row for row in rows if row["failed"]]
    for row in failed:
        where = f"{row['model']} {row['site']} r{row['rank']} T={row['tokens']}"
        console.print(f"failed: {row['impl']}, {where}: {row['failed']}", markup=False)
    if failed:
        console.print(f"{len(failed)} of {len(rows)} rows failed and do not count")


def _cells(row: dict[str, Any]) -> list[str]:
    batch = [f"{row['active']}/{row['slots']}", "add" if row["add"] else "set"]
    if row["base"]:
        batch.append(f"{row['base']:.0%} base")
    batch += quantised(row)
    if row["routing"] != "uniform":
        batch.append(row["routing"])
    head = [
        row["model"],
        row["site"],
        str(row["rank"]),
        str(row["tokens"]),
        " ".join(batch),
        row["impl"],
        row["variant"].removeprefix("moe_lora_"),
    ]
    error = "" if row["error"] is None else f"{row['error']:.1e}"
    if row["failed"]:
        return [*head, "failed", "", "", "", error]
    if row["us"] is None:
        return [*head, "", "", "", "", error]
    fraction = f"{row['floor_us'] / row['us']:.2f}" if row["us"] else ""
    spread = f"{row['us_p10']:.2f}-{row['us_p90']:.2f}"
    return [*head, f"{row['us']:.2f}", spread, fraction, f"{row['host_us']:.1f}", error]


def _times(rows: Sequence[dict[str, Any]], row: dict[str, Any], peer: str) -> str:
    times = speedup(rows, row, peer) if row["impl"] == "kernelgen" else None
    return "" if times is None else f"{times:.2f}"
