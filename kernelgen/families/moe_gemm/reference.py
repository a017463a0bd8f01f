"""The products of a base MoE layer in fp64, and how far a right kernel can be from them.

For every local pair p = t * top_k + j of expert e, from a row of x to a row of out, which are the token's, the pair's or the
pair's place in the tables:

    out[to(p)] = round(w[p] * f(x[from(p)] . W[e]^T))          f: nothing, or an activation
    out[t]     = round(sum over j of w[p] * (x[p] . W[e]^T))   where the experts of a token are summed

With an adapter l, v[p] . B[l, e]^T is added to the product: it is one of K + rank columns. A bias[e] is added behind that. The
routing weight of a product with an activation is one of its input, f((w[p] * x[from(p)]) . W[e]^T + bias[e]): it is the same to
multiply the sums, in fp32.

``round`` is to the dtype of out. All other rows keep their bytes.

The bound. A kernel forms sums in fp32, in any order and with any tree, on units that may truncate: a sum of n products is
then off by at most n * 2^-23 times the sum of their magnitudes (products of 16-bit numbers are exact in fp32). What follows
rounds once an operation; activations are in ``kernelgen.families.activation``.

FP8 operands stand for their numbers times their scales: ``dequantise`` them first. Their products are exact in fp32 too; scales
multiply sums or rows of x, which rounds up to four times more. The tensor cores of sm_90 form sums of FP8 products 32 at a time,
each of which, with what came before, loses what is below 2^-13 of the largest of them; after at most 128 of them a kernel adds
the sum up in fp32.
"""

from __future__ import annotations

from types import MappingProxyType
from typing import Mapping, NamedTuple, Sequence

import torch

from kernelgen.families.activation import Clamp, activate, slices
from kernelgen.families.moe_align.reference import Local
from kernelgen.families.moe_runs.reference import Adapters

_FP32 = 2.0**-23  # relative error of an fp32 operation that truncates
_FP32_TINY = 2.0**-149  # and its absolute error where it underflows
_SHORT = 132 * 2.0**-13  # of the magnitudes of FP8 products, what tensor cores lose: four times 32 of them, and a sum
_SCALINGS = 4  # roundings

Rows = Mapping[int, torch.Tensor]  # what was made beside a product, by pair
NO_ROWS: Rows = MappingProxyType({})


class Delta(NamedTuple):
    """What adapters add."""

    v: torch.Tensor  # [T * top_k, S, rank], by pair
    lora_b: Sequence[torch.Tensor]  # S tensors [L, E, N, rank]
    adapters: Adapters  # of each token
    scaled: bool = False  # lora_b was dequantised
    counted: Sequence[int] | None = None  # of each adapter, the ranks that are read; None: all


class Expected(NamedTuple):
    """What rows of ``out`` should hold, fp64; a right kernel is never further off than ``bound``."""

    rows: torch.Tensor  # [n] int64, the rows that are written
    out: torch.Tensor  # [n, N]
    bound: torch.Tensor  # [n, N]


