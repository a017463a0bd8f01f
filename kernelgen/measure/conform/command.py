"""``kernelgen conform``."""

from __future__ import annotations

from pathlib import Path

import click

from kernelgen.core.command import Report, command
from kernelgen.core.locate import SPECS, default_output
from kernelgen.core.table import table, terminal_width


@command("conform")
@click.option("--against", required=True, metavar="NAME", help="vllm or sglang; or a Python file that has ADAPTERS.")
@click.option("--path", type=click.Path(path_type=Path, file_okay=False), help="Where its sources lie, if it is not installed.")
@click.option("--only", metavar="GLOB", help="Only the ops that variants of such a name state.")
@click.option(
    "--files", type=click.Path(path_type=Path, file_okay=False), help="Folder that gets a file for each finding, which shows it."
)
@click.option("--out", type=click.Path(path_type=Path), help="Where generated/ is.  [default: beside the specs]")
def conform(against: str, path: Path | None, only: str | None, files: Path | None, out: Path | None) -> Report:
    """Meet somebody else's kernels with the cases of this package, interpreted: what of theirs is not as the op is.

    Exit code 1 where something is.
    """
    from kernelgen.core.progress import progress
    from kernelgen.measure.conform import run as conformance

    result = conformance.run(
        against, out or default_output(SPECS), path=path, only=only, files=files, progress=progress("meeting")
    )
    for finding in result.findings:
        click.echo(str(finding), err=True)
    click.echo(result.summary(), err=True)
    rows = [(f.call, f.case, f.variant, f.error) for f in result.found]
    return Report(result.as_json(), table(rows, ("call", "case", "op", "what is wrong"), terminal_width()), 1 if rows else 0)
