"""The schedules of moe_lora_expand where they are launched: a class each, and of it an object a variant."""

from __future__ import annotations

from typing import Any, ClassVar

from .. import _runtime as runtime
from ..moe_route._op import OF_ROUTE, PairRoute, SortedRoute, TableRoute
from ._problem import (
    OP,
    BlocksConfig,
    PairsConfig,
    Problem,
    check,
    choose,
)
from ._table import VARIANTS

_OPERANDS = f"out_ptr y_ptr b_ptrs=lora_b topk_weights_ptr {OF_ROUTE}"


class _Schedule:
    """What the variants of both schedules do."""

    schedule: ClassVar[str]
    naive: ClassVar[bool]
    config: ClassVar[type]

    def __init__(self, kernel: Any) -> None:
        self.name = runtime.variant_of(kernel)
        self.facts = VARIANTS.of(self.name)

    def bind(self, problem: Problem, route: Any, config: Any) -> runtime.Call:
        """The launch for checked calls of these sizes, ready to be made again and again."""
        raise NotImplementedError

    def launch(self, config: Any, **arguments: Any) -> None:
        """One call: checked, and made with the tiles ``config``; None: those of the rule.

        Raises:
            ValueError: something does not fit; nothing was launched.
        """
        facts = self.facts
        given = OP.given_to(self.name, facts, add_inputs=facts["adds"], mul_routed_weight=facts["weighted"], **arguments)
        problem = check(self.name, given, dtype=facts["torch_dtype"], naive=self.naive, max_rank=facts["max_rank"])
        if problem.num_pairs > 0:
            tiles = runtime.given(self.name, config, self.config) or choose(self.schedule, problem, given.route)
            self.bind(problem, given.route, tiles).run(given)


def _constants(problem: Problem, config: PairsConfig | BlocksConfig) -> dict[str, Any]:
    """Of the kernels of both."""
    return {
        "next_slice": problem.y_slice,
        "next_shard": problem.y_shard,
        "N": problem.n,
        "OFFSET": problem.offset,
        "RANK": problem.rank,
        "SHARD": problem.shard,
        "OUT_STRIDE": problem.out_stride,
        "Y_STRIDE": problem.y_stride,
        "B_STRIDE_L": problem.b_strides.adapter,
        "B_STRIDE_E": problem.b_strides.expert,
        "B_STRIDE_N": problem.b_strides.row,
        "BLOCK_N": config.block_n,
        "WEIGHTS": runtime.CACHE_POLICIES[config.weight_policy],
    }


class Pairs(_Schedule):
    """Launches of pairs."""

    schedule = "pairs"
    naive = True
    config = PairsConfig

    def __init__(self, product: Any) -> None:
        super().__init__(product)
        self._product = runtime.Launcher(product, OP, _OPERANDS)

    def bind(self, problem: Problem, route: PairRoute | TableRoute, config: PairsConfig) -> runtime.Call:
        return self._product.bind(
            problem.num_pairs * problem.slices * runtime.cdiv(problem.n, config.block_n),
            runtime.Options(config.num_warps),
            **_constants(problem, config),
            MAX_LORAS=route.max_loras,
            NUM_EXPERTS=route.num_experts,
            GLOBAL_EXPERTS=route.global_experts,
            TOP_K=route.top_k,
        )


class Blocks(_Schedule):
    """Launches of blocks."""

    schedule = "blocks"
    naive = False
    config = BlocksConfig

    def __init__(self, product: Any) -> None:
        super().__init__(product)
        self._product = runtime.Launcher(product, OP, _OPERANDS)

    def bind(self, problem: Problem, route: SortedRoute, config: BlocksConfig) -> runtime.Call:
        block_r, stages = self.facts["block_rank"], config.stages
        if self.facts["max_rank"] is None:
            block_r, stages = runtime.rank_tile(problem.rank, route.block_m, config.block_n, 1, 4, stages, problem.device)
        return self._product.bind(
            route.max_blocks * problem.slices * runtime.cdiv(problem.n, config.block_n * config.tiles),
            runtime.Options(config.num_warps),
            **_constants(problem, config),
            BLOCK_M=route.block_m,
            BLOCK_R=block_r,
            TILES=config.tiles,
            STAGES=stages,
        )
