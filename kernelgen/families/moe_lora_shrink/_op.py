"""The first product of MoE-LoRA by itself."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .. import _runtime as runtime
from ..moe_route._op import MoeRoute, PairRoute
from ._problem import OP, Given, check, choose
from ._table import VARIANTS


def moe_lora_shrink(
    y: torch.Tensor,
    x: torch.Tensor,
    lora_a: Sequence[torch.Tensor],
    route: MoeRoute,
) -> None:
    """The rank vectors of a batch: y[s, p] = x[row(p)] . A_s[l, e]^T for every live pair p = t * top_k + j, 0 for every other.

    For adapters that are sharded over GPUs: what is done to y between this and ``moe_lora_expand`` is the caller's. All of y
    is written, so it can be summed (``lora_a`` holds a part of K) or gathered (a part of the rank) over GPUs as it is.

    Args:
        y: [S, T * top_k, rank] float32, last stride 1; it may be a part of a larger buffer.
        x: [T, K], row(p) = t; or [T * top_k, K], row(p) = p; bfloat16 or float16, last stride 1.
        lora_a: S tensors [L, E, rank, K] of one layout, in the dtype of ``x``; the strides over L and E are free, 0 shares.
        route: from ``moe_route`` or ``MoeRoute.from_tables``.

    Raises:
        ValueError: something does not fit, or no variant serves it; nothing was launched.
    """
    (_in_graphs if torch.compiler.is_compiling() else _apply)(y, x, lora_a, route)


def _bind(given: Given) -> runtime.Call:
    problem, route = check("moe_lora_shrink", given), given.route
    schedule = "pairs" if isinstance(route, PairRoute) else "blocks"
    variant = VARIANTS.get(
        "moe_lora_shrink", schedule=schedule, torch_dtype=given.x.dtype, rank=problem.rank, weight_scales=None, x_scales=None
    )
    if problem.num_pairs == 0:
        return runtime.NOTHING
    call: runtime.Call = variant.bind(problem, route, choose(schedule, problem, route))
    return call


_apply = OP.caller(_bind)
_in_graphs = OP.in_graphs(_apply)
