"""``kernelgen bench-lora``. Imports torch only when it runs."""

from __future__ import annotations

from typing import Any

import click

from kernelgen.command import Report, command
from kernelgen.diagnostics import failure
from kernelgen.measure import document as documents
from kernelgen.measure import layers, session
from kernelgen.measure.command import Numbers, Words

_MODELS = tuple(layers.MODELS)


@command("bench-lora")
@click.option("--models", type=Words(_MODELS), default=_MODELS[:1], help="Model shapes.")
@click.option("--sites", type=Words(layers.SITES), default=layers.SITES, help="qkv, o, gate_up, down.")
@click.option("--ranks", type=Numbers(), default=layers.DEFAULT_RANKS, help="LoRA ranks.")
@click.option("--tokens", type=Numbers(), default=layers.DEFAULT_TOKENS, help="Tokens of a batch.")
@click.option("--active", type=Numbers(), default=(4, 1), help="Adapters that the batch uses.")
@click.option("--slots", type=click.IntRange(1), default=4, help="Adapters in the weights.")
@click.option("--scales", type=click.Choice(["tensor", "channel", "group"]), help="FP8 weights with a scale each.")
@click.option("--against", type=Words(("vllm", "torch")), default=(), help="Peers to time in the same run.")
@session.package_option
@session.out_option
@session.retry_option
@session.seconds_option
@session.check_only_option
def bench_lora(**options: Any) -> Report:
    """Time dense LoRA (route made beforehand) on this GPU, next to a floor and to the peers.

    Every result is compared with the formula in fp64 before it is timed. The exit code is 1 if one was wrong or failed.
    """
    if max(options["active"]) > options["slots"]:
        message = f"{max(options['active'])} active adapters do not fit {options['slots']} slots"
        raise failure("KG070", "workload", message)
    device = session.find_device(options["check_only"])
    from kernelgen.measure import dense, environment

    adapters = [(active, options["slots"]) for active in options["active"]]
    sizes = (options["models"], options["sites"], options["ranks"], options["tokens"])
    cells = list(layers.cells(*sizes, adapters, options["scales"]))
    names = ["kernelgen", *options["against"]]
    implementations = [dense.load(name, options["package"]) for name in names]
    machine, versions = environment.machine(device), environment.versions(implementations)
    document = documents.resume(options["out"], machine, versions, dense.COLUMNS)
    if options["retry"]:
        document.forget(lambda row: row["failed"] is not None)
    workload = dense.Dense(device, 1 if options["check_only"] else None)
    with session.progress() as shown:
        complete = session.measure(shown, workload, cells, implementations, document, options)
    rows = document.of(cells, names)
    return session.finish(document, rows, complete, map(_line, rows))


def _line(row: dict[str, Any]) -> str:
    cell = f"{row['model']} {row['site']} r{row['rank']} T={row['tokens']} {row['active']}/{row['slots']}"
    kind = f" FP8 a {row['scales']}" if row["scales"] else ""
    if row["failed"]:
        return f"{cell}{kind}: {row['impl']} failed: {row['failed']}"
    times = "checked" if row["us"] is None else f"{row['us']:.2f} us, floor {row['floor_us']:.2f}, host {row['host_us']:.1f} us"
    error = "" if row["error"] is None else f", error {row['error']:.1e}"
    return f"{cell}{kind}: {row['impl']} {times}{error}"
