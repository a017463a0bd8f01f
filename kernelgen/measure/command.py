"""``kernelgen bench SUITE``: one command a suite, of its axes. Imports torch only when one runs."""

from __future__ import annotations

import functools
import inspect
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, Callable, Iterable, Sequence

import click

from kernelgen.core.command import Report, command
from kernelgen.core.diagnostics import Diagnostic, failure
from kernelgen.core.locate import find_specs
from kernelgen.core.model import Location
from kernelgen.emit.rooms import in_rooms, serve
from kernelgen.measure import document as documents
from kernelgen.measure import suites
from kernelgen.measure.document import Document
from kernelgen.measure.options import Seconds, Words
from kernelgen.measure.suite import OURS, Axis, Cell, Row, Size, Suite, misfit

if TYPE_CHECKING:
    import torch
    from rich.progress import Progress

    from kernelgen.measure.workload import Implementation, Workload


class _Suites(click.Group):
    """A command a suite; without the name of one, options are those of the first, as they once were."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return suites.names()

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        return of_suite(cmd_name) if cmd_name in suites.names() else None

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        serve(specs_of(args))
        if args and args[0].startswith("-") and args[0] not in ("-h", "--help"):
            say_meant(f"kernelgen bench {suites.NAMES[0]}", args)
            args = [suites.NAMES[0], *args]
        return super().parse_args(ctx, args)


def specs_of(args: Sequence[str]) -> Path:
    """The folder of the specs, which decides what commands there are before they are parsed."""
    for word, behind in zip(args, [*args, ""][1:], strict=True):
        option, equals, value = word.partition("=")
        if option == "--specs":
            return Path(value if equals else behind)
    return find_specs()


def say_meant(spelling: str, args: Sequence[str]) -> None:
    """An old spelling is understood; who reads documents is not told."""
    if "--json" not in args:
        click.echo(f"{spelling} is meant: spell it so, as the old way will end", err=True)


@click.group("bench", cls=_Suites)
def bench() -> None:
    """Time generated kernels on this GPU, next to a floor and to the peers.

    Every result is compared with the formula in fp64 before it is timed. The exit code is 1 if one was wrong or failed.
    """


def of_suite(name: str) -> click.Command:
    """``kernelgen bench NAME``."""
    suite = suites.find(name)

    def run(**options: Any) -> Report:
        return _bench(suite, options)

    run.__doc__ = f"{suite.title}\n\n{inspect.cleandoc(bench.help or '')}"
    for option in reversed([*map(option_of, suite.axes), *_options(suite)]):
        run = option(run)
    return command(name)(run)


def option_of(axis: Axis) -> Callable[[Any], Any]:
    """The option that an axis is; unless told, it is as the size of the sweep says."""
    usual = axis.full
    told = "" if usual is None else ",".join(map(str, usual)) if isinstance(usual, tuple) else str(usual)
    text = f"{axis.help}  [default: {told}]" if told else axis.help
    if axis.flag:
        return click.option(axis.flag, axis.name, default=None, help=text)
    return click.option(f"--{axis.name.replace('_', '-')}", axis.name, type=axis.kind, help=text)


def specs_option(function: Any) -> Any:
    """Whose rooms, and whose tunables, are meant."""
    text = "Folder of the specs.  [default: ./specs, else those that come with kernelgen]"
    return click.option("--specs", type=click.Path(path_type=Path), help=text)(function)


def package_option(function: Any) -> Any:
    """Where the generated package is."""
    kind, usual = click.Path(path_type=Path), Path("generated")
    return click.option("--package", type=kind, default=usual, show_default=True, help="The generated package.")(function)


def _options(suite: Suite) -> list[Callable[[Any], Any]]:
    """What every suite has."""
    implementations = (OURS, *(f"{OURS}:{form}" for form in suite.forms), *suite.peers)
    own = []
    if suite.peers:
        text = "Peers to time in the same run."
        own.append(click.option("--against", type=Words(suite.peers), default=(), help=f"{text}  [{','.join(suite.peers)}]"))
        own.append(click.option("--no-ours", is_flag=True, help="Time the peers alone."))
    if suite.forms:
        text = "Other ways of ours to time too, each forced."
        text += f"  [{','.join(suite.forms)}]"
        own.append(click.option("--forms", type=Words(suite.forms), default=suite.usual, help=text))
    return [
        click.option("--quick", is_flag=True, help="A part of the sweep, which takes about a minute on a GPU."),
        click.option(
            "--check-only",
            is_flag=True,
            help="Compare tiny problems, or what is told, with fp64, and time nothing; without a GPU kernels are interpreted.",
        ),
        *own,
        specs_option,
        package_option,
        click.option(
            "--out",
            type=click.Path(path_type=Path, dir_okay=False),
            help="Result file; rows that it holds are not measured again.",
        ),
        click.option("--retry", is_flag=True, help="Try again what failed in --out."),
        click.option(
            "--again",
            type=Words(implementations),
            default=(),
            help="Measure the chosen cells again for these, though --out holds them.",
        ),
        click.option("--seconds", type=Seconds(0, min_open=True), help="Begin no cell after that."),
        click.option("--workers", type=click.IntRange(0), default=0, help="Processes that compile before anything is timed."),
        click.option("--compile-only", is_flag=True, help="Stop once everything is compiled."),
    ]


def _bench(suite: Suite, options: dict[str, Any]) -> Report:
    size: Size = "tiny" if options["check_only"] else "quick" if options["quick"] else "full"
    cells = suite.cells(options, size)
    names = [] if options.get("no_ours") else [OURS]
    names += [f"{OURS}:{form}" for form in options.get("forms", ())]
    names += options.get("against", ())
    if not names:
        raise misfit("--no-ours leaves nothing to time", "name peers with --against, or other ways of ours with --forms")
    if not cells:
        raise misfit("the options leave no cell")
    device = find_device(options["check_only"])
    from kernelgen.measure import environment, implementations, timing

    specs = options["specs"] or find_specs()
    load = functools.partial(in_rooms, specs, implementations.load, suite.name, package=options["package"])
    loaded = [load(name) for name in names]
    document = documents.resume(options["out"], suite, environment.machine(device), environment.versions(loaded))
    if options["retry"]:
        document.forget(lambda row: row["failed"] is not None)
    again = {document.key(row) for row in document.of(cells, options["again"])}
    document.forget(lambda row: document.key(row) in again)
    with progress() as shown:
        if device.type == "cuda" and (options["workers"] or options["compile_only"]):
            from kernelgen.measure.warmup import compile_all

            todo = [(c, n) for n in names for c in cells if not document.has(c, n)]
            task = shown.add_task("compiling", total=len(todo))
            compile_all(suite.name, todo, load, max(1, options["workers"]), lambda: shown.advance(task))
        if options["compile_only"]:
            return Report(document.as_json())
        if not options["check_only"]:
            document.ceilings = timing.ceilings()

        def release() -> None:
            for implementation in loaded:
                implementation.release()

        workload = implementations.workload(suite.name, device, 1 if options["check_only"] else None, release)
        complete = _measure(shown, workload, cells, loaded, document, options)
    rows = document.of(cells, names)
    return _finish(document, rows, complete, _table(suite, rows, options.get("against", ())))


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
    from kernelgen.prove import interpreter

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

    from kernelgen.core.progress import has_bars

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=Console(stderr=True), disable=not has_bars())


def _measure(
    shown: Progress,
    workload: Workload,
    cells: Sequence[Cell],
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

    def on_cell(cell: Cell, rows: Sequence[Row]) -> None:
        for row in rows:
            document.add(row)
        if options["out"] is not None and rows:
            document.save(options["out"])
        shown.update(task, advance=1, description=where(document.suite, cell.columns()))

    how = runner.Run(options["check_only"], options["seconds"])
    try:
        return runner.run(workload, cells, implementations, document, how, on_cell)
    except runner.ContextLost as error:
        message = f"the GPU context is lost: {error}"
        raise failure("KG074", "cuda", message, "run the same command again to go on after it") from error


def where(suite: Suite, row: Row) -> str:
    """A cell in words."""
    return " ".join(filter(None, [suite.label(row), suite.part(row), f"T={row['tokens']}"]))


def _table(suite: Suite, rows: Sequence[Row], peers: Sequence[str]) -> list[str]:
    from kernelgen.core.table import terminal_width
    from kernelgen.measure import table

    return [*table.results(suite, rows, peers, terminal_width()), *table.summary(suite, rows, peers)]


def _finish(document: Document, rows: Sequence[Row], complete: bool, lines: Iterable[str]) -> Report:
    """What there is to report of ``rows``; what is left to do, and what failed, goes to stderr."""
    if not complete:
        click.echo("out of time: run the same command again to go on", err=True)
    findings = [
        Diagnostic("KG073", Location(row["impl"]), f"{where(document.suite, row)}: {row['failed']}")
        for row in rows
        if row["failed"]
    ]
    for finding in findings:
        click.echo(str(finding), err=True)
    report = {**document.as_json(), "findings": [finding.as_json() for finding in findings]}
    return Report(report, lines, exit_code=1 if findings else 0)


# ``kernelgen bench-lora``, as it was once called.
bench_lora = type(of_suite("lora"))(
    "bench-lora",
    callback=of_suite("lora").callback,
    params=[*of_suite("lora").params],
    help=of_suite("lora").help,
    hidden=True,
    deprecated=True,
)
