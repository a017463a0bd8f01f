"""What holds for the tables of a base MoE layer as the front door makes them."""

from __future__ import annotations

import itertools
import random
from types import ModuleType
from typing import Any, Callable, Mapping, Sequence

import torch

from kernelgen.families.buffers import poison_
from kernelgen.families.case import Law, Variant
from kernelgen.families.moe_align.reference import faults, local_ids, local_pairs
from kernelgen.families.moe_experts import KINDS, Experts, Routed, draw

_TOKENS, _TOP_K, _EXPERTS = 24, 4, 6


def any_routing_is_complete(package: ModuleType, variants: Sequence[Variant], device: str) -> None:
    """No pair is lost, doubled or misplaced, for random sizes and kinds of routing, in a workspace that is used again."""
    rng = random.Random(0)
    workspace = _workspace(device)
    for kind, _ in itertools.product(KINDS, range(4)):
        tokens, top_k, experts = (rng.randint(1, most) for most in (_TOKENS, _TOP_K, _EXPERTS))
        valid = rng.choice((None, 0, 1, tokens // 2, tokens))
        how = Experts(kind, rng.choice((0, 5)), valid, rng.choice((torch.int32, torch.int64)))
        routed = draw(how, tokens, top_k, experts, rng, device)
        hint = rng.choice((None, 1, 1000))
        tables = _align(package, routed, workspace=workspace, num_tokens_hint=hint)
        found = _faults(routed.local, tables)
        assert not found, f"{tokens}, {top_k}, {experts}, {how}: {found[:3]}"


def many_pairs(package: ModuleType, variants: Sequence[Variant], device: str) -> None:
    """Tables of so many pairs that two launches make them, in front of a hint for few."""
    routed = draw(Experts("mixed", 0, 4100), 4200, 8, 5, random.Random(0), device)
    tables = _align(package, routed, num_tokens_hint=7)
    found = _faults(routed.local, tables)
    assert not found, found[:3]


def empty_batch(package: ModuleType, variants: Sequence[Variant], device: str) -> None:
    """No token: no block."""
    routed = draw(Experts(), 0, 2, 3, random.Random(0), device)
    tables = _align(package, routed, workspace=_workspace(device))
    assert int(tables.num_blocks) == 0


def wrong_arguments_are_named(
    package: ModuleType, variants: Sequence[Variant], device: str
) -> None:
    """Arguments that do not fit raise ValueError, with what was given and wanted."""
    routed = draw(Experts(valid=3), 5, 2, 3, random.Random(0), device)
    right = {"topk_ids": routed.topk_ids, "num_experts": 3, "valid_tokens": routed.valid_tokens}
    for label, change in _WRONG.items():
        try:
            package.moe_align(**{**right, **change(right)})
        except ValueError as error:
            complete = all(word in str(error) for word in ("moe_align", "got", "wanted"))
            assert complete, f"{label}: {error}"
        else:
            raise AssertionError(f"{label} is let pass")


def a_map_of_experts(package: ModuleType, variants: Sequence[Variant], device: str) -> None:
    """Tables under an expert_map are those of the local ids, with a workspace and without; they have these for topk_ids."""
    rng = random.Random(3)
    for tokens, experts in ((0, 3), (5, 6), (24, 3)):
        routed = draw(Experts("mixed", ids_dtype=torch.int64), tokens, _TOP_K, experts, rng, device)
        here = [*range(experts), -1, -1, experts]
        rng.shuffle(here)
        expert_map = torch.tensor(here, dtype=torch.int32, device=device)
        ids = local_ids(routed.topk_ids, expert_map)
        local = local_pairs(ids, num_experts=experts, local_expert_start=0, valid_tokens=None)
        for workspace in (_workspace(device), None):
            options = {"num_experts": experts, "expert_map": expert_map, "workspace": workspace}
            tables = package.moe_align(routed.topk_ids, **options)
            assert torch.equal(tables.topk_ids.cpu(), ids), "other local ids"
            found = _faults(local, tables)
            assert not found, f"{tokens} tokens: {found[:3]}"


def graph_replay(package: ModuleType, variants: Sequence[Variant], device: str) -> None:
    """A captured graph makes the tables of whatever routing and number of valid tokens it is replayed with."""
    tokens, top_k, experts = 300, 8, 32
    ids = torch.zeros(tokens, top_k, dtype=torch.int32, device=device)
    valid = torch.zeros(1, dtype=torch.int32, device=device)

    def align() -> Any:
        return package.moe_align(ids, num_experts=experts, valid_tokens=valid, num_tokens_hint=7)

    align()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        tables = align()
    rng = random.Random(1)
    for kind, count in itertools.product(KINDS, (0, 1, 150, tokens)):
        routed = draw(Experts(kind), tokens, top_k, experts, rng, device)
        ids.copy_(routed.topk_ids)
        valid.fill_(count)
        graph.replay()
        torch.cuda.synchronize()
        local = local_pairs(
            routed.topk_ids, num_experts=experts, local_expert_start=0, valid_tokens=count
        )
        found = _faults(local, tables)
        assert not found, f"{kind}, {count} tokens: {found[:3]}"


LAWS = (
    Law(any_routing_is_complete),
    Law(many_pairs, slow=True),
    Law(empty_batch),
    Law(a_map_of_experts),
    Law(wrong_arguments_are_named),
    Law(graph_replay, needs_gpu=True),
)


def _align(package: ModuleType, routed: Routed, **options: Any) -> Any:
    return package.moe_align(
        routed.topk_ids,
        num_experts=routed.num_experts,
        valid_tokens=routed.valid_tokens,
        local_expert_start=routed.start,
        **options,
    )


def _workspace(device: str) -> torch.Tensor:
    size = 8 + 2 * _TOKENS * _TOP_K + 3 * (_EXPERTS + _TOKENS * _TOP_K)
    return poison_(torch.empty(size, dtype=torch.int32, device=device))


def _faults(local: Sequence[Any], tables: Any) -> list[str]:
    count = int(tables.num_blocks)
    blocks = tables.blocks[: 3 * count].view(-1, 3).cpu()
    blocks = blocks[blocks[:, 2] != 0]
    return list(faults(local, tables.pairs.cpu(), blocks, block_m=tables.block_m))


_Arguments = dict[str, Any]

_WRONG: Mapping[str, Callable[[_Arguments], _Arguments]] = {
    "ids as a vector": lambda a: {"topk_ids": a["topk_ids"].flatten()},
    "ids that are not whole": lambda a: {"topk_ids": a["topk_ids"].float()},
    "ids with gaps": lambda a: {"topk_ids": a["topk_ids"].repeat(1, 2)[:, ::2]},
    "no experts": lambda a: {"num_experts": 0},
    "more experts than a program counts": lambda a: {"num_experts": 5000},
    "a start beside a map": lambda a: {"local_expert_start": 1, "expert_map": a["topk_ids"].flatten().contiguous()},
    "a map in 64 bits": lambda a: {"expert_map": a["topk_ids"].flatten().long()},
    "a start below zero": lambda a: {"local_expert_start": -1},
    "a hint of nothing": lambda a: {"num_tokens_hint": 0},
    "a block size that is no power of two": lambda a: {"block_m": 24},
    "two numbers of valid tokens": lambda a: {"valid_tokens": a["valid_tokens"].repeat(2)},
    "valid tokens in 64 bits": lambda a: {"valid_tokens": a["valid_tokens"].long()},
    "a workspace that is too small": lambda a: {"workspace": a["topk_ids"].new_empty(8)},
    "a workspace of floats": lambda a: {"workspace": torch.empty(4096, device=a["topk_ids"].device)},
}
