"""vLLM's LoRA kernels, called as its Punica wrapper calls them: dense products, their FP8 forms, and MoE-LoRA by each way."""

from __future__ import annotations

import functools
import importlib
from typing import Any, Callable, Sequence
from unittest import mock

import torch

from kernelgen.families.case import Tags
from kernelgen.measure.conform.run import Adapter, adapters_of_tokens, theirs
from kernelgen.measure.workload import Unsupported

_OPS = "vllm.lora.ops.triton_ops"
_MOE = f"{_OPS}.fused_moe_lora_op"
_LARGE = 2**24  # bytes; what is larger is sparse, and tries offsets
importlib.import_module(_OPS)


def _forget() -> None:
    """Its tables of pointers are keyed by address, and never invalidated."""
    for module in ("utils", "fused_moe_lora_op", "fused_moe_lora_fp8_op", "lora_shrink_fp8_op", "lora_expand_fp8_op"):
        for name, value in vars(importlib.import_module(f"{_OPS}.{module}")).items():
            if name.endswith("_PTR_DICT"):
                value.clear()


def _meta(route: Any, device: torch.device) -> tuple[Any, ...]:
    """The metadata of a dense layer."""
    module = importlib.import_module(f"{_OPS}.lora_kernel_metadata")
    meta = module.LoRAKernelMeta.make(route.max_loras, max(route.num_tokens, 1), device)
    meta.prepare_tensors(adapters_of_tokens(route, device))
    return tuple(meta.meta_args(route.num_tokens, False))


def _packed(tensor: torch.Tensor) -> torch.Tensor:
    """Operands of its ops are contiguous, and of a token at least."""
    if tensor.numel() == 0 or (not tensor.is_contiguous() and tensor.untyped_storage().nbytes() > _LARGE):
        raise Unsupported("operands that are contiguous, and of a token at least")
    return tensor.contiguous()


def _weights(weights: Sequence[torch.Tensor] | torch.Tensor) -> list[torch.Tensor]:
    return [_packed(each) for each in ([weights] if isinstance(weights, torch.Tensor) else weights)]


def _modes(tags: Tags, scales: Sequence[torch.Tensor]) -> dict[str, Any]:
    """What its FP8 ops want to know of scales."""
    group = tags["weight_quant"] == "w8group"
    sizes = {"group_k": 128, "group_n": 128} if group else {"group_k": 0, "group_n": 0}
    return {**sizes, "per_channel_quant": tags["weight_quant"] == "w8channel", "b_scale": list(scales)}


def _claimed(tags: Tags, *scales: torch.Tensor | None) -> None:
    """Its FP8 ops have FP8 weights, and scales in float32."""
    if tags.get("act_quant", "none") != "none" and tags["weight_quant"] == "none":
        raise Unsupported("FP8 activations beside FP8 weights")
    if any(scale is not None and scale.dtype != torch.float32 for scale in scales):
        raise Unsupported("scales in float32")


def _shrink(
    tags: Tags,
    y: Any,
    x: Any,
    lora_a: Any,
    route: Any,
    scaling: float,
    a_scale: Any = None,
    x_scale: Any = None,
    *,
    flat: bool = False,
) -> None:
    _claimed(tags, x_scale)
    if flat:
        if tags["act_quant"] != "a8token":
            raise Unsupported("a scale a token")
        x_scale = x_scale.reshape(-1)
    out = torch.empty(y.shape, dtype=y.dtype, device=y.device)
    arguments = (_packed(x), _weights(lora_a), out, *_meta(route, x.device), scaling)
    if tags["weight_quant"] == tags["act_quant"] == "none":
        theirs(_OPS, "lora_shrink", *arguments)
    else:
        scales = [] if a_scale is None else _weights(a_scale)
        given = {**_modes(tags, scales), "a_scale": x_scale, "use_fp8_w8a8": tags["act_quant"] != "none"}
        theirs(_OPS, "lora_shrink_fp8", *arguments, **given)
    live = (adapters_of_tokens(route, x.device) >= 0).nonzero()[:, 0]
    y[:, live] = out[:, live]  # the other rows become zero, which its callers expect


