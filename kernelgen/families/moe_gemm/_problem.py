"""What the schedules of moe_gemm share: the sizes of a call, its checks, and which tiles serve it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, NamedTuple

import torch

from .. import _mxfp4 as mxfp4
from .. import _operands as operands
from .. import _runtime as runtime
from .._activation import Alpha, Beta, Bias, Layout, Limit
from .._activation import choice as activation_choice
from .._routing import TopkWeights
from .._scales import (
    SCALES,
    check_fp8,
    check_x_scale,
    factor_scale_strides,
    find_x_mode,
    fits,
    is_fp32,
    is_scale,
    scale_operand,
    scale_shape,
)
from ..moe_align._op import MoeTables, Tables, default_block_m, max_blocks
from ..moe_runs._op import Runs
from ._table import QUANT, VARIANTS
from ._tuned import TUNED


class GemvConfig(NamedTuple):
    """Tiles of gemv."""

    block_n: int
    block_k: int
    num_warps: int
    weight_policy: int = 0


class NaiveConfig(NamedTuple):
    """Tiles of naive."""

    block_n: int
    block_k: int
    num_stages: int
    num_warps: int
    weight_policy: int = 0


class DiagonalConfig(NamedTuple):
    """Tiles of diagonal."""

    block_n: int
    block_k: int
    num_stages: int
    num_warps: int
    weight_policy: int = 0


class TileConfig(NamedTuple):
    """Tiles of tile; block_m is that of the tables."""

    block_n: int
    block_k: int
    num_stages: int
    num_warps: int
    group_m: int = 1  # blocks that share a tile of columns
    tail: int = 0  # 1: blocks of few rows take a tile of half the height
    weight_policy: int = 0
    block_d: int = 64  # ranks of a step over the adapters of a tile, where there are any
    delta_stages: int = 2  # of those steps


class BoxConfig(NamedTuple):
    """Tiles of box; as those of tile."""

    block_n: int
    block_k: int
    num_stages: int
    num_warps: int
    group_m: int = 1
    tail: int = 0
    block_d: int = 64
    delta_stages: int = 2


class WarpSpecialisedConfig(NamedTuple):
    """Tiles of warp_specialised, of which all but these are fixed."""

    num_stages: int
    group_m: int = 1
    programs: int = 1  # a multiprocessor, one behind the other: more share out better what takes unlike times


class LanesConfig(NamedTuple):
    """Tiles of lanes; a warp has at least 16 rows of W, and a step of K is fixed."""

    block_n: int
    num_stages: int
    num_warps: int


class LaneGemvConfig(NamedTuple):
    """Tiles of lane_gemv, whose columns are the 16 rows of W that a warp has."""

    parts: int  # of K of a pair, with warps of their own; a power of two
    num_stages: int  # steps of K whose weights are asked for at once


BY_PAIR = ("gemv", "naive", "diagonal", "lane_gemv")  # schedules that need no tables
COLUMNS, PART = 8, 4096  # of x that lane_gemv has side by side, and numbers of K that one of them has at most
CONFIGS = {
    "gemv": GemvConfig,
    "naive": NaiveConfig,
    "diagonal": DiagonalConfig,
    "tile": TileConfig,
    "box": BoxConfig,
    "warp_specialised": WarpSpecialisedConfig,
    "lanes": LanesConfig,
    "lane_gemv": LaneGemvConfig,
}
Tiled = GemvConfig | NaiveConfig | DiagonalConfig | TileConfig | BoxConfig
Config = Tiled | WarpSpecialisedConfig | LanesConfig | LaneGemvConfig


class Modes(NamedTuple):
    """Of what FP8 operands have a scale each: w "tensor", "channel", "group" or, of MXFP4, "mx"; x "token" for "channel"; the
    second factors as w; None: they are of 16 bits."""

    of_weights: str | None
    of_x: str | None
    of_b: str | None


# rows of x and of out -> whether tables are needed
_ROWS = {
    "token_sorted": True,
    "sorted_sorted": True,
    "sorted_pair": True,
    "token_pair": False,
    "pair_pair": False,
    "pair_token": False,
}


def _rows(values: Mapping[str, Any]) -> dict[str, int]:
    """Rows of x, R, and of out, P."""
    tables = values["tables"]
    num_pairs = tables.num_tokens * tables.top_k
    return {
        "R": tables.num_tokens if values["x_rows"] == "token" else num_pairs,
        "P": tables.num_tokens if values["out_rows"] == "token" else num_pairs,
    }


class Given(NamedTuple):
    """What moe_gemm is given."""

    out: Annotated[
        torch.Tensor,
        operands.Tensor(
            ("P, N", "T, top_k, N"),
            operands.FLOATS,
            operands.PAIRS,
            written=True,
            scaled_by="out_scale",
            asks=("torch_dtype",),
        ),
    ]
    x: Annotated[torch.Tensor, operands.Tensor("R, K", "D", scaled_by="x_scale", asks=("torch_dtype",))]
    w: Annotated[torch.Tensor, operands.Tensor(">=E, S*N, K", "D", scaled_by="w_scale", packed=True)]
    tables: Tables
    topk_weights: TopkWeights
    x_rows: Annotated[str, operands.Choice(("token", "pair", "sorted"), asks=("rows",))]
    out_rows: Annotated[str, operands.Choice(("pair", "sorted", "token"), asks=("rows",))]
    activation: Annotated[str | None, activation_choice("epilogue", none=True)]
    layout: Layout
    w_scale: Annotated[torch.Tensor | None, scale_operand("weight_scales")]
    x_scale: Annotated[torch.Tensor | None, scale_operand("x_scales")]
    v: Annotated[
        torch.Tensor | None,
        operands.Tensor(
            ("T*top_k, S, rank", "T, S, rank", "*, T*top_k, S, rank"), None, operands.CONTIGUOUS, asks=("adapted",)
        ),
    ]
    lora_b: Annotated[
        operands.Tensors | None,
        operands.Tensor(">=L, >=E, N, rank", "D", slices="alike", scaled_by="b_scale", asks=("adapted",)),
    ]
    runs: Runs | None
    b_scale: Annotated[operands.Tensors | None, scale_operand("b_scales", slices="any")]
    bias: Bias
    limit: Limit
    alpha: Alpha
    beta: Beta
    out_scale: Annotated[
        torch.Tensor | None, operands.Tensor(None, SCALES, operands.CONTIGUOUS, written=True, asks=("writes_fp8",))
    ]


OP = operands.Op(
    "moe_gemm",
    Given,
    spec=VARIANTS.spec,
    dtypes={"D": VARIANTS.dtypes},
    fp8=QUANT.elements,
    first=("w",),
    tells=("x",),
    aligned=("x", "w", "v", "lora_b"),
    sizes=_rows,
)


class Problem(NamedTuple):
    """The sizes of one checked call; strides count elements."""

    num_tokens: int
    num_pairs: int
    top_k: int
    num_experts: int
    local_expert_start: int
    tokens_hint: int
    block_m: int
    k: int
    n: int
    slices: int  # of the weights: 2 for gate and up
    rows: str
    epilogue: str
    out_stride: int
    x_stride: int
    w_stride_e: int
    w_stride_n: int
    zero_rest: bool
    follows: bool
    device: torch.device
    weight_scales: str | None
    x_scales: str | None
    w_scale_stride: int  # over E
    w_scale_next: int  # from the scales of gate to those of up
    x_scale_stride: int  # over rows, or over experts
    x_scale_next: int | None  # over groups, None: 1
    max_loras: int
    rank: int  # of adapters, 0: there are none
    parts: int  # of v, where there are no tables
    v_by_token: bool  # v has a row a token
    b_strides: operands.Strides
    b_scales: str | None
    b_scale_strides: operands.Strides
    ranked: bool  # whether adapters say how many of their ranks count
    interleaved: bool  # rows of gate and up are in turns
    bias_stride: int  # over E
    writes_fp8: bool
    out_scale_stride: int  # over experts, 0: one for all
    largest: float  # number of the type of out
    wide_ranks: bool  # whether rows of v and of the second factors start at 16-byte boundaries


def check(variant: str, given: Given, modes: Modes, dtype: torch.dtype, schedule: str) -> Problem:
    """The sizes of a call of a variant, once everything about it is known to fit.

    Raises:
        ValueError: says which argument does not fit, what it is and what was wanted.
    """
    return problem_of(variant, given, OP.check(variant, given, D=dtype), modes, dtype=dtype, schedule=schedule)


def problem_of(
    variant: str,
    given: Given,
    sizes: operands.Sizes,
    modes: Modes,
    *,
    dtype: torch.dtype,
    schedule: str | None = None,
    zero_rest: bool = False,
    follows: bool = False,
) -> Problem:
    """The sizes of a product whose operands are known to fit one by one, once they fit together.

    Args:
        sizes: what the check of the operands found.
        schedule: None: it is to be chosen.
        follows: it stands right behind a launch that waits for all before it lets this one begin, and writes nothing but rows of
            x or v.

    Raises:
        ValueError: says which argument does not fit, what it is and what was wanted.
    """
    out, x, w, tables, runs, w_scale = given.out, given.x, given.w, given.tables, given.runs, given.w_scale
    rows, interleaved = f"{given.x_rows}_{given.out_rows}", given.layout == "interleaved"
    if rows not in _ROWS:
        runtime.fail(variant, "x_rows, out_rows", rows.split("_"), " or ".join(_ROWS).replace("_", ", "))
    num_tokens, top_k = tables.num_tokens, tables.top_k
    num_pairs = num_tokens * top_k
    if (_ROWS[rows] if schedule is None else schedule not in BY_PAIR) and tables.block_m == 0:
        runtime.fail(variant, "tables", "none", "tables", "make them with moe_align")
    if modes.of_weights is not None:
        check_fp8(variant, "w", w, modes.of_weights, QUANT)
    if modes.of_x is not None:
        check_fp8(variant, "x", x, modes.of_x, QUANT)
    slices = sizes["S"]
    n, k = sizes["N"], sizes["K"]
    out_scale_stride = _check_out_scale(variant, out, given.out_scale, modes.of_x, tables)
    if not (out.dim() == 2 if rows == "pair_token" else given.out_scale is not None or out.dtype == dtype):
        wanted = f"[{num_tokens}, {n}]" if rows == "pair_token" else f"{dtype}"
        runtime.fail(variant, "out", runtime.describe(out), wanted, f"as of x_rows, out_rows {rows.replace('_', ', ')}")
    if w.stride(1) * w.shape[1] >= 2**31:
        runtime.fail(variant, "w", f"rows {w.stride(1)} elements apart", "an expert's matrix below 2**31 elements")
    w_scale_stride = w_scale_next = 0
    if modes.of_weights is not None and w_scale is not None:
        w_scale_stride, w_scale_next = _check_w_scale(variant, modes.of_weights, w_scale, w, slices)
        if interleaved and w_scale_next:
            w_scale_next = w_scale.stride(1)
    x_scale_stride, x_scale_next = 0, None
    if modes.of_x is not None and given.x_scale is not None:
        of_rows = 1 if rows.startswith("token") else tables.num_experts
        x_scale_stride, x_scale_next = check_x_scale(variant, modes.of_x, x, given.x_scale, QUANT, of_rows)
    expected, block_m = min(tables.tokens_hint, num_tokens), tables.block_m
    if block_m < 0:  # left open by a graph of torch.compile, and settled as moe_align does
        block_m = default_block_m(max(tables.tokens_hint, 1), top_k, tables.num_experts)
    rank, parts, v_by_token, b_strides = _check_delta(variant, given, sizes, dtype)
    problem = Problem(
        epilogue=given.activation or "none",
        num_tokens=num_tokens,
        num_pairs=num_pairs,
        top_k=top_k,
        num_experts=tables.num_experts,
        local_expert_start=tables.local_expert_start,
        tokens_hint=expected,
        block_m=block_m,
        k=k,
        n=n,
        slices=slices,
        rows=rows,
        out_stride=out.stride(1 if out.dim() == 3 and top_k > 1 else 0),
        x_stride=x.stride(0),
        w_stride_e=w.stride(0),
        w_stride_n=w.stride(1),
        zero_rest=zero_rest,
        follows=follows,
        device=x.device,
        weight_scales=modes.of_weights,
        x_scales=modes.of_x,
        w_scale_stride=w_scale_stride,
        w_scale_next=w_scale_next,
        x_scale_stride=x_scale_stride,
        x_scale_next=x_scale_next,
        max_loras=0 if runs is None else runs.max_loras,
        rank=rank,
        parts=parts,
        v_by_token=v_by_token,
        b_strides=b_strides,
        b_scales=modes.of_b,
        b_scale_strides=_check_b_scale(variant, given, modes.of_b),
        ranked=runs is not None and runs.lora_ranks is not None,
        interleaved=interleaved,
        bias_stride=0 if given.bias is None else given.bias.stride(0),
        writes_fp8=given.out_scale is not None,
        out_scale_stride=out_scale_stride,
        largest=torch.finfo(out.dtype).max,
        wide_ranks=all(map(runtime.describable, (given.v, *(given.lora_b or ())))) if given.v is not None else False,
    )
    if schedule == "box" and not has_boxes(problem, x, w):
        got = f"x {runtime.describe(x)}, w {runtime.describe(w)}"
        runtime.fail(variant, "rows", got, "rows at 16-byte boundaries, gate and up one behind the other", "use tile")
    if schedule == "warp_specialised" and not (has_boxes(problem, x, w) and has_roles(problem)):
        got = f"x {runtime.describe(x)}, w {runtime.describe(w)}, blocks of {block_m} rows on {runtime.traits(x.device).target}"
        k_of = f"K of {step_columns(problem)}s"
        wanted = f"blocks of 128 rows, {k_of}, rows and ranks at 16-byte boundaries, experts one behind the other, on sm_90"
        other = "x_rows='token'" if rows == "sorted_sorted" else "box"
        runtime.fail(variant, "rows", got, wanted, f"use {other}" if given.out_scale is None else "use moe_quant behind it")
    if schedule in ("lanes", "lane_gemv") and not has_lanes(problem, x, w):
        got = f"x {runtime.describe(x)}, w {runtime.describe(w)}, blocks of {block_m} rows on {runtime.traits(x.device).target}"
        wanted, other = "blocks of 16 or 32 rows, rows at 16-byte boundaries, on sm_90", "tile"
        if schedule == "lane_gemv":
            got = f"{got}, {k} columns and {top_k} experts of a token"
            wanted, other = f"rows at 16-byte boundaries, at most {COLUMNS} parts of {PART} columns, on sm_90", "naive"
        runtime.fail(variant, "rows", got, wanted, f"use {other}")
    return problem


def _check_out_scale(
    variant: str, out: torch.Tensor, scale: torch.Tensor | None, of_x: str | None, tables: MoeTables
) -> int:
    """How far the scales of an FP8 result, which are as those of x, are apart for experts; 0: there is one, or none."""
    if scale is None:
        return 0
    mode = find_x_mode(variant, out, scale, QUANT, of_x, tables.num_experts, "out_scale")
    check_fp8(variant, "out", out, mode, QUANT)
    stride, _ = check_x_scale(variant, mode, out, scale, QUANT, tables.num_experts, "out_scale")
    if mode != of_x or (mode != "tensor" and not is_fp32(scale, out.device)):
        hint = "it is written" if mode == of_x else "as x has them"
        runtime.fail(variant, "out_scale", runtime.describe(scale), f"contiguous float32, a scale a {of_x}", hint)
    return stride


def _check_delta(
    variant: str, given: Given, sizes: operands.Sizes, dtype: torch.dtype
) -> tuple[int, int, bool, operands.Strides]:
    """rank, parts, whether v has a row a token, and the strides of the second factors."""
    v, lora_b, tables = given.v, given.lora_b, given.tables
    there = [name for name in ("v", "lora_b", "runs", "b_scale") if getattr(given, name) is not None]
    if not there:
        return 0, 0, False, operands.Strides()
    if v is None or lora_b is None or given.runs is None:
        runtime.fail(variant, "v, lora_b, runs", there, "all three, or none")
    by_table = tables.block_m != 0
    kind, dims = (dtype, 3) if by_table else (torch.float32, 4)
    num_pairs = tables.num_tokens * tables.top_k
    by_token = by_table and v.shape[0] != num_pairs
    if v.dtype != kind or v.dim() != dims or (by_token and given.out_rows != "sorted"):
        wanted = f"[{'' if by_table else 'parts, '}{num_pairs}, {sizes['S']}, {sizes['rank']}] {kind}"
        runtime.fail(variant, "v", runtime.describe(v), wanted, "make it with moe_shrink")
    strides = operands.Strides.of(lora_b[0])
    if strides.row * sizes["N"] >= 2**31:
        runtime.fail(variant, "lora_b", f"rows {strides.row} elements apart", "an expert's matrix below 2**31 elements")
    return sizes["rank"], 0 if by_table else v.shape[0], by_token, strides


def _check_b_scale(variant: str, given: Given, of_b: str | None) -> operands.Strides:
    """The strides of the scales of the second factors."""
    if of_b is None or given.lora_b is None or given.b_scale is None:
        return operands.Strides()
    check_fp8(variant, "lora_b", given.lora_b[0], of_b, QUANT)
    return factor_scale_strides(variant, "b_scale", of_b, given.b_scale, given.lora_b, QUANT)


def step_ranks(problem: Problem) -> int:
    """Ranks that a program of pairs takes at a time; where factors have scales of groups, of one."""
    block_r = min(64, runtime.next_power_of_2(problem.rank))
    while problem.b_scales == "group" and QUANT.group_k % block_r:
        block_r //= 2
    return block_r


def _check_w_scale(
    variant: str, mode: str, scale: torch.Tensor, w: torch.Tensor, slices: int
) -> tuple[int, int]:
    """The strides of the scales of weights: over E, and from those of one slice to those of the next."""
    shape = scale_shape(mode, w.shape, QUANT, slices)
    fitting = fits(mode, scale.shape, w.shape, QUANT, slices)
    if not fitting or not is_scale(scale, w.device, mode) or not scale[0].is_contiguous():
        if mode == "mx":
            mxfp4.refuse_scale(variant, "w_scale", scale, w)
        wanted = f"{list(shape)} float32 or float8_e8m0fnu on {w.device}, contiguous behind E"
        runtime.fail(variant, "w_scale", runtime.describe(scale), wanted, f"a scale a {mode}")
    return scale.stride(0), 0 if scale.shape == w.shape[:1] else scale[0].numel() // slices


def has_boxes(problem: Problem, x: torch.Tensor, w: torch.Tensor) -> bool:
    """Whether the tensor memory accelerator can read the operands."""
    one = problem.slices == 1 or problem.interleaved or problem.w_stride_e == 2 * problem.n * problem.w_stride_n
    return one and runtime.describable(w) and (not problem.rows.startswith("sorted") or runtime.describable(x))


def has_roles(problem: Problem) -> bool:
    """Whether warps of roles can take operands that the tensor memory accelerator can read: rows of whole steps of K, experts one
    behind the other, blocks of two warpgroups; with what only sm_90 has.
    """
    rows = problem.slices == 2 if problem.rows.endswith("_sorted") else problem.rows == "sorted_pair"
    step = step_columns(problem)
    steps = problem.k % step == 0 and problem.x_stride % (step // 8) == 0 and (problem.rank == 0 or problem.wide_ranks)
    weights = (problem.weight_scales is None) == (problem.x_scales is None)
    weights = weights and problem.w_stride_e == problem.slices * problem.n * problem.w_stride_n
    return rows and steps and weights and problem.block_m == 128 and _is_hopper(problem.device)


def has_lanes(problem: Problem, x: torch.Tensor, w: torch.Tensor) -> bool:
    """Whether lanes of warps can read the operands: MXFP4 in rows of whole copies, beside few rows of x; on sm_90, where it is
    measured."""
    rows = problem.rows in ("token_sorted", "sorted_pair") and problem.block_m in (16, 32)
    if problem.rows in ("token_pair", "pair_token"):
        rows = _columns(problem.k, problem.top_k if problem.rows == "pair_token" else 1) <= COLUMNS
    rows = rows and runtime.describable(x) and runtime.describable(w)
    return rows and problem.weight_scales == "mx" and _is_hopper(problem.device)


def lanes_serve(x: torch.Tensor, weights: Sequence[torch.Tensor], top_k: int) -> bool:
    """Whether lanes widen the MXFP4 weights of both products of a layer for few tokens."""
    wide = _is_hopper(x.device) and has_gluon() and all(map(runtime.describable, (x, *weights)))
    return wide and all(_columns(2 * w.shape[2], top_k) <= COLUMNS for w in weights)


def _columns(k: int, pairs: int) -> int:
    """Columns of x, parts of K of pairs, that a program of lane_gemv takes at least."""
    return runtime.next_power_of_2(pairs) * runtime.next_power_of_2(runtime.cdiv(k, PART))


def _is_hopper(device: torch.device) -> bool:
    return runtime.traits(device).target == "sm_90"


def step_columns(problem: Problem) -> int:
    """Columns of K that a slot of warp_specialised holds: 128 bytes."""
    return 64 if problem.x_scales is None else 128


@functools.cache
def has_gluon() -> bool:
    """Whether kernels in Gluon can be launched: not every Triton has it, and its interpreter does not know it."""
    if runtime.INTERPRETED:
        return False
    try:
        from .. import _gluon  # noqa: F401
    except (AttributeError, ImportError):
        return False
    return True


def grid(problem: Problem, block_n: int) -> int:
    """Programs for the tokens that are expected; where there are more, programs stride over the tiles."""
    blocks = max_blocks(max(problem.tokens_hint, 1), problem.top_k, problem.num_experts, problem.block_m)
    return blocks * runtime.cdiv(problem.n, block_n)


def choose(schedule: str, problem: Problem) -> Any:
    """The tiles of ``schedule`` for a call, of its class."""
    s = _shape(problem)
    return _for_factors(problem, s, _rule(schedule, *s))


class Key(NamedTuple):
    """What measured tiles are looked up by: the sizes of specs/tuned, and what its tags stand for."""

    num_tokens: int  # the next power of two
    top_k: int
    num_experts: int
    block_m: int  # of the tables, 0: there are none
    k: int
    n: int
    slices: int
    reads_token: bool  # a row of x a token, as the first projection has; else one a pair
    sums: bool  # over the experts of a token
    rank: int  # of adapters, 0: there are none
    weight_scales: str | None
    x_scales: str | None
    writes_fp8: bool


def plan(problem: Problem, boxes: bool, lanes: bool, there: Callable[[str], bool]) -> tuple[str, Config]:
    """(schedule, tiles) for a call, from host integers alone: the same call always gets the same. ``boxes``, ``lanes``: whether
    these can read its operands; ``there``: whether the spec has a schedule for such calls.

    With adapters they are those without, as long as nothing else was measured: so rows without an adapter get the same bits.
    The number of tokens counts as the next power of two, so that the compile keys of a model are a short list.
    """
    s, device = _shape(problem), runtime.traits(problem.device)
    key = _key(problem, s)
    own = _schedule(problem, boxes and there("box"))
    if lanes and has_gluon():
        own = next(filter(there, ("lanes", "lane_gemv")), own)

    def rule(schedule: str | None) -> tuple[str, Config]:
        return schedule or own, _rule(schedule or own, *s)

    bare = key._replace(rank=0) if problem.rank > 0 and not runtime.taken_for(TUNED, key, device) else None

    def serves(schedule: str) -> bool:
        """Whether operands and rows are such that it can; what box and lanes can, tile can; Triton does not interpret Gluon."""
        if schedule == "warp_specialised":
            return there(schedule) and boxes and has_roles(problem) and has_gluon()
        return schedule == own or (schedule == "tile" and own in ("box", "lanes"))

    schedule, config = runtime.choose(TUNED, key, device, CONFIGS, rule, serves, bare)
    if bare is not None and isinstance(config, TileConfig | BoxConfig):
        block_d, delta_stages = _delta(s, config.block_n)
        config = config._replace(block_d=block_d, delta_stages=delta_stages)
    return schedule, _for_factors(problem, s, config)


def _key(problem: Problem, s: _Shape) -> Key:
    device = runtime.traits(problem.device)
    tokens = min(s.tokens, 4096)  # more tokens are more of the same blocks
    rows = (s.block_m, s.k, s.n, s.slices, problem.rows.startswith("token"), s.sums, problem.rank)
    key = Key(tokens, problem.top_k, problem.num_experts, *rows, s.weight_scales, s.x_scales, problem.writes_fp8)
    far = key._replace(num_tokens=16384)  # where so many have been measured too
    others = (far, far._replace(rank=0, writes_fp8=False))
    known = s.tokens >= far.num_tokens and any(runtime.measured(TUNED, each, device) for each in others)
    return far if known else key


def is_tuned(problem: Problem, boxes: bool) -> bool:
    """Whether warps of roles can take such a call, and tuning says what they then do; with adapters, or without."""
    key = _key(problem, _shape(problem))
    taken = runtime.taken_for(TUNED, key, runtime.traits(problem.device), key._replace(rank=0))
    return bool(taken) and boxes and has_roles(problem) and has_gluon()


def _for_factors(problem: Problem, s: _Shape, config: Config) -> Config:
    """Tiles for FP8 factors: a step is of one adapter, and its sums are in registers beside those that it is added to."""
    if problem.b_scales is None or not isinstance(config, TileConfig | BoxConfig):
        return config
    block_n = config.block_n
    while block_n > 16 and 2 * s.block_m * s.slices * block_n > config.num_warps * s.warp_sums:
        block_n //= 2
    return config._replace(block_n=block_n, block_d=min(config.block_d, max(32, runtime.next_power_of_2(problem.rank))))


class _Shape(NamedTuple):
    tokens: int
    pairs: int
    block_m: int
    k: int
    n: int
    slices: int
    sums: bool
    weight_scales: str | None
    x_scales: str | None
    rank: int  # of adapters, 0: there are none
    runs: int  # of adapters that a block has, if they and the experts of a batch spread evenly
    heavy: bool  # the activation takes many registers beside the sums
    biased: bool
    target: str
    accelerator: bool
    num_sms: int
    shared_memory: int
    full_warps: int
    warp_sums: int
    max_stages: int


def _shape(problem: Problem) -> _Shape:
    device = runtime.traits(problem.device)
    tokens = runtime.next_power_of_2(problem.tokens_hint)
    return _Shape(
        tokens=tokens,
        pairs=tokens * problem.top_k,
        block_m=problem.block_m,
        k=problem.k,
        n=problem.n,
        slices=problem.slices,
        sums=problem.rows == "pair_token",
        weight_scales=problem.weight_scales,
        x_scales=problem.x_scales,
        rank=problem.rank,
        runs=_expected_runs(problem, tokens * problem.top_k),
        heavy=problem.epilogue == "gelu" or (problem.epilogue == "swiglu_clamp" and problem.weight_scales == "group"),
        biased=problem.bias_stride != 0,
        target=device.target,
        accelerator=_has_accelerator(device),
        num_sms=device.num_sms,
        shared_memory=device.shared_memory,
        full_warps=device.full_warps,
        warp_sums=device.warp_sums,
        max_stages=device.max_stages,
    )


def _schedule(problem: Problem, boxes: bool) -> str:
    if problem.writes_fp8 or problem.rows == "sorted_sorted":
        return "warp_specialised"  # no other has groups in its tiles, or needs x in order
    if problem.rows == "pair_token" or problem.block_m == 0:
        return "naive" if problem.weight_scales == "mx" else "gemv" if problem.x_scales is None else "diagonal"
    # Below 64 rows a tile waits for memory, which pointers ask for as well as descriptors; FP8 weights that are widened pass
    # through registers anyway.
    boxes = boxes and (problem.weight_scales is None or problem.x_scales is not None)
    boxes = boxes and problem.block_m >= 64 and _has_accelerator(runtime.traits(problem.device))
    return "box" if boxes else "tile"


def _has_accelerator(device: runtime.Traits) -> bool:
    return device.pdl or runtime.INTERPRETED


@functools.lru_cache(maxsize=4096)
def _rule(schedule: str, *sizes: Any) -> Config:
    s = _Shape(*sizes)
    rules: dict[str, Callable[[_Shape], Config]] = {
        "gemv": _gemv,
        "naive": _naive,
        "diagonal": _diagonal,
        "tile": _tile,
        "box": _box,
        "warp_specialised": lambda s: WarpSpecialisedConfig(4, _group_m(s)),
        "lanes": lambda s: LanesConfig(64, 2, 4),
        "lane_gemv": _lane_gemv,
    }
    return rules[schedule](s)


def _gemv(s: _Shape) -> GemvConfig:
    wanted = 256 if s.k <= 8192 else 512
    if s.slices == 2 and s.weight_scales is None and 2048 < s.k <= 6144:
        wanted = 64  # two wide rows at a time spill there
    block_k = _block_k(s.k, wanted)
    # Of a layer with adapters others are faster, of tiles in which a lane has the same columns, so that no row has other bits.
    own = s.rank > 0 and s.weight_scales is None and block_k == 256
    if s.sums:
        return GemvConfig(min(s.tokens, 4) if own and s.rank <= 32 else 2, block_k, 2 if s.k > 8192 else 1, 1)
    if s.tokens == 1 and s.k <= 1024:
        return GemvConfig(2, block_k, 1, 1)
    if (s.rank or s.heavy or s.target == "sm_100") and s.slices == 2 and s.weight_scales == "group":
        return GemvConfig(4, block_k, 2, 1)  # one warp has no registers for scales of parts and for more beside them
    few_columns = s.rank and s.slices == 2 and s.weight_scales is not None  # or FP8 weights and factors fill the registers
    return GemvConfig(2 if few_columns or (own and s.tokens > 2) else 4, block_k, 1 if s.slices == 2 or s.k > 1024 else 2, 1)


def _lane_gemv(s: _Shape) -> LaneGemvConfig:
    if s.sums:
        return LaneGemvConfig(COLUMNS // runtime.next_power_of_2(s.pairs // s.tokens), 2)
    return LaneGemvConfig(max(4, _columns(s.k, 1)), 1)


def _naive(s: _Shape) -> NaiveConfig:
    # As measured; a masked last step costs less than short ones.
    return NaiveConfig(32, min(128, max(32, runtime.next_power_of_2(s.k))), min(3, s.max_stages), 2, 1)


def _diagonal(s: _Shape) -> DiagonalConfig:
    """As measured: pieces of rows as long as the rows of a tile allow, which a warp group has 64 of."""
    if s.sums:
        block_n, longest, stages = 16, 2048 if s.tokens == 1 or s.k >= 2048 else 1024, 3
    else:
        block_n, longest, stages = 32, 512 if s.tokens > 1 and s.k >= 4096 else 256, 3 if s.tokens == 1 or s.k >= 4096 else 4
    block_k = min(longest, max(32, runtime.next_power_of_2(s.k)))
    block_n, stages = max(block_n, 64 * QUANT.group_k // max(block_k, QUANT.group_k)), min(stages, s.max_stages)
    while stages > 2 and stages * s.slices * block_n * block_k > s.shared_memory // 2:
        stages -= 1
    return DiagonalConfig(block_n, block_k, stages, 4, 1 if s.sums else 0)


def together(problem: Problem, block_k: int) -> int:
    """Pairs of an expert that a program of diagonal takes at once: one a token, as long as their parts are few rows."""
    most: int = 32 // max(1, block_k // QUANT.group_k)
    return max(1, min(runtime.next_power_of_2(problem.num_tokens), 4, most))


# block_m -> block_n, block_k, stages, warps of the first projection with its two halves, and of any other product
_FIRST = {16: (32, 256, 3, 4), 32: (64, 128, 3, 4), 64: (128, 64, 4, 8), 128: (128, 64, 4, 8)}
_OTHER = {16: (128, 128, 3, 4), 32: (128, 128, 3, 4), 64: (128, 64, 3, 4), 128: (128, 64, 3, 4)}
# The same of FP8: weights that are widened, and products of FP8 with FP8.
_FIRST_W8 = {16: (64, 128, 3, 4), 32: (64, 128, 3, 4), 64: (64, 64, 4, 4), 128: (128, 64, 3, 8)}
_OTHER_W8 = {16: (128, 128, 3, 4), 32: (128, 128, 3, 4), 64: (128, 64, 3, 4), 128: (128, 128, 3, 8)}
_FIRST_W8A8 = {16: (64, 128, 3, 4), 32: (64, 128, 4, 4), 64: (64, 128, 4, 4), 128: (128, 128, 3, 8)}
_OTHER_W8A8 = {16: (128, 128, 3, 4), 32: (128, 128, 3, 4), 64: (128, 128, 4, 8), 128: (128, 128, 4, 8)}
# And of MXFP4, whose rows are those of a warp group's product, 64 for four warps.
_FIRST_MX = {16: (64, 128, 3, 4), 32: (64, 64, 4, 4), 64: (64, 64, 4, 4), 128: (64, 64, 3, 4)}
_OTHER_MX = {16: (64, 128, 3, 4), 32: (64, 64, 4, 4), 64: (128, 64, 3, 4), 128: (256, 64, 3, 8)}


def _tile(s: _Shape) -> TileConfig:
    block_n, block_k, stages, warps = _sizes(s)
    if s.block_m == 128 and s.weight_scales is None:
        warps = s.full_warps  # beside the pointers that a box does without; tables of others have as many
    while s.heavy and block_n > 16 and 2 * s.block_m * s.slices * block_n > warps * s.warp_sums:
        block_n //= 2
    return TileConfig(block_n, block_k, stages, warps, _group_m(s), int(s.block_m == 128), 0, *_delta(s, block_n))


def _box(s: _Shape) -> BoxConfig:
    block_n, block_k, stages, warps = _sizes(s)
    if not s.accelerator:  # boxes are copied by pointers to all of their elements, which take registers
        block_k, warps = min(block_k, 32), s.full_warps
    if s.biased and s.rank and s.slices == 2 and s.target == "sm_100":
        block_n //= 2  # there the sums of both halves leave no registers for biases in turns
    return BoxConfig(block_n, block_k, stages, warps, _group_m(s), int(s.block_m == 128), *_delta(s, block_n))


def _group_m(s: _Shape) -> int:
    """Blocks side by side where the weights of one expert are more than the cache holds until its next block."""
    size = s.slices * s.n * s.k * _bits(s.weight_scales) // 8
    return 16 if s.block_m >= 64 and size >= 64 * 2**20 else 1


def _expected_runs(problem: Problem, pairs: int) -> int:
    return min(problem.max_loras, runtime.cdiv(problem.max_loras * problem.block_m * problem.num_experts, max(pairs, 1)))


def _delta(s: _Shape, block_n: int) -> tuple[int, int]:
    """(ranks of a step over the adapters of a tile, stages): those of low ranks take a step together."""
    width = runtime.cdiv(s.rank, 16) * 16
    if width <= 32:
        return min(64, max(32, runtime.next_power_of_2(width * s.runs))), 2
    block_d, stages = 64, min(3, s.max_stages)
    while block_d > 32 and stages * block_d * 2 * s.slices * (s.block_m + block_n) > s.shared_memory - 4096:
        block_d //= 2
    return block_d, stages


def _sizes(s: _Shape) -> tuple[int, int, int, int]:
    first, other = _FIRST, _OTHER
    if s.weight_scales == "mx":
        first, other = _FIRST_MX, _OTHER_MX
    elif s.weight_scales is not None:
        first, other = (_FIRST_W8, _OTHER_W8) if s.x_scales is None else (_FIRST_W8A8, _OTHER_W8A8)
    block_n, block_k, stages, warps = (first if s.slices == 2 else other)[s.block_m]
    if s.weight_scales is None and s.block_m == 16 and s.slices == 2 and (s.rank or (s.k >= 4096 and s.tokens > 64)):
        block_n, block_k, stages = 64, 128, 4 if s.rank else stages
    if s.weight_scales is None and s.block_m == 128 and s.slices == 1 and s.k >= 2048:
        block_n, stages, warps = 256, 4, 8
    if s.block_m == 16 and s.pairs * runtime.cdiv(s.n, block_n) < s.num_sms:
        stages = 6  # so few programs keep memory busy by what they ask for ahead
    stages, warps = min(stages, s.max_stages), min(warps, s.full_warps)
    # Sums of a group pass through registers beside all others: behind them there is no room for factors, and on sm_100 for them.
    groups = s.weight_scales == s.x_scales == "group"
    room = s.warp_sums // 2 if groups and (s.rank > 0 or s.target == "sm_100") else s.warp_sums
    while s.block_m * s.slices * block_n > warps * room:
        block_n, warps = (block_n, 2 * warps) if warps < s.full_warps else (block_n // 2, warps)
    block_k = _in_group(s, _block_k(s.k, block_k))
    while block_n > 16 and block_n >= 2 * s.n:
        block_n //= 2
    while stages > 2 and stages * _stage_bytes(s, block_n, block_k) > s.shared_memory - 4096:
        stages -= 1
    while block_k > 32 and stages * _stage_bytes(s, block_n, block_k) > s.shared_memory - 4096:
        block_k //= 2
    return block_n, block_k, stages, warps


def _stage_bytes(s: _Shape, block_n: int, block_k: int) -> int:
    return block_k * (_bits(s.x_scales) * s.block_m + _bits(s.weight_scales) * s.slices * block_n) // 8


def _bits(scales: str | None) -> int:
    """Of a number of an operand with such scales."""
    return {None: 16, "mx": 4}.get(scales, 8)


def _in_group(s: _Shape, block_k: int) -> int:
    """A tile that lies in one group, where groups of columns have scales."""
    while s.weight_scales == "group" and QUANT.group_k % block_k:
        block_k //= 2
    return block_k


def _block_k(k: int, wanted: int) -> int:
    """The largest tile of at most ``wanted`` columns that divides K; a masked one where only small tiles do."""
    while wanted > 32 and k % wanted:
        wanted //= 2
    return wanted if k % wanted == 0 else min(64, max(32, runtime.next_power_of_2(k)))
