"""Cases of fused MoE-LoRA: each closes a hole in the tests of serving engines, or stands for a bug that they had."""

from __future__ import annotations

import dataclasses
import math
from types import MappingProxyType
from typing import Any, Mapping, Sequence

import torch

from kernelgen.families.moe_lora_inputs import Case, check
from kernelgen.families.moe_routing import Routing

__all__ = ["BODY", "CASES", "check"]

BODY = ("schedule", "rank")


def _only(**axes: str) -> Mapping[str, Sequence[str]]:
    return MappingProxyType({axis: tags.split() for axis, tags in axes.items()})


_SORTED, _WEIGHTED, _RANY = (
    _only(assignment="sorted"),
    _only(routed_weight="weighted"),
    _only(rank="rany"),
)
_ONE_GROUP = Routing("one_group")

_SCALES = ("schedule", "weight_quant", "act_quant")
_W8: Mapping[str, Any] = {"body": _SCALES, "only": _only(weight_quant="w8tensor w8channel w8group")}
_W8_CHANNEL: Mapping[str, Any] = {"body": _SCALES, "only": _only(weight_quant="w8channel")}
_W8_GROUP: Mapping[str, Any] = {"body": (*_SCALES, "tiled_rank"), "only": _only(weight_quant="w8group")}
_W8_TILED: Mapping[str, Any] = {
    "body": _SCALES,
    "only": _only(weight_quant="w8tensor w8channel w8group", rank="rany"),
}
_A8: Mapping[str, Any] = {"body": _SCALES, "only": _only(act_quant="a8tensor a8token a8group")}
_A8_GROUP: Mapping[str, Any] = {"body": _SCALES, "only": _only(act_quant="a8group")}

