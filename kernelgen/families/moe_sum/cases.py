"""Cases of the sum over the experts of a token."""

from __future__ import annotations

import dataclasses
import sys
from types import MappingProxyType, ModuleType
from typing import Any, Callable, Mapping, Sequence

import torch

from kernelgen.core.model import VOCABULARY
from kernelgen.families.buffers import allocate, allocate_sparse, positions, seal
from kernelgen.families.case import Case as BaseCase
from kernelgen.families.case import Tags, worst_ratio
from kernelgen.families.moe_deltas import draw as draw_delta
from kernelgen.families.moe_experts import SPREAD, Experts, draw, draw_bias
from kernelgen.families.moe_gemm.reference import NO_ROWS
from kernelgen.families.moe_sum.reference import moe_sum

BODY = ("routed_weight", "rest", "bias")

_HUGE = 2**31 + 64  # elements: out of reach of a 32-bit offset


@dataclasses.dataclass(frozen=True)
class Case(BaseCase):
    """Sizes and layout of one call; the memory of what must not be read is NaN.

    Attributes:
        hint: tokens that the grid is sized for, None: all.
        gap, offset: elements between rows, and before the first behind a 16-byte boundary.
        row_stride: of y, of what LoRA wrote beside it and of out, where it is given.
        y_dtype: of y, where it is not that of the variant.
        keep_empty: tokens without a local expert keep their rows.
        bias_dtype: of a bias, where the variant has one.
    """

    tokens: int = 5
    top_k: int = 2
    experts: int = 3
    n: int = 80
    routing: Experts = SPREAD
    hint: int | None = None
    out_dtype: torch.dtype | None = None
    weights_dtype: torch.dtype = torch.float32
    gap: int = 8
    offset: int = 0
    row_stride: int | None = None
    own_tiles: bool = False
    y_dtype: torch.dtype | None = None
    keep_empty: bool = False
    bias_dtype: torch.dtype = torch.bfloat16


_KEEP: Mapping[str, Sequence[str]] = MappingProxyType({"rest": ["keep"]})
_SPARSE = Experts("mixed", start=1, valid=7)
_BIASED: Mapping[str, Sequence[str]] = MappingProxyType({"bias": ["bias"]})
_WEIGHTED: Mapping[str, Sequence[str]] = MappingProxyType({"routed_weight": ["weighted"]})

