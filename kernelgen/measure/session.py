"""What the commands that measure share: their options, the device, the progress, and a file that grows cell by cell.

Imports torch only when it runs.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, Iterable, Sequence

import click

from kernelgen.command import Report
from kernelgen.diagnostics import Diagnostic, failure
from kernelgen.measure.document import AnyCell, Document
from kernelgen.model import Location

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
    help="Compare with the reference and time nothing; without a GPU kernels are interpreted.",
)


def find_device(check_only: bool) -> torch.device:
    """The GPU; to check results, where there is none or TRITON_INTERPRET is 1, the CPU with the interpreter repaired.

    Raises:
        Failure: times are wanted, and no GPU is there to run compiled kernels.
    """
    import torch

    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if torch.cuda.is_available() and not interpreted:
        return torch.device("cuda")
    if not check_only:
        found = "TRITON_INTERPRET is set" if interpreted else "torch sees no GPU here"
        raise failure("KG061", "cuda", f"{found}: there are no times to take", "--check-only compares results on the CPU")
    os.environ["TRITON_INTERPRET"] = "1"  # read where kernels are decorated
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
        Failure: the GPU context is lost, and nothing more can be measured in this process.
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
    try:
        return runner.run(workload, cells, implementations, document, how, on_cell)
    except runner.ContextLost as error:
        message = f"the GPU context is lost: {error}"
        raise failure("KG074", "cuda", message, "run the same command again to go on after it") from error


def finish(document: Document, rows: Sequence[dict[str, Any]], complete: bool, lines: Iterable[str]) -> Report:
    """What there is to report of ``rows``; what is left to do, and what failed, goes to stderr."""
    if not complete:
        click.echo("out of time: run the same command again to go on", err=True)
    findings = [_finding(row) for row in rows if row["failed"]]
    for finding in findings:
        click.echo(str(finding), err=True)
    report = {**document.as_json(), "findings": [finding.as_json() for finding in findings]}
    return Report(report, lines, exit_code=1 if findings else 0)


def _finding(row: dict[str, Any]) -> Diagnostic:
    where = f"{row['model']} {row['site']} r{row['rank']} T={row['tokens']}"
    return Diagnostic("KG073", Location(row["impl"]), f"{where}: {row['failed']}")