def _expand(
    tags: Tags,
    out: Any,
    y: Any,
    lora_b: Any,
    route: Any,
    offset_start: int = 0,
    b_scale: Any = None,
    *,
    first: int | None = None,
    in_fp8_op: bool = False,
) -> None:
    if in_fp8_op and tags["weight_quant"] != "none":
        raise Unsupported("weights of 16 bits, which its FP8 op takes where it is not w8a8")
    made, weights = _packed(out), _weights(lora_b)
    meta, rows = _meta(route, y.device), _packed(y)
    given: dict[str, Any] = {"offset_start": offset_start, "add_inputs": tags["add_inputs"] == "add"}
    function = "lora_expand"
    if tags["weight_quant"] != "none":
        function = "lora_expand_fp8"
        given |= {**_modes(tags, _weights(b_scale)), "use_fp8_w8a8": False}
    elif in_fp8_op:
        function = "lora_expand_fp8"
        given |= {"b_scale": [torch.ones(each.shape[0], device=y.device) for each in weights], "use_fp8_w8a8": False}
    if first is not None:
        if first == offset_start:
            raise Unsupported("calls at two offsets")
        theirs(_OPS, function, rows, weights, made.clone(), *meta, **{**given, "offset_start": first})
    theirs(_OPS, function, rows, weights, made, *meta, **given)
    if made is not out:
        out.copy_(made)


def _moe(
    tags: Tags,
    out: Any,
    x: Any,
    lora_a: Any,
    lora_b: Any,
    route: Any,
    topk_weights: Any = None,
    a_scale: Any = None,
    b_scale: Any = None,
    x_scale: Any = None,
    *,
    offset: int = 0,
    room: bool = False,
) -> None:
    _claimed(tags, x_scale)
    a, b, ids = _weights(lora_a), _weights(lora_b), route.topk_ids
    if room:
        if tags["weight_quant"] == "none":
            raise Unsupported("FP8 weights")
        a, b = [_with_room(each) for each in a], [_with_room(each) for each in b]
    weighted, rows = tags["routed_weight"] == "weighted", route.num_tokens
    rows_of_x, made = _packed(x), _packed(out)
    if x.shape[0] != rows * (route.top_k if weighted else 1):
        raise Unsupported("rows of x by token, or weighted ones by pair")
    if route.expert_map is not None or ids.min() < 0 or ids.max() >= route.num_experts:
        raise Unsupported("ids of local experts")
    device, rank, block = x.device, a[0].shape[-2], 16
    mapping = route.token_lora_mapping.int()
    enabled = torch.ones(route.max_loras + 1, dtype=torch.int32, device=device)
    if route.adapter_enabled is not None:
        enabled[: route.max_loras] = (route.adapter_enabled != 0).int()
    lora_ids = torch.full_like(enabled, -1)
    used = torch.unique(mapping)
    lora_ids[: used.numel()] = used
    active = torch.tensor([route.max_loras + 1], dtype=torch.int32)
    naive = tags["assignment"] == "naive"
    tables = (None, ids.reshape(-1), None) if naive else _align(ids, mapping, enabled, route, block)
    if topk_weights is None:
        topk_weights = torch.ones(ids.shape, dtype=torch.float32, device=device)
    width = 1 << (rank - 1).bit_length()
    shrink, expand = (block, min(64, max(16, width)), 32, 1, 4, 2, 1), (block, 32, max(16, min(width, 64)), 1, 4, 2, 1)
    routing = (made, rows_of_x, a, b, topk_weights, *tables, mapping, rank, route.top_k, lora_ids)
    found = importlib.import_module(_MOE)
    quantised = tags["weight_quant"] != "none" or tags["act_quant"] != "none"
    fast = 0 if tags["schedule"] == "two_kernel" else found._FUSED_MOE_LORA_ONE_SHOT_MAX_RANK
    with mock.patch.object(found, "_FUSED_MOE_LORA_ONE_SHOT_MAX_RANK", fast):
        if not quantised:
            adds = tags["add_inputs"] == "add"
            theirs(_MOE, "_fused_moe_lora", *routing, active, enabled, *shrink, *expand, weighted, False, offset, adds)
            out.copy_(made)
            return
    if tags["add_inputs"] != "add":
        raise Unsupported("FP8 that is added")
    given: dict[str, Any] = {"lora_a_scale_stacked": _weights(a_scale or []), "lora_b_scale_stacked": _weights(b_scale or [])}
    given |= {"shrink_act_scale": x_scale, "mul_routed_weight": weighted, "use_fp8_w8a8": tags["act_quant"] != "none"}
    given["use_int8_w8a16"] = tags["act_quant"] == "none"  # of weights of 8 bits alone it knows no other way
    given |= {"per_channel_quant": tags["weight_quant"] == "w8channel"}
    given |= {"block_shape": [128, 128] if tags["weight_quant"] == "w8group" else None}
    module = f"{_OPS}.fused_moe_lora_fp8_op"
    theirs(module, "_fused_moe_lora_fp8", *routing, int(active), enabled, *shrink, *expand, **given)
    out.copy_(made)


