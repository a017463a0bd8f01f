"""Which pairs of a batch go to which local expert: tables on the device, shared by the products of an MoE layer."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple, NoReturn

import torch

from .. import _operands as operands
from .. import _runtime as runtime
from ._table import VARIANTS

__all__ = ["MoeTables", "local_ids", "moe_align", "no_tables"]


@operands.bundle(tables=("pairs", "blocks", "num_blocks"), free=("tokens_hint",))
class MoeTables(NamedTuple):
    """The routing of T tokens with top_k experts each, and its tables. Pair p = t * top_k + j; E = num_experts.

    A pair is local when t is below ``valid_tokens`` and topk_ids[t, j] - local_expert_start is in [0, E). Tables are of the
    fields beside them: an op refuses such that were edited so that some of them are of others; ``tokens_hint`` may be any.
    """

    topk_ids: torch.Tensor  # [T, top_k] int32 or int64, global ids
    valid_tokens: torch.Tensor | None  # [1] int32, None: all T
    pairs: torch.Tensor | None  # [>= T * top_k] int32: local pairs by expert; None: there are no tables
    blocks: torch.Tensor | None  # [max_blocks, 3] int32: expert, first, rows; no rows: nothing to do
    num_blocks: torch.Tensor | None  # [1] int32
    num_tokens: int
    top_k: int
    num_experts: int
    local_expert_start: int
    tokens_hint: int  # tokens that grids are sized for; any number is right
    block_m: int  # rows of a block at most, 0: there are no tables


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
    num_blocks, pairs, blocks, scratch, ids = _views(workspace, size, splits, topk_ids, expert_map)
    expected = num_tokens if num_tokens_hint is None else num_tokens_hint
    sizes = (num_tokens, top_k, num_experts, local_expert_start, expected, block_m)
    tables = MoeTables(ids, valid_tokens, pairs, blocks, num_blocks, *sizes)
    if torch.compiler.is_compiling():
        _in_graphs(*request, workspace)
        return tables
    if plan.localize is not None:
        plan.localize(ids, topk_ids, expert_map)
    plan.fill(pairs, blocks, num_blocks, scratch, ids, valid_tokens)
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
            _LOCAL.refuse(_LOCAL.named(out, topk_ids, expert_map), error)
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
    sizes = (num_tokens, top_k, num_experts, local_expert_start, num_tokens, 0)
    tables = MoeTables(topk_ids, valid_tokens, None, None, None, *sizes)
    return tables if looks is None else operands.alike(tables, looks)


BLOCK_MS = (16, 32, 64, 128)
_FEW_PAIRS = 32768  # up to so many are sorted in one launch, whose programs each count all pairs
CHUNKS = 128  # at most, that pairs are counted in by two launches
_TABLE = (torch.int32, operands.CONTIGUOUS)

# What ops on the routing of a base layer take of it.
TOPK_IDS = operands.Tensor("topk_ids", "T, top_k", operands.IDS, operands.CONTIGUOUS)
EXPERT_MAP = operands.Tensor("expert_map", ">=1", *_TABLE)
VALID_TOKENS = operands.Tensor("valid_tokens", ("1", ""), *_TABLE, optional=True)
NUM_EXPERTS = operands.Int("num_experts", 1, 4096, size="E")  # a program counts them
LOCAL_EXPERT_START = operands.Int("local_expert_start")
NUM_TOKENS_HINT = operands.Int("num_tokens_hint", 1, optional=True)
OP = operands.Op(
    "moe_align",
    (
        TOPK_IDS,
        VALID_TOKENS,
        dataclasses.replace(EXPERT_MAP, optional=True),
        NUM_EXPERTS,
        LOCAL_EXPERT_START,
        NUM_TOKENS_HINT,
        operands.Int("block_m", optional=True, one_of=BLOCK_MS),
        operands.Tensor("workspace", "*", *_TABLE, optional=True, written=True),
    ),
)
_LOCAL = operands.Op(
    "local_ids", (operands.Tensor("out", "T, top_k", *_TABLE, made=True, written=True), TOPK_IDS, EXPERT_MAP), first=("topk_ids",)
)
_NO_TABLES = operands.Op("no_tables", (TOPK_IDS, VALID_TOKENS, NUM_EXPERTS, LOCAL_EXPERT_START))


# What the launcher of the single variant takes; moe_align makes the buffers.
_FILL = operands.Op(
    "moe_align_fill",
    (
        operands.Tensor("pairs", ">=T*top_k", *_TABLE, written=True),
        operands.Tensor("blocks", ("*, 3", "*"), *_TABLE, written=True),
        operands.Tensor("num_blocks", "1", *_TABLE, written=True),
        operands.Tensor("scratch", "*", *_TABLE, written=True),
        TOPK_IDS,
        VALID_TOKENS,
        NUM_EXPERTS,
        LOCAL_EXPERT_START,
        operands.Int("block_m", one_of=BLOCK_MS),
    ),
)


class Problem(NamedTuple):
    """What the launches that make tables depend on."""

    num_pairs: int
    top_k: int
    num_experts: int
    local_expert_start: int
    block_m: int
    device: torch.device


def check_fill(variant: str, scratch_size: Callable[[int, int], int], *arguments: Any) -> Problem:
    """The problem of a launcher's arguments; ``scratch_size``: of its variant.

    Raises:
        ValueError: says which does not fit, what it is and what was wanted.
    """
    given = _FILL.named(*arguments)
    sizes, block_m = _FILL.check(variant, given), given["block_m"]
    check_blocks(variant, given["blocks"], sizes, block_m)
    num_pairs, routing = sizes["T"] * sizes["top_k"], (sizes["top_k"], sizes["E"], given["local_expert_start"])
    needed = scratch_size(num_pairs, sizes["E"])
    if given["scratch"].numel() < needed:
        runtime.fail(variant, "scratch", runtime.describe(given["scratch"]), f"at least {needed} elements")
    return Problem(num_pairs, *routing, block_m, given["topk_ids"].device)


def check_local_ids(variant: str, out: torch.Tensor | None, topk_ids: torch.Tensor, expert_map: torch.Tensor) -> int:
    """The pairs of a call, once its arguments are known to fit.

    Raises:
        ValueError: says which does not, what it is and what was wanted.
    """
    sizes = _LOCAL.check(variant, _LOCAL.named(out, topk_ids, expert_map))
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


TABLES = operands.Bundle(
    "tables",
    MoeTables,
    (
        TOPK_IDS,
        VALID_TOKENS,
        operands.Tensor("pairs", ">=T*top_k", *_TABLE, optional=True),
        operands.Tensor("blocks", (">=max_blocks, 3", ">=3*max_blocks"), *_TABLE, optional=True),
        operands.Tensor("num_blocks", "1", *_TABLE, optional=True),
        operands.Int("num_tokens", size="T"),
        operands.Int("top_k", 1, size="top_k"),
        NUM_EXPERTS,
        LOCAL_EXPERT_START,
        operands.Int("tokens_hint"),
        operands.Int("block_m", -1, one_of=(0, *BLOCK_MS, -1)),  # -1: left open by a graph of torch.compile
    ),
    maker="moe_align",
    sizes=_table_sizes,
    whole=_check_tables,
    asks=("schedule",),
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


def counts_size(num_experts: int) -> int:
    """int32 elements of scratch for the counts of each chunk."""
    return CHUNKS * counters(num_experts)


def counters(num_experts: int) -> int:
    """Elements of a tile that has a counter for each expert."""
    return max(32, runtime.next_power_of_2(num_experts))


def table_size(num_tokens: int, top_k: int, num_experts: int) -> int:
    """int32 elements of a workspace for up to ``num_tokens`` tokens, whatever block size is chosen."""
    return sum(_open_splits(num_tokens, top_k, num_experts, False))


# (pairs, blocks, num_blocks, scratch, topk_ids, valid_tokens)
Fill = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None], None]


class _Plan(NamedTuple):
    """A checked request: what moe_align works out once for inputs of the same looks."""

    num_tokens: int
    top_k: int
    block_m: int
    size: int  # of the buffer
    splits: tuple[int, ...]  # as _splits
    localize: Callable[..., None] | None
    fill: Fill
    looks: list[object]  # of its tables


def _bind(
    topk_ids: torch.Tensor,
    valid_tokens: torch.Tensor | None,
    expert_map: torch.Tensor | None,
    num_experts: int,
    local_expert_start: int,
    num_tokens_hint: int | None,
    block_m: int | None,
    workspace: torch.Tensor | None,
) -> _Plan:
    request = (topk_ids, valid_tokens, expert_map, num_experts, local_expert_start, num_tokens_hint, block_m, workspace)
    sizes = OP.check("moe_align", OP.named(*request))
    num_tokens, top_k = sizes["T"], sizes["top_k"]
    block_m = block_m or default_block_m(num_tokens_hint or num_tokens, top_k, num_experts)
    num_pairs = num_tokens * top_k
    most = 3 * max_blocks(num_tokens, top_k, num_experts, block_m)
    splits = _splits(num_pairs, most, scratch_size(num_pairs, num_experts), expert_map is not None)
    localize = None
    if expert_map is not None:
        if local_expert_start != 0:
            fail_start("moe_align", local_expert_start)
        localize = bind_local(num_pairs, expert_map.shape[0])
    size = sum(splits)
    if workspace is not None and workspace.shape[0] < size:
        wanted = f"[>= {size}] int32 on {topk_ids.device}"
        runtime.fail("moe_align", "workspace", runtime.describe(workspace), wanted, "ask table_size of this module")
    fill: Fill = no_pairs
    if num_pairs > 0:
        fill = bind(Problem(num_pairs, top_k, num_experts, local_expert_start, block_m, topk_ids.device))
    return _Plan(num_tokens, top_k, block_m, size, splits, localize, fill, [])


def bind(problem: Problem) -> Fill:
    """The launches that make tables of these sizes."""
    call: Fill = _variant(problem.num_pairs, problem.num_experts).bind(problem)
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


def no_pairs(pairs: torch.Tensor, blocks: torch.Tensor, num_blocks: torch.Tensor, *rest: object) -> None:
    """The launch of an empty batch."""
    num_blocks.zero_()


def _no_plan(*request: object) -> list[object]:
    _NO_TABLES.check("no_tables", _NO_TABLES.named(*request))
    return []


def _bind_local(out: torch.Tensor, topk_ids: torch.Tensor, expert_map: torch.Tensor) -> Callable[..., None]:
    num_pairs = check_local_ids("local_ids", out, topk_ids, expert_map)
    return bind_local(num_pairs, expert_map.shape[0])


def bind_local(num_pairs: int, global_experts: int) -> Callable[..., None]:
    """The launch that writes local ids: (out, topk_ids, expert_map)."""
    if num_pairs == 0:
        return runtime.nothing
    call: Callable[..., None] = VARIANTS.get("local_ids", schedule="local_ids").bind(num_pairs, global_experts)
    return call


_local = _LOCAL.caller(_bind_local)
_local_in_graphs = _LOCAL.in_graphs(_local)
_plan, _routing = OP.finder(_bind), _NO_TABLES.finder(_no_plan)


def _align(
    topk_ids: torch.Tensor,
    valid_tokens: torch.Tensor | None,
    expert_map: torch.Tensor | None,
    num_experts: int,
    local_expert_start: int,
    num_tokens_hint: int | None,
    block_m: int | None,
    workspace: torch.Tensor,
) -> None:
    plan = _plan(topk_ids, valid_tokens, expert_map, num_experts, local_expert_start, num_tokens_hint, block_m, workspace)
    num_blocks, pairs, blocks, scratch, ids = _views(workspace, plan.size, plan.splits, topk_ids, expert_map)
    if plan.localize is not None:
        plan.localize(ids, topk_ids, expert_map)
    plan.fill(pairs, blocks, num_blocks, scratch, ids, valid_tokens)


_in_graphs = OP.in_graphs(_align)
