"""Grouped products of a base MoE layer: the schedule and the tiles by the sizes of the call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from .. import _mxfp4 as mxfp4
from .. import _runtime as runtime
from .._scales import find_factor_mode, find_mode, find_x_mode
from ..moe_align._op import MoeTables
from ..moe_runs._op import MoeRuns
from . import _problem as problems
from ._problem import (
    OP,
    Given,
    Modes,
    Problem,
    has_boxes,
    has_gluon,
    has_lanes,
    plan,
    problem_of,
)
from ._table import QUANT, VARIANTS


def moe_gemm(
    out: torch.Tensor,
    x: torch.Tensor,
    w: torch.Tensor,
    tables: MoeTables,
    *,
    x_rows: str,
    out_rows: str = "pair",
    activation: str | None = None,
    layout: str = "halves",
    topk_weights: torch.Tensor | None = None,
    w_scale: torch.Tensor | None = None,
    x_scale: torch.Tensor | None = None,
    v: torch.Tensor | None = None,
    lora_b: Sequence[torch.Tensor] | None = None,
    runs: MoeRuns | None = None,
    b_scale: Sequence[torch.Tensor] | None = None,
    bias: torch.Tensor | None = None,
    limit: float | None = None,
    alpha: float | None = None,
    beta: float | None = None,
    out_scale: torch.Tensor | None = None,
) -> None:
    """One projection of the experts of an MoE layer: out[to(p)] = w[p] * f(x[from(p)] . W[e]^T) for every local pair p.

    Rows of pairs that are not local keep their bytes. With adapters, a pair of the adapter l adds v[p] . B[l, e]^T to its
    product before f, in fp32; where there is a gate to each half its own. With a bias, bias[e] is added behind that, too. A
    routing weight of the first projection is one of its input: f(w[p] * x[from(p)] . W[e]^T); it multiplies the fp32 sums, as a
    product is linear, and not the bias.

    Args:
        out: [T * top_k, N] or [T, top_k, N] bfloat16 or float16; with ``out_rows="token"`` [T, N] in any float dtype.
        x: [T, K] with ``x_rows="token"``, else [T * top_k, K]; the dtype of the weights.
        w: [E, N, K], or [E, 2 * N, K] with an activation that has a gate: the gate, then the linear half, or both in turns.
        tables: from ``moe_align``; from ``moe_align.no_tables`` for few pairs, which then stream their weights one by one.
        x_rows: where the row of a pair stands in x: at its "token", at the "pair" itself, or at its place in the
            tables ("sorted"), which for an FP8 product with an activation ``moe_permute`` sees to.
        out_rows: "pair", "sorted", or "token": the sum over the experts of a token, of few pairs.
        activation: None, or a word of ``fused_moe``, of the fp32 sum; for ``x_rows="token"``.
        layout: how gate and up lie in w, its scales and its bias: "halves", gate over up, or "interleaved", the rows of gate at
            even places.
        topk_weights: [T, top_k] float, w[p], applied in fp32; with an activation, to the input.
        w_scale: float32 or float8_e8m0fnu, for FP8 weights (float8_e4m3fn or float8_e5m2), each of which stands for its number
            times its scale: [E]; or a scale a row, [E, rows of W[e]], with a last dimension of 1 or without; or a scale a
            group, [E, ceil(N / group_n), ceil(K / group_k)]. Gate and up are quantised apart: [E] may be [E, 2], and groups of
            rows begin anew with up, [E, 2 * ceil(N / group_n), ...]. Or uint8 or float8_e8m0fnu, [E, rows of W[e], K / 32], for
            MXFP4 weights, uint8 [E, rows of W[e], K / 2] of two numbers a byte, the lower bits first. ``out`` is bfloat16 then.
        x_scale: likewise, for an FP8 x: [1], [rows of x, 1] or [rows of x, ceil(K / group_k)], as the scales of the weights.
            [1] may be [E] where rows are of pairs: the input scale of each expert. Groups may lie column by column.
        v, lora_b, runs: rank vectors from ``moe_shrink``, with tables of pairs or of tokens; a tensor [L, E, N, rank] for each
            half of w, or one, with the scaling folded in, finite, the strides over L and E free, 0 shares; and the runs, with the
            ``tables`` that ``moe_runs`` returned beside them. For rows as a layer has them: "token" to "sorted" to "pair", or of
            few pairs "token" to "pair" with an activation, and "pair" to "token".
        b_scale: a tensor float32 for each of an FP8 ``lora_b`` (float8_e4m3fn or float8_e5m2), which stands for its numbers times
            scales: [L, E]; or [L, E, N], with a last dimension of 1 or without; or [L, E, ceil(N / group_n),
            ceil(rank / group_k)].
        bias: [E, rows of W[e]] in any float dtype, last stride 1, added in fp32.
        limit, alpha, beta: of "swiglu_clamp", as ``fused_moe`` takes them.
        out_scale: for an ``out`` that is FP8, [T * top_k, N] with ``out_rows="sorted"``: the codes and scales that ``moe_quant``
            makes of what else were written. Float32 [T * top_k, ceil(N / group_k)], contiguous, written, where the scales of x
            are of groups; [1] or [E], read, where x has one. For "swiglu" in blocks of 128 rows on sm_90, with Gluon.

    Raises:
        ValueError: something does not fit, or no variant serves it; nothing was launched.
    """
    request, scales = (topk_weights, x_rows, out_rows, activation, layout), (w_scale, x_scale)
    apply = _in_graphs if torch.compiler.is_compiling() else _apply
    apply(out, x, w, tables, *request, *scales, v, lora_b, runs, b_scale, bias, limit, alpha, beta, out_scale)


def bind(given: Given, *, zero_rest: bool = False, follows: bool = False, op: str = "moe_gemm") -> runtime.Call:
    """The launch for calls that look like this one, of ``op``; ``zero_rest``: rows behind the tokens become zero; ``follows``: as
    ``problem_of`` says.

    Raises:
        ValueError: as ``moe_gemm``.
    """
    in_order = given.x_rows == given.out_rows == "sorted"
    schedule = "warp_specialised" if in_order or given.out_scale is not None else None
    problem, facts = _asked(given, op, zero_rest=zero_rest, follows=follows, schedule=schedule)
    if problem.num_pairs == 0:
        return runtime.NOTHING

    def there(schedule: str) -> bool:
        return VARIANTS.find(schedule=schedule, **facts) is not None

    schedule, config = plan(problem, has_boxes(problem, given.x, given.w), has_lanes(problem, given.x, given.w), there)
    variant = VARIANTS.get(op, schedule=schedule, **facts)
    if given.out_scale is not None and not has_gluon():
        runtime.fail(op, "out_scale", runtime.describe(given.out_scale), None, "without Gluon use moe_quant behind it")
    if in_order and not has_gluon():
        runtime.fail(op, "x_rows, out_rows", "both sorted", "x_rows 'token'", "rows in order are for kernels in Gluon")
    call: runtime.Call = variant.bind(problem, config)
    return call


def is_tuned(given: Given, op: str = "moe_gemm") -> bool:
    """Whether tuning says of calls that look like this one that warps of roles take them, where these alone can: for rows of x in
    order, or with an ``out_scale``. By the rule none does.

    Raises:
        ValueError: as ``moe_gemm``.
    """
    problem, facts = _asked(given, op)
    served = problem.num_pairs > 0 and VARIANTS.find(schedule="warp_specialised", **facts) is not None
    return served and problems.is_tuned(problem, has_boxes(problem, given.x, given.w))


def _asked(
    given: Given, op: str, *, zero_rest: bool = False, follows: bool = False, schedule: str | None = None
) -> tuple[Problem, dict[str, Any]]:
    """The sizes of a call, checked, and the facts of the variants that serve it; of ``schedule`` where one is meant."""
    sizes = OP.check(op, given)
    kind = sizes.get("D") or torch.bfloat16  # of a product of FP8 with FP8
    of_rows = 1 if given.x_rows == "token" else given.tables.num_experts
    scales = (given.w_scale, given.x_scale)
    of_weights, of_x = find_scales(op, given.x, given.w, *scales, slices=sizes["S"], experts=of_rows)
    of_b = None
    if given.b_scale is not None and given.lora_b is not None:
        of_b = find_factor_mode(op, "b_scale", given.b_scale, given.lora_b, QUANT)
    modes, how = Modes(of_weights, of_x, of_b), {"zero_rest": zero_rest, "follows": follows}
    problem = problem_of(op, given, sizes, modes, dtype=kind, schedule=schedule, **how)
    return problem, {
        "torch_dtype": kind,
        "rows": problem.rows,
        "epilogue": problem.epilogue,
        "weighted": given.topk_weights is not None,
        "weight_scales": problem.weight_scales,
        "x_scales": problem.x_scales,
        "adapted": problem.rank > 0,
        "b_scales": problem.b_scales,
        "interleaved": problem.interleaved,
        "biased": given.bias is not None,
        "writes_fp8": problem.writes_fp8,
    }


def find_scales(
    name: str,
    x: torch.Tensor,
    w: torch.Tensor,
    w_scale: torch.Tensor | None,
    x_scale: torch.Tensor | None,
    *,
    slices: int,
    experts: int = 1,
    label: str = "w_scale",
) -> tuple[str | None, str | None]:
    """Of what w and x have a scale each, by the shapes; w is of so many ``slices``: 2 for gate and up; rows of x of one of so
    many ``experts`` each, or 1: a row is read by several.

    Raises:
        ValueError: no mode has scales of such shapes.
    """
    of_weights = of_x = None
    if w_scale is not None:
        of_weights = find_mode(w_scale, w, QUANT, slices)
        if of_weights is None and w.dtype == torch.uint8:
            mxfp4.refuse_scale(name, label, w_scale, w)
        if of_weights is None:
            groups = f"ceil(N / {QUANT.group_n}), ceil(K / {QUANT.group_k})"
            if slices > 1:
                wanted, hint = f"[E], [E, {slices}], [E, {slices} * N] or [E, {slices} * {groups}]", _APART
            else:
                wanted, hint = f"[E], [E, N] or [E, {groups}]", ""
            runtime.fail(name, label, runtime.describe(w_scale), f"{wanted} of w {runtime.describe(w)}", hint)
    if x_scale is not None:
        of_x = find_x_mode(name, x, x_scale, QUANT, "group" if of_weights == "group" else None, experts)
    return of_weights, of_x


_APART = "gate and up are quantised apart, so that groups of rows begin anew with up: quantize_weights(..., slices=2)"


_apply = OP.caller(bind)
_in_graphs = OP.in_graphs(_apply)
