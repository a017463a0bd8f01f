"""What the commands that measure share: their options, the device, the progress, and a file that grows cell by cell.

Imports torch only when it runs.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Sequence

import click

from kernelgen.measure.document import AnyCell, Document

if TYPE_CHECKING:
    import torch
    from rich.progress import Progress

    from kernelgen.measure.implementation import Implementation, Workload

package_option = click.option(
    "--package",
    type=click.Path(path_type=Path),
    default=Path("generated"),
    help="The generated package.",
)
out_option = click.option(
    "--out",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Result file; rows that it holds are not measured again.",
)
retry_option = click.option("--retry", is_flag=True, help="Try again what failed in --out.")
seconds_option = click.option(
    "--seconds", type=click.FloatRange(0, min_open=True), help="Begin no cell after that."
)
check_only_option = click.option(
    "--check-only",
    is_flag=True,
    help="Compare with the reference and time nothing; works on the CPU with TRITON_INTERPRET=1.",
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print the document in place of the table.")


def stop(message: object) -> int:
    """The exit code of what could not be done."""
    click.echo(f"error: {message}", err=True)
    return 2


def find_device(check_only: bool) -> torch.device | None:
    """The GPU, or the CPU with its interpreter repaired; None: there is no GPU to time on."""
    import torch

    if torch.cuda.is_available():
        return torch.device("cuda")
    if not check_only:
        stop("there is no GPU here; --check-only with TRITON_INTERPRET=1 runs on the CPU")
        return None
    from kernelgen import interpreter

    interpreter.install()  # bfloat16 and FP8 as on a GPU
    return torch.device("cpu")


def progress() -> Progress:
    """A bar on stderr."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=Console(stderr=True))


def measure(
    shown: Progress,
    workload: Workload,
    cells: Sequence[AnyCell],
    implementations: Sequence[Implementation],
    document: Document,
    options: dict[str, Any],
) -> bool:
    """Measure what ``document`` lacks, and save it cell by cell where there is --out; whether all was reached in time.

    Raises:
        ContextLost: nothing more can be measured in this process.
    """
    from kernelgen.measure import runner

    task = shown.add_task("measuring", total=len(cells))

    def on_cell(cell: Any, rows: Sequence[dict[str, Any]]) -> None:
        for row in rows:
            document.add(row)
        if options["out"] is not None and rows:
            document.save(options["out"])
        columns = cell.columns()
        where = f"{columns['model']} {columns['site']} r{columns['rank']} T={columns['tokens']}"
        shown.update(task, advance=1, description=where)

    if not options["check_only"]:
        runner.measure_ceilings(document)
    how = runner.Run(options["check_only"], options["seconds"])
    return runner.run(workload, cells, implementations, document, how, on_cell)


def finish(rows: Sequence[dict[str, Any]], complete: bool) -> int:
    """Say what is left; the exit code."""
    if not complete:
        click.echo("out of time: run the same command again to go on", err=True)
    return 1 if any(row["failed"] for row in rows) else 0


def lost(error: Exception) -> int:
    """The exit code where the GPU context was lost on the way."""
    return stop(f"the GPU context is lost: {error}; run the same command again to go on after it")
