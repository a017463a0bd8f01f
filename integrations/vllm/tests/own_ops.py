"""On a GPU, what vLLM's own tests of its kernels call in their place: the wrapper of the plugin, or the op behind it.

Each takes what vLLM's takes, and ``replace`` puts it in its place for a test module:

| name | calls |
| --- | --- |
| ``lora_shrink``, ``lora_expand`` of ``triton_ops`` | ``add_shrink``, ``add_expand`` of a wrapper |
| ``lora_shrink_fp8``, ``lora_expand_fp8`` of it | the ops ``lora_shrink``, ``lora_expand``: FP8 adapters stay vLLM's |
| ``use_fused_moe_lora_kernel``, ``..._naive`` | ``add_lora_w13`` of a wrapper, which makes the route |
| ``fused_moe_lora`` | ``moe_lora``, on vLLM's tables or pair by pair |
| ``ops.moe_lora_align_block_size`` | ``moe_route``, its blocks written out as vLLM's tables |
| ``moe_fused_mul_sum`` | ``moe_sum`` |
| ``fused_moe`` of FP8 experts | ``experts.Layer``, as the plugin serves them |
"""

from __future__ import annotations

import types
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

Tensors = Sequence[Tensor]


def replace(module: Any) -> None:
    """Have the tests of a module call these."""
    import vllm.lora.ops.triton_ops as triton_ops

    for function in _OF.get(module.__name__.rpartition(".")[2], ()):
        for place in (module, triton_ops, getattr(module, "ops", None)):
            if hasattr(place, function.__name__):
                setattr(place, function.__name__, function)


def _wrapper(mapping: Tensor, max_loras: int) -> Any:
    """A wrapper whose rows have the adapters of a mapping."""
    from kernelgen_vllm.punica import PunicaWrapper

    config, rows = types.SimpleNamespace(max_loras=max_loras), max(len(mapping), 1)
    wrapper = PunicaWrapper(rows, rows, mapping.device, lora_config=config)
    wrapper.token_mapping_meta.fill(mapping.contiguous(), bool((mapping >= 0).any()))
    return wrapper


def _stacked(factors: Tensors) -> tuple[Tensor, ...]:
    """Factors as layers have them, [L, 1, *, *]; the tests leave the 1 out."""
    return tuple(factor.unsqueeze(1) if factor.dim() == 3 else factor for factor in factors)


def lora_shrink(x: Tensor, lora_a: Tensors, out: Tensor, mapping: Tensor, *meta: Any) -> None:
    *_, scaling = meta
    _wrapper(mapping, len(lora_a[0])).add_shrink(out, x, _stacked(lora_a), scaling)


def lora_expand(
    x: Tensor, lora_b: Tensors, out: Tensor, mapping: Tensor, *meta: Any, offset_start: int = 0, add_inputs: bool = False
) -> None:
    widths = tuple(factor.shape[-2] for factor in lora_b)
    wrapper = _wrapper(mapping, len(lora_b[0]))
    wrapper.add_expand(out, x, _stacked(lora_b), widths, offset_start=offset_start, add_inputs=add_inputs)


