"""``kernelgen tune``. Imports no torch before it runs."""

from __future__ import annotations

import itertools
import math
import os
import re
import time
from pathlib import Path
from typing import Any, Callable, Iterable, NamedTuple

import click

from kernelgen.command import Report, command
from kernelgen.diagnostics import failure
from kernelgen.measure import layers, workloads
from kernelgen.measure.command import Numbers, ParamType, Words, chosen_models
from kernelgen.measure.tune.family import Family
from kernelgen.measure.tune.jobs import Device
from kernelgen.measure.tune.known import FAMILIES
from kernelgen.measure.workloads import Selection, Site
from kernelgen.names import TUNED

_MOE_SITES: tuple[Site, ...] = ("w13", "w2")
_LORA_MODELS = ("llama-3-8b",)
_RANKS = (16, 32, 64, 128)
_TOKENS = tuple(1 << i for i in range(13))  # what a choice is looked up by: all others go to the next of them
_UNITS = {"": 1.0, "s": 1.0, "m": 60.0, "h": 3600.0}
_STATUS_SECONDS = 15.0


class Duration(ParamType):
    """Seconds, from a text such as 90s, 5m or 1h."""

    name = "TIME"

    def convert(self, value: Any, param: Any, ctx: Any) -> float:
        if not isinstance(value, str):
            return float(value)
        match = re.fullmatch(r"(\d+(?:\.\d*)?)([smh]?)", value.strip())
        if match is None or float(match[1]) <= 0:
            self.fail(f"{value!r}: wanted a time such as 90s, 5m or 1h", param, ctx)
        return float(match[1]) * _UNITS[match[2]]


class Devices(ParamType):
    """Numbers of GPUs."""

    name = "N,N,..."

    def convert(self, value: Any, param: Any, ctx: Any) -> tuple[int, ...]:
        if not isinstance(value, str):
            return tuple(value)
        if not re.fullmatch(r"\d+(,\d+)*", value):
            self.fail(f"{value!r}: wanted numbers of GPUs with commas between them", param, ctx)
        return tuple(dict.fromkeys(map(int, value.split(","))))


@command("tune")
@click.option(
    "--family",
    type=click.Choice(tuple(FAMILIES)),
    default="moe_lora",
    show_default=True,
    help="Whose tiles; of the two products of dense LoRA either is timed with the other.",
)
@click.option(
    "--models",
    type=Words((*workloads.MODELS, *layers.MODELS)),
    help="Model shapes; four large ones, or llama-3-8b, unless told.",
)
@click.option(
    "--model-config",
    type=click.Path(path_type=Path),
    help="An MoE model's config.json, in place of --models.",
)
@click.option(
    "--tp", type=click.IntRange(1), default=1, help="With --model-config: tensor-parallel ranks."
)
@click.option(
    "--sites",
    type=Words((*_MOE_SITES, *layers.SITES)),
    help="w13, w2; of dense LoRA qkv, o, gate_up, down.  [default: all]",
)
@click.option(
    "--ranks", type=Numbers(), default=_RANKS, help="LoRA ranks; 16,32,64,128 unless told."
)
@click.option(
    "--tokens",
    type=Numbers(),
    default=_TOKENS,
    help="Tokens of a batch; 1,2,4,...,4096 unless told.",
)
@click.option(
    "--slots",
    type=click.IntRange(1),
    default=4,
    show_default=True,
    help="Adapters in the weights, all used.",
)
@click.option("--add/--set", "add", default=True, help="Add to out, or overwrite it.")
@click.option(
    "--quant",
    type=Words(workloads.QUANTS),
    default=("none",),
    help="FP8 weights with a scale a tensor, channel or group; none: 16 bits.",
)
@click.option(
    "--act",
    type=Words(workloads.ACTS),
    default=("none",),
    help="FP8 activations with a scale a tensor, token or group; none: 16 bits.",
)
@click.option(
    "--budget", type=Duration(), help="Stop after that, such as 5m, with the best so far."
)
@click.option(
    "--workers",
    type=click.IntRange(1),
    help="Processes that compile.  [default: the cores that are left]",
)
@click.option("--devices", type=Devices(), help="GPUs to measure on.  [default: all]")
@click.option(
    "--specs",
    type=click.Path(path_type=Path),
    help="Folder of the specs.  [default: ./specs, else those that come with kernelgen]",
)
@click.option(
    "--out",
    type=click.Path(path_type=Path, dir_okay=False),
    help="The tuned file.  [default: tuned/DEVICE/FAMILY.yaml in the specs]",
)
@click.option(
    "--package",
    type=click.Path(path_type=Path),
    default=Path("generated"),
    help="The generated package.",
)
def tune(
    family: str, specs: Path | None, out: Path | None, budget: float | None, workers: int | None,
    devices: tuple[int, ...] | None, package: Path, **workload: Any,
) -> Report:
    """Search the tiles of a family on the GPUs of this machine and write the best for kernelgen build.

    Every measurement is kept beside --out, so that the same command goes on where an earlier one stopped; problems
    of --out that are not searched now stay as they are. Only results that agree with the formula in fp64 can win.
    """  # fmt: skip
    from kernelgen.locate import find_specs

    cells = (_moe_cells if family == "moe_lora" else _lora_cells)(_Workload(**workload))
    return _tune(FAMILIES[family], cells, specs or find_specs(), out, package, budget, workers, devices)


