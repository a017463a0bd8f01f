"""The scales of FP8 operands, for every op that takes such: which shapes they have, and whether they fit.

There is a scale for a matrix of weights ("tensor"), for each of its rows ("channel") or for each group of rows and columns
("group"); of activations for all of them ("tensor"), for each row ("token") or for each group of columns ("group").

Slices that are stacked in one matrix, as gate over up, are quantised apart, and so is what the shapes mean: groups of rows begin
anew with each slice, and "tensor" may be a scale for each.

Scales are float32, or of float8_e8m0fnu: powers of two, a byte each, which kernels widen as they load them.

Weights that are MXFP4 have scales of their own, "mx": see _mxfp4.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from . import _mxfp4 as mxfp4
from . import _operands as operands
from . import _runtime as runtime


def scale_operand(*asks: str, slices: str = "", count: str = "S") -> operands.Tensor:
    """The operand of scales, whose shape and dtype hang on what they are of; ``asks``: the fact of a variant that says of what
    there is one each."""
    return operands.Tensor(None, None, operands.FREE, slices=slices, count=count, asks=asks)


SCALES = (torch.float32, torch.float8_e8m0fnu)  # what scales are made of


class Quant(NamedTuple):
    """What an op takes as FP8: the element types, and the rows and columns of weights that share a scale of a group."""

    elements: tuple[torch.dtype, ...]
    group_n: int
    group_k: int


def scale_shape(mode: str, weights: Sequence[int], quant: Quant, slices: int = 1) -> tuple[int, ...]:
    """The shape of the scales of weights [..., out, in], with "mx" [..., out, in / 2], so many ``slices`` stacked in out."""
    *batch, rows, columns = weights
    if mode == "mx":
        return mxfp4.scale_shape(weights)
    if mode == "tensor":
        return (*batch,)
    if mode == "channel":
        return (*batch, rows)
    return (*batch, slices * runtime.cdiv(rows // slices, quant.group_n), runtime.cdiv(columns, quant.group_k))


def x_scale_shape(mode: str, x: Sequence[int], quant: Quant) -> tuple[int, ...]:
    """The shape of the scales of activations [rows, K]."""
    if mode == "tensor":
        return (1,)
    return x[0], 1 if mode == "token" else runtime.cdiv(x[1], quant.group_k)


def meta_x_scales(
    kind: str | None, x: Sequence[int], quant: Quant, dtype: torch.dtype, experts: int = 1
) -> Iterator[torch.Tensor | None]:
    """Scales of activations [rows, K] without memory, for warm-up, in every layout that they may have. ``kind``: a mode; or
    "expert", or "group_by_column"; None: there are none."""
    by_column = kind == "group_by_column"
    mode = "group" if by_column else kind
    if mode is None:
        yield None
        return
    shape = (experts,) if mode == "expert" else x_scale_shape(mode, x, quant)
    if by_column:
        yield torch.empty(shape[::-1], dtype=dtype, device="meta").t()
    if not by_column or shape[0] == 1:  # of one row torch may say either
        yield torch.empty(shape, dtype=dtype, device="meta")


def fits(mode: str, scale: Sequence[int], weights: Sequence[int], quant: Quant, slices: int = 1) -> bool:
    """Whether scales of a shape are those of weights; a scale a channel may have a last dimension of 1, a scale a matrix one
    of its ``slices``, if they are stacked in it."""
    wanted = scale_shape(mode, weights, quant, slices)
    last = {"tensor": slices if slices > 1 else None, "channel": 1}.get(mode)
    return tuple(scale) == wanted or (last is not None and tuple(scale) == (*wanted, last))


def find_mode(scale: torch.Tensor, weights: torch.Tensor, quant: Quant, slices: int = 1) -> str | None:
    """Of what weights have a scale each, by the shape; where several fit they mean the same, and the first is taken."""
    if weights.dtype == torch.uint8:
        return "mx" if mxfp4.fits(scale.shape, weights) else None
    modes = ("tensor", "channel", "group")
    return next((mode for mode in modes if fits(mode, scale.shape, weights.shape, quant, slices)), None)


def find_x_mode(
    variant: str,
    x: torch.Tensor,
    x_scale: torch.Tensor,
    quant: Quant,
    first: str | None = None,
    experts: int = 1,
    label: str = "x_scale",
) -> str:
    """The same of activations; ``first`` is taken where it fits. ``experts``: where rows are of one each, "tensor" may be one an
    expert.

    Raises:
        ValueError: no mode has scales of such a shape.
    """
    for mode in (first or "tensor", "tensor", "token", "group"):
        if _fits_x(mode, x_scale.shape, x.shape, quant, experts):
            return mode
    wanted = f"[1], {list(x_scale_shape('token', x.shape, quant))} or {list(x_scale_shape('group', x.shape, quant))}"
    hint = "a scale for the tensor, a token or a group"
    if experts > 1:
        wanted, hint = f"[{experts}], {wanted}", f"{hint}, or an expert"
    elif x_scale.dim() == 1:
        hint += "; of one an expert take the largest, with which a row that several experts read is made FP8"
    runtime.fail(variant, label, runtime.describe(x_scale), wanted, hint)


def _fits_x(mode: str, scale: Sequence[int], x: Sequence[int], quant: Quant, experts: int) -> bool:
    of_experts = mode == "tensor" and experts > 1 and len(scale) == 1 and scale[0] == experts
    return of_experts or tuple(scale) == x_scale_shape(mode, x, quant)


def product_rows(block_m: int) -> int:
    """Rows of a block that one program multiplies where an operand is FP8; programs share a higher block.

    What was widened is in registers. mma.sync reads it from there; wgmma, which takes 64 rows and more, through shared memory
    and in another order, so that a token's last bit would depend on how many others there are.
    """
    return min(block_m, 32)


def check_fp8(variant: str, label: str, tensor: torch.Tensor, mode: str, quant: Quant) -> torch.dtype:
    """The dtype of a tensor that must be FP8, or with "mx" the codes of MXFP4.

    Raises:
        ValueError: it is none, or one that this GPU does not have.
    """
    if mode == "mx":
        mxfp4.check_codes(variant, label, tensor)
        return tensor.dtype
    if tensor.dtype not in quant.elements:
        hint = f"it has a scale a {mode}; quantize_weights and quantize_activations make such tensors"
        runtime.fail(variant, label, runtime.describe(tensor), " or ".join(map(str, quant.elements)), hint)
    if tensor.dtype == torch.float8_e4m3fn and not runtime.traits(tensor.device).e4m3:
        runtime.fail(variant, label, tensor.dtype, "a type of this GPU", "e4m3 needs sm_89 or newer; e5m2 does not")
    return tensor.dtype


def check_x_scale(
    variant: str,
    mode: str,
    x: torch.Tensor,
    x_scale: torch.Tensor,
    quant: Quant,
    experts: int = 1,
    label: str = "x_scale",
) -> tuple[int, int | None]:
    """The strides of the scales of x: over rows, or over experts where each has one, and over groups; that is None where it is 1.

    Scales of groups may lie row by row, or column by column, as some quantisation kernels write them: strides (1, >= rows).

    Raises:
        ValueError: these are not the scales of x.
    """
    shape = x_scale_shape(mode, x.shape, quant)
    right = is_scale(x_scale, x.device) and _fits_x(mode, x_scale.shape, x.shape, quant, experts)
    if right and mode == "group" and shape[1] > 1:
        row, group = x_scale.stride()
        if row == 1 and shape[0] <= group < 2**31 // shape[1]:  # so may a single row lie, that it has one key
            return 1, group
        if group == 1 and row >= shape[1]:
            return row, None
    elif right and x_scale.is_contiguous():
        return int(mode != "tensor" or x_scale.numel() > 1), None
    of_experts = f" or [{experts}]" if mode == "tensor" and experts > 1 else ""
    wanted = f"contiguous {list(shape)}{of_experts} float32 or float8_e8m0fnu on {x.device}"
    hint = "or column by column, strides (1, >= rows)" if mode == "group" else ""
    runtime.fail(variant, label, runtime.describe(x_scale), wanted, hint)


def find_factor_mode(
    variant: str, label: str, scales: Sequence[torch.Tensor], factors: Sequence[torch.Tensor], quant: Quant
) -> str:
    """Of what factors of adapters have a scale each; as ``find_mode``.

    Raises:
        ValueError: no mode has scales of such a shape.
    """
    mode = find_mode(scales[0], factors[0], quant)
    if mode is None:
        got = f"{runtime.describe(scales[0])} for {runtime.describe(factors[0])}"
        groups = f"[L, E, ceil(rows / {quant.group_n}), ceil(columns / {quant.group_k})]"
        runtime.fail(variant, label, got, f"[L, E], [L, E, rows] or {groups}", "a scale a factor, a row or a group")
    return mode


def factor_scale_strides(
    variant: str, label: str, mode: str, scales: Sequence[torch.Tensor], factors: Sequence[torch.Tensor], quant: Quant
) -> operands.Strides:
    """The strides of the scales of factors of adapters, S tensors [L, E, out, in] each, which are tensors of one layout.

    Raises:
        ValueError: these are not their scales.
    """
    shape = scale_shape(mode, factors[0].shape, quant)
    if len(scales) != len(factors):
        runtime.fail(variant, label, f"{len(scales)} tensors", f"{len(factors)}, one a slice")
    strides = operands.Strides.of(scales[0])
    for i, scale in enumerate(scales):
        if (
            not fits(mode, scale.shape, factors[0].shape, quant)
            or not is_fp32(scale, factors[0].device)
            or scale.stride()[:2] != strides[:2]
            or (scale.numel() > 0 and not scale[0, 0].is_contiguous())
        ):
            also = f" or {[*shape, 1]}" if mode == "channel" else ""
            wanted = f"{list(shape)}{also} float32 on {factors[0].device}, contiguous behind (L, E), strides as slice 0"
            hint = f"a scale a {mode}; of another dtype, .float() makes such, once"
            runtime.fail(variant, f"{label}[{i}]", runtime.describe(scale), wanted, hint)
    return strides


def is_scale(scale: torch.Tensor, device: torch.device, mode: str = "") -> bool:
    """Whether scales are of a dtype that kernels take, and where they are needed."""
    return scale.dtype in (mxfp4.SCALES if mode == "mx" else SCALES) and scale.device == device


def is_fp32(scale: torch.Tensor, device: torch.device) -> bool:
    """Whether scales are float32, and where they are needed: those of adapters, which nobody keeps in another dtype."""
    return scale.dtype == torch.float32 and scale.device == device


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def as_fp32(scale: tl.tensor) -> tl.tensor:
    """Scales that were loaded, in fp32. A byte b is float8_e8m0fnu: 2 ** (b - 127), and NaN for 255."""
    if scale.dtype == tl.uint8:
        bits = tl.where(scale == 0, 1 << 22, scale.to(tl.int32) << 23)  # 2 ** -127 is below the normal numbers
        return tl.where(scale == 255, float("nan"), bits.to(tl.float32, bitcast=True))
    else:
        return scale
