"""Cases of the activation between the two projections of an MoE layer."""

from __future__ import annotations

import dataclasses
import sys
from types import MappingProxyType, ModuleType
from typing import Any, Callable

import torch

from kernelgen.core.model import VOCABULARY
from kernelgen.families.activation import LOW, OTHER, Clamp, clamp_of, slices
from kernelgen.families.buffers import allocate, allocate_sparse, positions, seal
from kernelgen.families.case import Case as BaseCase
from kernelgen.families.case import Tags, worst_ratio
from kernelgen.families.moe_act.reference import moe_act
from kernelgen.families.moe_deltas import draw as draw_delta
from kernelgen.families.moe_experts import SPREAD, Experts, draw, draw_bias
from kernelgen.families.moe_gemm.reference import NO_ROWS

BODY = ("gated", "delta", "interleaved")  # the activations of a text are for EXACT, and for a case of their own

_HUGE = 2**31 + 64  # elements: out of reach of a 32-bit offset


@dataclasses.dataclass(frozen=True)
class Case(BaseCase):
    """Sizes and layout of one call; the memory of what must not be read is NaN.

    Attributes:
        hint: tokens that the grid is sized for, None: all.
        clamp: of an activation that has one.
        nan: the first and the last sum of each row, one of the gate and one of up, are NaN.
        gap, offset: elements between rows, and before the first behind a 16-byte boundary.
        row_stride: of x, where it is given.
        bias_dtype: of a bias, where the variant has one.
    """

    tokens: int = 5
    top_k: int = 2
    experts: int = 3
    n: int = 80
    routing: Experts = SPREAD
    hint: int | None = None
    scale: float = 1.0
    nan: bool = False
    clamp: Clamp = LOW
    gap: int = 8
    offset: int = 0
    row_stride: int | None = None
    own_tiles: bool = False
    bias_dtype: torch.dtype = torch.bfloat16


_BIASED = MappingProxyType({"bias": ("bias",)})

CASES = (
    Case("one", "every size is one", tokens=1, top_k=1, experts=1, n=1),
    Case("lt_tile", "a tile that is not full", n=40),
    Case("eq_tile", "one full tile", n=64),
    Case("gt_tile", "full tiles, then a row and a column", top_k=1, n=65),
    Case("ragged", "pairs that are elsewhere", core=True, tokens=9, top_k=3, n=100, routing=Experts("mixed", start=2)),
    Case("empty", "a launch without programs", tokens=0),
    Case("nothing_local", "no row at all", routing=Experts("away")),
    Case("some_valid", "rows behind the valid tokens", core=True, tokens=7, routing=Experts("mixed", valid=3)),
    Case("no_valid_token", "a step of padding alone", routing=Experts(valid=0)),
    Case("more_than_there_are", "a count beyond the batch", routing=Experts(valid=2**31 - 1)),
    Case("hint_too_low", "programs that take many rows", tokens=9, experts=4, hint=1),
    Case("ids_int64", "ids as torch.topk gives them", tokens=8, routing=Experts("mixed", ids_dtype=torch.int64)),
    Case("large", "gates in the tails of exp", body=("epilogue", "delta"), scale=60.0, clamp=OTHER),
    Case("nan", "a NaN of the gate, and one of up, stay", body=("epilogue", "delta"), nan=True, tokens=2, n=40),
    Case("unaligned", "odd strides, a base that is not 16-byte aligned", gap=1, offset=1, n=33),
    Case("own_tiles", "the tiles that the rule takes", own_tiles=True, n=500),
    Case("bias", "of experts that are not the first", only=_BIASED, body=("delta",), n=70, routing=Experts("mixed", start=2)),
    Case("bias_f32", "a bias in another dtype, and a full tile", only=_BIASED, body=("delta",), n=64, bias_dtype=torch.float32),
    Case(
        "huge_rows",
        "32-bit offsets of rows, and of biases of experts, wrap",
        tokens=4,
        row_stride=_HUGE // 4,
        gap=_HUGE // 2,
        routing=Experts("one"),
    ),
)
EXACT = tuple(case for case in CASES if case.name in ("ragged",))  # what exact algebra takes, on every text
# Arguments that the cases need not tell apart, and why.
SAME = {
    "topk_ids_ptr route_ids_ptr": "the route is of these ids",
    "NUM_EXPERTS ROUTE_EXPERTS": "and of these experts",
}


def check(
    package: ModuleType, launcher: Callable[..., None], tags: Tags, case: Case, device: str
) -> float:
    """Run ``case`` on a variant's launcher; return the worst error over its bound.

    Raises:
        AssertionError: the variant is wrong.
    """
    dtype = getattr(torch, str(VOCABULARY["dtype"][tags["dtype"]]["torch_dtype"]))
    width, clamp = case.n * slices(tags["epilogue"]), clamp_of(tags["epilogue"], case.clamp)
    routed = draw(case.routing, case.tokens, case.top_k, case.experts, case.random(), device)
    numbers, shape = case.generator(), (case.tokens, case.top_k, width)
    row = case.row_stride or width + case.gap
    strides = (case.top_k * row, row if case.top_k > 1 else 1, 1)  # of one pair a token nothing lies in between
    if case.row_stride:
        x = allocate_sparse(shape, strides, dtype, device)
    else:
        x = allocate(shape, strides, dtype, device, offset=case.offset)
    for pair, _ in routed.local:
        x[divmod(pair, case.top_k)] = (case.scale * torch.randn(width, generator=numbers)).to(x)
        if case.nan:
            x[divmod(pair, case.top_k)][:: width - 1] = torch.nan
    bias = None
    if tags["bias"] == "bias":
        bias = draw_bias(routed, width, case.bias_dtype, numbers, device, gap=case.gap + 16, offset=case.offset)
    rows = case.tokens * case.top_k
    h = allocate((rows, case.n), (case.n + case.gap, 1), dtype, device, offset=case.offset)
    h[:] = 1.0  # what it makes of a NaN that it should not read would be one too
    guarded = seal(h)
    beside = None
    if tags["delta"] == "lora":
        layout: dict[str, Any] = {"offset": case.offset, "sparse": case.row_stride is not None}
        beside = draw_delta(package, routed, x, case.random(), numbers, **layout)
    how: dict[str, Any] = {"interleaved": tags["layout"] == "interleaved", "bias": bias, "clamp": clamp}
    expected = moe_act(x, routed.local, epilogue=tags["epilogue"], delta=beside.rows if beside else NO_ROWS, **how)
    config = None if case.own_tiles else sys.modules[launcher.__module__].Config(2, 64, 2)
    launcher(
        h,
        x,
        routed.topk_ids,
        num_experts=case.experts,
        local_expert_start=case.routing.start,
        valid_tokens=routed.valid_tokens,
        num_tokens_hint=case.hint,
        config=config,
        **(beside.arguments if beside else {}),
        **(clamp.given if clamp else {}),
        **({} if bias is None else {"bias": bias}),
    )
    written = torch.zeros(rows, dtype=torch.bool)
    written[expected.rows] = True
    stray = int((guarded.changed() & ~positions(guarded, written.to(device))).sum())
    assert not stray, f"h: {stray} elements changed outside of the rows of local pairs"
    return worst_ratio(h[expected.rows].cpu(), expected.out.cpu(), expected.bound.cpu())