CASES = (
    Case("one", "every size is one", tokens=1, top_k=1, experts=1, n=1),
    Case("lt_tile", "a tile that is not full", n=40),
    Case("eq_tile", "one full tile", n=64),
    Case("gt_tile", "a full tile, then a column", n=65),
    Case("ragged", "pairs that are elsewhere", core=True, tokens=9, top_k=3, n=100, routing=Experts("mixed", start=2)),
    Case("empty", "a launch without programs", tokens=0),
    Case("nothing_local", "sums of nothing are zero", core=True, routing=Experts("away")),
    Case("no_valid_token", "a step of padding alone", core=True, routing=Experts(valid=0)),
    Case("some_valid", "rows behind the valid tokens", core=True, tokens=7, routing=Experts("mixed", valid=3)),
    Case("more_than_there_are", "a count beyond the batch", only=_KEEP, routing=Experts(valid=2**31 - 1)),
    Case("hint_too_low", "programs that take many tokens", tokens=10, experts=4, hint=1),
    Case("top_8", "as many experts as models have", top_k=8, experts=9),
    Case("ids_int64", "ids as torch.topk gives them", routing=Experts("mixed", ids_dtype=torch.int64)),
    Case("out_f32", "the sum as it is", out_dtype=torch.float32),
    Case("y_f32", "rows in fp32", y_dtype=torch.float32, out_dtype=torch.float32),
    Case("keep_empty", "tokens of other ranks alone", only=_KEEP, tokens=9, routing=_SPARSE, keep_empty=True),
    Case("keep_all", "no token has an expert here", only=_KEEP, n=64, routing=Experts("away"), keep_empty=True),
    Case("weights_bf16", "routing weights in another dtype", only=_WEIGHTED, weights_dtype=torch.bfloat16),
    Case("bias_f32", "a bias in another dtype", only=_BIASED, n=70, routing=Experts("mixed", start=2), bias_dtype=torch.float32),
    Case("unaligned", "odd strides, a base that is not 16-byte aligned", gap=1, offset=1, n=33),
    Case("own_tiles", "the tiles that the rule takes", own_tiles=True, n=300),
    Case(
        "huge_rows",
        "32-bit offsets of rows, and of biases of experts, wrap",
        tokens=4,
        row_stride=_HUGE // 3,
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
    routed = draw(case.routing, case.tokens, case.top_k, case.experts, case.random(), device)
    numbers, shape = case.generator(), (case.tokens, case.top_k, case.n)
    row = case.row_stride or case.n + case.gap
    strides = (case.top_k * row, row if case.top_k > 1 else 1, 1)  # of one pair a token nothing lies in between
    if case.row_stride:
        y = allocate_sparse(shape, strides, case.y_dtype or dtype, device)
    else:
        y = allocate(shape, strides, case.y_dtype or dtype, device, offset=case.offset)
    weights = None
    if tags["routed_weight"] == "weighted":
        weights = allocate(shape[:2], (case.top_k, 1), case.weights_dtype, device)
    for pair, _ in routed.local:
        token, j = divmod(pair, case.top_k)
        y[token, j] = torch.randn(case.n, generator=numbers).to(y)
        if weights is not None:
            weights[token, j] = torch.rand((), generator=numbers).to(weights)
    out_shape, out_dtype = (case.tokens, case.n), case.out_dtype or dtype
    if case.row_stride:
        out = allocate_sparse(out_shape, (case.row_stride + 24, 1), out_dtype, device)
    else:
        out = allocate(out_shape, (case.n + case.gap + 24, 1), out_dtype, device, offset=case.offset)
    guarded = seal(out, sparse=case.row_stride is not None)
    beside = None
    if tags["delta"] == "lora":
        layout: dict[str, Any] = {"offset": case.offset, "sparse": case.row_stride is not None}
        beside = draw_delta(package, routed, y.to(dtype) if case.y_dtype else y, case.random(), numbers, **layout)
    bias = None
    if tags["bias"] == "bias":
        bias = draw_bias(routed, case.n, case.bias_dtype, numbers, device, gap=case.gap + 16, offset=case.offset)
    given: dict[str, Any] = {"bias": bias, "num_tokens": routed.num_valid, "topk_weights": weights, "dtype": out.dtype}
    expected = moe_sum(y, routed.local, **given, delta=beside.rows if beside else NO_ROWS)
    config = None if case.own_tiles else sys.modules[launcher.__module__].Config(64, 2)
    launcher(
        out,
        y,
        routed.topk_ids,
        num_experts=case.experts,
        local_expert_start=case.routing.start,
        valid_tokens=routed.valid_tokens,
        num_tokens_hint=case.hint,
        config=config,
        **({} if weights is None else {"topk_weights": weights}),
        **({} if bias is None else {"bias": bias}),
        **({"keep_empty": True} if case.keep_empty else {}),
        **(beside.arguments if beside else {}),
    )
    written = torch.arange(case.tokens, device=device) < routed.num_valid
    if case.keep_empty:
        served = {pair // case.top_k for pair, _ in routed.local}
        written &= torch.tensor([token in served for token in range(case.tokens)], device=device)
    if tags["rest"] == "zero":
        assert not out[~written].any(), "rows behind the valid tokens are not zero"
        written[:] = True
    stray = int((guarded.changed() & ~positions(guarded, written)).sum())
    assert not stray, f"out: {stray} elements changed outside of the rows of valid tokens"
    rows = written[: routed.num_valid].cpu()
    return worst_ratio(out[: routed.num_valid].cpu()[rows], expected.out.cpu()[rows], expected.bound.cpu()[rows])
