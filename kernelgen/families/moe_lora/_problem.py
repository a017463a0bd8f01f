"""What the schedules of moe_lora share: the sizes of a call, its checks, and which tiles serve it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, NamedTuple

import torch

from .. import _operands as operands
from .. import _runtime as runtime
from .. import _scales
from .._scales import (
    check_fp8,
    check_x_scale,
    factor_scale_strides,
    find_x_mode,
    product_rows,
    scale_operand,
)
from ..moe_route._op import (
    AddInputs,
    MoeRoute,
    MulRoutedWeight,
    Route,
    RoutingWeights,
    check_kind,
    check_rank,
    default_block_m,
    expected_groups,
    experts_in_weights,
    few_pairs,
    has_routing,
    rows_of_block,
)
from ._table import QUANT, VARIANTS
from ._tuned import TUNED


class OneShotConfig(NamedTuple):
    """Tiles of one_shot; block_m is the route's."""

    block_n: int
    block_k: int
    shrink_stages: int
    expand_stages: int
    num_warps: int
    weight_policy: int = 0


class SmallBatchConfig(NamedTuple):
    """Tiles of small_batch; split_k: columns of K that one program of the shrink takes."""

    shrink_block_r: int
    block_k: int
    split_k: int
    block_n: int
    shrink_warps: int
    expand_warps: int
    weight_policy: int = 0
    pdl: int = 1  # where the target has it


class TwoKernelConfig(NamedTuple):
    """Tiles of two_kernel; expand_tiles: column tiles that one program of the expand takes."""

    block_k: int
    split_k: int
    shrink_stages: int
    shrink_warps: int
    block_n: int
    expand_tiles: int
    expand_stages: int
    expand_warps: int
    weight_policy: int = 0
    pdl: int = 1  # where the target has it


CONFIGS = {"one_shot": OneShotConfig, "small_batch": SmallBatchConfig, "two_kernel": TwoKernelConfig}
Config = OneShotConfig | SmallBatchConfig | TwoKernelConfig


class Modes(NamedTuple):
    """Of what FP8 operands have a scale each: "tensor", "channel" or "group"; x "token" for "channel"; None: of 16 bits."""

    of_weights: str | None
    of_x: str | None


def _sizes(values: Mapping[str, Any]) -> dict[str, int]:
    """Rows of x, R, and the experts of weights."""
    route = values["route"]
    rows = route.num_tokens * (route.top_k if values["mul_routed_weight"] else 1)
    return {"R": rows, **experts_in_weights(values)}


class Given(NamedTuple):
    """What moe_lora is given."""

    out: Annotated[torch.Tensor, operands.Tensor("T, top_k, S*N", "D", operands.PAIRS, written=True, asks=("torch_dtype",))]
    x: Annotated[torch.Tensor, operands.Tensor("R, K", "D", scaled_by="x_scale", asks=("torch_dtype",))]
    lora_a: Annotated[
        operands.Tensors,
        operands.Tensor("slots>=L, experts>=X, rank, K", "D", slices="alike", scaled_by="a_scale", asks=("rank",)),
    ]
    lora_b: Annotated[
        operands.Tensors,
        operands.Tensor("slots>=L, experts>=X, N, rank", "D", slices="alike", scaled_by="b_scale", asks=("rank",)),
    ]
    route: Route
    topk_weights: RoutingWeights
    add_inputs: AddInputs
    mul_routed_weight: MulRoutedWeight
    a_scale: Annotated[operands.Tensors | None, scale_operand("weight_scales", slices="any")]
    b_scale: Annotated[operands.Tensors | None, scale_operand("weight_scales", slices="any")]
    x_scale: Annotated[torch.Tensor | None, scale_operand("x_scales")]


OP = operands.Op(
    "moe_lora",
    Given,
    spec=VARIANTS.spec,
    dtypes={"D": VARIANTS.dtypes},
    fp8=QUANT.elements,
    first=("lora_a", "lora_b"),
    sizes=_sizes,
)


class Problem(NamedTuple):
    """The sizes of one checked call; strides count elements."""

    num_pairs: int
    k: int
    n: int
    slices: int
    rank: int
    x_stride: int
    out_stride: int
    a_strides: operands.Strides
    b_strides: operands.Strides
    weighted: bool
    adds: bool
    device: torch.device
    weight_scales: str | None
    x_scales: str | None
    a_scale_strides: operands.Strides
    b_scale_strides: operands.Strides
    x_scale_stride: int  # over rows, or over experts
    x_scale_next: int | None  # over groups, None: 1
    block_r: int = 0  # ranks of a tile of the variant that serves it; 0: as many as the rank needs


