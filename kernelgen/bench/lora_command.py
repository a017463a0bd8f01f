"""``kernelgen bench-lora``. Imports torch only when it runs."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import click

from kernelgen.bench.command import Numbers, Words

# As in kernelgen.bench.dense, which needs torch.
_MODELS = ("llama-3-8b", "llama-3-70b", "llama-3-70b-tp8", "tiny")
_SITES = ("qkv", "o", "gate_up", "down")
SCHEMA_VERSION = 1


@click.command("bench-lora")
@click.option("--models", type=Words(_MODELS), default=_MODELS[:1], help="Model shapes.")
@click.option("--sites", type=Words(_SITES), default=_SITES, help="qkv, o, gate_up, down.")
@click.option("--ranks", type=Numbers(), default=(16, 64), help="LoRA ranks.")
@click.option("--tokens", type=Numbers(), default=(1, 16, 64, 256, 1024, 4096), help="Tokens of a batch.")
@click.option("--active", type=Numbers(), default=(4, 1), help="Adapters that the batch uses.")
@click.option("--slots", type=click.IntRange(1), default=4, help="Adapters in the weights.")
@click.option("--scales", type=click.Choice(["tensor", "channel", "group"]), help="FP8 weights with a scale each.")
@click.option("--against", type=Words(("vllm", "torch")), default=(), help="Peers to time in the same run.")
@click.option("--package", type=click.Path(path_type=Path), default=Path("generated"), help="The generated package.")
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), help="Result file.")
@click.option("--check-only", is_flag=True, help="Compare with fp64 and time nothing; works on the CPU, interpreted.")
@click.option("--json", "as_json", is_flag=True, help="Print the document in place of the table.")
def bench_lora(**options: Any) -> None:
    """Time dense LoRA (route made beforehand) on this GPU, next to a floor and to the peers."""
    if max(options["active"]) > options["slots"]:
        raise click.UsageError(f"{max(options['active'])} active adapters do not fit {options['slots']} slots")
    sys.exit(_bench(options))


def _bench(options: dict[str, Any]) -> int:
    try:
        import torch
    except ImportError as error:
        raise click.ClickException(f"bench-lora needs torch and triton: {error}") from error
    from kernelgen.bench import dense, environment, registry, timing
    from kernelgen.bench.implementation import Unavailable

    gpu, check_only = torch.cuda.is_available(), options["check_only"]
    if not gpu and not check_only:
        click.echo("error: there is no GPU here; --check-only with TRITON_INTERPRET=1 runs on the CPU", err=True)
        return 2
    if not gpu:
        from kernelgen import interpreter

        interpreter.install()  # bfloat16 and FP8 as on a GPU
    device = torch.device("cuda" if gpu else "cpu")
    try:
        package = registry.import_package(options["package"])
    except Unavailable as error:
        click.echo(f"error: {error}", err=True)
        return 2
    adapters = [(active, options["slots"]) for active in options["active"]]
    wanted = list(
        dense.cells(
            options["models"], options["sites"], options["ranks"], options["tokens"], adapters, options["scales"]
        )
    )
    ceilings = {} if check_only else timing.ceilings()
    rows = []
    for row in dense.sweep(
        wanted, package, options["against"], device, check_only=check_only, copy_gb_s=ceilings.get("copy_gb_s", 1e9)
    ):
        rows.append(row)
        if not options["as_json"]:
            click.echo(_line(row))
    document = {
        "schema_version": SCHEMA_VERSION,
        "machine": environment.machine(device),
        "versions": environment.versions([]),
        "ceilings": ceilings,
        "rows": rows,
    }
    text = json.dumps(document, indent=1) + "\n"
    if options["out"] is not None:
        options["out"].write_text(text, encoding="utf-8")
    if options["as_json"]:
        click.echo(text, nl=False)
    return 0


def _line(row: dict[str, Any]) -> str:
    cell = f"{row['model']} {row['site']} r{row['rank']} T={row['tokens']} {row['active']}/{row['slots']}"
    kind = f" FP8 a {row['scales']}" if row["scales"] else ""
    error = "" if row["error"] is None else f", error {row['error']:.1e}"
    times = f"{row['us']:.2f} us, floor {row['floor_us']:.2f}, host {row['host_us']:.1f} us" if "us" in row else "checked"
    return f"{cell}{kind}: {row['impl']} {times}{error}"
