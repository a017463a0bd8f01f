"""From 16 or 32-bit numbers to FP8 with fp32 scales, or to MXFP4, in plain torch: a number is its code times its scale.

A scale is the largest magnitude of its numbers over the largest FP8 number, so the code of that number is the largest one.
A code is the number times 1 / scale, and quotients are exact to the last bit, on a GPU too: kernels make the same codes and
scales. Numbers are rounded to nearest even. NaN stays NaN, where it is, and leaves its scale alone; an infinity saturates to
the largest code, of a scale that the finite numbers set. Where all numbers are zero the scale is 1. Nothing waits for the
device. Codes and scales are constants: no gradient goes through them.

MXFP4 has no code for NaN: there a NaN is one of all 32 numbers that share its scale.
"""

from __future__ import annotations

from typing import Annotated, NamedTuple

import torch

from . import _mxfp4 as mxfp4
from . import _operands as operands
from . import _runtime as runtime

__all__ = ["quantize_activations", "quantize_mxfp4", "quantize_weights"]

_SMALLEST = torch.finfo(torch.float32).tiny  # of a scale, so that codes are never divided by zero


_GROUP = 128  # rows or columns that share a scale, unless another number is asked for
_Dtype = Annotated[torch.dtype, operands.Choice((torch.float8_e4m3fn, torch.float8_e5m2))]


class _Weights(NamedTuple):
    weights: Annotated[torch.Tensor, operands.Tensor(None, operands.FLOATS, operands.FREE)]
    scales: Annotated[str, operands.Choice(("tensor", "channel", "group"))]
    dtype: _Dtype
    rows: operands.Size
    columns: operands.Size
    slices: operands.Size


class _Activations(NamedTuple):
    x: Annotated[torch.Tensor, operands.Tensor("T, K", operands.FLOATS, operands.FREE)]
    scales: Annotated[str, operands.Choice(("tensor", "token", "group"))]
    dtype: _Dtype
    group_k: operands.Size


class _Mxfp4(NamedTuple):
    weights: Annotated[torch.Tensor, operands.Tensor(None, operands.FLOATS, operands.FREE)]


_WEIGHTS = operands.Op("quantize_weights", _Weights, launches=False)
_ACTIVATIONS = operands.Op("quantize_activations", _Activations, launches=False)
_MXFP4 = operands.Op("quantize_mxfp4", _Mxfp4, launches=False)