def _moe_at_offset(tags: Tags, out: Any, *operands: Any, **named: Any) -> None:
    """In columns of a wider out."""
    wide = torch.cat([out.new_zeros(*out.shape[:2], 8), out], 2).contiguous()
    _moe(tags, wide, *operands, **named, offset=8)
    out.copy_(wide[..., 8:])


def _with_room(weights: torch.Tensor) -> torch.Tensor:
    """With zeros behind: pointers that are cast to 16 or 32 bits stay in the tensor, and what they read is compared."""
    behind = weights.new_zeros(3 * weights.numel(), dtype=torch.uint8)
    room = torch.cat([weights.view(torch.uint8).flatten(), behind]).view(weights.dtype)
    return room[: weights.numel()].view(weights.shape)


def _moe_either_way(tags: Tags, out: Any, *operands: Any, **named: Any) -> None:
    """A request that is alone goes the way of few tokens, and among others the one of sorted tables: with the same bits."""
    if tags["assignment"] != "naive" or tags["weight_quant"] != "none" or tags["act_quant"] != "none":
        raise Unsupported("few tokens, of 16 bits")
    alone, among = out.clone(), out.clone()
    _moe(tags, alone, *operands, **named)
    _moe({**tags, "assignment": "sorted"}, among, *operands, **named)
    differ = (alone.view(torch.int16) != among.view(torch.int16)).nonzero()
    if len(differ):
        place = tuple(differ[0].tolist())
        bits = f"alone {float(alone[place]):.6g}, among others {float(among[place]):.6g}"
        raise AssertionError(f"{len(differ)} of {alone.numel()} elements have other bits in a larger batch; at {place}: {bits}")
    out.copy_(alone)


def _align(ids: torch.Tensor, mapping: torch.Tensor, enabled: torch.Tensor, route: Any, block: int) -> tuple[torch.Tensor, ...]:
    """(sorted_token_ids [L, EM], expert_ids [L, EM / block], num_tokens_post_padded [L]), as its CUDA op makes them."""
    pairs, experts = ids.numel(), route.num_experts
    size = pairs + experts * (block - 1)
    size = -(-size // block) * block
    tables = torch.full((route.max_loras, size), pairs, dtype=torch.int32, device=ids.device)
    owners = torch.full((route.max_loras, size // block), -1, dtype=torch.int32, device=ids.device)
    ends = torch.zeros(route.max_loras, dtype=torch.int32, device=ids.device)
    adapters = mapping.repeat_interleave(route.top_k)
    for adapter in range(route.max_loras):
        at = 0
        for expert in range(experts):
            rows = ((adapters == adapter) & (ids.reshape(-1) == expert) & bool(enabled[adapter])).nonzero()[:, 0]
            tables[adapter, at : at + len(rows)] = rows.int()
            blocks = -(-len(rows) // block)
            owners[adapter, at // block : at // block + blocks] = expert
            at += blocks * block
        ends[adapter] = at
    return tables, owners, ends


_BF16 = {"dtype": ("bf16",)}
_Calls = dict[str, Callable[..., None]]
_SHRINKS: _Calls = {"lora_shrink": _shrink, "lora_shrink with scales [T]": functools.partial(_shrink, flat=True)}
_EXPANDS: _Calls = {
    "lora_expand": _expand,
    "lora_expand after another offset": functools.partial(_expand, first=0),
    "lora_expand_fp8 of 16 bits": functools.partial(_expand, in_fp8_op=True),
}
_MOES: _Calls = {
    "fused_moe_lora": _moe,
    "fused_moe_lora at an offset": _moe_at_offset,
    "fused_moe_lora with room": functools.partial(_moe, room=True),
    "fused_moe_lora either way": _moe_either_way,
}
ADAPTERS = {
    "lora_shrink": Adapter(_SHRINKS, _BF16, _forget),
    "lora_expand": Adapter(_EXPANDS, _BF16, _forget),
    "moe_lora": Adapter(_MOES, _BF16, _forget),
}
