"""The activation between the two projections of an MoE layer."""

from __future__ import annotations

import torch

from .. import _runtime as runtime
from ..moe_route._op import MoeRoute
from ._problem import OP, Given, check, choose
from ._table import VARIANTS


def moe_act(
    h: torch.Tensor,
    x: torch.Tensor,
    topk_ids: torch.Tensor,
    *,
    activation: str,
    layout: str = "halves",
    num_experts: int,
    local_expert_start: int = 0,
    valid_tokens: torch.Tensor | None = None,
    num_tokens_hint: int | None = None,
    delta: torch.Tensor | None = None,
    route: MoeRoute | None = None,
    bias: torch.Tensor | None = None,
    limit: float | None = None,
    alpha: float | None = None,
    beta: float | None = None,
) -> None:
    """h[p] = act(x[p] + delta[p] + bias[e]) for every local pair p = t * top_k + j, in fp32, rounded once; other rows keep their
    bytes.

    ``fused_moe`` has its activation inside of its first product. This one is for layers in which LoRA adds to its rows.

    Args:
        h: [T * top_k, N] bfloat16 or float16, last stride 1.
        x: [T, top_k, 2 * N] with an activation that has a gate (the gate, and the linear half), else [T, top_k, N]; dtype of
            ``h``, stride(0) == top_k * stride(1).
        topk_ids: [T, top_k] int32 or int64, global ids.
        activation: a word of ``fused_moe``, for one.
        layout: how gate and up lie in x and in its bias: "halves", all of the gate first, or "interleaved", the gate at even
            columns and up at odd ones, as in gpt-oss.
        num_experts, local_expert_start: the global ids that are local.
        valid_tokens: int32 on the device, how many of the T rows are tokens; None: all.
        num_tokens_hint: how many tokens to expect, for the size of the grid; None: T. Any number is right.
        delta, route: what ``moe_lora`` wrote with ``add_inputs=False``, like ``x``, and its route, from ``moe_route``: rows of
            pairs that are live on it are added, others are not read. Its columns are halves in either layout, as moe_lora has
            its slices side by side. None: x has it already, or there is none.
        bias: [E, columns of x] in any float dtype, last stride 1, of the local experts, added in fp32 behind delta.
        limit, alpha, beta: of "swiglu_clamp", as ``fused_moe`` takes them.

    Raises:
        ValueError: something does not fit, or no variant serves it; nothing was launched.
    """
    sizes = (activation, layout, num_experts, local_expert_start, num_tokens_hint)
    apply = _in_graphs if torch.compiler.is_compiling() else _apply
    apply(h, x, topk_ids, valid_tokens, *sizes, delta, route, bias, limit, alpha, beta)


def _bind(given: Given) -> runtime.Call:
    problem = check("moe_act", given)
    facts = {"adapted": given.delta is not None, "interleaved": given.layout == "interleaved", "biased": given.bias is not None}
    variant = VARIANTS.get("moe_act", torch_dtype=given.x.dtype, epilogue=given.activation, **facts)
    if problem.num_tokens == 0:
        return runtime.NOTHING
    call: runtime.Call = variant.bind(problem, choose(problem))
    return call


_apply = OP.caller(_bind)
_in_graphs = OP.in_graphs(_apply)