_SIXTEEN_BIT = (
    Case(
        "one",
        "every size is one",
        tokens=1,
        top_k=1,
        experts=1,
        loras=1,
        k=1,
        n=1,
        rank="one",
    ),
    Case("lt_tile", "a first tile that is not full", tokens=3, k=20, n=28, rank="part", slices=2),
    Case("eq_tile", "one full tile", tokens=16, top_k=1, routing=_ONE_GROUP, k=32, n=32),
    Case("gt_tile", "full tiles, then a row", tokens=33, top_k=1, routing=_ONE_GROUP, k=192, n=128),
    Case(
        "one_more",
        "one column, one row behind a tile",
        tokens=17,
        top_k=1,
        routing=_ONE_GROUP,
        k=65,
        n=65,
    ),
    Case(
        "ragged",
        "no size divides",
        tokens=5,
        experts=2,
        slices=2,
        k=70,
        n=40,
        rank="part",
    ),
    Case("many_splits", "a part of K lost, or a short one", tokens=2, k=300, rank="part", split_k=128),
    Case("most_splits", "more parts of K than are added one by one", tokens=1, k=560),
    Case("empty", "a launch without programs", tokens=0),
    Case(
        "nothing_live", "base tokens only, adapters loaded (vLLM #42008)", routing=Routing("none")
    ),
    Case(
        "mixed",
        "live rows beside rows without an adapter, with a disabled one, with experts that are elsewhere (vLLM #49063)",
        core=True,
        tokens=8,
        naive_tokens=8,
        loras=3,
        routing=Routing("mixed", disabled=(0,)),
        rank="part",
    ),
    Case(
        "last_adapter",
        "the last adapter of a mixed batch (vLLM #32235)",
        loras=4,
        routing=Routing("last"),
    ),
    Case("one_adapter", "a single slot", loras=1, experts=4),
    Case("twice_the_expert", "an expert twice in a token", routing=Routing("duplicates"), top_k=3),
    Case("top_1", "top_k = 1 folds a dimension away", top_k=1),
    Case("top_8", "the pair's token", tokens=2, naive_tokens=1, top_k=8, experts=9),
    Case(
        "expert_parallel",
        "global ids, and -1 that must not land on a neighbour (vLLM PR 40867, SGLang #23178)",
        tokens=8,
        naive_tokens=8,
        routing=Routing("mixed", expert_map=True),
    ),
    Case(
        "ids_int64",
        "ids as torch.topk gives them, some of whose lower halves name experts (vLLM #50845)",
        tokens=8,
        naive_tokens=8,
        routing=Routing("mixed", ids_dtype=torch.int64),
    ),
    Case("weights_bf16", "weights in another dtype", only=_WEIGHTED, weights_dtype=torch.bfloat16),
    Case("weights_f16", "weights in another dtype", only=_WEIGHTED, weights_dtype=torch.float16),
    Case("w2_rows", "x has a row a pair, not a token", only=_WEIGHTED, tokens=5, top_k=3),
    Case("packed", "nothing between rows", layout="packed", slices=2),
    Case("shared_experts", "weights stored once for all experts: stride 0", layout="shared"),
    Case("expert_major", "strides in another order", layout="expert_major", loras=3),
    Case(
        "unaligned",
        "odd strides, a base that is not 16-byte aligned",
        layout="odd",
        k=33,
        n=23,
        slices=2,
    ),
    Case("huge_adapters", "32-bit offsets of adapters wrap", loras=3, routing=_ONE_GROUP, layout="huge_adapters"),
    Case(
        "huge_experts",
        "32-bit offsets of experts wrap (vLLM #53028)",
        routing=_ONE_GROUP,
        layout="huge_experts",
    ),
    Case("huge_rows", "32-bit offsets of rows wrap (vLLM #39585)", tokens=3, layout="huge_rows"),
    Case(
        "far_parts",
        "32-bit offsets into the workspace wrap",
        only=_only(schedule="two_kernel"),
        k=100,
        far_parts=True,
    ),
    Case("slices_3", "the third slice", slices=3),
    Case("apart", "slices that share no product", slices=3, card="gfx942"),
    Case("rank_one", "a rank far below its bucket", rank="one", slices=2, k=100, n=64),
    Case("rank_part", "a rank below its bucket, all else divides", rank="part", k=64, n=64),
    Case("rank_24_any", "a small rank in a tiled kernel", only=_RANY, rank=24),
    Case("rank_129", "one rank behind a tile", only=_RANY, rank=129, tokens=2),
    Case("rank_512", "the largest rank (vLLM #55158)", only=_RANY, rank=512, tokens=1),
    Case(
        "wide_blocks",
        "64 rows a block",
        only=_SORTED,
        tokens=66,
        top_k=1,
        routing=_ONE_GROUP,
        block_m=64,
    ),
    Case("many_groups", "blocks of one row", only=_SORTED, tokens=5, experts=8, loras=4),
    Case(
        "overflow",
        "infinity of the right sign, not NaN",
        rank="one",
        scale=2.0**14,
        spread=3,
        only=_only(dtype="f16"),
    ),
    Case("wide_range", "sums in 16 bits", spread=8, k=96),
    Case("nan_row", "a NaN stays in the rows of its token", nan_token=1, routing=_ONE_GROUP),
    Case(
        "infinite_rank",
        "infinity of the last rank, which ranks behind it would make NaN",
        body=("schedule", "tiled_rank"),
        rank="part",
        special=math.inf,
    ),
    Case("own_tiles", "the tiles that the variant chooses", core=True, own_tiles=True, naive_tokens=1, k=64, n=48),
    Case(
        "model_sized",
        "long loops, many programs",
        needs_gpu=True,
        own_tiles=True,
        tokens=160,
        naive_tokens=16,
        top_k=4,
        experts=8,
        loras=3,
        slices=2,
        k=2048,
        n=768,
        routing=Routing("mixed"),
    ),
)
_FP8 = (
    Case("w8_one", "every size is one", **_W8, tokens=1, top_k=1, experts=1, k=1, n=1, rank="one"),
    Case(
        "w8_wide_blocks",
        "64 rows a block, which programs share",
        only={**_W8["only"], **_SORTED},
        body=_SCALES,
        tokens=66,
        top_k=1,
        routing=_ONE_GROUP,
        block_m=64,
    ),
    Case(
        "w8_groups",
        "one scale for two groups (vLLM's FP8 shrink of less than 128 tokens), a short last group",
        **_W8_GROUP,
        tokens=3,
        k=300,
        n=200,
        slices=2,
    ),
    Case("w8_wide_tiles", "a tile of columns of two groups", **_W8_GROUP, tokens=1, n=300, block_n=256),
    Case("w8_tile_a_group", "tiles of a group each, several to a program", **_W8_GROUP, tokens=1, k=256, n=256, block_n=128),
    Case("w8_rank_groups", "ranks of two groups", **_W8_TILED, tokens=2, rank=200, n=150, k=140),
    Case(
        "w8_slices",
        "the scales of the second slice, and e5m2 that is read as e4m3 there (vLLM's FP8 ops)",
        **_W8,
        element="e5m2",
        slices=3,
    ),
    Case(
        "w8_packed",
        "nothing behind the last scale",
        **_W8,
        layout="packed",
        top_k=1,
        experts=1,
        loras=1,
        slices=2,
        k=64,
        n=60,
    ),
    Case("w8_unaligned", "odd strides and base", **_W8, layout="odd", k=33, n=23, slices=2),
    Case("w8_shared", "weights and scales stored once for all experts", **_W8, layout="shared"),
    Case("w8_huge_adapters", "32-bit offsets of scales wrap", **_W8, loras=3, routing=_ONE_GROUP, layout="huge_adapters"),
    Case(
        "w8_huge_experts", "32-bit offsets of scales wrap", **_W8, layout="huge_experts", routing=_ONE_GROUP
    ),
    Case(
        "w8_out_1",
        "scales [L, E, out, 1]",
        **_W8_CHANNEL,
        scales_end_in_1=True,
        slices=2,
        rank="part",
    ),
    Case(
        "w8_nan",
        "a NaN among the weights stays with its adapter and expert",
        **_W8,
        special=math.nan,
    ),
    Case("w8_empty", "a launch without programs", **_W8, tokens=0),
    Case(
        "a8_rows",
        "a scale for each row (vLLM takes that of row 0 for all; #42007 takes none)",
        **_A8,
        tokens=5,
        top_k=3,
        rank="part",
    ),
    Case("a8_groups", "a scale for each group, and a short last one", **_A8_GROUP, k=300, tokens=5),
    Case("a8_e5m2", "e5m2 that is read as e4m3", **_A8, element="e5m2", slices=2, k=100),
    Case("a8_e8m0", "scales of x that are powers of two, a byte each (vLLM #54435)", **_A8, x_scale_dtype=torch.float8_e8m0fnu),
    Case("a8_by_column", "scales of x column by column (tokenspeed #189)", **_A8_GROUP, k=300, by_column=True),
    Case(
        "a8_scale_an_expert",
        "the input scale of each expert, of rows that have one expert (TensorRT-LLM #10778)",
        body=_SCALES,
        only=_only(act_quant="a8tensor", routed_weight="weighted"),
        x_scale_an_expert=True,
    ),
    Case("a8_huge_rows", "32-bit offsets of rows wrap", **_A8, layout="huge_rows", tokens=3),
    Case("a8_unaligned", "odd strides and base", **_A8, layout="odd", k=33, n=23, slices=2),
    Case(
        "a8_nan_row", "a NaN stays in the rows of its token", **_A8, nan_token=1, routing=_ONE_GROUP
    ),
    Case("a8_empty", "a launch without programs", **_A8, tokens=0),
    *(
        Case(
            f"{name}_model_sized",
            "long loops, many programs",
            **axes,
            needs_gpu=True,
            own_tiles=True,
            tokens=160,
            naive_tokens=16,
            top_k=4,
            experts=8,
            loras=3,
            slices=2,
            k=2048,
            n=768,
            routing=Routing("mixed"),
        )
        for name, axes in (("w8", _W8), ("a8", _A8))
    ),
)
_NO_FP8 = _only(weight_quant="none", act_quant="none")
# FP8 meets the core cases, and its own: sizes and layouts are the business of the text that it shares with 16 bits.
CASES = (
    *(c if c.core else dataclasses.replace(c, only={**c.only, **_NO_FP8}) for c in _SIXTEEN_BIT),
    *_FP8,
)
# What exact algebra takes: a part of every tile, two groups of scales on both axes; and rows that programs share.
EXACT = (
    Case("exact", "every text", tokens=3, naive_tokens=1, experts=2, slices=2, k=136, n=200, rank="part"),
    Case(
        "exact_parts",
        "more parts of K than are added one by one",
        only=_only(assignment="naive"),
        body=("rank", "weight_quant", "act_quant"),
        tokens=1,
        k=560,
    ),
    Case(
        "exact_whole",
        "whole tiles of K and of N",
        only=_only(rank="r16"),
        body=("schedule", "weight_quant", "act_quant"),
        tokens=1,
        experts=2,
        k=128,
        n=64,
    ),
    Case(
        "exact_high",
        "a block of more rows than a program of FP8 takes",
        only=_only(assignment="sorted", rank="r16", weight_quant="w8tensor w8channel w8group"),
        tokens=40,
        top_k=1,
        routing=_ONE_GROUP,
        block_m=64,
    ),
)
