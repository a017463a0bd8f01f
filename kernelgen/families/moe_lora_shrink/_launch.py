"""The schedules of moe_lora_shrink where they are launched: a class each, and of it an object a variant."""

from __future__ import annotations

from typing import Any, ClassVar

import torch

from .. import _runtime as runtime
from .._slices import joined_slices
from ..moe_route._op import OF_ROUTE, PairRoute, SortedRoute, TableRoute, scratch
from ._problem import (
    OP,
    BlocksConfig,
    PairsConfig,
    Problem,
    check,
    choose,
)
from ._table import VARIANTS

_OPERANDS = f"x_ptr a_ptrs=lora_a {OF_ROUTE}"
_CELLS = 256  # of a program that adds parts of pairs


class _Schedule:
    """What the variants of both schedules do."""

    schedule: ClassVar[str]
    naive: ClassVar[bool]
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
        dtype, max_rank = self.facts["torch_dtype"], self.facts["max_rank"]
        given = OP.given_to(self.name, self.facts, **arguments)
        problem = check(self.name, given, dtype=dtype, naive=self.naive, max_rank=max_rank)
        if problem.num_pairs > 0:
            tiles = runtime.given(self.name, config, self.config) or choose(self.schedule, problem, given.route)
            self.bind(problem, given.route, tiles).run(given)


def _constants(problem: Problem, config: PairsConfig | BlocksConfig, pdl: bool) -> dict[str, Any]:
    """Of the products of both."""
    return {
        "K": problem.k,
        "RANK": problem.rank,
        "Y_STRIDE": problem.y_stride if _parts(problem, config) == 1 else problem.rank,
        "X_STRIDE": problem.x_stride,
        "A_STRIDE_L": problem.a_strides.adapter,
        "A_STRIDE_E": problem.a_strides.expert,
        "A_STRIDE_R": problem.a_strides.row,
        "BLOCK_K": config.block_k,
        "SPLIT_K": config.split_k,
        "WEIGHTS": runtime.CACHE_POLICIES[config.weight_policy],
        "PDL": pdl,
    }


def _written(problem: Problem, parts: int, sums: runtime.Path) -> dict[str, Any]:
    """Where products put what they find: in y, or ``parts`` in the place of ``sums``, for another launch to add up."""
    if parts == 1:
        return {"y_ptr": runtime.GIVEN.y, "next_slice": problem.y_slice, "next_part": 0}
    slice_size = problem.num_pairs * problem.rank
    return {"y_ptr": sums, "next_slice": slice_size, "next_part": problem.slices * slice_size}


def _parts(problem: Problem, config: PairsConfig | BlocksConfig) -> int:
    return runtime.cdiv(problem.k, config.split_k)


def _dependent(problem: Problem, config: PairsConfig | BlocksConfig) -> bool:
    return _parts(problem, config) > 1 and runtime.traits(problem.device).pdl and config.pdl == 1


class Pairs(_Schedule):
    """Launches of pairs."""

    schedule = "pairs"
    naive = True
    config = PairsConfig

    def __init__(self, product: Any, total: Any) -> None:
        super().__init__(product)
        self._product = runtime.Launcher(product, OP, _OPERANDS)
        self._total = runtime.Launcher(total, OP, "y_ptr")

    def bind(self, problem: Problem, route: PairRoute | TableRoute, config: PairsConfig) -> runtime.Call:
        runtime.check_tile(self.name, "block_k", config.block_k, split_k=config.split_k)
        parts, pdl = _parts(problem, config), _dependent(problem, config)
        part_size = problem.slices * problem.num_pairs * problem.rank
        sums, space = scratch(route, parts * part_size, problem.device)
        product = self._product.bind(
            problem.num_pairs * problem.slices * runtime.cdiv(problem.rank, config.block_r) * parts,
            runtime.Options(config.num_warps),
            **_written(problem, parts, sums),
            **_constants(problem, config, pdl),
            MAX_LORAS=route.max_loras,
            NUM_EXPERTS=route.num_experts,
            GLOBAL_EXPERTS=route.global_experts,
            TOP_K=route.top_k,
            PAIRS_A_ROW=problem.pairs_a_row,
            BLOCK_R=config.block_r,
        )
        if parts == 1:
            return product
        total = self._total.bind(
            runtime.cdiv(part_size, _CELLS),
            runtime.Options(4, pdl=pdl),
            parts_ptr=sums,
            num_pairs=problem.num_pairs,
            next_slice=problem.y_slice,
            next_part=part_size,
            RANK=problem.rank,
            Y_STRIDE=problem.y_stride,
            PARTS=parts,
            BLOCK=_CELLS,
            PDL=pdl,
        )
        return runtime.InOrder((product, total), space)


class Blocks(_Schedule):
    """Launches of blocks."""

    schedule = "blocks"
    naive = False
    config = BlocksConfig

    def __init__(self, product: Any, total: Any) -> None:
        super().__init__(product)
        self._product = runtime.Launcher(product, OP, _OPERANDS)
        self._total = runtime.Launcher(total, OP, f"y_ptr {OF_ROUTE}")

    def bind(self, problem: Problem, route: SortedRoute, config: BlocksConfig) -> runtime.Call:
        parts, pdl, block_rank = _parts(problem, config), _dependent(problem, config), self.facts["block_rank"]
        if parts > 1:
            runtime.check_tile(self.name, "block_k", config.block_k, split_k=config.split_k)
        part_size = problem.slices * problem.num_pairs * problem.rank
        sums, space = scratch(route, parts * part_size, problem.device)
        product = self._product.bind(
            route.max_blocks * runtime.cdiv(problem.rank, block_rank) * parts,
            runtime.Options(config.num_warps),
            **_written(problem, parts, sums),
            **_constants(problem, config, pdl),
            TOP_K=problem.pairs_a_row,
            BLOCK_M=route.block_m,
            JOINED=joined_slices(problem.slices, block_rank, problem.device),
            SHRINK_STAGES=config.stages,
        )
        zero, block_r = runtime.OnHost(torch.Tensor.zero_, runtime.GIVEN.y), min(32, block_rank)
        if parts == 1:
            return runtime.InOrder((zero, product))
        total = self._total.bind(
            route.max_blocks * problem.slices * runtime.cdiv(problem.rank, block_r),
            runtime.Options(4, pdl=pdl),
            parts_ptr=sums,
            next_slice=problem.y_slice,
            next_part=part_size,
            SLICES=problem.slices,
            RANK=problem.rank,
            Y_STRIDE=problem.y_stride,
            PARTS=parts,
            BLOCK_M=route.block_m,
            BLOCK_R=block_r,
            PDL=pdl,
        )
        return runtime.InOrder((zero, product, total), space)