class _Workload(NamedTuple):
    """What the options say; None: all that the family has."""

    models: tuple[str, ...] | None
    model_config: Path | None
    tp: int
    sites: tuple[Any, ...] | None
    ranks: tuple[int, ...]
    tokens: tuple[int, ...]
    slots: int
    add: bool
    quant: tuple[Any, ...]
    act: tuple[Any, ...]


def _moe_cells(w: _Workload) -> list[Any]:
    _check(w, workloads.MODELS, _MOE_SITES)
    selection = Selection(
        models=chosen_models(w.models, w.model_config, w.tp, workloads.DEFAULT_MODELS),
        sites=w.sites or _MOE_SITES,
        ranks=w.ranks,
        tokens=w.tokens,
        adapters=((w.slots, w.slots),),
        adds=(w.add,),
        quants=tuple(itertools.product(w.quant, w.act)),
    )
    return list(selection.cells())


def _lora_cells(w: _Workload) -> list[Any]:
    if w.model_config is not None or w.tp != 1 or not w.add or w.act != ("none",):
        raise failure("KG070", "workload", "--model-config, --tp, --set and --act are for moe_lora")
    _check(w, layers.MODELS, layers.SITES)
    found: list[Any] = []
    for scales in w.quant:
        sizes = (w.models or _LORA_MODELS, w.sites or layers.SITES, w.ranks, w.tokens, ((w.slots, w.slots),))
        found += layers.cells(*sizes, None if scales == "none" else scales)
    return found


def _check(w: _Workload, models: Iterable[str], sites: Iterable[str]) -> None:
    """Raise Failure for what this family has not, or what no choice is looked up by."""
    for label, words, known in (("models", w.models, models), ("sites", w.sites, sites)):
        if other := [word for word in words or () if word not in known]:
            raise failure("KG070", "workload", f"--{label} {other[0]}: this family has {', '.join(known)}")
    if odd := [count for count in w.tokens if count not in _TOKENS]:
        raise failure("KG070", "workload", f"--tokens {odd[0]}: choices are looked up by powers of two up to {_TOKENS[-1]}")


def _tune(
    family: Family,
    cells: list[Any],
    specs: Path,
    out: Path | None,
    package: Path,
    budget: float | None,
    workers: int | None,
    devices: tuple[int, ...] | None,
) -> Report:
    started = time.monotonic()
    import torch

    from kernelgen.measure.tune import space, tuned_file
    from kernelgen.measure.tune.crew import Processes
    from kernelgen.measure.tune.gauge import gauge
    from kernelgen.measure.tune.kernels import Kernels, compiler
    from kernelgen.measure.tune.state import State
    from kernelgen.measure.tune.tuner import Tuner

    count = torch.cuda.device_count()
    chosen = devices if devices is not None else tuple(range(count))
    if not chosen or max(chosen) >= count:
        wanted = f"there are {count} GPUs here, and tune measures on one at least"
        raise failure("KG061", "cuda", wanted, "" if devices is None else "choose others with --devices")
    crews: list[Processes] = []
    try:
        searched = space.read(specs / f"{family.name}.yaml", family.name)
        gauges = Processes(gauge, (family.name, package), [_visible(number) for number in chosen])
        crews.append(gauges)
        left = max(1, _cores() - len(chosen) - 1)
        hidden = [{"CUDA_VISIBLE_DEVICES": ""}] * (workers or left)
        crews.append(Processes(compiler, (family.name, package), hidden, background=True))
        hello, *others = gauges.started()
        if any(other.device != hello.device for other in others):
            raise failure("KG061", "cuda", "the GPUs differ", "choose those of one kind with --devices")
        device: Device = hello.device
        out = out or specs / TUNED / device.label / f"{family.name}.yaml"
        known, earlier = tuned_file.read(out, searched)
        if known not in (None, device.name):
            message = f"it holds times of {known}, this is {device.name}"
            raise failure("KG072", str(out), message, "name another --out")
        state = State(
            out.with_suffix(".state.jsonl"), searched, {"device": device.name, **hello.versions}
        )
        tuner = Tuner(
            family,
            cells,
            searched,
            Kernels(family.name, package, device.target),
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
        complete = tuner.run()
    finally:
        for crew in crews:
            crew.stop()
    status, losses = tuner.status(), tuner.losses()
    document = {
        "out": str(out),
        "device": device.name,
        "versions": hello.versions,
        "complete": complete,
        "seconds": round(time.monotonic() - started, 1),
        **status._asdict(),
        "rule": [loss._asdict() for loss in losses],
    }
    lines = [
        f"{out}: {status.timed} of {status.problems} problems; {status.measured} timings and "
        f"{status.compiled} kernels in {time.monotonic() - started:.0f} s"
    ]
    if losses:
        ratios = [loss.rule_us / loss.best_us for loss in losses]
        mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
        lines.append(
            f"the rule for what is not tuned takes {mean:.3f} times as long as the best in the geometric mean, "
            f"{max(ratios):.2f} times at worst"
        )
    if not complete:
        click.echo("out of time: run the same command again to go on", err=True)
    return Report(document, lines, exit_code=0 if status.timed == status.problems else 1)


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
        if now - last >= _STATUS_SECONDS:
            last = now
            click.echo(
                f"{now - started:.0f} s: {status.timed} of {status.problems} problems timed, {status.finished} finished; "
                f"{status.measured} timings; {status.compiled} kernels compiled, {status.dropped} of them dropped, "
                f"{status.waiting} to go",
                err=True,
            )

    return report
