"""moe_sum where it is launched: an object a variant."""

from __future__ import annotations

from typing import Any

from .. import _runtime as runtime
from .._live import ROUTING
from ._problem import OP, Config, Problem, check, choose
from ._table import VARIANTS


class MoeSum:
    """Launches of one variant."""

    def __init__(self, kernel: Any) -> None:
        self.name = runtime.variant_of(kernel)
        self.facts = VARIANTS.of(self.name)
        operands = f"out_ptr y_ptr delta_ptr bias_ptr topk_weights_ptr topk_ids_ptr valid_tokens_ptr {ROUTING}"
        self._kernel = runtime.Launcher(kernel, OP, operands)

    def launch(self, config: Config | None, **arguments: Any) -> None:
        """One call: checked, and made with the tiles ``config``; None: those of the rule.

        Raises:
            ValueError: something does not fit; nothing was launched.
        """
        given = OP.given_to(self.name, self.facts, **arguments)
        problem = check(self.name, given, dtype=self.facts["torch_dtype"])
        if problem.num_tokens > 0:
            self.bind(problem, runtime.given(self.name, config, Config) or choose(problem)).run(given)

    def bind(self, problem: Problem, config: Config) -> runtime.Call:
        """The launch for checked calls of these sizes, ready to be made again and again."""
        pdl, num_tokens = runtime.traits(problem.device).pdl, problem.num_tokens
        tokens = num_tokens if self.facts["zeroes"] else min(num_tokens, problem.tokens_hint)
        return self._kernel.bind(
            tokens * runtime.cdiv(problem.n, config.block_n),
            runtime.Options(config.num_warps, pdl=pdl),
            num_tokens=num_tokens,
            TOP_K=problem.top_k,
            NUM_EXPERTS=problem.num_experts,
            LOCAL_EXPERT_START=problem.local_expert_start,
            N=problem.n,
            OUT_STRIDE=problem.out_stride,
            Y_STRIDE=problem.y_stride,
            BIAS_STRIDE=problem.bias_stride,
            KEEP_EMPTY=problem.keep_empty,
            BLOCK_N=config.block_n,
            PDL=pdl,
            D_STRIDE=problem.delta.stride,
            MAX_LORAS=problem.delta.max_loras,
            ROUTE_EXPERTS=problem.delta.num_experts,
            GLOBAL_EXPERTS=problem.delta.global_experts,
        )
