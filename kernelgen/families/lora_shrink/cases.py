"""Cases of the first product of dense LoRA: each closes a hole in the tests of serving engines, or stands for a bug of theirs."""

from __future__ import annotations

import dataclasses
import sys
from types import ModuleType
from typing import Any, Callable, Mapping

import torch

from kernelgen.families import lora_inputs
from kernelgen.families.buffers import positions, seal
from kernelgen.families.case import Tags, worst_ratio
from kernelgen.families.lora_inputs import Case
from kernelgen.families.lora_shrink.reference import lora_shrink

BODY = ("rank",)

_RANY = {"rank": ("rany",)}
_SCALES = ("weight_quant", "act_quant")
_W8: Mapping[str, Any] = {"body": _SCALES, "only": {"weight_quant": ("w8tensor", "w8channel", "w8group")}}
_W8_CHANNEL: Mapping[str, Any] = {"body": _SCALES, "only": {"weight_quant": ("w8channel",)}}
_W8_GROUP: Mapping[str, Any] = {"body": _SCALES, "only": {"weight_quant": ("w8group",)}}
_A8: Mapping[str, Any] = {"body": _SCALES, "only": {"act_quant": ("a8tensor", "a8token", "a8group")}}
_A8_GROUP: Mapping[str, Any] = {"body": _SCALES, "only": {"act_quant": ("a8group",)}}

