"""LoRA whose adapters are sharded over GPUs like the layer under them, over ``torch.distributed``.

Tensor parallelism cuts a layer's weight into n shards. Cut both matrices of an adapter too, and each GPU holds and reads an
n-th of them; what it costs is one collective on the rank vectors, float32 [S, rows, rank], between the two products:

| layer | A of a GPU | hand-over | B of a GPU | offset |
| --- | --- | --- | --- | --- |
| column-parallel (q, k, v; gate, up) | rank / n of the rank | all-gather | N / n of the columns | 0 |
| row-parallel (o; down) | K / n of the columns | all-reduce | N / n of the columns | index * N / n |

``column_shard`` and ``row_shard`` cut so. ``out`` is the base layer's on this GPU: in a column-parallel layer its own columns,
in a row-parallel one all columns, of which it adds to its own, before the layer sums ``out`` over the GPUs. Which hand-over it
is, the shapes say: A with the rank of B makes parts of a sum, A with an n-th of it parts of the rank.

The rank vector is rounded to the dtype of the activations once, behind the hand-over, so the result is within the bound of an
unsharded one. With a sorted route and an all-gather, ``sharded_moe_lora`` gives the very bits of the same two ops on one GPU,
as each rank is summed up by one GPU, in the same order. In an all-reduce the parts are added as the library does it.

Everything stays on the device: with NCCL a call can be captured in a CUDA graph, on all GPUs alike. All GPUs must make the
same calls, with routes of the same tokens; that of each may be naive or sorted, as rank vectors are by pair.

Expert parallelism needs nothing of this: give ``moe_route`` an ``expert_map`` and the adapters of all tokens that are here,
gathered with them. No list of the adapters of a GPU's own batch takes part, so a token from elsewhere keeps its adapter.
"""

from __future__ import annotations

import math
from types import ModuleType
from typing import Any, NamedTuple, Sequence

import torch
import torch.distributed as dist

Slices = Sequence[torch.Tensor]

# The name changed in torch 2.13.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


def column_shard(lora_a: Slices, lora_b: Slices, index: int, shards: int) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """What GPU ``index`` of ``shards`` holds of adapters on a column-parallel layer: a part of the rank of A, of the rows of B.

    Args:
        lora_a: S tensors [..., rank, K]; the rank may be padded with zeroes, in A and B.
        lora_b: S tensors [..., N, rank].

    Raises:
        ValueError: a size that ``shards`` does not divide.
    """
    return [_part(a, -2, index, shards) for a in lora_a], [_part(b, -2, index, shards) for b in lora_b]


def row_shard(lora_a: Slices, lora_b: Slices, index: int, shards: int) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """As ``column_shard`` for a row-parallel layer: a part of the columns of A, of the rows of B."""
    return [_part(a, -1, index, shards) for a in lora_a], [_part(b, -2, index, shards) for b in lora_b]


def sharded_workspace(
    *, max_rows: int, num_slices: int, max_rank: int, device: torch.device | str
) -> torch.Tensor:
    """Memory for the rank vectors of every call of at most these sizes, on any number of GPUs; one for each stream.

    Args:
        max_rows: tokens; for ``sharded_moe_lora`` tokens * top_k.
        max_rank: that of B.
    """
    return torch.empty(3 * _round_up(num_slices * max_rows * max_rank), dtype=torch.float32, device=device)


def sharded_moe_lora(
    kernels: ModuleType,
    out: torch.Tensor,
    x: torch.Tensor,
    lora_a: Slices,
    lora_b: Slices,
    route: Any,
    *,
    group: dist.ProcessGroup | None = None,
    offset: int = 0,
    topk_weights: torch.Tensor | None = None,
    mul_routed_weight: bool = False,
    workspace: torch.Tensor | None = None,
) -> None:
    """``moe_lora`` with adapters that are sharded over the GPUs of ``group``: adds this GPU's columns of the delta to ``out``.

    Args:
        kernels: the generated package, under whatever name it was imported.
        out: [T, top_k, *], this GPU's; the columns [offset, offset + S * N) are added to.
        x: [T, K], or [T * top_k, K] behind the activation; K is this GPU's part in a row-parallel layer.
        lora_a, lora_b: this GPU's, S tensors [L, E, *, K] and [L, E, N, rank].
        route: from the package's ``moe_route``.
        group: None is the default group; a group of one does without a collective.
        offset: where this GPU's columns begin in ``out``.
        topk_weights, mul_routed_weight: as in ``moe_lora``.
        workspace: from ``sharded_workspace``; None allocates.

    Raises:
        ValueError: something does not fit; ``out`` is as it was. GPUs with shards of one shape raise alike.
    """
    vectors = _vectors("sharded_moe_lora", lora_a, lora_b, route.num_tokens * route.top_k, group, workspace)
    kernels.moe_lora_shrink(vectors.own, x, lora_a, route)
    y = _hand_over(vectors, group)
    weights = {"topk_weights": topk_weights, "mul_routed_weight": mul_routed_weight}
    kernels.moe_lora_expand(out, y, lora_b, route, offset=offset, **weights)


