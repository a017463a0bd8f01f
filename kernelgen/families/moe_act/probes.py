"""What the activation of an MoE layer is compiled for."""

from __future__ import annotations

from types import ModuleType
from typing import Any, Iterator

from kernelgen.core.model import Variant
from kernelgen.families.activation import OSS
from kernelgen.families.probe import QWEN3, Probe, launcher_of, meta, route_of, tensors


def probes(package: ModuleType, variant: Variant) -> Iterator[Probe]:
    """Of a batch of many tokens."""
    launcher, num_tokens, top_k, width = launcher_of(package, variant), 1024, QWEN3["top_k"], QWEN3["inter"]
    experts = QWEN3["num_experts"]
    given = tensors(package, variant, T=num_tokens, top_k=top_k, N=width, S=variant.slices)
    def call() -> None:
        more: dict[str, Any] = {"route": route_of(package, given["x"])} if variant.adapted else {}
        more |= OSS.given if variant.clamped else {}
        more |= {"bias": meta(experts, variant.slices * width, dtype=given["x"].dtype)} if variant.biased else {}
        launcher(**given, num_experts=experts, valid_tokens=meta(1), **more)

    sizes = {"num_tokens": num_tokens, "top_k": top_k, "n": width}
    yield Probe(f"t{num_tokens}", sizes, call, flops=0.0, bytes=float(given["h"].nbytes + given["x"].nbytes))
