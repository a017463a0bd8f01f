"""moe_quant where it is launched: an object a variant."""

from __future__ import annotations

from typing import Any

from .. import _runtime as runtime
from ..moe_align._op import OF_TABLES, max_rows
from ._problem import OP, Config, Problem, check, choose
from ._table import QUANT, VARIANTS


class MoeQuant:
    """Launches of one variant."""

    def __init__(self, kernel: Any) -> None:
        self.name = runtime.variant_of(kernel)
        self.facts = VARIANTS.of(self.name)
        self._kernel = runtime.Launcher(kernel, OP, f"codes_ptr x_ptr scale_ptr {OF_TABLES}")

    def launch(self, config: Config | None, **arguments: Any) -> None:
        """One call: checked, and made with the tiles ``config``; None: those of the rule.

        Raises:
            ValueError: something does not fit; nothing was launched.
        """
        facts = self.facts
        given = OP.given_to(self.name, facts, order="sorted" if facts["by_table"] else "pair", **arguments)
        problem = check(self.name, given, mode=facts["x_scales"], dtype=facts["torch_dtype"])
        if problem.num_pairs > 0:
            self.bind(problem, runtime.given(self.name, config, Config) or choose(problem)).run(given)

    def bind(self, problem: Problem, config: Config) -> runtime.Call:
        """The launch for checked calls of these sizes, ready to be made again and again."""
        pdl, num_pairs = runtime.traits(problem.device).pdl, problem.num_pairs
        sizes = (problem.tokens_hint, problem.top_k, problem.num_experts, problem.block_m)
        rows = max_rows(*sizes) if self.facts["by_table"] else num_pairs
        width = QUANT.group_k if problem.x_scales == "group" else runtime.next_power_of_2(problem.n)
        return self._kernel.bind(
            runtime.cdiv(rows, config.rows),
            runtime.Options(config.num_warps, pdl=pdl),
            num_pairs=num_pairs,
            TOP_K=problem.top_k,
            NUM_EXPERTS=problem.num_experts,
            LOCAL_EXPERT_START=problem.local_expert_start,
            N=problem.n,
            CODES_STRIDE=problem.codes_stride,
            X_STRIDE=problem.x_stride,
            SCALE_STRIDE=problem.scale_stride,
            LARGEST=problem.largest,
            BLOCK_M=problem.block_m,
            ROWS=config.rows,
            GROUPS=runtime.next_power_of_2(runtime.cdiv(problem.n, width)),
            WIDTH=width,
            PDL=pdl,
        )
