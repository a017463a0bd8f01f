"""Which pairs go where: the route of a batch, built on the device and shared by every op of an MoE layer."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Mapping
from typing import Annotated, Any, NamedTuple

import torch

from .. import _operands as operands
from .. import _runtime as runtime
from .._routing import INT32, AdapterEnabled, ExpertMap, TokenLoraMapping, TopkIds
from ._table import VARIANTS

__all__ = ["EngineRoute", "MoeRoute", "MoeWorkspace", "PairRoute", "TableRoute", "moe_route", "moe_workspace"]

_MAX_GROUPS = 16384  # adapters * experts that the sorting kernels count in one program
MAX_PAIRS = 512  # up to so many are sorted by one program
CHUNK, WIDTH = 256, 32  # pairs, and groups, of a program where there are more
_FEW_CHUNKS, _FEW_COUNTERS = 8, 1024  # that a program adds up by itself as fast as a launch of its own does

BLOCK_MS = (16, 32, 64, 128)
_PARTS = operands.Tensor("*", torch.float32, operands.CONTIGUOUS, written=True)


@operands.bundle()
class MoeWorkspace(NamedTuple):
    """Buffers for the worst case, so that neither a route nor an op on it allocates; one per stream."""

    tables: Annotated[torch.Tensor, operands.Tensor("*", *INT32, written=True)]
    parts: Annotated[torch.Tensor, _PARTS]
    views: dict[tuple[int, ...], tuple[torch.Tensor, ...]]  # of tables, by their sizes: making them costs 4 us of host time


def _check_workspace(op: str, name: str, workspace: MoeWorkspace) -> None:
    if not isinstance(workspace.views, dict):
        runtime.fail(op, f"{name}.views", type(workspace.views).__name__, "a dict", "make it with moe_workspace")


# What routes are made of, and what an op on one takes of it.
Pairs = Annotated[torch.Tensor, operands.Tensor(">=sorted_pairs", *INT32)]  # live ones by (adapter, expert)
Blocks = Annotated[torch.Tensor, operands.Tensor(">=max_blocks, 4", *INT32)]  # adapter, expert, first, rows
NumBlocks = Annotated[torch.Tensor, operands.Tensor("1", *INT32)]
Parts = Annotated[torch.Tensor | None, _PARTS]
NumTokens = Annotated[int, operands.Int(size="T")]
TopK = Annotated[int, operands.Int(1, size="top_k")]
Experts = Annotated[int, operands.Int(1, size="E")]
Loras = Annotated[int, operands.Int(1, size="L")]
Assignment = Annotated[str, operands.Choice(("auto", "naive", "sorted"))]
Rank = Annotated[int | None, operands.Int(1)]
BlockM = Annotated[int, operands.Int(one_of=BLOCK_MS)]  # rows of a block at most
MaxBlocks = Annotated[int, operands.Int(size="max_blocks")]
Workspace = Annotated[MoeWorkspace | None, operands.Bundle(MoeWorkspace, maker="moe_workspace", whole=_check_workspace)]


class MoeRoute:
    """The route of T tokens with top_k experts each: a ``PairRoute``, a ``TableRoute`` or an ``EngineRoute``.

    Pair p = t * top_k + j; L = max_loras, E = num_experts. A pair is live when its adapter is in [0, L) and enabled and its
    expert, after expert_map, is in [0, E).
    """

    parts: torch.Tensor | None  # [*] float32 scratch of the ops, None: they allocate
    num_tokens: int
    top_k: int
    num_experts: int
    max_loras: int
    expert_map: torch.Tensor | None = None

    @property
    def global_experts(self) -> int:
        """Entries of expert_map, 0 without one."""
        return 0 if self.expert_map is None else self.expert_map.shape[0]

    @staticmethod
    def from_tables(
        sorted_token_ids: torch.Tensor,
        expert_ids: torch.Tensor,
        num_tokens_post_padded: torch.Tensor,
        *,
        block_size: int,
        num_tokens: int,
        top_k: int,
        num_experts: int,
        max_loras: int,
        lora_ids: torch.Tensor | None = None,
        adapter_enabled: torch.Tensor | None = None,
        workspace: MoeWorkspace | None = None,
    ) -> EngineRoute:
        """A route from the padded per-adapter tables that an engine already has; on the device only.

        Args:
            sorted_token_ids: [L, EM] int32, or flat. Row l: pair ids of adapter l, grouped by expert, each group padded to a
                multiple of ``block_size`` with ids >= num_tokens * top_k. EM need not be a multiple of it.
            expert_ids: [L, ceil(EM / block_size)] int32, or flat: the (local) expert of each block, -1 where there is none.
            num_tokens_post_padded: [L] int32, how much of each row counts.
            lora_ids: [*] int32, the adapters of this batch (-1 is skipped); None: every row of the tables.
            adapter_enabled: [>= L] int32, 0 drops the adapter; None: all are enabled.

        Raises:
            ValueError: a shape, dtype or block size that does not fit; nothing was launched.
        """
        source = (sorted_token_ids, expert_ids, num_tokens_post_padded, lora_ids, adapter_enabled)
        sizes, block_m = (num_tokens, top_k, num_experts, max_loras), block_size
        if torch.compiler.is_compiling():
            max_blocks = max_loras * _rows(expert_ids, max_loras).shape[1]
        else:
            max_blocks, fill, looks = _table_plan(*source, block_size, *sizes, workspace)
        splits = _splits(max_blocks, max_blocks * block_size, 0)
        if torch.compiler.is_compiling():
            _check_size("MoeRoute.from_tables", workspace, splits)
        buffer, num_blocks, blocks, pairs, _ = _buffers(workspace, splits, sorted_token_ids.device)
        if torch.compiler.is_compiling():
            _tables_in_graphs(buffer, *source, block_size, *sizes)
        else:
            num_pairs = num_tokens * top_k
            fill.run(Pack(pairs, blocks, num_blocks, *source, num_pairs, num_experts, max_loras, block_m))
        parts = None if workspace is None else workspace.parts
        route = EngineRoute(pairs, blocks, num_blocks, parts, *sizes, block_m, max_blocks)
        return route if torch.compiler.is_compiling() else operands.alike(route, looks)


class _Pairs(NamedTuple):
    topk_ids: TopkIds
    token_lora_mapping: TokenLoraMapping
    adapter_enabled: AdapterEnabled
    expert_map: ExpertMap | None
    parts: Parts
    num_tokens: NumTokens
    top_k: TopK
    num_experts: Experts
    max_loras: Loras


@operands.bundle()
class PairRoute(_Pairs, MoeRoute):
    """The routing alone: pairs come one by one. Its fields are those of the call that made it."""


class _Tables(NamedTuple):
    topk_ids: TopkIds | None  # None: of a dense layer, every token has its one expert
    token_lora_mapping: TokenLoraMapping
    adapter_enabled: AdapterEnabled
    expert_map: ExpertMap | None
    pairs: Pairs
    blocks: Blocks
    num_blocks: NumBlocks
    parts: Parts
    num_tokens: NumTokens
    top_k: TopK
    num_experts: Experts
    max_loras: Loras
    block_m: BlockM
    max_blocks: MaxBlocks


@operands.bundle(tables=("pairs", "blocks", "num_blocks"), free=("parts",))
class TableRoute(_Tables, MoeRoute):
    """The routing, and its live pairs in blocks of one adapter and expert.

    Tables are of the fields beside them: an op refuses a route that was edited so that some of them are of another; ``parts``
    may be any.
    """


class _EngineTables(NamedTuple):
    pairs: Pairs
    blocks: Blocks
    num_blocks: NumBlocks
    parts: Parts
    num_tokens: NumTokens
    top_k: TopK
    num_experts: Experts
    max_loras: Loras
    block_m: BlockM
    max_blocks: MaxBlocks


@operands.bundle(tables=("pairs", "blocks", "num_blocks"), free=("parts",))
class EngineRoute(_EngineTables, MoeRoute):
    """Blocks as in a ``TableRoute``, of tables that an engine made; the routing that they are of is not known."""


SortedRoute = TableRoute | EngineRoute


class _Open(NamedTuple):
    topk_ids: TopkIds | None
    token_lora_mapping: TokenLoraMapping
    adapter_enabled: AdapterEnabled
    expert_map: ExpertMap | None
    pairs: Pairs
    blocks: Blocks
    num_blocks: NumBlocks
    parts: Parts
    num_tokens: NumTokens
    top_k: TopK
    num_experts: Experts
    max_loras: Loras
    assignment: Assignment
    rank: Rank
    block_m: BlockM | None


@operands.bundle()
class OpenRoute(_Open, MoeRoute):
    """What a graph of torch.compile has for a route: it serves any number of tokens, so its kind shows when it runs."""

    def settled(self) -> PairRoute | TableRoute:
        """The route for the number of tokens that there are."""
        sizes = (self.num_tokens, self.top_k, self.num_experts, self.max_loras)
        block_m = _rows_of_block(*sizes, self.assignment, self.rank, self.block_m)
        source = (self.topk_ids, self.token_lora_mapping, self.adapter_enabled, self.expert_map)
        if block_m is None:
            return PairRoute._make((*source, self.parts, *sizes))
        max_blocks = most_blocks(self.num_tokens * self.top_k, self.num_experts * self.max_loras, block_m)
        tables = (self.pairs, self.blocks, self.num_blocks, self.parts)
        return TableRoute._make((*source, *tables, *sizes, block_m, max_blocks))


class _OpenRows(NamedTuple):
    token_lora_mapping: TokenLoraMapping
    pairs: Pairs
    blocks: Blocks  # of all heights, as first_blocks says
    num_blocks: NumBlocks  # of each height
    parts: Parts
    num_tokens: NumTokens
    max_loras: Loras
    capacity: operands.Count


@operands.bundle()
class OpenRows(_OpenRows, MoeRoute):
    """The first rows of a route that an engine holds, whose blocks are of a height that shows when their number does."""

    topk_ids = None
    top_k = 1
    num_experts = 1

    def settled(self) -> TableRoute:
        """The route for the number of tokens that there are."""
        block_m = default_block_m(self.num_tokens, 1, self.max_loras, dense=True)
        height = BLOCK_MS.index(block_m)
        blocks = self.blocks[first_blocks(self.capacity, self.max_loras)[height] :]
        num_blocks, max_blocks = self.num_blocks[height : height + 1], most_blocks(self.num_tokens, self.max_loras, block_m)
        tables, sizes = (self.pairs, blocks, num_blocks, self.parts), (self.num_tokens, 1, 1, self.max_loras, block_m, max_blocks)
        return TableRoute._make((None, self.token_lora_mapping, None, None, *tables, *sizes))


def first_blocks(capacity: int, max_loras: int) -> tuple[int, ...]:
    """Where the blocks of each height begin, in tables for all of them."""
    numbers = (most_blocks(capacity, max_loras, block_m) for block_m in BLOCK_MS[:-1])
    return tuple(itertools.accumulate(numbers, initial=0))


def moe_route(
    topk_ids: torch.Tensor | None,
    token_lora_mapping: torch.Tensor,
    *,
    num_experts: int,
    max_loras: int,
    adapter_enabled: torch.Tensor | None = None,
    expert_map: torch.Tensor | None = None,
    assignment: str = "auto",
    workspace: MoeWorkspace | None = None,
    rank: int | None = None,
    block_m: int | None = None,
) -> MoeRoute:
    """The route of a batch, on the device only: no host sync, and a captured CUDA graph stays right when it changes.

    Args:
        topk_ids: [T, top_k] int32 or int64, the experts of each token (global ones where there is an ``expert_map``).
            None: one expert, top_k 1, as in a dense layer (``lora_route``).
        token_lora_mapping: [T] int32, the adapter of each token, -1: none.
        num_experts: experts in the weights (E, the local ones under expert parallelism).
        max_loras: adapter slots in the weights (L).
        adapter_enabled: [>= L] int32, 0: the adapter is loaded but has no expert weights. None: all enabled.
        expert_map: [global experts] int32, global to local expert, -1: not on this rank.
        assignment: "naive" (every pair by itself, nothing is launched here), "sorted" (blocks of one adapter and
            expert), or "auto": naive for so few pairs that streaming the weights pair by pair is faster.
        workspace: buffers from ``moe_workspace``; None allocates.
        rank: the adapters' rank, if known: "auto" then knows how far the naive way carries.
        block_m: rows of a block, None: from the mean number of pairs of an (adapter, expert).

    Raises:
        ValueError: a shape, dtype, device or option that does not fit; nothing was launched.
    """
    source = (topk_ids, token_lora_mapping, adapter_enabled, expert_map)
    if torch.compiler.is_compiling():
        return in_graph(source, num_experts, max_loras, assignment, rank, block_m, workspace)
    plan = _plan(*source, num_experts, max_loras, assignment, rank, block_m, workspace)
    return made(plan, source, workspace)


# topk_ids, token_lora_mapping, adapter_enabled, expert_map
_Source = tuple[torch.Tensor | None, torch.Tensor, torch.Tensor | None, torch.Tensor | None]


def made(plan: Plan, source: _Source, workspace: MoeWorkspace | None) -> PairRoute | TableRoute:
    """The route of a plan: its launches, made."""
    parts, (topk_ids, token_lora_mapping, adapter_enabled, expert_map) = None if workspace is None else workspace.parts, source
    num_tokens, top_k, num_experts, max_loras = plan.sizes
    routing, sizes = (topk_ids, token_lora_mapping, adapter_enabled, expert_map), (num_tokens, top_k, num_experts, max_loras)
    if plan.block_m is None:
        return operands.alike(PairRoute._make((*routing, parts, *sizes)), plan.looks)
    _, num_blocks, blocks, pairs, scratch = _buffers(workspace, plan.splits, token_lora_mapping.device)
    if plan.num_pairs > 0:
        plan.fill.run(Sort._make((pairs, blocks, num_blocks, scratch, *routing, num_experts, max_loras, plan.block_m)))
    tables = (pairs, blocks, num_blocks, parts)
    route = TableRoute._make((*routing, *tables, *sizes, plan.block_m, plan.max_blocks))  # quicker than TableRoute(...)
    return operands.alike(route, plan.looks)


def in_graph(
    source: _Source,
    num_experts: int,
    max_loras: int,
    assignment: str,
    rank: int | None,
    block_m: int | None,
    workspace: MoeWorkspace | None,
) -> MoeRoute:
    """The route as a graph of torch.compile makes it; arguments are checked when it runs."""
    parts = None if workspace is None else workspace.parts
    topk_ids, token_lora_mapping, adapter_enabled, expert_map = source
    num_tokens, top_k = _tokens(topk_ids, token_lora_mapping)
    routing, sizes = (topk_ids, token_lora_mapping, adapter_enabled, expert_map), (num_tokens, top_k, num_experts, max_loras)
    if assignment == "naive":
        _check_without_blocks("moe_route", block_m)
        return PairRoute._make((*routing, parts, *sizes))
    splits = _open_splits(*sizes)
    _check_size("moe_route", workspace, splits)
    buffer, num_blocks, blocks, pairs, _ = _buffers(workspace, splits, token_lora_mapping.device)
    request = (assignment, rank, block_m)
    _route_in_graphs(buffer, *source, num_experts, max_loras, *request)
    return OpenRoute(*routing, pairs, blocks, num_blocks, parts, *sizes, *request)


class Plan(NamedTuple):
    """A checked request: what moe_route works out once for inputs of the same looks."""

    sizes: tuple[int, int, int, int]  # tokens, top_k, experts, adapters
    num_pairs: int
    block_m: int | None  # None: pairs come one by one
    max_blocks: int
    splits: tuple[int, int, int, int, int]  # elements of num_blocks, blocks, pairs, scratch
    fill: runtime.Call
    looks: list[object]  # of its routes


class Given(NamedTuple):
    """What moe_route is given."""

    topk_ids: TopkIds | None
    token_lora_mapping: TokenLoraMapping
    adapter_enabled: AdapterEnabled
    expert_map: ExpertMap | None
    num_experts: Experts
    max_loras: Loras
    assignment: Assignment
    rank: Rank
    block_m: BlockM | None
    workspace: Workspace


OP = operands.Op("moe_route", Given)


class GivenDense(NamedTuple):
    """What lora_route is given, without a capacity."""

    token_lora_mapping: TokenLoraMapping
    max_loras: Loras
    block_m: BlockM | None
    workspace: Workspace


DENSE = operands.Op("lora_route", GivenDense)


class _Space(NamedTuple):
    max_tokens: operands.Count
    top_k: operands.Size
    num_experts: Experts
    max_loras: Loras
    max_rank: operands.Size
    num_slices: operands.Size
    device: Annotated[torch.device | str, operands.Device()]
    table_size: operands.Count


_SPACE = operands.Op("moe_workspace", _Space, launches=False)


class Sort(NamedTuple):
    """What the launchers of single variants that sort are given; front doors make the buffers."""

    pairs: Annotated[torch.Tensor, operands.Tensor("*", *INT32, written=True)]
    blocks: Annotated[torch.Tensor, operands.Tensor("*, 4", *INT32, written=True)]
    num_blocks: Annotated[torch.Tensor, operands.Tensor("1", *INT32, written=True)]
    scratch: Annotated[torch.Tensor, operands.Tensor("*", *INT32, written=True)]
    topk_ids: TopkIds  # from a front door None, of a dense layer
    token_lora_mapping: TokenLoraMapping
    adapter_enabled: AdapterEnabled
    expert_map: ExpertMap | None
    num_experts: Experts
    max_loras: Loras
    block_m: BlockM


SORT = operands.Op("moe_route_sort", Sort)


class Pack(NamedTuple):
    """What the launcher for tables of an engine is given."""

    pairs: Annotated[torch.Tensor, operands.Tensor("*", *INT32, written=True)]
    blocks: Annotated[torch.Tensor, operands.Tensor("*, 4", *INT32, written=True)]
    num_blocks: Annotated[torch.Tensor, operands.Tensor("1", *INT32, written=True)]
    sorted_token_ids: Annotated[torch.Tensor, operands.Tensor(">=L, EM", torch.int32)]
    expert_ids: Annotated[torch.Tensor, operands.Tensor(">=L, B", torch.int32)]
    num_tokens_post_padded: Annotated[torch.Tensor, operands.Tensor(">=L", *INT32)]
    lora_ids: Annotated[torch.Tensor | None, operands.Tensor(">=1", *INT32)]
    adapter_enabled: AdapterEnabled
    num_pairs: operands.Count
    num_experts: Experts
    max_loras: Loras
    block_m: BlockM


PACK = operands.Op("moe_route_pack", Pack)


class Problem(NamedTuple):
    """What the launches of a sort depend on."""

    num_pairs: int
    top_k: int
    num_experts: int
    max_loras: int
    global_experts: int  # entries of expert_map, 0 without one
    block_m: int
    device: torch.device

    @property
    def num_groups(self) -> int:
        """Adapters * experts."""
        return self.max_loras * self.num_experts


class PackProblem(NamedTuple):
    """What the launches over tables [L, *] of an engine depend on."""

    num_pairs: int
    num_experts: int
    max_loras: int
    block_m: int
    num_lora_ids: int
    row_blocks: int  # columns of expert_ids
    blocks_stride: int  # from row to row of it
    row_size: int  # columns of sorted_token_ids
    row_stride: int


def check_sort(variant: str, scratch_size: Callable[[int, int], int], given: Sort) -> Problem:
    """The problem of a call of a launcher that sorts; ``scratch_size``: of its variant.

    Raises:
        ValueError: says which does not fit, what it is and what was wanted.
    """
    sizes, expert_map = SORT.check(variant, given), given.expert_map
    num_pairs, num_groups = sizes["T"] * sizes["top_k"], sizes["L"] * sizes["E"]
    if num_groups > _MAX_GROUPS:
        runtime.fail(variant, "max_loras * num_experts", num_groups, f"at most {_MAX_GROUPS}")
    wanted = {"pairs": num_pairs, "blocks": most_blocks(num_pairs, num_groups, given.block_m)}
    wanted["scratch"] = scratch_size(num_pairs, num_groups)
    _check_filled(variant, given, wanted)
    groups = (sizes["E"], sizes["L"], 0 if expert_map is None else expert_map.shape[0])
    return Problem(num_pairs, sizes["top_k"], *groups, given.block_m, given.token_lora_mapping.device)


def check_pack(variant: str, given: Pack) -> PackProblem:
    """The problem of a call of the launcher for tables of an engine.

    Raises:
        ValueError: says which does not fit, what it is and what was wanted.
    """
    sizes, block_m = PACK.check(variant, given), given.block_m
    if sizes["B"] > runtime.cdiv(sizes["EM"], block_m):
        wanted = f"at most {runtime.cdiv(sizes['EM'], block_m)} columns, one a block of sorted_token_ids"
        runtime.fail(variant, "expert_ids", runtime.describe(given.expert_ids), wanted)
    blocks = sizes["L"] * sizes["B"]
    _check_filled(variant, given, {"pairs": blocks * block_m, "blocks": blocks})
    tables = (given.sorted_token_ids, given.expert_ids, given.lora_ids)
    return _pack_problem(*tables, given.num_pairs, sizes["E"], sizes["L"], block_m)


def _pack_problem(
    sorted_token_ids: torch.Tensor,
    expert_ids: torch.Tensor,
    lora_ids: torch.Tensor | None,
    num_pairs: int,
    num_experts: int,
    max_loras: int,
    block_m: int,
) -> PackProblem:
    num_lora_ids = 0 if lora_ids is None else lora_ids.numel()
    rows = (expert_ids.shape[1], expert_ids.stride(0), sorted_token_ids.shape[1], sorted_token_ids.stride(0))
    return PackProblem(num_pairs, num_experts, max_loras, block_m, num_lora_ids, *rows)


def _check_filled(variant: str, given: Sort | Pack, wanted: dict[str, int]) -> None:
    for name, size in wanted.items():
        buffer = getattr(given, name)
        if buffer.shape[0] < size:
            of = "rows" if name == "blocks" else "elements"
            runtime.fail(variant, name, runtime.describe(buffer), f"at least {size} {of}")


def _table_sizes(route: MoeRoute) -> dict[str, int]:
    """Pairs that tables hold at most: all, but no more than blocks have rows."""
    if not isinstance(route, SortedRoute):
        return {}
    return {"sorted_pairs": min(route.num_tokens * route.top_k, route.max_blocks * route.block_m)}


# What an op on a route takes of it.
ROUTE = operands.Bundle(
    MoeRoute,
    maker="moe_route",
    kinds=(PairRoute, TableRoute, EngineRoute),
    open=(OpenRoute, OpenRows),
    sizes=_table_sizes,
    asks=("schedule", "assignment"),
)
Route = Annotated[MoeRoute, ROUTE]
# Where launchers find what kernels read of it.
LIVE = (
    "token_lora_mapping_ptr=route.token_lora_mapping adapter_enabled_ptr=route.adapter_enabled expert_map_ptr=route.expert_map"
)
OF_ROUTE = (
    f"topk_ids_ptr=route.topk_ids {LIVE} pairs_ptr=route.pairs blocks_ptr=route.blocks num_blocks_ptr=route.num_blocks"
)
# And what says what it does with pairs.
AddInputs = Annotated[bool, operands.Flag(asks=("adds",))]
MulRoutedWeight = Annotated[bool, operands.Flag(asks=("weighted",))]
RoutingWeights = Annotated[
    torch.Tensor | None,
    operands.Tensor("T, top_k", operands.FLOATS, operands.CONTIGUOUS, only_with="mul_routed_weight", asks=("weighted",)),
]


def experts_in_weights(values: Mapping[str, Any]) -> dict[str, int]:
    """X, the experts that weights have at least: all that the route may name, unless an expert_map says which those are."""
    route = values["route"]
    return {"X": route.num_experts if route.expert_map is None else 1}


def check_kind(variant: str, route: MoeRoute, naive: bool | None) -> None:
    """Raise ValueError where a route is not of a kind that a schedule takes; ``naive``: pairs one by one; None: any."""
    if isinstance(route, TableRoute) and route.topk_ids is None:
        hint = "its tables may list more rows than there are"
        runtime.fail(variant, "route", "that of a dense layer", "a route from moe_route", hint)
    if naive and not has_routing(route):
        runtime.fail(variant, "route", "tables only", "a route from moe_route", "use a variant over blocks")
    if naive is False and not isinstance(route, SortedRoute):
        runtime.fail(variant, "route", "naive", "sorted", 'make it with assignment="sorted"')


def has_routing(route: MoeRoute) -> bool:
    """Whether it says of every pair where it goes, and not in tables alone."""
    return isinstance(route, PairRoute | TableRoute) and route.topk_ids is not None


def rows_of_block(route: MoeRoute) -> int:
    """What measured tiles know a route by: rows of a block at most, 0: pairs come one by one."""
    return route.block_m if isinstance(route, SortedRoute) else 0


def scratch(route: MoeRoute, size: int, device: torch.device, dtype: torch.dtype = torch.float32) -> runtime.Lent:
    """Memory of so many elements, of at most 4 bytes, for calls on such routes: the workspace's where it is large enough."""
    if route.parts is None or route.parts.numel() < size:
        return runtime.SCRATCH, functools.partial(torch.empty, size, dtype=dtype, device=device)
    parts = runtime.GIVEN.route.parts
    return parts if dtype == torch.float32 else parts.view(dtype), None


