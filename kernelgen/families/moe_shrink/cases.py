"""Cases of the rank vectors of a layer with adapters.

Everything that a kernel must not read is poison (NaN): rows of x of pairs without an adapter, factors that no pair has, what
lies between and around rows, entries of tables behind what counts. What is not written keeps its bits.
"""

from __future__ import annotations

import dataclasses
import importlib
import math
import sys
from types import ModuleType
from typing import Any, Callable, Mapping, Sequence

import torch

from kernelgen.core.model import QUANT_AXES
from kernelgen.families import quant
from kernelgen.families.buffers import allocate, positions, row_major, seal
from kernelgen.families.case import Case as BaseCase
from kernelgen.families.case import Tags, worst_ratio
from kernelgen.families.lora_inputs import dtype_of, sealed, unchanged
from kernelgen.families.moe_adapters import HUGE, MIXED, RANKED, Adapters, factors, live_of
from kernelgen.families.moe_adapters import draw as draw_adapters
from kernelgen.families.moe_align.reference import Local
from kernelgen.families.moe_experts import SPREAD, Experts, draw
from kernelgen.families.moe_gemm.cases import tables_of
from kernelgen.families.moe_lora.reference import dequantise
from kernelgen.families.moe_runs.reference import moe_runs
from kernelgen.families.moe_shrink.reference import moe_shrink

BODY = ("schedule", "rows")
_SCALES = (*BODY, *QUANT_AXES)  # what FP8 operands and their scales pass through
_SPREAD = Adapters("spread", 2)


@dataclasses.dataclass(frozen=True)
class Case(BaseCase):
    """Sizes and layout of one call.

    Attributes:
        few: at most so many tokens for a variant that takes pairs one by one, where more show nothing more.
        hint: tokens that the grid is sized for, None: all.
        a_layout: of the factors, a key of ``LAYOUTS`` of moe_adapters; "padded" ones are shared where rows are of tokens.
        x_row: elements from a row of x to the next, and of its scales, None: K and 8 more.
        offset: elements that x starts behind a 16-byte boundary.
        nan_token: rows of x of this token are NaN.
        rows, block_r, block_k: of a tile that is of rows; half of the ranks are those of one of pairs.
        own_tiles: the variant chooses its tiles itself.
        element: of FP8 operands.
        scales_dtype: of the scales of x.
        by_column: these lie column by column.
        scales_end_in_1: scales of the rows of factors have a last dimension of one.
    """

    tokens: int = 5
    few: int = 3
    top_k: int = 2
    experts: int = 3
    k: int = 40
    slices: int = 1
    rank: int = 12
    block_m: int = 16
    hint: int | None = None
    routing: Experts = SPREAD
    adapters: Adapters = _SPREAD
    a_layout: str = "padded"
    x_row: int | None = None
    offset: int = 0
    nan_token: int | None = None
    rows: int = 16
    block_r: int = 16
    block_k: int = 32
    own_tiles: bool = False
    element: str = "e4m3"
    scales_dtype: torch.dtype = torch.float32
    by_column: bool = False
    scales_end_in_1: bool = False


_ONE = Experts("one")
_RUNS = {"schedule": ("runs",)}
_TILES = {"schedule": ("runs", "tokens")}
_TOKENS = {"rows": ("token_token",)}
_OWN_FACTORS = {"rows": ("token_sorted", "sorted_sorted", "token_pair", "pair_pair")}
_LAST = Adapters("one")
_RANKED_19 = dataclasses.replace(RANKED, loras=19)
_A8: Mapping[str, Any] = {"only": {"act_quant": ("a8tensor", "a8token", "a8group")}, "body": _SCALES}
_W8: Mapping[str, Any] = {"only": {"weight_quant": ("w8tensor", "w8channel", "w8group")}, "body": _SCALES}
_W8_GROUPS: Mapping[str, Any] = {"only": {"weight_quant": ("w8group",)}, "body": _SCALES}
_GROUPS: Mapping[str, Any] = {"only": {"act_quant": ("a8group",)}, "body": _SCALES}

