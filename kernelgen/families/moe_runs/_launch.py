"""moe_runs where it is launched."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from .. import _runtime as runtime
from ..moe_align._launch import walk
from ._op import Problem, check_fill

_SUMS = 128  # of rows by adapters, that a warp holds at a time
_WRITTEN = "pairs_ptr blocks_ptr num_blocks_ptr run_of_row_ptr runs_ptr gathered_ptr"
_READ = "topk_ids_ptr valid_tokens_ptr token_lora_mapping_ptr adapter_enabled_ptr lora_ranks_ptr num_pairs"


class OneLaunch:
    """Launches of the single variant."""

    def __init__(self, kernel: Any) -> None:
        self.name = runtime.variant_of(kernel)
        self._kernel = runtime.Launcher(kernel, f"{_WRITTEN} {_READ}")

    def launch(
        self,
        pairs: Tensor,
        blocks: Tensor,
        num_blocks: Tensor,
        run_of_row: Tensor,
        runs: Tensor,
        gathered: Tensor,
        topk_ids: Tensor,
        valid_tokens: Tensor | None,
        token_lora_mapping: Tensor,
        adapter_enabled: Tensor | None,
        lora_ranks: Tensor | None,
        num_experts: int,
        local_expert_start: int,
        max_loras: int,
        block_m: int,
    ) -> None:
        """One call, checked.

        Raises:
            ValueError: something does not fit; nothing was launched.
        """
        written = (pairs, blocks, num_blocks, run_of_row, runs, gathered)
        read = (topk_ids, valid_tokens, token_lora_mapping, adapter_enabled, lora_ranks)
        problem = check_fill(self.name, *written, *read, num_experts, local_expert_start, max_loras, block_m)
        self.bind(problem)(*written, *read)

    def bind(self, problem: Problem) -> Callable[..., None]:
        """The launch for tables of these sizes, ready to be made again and again."""
        over = walk(problem.num_pairs, problem.top_k, problem.num_experts)
        groups = max(8, runtime.next_power_of_2(problem.max_loras + 1))
        launch = self._kernel.bind(
            problem.num_experts,
            runtime.Options(over.num_warps),
            TOP_K=problem.top_k,
            NUM_EXPERTS=problem.num_experts,
            LOCAL_EXPERT_START=problem.local_expert_start,
            MAX_LORAS=problem.max_loras,
            BLOCK_M=problem.block_m,
            DENSE=over.dense,
            SIZE=over.counters,
            ROWS=over.rows,
            GROUPS=groups,
            WIDTH=max(16, _SUMS * over.num_warps // groups),
            PDL=runtime.traits(problem.device).pdl,
        )
        num_pairs = problem.num_pairs

        def call(
            pairs: Tensor,
            blocks: Tensor,
            num_blocks: Tensor,
            run_of_row: Tensor,
            runs: Tensor,
            gathered: Tensor,
            topk_ids: Tensor,
            valid_tokens: Tensor | None,
            token_lora_mapping: Tensor,
            adapter_enabled: Tensor | None,
            lora_ranks: Tensor | None,
        ) -> None:
            written, read = (pairs, blocks, num_blocks, run_of_row, runs, gathered), (topk_ids, valid_tokens)
            launch.run(*written, *read, token_lora_mapping, adapter_enabled, lora_ranks, num_pairs)

        return call