def sharded_lora(
    kernels: ModuleType,
    out: torch.Tensor,
    x: torch.Tensor,
    lora_a: Slices,
    lora_b: Slices,
    route: Any,
    *,
    group: dist.ProcessGroup | None = None,
    scaling: float = 1.0,
    offset: int = 0,
    workspace: torch.Tensor | None = None,
) -> None:
    """``lora`` with adapters that are sharded over the GPUs of ``group``: adds this GPU's columns of the delta to ``out``.

    Args:
        kernels: the generated package, under whatever name it was imported.
        out: [T, *], this GPU's; as many columns as B has, from ``offset`` on, are added to.
        x: [T, K]; K is this GPU's part in a row-parallel layer.
        lora_a, lora_b: this GPU's, S tensors [L, *, K] and [L, N_s, rank].
        route: from the package's ``lora_route``.
        group, workspace: as in ``sharded_moe_lora``.
        scaling: applied in float32, in front of the hand-over.
        offset: where this GPU's columns begin in ``out``.

    Raises:
        ValueError: something does not fit; ``out`` is as it was. GPUs with shards of one shape raise alike.
    """
    vectors = _vectors("sharded_lora", lora_a, lora_b, route.num_tokens, group, workspace)
    vectors.own.zero_()  # lora_shrink leaves out rows without an adapter, and a collective moves all
    kernels.lora_shrink(vectors.own, x, lora_a, route, scaling=scaling)
    y = _hand_over(vectors, group)
    if vectors.joined is not None:  # the ranks of a row, side by side
        shards, slices, rows, held = y.shape
        vectors.joined.view(slices, rows, shards, held).copy_(y.permute(1, 2, 0, 3))
        y = vectors.joined
    kernels.lora_expand(out, y, lora_b, route, offset_start=offset)


class _Vectors(NamedTuple):
    """Memory for the rank vectors of one call."""

    own: torch.Tensor  # [S, rows, held], of this GPU
    gathered: torch.Tensor | None  # [shards, S, rows, held], where parts of the rank are gathered
    joined: torch.Tensor | None  # and [S, rows, rank]


def _vectors(
    caller: str,
    lora_a: Slices,
    lora_b: Slices,
    rows: int,
    group: dist.ProcessGroup | None,
    workspace: torch.Tensor | None,
) -> _Vectors:
    shards, slices = dist.get_world_size(group), len(lora_a)
    held, rank = lora_a[0].shape[-2], lora_b[0].shape[-1]
    if held != rank and held * shards != rank:
        raise ValueError(
            f"{caller}: rank of lora_a: got {held}, wanted {rank} (that of lora_b: parts of a sum) or an n-th of it (parts of "
            f"the rank), with n = {shards} GPUs\n  hint: row_shard and column_shard cut adapters so"
        )
    own, whole = _round_up(slices * rows * held), _round_up(slices * rows * rank)
    needed = own if held == rank else own + 2 * whole
    if workspace is None:
        workspace = torch.empty(needed, dtype=torch.float32, device=lora_a[0].device)
    if workspace.dtype != torch.float32 or workspace.dim() != 1 or workspace.numel() < needed:
        raise ValueError(
            f"{caller}: workspace: got {list(workspace.shape)} {workspace.dtype}, wanted [>= {needed}] torch.float32\n"
            "  hint: make it with sharded_workspace for the largest batch"
        )

    def take(start: int, *shape: int) -> torch.Tensor:
        return workspace[start : start + math.prod(shape)].view(shape)

    if held == rank:
        return _Vectors(take(0, slices, rows, held), None, None)
    gathered, joined = take(own, shards, slices, rows, held), take(own + whole, slices, rows, rank)
    return _Vectors(take(0, slices, rows, held), gathered, joined)


def _hand_over(vectors: _Vectors, group: dist.ProcessGroup | None) -> torch.Tensor:
    """The rank vectors of all GPUs, summed: [S, rows, rank]; or gathered: [shards, S, rows, rank / shards]."""
    own, gathered, _ = vectors
    if own.numel() == 0:
        return own if gathered is None else gathered
    if gathered is not None:
        _all_gather(gathered.view(-1), own.view(-1), group=group)
        return gathered
    if dist.get_world_size(group) > 1:
        dist.all_reduce(own, group=group)
    return own


def _part(matrices: torch.Tensor, dim: int, index: int, shards: int) -> torch.Tensor:
    size = matrices.shape[dim]
    if not 0 <= index < shards or size % shards:
        raise ValueError(
            f"shard {index} of {shards}: got {size} of dimension {dim} of {list(matrices.shape)}, wanted a multiple of {shards}\n"
            "  hint: pad the rank with zeroes, in A and in B"
        )
    return matrices.chunk(shards, dim)[index].contiguous()


def _round_up(elements: int) -> int:
    return (elements + 31) // 32 * 32  # what lies next starts 128 bytes aligned