def check(
    variant: str,
    given: Given,
    *,
    dtype: torch.dtype | None = None,
    naive: bool | None = None,
    max_rank: int | None = None,
    modes: Modes | None = None,
    block_r: int = 0,
) -> Problem:
    """The sizes of a call, once everything about it is known to fit; dtype, naive and modes of None: any.

    Raises:
        ValueError: says which argument does not fit, what it is and what was wanted.
    """
    sizes, route, x = OP.check(variant, given, D=dtype), given.route, given.x
    check_kind(variant, route, naive)
    of_rows = route.num_experts if given.mul_routed_weight else 1
    of_weights, of_x = modes or find_modes(variant, given, of_rows)
    num_pairs, a, b = route.num_tokens * route.top_k, given.lora_a[0], given.lora_b[0]
    n, k, rank, slices = sizes["N"], sizes["K"], sizes["rank"], sizes["S"]
    check_rank(variant, "lora_a", rank, max_rank, a.stride(2))
    check_rank(variant, "lora_b", rank, max_rank, b.stride(2), n)
    if of_weights is not None:
        check_fp8(variant, "lora_a", a, of_weights, QUANT)
        check_fp8(variant, "lora_b", b, of_weights, QUANT)
    if of_x is not None:
        check_fp8(variant, "x", x, of_x, QUANT)
    out = given.out
    out_stride = out.stride(1) if route.top_k > 1 else out.stride(0)
    if slices * n >= 2**31:
        runtime.fail(variant, "out", runtime.describe(out), "below 2**31 columns")
    a_scale_strides = b_scale_strides = operands.Strides()
    if of_weights is not None and given.a_scale is not None and given.b_scale is not None:
        a_scale_strides = factor_scale_strides(variant, "a_scale", of_weights, given.a_scale, given.lora_a, QUANT)
        b_scale_strides = factor_scale_strides(variant, "b_scale", of_weights, given.b_scale, given.lora_b, QUANT)
    x_scale_stride, x_scale_next = 0, None
    if of_x is not None and given.x_scale is not None:
        x_scale_stride, x_scale_next = check_x_scale(variant, of_x, x, given.x_scale, QUANT, of_rows)
    return Problem(
        num_pairs=num_pairs,
        k=k,
        n=n,
        slices=slices,
        rank=rank,
        x_stride=x.stride(0),
        out_stride=out_stride,
        a_strides=operands.Strides.of(a),
        b_strides=operands.Strides.of(b),
        weighted=given.mul_routed_weight,
        adds=given.add_inputs,
        device=x.device,
        weight_scales=of_weights,
        x_scales=of_x,
        a_scale_strides=a_scale_strides,
        b_scale_strides=b_scale_strides,
        x_scale_stride=x_scale_stride,
        x_scale_next=x_scale_next,
        block_r=block_r,
    )


def scale_shape(mode: str, weights: Sequence[int]) -> tuple[int, ...]:
    """The shape of the scales of weights [L, E, out, in]."""
    return _scales.scale_shape(mode, weights, QUANT)


def x_scale_shape(mode: str, x: Sequence[int]) -> tuple[int, ...]:
    """The shape of the scales of x [rows, K]."""
    return _scales.x_scale_shape(mode, x, QUANT)


def find_modes(variant: str, given: Given, experts: int) -> Modes:
    """Those of a call, by the shapes; where several fit they mean the same, and the first of them is taken. ``experts``: where
    rows of x are of one each; 1: a row is read by several.

    Raises:
        ValueError: there are scales of one factor alone, or no mode has such shapes.
    """
    lora_a, lora_b, a_scale, b_scale = given.lora_a, given.lora_b, given.a_scale, given.b_scale
    of_weights = of_x = None
    if a_scale is not None and b_scale is not None and len(lora_a) and len(lora_b):
        of_weights = next((mode for mode in ("tensor", "channel", "group") if _fit(mode, a_scale, lora_a, b_scale, lora_b)), None)
        if of_weights is None:
            got = f"{[list(s.shape) for s in (*a_scale[:1], *b_scale[:1])]} for {[list(w.shape) for w in (lora_a[0], lora_b[0])]}"
            groups = f"[L, E, ceil(out / {QUANT.group_n}), ceil(in / {QUANT.group_k})]"
            runtime.fail(variant, "a_scale, b_scale", got, f"[L, E] each, or [L, E, out], or {groups}")
    elif a_scale is not None or b_scale is not None:
        runtime.fail(variant, "a_scale, b_scale", "one of them", "both, or none")
    if given.x_scale is not None:
        # Where K is one group, a scale a token has the same shape: groups of weights go with groups of x.
        of_x = find_x_mode(variant, given.x, given.x_scale, QUANT, "group" if of_weights == "group" else None, experts)
    return Modes(of_weights, of_x)