def check_rank(variant: str, label: str, rank: int, max_rank: int | None, row: int, rows: int | None = None) -> None:
    """Raise ValueError where a variant does not serve a rank, or the matrix of ``rows`` or rank is too large for it."""
    if max_rank is not None and rank > max_rank:
        runtime.fail(variant, f"rank of {label}", rank, f"1 to {max_rank}", "the front door picks the variant that serves a rank")
    if row * (rows or rank) >= 2**31:
        runtime.fail(variant, label, f"rows {row} elements apart", "a matrix below 2**31 elements")


def _tokens(topk_ids: torch.Tensor | None, token_lora_mapping: torch.Tensor) -> tuple[int, int]:
    """(T, top_k)"""
    if topk_ids is None:
        return token_lora_mapping.numel(), 1
    return topk_ids.shape[0], topk_ids.shape[1]


def _bind(given: Given) -> Plan:
    name = "moe_route"
    OP.check(name, given)
    if given.topk_ids is None and (given.num_experts != 1 or given.assignment == "naive"):
        got = f"None with num_experts={given.num_experts}, assignment={given.assignment!r}"
        runtime.fail(name, "topk_ids", got, "the experts of each token", "a dense layer has one expert and is sorted")
    if given.assignment == "naive":
        _check_without_blocks(name, given.block_m)
    return _planned(name, given)


