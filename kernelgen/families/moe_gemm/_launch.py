"""The schedules of moe_gemm where they are launched: a class each, and of it an object a variant."""

from __future__ import annotations

from typing import Any, ClassVar

from triton.tools.tensor_descriptor import TensorDescriptor

from .. import _runtime as runtime
from ._problem import (
    CACHE_POLICIES,
    OP,
    BoxConfig,
    Call,
    GemvConfig,
    Given,
    Modes,
    NaiveConfig,
    Problem,
    TileConfig,
    Tiled,
    WarpSpecialisedConfig,
    check,
    choose,
    grid,
    step_columns,
    step_ranks,
)
from ._table import QUANT, VARIANTS

_DELTA = "v_ptr b_ptrs b_scale_ptrs"
_SCALES = "topk_weights_ptr w_scale_ptr x_scale_ptr x_scale_next"
_CLAMP = "limit alpha beta"
_TABLES = "pairs_ptr blocks_ptr num_blocks_ptr run_of_row_ptr runs_ptr"
_ROUTING = "topk_ids_ptr valid_tokens_ptr token_lora_mapping_ptr adapter_enabled_ptr lora_ranks_ptr num_pairs"


def _scales(given: Given) -> tuple[Any, ...]:
    return given.topk_weights, given.w_scale, given.x_scale


def _clamp(given: Given) -> tuple[Any, ...]:
    return given.limit, given.alpha, given.beta


def _blocks(given: Given) -> tuple[Any, ...]:
    """The tables, and the runs of their rows."""
    tables, runs = given.tables, given.runs
    of_rows = (None, None) if runs is None else (runs.run_of_row, runs.runs)
    return tables.pairs, tables.blocks, tables.num_blocks, *of_rows


class _Schedule:
    """What the variants of all schedules do."""

    schedule: ClassVar[str]
    config: ClassVar[type]
    operands: ClassVar[str]

    def __init__(self, kernel: Any) -> None:
        self.name = runtime.variant_of(kernel)
        self.facts = VARIANTS.of(self.name)
        self._kernel = runtime.Launcher(kernel, self.operands)

    def bind(self, problem: Problem, config: Any) -> Call:
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
            self.bind(problem, runtime.given(self.name, config, self.config) or choose(self.schedule, problem))(given)

    def _constants(self, problem: Problem, config: Tiled) -> dict[str, Any]:
        """Of the kernels of all schedules that tile K."""
        return {
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
            "BLOCK_N": config.block_n,
            "BLOCK_K": config.block_k,
            "PDL": runtime.traits(problem.device).pdl,
        }

    def _check_groups(self, problem: Problem, block_k: int) -> None:
        if problem.weight_scales == "group":
            runtime.check_tile(self.name, "block_k", block_k, group_k=QUANT.group_k)


class _ByPair(_Schedule):
    """Pairs as they come."""

    operands = f"out_ptr x_ptr w_ptr {_DELTA} {_SCALES} bias_ptr {_CLAMP} {_ROUTING}"

    def _bind(self, problem: Problem, rows: int, options: runtime.Options, constants: dict[str, Any]) -> Call:
        waits = not problem.rows.startswith("token") or problem.rank > 0  # but not before it reads of whom a pair is
        launch = self._kernel.bind(
            rows * runtime.cdiv(problem.n, constants["BLOCK_N"]),
            options._replace(pdl=waits and problem.follows and constants["PDL"]),
            **constants,
            NUM_EXPERTS=problem.num_experts,
            LOCAL_EXPERT_START=problem.local_expert_start,
            MAX_LORAS=problem.max_loras,
            V_PARTS=problem.parts,
            BLOCK_R=step_ranks(problem),
        )
        num_pairs, x_scale_next = problem.num_pairs, problem.x_scale_next

        def call(given: Given) -> None:
            tables, runs = given.tables, given.runs
            adapters = _NO_ADAPTERS if runs is None else (runs.token_lora_mapping, runs.adapter_enabled, runs.lora_ranks)
            factors, scales = (given.v, given.lora_b, given.b_scale), (*_scales(given), x_scale_next)
            more, routing = (given.bias, *_clamp(given)), (tables.topk_ids, tables.valid_tokens)
            launch.run(given.out, given.x, given.w, *factors, *scales, *more, *routing, *adapters, num_pairs)

        return call


_NO_ADAPTERS = (None, None, None)


class Gemv(_ByPair):
    """Launches of gemv."""

    schedule = "gemv"
    config = GemvConfig

    def bind(self, problem: Problem, config: GemvConfig) -> Call:
        self._check_groups(problem, min(config.block_k, QUANT.group_k))
        constants = {
            **self._constants(problem, config),
            "WEIGHTS": CACHE_POLICIES[config.weight_policy],
            "ZERO_REST": problem.zero_rest,
        }
        rows = problem.num_tokens if problem.rows == "pair_token" else problem.num_pairs
        return self._bind(problem, rows, runtime.Options(config.num_warps), constants)


