"""The schedules of moe_runs where they are launched: a class each, and of it an object a variant."""

from __future__ import annotations

from typing import Any

from .. import _runtime as runtime
from .._filling import Filling
from ..moe_align._launch import chunks, counted_pairs, walk
from ..moe_align._op import counts_size
from ._op import FILL, Problem, check_fill

_SUMS = 128  # of rows by adapters, that a warp holds at a time
_BLOCKS = 1024  # that a program looks at at a time
_TABLES = "pairs_ptr blocks_ptr num_blocks_ptr"
_RUNS = "run_of_row_ptr runs_ptr gathered_ptr=scratch"
_ROUTING = "topk_ids_ptr valid_tokens_ptr"
_ADAPTERS = "token_lora_mapping_ptr adapter_enabled_ptr lora_ranks_ptr"


class _Schedule(Filling):
    """What both schedules do."""

    op = FILL
    check = check_fill


def _of_adapters(problem: Problem, num_warps: int) -> dict[str, Any]:
    """The constants of what counts the adapters of rows."""
    groups = max(8, runtime.next_power_of_2(problem.max_loras + 1))
    most = counted_pairs(problem.num_pairs, problem.top_k)
    width = runtime.next_power_of_2(2 * runtime.cdiv(most, problem.num_experts))  # holds those of most experts
    return {
        "TOP_K": problem.top_k,
        "MAX_LORAS": problem.max_loras,
        "BLOCK_M": problem.block_m,
        "GROUPS": groups,
        "WIDTH": max(16, min(width, _SUMS * num_warps // groups)),
        "PDL": runtime.traits(problem.device).pdl,
    }


class OneLaunch(_Schedule):
    """Launches of one_launch."""

    def __init__(self, kernel: Any) -> None:
        super().__init__(kernel)
        self._kernel = runtime.Launcher(kernel, FILL, f"{_TABLES} {_RUNS} {_ROUTING} {_ADAPTERS}")

    def scratch_size(self, num_pairs: int, num_experts: int) -> int:
        return num_pairs

    def bind(self, problem: Problem) -> runtime.Call:
        over = walk(problem.num_pairs, problem.top_k, problem.num_experts)
        return self._kernel.bind(
            problem.num_experts,
            runtime.Options(over.num_warps),
            num_pairs=problem.num_pairs,
            **_of_adapters(problem, over.num_warps),
            NUM_EXPERTS=problem.num_experts,
            LOCAL_EXPERT_START=problem.local_expert_start,
            DENSE=over.dense,
            SIZE=over.counters,
            ROWS=over.rows,
        )


class ThreeLaunch(_Schedule):
    """Launches of three_launch."""

    def __init__(self, count: Any, place: Any, order: Any) -> None:
        super().__init__(count)
        self._count = runtime.Launcher(count, FILL, _ROUTING)
        self._place = runtime.Launcher(place, FILL, f"gathered_ptr=scratch blocks_ptr num_blocks_ptr {_ROUTING}")
        self._order = runtime.Launcher(order, FILL, f"{_TABLES} {_RUNS} {_ADAPTERS}")

    def scratch_size(self, num_pairs: int, num_experts: int) -> int:
        return num_pairs + counts_size(num_experts)

    def bind(self, problem: Problem) -> runtime.Call:
        num_pairs, over = problem.num_pairs, chunks(problem.num_pairs, problem.num_experts)
        constants = {
            **_of_adapters(problem, 16),
            "counts_ptr": runtime.GIVEN.scratch[num_pairs:],
            "num_pairs": num_pairs,
            "num_chunks": over.number,
            "NUM_EXPERTS": problem.num_experts,
            "LOCAL_EXPERT_START": problem.local_expert_start,
            "CHUNK": over.pairs,
            "SIZE": over.counters,
        }
        count = self._count.bind(over.number, runtime.Options(4), **constants)
        options = runtime.Options(over.num_warps, pdl=constants["PDL"])
        place = self._place.bind(over.number, options, **constants, ROWS=over.rows)
        options = runtime.Options(16, pdl=constants["PDL"])
        order = self._order.bind(problem.num_experts, options, **constants, BLOCKS=_BLOCKS)
        return runtime.InOrder((count, place, order))
