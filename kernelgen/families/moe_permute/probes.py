"""What rows in the order of tables are compiled for."""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Iterator

from kernelgen.core.model import Variant
from kernelgen.families.probe import FP32, QWEN3, Probe, launcher_of, meta


def probes(package: ModuleType, variant: Variant) -> Iterator[Probe]:
    """Of a prefill."""
    launcher = launcher_of(package, variant)
    scales = importlib.import_module(f"{package.__name__}._scales")
    problem = importlib.import_module(f"{package.__name__}.{variant.family}._problem")
    top_k, num_experts, k = QWEN3["top_k"], QWEN3["num_experts"], QWEN3["hidden"]
    num_tokens = 4096
    num_pairs = num_tokens * top_k

    def call() -> None:
        with package._runtime.compile_only():
            tables = package.moe_align(meta(num_tokens, top_k), num_experts=num_experts, valid_tokens=meta(1))
        given = {}
        for x, scale, rows in (("x", "x_scale", num_tokens), ("out", "out_scale", num_pairs)):
            given[x] = meta(rows, k, dtype=problem.QUANT.elements[0])
            given[scale] = meta(*scales.x_scale_shape(variant.x_scales, (rows, k), problem.QUANT), dtype=FP32)
        launcher(**given, tables=tables)

    sizes = {"num_tokens": num_tokens, "k": k, "top_k": top_k, "num_experts": num_experts}
    yield Probe(f"t{num_tokens}", sizes, call, flops=0.0, bytes=2.0 * num_pairs * k)
