"""lora_shrink where it is launched: an object a variant."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import _runtime as runtime
from .._scales import product_rows
from ..moe_route._op import SortedRoute
from ._problem import (
    CACHE_POLICIES,
    OP,
    Call,
    Config,
    Given,
    Modes,
    Parts,
    Problem,
    Total,
    check,
    check_packed,
    choose,
)
from ._table import QUANT, VARIANTS

_TABLES = "tokens_ptr blocks_ptr num_blocks_ptr"


class LoraShrink:
    """Launches of one variant."""

    def __init__(self, product: Any, total: Any) -> None:
        self.name = runtime.variant_of(product)
        self.facts = VARIANTS.of(self.name)
        operands = "y_ptr x_ptr a_ptrs a_scale_ptrs scaling num_tokens x_scale_ptr x_scale_next"
        self._product = runtime.Launcher(product, f"{operands} {_TABLES} lora_ranks_ptr scalings_ptr")
        self._total = runtime.Launcher(total, f"y_ptr parts_ptr scaling num_tokens {_TABLES} scalings_ptr")

    def launch(self, config: Config | None, **arguments: Any) -> None:
        """One call: checked, and made with the tiles ``config``; None: those of the rule.

        Raises:
            ValueError: something does not fit; nothing was launched.
        """
        facts, given = self.facts, OP.given_to(self.name, self.facts, **arguments)
        modes = Modes(facts["weight_scales"], facts["x_scales"])
        problem, route = check(self.name, given, modes, facts["torch_dtype"], facts["max_rank"]), given.route
        if problem.num_tokens > 0:
            call = self.bind(problem, route, runtime.given(self.name, config, Config) or choose(problem, route))
            call(given._replace(scaling=float(given.scaling)))

    def bind(self, problem: Problem, route: Any, config: Config) -> Call:
        """The launches for checked calls of these sizes, ready to be made again and again."""
        parts = problem.parts(config)
        if parts.number == 1:
            return self.bind_product(problem, route, config, False)
        pdl = runtime.traits(problem.device).pdl
        product, total = self.bind_product(problem, route, config, pdl), self.bind_total(problem, route, parts, pdl)
        size = parts.number * problem.slices * problem.num_tokens * problem.rank

        def call(given: Given) -> None:
            route = given.route
            y = route.parts
            if y is None or y.shape[0] < size:
                y = torch.empty(size, dtype=torch.float32, device=given.y.device)
            of_a = (given.a_scale, given.x_scale, given.lora_ranks)
            product(Given(y, given.x, given.lora_a, route, 1.0, False, *of_a, None, given.packed))
            total(given.y, y, route, given.scaling, given.scalings)

        return call

    def bind_product(self, problem: Problem, route: SortedRoute, config: Config, pdl: bool) -> Call:
        """The product for checked calls of these sizes; of parts, which are to be added and then scaled, where there are any:
        [parts, S, T, rank].
        """
        scales = (problem.weight_scales, problem.x_scales)
        groups = {"group_k": QUANT.group_k} if "group" in scales else {}
        runtime.check_tile(self.name, "block_k", config.block_k, chunk_k=config.chunk_k, **groups)
        together = problem.slices if config.together else 1
        block_r, block_m = min(config.ranks, self.facts["block_rank"]), min(config.rows, route.block_m)
        if any(scales):
            block_m = product_rows(block_m)
        shares, tiles = route.block_m // block_m, runtime.cdiv(problem.rank, block_r)
        launch = self._product.bind(
            route.max_blocks * tiles * (problem.slices // together) * problem.parts(config).number * shares,
            runtime.Options(config.num_warps),
            K=problem.k,
            RANK=problem.rank,
            X_STRIDE=problem.x_stride,
            A_STRIDE_L=problem.a_stride_l,
            A_STRIDE_R=problem.a_stride_r,
            A_SCALE_STRIDE_L=problem.a_scale_stride_l,
            X_SCALE_STRIDE=problem.x_scale_stride,
            BLOCK_M=block_m,
            SHARES=shares,
            BLOCK_R=block_r,
            BLOCK_K=config.block_k,
            CHUNK_K=config.chunk_k,
            QUARTER_K=config.chunk_k * problem.quarter(config),
            PART_K=problem.part_k(config),
            TOGETHER=together,
            PACKED=problem.packed,
            STAGES=config.stages,
            WEIGHTS=CACHE_POLICIES[config.weight_policy],
            PDL=pdl,
        )
        num_tokens, x_scale_next, packed = problem.num_tokens, problem.x_scale_next, problem.packed

        def call(given: Given) -> None:
            if packed:
                check_packed(self.name, given.lora_a)
            route: Any = given.route
            scales, tables = (given.x_scale, x_scale_next), (route.pairs, route.blocks, route.num_blocks)
            factors = (given.lora_a, given.a_scale, given.scaling, num_tokens)
            launch.run(given.y, given.x, *factors, *scales, *tables, given.lora_ranks, given.scalings)

        return call

    def bind_total(self, problem: Problem, route: SortedRoute, parts: Parts, pdl: bool) -> Total:
        """The sum of parts, scaled; it may take the place of the first of them."""
        launch = self._total.bind(
            route.max_blocks * problem.slices * runtime.cdiv(problem.rank, 16),
            runtime.Options(4, pdl=pdl),
            SLICES=problem.slices,
            RANK=problem.rank,
            PARTS=parts.number,
            QUARTER=parts.quarter,
            BLOCK_M=route.block_m,
            PDL=pdl,
        )
        num_tokens = problem.num_tokens

        def total(y: Tensor, sums: Tensor, route: Any, scaling: float, scalings: Tensor | None) -> None:
            launch.run(y, sums, scaling, num_tokens, route.pairs, route.blocks, route.num_blocks, scalings)

        return total
