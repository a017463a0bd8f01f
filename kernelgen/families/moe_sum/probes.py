"""What the sum of the experts of a token is compiled for."""

from __future__ import annotations

from types import ModuleType
from typing import Any, Iterator

from kernelgen.core.model import Variant
from kernelgen.families.probe import QWEN3, Probe, launcher_of, meta, route_of, tensors


def probes(package: ModuleType, variant: Variant) -> Iterator[Probe]:
    """Of few tokens, and of many."""
    launcher = launcher_of(package, variant)
    top_k, width = QWEN3["top_k"], QWEN3["hidden"]
    for num_tokens in (16, 4096):
        given = tensors(package, variant, T=num_tokens, top_k=top_k, N=width)
        options: dict[str, Any] = {"num_experts": QWEN3["num_experts"], "valid_tokens": meta(1)}
        def call(given: Any = given, options: Any = options) -> None:
            more: dict[str, Any] = {"route": route_of(package, given["y"])} if variant.adapted else {}
            more |= {"bias": meta(QWEN3["num_experts"], width, dtype=given["y"].dtype)} if variant.biased else {}
            launcher(**given, **options, **more)

        sizes = {"num_tokens": num_tokens, "top_k": top_k, "n": width}
        moved = given["out"].nbytes + given["y"].nbytes
        yield Probe(f"t{num_tokens}", sizes, call, flops=2.0 * given["y"].numel(), bytes=float(moved))
