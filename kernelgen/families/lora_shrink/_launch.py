"""lora_shrink where it is launched: an object a variant."""

from __future__ import annotations

import functools
from typing import Any

from .. import _runtime as runtime
from .._scales import product_rows
from ..moe_route._op import OF_ROUTE, SortedRoute
from ._problem import (
    OP,
    Config,
    Modes,
    Parts,
    Problem,
    check,
    check_packed,
    choose,
)
from ._table import QUANT, VARIANTS

_ROUTE = f"tokens_ptr=route.pairs {OF_ROUTE} scalings_ptr"


class LoraShrink:
    """Launches of one variant."""

    def __init__(self, product: Any, total: Any) -> None:
        self.name = runtime.variant_of(product)
        self.facts = VARIANTS.of(self.name)
        operands = "y_ptr x_ptr a_ptrs=lora_a a_scale_ptrs scaling x_scale_ptr lora_ranks_ptr"
        self._product = runtime.Launcher(product, OP, f"{operands} {_ROUTE}")
        self._total = runtime.Launcher(total, OP, f"y_ptr scaling {_ROUTE}")

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
            call.run(given._replace(scaling=float(given.scaling)))

    def bind(self, problem: Problem, route: Any, config: Config) -> runtime.Call:
        """The launches for checked calls of these sizes, ready to be made again and again."""
        parts = problem.parts(config)
        if parts.number == 1:
            return self.bind_product(problem, route, config, False)
        pdl = runtime.traits(problem.device).pdl
        sums, scratch = problem.scratch(route, parts)
        product = self.bind_product(problem, route, config, pdl)
        unscaled = product.through(runtime.GIVEN, y_ptr=sums, scaling=1.0, scalings_ptr=None)
        return runtime.InOrder((unscaled, self.bind_total(problem, route, parts, pdl, sums)), scratch)

    def bind_product(self, problem: Problem, route: SortedRoute, config: Config, pdl: bool) -> runtime.Call:
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
            num_tokens=problem.num_tokens,
            x_scale_next=problem.x_scale_next,
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
            WEIGHTS=runtime.CACHE_POLICIES[config.weight_policy],
            PDL=pdl,
        )
        if not problem.packed:
            return launch
        return runtime.InOrder((runtime.OnHost(functools.partial(check_packed, self.name), runtime.GIVEN.lora_a), launch))

    def bind_total(self, problem: Problem, route: SortedRoute, parts: Parts, pdl: bool, sums: runtime.Path) -> runtime.Call:
        """The sum of parts, which lie at ``sums``, scaled; it may take the place of the first of them."""
        return self._total.bind(
            route.max_blocks * problem.slices * runtime.cdiv(problem.rank, 16),
            runtime.Options(4, pdl=pdl),
            parts_ptr=sums,
            num_tokens=problem.num_tokens,
            SLICES=problem.slices,
            RANK=problem.rank,
            PARTS=parts.number,
            QUARTER=parts.quarter,
            BLOCK_M=route.block_m,
            PDL=pdl,
        )
