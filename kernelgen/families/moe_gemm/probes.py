"""What the grouped products of a base MoE layer are compiled for."""

from __future__ import annotations

from types import ModuleType
from typing import Iterator

import torch

from kernelgen.core.model import Variant
from kernelgen.families.activation import OSS
from kernelgen.families.moe_experts import BY_PAIR
from kernelgen.families.probe import QWEN3, Probe, factors, launcher_of, meta, tensors

# One call of each kind of tile: tokens of Qwen3-30B-A3B whose mean expert makes blocks of that height, and a rank of adapters.
_TOKENS = {"gemv": {1: 16, 4: 64}, "naive": {1: 16, 4: 64}, "tile": {64: 64, 256: 16, 4096: 64}, "box": {1024: 16, 4096: 64}}
_TOKENS |= {"diagonal": {1: 16, 4: 64}, "warp_specialised": {4096: 16}, "lanes": {64: 64, 256: 16}, "lane_gemv": {1: 16, 2: 64}}
_SM_90 = ("warp_specialised", "lanes", "lane_gemv")


def probes(package: ModuleType, variant: Variant) -> Iterator[Probe]:
    """One call of each kind of tile; on targets other than sm_90, none of kernels in Gluon."""
    if variant.schedule in _SM_90 and package._runtime.traits(torch.device("meta")).target != "sm_90":
        return
    for num_tokens, rank in _TOKENS[variant.schedule].items():
        yield _probe(package, variant, num_tokens, rank if variant.adapted else 0)


def _probe(package: ModuleType, variant: Variant, num_tokens: int, rank: int) -> Probe:
    launcher = launcher_of(package, variant)
    dtype = getattr(torch, variant.torch_dtype)
    top_k, num_experts = QWEN3["top_k"], QWEN3["num_experts"]
    num_pairs = num_tokens * top_k
    k, n = QWEN3["hidden"], QWEN3["inter"]
    if not variant.reads_token:
        k, n = n, k
    rows = num_tokens if variant.reads_token else num_pairs
    outputs = num_tokens if variant.sums else num_pairs
    height = variant.slices * n

    def call() -> None:
        with package._runtime.compile_only():
            make = package.no_tables if variant.schedule in BY_PAIR else package.moe_align
            ids, routing = meta(num_tokens, top_k), {"num_experts": num_experts, "valid_tokens": meta(1)}
            tables = make(ids, **routing)
        known = {"T": num_tokens, "top_k": top_k, "P": outputs, "R": rows, "E": num_experts, "N": n, "K": k, "S": variant.slices}
        given = tensors(package, variant, **known)
        if variant.adapted:
            with package._runtime.compile_only():
                routing["block_m"] = tables.block_m
                if variant.schedule == "warp_specialised":
                    routing["lora_ranks"] = meta(5)  # copies must stay wide with these too
                tables, given["runs"] = package.moe_runs(ids, meta(num_tokens), max_loras=5, **routing)
                a = [meta(5, num_experts, rank, k, dtype=dtype)] * variant.slices
                x_rows = "token" if variant.reads_token else "pair" if variant.schedule in BY_PAIR else "sorted"
                given["v"] = package.moe_shrink(meta(rows, k, dtype=dtype), a, tables, given["runs"], x_rows=x_rows)
            given["lora_b"], b_scale = factors(package, variant, variant.b_scales, (5, num_experts, n, rank), variant.slices)
            given |= {} if b_scale is None else {"b_scale": b_scale}
        given |= OSS.given if variant.clamped else {}
        given |= {"bias": meta(num_experts, height, dtype=dtype)} if variant.biased else {}
        launcher(**given, tables=tables)

    hit = num_experts * (1.0 - (1.0 - 1.0 / num_experts) ** num_pairs)  # if pairs are spread evenly
    sizes = {"num_tokens": num_tokens, "k": k, "n": n, "top_k": top_k, "num_experts": num_experts}
    return Probe(
        f"t{num_tokens}",
        {**sizes, "rank": rank} if rank else sizes,
        call,
        flops=2.0 * num_pairs * height * (k + rank),
        bytes=hit * height * k * {None: dtype.itemsize, "mx": 17 / 32}.get(variant.weight_scales, 1)
        + rows * k * (1 if variant.x_scales else dtype.itemsize)
        + outputs * n * dtype.itemsize,
    )
