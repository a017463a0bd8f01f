"""What the second product of MoE-LoRA is compiled for."""

from __future__ import annotations

from types import ModuleType
from typing import Iterator

import torch

from kernelgen.core.model import Variant
from kernelgen.families.moe_lora_apart_probe import TOKENS, apart_probe
from kernelgen.families.probe import FP32, QWEN3, Probe, meta, ranks


def probes(package: ModuleType, variant: Variant) -> Iterator[Probe]:
    """Of few tokens, pair by pair, or of many."""
    slices, n = (1, 1024) if variant.weighted else (2, 384)
    for rank in ranks(variant):
        for num_tokens, block_m in TOKENS[variant.schedule].items():
            num_pairs = num_tokens * QWEN3["top_k"]
            # what is gathered lies in two parts
            shape = (slices, num_pairs, rank) if variant.weighted or rank % 2 else (2, slices, num_pairs, rank // 2)
            y = meta(*shape, dtype=FP32)
            out = meta(num_tokens, QWEN3["top_k"], 2 * n, dtype=getattr(torch, variant.torch_dtype))
            b = [meta(5, QWEN3["num_experts"], n, rank, dtype=out.dtype)] * slices
            times = 2 if variant.adds else 1
            yield apart_probe(package, variant, rank, num_tokens, block_m, (out, y, b), times, slices * rank * n)
