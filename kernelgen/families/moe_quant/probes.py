"""What the quantisation of rows between the products is compiled for."""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Iterator

from kernelgen.core.model import Variant
from kernelgen.families.probe import FP32, QWEN3, Probe, launcher_of, meta, tensors


def probes(package: ModuleType, variant: Variant) -> Iterator[Probe]:
    """Of few tokens, and of many."""
    launcher = launcher_of(package, variant)
    scales = importlib.import_module(f"{package.__name__}._scales")
    problem = importlib.import_module(f"{package.__name__}.{variant.family}._problem")
    top_k, num_experts, n = QWEN3["top_k"], QWEN3["num_experts"], QWEN3["inter"]
    for num_tokens in (4, 4096):
        shape = (num_tokens * top_k, n)

        def call(num_tokens: int = num_tokens, shape: tuple[int, int] = shape) -> None:
            with package._runtime.compile_only():
                tables = package.moe_align(meta(num_tokens, top_k), num_experts=num_experts, valid_tokens=meta(1))
            scale = scales.x_scale_shape(variant.x_scales, shape, problem.QUANT)
            given = tensors(package, variant, T=num_tokens, top_k=top_k, N=n)
            launcher(**given, scale=meta(*scale, dtype=FP32), tables=tables)

        sizes = {"num_tokens": num_tokens, "n": n, "top_k": top_k, "num_experts": num_experts}
        yield Probe(f"t{num_tokens}", sizes, call, flops=0.0, bytes=3.0 * shape[0] * shape[1])
