"""``kernelgen bench``. Imports torch only when it runs."""

from __future__ import annotations

import functools
import io
import itertools
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Sequence

import click

from kernelgen.command import Report, command
from kernelgen.diagnostics import failure
from kernelgen.measure import document as documents
from kernelgen.measure import session, workloads
from kernelgen.measure.workloads import Cell, Model, Selection, Site

PEERS = ("vllm", "sglang", "torch")
_PIPED_WIDTH = 180
SCHEDULES = ("one_shot", "small_batch", "two_kernel")


if TYPE_CHECKING:
    ParamType = click.ParamType[Any]
else:
    ParamType = click.ParamType  # generic in some versions only


class Numbers(ParamType):
    """Integers with commas between them."""

    name = "N,N,..."

    def convert(self, value: Any, param: Any, ctx: Any) -> tuple[int, ...]:
        if not isinstance(value, str):
            return tuple(value)
        try:
            numbers = tuple(int(part) for part in value.split(","))
        except ValueError:
            self.fail(f"{value!r}: wanted whole numbers with commas between them", param, ctx)
        if min(numbers) < 1:
            self.fail(f"{value!r}: each is at least 1", param, ctx)
        return numbers


class Words(ParamType):
    """Words out of a list, with commas between them."""

    name = "A,B,..."

    def __init__(self, known: Sequence[str]) -> None:
        self.known = known

    def convert(self, value: Any, param: Any, ctx: Any) -> tuple[str, ...]:
        if not isinstance(value, str):
            return tuple(value)
        words = tuple(word.strip() for word in value.split(","))
        for word in words:
            if word not in self.known:
                self.fail(f"{word!r} is none of {', '.join(self.known)}", param, ctx)
        return words


@command("bench")
@click.option(
    "--models",
    type=Words(tuple(workloads.MODELS)),
    help="Model shapes; four large ones unless told.",
)
@click.option(
    "--model-config",
    type=click.Path(path_type=Path),
    help="A model's config.json, in place of --models.",
)
@click.option(
    "--tp", type=click.IntRange(1), default=1, help="With --model-config: tensor-parallel ranks."
)
@click.option(
    "--sites",
    type=Words(workloads.SITES),
    default=workloads.DEFAULT_SITES,
    help="w13, w2, route, layer.",
)
@click.option("--ranks", type=Numbers(), help="LoRA ranks, such as 16,64,128.")
@click.option("--tokens", type=Numbers(), help="Tokens of a batch, such as 1,64,4096.")
@click.option("--active", type=Numbers(), default=(4,), help="Adapters that the batch uses.")
@click.option(
    "--slots",
    type=Numbers(),
    help="Adapters in the weights, one number for each --active; the same unless told.",
)
@click.option(
    "--base",
    type=click.FloatRange(0, 1, max_open=True),
    default=0.0,
    help="Share of tokens without an adapter.",
)
@click.option(
    "--routing", type=Words(workloads.ROUTINGS), default=("uniform",), help="uniform, skewed."
)
@click.option(
    "--add/--set", "add", default=None, help="Add to out, or overwrite it; both unless told."
)
@click.option(
    "--dtype",
    type=click.Choice(["bf16", "f16"]),
    default="bf16",
    help="Of activations and weights.",
)
@click.option(
    "--quant",
    type=Words(workloads.QUANTS),
    default=("none",),
    help="FP8 weights with a scale a tensor, channel or group; none: of --dtype.",
)
@click.option(
    "--act",
    type=Words(workloads.ACTS),
    default=("none",),
    help="FP8 activations with a scale a tensor, token or group; none: of --dtype.",
)
@click.option("--quick", is_flag=True, help="Two models, two ranks, four batch sizes.")
@click.option(
    "--against",
    type=Words(PEERS),
    default=(),
    help="Peers to time in the same run: vllm, sglang, torch.",
)
@click.option(
    "--schedules", type=Words(SCHEDULES), default=(), help="Time these schedules too, each forced."
)
@click.option("--no-ours", is_flag=True, help="Time the peers alone.")
@session.package_option
@session.out_option
@click.option(
    "--again",
    type=Words(("kernelgen", *(f"kernelgen:{s}" for s in SCHEDULES), *PEERS)),
    default=(),
    help="Measure the chosen cells again for these, though --out holds them.",
)
@session.retry_option
@session.seconds_option
@click.option(
    "--workers",
    type=click.IntRange(0),
    default=0,
    help="Processes that compile before anything is timed.",
)
@click.option("--compile-only", is_flag=True, help="Stop once everything is compiled.")
@session.check_only_option
def bench(
    add: bool | None, against: tuple[str, ...], schedules: tuple[str, ...], **options: Any
) -> Report:
    """Time MoE-LoRA kernels on this GPU, next to a floor and to the peers.

    Every result is compared with the formula in fp64 before it is timed. The exit code is 1 if one was wrong or failed.
    """
    cells = select(add=add, **options)
    names = [] if options["no_ours"] else ["kernelgen"]
    names += [f"kernelgen:{schedule}" for schedule in schedules]
    names += against
    if not names:
        message = "--no-ours leaves nothing to time"
        raise failure("KG070", "workload", message, "name peers with --against, or schedules with --schedules")
    return _bench(cells, names, options)