class Naive(_ByPair):
    """Launches of naive."""

    schedule = "naive"
    config = NaiveConfig

    def bind(self, problem: Problem, config: NaiveConfig) -> Call:
        self._check_groups(problem, config.block_k)
        constants = {
            **self._constants(problem, config),
            "STAGES": config.num_stages,
            "WEIGHTS": CACHE_POLICIES[config.weight_policy],
        }
        return self._bind(problem, problem.num_pairs, runtime.Options(config.num_warps, config.num_stages), constants)


class _ByBlock(_Schedule):
    """Blocks of the tables."""

    def _launch_of(self, problem: Problem, config: TileConfig | BoxConfig, weights: str) -> runtime.Bound:
        self._check_groups(problem, config.block_k)
        if problem.b_scales == "group":
            runtime.check_tile(self.name, "block_d", config.block_d, group_k=QUANT.group_k)
        constants = self._constants(problem, config)
        waits_first = problem.rank == 0  # with adapters it waits for v alone
        return self._kernel.bind(
            grid(problem, config.block_n),
            runtime.Options(config.num_warps, config.num_stages, constants["PDL"] and (waits_first or problem.follows)),
            **constants,
            BLOCK_M=problem.block_m,
            STAGES=config.num_stages,
            WEIGHTS=weights,
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
    operands = f"out_ptr x_ptr w_ptr {_DELTA} {_SCALES} bias_ptr {_CLAMP} {_TABLES}"

    def bind(self, problem: Problem, config: TileConfig) -> Call:
        launch = self._launch_of(problem, config, CACHE_POLICIES[config.weight_policy])
        x_scale_next = problem.x_scale_next

        def call(given: Given) -> None:
            factors, scales = (given.v, given.lora_b, given.b_scale), (*_scales(given), x_scale_next)
            launch.run(given.out, given.x, given.w, *factors, *scales, given.bias, *_clamp(given), *_blocks(given))

        return call


class Box(_ByBlock):
    """Launches of box; rows of x that are read one after the other are a box too, of blocks and of those of half the height."""

    schedule = "box"
    config = BoxConfig
    operands = f"out_ptr x_ptr x_desc half_desc w_desc {_DELTA} {_SCALES} bias_ptr {_CLAMP} {_TABLES}"

    def bind(self, problem: Problem, config: BoxConfig) -> Call:
        launch, x_scale_next = self._launch_of(problem, config, ""), problem.x_scale_next
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

        def call(given: Given) -> None:
            x, x_desc, half_desc = given.x, None, None
            if in_order:
                x_desc = TensorDescriptor(x, x_shape, x_strides, x_box)
                half_desc = TensorDescriptor(x, x_shape, x_strides, half_box)
            w_desc = TensorDescriptor(given.w, w_shape, w_strides, w_box)
            factors, scales = (given.v, given.lora_b, given.b_scale), (*_scales(given), x_scale_next)
            more = (given.bias, *_clamp(given))
            launch.run(given.out, x, x_desc, half_desc, w_desc, *factors, *scales, *more, *_blocks(given))

        return call


class WarpSpecialised(_Schedule):
    """Launches of warp_specialised: some programs a multiprocessor, whose three roles of warps have registers of their own."""

    schedule = "warp_specialised"
    config = WarpSpecialisedConfig
    operands = f"out_ptr out_scale_ptr x_ptr x_desc w_desc {_DELTA} {_SCALES} {_CLAMP} {_TABLES}"

    def bind(self, problem: Problem, config: WarpSpecialisedConfig) -> Call:
        from .._gluon import box  # not every Triton has it

        block_n = 128 if problem.slices == 2 else 256
        launch = self._kernel.bind(
            min(grid(problem, block_n), config.programs * runtime.traits(problem.device).num_sms),
            runtime.Options(num_warps=4, max_registers=168),
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
        w_shape, w_strides = [problem.num_experts * problem.slices * problem.n, problem.k], [problem.w_stride_n, 1]
        x_shape, x_strides = [problem.num_pairs, problem.k], [problem.x_stride, 1]
        in_order, x_scale_next = problem.rows == "sorted_pair", problem.x_scale_next or 1
        x_box, w_box = [64, step_columns(problem)], [128, step_columns(problem)]

        def call(given: Given) -> None:
            x_desc = box(given.x, x_shape, x_strides, x_box) if in_order else None
            w_desc = box(given.w, w_shape, w_strides, w_box)
            factors, scales = (given.v, given.lora_b, given.b_scale), (*_scales(given), x_scale_next)
            out = (given.out, given.out_scale)
            launch.run(*out, given.x, x_desc, w_desc, *factors, *scales, *_clamp(given), *_blocks(given))

        return call