def moe_gemm(
    x: torch.Tensor,
    w: torch.Tensor,
    local: Sequence[Local],
    *,
    top_k: int,
    rows: str,
    epilogue: str,
    topk_weights: torch.Tensor | None,
    dtype: torch.dtype,
    scaled: bool = False,
    short: bool = False,
    order: Sequence[Local] | None = None,
    delta: Delta | None = None,
    interleaved: bool = False,
    bias: torch.Tensor | None = None,
    clamp: Clamp | None = None,
) -> Expected:
    """The exact rows for operands as they are, and the bound on a kernel's error.

    Args:
        x: [T, K] or [T * top_k, K], in the order that ``rows`` names first.
        w: [E, N, K]; with a gate [E, 2 * N, K].
        local: from ``local_pairs``.
        rows: "token_sorted", "sorted_sorted", "sorted_pair", "token_pair" or "pair_pair"; for "pair_token" see ``moe_gemm_sum``.
        epilogue: a tag of the axis.
        topk_weights: [T, top_k], or None: 1.
        dtype: of out.
        scaled: operands were dequantised; a kernel applies their scales, which are below 2^24, in fp32.
        short: products of FP8 with FP8 are formed on tensor cores.
        order: local pairs in the order of the tables, None: by (expert, pair).
        delta: None: there are no adapters.
        interleaved: rows of gate and up are in turns, in w and bias.
        bias: [E, rows of W[e]]; None: there is none.
        clamp: the numbers of "swiglu_clamp".
    """
    if interleaved:
        w, bias = in_halves(w), None if bias is None else in_halves(bias)
    order = order or sorted(local, key=lambda item: (item.expert, item.pair))
    place = {item.pair: position for position, item in enumerate(order)}
    targets, values, bounds = [], [], []
    for pair, expert in local:
        source = {"token": pair // top_k, "sorted": place[pair], "pair": pair}[rows.split("_")[0]]
        value, error = _product(w, x[source], pair // top_k, pair, expert, delta, scaled=scaled, short=short)
        if topk_weights is not None and epilogue != "none":
            value, error = _weighted(value, error, topk_weights, pair)
        if bias is not None:
            value = value + bias[expert].double()
            error = error + _FP32 * (value.abs() + error)
        value, error = activate(value, error, epilogue, clamp)
        if topk_weights is not None and epilogue == "none":
            value, error = _weighted(value, error, topk_weights, pair)
        targets.append(place[pair] if rows.endswith("_sorted") else pair)
        values.append(value)
        bounds.append(error + cast_error(value.abs() + error, dtype))
    return _expected(targets, values, bounds, w.shape[1] // slices(epilogue))


def moe_gemm_sum(
    x: torch.Tensor,
    w: torch.Tensor,
    local: Sequence[Local],
    *,
    num_tokens: int,
    top_k: int,
    topk_weights: torch.Tensor | None,
    dtype: torch.dtype,
    scaled: bool = False,
    short: bool = False,
    delta: Delta | None = None,
    bias: torch.Tensor | None = None,
) -> Expected:
    """The sums over the experts of the first ``num_tokens`` tokens; arguments as of ``moe_gemm``."""
    values = torch.zeros(num_tokens, w.shape[1], dtype=torch.float64, device=x.device)
    bounds = torch.zeros_like(values)
    for pair, expert in local:
        value, error = _product(w, x[pair], pair // top_k, pair, expert, delta, top_k, scaled=scaled, short=short)
        weight = torch.ones((), dtype=torch.float64) if topk_weights is None else topk_weights.flatten()[pair].float().double()
        if bias is not None:  # one that is weighted and summed up beside the products, then one more sum
            value = value + bias[expert].double()
            error = error + (top_k + 2) * _FP32 * bias[expert].double().abs() + _FP32 * (value.abs() + error)
        values[pair // top_k] += weight * value
        bounds[pair // top_k] += weight.abs() * error + _FP32_TINY
    bounds += cast_error(values.abs() + bounds, dtype)
    return Expected(torch.arange(num_tokens), values, bounds)


def moe_sum(
    y: torch.Tensor,
    local: Sequence[Local],
    *,
    num_tokens: int,
    topk_weights: torch.Tensor | None,
    dtype: torch.dtype,
    delta: Rows = NO_ROWS,
    bias: torch.Tensor | None = None,
) -> Expected:
    """out[t] = sum of w[t, j] * (y[t, j] + delta[t, j] + bias[e]) over the local pairs of the first tokens; y [T, top_k, N]."""
    top_k = y.shape[1]
    values = torch.zeros(num_tokens, y.shape[2], dtype=torch.float64, device=y.device)
    bounds = torch.zeros_like(values)
    for pair, expert in local:
        token, j = divmod(pair, top_k)
        weight = torch.ones((), dtype=torch.float64) if topk_weights is None else topk_weights[token, j].float().double()
        part, error = _added(y[token, j], delta.get(pair), None if bias is None else bias[expert])
        part, error = weight * part, weight.abs() * error
        values[token] += part
        bounds[token] += error + (top_k + 1) * (_FP32 * (part.abs() + error) + _FP32_TINY)
    bounds += cast_error(values.abs() + bounds, dtype)
    return Expected(torch.arange(num_tokens), values, bounds)


def in_halves(rows: torch.Tensor) -> torch.Tensor:
    """Rows of gate and up that are in turns, all of gate first; [E, 2 * N, ...]."""
    return torch.cat([rows[:, ::2], rows[:, 1::2]], 1)


def _weighted(
    value: torch.Tensor, error: torch.Tensor, topk_weights: torch.Tensor, pair: int
) -> tuple[torch.Tensor, torch.Tensor]:
    weight = topk_weights.flatten()[pair].float().double()
    return weight * value, weight.abs() * error + _FP32 * (weight * value).abs() + _FP32_TINY


def _product(
    w: torch.Tensor, x: torch.Tensor, token: int, pair: int, expert: int, delta: Delta | None, times: int = 1, **flags: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """The sums of a pair and their error; ``times`` as many products end in one sum."""
    rank = 0 if delta is None else delta.v.shape[2]
    terms = times * (x.shape[0] + rank) + (0 if times == 1 and delta is None else 2)
    value, error = dot(w[expert], x, terms, **flags)
    adapter = None if delta is None else delta.adapters[token]
    if delta is not None and adapter is not None:
        pairs, counted = zip(delta.lora_b, delta.v[pair], strict=True), delta.counted
        read = slice(None if counted is None else counted[adapter])
        more = [dot(b[adapter, expert][:, read], v[read], terms, scaled=delta.scaled) for b, v in pairs]
        value, error = (part + torch.cat(added) for part, added in zip((value, error), zip(*more, strict=True), strict=True))
    return value, error


def _expected(
    targets: list[int], values: list[torch.Tensor], bounds: list[torch.Tensor], n: int
) -> Expected:
    if not targets:
        nothing = torch.zeros(0, n, dtype=torch.float64)
        return Expected(torch.zeros(0, dtype=torch.int64), nothing, nothing)
    return Expected(torch.tensor(targets), torch.stack(values), torch.stack(bounds))


def dot(
    matrix: torch.Tensor,
    vector: torch.Tensor,
    terms: int | None = None,
    *,
    scaled: bool = False,
    short: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """matrix @ vector in fp64, and the error of fp32 sums over its columns; ``scaled`` and ``short`` as of ``moe_gemm``."""
    matrix, vector = matrix.double(), vector.double()
    count = matrix.shape[1] if terms is None else terms
    tiny = _FP32_TINY
    if scaled:
        count, tiny = count + _SCALINGS, tiny * 2.0**24
    size = matrix.abs() @ vector.abs()
    return matrix @ vector, count * (_FP32 * size + tiny) + (_SHORT * size if short else 0.0)


def cast_error(magnitude: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The error of rounding numbers of at most ``magnitude`` to ``dtype``, to nearest."""
    info = torch.finfo(dtype)
    return magnitude * (info.eps / 2) + info.smallest_normal * info.eps / 2


def _added(row: torch.Tensor, *more: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """A row and what is added to it, one after the other in fp32, and the error of that."""
    value, error = row.double(), torch.zeros_like(row, dtype=torch.float64)
    for part in more:
        if part is not None:
            value = value + part.double()
            error = error + _FP32 * (value.abs() + error)
    return value, error


def moe_act(
    x: torch.Tensor,
    local: Sequence[Local],
    *,
    epilogue: str,
    delta: Rows = NO_ROWS,
    interleaved: bool = False,
    bias: torch.Tensor | None = None,
    clamp: Clamp | None = None,
) -> Expected:
    """h[p] = act(x[p] + delta[p] + bias[e]) of the local pairs; x [T, top_k, N or 2 * N], h [T * top_k, N] of its dtype.

    Columns of gate and up are in turns in x and bias where they are ``interleaved``, and never in delta.
    """
    given = x.flatten(0, 1)
    if interleaved:
        given, bias = in_halves(given), None if bias is None else in_halves(bias)
    targets, found = [pair for pair, _ in local], []
    for pair, expert in local:
        row, error = _added(given[pair], delta.get(pair), None if bias is None else bias[expert])
        found.append(activate(row, error, epilogue, clamp))
    values = [value for value, _ in found]
    bounds = [error + cast_error(value.abs() + error, x.dtype) for value, error in found]
    return _expected(targets, values, bounds, x.shape[2] // slices(epilogue))
