"""The experts of an MoE layer: unquantised ones with what adapters add to them, and what adapters add to others of SGLang's own.

``FusedMoEWithLoRA._forward_with_lora``, ``build_lora_hooks`` and ``MoeLoraRunner.from_layer`` are SGLang's; ours are around them,
and call them where SGLang is on its own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from . import kernels as kg
from .backend import Backend
from .shared import experts, gate
from .versions import seams

__all__ = ["Deltas", "Runner", "build_lora_hooks", "forward_with_lora", "from_layer", "refusal", "runner_of"]

_sglang = seams()
# (activation, it has a gate), and what kernels do
_WORDS = {
    ("silu", True): "swiglu",
    ("gelu", True): "geglu",
    ("gelu_tanh", True): "geglu_tanh",
    ("silu", False): "silu",
    ("gelu", False): "gelu",
    ("relu2", False): "relu2",
}


class Deltas:
    """What the adapters of a step add to the two products of a layer.

    Args:
        topk_ids: [T, top_k] of the experts here, -1: elsewhere.
        slots: [>= T] int32, the adapter of each token, -1: none.
        a13, b13, a2, b2: [L, E, S * rank, H], [L, E, S * I, rank], [L, E, rank, I] and [L, E, H, rank], the scaling folded in; of
            the first and the last E may be 1, for all experts.
    """

    def __init__(
        self,
        topk_ids: torch.Tensor,
        slots: torch.Tensor,
        a13: torch.Tensor,
        b13: torch.Tensor,
        a2: torch.Tensor,
        b2: torch.Tensor,
    ) -> None:
        max_loras, num_experts, rank, _ = a2.shape
        halves = a13.shape[2] // rank
        a13, b2 = (factor.expand(-1, num_experts, -1, -1) for factor in (a13, b2))
        self._first = (a13.chunk(halves, 2), b13.chunk(halves, 2))
        self._second = ([a2], [b2])
        slots = slots[: topk_ids.shape[0]]
        self._route = kg.moe_route(topk_ids, slots, num_experts=num_experts, max_loras=max_loras, rank=rank)

    def add_first(self, gate_up: torch.Tensor, x: torch.Tensor) -> None:
        """To the rows of gate and up, [T, top_k, S * I], of x [T, H]."""
        kg.moe_lora(gate_up, x, *self._first, self._route)

    def add_second(self, down: torch.Tensor, h: torch.Tensor, topk_weights: torch.Tensor) -> None:
        """To the rows, [T, top_k, H], that have these weights, of h [T * top_k, I]."""
        kg.moe_lora(down, h, *self._second, self._route, topk_weights=topk_weights, mul_routed_weight=True)


def build_lora_hooks(own: Callable[..., Any], hidden_states: torch.Tensor, lora_info: Any, topk_ids: torch.Tensor) -> Any:
    """What SGLang's own layers call behind each of their products."""
    if lora_info is None or lora_info.seg_indptr is not None:  # as our backend has it not
        return own(hidden_states, lora_info, topk_ids)
    if not (lora_info.has_active_lora or _sglang.capturing_lora_graph()):
        return _sglang.LoRAHooks()
    deltas = Deltas(
        topk_ids,
        lora_info.token_lora_mapping,
        lora_info.gate_up_lora_a_weights,
        lora_info.gate_up_lora_b_weights,
        lora_info.down_lora_a_weights,
        lora_info.down_lora_b_weights,
    )

    def after_gate_up(x: torch.Tensor, gate_up: torch.Tensor, topk_weights: torch.Tensor, topk_ids: torch.Tensor) -> None:
        deltas.add_first(gate_up, x)

    def after_down(h: torch.Tensor, down: torch.Tensor, topk_weights: torch.Tensor, topk_ids: torch.Tensor) -> None:
        deltas.add_second(down, h[: topk_ids.numel()], topk_weights)

    return _sglang.LoRAHooks(after_gate_up, after_down)


def refusal(layer: Any) -> str | None:
    """Why the products of a layer stay SGLang's own; None: they do not."""
    config = layer.moe_runner_config
    if not isinstance(layer.quant_method, _sglang.UnquantizedFusedMoEMethod):
        return "experts are quantised"
    if layer.w13_weight.dtype not in (torch.bfloat16, torch.float16):
        return f"experts are of {layer.w13_weight.dtype}"
    if layer.w13_weight.shape[2] != layer.hidden_size:
        return "weights are padded"
    if (config.activation, bool(config.is_gated)) not in _WORDS:
        return f"no kernel has the activation {config.activation}"
    if {config.gemm1_alpha, config.gemm1_clamp_limit, config.swiglu_limit} != {None}:
        return "the gate has a limit"
    if getattr(layer, "with_bias", False):
        return "experts have a bias"
    if config.no_combine or config.num_fused_shared_experts or layer.should_fuse_routed_scaling_factor_in_topk:
        return "the sum is not of routed experts alone"
    if not isinstance(layer.dispatcher, _sglang.StandardDispatcher) or layer.dispatcher.skip_local_expert_mapping:
        return "tokens are dispatched by global experts"
    return None


