"""Times of the base MoE on this GPU, as JSON: whole layers, their tables and sums, layers with adapters, and overlap.

    python benchmarks/fused_moe.py OUT.json [--seconds 60]

Replays of CUDA graphs; weights and routing take turns, so that weights come from memory, not from the cache. What does not
fit into the seconds is left out.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import time
from pathlib import Path
from typing import Any, Callable, Iterator, NamedTuple

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

import generated as kg
from kernelgen.integrations.moe_layer import MoeLayer
from kernelgen.integrations.peft import LayerBuffers, SliceBuffers
from kernelgen.measure import environment, timing

DEVICE, BF16, LORAS = "cuda", torch.bfloat16, 4
TOKENS = (1, 4, 16, 64, 256, 1024, 4096)


class Model(NamedTuple):
    """The experts of one layer."""

    name: str
    hidden: int
    inter: int
    experts: int
    top_k: int


QWEN3 = Model("Qwen3-30B-A3B", 2048, 768, 128, 8)
DEEPSEEK = Model("DeepSeek-V3", 7168, 2048, 256, 8)
# scales of weights and of activations
FORMS = {"bf16": (None, None), "w8a8 group": ("group", "group"), "w8a16 group": ("group", None)}
FORMS |= {"w8a8 channel": ("channel", "token"), "w8a16 channel": ("channel", None)}


class Weights(NamedTuple):
    """Of one layer; scales are the arguments of fused_moe."""

    w13: torch.Tensor
    w2: torch.Tensor
    scales: dict[str, torch.Tensor]


def normal(*size: int) -> torch.Tensor:
    """Weights that keep the size of activations."""
    return torch.empty(size, dtype=BF16, device=DEVICE).normal_(0, size[-1] ** -0.5)


def make_weights(model: Model, form: str) -> Weights:
    """Random weights of a layer; FP8 ones are quantised expert by expert, as the whole would not fit in fp32."""
    shapes = ((2 * model.inter, model.hidden), (model.hidden, model.inter))
    mode = FORMS[form][0]
    if mode is None:
        return Weights(*(normal(model.experts, *shape) for shape in shapes), {})
    found, scales = [], {}
    for name, shape in zip(("w13_scale", "w2_scale"), shapes, strict=True):
        codes, each = kg.quantize_weights(normal(1, *shape), mode)
        found.append(codes.view(torch.uint8).repeat(model.experts, 1, 1).view(codes.dtype))
        scales[name] = each.repeat(model.experts, *[1] * (each.dim() - 1))
    return Weights(*found, scales)


class Batch(NamedTuple):
    """What changes from call to call."""

    hidden: torch.Tensor
    topk_ids: torch.Tensor
    topk_weights: torch.Tensor
    scales: dict[str, torch.Tensor]


def make_batch(model: Model, tokens: int, form: str) -> Batch:
    """Random tokens, each with distinct experts."""
    hidden = torch.randn(tokens, model.hidden, device=DEVICE, dtype=BF16)
    ids = torch.rand(tokens, model.experts, device=DEVICE).topk(model.top_k, dim=1).indices
    weights = torch.rand(tokens, model.top_k, device=DEVICE).softmax(-1)
    scales = {}
    if FORMS[form][1] is not None:
        hidden, scales["x_scale"] = kg.quantize_activations(hidden, FORMS[form][1])
    return Batch(hidden, ids.to(torch.int32).contiguous(), weights, scales)


def batches(model: Model, tokens: int, form: str = "bf16") -> list[Batch]:
    """As many as take turns in a graph."""
    return [make_batch(model, tokens, form) for _ in range(8 if tokens <= 4 else 4)]


Calls = list[Callable[[], Any]]


def measure(named: dict[str, Calls]) -> dict[str, float]:
    """Microseconds a call, the graphs in turns."""
    graphs = {name: (timing.capture(calls), len(calls)) for name, calls in named.items()}
    warm = time.perf_counter() + 0.1
    while time.perf_counter() < warm:
        for graph, _ in graphs.values():
            graph.replay()
        torch.cuda.synchronize()
    return {name: round(spread.median, 2) for name, spread in timing.replay(graphs).items()}


def layers(model: Model, form: str) -> Iterator[dict[str, Any]]:
    """Whole layers: routing given, sum included."""
    weights = [make_weights(model, form) for _ in range(2)]
    for tokens in TOKENS:
        workspace = kg.fused_moe_workspace(
            max_tokens=tokens,
            top_k=model.top_k,
            num_experts=model.experts,
            hidden=model.hidden,
            intermediate=model.inter,
            fp8_activations=FORMS[form][1] is not None,
            device=DEVICE,
        )
        out = torch.empty(tokens, model.hidden, device=DEVICE, dtype=BF16)

        def call(w: Weights, b: Batch, out: torch.Tensor = out, workspace: Any = workspace) -> None:
            operands = (b.hidden, w.w13, w.w2, b.topk_ids, b.topk_weights)
            kg.fused_moe(*operands, activation="swiglu", out=out, workspace=workspace, **w.scales, **b.scales)

        pairs = zip(itertools.cycle(weights), batches(model, tokens, form))
        us = measure({"layer": [lambda w=w, b=b: call(w, b) for w, b in pairs]})["layer"]
        flops = 6.0 * tokens * model.top_k * model.hidden * model.inter
        hit = model.experts * (1 - (1 - model.top_k / model.experts) ** tokens)
        moved = hit * 3 * model.hidden * model.inter * weights[0].w13.element_size()
        yield {"model": model.name, "form": form, "tokens": tokens, "us": us} | {
            "tflop_s": round(flops / us * 1e-6, 1),
            "weights_gb_s": round(moved / us * 1e-3, 1),
        }


def tables_and_sums(model: Model) -> Iterator[dict[str, Any]]:
    """The first and the last launch of a layer."""
    for tokens in TOKENS:
        rows = torch.randn(tokens, model.top_k, model.hidden, device=DEVICE).to(BF16)
        out = torch.empty(tokens, model.hidden, device=DEVICE, dtype=BF16)
        each = batches(model, tokens)
        align: Calls = [lambda b=b: kg.moe_align(b.topk_ids, num_experts=model.experts) for b in each]

        def add_up(b: Batch, rows: torch.Tensor = rows, out: torch.Tensor = out) -> None:
            kg.moe_sum(rows, b.topk_ids, topk_weights=b.topk_weights, num_experts=model.experts, out=out)

        total: Calls = [lambda b=b, add_up=add_up: add_up(b) for b in each]
        us = measure({"align": align, "sum": total})
        moved = 2 * (rows.numel() + out.numel())
        yield {"model": model.name, "tokens": tokens, "align_us": us["align"], "sum_us": us["sum"]} | {
            "sum_gb_s": round(moved / us["sum"] * 1e-3, 1)
        }


def adapters(model: Model, rank: int) -> LayerBuffers:
    """Random adapters on both projections."""
    gate_up = tuple(normal(LORAS, model.experts, rank, model.hidden) for _ in range(2))
    up = tuple(normal(LORAS, model.experts, model.inter, rank) for _ in range(2))
    down_a = (normal(LORAS, model.experts, rank, model.inter),)
    down_b = (normal(LORAS, model.experts, model.hidden, rank),)
    enabled = torch.ones(LORAS, dtype=torch.int32, device=DEVICE)
    return LayerBuffers(SliceBuffers(gate_up, up), SliceBuffers(down_a, down_b), enabled)


def with_adapters(model: Model, rank: int) -> Iterator[dict[str, Any]]:
    """A layer without adapters, with one for each token, and with adapters that no token has; overlap of the first product."""
    weights = [make_weights(model, "bf16") for _ in range(2)]
    loras = [adapters(model, rank) for _ in range(2)]
    stream, events = torch.cuda.Stream(), (torch.cuda.Event(), torch.cuda.Event())
    for tokens in TOKENS:
        mapping = torch.arange(tokens, device=DEVICE).remainder(LORAS).int()
        sizes = {"top_k": model.top_k, "num_experts": model.experts, "max_loras": LORAS}
        workspace = kg.moe_workspace(max_tokens=tokens, max_rank=rank, num_slices=2, device=DEVICE, **sizes)
        out = torch.empty(tokens, model.hidden, device=DEVICE, dtype=BF16)
        each = [(weights[i % 2], batch, loras[i % 2]) for i, batch in enumerate(batches(model, tokens))]

        def layer(mapping: torch.Tensor | None, each: Any = each, out: Any = out, workspace: Any = workspace) -> Calls:
            return [
                lambda w=w, b=b, lora=lora: MoeLayer(kg, w.w13, w.w2, lora)(
                    b.hidden, b.topk_ids, b.topk_weights, mapping, out=out, workspace=workspace
                )
                for w, b, lora in each
            ]

        us = measure({"base": layer(None), "adapters": layer(mapping), "no_token": layer(torch.full_like(mapping, -1))})
        row = {"model": model.name, "rank": rank, "tokens": tokens}
        row |= {f"{name}_us": value for name, value in us.items()}
        row["tax"] = round(us["adapters"] / us["base"] - 1, 3)
        yield row | first_product(model, tokens, rank, each, mapping, stream, events)


def first_product(
    model: Model, tokens: int, rank: int, each: Any, mapping: torch.Tensor, stream: Any, events: Any
) -> dict[str, float]:
    """The first product and its adapters: one behind the other, and beside each other."""
    rows = torch.empty(tokens, model.top_k, 2 * model.inter, device=DEVICE, dtype=BF16)
    delta = torch.empty_like(rows)
    make = kg.no_tables if tokens <= 4 else kg.moe_align
    calls: dict[str, Calls] = {"sequence": [], "overlap": []}
    for w, b, lora in each:
        tables = make(b.topk_ids, num_experts=model.experts)
        sizes = {"num_experts": model.experts, "max_loras": LORAS}
        route = kg.moe_route(b.topk_ids, mapping, rank=rank, **sizes)
        scratch = kg.moe_workspace(max_tokens=tokens, top_k=model.top_k, max_rank=rank, num_slices=2, device=DEVICE, **sizes)
        route = route._replace(parts=scratch.parts)

        def base(w: Weights = w, b: Batch = b, tables: Any = tables) -> None:
            kg.moe_gemm(rows, b.hidden, w.w13, tables, x_rows="token")

        def add(b: Batch = b, lora: Any = lora, route: Any = route, base: Callable[[], None] = base) -> None:
            base()
            kg.moe_lora(rows, b.hidden, *lora.gate_up, route)

        def beside(b: Batch = b, lora: Any = lora, route: Any = route, base: Callable[[], None] = base) -> None:
            kg.overlap(base, lambda: kg.moe_lora(delta, b.hidden, *lora.gate_up, route, add_inputs=False), stream, events)
            kg.moe_add(rows, delta, route)

        calls["sequence"].append(add)
        calls["overlap"].append(beside)
    return {f"first_{name}_us": value for name, value in measure(calls).items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--seconds", type=float, default=600.0)
    arguments = parser.parse_args()
    end = time.monotonic() + arguments.seconds
    document: dict[str, Any] = {
        "schema_version": 1,
        "machine": environment.machine(torch.device(DEVICE)),
        "versions": environment.versions(()),
        "ceilings": timing.ceilings(),
        "layers": [],
        "tables_and_sums": [],
        "adapters": [],
    }
    parts: list[tuple[str, Callable[[], Iterator[dict[str, Any]]]]] = [
        *[("layers", lambda form=form: layers(QWEN3, form)) for form in ("bf16", "w8a8 group")],
        ("tables_and_sums", lambda: tables_and_sums(QWEN3)),
        *[("adapters", lambda rank=rank: with_adapters(QWEN3, rank)) for rank in (16, 64)],
        *[("layers", lambda form=form: layers(DEEPSEEK, form)) for form in ("bf16", "w8a8 group")],
        ("tables_and_sums", lambda: tables_and_sums(DEEPSEEK)),
        *[("layers", lambda form=form: layers(QWEN3, form)) for form in ("w8a16 group", "w8a8 channel", "w8a16 channel")],
        ("layers", lambda: layers(DEEPSEEK, "w8a16 group")),
    ]
    for part, rows in parts:
        for row in rows():
            document[part].append(row)
            print(part, row, file=sys.stderr, flush=True)
            if time.monotonic() > end:
                break
        torch.cuda.empty_cache()
        if time.monotonic() > end:
            break
    arguments.out.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
