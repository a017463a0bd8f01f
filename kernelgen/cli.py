"""The commands: arguments in, a report out; no logic.

A command is one function with ``@_command``. It returns a ``Report``; spec faults and other failures may be raised. Modules are
imported inside the commands, so that ``--help`` stays quick and nothing loads torch before it is needed.
"""

from __future__ import annotations

import collections
import functools
import importlib
import itertools
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, Callable, Iterable, Mapping, Sequence

import click

from kernelgen import __version__
from kernelgen.core.command import Report, command
from kernelgen.core.table import inline, table, terminal_width
from kernelgen.prove import SANITIZERS

if TYPE_CHECKING:
    from kernelgen.compiled.served import Served


# Commands of other modules, which are imported when they are called.
_ELSEWHERE = {
    "bench": "kernelgen.measure.command",
    "bench-lora": "kernelgen.measure.command",
    "conform": "kernelgen.measure.conform.command",
    "init": "kernelgen.measure.init.command",
    "report": "kernelgen.measure.report",
    "tune": "kernelgen.measure.tune.command",
}


class _Commands(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted([*super().list_commands(ctx), *_ELSEWHERE])

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _ELSEWHERE:
            return super().get_command(ctx, cmd_name)
        command: click.Command = getattr(
            importlib.import_module(_ELSEWHERE[cmd_name]), cmd_name.replace("-", "_")
        )
        return command


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="kernelgen")
def commands() -> None:
    """Write GPU kernels from specs, prove them, and say what they cost.

    Exit codes: 0 clean, 1 findings, 2 could not do the job, 130 interrupted.
    """


def _command(name: str, **settings: Any) -> Callable[[Callable[..., Report]], click.Command]:
    """Register a command that gives a ``Report``."""

    def register(function: Callable[..., Report]) -> click.Command:
        made = command(name, **settings)(function)
        commands.add_command(made)
        return made

    return register


def _specs_option(function: Callable[..., Report]) -> Callable[..., Report]:
    @click.option(
        "--specs",
        type=click.Path(path_type=Path),
        help="Folder of the specs.  [default: ./specs, else those that come with kernelgen]",
    )
    @functools.wraps(function)
    def run(specs: Path | None, **arguments: Any) -> Report:
        from kernelgen.core.locate import find_specs

        return function(specs=specs or find_specs(), **arguments)

    return run


def _out_option(function: Callable[..., Report]) -> Callable[..., Report]:
    @click.option(
        "--out",
        type=click.Path(path_type=Path),
        help="Folder that holds generated/.  [default: the parent of the specs]",
    )
    @functools.wraps(function)
    def run(specs: Path, out: Path | None, **arguments: Any) -> Report:
        from kernelgen.core.locate import default_output

        return function(specs=specs, out=out or default_output(specs), **arguments)

    return run


@_command("build")
@click.option("--check", is_flag=True, help="Write nothing; exit 1 when something would change.")
@click.option("--diff", is_flag=True, help="As --check, and print what would change.")
@click.option("--only", metavar="GLOB", help="Build only the variants of such a name, those that are there, and what they need.")
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
    from kernelgen.core.locate import default_output
    from kernelgen.emit import build as pipeline

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
    lines = list(pipeline.differences(done, target)) if diff else []
    return Report({**document, "diff": lines} if diff else document, lines, exit_code=1 if findings else 0)


@_command("new")
@click.argument("family")
@click.option("--specs", type=click.Path(path_type=Path), default=Path("specs"), help="Folder of the specs.  [default: ./specs]")
def new(family: str, specs: Path) -> Report:
    """Write the spec, the template and the room of a new FAMILY: a small one that builds, is right and compiles.

    Nothing that is there is overwritten.
    """
    from kernelgen.emit.new import new as write

    written = [str(path) for path in write(family, specs)]
    click.echo(f"kernelgen build, then kernelgen verify --only '{family}_*'; each file says what to change", err=True)
    return Report({"written": written}, written)


