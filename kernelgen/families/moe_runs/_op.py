"""Which pairs of a batch go to which local expert, and which of them have which adapter: tables on the device, for products that
add their adapters themselves.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, NamedTuple

import torch

from .. import _operands as operands
from .. import _runtime as runtime
from .._routing import INT32, AdapterEnabled, LoraRanks, TokenLoraMapping, TopkIds
from ..moe_align._op import (
    BLOCK_MS,
    NO_PAIRS,
    MoeTables,
    NumExperts,
    NumTokensHint,
    ValidTokens,
    check_blocks,
    counts_size,
    default_block_m,
    in_chunks,
    most_tables,
)
from ._table import VARIANTS

__all__ = ["MoeRuns", "moe_runs"]

_MaxLoras = Annotated[int, operands.Int(1, 4095, size="L")]  # a program counts them


@operands.bundle(tables=("run_of_row", "runs"))
class MoeRuns(NamedTuple):
    """The adapters of a batch, and what each block of its tables holds of them.

    A pair has the adapter of its token where that is in [0, max_loras) and enabled, else none. A run is the rows of a block
    that have one adapter; they stand side by side. They go with the tables that ``moe_runs`` returned beside them, and with the
    fields beside them: an op refuses others, and runs that were edited so that some of them are of others.
    """

    token_lora_mapping: TokenLoraMapping
    adapter_enabled: AdapterEnabled
    # the run of each row in its block, -1: no adapter; None: no tables
    run_of_row: Annotated[torch.Tensor | None, operands.Tensor("T*top_k", *INT32)]
    # of a block from the place of its rows on: adapter (and ranks), first row
    runs: Annotated[torch.Tensor | None, operands.Tensor("T*top_k, 2", *INT32)]
    max_loras: _MaxLoras
    lora_ranks: LoraRanks = None  # how many ranks of each adapter count; None: all


def moe_runs(
    topk_ids: torch.Tensor,
    token_lora_mapping: torch.Tensor,
    *,
    num_experts: int,
    max_loras: int,
    adapter_enabled: torch.Tensor | None = None,
    lora_ranks: torch.Tensor | None = None,
    valid_tokens: torch.Tensor | None = None,
    num_tokens_hint: int | None = None,
    local_expert_start: int = 0,
    block_m: int | None = None,
    workspace: torch.Tensor | None = None,
) -> tuple[MoeTables, MoeRuns]:
    """The tables of a batch with adapters in one launch: no host sync, and a captured CUDA graph stays right for every routing.

    Their order is that of (expert, adapter, pair), pairs without an adapter first, whatever the GPU does first. They stand in
    for those of ``moe_align``.

    Args:
        topk_ids: [T, top_k] int32 or int64, global ids of the experts of each token.
        token_lora_mapping: [T] int32, the adapter of each token; -1, or what is not in [0, max_loras): none.
        num_experts: experts in the weights (E, the local ones under expert parallelism).
        max_loras: adapters in the weights (L).
        adapter_enabled: [>= max_loras] int32, 0: tokens with this adapter have none; None: all are enabled.
        lora_ranks: [>= max_loras] int32, how many of the ranks of each adapter count: rows of A and columns of B behind them are
            zero, and hardly read; None: all.
        valid_tokens: int32 on the device, how many of the T rows are tokens; None: all.
        num_tokens_hint: how many tokens to expect, for the sizes of blocks and grids; None: T. Any number is right.
        local_expert_start: the global id of the first expert in the weights.
        block_m: rows of a block, None: from the mean number of pairs of an expert; 0: no tables, for products of few pairs, which
            need none; then nothing is launched.
        workspace: int32 memory of at least ``run_size`` elements; None allocates.

    Raises:
        ValueError: a shape, dtype, device or option that does not fit; nothing was launched.
    """
    adapters = (token_lora_mapping, adapter_enabled)
    routing = (num_experts, local_expert_start, num_tokens_hint, block_m)
    tensors = (topk_ids, valid_tokens, *adapters, lora_ranks)
    plan = None if torch.compiler.is_compiling() else _plan(*tensors, workspace, *routing, max_loras)
    num_tokens, top_k = topk_ids.shape
    tokens_hint = num_tokens if num_tokens_hint is None or block_m == 0 else num_tokens_hint
    block_m = plan.block_m if plan is not None else -1 if block_m is None else block_m
    sizes = (num_tokens, top_k, num_experts, local_expert_start, tokens_hint, block_m)
    if block_m == 0:
        tables = MoeTables(topk_ids, valid_tokens, None, None, None, *sizes)
        of_batch = MoeRuns(*adapters, None, None, max_loras, lora_ranks)
    else:
        if workspace is None:
            size = run_size(num_tokens, top_k, num_experts)
            workspace = torch.empty(size, dtype=torch.int32, device=topk_ids.device)
        pairs, blocks, num_blocks, run_of_row, runs, scratch = _split(workspace, num_tokens, top_k, num_experts)
        tables = MoeTables(topk_ids, valid_tokens, pairs, blocks, num_blocks, *sizes)
        of_batch = MoeRuns(*adapters, run_of_row, runs, max_loras, lora_ranks)
    if plan is None:
        if block_m != 0:
            _in_graphs(*tensors, workspace, *routing, max_loras)
        return tables, of_batch
    if block_m != 0:
        filled, groups = (pairs, blocks, num_blocks, run_of_row, runs, scratch), (num_experts, local_expert_start, max_loras)
        plan.fill.run(Fill(*filled, *tensors, *groups, plan.block_m))
        of_batch.__dict__["order"] = tables.pairs
    return operands.alike(tables, plan.looks_of_tables), operands.alike(of_batch, plan.looks_of_runs)


class Given(NamedTuple):
    """What moe_runs is given."""

    topk_ids: TopkIds
    valid_tokens: ValidTokens
    token_lora_mapping: TokenLoraMapping
    adapter_enabled: AdapterEnabled
    lora_ranks: LoraRanks
    workspace: Annotated[torch.Tensor | None, operands.Tensor("*", *INT32, written=True)]
    num_experts: NumExperts
    local_expert_start: operands.Count
    num_tokens_hint: NumTokensHint
    block_m: Annotated[int | None, operands.Int(one_of=(0, *BLOCK_MS))]
    max_loras: _MaxLoras


OP = operands.Op("moe_runs", Given, first=("topk_ids",))


def _check_runs(op: str, name: str, runs: MoeRuns) -> None:
    """Raise ValueError where one of both tables is missing."""
    missing = [field for field in ("run_of_row", "runs") if getattr(runs, field) is None]
    if len(missing) == 1:
        runtime.fail(op, f"{name}.{missing[0]}", None, "run_of_row and runs, or neither", "make it with moe_runs")


def _check_tables(op: str, name: str, runs: MoeRuns, tables: MoeTables) -> None:
    """Raise ValueError where runs are of other tables than those they come with."""
    if (tables.block_m == 0) != (runs.runs is None):
        got, wanted = ("with", "without") if tables.block_m == 0 else ("without", "with")
        runtime.fail(op, name, f"runs {got} tables", f"runs {wanted} tables", "moe_runs returns the tables that they go with")
    order = runs.__dict__.get("order")
    if order is not None and (tables.pairs is None or order.data_ptr() != tables.pairs.data_ptr()):
        runtime.fail(op, name, "those of other tables", "those of tables", "moe_runs returns the tables that they go with")


RUNS = operands.Bundle(
    MoeRuns, maker="moe_runs", whole=_check_runs, goes_with=("tables", _check_tables), asks=("schedule", "adapted")
)
Runs = Annotated[MoeRuns, RUNS]  # what an op on them takes
# Where launchers find what kernels read of them.
OF_RUNS = (
    "token_lora_mapping_ptr=runs.token_lora_mapping adapter_enabled_ptr=runs.adapter_enabled lora_ranks_ptr=runs.lora_ranks "
    "run_of_row_ptr=runs.run_of_row runs_ptr=runs.runs"
)


def run_size(num_tokens: int, top_k: int, num_experts: int) -> int:
    """int32 elements of a workspace for up to ``num_tokens`` tokens, whatever block size is chosen."""
    return most_tables(num_tokens, top_k, num_experts) + runs_size(num_tokens * top_k, num_experts)


def runs_size(num_pairs: int, num_experts: int) -> int:
    """int32 elements beside the tables, for up to so many pairs."""
    return 4 * num_pairs + counts_size(num_experts)


def split(buffer: torch.Tensor, num_pairs: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """run_of_row, runs and scratch, in a buffer."""
    return buffer[:num_pairs], buffer[num_pairs : 3 * num_pairs].view(num_pairs, 2), buffer[3 * num_pairs :]


_Buffers = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def _split(buffer: torch.Tensor, num_tokens: int, top_k: int, num_experts: int) -> _Buffers:
    """pairs, blocks and num_blocks, then as ``split``, in a workspace."""
    num_pairs, size = num_tokens * top_k, most_tables(num_tokens, top_k, num_experts)
    sizes = (1, 3, num_pairs, size - 4 - num_pairs)
    num_blocks, _, pairs, blocks, rest = buffer.split_with_sizes((*sizes, buffer.shape[0] - size))
    return pairs, blocks, num_blocks, *split(rest, num_pairs)


def settled_block_m(tables: MoeTables) -> int:
    """Rows of a block; a graph of torch.compile leaves them open, and they are settled as moe_align does."""
    if tables.block_m >= 0:
        return tables.block_m
    return default_block_m(max(tables.tokens_hint, 1), tables.top_k, tables.num_experts)


class Fill(NamedTuple):
    """What the launchers of single variants are given; moe_runs makes the buffers."""

    pairs: Annotated[torch.Tensor, operands.Tensor(">=T*top_k", *INT32, written=True)]
    blocks: Annotated[torch.Tensor, operands.Tensor(("*, 3", "*"), *INT32, written=True)]
    num_blocks: Annotated[torch.Tensor, operands.Tensor("1", *INT32, written=True)]
    run_of_row: Annotated[torch.Tensor, operands.Tensor(">=T*top_k", *INT32, written=True)]
    runs: Annotated[torch.Tensor, operands.Tensor(">=T*top_k, 2", *INT32, written=True)]
    scratch: Annotated[torch.Tensor, operands.Tensor("*", *INT32, written=True)]
    topk_ids: TopkIds
    valid_tokens: ValidTokens
    token_lora_mapping: TokenLoraMapping
    adapter_enabled: AdapterEnabled
    lora_ranks: LoraRanks
    num_experts: NumExperts
    local_expert_start: operands.Count
    max_loras: _MaxLoras
    block_m: Annotated[int, operands.Int(one_of=BLOCK_MS)]


FILL = operands.Op("moe_runs_fill", Fill)


class Problem(NamedTuple):
    """What the launch that makes tables depends on."""

    num_pairs: int
    top_k: int
    num_experts: int
    local_expert_start: int
    max_loras: int
    block_m: int
    device: torch.device


def check_fill(variant: str, scratch_size: Callable[[int, int], int], given: Fill) -> Problem:
    """The problem of a call; ``scratch_size``: of its variant.

    Raises:
        ValueError: says which does not fit, what it is and what was wanted.
    """
    sizes = FILL.check(variant, given)
    check_blocks(variant, given.blocks, sizes, given.block_m)
    num_pairs = sizes["T"] * sizes["top_k"]
    wanted = scratch_size(num_pairs, sizes["E"])
    if given.scratch.shape[0] < wanted:
        runtime.fail(variant, "scratch", runtime.describe(given.scratch), f"at least {wanted} elements")
    routing = (sizes["top_k"], sizes["E"], given.local_expert_start, sizes["L"])
    return Problem(num_pairs, *routing, given.block_m, given.topk_ids.device)


class _Plan(NamedTuple):
    """A checked request: what moe_runs works out once for inputs of the same looks."""

    block_m: int
    fill: runtime.Call
    looks_of_tables: list[object]
    looks_of_runs: list[object]


def _bind(given: Given) -> _Plan:
    sizes = OP.check("moe_runs", given)
    num_tokens, top_k = sizes["T"], sizes["top_k"]
    if given.block_m == 0:
        return _Plan(0, NO_PAIRS, [], [])
    size, device = run_size(num_tokens, top_k, given.num_experts), given.topk_ids.device
    if given.workspace is not None and given.workspace.shape[0] < size:
        wanted = f"[>= {size}] int32 on {device}"
        runtime.fail("moe_runs", "workspace", runtime.describe(given.workspace), wanted, "ask run_size of this module")
    block_m = given.block_m or default_block_m(given.num_tokens_hint or num_tokens, top_k, given.num_experts)
    groups = (given.num_experts, given.local_expert_start, given.max_loras)
    return _Plan(block_m, bind(Problem(num_tokens * top_k, top_k, *groups, block_m, device)), [], [])


def bind(problem: Problem) -> runtime.Call:
    """The launches for batches of these sizes."""
    if problem.num_pairs == 0:
        return NO_PAIRS
    schedule = "three_launch" if in_chunks(problem.num_pairs, problem.num_experts) else "one_launch"
    call: runtime.Call = VARIANTS.get("moe_runs", schedule=schedule).bind(problem)
    return call


_plan = OP.finder(_bind)


def _runs(*arguments: Any) -> None:
    given = Given(*arguments)
    plan, (num_tokens, top_k) = _plan(*given), given.topk_ids.shape
    assert given.workspace is not None
    pairs, blocks, num_blocks, run_of_row, runs, scratch = _split(given.workspace, num_tokens, top_k, given.num_experts)
    filled, routing = (pairs, blocks, num_blocks, run_of_row, runs, scratch), (given.topk_ids, given.valid_tokens)
    adapters = (given.token_lora_mapping, given.adapter_enabled, given.lora_ranks)
    groups = (given.num_experts, given.local_expert_start, given.max_loras)
    plan.fill.run(Fill(*filled, *routing, *adapters, *groups, plan.block_m))  # type: ignore[arg-type]


_in_graphs = OP.in_graphs(_runs)