_SIXTEEN_BIT = (
    Case("one", "every size is one", tokens=1, loras=1, k=1, widths=(1,), rank="one"),
    Case("lt_tile", "a tile that is not full", tokens=3, k=20, rank="part"),
    Case("eq_tile", "one full tile", tokens=16, adapters="one", k=32),
    Case("gt_tile", "full tiles, then a row", tokens=33, adapters="one", k=64),
    Case("ragged", "no size divides", held=2, k=150, widths=(1, 1), rank="part"),
    Case("all_of_k", "chunks and quarters that are added up in the program", k=330, widths=(1, 1), parts=0),
    Case("quarters", "chunks that are added up in the program, quarters afterwards", k=330, widths=(1, 1), parts=2),
    Case("parts_of_quarters", "more parts than quarters of them", k=330, widths=(1, 1)),
    Case("whole_chunks", "a last chunk that is full", k=128, parts=0),
    Case("whole_parts", "a last part that is full", k=128),
    Case("a_part_too_many", "programs of K that have no work (vLLM's split of 64)", k=40),
    Case("slice_by_slice", "a program a slice", widths=(1, 1, 1), together=False),
    Case("slice_by_slice_in_one", "a program a slice, for all of K", widths=(1, 1), together=False, parts=0),
    Case("slices_3", "the third slice", widths=(1, 1, 1)),
    Case("ranks_apart", "programs of a slice that share its ranks", rank="part", ranks=16, widths=(1, 1), together=False),
    Case("ranked", "ranks of every size, which programs share", rank="part", ranks=16, widths=(1, 1), ranked=(5, -1, 2**20)),
    Case(
        "ranked_packed",
        "slices one behind the other, a program each",
        rank="part",
        widths=(1, 1, 1),
        together=False,
        ranked=(3, -(2**20), 9),
        packed=True,
    ),
    Case("empty", "a launch without programs", tokens=0),
    Case("nothing_live", "base tokens only, adapters loaded (vLLM #42008)", adapters="none"),
    Case("mixed", "live rows beside others, of a route that lists more", core=True, tokens=9, held=2, adapters="mixed"),
    Case("last_adapter", "the last adapter of a mixed batch (vLLM #32235)", adapters="last"),
    Case("one_adapter", "a single slot", loras=1),
    Case("negative_scaling", "the sign of the scaling", scaling=-2.5, parts=0),
    Case("scaling_once", "a scaling that is applied to each part and to their sum", scaling=8.0, k=300),
    Case("packed", "nothing between rows", layout="packed", widths=(1, 1)),
    Case("shared", "weights stored once for all adapters: stride 0", layout="shared"),
    Case("unaligned", "odd strides, a base that is not 16-byte aligned", layout="odd", k=33, widths=(1, 1)),
    Case("huge_adapters", "32-bit offsets of adapters wrap", adapters="last", layout="huge_adapters"),
    Case("huge_rows", "32-bit offsets of rows wrap (vLLM #53028)", tokens=3, layout="huge_rows"),
    Case("four_dimensions", "weights [L, 1, rank, K]", four=True),
    Case("no_workspace", "parts in memory of their own", k=200, rank="part", workspace=False),
    Case("rank_one", "a rank far below its bucket", rank="one"),
    Case("rank_24_any", "a small rank in a tiled kernel", only=_RANY, rank=24),
    Case("rank_129", "one rank behind a tile", only=_RANY, rank=129),
    Case("rank_512", "the largest rank (vLLM #55158)", only=_RANY, rank=512, tokens=2),
    Case("wide_blocks", "64 rows a block", tokens=66, adapters="one", block_m=64),
    Case("wide_range", "sums in 16 bits", spread=8, k=96),
    Case("nan_row", "a NaN stays in the rows of its token", adapters="one", nan_token=1),
    Case("own_tiles", "the tiles that the variant chooses", core=True, own_tiles=True, k=600),
    Case(
        "long_k",
        "tiles that end behind their part, in the columns of the next",
        own_tiles=True,
        tokens=2,
        loras=1,
        k=9216,
        layout="packed",
    ),
    Case(
        "model_sized",
        "long loops, many programs",
        needs_gpu=True,
        own_tiles=True,
        tokens=160,
        k=4096,
        widths=(1, 1, 1),
        adapters="mixed",
    ),
)
_FP8 = (
    Case("w8_one", "every size is one", **_W8, tokens=1, loras=1, k=1, rank="one"),
    Case(
        "w8_groups",
        "one scale for two groups, as in vLLM's shrink of less than 128 tokens; a short last group",
        **_W8_GROUP,
        k=300,
        widths=(1, 1),
    ),
    Case("w8_rank_groups", "ranks of two groups", body=_SCALES, only={**_W8_GROUP["only"], **_RANY}, rank=200, k=256),
    Case(
        "w8_slices",
        "the scales of the second slice, and e5m2 that is read as e4m3 there (vLLM's FP8 ops)",
        **_W8,
        element="e5m2",
        widths=(1, 1, 1),
        k=150,
        held=3,
    ),
    Case("w8_slice_by_slice", "a program a slice, for all of K", **_W8, widths=(1, 1, 1), together=False, k=330, parts=0),
    Case("w8_packed", "nothing behind the last scale", **_W8, layout="packed", loras=1, k=64),
    Case("w8_unaligned", "odd strides and base", **_W8, layout="odd", k=33, widths=(1, 1)),
    Case("w8_huge_adapters", "32-bit offsets of scales wrap", **_W8, layout="huge_adapters", adapters="last"),
    Case("w8_out_1", "scales [L, rank, 1]", **_W8_CHANNEL, scales_end_in_1=True, rank="part"),
    Case("w8_empty", "a launch without programs", **_W8, tokens=0),
    Case("a8_rows", "a scale for each row, where vLLM takes that of row 0 for all", **_A8, tokens=7, held=1, adapters="mixed"),
    Case("a8_groups", "a scale for each group, and a short last one", **_A8_GROUP, k=300),
    Case("a8_e5m2", "e5m2 that is read as e4m3", **_A8, element="e5m2", widths=(1, 1), k=100),
    Case("a8_e8m0", "scales of x that are powers of two, a byte each (vLLM #54435)", **_A8, x_scale_dtype=torch.float8_e8m0fnu),
    Case("a8_by_column", "scales of x column by column (tokenspeed #189)", **_A8_GROUP, k=300, by_column=True),
    Case("a8_unaligned", "odd strides and base", **_A8, layout="odd", k=33),
    Case("a8_nan_row", "a NaN stays in the rows of its token", **_A8, nan_token=1, adapters="one"),
    Case("a8_empty", "a launch without programs", **_A8, tokens=0),
    *(
        Case(
            f"{name}_model_sized",
            "long loops, many programs",
            **axes,
            needs_gpu=True,
            own_tiles=True,
            tokens=160,
            k=4096,
            widths=(1, 1, 1),
            adapters="mixed",
        )
        for name, axes in (("w8", _W8), ("a8", _A8))
    ),
)
_NO_FP8 = {"weight_quant": ("none",), "act_quant": ("none",)}
# FP8 meets the core cases, and its own: sizes and layouts are the business of the text that it shares with 16 bits.
CASES = (
    *(c if c.core else dataclasses.replace(c, only={**c.only, **_NO_FP8}) for c in _SIXTEEN_BIT),
    *_FP8,
)
# What exact algebra takes: a part of every tile, two groups of scales.
EXACT = (
    Case("exact", "every text, more parts than quarters of them", tokens=3, k=330, widths=(1, 1), rank="part"),
    Case("exact_in_one", "chunks and quarters in the program", body=_SCALES, tokens=2, k=330, parts=0, rank="part"),
    Case("exact_whole", "whole tiles of K", body=_SCALES, tokens=2, k=256, parts=2),
)
# Arguments that the cases need not tell apart, and why.
SAME = {
    "scalings_ptr": "a law has them, adapters_say_their_ranks_and_scalings of lora_expand",
}


