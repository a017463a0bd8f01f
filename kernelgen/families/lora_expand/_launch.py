"""lora_expand where it is launched: an object a variant."""

from __future__ import annotations

import itertools
from typing import Any

from .. import _runtime as runtime
from .._scales import product_rows
from ..lora_shrink._problem import ONE_PART, Parts
from ..moe_route._op import OF_ROUTE
from ._problem import OP, Config, Problem, check, choose
from ._table import VARIANTS


class LoraExpand:
    """Launches of one variant."""

    def __init__(self, product: Any) -> None:
        self.name = runtime.variant_of(product)
        self.facts = VARIANTS.of(self.name)
        operands = f"out_ptr y_ptr b_ptrs=lora_b b_scale_ptrs scaling tokens_ptr=route.pairs {OF_ROUTE}"
        self._product = runtime.Launcher(product, OP, operands)

    def launch(self, config: Config | None, **arguments: Any) -> None:
        """One call: checked, and made with the tiles ``config``; None: those of the rule.

        Raises:
            ValueError: something does not fit; nothing was launched.
        """
        facts = self.facts
        given = OP.given_to(self.name, facts, scaling=1.0, add_inputs=facts["adds"], **arguments)
        of_variant = (facts["weight_scales"], facts["torch_dtype"], facts["max_rank"])
        problem, route = check(self.name, given, *of_variant), given.route
        if problem.num_tokens > 0:
            self.bind(problem, route, runtime.given(self.name, config, Config) or choose(problem, route)).run(given)

    def bind(self, problem: Problem, route: Any, config: Config, parts: Parts = ONE_PART, pdl: bool = False) -> runtime.Call:
        """The launch for checked calls of these sizes, ready to be made again and again; pdl: right behind a lora_shrink."""
        wide = config.block_n * config.tiles
        spans = tuple(itertools.accumulate((runtime.cdiv(width, wide) for width in problem.widths), initial=0))
        block_m = min(config.rows, route.block_m)
        if problem.weight_scales:
            block_m = product_rows(block_m)
        shares = route.block_m // block_m
        return self._product.bind(
            route.max_blocks * spans[-1] * shares,
            runtime.Options(config.num_warps, pdl=pdl),
            num_tokens=problem.num_tokens,
            scalings_ptr=None,  # which ``lora`` alone has
            WIDTHS=problem.widths,
            COLUMNS=problem.columns,
            COLUMN_STRIDE=problem.column_stride,
            SPANS=spans,
            EVEN=all(width % wide == 0 for width in problem.widths),
            RANK=problem.rank,
            OUT_STRIDE=problem.out_stride,
            B_STRIDES_L=problem.b_strides_l,
            B_STRIDE_N=problem.b_stride_n,
            B_SCALE_STRIDES_L=problem.b_scale_strides_l,
            PARTS=parts.number,
            QUARTER=parts.quarter,
            BLOCK_M=block_m,
            SHARES=shares,
            BLOCK_N=config.block_n,
            TILES=config.tiles,
            STAGES=config.stages,
            WEIGHTS=runtime.CACHE_POLICIES[config.weight_policy],
            PDL=pdl,
        )
