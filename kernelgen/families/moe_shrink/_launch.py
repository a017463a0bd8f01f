"""The schedules of moe_shrink where they are launched: a class each, and of it an object a variant."""

from __future__ import annotations

from typing import Any, ClassVar

from .. import _runtime as runtime
from ..moe_align._op import OF_TABLES
from ..moe_runs._op import OF_RUNS
from ._problem import (
    OP,
    PairsConfig,
    Problem,
    RunsConfig,
    TokensConfig,
    check,
    choose,
    programs,
    split_k,
)
from ._table import QUANT, VARIANTS

_OPERANDS = f"v_ptr x_ptr a_ptrs=lora_a a_scale_ptrs x_scale_ptr {OF_TABLES} {OF_RUNS}"


class _Schedule:
    """What the variants of all schedules do."""

    schedule: ClassVar[str]
    config: ClassVar[type]

    def __init__(self, kernel: Any) -> None:
        self.name = runtime.variant_of(kernel)
        self.facts = VARIANTS.of(self.name)
        self._kernel = runtime.Launcher(kernel, OP, _OPERANDS)

    def bind(self, problem: Problem, config: Any) -> runtime.Call:
        """The launch for checked calls of these sizes, ready to be made again and again."""
        raise NotImplementedError

    def launch(self, config: Any, **arguments: Any) -> None:
        """One call: checked, and made with the tiles ``config``; None: those of the rule.

        Raises:
            ValueError: something does not fit; nothing was launched.
        """
        facts = self.facts
        x_rows, writes = facts["rows"].split("_")
        given = OP.given_to(self.name, facts, x_rows=x_rows, **arguments)
        modes = {"of_factors": facts["weight_scales"], "mode": facts["x_scales"]}
        problem = check(self.name, given, dtype=facts["torch_dtype"], writes=writes, **modes)
        if problem.num_pairs > 0:
            self.bind(problem, runtime.given(self.name, config, self.config) or choose(self.schedule, problem)).run(given)

    def _constants(self, problem: Problem, config: PairsConfig | RunsConfig | TokensConfig) -> dict[str, Any]:
        """Of the kernels of all schedules."""
        return {
            "x_scale_next": problem.x_scale_next,
            "TOP_K": problem.top_k,
            "MAX_LORAS": problem.max_loras,
            "K": problem.k,
            "RANK": problem.rank,
            "X_STRIDE": problem.x_stride,
            "X_SCALE_STRIDE": problem.x_scale_stride,
            "A_STRIDE_L": problem.a_strides.adapter,
            "A_STRIDE_E": problem.a_strides.expert,
            "A_STRIDE_R": problem.a_strides.row,
            "A_SCALE_STRIDE_L": problem.a_scale_strides.adapter,
            "A_SCALE_STRIDE_E": problem.a_scale_strides.expert,
            "BLOCK_R": config.block_r,
            "BLOCK_K": config.block_k,
            "WEIGHTS": runtime.CACHE_POLICIES[config.weight_policy],
            "PDL": runtime.traits(problem.device).pdl,
        }


class Pairs(_Schedule):
    """Launches of pairs."""

    schedule = "pairs"
    config = PairsConfig

    def bind(self, problem: Problem, config: PairsConfig) -> runtime.Call:
        columns, constants = split_k(problem.k), self._constants(problem, config)
        runtime.check_tile(self.name, "block_k", config.block_k, split_k=columns)
        return self._kernel.bind(
            problem.num_pairs * problem.slices * runtime.cdiv(problem.rank, config.block_r) * problem.parts,
            runtime.Options(config.num_warps, pdl=not problem.reads_token and constants["PDL"]),
            **constants,
            num_pairs=problem.num_pairs,
            NUM_EXPERTS=problem.num_experts,
            LOCAL_EXPERT_START=problem.local_expert_start,
            SPLIT_K=columns,
        )


class _Tiles(_Schedule):
    """On matrix units."""

    def bind(self, problem: Problem, config: RunsConfig | TokensConfig) -> runtime.Call:
        if "group" in (problem.weight_scales, problem.x_scales):
            runtime.check_tile(self.name, "block_k", config.block_k, group_k=QUANT.group_k)
        constants = self._constants(problem, config)
        blocks, side, chunks, joined = programs(problem, config)
        return self._kernel.bind(
            blocks * side * chunks,
            runtime.Options(config.num_warps, config.num_stages, constants["PDL"]),
            **constants,
            num_tokens=problem.num_tokens,
            SIDE=side,
            CHUNKS=chunks,
            ROWS=config.rows,
            JOINED=joined,
            RANKED=problem.ranked,
            STAGES=config.num_stages,
        )


class Runs(_Tiles):
    """Launches of runs."""

    schedule = "runs"
    config = RunsConfig


class Tokens(_Tiles):
    """Launches of tokens."""

    schedule = "tokens"
    config = TokensConfig
