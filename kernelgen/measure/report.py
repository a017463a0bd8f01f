"""``kernelgen report``: the plots and the table that a result file gives. Imports matplotlib only when it draws."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Sequence

import click

from kernelgen.command import Report, command
from kernelgen.measure.document import Document, load, row_key
from kernelgen.measure.summary import (
    OURS,
    Row,
    counts,
    geomean,
    over_16_bit,
    quantised,
    speedups,
)

_COLOURS = 2.0  # the colour scale ends at 4 x faster and 4 x slower


@command("report")
@click.argument("result", type=click.Path(path_type=Path, dir_okay=False))
@click.option(
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    help="Folder for the plots; beside RESULT unless told.",
)
@click.option("--markdown", is_flag=True, help="Print the table of times, and draw nothing.")
def report(result: Path, out: Path | None, markdown: bool) -> Report:
    """Draw the speed-ups and the fractions of the floor that RESULT, a file of kernelgen bench, holds."""
    document = load(result)
    if markdown:
        text = markdown_tables(document)
        return Report({"markdown": text}, text.splitlines())
    written = [str(path) for path in draw(document, out or result.parent, result.stem)]
    return Report({"written": written}, written)


def peers_of(document: Document) -> list[str]:
    """The implementations beside ours, in the order of their first rows; forced schedules are no peers."""
    names = dict.fromkeys(row["impl"] for row in document.rows)
    return [name for name in names if not name.startswith(OURS)]


def markdown_tables(document: Document) -> str:
    """A summary, and for add and for set a table of µs: a line a (model, site, rank), a column a batch size."""
    lines = [_headline(document), ""]
    for peer in peers_of(document):
        for add in (True, False):
            times = [t for row, t in speedups(document.rows, peer) if row["add"] == add]
            if times:
                lines.append(
                    f"- {peer}, {_mode(add)}: **{geomean(times):.2f} ×** geomean, "
                    f"{min(times):.2f} to {max(times):.2f} over {len(times)} cells"
                )
    lines += _fp8_lines(document)
    for add in (True, False):
        rows = [r for r in document.rows if r["add"] == add and r["impl"] == OURS and counts(r)]
        if rows:
            lines += ["", *_table(document, rows, add)]
    return "\n".join(lines) + "\n"


def _fp8_lines(document: Document) -> list[str]:
    """How FP8 compares with 16-bit operands, a line for each kind of scales."""
    faster = over_16_bit(document.rows)
    kinds: dict[str, list[float]] = {}
    for row in document.rows:
        if row_key(row) in faster:
            kinds.setdefault(" ".join(quantised(row)), []).append(faster[row_key(row)])
    return [
        f"- {kind} against 16-bit operands: **{geomean(times):.2f} ×** geomean, "
        f"{min(times):.2f} to {max(times):.2f} over {len(times)} cells"
        for kind, times in kinds.items()
    ]


def draw(document: Document, folder: Path, stem: str) -> list[Path]:
    """Write a heat map of speed-ups for each peer and mode, and the fraction of the floor; return the files."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "kernelgen"  # the same rows draw the same bytes
    matplotlib.rcParams["font.size"] = 9
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for peer in peers_of(document):
        for add in (True, False):
            pairs = [(r, t) for r, t in speedups(document.rows, peer) if r["add"] == add]
            if pairs:
                path = folder / f"{stem}_speedup_{peer}_{_mode(add)}.svg"
                _save(_heat_map(pairs, f"times as fast as {peer}, {_mode(add)}"), path)
                written.append(path)
    for add in (True, False):
        rows = [
            r
            for r in document.rows
            if r["add"] == add and r["site"] in ("w13", "w2") and counts(r) and r["impl"] == OURS
        ]
        if rows:
            path = folder / f"{stem}_floor_{_mode(add)}.svg"
            _save(_fractions(rows, _mode(add)), path)
            written.append(path)
    return written


def _headline(document: Document) -> str:
    versions = document.versions
    parts = [str(document.machine.get("gpu", "CPU"))]
    parts += [
        f"{name} {versions[name]}"
        for name in ("torch", "triton", "vllm", "sglang")
        if name in versions
    ]
    if document.ceilings:
        parts.append(f"copy {document.ceilings['copy_gb_s']:.0f} GB/s")
        parts.append(f"bf16 {document.ceilings['bf16_tflop_s']:.0f} TFLOP/s")
    return ", ".join(parts)


def _mode(add: bool) -> str:
    return "add" if add else "set"


def _line(row: Row) -> tuple[Any, ...]:
    return (
        row["model"],
        row["site"],
        row["rank"],
        row["active"],
        row["slots"],
        row["base"],
        row["routing"],
        *quantised(row),
    )


def _label(line: tuple[Any, ...]) -> str:
    model, site, rank, active, slots, base, routing, *fp8 = line
    label = " ".join([f"{model} {site} r{rank}", *fp8])
    if (active, slots) != (4, 4):
        label += f", {active} of {slots} adapters"
    if base:
        label += f", {base:.0%} base tokens"
    return label + (f", {routing}" if routing != "uniform" else "")


