"""The commands: arguments in, a report out; no logic.

A command is one function with ``@_command``. It returns a ``Report``; spec faults and other failures may be raised. Modules are
imported inside the commands, so that ``--help`` stays quick and nothing loads torch before it is needed.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import os
import sys
from pathlib import Path
from typing import Any, Callable, Iterable, Mapping, Sequence

import click

from kernelgen import __version__

SCHEMA_VERSION = 1  # of every document that --json prints
INTERRUPTED = 130


@dataclasses.dataclass(frozen=True)
class Report:
    """What a command found out.

    Attributes:
        document: the fields of the JSON document.
        lines: what a person reads instead, on stdout.
        exit_code: 0 clean, 1 findings, 2 the job could not be done.
    """

    document: Mapping[str, Any]
    lines: Iterable[str] = ()
    exit_code: int = 0


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="kernelgen")
def commands() -> None:
    """Write GPU kernels from specs, prove them, and say what they cost.

    Exit codes: 0 clean, 1 findings, 2 could not do the job, 130 interrupted.
    """


def _command(name: str, **settings: Any) -> Callable[[Callable[..., Report]], click.Command]:
    """Register a command that gives a ``Report``, with ``--json`` and the one way to fail."""

    def register(function: Callable[..., Report]) -> click.Command:
        @commands.command(name, **settings)
        @click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
        @functools.wraps(function)
        def run(as_json: bool, **arguments: Any) -> int:
            from kernelgen.diagnostics import Failure

            try:
                report = function(**arguments)
            except Failure as failed:
                if not as_json:
                    raise
                errors = [diagnostic.as_json() for diagnostic in failed.diagnostics]
                report = Report({"errors": errors}, exit_code=failed.exit_code)
            if as_json:
                click.echo(json.dumps({"schema_version": SCHEMA_VERSION, **report.document}))
            else:
                for line in report.lines:
                    click.echo(line)
            return report.exit_code

        return run

    return register


def _specs_option(function: Callable[..., Report]) -> Callable[..., Report]:
    @click.option(
        "--specs",
        type=click.Path(path_type=Path),
        help="Folder of the specs.  [default: ./specs, else those that come with kernelgen]",
    )
    @functools.wraps(function)
    def run(specs: Path | None, **arguments: Any) -> Report:
        from kernelgen.locate import find_specs

        return function(specs=specs or find_specs(), **arguments)

    return run


@_command("build")
@click.option("--check", is_flag=True, help="Write nothing; exit 1 when something would change.")
@click.option("--diff", is_flag=True, help="As --check, and print what would change.")
@click.option("--only", metavar="GLOB", help="Build only the variants of such a name.")
@_specs_option
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    help="Folder that gets generated/ and tests/generated/.  [default: the parent of the specs]",
)
@click.option(
    "-j",
    "--jobs",
    type=click.IntRange(1, 64),
    help="Processes to format with.  [default: one a core]",
)
def build(
    check: bool,
    diff: bool,
    only: str | None,
    specs: Path,
    out: Path | None,
    jobs: int | None,
) -> Report:
    """Write generated/ and tests/generated/ from the specs."""
    from kernelgen import build as pipeline
    from kernelgen.locate import default_output

    dry = check or diff
    target = default_output(specs) if out is None else out
    work = pipeline.check if dry else pipeline.build
    done = work(specs, target, only, jobs or _cores())
    findings = pipeline.findings(done) if dry else []
    for finding in findings:
        if not (diff and finding.code == "KG034"):  # the diff shows it
            click.echo(str(finding), err=True)
    written, removed = ("to write", "to remove") if dry else ("written", "removed")
    counts = (
        f"{len(done.written)} {written}, {len(done.removed)} {removed}, {done.unchanged} unchanged"
    )
    click.echo(f"{counts}; run kernelgen build" if findings else counts, err=True)
    document = {
        "written": done.written,
        "removed": done.removed,
        "unchanged": done.unchanged,
        "findings": [finding.as_json() for finding in findings],
    }
    lines = pipeline.differences(done, target) if diff else ()
    return Report(document, lines, exit_code=1 if findings else 0)


@_command("list")
@click.argument("glob", default="*")
@_specs_option
def list_variants(glob: str, specs: Path) -> Report:
    """List the variants, or those whose name matches GLOB."""
    from kernelgen import build as pipeline
    from kernelgen.assemble import select

    variants = select(pipeline.package(specs), glob)
    rows = [(v.name, *(f"{axis}={tag}" for axis, tag in v.tags)) for v in variants]
    document = {
        "variants": [
            {"name": v.name, "family": v.family, "module": v.module, "axes": dict(v.tags)}
            for v in variants
        ]
    }
    return Report(document, _columns(rows))


@_command("show")
@click.argument("variant")
@click.option("--source", is_flag=True, help="Print the text of its module.")
@_specs_option
def show(variant: str, source: bool, specs: Path) -> Report:
    """Show what VARIANT is: its axes, its tunables, its source."""
    from kernelgen import build as pipeline
    from kernelgen import names
    from kernelgen.assemble import source as text_of

    family, found = pipeline.find(pipeline.package(specs), variant)
    kernel = family.kernel(found.kernel)
    document = {
        "name": found.name,
        "family": found.family,
        "spec": str(family.location),
        "template": f"templates/{kernel.template}",
        "path": names.family_path(found.family, found.module),
        "axes": dict(found.tags),
        "facts": dict(found.facts),
        "tunables": {tunable.name: tunable.values for tunable in kernel.tunables},
        "targets": family.targets,
    }
    if source:
        text = text_of(found, family, pipeline.renderer(specs))
        return Report({**document, "source": text}, text.splitlines())
    rows = [(key, _inline(value)) for key, value in document.items()]
    return Report(document, _columns(rows))


@_command("which", context_settings={"ignore_unknown_options": True})
@click.argument("words", nargs=-1, metavar="[FAMILY] [--AXIS VALUE]...", type=click.UNPROCESSED)
@_specs_option
def which(words: Sequence[str], specs: Path) -> Report:
    """Say which variant serves a case, and why.

    Any axis of the family is an option, and so is any size that was tuned for:

        kernelgen which moe_lora --dtype bf16 --rank 24 --assignment sorted
    """
    from kernelgen import build as pipeline
    from kernelgen.which import which as answer

    family, case = _case(words)
    found = answer(pipeline.package(specs), family, case)
    document = {
        "family": found.family.name,
        "variants": [variant.name for variant in found.variants],
        "reasons": found.reasons,
        "measured": [
            {"problem": dict(entry.problem), "schedule": entry.schedule, "us": entry.best.us}
            for entry in found.measured
        ],
    }
    tags = {
        axis: ", ".join(dict.fromkeys(getattr(variant, axis) for variant in found.variants))
        for axis in found.reasons
    }
    lines: list[str] = [variant.name for variant in found.variants]
    lines += ["", *_columns([(axis, tags[axis], why) for axis, why in found.reasons.items()])]
    lines += [
        f"measured: {_inline(dict(entry.problem))}: {entry.schedule}, {entry.best.us} us"
        for entry in found.measured
    ]
    return Report(document, lines)


@_command("schema")
@click.option("--check", is_flag=True, help="Compare with kernelgen.schema.json beside the specs.")
@_specs_option
def schema(check: bool, specs: Path) -> Report:
    """Print the JSON Schema of a spec, for editors."""
    from kernelgen.schema import check_schema, json_schema

    if check:
        check_schema(specs)
        return Report({"current": True})
    document = json_schema()
    return Report({"schema": document}, json.dumps(document, indent=2).splitlines())


def _case(words: Sequence[str]) -> tuple[str | None, dict[str, str]]:
    """``[FAMILY] [--AXIS VALUE | --AXIS=VALUE]...`` as the family and the case."""
    family: str | None = None
    case: dict[str, str] = {}
    rest = list(words)
    while rest:
        word = rest.pop(0)
        if not word.startswith("--"):
            if family is not None:
                raise click.UsageError(f"unexpected argument {word!r}")
            family = word
            continue
        option, equals, value = word[2:].partition("=")
        if not equals:
            if not rest:
                raise click.UsageError(f"option {word!r} needs a value")
            value = rest.pop(0)
        case[option.replace("-", "_")] = value
    return family, case


def _cores() -> int:
    affinity = getattr(os, "sched_getaffinity", None)  # Linux; knows of containers and taskset
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def _columns(rows: Sequence[Sequence[str]]) -> list[str]:
    columns = itertools.zip_longest(*rows, fillvalue="")
    widths = [max(map(len, column)) for column in columns]
    return ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]


def _inline(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key}={_inline(item)}" for key, item in value.items())
    if isinstance(value, (list, tuple)):
        return " ".join(map(str, value))
    return str(value)


def main() -> None:
    """Run the command line; the one place that turns failures into exit codes."""
    sys.exit(_run())


def _run() -> int:
    from kernelgen.diagnostics import Failure

    try:
        return commands.main(standalone_mode=False) or 0
    except Failure as failed:
        click.echo(str(failed), err=True)
        return failed.exit_code
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except (click.Abort, KeyboardInterrupt):
        click.echo("interrupted", err=True)
        return INTERRUPTED
    except Exception as error:
        if os.environ.get("KERNELGEN_TRACEBACK"):
            raise
        kind = type(error).__name__
        hint = "set KERNELGEN_TRACEBACK=1 to see where"
        click.echo(f"kernelgen: internal error: {kind}: {error}\n  hint: {hint}", err=True)
        return 2
