"""The experts of an MoE layer, with adapters, in place of vLLM's own Triton kernels.

A step is one ``fused_moe``, with its adapters inside of both products. Adapters that are cut over GPUs need a collective behind
their first factors: the products are apart then, and what ``add_lora_w13`` and ``add_lora_w2`` of the wrapper add goes between
them, as in vLLM. Either way numbers of one adapter never reach rows of another, whatever they are.
"""

from __future__ import annotations

import dataclasses
import types
from typing import Any

import torch

from . import kernels as kg
from .shared import experts as shared
from .shared.calls import empty, looks, on_meta, refusal
from .versions import MXFP4, seams

__all__ = ["FACTORS", "Deltas", "Layer", "activation_of", "apply", "contain", "layer_of", "refusal_of"]

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
_DTYPES = (torch.bfloat16, torch.float16)
_GROUPS = [128, 128]  # rows and columns of FP8 weights that share a scale


@dataclasses.dataclass(frozen=True)
class Layer:
    """A layer that the kernels serve.

    Attributes:
        activation: as ``moe_act`` takes it.
        options: what ``fused_moe`` takes besides, each step the same; where it has no adapters inside, biases alone.
        scale: of what FP8 inputs have one each: "tensor", "token" or "group"; None: they are of 16 bits.
        fused, inside: whether ``fused_moe`` has such a layer without adapters, and with them inside of its products.
    """

    activation: dict[str, Any]
    options: dict[str, Any]
    scale: str | None = None
    fused: bool = True
    inside: bool = True

    def empty_scales(self, num_tokens: int, width: int) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Scales of FP8 inputs as vLLM has them, on the meta device."""
        if self.scale is None:
            return None, None
        sizes = {"tensor": (1,), "token": (num_tokens, 1), "group": (num_tokens, -(-width // _GROUPS[1]))}
        of_h = empty(1, dtype=torch.float32) if self.scale == "tensor" else None
        return empty(*sizes[self.scale], dtype=torch.float32), of_h

    def ops(self, fully_sharded: bool) -> str:
        """What it calls, of steps with adapters and of those without."""
        if self.inside:
            return "fused_moe"
        lora = "moe_lora_shrink, moe_lora_expand" if fully_sharded else "moe_lora"
        return f"{lora} (moe_gemm, moe_act, moe_sum{'; fused_moe' if self.fused else ''})"

    @property
    def looks(self) -> tuple[Any, ...]:
        """Equal for layers that make the same calls."""
        return (*self.activation.items(), self.scale, *self.options, *looks(*self.options.values()))

    def on_meta(self) -> Layer:
        """The same on the meta device."""
        return dataclasses.replace(self, options={name: on_meta(value) for name, value in self.options.items()})

    def fused_moe(self, out: torch.Tensor, x: torch.Tensor, *layer: torch.Tensor, **given: Any) -> None:
        """out[t] = sum over j of topk_weights[t, j] * W2 . act(W1 . x[t])."""
        kg.fused_moe(x, *layer, out=out, **self.activation, **self.options, **given)

    def scales_of(self, num_tokens: int, x: torch.Tensor | None, h: torch.Tensor | None) -> dict[str, torch.Tensor]:
        """Scales of FP8 inputs as vLLM has them, of T tokens and of the rows in between, as ``fused_moe`` takes them."""
        if self.scale is None or x is None:
            return {}
        if self.scale == "group":
            return {"x_scale": x}
        if self.scale == "token":
            return {"x_scale": x.reshape(-1, 1).expand(num_tokens, 1).contiguous()}
        assert h is not None
        return {"x_scale": x.reshape(1), "h_scale": h.reshape(1)}


def layer_of(experts: Any, context: Any, w1: torch.Tensor, w2: torch.Tensor, activation: Any) -> Layer | str:
    """What serves a layer, or why its base products stay vLLM's own."""
    in_mxfp4 = getattr(experts, "kernelgen_mxfp4", False)
    if type(experts) is not _vllm.TritonExperts and not in_mxfp4:  # it may have other sums, or numbers that are prepared
        if experts.weight_quant_dtype == "mxfp4":
            why = getattr(experts.moe_config, "kernelgen_refusal", f"{MXFP4}=1 is not set")
            return f"it has repacked weights in MXFP4, as {why}"
        return "its kernels are its own"
    act = activation_of(activation, experts.activation_config)
    if act is None:
        return f"no kernel has the activation {activation.value}"
    biases = {"w13_bias": experts.w1_bias, "w2_bias": experts.w2_bias}
    options: dict[str, Any] = {name: bias for name, bias in biases.items() if bias is not None}
    scale = None
    if in_mxfp4:
        options |= {"w13_scale": experts.w1_scale, "w2_scale": experts.w2_scale}
    elif experts.quant_dtype is not None or w1.dtype not in _DTYPES:
        found = _fp8(experts, w1, w2)
        if isinstance(found, str):
            return found
        scale, of_weights = found
        options = options | of_weights
    layer = Layer(act, options, scale)
    refusals = [refusal_of(layer, context, w1, w2, adapted, w1.device) for adapted in (False, True)]
    if refusals == [None, None]:
        return layer
    apart = dataclasses.replace(layer, fused=refusals[0] is None, inside=False)
    weights_scaled = "w13_scale" in options  # products that are apart have no scales
    if not weights_scaled and refusal_of(apart, context, w1, w2, False, w1.device) is None:
        return apart
    return next(filter(None, reversed(refusals)))