def check(package: ModuleType, launcher: Callable[..., None], tags: Tags, case: Case, device: str) -> float:
    """Run ``case`` on a variant's launcher; return the worst error over its bound.

    Raises:
        AssertionError: the variant is wrong.
    """
    batch, numbers = lora_inputs.draw(case, device), case.generator()
    rank = lora_inputs.rank_of(case, tags)
    x = lora_inputs.make_x(case, tags, batch, numbers)
    a = lora_inputs.make_weights(case, tags, batch, [rank] * len(case.widths), case.k, numbers)
    y = lora_inputs.make_y(case, tags, batch, None)
    route, tables = lora_inputs.route_of(package, case, batch, device)
    options: dict[str, Any] = {}
    if case.ranked:
        a, options["lora_ranks"] = lora_inputs.with_ranks(case, a, device)
    if case.packed:
        options["packed"] = True
    tensors = {"x": x.tensor, **lora_inputs.tensors_of("a", a)}
    options |= lora_inputs.scales_of("a_scale", a)
    if x.scales is not None:
        tensors["x_scale"] = options["x_scale"] = x.scales
    inputs = lora_inputs.sealed(tensors)
    stands_for = [w.numbers for w in a]
    expected = lora_shrink(
        y, x.numbers, stands_for, batch.adapters, scaling=case.scaling, scaled="a_scale" in options or "x_scale" in options
    )
    guarded = seal(y)
    config = None if case.own_tiles else tiles(launcher, case)
    weights = lora_inputs.given(case, a)
    if case.ranked:  # which the front door passes on, and no launcher takes
        given = {"y": y, "x": x.tensor, "lora_a": weights, "route": route, "scaling": case.scaling, "zero_rest": False}
        sys.modules[launcher.__module__].schedule.launch(config, **given, **options)
    else:
        launcher(y, x.tensor, weights, route, scaling=case.scaling, config=config, **options)
    lora_inputs.unchanged({**inputs, **tables})
    rows = batch.rows().expand(y.shape[:2])
    stray = int((guarded.changed() & ~positions(guarded, rows)).sum())
    assert not stray, f"y: {stray} elements changed outside of the rows of tokens with an adapter"
    return worst_ratio(y[rows], expected.value[rows], expected.bound[rows])


def tiles(launcher: Callable[..., None], case: Case) -> Any:
    """Tiles that small shapes can be less than, equal to and greater than."""
    config = sys.modules[launcher.__module__].Config
    return config(32, case.ranks, 32, 64, case.parts, int(case.together), 2, 4)
