"""lora_shrink where it is launched: an object a variant."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import _runtime as runtime
from .._operands import Tensors
from .._scales import product_rows
from ..moe_route._op import MoeRoute, SortedRoute
from ._problem import (
    CACHE_POLICIES,
    Call,
    Config,
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

    def launch(
        self,
        config: Config | None,
        y: Tensor,
        x: Tensor,
        lora_a: Tensors,
        route: MoeRoute,
        scaling: float,
        a_scale: Tensors | None = None,
        x_scale: Tensor | None = None,
    ) -> None:
        """One call: checked, and made with the tiles ``config``; None: those of the rule.

        Raises:
            ValueError: something does not fit; nothing was launched.
        """
        facts = self.facts
        problem = check(
            self.name,
            y,
            x,
            lora_a,
            route,
            dtype=facts["torch_dtype"],
            max_rank=facts["max_rank"],
            a_scale=None if a_scale is None else (facts["weight_scales"], a_scale),
            x_scale=None if x_scale is None else (facts["x_scales"], x_scale),
            scaling=scaling,
        )
        if problem.num_tokens > 0:
            call = self.bind(problem, route, runtime.given(self.name, config, Config) or choose(problem, route))
            call(y, x, lora_a, route, float(scaling), a_scale, x_scale)

    def bind(self, problem: Problem, route: Any, config: Config) -> Call:
        """The launches for checked calls of these sizes, ready to be made again and again."""
        parts = problem.parts(config)
        if parts.number == 1:
            return self.bind_product(problem, route, config, False)
        pdl = runtime.traits(problem.device).pdl
        product, total = self.bind_product(problem, route, config, pdl), self.bind_total(problem, route, parts, pdl)
        size = parts.number * problem.slices * problem.num_tokens * problem.rank

        def call(
            y: Tensor,
            x: Tensor,
            lora_a: Tensors,
            route: SortedRoute,
            scaling: float,
            a_scale: Tensors | None,
            x_scale: Tensor | None,
            lora_ranks: Tensor | None = None,
            scalings: Tensor | None = None,
        ) -> None:
            sums = route.parts
            if sums is None or sums.shape[0] < size:
                sums = torch.empty(size, dtype=torch.float32, device=y.device)
            product(sums, x, lora_a, route, 1.0, a_scale, x_scale, lora_ranks, None)
            total(y, sums, route, scaling, scalings)

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

        def call(
            y: Tensor,
            x: Tensor,
            lora_a: Tensors,
            route: SortedRoute,
            scaling: float,
            a_scale: Tensors | None,
            x_scale: Tensor | None,
            lora_ranks: Tensor | None = None,
            scalings: Tensor | None = None,
        ) -> None:
            if packed:
                check_packed(self.name, lora_a)
            tables = (route.pairs, route.blocks, route.num_blocks)
            launch.run(y, x, lora_a, a_scale, scaling, num_tokens, x_scale, x_scale_next, *tables, lora_ranks, scalings)

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

        def total(y: Tensor, sums: Tensor, route: SortedRoute, scaling: float, scalings: Tensor | None = None) -> None:
            launch.run(y, sums, scaling, num_tokens, route.pairs, route.blocks, route.num_blocks, scalings)

        return total
