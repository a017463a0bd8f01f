"""The first product of dense LoRA in fp64, and how far a right kernel can be from it.

For every token t of an adapter l, and every slice s:

    y[s, t] = scaling * (x[t] . A_s[l]^T)

in fp32; rows of other tokens keep their bytes. A kernel forms the sum in fp32, in any order and with any tree, on units that
may truncate: a sum of n products is then off by at most n * 2^-23 times the sum of their magnitudes (products of 16-bit
numbers are exact in fp32). The scaling rounds once more; so does each scale of operands that were dequantised.
"""

from __future__ import annotations

from typing import NamedTuple, Sequence

import torch

FP32 = 2.0**-23  # relative error of an fp32 operation that truncates
FP32_TINY = 2.0**-149  # and its absolute error where it underflows


class Expected(NamedTuple):
    """What a tensor should hold, and a bound that a right kernel is never further off than; both fp64."""

    value: torch.Tensor
    bound: torch.Tensor  # 0 where nothing is written


def lora_shrink(
    y: torch.Tensor,
    x: torch.Tensor,
    lora_a: Sequence[torch.Tensor],
    adapters: Sequence[int | None],
    *,
    scaling: float,
    scaled: bool = False,
) -> Expected:
    """The exact rank vectors for operands as they are, and the bound on a kernel's error.

    Args:
        y: [S, T, rank], its old values.
        x: [T, K].
        lora_a: S tensors [L, rank, K].
        adapters: of each token, None: it has none.
        scaled: operands were dequantised; a kernel applies their scales, which are below 2^24, in fp32.
    """
    value, bound = y.double(), torch.zeros(y.shape, dtype=torch.float64, device=y.device)
    factor = float(torch.tensor(scaling, dtype=torch.float32))
    for token, adapter in enumerate(adapters):
        for s, a in enumerate(lora_a):
            if adapter is not None:
                total, error = dot(a[adapter], x[token], scaled)
                value[s, token] = factor * total
                error = abs(factor) * error
                bound[s, token] = error + FP32 * (value[s, token].abs() + error) + FP32_TINY
    return Expected(value, bound)


def dot(
    matrix: torch.Tensor, vector: torch.Tensor, scaled: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """matrix @ vector in fp64, and the error of fp32 sums over its columns, times two scales where it is ``scaled``."""
    matrix, vector = matrix.double(), vector.double()
    columns = matrix.shape[1]
    relative, tiny = (columns + 2, FP32_TINY * 2.0**24) if scaled else (columns, FP32_TINY)
    return matrix @ vector, relative * FP32 * (matrix.abs() @ vector.abs()) + columns * tiny
