"""The demo: serve a mixed batch, and show that it equals PEFT."""

from __future__ import annotations

import importlib
import os
import tempfile
import time
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Sequence

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from kernelgen.core.command import Strict
from kernelgen.core.diagnostics import failure

if TYPE_CHECKING:
    from .compare import Result
    from .models import AdapterSpec

# (slot of the adapter, prompt length), -1: the bare model. Neighbours differ, so that no block of tokens has one adapter.
_REQUESTS = ((0, 9), (-1, 14), (1, 12), (2, 7), (0, 16), (-1, 5), (2, 11), (1, 8))
_NEW_TOKENS = 3

_LEGEND = """\
layer: worst element of an MoE layer's output, |ours - PEFT in float64| / bound
effect: the most that the adapter moves a logit
error: worst |logit - PEFT in float64|
allowed: twice the error of PEFT in the dtype that is served
top: tokens with PEFT's likeliest successor; ties: another, within that error
"""


@click.command(cls=Strict)
@click.option(
    "--model",
    "model_name",
    type=click.Choice(["qwen3_moe", "mixtral"]),
    default="qwen3_moe",
    show_default=True,
)
@click.option(
    "--dtype",
    "dtype_name",
    type=click.Choice(["bfloat16", "float16"]),
    default="bfloat16",
    show_default=True,
)
@click.option(
    "--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True
)
@click.option(
    "--package", default="generated", show_default=True, help="The generated package to serve with."
)
@click.option("--seed", type=click.IntRange(0, 2**63 - 1), default=0, show_default=True)
def main(model_name: str, dtype_name: str, device: str, package: str, seed: int) -> int:
    """Make a small mixture-of-experts model and three LoRA adapters, serve a batch that mixes them, and compare with PEFT.

    Exit code 0: everything agrees; 1: something does not.
    """
    warnings.filterwarnings("ignore", category=FutureWarning)
    os.environ["HF_HUB_OFFLINE"] = "1"
    import torch

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        _interpret()
        torch.set_num_threads(1)
    else:
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
        torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
    try:
        kernels = importlib.import_module(package)
        kernels.moe_lora  # noqa: B018
    except (ImportError, AttributeError, ValueError, TypeError) as error:
        raise failure("KG001", package, f"no generated package: {error}", "run kernelgen build") from error

    from kernelgen.integrations.peft import read_adapter, stack_adapters
    from kernelgen.integrations.transformers import MoeLora, expert_shape

    from . import models
    from .compare import Comparison
    from .serve import Request, serve

    dtype = getattr(torch, dtype_name)
    started = time.monotonic()
    slots = sorted({slot for slot, _ in _REQUESTS})
    work = len(models.ADAPTERS) + 1 + _NEW_TOKENS + len(_REQUESTS) + len(slots) + 1
    with _progress() as progress, tempfile.TemporaryDirectory() as scratch:
        bar = progress.add_task("", total=work)

        def done() -> None:
            progress.advance(bar)

        torch.manual_seed(seed)
        progress.update(bar, description="PEFT saves the adapters")
        original = models.MODELS[model_name]()
        folders = []
        for spec in models.ADAPTERS:
            folders.append(models.save_adapter(original, spec, Path(scratch)))
            done()
        model = original.to(device, dtype)

        progress.update(bar, description="reading them back, serving the batch")
        shape = expert_shape(model)
        adapters = [read_adapter(folder, shape) for folder in folders]
        server = MoeLora(
            model, stack_adapters(adapters, shape, dtype=dtype, device=device), kernels
        )
        requests = [
            Request(slot, torch.randint(models.VOCABULARY, (length,))) for slot, length in _REQUESTS
        ]
        served, steps = serve(model, server, requests, _NEW_TOKENS, done)

        progress.update(bar, description="PEFT, one sequence at a time")
        comparison = Comparison(model, adapters, folders)
        results = [comparison.compare(slot, served, steps, done) for slot in slots]
        untouched = comparison.untouched(server, steps)
        done()

    console = Console()
    how = "Triton's interpreter" if device == "cpu" else torch.cuda.get_device_name()
    console.print(f"{model_name}, {dtype_name}, {how}: {len(served)} requests served as one batch")
    console.print(_table(results, models.ADAPTERS))
    console.print(f"\n{_LEGEND}", style="dim", highlight=False)
    bits = "bit for bit" if untouched else "[bold red]NOT[/] bit for bit"
    console.print(
        f"Tokens without an adapter leave the MoE layers {bits} as in a batch without adapters."
    )
    agrees = untouched and all(r.agrees for r in results)
    console.print(
        f"{'Agrees' if agrees else 'Does not agree'}, after {time.monotonic() - started:.0f} s."
    )
    return 0 if agrees else 1


def _table(results: Sequence[Result], specs: Sequence[AdapterSpec]) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 1))
    table.add_column("adapter", no_wrap=True)
    for column in ("tokens", "layer", "effect", "error", "allowed", "top", "agrees"):
        table.add_column(column, justify="right", no_wrap=True)
    for r in results:
        spec = specs[r.adapter] if r.adapter >= 0 else None
        name = f"{spec.name} r{spec.rank}{' rsLoRA' if spec.rslora else ''}" if spec else "none"
        top = f"{r.top} + {r.ties} ties" if r.ties else str(r.top)
        figures = (
            f"{r.layer:.3f}",
            f"{r.effect:.2g}" if spec else "",
            f"{r.error:.2g}",
            f"{r.allowed:.2g}",
            top,
        )
        table.add_row(name, str(r.tokens), *figures, "yes" if r.agrees else "[bold red]NO[/]")
    return table


def _interpret() -> None:
    """Run kernels on CPU tensors; to be called before anything imports triton."""
    os.environ["TRITON_INTERPRET"] = "1"
    from kernelgen.prove import interpreter

    interpreter.install()


def _progress() -> Progress:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    return Progress(*columns, console=Console(stderr=True), transient=True)