def select(
    *,
    models: tuple[str, ...] | None,
    model_config: Path | None,
    tp: int,
    sites: tuple[Site, ...],
    ranks: tuple[int, ...] | None,
    tokens: tuple[int, ...] | None,
    active: tuple[int, ...],
    slots: tuple[int, ...] | None,
    base: float,
    routing: tuple[workloads.Routing, ...],
    add: bool | None,
    dtype: Any,
    quant: tuple[workloads.Quant, ...],
    act: tuple[workloads.Act, ...],
    quick: bool,
    **_: Any,
) -> list[Cell]:
    """The cells that the options ask for.

    Raises:
        Failure: options that do not go together.
    """
    default = workloads.QUICK_MODELS if quick else workloads.DEFAULT_MODELS
    chosen = chosen_models(models, model_config, tp, default)
    slots = slots or active
    if len(slots) == 1:
        slots = slots * len(active)
    if len(slots) != len(active):
        raise failure("KG070", "workload", "--slots wants one number, or one for each of --active")
    selection = Selection(
        models=chosen,
        sites=sites,
        ranks=ranks or (workloads.QUICK_RANKS if quick else workloads.DEFAULT_RANKS),
        tokens=tokens or (workloads.QUICK_TOKENS if quick else workloads.DEFAULT_TOKENS),
        adapters=tuple(zip(active, slots, strict=True)),
        bases=(base,),
        routings=routing,
        adds=(True, False) if add is None else (add,),
        dtype=dtype,
        quants=tuple(itertools.product(quant, act)),
    )
    return list(selection.cells())


def chosen_models(
    models: tuple[str, ...] | None, model_config: Path | None, tp: int, default: Sequence[str]
) -> list[Model]:
    """What --models, --model-config and --tp stand for.

    Raises:
        Failure: they do not go together, or the config is not one of a mixture of experts.
    """
    if model_config is not None:
        if models is not None:
            raise failure("KG070", "workload", "--models and --model-config exclude each other")
        return [workloads.model_from_config(model_config, tp)]
    if tp != 1:
        raise failure("KG070", "workload", "--tp goes with --model-config")
    return [workloads.MODELS[name] for name in models or default]


def _bench(cells: Sequence[Cell], names: Sequence[str], options: dict[str, Any]) -> Report:
    from rich.console import Console

    device = session.find_device(options["check_only"])
    from kernelgen.measure import environment, moe_lora, registry, table

    load = functools.partial(registry.load, package=options["package"])
    implementations = [load(name) for name in names]
    machine, versions = environment.machine(device), environment.versions(implementations)
    document = documents.resume(options["out"], machine, versions)
    if options["retry"]:
        document.forget(lambda row: row["failed"] is not None)
    again = {document.key(row) for row in document.of(cells, options["again"])}
    document.forget(lambda row: document.key(row) in again)

    def release() -> None:
        for implementation in implementations:
            implementation.release()

    with session.progress() as shown:
        if device.type == "cuda" and (options["workers"] or options["compile_only"]):
            from kernelgen.measure.warmup import compile_all

            todo = [(c, n) for n in names for c in cells if not document.has(c, n)]
            task = shown.add_task("compiling", total=len(todo))
            compile_all(todo, load, max(1, options["workers"]), lambda: shown.advance(task))
        if options["compile_only"]:
            return Report(document.as_json())
        workload = moe_lora.MoeLora(device, release, 1 if options["check_only"] else None)
        complete = session.measure(shown, workload, cells, implementations, document, options)
    rows = document.of(cells, names)
    peers = [name for name in names if name in PEERS]
    console = Console(file=io.StringIO(), width=None if sys.stdout.isatty() else _PIPED_WIDTH)
    with console.capture() as printed:
        console.print(table.results(rows, peers))
        table.summary(console, rows, peers)
    return session.finish(document, rows, complete, [printed.get().rstrip("\n")])
