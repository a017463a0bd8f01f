"""The private parts of SGLang 0.5.23 that the plugin touches: all of them, and only here and in ``plugin``.

| part | what for |
| --- | --- |
| ``LoRAManager.init_lora_modules``, ``init_state`` | in front of them LoRA is chosen, behind them all layers are there |
| ``BaseLoRABackend`` | what backends are; layers call ``forward_with_base`` of one |
| ``LoRAMemoryPool`` | how factors lie; ``load_lora_weight_to_buffer``, ``_clear_buffer_slot_for_base`` |
| ``build_lora_hooks`` | what adapters add in the experts of the runners ``triton`` and ``marlin`` |
| ``MoeLoraRunner`` | the experts of the runners ``lora_*`` |
| ``runtime_context`` | what a server is asked to do |
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from sglang.kernels.plugin_kernels.nvidia.spec import Feature, Numerics, NumericsKind, Requirements
from sglang.srt.distributed.device_communicators.pynccl_allocator import use_symmetric_memory
from sglang.srt.environ import envs
from sglang.srt.layers.dp_attention import is_allocation_symmetric
from sglang.srt.layers.moe.fused_moe_triton.layer import FusedMoE
from sglang.srt.layers.moe.token_dispatcher.standard import StandardCombineInput, StandardDispatcher
from sglang.srt.layers.moe.utils import get_moe_runner_backend
from sglang.srt.layers.quantization.unquant import UnquantizedFusedMoEMethod
from sglang.srt.lora import layers
from sglang.srt.lora.backend.base_backend import BaseLoRABackend
from sglang.srt.lora.dense.plan import DenseLoraKind
from sglang.srt.lora.lora_moe_runners import LoRAHooks
from sglang.srt.lora.utils import MoELoRABatchInfo, capturing_lora_graph, get_batch_token_counts, get_lm_head_pruned_lens
from sglang.srt.runtime_context import get_disagg, get_exec, get_flags, get_parallel, get_schedule, get_spec

__all__ = [
    "BaseLoRABackend",
    "DenseLoraKind",
    "Feature",
    "FusedMoE",
    "LoRAHooks",
    "MoELoRABatchInfo",
    "Numerics",
    "NumericsKind",
    "Requirements",
    "StandardCombineInput",
    "StandardDispatcher",
    "UnquantizedFusedMoEMethod",
    "asked",
    "capturing_lora_graph",
    "clear_slot",
    "largest_batch",
    "layers",
    "logits_at_once",
    "lora_layers",
    "new_output",
    "rows_of_logits",
    "rows_of_requests",
]

# Those for GPUs, one of which is replaced. Others are for other devices, or for drafts of SGLang's own.
BACKENDS = ("csgmv", "triton", "triton_v2")


def asked() -> dict[Any, bool]:
    """Whether a server is asked for features, those of the contract and others, by what they are called."""
    parallel, runner = get_parallel(), get_moe_runner_backend()
    return {
        Feature.PIPELINE_PARALLEL: parallel.pp_size > 1,
        Feature.EXPERT_PARALLEL: parallel.moe_ep_size > 1,
        Feature.CONTEXT_PARALLEL: parallel.attn_cp_size > 1,
        Feature.DP_ATTENTION: parallel.attn_dp_enabled,
        Feature.EPLB: get_exec().moe.enable_eplb,
        Feature.SPECULATIVE_DECODING: get_spec().speculative_algorithm is not None,
        Feature.TWO_BATCH_OVERLAP: get_exec().overlap.enable_two_batch_overlap,
        Feature.TORCH_COMPILE: bool(get_flags().capture.enable_torch_compile),
        "PD multiplexing": get_disagg().enable_pdmux,
        "SGLANG_EXPERIMENTAL_LORA_OPTI": envs.SGLANG_EXPERIMENTAL_LORA_OPTI.get(),
        f"--moe-runner-backend {runner.value}": runner.is_experimental_sgl_trtllm() or runner.is_experimental_sgl_marlin(),
    }


def rows_of_requests(forward_batch: Any) -> list[int]:
    """How many rows each request of a batch has."""
    if forward_batch.forward_mode.is_extend_without_speculative():
        return list(forward_batch.extend_seq_lens_cpu)
    _, each = get_batch_token_counts(forward_batch)
    return [each] * forward_batch.batch_size


def rows_of_logits(forward_batch: Any) -> list[int] | None:
    """How many rows of each request reach the head; None: all of them."""
    rows: list[int] | None = get_lm_head_pruned_lens(forward_batch)
    return rows


def logits_at_once() -> int | None:
    """Of how many rows logits are made at a time; None: of all."""
    return int(envs.SGLANG_LOGPROB_CHUNK_SIZE.get()) if envs.SGLANG_ENABLE_LOGPROB_CHUNK.get() else None


def largest_batch() -> int:
    """Tokens of the largest batch that is not padded beyond them."""
    schedule = get_schedule()
    sizes: list[int | None] = [schedule.chunked_prefill_size, schedule.max_prefill_tokens]
    return max(1, *(size for size in sizes if size is not None))


def lora_layers(manager: Any) -> list[Any]:
    """The layers of a model that adapters may be on."""
    heads = (manager.embed_tokens_module, manager.lm_head_module)
    return [layer for named in manager.lora_modules for layer in named.values()] + [head for head in heads if head is not None]


def clear_slot(pool: Any, slot: int) -> None:
    """Make the factors of a slot zero."""
    pool._clear_buffer_slot_for_base(slot)


def new_output(num_tokens: int, width: int, like: torch.Tensor) -> torch.Tensor:
    """[num_tokens, width], where what reduces it over GPUs wants it."""
    with contextlib.ExitStack() as stack:
        if like.device.type == "cuda":
            stack.enter_context(use_symmetric_memory(get_parallel().tp_group, disabled=not is_allocation_symmetric()))
        return like.new_empty(num_tokens, width)