@_command("list")
@click.argument("glob", default="*")
@_specs_option
def list_variants(glob: str, specs: Path) -> Report:
    """List the variants, or those whose name matches GLOB."""
    from kernelgen.emit import build as pipeline
    from kernelgen.emit.assemble import select

    variants = select(pipeline.package(specs), glob)
    rows = [(v.name, *(f"{axis}={tag}" for axis, tag in v.tags)) for v in variants]
    document = {
        "variants": [
            {"name": v.name, "family": v.family, "module": v.module, "axes": dict(v.tags)}
            for v in variants
        ]
    }
    return Report(document, _table(rows))


@_command("show")
@click.argument("variant")
@click.option("--source", is_flag=True, help="Print the text of its module.")
@click.option("--ptx", "assembly", flag_value="ptx", help="Print what its kernels compile to.")
@click.option("--sass", "assembly", flag_value="sass", help="The same, as NVIDIA's machine code.")
@click.option("--amdgcn", "assembly", flag_value="amdgcn", help="The same, for a target of AMD.")
@click.option("--arch", metavar="TARGET", help="Compiled for what.  [default: sm_90]")
@_specs_option
@_out_option
def show(
    variant: str, source: bool, assembly: str | None, arch: str | None, specs: Path, out: Path
) -> Report:
    """Show what VARIANT is: its axes, its tunables, its source, or its kernels compiled."""
    if source and assembly:
        raise click.UsageError(f"--source and --{assembly} exclude each other")
    if arch and not assembly:
        raise click.UsageError("--arch goes with --ptx, --sass or --amdgcn")
    from kernelgen.core import names
    from kernelgen.emit import build as pipeline
    from kernelgen.emit.assemble import source as text_of

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
    if assembly:
        from kernelgen.compiled.compile import assembly as compiled
        from kernelgen.core.targets import PRIMARY

        pipeline.require_current(specs, out, variant, _cores())
        texts = compiled(specs, out, variant, assembly, arch or PRIMARY)
        lines = itertools.chain.from_iterable(code.splitlines() for code in texts.values())
        return Report({**document, "arch": arch or PRIMARY, assembly: texts}, lines)
    rows = [(key, inline(value)) for key, value in document.items()]
    return Report(document, _table(rows))


@_command("which", context_settings={"ignore_unknown_options": True})
@click.argument("words", nargs=-1, metavar="[FAMILY] [--AXIS VALUE]...", type=click.UNPROCESSED)
@_specs_option
@_out_option
def which(words: Sequence[str], specs: Path, out: Path) -> Report:
    """Say which variant a call gets on an H200, with which tiles, and why.

    Any axis of the family is an option, and so is any size of a call. What is not given is assumed, and told:

        kernelgen which moe_lora --dtype bf16 --rank 24 --num-tokens 4096
    """
    from kernelgen.compiled.which import which as answer
    from kernelgen.core import names
    from kernelgen.core.diagnostics import failure
    from kernelgen.core.locate import room_label
    from kernelgen.core.targets import PRIMARY, TARGETS
    from kernelgen.emit import build as pipeline
    from kernelgen.emit.rooms import serve

    family, case = _case(words)
    serve(specs)
    found = answer(pipeline.package(specs), family, case)
    taken: Sequence[Served] | None = None
    others: list[str] = []
    room = room_label(f"{found.family.name}/call")
    note = f"no call of {found.family.name} is known, so which of them it gets is not: {room} would say"
    if found.sizes and not (out / names.PACKAGE).exists():
        note = "which of them a call gets, and with which tiles, the generated package says: run kernelgen build"
    elif found.sizes:
        try:
            from kernelgen.compiled.served import ask

            pipeline.require_current(specs, out, None, _cores())
            served = ask(out, found)
            taken = [one for one in served if one.variant in found.variants]
            others = [one.variant.name for one in served if one.variant not in found.variants]
        except ImportError as error:
            note = f"which of them a call gets, and with which tiles, the generated package says: it needs {error.name}"
    document = {
        "family": found.family.name,
        "variants": [variant.name for variant in found.variants],
        "reasons": found.reasons,
        "assumed": found.assumed,
        "card": TARGETS[PRIMARY].card,
        "served": None if taken is None else [one.as_json() for one in taken],
        "measured": [
            {
                "problem": dict(entry.problem),
                "tags": dict(entry.tags),
                "schedule": entry.schedule,
                "us": entry.best.us,
            }
            for entry in found.measured
        ],
    }
    shown = found.variants if taken is None else [one.variant for one in taken]
    lines = [str(variant.name) for variant in shown]
    if not lines:
        message = f"a call of these sizes takes {', '.join(others) or 'none of its family'}"
        raise failure("KG041", found.family.spec, message, f"the sizes: {_options(found.sizes)}", exit_code=1)
    for one in taken or ():
        lines += ["", *_table(one.rows())]
    tags = {
        axis: ", ".join(dict.fromkeys(getattr(variant, axis) for variant in shown or found.variants))
        for axis in found.reasons
    }
    lines += ["", *_table([(axis, tags[axis], why) for axis, why in found.reasons.items()])]
    if found.assumed:
        decided = {name for one in taken or () for name, tag in one.variant.tags if found.assumed.get(name, tag) != tag}
        lines += ["", f"assumed: {_options({n: v for n, v in found.assumed.items() if n not in decided})}"]
    if taken is not None:
        lines += ["", f"on an {TARGETS[PRIMARY].card}; another card has tiles that were measured on it, else those of the rule"]
    else:
        lines += ["", note]
        lines += [
            f"measured: {inline(dict((*entry.problem, *entry.tags)))}: {entry.schedule}, {entry.best.us} us"
            for entry in found.measured
        ]
    return Report(document, lines)


