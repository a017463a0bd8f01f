"""``kernelgen tune FAMILY``: one command a family that has tunables, of the axes of the suite that calls it. Imports torch only
when one runs.
"""

from __future__ import annotations

import functools
import inspect
import math
import os
import re
import time
from pathlib import Path
from typing import Any, Callable, Mapping, Sequence

import click

from kernelgen.core.command import Report, command
from kernelgen.core.diagnostics import failure
from kernelgen.core.locate import find_specs
from kernelgen.core.names import TUNED
from kernelgen.core.progress import is_wanted
from kernelgen.emit.rooms import in_rooms, rooms_with, serve
from kernelgen.measure import suites
from kernelgen.measure.command import option_of, package_option, say_meant, specs_of, specs_option
from kernelgen.measure.options import Duration, Kind
from kernelgen.measure.suite import Cell, Suite, misfit
from kernelgen.measure.tune import hints, space

_TOKENS = tuple(1 << i for i in range(13))  # what a choice is looked up by: all others go to the next of them
_STATUS_SECONDS = 15.0
_SPECS = "kernelgen.specs"  # of a command line
_USUAL = "moe_lora"  # what was tuned where no family was named


class Devices(Kind):
    """Numbers of GPUs."""

    name = "N,N,..."

    def convert(self, value: Any, param: Any, ctx: Any) -> tuple[int, ...]:
        if not isinstance(value, str):
            return tuple(value)
        if not re.fullmatch(r"\d{1,4}(,\d{1,4})*", value):
            self.fail(f"{value!r}: wanted numbers of GPUs with commas between them", param, ctx)
        return tuple(dict.fromkeys(map(int, value.split(","))))


def families() -> list[str]:
    """Those whose rooms say how their tiles are searched."""
    return rooms_with("tune")