def _fit(mode: str, a_scale: Sequence[torch.Tensor], lora_a: Sequence[torch.Tensor], *rest: Sequence[torch.Tensor]) -> bool:
    """Whether the first tensors of pairs (scales, weights) have the shapes of a mode."""
    fits = len(a_scale) > 0 and _scales.fits(mode, a_scale[0].shape, lora_a[0].shape, QUANT)
    return fits and (not rest or _fit(mode, *rest))


def choose(schedule: str, problem: Problem, route: MoeRoute) -> Any:
    """The tiles of ``schedule`` for a call, of its class: the tuned ones where the schedule was tuned for it, else the rule's."""
    chosen, config = plan(problem, route)
    if chosen == schedule:
        return config
    return _rule(schedule, *_shape(problem, route))


def plan(problem: Problem, route: MoeRoute) -> tuple[str, Config]:
    """(schedule, tiles) for a call, from host integers alone: the same call always gets the same.

    The number of tokens counts as the next power of two, so that the compile keys of a model are a short list.
    """
    s, has_ids, device = _shape(problem, route), has_routing(route), runtime.traits(problem.device)
    tokens = min(s.tokens, 4096)  # the largest that is tuned; more tokens are more of the same blocks
    sizes = (tokens, s.top_k, s.experts, s.loras, s.k, s.n, s.slices, s.rank, s.weighted)
    key = Key(*sizes, s.adds, s.weight_scales, s.x_scales)

    def rule(schedule: str | None) -> tuple[str, Config]:
        schedule = schedule or _schedule(has_ids, s)
        return schedule, _rule(schedule, *s)

    def serves(schedule: str) -> bool:
        return _serves(schedule, has_ids, s)

    configs: dict[str, Callable[..., Config]] = {**CONFIGS}
    if VARIANTS.strict:  # tiles of small_batch are measured without a matrix unit
        configs["small_batch"] = lambda *measured: rule("small_batch")[1]
    return runtime.choose(TUNED, key, device, configs, rule, serves, key._replace(adds=True))


class Key(NamedTuple):
    """What measured tiles are looked up by: the sizes of specs/tuned, and what its tags stand for."""

    num_tokens: int  # the next power of two
    top_k: int
    num_experts: int
    max_loras: int
    k: int
    n: int
    slices: int
    rank: int
    weighted: bool
    adds: bool
    weight_scales: str | None
    x_scales: str | None


class _Shape(NamedTuple):
    tokens: int
    top_k: int
    experts: int
    loras: int
    block_m: int
    k: int
    n: int
    slices: int
    rank: int
    block_r: int  # ranks of a tile
    weighted: bool
    adds: bool
    weight_scales: str | None
    x_scales: str | None
    num_sms: int
    shared_memory: int
    full_warps: int

    @property
    def plain(self) -> bool:
        """Whether operands have 16 bits."""
        return self.weight_scales is None is self.x_scales


def _shape(problem: Problem, route: MoeRoute) -> _Shape:
    device = runtime.traits(problem.device)
    return _Shape(
        runtime.next_power_of_2(route.num_tokens),
        route.top_k,
        route.num_experts,
        route.max_loras,
        rows_of_block(route),
        problem.k,
        problem.n,
        problem.slices,
        problem.rank,
        max(problem.block_r, runtime.block_rank(problem.rank)),
        problem.weighted,
        problem.adds,
        problem.weight_scales,
        problem.x_scales,
        device.num_sms,
        device.shared_memory,
        device.full_warps,
    )


