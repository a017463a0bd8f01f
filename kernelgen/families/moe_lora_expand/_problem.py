"""What the schedules of moe_lora_expand share: the sizes of a call, its checks, and which tiles serve it."""

from __future__ import annotations

import functools
from typing import Annotated, Any, NamedTuple

import torch

from .. import _operands as operands
from .. import _runtime as runtime
from ..moe_route._op import (
    AddInputs,
    MoeRoute,
    MulRoutedWeight,
    Route,
    RoutingWeights,
    check_kind,
    check_rank,
    expected_groups,
    experts_in_weights,
    rows_of_block,
)
from ._table import VARIANTS
from ._tuned import TUNED


class PairsConfig(NamedTuple):
    """Tiles of pairs."""

    block_n: int
    num_warps: int
    weight_policy: int = 0


class BlocksConfig(NamedTuple):
    """Tiles of blocks; block_m is the route's, tiles: column tiles that one program takes."""

    block_n: int
    tiles: int
    stages: int
    num_warps: int
    weight_policy: int = 0


CONFIGS = {"pairs": PairsConfig, "blocks": BlocksConfig}
Config = PairsConfig | BlocksConfig


class Given(NamedTuple):
    """What moe_lora_expand is given."""

    out: Annotated[torch.Tensor, operands.Tensor("T, top_k, *", "D", operands.PAIRS, written=True, asks=("torch_dtype",))]
    y: Annotated[torch.Tensor, operands.Tensor(("S, T*top_k, rank", "shards, S, T*top_k, shard"), torch.float32)]
    lora_b: Annotated[operands.Tensors, operands.Tensor(">=L, >=X, N, rank", "D", slices="alike", asks=("rank",))]
    route: Route
    topk_weights: RoutingWeights
    offset: operands.Count
    add_inputs: AddInputs
    mul_routed_weight: MulRoutedWeight


OP = operands.Op(
    "moe_lora_expand",
    Given,
    spec=VARIANTS.spec,
    dtypes={"D": VARIANTS.dtypes},
    first=("lora_b",),
    tells=("out",),
    sizes=experts_in_weights,
)


class Problem(NamedTuple):
    """The sizes of one checked call; strides count elements."""

    num_pairs: int
    n: int
    slices: int
    rank: int
    shard: int  # ranks that lie together in y
    offset: int  # column of out where the first slice begins
    out_stride: int
    y_stride: int  # between pairs
    y_slice: int  # between slices, and
    y_shard: int  # shards, which may depend on the number of pairs: no constants of a kernel
    b_strides: operands.Strides
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
    out, y, lora_b, route, offset = given.out, given.y, given.lora_b, given.route, given.offset
    check_kind(variant, route, naive)
    n, rank, slices, num_pairs = sizes["N"], sizes["rank"], sizes["S"], route.num_tokens * route.top_k
    strides, end = operands.Strides.of(lora_b[0]), offset + slices * n
    check_rank(variant, "lora_b", rank, max_rank, strides.row, n)
    if end >= 2**31:
        runtime.fail(variant, "offset", offset, "columns below 2**31", f"{slices} slices of {n} end at {end}, N as in lora_b")
    if out.shape[2] < end:
        hint = f"{slices} slices of {n} columns from offset = {offset} on, N as in lora_b"
        runtime.fail(variant, "out", runtime.describe(out), f"[{route.num_tokens}, {route.top_k}, >= {end}]", hint)
    shards = y.shape[0] if y.dim() == 4 else 1
    if y.shape[-1] * shards != rank:
        wanted = f"{[slices, num_pairs, rank]}, or [shards, {slices}, {num_pairs}, {rank} / shards]"
        runtime.fail(variant, "y", runtime.describe(y), wanted, "as moe_lora_shrink leaves it; rank as in lora_b")
    if max(y.stride()[:-2]) >= 2**31:
        wanted = "slices and shards that are less than 2**31 elements apart"
        runtime.fail(variant, "y", runtime.describe(y), wanted, "send fewer tokens")
    out_stride = out.stride(1) if route.top_k > 1 else out.stride(0)
    return Problem(
        num_pairs=num_pairs,
        n=n,
        slices=slices,
        rank=rank,
        shard=y.shape[-1],
        offset=offset,
        out_stride=out_stride,
        y_stride=y.stride(-2),
        y_slice=y.stride(-3),
        y_shard=y.stride(0) if y.dim() == 4 else 0,
        b_strides=strides,
        device=out.device,
    )


