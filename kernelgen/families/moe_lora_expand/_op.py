"""The second product of MoE-LoRA by itself."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .. import _runtime as runtime
from ..moe_route._op import MoeRoute, PairRoute
from ._problem import OP, Given, check, choose
from ._table import VARIANTS


def moe_lora_expand(
    out: torch.Tensor,
    y: torch.Tensor,
    lora_b: Sequence[torch.Tensor],
    route: MoeRoute,
    *,
    offset: int = 0,
    topk_weights: torch.Tensor | None = None,
    add_inputs: bool = True,
    mul_routed_weight: bool = False,
) -> None:
    """Columns of a batch from its rank vectors: out[p, columns of s] (+)= w[p] * (y[s, p] . B_s[l, e]^T) for every live pair p.

    For adapters that are sharded over GPUs: y is what ``moe_lora_shrink`` made, summed or gathered over them. It is rounded
    to the dtype of ``out`` in front of the product. Rows of other pairs and other columns keep their bytes.

    Args:
        out: [T, top_k, *] bfloat16 or float16, last stride 1, stride(0) == top_k * stride(1).
        y: float32, [S, T * top_k, rank]; or, as an all-gather of parts of the rank leaves it,
            [shards, S, T * top_k, shard], shards * shard = rank. Last stride 1, the others are free. Rows of other pairs are not
            read.
        lora_b: S tensors [L, E, N, rank] of one layout, in the dtype of ``out``, the adapter's scaling folded in; the strides
            over L and E are free, 0 shares.
        route: that of the shrink.
        offset: column of ``out`` where the first slice begins; each other begins where the one before it ends.
        topk_weights: [T, top_k] float, w; used with ``mul_routed_weight``.
        add_inputs: add to ``out``, or overwrite.
        mul_routed_weight: the second projection of an expert (w2); False: w[p] = 1.

    Raises:
        ValueError: something does not fit, or no variant serves it; nothing was launched.
    """
    request = (topk_weights, offset, add_inputs, mul_routed_weight)
    (_in_graphs if torch.compiler.is_compiling() else _apply)(out, y, lora_b, route, *request)


def _bind(given: Given) -> runtime.Call:
    problem, route = check("moe_lora_expand", given), given.route
    schedule = "pairs" if isinstance(route, PairRoute) else "blocks"
    variant = VARIANTS.get(
        "moe_lora_expand",
        schedule=schedule,
        torch_dtype=given.out.dtype,
        adds=given.add_inputs,
        weighted=given.mul_routed_weight,
        rank=problem.rank,
        weight_scales=None,
    )
    if problem.num_pairs == 0:
        return runtime.NOTHING
    call: runtime.Call = variant.bind(problem, route, choose(schedule, problem, route))
    return call


_apply = OP.caller(_bind)
_in_graphs = OP.in_graphs(_apply)