class _Families(click.Group):
    """A command a family; as an option, a family is still understood."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return families()

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in families():
            _require_room(cmd_name, ctx.meta[_SPECS])
            return None
        return of_family(cmd_name)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        ctx.meta[_SPECS] = specs_of(args)
        serve(ctx.meta[_SPECS])
        if args and args[0].startswith("-") and args[0] not in ("-h", "--help"):
            at = args.index("--family") if "--family" in args[:-1] else None
            family = _USUAL if at is None else args[at + 1]
            say_meant(f"kernelgen tune {family}", args)
            args = [family, *(args if at is None else args[:at] + args[at + 2 :])]
        return super().parse_args(ctx, args)


@click.group("tune", cls=_Families)
def tune() -> None:
    """Search the tiles of a family on the GPUs of this machine and write the best for kernelgen build.

    Every measurement is kept beside --out, so that the same command goes on where an earlier one stopped; problems
    of --out that are not searched now stay as they are. Only results that agree with the formula in fp64 can win.
    """


def of_family(family: str) -> click.Command:
    """``kernelgen tune FAMILY``."""
    tuning = hints.of(family)
    suite, usual = suites.find(tuning.suite), tuning.axes
    axes = [axis for axis in suite.axes if axis.name != "routing"]  # tiles serve all

    def run(**options: Any) -> Report:
        return _tune(suite, family, options)

    run.__doc__ = f"Search the tiles of {family}, in calls of the suite {suite.name}.\n\n{inspect.cleandoc(tune.help or '')}"
    spanned = [axis.usually(usual.get(axis.name, _TOKENS if axis.name == "tokens" else None)) for axis in axes]
    for option in reversed([*map(option_of, spanned), *_options()]):
        run = option(run)
    return command(family)(run)


def _require_room(family: str, specs: Path) -> None:
    """Say of a family what its room lacks to be tuned; of a word that is none, nothing.

    Raises:
        Failure: it has tunables and no tune.py (KG062), or nothing to tune (KG070).
    """
    spec = specs / f"{family}.yaml"
    if spec.name in {known.name for known in specs.glob("*.yaml")}:
        space.read(spec, family)
        hints.of(family)


def _options() -> list[Callable[[Any], Any]]:
    return [
        click.option("--budget", type=Duration(), help="Stop after that, such as 5m, with the best so far."),
        click.option("--workers", type=click.IntRange(1), help="Processes that compile.  [default: the cores that are left]"),
        click.option("--devices", type=Devices(), help="GPUs to measure on.  [default: all]"),
        specs_option,
        click.option(
            "--out",
            type=click.Path(path_type=Path, dir_okay=False),
            help="The tuned file.  [default: tuned/DEVICE/FAMILY.yaml in the specs]",
        ),
        package_option,
    ]


def cells_of(suite: Suite, family: str, options: Mapping[str, Any]) -> list[Cell]:
    """The cells in whose calls problems of ``family`` are timed.

    Raises:
        Failure: options that do not go together, or tokens that no choice is looked up by.
    """
    told = {name: value for name, value in options.items() if value is not None}
    cells = suite.cells({"tokens": _TOKENS, **hints.of(family).axes, **told})
    odd = [cell.tokens for cell in cells if cell.tokens not in _TOKENS]
    if odd:
        raise misfit(f"--tokens {odd[0]}: choices are looked up by powers of two up to {_TOKENS[-1]}")
    if not cells:
        raise misfit("the options leave no cell")
    return cells


def _tune(suite: Suite, family: str, options: dict[str, Any]) -> Report:
    started = time.monotonic()
    cells = cells_of(suite, family, options)
    import torch

    from kernelgen.measure.tune import tuned_file
    from kernelgen.measure.tune.crew import Processes
    from kernelgen.measure.tune.gauge import gauge
    from kernelgen.measure.tune.kernels import Kernels, compiler
    from kernelgen.measure.tune.state import State
    from kernelgen.measure.tune.tuner import Tuner

    count, devices, budget = torch.cuda.device_count(), options["devices"], options["budget"]
    chosen = devices if devices is not None else tuple(range(count))
    if not chosen or max(chosen) >= count:
        wanted = f"there are {count} GPUs here, and tune measures on one at least"
        raise failure("KG061", "cuda", wanted, "" if devices is None else "choose others with --devices")
    specs, what = options["specs"] or find_specs(), (suite.name, family, options["package"])
    crews: list[Processes] = []
    try:
        searched = space.read(specs / f"{family}.yaml", family)
        gauges = Processes(functools.partial(in_rooms, specs, gauge), what, [_visible(number) for number in chosen])
        crews.append(gauges)
        hidden = [{"CUDA_VISIBLE_DEVICES": ""}] * (options["workers"] or max(1, _cores() - len(chosen) - 1))
        crews.append(Processes(functools.partial(in_rooms, specs, compiler), what, hidden, background=True))
        hello, *others = gauges.started()
        if any(other.device != hello.device for other in others):
            raise failure("KG061", "cuda", "the GPUs differ", "choose those of one kind with --devices")
        device = hello.device
        out = options["out"] or specs / TUNED / device.label / f"{family}.yaml"
        known, earlier = tuned_file.read(out, searched)
        if known not in (None, device.name):
            message = f"it holds times of {known}, this is {device.name}"
            raise failure("KG072", str(out), message, "name another --out")
        state = State(out.with_suffix(".state.jsonl"), searched, {"device": device.name, **hello.versions})
        tuner = Tuner(
            hints.of(family).hints,
            cells,
            searched,
            Kernels(*what, device.target),
            device.target,
            compilers=crews[1],
            gauges=gauges,
            state=state,
            earlier=earlier,
            save=lambda entries: tuned_file.write(
                out, tuned_file.text(family, device, hello.versions, entries, searched)
            ),
            budget=None if budget is None else budget - (time.monotonic() - started),
            on_status=_reporter(started),
        )
        if not tuner.tasks:
            raise misfit(f"no call of these cells looks up tiles of {family}", "see the excludes of the spec")
        complete = tuner.run()
    finally:
        for crew in crews:
            crew.stop()
    status, losses, seconds = tuner.status(), tuner.losses(), time.monotonic() - started
    document = {
        "out": str(out),
        "device": device.name,
        "versions": hello.versions,
        "complete": complete,
        "seconds": round(seconds, 1),
        **status._asdict(),
        "rule": [loss._asdict() for loss in losses],
    }
    if not complete:
        click.echo("out of time: run the same command again to go on", err=True)
    return Report(document, _lines(out, status, losses, seconds), exit_code=0 if status.timed == status.problems else 1)


def _lines(out: Path, status: Any, losses: Sequence[Any], seconds: float) -> list[str]:
    lines = [
        f"{out}: {status.timed} of {status.problems} problems; {status.measured} timings and "
        f"{status.compiled} kernels in {seconds:.0f} s"
    ]
    if losses:
        ratios = [loss.rule_us / loss.best_us for loss in losses]
        mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
        lines.append(
            f"the rule for what is not tuned takes {mean:.3f} times as long as the best in the geometric mean, "
            f"{max(ratios):.2f} times at worst"
        )
    return lines


def _cores() -> int:
    affinity = getattr(os, "sched_getaffinity", None)  # Linux; knows of containers and taskset
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def _visible(number: int) -> dict[str, str]:
    """The environment of a process that sees this GPU alone."""
    allowed = os.environ.get("CUDA_VISIBLE_DEVICES")
    name = allowed.split(",")[number].strip() if allowed else str(number)
    return {"CUDA_VISIBLE_DEVICES": name}


def _reporter(started: float) -> Callable[[Any], None]:
    """Says on stderr, every so often, how far the run is."""
    last = started

    def report(status: Any) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= _STATUS_SECONDS and is_wanted():
            last = now
            click.echo(
                f"{now - started:.0f} s: {status.timed} of {status.problems} problems timed, {status.finished} finished; "
                f"{status.measured} timings; {status.compiled} kernels compiled, {status.dropped} of them dropped, "
                f"{status.waiting} to go",
                err=True,
            )

    return report
