"""A whole base MoE layer in fp64, and how far a right implementation can be from it.

    h[p]   = round(act(x[t] . W13[e]^T))             for every local pair p = t * top_k + j of expert e
    out[t] = round(sum over j of w[p] * (h[p] . W2[e]^T))

``round`` of h is to the dtype of the layer, of out to its own. A product h . W2^T may be rounded to the dtype of the layer
before it is weighted and summed up, or not: the bound admits both. The rounding of h is a step function: h must be a number
that some value within the error of the exact one rounds to, which for nearly all h is a single one.

FP8 operands stand for their numbers times their scales: ``dequantise`` them first. With FP8 activations h becomes FP8 as
``moe_quant`` makes it of the rounded h: another step function, whose scale is known to the bit wherever the largest h is.

With biases b13[e] is added to the first product, b2[e] to the second. Where routing weights are of the input, h[p] is
round(act(w[p] * (x[t] . W13[e]^T) + b13[e])), and out their plain sum.

With an adapter l each product of a row r has B[l, e] . round(A[l, e] . r) added, whose rank vectors are rounded to the dtype
between the products: a step function of its own. r is x, or h as it was rounded, before it becomes FP8.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Sequence

import torch

from kernelgen.families.activation import Clamp, activate
from kernelgen.families.moe_align.reference import Local
from kernelgen.families.moe_gemm.reference import Expected, cast_error, dot, in_halves
from kernelgen.families.moe_runs.reference import Adapters

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


class Lora(NamedTuple):
    """The adapters of a layer: those of tokens, and factors as of the op."""

    adapters: Adapters
    a13: Sequence[torch.Tensor]
    b13: Sequence[torch.Tensor]
    a2: Sequence[torch.Tensor]
    b2: Sequence[torch.Tensor]
    scaled: bool = False  # they were dequantised


class Model(NamedTuple):
    """What experts of some models have; arguments of the op."""

    layout: str = "halves"
    w13_bias: torch.Tensor | None = None
    w2_bias: torch.Tensor | None = None
    apply_router_weight_on_input: bool = False

    @property
    def given(self) -> dict[str, Any]:
        """The arguments of a call."""
        return self._asdict()


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
    lora: Lora | None = None,
    clamp: Clamp | None = None,
    model: Model | None = None,
) -> Expected:
    """The rows of the first ``num_tokens`` tokens, ``dtype`` being that of out; other arguments as of the op.

    ``inner`` goes with operands that were dequantised; None: there is no FP8. ``lora``: None: there are
    no adapters. ``clamp``: the numbers of "swiglu_clamp".
    """
    model = model or Model()
    on_input, bias = model.apply_router_weight_on_input, (model.w13_bias, model.w2_bias)
    if model.layout == "interleaved":
        w13, bias = in_halves(w13), (None if bias[0] is None else in_halves(bias[0]), bias[1])
    scaled, inner = inner is not None, inner or Inner(hidden.dtype)
    flags = {"scaled": scaled, "short": inner.short}
    top_k = topk_weights.shape[1]
    values = torch.zeros(num_tokens, w2.shape[1], dtype=torch.float64, device=hidden.device)
    bounds = torch.zeros_like(values)
    for pair, expert in local:
        token, j = divmod(pair, top_k)
        adapter = None if lora is None else lora.adapters[token]
        factors = ((), ()) if lora is None or adapter is None else ((lora.a13, lora.b13), (lora.a2, lora.b2))
        of_lora = lora is not None and lora.scaled
        of_first, of_last = (
            [(a[adapter, expert], b[adapter, expert]) for a, b in zip(*each, strict=True)] for each in factors
        )
        rank = 0 if lora is None else max(lora.a13[0].shape[2], lora.a2[0].shape[2]) + 2
        x = hidden[token].double()
        sums, error = dot(w13[expert], x, x.shape[0] + rank, **flags)
        sizes = (sums, x.shape[0] + rank, inner.dtype)
        more, its = _delta(of_first, x, torch.zeros_like(x), *sizes, scaled=inner.element is not None, of_factors=of_lora)
        sums, error = sums + more, error + its
        weight = topk_weights[token, j].float().double()
        if on_input:
            sums, error = weight * sums, weight.abs() * error + _FP32 * (weight * sums).abs()
        sums, error = _biased(sums, error, bias[0], expert)
        h, error = activate(sums, error, activation, clamp)
        low, high = h_low, h_high = tuple((h + e).to(inner.dtype).double() for e in (-error, error))
        if inner.element is not None:
            given = None if inner.given is None else inner.given[expert if len(inner.given) > 1 else 0]
            low, high = as_fp8(low, high, inner.element, inner.width, given)
        y, error = dot(w2[expert], (low + high) / 2, w2.shape[2] + rank, **flags)
        middle, radius = (h_low + h_high) / 2, (h_high - h_low) / 2
        more, its = _delta(of_last, middle, radius, y, w2.shape[2] + rank, inner.dtype, of_factors=of_lora)
        y, error = _biased(y + more, error + its, bias[1], expert, top_k)
        error = error + w2[expert].double().abs() @ ((high - low) / 2) * (1 + w2.shape[2] * _FP32)
        error = error + cast_error(y.abs() + error, inner.dtype)
        weight = torch.ones_like(weight) if on_input else weight
        values[token] += weight * y
        bounds[token] += weight.abs() * (error + (top_k + 1) * _FP32 * (y.abs() + error))
    bounds += cast_error(values.abs() + bounds, dtype)
    return Expected(torch.arange(num_tokens), values, bounds)


def _biased(
    sums: torch.Tensor, error: torch.Tensor, bias: torch.Tensor | None, expert: int, times: int = 1
) -> tuple[torch.Tensor, torch.Tensor]:
    """With a bias, which may be one of ``times`` in a sum of their own."""
    if bias is None:
        return sums, error
    sums, size = sums + bias[expert].double(), bias[expert].double().abs()
    return sums, error + _FP32 * (sums.abs() + error + (times + 2) * size)


def _delta(
    factors: Sequence[tuple[torch.Tensor, torch.Tensor]],
    row: torch.Tensor,
    radius: torch.Tensor,
    like: torch.Tensor,
    terms: int,
    dtype: torch.dtype,
    *,
    scaled: bool = False,
    of_factors: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """B . round(A . row) of each slice behind the other, and its error, for a row within ``radius``, which may have been
    dequantised, as may the factors; 0 without factors."""
    if not factors:
        return torch.zeros_like(like), torch.zeros_like(like)
    found = []
    for a, b in factors:
        v, error = dot(a, row, scaled=scaled or of_factors)
        error = error + a.double().abs() @ radius * (1 + row.shape[0] * _FP32)
        low, high = ((v + e).to(dtype).double() for e in (-error, error))
        value, error = dot(b, (low + high) / 2, terms, scaled=of_factors)
        found.append((value, error + b.double().abs() @ ((high - low) / 2) * (1 + terms * _FP32)))
    values, errors = zip(*found, strict=True)
    return torch.cat(values), torch.cat(errors)


def as_fp8(
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
