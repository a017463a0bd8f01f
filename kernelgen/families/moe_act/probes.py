"""What the activation of an MoE layer is compiled for."""

from __future__ import annotations

from types import ModuleType
from typing import Iterator

import torch

from kernelgen.core.model import Variant
from kernelgen.families.probe import QWEN3, Probe, launcher_of, meta


def probes(package: ModuleType, variant: Variant) -> Iterator[Probe]:
    """Of a batch of many tokens."""
    launcher = launcher_of(package, variant)
    dtype = getattr(torch, variant.torch_dtype)
    num_tokens, top_k, width = 1024, QWEN3["top_k"], QWEN3["inter"]
    h = meta(num_tokens * top_k, width, dtype=dtype)
    x = meta(num_tokens, top_k, variant.slices * width, dtype=dtype)
    options = {"num_experts": QWEN3["num_experts"], "valid_tokens": meta(1)}

    def call() -> None:
        launcher(h, x, meta(num_tokens, top_k), **options)

    sizes = {"num_tokens": num_tokens, "top_k": top_k, "n": width}
    moved = dtype.itemsize * (h.numel() + x.numel())
    yield Probe(f"t{num_tokens}", sizes, call, flops=0.0, bytes=float(moved))
