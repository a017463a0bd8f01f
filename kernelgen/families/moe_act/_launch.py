"""moe_act where it is launched: an object a variant."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .. import _runtime as runtime
from .._activation import Clamp
from .._live import routing_of
from ._problem import Call, Config, Problem, check, choose
from ._table import VARIANTS

_ROUTING = "route_ids_ptr token_lora_mapping_ptr adapter_enabled_ptr expert_map_ptr"


class MoeAct:
    """Launches of one variant."""

    def __init__(self, kernel: Any) -> None:
        self.name = runtime.variant_of(kernel)
        self.facts = VARIANTS.of(self.name)
        operands = f"h_ptr x_ptr delta_ptr topk_ids_ptr valid_tokens_ptr {_ROUTING} limit alpha beta num_tokens"
        self._kernel = runtime.Launcher(kernel, operands)

    def launch(
        self,
        config: Config | None,
        h: Tensor,
        x: Tensor,
        topk_ids: Tensor,
        valid_tokens: Tensor | None,
        delta: Tensor | None = None,
        route: Any = None,
        /,
        limit: float | None = None,
        alpha: float | None = None,
        beta: float | None = None,
        **sizes: Any,
    ) -> None:
        """One call: checked, and made with the tiles ``config``; None: those of the rule.

        Raises:
            ValueError: something does not fit; nothing was launched.
        """
        operands, clamp = (h, x, topk_ids, valid_tokens, delta, route), Clamp(limit, alpha, beta)
        problem = check(
            self.name,
            *operands,
            activation=self.facts["epilogue"],
            clamp=clamp,
            dtype=self.facts["torch_dtype"],
            adapted=self.facts["adapted"],
            **sizes,
        )
        if problem.num_tokens > 0:
            tiles = runtime.given(self.name, config, Config) or choose(problem)
            self.bind(problem, tiles)(*operands, *clamp)

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
            D_STRIDE=problem.delta.stride,
            MAX_LORAS=problem.delta.max_loras,
            ROUTE_EXPERTS=problem.delta.num_experts,
            GLOBAL_EXPERTS=problem.delta.global_experts,
        )

        def call(
            h: Tensor,
            x: Tensor,
            topk_ids: Tensor,
            valid_tokens: Tensor | None,
            delta: Tensor | None,
            route: Any,
            limit: float | None,
            alpha: float | None,
            beta: float | None,
        ) -> None:
            launch.run(h, x, delta, topk_ids, valid_tokens, *routing_of(route), limit, alpha, beta, num_tokens)

        return call
