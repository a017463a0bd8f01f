"""The schedules of moe_gemm where they are launched: a class each, and of it an object a variant."""

from __future__ import annotations

from typing import Any, ClassVar

from triton.tools.tensor_descriptor import TensorDescriptor

from .. import _runtime as runtime
from ..moe_align._op import OF_TABLES
from ..moe_runs._op import OF_RUNS
from ._problem import (
    COLUMNS,
    OP,
    PART,
    BoxConfig,
    DiagonalConfig,
    GemvConfig,
    LaneGemvConfig,
    LanesConfig,
    Modes,
    NaiveConfig,
    Problem,
    TileConfig,
    WarpSpecialisedConfig,
    check,
    choose,
    grid,
    step_columns,
    step_ranks,
    together,
)
from ._table import QUANT, VARIANTS

_DELTA = "v_ptr b_ptrs=lora_b b_scale_ptrs"
_SCALES = "topk_weights_ptr w_scale_ptr x_scale_ptr"
_MORE = "bias_ptr limit alpha beta"
_TABLES = f"{OF_TABLES} {OF_RUNS}"


class _Schedule:
    """What the variants of all schedules do."""

    schedule: ClassVar[str]
    config: ClassVar[type]
    operands: ClassVar[str]

    def __init__(self, kernel: Any) -> None:
        self.name = runtime.variant_of(kernel)
        self.facts = VARIANTS.of(self.name)
        self._kernel = runtime.Launcher(kernel, OP, self.operands)

    def bind(self, problem: Problem, config: Any) -> runtime.Call:
        """The launch for checked calls of these sizes, ready to be made again and again."""
        raise NotImplementedError

    def launch(self, config: Any, **arguments: Any) -> None:
        """One call: checked, and made with the tiles ``config``; None: those of the rule.

        Raises:
            ValueError: something does not fit; nothing was launched.
        """
        facts, activation = self.facts, None if self.facts["epilogue"] == "none" else self.facts["epilogue"]
        (x_rows, out_rows), layout = facts["rows"].split("_"), "interleaved" if facts["interleaved"] else "halves"
        given = OP.given_to(self.name, facts, x_rows=x_rows, out_rows=out_rows, activation=activation, layout=layout, **arguments)
        modes = Modes(facts["weight_scales"], facts["x_scales"], facts["b_scales"])
        problem = check(self.name, given, modes, facts["torch_dtype"], self.schedule)
        if problem.num_pairs > 0:
            self.bind(problem, runtime.given(self.name, config, self.config) or choose(self.schedule, problem)).run(given)

    def _constants(self, problem: Problem, block_n: int) -> dict[str, Any]:
        """Of the kernels of all schedules whose warps are alike."""
        return {
            "x_scale_next": problem.x_scale_next,
            "TOP_K": problem.top_k,
            "K": problem.k,
            "N": problem.n,
            "OUT_STRIDE": problem.out_stride,
            "X_STRIDE": problem.x_stride,
            "W_STRIDE_E": problem.w_stride_e,
            "W_STRIDE_N": problem.w_stride_n,
            "W_SCALE_STRIDE": problem.w_scale_stride,
            "W_SCALE_NEXT": problem.w_scale_next,
            "X_SCALE_STRIDE": problem.x_scale_stride,
            "BIAS_STRIDE": problem.bias_stride,
            "RANK": problem.rank,
            "B_STRIDE_L": problem.b_strides.adapter,
            "B_STRIDE_E": problem.b_strides.expert,
            "B_STRIDE_N": problem.b_strides.row,
            "B_SCALE_STRIDE_L": problem.b_scale_strides.adapter,
            "B_SCALE_STRIDE_E": problem.b_scale_strides.expert,
            "BLOCK_N": block_n,
            "PDL": runtime.traits(problem.device).pdl,
        }

    def _check_groups(self, problem: Problem, block_k: int) -> None:
        if problem.weight_scales == "group":
            runtime.check_tile(self.name, "block_k", block_k, group_k=QUANT.group_k)


class _ByPair(_Schedule):
    """Pairs as they come."""

    operands = f"out_ptr x_ptr w_ptr {_DELTA} {_SCALES} {_MORE} {_TABLES}"

    def _bind(self, problem: Problem, options: runtime.Options, constants: dict[str, Any]) -> runtime.Call:
        rows = problem.num_tokens if problem.rows == "pair_token" else problem.num_pairs
        waits = not problem.rows.startswith("token") or problem.rank > 0  # but not before it reads of whom a pair is
        return self._kernel.bind(
            rows * runtime.cdiv(problem.n, constants["BLOCK_N"]),
            options._replace(pdl=waits and problem.follows and constants["PDL"]),
            **constants,
            num_pairs=problem.num_pairs,
            NUM_EXPERTS=problem.num_experts,
            LOCAL_EXPERT_START=problem.local_expert_start,
            MAX_LORAS=problem.max_loras,
            V_PARTS=problem.parts,
            BLOCK_R=step_ranks(problem),
        )