def _serves(schedule: str, has_ids: bool, s: _Shape) -> bool:
    if schedule == "small_batch":
        return has_ids and (s.block_m == 0 or _streams(s))
    # tuned with the blocks that moe_route makes; an engine's own tables may have others
    return s.block_m > 0 and s.block_m == default_block_m(s.tokens, s.top_k, s.experts * s.loras)


def _streams(s: _Shape) -> bool:
    """Whether small_batch is faster for few pairs than what takes tables: where numerics are strict it adds in the order of a
    matrix unit, which weights of 16 bits do not wait for."""
    return not VARIANTS.strict or s.weight_scales is not None


def _schedule(has_ids: bool, s: _Shape) -> str:
    if s.block_m == 0:
        return "small_batch"
    if has_ids and _streams(s) and few_pairs(s.tokens, s.top_k, s.experts * s.loras, s.rank):
        return "small_batch"
    if s.rank > 128:
        return "two_kernel"
    # One program walks a whole block in one_shot. Cut it where there are fewer blocks than programs that the GPU holds,
    # and where long rows of few pairs keep a program busy for so long that the last ones run alone.
    if s.plain:
        few, long = 1.5 if s.rank <= 32 else 1.0, 4608 if s.block_m == 16 and s.rank > 32 else 8192
    else:
        few, long = 0.9, 2560 if s.block_m == 16 and s.rank > 16 else 8192
    return "two_kernel" if _num_blocks(s) < few * s.num_sms or max(s.k, s.n) >= long else "one_shot"


def _num_blocks(s: _Shape) -> float:
    pairs = s.tokens * s.top_k
    groups = expected_groups(pairs, s.experts * s.loras)
    return groups + (pairs - groups) / max(s.block_m, 1)


@functools.lru_cache(maxsize=4096)
def _rule(schedule: str, *sizes: Any) -> Config:
    s = _Shape(*sizes)
    rules: dict[str, Callable[[_Shape], Config]] = {
        "one_shot": _one_shot,
        "small_batch": _small_batch,
        "two_kernel": _two_kernel,
    }
    return rules[schedule](s)


def _block_k(k: int, wanted: int, waste: float = 0.0) -> int:
    """The largest tile of at most ``wanted`` columns that divides K, or that masks no more than a share ``waste`` of them; where
    only small ones do, ``wanted``: what is masked is not read."""
    tile = wanted
    while tile > 64 and _padded(k, tile) > k * (1.0 + waste):
        tile //= 2
    return tile if k % tile == 0 else min(wanted, max(32, runtime.next_power_of_2(k)))


def _block_n(n: int, wanted: int, waste: float = 0.0) -> int:
    """The largest tile of at most ``wanted`` columns of which hardly more than a share ``waste`` is masked beyond the least."""
    if n <= 64:
        return max(16, runtime.next_power_of_2(n))
    tile = wanted
    while tile > 64 and _padded(n, tile) > _padded(n, 64) * (1.0 + waste):
        tile //= 2
    return tile


def _padded(size: int, tile: int) -> int:
    return runtime.cdiv(size, tile) * tile


def _fitting(tile: int, column_bytes: int, budget: int) -> int:
    """``tile``, or the largest part of it of which two stages fit."""
    while tile > 16 and 2 * tile * column_bytes > budget:
        tile //= 2
    return tile


def _stages(wanted: int, stage_bytes: int, budget: int) -> int:
    while wanted > 2 and wanted * stage_bytes > budget:
        wanted -= 1
    return wanted


def _in_group(s: _Shape, block_k: int) -> int:
    """Where groups of columns have scales, a tile in one group: the same in every batch, as its sum is scaled by itself."""
    if "group" not in (s.weight_scales, s.x_scales):
        return block_k
    if VARIANTS.strict:
        whole: int = QUANT.group_k
        return whole
    # On AMD what is on its way takes registers.
    tile = 32 if s.full_warps < 8 else 128 if s.shared_memory > 192 * 1024 else 64
    while QUANT.group_k % tile:
        tile //= 2
    return tile


def _accumulators(s: _Shape) -> int:
    """Numbers that a program of the shrink holds: its sums, and what scaling the sums of groups takes."""
    held = s.slices + (2 if "group" in (s.weight_scales, s.x_scales) else 0)
    if VARIANTS.strict and (s.weight_scales or s.x_scales):
        held += s.slices  # the totals
    return s.block_m * s.block_r * held