class Key(NamedTuple):
    """What measured tiles are looked up by: the sizes of specs/tuned, and what its tags stand for."""

    num_tokens: int  # the next power of two
    top_k: int
    num_experts: int
    max_loras: int
    block_m: int  # of the route, 0: pairs come one by one
    n: int
    slices: int
    rank: int
    adds: bool
    weight_scales: str | None


def choose(schedule: str, problem: Problem, route: MoeRoute) -> Any:
    """The tiles of ``schedule`` for a call, of its class, from host integers alone: the same call always gets the same.

    The number of tokens counts as the next power of two, so that the compile keys of a model are a short list.
    """
    tokens, device = runtime.next_power_of_2(route.num_tokens), runtime.traits(problem.device)
    layer = (rows_of_block(route), problem.n, problem.slices, problem.rank)
    key = Key(min(tokens, 4096), route.top_k, route.num_experts, route.max_loras, *layer, True, None)

    def rule(_: str | None) -> tuple[str, Config]:
        sizes = (tokens * route.top_k, route.num_experts * route.max_loras, *layer)
        return schedule, _choose(schedule, _Shape(*sizes, device.num_sms, device.shared_memory))

    return runtime.choose(TUNED, key, device, CONFIGS, rule, lambda other: other == schedule)[1]


class _Shape(NamedTuple):
    """What tiles depend on where nothing was measured."""

    pairs: int
    groups: int  # of an adapter and an expert
    block_m: int  # 0: pairs come one by one
    n: int
    slices: int
    rank: int
    num_sms: int
    shared_memory: int


@functools.lru_cache(maxsize=4096)
def _choose(schedule: str, s: _Shape) -> Config:
    return _pairs(s) if schedule == "pairs" else _blocks(s)


def _pairs(s: _Shape) -> PairsConfig:
    wide = s.pairs >= 128
    of_ranks = {16: (256, 4), 32: (128, 4), 64: (128 if wide else 64, 2), 128: (64 if wide else 32, 2)}
    block_n, warps = of_ranks[runtime.block_rank(s.rank)]
    if s.rank % 8:
        warps = 4  # rows that are not aligned are loaded element by element
    reread = s.pairs > 2 * expected_groups(s.pairs, s.groups)
    return PairsConfig(min(block_n, max(16, runtime.next_power_of_2(s.n))), warps, 0 if reread else 1)


def _blocks(s: _Shape) -> BlocksConfig:
    block_n = max(16, runtime.next_power_of_2(s.n)) if s.n <= 64 else 128 if s.n % 128 == 0 else 64
    while s.rank <= 128 and block_n > 16 and 4 * block_n * (s.block_m + runtime.block_rank(s.rank)) > s.shared_memory - 4096:
        block_n //= 2
    hit = expected_groups(s.pairs, s.groups)
    blocks = hit + (s.pairs - hit) / max(s.block_m, 1)
    tiles = runtime.cdiv(s.n, block_n)
    # As many column tiles in a row as leave each multiprocessor several programs.
    most = blocks * s.slices * tiles / (8 * s.num_sms)
    taken = max((t for t in (1, 2, 3, 4, 5, 8) if tiles % t == 0 and t <= max(most, 2)), default=1)
    stages = 3 if s.rank > 128 or (taken > 2 and s.block_m == 16) else 2
    return BlocksConfig(block_n, taken, stages, 8 if s.block_m >= 64 else 4)