class Gemv(_ByPair):
    """Launches of gemv."""

    schedule = "gemv"
    config = GemvConfig

    def bind(self, problem: Problem, config: GemvConfig) -> runtime.Call:
        self._check_groups(problem, min(config.block_k, QUANT.group_k))
        constants = {
            **self._constants(problem, config.block_n),
            "BLOCK_K": config.block_k,
            "WEIGHTS": runtime.CACHE_POLICIES[config.weight_policy],
            "ZERO_REST": problem.zero_rest,
        }
        return self._bind(problem, runtime.Options(config.num_warps), constants)


class Naive(_ByPair):
    """Launches of naive."""

    schedule = "naive"
    config = NaiveConfig

    def bind(self, problem: Problem, config: NaiveConfig) -> runtime.Call:
        self._check_groups(problem, config.block_k)
        constants = {
            **self._constants(problem, config.block_n),
            "BLOCK_K": config.block_k,
            "STAGES": config.num_stages,
            "WEIGHTS": runtime.CACHE_POLICIES[config.weight_policy],
        }
        return self._bind(problem, runtime.Options(config.num_warps, config.num_stages), constants)


class Diagonal(_ByPair):
    """Launches of diagonal."""

    schedule = "diagonal"
    config = DiagonalConfig

    def bind(self, problem: Problem, config: DiagonalConfig) -> runtime.Call:
        self._check_groups(problem, min(config.block_k, QUANT.group_k))
        constants = {
            **self._constants(problem, config.block_n),
            "BLOCK_K": config.block_k,
            "STAGES": config.num_stages,
            "WEIGHTS": runtime.CACHE_POLICIES[config.weight_policy],
            "ZERO_REST": problem.zero_rest,
            "ROWS": together(problem, config.block_k),
            "PAIRS": runtime.next_power_of_2(problem.num_pairs),
        }
        return self._bind(problem, runtime.Options(config.num_warps, config.num_stages), constants)