@_command("verify")
@click.option("--only", metavar="GLOB", help="Only the variants of such a name, and no laws.")
@click.option(
    "--device",
    type=click.Choice(["cpu", "cuda"]),
    default="cpu",
    show_default=True,
    help="Interpret the kernels, or compile and run them on the GPU.",
)
@click.option("--exact", is_flag=True, help="In exact algebra, where every variant must equal the reference.")
@click.option(
    "-j",
    "--jobs",
    type=click.IntRange(1, 256),
    help="Processes to run in.  [default: one a core, at most 12]",
)
@_specs_option
@_out_option
def verify(only: str | None, device: str, exact: bool, jobs: int | None, specs: Path, out: Path) -> Report:
    """Run every variant on its cases against the fp64 reference, and show the worst error over its bound."""
    if exact and device != "cpu":
        raise click.UsageError("--exact interprets the kernels: --device cpu")
    from kernelgen.core.progress import progress
    from kernelgen.emit import build as pipeline
    from kernelgen.prove import verify as proof

    workers = jobs or min(_cores(), 12)
    pipeline.require_current(specs, out, only, workers)
    result = proof.run(
        out, specs=specs, only=only, device=device, exact=exact, workers=workers, progress=progress("verifying")
    )
    for finding in result.findings:
        click.echo(str(finding), err=True)
    click.echo(result.summary(), err=True)
    return Report(result.as_json(), _table(*result.table()), 1 if result.findings else 0)


@_command("sanitize")
@click.option("--only", metavar="GLOB", help="Only the variants of such a name.")
@click.option(
    "--tool",
    "tools",
    type=click.Choice(SANITIZERS),
    multiple=True,
    help="Only this; repeatable.",
)
@click.option(
    "--result",
    type=click.Path(path_type=Path, dir_okay=False),
    help="File that gets what was found, and hashes of what was checked.",
)
@click.option("--check", is_flag=True, help="Run nothing: exit 1 where --result is not of the kernels as they are now.")
@click.option("-j", "--jobs", type=click.IntRange(1, 256), help="Processes on the GPU.  [default: one a core, at most 12]")
@_specs_option
@_out_option
def sanitize(
    only: str | None, tools: Sequence[str], result: Path | None, check: bool, jobs: int | None, specs: Path, out: Path
) -> Report:
    """Run every kernel's text on the GPU under compute-sanitizer: bounds, memory that nothing wrote, races, barriers."""
    if check and result is None:
        raise click.UsageError("--check goes with --result")
    from kernelgen.core.progress import progress
    from kernelgen.core.write import replace_file
    from kernelgen.emit import build as pipeline
    from kernelgen.prove import sanitize as sanitizer

    workers = jobs or min(_cores(), 12)
    pipeline.require_current(specs, out, only, workers)
    if check and result is not None:
        findings = sanitizer.compare(out, result, only)
        document: dict[str, Any] = {"findings": [finding.as_json() for finding in findings]}
    else:
        tell = functools.partial(click.echo, err=True)
        done = sanitizer.run(
            out, specs, only=only, tools=tools or SANITIZERS, workers=workers, progress=progress("checking"), tell=tell
        )
        findings, document = done.findings, done.as_json()
        if result is not None:
            replace_file(result, json.dumps(document, indent=1) + "\n")
        click.echo(done.summary(), err=True)
    for finding in findings:
        click.echo(str(finding), err=True)
    return Report(document, (), 1 if findings else 0)