def _scales(factors: Tensors, scales: Tensors, group: tuple[int, int], per_channel: bool) -> list[Tensor]:
    """Scales of FP8 factors [L, rows, columns]: a group's [L, ., .], a channel's [L, rows], or a slot's [L]."""

    def shape(factor: Tensor) -> tuple[int, ...]:
        slots, *sides = factor.shape
        if all(group):
            return slots, *(-(-side // size) for side, size in zip(sides, group, strict=True))
        return (slots, sides[0]) if per_channel else (slots,)

    return [scale.float().reshape(shape(factor)) for factor, scale in zip(factors, scales, strict=True)]


def lora_shrink_fp8(
    x: Tensor, lora_a: Tensors, out: Tensor, mapping: Tensor, *meta: Any, a_scale: Tensor,
    group_k: int = 0, group_n: int = 0, use_fp8_w8a8: bool = False, per_channel_quant: bool = False,
) -> None:  # fmt: skip
    from kernelgen_vllm import kernels as kg

    *_, scaling, b_scale = meta
    route, y = kg.lora_route(mapping.int(), max_loras=len(lora_a[0])), torch.empty_like(out, dtype=torch.float32)
    of_tensor = a_scale.numel() == 1 and not per_channel_quant and not group_k
    x_scale = a_scale.reshape(-1) if of_tensor else a_scale.reshape(len(x), -1)
    scales = _scales(lora_a, b_scale, (group_n, group_k), per_channel_quant)
    kg.lora_shrink(y, x, list(lora_a), route, scaling=scaling, zero_rest=True, x_scale=x_scale, a_scale=scales)
    out.copy_(y)


def lora_expand_fp8(
    x: Tensor, lora_b: Tensors, out: Tensor, mapping: Tensor, *meta: Any, a_scale: Tensor, offset_start: int = 0,
    add_inputs: bool = False, group_k: int = 0, group_n: int = 0, use_fp8_w8a8: bool = False, per_channel_quant: bool = False,
) -> None:  # fmt: skip
    from kernelgen_vllm import kernels as kg

    *_, b_scale = meta
    route, rank = kg.lora_route(mapping.int(), max_loras=len(lora_b[0])), x.shape[2]
    if a_scale.numel() > 1:  # of tokens, or of groups of ranks
        a_scale = a_scale.reshape(x.shape[1], -1).repeat_interleave(group_k or rank, 1)[:, :rank]
    y = (x.float() * a_scale).contiguous()
    scales = _scales(lora_b, b_scale, (group_n, group_k), per_channel_quant)
    kg.lora_expand(out, y, list(lora_b), route, offset_start=offset_start, add_inputs=add_inputs, b_scale=scales)


def use_fused_moe_lora_kernel(
    topk_ids: Tensor, topk_weights: Tensor, mapping: Tensor, rank: int, top_k: int, lora_ids: Tensor,
    lora_a: Tensors, lora_b: Tensors, x: Tensor, out: Tensor, max_loras: int, num_experts: int, block_size: int,
    fully_sharded: bool = False, offset: int = 0, add_inputs: bool = True,
) -> None:  # fmt: skip
    enabled = torch.ones(max_loras + 1, dtype=torch.int32, device=x.device)
    _wrapper(mapping.to(x.device), max_loras).add_lora_w13(
        out, x, tuple(lora_a), tuple(lora_b), topk_ids.to(x.device), topk_weights, None, None, None, len(x), top_k, max_loras,
        enabled, num_experts, top_k, len(lora_a), fully_sharded, False, add_inputs=add_inputs,
    )  # fmt: skip


def use_fused_moe_lora_kernel_naive(*given: Any, **options: Any) -> None:
    *front, max_loras, block_size = given  # it takes no number of experts
    use_fused_moe_lora_kernel(*front, max_loras, front[6][0].shape[1], block_size, **options)


def fused_moe_lora(
    out: Tensor, x: Tensor, lora_a: Tensors, lora_b: Tensors, topk_weights: Tensor, sorted_ids: Tensor | None,
    expert_ids: Tensor, num_padded: Tensor | None, mapping: Tensor, rank: int, top_k: int, lora_ids: Tensor,
    num_active: Tensor, enabled: Tensor, block_m: int, *rest: Any,
) -> None:  # fmt: skip
    from kernelgen_vllm import kernels as kg

    weighted, _, offset, add_inputs = rest[-4:]
    max_loras, num_experts = lora_a[0].shape[:2]
    sizes = {"num_experts": num_experts, "max_loras": max_loras, "adapter_enabled": enabled}
    if sorted_ids is None:
        route = kg.moe_route(expert_ids.view(-1, top_k), mapping.int(), **sizes)
    else:
        tables = (sorted_ids, expert_ids, num_padded)
        route = kg.MoeRoute.from_tables(*tables, block_size=block_m, num_tokens=len(out), top_k=top_k, lora_ids=lora_ids, **sizes)
    options = {"topk_weights": topk_weights, "mul_routed_weight": True} if weighted else {}
    assert not offset  # of shards: a test of two GPUs
    kg.moe_lora(out, x, list(lora_a), list(lora_b), route, add_inputs=add_inputs, **options)


def moe_lora_align_block_size(
    topk_ids: Tensor, mapping: Tensor, num_experts: int, block_size: int, max_loras: int, max_padded: int, max_blocks: int,
    sorted_ids: Tensor, expert_ids: Tensor, num_padded: Tensor, enabled: Tensor, lora_ids: Tensor,
    expert_map: Tensor | None = None,
) -> None:  # fmt: skip
    from kernelgen_vllm import kernels as kg

    sizes = {"num_experts": num_experts, "max_loras": max_loras, "adapter_enabled": enabled}
    route = kg.moe_route(topk_ids, mapping, assignment="sorted", block_m=block_size, **sizes)
    pairs, tables = route.pairs.cpu(), (sorted_ids, expert_ids, num_padded)
    rows_of, experts_of, number_of = (table.view(max_loras, -1).cpu() for table in tables)
    on = [slot for slot in range(max_loras) if enabled[slot]]  # tables of the others keep what they have
    rows_of[on], experts_of[on], number_of[on] = topk_ids.numel(), -1, 0
    for slot, expert, first, rows in route.blocks[: int(route.num_blocks)].tolist():
        at = int(number_of[slot])
        rows_of[slot, at : at + rows] = pairs[first : first + rows]
        experts_of[slot, at // block_size] = expert
        number_of[slot] += block_size
    for table, made in zip(tables, (rows_of, experts_of, number_of), strict=True):
        table.copy_(made.view(table.shape))


def moe_fused_mul_sum(
    inputs: Tensor, topk_weights: Tensor, outputs: Tensor | None = None, topk_ids: Tensor | None = None,
    expert_map: Tensor | None = None, num_valid_tokens: Tensor | None = None,
) -> Tensor:  # fmt: skip
    from kernelgen_vllm import kernels as kg

    if topk_ids is None:
        topk_ids = torch.zeros(topk_weights.shape, dtype=torch.int32, device=inputs.device)
    keep = bool((topk_ids < 0).all(-1).any())  # vLLM's keeps such rows alone, and makes others without an expert zero
    if expert_map is not None:
        topk_ids = torch.where(topk_ids >= 0, expert_map[topk_ids.clamp_min(0).long()], -1)
    out = inputs.new_empty(len(inputs), inputs.shape[2]) if outputs is None else outputs
    num_experts = max([0, *topk_ids.flatten().tolist()]) + 1
    options = {"topk_weights": topk_weights, "valid_tokens": num_valid_tokens, "keep_empty": keep}
    return kg.moe_sum(inputs, topk_ids, num_experts=num_experts, out=out, **options)


def fused_moe(x: Tensor, w1: Tensor, w2: Tensor, scores: Tensor, topk: int, renormalize: bool, quant_config: Any) -> Tensor:
    from kernelgen_vllm.experts import Layer
    from vllm import _custom_ops

    topk_weights, topk_ids = scores.float().softmax(-1).topk(topk)
    q, scale = _custom_ops.scaled_fp8_quant(x, use_per_token_if_dynamic=True)
    layer = Layer({"activation": "swiglu"}, {"w13_scale": quant_config.w1_scale, "w2_scale": quant_config.w2_scale}, "token")
    out = torch.empty_like(x)
    layer.fused_moe(out, q, w1, w2, topk_ids.int(), topk_weights, **layer.scales_of(len(x), scale, None))
    return out


_OF: dict[str, tuple[Callable[..., Any], ...]] = {
    "test_punica_ops": (lora_shrink, lora_expand),
    "test_punica_ops_fp8": (lora_shrink_fp8, lora_expand_fp8),
    "test_moe_lora_align_sum": (moe_lora_align_block_size,),
    "test_fused_moe_lora_kernel": (use_fused_moe_lora_kernel, use_fused_moe_lora_kernel_naive, fused_moe_lora),
    "test_moe_fused_mul_sum": (moe_fused_mul_sum,),
    "test_triton_moe_ptpc_fp8": (fused_moe,),
}
