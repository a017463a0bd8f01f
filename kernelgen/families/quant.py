"""FP8 operands of cases: how scales are shaped and drawn. Groups differ by a factor of up to 100, so that a scale that is
taken from the wrong place shows."""

from __future__ import annotations

from types import MappingProxyType
from typing import Mapping, Sequence

import torch

from kernelgen.core.model import VOCABULARY
from kernelgen.families.buffers import allocate, row_major
from kernelgen.families.case import Tags
from kernelgen.families.moe_lora.reference import dequantise

ELEMENTS: Mapping[str, torch.dtype] = MappingProxyType(
    {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}
)
GROUP = (128, 128)  # of the specs


def scales_of(tags: Tags) -> tuple[str | None, str | None]:
    """Of what there is a scale each: of weights, and of activations."""
    found = (
        VOCABULARY[axis][tags.get(axis, "none")][fact]
        for axis, fact in (("weight_quant", "weight_scales"), ("act_quant", "x_scales"))
    )
    weights, x = (None if scales is None else str(scales) for scales in found)
    return weights, x


def group_of(scales: str | None, shape: Sequence[int], group: tuple[int, int]) -> tuple[int, int]:
    """Rows and columns of a matrix that share a scale; the groups of x are of one row."""
    rows, columns = shape
    whole = {
        "tensor": (max(rows, 1), columns),
        "channel": (1, columns),
        "token": (1, columns),
        "group": group,
    }
    return whole[str(scales)]


def scale_shape(
    scales: str | None, shape: Sequence[int], group: tuple[int, int], slices: int = 1
) -> tuple[int, ...]:
    """The shape of the scales of a matrix; behind (L, E), for weights. Slices that are stacked in it are quantised apart."""
    rows, columns = shape
    parts = slices * -(-rows // slices // group[0]), -(-columns // group[1])
    return {"tensor": (), "channel": (rows,), "group": parts}[str(scales)]


def x_scale_shape(scales: str | None, shape: Sequence[int], group_k: int) -> tuple[int, ...]:
    """The shape of the scales of activations."""
    rows, columns = shape
    return {"tensor": (1,), "token": (rows, 1), "group": (rows, -(-columns // group_k))}[
        str(scales)
    ]


def dequantise_slices(
    codes: torch.Tensor, scales: torch.Tensor, kind: str | None, slices: int
) -> torch.Tensor:
    """What FP8 weights [E, slices * N, K] stand for, in fp64; a scale a matrix is one of all slices, or of each."""
    apart = codes.reshape(codes.shape[0], slices, -1, codes.shape[2])
    if scales.dim() == 1:
        scales = scales[:, None].expand(-1, slices)
    return dequantise(apart, scales, group_of(kind, apart.shape[2:], GROUP)).flatten(1, 2)


def allocate_x_scale(
    shape: Sequence[int], device: str, dtype: torch.dtype = torch.float32, by_column: bool = False
) -> torch.Tensor:
    """Scales of activations, all poison: row by row, or column by column with one row more than there are."""
    strides = (1, shape[0] + 1) if by_column else row_major(shape)
    return allocate(shape, strides, dtype, device)


_LARGE = 48.0  # what a number of size 1 is stored as: far from the ends of e4m3


def as_dtype(numbers: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Numbers of size 1 in the dtype of ``like``; as FP8 they are larger, and saturate."""
    if like.element_size() > 1:
        return numbers.to(like)
    largest = torch.finfo(like.dtype).max
    return (numbers * _LARGE).clamp(-largest, largest).to(like)


def draw_scales(like: torch.Tensor, size: float, numbers: torch.Generator) -> torch.Tensor:
    """Scales that make numbers of about ``size`` of what ``as_dtype`` stores, but for a factor of 0.1 to 10."""
    spread = 10.0 ** (2.0 * torch.rand(like.shape, generator=numbers) - 1.0)
    return (spread * (size / _LARGE)).to(like)
