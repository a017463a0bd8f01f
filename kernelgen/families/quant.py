"""FP8 and MXFP4 operands of cases: how scales are shaped, drawn. Groups differ by a factor of up to 100, so that a scale that is
taken from the wrong place shows."""

from __future__ import annotations

import contextlib
import contextvars
import importlib
import math
from types import MappingProxyType, ModuleType
from typing import Any, Iterator, Mapping, NamedTuple, Sequence

import torch

from kernelgen.core.model import VOCABULARY
from kernelgen.families.buffers import allocate, row_major
from kernelgen.families.case import Tags
from kernelgen.families.moe_lora.reference import dequantise

ELEMENTS: Mapping[str, torch.dtype] = MappingProxyType(
    {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}
)


class Formats(NamedTuple):
    """What ``quant`` of a spec says: the types of FP8 operands, and the rows and columns of weights that share a scale."""

    elements: tuple[torch.dtype, ...]
    group: tuple[int, int]


MX = 32  # columns that share a scale in MXFP4
_USUAL = Formats(tuple(ELEMENTS.values()), (128, 128))
_formats = contextvars.ContextVar("formats", default=_USUAL)


@contextlib.contextmanager
def formats_of(package: ModuleType, family: str) -> Iterator[None]:
    """Inside, FP8 operands are as the spec of ``family`` has them, from which its table in ``package`` was made."""
    made, formats = None, _formats.get()
    with contextlib.suppress(ModuleNotFoundError):  # a launcher may be of no package
        made = getattr(importlib.import_module(f"{package.__name__}.{family}._table"), "QUANT", None)
    before = _formats.set(formats if made is None else Formats(made.elements, (made.group_n, made.group_k)))
    try:
        yield
    finally:
        _formats.reset(before)


def group() -> tuple[int, int]:
    """Rows and columns of weights that share a scale; columns of a row of activations that do."""
    return _formats.get().group


def quantize_weights(package: Any, weights: torch.Tensor, scales: str, slices: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and scales as ``quantize_weights`` of the package makes them in the formats of the spec."""
    if scales == "mx":
        return package.quantize_mxfp4(weights)  # type: ignore[no-any-return]
    more = {"group": group()} if scales == "group" else {}
    made: tuple[torch.Tensor, torch.Tensor] = package.quantize_weights(
        weights, scales, dtype=element("e4m3"), slices=slices, **more
    )
    return made


def quantize_activations(package: Any, x: torch.Tensor, scales: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The same of activations."""
    more = {"group_k": group()[1]} if scales == "group" else {}
    made: tuple[torch.Tensor, torch.Tensor] = package.quantize_activations(x, scales, dtype=element("e4m3"), **more)
    return made


def element(name: str) -> torch.dtype:
    """The FP8 type of a case; where the spec has no such, its first."""
    known = _formats.get().elements
    return ELEMENTS[name] if ELEMENTS[name] in known else known[0]


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
    if scales == "mx":
        return rows, columns // MX
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
    """What weights [E, slices * N, K] stand for, in fp64; a scale a matrix is one of all slices, or of each."""
    if kind == "mx":
        return dequantise_mxfp4(codes, scales)
    apart = codes.reshape(codes.shape[0], slices, -1, codes.shape[2])
    if scales.dim() == 1:
        scales = scales[:, None].expand(-1, slices)
    return dequantise(apart, scales, group_of(kind, apart.shape[2:], group())).flatten(1, 2)


def dequantise_mxfp4(codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """What MXFP4 [..., K / 2] stands for, in fp64: by the tables of the OCP Microscaling specification v1.0, section 5."""
    magnitudes = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
    e2m1 = torch.tensor([*magnitudes, *(-m for m in magnitudes)], dtype=torch.float64, device=codes.device)
    powers = [*(2.0 ** (byte - 127) for byte in range(255)), torch.nan]
    e8m0 = torch.tensor(powers, dtype=torch.float64, device=codes.device)
    numbers = torch.stack((e2m1[(codes & 15).long()], e2m1[(codes >> 4).long()]), -1).flatten(-2)
    of_groups = e8m0[scales.view(torch.uint8).long()]
    return (numbers.reshape(*of_groups.shape, MX) * of_groups[..., None]).flatten(-2)


def draw_mxfp4(codes: torch.Tensor, scales: torch.Tensor, size: float, numbers: torch.Generator) -> None:
    """All sorts of codes, with scales that make numbers of about ``size`` of them, but for a factor of 1/8 to 8."""
    codes.copy_(torch.randint(0, 256, codes.shape, generator=numbers))
    drawn = torch.randint(-3, 4, scales.shape, generator=numbers) + (125 + round(math.log2(size)))
    scales.view(torch.uint8).copy_(drawn)


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