@_command("mutate")
@click.option("--host", is_flag=True, help="Into host code, instead of kernels; in one process.")
@click.option("--only", metavar="GLOB", multiple=True, help="Only variants, or modules of host code, of such a name; repeatable.")
@click.option("--sample", type=click.IntRange(1), help="So many of each family, or module, drawn by --seed.  [default: all]")
@click.option("--seed", type=int, default=0, show_default=True, help="Of --sample.")
@click.option("-j", "--jobs", type=click.IntRange(1, 256), help="Processes to run in.  [default: one a core, at most 12]")
@_specs_option
@_out_option
def mutate(host: bool, only: Sequence[str], sample: int | None, seed: int, jobs: int | None, specs: Path, out: Path) -> Report:
    """Put small faults into kernels, one at a time, and list those that no case notices; exit 1 where there are any."""
    if host and jobs:
        raise click.UsageError("--host runs in one process, and takes no --jobs")
    from kernelgen.core.progress import progress
    from kernelgen.emit import build as pipeline
    from kernelgen.prove import mutate as kernels
    from kernelgen.prove import mutate_host

    workers = jobs or min(_cores(), 12)
    pipeline.require_current(specs, out, None, workers)
    run: Callable[..., Any] = mutate_host.run if host else functools.partial(kernels.run, workers=workers)
    living: list[str] = []

    def lives(line: str) -> None:
        living.append(line)
        click.echo(f"lives: {line}", err=True)  # at once: all of them take hours

    fates = run(out, only or ("*",), sample=sample or 0, seed=seed, progress=progress("trying"), lives=lives)
    tried, killed = (collections.Counter(of for of, fate in fates if fate.killer or counted) for counted in (True, False))
    click.echo(f"{killed.total()} of {tried.total()} killed", err=True)
    scores = {of: {"tried": tried[of], "killed": killed[of]} for of in sorted(tried)}
    rows = [(of, str(score["killed"]), str(score["tried"])) for of, score in scores.items()]
    return Report({"scores": scores, "living": living}, _table(rows, ("of", "killed", "tried")), 1 if living else 0)


@_command("numerics")
@click.option("--only", metavar="GLOB", help="Only the variants of such a name.")
@click.option("--update", is_flag=True, help="Write the terms to numerics.lock, instead of a comparison.")
@click.option("-j", "--jobs", type=click.IntRange(1, 256), help="Processes to run in.  [default: one a core, at most 12]")
@_specs_option
@_out_option
def numerics(only: str | None, update: bool, jobs: int | None, specs: Path, out: Path) -> Report:
    """Trace in which order kernels add and where they round, and compare it with numerics.lock; exit 1 where it differs."""
    from kernelgen.core.progress import progress
    from kernelgen.emit import build as pipeline
    from kernelgen.prove.numerics import receipts

    workers = jobs or min(_cores(), 12)
    pipeline.require_current(specs, out, only, workers)
    result = receipts.run(out, specs, only=only, update=update, workers=workers, progress=progress("tracing"))
    for finding in result.findings:
        click.echo(str(finding), err=True)
    click.echo(result.summary(), err=True)
    return Report(result.as_json(), (), 1 if result.findings else 0)