def from_layer(own: Callable[..., Any], cls: type, base_layer: Any, *, workspace: Any, **options: Any) -> Any:
    """The runner of a layer: ours with our backend, where it serves the layer."""
    if not isinstance(workspace, Backend):
        return own(cls, base_layer, workspace=workspace, **options)
    if refusal(base_layer) is not None:
        return own(cls, base_layer, workspace=None, **options)
    return Runner(base_layer, workspace)


def runner_of(layer: Any) -> Runner | None:
    """Ours, of a layer with adapters; None: its products are SGLang's own."""
    own = getattr(layer, "_moe_lora_runner", None)  # of the runner for LoRA
    if own is not None:
        return own if isinstance(own, Runner) else None
    ours = isinstance(layer.lora_backend, Backend) and layer._lora_runner_backend.is_triton()
    ours = ours and gate.is_on("KERNELGEN_SGLANG_EXPERTS") and refusal(layer.base_layer) is None
    return Runner(layer.base_layer, layer.lora_backend) if ours else None


def forward_with_lora(
    own: Callable[..., Any], layer: Any, hidden_states: torch.Tensor, topk_output: Any, lora_info: Any, **options: Any
) -> Any:
    """A layer of any runner but that for LoRA, of a batch that may have adapters; ``start`` gave it a runner of ours, or none."""
    runner = getattr(layer, "_kernelgen_runner", None)
    if runner is None or options:
        return own(layer, hidden_states, topk_output, lora_info, **options)
    dispatcher = layer.base_layer.dispatcher
    dispatched = dispatcher.dispatch(hidden_states=hidden_states, topk_output=topk_output)
    factors = (
        lora_info.gate_up_lora_a_weights,
        lora_info.gate_up_lora_b_weights,
        lora_info.down_lora_a_weights,
        lora_info.down_lora_b_weights,
    )
    return dispatcher.combine(combine_input=runner.over(dispatched, factors))


class Runner:
    """The experts of a layer, base and adapters, as ``MoeLoraRunner`` of SGLang has them."""

    def __init__(self, layer: Any, backend: Backend) -> None:
        self.layer, self.backend = layer, backend
        config = layer.moe_runner_config
        self.activation = {"activation": _WORDS[config.activation, bool(config.is_gated)]}
        self.factor = 1.0 if config.routed_scaling_factor is None else float(config.routed_scaling_factor)

    def run(self, dispatch_output: Any, batch: Any) -> Any:
        """The output of tokens that were dispatched, under the adapters of a ``MoeLoraBatch``."""
        return self.over(dispatch_output, (batch.gate_up_lora_a, batch.gate_up_lora_b, batch.down_lora_a, batch.down_lora_b))

    def over(self, dispatch_output: Any, factors: tuple[torch.Tensor, ...]) -> Any:
        """The same, under factors as they lie in the memory of LoRA."""
        x, topk = dispatch_output.hidden_states, dispatch_output.topk_output
        out = _sglang.new_output(x.shape[0], x.shape[1], x)
        info = self.backend.batch_info
        some = info.has_active_lora or _sglang.capturing_lora_graph()
        weights = (self.layer.w13_weight, self.layer.w2_weight)
        self.apply(out, x, *weights, topk.topk_ids, topk.topk_weights, info.token_slots if some else None, factors)
        return _sglang.StandardCombineInput(hidden_states=out)

    def apply(
        self,
        out: torch.Tensor,
        x: torch.Tensor,
        w1: torch.Tensor,
        w2: torch.Tensor,
        topk_ids: torch.Tensor,
        topk_weights: torch.Tensor,
        slots: torch.Tensor | None,
        factors: tuple[torch.Tensor, ...],
    ) -> None:
        """The layer, [T, H] of x [T, H]; ``slots``: of tokens, None: no token has an adapter."""
        weights = topk_weights if self.factor == 1.0 else topk_weights * self.factor
        if slots is None:
            kg.fused_moe(x, w1, w2, topk_ids, weights, out=out, **self.activation)
            return
        deltas = Deltas(topk_ids, slots, *factors)
        experts.layer(out, x, w1, w2, topk_ids, weights, self.activation, deltas.add_first, deltas.add_second)
