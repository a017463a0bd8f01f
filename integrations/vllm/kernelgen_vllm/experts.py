"""The experts of an unquantised MoE layer, with adapters, in place of vLLM's own Triton kernels.

A step without adapters is one ``fused_moe``. With adapters the products are apart, and what ``add_lora_w13`` and ``add_lora_w2``
of the wrapper add goes between them, as in vLLM: numbers of one adapter never reach rows of another, whatever they are.
"""

from __future__ import annotations

from typing import Any

import torch

from . import kernels as kg
from .rows import Rows
from .shared import experts as shared
from .versions import seams

__all__ = ["Deltas", "activation_of", "apply", "refusal"]

_vllm = seams()
# What vLLM calls activations, and what kernels do.
_WORDS = {
    "silu": "swiglu",
    "gelu": "geglu",
    "gelu_tanh": "geglu_tanh",
    "silu_no_mul": "silu",
    "gelu_no_mul": "gelu",
    "gelu_tanh_no_mul": "gelu_tanh",
    "relu2_no_mul": "relu2",
}
_IN_PRODUCT = ("swiglu", "swiglu_clamp", "relu2")  # what ``fused_moe`` has in both dtypes


def refusal(experts: Any, w1_dtype: torch.dtype, activation: Any, apply_router_weight_on_input: bool) -> str | None:
    """Why the base products of a layer stay vLLM's own; None: they do not."""
    if type(experts) is not _vllm.TritonExperts:  # a class of it may have other sums, or numbers that are prepared
        return "its kernels are its own"
    if w1_dtype not in (torch.bfloat16, torch.float16) or experts.quant_dtype is not None:
        return f"weights are of {w1_dtype}"
    if experts.w1_bias is not None or experts.w2_bias is not None:
        return "experts have a bias"
    if activation_of(activation, experts.activation_config) is None:
        return f"no kernel has the activation {activation.value}"
    if apply_router_weight_on_input:
        return "the routing weight is applied to the input"
    return None


def activation_of(activation: Any, config: Any) -> dict[str, Any] | None:
    """An activation of vLLM, with its ``ApplyMoEActivationConfig``, as the kernels take it; None: they have no such."""
    name, limit = activation.value, config.clamp_limit
    if name == "silu" and limit is not None:
        return {"activation": "swiglu_clamp", "limit": limit, "alpha": 1.0, "beta": 0.0}
    if name == "swigluoai_uninterleave" and limit is not None:
        return {"activation": "swiglu_clamp", "limit": limit, "alpha": config.alpha, "beta": config.beta}
    return {"activation": _WORDS[name]} if name in _WORDS else None


def apply(
    self: Any,
    output: torch.Tensor,
    hidden_states: torch.Tensor,
    w1: torch.Tensor,
    w2: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    activation: Any,
    global_num_experts: int,
    expert_map: torch.Tensor | None,
    a1q_scale: torch.Tensor | None,
    a2_scale: torch.Tensor | None,
    workspace13: torch.Tensor,
    workspace2: torch.Tensor,
    expert_tokens_meta: Any,
    apply_router_weight_on_input: bool,
) -> None:
    """``TritonExperts.apply``: output[t] = sum over j of topk_weights[t, j] * W2 . act(W1 . x[t]), [T, H] of T tokens."""
    context = self._lora_context
    ours = context is not None and isinstance(context.punica_wrapper.token_mapping_meta, Rows)
    ours = ours and not _vllm.is_hooked(self, topk_ids.shape[0])
    if not ours or refusal(self, w1.dtype, activation, apply_router_weight_on_input) is not None:
        self._kernelgen_own_apply(
            output, hidden_states, w1, w2, topk_weights, topk_ids, activation, global_num_experts, expert_map, a1q_scale,
            a2_scale, workspace13, workspace2, expert_tokens_meta, apply_router_weight_on_input,
        )  # fmt: skip
        return
    act = activation_of(activation, self.activation_config)
    assert act is not None
    some = context.local_token_lora_mapping is not None or context.punica_wrapper.token_mapping_meta.any
    if not some and act["activation"] in _IN_PRODUCT:
        kg.fused_moe(hidden_states, w1, w2, topk_ids, topk_weights, expert_map=expert_map, out=output, **act)
        return
    deltas = Deltas(self, w1, w2, topk_weights, topk_ids, expert_map)
    here = _here(topk_ids, expert_map)
    shared.layer(output, hidden_states, w1, w2, here, topk_weights, act, deltas.add_first, deltas.add_second)


_ROUTE = ("sorted_token_ids_lora", "expert_ids_lora", "num_tokens_post_padded_lora", "token_lora_mapping")  # as vLLM calls it


class Deltas:
    """What the adapters of a step add to the two products of a layer."""

    def __init__(
        self,
        experts: Any,
        w1: torch.Tensor,
        w2: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        expert_map: torch.Tensor | None,
    ) -> None:
        (num_tokens, top_k), self._experts = topk_ids.shape, experts
        self._layer = {"topk_weights": topk_weights, "num_tokens": num_tokens, "w1": w1, "w2": w2, "top_k_num": top_k}
        self._routing = {"topk_ids": topk_ids, "expert_map": expert_map}
        self._route: tuple[Any, ...] = ()

    def add_first(self, gate_up: torch.Tensor, x: torch.Tensor) -> None:
        """To the rows of gate and up, [T, top_k, *], of x [T, H]."""
        experts = self._experts
        self._route = experts.apply_w13_lora(experts._lora_context, y=gate_up, x=x, **self._routing, **self._layer)

    def add_second(self, down: torch.Tensor, h: torch.Tensor) -> None:
        """To the weighted rows of down, [T, top_k, H], of h [T * top_k, I]."""
        experts = self._experts
        route = dict(zip(_ROUTE, self._route, strict=True))
        experts.apply_w2_lora(experts._lora_context, y=down, x=h, **route, **self._layer)


def _here(topk_ids: torch.Tensor, expert_map: torch.Tensor | None) -> torch.Tensor:
    """The experts of each token as this GPU counts them, -1: not here."""
    if expert_map is None:
        return topk_ids
    return torch.where(topk_ids >= 0, expert_map[topk_ids.clamp_min(0).long()], -1)
