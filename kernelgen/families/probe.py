"""What the probes of all families share.

A probe is a problem that stands for others when a variant is compiled without a GPU. It calls the variant as a user would, on
tensors of the ``meta`` device, inside ``compile_only``: so the kernels, tiles and options are the ones that the launcher itself
picks for the target. Rows of the lock are named by it.
"""

from __future__ import annotations

import dataclasses
import importlib
from types import ModuleType
from typing import Any, Callable, Mapping

import torch

from kernelgen.core.model import Variant

FP32 = torch.float32
# Layers of Qwen3-30B-A3B.
QWEN3 = {"hidden": 2048, "inter": 768, "top_k": 8, "num_experts": 128}
_TILED_RANKS = (256, 129)  # a whole number of tiles, and rows that are not aligned


@dataclasses.dataclass(frozen=True)
class Probe:
    """A problem that a variant is compiled for.

    Attributes:
        name: short; one of its kind a variant.
        sizes: what the problem is, for a reader.
        call: makes the launches; to be called where launches are recorded.
        flops: of the problem.
        bytes: that must move between memory and chip, if every tensor moved once.
        is_tuned: with tiles that were measured: of interest for the primary target and the measured version of Triton only.
    """

    name: str
    sizes: Mapping[str, int]
    call: Callable[[], None]
    flops: float
    bytes: float
    is_tuned: bool = False


def launcher_of(package: ModuleType, variant: Variant) -> Callable[..., None]:
    """The launcher of ``variant`` in the generated ``package``."""
    module = importlib.import_module(f"{package.__name__}.{variant.family}.{variant.module}")
    launcher: Callable[..., None] = getattr(module, variant.name)
    return launcher


def ranks(variant: Variant) -> tuple[int, ...]:
    """The ranks that stand for those of its bucket."""
    return _TILED_RANKS if variant.tiled_rank else (variant.max_rank,)


def fp8(package: ModuleType) -> torch.dtype:
    """What FP8 operands of a probe are made of: e4m3, where the target that is compiled for has it."""
    has_e4m3 = package._runtime.traits(torch.device("meta")).e4m3
    return torch.float8_e4m3fn if has_e4m3 else torch.float8_e5m2


def tensors(package: ModuleType, variant: Variant, **sizes: int) -> dict[str, Any]:
    """The tensors that a call of a variant takes, as far as these sizes tell their shapes, by their names in its declaration, and
    the scales of such as the variant has FP8 for. What is written, or of a shared dtype, is of that of the variant; else of the
    first that it may have."""
    table = importlib.import_module(f"{package.__name__}.{variant.family}._table")
    op, own = package._operands.OPS[variant.family], getattr(torch, getattr(variant, "torch_dtype", "float32"))
    declared = {operand.name: operand for operand in op.operands}
    hanging = {operand.name: is_needed for operand, is_needed in op.hang_on(table.VARIANTS.of(variant.name))}
    found: dict[str, Any] = {}
    for name, shape in op.shapes(**sizes).items():
        operand = declared[name]
        if operand.dtype is None or not hanging.get(name, not operand.is_optional):
            continue
        fact = declared[operand.scaled_by].asks[0] if operand.scaled_by else ""
        kind = getattr(variant, fact, None)
        kind = variant.x_scales if kind is True else kind
        several = operand.dtype if isinstance(operand.dtype, tuple) else (operand.dtype,)
        dtype = own if isinstance(operand.dtype, str) or (operand.written and own in several) else several[0]
        packed = kind == "mx"
        if packed:
            dtype, shape = torch.uint8, (*shape[:-1], shape[-1] // 2)
        elif kind or dtype.itemsize == 1:
            dtype = fp8(package)
        made = {name: meta(*shape, dtype=dtype)}
        if kind:
            of_rows = fact in ("x_scales", "writes_fp8")
            stacked = () if operand.slices or of_rows else (sizes.get("S", 1),)
            scale_shape = package._scales.x_scale_shape if of_rows else package._scales.scale_shape
            scales = scale_shape(kind, shape, table.QUANT, *stacked)
            made[operand.scaled_by] = meta(*scales, dtype=torch.uint8 if packed else FP32)
        found |= {name: [tensor] * sizes[operand.count] if operand.slices else tensor for name, tensor in made.items()}
    return found


def factors(
    package: ModuleType, variant: Variant, scales: str | None, shape: tuple[int, ...], slices: int
) -> tuple[list[torch.Tensor], list[torch.Tensor] | None]:
    """Factors of adapters [L, E, out, in] of a variant, one a slice; FP8 where there are ``scales``, and these. E of 1: they are
    of QWEN3's experts, which share them."""
    dtype = getattr(torch, variant.torch_dtype)

    def of_all(tensor: torch.Tensor) -> list[torch.Tensor]:
        return [tensor.expand(-1, QWEN3["num_experts"], *tensor.shape[2:])] * slices

    if scales is None:
        return of_all(meta(*shape, dtype=dtype)), None
    quant = importlib.import_module(f"{package.__name__}.{variant.family}._table").QUANT
    scale = meta(*package._scales.scale_shape(scales, shape, quant), dtype=FP32)
    return of_all(meta(*shape, dtype=fp8(package))), of_all(scale)


def meta(*size: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
    """A tensor that is a shape and a dtype alone."""
    return torch.empty(size, dtype=dtype, device="meta")


def delta_beside(package: ModuleType, like: torch.Tensor) -> dict[str, Any]:
    """The arguments of an op that adds a delta like ``like``, and its route; of shapes alone."""
    return {"delta": torch.empty_like(like), "route": route_of(package, like)}


def route_of(package: ModuleType, like: torch.Tensor) -> Any:
    """That of a delta like ``like``."""
    ints = torch.empty(like.shape[:2], dtype=torch.int32, device=like.device)
    mapping, enabled = ints[:, 0].contiguous(), ints[0, :4].contiguous()
    sizes: dict[str, Any] = {"num_experts": QWEN3["num_experts"], "max_loras": 4, "assignment": "naive"}
    return package.moe_route(ints, mapping, adapter_enabled=enabled, **sizes)
