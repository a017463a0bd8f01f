"""The experts of a layer, with what adapters add between their products."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .. import kernels as kg

__all__ = ["layer"]


def layer(
    out: torch.Tensor,
    x: torch.Tensor,
    w1: torch.Tensor,
    w2: torch.Tensor,
    topk_ids: torch.Tensor,
    topk_weights: torch.Tensor,
    activation: dict[str, Any],
    add_first: Callable[[torch.Tensor, torch.Tensor], None],
    add_second: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], None],
    *,
    w13_bias: torch.Tensor | None = None,
    w2_bias: torch.Tensor | None = None,
) -> None:
    """out[t] = sum over j of topk_weights[t, j] * (W2 . act(W1 . x[t] + w13_bias) + w2_bias), [T, H] of T tokens, with adapters.

    The products are apart, so that numbers of one adapter never reach rows of another, whatever they are.

    Args:
        topk_ids: [T, top_k], -1: not here.
        activation: as ``moe_act`` takes it.
        add_first: adds to the rows of gate and up, [T, top_k, *], of x [T, H].
        add_second: adds to rows [T, top_k, H] that have these weights [T, top_k], of the activations [T * top_k, I].
        w13_bias, w2_bias: [E, rows of W] in any float dtype; None: there is none.
    """
    (num_tokens, top_k), (num_experts, width, inter) = topk_ids.shape, w2.shape
    tables = kg.moe_align(topk_ids, num_experts=num_experts)
    gate_up, h = x.new_empty(num_tokens, top_k, w1.shape[1]), x.new_empty(num_tokens * top_k, inter)
    kg.moe_gemm(gate_up, x, w1, tables, x_rows="token")
    add_first(gate_up, x)
    kg.moe_act(h, gate_up, topk_ids, num_experts=num_experts, bias=w13_bias, **activation)
    down = x.new_empty(num_tokens, top_k, width)
    sum_weights = None
    if w2_bias is not None:  # it is weighted with its row, by the sum
        sum_weights, topk_weights = topk_weights, torch.ones_like(topk_weights)
    kg.moe_gemm(down, h, w2, tables, x_rows="pair", topk_weights=topk_weights)
    add_second(down, h, topk_weights)
    kg.moe_sum(down, topk_ids, num_experts=num_experts, topk_weights=sum_weights, bias=w2_bias, out=out)