def activation_of(activation: Any, config: Any) -> dict[str, Any] | None:
    """An activation of vLLM, with its ``ApplyMoEActivationConfig``, as the kernels take it; None: they have no such."""
    name, limit = activation.value, config.clamp_limit
    if name == "silu" and limit is not None:
        return {"activation": "swiglu_clamp", "limit": limit, "alpha": 1.0, "beta": 0.0}
    if name == "swigluoai":  # of gpt-oss, whose numbers vLLM has in its kernel
        return {"activation": "swiglu_clamp", "layout": "interleaved", "limit": 7.0, "alpha": 1.702, "beta": 1.0}
    if name == "swigluoai_uninterleave" and limit is not None:
        return {"activation": "swiglu_clamp", "limit": limit, "alpha": config.alpha, "beta": config.beta}
    return {"activation": _WORDS[name]} if name in _WORDS else None


def _fp8(experts: Any, w1: torch.Tensor, w2: torch.Tensor) -> tuple[str, dict[str, torch.Tensor]] | str:
    """Of what FP8 inputs have a scale each, and the scales of the weights; or why not."""
    scales = experts.w1_scale, experts.w2_scale
    if w1.dtype not in (torch.float8_e4m3fn, torch.float8_e5m2) or None in scales or experts.quantization_emulation:
        return f"weights are of {w1.dtype}"
    if experts.quant_dtype != w1.dtype:
        return f"weights are of {w1.dtype}, activations of {experts.quant_dtype}"
    named = dict(zip(("w13_scale", "w2_scale"), scales, strict=True))
    if experts.block_shape is not None:
        if list(experts.block_shape) != _GROUPS:
            return f"blocks of {experts.block_shape} share a scale"
        return "group", named
    if experts.a2_scale is not None:
        return "tensor", {name: scale.reshape(-1) for name, scale in named.items()}
    # Rows in between have a scale each, found as they come; beside it weights have one of a row.
    rows = {"w13_scale": w1.shape[1], "w2_scale": w2.shape[1]}
    return "token", {name: scale.reshape(len(w1), -1).expand(-1, rows[name]).contiguous() for name, scale in named.items()}


def refusal_of(
    layer: Layer, context: Any, w1: torch.Tensor, w2: torch.Tensor, adapted: bool, device: torch.device
) -> str | None:
    """Why the kernels do not have a layer, as it would be served; None: they have."""
    if adapted and context.fully_sharded:
        return "adapters are fully sharded"
    some, (w1, w2) = layer.on_meta(), on_meta((w1, w2))
    factors = types.SimpleNamespace(**{name: on_meta(getattr(context, name)) for name in (*FACTORS, "adapter_enabled")})
    dtype = torch.bfloat16 if w1.dtype == torch.uint8 else w1.dtype  # of tokens beside MXFP4

    def make() -> None:
        for rows in (1, 4096):  # as few tokens are served, and as many
            x = empty(rows, w2.shape[1], dtype=dtype)
            out = empty(rows, w2.shape[1], dtype=dtype if layer.scale is None else torch.bfloat16)
            routed = empty(rows, context.top_k, dtype=torch.int32), empty(rows, context.top_k, dtype=torch.float32)
            if not layer.inside:
                shared.layer(out, x, w1, w2, *routed, some.activation, lambda *of: None, lambda *of: None, **some.options)
                continue
            lora = _adapters(layer, factors, empty(rows, dtype=torch.int32)) if adapted else None
            some.fused_moe(out, x, w1, w2, *routed, lora=lora, **some.scales_of(rows, *some.empty_scales(*x.shape)))

    return refusal(make, device)


FACTORS = ("w13_lora_a_stacked", "w13_lora_b_stacked", "w2_lora_a_stacked", "w2_lora_b_stacked")


