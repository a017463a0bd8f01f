"""Which pairs of a batch go to which local expert: tables on the device, shared by the products of an MoE layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, NamedTuple, NoReturn

import torch

from .. import _operands as operands
from .. import _runtime as runtime
from .._routing import INT32, ExpertMap, TopkIds
from ._table import VARIANTS

__all__ = ["MoeTables", "local_ids", "moe_align", "no_tables"]

BLOCK_MS = (16, 32, 64, 128)
_FEW_PAIRS = 16384  # up to so many are sorted in one launch, whose programs each count all pairs
CHUNKS = 128  # at most, that pairs are counted in by two launches

# What ops on the routing of a base layer take of it.
ValidTokens = Annotated[torch.Tensor | None, operands.Tensor(("1", ""), *INT32)]
NumExperts = Annotated[int, operands.Int(1, 4096, size="E")]  # a program counts them
NumTokensHint = Annotated[int | None, operands.Int(1)]


@operands.bundle(tables=("pairs", "blocks", "num_blocks"), free=("tokens_hint",))
class MoeTables(NamedTuple):
    """The routing of T tokens with top_k experts each, and its tables. Pair p = t * top_k + j; E = num_experts.

    A pair is local when t is below ``valid_tokens`` and topk_ids[t, j] - local_expert_start is in [0, E). Tables are of the
    fields beside them: an op refuses such that were edited so that some of them are of others; ``tokens_hint`` may be any.
    """

    topk_ids: TopkIds  # global ids
    valid_tokens: ValidTokens  # None: all T
    pairs: Annotated[torch.Tensor | None, operands.Tensor(">=T*top_k", *INT32)]  # local ones by expert; None: no tables
    # expert, first, rows; no rows: nothing to do
    blocks: Annotated[torch.Tensor | None, operands.Tensor((">=max_blocks, 3", ">=3*max_blocks"), *INT32)]
    num_blocks: Annotated[torch.Tensor | None, operands.Tensor("1", *INT32)]
    num_tokens: Annotated[int, operands.Int(size="T")]
    top_k: Annotated[int, operands.Int(1, size="top_k")]
    num_experts: NumExperts
    local_expert_start: operands.Count
    tokens_hint: operands.Count  # tokens that grids are sized for; any number is right
    # rows of a block at most, 0: there are no tables; -1: left open by a graph of torch.compile
    block_m: Annotated[int, operands.Int(-1, one_of=(0, *BLOCK_MS, -1))]


def moe_align(
    topk_ids: torch.Tensor,
    *,
    num_experts: int,
    valid_tokens: torch.Tensor | None = None,
    num_tokens_hint: int | None = None,
    local_expert_start: int = 0,
    expert_map: torch.Tensor | None = None,
    block_m: int | None = None,
    workspace: torch.Tensor | None = None,
) -> MoeTables:
    """The tables of a batch in a launch or two: no host sync, and a captured CUDA graph stays right when routing changes.

    Their order is that of (expert, pair), whatever the GPU does first. Pairs that are not local are absent.

    Args:
        topk_ids: [T, top_k] int32 or int64, global ids of the experts of each token.
        num_experts: experts in the weights (E, the local ones under expert parallelism).
        valid_tokens: int32 on the device, how many of the T rows are tokens; None: all.
        num_tokens_hint: how many tokens to expect, for the sizes of blocks and grids; None: T. Any number is right.
        local_expert_start: the global id of the first expert in the weights.
        expert_map: [global experts] int32, global to local expert, -1: not here; in place of ``local_expert_start``. The tables
            then have ``local_ids`` for ``topk_ids``, made in a launch in front, which is what other ops on the batch take.
        block_m: rows of a block, None: from the mean number of pairs of an expert.
        workspace: int32 memory of at least ``table_size`` elements, with an ``expert_map`` T * top_k + 3 more; None allocates.

    Raises:
        ValueError: a shape, dtype, device or option that does not fit; nothing was launched.
    """
    request = (topk_ids, valid_tokens, expert_map, num_experts, local_expert_start, num_tokens_hint, block_m)
    if torch.compiler.is_compiling():
        num_tokens, top_k = topk_ids.shape
        block_m = -1 if block_m is None else block_m
        splits = _open_splits(num_tokens, top_k, num_experts, expert_map is not None)
        size = sum(splits)
    else:
        plan = _plan(*request, workspace)
        num_tokens, top_k, block_m, size, splits, *_ = plan
    if workspace is None:
        workspace = torch.empty(size, dtype=torch.int32, device=topk_ids.device)
    num_blocks, pairs, blocks, scratch, out = _views(workspace, size, splits, topk_ids, expert_map)
    if torch.compiler.is_compiling():
        _in_graphs(*request, workspace)
    elif expert_map is not None:
        plan.localize.run(Localize(out, topk_ids, expert_map))
    topk_ids, tokens_hint = out, num_tokens if num_tokens_hint is None else num_tokens_hint
    sizes = (num_tokens, top_k, num_experts, local_expert_start, tokens_hint, block_m)
    tables = MoeTables(topk_ids, valid_tokens, pairs, blocks, num_blocks, *sizes)
    if torch.compiler.is_compiling():
        return tables
    plan.fill.run(Fill(pairs, blocks, num_blocks, scratch, topk_ids, valid_tokens, num_experts, local_expert_start, block_m))
    return operands.alike(tables, plan.looks)


def local_ids(topk_ids: torch.Tensor, expert_map: torch.Tensor, *, out: torch.Tensor | None = None) -> torch.Tensor:
    """The local ids of the experts of each token, where ``expert_map`` says which are here: what other ops take for ``topk_ids``.

    One launch, and a captured CUDA graph stays right when the routing or the map changes.

    Args:
        topk_ids: [T, top_k] int32 or int64, global ids.
        expert_map: [global experts] int32, the local id of each, -1: not here. An id that is not in it is nowhere.
        out: contiguous [T, top_k] int32; None: a new tensor.

    Raises:
        ValueError: something does not fit; nothing was launched.
    """
    if out is None:
        try:
            out = torch.empty(topk_ids.shape, dtype=torch.int32, device=topk_ids.device)
        except AttributeError as error:
            LOCALIZE.refuse(LOCALIZE.given(topk_ids=topk_ids, expert_map=expert_map), error)
    (_local_in_graphs if torch.compiler.is_compiling() else _local)(out, topk_ids, expert_map)
    return out


def no_tables(
    topk_ids: torch.Tensor,
    *,
    num_experts: int,
    valid_tokens: torch.Tensor | None = None,
    local_expert_start: int = 0,
) -> MoeTables:
    """The routing alone, for products of few pairs, which need no tables; launches nothing.

    Raises:
        ValueError: as ``moe_align``.
    """
    looks = None if torch.compiler.is_compiling() else _routing(topk_ids, valid_tokens, num_experts, local_expert_start)
    num_tokens, top_k = topk_ids.shape
    tokens_hint = num_tokens
    sizes = (num_tokens, top_k, num_experts, local_expert_start, tokens_hint, 0)
    tables = MoeTables(topk_ids, valid_tokens, None, None, None, *sizes)
    return tables if looks is None else operands.alike(tables, looks)


class Given(NamedTuple):
    """What moe_align is given."""

    topk_ids: TopkIds
    valid_tokens: ValidTokens
    expert_map: ExpertMap | None
    num_experts: NumExperts
    local_expert_start: operands.Count
    num_tokens_hint: NumTokensHint
    block_m: Annotated[int | None, operands.Int(one_of=BLOCK_MS)]
    workspace: Annotated[torch.Tensor | None, operands.Tensor("*", *INT32, written=True)]


OP = operands.Op("moe_align", Given)


class Localize(NamedTuple):
    """What local_ids is given."""

    out: Annotated[torch.Tensor, operands.Tensor("T, top_k", *INT32, made=True, written=True)]
    topk_ids: TopkIds
    expert_map: ExpertMap


LOCALIZE = operands.Op("local_ids", Localize, first=("topk_ids",))


class _Routing(NamedTuple):
    topk_ids: TopkIds
    valid_tokens: ValidTokens
    num_experts: NumExperts
    local_expert_start: operands.Count


_NO_TABLES = operands.Op("no_tables", _Routing)


class Fill(NamedTuple):
    """What the launchers of single variants are given; moe_align makes the buffers."""

    pairs: Annotated[torch.Tensor, operands.Tensor(">=T*top_k", *INT32, written=True)]
    blocks: Annotated[torch.Tensor, operands.Tensor(("*, 3", "*"), *INT32, written=True)]
    num_blocks: Annotated[torch.Tensor, operands.Tensor("1", *INT32, written=True)]
    scratch: Annotated[torch.Tensor, operands.Tensor("*", *INT32, written=True)]
    topk_ids: TopkIds
    valid_tokens: ValidTokens
    num_experts: NumExperts
    local_expert_start: operands.Count
    block_m: Annotated[int, operands.Int(one_of=BLOCK_MS)]


FILL = operands.Op("moe_align_fill", Fill)


class Problem(NamedTuple):
    """What the launches that make tables depend on."""

    num_pairs: int
    top_k: int
    num_experts: int
    local_expert_start: int
    block_m: int
    device: torch.device


def check_fill(variant: str, scratch_size: Callable[[int, int], int], given: Fill) -> Problem:
    """The problem of a call; ``scratch_size``: of its variant.

    Raises:
        ValueError: says which does not fit, what it is and what was wanted.
    """
    sizes = FILL.check(variant, given)
    check_blocks(variant, given.blocks, sizes, given.block_m)
    num_pairs, routing = sizes["T"] * sizes["top_k"], (sizes["top_k"], sizes["E"], given.local_expert_start)
    needed = scratch_size(num_pairs, sizes["E"])
    if given.scratch.numel() < needed:
        runtime.fail(variant, "scratch", runtime.describe(given.scratch), f"at least {needed} elements")
    return Problem(num_pairs, *routing, given.block_m, given.topk_ids.device)


def check_local_ids(variant: str, given: Localize) -> int:
    """The pairs of a call, once its arguments are known to fit.

    Raises:
        ValueError: says which does not, what it is and what was wanted.
    """
    sizes = LOCALIZE.check(variant, given)
    return int(sizes["T"] * sizes["top_k"])


def fail_start(op: str, local_expert_start: int) -> NoReturn:
    """Raise the error of a call that says twice which experts are here.

    Raises:
        ValueError: always.
    """
    runtime.fail(op, "local_expert_start", local_expert_start, 0, "expert_map says which experts are here")


def _splits(num_pairs: int, blocks: int, scratch: int, with_ids: bool) -> tuple[int, ...]:
    """Elements of num_blocks, a gap, pairs, blocks, scratch, a gap, and local ids where there is a map: 16-byte aligned."""
    size = 4 + num_pairs + blocks + scratch
    return 1, 3, num_pairs, blocks, scratch, *(((size + 3) // 4 * 4 - size, num_pairs) if with_ids else (0, 0))


def _views(
    workspace: torch.Tensor, size: int, splits: tuple[int, ...], topk_ids: torch.Tensor, expert_map: torch.Tensor | None
) -> tuple[torch.Tensor, ...]:
    """num_blocks, pairs, blocks and scratch of such ``splits`` in a workspace, and the ids that tables are of."""
    num_blocks, _, pairs, blocks, scratch, _, ids, _ = workspace.split_with_sizes((*splits, workspace.shape[0] - size))
    return num_blocks, pairs, blocks, scratch, topk_ids if expert_map is None else ids.view(topk_ids.shape)


def _open_splits(num_tokens: int, top_k: int, num_experts: int, with_ids: bool) -> tuple[int, ...]:
    """As ``_splits``, with room for blocks of any height, and without a branch on the number of tokens."""
    num_pairs = num_tokens * top_k
    return _splits(num_pairs, _most_blocks(num_pairs, num_experts), counts_size(num_experts), with_ids)


def _most_blocks(num_pairs: int, num_experts: int) -> int:
    return 3 * (num_experts + num_pairs // 16)


def most_tables(num_tokens: int, top_k: int, num_experts: int) -> int:
    """int32 elements of num_blocks, a gap, pairs, and blocks of any height."""
    return 4 + num_tokens * top_k + _most_blocks(num_tokens * top_k, num_experts)


def check_blocks(variant: str, blocks: torch.Tensor, sizes: operands.Sizes, block_m: int) -> None:
    """Raise ValueError where there is no room for the blocks of such a batch."""
    size = 3 * max_blocks(sizes["T"], sizes["top_k"], sizes["E"], block_m)
    if blocks.numel() < size:
        runtime.fail(variant, "blocks", runtime.describe(blocks), f"at least {size} elements")


def _check_tables(op: str, name: str, tables: MoeTables) -> None:
    """Raise ValueError where tables are not all there."""
    for field in ("pairs", "blocks", "num_blocks"):
        if tables.block_m != 0 and getattr(tables, field) is None:
            runtime.fail(op, f"{name}.{field}", None, f"a tensor, with blocks of {tables.block_m}", "make it with moe_align")


def _table_sizes(tables: MoeTables) -> dict[str, int]:
    """Blocks that tables have at least; 0 where a graph of torch.compile leaves their rows open."""
    sizes = (tables.num_tokens, tables.top_k, tables.num_experts, tables.block_m)
    return {"max_blocks": max_blocks(*sizes) if tables.block_m > 0 else 0}


TABLES = operands.Bundle(MoeTables, maker="moe_align", sizes=_table_sizes, whole=_check_tables, asks=("schedule",))
Tables = Annotated[MoeTables, TABLES]  # what an op on them takes
# Where launchers find what kernels read of them.
OF_TABLES = (
    "topk_ids_ptr=tables.topk_ids valid_tokens_ptr=tables.valid_tokens "
    "pairs_ptr=tables.pairs blocks_ptr=tables.blocks num_blocks_ptr=tables.num_blocks"
)


def default_block_m(num_tokens: int, top_k: int, num_experts: int, fp8: bool = False) -> int:
    """Rows of a block: near the mean number of pairs of an expert that is hit, if they spread evenly.

    Tall blocks pay early: they read weights once where two lower ones would; of FP8 weights that is half as much.
    """
    num_pairs = runtime.next_power_of_2(num_tokens) * top_k
    mean = num_pairs / experts_hit(num_pairs, num_experts)
    return 16 if mean < 12 else 32 if mean < 24 else 64 if mean < (96 if fp8 else 48) else 128


def experts_hit(num_pairs: int, num_experts: int) -> float:
    """How many experts have a pair, if pairs spread evenly."""
    return num_experts * (1.0 - (1.0 - 1.0 / num_experts) ** num_pairs)


def is_dense(num_tokens: int, top_k: int, num_experts: int) -> bool:
    """Whether blocks are counted so that there are no entries without rows: where those would be many."""
    return runtime.next_power_of_2(num_tokens) * top_k < 4 * num_experts


def max_blocks(num_tokens: int, top_k: int, num_experts: int, block_m: int) -> int:
    """How many entries the blocks of so many tokens can take at most."""
    num_pairs = num_tokens * top_k
    if not is_dense(num_tokens, top_k, num_experts):
        return num_experts + num_pairs // block_m
    experts = min(num_pairs, num_experts)
    return experts + (num_pairs - experts) // block_m


def max_rows(tokens_hint: int, top_k: int, num_experts: int, block_m: int) -> int:
    """Rows of the blocks for the tokens that are expected; where there are more, programs stride over them."""
    return max_blocks(max(tokens_hint, 1), top_k, num_experts, block_m) * block_m


def counts_size(num_experts: int) -> int:
    """int32 elements of scratch for the counts of each chunk."""
    return CHUNKS * counters(num_experts)


def counters(num_experts: int) -> int:
    """Elements of a tile that has a counter for each expert."""
    return max(32, runtime.next_power_of_2(num_experts))


def table_size(num_tokens: int, top_k: int, num_experts: int) -> int:
    """int32 elements of a workspace for up to ``num_tokens`` tokens, whatever block size is chosen."""
    return sum(_open_splits(num_tokens, top_k, num_experts, False))


class _Plan(NamedTuple):
    """A checked request: what moe_align works out once for inputs of the same looks."""

    num_tokens: int
    top_k: int
    block_m: int
    size: int  # of the buffer
    splits: tuple[int, ...]  # as _splits
    localize: runtime.Call
    fill: runtime.Call
    looks: list[object]  # of its tables


def _bind(given: Given) -> _Plan:
    sizes = OP.check("moe_align", given)
    num_tokens, top_k, num_experts, expert_map = sizes["T"], sizes["top_k"], given.num_experts, given.expert_map
    block_m = given.block_m or default_block_m(given.num_tokens_hint or num_tokens, top_k, num_experts)
    num_pairs = num_tokens * top_k
    most = 3 * max_blocks(num_tokens, top_k, num_experts, block_m)
    splits = _splits(num_pairs, most, scratch_size(num_pairs, num_experts), expert_map is not None)
    localize: runtime.Call = runtime.NOTHING
    if expert_map is not None:
        if given.local_expert_start != 0:
            fail_start("moe_align", given.local_expert_start)
        localize = bind_local(num_pairs, expert_map.shape[0])
    size = sum(splits)
    device = given.topk_ids.device
    if given.workspace is not None and given.workspace.shape[0] < size:
        wanted = f"[>= {size}] int32 on {device}"
        runtime.fail("moe_align", "workspace", runtime.describe(given.workspace), wanted, "ask table_size of this module")
    fill: runtime.Call = NO_PAIRS
    if num_pairs > 0:
        fill = bind(Problem(num_pairs, top_k, num_experts, given.local_expert_start, block_m, device))
    return _Plan(num_tokens, top_k, block_m, size, splits, localize, fill, [])


def bind(problem: Problem) -> runtime.Call:
    """The launches that make tables of these sizes."""
    call: runtime.Call = _variant(problem.num_pairs, problem.num_experts).bind(problem)
    return call


def _variant(num_pairs: int, num_experts: int) -> Any:
    return VARIANTS.get("moe_align", schedule="two_launch" if in_chunks(num_pairs, num_experts) else "one_launch")


def in_chunks(num_pairs: int, num_experts: int) -> bool:
    """Whether so many pairs are sorted chunk by chunk: each program then holds all experts of its rows."""
    return num_pairs > _FEW_PAIRS and num_experts <= 256


def scratch_size(num_pairs: int, num_experts: int) -> int:
    """int32 elements of scratch that the launches need; of fewer pairs no more."""
    size: int = _variant(num_pairs, num_experts).scratch_size(num_pairs, num_experts)
    return size


NO_PAIRS = runtime.OnHost(torch.Tensor.zero_, runtime.GIVEN.num_blocks)  # of an empty batch


def _no_plan(given: _Routing) -> list[object]:
    _NO_TABLES.check("no_tables", given)
    return []


def _bind_local(given: Localize) -> runtime.Call:
    return bind_local(check_local_ids("local_ids", given), given.expert_map.shape[0])


def bind_local(num_pairs: int, global_experts: int) -> runtime.Call:
    """The launch that writes local ids."""
    if num_pairs == 0:
        return runtime.NOTHING
    call: runtime.Call = VARIANTS.get("local_ids", schedule="local_ids").bind(num_pairs, global_experts)
    return call


_local = LOCALIZE.caller(_bind_local)
_local_in_graphs = LOCALIZE.in_graphs(_local)
_plan, _routing = OP.finder(_bind), _NO_TABLES.finder(_no_plan)


def _align(*arguments: Any) -> None:
    given = Given(*arguments)
    plan, topk_ids, expert_map = _plan(*given), given.topk_ids, given.expert_map
    assert given.workspace is not None
    num_blocks, pairs, blocks, scratch, out = _views(given.workspace, plan.size, plan.splits, topk_ids, expert_map)
    if expert_map is not None:
        plan.localize.run(Localize(out, topk_ids, expert_map))
    sizes, topk_ids = (given.num_experts, given.local_expert_start, plan.block_m), out
    plan.fill.run(Fill(pairs, blocks, num_blocks, scratch, topk_ids, given.valid_tokens, *sizes))


_in_graphs = OP.in_graphs(_align)
