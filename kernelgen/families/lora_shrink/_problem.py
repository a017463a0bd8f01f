"""What the variants of lora_shrink share: the sizes of a call, its checks, and which tiles serve it."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Annotated, NamedTuple

import torch

from .. import _operands as operands
from .. import _runtime as runtime
from .._routing import LoraRanks
from .._scales import (
    Quant,
    check_fp8,
    check_x_scale,
    is_fp32,
    product_rows,
    scale_operand,
    scale_shape,
)
from .._scales import (
    fits as scale_fits,
)
from ..moe_route._op import (
    MoeRoute,
    PairRoute,
    Route,
    check_rank,
    default_block_m,
    rows_of_block,
    scratch,
)
from ._table import QUANT, VARIANTS
from ._tuned import TUNED


class Config(NamedTuple):
    """Tiles of lora_shrink; block_m is the route's.

    chunk_k is part of the numbers: the columns of K that are added up before their sum is added to that of the chunks in front
    in a quarter of them. block_k divides it.
    """

    rows: int  # of a block that a program takes, where it has more: 16, 32, 64 or 128
    ranks: int  # that a program takes: 16, 32, 64 or 128; of a bucket at most as many as it has
    block_k: int
    chunk_k: int
    parts: int  # 1: a program takes a chunk of K; 2: a quarter of them; 0: all
    together: int  # 1: a program takes all slices, and reads x once for them; 0: one of them
    stages: int
    num_warps: int
    weight_policy: int = 0


CONFIGS = {"lora_shrink": Config}


# Columns of K above which few rows take tiles of 256.
LONG_K = 8192

# Tokens up to which K may be shared out: their parts are few bytes, and what a workspace is made for.
MAX_TOKENS_IN_PARTS = 4096

Scalings = Annotated[torch.Tensor | None, operands.Tensor(">=L", torch.float32, operands.CONTIGUOUS)]


class Given(NamedTuple):
    """What lora_shrink is given."""

    y: Annotated[torch.Tensor, operands.Tensor("S, T, rank", torch.float32, operands.CONTIGUOUS, written=True)]
    x: Annotated[torch.Tensor, operands.Tensor("T, K", "D", scaled_by="x_scale", asks=("torch_dtype",))]
    lora_a: Annotated[
        operands.Tensors,
        operands.Tensor(
            (">=L, rank, K", ">=L, 1, rank, K"), "D", slices="alike", scaled_by="a_scale", asks=("rank", "torch_dtype")
        ),
    ]
    route: Route
    scaling: Annotated[float, operands.Number()]
    zero_rest: operands.Bool
    a_scale: Annotated[operands.Tensors | None, scale_operand("weight_scales", slices="any")]
    x_scale: Annotated[torch.Tensor | None, scale_operand("x_scales")]
    lora_ranks: LoraRanks
    scalings: Scalings
    packed: operands.Bool


OP = operands.Op(
    "lora_shrink",
    Given,
    spec=VARIANTS.spec,
    dtypes={"D": VARIANTS.dtypes},
    fp8=QUANT.elements,
    first=("lora_a",),
    tells=("x",),
)


class Modes(NamedTuple):
    """Of what FP8 operands have a scale each: "tensor", "channel" or "group"; x "token" for "channel"; None: of 16 bits."""

    of_weights: str | None
    of_x: str | None


class Parts(NamedTuple):
    """Sums of parts of K, of which ``quarter`` in a row are added up before their sum is added to the others."""

    number: int = 1
    quarter: int = 1


ONE_PART = Parts()


class Problem(NamedTuple):
    """The sizes of one checked call; strides count elements."""

    num_tokens: int
    k: int
    slices: int
    rank: int
    x_stride: int
    a_stride_l: int
    a_stride_r: int
    device: torch.device
    weight_scales: str | None  # of what there is a scale each: "tensor", "channel" or "group"; None: 16-bit weights
    x_scales: str | None  # likewise of x, "token" for "channel"
    a_scale_stride_l: int
    x_scale_stride: int  # over rows
    x_scale_next: int | None  # over groups, None: 1
    packed: bool = False  # whether the slices of an adapter lie one behind the other, by its rank

    def quarter(self, config: Config) -> int:
        """Chunks that are added up by themselves: there are at most four such sums."""
        return runtime.cdiv(runtime.cdiv(self.k, config.chunk_k), 4)

    def part_k(self, config: Config) -> int:
        """Columns of K of one program."""
        chunks = runtime.cdiv(self.k, config.chunk_k)
        return config.chunk_k * (chunks, 1, self.quarter(config))[config.parts]

    def parts(self, config: Config) -> Parts:
        """The sums that programs leave."""
        return Parts(runtime.cdiv(self.k, self.part_k(config)), self.quarter(config) if config.parts == 1 else 1)

    def scratch(self, route: MoeRoute, parts: Parts) -> runtime.Lent:
        """Room for so many sums, of calls on such routes: the workspace's where it is large enough."""
        return scratch(route, parts.number * self.slices * self.num_tokens * self.rank, self.device)


