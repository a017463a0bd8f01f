"""moe_act where it is launched: an object a variant."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .. import _runtime as runtime
from ._problem import Call, Config, Problem, check, choose
from ._table import VARIANTS


class MoeAct:
    """Launches of one variant."""

    def __init__(self, kernel: Any) -> None:
        self.name = runtime.variant_of(kernel)
        self.facts = VARIANTS.of(self.name)
        self._kernel = runtime.Launcher(kernel, "h_ptr x_ptr topk_ids_ptr valid_tokens_ptr num_tokens")

    def launch(
        self, config: Config | None, h: Tensor, x: Tensor, topk_ids: Tensor, valid_tokens: Tensor | None, **sizes: Any
    ) -> None:
        """One call: checked, and made with the tiles ``config``; None: those of the rule.

        Raises:
            ValueError: something does not fit; nothing was launched.
        """
        activation, dtype = self.facts["epilogue"], self.facts["torch_dtype"]
        problem = check(self.name, h, x, topk_ids, valid_tokens, activation=activation, dtype=dtype, **sizes)
        if problem.num_tokens > 0:
            tiles = runtime.given(self.name, config, Config) or choose(problem)
            self.bind(problem, tiles)(h, x, topk_ids, valid_tokens)

    def bind(self, problem: Problem, config: Config) -> Call:
        """The launch for checked calls of these sizes, ready to be made again and again."""
        pdl, num_tokens = runtime.traits(problem.device).pdl, problem.num_tokens
        pairs = min(num_tokens, problem.tokens_hint) * problem.top_k
        launch = self._kernel.bind(
            runtime.cdiv(pairs, config.rows) * runtime.cdiv(problem.n, config.block_n),
            runtime.Options(config.num_warps, pdl=pdl),
            TOP_K=problem.top_k,
            NUM_EXPERTS=problem.num_experts,
            LOCAL_EXPERT_START=problem.local_expert_start,
            N=problem.n,
            H_STRIDE=problem.h_stride,
            X_STRIDE=problem.x_stride,
            ROWS=config.rows,
            BLOCK_N=config.block_n,
            PDL=pdl,
        )

        def call(h: Tensor, x: Tensor, topk_ids: Tensor, valid_tokens: Tensor | None) -> None:
            launch.run(h, x, topk_ids, valid_tokens, num_tokens)

        return call