def _adapters(layer: Layer, context: Any, slots: torch.Tensor) -> Any:
    """The adapters of a ``MoELoRAContext``, of tokens in these slots, as ``fused_moe`` takes them."""
    a13, b13, a2, b2 = (getattr(context, name) for name in FACTORS)
    num_experts = a2[0].shape[1]
    if b13[0].shape[2] != a2[0].shape[3]:  # gate and up in one
        (a,), (b,) = a13, b13
        a13, b13 = (a, a), (b[:, :, ::2], b[:, :, 1::2]) if "layout" in layer.activation else b.chunk(2, 2)
    a13, b2 = ([factor.expand(-1, num_experts, -1, -1) for factor in factors] for factors in (a13, b2))
    return kg.FusedMoeLora(slots, list(a13), list(b13), list(a2), list(b2), context.adapter_enabled)


def contain(layer: Any, slot: int) -> None:
    """Have an adapter that was put in a slot of a ``FusedMoEWithLoRA`` keep to its rows: a second factor that is not finite would
    reach others of a tile. It becomes zeros, and the first one NaN, which is what its rows get, as they would.
    """
    a13, b13, a2, b2 = (getattr(layer, name) for name in FACTORS)
    for a, b in (*zip(a13, b13, strict=True), *zip(a2, b2, strict=True)):
        finite = b[slot].isfinite().all()
        b[slot].masked_fill_(~finite, 0.0)
        a[slot].masked_fill_(~finite, torch.nan)


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
    layer: Layer | None = getattr(self, "_kernelgen_layer", None)
    if layer is None or _vllm.is_hooked(self, topk_ids.shape[0]):
        self._kernelgen_own_apply(
            output, hidden_states, w1, w2, topk_weights, topk_ids, activation, global_num_experts, expert_map, a1q_scale,
            a2_scale, workspace13, workspace2, expert_tokens_meta, apply_router_weight_on_input,
        )  # fmt: skip
        return
    if apply_router_weight_on_input:  # so vLLM did, before it made them FP8
        topk_weights = torch.ones_like(topk_weights)
    context, num_tokens = self._lora_context, topk_ids.shape[0]
    rows, slots = context.punica_wrapper.token_mapping_meta, context.local_token_lora_mapping  # those of gathered tokens
    some = slots is not None or rows.any
    if layer.inside or (layer.fused and not some):
        if layer.scale is not None and a1q_scale is None:  # vLLM left it to the experts
            hidden_states, a1q_scale = _vllm.quantized(self, hidden_states)
        if slots is None and some:
            slots = rows.first(num_tokens).token_lora_mapping
        lora = _adapters(layer, context, slots.to(torch.int32)) if some else None
        scales = layer.scales_of(num_tokens, a1q_scale, a2_scale)
        layer.fused_moe(output, hidden_states, w1, w2, topk_ids, topk_weights, expert_map=expert_map, lora=lora, **scales)
        return
    deltas = Deltas(self, w1, w2, topk_weights, topk_ids, expert_map)
    operands = (output, hidden_states, w1, w2, _here(topk_ids, expert_map), topk_weights)
    shared.layer(*operands, layer.activation, deltas.add_first, deltas.add_second, **layer.options)


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
        self._layer = {"num_tokens": num_tokens, "w1": w1, "w2": w2, "top_k_num": top_k}
        self._routing = {"topk_ids": topk_ids, "topk_weights": topk_weights, "expert_map": expert_map}
        self._route: tuple[Any, ...] = ()

    def add_first(self, gate_up: torch.Tensor, x: torch.Tensor) -> None:
        """To the rows of gate and up, [T, top_k, *], of x [T, H]."""
        experts = self._experts
        self._route = experts.apply_w13_lora(experts._lora_context, y=gate_up, x=x, **self._routing, **self._layer)

    def add_second(self, down: torch.Tensor, h: torch.Tensor, topk_weights: torch.Tensor) -> None:
        """To the rows of down, [T, top_k, H], that have these weights, of h [T * top_k, I]."""
        experts = self._experts
        route = dict(zip(_ROUTE, self._route, strict=True))
        experts.apply_w2_lora(experts._lora_context, y=down, x=h, topk_weights=topk_weights, **route, **self._layer)


def _here(topk_ids: torch.Tensor, expert_map: torch.Tensor | None) -> torch.Tensor:
    """The experts of each token as this GPU counts them, -1: not here."""
    if expert_map is None:
        return topk_ids
    return torch.where(topk_ids >= 0, expert_map[topk_ids.clamp_min(0).long()], -1)
