"""Cases of the tables of a sorted assignment: exactly the reference's tables, in poisoned memory, nothing written around them."""

from __future__ import annotations

import dataclasses
import importlib
import sys
from types import ModuleType
from typing import Callable, Sequence

import torch

from kernelgen.families.buffers import allocate, allocate_sparse, positions, seal
from kernelgen.families.case import Case as BaseCase
from kernelgen.families.case import Tags
from kernelgen.families.moe_experts import far_ids
from kernelgen.families.moe_route.reference import (
    Live,
    PaddedTables,
    by_first_token,
    faults,
    from_padded,
    live_pairs,
    moe_route,
    padded_tables,
)
from kernelgen.families.moe_routing import SPREAD, Routed, Routing, Sizes, draw

BODY = ("schedule",)


@dataclasses.dataclass(frozen=True)
class Case(BaseCase):
    """Sizes of one batch.

    Attributes:
        routing: how experts and adapters are drawn.
        names_adapters: an engine's tables come with the adapters of the batch, and hold rows of an older one.
        row_stride: elements between the rows of an engine's tables, 0: as close as they fit.
        room: rows that a held route has behind the batch.
        valid: how many tokens of the batch count, None: all.
    """

    tokens: int = 7
    top_k: int = 2
    experts: int = 3
    loras: int = 2
    block_m: int = 16
    routing: Routing = SPREAD
    names_adapters: bool = True
    row_stride: int = 0
    room: int = 5
    valid: int | None = None


_ONE_GROUP = Routing("one_group")
_HELD = {"schedule": ("held",)}
_THREE = {"schedule": ("three_launch",)}

CASES = (
    Case("one", "every size is one", tokens=1, top_k=1, experts=1, loras=1),
    Case("lt_block", "a block that is not full", tokens=9, top_k=1, routing=_ONE_GROUP),
    Case("eq_block", "one full block", tokens=16, top_k=1, routing=_ONE_GROUP),
    Case("gt_block", "full blocks, then a row", tokens=33, top_k=1, routing=_ONE_GROUP),
    Case("ragged", "groups of every size", tokens=61, top_k=3, experts=5, loras=3),
    Case("block_32", "another block size", tokens=70, top_k=1, routing=_ONE_GROUP, block_m=32),
    Case("block_64", "another block size", tokens=70, routing=Routing("last"), block_m=64),
    Case("block_128", "another block size", tokens=130, top_k=1, routing=_ONE_GROUP, block_m=128),
    Case("nothing_live", "no block at all", routing=Routing("none")),
    Case("mixed", "rows that are not live", tokens=30, loras=4, routing=Routing("mixed")),
    Case(
        "disabled",
        "an adapter without expert weights between two that have them",
        tokens=30,
        loras=3,
        routing=Routing("mixed", disabled=(1,)),
    ),
    Case("expert_parallel", "global ids", tokens=30, routing=Routing("mixed", expert_map=True)),
    Case(
        "ids_int64", "ids as torch.topk gives them", tokens=30, routing=Routing("mixed", ids_dtype=torch.int64)
    ),
    Case(
        "last_adapter", "the last adapter and expert", loras=5, experts=9, routing=Routing("last")
    ),
    Case("twice_the_expert", "an expert twice in a token", top_k=4, routing=Routing("duplicates")),
    Case("many_groups", "more groups than pairs", tokens=20, experts=24, loras=9),
    Case("no_names", "an engine that names no adapters", names_adapters=False, tokens=12),
    Case("many_entries", "more blocks in rows than a turn takes", tokens=48, experts=40, loras=40, names_adapters=False),
    Case(
        "far_rows",
        "32-bit offsets of rows wrap",
        loras=3,
        row_stride=2**30 + 3,
        routing=Routing("last"),
    ),
    Case("eq_chunk", "as many pairs as a program takes", tokens=256, experts=4),
    Case("gt_chunk", "one pair more", tokens=171, top_k=3, routing=Routing("mixed", expert_map=True)),
    Case("chunks", "groups that reach over several programs", tokens=600, top_k=2, experts=7),
    Case("many_chunks", "more programs than are added up at a time", only=_THREE, tokens=16500, top_k=1),
    Case("stale", "ids of an older batch behind the tokens that count", only=_HELD, tokens=150, loras=3, valid=77),
    Case("all_stale", "no token counts", only=_HELD, valid=0),
    Case("valid_beyond", "more tokens said to count than there are", only=_HELD, routing=Routing("mixed"), valid=1000),
    Case("full", "as many tokens as rows", only=_HELD, tokens=256, room=0),
    Case("empty", "a batch of nothing", only=_HELD, tokens=0, room=140),
    Case("steps", "more tokens than are counted at a time", only=_HELD, tokens=4200, top_k=1, loras=33),
)
# Arguments that the cases need not tell apart, and why.
SAME = {
    "CHUNK": "launches have one",
    "WIDTH": "launches have one",
    "STEP": "launches have one",
    "ENTRIES": "launches have one",
}


