"""Fused MoE-LoRA in fp64, and how far a right kernel can be from it.

For every live pair p = t * top_k + j, of adapter l and expert e, and every slice s:

    v = round(x[row(p)] . A_s[l, e]^T)                 row(p) is t, or p for the weighted form (w2)
    out[t, j, s] = round(out[t, j, s] + w[p] * (v . B_s[l, e]^T))     without the old out where it is overwritten

``round`` is to the dtype of ``out``; it happens at these two places and nowhere else. All other rows keep their bytes. FP8
operands stand for their numbers times their scales: ``dequantise`` them first.

The bound. A kernel forms both sums in fp32, in any order and with any tree, on units that may truncate: a sum of n products
is then off by at most n * 2^-23 times the sum of their magnitudes (products of 16-bit numbers are exact in fp32). The
rounding of v is a step function: v must be a number that some value within that distance of the exact sum rounds to, which
for nearly all v is a single one. The routing weight, the old value and the last cast each round once more; so does each scale.
"""

from __future__ import annotations

from typing import NamedTuple, Sequence

import torch

from kernelgen.families.moe_route.reference import Live

_FP32 = 2.0**-23  # relative error of an fp32 operation that truncates
_FP32_TINY = 2.0**-149  # and its absolute error where it underflows


class Expected(NamedTuple):
    """What ``out`` should hold; both [T, top_k, S * N] fp64."""

    out: torch.Tensor
    bound: (
        torch.Tensor
    )  # a right kernel is never further off than this; 0 in rows that are not live


def moe_lora(
    out: torch.Tensor,
    x: torch.Tensor,
    lora_a: Sequence[torch.Tensor],
    lora_b: Sequence[torch.Tensor],
    live: Sequence[Live],
    *,
    topk_weights: torch.Tensor | None,
    add_inputs: bool,
    scaled: bool = False,
) -> Expected:
    """The exact result for operands as they are, and the bound on a kernel's error.

    Args:
        out: [T, top_k, S * N], its old values.
        x: [T, K], or [T * top_k, K] in the weighted form.
        lora_a: S tensors [L, E, rank, K].
        lora_b: S tensors [L, E, N, rank].
        live: from ``live_pairs``.
        topk_weights: [T, top_k], makes it the weighted form; None: the plain form.
        scaled: operands were dequantised; a kernel applies their scales, which are below 2^24, in fp32.

    Raises:
        ValueError: v is beyond the range of the activations' dtype, where no bound holds.
    """
    top_k, n = out.shape[1], lora_b[0].shape[2]
    exact = out.double().flatten(0, 1)
    bound = torch.zeros_like(exact)
    groups: dict[tuple[int, int], list[int]] = {}
    for pair, adapter, expert in live:
        groups.setdefault((adapter, expert), []).append(pair)
    for (adapter, expert), pairs in groups.items():
        rows = x[[pair // top_k for pair in pairs] if topk_weights is None else pairs]
        weights = None if topk_weights is None else topk_weights.flatten()[pairs].float().double()[:, None]
        for s, (a, b) in enumerate(zip(lora_a, lora_b, strict=True)):
            columns = slice(s * n, (s + 1) * n)
            matrices = a[adapter, expert], b[adapter, expert]
            value, error = _delta(rows, *matrices, weights, out.dtype, scaled)
            if add_inputs:
                value = value + exact[pairs, columns]
                error = error + _FP32 * (value.abs() + error)
            exact[pairs, columns] = value
            bound[pairs, columns] = error + _cast_error(value.abs() + error, out.dtype)
    return Expected(exact.view(out.shape), bound.view(out.shape))


def dequantise(codes: torch.Tensor, scales: torch.Tensor, group: tuple[int, int]) -> torch.Tensor:
    """What FP8 numbers [..., rows, columns] stand for, in fp64.

    Args:
        scales: one for each ``group`` (rows, columns) of a matrix, in the order of the matrix; in any shape.
    """
    *batch, rows, columns = codes.shape
    height, width = (-(-size // part) for size, part in zip((rows, columns), group, strict=True))
    each = scales.double().reshape(*batch, height, width)
    each = each.repeat_interleave(group[0], -2).repeat_interleave(group[1], -1)
    return codes.double() * each[..., :rows, :columns]


def _delta(
    x: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    weight: torch.Tensor | None,
    dtype: torch.dtype,
    scaled: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """w * (round(x . A^T) . B^T) of pairs and one slice, and its error before the last cast; [pairs, N] fp64 both."""
    v, v_error = _dot(x.double(), a, scaled)
    v_error = torch.where(v.isfinite(), v_error, 0.0)  # an infinity is one in any order
    low, high = ((v + e).to(dtype).double() for e in (-v_error, v_error))
    if (v.isfinite() & ~(low.isfinite() & high.isfinite())).any():
        raise ValueError(f"x . A^T reaches {v.abs().max():.3g}, beyond the range of {dtype}")
    y, y_error = _dot((low + high) / 2, b, scaled)
    y_error = y_error + (high - low).nan_to_num() / 2 @ b.double().abs().T * (1 + (b.shape[1] + 2) * _FP32)
    if weight is not None:
        y, y_error = weight * y, weight.abs() * (y_error + _FP32 * (y.abs() + y_error)) + _FP32_TINY
    return y, y_error


def _dot(
    rows: torch.Tensor, matrix: torch.Tensor, scaled: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """rows @ matrix^T in fp64, and the error of fp32 sums over columns, times two scales where it is ``scaled``."""
    matrix, columns = matrix.double().T, matrix.shape[1]
    relative, tiny = (columns + 2, _FP32_TINY * 2.0**24) if scaled else (columns, _FP32_TINY)
    magnitude = rows.abs() @ matrix.abs()
    return rows @ matrix, relative * _FP32 * magnitude + columns * tiny


def _cast_error(magnitude: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The error of rounding numbers of at most ``magnitude`` to ``dtype``, to nearest."""
    info = torch.finfo(dtype)
    return magnitude * (info.eps / 2) + info.smallest_normal * info.eps / 2
