"""What the schedules of moe_shrink share: the sizes of a call, its checks, and which tiles serve it."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, NamedTuple

import torch

from .. import _operands as operands
from .. import _runtime as runtime
from .._scales import (
    check_fp8,
    check_x_scale,
    factor_scale_strides,
    find_factor_mode,
    find_x_mode,
    product_rows,
    scale_operand,
)
from ..moe_align._op import Tables, max_blocks
from ..moe_runs._op import Runs, settled_block_m
from ._table import QUANT, VARIANTS
from ._tuned import TUNED


class PairsConfig(NamedTuple):
    """Tiles of pairs."""

    block_r: int
    block_k: int
    num_warps: int
    weight_policy: int = 0


class RunsConfig(NamedTuple):
    """Tiles of runs; rows: of a tile, block_r: its columns."""

    rows: int
    block_r: int
    block_k: int
    num_stages: int
    num_warps: int
    weight_policy: int = 0


class TokensConfig(NamedTuple):
    """Tiles of tokens; as those of runs."""

    rows: int
    block_r: int
    block_k: int
    num_stages: int
    num_warps: int
    weight_policy: int = 0


CONFIGS = {"pairs": PairsConfig, "runs": RunsConfig, "tokens": TokensConfig}
Config = PairsConfig | RunsConfig | TokensConfig


def _rows(values: Mapping[str, Any]) -> dict[str, int]:
    """Rows of x, R."""
    tables = values["tables"]
    return {"R": tables.num_tokens * (1 if values["x_rows"] == "token" else tables.top_k)}


# What rank vectors are of: pairs, tokens, or pairs in parts.
VECTORS = ("T*top_k, S, rank", "T, S, rank", "*, T*top_k, S, rank")


class Given(NamedTuple):
    """What moe_shrink is given."""

    v: Annotated[torch.Tensor, operands.Tensor(VECTORS, None, operands.CONTIGUOUS, made=True, written=True)]
    x: Annotated[torch.Tensor, operands.Tensor("R, K", "D", scaled_by="x_scale", asks=("torch_dtype",))]
    lora_a: Annotated[
        operands.Tensors,
        operands.Tensor(">=L, >=E, rank, K", "D", slices="alike", scaled_by="a_scale", asks=("torch_dtype",)),
    ]
    tables: Tables
    runs: Runs
    x_rows: Annotated[str, operands.Choice(("token", "pair", "sorted"), asks=("rows",))]
    a_scale: Annotated[operands.Tensors | None, scale_operand("weight_scales", slices="any")]
    x_scale: Annotated[torch.Tensor | None, scale_operand("x_scales")]


OP = operands.Op(
    "moe_shrink",
    Given,
    spec=VARIANTS.spec,
    dtypes={"D": VARIANTS.dtypes},
    fp8=QUANT.elements,
    first=("lora_a",),
    tells=("x",),
    sizes=_rows,
)


class Problem(NamedTuple):
    """The sizes of one checked call; strides count elements."""

    num_tokens: int
    num_pairs: int
    top_k: int
    num_experts: int
    local_expert_start: int
    max_loras: int
    tokens_hint: int
    block_m: int
    k: int
    slices: int
    rank: int
    parts: int  # of K, that v has; 0: v is in the order of the tables, or of tokens
    rows: str
    x_stride: int
    a_strides: operands.Strides
    ranked: bool  # whether adapters say how many of their ranks count
    device: torch.device
    weight_scales: str | None  # of what FP8 factors have a scale each: "tensor", "channel" or "group"
    a_scale_strides: operands.Strides
    x_scales: str | None  # of what an FP8 x has a scale each: "tensor", "token" or "group"
    x_scale_stride: int  # over rows
    x_scale_next: int | None  # over groups, None: 1

    @property
    def reads_token(self) -> bool:
        return self.rows.startswith("token")

    @property
    def by_token(self) -> bool:
        return self.rows == "token_token"


def check(
    variant: str,
    given: Given,
    *,
    dtype: torch.dtype | None = None,
    writes: str | None = None,
    of_factors: str | None = None,
    mode: str | None = None,
) -> Problem:
    """The sizes of a call, once everything about it is known to fit; dtype, and of_factors and mode, of which factors and x have
    a scale each, of None: any.

    writes: where a row of v stands; None: as x and the runs say.

    Raises:
        ValueError: says which argument does not fit, what it is and what was wanted.
    """
    sizes = OP.check(variant, given, D=dtype)
    v, x, lora_a, tables, runs, reads, a_scale, x_scale = given
    if writes is None:
        of_tokens = reads == "token" and tables.top_k > 1 and v.shape[0] == tables.num_tokens > 0
        writes = "pair" if runs.runs is None else "token" if of_tokens else "sorted"
    by_table, by_token = writes == "sorted", writes == "token"
    if by_table and (runs.runs is None or tables.block_m == 0):
        runtime.fail(variant, "runs", "none", "runs", "make them with moe_align and moe_runs")
    weight_scales, a_scale_strides = _check_a_scale(variant, lora_a, a_scale, of_factors)
    x_scales, (x_scale_stride, x_scale_next) = _check_x_scale(variant, x, x_scale, mode, weight_scales)
    num_pairs, rank, k = tables.num_tokens * tables.top_k, sizes["rank"], sizes["K"]
    of_rows = (tables.num_tokens if by_token else num_pairs, sizes["S"], rank)
    parts = 0 if by_table or by_token else part_count(k)
    shape, kind = ((parts, *of_rows), torch.float32) if parts else (of_rows, vector_dtype(x, lora_a))
    if v.shape != shape or v.dtype != kind:
        runtime.fail(variant, "v", runtime.describe(v), f"{list(shape)} {kind}", "None makes it")
    strides = operands.Strides.of(lora_a[0])
    for label, of_experts in (("lora_a", strides.expert), ("a_scale", a_scale_strides.expert)):
        if by_token and of_experts != 0:
            got = f"experts {of_experts} elements apart"
            runtime.fail(variant, label, got, "0, for a v of tokens", "all experts share one matrix")
    if strides.row * rank >= 2**31:
        runtime.fail(variant, "lora_a", f"rows {strides.row} elements apart", "an expert's matrix below 2**31 elements")
    return Problem(
        num_tokens=tables.num_tokens,
        num_pairs=num_pairs,
        top_k=tables.top_k,
        num_experts=tables.num_experts,
        local_expert_start=tables.local_expert_start,
        max_loras=runs.max_loras,
        tokens_hint=min(tables.tokens_hint, tables.num_tokens),
        block_m=settled_block_m(tables),
        k=k,
        slices=sizes["S"],
        rank=rank,
        parts=parts,
        rows=f"{reads}_{writes}",
        x_stride=x.stride(0),
        a_strides=strides,
        ranked=runs.lora_ranks is not None,
        device=x.device,
        weight_scales=weight_scales,
        a_scale_strides=a_scale_strides,
        x_scales=x_scales,
        x_scale_stride=x_scale_stride,
        x_scale_next=x_scale_next,
    )


def vector_dtype(x: torch.Tensor, lora_a: Sequence[torch.Tensor]) -> torch.dtype:
    """Of rank vectors that are rounded: that of the operands of 16 bits; where all are FP8, bfloat16."""
    return next((given.dtype for given in (lora_a[0], x) if given.itemsize > 1), torch.bfloat16)


def _check_a_scale(
    variant: str, lora_a: Sequence[torch.Tensor], a_scale: Sequence[torch.Tensor] | None, mode: str | None
) -> tuple[str | None, operands.Strides]:
    """Of what FP8 factors have a scale each, and the strides of these."""
    if a_scale is None:
        return None, operands.Strides()
    found = mode or find_factor_mode(variant, "a_scale", a_scale, lora_a, QUANT)
    check_fp8(variant, "lora_a", lora_a[0], found, QUANT)
    return found, factor_scale_strides(variant, "a_scale", found, a_scale, lora_a, QUANT)


def _check_x_scale(
    variant: str, x: torch.Tensor, x_scale: torch.Tensor | None, mode: str | None, of_factors: str | None
) -> tuple[str | None, tuple[int, int | None]]:
    """Of what an FP8 x has a scale each, and the strides of these."""
    if x_scale is None:
        return None, (0, None)
    # Where K is one group, a scale a token has the same shape.
    found = mode or find_x_mode(variant, x, x_scale, QUANT, "group" if of_factors == "group" else None)
    check_fp8(variant, "x", x, found, QUANT)
    return found, check_x_scale(variant, found, x, x_scale, QUANT)


def part_count(k: int) -> int:
    """How many parts of K the vectors of pairs come in: enough programs for one token, and few numbers to add up."""
    return runtime.cdiv(k, split_k(k))


def split_k(k: int) -> int:
    """Columns of a part."""
    columns = 512
    while runtime.cdiv(k, columns) > 8:
        columns *= 2
    return columns


def programs(problem: Problem, config: RunsConfig | TokensConfig) -> tuple[int, int, int, bool]:
    """(blocks, programs for runs or adapters of each, chunks of the columns of v, whether a chunk may be of several slices)."""
    tokens, side = max(problem.tokens_hint, 1), min(problem.max_loras, 8)
    if problem.by_token:
        blocks = runtime.cdiv(tokens, config.rows)
    else:
        side = max(side, min(2 * problem.block_m // config.rows, 8))
        blocks = max_blocks(tokens, problem.top_k, problem.num_experts, problem.block_m)
    joined = runtime.traits(problem.device).mixed_pointers
    chunks = problem.slices * runtime.cdiv(problem.rank, config.block_r)
    if joined:
        rank = runtime.cdiv(problem.rank, 16) * 16 if problem.ranked else problem.rank
        chunks = runtime.cdiv(problem.slices * rank, config.block_r)
    return blocks, side, chunks, joined


class Key(NamedTuple):
    """What measured tiles are looked up by: the sizes of specs/tuned, and what its tags stand for."""

    num_tokens: int  # the next power of two
    top_k: int
    num_experts: int
    max_loras: int
    block_m: int  # of the tables, 0: there are none
    k: int
    slices: int
    rank: int
    reads_token: bool  # a row of x a token, else one a pair
    weight_scales: str | None
    x_scales: str | None


def choose(schedule: str, problem: Problem) -> Any:
    """The tiles for a call, from host integers alone: the same call always gets the same.

    The number of tokens counts by its blocks, so that the compile keys of a model are a short list.
    """
    device = runtime.traits(problem.device)
    tokens = min(runtime.next_power_of_2(problem.tokens_hint), 4096)
    layer = (problem.top_k, problem.num_experts, problem.max_loras, problem.block_m, problem.k, problem.slices, problem.rank)
    key = Key(tokens, *layer, problem.reads_token, problem.weight_scales, problem.x_scales)

    def rule(_: str | None) -> tuple[str, Config]:
        columns = problem.rank * (problem.slices if device.mixed_pointers else 1)
        if problem.ranked:
            columns = min(columns, 64)  # so that there are chunks in which nothing counts
        # Of tokens by themselves as many share a tile as leave programs for all multiprocessors.
        height = problem.block_m if not problem.by_token else 16 if tokens <= 512 else 64 if tokens <= 2048 else 128
        groups = problem.num_experts * problem.max_loras if not problem.by_token else 1
        run = runtime.cdiv(tokens * problem.top_k, groups)  # rows of one, if experts and adapters of a batch spread evenly
        sizes = (height, run, problem.k, columns, problem.reads_token, problem.weight_scales, problem.x_scales)
        return schedule, _choose(schedule, _Shape(*sizes, device.shared_memory, device.max_stages))

    return runtime.choose(TUNED, key, device, CONFIGS, rule, lambda other: other == schedule)[1]


class _Shape(NamedTuple):
    """What tiles depend on where nothing was measured."""

    block_m: int
    run: int  # rows of one expert and adapter
    k: int
    columns: int  # of a product
    reads_token: bool
    weight_scales: str | None
    x_scales: str | None
    shared_memory: int
    max_stages: int


@functools.lru_cache(maxsize=4096)
def _choose(schedule: str, s: _Shape) -> Config:
    if schedule == "tokens":
        return TokensConfig(*_tiles(s))
    return _pairs(s) if schedule == "pairs" else _runs(s)


def _pairs(s: _Shape) -> PairsConfig:
    block_r = 32 if s.columns >= 32 else 8
    while s.weight_scales == "group" and QUANT.group_n % block_r:
        block_r //= 2
    return PairsConfig(block_r, min(256, max(64, runtime.next_power_of_2(s.k))), 4, 1)


def _runs(s: _Shape) -> RunsConfig:
    if s.block_m < 64 or s.columns > 32:
        return _tiles(s)
    # Few sums: tiles as high as a run, and long steps, so that programs keep memory busy.
    if not s.reads_token:
        return _tiles(s, 32, *((256, 4) if s.k >= 4096 else (128, 3)))
    if s.x_scales:
        return _tiles(s, max(16, 2 * runtime.next_power_of_2(s.run)), 128, 3)
    return _tiles(s, 64, 128 if s.run <= 256 else 64, 3)


def _tiles(s: _Shape, *sizes: int) -> RunsConfig:
    """Tiles of some rows, block_k and stages, as far as operands and memory allow; without ``sizes`` those of the table."""
    rows, block_r, block_k, stages = (_OF_TOKENS if s.reads_token else _OF_PAIRS)[s.block_m]
    rows, block_k, stages = sizes or (rows, block_k, stages)
    block_r = min(block_r, max(16, runtime.next_power_of_2(s.columns)))
    if s.weight_scales or s.x_scales:
        rows = product_rows(rows)
    if "group" in (s.weight_scales, s.x_scales):
        block_k = min(block_k, QUANT.group_k)
    if block_r <= 32:  # where a tile has registers to spare, it is not much higher than what it holds
        rows = min(rows, max(32, 2 * runtime.next_power_of_2(s.run)))
    stages = min(stages if block_r < 128 else 3, s.max_stages)
    while block_k > 32 and s.k % block_k:
        block_k //= 2
    while block_k > 32 and stages * 2 * block_k * (rows + block_r) > s.shared_memory - 4096:
        block_k //= 2
    return RunsConfig(rows, block_r, block_k, stages, 4)


# block_m -> rows, most columns, block_k and stages: few rows of an adapter ask for much of K at a time.
_OF_TOKENS = {16: (16, 32, 256, 4), 32: (16, 32, 256, 4), 64: (32, 128, 64, 4), 128: (64, 128, 64, 3)}
_OF_PAIRS = {16: (16, 32, 128, 4), 32: (16, 32, 128, 4), 64: (32, 64, 128, 3), 128: (64, 64, 128, 3)}
