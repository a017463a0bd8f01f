"""What the runs of adapters inside the tables of base products are compiled for."""

from __future__ import annotations

from types import ModuleType
from typing import Iterator

import torch

from kernelgen.core.model import Variant
from kernelgen.families.probe import QWEN3, Probe, meta


def probes(package: ModuleType, variant: Variant) -> Iterator[Probe]:
    """Of few tokens, and of many."""
    del variant
    top_k, num_experts = QWEN3["top_k"], QWEN3["num_experts"]
    for num_tokens in (16, 4096, 16384):
        ids = meta(num_tokens, top_k)

        def call(ids: torch.Tensor = ids) -> None:
            given = {"adapter_enabled": meta(5), "valid_tokens": meta(1)}
            package.moe_runs(ids, meta(ids.shape[0]), num_experts=num_experts, max_loras=5, **given)

        sizes = {"num_tokens": num_tokens, "top_k": top_k, "num_experts": num_experts, "max_loras": 5}
        yield Probe(f"t{num_tokens}", sizes, call, flops=0.0, bytes=20.0 * ids.numel())
