"""Cases of the sum of a base product and a LoRA delta."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import sys
from types import ModuleType
from typing import Callable

import torch

from kernelgen.core.model import VOCABULARY
from kernelgen.families.buffers import allocate, allocate_sparse, positions, seal
from kernelgen.families.case import Case as BaseCase
from kernelgen.families.case import Tags, worst_ratio
from kernelgen.families.moe_add.reference import moe_add
from kernelgen.families.moe_routing import SPREAD, Routing, Sizes, draw

BODY = ("dtype",)

_HUGE = 2**31 + 64  # elements: out of reach of a 32-bit offset


@dataclasses.dataclass(frozen=True)
class Case(BaseCase):
    """Sizes and layout of one call; rows of delta that LoRA does not write are NaN.

    Attributes:
        gap: elements between rows of out; those of delta lie 8 further apart.
        offset: elements before the first behind a 16-byte boundary.
        row_stride: of out, where it is given.
    """

    tokens: int = 5
    top_k: int = 2
    experts: int = 3
    loras: int = 2
    n: int = 80
    routing: Routing = SPREAD
    gap: int = 8
    offset: int = 0
    row_stride: int | None = None
    own_tiles: bool = False


CASES = (
    Case("one", "every size is one", tokens=1, top_k=1, experts=1, loras=1, n=1),
    Case("lt_tile", "a tile that is not full", n=40),
    Case("eq_tile", "one full tile", n=64),
    Case("gt_tile", "a full tile, then a column", n=65),
    Case("empty", "a launch without programs", tokens=0),
    Case("nothing_live", "a poisoned delta that no row of is added", routing=Routing("none")),
    Case(
        "mixed",
        "rows that LoRA leaves alone between those that it writes",
        core=True,
        tokens=16,
        loras=3,
        routing=Routing("mixed", disabled=(0,)),
    ),
    Case("expert_parallel", "global ids", core=True, tokens=16, routing=Routing("mixed", expert_map=True)),
    Case("ids_int64", "ids as torch.topk gives them", tokens=8, routing=Routing("mixed", ids_dtype=torch.int64)),
    Case("unaligned", "odd strides, a base that is not 16-byte aligned", gap=1, offset=1, n=33),
    Case("own_tiles", "the tiles that the rule takes", own_tiles=True, n=500),
    Case("huge_rows", "32-bit offsets of rows wrap", row_stride=_HUGE // 4, tokens=4),
)
EXACT = tuple(case for case in CASES if case.name in ("mixed",))  # what exact algebra takes, on every text


def check(
    package: ModuleType, launcher: Callable[..., None], tags: Tags, case: Case, device: str
) -> float:
    """Run ``case`` on a variant's launcher; return the worst error over its bound.

    Raises:
        AssertionError: the variant is wrong.
    """
    dtype = getattr(torch, str(VOCABULARY["dtype"][tags["dtype"]]["torch_dtype"]))
    sizes = Sizes(case.tokens, case.top_k, case.experts, case.loras)
    routed = draw(case.routing, sizes, case.random(), device)
    numbers, shape = case.generator(), (case.tokens, case.top_k, case.n)
    row = case.row_stride or case.n + case.gap
    make = allocate_sparse if case.row_stride else functools.partial(allocate, offset=case.offset)
    out, delta = (make(shape, (case.top_k * each, each, 1), dtype, device) for each in (row, row + 8))
    written = torch.zeros(shape[:2], dtype=torch.bool)
    for place in itertools.product(range(case.tokens), range(case.top_k)):  # a NaN that something is added to may keep its bits
        out[place] = torch.randn(case.n, generator=numbers).to(out)
    for pair, _, _ in routed.live:
        place = divmod(pair, case.top_k)
        written[place] = True
        delta[place] = torch.randn(case.n, generator=numbers).to(delta)
    expected = moe_add(out, delta, routed.live)
    guarded = seal(out, sparse=case.row_stride is not None)
    ids, mapping = routed.topk_ids, routed.token_lora_mapping
    route = package.moe_route(ids, mapping, **routed.arguments, assignment="naive")
    config = None if case.own_tiles else sys.modules[launcher.__module__].Config(64, 2)
    launcher(out, delta, route, config=config)
    stray = int((guarded.changed() & ~positions(guarded, written.to(device))).sum())
    assert not stray, f"out: {stray} elements changed outside of the rows of live pairs"
    rows = out[written.to(device)].cpu()
    return worst_ratio(rows, expected.out.cpu(), expected.bound.cpu())
