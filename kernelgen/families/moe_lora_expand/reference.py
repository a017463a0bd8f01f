"""The second product of MoE-LoRA in fp64, and how far a right kernel can be from it.

For every live pair p = t * top_k + j, of adapter l and expert e, and every slice s:

    out[p, columns of s] = round(out[p, columns of s] + w[p] * (round(y[s, p]) . B_s[l, e]^T))

or, where inputs are not added, without the old value. ``round`` is to the dtype of ``out``. All else keeps its bytes. The sum
is bounded as in ``lora_shrink``; the routing weight, the old value and the last cast each round once more.
"""

from __future__ import annotations

from typing import Sequence

import torch

from kernelgen.families.lora_shrink.reference import FP32, FP32_TINY, Expected, dot
from kernelgen.families.moe_route.reference import Live


def moe_lora_expand(
    out: torch.Tensor,
    y: torch.Tensor,
    lora_b: Sequence[torch.Tensor],
    live: Sequence[Live],
    *,
    offset: int,
    topk_weights: torch.Tensor | None,
    add_inputs: bool,
) -> Expected:
    """The exact output for operands as they are, and the bound on a kernel's error.

    Args:
        out: [T, top_k, *], its old values.
        y: [S, T * top_k, rank].
        lora_b: S tensors [L, E, N, rank].
        live: from ``live_pairs``.
        topk_weights: [T, top_k]; None: every weight is 1.
        add_inputs: whether to add to ``out``, else live rows are overwritten.
    """
    exact = out.double().flatten(0, 1)
    bound = torch.zeros_like(exact)
    info, rounded = torch.finfo(out.dtype), y.to(out.dtype)
    for pair, adapter, expert in live:
        for s, b in enumerate(lora_b):
            begin = offset + s * b.shape[2]
            columns = slice(begin, begin + b.shape[2])
            value, error = dot(b[adapter, expert], rounded[s, pair], scaled=False)
            if topk_weights is not None:
                weight = topk_weights.flatten()[pair].float().double()
                value, error = weight * value, weight.abs() * error
                error = error + FP32 * (value.abs() + error) + FP32_TINY
            if add_inputs:
                value = value + exact[pair, columns]
                error = error + FP32 * (value.abs() + error)
            cast = (value.abs() + error) * (info.eps / 2) + info.smallest_normal * info.eps / 2
            exact[pair, columns], bound[pair, columns] = value, error + cast
    return Expected(exact.view(out.shape), bound.view(out.shape))