class Operands(NamedTuple):
    """Those of a product of x and first factors, of ``lora_shrink`` and of ``lora``."""

    x: torch.Tensor
    lora_a: operands.Tensors
    route: MoeRoute
    a_scale: operands.Tensors | None
    x_scale: torch.Tensor | None
    lora_ranks: torch.Tensor | None
    packed: bool


def check(variant: str, given: Given, modes: Modes, dtype: torch.dtype, max_rank: int | None) -> Problem:
    """The sizes of a call of a variant, once everything about it is known to fit.

    Raises:
        ValueError: as ``problem_of``.
    """
    sizes = OP.check(variant, given, D=dtype)
    return problem_of(variant, operands.part_of(Operands, given), sizes, modes, max_rank)


def problem_of(
    variant: str, given: Operands, sizes: operands.Sizes, modes: Modes, max_rank: int | None = None
) -> Problem:
    """The sizes of a product whose operands are known to fit one by one, once they fit together.

    Raises:
        ValueError: says which argument does not fit, what it is and what was wanted.
    """
    (of_weights, of_x), (x, lora_a, route, a_scale, x_scale, lora_ranks, packed) = modes, given
    check_route(variant, route)
    a, slices, rank = lora_a[0], sizes["S"], sizes["rank"]
    if packed:
        if lora_ranks is None or of_weights is not None:
            wanted = "lora_ranks with it" if lora_ranks is None else False
            runtime.fail(variant, "packed", True, wanted, "ranks say where slices of 16 bits begin")
        check_packed(variant, lora_a)
    if of_weights is not None:
        check_fp8(variant, "lora_a", a, of_weights, QUANT)
    if of_x is not None:
        check_fp8(variant, "x", x, of_x, QUANT)
    check_rank(variant, "lora_a", rank, max_rank, a.stride(-2))
    a_scale_stride = 0
    if of_weights is not None and a_scale is not None:
        found = scale_strides(variant, "a_scale", of_weights, a_scale, lora_a, QUANT)
        a_scale_stride = found[0]
        if found != (a_scale_stride,) * slices:
            runtime.fail(variant, "a_scale", f"strides {found} over L", "one for all slices", "slices have one layout")
    x_scale_stride, x_scale_next = 0, None
    if of_x is not None and x_scale is not None:
        x_scale_stride, x_scale_next = check_x_scale(variant, of_x, x, x_scale, QUANT)
    return Problem(
        num_tokens=route.num_tokens,
        k=sizes["K"],
        slices=slices,
        rank=rank,
        x_stride=x.stride(0),
        a_stride_l=a.stride(0),
        a_stride_r=a.stride(-2),
        device=x.device,
        weight_scales=of_weights,
        x_scales=of_x,
        a_scale_stride_l=a_scale_stride,
        x_scale_stride=x_scale_stride,
        x_scale_next=x_scale_next,
        packed=packed,
    )


def check_packed(variant: str, lora_a: Sequence[torch.Tensor]) -> None:
    """Raise ValueError unless slices have room one behind the other in one tensor; asked at every call, as it is about places."""
    a = lora_a[0]
    after = a.shape[-2] * a.stride(-2) * a.element_size()
    if a.device.type != "meta" and any(other.data_ptr() != a.data_ptr() + i * after for i, other in enumerate(lora_a)):
        hint = f"each {a.shape[-2]} rows behind the one before it, in one tensor"
        runtime.fail(variant, "lora_a", "slices that lie apart", "packed ones", hint)


def check_route(variant: str, route: MoeRoute) -> None:
    """Raise ValueError where a route is not that of a dense layer."""
    if route.num_experts != 1 or route.top_k != 1 or isinstance(route, PairRoute):
        got = f"{route.num_experts} experts, top_k {route.top_k}, {'naive' if isinstance(route, PairRoute) else 'sorted'}"
        runtime.fail(variant, "route", got, "one expert, top_k 1, sorted", "make it with lora_route")


def kind_of_scales(
    variant: str, label: str, scales: Sequence[torch.Tensor], weights: Sequence[torch.Tensor], quant: Quant
) -> str:
    """Of what there is a scale each, by the shapes; those of the weights' own dimensions before those with one more or less."""
    if len(scales) > 0 and len(weights) > 0 and weights[0].dim() > 2:
        own = tuple(weights[0].shape)
        for shape in (own, *_forms(own)):
            for kind in ("tensor", "channel", "group"):
                if scale_fits(kind, scales[0].shape, shape, quant):
                    return kind
    got = f"{[list(s.shape) for s in scales[:1]]} for lora_{label[0]} {[list(w.shape) for w in weights[:1]]}"
    wanted = f"[L] each, or [L, out], or [L, ceil(out / {quant.group_n}), ceil(in / {quant.group_k})]"
    runtime.fail(variant, label, got, wanted)


