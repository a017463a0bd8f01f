"""What the sum of a base product and a LoRA delta is compiled for."""

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
    num_tokens, top_k, width = 1024, QWEN3["top_k"], 2 * QWEN3["inter"]
    out, delta = (meta(num_tokens, top_k, width, dtype=dtype) for _ in range(2))
    sizes = {"num_experts": QWEN3["num_experts"], "max_loras": 4}

    def call() -> None:
        route = package.moe_route(
            meta(num_tokens, top_k), meta(num_tokens), assignment="naive", adapter_enabled=meta(4), **sizes
        )
        launcher(out, delta, route)

    moved = 3.0 * dtype.itemsize * out.numel()
    yield Probe(f"t{num_tokens}", {"num_tokens": num_tokens, "n": width}, call, flops=0.0, bytes=moved)
