"""The probes that the two products of MoE-LoRA, made apart, have in common."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch

from kernelgen.core.model import Variant
from kernelgen.families.probe import FP32, QWEN3, Probe, launcher_of, meta

# Half of an adapter on w13, or on w2, of Qwen3-30B-A3B over two GPUs: of its rank, or of its columns.
TOKENS = {"pairs": {4: 0}, "blocks": {64: 16, 4096: 64}}


def apart_probe(
    package: ModuleType,
    variant: Variant,
    rank: int,
    num_tokens: int,
    block_m: int,
    operands: tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]],
    times: int,
    products: int,
) -> Probe:
    """``operands``: what is written (``times`` it moves), what is read, and weights; ``products``: of one pair."""
    launcher = launcher_of(package, variant)
    top_k, num_experts = QWEN3["top_k"], QWEN3["num_experts"]
    options: dict[str, Any] = {}
    if getattr(variant.tags, "routed_weight", "plain") == "weighted":
        options["topk_weights"] = meta(num_tokens, top_k, dtype=FP32)

    def call() -> None:
        with package._runtime.compile_only():
            route = package.moe_route(
                meta(num_tokens, top_k),
                meta(num_tokens),
                num_experts=num_experts,
                max_loras=5,
                assignment="sorted" if block_m else "naive",
                block_m=block_m or None,
            )
        launcher(*operands, route, **options)

    written, read, weights = operands
    groups = 5 * num_experts
    hit = 1.0 - (1.0 - 1.0 / groups) ** (num_tokens * top_k)  # if pairs are spread evenly
    moved = times * written.nbytes + read.nbytes + hit * sum(w.nbytes for w in weights)
    sizes = {"num_tokens": num_tokens, "rank": rank, "block_m": block_m, "max_loras": 5}
    suffix = f"_r{rank}" if variant.tiled_rank else ""
    flops = 2.0 * num_tokens * top_k * products
    return Probe(f"t{num_tokens}{suffix}", sizes, call, flops=flops, bytes=float(moved))
