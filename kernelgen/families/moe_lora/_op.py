"""Fused MoE-LoRA: the schedule and the tiles by the sizes of the call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from .. import _runtime as runtime
from ..moe_route._op import MoeRoute
from ._problem import CONFIGS, OP, Given, Problem, check, choose, plan
from ._table import VARIANTS


def moe_lora(
    out: torch.Tensor,
    x: torch.Tensor,
    lora_a: Sequence[torch.Tensor],
    lora_b: Sequence[torch.Tensor],
    route: MoeRoute,
    *,
    topk_weights: torch.Tensor | None = None,
    add_inputs: bool = True,
    mul_routed_weight: bool = False,
    a_scale: Sequence[torch.Tensor] | None = None,
    b_scale: Sequence[torch.Tensor] | None = None,
    x_scale: torch.Tensor | None = None,
) -> None:
    """Apply the LoRA adapters of a batch to the experts of an MoE layer, in place.

    For every live pair p = t * top_k + j of adapter l and expert e, and every slice s:
    out[t, j, s * N : (s + 1) * N] (+)= w[p] * (x[row(p)] . A_s[l, e]^T) . B_s[l, e]^T. Rows of other pairs keep their bytes.

    Args:
        out: [T, top_k, S * N] bfloat16 or float16, last stride 1, stride(0) == top_k * stride(1).
        x: [T, K], row(p) = t; with ``mul_routed_weight`` [T * top_k, K], row(p) = p. Dtype of ``out``.
        lora_a: S tensors [L, E, rank, K] of one shape and strides (those over L and E are free, 0 shares). S = 2: gate, up.
        lora_b: S tensors [L, E, N, rank], the adapter's scaling folded in.
        route: from ``moe_route`` or ``MoeRoute.from_tables``.
        topk_weights: [T, top_k] float, w; used with ``mul_routed_weight``.
        add_inputs: add to ``out``, or overwrite its live rows.
        mul_routed_weight: the second projection of an expert (w2); False: the first (w13), where w[p] = 1.
        a_scale, b_scale: S tensors float32 each, for FP8 weights (float8_e4m3fn or float8_e5m2): [L, E]; or [L, E, rank] and
            [L, E, N], with a last dimension of 1 or without; or, a scale a group,
            [L, E, ceil(out / group_n), ceil(in / group_k)] of each matrix [out, in]. A weight stands for its number times its
            scale.
        x_scale: float32 or float8_e8m0fnu, for an FP8 x: [1], or [E] of experts with ``mul_routed_weight``; or [rows, 1]; or
            [rows, ceil(K / group_k)], row by row or column by column.

    Raises:
        ValueError: something does not fit, or no variant serves it; nothing was launched.
    """
    request = (topk_weights, add_inputs, mul_routed_weight, a_scale, b_scale, x_scale)
    (_in_graphs if torch.compiler.is_compiling() else _apply)(out, x, lora_a, lora_b, route, *request)


def _bind(given: Given) -> runtime.Call:
    problem = check("moe_lora", given)
    if problem.num_pairs == 0:
        return runtime.NOTHING
    facts, route = {schedule: _facts(schedule, problem, given.out.dtype) for schedule in CONFIGS}, given.route
    found = {schedule: VARIANTS.find(**wanted) for schedule, wanted in facts.items()}
    least = min((variant.block_rank for variant in found.values() if variant is not None), default=0)
    problem = problem._replace(block_r=least)
    schedule, config = plan(problem, route)
    variant = found[schedule]
    if schedule != "small_batch" and (variant is None or variant.block_rank > least):
        schedule = "one_shot" if schedule == "two_kernel" else "two_kernel"  # serves the same sorted batches
        config, variant = choose(schedule, problem, route), found[schedule]
    call: runtime.Call = VARIANTS.get("moe_lora", **facts[schedule]).bind(problem, route, config)
    return call


def _facts(schedule: str, problem: Problem, dtype: torch.dtype) -> dict[str, Any]:
    """What the call asks of the variant of a schedule."""
    return {
        "schedule": schedule,
        "torch_dtype": dtype,
        "assignment": "naive" if schedule == "small_batch" else "sorted",
        "adds": problem.adds,
        "weighted": problem.weighted,
        "rank": problem.rank,
        "weight_scales": problem.weight_scales,
        "x_scales": problem.x_scales,
    }


_apply = OP.caller(_bind)
_in_graphs = OP.in_graphs(_apply)