def check(
    package: ModuleType, launcher: Callable[..., None], tags: Tags, case: Case, device: str
) -> float:
    """Run ``case`` on a variant's launcher; the tables are right or not, so the ratio is 0.

    Raises:
        AssertionError: a table differs from the reference, or memory around it changed.
    """
    tokens = case.tokens
    if tags["schedule"] == "one_launch":
        most = importlib.import_module(f"{package.__name__}.moe_route._op").MAX_PAIRS
        tokens = min(tokens, most // case.top_k)
    sizes = Sizes(tokens, case.top_k, case.experts, case.loras)
    routed = draw(case.routing, sizes, case.random(), device)
    if tags["schedule"] == "held":
        _check_held(launcher, case, routed, device)
        return 0.0
    if tags["schedule"] == "from_tables":
        _check_from_tables(launcher, case, routed, device)
    else:
        _check_sort(launcher, case, routed, device)
    return 0.0


class _Written:
    """int32 memory that a launcher fills, all poison before."""

    def __init__(self, device: str, **sizes: int) -> None:
        self.views = {name: allocate((n,), (1,), torch.int32, device) for name, n in sizes.items()}
        self.sealed = {name: seal(view) for name, view in self.views.items()}

    def read(self, name: str, size: int) -> torch.Tensor:
        assert 0 <= size <= self.views[name].numel(), f"{name}: {size} entries do not fit"
        return self.views[name][:size].cpu()

    def verify(self) -> None:
        for name, guarded in self.sealed.items():
            inside = positions(guarded, torch.tensor(True, device=guarded.view.device))
            stray = int((guarded.changed() & ~inside).sum())
            assert not stray, f"{name}: {stray} elements changed around it"


def _check_sort(launcher: Callable[..., None], case: Case, routed: Routed, device: str) -> None:
    num_pairs, num_groups = routed.topk_ids.numel(), case.loras * case.experts
    wanted = moe_route(routed.live, block_m=case.block_m)
    scratch = sys.modules[launcher.__module__].schedule.scratch_size(num_pairs, num_groups)
    groups = min(num_pairs, num_groups)
    max_blocks = groups + (num_pairs - groups) // case.block_m
    written = _Written(
        device, pairs=num_pairs, blocks=4 * max_blocks, num_blocks=1, scratch=scratch
    )
    views = written.views
    launcher(
        views["pairs"],
        views["blocks"].view(-1, 4),
        views["num_blocks"],
        views["scratch"],
        *routed.tensors.values(),
        num_experts=case.experts,
        max_loras=case.loras,
        block_m=case.block_m,
    )
    written.verify()
    count = int(views["num_blocks"])
    assert count == len(wanted.blocks), f"{count} blocks, wanted {len(wanted.blocks)}"
    blocks, pairs = written.read("blocks", 4 * count).view(-1, 4), written.read("pairs", num_pairs)
    _raise(list(faults(routed.live, pairs, blocks, block_m=case.block_m)))
    assert torch.equal(
        blocks, wanted.blocks
    ), f"blocks {blocks.tolist()}, wanted {wanted.blocks.tolist()}"
    assert torch.equal(pairs[: len(wanted.pairs)], wanted.pairs), "pairs are not in ascending order"


def _check_held(launcher: Callable[..., None], case: Case, routed: Routed, device: str) -> None:
    tokens, loras = case.tokens, case.loras
    mapping, capacity = routed.token_lora_mapping.to(case.routing.ids_dtype), tokens + case.room
    counted = tokens if case.valid is None else min(case.valid, tokens)
    adapters = [a if 0 <= a < loras and t < counted else -1 for t, a in enumerate(mapping.tolist())]
    if mapping.dtype == torch.int64:
        mapping = torch.where(torch.tensor(adapters, device=device) < 0, 2**32, mapping)  # 0, if it were cut
    heights = [16, 32, 64, 128]
    most = [min(capacity, loras) + (capacity - min(capacity, loras)) // height for height in heights]
    written = _Written(device, adapters=capacity, pairs=capacity, blocks=4 * sum(most), num_blocks=4)
    views = written.views
    valid = None if case.valid is None else torch.tensor([case.valid], dtype=torch.int32, device=device)
    tables = (views["adapters"], views["pairs"], views["blocks"].view(-1, 4), views["num_blocks"])
    launcher(*tables, mapping, valid, max_loras=loras)
    written.verify()
    assert written.read("adapters", capacity).tolist() == adapters + [-1] * case.room, "adapters of tokens"
    live, at = [Live(t, a, 0) for t, a in enumerate(adapters) if a >= 0], 0
    for i, height in enumerate(heights):
        wanted = by_first_token(moe_route(live, block_m=height))
        count = int(views["num_blocks"][i])
        blocks = written.read("blocks", 4 * sum(most)).view(-1, 4)[at : at + count]
        assert torch.equal(blocks, wanted.blocks), f"{height}: blocks {blocks.tolist()}, wanted {wanted.blocks.tolist()}"
        assert torch.equal(written.read("pairs", len(live)), wanted.pairs), "pairs are not in ascending order"
        at += most[i]


def _check_from_tables(
    launcher: Callable[..., None], case: Case, routed: Routed, device: str
) -> None:
    num_pairs = routed.topk_ids.numel()
    tables, lora_ids = engine_tables(routed, case.block_m, case.names_adapters)
    wanted = from_padded(
        tables,
        num_pairs=num_pairs,
        num_experts=case.experts,
        block_size=case.block_m,
        lora_ids=lora_ids,
        adapter_enabled=routed.adapter_enabled,
    )
    max_blocks = case.loras * tables.expert_ids.shape[1]
    written = _Written(device, pairs=max_blocks * case.block_m, blocks=4 * max_blocks, num_blocks=1)
    views = written.views
    launcher(
        views["pairs"],
        views["blocks"].view(-1, 4),
        views["num_blocks"],
        _place(tables.sorted_token_ids, case.row_stride, device),
        _place(tables.expert_ids, tables.expert_ids.shape[1] + 3, device),
        tables.num_tokens_post_padded.to(device),
        None if lora_ids is None else lora_ids.to(device),
        routed.adapter_enabled,
        num_pairs=num_pairs,
        num_experts=case.experts,
        max_loras=case.loras,
        block_m=case.block_m,
    )
    written.verify()
    count = int(views["num_blocks"])
    assert count == len(wanted), f"{count} blocks, wanted {len(wanted)}"
    blocks = written.read("blocks", 4 * count).view(-1, 4)
    pairs = written.read("pairs", views["pairs"].numel())
    _raise(list(faults(routed.live, pairs, blocks, block_m=case.block_m)))
    for (adapter, expert, first, rows), block in zip(blocks.tolist(), wanted, strict=True):
        got = (adapter, expert, pairs[first : first + rows].tolist())
        assert got == block, f"block {got}, wanted {block}"


def _place(table: torch.Tensor, row_stride: int, device: str) -> torch.Tensor:
    if not row_stride:
        return table.to(device)
    return (allocate_sparse if row_stride > 2**29 else allocate)(table.shape, (row_stride, 1), table.dtype, device).copy_(table)


def engine_tables(
    routed: Routed, block_size: int, names_adapters: bool = True
) -> tuple[PaddedTables, torch.Tensor | None]:
    """The tables that an engine makes of a batch, and its lora_ids, on the CPU.

    They hold more than what is live: groups of disabled adapters, blocks of experts that are elsewhere, and, where
    ``lora_ids`` names the adapters of the batch, rows of the others from an older batch. Rows with names are as short as
    they can be, those without as long as an engine must fear.
    """
    tokens, top_k, experts, loras = routed.sizes
    num_pairs, far = tokens * top_k, far_ids(torch.int32)
    groups: dict[tuple[int, int], list[int]] = {}
    loaded = live_pairs(
        routed.topk_ids,
        routed.token_lora_mapping,
        num_experts=experts,
        max_loras=loras,
        expert_map=routed.expert_map,
    )
    for pair, adapter, expert in loaded:
        groups.setdefault((adapter, expert), []).append(pair)
    for pair in sorted(set(range(num_pairs)) - {item.pair for item in loaded}):
        adapter = int(routed.token_lora_mapping[pair // top_k])
        if 0 <= adapter < loras:
            groups.setdefault((adapter, (-1, experts, *far)[pair % 4]), []).append(pair)
    rows = [(*group, pairs) for group, pairs in sorted(groups.items())]
    row_size = num_pairs + min(experts, num_pairs) * (block_size - 1)
    if names_adapters:
        row_size = max([_row_size(rows, adapter, block_size) for adapter in range(loras)])
    tables = padded_tables(
        rows, num_pairs=num_pairs, max_loras=loras, row_size=row_size, block_size=block_size
    )
    padding = (tables.sorted_token_ids == num_pairs).nonzero().T
    tables.sorted_token_ids[tuple(padding[:, ::2])] = far[0]
    if not names_adapters:
        return tables, None
    active = sorted(set(routed.token_lora_mapping.clamp(min=-1, max=loras).tolist()) - {loras})
    lora_ids = torch.tensor([*active, *far, *[-1] * (loras + 1 - len(active))], dtype=torch.int32)
    for adapter in set(range(loras)) - set(active):
        tables.num_tokens_post_padded[adapter] = row_size
    return tables, lora_ids


def _row_size(rows: Sequence[tuple[int, int, Sequence[int]]], adapter: int, block_size: int) -> int:
    """Entries of an adapter's row without the padding of its last block; at least one."""
    sizes = [len(pairs) for owner, _, pairs in rows if owner == adapter]
    padded = [-(-size // block_size) * block_size for size in sizes[:-1]]
    return max(1, sum(padded) + sum(sizes[-1:]))


def groups_of(pairs: torch.Tensor, blocks: torch.Tensor) -> dict[tuple[int, int], list[int]]:
    """(adapter, expert) -> pairs in the order of the tables."""
    found: dict[tuple[int, int], list[int]] = {}
    order = pairs.tolist()
    for adapter, expert, first, rows in blocks.tolist():
        found.setdefault((adapter, expert), []).extend(order[first : first + rows])
    return found


def _raise(found: Sequence[str]) -> None:
    assert not found, "; ".join(found[:3])
