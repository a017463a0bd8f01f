"""What the variants of lora_expand share: the sizes of a call, its checks, and which tiles serve it."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from typing import Annotated, NamedTuple

import torch

from .. import _operands as operands
from .. import _runtime as runtime
from .._scales import check_fp8, product_rows, scale_operand
from ..lora_shrink._problem import Parts, check_route, is_as_measured, scale_strides
from ..moe_route._op import AddInputs, MoeRoute, Route, check_rank, rows_of_block
from ._table import QUANT, VARIANTS
from ._tuned import TUNED


class Config(NamedTuple):
    """Tiles of lora_expand; rows: of a block that one program takes, tiles: of columns."""

    rows: int
    block_n: int
    tiles: int
    stages: int
    num_warps: int
    weight_policy: int = 0


CONFIGS = {"lora_expand": Config}


Columns = Annotated[tuple[int, ...] | None, operands.Several(operands.Int())]


class Given(NamedTuple):
    """What lora_expand is given."""

    out: Annotated[torch.Tensor, operands.Tensor("T, *", "D", also=(torch.float32,), written=True, asks=("torch_dtype",))]
    y: Annotated[torch.Tensor, operands.Tensor("S, T, rank", "D", operands.CONTIGUOUS, also=(torch.float32,))]
    lora_b: Annotated[
        operands.Tensors,
        operands.Tensor(
            ("slots>=L, >=1, rank", "slots>=L, 1, >=1, rank"),
            "D",
            slices="any",
            scaled_by="b_scale",
            asks=("rank", "torch_dtype"),
        ),
    ]
    route: Route
    scaling: Annotated[float, operands.Number(public=False)]
    offset_start: operands.Count
    columns: Columns
    column_stride: operands.Size
    add_inputs: AddInputs
    b_scale: Annotated[operands.Tensors | None, scale_operand("weight_scales", slices="any")]


OP = operands.Op(
    "lora_expand",
    Given,
    spec=VARIANTS.spec,
    dtypes={"D": VARIANTS.dtypes},
    fp8=QUANT.elements,
    first=("lora_b",),
    tells=("out",),
)


class Problem(NamedTuple):
    """The sizes of one checked call; strides count elements."""

    num_tokens: int
    widths: tuple[int, ...]  # of the slices
    rank: int
    columns: tuple[int, ...]  # of out where the slices begin
    column_stride: int  # from one column of a slice to the next, in out
    out_stride: int
    b_strides_l: tuple[int, ...]  # of the slices
    b_stride_n: int
    device: torch.device
    weight_scales: str | None  # of what there is a scale each: "tensor", "channel" or "group"; None: 16-bit weights
    b_scale_strides_l: tuple[int, ...]


class Operands(NamedTuple):
    """Those of a product of rank vectors and second factors, of ``lora_expand`` and of ``lora``."""

    out: torch.Tensor
    lora_b: operands.Tensors
    route: MoeRoute
    offset_start: int
    columns: tuple[int, ...] | None
    column_stride: int
    b_scale: operands.Tensors | None


def check(variant: str, given: Given, mode: str | None, dtype: torch.dtype, max_rank: int | None) -> Problem:
    """The sizes of a call of a variant, once everything about it is known to fit.

    Raises:
        ValueError: as ``problem_of``.
    """
    sizes = OP.check(variant, given, D=dtype)
    return problem_of(variant, operands.part_of(Operands, given), sizes, mode, max_rank)


def problem_of(
    variant: str, given: Operands, sizes: operands.Sizes, mode: str | None, max_rank: int | None = None
) -> Problem:
    """The sizes of a product whose operands are known to fit one by one, once they fit together; ``mode``: of what FP8 factors
    have a scale each.

    Raises:
        ValueError: says which argument does not fit, what it is and what was wanted.
    """
    out, lora_b, route, offset_start, columns, column_stride, b_scale = given
    check_route(variant, route)
    first, rank, widths = lora_b[0], sizes["rank"], tuple(b.shape[-2] for b in lora_b)
    row = first.stride(-2)
    for i, b in enumerate(lora_b):
        if b.stride(-2) != row or b.dtype != first.dtype:
            wanted = f"[L, N >= 1, {rank}] {first.dtype} with rows {row} apart"
            runtime.fail(variant, f"lora_b[{i}]", runtime.describe(b), wanted, "slices differ in N alone")
    check_rank(variant, "lora_b", rank, max_rank, row, max(widths))
    columns = _columns(variant, widths, offset_start, columns, column_stride)
    end = max(begin + (width - 1) * column_stride + 1 for begin, width in zip(columns, widths, strict=True))
    if end >= 2**31:
        runtime.fail(variant, "offset_start", offset_start, "columns below 2**31", f"slices end at {end}")
    if out.shape[1] < end:
        hint = f"slices of {', '.join(map(str, widths))} columns, as in lora_b, from {', '.join(map(str, columns))} on"
        runtime.fail(variant, "out", runtime.describe(out), f"[{route.num_tokens}, >= {end}]", hint)
    of_scales: tuple[int, ...] = ()
    if mode is not None and b_scale is not None:
        check_fp8(variant, "lora_b[0]", first, mode, QUANT)
        of_scales = scale_strides(variant, "b_scale", mode, b_scale, lora_b, QUANT)
    return Problem(
        num_tokens=route.num_tokens,
        widths=widths,
        rank=rank,
        columns=columns,
        column_stride=column_stride,
        out_stride=out.stride(0),
        b_strides_l=tuple(b.stride(0) for b in lora_b),
        b_stride_n=row,
        device=out.device,
        weight_scales=mode,
        b_scale_strides_l=of_scales,
    )


def _columns(
    variant: str, widths: Sequence[int], offset_start: int, columns: tuple[int, ...] | None, stride: int
) -> tuple[int, ...]:
    """Where each slice begins in ``out``, once it is known that no column is of two slices."""
    if columns is None:
        if stride != 1:
            hint = "slices one behind the other have their columns side by side"
            runtime.fail(variant, "column_stride", stride, "1, or columns as well", hint)
        return tuple(itertools.accumulate(widths[:-1], initial=offset_start))
    if offset_start != 0 or len(columns) != len(widths):
        got = f"{len(columns)} for {len(widths)} slices, offset_start = {offset_start}"
        runtime.fail(variant, "columns", got, "where each slice begins, offset_start left out")
    for (one, width), (other, of_other) in itertools.combinations(zip(columns, widths, strict=True), 2):
        if (one - other) % stride == 0 and -width * stride < one - other < of_other * stride:
            hint = f"slices of {', '.join(map(str, widths))} columns, {stride} apart"
            runtime.fail(variant, "columns", columns, "columns that are of one slice alone", hint)
    return columns


# Bytes of parts from which it is faster to add them up first than to let every program of the expand do it.
_MANY_BYTES = 31e6


def sums_first(problem: Problem, config: Config, parts: Parts) -> bool:
    """Whether parts of y are to be added up in front of the expand, as its programs would read them too often; where there are
    many tokens of 16 bits, they wait for memory anyway."""
    tokens = runtime.next_power_of_2(problem.num_tokens)
    readers = sum(runtime.cdiv(width, config.block_n * config.tiles) for width in problem.widths)
    often = 4.0 * tokens * problem.rank * parts.number * readers > _MANY_BYTES
    many = problem.rank > 128 and parts.number > 8
    return parts.number > 1 and (many or often) and (tokens <= 2048 or problem.weight_scales is not None)


def choose(problem: Problem, route: MoeRoute, k: int | None = None) -> Config:
    """The tiles for a call, from host integers alone: the same call always gets the same; ``k``: of the lora_shrink in front.

    With it those that were measured, as parts of K are what is read then; else the rule's. The number of tokens counts as the
    next power of two, so that the compile keys of a model are a short list.
    """
    tokens, device = runtime.next_power_of_2(problem.num_tokens), runtime.traits(problem.device)
    layer = (k, sum(problem.widths), min(problem.widths), len(problem.widths), problem.rank)
    key = Key(tokens, route.max_loras, *layer, True, problem.weight_scales)  # adding is measured, for both

    def rule(schedule: str | None) -> tuple[str, Config]:
        del schedule  # there is one
        sizes = (tokens, rows_of_block(route), route.max_loras, problem.widths, problem.rank, problem.weight_scales is not None)
        return "lora_expand", _choose(_Shape(*sizes, device.num_sms, device.shared_memory))

    return runtime.choose(TUNED, key, device, CONFIGS, rule, lambda schedule: is_as_measured(route, tokens))[1]


class Key(NamedTuple):
    """What measured tiles are looked up by: the sizes of specs/tuned, and what its tags stand for."""

    num_tokens: int  # the next power of two
    max_loras: int
    k: int | None  # of the lora_shrink in front; None: of none
    n: int  # of all slices
    n_min: int  # of the narrowest
    slices: int
    rank: int
    adds: bool
    weight_scales: str | None


class _Shape(NamedTuple):
    """What tiles depend on where nothing was measured."""

    tokens: int  # a power of two
    block_m: int
    loras: int
    widths: tuple[int, ...]
    rank: int
    scaled: bool  # FP8 weights
    num_sms: int
    shared_memory: int

    @property
    def ranks(self) -> int:
        """Of the tiles of B and of the rank vectors, together."""
        tile = runtime.block_rank(self.rank)
        return runtime.cdiv(self.rank, tile) * tile

    @property
    def aligned(self) -> bool:
        """Whether rows of B are; others go through registers."""
        return self.rank % 8 == 0

    @property
    def many_columns(self) -> bool:
        return sum(self.widths) >= 16384

    def bytes(self, stages: int, rows: int, block_n: int) -> int:
        """Of shared memory: tiles of B and of out on their way, and the rank vectors."""
        return 2 * (stages * block_n * (self.ranks + rows) + rows * self.ranks)

    def columns(self, block_n: int) -> int:
        """Column tiles of a block."""
        return sum(runtime.cdiv(width, block_n) for width in self.widths)


@functools.lru_cache(maxsize=4096)
def _choose(s: _Shape) -> Config:
    rows, block_n = _tile(s)
    tiles, in_a_row = _in_a_row(s, rows, block_n)
    if s.aligned and not s.scaled and s.block_m == 128 and 64 < s.rank <= 256 and s.bytes(2, 128, block_n) <= s.shared_memory:
        # B is read less often, if that leaves no wave of few programs.
        higher = _in_a_row(s, 128, block_n)
        waves = s.tokens // 128 * s.columns(higher[1] * block_n) / s.num_sms
        if higher[0] >= 4 * s.num_sms and (waves <= 1.0 or waves >= 0.8 * math.ceil(waves)):
            rows, (tiles, in_a_row) = 128, higher
    crowded = s.rank > 64 and tiles >= 64 * s.num_sms and (s.rank <= 128 or s.scaled)
    stages = 2 if in_a_row == 1 or crowded else 3
    while stages > 2 and s.bytes(stages, rows, block_n) > s.shared_memory:
        stages -= 1
    large = rows == 64 or (rows == 16 and block_n * s.ranks >= 256 * 128 and not s.scaled)
    return Config(rows, block_n, in_a_row, stages, 8 if rows == 128 or (large and (s.rank <= 128 or not s.aligned)) else 4)


def _tile(s: _Shape) -> tuple[int, int]:
    """(rows, columns) of a tile: two of B, and the rank vectors, fit a program."""
    rows, narrow = product_rows(s.block_m) if s.scaled else min(64, s.block_m), min(s.widths)
    if rows == 16:  # few tokens: many programs, each with its weights on the way before rank vectors are there
        wanted = 256 if s.many_columns and s.rank <= 128 else 128 if s.rank > 64 and not s.scaled else 64
    else:
        wanted = 128 if s.rank <= 128 else 64 if s.aligned else 32
    block_n = wanted if narrow % wanted == 0 else min(wanted, 64 if narrow > 32 else 32)
    while s.rank > 128 and max(rows, block_n) > 16 and s.bytes(2, rows, block_n) > s.shared_memory:
        rows, block_n = (rows // 2, block_n) if rows > block_n else (rows, block_n // 2)
    return rows, block_n


def _in_a_row(s: _Shape, rows: int, block_n: int) -> tuple[int, int]:
    """(all column tiles, how many a program takes: as many as leave each multiprocessor a program)."""
    tiles, narrow = (min(s.tokens, s.loras) + s.tokens // rows) * s.columns(block_n), min(s.widths)
    if s.rank > 128 and s.bytes(2, rows, block_n) > s.shared_memory:
        return tiles, 1
    if rows == 16:
        large = 128 < s.rank <= 1024 and s.many_columns and (s.tokens >= 64 or s.rank > 256)
        return tiles, 8 if large and narrow % (8 * block_n) == 0 else 1
    most, least = tiles / s.num_sms, max(1, s.tokens // rows) * s.columns(block_n) / s.num_sms
    fits = (t for t in (2, 4, 8) if t <= (2.0 if rows == 32 else 8.0) and narrow % (t * block_n) == 0)
    return tiles, max((t for t in fits if t <= most and least >= 0.8 * t), default=1)
