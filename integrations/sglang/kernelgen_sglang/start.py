"""What is done once, as a model is loaded: LoRA is chosen, a line says what serves it, and kernels are compiled."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from . import __version__, contract
from .backend import Backend, Batch
from .experts import Deltas, refusal, runner_of
from .plugin import log
from .shared.calls import Calls, compile_all, empty, looks, on_meta, say
from .versions import seams

__all__ = ["calls_of", "choose", "clear", "prepare"]

_sglang = seams()
_IDS = (torch.int32, torch.int64)  # routers of SGLang make either


def choose(manager: Any) -> None:
    """In front of the making of LoRA layers: give them our backend, or say why they have SGLang's own."""
    if isinstance(manager.lora_backend, Backend):
        return
    reasons = contract.refusals(manager)
    if reasons:
        log.warning("kernelgen: LoRA is SGLang's own: %s", "; ".join(reasons))
        return
    own, most = manager.lora_backend, _sglang.largest_batch()
    manager.lora_backend = Backend(own.name, manager.max_loras_per_batch, manager.device, capacity=most)


def prepare(result: None, manager: Any, *args: Any, **kwargs: Any) -> None:
    """Behind it: say which ops serve the layers, and compile all that they can ask for up to the largest batch."""
    if not isinstance(manager.lora_backend, Backend):
        return
    found = list(calls_of(manager))
    promised = ", ".join(f"{dtype} {share:g}" for dtype, share in contract.NUMERICS.tolerances.items())
    log.info("kernelgen %s: deltas are as SGLang's within, of the largest: %s", __version__, promised)
    say(log, __version__, found)
    compile_all(log, found, _sglang.largest_batch(), manager.device)


def clear(pool: Any, uid: Any, buffer_id: int, adapter: Any, lora_modules: Any, *heads: Any) -> None:
    """In front of the loading of an adapter: nothing that another left in its slot is behind its ranks, whatever it was."""
    layers = [*heads, *(layer for named in lora_modules for layer in named.values())]
    if any(isinstance(getattr(layer, "lora_backend", None), Backend) for layer in layers):
        _sglang.clear_slot(pool, buffer_id)


def calls_of(manager: Any) -> Iterator[Calls]:
    """The calls of all layers."""
    backend = manager.lora_backend
    yield Calls("step: lora_route", (), lambda rows: _step(backend, rows))
    for layer in _sglang.lora_layers(manager):
        line, looks_of, make = (_experts if isinstance(layer, _sglang.layers.FusedMoEWithLoRA) else _linear)(layer, backend)
        yield Calls(f"{type(layer).__name__}: {line}", looks_of, make)


_Found = tuple[str, tuple[Any, ...], Callable[[int], None]]


def _twin(backend: Backend, rows: int) -> Backend:
    """A backend on the meta device, with a batch of so many rows that have adapters."""
    twin = Backend(backend.name, backend.max_loras_per_batch, torch.device("meta"), capacity=backend.capacity)
    twin.batch_info = Batch(backend.capacity, backend.max_loras_per_batch, twin.device)
    twin.batch_info.has_active_lora = True
    return twin


def _step(backend: Backend, rows: int) -> None:
    _twin(backend, rows).batch_info.fill(empty(rows, dtype=torch.int32))


def _linear(layer: Any, backend: Backend) -> _Found:
    kinds, base, kind = _sglang.layers, layer.base_layer, _sglang.DenseLoraKind.LINEAR
    if isinstance(layer, kinds.VocabParallelEmbeddingWithLoRA):
        kind, a, b = _sglang.DenseLoraKind.EMBEDDING, layer.embedding_A_buffer, layer.embedding_B_buffer
        width, dtype = base.embedding_dim, base.weight.dtype
    elif isinstance(layer, kinds.ParallelLMHeadWithLoRA):
        kind, a, b = _sglang.DenseLoraKind.LM_HEAD, layer.lm_head_A_buffer, layer.lm_head_B_buffer
        width, dtype = base.weight.shape[0], base.weight.dtype
    else:
        a, b, dtype = layer.lora_a, layer.lora_b, base.params_dtype
        width = getattr(base, "output_size_per_partition", base.output_size)
    a, b, offsets = on_meta(a), on_meta(b), tuple(layer.lora_offsets)
    embeds = kind == _sglang.DenseLoraKind.EMBEDDING

    def make(rows: int) -> None:
        x = empty(rows, dtype=torch.int64) if embeds else empty(rows, a.shape[2], dtype=a.dtype)
        twin = _twin(backend, rows)
        twin.forward_with_base(layer, x, lambda: empty(rows, width, dtype=dtype), a, b, None, offsets, kind=kind)

    return "lora_expand" if embeds else "lora", (kind, *looks(a, b), width, offsets, dtype), make


def _experts(layer: Any, backend: Backend) -> _Found:
    base = layer.base_layer
    layer._kernelgen_runner = ours = runner_of(layer)
    factors = on_meta(
        (layer.gate_up_lora_a_weights, layer.gate_up_lora_b_weights, layer.down_lora_a_weights, layer.down_lora_b_weights)
    )
    (_, _, gate_up, _), (_, _, _, inter), (_, _, width, _) = (factor.shape for factor in factors[1:])
    dtype, top_k = factors[0].dtype, base.top_k
    w1, w2 = (on_meta(getattr(base, name, None)) for name in ("w13_weight", "w2_weight"))  # quantised ones have other names

    def make(rows: int) -> None:
        slots, scores = _twin(backend, rows).batch_info.token_slots, empty(rows, top_k, dtype=torch.float32)
        x = empty(rows, width, dtype=dtype)
        for ids in (empty(rows, top_k, dtype=of_ids) for of_ids in _IDS):
            if ours is not None:
                for some in (None, slots):
                    ours.apply(empty(rows, width, dtype=dtype), x, w1, w2, ids, scores, some, factors)
            else:
                deltas = Deltas(ids, slots, *factors)
                deltas.add_first(empty(rows, top_k, gate_up, dtype=dtype), x)
                deltas.add_second(empty(rows, top_k, width, dtype=dtype), empty(rows * top_k, inter, dtype=dtype), scores)

    if ours is not None:
        return "moe_lora (moe_gemm, moe_act, moe_sum; fused_moe)", looks(*factors, w1, w2), make
    runner = layer._lora_runner_backend
    why = refusal(base) or ("KERNELGEN_SGLANG_EXPERTS=0" if runner.is_triton() else f"the runner is {runner.value}")
    if runner.is_lora():
        return f"SGLang's own: {why}", (), lambda rows: None
    return f"moe_lora (on SGLang's own products: {why})", looks(*factors), make