def _check_without_blocks(name: str, block_m: int | None) -> None:
    if block_m is not None:
        runtime.fail(name, "block_m", block_m, None, 'assignment="naive" has no blocks')


def _bind_dense(given: GivenDense) -> Plan:
    DENSE.check("lora_route", given)
    mapping, of_blocks = given.token_lora_mapping, {"block_m": given.block_m, "workspace": given.workspace}
    request = OP.given(token_lora_mapping=mapping, num_experts=1, max_loras=given.max_loras, assignment="sorted", **of_blocks)
    return _planned("lora_route", request)


def _planned(name: str, given: Given) -> Plan:
    num_groups = given.max_loras * given.num_experts
    if given.assignment == "sorted" and num_groups > _MAX_GROUPS:
        runtime.fail(name, "max_loras * num_experts", num_groups, f"at most {_MAX_GROUPS}", 'use assignment="naive"')
    num_tokens, top_k = _tokens(given.topk_ids, given.token_lora_mapping)
    sizes = (num_tokens, top_k, given.num_experts, given.max_loras)
    num_pairs = num_tokens * top_k
    block_m = _rows_of_block(*sizes, given.assignment, given.rank, given.block_m)
    if block_m is None:
        return Plan(sizes, num_pairs, None, 0, (0, 0, 0, 0, 0), runtime.NOTHING, [])
    max_blocks = most_blocks(num_pairs, num_groups, block_m)
    splits = _splits(max_blocks, num_pairs, _scratch_size(num_pairs, num_groups))
    _check_size(name, given.workspace, splits)
    global_experts = 0 if given.expert_map is None else given.expert_map.shape[0]
    groups = (given.num_experts, given.max_loras, global_experts)
    problem = Problem(num_pairs, top_k, *groups, block_m, given.token_lora_mapping.device)
    fill: runtime.Call = _variant(num_pairs, num_groups).bind(problem)
    return Plan(sizes, num_pairs, block_m, max_blocks, splits, fill, [])


