"""Cases of the runs of adapters: exactly the reference's tables, in poisoned memory, nothing written around them."""

from __future__ import annotations

import dataclasses
from types import ModuleType
from typing import Callable

import torch

from kernelgen.buffers import allocate, positions, seal
from kernelgen.cases.base import Case as BaseCase
from kernelgen.cases.base import Tags
from kernelgen.cases.moe_adapters import MIXED, Adapters
from kernelgen.cases.moe_adapters import draw as draw_adapters
from kernelgen.cases.moe_experts import SPREAD, Experts, draw
from kernelgen.reference.moe_align import moe_align
from kernelgen.reference.moe_runs import moe_runs

BODY = ("schedule",)
_NO_ROWS = [2**30, 2**30, 0]  # an entry of the tables without rows, where nothing may be read


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

CASES = (
    Case("one", "every size is one", tokens=1, top_k=1, experts=1, adapters=Adapters("one", 1)),
    Case("lt_block", "a block that is not full", tokens=9, top_k=1, routing=_ONE),
    Case("eq_block", "one full block", tokens=16, top_k=1, routing=_ONE, adapters=Adapters("spread")),
    Case("gt_block", "a run that goes on in the next block", tokens=33, top_k=1, routing=_ONE, adapters=Adapters("one", 2)),
    Case("ragged", "groups and runs of every size", tokens=61, top_k=3, experts=5, adapters=Adapters(loras=7)),
    Case("no_adapter", "a step without adapters: no run", tokens=20, adapters=Adapters("none")),
    Case("disabled", "adapters that are loaded but disabled", tokens=40, adapters=Adapters("spread", 4, (0, 3))),
    Case("a_run_a_row", "every row a run of its own", tokens=16, top_k=1, routing=_ONE, adapters=Adapters("spread", 200)),
    Case("blocks_of_128", "the largest block", tokens=300, top_k=1, routing=Experts("skewed"), block_m=128),
    Case("nothing_local", "no block at all", routing=Experts("away")),
    Case("some_valid", "tokens that are not valid are absent", tokens=30, routing=Experts("mixed", valid=13)),
    Case("expert_parallel", "ids on both sides are elsewhere", tokens=40, routing=Experts("mixed", start=3)),
    Case("many_experts", "more blocks than a program looks at at a time", tokens=420, top_k=1, experts=420),
    Case("gt_chunk", "more rows of an expert than a program looks at at a time", tokens=700, top_k=2, experts=2),
)


def check(package: ModuleType, launcher: Callable[..., None], tags: Tags, case: Case, device: str) -> float:
    """Run ``case`` on a variant's launcher; the tables are right or not, so the ratio is 0.

    Raises:
        AssertionError: a table differs from the reference, or memory around it changed.
    """
    rng = case.random()
    routed = draw(case.routing, case.tokens, case.top_k, case.experts, rng, device)
    adapters = draw_adapters(case.adapters, case.tokens, rng, device)
    base = moe_align(routed.local, block_m=case.block_m)
    wanted = moe_runs(routed.local, adapters.of_token, top_k=case.top_k, block_m=case.block_m)
    num_pairs, count = case.tokens * case.top_k, len(base.pairs)
    order = allocate((num_pairs,), (1,), torch.int32, device)
    order[:count] = base.pairs.to(device)
    entries = [_NO_ROWS, *(entry for block in base.blocks.tolist() for entry in (block, _NO_ROWS))]
    blocks = allocate((len(entries) + 2, 3), (3, 1), torch.int32, device)
    blocks[: len(entries)] = torch.tensor(entries, dtype=torch.int32).to(device)
    shapes = {"pairs": (num_pairs,), "run_of_row": (num_pairs,), "runs": (num_pairs, 2)}
    views = {name: allocate(s, (2, 1)[-len(s) :], torch.int32, device) for name, s in shapes.items()}
    sealed = {name: seal(view) for name, view in views.items()}
    launcher(
        *views.values(),
        order,
        blocks,
        torch.tensor([len(entries)], dtype=torch.int32, device=device),
        adapters.token_lora_mapping,
        adapters.adapter_enabled,
        top_k=case.top_k,
        max_loras=adapters.loras,
        block_m=case.block_m,
    )
    exact = {"pairs": torch.tensor([item.pair for item in wanted.order], dtype=torch.int32), "run_of_row": wanted.run_of_row}
    exact["runs"] = wanted.runs
    for name, guarded in sealed.items():
        written = exact[name] >= 0 if name == "runs" else torch.ones(count, dtype=torch.bool)
        rows = torch.zeros(num_pairs, dtype=torch.bool)
        rows[:count] = written[:, 0] if name == "runs" else written
        inside = positions(guarded, rows.to(device))
        stray = int((guarded.changed() & ~inside).sum())
        assert not stray, f"{name}: {stray} elements changed around it"
        found = views[name][:count].cpu()
        assert torch.equal(found[written], exact[name][written]), f"{name} {found.tolist()}, wanted {exact[name].tolist()}"
    return 0.0
