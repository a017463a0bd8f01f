"""What the first product of dense LoRA is compiled for."""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any, Iterator

import torch

from kernelgen.core.model import TunedEntry, Variant
from kernelgen.families.lora_probe import Operands, Sizes, of_measured, of_rule
from kernelgen.families.probe import FP32, Probe, fp8, meta

_TOKENS = (16, 4096, 16384)


def probes(package: ModuleType, variant: Variant) -> Iterator[Probe]:
    """With the tiles of the rule."""
    return of_rule(package, variant, _operands, _TOKENS)


def tuned(package: ModuleType, variant: Variant, entry: TunedEntry) -> Iterator[Probe]:
    """With tiles that were measured."""
    return of_measured(package, variant, _operands, entry)


def _operands(package: ModuleType, variant: Variant, sizes: Sizes) -> Operands:
    scales_of = importlib.import_module(f"{package.__name__}._scales")
    problem = importlib.import_module(f"{package.__name__}.{variant.family}._problem")
    dtype, slices = getattr(torch, variant.torch_dtype), len(sizes.widths)
    of_a = fp8(package) if variant.weight_scales else dtype
    of_x = fp8(package) if variant.x_scales else dtype
    a = [meta(sizes.max_loras, sizes.rank, sizes.k, dtype=of_a)] * slices
    x = meta(sizes.num_tokens, sizes.k, dtype=of_x)
    y = meta(slices, sizes.num_tokens, sizes.rank, dtype=FP32)
    scales: dict[str, Any] = {}
    if variant.weight_scales:
        shape = scales_of.scale_shape(variant.weight_scales, a[0].shape, problem.QUANT)
        scales["a_scale"] = [meta(*shape, dtype=FP32)] * slices
    if variant.x_scales:
        scales["x_scale"] = meta(*scales_of.x_scale_shape(variant.x_scales, x.shape, problem.QUANT), dtype=FP32)
    return Operands(y, x, a, scales, 1, y.numel() * sizes.k)
