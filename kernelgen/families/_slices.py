"""Slices of a projection: side by side in one product of the shrink, or one of them, chosen as a kernel runs."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from . import _runtime as runtime


def joined_slices(slices: int, block_rank: int, device: torch.device) -> int:
    """Slices that share a product of the shrink: all, where one by itself would be narrow.

    The warps of a narrow product lie one below the other as well, and each of them reads, and of FP8 widens, the same weights.
    """
    return slices if block_rank < 128 and runtime.traits(device).mixed_pointers else 1


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def slice_of(ptrs: tl.tuple, s: tl.tensor) -> tl.tensor:
    """The pointer of the slice ``s``, a number that is known at run time alone."""
    ptr = ptrs[0]
    for i in tl.static_range(1, len(ptrs)):
        ptr = tl.where(s == i, ptrs[i], ptr)
    return ptr


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def split_slices(tile: tl.tensor, SLICES: tl.constexpr) -> tl.tuple:
    """The tiles of slices that lie side by side in ``tile`` [rows, SLICES * columns of a slice]; SLICES: a power of two."""
    if SLICES == 1:
        return (tile,)
    else:
        halves = tl.reshape(tile, [tile.shape[0], 2, tile.shape[1] // 2])
        left, right = tl.split(tl.permute(halves, (0, 2, 1)))
        return split_slices(left, SLICES // 2) + split_slices(right, SLICES // 2)