@_command("compile")
@click.option("--arch", "archs", metavar="TARGET", multiple=True, help="Only for this; repeatable.")
@click.option("--only", metavar="GLOB", help="Only the variants of such a name.")
@click.option("--check", is_flag=True, help="Compare with kernels.lock; exit 1 where it differs.")
@click.option("--update", is_flag=True, help="Write what was found to kernels.lock.")
@click.option("--full", is_flag=True, help="Every kernel for every target, tuned tiles too.")
@click.option(
    "-j",
    "--jobs",
    type=click.IntRange(1, 256),
    help="Processes to compile in.  [default: one a core]",
)
@_specs_option
@_out_option
def compile_kernels(
    archs: Sequence[str],
    only: str | None,
    check: bool,
    update: bool,
    full: bool,
    jobs: int | None,
    specs: Path,
    out: Path,
) -> Report:
    """Compile the kernels without a GPU, and judge the registers, spills and shared memory that they use.

    Unless --full, --only or --arch say otherwise, a sample that meets every schedule for every target: of a fixed size,
    or, for --update, all of sm_90 and a share of each other target. The last line says how much of the whole it is.

    What was compiled is remembered, line by line, in usage-*.jsonl of ~/.cache/kernelgen (KERNELGEN_CACHE_DIR), so an
    interrupted run goes on where it was. To use what another machine compiled, append its file to yours.
    """
    from kernelgen.compiled import compile as compiler
    from kernelgen.core.progress import progress
    from kernelgen.emit import build as pipeline

    if check and update:
        raise click.UsageError("--check and --update exclude each other")
    pipeline.require_current(specs, out, only, jobs or _cores())
    result = compiler.run(
        specs,
        out,
        only=only,
        targets=archs,
        mode="check" if check else "update" if update else "report",
        full=full,
        workers=jobs or _cores(),
        progress=progress("compiling"),
    )
    for finding in result.findings:
        click.echo(str(finding), err=True)
    click.echo(result.summary(), err=True)
    lines = [] if check or update else _table(*result.table())
    return Report(result.as_json(), lines, exit_code=1 if result.findings else 0)


@_command("explain")
@click.argument("variant")
@click.option("--arch", metavar="TARGET", help="For what.  [default: sm_90]")
@click.option("--numerics", is_flag=True, help="Instead, in which order it adds and where it rounds.")
@_specs_option
@_out_option
def explain(variant: str, arch: str | None, numerics: bool, specs: Path, out: Path) -> Report:
    """Say what limits VARIANT on a target: resources, occupancy, arithmetic intensity, roofline. Needs no GPU."""
    if numerics and arch:
        raise click.UsageError("--numerics are the same for every --arch")
    from kernelgen.core.targets import PRIMARY
    from kernelgen.emit import build as pipeline

    pipeline.find(pipeline.package(specs), variant)
    pipeline.require_current(specs, out, variant, _cores())
    if numerics:
        from kernelgen.prove.numerics import receipts

        told = receipts.explain(out, specs, variant)
        return Report(told.as_json(), told.lines())
    from kernelgen.compiled.explain import explain as answer

    explanation = answer(specs, out, variant, arch or PRIMARY)
    return Report(explanation.as_json(), explanation.lines())


@_command("doctor")
@_specs_option
@_out_option
def doctor(specs: Path, out: Path) -> Report:
    """Say what of this environment works: packages, GPU, interpreter, compiler, specs, and whether generated/ is current.

    Exit code 1 if something is to be mended.
    """
    from kernelgen import doctor as examination

    checks = examination.examine(specs, out, _cores())
    faults = any(check.status == "fault" for check in checks)
    lines = _table(examination.rows(checks))
    return Report(examination.as_json(checks), lines, exit_code=1 if faults else 0)


@_command("schema")
@click.option("--check", is_flag=True, help="Compare with kernelgen.schema.json beside the specs.")
@_specs_option
def schema(check: bool, specs: Path) -> Report:
    """Print the JSON Schema of a spec, for editors."""
    from kernelgen.spec.schema import check_schema, json_schema

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
        name = option.replace("-", "_")
        if name in case:
            raise click.UsageError(f"--{option} is given twice")
        case[name] = value
    return family, case


def _options(values: Mapping[str, object]) -> str:
    return ", ".join(f"--{name} {value}" for name, value in values.items())


def _cores() -> int:
    affinity = getattr(os, "sched_getaffinity", None)  # Linux; knows of containers and taskset
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def _table(rows: Iterable[Sequence[str]], head: Sequence[str] = ()) -> list[str]:
    return table(list(rows), head, terminal_width())
