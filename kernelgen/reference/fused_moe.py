"""A whole base MoE layer in fp64, and how far a right implementation can be from it.

    h[p]   = round(act(x[t] . W13[e]^T))             for every local pair p = t * top_k + j of expert e
    out[t] = round(sum over j of w[p] * (h[p] . W2[e]^T))

``round`` of h is to the dtype of the layer, of out to its own. A product h . W2^T may be rounded to the dtype of the layer
before it is weighted and summed up, or not: the bound admits both. The rounding of h is a step function: h must be a number
that some value within the error of the exact one rounds to, which for nearly all h is a single one.
"""

from __future__ import annotations

from typing import Sequence

import torch

from kernelgen.reference.moe_align import Local
from kernelgen.reference.moe_gemm import Expected, activate, cast_error, dot

_FP32 = 2.0**-23


def fused_moe(
    hidden: torch.Tensor,
    w13: torch.Tensor,
    w2: torch.Tensor,
    local: Sequence[Local],
    topk_weights: torch.Tensor,
    *,
    activation: str,
    num_tokens: int,
    dtype: torch.dtype,
) -> Expected:
    """The rows of the first ``num_tokens`` tokens, ``dtype`` being that of out; other arguments as of the op."""
    top_k = topk_weights.shape[1]
    values = torch.zeros(num_tokens, w2.shape[1], dtype=torch.float64, device=hidden.device)
    bounds = torch.zeros_like(values)
    for pair, expert in local:
        token, j = divmod(pair, top_k)
        h, error = activate(*dot(w13[expert], hidden[token]), activation)
        low, high = ((h + e).to(hidden.dtype).double() for e in (-error, error))
        y, error = dot(w2[expert], (low + high) / 2)
        error = error + w2[expert].double().abs() @ ((high - low) / 2) * (1 + w2.shape[2] * _FP32)
        error = error + cast_error(y.abs() + error, hidden.dtype)
        weight = topk_weights[token, j].float().double()
        values[token] += weight * y
        bounds[token] += weight.abs() * (error + (top_k + 1) * _FP32 * (y.abs() + error))
    bounds += cast_error(values.abs() + bounds, dtype)
    return Expected(torch.arange(num_tokens), values, bounds)