def _check_size(name: str, workspace: MoeWorkspace | None, splits: tuple[int, ...]) -> None:
    if workspace is not None and workspace.tables.shape[0] < sum(splits):
        hint = "make it with moe_workspace for the largest batch, and table_size for tables of an engine"
        runtime.fail(name, "workspace.tables", runtime.describe(workspace.tables), f"[>= {sum(splits)}] int32", hint)


_plan, dense_plan = OP.finder(_bind), DENSE.finder(_bind_dense)


def _rows_of_block(
    num_tokens: int,
    top_k: int,
    num_experts: int,
    max_loras: int,
    assignment: str,
    rank: int | None,
    block_m: int | None,
) -> int | None:
    """Rows of a block, None: pairs come one by one."""
    num_groups = num_experts * max_loras
    if assignment == "naive" or (assignment == "auto" and few_pairs(num_tokens, top_k, num_groups, rank)):
        return None
    return block_m or default_block_m(num_tokens, top_k, num_groups, dense=num_experts == 1)


def _open_splits(num_tokens: int, top_k: int, num_experts: int, max_loras: int) -> tuple[int, int, int, int, int]:
    """As ``_splits``, large enough however the request is settled, and without a branch on the number of tokens."""
    num_pairs, num_groups = num_tokens * top_k, max_loras * num_experts
    scratch = counts_size(num_pairs, num_groups) + 2 * _FEW_CHUNKS * counters(num_groups)
    return _splits(num_groups + num_pairs // 16, num_pairs, scratch)


def moe_workspace(
    *,
    max_tokens: int,
    top_k: int,
    num_experts: int,
    max_loras: int,
    max_rank: int,
    num_slices: int,
    device: torch.device | str,
    table_size: int = 0,
) -> MoeWorkspace:
    """Buffers that serve every batch of up to ``max_tokens`` tokens, whatever its routing.

    Use one workspace per stream: an op writes its scratch into it. ``table_size``: for ``MoeRoute.from_tables``, elements of
    the largest ``sorted_token_ids``.

    Raises:
        ValueError: an argument that does not fit.
    """
    sizes = (max_tokens, top_k, num_experts, max_loras, max_rank, num_slices)
    _SPACE.check("moe_workspace", _Space(*sizes, device, table_size))
    num_pairs = max_tokens * top_k
    padded = table_size + 127 * max_loras if table_size else 0  # each row up to a whole block of 128
    tables = max(sum(_open_splits(max_tokens, top_k, num_experts, max_loras)), sum(_splits(padded // 16, padded, 0)))
    tile = runtime.block_rank(max_rank)
    rank = runtime.cdiv(max_rank, tile) * tile
    # A split of K pays for few pairs only: 32 parts up to 256 pairs, 8 up to 4096, then one, in half the bytes.
    parts = max(min(num_pairs, 256) * 32, min(num_pairs, 4096) * 8, num_pairs) * num_slices * rank
    return MoeWorkspace(
        tables=torch.empty(tables, dtype=torch.int32, device=device),
        parts=torch.empty(parts, dtype=torch.float32, device=device),
        views={},
    )


def default_block_m(num_tokens: int, top_k: int, num_groups: int, dense: bool = False) -> int:
    """Rows of a block: near the mean number of pairs of a group that is hit, if pairs were spread evenly."""
    num_pairs = runtime.next_power_of_2(num_tokens) * top_k
    mean = num_pairs / expected_groups(num_pairs, num_groups)
    if dense and mean >= 512:
        return 128
    return 16 if mean < (20 if dense else 12) else 32 if mean < (40 if dense else 24) else 64


def expected_groups(num_pairs: int, num_groups: int) -> float:
    """How many of ``num_groups`` equally likely groups ``num_pairs`` draws hit."""
    return num_groups * (1.0 - (1.0 - 1.0 / num_groups) ** num_pairs) if num_groups > 1 else 1.0


def few_pairs(num_tokens: int, top_k: int, num_groups: int, rank: int | None) -> bool:
    """Whether pairs are so few, and share so few weights, that streaming the weights pair by pair is fastest."""
    num_pairs = runtime.next_power_of_2(num_tokens) * top_k
    if num_groups > _MAX_GROUPS or num_pairs <= 8:
        return True
    shared = num_pairs / expected_groups(num_pairs, num_groups)
    if rank is not None and rank <= 16:
        return num_pairs <= 512 and shared < 2.0
    return num_pairs <= 128 and shared < 1.5


def most_blocks(num_pairs: int, num_groups: int, block_m: int) -> int:
    groups = min(num_pairs, num_groups)
    return groups + (num_pairs - groups) // block_m


def _scratch_size(num_pairs: int, num_groups: int) -> int:
    size: int = _variant(num_pairs, num_groups).scratch_size(num_pairs, num_groups)
    return size


def counts_size(num_pairs: int, num_groups: int) -> int:
    """int32 elements of scratch for counts and offsets of each chunk of pairs."""
    size = counters(num_groups)
    return size + 3 * size * runtime.cdiv(num_pairs, CHUNK)


def counters(num_groups: int) -> int:
    """Elements of a tile that has a counter for each group."""
    return max(WIDTH, runtime.next_power_of_2(num_groups))


def _variant(num_pairs: int, num_groups: int) -> Any:
    few = num_pairs <= _FEW_CHUNKS * CHUNK and counters(num_groups) <= _FEW_COUNTERS
    return VARIANTS.get("moe_route", schedule="one_launch" if num_pairs <= MAX_PAIRS else "two_launch" if few else "three_launch")


def _splits(max_blocks: int, num_pairs: int, scratch: int) -> tuple[int, int, int, int, int]:
    """Elements of num_blocks, a gap, blocks, pairs and scratch in one buffer; each starts 16-byte aligned."""
    return 1, 3, 4 * max_blocks, (num_pairs + 3) // 4 * 4, scratch


def _buffers(
    workspace: MoeWorkspace | None, splits: tuple[int, int, int, int, int], device: torch.device
) -> tuple[torch.Tensor, ...]:
    """A buffer for the tables, and num_blocks, blocks, pairs, scratch in it."""
    if workspace is None:
        return _views(torch.empty(sum(splits), dtype=torch.int32, device=device), splits)
    tables = workspace.tables
    if torch.compiler.is_compiling():
        return _views(tables, splits)
    found = workspace.views.get(splits)
    if found is None or found[0] is not tables:
        workspace.views[splits] = found = _views(tables, splits)
    return found


def _views(buffer: torch.Tensor, splits: tuple[int, int, int, int, int]) -> tuple[torch.Tensor, ...]:
    num_blocks, _, blocks, pairs, scratch, _ = buffer.split_with_sizes((*splits, buffer.shape[0] - sum(splits)))
    return buffer, num_blocks, blocks.view(-1, 4), pairs, scratch


def _rows(table: torch.Tensor, max_loras: int) -> torch.Tensor:
    """A table of an engine as [L, *], where it is flat."""
    return table.view(max_loras, -1) if table.dim() == 1 and table.numel() % max_loras == 0 else table


class _OfTables(NamedTuple):
    sorted_token_ids: Annotated[torch.Tensor, operands.Tensor((">=L, *", "*"), torch.int32)]
    expert_ids: Annotated[torch.Tensor, operands.Tensor((">=L, *", "*"), torch.int32)]
    num_tokens_post_padded: Annotated[torch.Tensor, operands.Tensor(">=L", *INT32)]
    lora_ids: Annotated[torch.Tensor | None, operands.Tensor(">=1", *INT32)]
    adapter_enabled: AdapterEnabled
    block_size: BlockM
    num_tokens: operands.Count
    top_k: operands.Size
    num_experts: Experts
    max_loras: Loras
    workspace: Workspace


_OF_TABLES = operands.Op("MoeRoute.from_tables", _OfTables)


class _TablePlan(NamedTuple):
    """Checked tables: what from_tables works out once for tables of the same looks."""

    max_blocks: int
    fill: runtime.Call
    looks: list[object]  # of its routes


def _bind_tables(given: _OfTables) -> _TablePlan:
    name, max_loras, block_size = "MoeRoute.from_tables", given.max_loras, given.block_size
    _OF_TABLES.check(name, given)
    ids, experts = _rows(given.sorted_token_ids, max_loras), _rows(given.expert_ids, max_loras)
    for label, table in (("sorted_token_ids", ids), ("expert_ids", experts)):
        if table.dim() != 2:
            runtime.fail(name, label, runtime.describe(table), f"[>= {max_loras}, *], or flat, of {max_loras} rows")
    row_blocks = runtime.cdiv(ids.shape[1], block_size)
    if experts.shape[1] > row_blocks:
        wanted = f"at most {row_blocks} columns, one for block_size = {block_size} columns of sorted_token_ids"
        runtime.fail(name, "expert_ids", runtime.describe(given.expert_ids), wanted)
    max_blocks = max_loras * experts.shape[1]
    _check_size(name, given.workspace, _splits(max_blocks, max_blocks * block_size, 0))
    if max_blocks == 0:
        return _TablePlan(0, runtime.NOTHING, [])
    num_pairs = given.num_tokens * given.top_k
    problem = _pack_problem(ids, experts, given.lora_ids, num_pairs, given.num_experts, max_loras, block_size)
    return _TablePlan(max_blocks, VARIANTS.get("moe_route", schedule="from_tables").bind(problem), [])


_table_plan = _OF_TABLES.finder(_bind_tables)


def _route(buffer: torch.Tensor, *arguments: Any) -> None:
    given = Given(*arguments, workspace=None)  # type: ignore[misc]
    plan = _plan(*given)
    if plan.block_m is not None and plan.num_pairs > 0:
        _, num_blocks, blocks, pairs, scratch = _views(buffer, _open_splits(*plan.sizes))
        routing = (given.topk_ids, given.token_lora_mapping, given.adapter_enabled, given.expert_map)
        groups = (given.num_experts, given.max_loras, plan.block_m)
        plan.fill.run(Sort(pairs, blocks, num_blocks, scratch, *routing, *groups))  # type: ignore[arg-type]


def _from_tables(buffer: torch.Tensor, *arguments: Any) -> None:
    given = _OfTables(*arguments, workspace=None)  # type: ignore[misc]
    plan = _table_plan(*given)
    _, num_blocks, blocks, pairs, _ = _views(buffer, _splits(plan.max_blocks, plan.max_blocks * given.block_size, 0))
    source = (given.sorted_token_ids, given.expert_ids, given.num_tokens_post_padded, given.lora_ids, given.adapter_enabled)
    num_pairs, block_m = given.num_tokens * given.top_k, given.block_size
    plan.fill.run(Pack(pairs, blocks, num_blocks, *source, num_pairs, given.num_experts, given.max_loras, block_m))


_route_in_graphs = OP.in_graphs_into("buffer", _route, without=("workspace",))
_tables_in_graphs = _OF_TABLES.in_graphs_into("buffer", _from_tables, without=("workspace",))