def rows_of_program(weight_scales: str | None, x_scales: str | None, rank: int, block_m: int, slices: int) -> int:
    """Rows of a block that one program takes: of FP8 operands few, however high the block is."""
    if not (weight_scales or x_scales):
        return block_m
    return min(block_m, 16) if weight_scales and rank <= 16 and slices == 1 else product_rows(block_m)


# (rows of a block, rank): (block_k, stages) of one slice, and of more; of 16 bits, measured on an H200
_SHRINK_TILES = {
    (16, 16): ((128, 4), (128, 3)),
    (16, 32): ((128, 4), (128, 3)),
    (16, 64): ((64, 4), (128, 4)),
    (16, 128): ((128, 3), (128, 3)),
    (32, 16): ((256, 3), (128, 4)),
    (32, 32): ((128, 3), (128, 3)),
    (32, 64): ((128, 3), (128, 3)),
    (32, 128): ((128, 3), (128, 2)),
    (64, 16): ((128, 3), (128, 4)),
    (64, 32): ((64, 4), (64, 4)),
    (64, 64): ((128, 3), (64, 4)),
    (64, 128): ((64, 4), (64, 4)),
}


def _one_shot(s: _Shape) -> OneShotConfig:
    rank = s.block_r
    # Programs of little work that are alone on their multiprocessors wait for memory: larger tiles have more on the way.
    alone = rank == 16 and s.block_m <= 32 and _num_blocks(s) < 1.5 * s.num_sms
    rows = rows_of_program(s.weight_scales, s.x_scales, s.rank, s.block_m, s.slices)
    cut, s = rows == 16 < s.block_m, s._replace(block_m=rows)
    wide = rank == 16 and s.block_m == 16 and s.k >= 4096
    if alone:
        block_k, stages = 256, 4
    elif s.plain:
        block_k, stages = _SHRINK_TILES[min(s.block_m, 64), rank][s.slices > 1]
    elif s.block_m == 16:
        block_k, stages = (256, 3) if wide else (128, 3) if rank == 16 or rank * s.slices >= 256 else (64, 3)
    elif s.block_m == 32:
        block_k, stages = (128, 3) if rank in (32, 64) else (64, 4)
    else:
        block_k, stages = 64, 6 if rank == 16 else 4
    if s.weight_scales and rank < 128 and not alone:
        block_k, stages = 128, 4 if rank == 16 else 3  # as many bytes on the way as of 16 bits
        if cut:
            block_k, stages = 256, 3
    budget = s.shared_memory - 4096
    shrink_bytes, expand_bytes = 2 * (s.block_m + s.slices * rank), 2 * (s.block_m + rank)  # of a column
    block_k = _in_group(s, _fitting(_block_k(s.k, block_k, 0.07 if s.plain else 0.0), shrink_bytes, budget))
    stages = _stages(stages, shrink_bytes * block_k, budget)
    # FP8 with one scale for all would spill a register in the wide tile, as would a share of a block with a scale a token.
    scaled = rank == 16 and s.block_m == 16 and s.weight_scales in ("channel", "group")
    wide = (cut or wide or alone or scaled) and not (cut and s.x_scales == "token")
    waste = 0.05 if s.plain else 0.03 if rank == 16 else 0.0
    block_n = _fitting(_block_n(s.n, 256 if wide else 128, waste), expand_bytes, budget)
    accumulators = _accumulators(s)
    narrow = s.weight_scales is not None and accumulators >= 32 * 256
    if narrow:
        block_n = min(block_n, 8 * s.full_warps)  # widening and scaling a wider tile beside the sums of the shrink would spill
    if s.weight_scales == "group":
        block_n = min(block_n, QUANT.group_n)  # one scale a tile
    expand = _stages(3, expand_bytes * block_n, budget)
    # Accumulators of the shrink would spill over 4 warps; sooner without the matrix units of a large card.
    heavy = accumulators >= ((64 if narrow and not s.x_scales else 48) * 256 if budget > 128 * 1024 else 64 * 128)
    heavy |= rank == 32 == s.block_m and s.weight_scales is not None
    low = s.block_m == 16 or (s.block_m == 32 and s.weight_scales is not None)
    few_warps = rank == 16 or (s.plain and rank == 64 and s.slices > 1)
    warps = 8 if heavy or s.block_m == 128 else 2 if few_warps and low and not cut else 4
    return OneShotConfig(block_n, block_k, stages, expand, min(warps, s.full_warps))


