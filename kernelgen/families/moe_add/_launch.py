"""moe_add where it is launched: an object a variant."""

from __future__ import annotations

from typing import Any

from .. import _runtime as runtime
from .._live import ROUTING
from ._problem import OP, Config, Problem, check, choose
from ._table import VARIANTS


class MoeAdd:
    """Launches of one variant."""

    def __init__(self, kernel: Any) -> None:
        self.name = runtime.variant_of(kernel)
        self.facts = VARIANTS.of(self.name)
        self._kernel = runtime.Launcher(kernel, OP, f"out_ptr delta_ptr {ROUTING}")

    def launch(self, config: Config | None, **arguments: Any) -> None:
        """One call: checked, and made with the tiles ``config``; None: those of the rule.

        Raises:
            ValueError: something does not fit; nothing was launched.
        """
        given = OP.given_to(self.name, self.facts, **arguments)
        problem = check(self.name, given, self.facts["torch_dtype"])
        if problem.num_pairs > 0:
            self.bind(problem, runtime.given(self.name, config, Config) or choose(problem)).run(given)

    def bind(self, problem: Problem, config: Config) -> runtime.Call:
        """The launch for checked calls of these sizes, ready to be made again and again."""
        return self._kernel.bind(
            problem.num_pairs * runtime.cdiv(problem.n, config.block_n),
            runtime.Options(config.num_warps),
            TOP_K=problem.top_k,
            N=problem.n,
            OUT_STRIDE=problem.out_stride,
            BLOCK_N=config.block_n,
            D_STRIDE=problem.delta.stride,
            MAX_LORAS=problem.delta.max_loras,
            ROUTE_EXPERTS=problem.delta.num_experts,
            GLOBAL_EXPERTS=problem.delta.global_experts,
        )
