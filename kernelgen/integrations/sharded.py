"""Fully sharded LoRA: both of an adapter's matrices are cut over the GPUs of a tensor-parallel group.

Each GPU makes rank vectors of what it holds of A, hands them over to the others, and makes the columns that it holds of B:

    A cut along the rank (of a layer whose columns are sharded: w13, qkv)   all-gather: vectors lie side by side
    A cut along K (of a layer whose rows are sharded: w2, o_proj)           all-reduce: vectors are partial sums

Which of them it is, the shapes say: B has the full rank in both. The vectors are float32, and are rounded to the dtype of the
activations once, behind the hand-over, as they are without sharding. So after an all-gather a result has the bits that one
GPU with all of the rank would have given it, wherever its route is sorted: each vector is added up in the order that K and the
number of tokens set. An all-reduce adds in an order of its own, within the published bound.

A route is made from the tokens of the batch that is on the GPU, on the device. Under expert and data parallelism that is
the batch gathered from all GPUs, with the adapters gathered likewise: no list of active adapters of the own requests is
asked for, so an adapter that only another GPU's requests name is served too.

The collectives are those of ``torch.distributed``; with NCCL all of it can be captured in a CUDA graph. Every GPU of the group
must come here with as many tokens, whatever their adapters.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any, Callable, Sequence

import torch
import torch.distributed as dist

# torch 2.13 renames it
all_gather: Callable[..., Any] = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)


def sharded_moe_lora(
    kernels: ModuleType,
    out: torch.Tensor,
    x: torch.Tensor,
    lora_a: Sequence[torch.Tensor],
    lora_b: Sequence[torch.Tensor],
    route: Any,
    *,
    group: dist.ProcessGroup | None = None,
    offset: int = 0,
    topk_weights: torch.Tensor | None = None,
    mul_routed_weight: bool = False,
) -> None:
    """As ``moe_lora`` of the generated package ``kernels``, on this GPU's shards of the adapters; adds to ``out``.

    Args:
        out: [T, top_k, *].
        x: [T, K] or [T * top_k, K]; K is this GPU's part of it where A is cut along K.
        lora_a: S tensors [L, E, rank or a part of it, K].
        lora_b: S tensors [L, E, N, rank].
        route: of the same tokens and experts on every GPU of the group.
        group: None is the default group.
        offset: column of ``out`` where the first slice begins: N * the GPU's place where ``out`` has the columns of all GPUs.
        topk_weights, mul_routed_weight: as in ``moe_lora``.

    Raises:
        ValueError: the rank of B is neither that of A nor that of all parts of A, or the kernels refuse an argument; then
            the other GPUs, if their arguments do fit, wait for this one.
    """
    slices, num_pairs = len(lora_a), route.num_tokens * route.top_k
    gathers = _gathers("sharded_moe_lora", lora_a[0].shape[2], lora_b[0].shape[3], group)
    y = torch.empty((slices, num_pairs, lora_a[0].shape[2]), dtype=torch.float32, device=x.device)
    kernels.moe_lora_shrink(y, x, lora_a, route)
    y = _gathered(y, group) if gathers else _reduced(y, group)
    options = {"offset": offset, "topk_weights": topk_weights, "mul_routed_weight": mul_routed_weight}
    kernels.moe_lora_expand(out, y, lora_b, route, **options)


def sharded_lora(
    kernels: ModuleType,
    out: torch.Tensor,
    x: torch.Tensor,
    lora_a: Sequence[torch.Tensor],
    lora_b: Sequence[torch.Tensor],
    route: Any,
    *,
    group: dist.ProcessGroup | None = None,
    scaling: float = 1.0,
    offset_start: int = 0,
    add_inputs: bool = True,
) -> None:
    """As ``lora`` of the generated package ``kernels``, on this GPU's shards of the adapters.

    Args:
        out: [T, *].
        x: [T, K]; K is this GPU's part of it where A is cut along K.
        lora_a: S tensors [L, rank or a part of it, K].
        lora_b: S tensors [L, N_s, rank].
        route: from ``lora_route``, of the same tokens on every GPU of the group.
        group: None is the default group.
        scaling, add_inputs: as in ``lora``.
        offset_start: column of ``out`` where the first slice begins.

    Raises:
        ValueError: as ``sharded_moe_lora``.
    """
    gathers = _gathers("sharded_lora", lora_a[0].shape[-2], lora_b[0].shape[-1], group)
    # zero where a token has no adapter: lora_shrink leaves those rows as they are
    y = torch.zeros((len(lora_a), route.num_tokens, lora_a[0].shape[-2]), dtype=torch.float32, device=x.device)
    kernels.lora_shrink(y, x, lora_a, route, scaling=scaling)
    if gathers:
        y = _gathered(y, group).permute(1, 2, 0, 3).reshape(len(lora_a), route.num_tokens, -1)
    else:
        y = _reduced(y, group)
    kernels.lora_expand(out, y, lora_b, route, offset_start=offset_start, add_inputs=add_inputs)


def _gathers(name: str, rank_of_a: int, rank_of_b: int, group: dist.ProcessGroup | None) -> bool:
    """Whether A is cut along the rank."""
    if rank_of_b == rank_of_a:
        return False
    shards = dist.get_world_size(group)
    if rank_of_b != shards * rank_of_a:
        wanted = f"{rank_of_a}, or {shards * rank_of_a} in all of the {shards} shards"
        hint = "cut A along K or along the rank, in equal parts, and give B the full rank"
        raise ValueError(f"{name}: rank of lora_b: got {rank_of_b}, wanted that of lora_a: {wanted}; {hint}")
    return True


def _gathered(y: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
    """[shards, *y.shape], in the order of the group's ranks."""
    shards = y.new_empty((dist.get_world_size(group), *y.shape))
    if y.numel():
        all_gather(shards.flatten(0, 1), y, group=group)
    return shards


def _reduced(y: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
    if y.numel():
        dist.all_reduce(y, group=group)
    return y