def _small_batch(s: _Shape) -> SmallBatchConfig:
    pairs = s.tokens * s.top_k
    block_k = min(256, max(16, runtime.next_power_of_2(s.k)))
    split_k = max(block_k, 1024 if s.k > 4096 and pairs >= 32 else 512)
    while runtime.cdiv(s.k, split_k) > (32 if pairs <= 256 else 8):
        split_k *= 2
    wide = pairs >= 128
    block_n, warps = {16: (256, 4), 32: (128, 4), 64: (128 if wide else 64, 2), 128: (64 if wide else 32, 2)}[
        s.block_r
    ]
    block_n = min(block_n, max(16, runtime.next_power_of_2(s.n)))
    if s.rank % 8:
        warps = 4  # rows that are not aligned are loaded element by element
    block_r, shrink_warps = 16 if s.rank > 8 and s.rank % 8 == 0 else 8, 4
    if VARIANTS.chunk_k:
        # A tile is of a matrix unit, whose warps stand below each other, 16 rows each.
        block_r, split_k = min(s.block_r, 32), VARIANTS.chunk_k
        block_k = _in_group(s, min(block_k, split_k))
        block_n = min(8192 // max(s.block_r, 64), max(16, runtime.next_power_of_2(s.n)))
        shrink_warps = warps = block_r // 16
    # Where weights are read once, they need not stay in the cache. With many parts an early expand was seen to stall.
    reread = pairs > 2 * expected_groups(pairs, s.experts * s.loras)
    pdl = 1 if runtime.cdiv(s.k, split_k) <= 8 else 0
    return SmallBatchConfig(block_r, block_k, split_k, block_n, shrink_warps, warps, 0 if reread else 1, pdl)


def _two_kernel(s: _Shape) -> TwoKernelConfig:
    rank, blocks = s.block_r, _num_blocks(s)
    block_m = rows_of_program(s.weight_scales, s.x_scales, s.rank, s.block_m, s.slices)
    s = s._replace(block_m=block_m)
    budget = s.shared_memory - 4096
    shrink_bytes = 2 * (block_m + s.slices * rank)  # of a column
    # Rows of a K that is no multiple of 8 are loaded element by element, which takes registers.
    wanted = 32 if rank == 128 and s.k % 8 else 64 if rank == 128 or block_m > 32 else 128
    if s.weight_scales and block_m == 16 and s.k % 8 == 0 and budget > 128 * 1024:
        wanted = 128 if rank > 16 else 64  # as many bytes on the way as of 16 bits
    block_k = _in_group(s, _fitting(_block_k(s.k, wanted), shrink_bytes, budget))
    split_k = s.k
    if s.tokens * s.top_k <= 4096:
        for count in range(1, 9):
            if s.k % block_k == 0 and s.k % (count * block_k):
                continue  # equal parts, where there can be any
            split_k = _padded(runtime.cdiv(s.k, count), block_k)
            if blocks * count >= (1.8 if s.plain and rank <= 32 else 0.95) * s.num_sms and split_k <= 4096:
                break
    stages = _stages(4, shrink_bytes * block_k, min(112 * 1024, budget))
    block_n = _block_n(s.n, 128)
    if s.rank <= 128:
        block_n = _fitting(block_n, 2 * (block_m + rank), budget)
    tiles = runtime.cdiv(s.n, block_n)
    # As many column tiles in a row as leave each multiprocessor several programs.
    most = blocks * s.slices * tiles / (8 * s.num_sms)
    expand_tiles = max((t for t in (1, 2, 3, 4, 5, 8) if tiles % t == 0 and t <= max(most, 2)), default=1)
    if s.plain:
        deep = expand_tiles > (1 if rank == 16 else 2)
    else:
        deep = block_m == 16 and (expand_tiles > 2 or s.weight_scales is not None)
    # Rows that are not aligned and numbers that are widened take registers of the shrink.
    heavy = _accumulators(s) > (64 if s.plain and s.k % 8 == 0 else 48) * 256
    return TwoKernelConfig(
        block_k,
        split_k,
        stages,
        min(8 if block_m == 128 or heavy else 4, s.full_warps),
        block_n,
        expand_tiles,
        3 if s.rank > 128 or deep else 2,
        8 if block_m >= 64 and (block_n > 64 or not s.plain) else 4,
    )
