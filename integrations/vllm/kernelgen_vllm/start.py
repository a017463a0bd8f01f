"""What is done once, when the LoRA layers of a model are there: a line of what serves them, and warm-up.

Warm-up makes the calls of each layer (``shared.calls``) through a wrapper on the meta device and what else serving calls.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch

from . import __version__, experts
from .plugin import log
from .shared import gate
from .shared.calls import Calls, compile_all, distinct, empty, looks, on_meta, say
from .versions import seams

__all__ = ["Calls", "calls_of", "distinct", "install", "prepare"]

_vllm = seams()
_IDS = (torch.int32, torch.int64)  # routers of vLLM make either


@functools.cache
def install() -> None:
    """Replace what is not asked for by name, once a process; ``KERNELGEN_VLLM_EXPERTS=0`` leaves base experts to vLLM."""
    _vllm.keyed_as(f"kernelgen_vllm {__version__}")
    _vllm.when_layers_are_made(prepare)
    if gate.is_on("KERNELGEN_VLLM_EXPERTS"):
        _vllm.replace_experts(experts.apply)
        _vllm.when_experts_are_set(experts.contain)


def prepare(manager: Any) -> None:
    """Say which ops serve the layers of a model, and compile all that they can ask for up to the largest batch."""
    found = list(calls_of(manager))
    if not found:  # of a wrapper of vLLM's own
        return
    say(log, __version__, found)
    compile_all(log, found, largest_batch(manager), manager.device)


def largest_batch(manager: Any) -> int:
    """Rows of the largest call: tokens of all ranks, where those of experts are gathered."""
    experts_of = (layer for layer in manager.modules.values() if isinstance(layer, _vllm.layers.FusedMoEWithLoRA))
    ranks = max((layer.moe_config.moe_parallel_config.dp_size for layer in experts_of), default=1)
    return int(manager.max_num_batched_tokens * ranks)


def calls_of(manager: Any) -> Iterator[Calls]:
    """The calls of all layers whose wrapper is ours."""
    from .punica import PunicaWrapper

    for layer in manager.modules.values():
        own = layer.punica_wrapper
        if not isinstance(own, PunicaWrapper):
            continue

        kind = next(kind for kind in _KINDS if isinstance(layer, kind))
        line, looks_of, make = _KINDS[kind](layer, manager)
        yield Calls(f"{type(layer).__name__}: {line}", looks_of, functools.partial(_make, make, manager, own.lora_config))


def _make(make: Callable[[int, Any], None], manager: Any, lora_config: Any, rows: int) -> None:
    """The calls of a batch of so many rows, with a wrapper on the meta device whose rows have adapters."""
    from .punica import PunicaWrapper

    meta = PunicaWrapper(largest_batch(manager), 1, "meta", lora_config=lora_config)
    meta.token_mapping_meta.any = meta.prompt_mapping_meta.any = True
    make(rows, meta)


_Found = tuple[str, tuple[Any, ...], Callable[[int, Any], None]]


def _linear(layer: Any, manager: Any) -> _Found:
    a, b, slices = on_meta(layer.lora_a_stacked), on_meta(layer.lora_b_stacked), layer.output_slices
    base, dtype = layer.base_layer, a[0].dtype
    width, add = getattr(base, "output_size_per_partition", base.output_size), not layer._enable_aux_cuda_stream
    local_rank, rank = a[0].shape[-2], b[0].shape[-1]
    of_out = getattr(base, "out_dtype", None) or dtype  # a router has logits in float32

    def make(rows: int, wrapper: Any) -> None:
        x, out = empty(rows, a[0].shape[-1], dtype=dtype), empty(rows, width, dtype=of_out)
        wrapper.add_lora_linear(out, x, a, b, 1.0, slices, add_inputs=add)

    def make_sharded(rows: int, wrapper: Any) -> None:
        x, out = empty(rows, a[0].shape[-1], dtype=dtype), empty(rows, width, dtype=dtype)
        wrapper.add_shrink(empty(len(a), rows, local_rank, dtype=torch.float32), x, a, 1.0)
        offset = layer.tp_rank * b[0].shape[-2] if isinstance(layer, _vllm.layers.RowParallelLinearWithShardedLoRA) else 0
        wrapper.add_expand(out, empty(len(b), rows, rank, dtype=torch.float32), b, slices, offset_start=offset)

    if isinstance(layer, _vllm.SHARDED):
        return "lora_shrink, lora_expand", (*looks(a, b), width, "sharded"), make_sharded
    return "lora", (*looks(a, b), width, of_out, add), make


def _classifier(layer: Any, manager: Any) -> _Found:
    a, b, full = on_meta(layer.lora_a_stacked[0]), on_meta(layer.lora_b_stacked[0]), on_meta(layer.full_weight_stacked)
    dtype = layer.base_layer.params_dtype

    def make(rows: int, wrapper: Any) -> None:
        x, out = empty(rows, a.shape[-1], dtype=a.dtype), empty(rows, layer.output_size, dtype=dtype)
        wrapper.add_lora_logits(out, x, a, b, 1.0)
        wrapper.add_lora_linear(out, x, (a,), (b,), 1.0, layer.output_slices)
        wrapper.full_linear(x, full)  # of requests and, as add_shrink, of tokens

    return "lora, lora_shrink", (*looks(a, b, full), dtype), make


def _embedding(layer: Any, manager: Any) -> _Found:
    b = on_meta(layer.lora_b_stacked)
    dtype = layer.base_layer.weight.dtype

    def make(rows: int, wrapper: Any) -> None:
        wrapper.add_lora_embedding(empty(rows, b.shape[-2], dtype=dtype), empty(rows, b.shape[-1], dtype=b.dtype), b)

    return "lora_expand", (*looks(b), dtype), make


def _logits(layer: Any, manager: Any) -> _Found:
    a, b = on_meta(layer.lora_a_stacked), on_meta(layer.lora_b_stacked)
    dtype, width = layer.base_layer.head_dtype or layer.dtype, _vllm.logits_width(layer, manager.model)

    def make(rows: int, wrapper: Any) -> None:
        wrapper.add_lora_logits(empty(rows, width, dtype=dtype), empty(rows, a.shape[-1], dtype=a.dtype), a, b, 1.0)

    return "lora", (*looks(a, b), dtype, width), make


def _experts(layer: Any, manager: Any) -> _Found:
    fused, context = layer._moe_kernel.fused_experts, layer._build_lora_context()
    weights, activation = layer.base_layer.routed_experts, layer._moe_kernel.fused_experts.moe_config.activation
    w1, w2, expert_map = on_meta((weights.w13_weight, weights.w2_weight, weights.expert_map))
    factors = {name: on_meta(getattr(context, name)) for name in (*experts.FACTORS, "adapter_enabled")}
    served: experts.Layer | str = "KERNELGEN_VLLM_EXPERTS=0"
    if _vllm.TritonExperts.apply is experts.apply:
        served = experts.layer_of(fused, context, weights.w13_weight, weights.w2_weight, activation)
    fused._kernelgen_layer = served if isinstance(served, experts.Layer) else None
    top_k, width, inter = context.top_k, layer.hidden_size, factors["w2_lora_a_stacked"][0].shape[-1]
    gate_up, of_x = sum(b.shape[-2] for b in factors["w13_lora_b_stacked"]), factors["w2_lora_a_stacked"][0].dtype

    def make(rows: int, wrapper: Any) -> None:
        twin = copy.copy(fused)
        twin.set_lora_context(dataclasses.replace(context, punica_wrapper=wrapper, **factors))
        x, scores = empty(rows, width, dtype=of_x), empty(rows, top_k, dtype=torch.float32)
        for ids in (empty(rows, top_k, dtype=dtype) for dtype in _IDS):
            if isinstance(served, experts.Layer):
                twin._kernelgen_layer = served.on_meta()
                x1 = x if served.scale is None else empty(rows, width, dtype=w1.dtype)
                routed = (w1, w2, scores, ids, activation, layer.global_num_experts, expert_map)
                scales = served.empty_scales(rows, width)
                for wrapper.token_mapping_meta.any in (False, True):
                    experts.apply(twin, empty(rows, width, dtype=of_x), x1, *routed, *scales, x, x, None, False)
            else:
                deltas = experts.Deltas(twin, w1, w2, scores, ids, expert_map)
                deltas.add_first(empty(rows, top_k, gate_up, dtype=of_x), x)
                deltas.add_second(empty(rows, top_k, width, dtype=of_x), empty(rows * top_k, inter, dtype=of_x), scores)

    if isinstance(served, experts.Layer):
        return served.ops(context.fully_sharded), (*looks(*factors.values(), w1, w2), expert_map is None, served.looks), make
    lora = "moe_lora_shrink, moe_lora_expand" if context.fully_sharded else "moe_lora"
    line = f"{lora} (under {type(fused).__name__}: {served})"
    return line, (*looks(*factors.values(), w1, w2), expert_map is None), make


_layers = _vllm.layers
# The first that a layer is of.
_KINDS: dict[type, Callable[[Any, Any], _Found]] = {
    _layers.FusedMoEWithLoRA: _experts,
    _layers.LogitsProcessorWithLoRA: _logits,
    _layers.VocabParallelEmbeddingWithLoRA: _embedding,
    _vllm.CLASSIFIERS: _classifier,
    _layers.BaseLayerWithLoRA: _linear,
}
