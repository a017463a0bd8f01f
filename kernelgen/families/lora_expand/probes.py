"""What the second product of dense LoRA is compiled for."""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any, Iterator

import torch

from kernelgen.core.model import TunedEntry, Variant
from kernelgen.families.lora_probe import Operands, Sizes, of_measured, of_rule
from kernelgen.families.probe import FP32, Probe, fp8, meta

_TOKENS = (16, 4096)  # more have the same tiles


def probes(package: ModuleType, variant: Variant) -> Iterator[Probe]:
    """With the tiles of the rule."""
    return of_rule(package, variant, _operands, _TOKENS)


def tuned(package: ModuleType, variant: Variant, entry: TunedEntry) -> Iterator[Probe]:
    """With tiles that were measured."""
    return of_measured(package, variant, _operands, entry)


def _operands(package: ModuleType, variant: Variant, sizes: Sizes) -> Operands:
    scales_of = importlib.import_module(f"{package.__name__}._scales")
    problem = importlib.import_module(f"{package.__name__}.{variant.family}._problem")
    out = meta(sizes.num_tokens, sum(sizes.widths), dtype=getattr(torch, variant.torch_dtype))
    y = meta(len(sizes.widths), sizes.num_tokens, sizes.rank, dtype=FP32)
    of_b = fp8(package) if variant.weight_scales else out.dtype
    b = [meta(sizes.max_loras, width, sizes.rank, dtype=of_b) for width in sizes.widths]
    scales: dict[str, Any] = {}
    if variant.weight_scales:
        shapes = [scales_of.scale_shape(variant.weight_scales, w.shape, problem.QUANT) for w in b]
        scales["b_scale"] = [meta(*shape, dtype=FP32) for shape in shapes]
    return Operands(out, y, b, scales, 2 if variant.adds else 1, out.numel() * sizes.rank)
