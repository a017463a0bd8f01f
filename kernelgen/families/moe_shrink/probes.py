"""What the first product of adapters inside a base product is compiled for."""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any, Iterator

import torch

from kernelgen.core.model import Variant
from kernelgen.families.probe import FP32, QWEN3, Probe, factors, launcher_of, meta, tensors


def probes(package: ModuleType, variant: Variant) -> Iterator[Probe]:
    """Of few tokens, pair by pair, or of many."""
    launcher = launcher_of(package, variant)
    dtype, top_k, num_experts = getattr(torch, variant.torch_dtype), QWEN3["top_k"], QWEN3["num_experts"]
    slices, k = (2, QWEN3["hidden"]) if variant.reads_token else (1, QWEN3["inter"])
    problem = importlib.import_module(f"{package.__name__}.moe_shrink._problem")
    few, experts = variant.schedule == "pairs", 1 if variant.by_token else num_experts
    for num_tokens, rank in {1: 16, 4: 64}.items() if few else {64: 64, 1024: 16, 4096: 64}.items():
        num_pairs = num_tokens * top_k
        given = tensors(package, variant, R=num_tokens if variant.reads_token else num_pairs, K=k)
        rows = num_tokens if variant.by_token else num_pairs
        v = meta(rows, slices, rank, dtype=dtype)
        if few:
            v = meta(problem.part_count(k), num_pairs, slices, rank, dtype=FP32)
        lora_a, a_scale = factors(package, variant, variant.weight_scales, (5, experts, rank, k), slices)
        given |= {"v": v, "lora_a": lora_a, **({} if a_scale is None else {"a_scale": a_scale})}

        def call(given: Any = given, num_tokens: int = num_tokens) -> None:
            with package._runtime.compile_only():
                sizes = {"num_experts": num_experts, "max_loras": 5, "block_m": 0 if few else None}
                tables, runs = package.moe_runs(meta(num_tokens, top_k), meta(num_tokens), **sizes)
            launcher(**given, tables=tables, runs=runs)

        hit = 1.0 - (1.0 - 1.0 / (5 * experts)) ** rows  # if rows are spread evenly
        moved = given["x"].nbytes + v.nbytes + hit * slices * 5 * experts * rank * k * lora_a[0].itemsize
        sizes = {"num_tokens": num_tokens, "k": k, "rank": rank, "slices": slices, "max_loras": 5}
        flops = 2.0 * rows * slices * rank * k
        yield Probe(f"t{num_tokens}", sizes, call, flops=flops, bytes=moved)