def quantize_weights(
    weights: torch.Tensor,
    scales: str = "channel",
    *,
    dtype: torch.dtype = torch.float8_e4m3fn,
    group: tuple[int, int] = (_GROUP, _GROUP),
    slices: int = 1,
) -> tuple[torch.Tensor, torch.Tensor]:
    """FP8 codes and scales of weights [..., out, in], as the ops take them.

    Args:
        weights: in any float dtype; the leading dimensions are adapters and experts.
        scales: "tensor", one for each matrix: [...]; "channel", one for each row: [..., out]; "group", one for each ``group``:
            [..., ceil(out / group[0]), ceil(in / group[1])].
        dtype: float8_e4m3fn or float8_e5m2.
        group: rows and columns that share a scale; for "group" alone.
        slices: matrices that are stacked in out and quantised apart: 2 for the gate and up of an expert. "tensor" then makes a
            scale for each, [..., slices], and groups begin anew with each: [..., slices * ceil(out / slices / group[0]), ...].

    Raises:
        ValueError: an argument that does not fit.
    """
    op = "quantize_weights"
    if not isinstance(group, tuple) or len(group) != 2:
        runtime.fail(op, "group", group, "(rows, columns)")
    rows, columns = group
    _WEIGHTS.check(runtime.Caller(op, rows="group", columns="group"), _Weights(weights, scales, dtype, rows, columns, slices))
    if weights.dim() < 2 or min(weights.shape[-2:]) < 1:
        runtime.fail(op, "weights", runtime.describe(weights), "[..., out, in], of at least one row and column")
    if scales != "group" and group != (_GROUP, _GROUP):
        runtime.fail(op, "group", group, "none", f'scales="{scales}" have no groups')
    rows, columns = weights.shape[-2:]
    if rows % slices:
        runtime.fail(op, "slices", slices, f"a number that divides the {rows} rows of weights")
    sizes = {"tensor": (rows // slices, columns), "channel": (1, columns), "group": group}
    codes, found = _quantize(weights.reshape(*weights.shape[:-2], slices, rows // slices, columns), scales, sizes, dtype)
    codes, found = codes.flatten(-3, -2), found.flatten(-3, -2)
    if scales == "tensor":
        return codes, found[..., 0] if slices > 1 else found[..., 0, 0]
    return codes, found if scales == "group" else found[..., 0]


def quantize_mxfp4(weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """MXFP4 codes [..., out, in / 2] and scales [..., out, in / 32], both uint8, of weights [..., out, in], as the ops take them.

    A scale is the power of two of the largest magnitude over 4, the power of two of the largest code, as section 6.3 of the OCP
    Microscaling specification v1.0 has it; so what is above 6 times the scale saturates.

    Args:
        weights: in any float dtype; ``in`` is a multiple of 32. Slices that are stacked in out need no thought.

    Raises:
        ValueError: an argument that does not fit.
    """
    _MXFP4.check("quantize_mxfp4", _Mxfp4(weights))
    if weights.dim() < 2 or min(weights.shape[-2:]) < 1 or weights.shape[-1] % mxfp4.GROUP:
        wanted = f"[..., out, in], of at least one row, in a multiple of {mxfp4.GROUP}"
        runtime.fail("quantize_mxfp4", "weights", runtime.describe(weights), wanted)
    with torch.no_grad():
        return _mxfp4(weights.float().reshape(*weights.shape[:-1], -1, mxfp4.GROUP))


def quantize_activations(
    x: torch.Tensor,
    scales: str = "token",
    *,
    dtype: torch.dtype = torch.float8_e4m3fn,
    group_k: int = _GROUP,
) -> tuple[torch.Tensor, torch.Tensor]:
    """FP8 codes and scales of activations [T, K], as the ops take them.

    Args:
        x: in any float dtype.
        scales: "tensor", one for all: [1]; "token", one for each row: [T, 1]; "group", one for each ``group_k`` columns of a
            row: [T, ceil(K / group_k)].
        dtype: float8_e4m3fn or float8_e5m2.
        group_k: columns that share a scale; for "group" alone.

    Raises:
        ValueError: an argument that does not fit.
    """
    _ACTIVATIONS.check("quantize_activations", _Activations(x, scales, dtype, group_k))
    if scales != "group" and group_k != _GROUP:
        runtime.fail("quantize_activations", "group_k", group_k, "none", f'scales="{scales}" have no groups')
    rows, columns = x.shape
    sizes = {"tensor": (max(rows, 1), columns), "token": (1, columns), "group": (1, group_k)}
    codes, found = _quantize(x, scales, sizes, dtype)
    if scales != "tensor":
        return codes, found
    return codes, found.reshape(1) if rows > 0 else found.new_ones(1)


# Between e2m1 numbers one after the other, and whether what is right between goes to the larger one, whose last bit is zero.
_TIES = ((0.25, False), (0.75, True), (1.25, False), (1.75, True), (2.5, False), (3.5, True), (5.0, False))


def _mxfp4(groups: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Of numbers [..., groups, 32]."""
    highest = groups.abs().where(groups.isfinite(), 0.0).amax(-1)
    power = (torch.frexp(highest).exponent - 3).clamp(-127, 127)
    power = power.where(highest > 0, 0)
    sizes = torch.ldexp(groups.abs().double(), -power[..., None])
    codes = torch.signbit(groups).to(torch.uint8) << 3
    codes += sum((sizes >= tie if upwards else sizes > tie).to(torch.uint8) for tie, upwards in _TIES)
    scales = (power + 127).where(~groups.isnan().any(-1), 255).to(torch.uint8)
    return (codes[..., ::2] | codes[..., 1::2] << 4).flatten(-2), scales


@torch.no_grad()
def _quantize(
    numbers: torch.Tensor, scales: str, sizes: dict[str, tuple[int, int]], dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes of the shape of ``numbers`` [..., rows, columns], and scales [..., groups of rows, groups of columns]."""
    height, width = sizes[scales]
    *batch, rows, columns = numbers.shape
    down, across = -(-rows // height), -(-columns // width)
    wide = torch.nn.functional.pad(numbers.float(), (0, across * width - columns, 0, down * height - rows))
    tiles = wide.reshape(*batch, down, height, across, width)
    highest = tiles.abs().where(tiles.isfinite(), 0.0).amax((-3, -1), keepdim=True)
    largest = torch.finfo(dtype).max
    divisor = torch.full_like(highest, largest)  # by a number of the host a GPU would multiply, with its rounded reciprocal
    found = (highest / divisor).clamp(min=_SMALLEST).where(highest > 0, 1.0)
    codes = (tiles * found.reciprocal()).clamp(-largest, largest).to(dtype)
    codes = codes.reshape(*batch, down * height, across * width)[..., :rows, :columns].contiguous()
    return codes, found.squeeze(-1).squeeze(-2)
