"""Gluon, in which Triton's kernels say what each warp does, under names that do not change with its releases.

A Triton without it, or with another, fails to import this; modules of kernels in it are imported where it did not.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from triton.experimental import gluon as _gluon
from triton.experimental.gluon.language.nvidia import ampere, hopper
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

# The package would offer, and so import, what an __all__ here names.
gluon, gl = _gluon, _gluon.language
mbarrier = hopper.mbarrier
fence_async_shared = hopper.fence_async_shared
warpgroup_mma, warpgroup_mma_wait = hopper.warpgroup_mma, hopper.warpgroup_mma_wait
mma_v2 = ampere.mma_v2  # of warps, from registers

# Triton 3.6 and later releases.
_copies = ampere.async_copy
copy_box = getattr(hopper.tma, "async_load", None) or hopper.tma.async_copy_global_to_shared
copy_rows = getattr(_copies, "async_load", None) or _copies.async_copy_global_to_shared
commit_rows, wait_rows = _copies.commit_group, _copies.wait_group
reinterpret = getattr(gl.shared_memory_descriptor, "reinterpret", None) or gl.shared_memory_descriptor._reinterpret


@functools.cache
def _swizzled(bits: int) -> Any:
    return gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=bits, rank=2)


def box(tensor: torch.Tensor, shape: list[int], strides: list[int], block: list[int]) -> Any:
    """What the tensor memory accelerator copies ``block`` by: rows of 128 bytes, laid out as ``wgmma`` reads them."""
    return TensorDescriptor(tensor, shape, strides, block, _swizzled(8 * tensor.element_size()))
