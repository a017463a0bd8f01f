"""What the first product of MoE-LoRA is compiled for."""

from __future__ import annotations

from types import ModuleType
from typing import Iterator

from kernelgen.core.model import Variant
from kernelgen.families.moe_lora_apart_probe import TOKENS, apart_probe
from kernelgen.families.probe import QWEN3, Probe, ranks, tensors


def probes(package: ModuleType, variant: Variant) -> Iterator[Probe]:
    """Of few tokens, pair by pair, or of many."""
    slices, k = 2, 2048
    for rank in ranks(variant):
        for num_tokens, block_m in TOKENS[variant.schedule].items():
            sizes = {"T": num_tokens, "top_k": QWEN3["top_k"], "L": 5, "X": QWEN3["num_experts"]}
            given = tensors(package, variant, **sizes, S=slices, K=k, rank=rank)
            operands = (given["y"], given["x"], given["lora_a"])
            yield apart_probe(package, variant, rank, num_tokens, block_m, operands, 1, slices * rank * k)
