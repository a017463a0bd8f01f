"""Tensors that show what a kernel did beside its job: views inside of poisoned memory, compared bit for bit."""

from __future__ import annotations

import dataclasses
import math
import mmap
from typing import Sequence

import torch

# A NaN as bfloat16, float16 and float32, and out of every range as an integer.
_POISON = 0x7FDA
_POISON_8 = 0x7F  # a NaN as float8_e4m3fn and float8_e5m2
_POISON_E8M0 = 0xFF  # so too in a byte
_GUARD = 64  # elements of poison before and after a view; keeps 16-byte alignment
_SPARSE = 2**29  # elements
_NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000)


def poison_(tensor: torch.Tensor) -> torch.Tensor:
    """Fill a contiguous tensor with NaN, or with numbers that are no index."""
    if tensor.element_size() > 1:
        tensor.view(-1).view(torch.int16).fill_(_POISON)
    elif tensor.is_floating_point():
        tensor.view(-1).view(torch.uint8).fill_(_POISON_E8M0 if tensor.dtype == torch.float8_e8m0fnu else _POISON_8)
    elif tensor.dtype == torch.uint8:
        tensor.fill_(_POISON_E8M0)
    else:
        raise TypeError(f"no poison for {tensor.dtype}")
    return tensor


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """The bits of a tensor, as integers of its width: equal where the bytes are, NaN included."""
    return tensor.view(
        {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    )


@dataclasses.dataclass(frozen=True)
class Guarded:
    """A view and the memory around it.

    Attributes:
        view: what a kernel is given.
        base: the whole memory, one dimension; of a sparse buffer, the view itself.
        before: the bits of ``base`` when it was sealed.
    """

    view: torch.Tensor
    base: torch.Tensor
    before: torch.Tensor

    def changed(self) -> torch.Tensor:
        """Where ``base`` does not hold the bits that it was sealed with."""
        return bits(self.base) != self.before


def allocate(
    shape: Sequence[int],
    strides: Sequence[int],
    dtype: torch.dtype,
    device: str,
    *,
    offset: int = 0,
) -> torch.Tensor:
    """A view of ``shape`` and ``strides`` (elements) in memory that is all poison; ``seal`` guards it. Gigabytes are sparse.

    Args:
        offset: elements that the view starts behind a 16-byte boundary.
    """
    if _span(shape, strides) >= _SPARSE:
        return allocate_sparse(shape, strides, dtype, device)
    base = torch.empty(_GUARD + offset + _span(shape, strides) + _GUARD, dtype=dtype, device=device)
    return poison_(base).as_strided(shape, strides, _GUARD + offset)


def allocate_sparse(
    shape: Sequence[int], strides: Sequence[int], dtype: torch.dtype, device: str
) -> torch.Tensor:
    """As ``allocate``, for gigabytes of which little is touched: without poison; on the CPU untouched pages take no memory."""
    span = _span(shape, strides)
    if device != "cpu":
        torch.cuda.empty_cache()  # tests run side by side: keep no gigabytes that nobody uses
        return torch.empty(span, dtype=dtype, device=device).as_strided(shape, strides)
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NORESERVE
    memory = mmap.mmap(-1, span * dtype.itemsize, flags=flags)
    return torch.frombuffer(memory, dtype=dtype).as_strided(shape, strides)


def seal(view: torch.Tensor, *, sparse: bool = False) -> Guarded:
    """Note the bits of the view and of all memory around it, or of a sparse view alone.

    What is NaN there becomes one of the other sign: that of an operand shows where it is written.
    """
    if sparse or view.untyped_storage().nbytes() >= _SPARSE * view.element_size():
        return Guarded(view, view, bits(view).clone())
    storage = view.untyped_storage()
    base = torch.empty(0, dtype=view.dtype, device=view.device).set_(storage)
    if view.is_floating_point() and view.dtype != torch.float8_e8m0fnu:  # whose NaN is one
        held, poison = bits(base), bits(poison_(torch.empty(1, dtype=view.dtype, device=view.device)))
        held.masked_fill_(held == poison, int(poison) + torch.iinfo(poison.dtype).min)
    return Guarded(view, base, bits(base).clone())


def positions(guarded: Guarded, rows: torch.Tensor) -> torch.Tensor:
    """Which elements of ``base`` the rows of the view that ``rows`` marks are made of.

    Args:
        rows: bool, of the shape of the view without its last dimension.
    """
    chosen = torch.zeros_like(guarded.before, dtype=torch.bool)
    if guarded.base is guarded.view:
        chosen[rows] = True
    else:
        view = guarded.view
        chosen.as_strided(view.shape, view.stride(), view.storage_offset())[rows] = True
    return chosen


def row_major(shape: Sequence[int], *, row: int | None = None) -> tuple[int, ...]:
    """Contiguous strides, or those with rows ``row`` elements apart."""
    inner = [row if row is not None else shape[-1], *reversed(shape[1:-1])]
    outer = [math.prod(inner[: i + 1]) for i in range(len(shape) - 1)]
    return (*reversed(outer), 1)


def _span(shape: Sequence[int], strides: Sequence[int]) -> int:
    if 0 in shape:
        return 0
    return 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