def _fits(kind: str, scale: torch.Tensor, weights: torch.Tensor, quant: Quant) -> bool:
    return any(scale_fits(kind, scale.shape, shape, quant) for shape in _forms(weights.shape))


def _forms(shape: Sequence[int]) -> tuple[tuple[int, ...], ...]:
    """How weights of a linear layer may be laid out: [L, out, in], or as of one expert."""
    loras, *_, rows, columns = shape
    return (loras, rows, columns), (loras, 1, rows, columns)


def scale_strides(
    variant: str,
    label: str,
    kind: str,
    scales: Sequence[torch.Tensor],
    weights: Sequence[torch.Tensor],
    quant: Quant,
) -> tuple[int, ...]:
    """The stride over L of the scales of each slice of weights."""
    for i, (scale, matrix) in enumerate(zip(scales, weights, strict=True)):
        right = is_fp32(scale, matrix.device) and _fits(kind, scale, matrix, quant)
        if not right or (scale.numel() > 0 and not scale[0].is_contiguous()):
            loras, *_, rows, columns = matrix.shape
            shape = scale_shape(kind, (loras, rows, columns), quant)
            wanted = f"{list(shape)} float32 on {matrix.device}, contiguous behind L"
            hint = f"a scale a {kind}; of another dtype, .float() makes such, once"
            runtime.fail(variant, f"{label}[{i}]", runtime.describe(scale), wanted, hint)
    return tuple(scale.stride(0) for scale in scales)


def choose(problem: Problem, route: MoeRoute) -> Config:
    """The tiles for a call, from host integers alone: those that were measured, else the rule's; always the same for a call.

    The number of tokens counts as the next power of two, so that the compile keys of a model are a short list.
    """
    tokens, device = runtime.next_power_of_2(problem.num_tokens), runtime.traits(problem.device)
    scales = (problem.weight_scales, problem.x_scales)
    key = Key(tokens, route.max_loras, problem.k, problem.slices, problem.rank, *scales)

    def rule(schedule: str | None) -> tuple[str, Config]:
        del schedule  # there is one
        rows = product_rows(rows_of_block(route)) if any(scales) else min(64, rows_of_block(route))
        sizes = (tokens, rows, problem.k, problem.slices, problem.rank)
        return "lora_shrink", _choose(_Shape(*sizes, *scales, device.num_sms, device.shared_memory, device.full_warps))

    return runtime.choose(TUNED, key, device, CONFIGS, rule, lambda schedule: is_as_measured(route, tokens))[1]


def is_as_measured(route: MoeRoute, tokens: int) -> bool:
    """Whether the blocks of the route are those that lora_route makes, which tiles were measured with."""
    return rows_of_block(route) == default_block_m(tokens, 1, route.max_loras, dense=True)


class Key(NamedTuple):
    """What measured tiles are looked up by: the sizes of specs/tuned, and what its tags stand for."""

    num_tokens: int  # the next power of two
    max_loras: int
    k: int
    slices: int
    rank: int
    weight_scales: str | None
    x_scales: str | None


class _Shape(NamedTuple):
    """What tiles depend on where nothing was measured."""

    tokens: int  # a power of two
    rows: int  # of a block
    k: int
    slices: int
    rank: int
    weight_scales: str | None
    x_scales: str | None
    num_sms: int
    shared_memory: int
    full_warps: int

    @property
    def grouped(self) -> bool:
        return "group" in (self.weight_scales, self.x_scales)

    @property
    def plain(self) -> bool:
        """Whether operands have 16 bits."""
        return self.weight_scales is None is self.x_scales

    @property
    def wide(self) -> bool:
        return self.plain and self.rank > 64

    @property
    def chunk(self) -> int:
        return chunk_k(self.k, self.slices)

    @property
    def budget(self) -> int:
        """Bytes of shared memory for what is on its way."""
        return self.shared_memory - 4096


class _Share(NamedTuple):
    """What one of ``programs`` takes; see Config."""

    rows: int
    ranks: int
    parts: int
    together: bool
    columns: int  # of the product: ranks, of each slice
    programs: int


