"""What the sum of a base product and a LoRA delta is compiled for."""

from __future__ import annotations

from types import ModuleType
from typing import Iterator

from kernelgen.core.model import Variant
from kernelgen.families.probe import QWEN3, Probe, launcher_of, meta, tensors


def probes(package: ModuleType, variant: Variant) -> Iterator[Probe]:
    """Of a batch of many tokens."""
    launcher = launcher_of(package, variant)
    num_tokens, top_k, width = 1024, QWEN3["top_k"], 2 * QWEN3["inter"]
    given = tensors(package, variant, T=num_tokens, top_k=top_k, N=width)
    sizes = {"num_experts": QWEN3["num_experts"], "max_loras": 4}

    def call() -> None:
        route = package.moe_route(
            meta(num_tokens, top_k), meta(num_tokens), assignment="naive", adapter_enabled=meta(4), **sizes
        )
        launcher(**given, route=route)

    moved = 3.0 * given["out"].nbytes
    yield Probe(f"t{num_tokens}", {"num_tokens": num_tokens, "n": width}, call, flops=0.0, bytes=moved)