CASES = (
    Case("one", "every size is one", tokens=1, top_k=1, experts=1, k=1, rank=1, adapters=Adapters("one", 1)),
    Case("eq_tile", "one full tile", tokens=16, top_k=1, routing=_ONE, k=64, rank=16, adapters=_LAST),
    Case("gt_tile", "full tiles, then a row", tokens=33, top_k=1, routing=_ONE, k=96, rank=32, adapters=_LAST),
    Case(
        "ragged",
        "no size divides; pairs without an adapter, with one that is disabled, with experts that are elsewhere",
        core=True,
        tokens=11,
        few=9,
        k=72,
        slices=2,
        routing=Experts("mixed", start=2, valid=10),
        adapters=Adapters("mixed", 3, (1,)),
    ),
    Case("gt_part", "two parts of K, the last one short", k=600, tokens=3),
    Case("long_k", "parts of more columns than others", only={"schedule": ("pairs",)}, few=1, top_k=1, k=4200),
    Case("slices_3", "the third slice, where a tile is of several", slices=3, rank=24, block_k=64),
    Case("rank_65", "columns behind a tile", tokens=2, slices=2, rank=65),
    Case("high_blocks", "blocks of several tiles", only=_TILES, tokens=70, experts=2, block_m=64, rows=32, adapters=_LAST),
    Case(
        "many_runs",
        "more runs of a block than programs",
        only=_RUNS,
        tokens=24,
        top_k=1,
        routing=_ONE,
        block_m=32,
        adapters=Adapters("spread", 12),
    ),
    Case(
        "adapters_apart",
        "more adapters than a program of tokens takes side by side, and no multiple of them",
        only={"schedule": ("tokens",)},
        tokens=24,
        adapters=Adapters("spread", 12),
        a_layout="shared",
    ),
    Case(
        "uneven_runs",
        "a run of more tiles than the programs that share it",
        only=_RUNS,
        tokens=124,
        top_k=1,
        experts=1,
        routing=_ONE,
        block_m=128,
        adapters=Adapters("uneven", 2),
    ),
    Case("hint_too_low", "programs that take many blocks", only=_TILES, tokens=40, hint=1),
    Case("empty", "a launch without programs", tokens=0, few=0),
    Case("no_adapter", "a graph for adapters, replayed without one", routing=SPREAD, adapters=Adapters("none")),
    Case("no_valid_token", "a step of padding alone", routing=Experts(valid=0)),
    Case("more_than_there_are", "a count beyond the batch", few=5, routing=Experts(valid=9)),
    Case("shared_experts", "factors stored once for all experts: stride 0", a_layout="shared", slices=2),
    Case("unaligned", "odd strides, a base that is not 16-byte aligned", k=33, x_row=35, offset=1),
    Case("huge_adapters", "32-bit offsets of adapters wrap", only=_OWN_FACTORS, adapters=_LAST, a_layout="huge_adapters"),
    Case("huge_experts", "32-bit offsets of experts wrap", only=_OWN_FACTORS, routing=_ONE, a_layout="huge_experts"),
    Case("huge_shared", "32-bit offsets of adapters wrap", only=_TOKENS, adapters=_LAST, a_layout="huge_shared"),
    Case("disabled", "adapters that are loaded but disabled", tokens=9, adapters=Adapters("mixed", 4, (0, 2))),
    Case(
        "ranked",
        "ranks of every size, of several slices, which end within a tile; ids as torch.topk gives them",
        tokens=9,
        few=6,
        slices=2,
        rank=40,
        block_r=64,
        routing=Experts("mixed", ids_dtype=torch.int64),
        adapters=RANKED,
    ),
    Case("apart", "slices that share no tile", only=_TILES, slices=3, rank=40, card="gfx942"),
    Case(
        "ranked_apart",
        "ranks of every size there, in tiles of which a part counts",
        only=_TILES,
        tokens=9,
        slices=2,
        rank=40,
        block_r=32,
        adapters=RANKED,
        card="gfx942",
    ),
    Case("many_adapters", "more adapters than programs of a tile", only=_TOKENS, tokens=20, rank=40, adapters=_RANKED_19),
    Case("huge_rows", "32-bit offsets of rows wrap", x_row=HUGE // 3, tokens=4, few=4),
    Case("nan_row", "a NaN stays with the pairs of its token", tokens=8, nan_token=1, routing=_ONE, adapters=_LAST),
    Case("own_tiles", "the tiles that the rule takes", own_tiles=True, tokens=40, k=600, slices=2, block_m=64),
    Case("fp8", "two parts and several groups of K, none of them full at the end", **_A8, k=600, slices=2, adapters=MIXED),
    Case("fp8_whole", "whole groups, no mask; ranks of every size", **_A8, k=512, few=3, tokens=9, rank=40, adapters=RANKED),
    Case("fp8_e8m0", "scales that are powers of two, bytes (vLLM #54435)", **_A8, few=1, scales_dtype=torch.float8_e8m0fnu),
    Case("fp8_huge_rows", "32-bit offsets of rows of scales wrap", **_GROUPS, k=160, x_row=HUGE // 3, tokens=4, few=4),
    Case("fp8_e5m2", "e5m2 that is read as e4m3", **_A8, few=1, element="e5m2"),
    Case("fp8_by_column", "scales of x column by column (tokenspeed #189)", **_GROUPS, k=160, by_column=True),
    Case("fp8_nan_row", "a NaN stays with the pairs of its token", **_A8, tokens=8, nan_token=1, routing=_ONE, adapters=_LAST),
    Case("fp8_factors", "several groups on both axes", **_W8_GROUPS, tokens=5, few=1, k=136, slices=2, rank=136),
    Case(
        "fp8_factors_shared",
        "scales stored once for all experts: stride 0",
        **_W8,
        few=2,
        element="e5m2",
        a_layout="shared",
        scales_end_in_1=True,
    ),
    Case("fp8_factors_ranked", "ranks of every size", **_W8, tokens=9, few=3, slices=2, rank=40, adapters=RANKED),
    Case(
        "fp8_factors_apart",
        "slices that share no tile",
        only={**_W8["only"], **_TILES},
        body=_SCALES,
        slices=2,
        k=136,
        rank=136,
        card="gfx942",
    ),
    Case("fp8_own_tiles", "the tiles that the rule takes", **_A8, own_tiles=True, few=2, tokens=20, k=600, slices=2),
)
EXACT = tuple(case for case in CASES if case.name in ("ragged", "fp8"))  # what exact algebra takes, on every text


def check(package: ModuleType, launcher: Callable[..., None], tags: Tags, case: Case, device: str) -> float:
    """Run ``case`` on a variant's launcher; return the worst error over its bound.

    Raises:
        AssertionError: the variant is wrong.
    """
    few, dtype, reads = tags["schedule"] == "pairs", dtype_of(tags), tags["rows"].split("_")[0]
    tokens, rng, numbers = min(case.tokens, case.few) if few else case.tokens, case.random(), case.generator()
    routed = draw(case.routing, tokens, case.top_k, case.experts, rng, device)
    adapters = draw_adapters(case.adapters, tokens, rng, device)
    num_pairs = tokens * case.top_k
    order = moe_runs(routed.local, adapters.of_token, top_k=case.top_k, block_m=case.block_m).order
    layout, by_token = case.a_layout, tags["rows"] == "token_token"
    if by_token:
        order = [Local(token * case.top_k, 0) for token in range(routed.num_valid)]
        layout = "shared" if layout == "padded" else layout
    of_x = quant.scales_of(tags)[1]
    x, x_scale, stands_for = _x(case, reads, of_x, num_pairs, order, adapters.of_token, numbers, dtype, device)
    scales = {} if x_scale is None else {"x_scale": x_scale}
    shape = (adapters.loras, case.experts, case.rank, case.k)
    live, of_factors = live_of(order, adapters.of_token, case.top_k), quant.scales_of(tags)[0]
    form, counted = (of_factors, case.element, case.scales_end_in_1), adapters.counted(case.rank)
    a = factors(shape, case.slices, layout, live, numbers, dtype, device, *form, counted=counted)
    tables, runs, ints = tables_of(package, case, routed, few, device, adapters)
    vectors: tuple[int, ...] = (tokens if by_token else num_pairs, case.slices, case.rank)
    if few:
        columns = importlib.import_module(f"{package.__name__}.moe_shrink._problem").split_k(case.k)
        vectors = (-(-case.k // columns), *vectors)
    v = allocate(vectors, row_major(vectors), torch.float32 if few else dtype, device)
    inputs, guarded = sealed({"x": x, **a.each("lora_a", "a_scale"), **scales, **ints}), seal(v)
    operands = {**a.named("lora_a", "a_scale"), **scales}
    launcher(v, x, tables=tables, runs=runs, config=None if case.own_tiles else tiles(launcher, case), **operands)
    unchanged(inputs)
    options: dict[str, Any] = {"num_pairs": num_pairs, "rows": tags["rows"], "dtype": dtype}
    options["scaled"] = x_scale is not None or a.scales is not None
    exact = moe_shrink(stands_for, a.numbers, order, adapters.of_token, counted=counted, **options)
    written = exact.written.to(device)
    stray = int((guarded.changed() & ~positions(guarded, written.expand(v.shape))).sum())
    assert not stray, f"v: {stray} elements changed beside ranks that count of pairs with an adapter"
    found = v.sum(0) if few else v
    return worst_ratio(found[written].cpu(), exact.value[written].cpu(), exact.bound[written].cpu())


def _x(
    case: Case,
    reads: str,
    of_x: str | None,
    num_pairs: int,
    order: Sequence[Any],
    of_token: Sequence[int | None],
    numbers: torch.Generator,
    dtype: torch.dtype,
    device: str,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """x, its scales and what it stands for: numbers where a pair that reads the row has an adapter."""
    row = case.x_row or case.k + 8
    shape = (len(of_token) if reads == "token" else num_pairs, case.k)
    kind = quant.element(case.element) if of_x else dtype
    x = allocate(shape, (row, 1), kind, device, offset=case.offset)
    x_scale = None
    if of_x:
        scales_shape = quant.x_scale_shape(of_x, shape, quant.group()[1])
        if case.x_row and len(scales_shape) == 2 and scales_shape[1] > 1:
            x_scale = allocate(scales_shape, (case.x_row, 1), case.scales_dtype, device)
        else:
            x_scale = quant.allocate_x_scale(scales_shape, device, case.scales_dtype, case.by_column)
    for place, (pair, _) in enumerate(order):
        token = pair // case.top_k
        if of_token[token] is not None:
            row = {"token": token, "pair": pair, "sorted": place}[reads]
            drawn = quant.as_dtype(torch.randn(case.k, generator=numbers), x)
            x[row] = math.nan if token == case.nan_token else drawn
            if x_scale is not None:
                each = x_scale[row] if x_scale.dim() > 1 else x_scale
                each.copy_(quant.draw_scales(each, 1.0, numbers))
    if x_scale is None or not of_token:
        return x, x_scale, x
    return x, x_scale, dequantise(x, x_scale, quant.group_of(of_x, shape, (1, quant.group()[1])))


def tiles(launcher: Callable[..., None], case: Case) -> Any:
    """Tiles that small shapes can be less than, equal to and greater than."""
    config = sys.modules[launcher.__module__].Config
    known: Mapping[str, int] = {"num_stages": 2, "num_warps": 4}
    known = {**known, "rows": case.rows, "block_r": case.block_r, "block_k": case.block_k}
    if "rows" not in config._fields:
        known = {"block_r": case.block_r // 2, "block_k": 64, "num_warps": 4}
    return config(**known)
