"""A whole base MoE layer in fp64, and how far a right implementation can be from it.

    h[p]   = round(act(x[t] . W13[e]^T))             for every local pair p = t * top_k + j of expert e
    out[t] = round(sum over j of w[p] * (h[p] . W2[e]^T))

``round`` of h is to the dtype of the layer, of out to its own. A product h . W2^T may be rounded to the dtype of the layer
before it is weighted and summed up, or not: the bound admits both. The rounding of h is a step function: h must be a number
that some value within the error of the exact one rounds to, which for nearly all h is a single one.

FP8 operands stand for their numbers times their scales: ``dequantise`` them first. With FP8 activations h becomes FP8 as
``moe_quant`` makes it of the rounded h: another step function, whose scale is known to the bit wherever the largest h is.
"""

from __future__ import annotations

from typing import NamedTuple, Sequence

import torch

from kernelgen.reference.moe_align import Local
from kernelgen.reference.moe_gemm import Expected, activate, cast_error, dot

_FP32 = 2.0**-23


class Inner(NamedTuple):
    """What the numbers between the two products become.

    Attributes:
        dtype: what they are rounded to first.
        element: the FP8 type of their codes; None: they stay as they are.
        width: columns that share a scale.
        given: the scales of all, or of each expert, where they are given.
        short: both products are of FP8 with FP8, on tensor cores.
    """

    dtype: torch.dtype
    element: torch.dtype | None = None
    width: int = 0
    given: Sequence[float] | None = None
    short: bool = False


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
    inner: Inner | None = None,
) -> Expected:
    """The rows of the first ``num_tokens`` tokens, ``dtype`` being that of out; other arguments as of the op.

    ``inner`` goes with operands that were dequantised; None: there is no FP8.
    """
    scaled, inner = inner is not None, inner or Inner(hidden.dtype)
    flags = {"scaled": scaled, "short": inner.short}
    top_k = topk_weights.shape[1]
    values = torch.zeros(num_tokens, w2.shape[1], dtype=torch.float64, device=hidden.device)
    bounds = torch.zeros_like(values)
    for pair, expert in local:
        token, j = divmod(pair, top_k)
        h, error = activate(*dot(w13[expert], hidden[token], **flags), activation)
        low, high = ((h + e).to(inner.dtype).double() for e in (-error, error))
        if inner.element is not None:
            given = None if inner.given is None else inner.given[expert if len(inner.given) > 1 else 0]
            low, high = _as_fp8(low, high, inner.element, inner.width, given)
        y, error = dot(w2[expert], (low + high) / 2, **flags)
        error = error + w2[expert].double().abs() @ ((high - low) / 2) * (1 + w2.shape[2] * _FP32)
        error = error + cast_error(y.abs() + error, inner.dtype)
        weight = topk_weights[token, j].float().double()
        values[token] += weight * y
        bounds[token] += weight.abs() * (error + (top_k + 1) * _FP32 * (y.abs() + error))
    bounds += cast_error(values.abs() + bounds, dtype)
    return Expected(torch.arange(num_tokens), values, bounds)


def _as_fp8(
    low: torch.Tensor, high: torch.Tensor, element: torch.dtype, width: int, given: float | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The least and the largest numbers that codes of one row can stand for, if it is between ``low`` and ``high``."""
    info = torch.finfo(element)
    lows, highs = [], []
    for start in range(0, low.shape[0], width):
        a, b = low[start : start + width], high[start : start + width]
        nearest = torch.where(a * b > 0, torch.minimum(a.abs(), b.abs()), 0.0)
        farthest = torch.maximum(a.abs(), b.abs())
        least, most = (_scale(size, info, given) for size in (nearest, farthest))
        if least == most:
            inverse = (1.0 / most).float().double()
            a, b = ((part * inverse).float().clamp(info.min, info.max).to(element).double() * most for part in (a, b))
        else:  # within half a step of numbers that are scaled by at most ``most``
            step = torch.maximum(farthest * (info.eps / 2), most * (info.smallest_normal * info.eps / 2)) * (1 + 2 * _FP32)
            a, b = a - step, b + step
        lows.append(a)
        highs.append(b)
    return torch.cat(lows), torch.cat(highs)


def _scale(sizes: torch.Tensor, info: torch.finfo, given: float | None) -> torch.Tensor:
    if given is not None:
        return sizes.new_tensor(given)
    highest = sizes.max()
    scale = (highest / info.max).float().clamp(min=torch.finfo(torch.float32).tiny)
    return scale.double().where(highest > 0, 1.0)