@functools.lru_cache(maxsize=4096)
def _choose(s: _Shape) -> Config:
    share = _share(s)
    held = share.rows * share.columns * (3, 1, 2)[share.parts]
    if s.wide:  # one program of 8 warps on a multiprocessor, or two of 4
        alone = share.programs <= s.num_sms and share.rows >= 64 and share.ranks >= 64
        many = alone or held > 2 * 64 * 128
    else:
        high = share.rows >= (32 if s.x_scales else 64)  # FP8 x is widened by each warp that multiplies it
        grouped = s.grouped and share.ranks >= (128 if share.parts else 64)
        many = held > 64 * 128 or (high and share.ranks >= 64) or grouped
    num_warps = 8 if many else 4
    block_k, stages = _pipeline(s, share)
    num_warps = min(num_warps, s.full_warps)
    return Config(share.rows, share.ranks, block_k, s.chunk, share.parts, int(share.together), stages, num_warps)


def _share(s: _Shape) -> _Share:
    """How the work is shared out: over all multiprocessors where tokens are few, and with few loads of x where they are many."""
    rows, ranks = s.rows, runtime.block_rank(s.rank)
    all_ranks = runtime.cdiv(s.rank, ranks) * ranks
    chunks, by_rank = runtime.cdiv(s.k, s.chunk), s.plain and s.rank > 32
    enough = (0.7 if by_rank else 0.9) * s.num_sms
    # Scales that are applied to a whole sum would round it in another place: then K is shared out in every batch.
    late = s.weight_scales in ("tensor", "channel") or s.x_scales in ("tensor", "token")
    fills = s.tokens // rows * s.slices * (all_ranks // ranks if by_rank else 1) >= 0.9 * s.num_sms
    quarters = 4 * (s.tokens // 64) * s.slices * (runtime.cdiv(s.rank, 64) if by_rank else 1)
    parts = 1 if late else 0 if fills or s.tokens > MAX_TOKENS_IN_PARTS else 2 if quarters >= enough else 1

    def programs(rows: int, ranks: int) -> int:
        of_k = (1, chunks, min(chunks, 4))[parts]
        return max(1, s.tokens // rows) * s.slices * (all_ranks // ranks) * of_k

    # The matrix unit is at its best with 64 rows: of 16 bits ranks are shared out first, where that is enough.
    if by_rank and rows == 64 and programs(rows, 32) >= enough:
        while ranks > 32 and programs(rows, ranks) <= 0.5 * s.num_sms:
            ranks //= 2
    while parts == 1 and rows > 16 and programs(rows, ranks) < (enough if rows == 64 else 0.9 * s.num_sms):
        rows //= 2
    while parts == 1 and ranks > 16 and programs(rows, ranks) < 0.6 * s.num_sms:
        ranks //= 2
    # Few blocks are spread over more programs, slice by slice; many read x once for all slices, if it and their sums fit.
    columns = ranks * s.slices
    fits = rows * columns <= 64 * 256 and (64 if s.grouped else 32) * 6 * (rows + columns) <= s.budget
    together = s.slices == 1 or (parts == 1 and s.tokens >= 1024 and fits)
    count = programs(rows, ranks) // (s.slices if together else 1)
    return _Share(rows, ranks, parts, together, columns if together else ranks, count)


def _pipeline(s: _Shape, share: _Share) -> tuple[int, int]:
    """block_k and the stages of the loop over K."""
    rows, column_bytes = share.rows, 2 * (share.rows + share.columns)
    # High programs that are alone on their multiprocessors may take all of its memory, others leave room for a second or a third.
    alone, half = rows > 32 and share.programs <= s.num_sms, min(s.budget, 112 * 1024)
    room = s.budget if alone or rows <= 32 else half
    full = share.programs > (s.num_sms if share.parts == 1 else 2 * s.num_sms)
    crowded = full and s.plain
    if rows <= 32:
        block_k = 64 if crowded and share.ranks >= 64 else 256 if s.k > LONG_K and share.ranks <= 64 else 128
    else:
        block_k = 64 if crowded or (s.slices > 1 and share.together) else 128
    while s.chunk % block_k or (block_k > 32 and (3 * block_k * column_bytes > room or (s.k % block_k and s.k % 32 == 0))):
        block_k //= 2
    if s.grouped:
        block_k = 64  # of any batch: sums of a tile are scaled before they are added
    stage_bytes = block_k * column_bytes
    deep = alone and (3 * stage_bytes > half or share.parts != 1 or s.wide)
    return block_k, 4 if 4 * stage_bytes <= (s.budget if deep else half) else 3 if 3 * stage_bytes <= s.budget else 2


def chunk_k(k: int, slices: int) -> int:
    """Columns of K that are added up before the sum is added to the others: by the layer alone, for the same bits in every batch.

    There are at most ``max_parts(slices)`` of them.
    """
    if k <= LONG_K:
        return max(512, runtime.cdiv(k, 8 * 128) * 128)
    return runtime.cdiv(k, (16 if slices == 1 else 8) * 128) * 128


def max_parts(slices: int) -> int:
    """The most parts of a layer, of all its slices together; or of one with fewer slices."""
    return max(16, 8 * slices)
