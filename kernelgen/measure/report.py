"""``kernelgen report``: the plots and the table that a result file gives. Imports matplotlib only when it draws."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Sequence

import click

from kernelgen.core.command import Report, command
from kernelgen.core.locate import find_specs
from kernelgen.emit.rooms import serve
from kernelgen.measure.command import specs_option
from kernelgen.measure.document import Document, load
from kernelgen.measure.suite import OURS, Row, Suite
from kernelgen.measure.summary import beside, counts, findings, geomean, key, parts, speedups

_COLOURS = 2.0  # the colour scale ends at 4 x faster and 4 x slower
_NAMED = ("torch", "triton", "vllm", "sglang", "triton_kernels", "deep_gemm")


@command("report")
@click.argument("result", type=click.Path(path_type=Path, dir_okay=False))
@click.option(
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    help="Folder for the plots; beside RESULT unless told.",
)
@specs_option
@click.option("--markdown", is_flag=True, help="Print the table of times, and draw nothing.")
def report(result: Path, out: Path | None, specs: Path | None, markdown: bool) -> Report:
    """Draw the speed-ups and the fractions of the floor that RESULT, a file of kernelgen bench, holds."""
    serve(specs or find_specs())
    document = load(result)
    if markdown:
        text = markdown_tables(document)
        return Report({"markdown": text}, text.splitlines())
    written = [str(path) for path in draw(document, out or result.parent, result.stem)]
    return Report({"written": written}, written)


def peers_of(document: Document) -> list[str]:
    """The implementations beside ours, in the order of their first rows; other ways of ours are no peers."""
    names = dict.fromkeys(row["impl"] for row in document.rows)
    return [name for name in names if not name.startswith(OURS)]


def markdown_tables(document: Document) -> str:
    """A summary, and a table of µs for each part: a line a cell without its tokens, a column a batch size."""
    suite = document.suite
    lines = [_headline(document), "", *(f"- {line}" for line in findings(suite, document.rows, peers_of(document)))]
    for part in parts(suite):
        rows = [r for r in document.rows if suite.part(r) == part and r["impl"].startswith(OURS) and counts(r)]
        if rows:
            lines += ["", *_table(document, rows, part)]
    return "\n".join(lines) + "\n"


def draw(document: Document, folder: Path, stem: str) -> list[Path]:
    """Write a heat map of speed-ups for each peer and part, the fraction of the floor, and how long a call takes by what it is
    measured beside; return the files.
    """
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "kernelgen"  # the same rows draw the same bytes
    matplotlib.rcParams["font.size"] = 9
    folder.mkdir(parents=True, exist_ok=True)
    written, suite = [], document.suite
    for peer in peers_of(document):
        for part in parts(suite):
            pairs = [(r, t) for r, t in speedups(suite, document.rows, peer) if suite.part(r) == part]
            if pairs:
                path = folder / f"{_name(stem, 'speedup', peer, part)}.svg"
                _save(_heat_map(suite, pairs, ", ".join(filter(None, [f"times as fast as {peer}", part]))), path)
                written.append(path)
    for part in parts(suite):
        rows = [r for r in document.rows if suite.part(r) == part and counts(r) and r["impl"] == OURS and r["site"] != "route"]
        if rows:
            path = folder / f"{_name(stem, 'floor', part)}.svg"
            points = [(row, row["floor_us"] / row["us"]) for row in rows]
            title = ", ".join(filter(None, ["fraction of the floor", part]))
            _save(_curves(suite, points, title, "floor / time", 1.0), path)
            written.append(path)
        points = [(row, 1.0 / times) for row, times in beside(suite, document.rows) if suite.part(row) == part]
        if points and suite.beside:
            path = folder / f"{_name(stem, 'beside', part)}.svg"
            title = ", ".join(filter(None, [f"times as long as {suite.beside[0]}", part]))
            _save(_curves(suite, points, title, "time / time", 1.0), path)
            written.append(path)
    return written


def _name(*parts: str) -> str:
    return "_".join(filter(None, parts))


def _headline(document: Document) -> str:
    versions = document.versions
    said = [str(document.machine.get("gpu", "CPU"))]
    said += [f"{name} {versions[name]}" for name in _NAMED if name in versions]
    units = {"copy_gb_s": "copy {:.0f} GB/s", "bf16_tflop_s": "bf16 {:.0f} TFLOP/s", "fp8_tflop_s": "FP8 {:.0f} TFLOP/s"}
    said += [text.format(document.ceilings[name]) for name, text in units.items() if name in document.ceilings]
    return ", ".join(said)


def _line(suite: Suite, row: Row) -> str:
    form = row["impl"].removeprefix(OURS)
    return suite.label(row) + (f", {form[1:]}" if form else "")


def _table(document: Document, rows: Sequence[Row], part: str) -> list[str]:
    suite = document.suite
    tokens = sorted({row["tokens"] for row in rows})
    against = {
        peer: {key(suite, row): t for row, t in speedups(suite, document.rows, peer)} for peer in peers_of(document)
    }
    near = {key(suite, row): t for row, t in beside(suite, rows)}
    legend = "µs (fraction of the floor)"
    legend += "".join(f", × {peer}" for peer, times in against.items() if any(key(suite, row) in times for row in rows))
    legend += f", × {suite.beside[0]}" if near and suite.beside else ""
    found = {(_line(suite, row), row["tokens"]): row for row in rows}
    lines = [
        f"{part}: {legend}" if part else legend,
        "",
        "| | " + " | ".join(f"T={t}" for t in tokens) + " |",
        "|---" * (len(tokens) + 1) + "|",
    ]
    for line in dict.fromkeys(_line(suite, row) for row in rows):
        cells = []
        for t in tokens:
            row = found.get((line, t))
            if row is None:
                cells.append("–")
                continue
            cell, own = f"{row['us']:.3g} ({row['floor_us'] / row['us']:.2f})", key(suite, row)
            for times in (times[own] for times in against.values() if own in times):
                cell += f" ×{times:.2g}" if times < 10 else f" ×{times:.0f}"
            cells.append(cell + (f" ×{near[own]:.2f}" if own in near else ""))
        lines.append(f"| {line} | " + " | ".join(cells) + " |")
    return lines


def _heat_map(suite: Suite, pairs: Sequence[tuple[Row, float]], title: str) -> Any:
    import numpy
    from matplotlib.figure import Figure

    lines = list(dict.fromkeys(suite.label(row) for row, _ in pairs))
    tokens = sorted({row["tokens"] for row, _ in pairs})
    grid = numpy.full((len(lines), len(tokens)), numpy.nan)
    for row, times in pairs:
        grid[lines.index(suite.label(row)), tokens.index(row["tokens"])] = times
    figure = Figure(figsize=(3.2 + 0.62 * len(tokens), 0.9 + 0.24 * len(lines)), layout="constrained")
    axes = figure.add_subplot()
    axes.imshow(numpy.log2(grid), cmap="RdYlGn", vmin=-_COLOURS, vmax=_COLOURS, aspect="auto")
    for y, x in zip(*numpy.nonzero(~numpy.isnan(grid)), strict=True):
        times = grid[y, x]
        text = f"{times:.2g}" if times < 10 else f"{times:.0f}"
        dark = abs(math.log2(times)) > 0.7 * _COLOURS
        axes.text(x, y, text, ha="center", va="center", color="white" if dark else "black")
    axes.set_xticks(range(len(tokens)), [str(t) for t in tokens])
    axes.set_yticks(range(len(lines)), lines)
    axes.set_xlabel("tokens")
    mean = geomean([times for _, times in pairs])
    axes.set_title(f"{title}: geomean {mean:.2f}")
    return figure


def _curves(suite: Suite, values: Sequence[tuple[Row, float]], title: str, unit: str, level: float) -> Any:
    """Values by tokens, a panel for each model and site; ``level``: where a line is drawn."""
    from matplotlib.figure import Figure

    rows = [row for row, _ in values]
    panels = list(dict.fromkeys((row["model"], row["site"]) for row in rows))
    wide = min(4, len(panels))
    high = -(-len(panels) // wide)
    figure = Figure(figsize=(2.6 * wide + 0.6, 2.1 * high + 0.5), layout="constrained")
    grid = list(figure.subplots(high, wide, squeeze=False, sharex=True, sharey=True).flat)
    for axes, (model, site) in zip(grid[: len(panels)], panels, strict=True):
        here = [(row, value) for row, value in values if (row["model"], row["site"]) == (model, site)]
        for line in dict.fromkeys(suite.label(row) for row, _ in here):
            points = sorted((row["tokens"], value) for row, value in here if suite.label(row) == line)
            words = line.removeprefix(f"{model} {site}").strip() or "16 bits"
            axes.plot(*zip(*points, strict=True), marker=".", label=words)
        axes.axhline(level, color="grey", linewidth=0.6)
        tokens = sorted({row["tokens"] for row in rows})
        axes.set_xscale("log", base=2)
        axes.set_xticks(tokens, [str(t) for t in tokens], fontsize=7)
        axes.set_ylim(bottom=0.0, top=1.1 * max(level, *(value for _, value in values)))
        axes.set_title(f"{model} {site}", fontsize=9)
        axes.legend(fontsize=7, frameon=False)
    for axes in grid[len(panels) :]:
        axes.set_axis_off()
    figure.supxlabel("tokens")
    figure.supylabel(unit)
    figure.suptitle(title)
    return figure


def _save(figure: Any, path: Path) -> None:
    figure.savefig(path, format="svg", metadata={"Date": None})
