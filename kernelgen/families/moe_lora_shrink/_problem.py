"""What the schedules of moe_lora_shrink share: the sizes of a call, its checks, and which tiles serve it."""

from __future__ import annotations

import functools
from typing import Annotated, Any, NamedTuple

import torch

from .. import _operands as operands
from .. import _runtime as runtime
from ..moe_route._op import (
    MoeRoute,
    Route,
    check_kind,
    check_rank,
    expected_groups,
    experts_in_weights,
    rows_of_block,
)
from ._table import VARIANTS
from ._tuned import TUNED


class PairsConfig(NamedTuple):
    """Tiles of pairs; split_k: columns of K that one program takes."""

    block_r: int
    block_k: int
    split_k: int
    num_warps: int
    weight_policy: int = 0
    pdl: int = 1  # where the target has it


class BlocksConfig(NamedTuple):
    """Tiles of blocks; block_m is the route's, split_k: columns of K that one program takes."""

    block_k: int
    split_k: int
    stages: int
    num_warps: int
    weight_policy: int = 0
    pdl: int = 1  # where the target has it


CONFIGS = {"pairs": PairsConfig, "blocks": BlocksConfig}
Config = PairsConfig | BlocksConfig


class Given(NamedTuple):
    """What moe_lora_shrink is given."""

    y: Annotated[torch.Tensor, operands.Tensor("S, T*top_k, rank", torch.float32, written=True)]
    x: Annotated[torch.Tensor, operands.Tensor(("T, K", "T*top_k, K"), "D", asks=("torch_dtype",))]
    lora_a: Annotated[operands.Tensors, operands.Tensor(">=L, >=X, rank, K", "D", slices="alike", asks=("rank",))]
    route: Route


OP = operands.Op(
    "moe_lora_shrink",
    Given,
    spec=VARIANTS.spec,
    dtypes={"D": VARIANTS.dtypes},
    first=("lora_a",),
    tells=("x",),
    sizes=experts_in_weights,
)


class Problem(NamedTuple):
    """The sizes of one checked call; strides count elements."""

    num_pairs: int
    k: int
    slices: int
    rank: int
    pairs_a_row: int  # of x: top_k, or 1 where every pair has its own
    x_stride: int
    y_stride: int  # between pairs
    y_slice: int  # between slices, which may depend on the number of pairs: no constant of a kernel
    a_strides: operands.Strides
    device: torch.device


def check(
    variant: str,
    given: Given,
    *,
    dtype: torch.dtype | None = None,
    naive: bool | None = None,
    max_rank: int | None = None,
) -> Problem:
    """The sizes of a call, once everything about it is known to fit; dtype and naive of None: any.

    Raises:
        ValueError: says which argument does not fit, what it is and what was wanted.
    """
    sizes = OP.check(variant, given, D=dtype)
    y, x, lora_a, route = given
    check_kind(variant, route, naive)
    rank, num_pairs, strides = sizes["rank"], route.num_tokens * route.top_k, operands.Strides.of(lora_a[0])
    check_rank(variant, "lora_a", rank, max_rank, strides.row)
    if max(y.stride(0), y.numel()) >= 2**31:
        runtime.fail(variant, "y", runtime.describe(y), "below 2**31 elements, and a slice of them", "send fewer tokens")
    pairs_a_row = 1 if x.shape[0] == num_pairs else route.top_k
    return Problem(
        num_pairs=num_pairs,
        k=sizes["K"],
        slices=sizes["S"],
        rank=rank,
        pairs_a_row=pairs_a_row,
        x_stride=x.stride(0),
        y_stride=y.stride(1),
        y_slice=y.stride(0),
        a_strides=strides,
        device=x.device,
    )


class Key(NamedTuple):
    """What measured tiles are looked up by: the sizes of specs/tuned, and what its tags stand for."""

    num_tokens: int  # the next power of two
    top_k: int
    num_experts: int
    max_loras: int
    block_m: int  # of the route, 0: pairs come one by one
    k: int
    slices: int
    rank: int
    weight_scales: str | None
    x_scales: str | None


def choose(schedule: str, problem: Problem, route: MoeRoute) -> Any:
    """The tiles of ``schedule`` for a call, of its class, from host integers alone: the same call always gets the same.

    How K is shared out, and with it the order of a sum, depends on everything but the rank: so a GPU that holds a part of
    the ranks makes the same bits of them as one that holds all. The number of tokens counts as the next power of two, so
    that the compile keys of a model are a short list.
    """
    tokens, device = runtime.next_power_of_2(route.num_tokens), runtime.traits(problem.device)
    layer = (rows_of_block(route), problem.k, problem.slices, problem.rank)
    key = Key(min(tokens, 4096), route.top_k, route.num_experts, route.max_loras, *layer, None, None)

    def rule(_: str | None) -> tuple[str, Config]:
        sizes = (tokens * route.top_k, route.num_experts * route.max_loras, *layer)
        return schedule, _choose(schedule, _Shape(*sizes, device.num_sms, device.shared_memory))

    return runtime.choose(TUNED, key, device, CONFIGS, rule, lambda other: other == schedule)[1]


class _Shape(NamedTuple):
    """What tiles depend on where nothing was measured."""

    pairs: int
    groups: int  # of an adapter and an expert
    block_m: int  # 0: pairs come one by one
    k: int
    slices: int
    rank: int
    num_sms: int
    shared_memory: int


@functools.lru_cache(maxsize=4096)
def _choose(schedule: str, s: _Shape) -> Config:
    return _pairs(s) if schedule == "pairs" else _blocks(s)


def _pairs(s: _Shape) -> PairsConfig:
    block_k = min(256, max(16, runtime.next_power_of_2(s.k)))
    split_k = max(block_k, 1024 if s.k > 4096 and s.pairs >= 32 else 512)
    while runtime.cdiv(s.k, split_k) > 8:
        split_k *= 2
    # Where weights are read once, they need not stay in the cache.
    reread = s.pairs > 2 * expected_groups(s.pairs, s.groups)
    return PairsConfig(16 if s.rank > 8 else 8, block_k, split_k, 4, 0 if reread else 1)


def _blocks(s: _Shape) -> BlocksConfig:
    block_r = runtime.block_rank(s.rank)
    column_bytes, budget = 2 * (s.block_m + s.slices * block_r), s.shared_memory - 4096
    block_k = 64
    if block_r == 128 and s.k % 8:
        block_k = 32  # rows that are not aligned are loaded element by element, which takes registers
    while block_k > 32 and 3 * block_k * column_bytes > budget:
        block_k //= 2
    hit = expected_groups(s.pairs, s.groups)
    blocks = hit + (s.pairs - hit) / max(s.block_m, 1)
    split_k = runtime.cdiv(s.k, 64) * 64
    if s.pairs <= 4096:
        for count in range(1, 9):
            if s.k % 64 == 0 and s.k % (64 * count):
                continue  # equal parts, where there can be any
            split_k = runtime.cdiv(s.k, count * 64) * 64
            if blocks * count >= 0.95 * s.num_sms and split_k <= 4096:
                break
    stages = 4 if 4 * block_k * column_bytes <= min(112 * 1024, budget) else 3 if 3 * block_k * column_bytes <= budget else 2
    # More would spill over 4 warps; sooner without the matrix units of a large card.
    most = 32 if s.shared_memory < 200_000 else 48 if s.k % 8 else 64
    return BlocksConfig(block_k, split_k, stages, 8 if s.block_m == 128 or s.block_m * block_r * s.slices >= most * 256 else 4)
