"""What the tables of base products are compiled for."""

from __future__ import annotations

from types import ModuleType
from typing import Iterator

import torch

from kernelgen.core.model import Variant
from kernelgen.families.probe import QWEN3, Probe, meta


def probes(package: ModuleType, variant: Variant) -> Iterator[Probe]:
    """Of batches of each kind of table."""
    top_k, num_experts = QWEN3["top_k"], QWEN3["num_experts"]
    for num_tokens in (16, 256, 4096, 16384):
        ids, valid = meta(num_tokens, top_k), meta(1)

        def call(ids: torch.Tensor = ids, valid: torch.Tensor = valid) -> None:
            if variant.schedule == "local_ids":
                package.local_ids(ids, meta(num_experts))
            else:
                package.moe_align(ids, num_experts=num_experts, valid_tokens=valid)

        sizes = {"num_tokens": num_tokens, "top_k": top_k, "num_experts": num_experts}
        yield Probe(f"t{num_tokens}", sizes, call, flops=0.0, bytes=8.0 * ids.numel())
