"""Cases of the runs of adapters: exactly the reference's tables, in poisoned memory, nothing written around them."""

from __future__ import annotations

import dataclasses
import importlib
from types import ModuleType
from typing import Callable

import torch

from kernelgen.families.buffers import allocate, positions, seal
from kernelgen.families.case import Case as BaseCase
from kernelgen.families.case import Tags
from kernelgen.families.moe_adapters import MIXED, Adapters
from kernelgen.families.moe_adapters import draw as draw_adapters
from kernelgen.families.moe_experts import SPREAD, Experts, draw
from kernelgen.families.moe_runs.reference import moe_runs, with_ranks

BODY = ("schedule",)

@dataclasses.dataclass(frozen=True)
class Case(BaseCase):
    """Sizes of one batch."""

    tokens: int = 12
    top_k: int = 2
    experts: int = 3
    block_m: int = 16
    routing: Experts = SPREAD
    adapters: Adapters = MIXED


_ONE = Experts("one")
_RANKS = (-40, 0, 1, 16, 17, 64, 10**6)
_ONE_LAUNCH = {"schedule": ("one_launch",)}
_THREE = {"schedule": ("three_launch",)}

CASES = (
    Case("one", "every size is one", tokens=1, top_k=1, experts=1, adapters=Adapters("one", 1)),
    Case("lt_block", "a block that is not full", tokens=9, top_k=1, routing=_ONE),
    Case("eq_block", "one full block", tokens=16, top_k=1, routing=_ONE, adapters=Adapters("spread")),
    Case("gt_block", "a run that goes on in the next block", tokens=33, top_k=1, routing=_ONE, adapters=Adapters("one", 2)),
    Case("ragged", "groups and runs of every size", tokens=61, top_k=3, experts=5, adapters=Adapters(loras=7)),
    Case("ranked", "ranks of every size", tokens=61, top_k=3, experts=5, adapters=Adapters(loras=7, ranks=_RANKS)),
    Case("eight_adapters", "a power of two, and none", tokens=64, experts=2, adapters=Adapters(loras=8)),
    Case("no_adapter", "a step without adapters: no run", tokens=20, adapters=Adapters("none")),
    Case("disabled", "adapters that are loaded but disabled", tokens=40, adapters=Adapters("spread", 4, (0, 3))),
    Case("a_run_a_row", "every row a run of its own", tokens=16, top_k=1, routing=_ONE, adapters=Adapters("spread", 200)),
    Case("blocks_of_128", "the largest block", tokens=300, top_k=1, routing=Experts("skewed"), block_m=128),
    Case("empty", "no token", tokens=0),
    Case("nothing_local", "no block at all", routing=Experts("away")),
    Case("some_valid", "tokens that are not valid are absent", tokens=30, routing=Experts("mixed", valid=13)),
    Case("more_than_there_are", "a count beyond the batch", routing=Experts(valid=2**31 - 1)),
    Case("expert_parallel", "ids on both sides are elsewhere", tokens=40, routing=Experts("mixed", start=3)),
    Case("ids_int64", "ids as torch.topk gives them", routing=Experts("mixed", ids_dtype=torch.int64)),
    Case("many_experts", "more experts than pairs", tokens=40, top_k=2, experts=420, routing=Experts("skewed")),
    Case("gt_width", "more rows of an expert than are counted at a time", tokens=700, top_k=2, experts=2),
    Case("gt_chunk", "more pairs than a program holds at a time", only=_ONE_LAUNCH, tokens=1030, top_k=8, experts=2, block_m=128),
    Case("many_blocks", "more blocks than are looked at at a time", only=_THREE, tokens=2100, top_k=8, experts=2),
)
# Arguments that the cases need not tell apart, and why.
SAME = {
    "CHUNK": "launches have one",
    "BLOCKS": "launches have one",
    "ROWS": "launches of so few rows have one",
}


def check(package: ModuleType, launcher: Callable[..., None], tags: Tags, case: Case, device: str) -> float:
    """Run ``case`` on a variant's launcher; the tables are right or not, so the ratio is 0.

    Raises:
        AssertionError: a table differs from the reference, or memory around it changed.
    """
    rng = case.random()
    routed = draw(case.routing, case.tokens, case.top_k, case.experts, rng, device)
    adapters = draw_adapters(case.adapters, case.tokens, rng, device)
    wanted = moe_runs(routed.local, adapters.of_token, top_k=case.top_k, block_m=case.block_m)
    num_pairs, count = case.tokens * case.top_k, len(wanted.order)
    align = importlib.import_module(f"{package.__name__}.moe_align._op")
    most = align.max_blocks(case.tokens, case.top_k, case.experts, case.block_m)
    shapes = {"pairs": (num_pairs,), "blocks": (most, 3), "num_blocks": (1,), "run_of_row": (num_pairs,)}
    needed = importlib.import_module(launcher.__module__).schedule.scratch_size(num_pairs, case.experts)
    shapes |= {"runs": (num_pairs, 2), "scratch": (needed,)}
    views = {name: allocate(s, (3 if name == "blocks" else 2, 1)[-len(s) :], torch.int32, device) for name, s in shapes.items()}
    sealed = {name: seal(view) for name, view in views.items()}
    launcher(
        *views.values(),
        routed.topk_ids,
        routed.valid_tokens,
        adapters.token_lora_mapping,
        adapters.adapter_enabled,
        adapters.lora_ranks,
        num_experts=case.experts,
        local_expert_start=case.routing.start,
        max_loras=adapters.loras,
        block_m=case.block_m,
    )
    for name, guarded in sealed.items():
        shape = views[name].shape
        rows = torch.arange(shape[0]) < (shape[0] if name in ("blocks", "num_blocks", "scratch") else count)
        if name == "runs":
            rows = wanted.runs[:, 0] >= 0
            rows = torch.cat((rows, torch.zeros(num_pairs - count, dtype=torch.bool)))
        inside = positions(guarded, rows.to(device).view(-1, *(1,) * (len(shape) - 1)).expand(shape))
        stray = int((guarded.changed() & ~inside).sum())
        assert not stray, f"{name}: {stray} elements changed around it"
    blocks = views["blocks"][: int(views["num_blocks"])].cpu()
    assert (blocks[:, 1] < max(num_pairs, 1)).all(), "a block begins behind the last pair"
    exact = {"pairs": torch.tensor([item.pair for item in wanted.order], dtype=torch.int32), "run_of_row": wanted.run_of_row}
    runs = wanted.runs if adapters.lora_ranks is None else with_ranks(wanted.runs, adapters.lora_ranks.tolist())
    for name, table in {**exact, "runs": runs}.items():
        found, written = views[name][:count].cpu(), table >= 0 if name == "runs" else torch.ones(count, dtype=torch.bool)
        assert torch.equal(found[written], table[written]), f"{name} {found.tolist()}, wanted {table.tolist()}"
    assert torch.equal(blocks[blocks[:, 2] != 0], wanted.blocks), f"blocks {blocks.tolist()}, wanted {wanted.blocks.tolist()}"
    return 0.0