def _table(document: Document, rows: Sequence[Row], add: bool) -> list[str]:
    tokens = sorted({row["tokens"] for row in rows})
    against: dict[str, dict[tuple[Any, ...], float]] = {
        peer: {
            (*_line(r), r["tokens"]): t for r, t in speedups(document.rows, peer) if r["add"] == add
        }
        for peer in peers_of(document)
    }
    shown = [peer for peer, times in against.items() if times]
    legend = "µs (fraction of the floor)" + "".join(f", × {peer}" for peer in shown)
    faster = over_16_bit(rows)
    legend += ", × our 16-bit operands" if faster else ""
    found = {(*_line(row), row["tokens"]): row for row in rows}
    lines = [
        f"{_mode(add)}: {legend}",
        "",
        "| | " + " | ".join(f"T={t}" for t in tokens) + " |",
        "|---" * (len(tokens) + 1) + "|",
    ]
    for line in dict.fromkeys(_line(row) for row in rows):
        cells = []
        for t in tokens:
            row = found.get((*line, t))
            if row is None:
                cells.append("–")
                continue
            cell = f"{row['us']:.3g} ({row['floor_us'] / row['us']:.2f})"
            for peer in shown:
                times = against[peer].get((*line, t))
                cell += (
                    "" if times is None else f" ×{times:.2g}" if times < 10 else f" ×{times:.0f}"
                )
            if row_key(row) in faster:
                cell += f" ×{faster[row_key(row)]:.2f}"
            cells.append(cell)
        lines.append(f"| {_label(line)} | " + " | ".join(cells) + " |")
    return lines


def _heat_map(pairs: Sequence[tuple[Row, float]], title: str) -> Any:
    import numpy
    from matplotlib.figure import Figure

    lines = list(dict.fromkeys(_line(row) for row, _ in pairs))
    tokens = sorted({row["tokens"] for row, _ in pairs})
    grid = numpy.full((len(lines), len(tokens)), numpy.nan)
    for row, times in pairs:
        grid[lines.index(_line(row)), tokens.index(row["tokens"])] = times
    figure = Figure(
        figsize=(3.2 + 0.62 * len(tokens), 0.9 + 0.24 * len(lines)), layout="constrained"
    )
    axes = figure.add_subplot()
    axes.imshow(numpy.log2(grid), cmap="RdYlGn", vmin=-_COLOURS, vmax=_COLOURS, aspect="auto")
    for y, x in zip(*numpy.nonzero(~numpy.isnan(grid)), strict=True):
        times = grid[y, x]
        text = f"{times:.2g}" if times < 10 else f"{times:.0f}"
        dark = abs(math.log2(times)) > 0.7 * _COLOURS
        axes.text(x, y, text, ha="center", va="center", color="white" if dark else "black")
    axes.set_xticks(range(len(tokens)), [str(t) for t in tokens])
    axes.set_yticks(range(len(lines)), [_label(line) for line in lines])
    axes.set_xlabel("tokens")
    mean = geomean([times for _, times in pairs])
    axes.set_title(f"{title}: geomean {mean:.2f}")
    return figure


def _fractions(rows: Sequence[Row], mode: str) -> Any:
    from matplotlib.figure import Figure

    panels = list(dict.fromkeys((row["model"], row["site"]) for row in rows))
    wide = min(4, len(panels))
    high = -(-len(panels) // wide)
    figure = Figure(figsize=(2.6 * wide + 0.6, 2.1 * high + 0.5), layout="constrained")
    grid = list(figure.subplots(high, wide, squeeze=False, sharex=True, sharey=True).flat)
    for axes, (model, site) in zip(grid[: len(panels)], panels, strict=True):
        here = [row for row in rows if (row["model"], row["site"]) == (model, site)]
        for line in dict.fromkeys(_line(row) for row in here):
            points = sorted(
                (row["tokens"], row["floor_us"] / row["us"]) for row in here if _line(row) == line
            )
            axes.plot(*zip(*points, strict=True), marker=".", label=_label(line).split(" ", 2)[2])
        axes.axhline(1.0, color="grey", linewidth=0.6)
        tokens = sorted({row["tokens"] for row in rows})
        axes.set_xscale("log", base=2)
        axes.set_xticks(tokens, [str(t) for t in tokens], fontsize=7)
        axes.set_ylim(0.0, 1.1)
        axes.set_title(f"{model} {site}", fontsize=9)
        axes.legend(fontsize=7, frameon=False)
    for axes in grid[len(panels) :]:
        axes.set_axis_off()
    figure.supxlabel("tokens")
    figure.supylabel("floor / time")
    figure.suptitle(f"fraction of the floor, {mode}")
    return figure


def _save(figure: Any, path: Path) -> None:
    figure.savefig(path, format="svg", metadata={"Date": None})
