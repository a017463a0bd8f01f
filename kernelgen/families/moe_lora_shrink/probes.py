"""What the first product of MoE-LoRA is compiled for."""

from __future__ import annotations

from types import ModuleType
from typing import Iterator

import torch

from kernelgen.core.model import Variant
from kernelgen.families.moe_lora_apart_probe import TOKENS, apart_probe
from kernelgen.families.probe import FP32, QWEN3, Probe, meta, ranks


def probes(package: ModuleType, variant: Variant) -> Iterator[Probe]:
    """Of few tokens, pair by pair, or of many."""
    slices, k = 2, 2048
    for rank in ranks(variant):
        for num_tokens, block_m in TOKENS[variant.schedule].items():
            num_pairs = num_tokens * QWEN3["top_k"]
            x = meta(num_tokens, k, dtype=getattr(torch, variant.torch_dtype))
            a = [meta(5, QWEN3["num_experts"], rank, k, dtype=x.dtype)] * slices
            operands = (meta(slices, num_pairs, rank, dtype=FP32), x, a)
            yield apart_probe(package, variant, rank, num_tokens, block_m, operands, 1, slices * rank * k)