class LaneGemv(_ByPair):
    """Launches of lane_gemv."""

    schedule = "lane_gemv"
    config = LaneGemvConfig

    def bind(self, problem: Problem, config: LaneGemvConfig) -> runtime.Call:
        pairs = runtime.next_power_of_2(problem.top_k) if problem.rows == "pair_token" else 1
        runtime.check_tile(self.name, "parts", config.parts, columns=COLUMNS // pairs)
        if problem.k > config.parts * PART:
            runtime.fail(self.name, "parts", config.parts, f"parts of at most {PART} of {problem.k} columns")
        constants = {
            **self._constants(problem, 16),
            "PARTS": config.parts,
            "STAGES": config.num_stages,
            "ZERO_REST": problem.zero_rest,
        }
        return self._bind(problem, runtime.Options(pairs * config.parts), constants)


class _ByBlock(_Schedule):
    """Blocks of the tables."""

    def _options(self, problem: Problem, config: TileConfig | BoxConfig | LanesConfig, waits_first: bool) -> runtime.Options:
        pdl = runtime.traits(problem.device).pdl and (waits_first or problem.follows)
        return runtime.Options(config.num_warps, config.num_stages, pdl)

    def _bind(self, problem: Problem, config: TileConfig | BoxConfig, **constants: Any) -> runtime.Call:
        self._check_groups(problem, config.block_k)
        if problem.b_scales == "group":
            runtime.check_tile(self.name, "block_d", config.block_d, group_k=QUANT.group_k)
        constants |= self._constants(problem, config.block_n)
        return self._kernel.bind(
            grid(problem, config.block_n),
            self._options(problem, config, waits_first=problem.rank == 0),  # with adapters it waits for v alone
            **constants,
            BLOCK_M=problem.block_m,
            BLOCK_K=config.block_k,
            STAGES=config.num_stages,
            GROUP_M=config.group_m,
            TAIL=config.tail == 1,
            V_BY_TOKEN=problem.v_by_token,
            BLOCK_D=config.block_d,
            DELTA_STAGES=config.delta_stages,
            RANKED=problem.ranked,
        )


class Tile(_ByBlock):
    """Launches of tile."""

    schedule = "tile"
    config = TileConfig
    operands = f"out_ptr x_ptr w_ptr {_DELTA} {_SCALES} {_MORE} {_TABLES}"

    def bind(self, problem: Problem, config: TileConfig) -> runtime.Call:
        return self._bind(problem, config, WEIGHTS=runtime.CACHE_POLICIES[config.weight_policy])


class Box(_ByBlock):
    """Launches of box; rows of x that are read one after the other are a box too, of blocks and of those of half the height."""

    schedule = "box"
    config = BoxConfig
    operands = f"out_ptr x_ptr {_DELTA} {_SCALES} {_MORE} {_TABLES}"

    def bind(self, problem: Problem, config: BoxConfig) -> runtime.Call:
        slices, block_k = problem.slices, config.block_k
        w_shape = [problem.num_experts * slices, problem.n, problem.k]
        w_strides = [problem.w_stride_e // slices, problem.w_stride_n, 1]
        w_box = [1 if problem.weight_scales else slices, config.block_n, block_k]
        if problem.interleaved:
            w_shape, w_strides = [problem.num_experts, slices * problem.n, problem.k], [problem.w_stride_e, problem.w_stride_n, 1]
            w_box = [1, slices * config.block_n, block_k]
        in_order = problem.rows.startswith("sorted")
        x_shape, x_strides = [problem.num_pairs, problem.k], [problem.x_stride, 1]
        x_box, half_box = [problem.block_m, block_k], [problem.block_m // 2, block_k]
        w, x = runtime.GIVEN.w, runtime.GIVEN.x
        return self._bind(
            problem,
            config,
            x_desc=runtime.Made(lambda base: TensorDescriptor(base, x_shape, x_strides, x_box), x) if in_order else None,
            half_desc=runtime.Made(lambda base: TensorDescriptor(base, x_shape, x_strides, half_box), x) if in_order else None,
            w_desc=runtime.Made(lambda base: TensorDescriptor(base, w_shape, w_strides, w_box), w),
            WEIGHTS="",
        )


class Lanes(_ByBlock):
    """Launches of lanes."""

    schedule = "lanes"
    config = LanesConfig
    operands = Tile.operands

    def bind(self, problem: Problem, config: LanesConfig) -> runtime.Call:
        waits_first = problem.rank == 0 and problem.rows == "token_sorted"  # else it waits for x, or for v
        return self._kernel.bind(
            grid(problem, config.block_n),
            self._options(problem, config, waits_first),
            **self._constants(problem, config.block_n),
            BLOCK_M=problem.block_m,
            STAGES=config.num_stages,
            WARPS=config.num_warps,
            V_BY_TOKEN=problem.v_by_token,
            RANKED=problem.ranked,
        )


class WarpSpecialised(_Schedule):
    """Launches of warp_specialised: some programs a multiprocessor, whose three roles of warps have registers of their own."""

    schedule = "warp_specialised"
    config = WarpSpecialisedConfig
    operands = f"out_ptr out_scale_ptr x_ptr {_DELTA} {_SCALES} {_MORE} {_TABLES}"

    def bind(self, problem: Problem, config: WarpSpecialisedConfig) -> runtime.Call:
        from .._gluon import box  # not every Triton has it

        block_n = 128 if problem.slices == 2 else 256
        w_shape, w_strides = [problem.num_experts * problem.slices * problem.n, problem.k], [problem.w_stride_n, 1]
        x_shape, x_strides = [problem.num_pairs, problem.k], [problem.x_stride, 1]
        x_box, w_box = [64, step_columns(problem)], [128, step_columns(problem)]
        in_order, w, x = problem.rows.startswith("sorted"), runtime.GIVEN.w, runtime.GIVEN.x
        return self._kernel.bind(
            min(grid(problem, block_n), config.programs * runtime.traits(problem.device).num_sms),
            runtime.Options(num_warps=4, max_registers=168),
            x_desc=runtime.Made(lambda base: box(base, x_shape, x_strides, x_box), x) if in_order else None,
            w_desc=runtime.Made(lambda base: box(base, w_shape, w_strides, w_box), w),
            x_scale_next=problem.x_scale_next or 1,
            TOP_K=problem.top_k,
            K=problem.k,
            N=problem.n,
            OUT_STRIDE=problem.out_stride,
            X_STRIDE=problem.x_stride,
            W_SCALE_STRIDE=problem.w_scale_stride,
            W_SCALE_NEXT=problem.w_scale_next,
            X_SCALE_STRIDE=problem.x_scale_stride,
            RANK=problem.rank,
            V_BY_TOKEN=problem.v_by_token,
            B_STRIDE_L=problem.b_strides.adapter,
            B_STRIDE_E=problem.b_strides.expert,
            B_STRIDE_N=problem.b_strides.row,
            RANKED=problem.ranked,
            OUT_SCALE_STRIDE=problem.out_scale_stride,
            LARGEST=problem.largest,
            STAGES=config.num_stages,
            GROUP_M=config.group_m,
        )
