"""The schedules of moe_lora where they are launched: a class each, and of it an object a variant."""

from __future__ import annotations

from typing import Any, ClassVar

import torch

from .. import _runtime as runtime
from .._slices import joined_slices
from ..moe_route._op import (
    OF_ROUTE,
    MoeRoute,
    PairRoute,
    SortedRoute,
    TableRoute,
    scratch,
)
from ._problem import (
    OP,
    Modes,
    OneShotConfig,
    Problem,
    SmallBatchConfig,
    TwoKernelConfig,
    check,
    choose,
    rows_of_program,
)
from ._table import QUANT, VARIANTS

_A = "x_ptr a_ptrs=lora_a a_scale_ptrs x_scale_ptr"
_B = "out_ptr b_ptrs=lora_b b_scale_ptrs topk_weights_ptr"


class _Schedule:
    """What the variants of all schedules do."""

    schedule: ClassVar[str]
    naive: ClassVar[bool] = False
    config: ClassVar[type]

    def __init__(self, kernel: Any) -> None:
        self.name = runtime.variant_of(kernel)
        self.facts = VARIANTS.of(self.name)

    def bind(self, problem: Problem, route: Any, config: Any) -> runtime.Call:
        """The launches for checked calls of these sizes, ready to be made again and again."""
        raise NotImplementedError

    def launch(self, config: Any, **arguments: Any) -> None:
        """One call: checked, and made with the tiles ``config``; None: those of the rule.

        Raises:
            ValueError: something does not fit; nothing was launched.
        """
        facts = self.facts
        given = OP.given_to(self.name, facts, add_inputs=facts["adds"], mul_routed_weight=facts["weighted"], **arguments)
        problem = check(
            self.name,
            given,
            dtype=facts["torch_dtype"],
            naive=self.naive,
            max_rank=facts["max_rank"],
            modes=Modes(facts["weight_scales"], facts["x_scales"]),
            block_r=facts["block_rank"],
        )
        if problem.num_pairs > 0:
            tiles = runtime.given(self.name, config, self.config) or choose(self.schedule, problem, given.route)
            self.bind(problem, given.route, tiles).run(given)

    def _check_tile(self, name: str, tile: int, **wholes: int) -> None:
        runtime.check_tile(self.name, name, tile, **wholes)


def _constants(problem: Problem, route: MoeRoute) -> dict[str, Any]:
    """Of kernels of all schedules."""
    return {
        "x_scale_next": problem.x_scale_next,
        "TOP_K": route.top_k,
        "K": problem.k,
        "N": problem.n,
        "RANK": problem.rank,
        "OUT_STRIDE": problem.out_stride,
        "X_STRIDE": problem.x_stride,
        "A_STRIDE_L": problem.a_strides.adapter,
        "A_STRIDE_E": problem.a_strides.expert,
        "A_STRIDE_R": problem.a_strides.row,
        "B_STRIDE_L": problem.b_strides.adapter,
        "B_STRIDE_E": problem.b_strides.expert,
        "B_STRIDE_N": problem.b_strides.row,
        "A_SCALE_STRIDE_L": problem.a_scale_strides.adapter,
        "A_SCALE_STRIDE_E": problem.a_scale_strides.expert,
        "B_SCALE_STRIDE_L": problem.b_scale_strides.adapter,
        "B_SCALE_STRIDE_E": problem.b_scale_strides.expert,
        "X_SCALE_STRIDE": problem.x_scale_stride,
    }


def _has_groups(problem: Problem) -> bool:
    return "group" in (problem.weight_scales, problem.x_scales)


def _is_fused(problem: Problem) -> bool:
    """Where numerics are strict, a scaled sum that is added to another is rounded by itself, as one that went through memory."""
    return not (VARIANTS.strict and (problem.weight_scales or problem.x_scales))


def _dependent(problem: Problem, config: SmallBatchConfig | TwoKernelConfig) -> bool:
    return runtime.traits(problem.device).pdl and config.pdl == 1


class OneShot(_Schedule):
    """Launches of one_shot."""

    schedule = "one_shot"
    config = OneShotConfig

    def __init__(self, kernel: Any) -> None:
        super().__init__(kernel)
        self._kernel = runtime.Launcher(kernel, OP, f"{_A} {_B} {OF_ROUTE}")

    def bind(self, problem: Problem, route: SortedRoute, config: OneShotConfig) -> runtime.Call:
        if _has_groups(problem):
            self._check_tile("block_k", config.block_k, group_k=QUANT.group_k)
            if VARIANTS.chunk_k:
                config = config._replace(block_k=QUANT.group_k)  # the order of sums of groups
        if VARIANTS.chunk_k:
            self._check_tile("block_k", config.block_k, chunk_k=VARIANTS.chunk_k)
        block_m = rows_of_program(problem.weight_scales, problem.x_scales, problem.rank, route.block_m, problem.slices)
        shares = runtime.cdiv(route.block_m, block_m)
        return self._kernel.bind(
            route.max_blocks * shares,
            runtime.Options(config.num_warps, fused=_is_fused(problem)),
            **_constants(problem, route),
            BLOCK_M=block_m,
            SHARES=shares,
            JOINED=joined_slices(problem.slices, self.facts["block_rank"], problem.device),
            BLOCK_N=config.block_n,
            BLOCK_K=config.block_k,
            SHRINK_STAGES=config.shrink_stages,
            EXPAND_STAGES=config.expand_stages,
            WEIGHTS=runtime.CACHE_POLICIES[config.weight_policy],
        )


