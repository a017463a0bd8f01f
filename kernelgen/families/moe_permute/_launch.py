"""moe_permute where it is launched: an object a variant."""

from __future__ import annotations

from typing import Any

from .. import _runtime as runtime
from ..moe_align._op import OF_TABLES, max_rows
from ._problem import OP, Config, Problem, check, choose
from ._table import QUANT, VARIANTS


class MoePermute:
    """Launches of one variant."""

    def __init__(self, kernel: Any) -> None:
        self.name = runtime.variant_of(kernel)
        self.facts = VARIANTS.of(self.name)
        self._kernel = runtime.Launcher(kernel, OP, f"out_ptr x_ptr out_scale_ptr x_scale_ptr {OF_TABLES}")

    def launch(self, config: Config | None, **arguments: Any) -> None:
        """One call: checked, and made with the tiles ``config``; None: those of the rule.

        Raises:
            ValueError: something does not fit; nothing was launched.
        """
        given = OP.given_to(self.name, self.facts, **arguments)
        problem = check(self.name, given, mode=self.facts["x_scales"])
        if problem.num_pairs > 0:
            self.bind(problem, runtime.given(self.name, config, Config) or choose(problem)).run(given)

    def bind(self, problem: Problem, config: Config) -> runtime.Call:
        """The launch for checked calls of these sizes, ready to be made again and again."""
        pdl = runtime.traits(problem.device).pdl
        sizes = (problem.tokens_hint, problem.top_k, problem.num_experts, problem.block_m)
        return self._kernel.bind(
            runtime.cdiv(max_rows(*sizes), config.rows),
            runtime.Options(config.num_warps, pdl=pdl),
            x_scale_next=problem.x_scale_next,
            TOP_K=problem.top_k,
            NUM_EXPERTS=problem.num_experts,
            K=problem.k,
            OUT_STRIDE=problem.out_stride,
            X_STRIDE=problem.x_stride,
            X_SCALE_STRIDE=problem.x_scale_stride,
            BLOCK_M=problem.block_m,
            ROWS=config.rows,
            WIDTH=runtime.next_power_of_2(problem.k),
            GROUPS=runtime.next_power_of_2(runtime.cdiv(problem.k, QUANT.group_k)),
            PDL=pdl,
        )
