"""Cases of the tables of a base MoE layer: exactly the reference's tables, in poisoned memory, nothing written around them."""

from __future__ import annotations

import dataclasses
import importlib
import sys
from types import ModuleType
from typing import Callable

import torch

from kernelgen.families.buffers import allocate, positions, seal
from kernelgen.families.case import Case as BaseCase
from kernelgen.families.case import Tags
from kernelgen.families.moe_align.reference import faults, local_ids, moe_align
from kernelgen.families.moe_experts import SPREAD, Experts, draw

BODY = ("schedule",)


@dataclasses.dataclass(frozen=True)
class Case(BaseCase):
    """Sizes of one batch."""

    tokens: int = 7
    top_k: int = 2
    experts: int = 3
    block_m: int = 16
    routing: Experts = SPREAD


CASES = (
    Case("one", "every size is one", tokens=1, top_k=1, experts=1),
    Case("lt_block", "a block that is not full", tokens=9, top_k=1, routing=Experts("one")),
    Case("eq_block", "one full block", tokens=16, top_k=1, routing=Experts("one")),
    Case("gt_block", "full blocks, then a row", tokens=33, top_k=1, routing=Experts("one")),
    Case("ragged", "groups of every size", tokens=61, top_k=3, experts=5),
    Case("block_32", "another block size", tokens=70, routing=Experts("skewed"), block_m=32),
    Case("block_64", "another block size", tokens=70, routing=Experts("one"), block_m=64),
    Case("block_128", "another block size", tokens=130, routing=Experts("skewed"), block_m=128),
    Case("nothing_local", "no block at all", routing=Experts("away")),
    Case("no_valid_token", "a step of padding alone", routing=Experts(valid=0)),
    Case("one_valid_token", "a graph for many tokens, replayed for one", routing=Experts(valid=1)),
    Case("some_valid", "pairs of tokens that are not valid are absent", tokens=30, routing=Experts("mixed", valid=13)),
    Case("more_than_there_are", "a count beyond the batch", routing=Experts(valid=2**31 - 1)),
    Case("expert_parallel", "the second rank: ids on both sides are elsewhere", tokens=40, routing=Experts("mixed", start=3)),
    Case("ids_int64", "ids as torch.topk gives them", routing=Experts("mixed", ids_dtype=torch.int64)),
    Case("twice_the_expert", "an expert twice in a token", top_k=4, experts=2),
    Case("many_experts", "more experts than pairs, and than lanes", tokens=5, experts=70, routing=Experts("skewed")),
    Case(
        "gt_chunk",
        "more pairs than a program holds at a time",
        tokens=1030,
        top_k=8,
        experts=2,
        routing=Experts("mixed", valid=1029),
    ),
)
# Arguments that the cases need not tell apart, and why.
SAME = {
    "CHUNK": "launches have one",
    "ROWS": "launches of so few rows have one",
    "BLOCK": "launches have one",
}


def check(
    package: ModuleType, launcher: Callable[..., None], tags: Tags, case: Case, device: str
) -> float:
    """Run ``case`` on a variant's launcher; the tables are right or not, so the ratio is 0.

    Raises:
        AssertionError: a table differs from the reference, or memory around it changed.
    """
    routed = draw(case.routing, case.tokens, case.top_k, case.experts, case.random(), device)
    if tags["schedule"] == "local_ids":
        _check_local_ids(launcher, case, routed.topk_ids)
        return 0.0
    wanted = moe_align(routed.local, block_m=case.block_m)
    num_pairs = case.tokens * case.top_k
    max_blocks = importlib.import_module(f"{package.__name__}.moe_align._op").max_blocks
    sizes = {
        "pairs": num_pairs,
        "blocks": 3 * max_blocks(case.tokens, case.top_k, case.experts, case.block_m),
        "num_blocks": 1,
        "scratch": sys.modules[launcher.__module__].schedule.scratch_size(num_pairs, case.experts),
    }
    views = {name: allocate((n,), (1,), torch.int32, device) for name, n in sizes.items()}
    sealed = {name: seal(view) for name, view in views.items()}
    launcher(
        *views.values(),
        routed.topk_ids,
        routed.valid_tokens,
        num_experts=case.experts,
        local_expert_start=case.routing.start,
        block_m=case.block_m,
    )
    for name, guarded in sealed.items():
        inside = positions(guarded, torch.tensor(True, device=device))
        stray = int((guarded.changed() & ~inside).sum())
        assert not stray, f"{name}: {stray} elements changed around it"
    count = int(views["num_blocks"])
    assert 0 <= 3 * count <= sizes["blocks"], f"{count} entries do not fit"
    blocks, pairs = views["blocks"][: 3 * count].view(-1, 3).cpu(), views["pairs"].cpu()
    assert (blocks[:, 1] < max(num_pairs, 1)).all(), "a block begins behind the last pair"
    blocks = blocks[blocks[:, 2] != 0]
    found = list(faults(routed.local, pairs, blocks, block_m=case.block_m))
    assert not found, "; ".join(found[:3])
    assert torch.equal(blocks, wanted.blocks), f"blocks {blocks.tolist()}, wanted {wanted.blocks.tolist()}"
    assert torch.equal(pairs[: len(wanted.pairs)], wanted.pairs), "pairs are not in ascending order"
    return 0.0


def _check_local_ids(launcher: Callable[..., None], case: Case, topk_ids: torch.Tensor) -> None:
    """Under a map that has ids of other experts, some that no weights have, and -1 among those that are here."""
    here = [*range(case.experts), *[-1] * 5, case.experts, 2**31 - 1]  # "mixed" has the id case.experts + 7
    case.random().shuffle(here)
    expert_map = allocate((len(here),), (1,), torch.int32, str(topk_ids.device))
    expert_map.copy_(torch.tensor(here))
    out = allocate(topk_ids.shape, (case.top_k, 1), torch.int32, str(topk_ids.device))
    guarded = seal(out)
    launcher(out, topk_ids, expert_map)
    stray = int((guarded.changed() & ~positions(guarded, torch.tensor(True, device=out.device))).sum())
    assert not stray, f"out: {stray} elements changed around it"
    assert torch.equal(out.cpu(), local_ids(topk_ids, expert_map)), "other ids"