class SmallBatch(_Schedule):
    """Launches of small_batch."""

    schedule = "small_batch"
    naive = True
    config = SmallBatchConfig

    def __init__(self, shrink: Any, expand: Any) -> None:
        super().__init__(shrink)
        self._shrink = runtime.Launcher(shrink, OP, f"{_A} {OF_ROUTE}")
        self._expand = runtime.Launcher(expand, OP, f"{_B} {OF_ROUTE}")

    def bind(self, problem: Problem, route: PairRoute | TableRoute, config: SmallBatchConfig) -> runtime.Call:
        if problem.weight_scales == "group":
            self._check_tile("shrink_block_r", config.shrink_block_r, group_n=QUANT.group_n)
        split_k, block_r, expand_warps = config.split_k, config.shrink_block_r, config.expand_warps
        if VARIANTS.chunk_k:
            # a matrix unit has 16 rows; 64 of them, of four warps, go to one that takes widened FP8 in another order
            split_k, block_r, expand_warps = VARIANTS.chunk_k, min(max(16, block_r), 32), min(expand_warps, 2)
            if _has_groups(problem):
                config = config._replace(block_k=QUANT.group_k)  # the order of sums of groups
        self._check_tile("block_k", config.block_k, split_k=split_k)
        splits, chunks = runtime.cdiv(problem.k, split_k), runtime.cdiv(problem.rank, block_r)
        num_pairs, slices, part_stride = problem.num_pairs, problem.slices, chunks * block_r
        fused, pdl = _is_fused(problem), _dependent(problem, config)
        size = splits * num_pairs * slices * part_stride
        parts, space = scratch(route, size, problem.device)
        constants = {
            **_constants(problem, route),
            "parts_ptr": parts,
            "num_pairs": num_pairs,
            "MAX_LORAS": route.max_loras,
            "NUM_EXPERTS": route.num_experts,
            "GLOBAL_EXPERTS": route.global_experts,
            "WEIGHTS": runtime.CACHE_POLICIES[config.weight_policy],
            "PDL": pdl,
        }
        shrink = self._shrink.bind(
            num_pairs * slices * chunks * splits,
            runtime.Options(config.shrink_warps, fused=fused),
            **constants,
            BLOCK_R=block_r,
            BLOCK_K=config.block_k,
            SPLIT_K=split_k,
        )
        expand = self._expand.bind(
            num_pairs * slices * runtime.cdiv(problem.n, config.block_n),
            runtime.Options(expand_warps, pdl=pdl, fused=fused),
            **constants,
            PARTS=splits,
            PARTS_SIZE=runtime.next_power_of_2(splits),
            PART_STRIDE=part_stride,
            BLOCK_N=config.block_n,
        )
        return runtime.InOrder((shrink, expand), space)


class TwoKernel(_Schedule):
    """Launches of two_kernel."""

    schedule = "two_kernel"
    config = TwoKernelConfig

    def __init__(self, shrink: Any, expand: Any) -> None:
        super().__init__(shrink)
        self._shrink = runtime.Launcher(shrink, OP, f"{_A} {OF_ROUTE}")
        self._expand = runtime.Launcher(expand, OP, f"{_B} {OF_ROUTE}")

    def bind(self, problem: Problem, route: SortedRoute, config: TwoKernelConfig) -> runtime.Call:
        if _has_groups(problem):
            self._check_tile("block_k", config.block_k, group_k=QUANT.group_k)
            if VARIANTS.chunk_k:
                config = config._replace(block_k=QUANT.group_k)  # the order of sums of groups
        split_k = config.split_k
        if VARIANTS.chunk_k:
            split_k = split_k if split_k >= problem.k else VARIANTS.chunk_k
            self._check_tile("block_k", config.block_k, chunk_k=VARIANTS.chunk_k)
        splits = runtime.cdiv(problem.k, split_k)
        if splits > 1:
            self._check_tile("block_k", config.block_k, split_k=split_k)
        block_rank, slices = self.facts["block_rank"], problem.slices
        block_m = rows_of_program(problem.weight_scales, problem.x_scales, problem.rank, route.block_m, slices)
        shares = runtime.cdiv(route.block_m, block_m)
        chunks, spans = runtime.cdiv(problem.rank, block_rank), runtime.cdiv(problem.n, config.block_n * config.expand_tiles)
        part_dtype = torch.float32 if splits > 1 else self.facts["torch_dtype"]
        block_r, stages = block_rank, config.expand_stages
        if self.facts["max_rank"] is None:
            sizes = (problem.rank, block_m, config.block_n, splits, part_dtype.itemsize, stages)
            block_r, stages = runtime.rank_tile(*sizes, problem.device)
        fused, pdl = _is_fused(problem), _dependent(problem, config)
        capacity = route.pairs.shape[0]
        size = splits * slices * chunks * block_rank * capacity
        parts, space = scratch(route, size, problem.device, part_dtype)
        constants = {
            **_constants(problem, route),
            "parts_ptr": parts,
            "capacity": capacity,
            "BLOCK_M": block_m,
            "SHARES": shares,
            "WEIGHTS": runtime.CACHE_POLICIES[config.weight_policy],
            "PDL": pdl,
        }
        shrink = self._shrink.bind(
            route.max_blocks * chunks * splits * shares,
            runtime.Options(config.shrink_warps, fused=fused),
            **constants,
            JOINED=joined_slices(slices, block_rank, problem.device),
            BLOCK_K=config.block_k,
            SPLIT_K=split_k,
            SHRINK_STAGES=config.shrink_stages,
        )
        expand = self._expand.bind(
            route.max_blocks * slices * spans * shares,
            runtime.Options(config.expand_warps, pdl=pdl, fused=fused),
            **constants,
            PARTS=splits,
            BLOCK_N=config.block_n,
            BLOCK_R=block_r,
            TILES=config.expand_tiles,
            EXPAND_STAGES=stages,
        )
        return runtime.InOrder((shrink, expand), space)
