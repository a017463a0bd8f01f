"""Cases of the grouped products of a base MoE layer.

Everything that a kernel must not read is poison (NaN): rows of x and routing weights of pairs that are not local, weights of
experts that nobody asked for, what lies between and around rows, table entries behind the last block. Everything that it
must not write is compared bit for bit; rows that it must write are NaN before.
"""

from __future__ import annotations

import dataclasses
import math
import sys
from types import MappingProxyType, ModuleType
from typing import Any, Callable, Mapping, Sequence

import torch

from kernelgen.core.model import QUANT_AXES, VOCABULARY
from kernelgen.families import quant
from kernelgen.families.activation import LOW, OTHER, Clamp, clamp_of
from kernelgen.families.activation import slices as slices_of
from kernelgen.families.buffers import Guarded, allocate, allocate_sparse, positions, row_major, seal
from kernelgen.families.case import Case as BaseCase
from kernelgen.families.case import Tags, compare_exactly, worst_ratio
from kernelgen.families.fused_moe import as_fp8
from kernelgen.families.moe_adapters import MIXED, RANKED, Adapters, Drawn, Factors, factors, live_of
from kernelgen.families.moe_adapters import draw as draw_adapters
from kernelgen.families.moe_experts import BY_PAIR, SPREAD, Experts, Routed, draw, draw_bias
from kernelgen.families.moe_gemm.reference import Delta, Expected, moe_gemm, moe_gemm_sum
from kernelgen.families.moe_lora.reference import dequantise
from kernelgen.families.moe_runs.reference import moe_runs, with_ranks

BODY = ("schedule", "rows", "gated")  # the activations of a text are for EXACT, and for cases of their own
_QUANTS = ("schedule", "rows", *QUANT_AXES)  # what FP8 operands and their scales pass through

# Tiles that small shapes can be less than, equal to and greater than.
_TILES: Mapping[str, int] = MappingProxyType({"block_n": 32, "block_k": 32, "num_stages": 2, "num_warps": 4, "parts": 2})
_NO_ROWS = [2**30, 2**30, 0]  # an entry of the tables without rows, where nothing may be read
_HUGE = 2**31 + 64  # elements: out of reach of a 32-bit offset


@dataclasses.dataclass(frozen=True)
class Case(BaseCase):
    """Sizes and layout of one call.

    Attributes:
        few: at most so many tokens for a variant that takes pairs one by one, where more show nothing more.
        hint: tokens that the grid is sized for, None: all.
        clamp: of an activation that has one.
        nan: the first and the last row of each weight, one of the gate and one of up, are NaN.
        tiles: tunables that differ from those of the other cases, where a variant has them.
        own_tiles: the variant chooses its tiles itself.
        align: rows are padded to a multiple of this many 16-bit elements, or twice as many of 8 bits,
        gap: and then lie so far apart.
        offset: elements that memory starts behind a 16-byte boundary.
        expert_stride, row_stride: of the weights, and of x, its scales and out, where they are given.
        scale_stride: of the scales of weights and of the biases of experts, where it is given.
        element: of FP8 operands.
        scales_end_in_1: scales a channel have a last dimension of one.
        scale_a_slice: a scale a matrix is one of each of its slices.
        scale_an_expert: a scale for all of x is one of the rows of each expert.
        scales_dtype: of all scales.
        by_column: the scales of x lie column by column.
        out_scales: of an FP8 result, where they are given: 1, or one an expert.
        adapters, rank: of a variant with adapters.
        parts: of its rank vectors, where there are no tables.
        v_by_token: these have a row a token, not one a pair.
        b_layout: of its second factors, a key of ``LAYOUTS`` of moe_adapters.
    """

    tokens: int = 5
    few: int = 3
    top_k: int = 2
    experts: int = 3
    k: int = 40
    n: int = 24
    block_m: int = 16
    routing: Experts = SPREAD
    hint: int | None = None
    weights_dtype: torch.dtype = torch.float32
    bias_dtype: torch.dtype = torch.bfloat16
    out_dtype: torch.dtype | None = None
    scale: float = 1.0
    nan: bool = False
    clamp: Clamp = LOW
    tiles: Mapping[str, int] = dataclasses.field(default_factory=dict, hash=False)
    own_tiles: bool = False
    align: int = 8
    gap: int = 8
    offset: int = 0
    expert_stride: int | None = None
    row_stride: int | None = None
    scale_stride: int | None = None
    element: str = "e4m3"
    scales_end_in_1: bool = False
    scale_a_slice: bool = False
    scale_an_expert: bool = False
    scales_dtype: torch.dtype = torch.float32
    by_column: bool = False
    out_scales: int = 1
    adapters: Adapters = MIXED
    rank: int = 12
    parts: int = 2
    v_by_token: bool = False
    b_layout: str = "padded"

    def of(self, tags: Tags) -> Case:
        """The case as a variant has it: MXFP4 has whole groups of columns, and tiles of two of them, and for lanes rows that are
        whole copies apart."""
        if tags.get("weight_quant") != "mxfp4":
            return self
        gap = 2 * self.gap if tags["schedule"] in _LANES else self.gap
        return dataclasses.replace(self, k=-(-self.k // quant.MX) * quant.MX, gap=gap, tiles={"block_k": 64, **self.tiles})

    def fits(self, tags: Tags) -> bool:
        """As of any case; warps of roles take blocks of 128 rows alone, whole steps of K, and ranks of whole copies; lanes take
        blocks of few rows, and what descriptors can read."""
        if tags["schedule"] in _LANES:
            return super().fits(tags) and self.block_m in (16, 32) and not (self.align % 8 or self.gap % 8 or self.offset % 8)
        whole = self.block_m == 128 and self.k % (64 if tags["act_quant"] == "none" else 128) == 0
        whole = whole and (tags["delta"] == "none" or self.rank % 8 == 0)
        return super().fits(tags) and (whole or tags["schedule"] != "warp_specialised")


def _only(**axes: str) -> Mapping[str, Sequence[str]]:
    return MappingProxyType({axis: tags.split() for axis, tags in axes.items()})


_LANES = ("lanes", "lane_gemv")
_TILED = _only(schedule="tile box")
_POINTERS = _only(schedule="gemv naive diagonal tile")
_WEIGHTED = _only(routed_weight="weighted")
_ONE = Experts("one")
_FP8 = _only(weight_quant="w8tensor w8channel w8group")
_MX = _only(weight_quant="mxfp4")
_MORE = ("schedule", "rows", "delta", "biased", "weighted")
_ENDS = ("schedule", "epilogue")
_BIASED = _only(bias="bias")
_E8M0 = torch.float8_e8m0fnu
_LORA = _only(delta="lora")
_BY_TOKEN = _only(delta="lora", rows="token_sorted sorted_sorted")  # where rank vectors may be those of tokens
_FP8_LORA = _only(delta_quant="b8tensor b8channel b8group")
_ALL_QUANTS = (*_QUANTS, "delta_quant")
_ACTIVATED = MappingProxyType({"epilogue": [tag for tag in VOCABULARY["epilogue"] if tag != "none"]})
_MANY = Adapters("spread", 60)
_FP8_TILED = MappingProxyType({**_FP8, **_only(schedule="tile box warp_specialised")})
_ROLES = _only(schedule="warp_specialised")
_STRIDED = _only(schedule="gemv naive diagonal tile lanes lane_gemv")
_BOX = _only(schedule="box")
_FAR: Mapping[str, Any] = {
    **{"tokens": 4, "few": 4, "routing": _ONE, "row_stride": _HUGE // 3, "scale_stride": _HUGE // 2},
    **{"adapters": Adapters("one"), "b_layout": "huge_both", "rank": 16},
}
_FAR_STRIDED: Mapping[str, Any] = {"only": _STRIDED, "experts": 9, "k": 136, "expert_stride": _HUGE // 2}
_FAR_ROLES: Mapping[str, Any] = {"only": _ROLES, "k": 256, "block_m": 128}

_OF_LORA = (
    Case("rank_1", "a rank of one, and one part", only=_LORA, rank=1, parts=1),
    Case("rank_64", "runs that end with a step, many parts", only=_LORA, tokens=20, few=1, top_k=1, experts=2, rank=64, parts=11),
    Case("rank_40", "steps of several runs, and runs of several steps", only=_LORA, tokens=20, top_k=1, experts=2, rank=40),
    Case("rank_130", "more ranks than a program takes at a time", only=_LORA, tokens=3, few=2, rank=130, own_tiles=True),
    Case("no_adapter", "a graph for adapters, replayed without one", only=_LORA, adapters=Adapters("none")),
    Case("one_adapter", "a run as high as its blocks", only=_LORA, tokens=33, top_k=1, routing=_ONE, adapters=Adapters("one")),
    Case("disabled", "adapters that are loaded but disabled", only=_LORA, tokens=9, adapters=Adapters("spread", 4, (0, 2))),
    Case("ranked", "ranks of every size", only=_LORA, tokens=9, few=6, rank=40, adapters=RANKED),
    Case(
        "ids_int64_adapters",
        "ids some of whose lower halves name experts; an adapter that is enabled by another number than one",
        only={**_LORA, "rows": ("pair_token", "token_pair")},
        tokens=8,
        routing=Experts("mixed", ids_dtype=torch.int64),
        adapters=Adapters("one", 3, (0,)),
    ),
    Case(
        "three_of_a_token",
        "deltas of pairs that fill no power of two",
        only={**_LORA, "rows": ("pair_token",)},
        tokens=4,
        few=4,
        top_k=3,
        experts=4,
        rank=16,
    ),
    Case("a_run_a_row", "every row a run of its own", only=_LORA, tokens=16, top_k=1, routing=_ONE, adapters=_MANY),
    Case("v_by_token", "vectors of tokens", only=_BY_TOKEN, tokens=20, top_k=3, v_by_token=True),
    Case("shared_b", "factors stored once for all experts: stride 0", only=_LORA, b_layout="shared"),
    Case(
        "fp8_with_adapters",
        "a delta behind sums that have their scales",
        only=MappingProxyType({**_FP8, **_LORA}),
        body=_QUANTS,
        tokens=20,
        few=2,
        experts=2,
        k=160,
        n=136,
        rank=40,
    ),
    Case(
        "fp8_adapters",
        "scales of several groups on both axes, none of them full at the end",
        only=_FP8_LORA,
        body=_ALL_QUANTS,
        tokens=20,
        few=1,
        experts=2,
        k=32,
        n=136,
        rank=136,
        scales_end_in_1=True,
    ),
    Case(
        "fp8_adapters_shared",
        "scales stored once for all experts: stride 0",
        only=_FP8_LORA,
        body=_ALL_QUANTS,
        few=2,
        rank=40,
        element="e5m2",
        b_layout="shared",
        own_tiles=True,
    ),
    Case(
        "fp8_adapters_ranked",
        "ranks of every size",
        only=_FP8_LORA,
        body=_ALL_QUANTS,
        tokens=6,
        few=6,
        rank=40,
        adapters=RANKED,
    ),
)

# Of warps of roles: a ring of slots that begins anew within a tile and between tiles, halves of a block with and without rows.
_OF_ROLES = (
    Case(
        "roles",
        "few programs of many tiles, the last of each kind not full",
        only=_ROLES,
        body=(*_QUANTS, "out_quant"),
        tokens=70,
        experts=2,
        hint=1,
        k=384,
        n=392,
        block_m=128,
        routing=Experts("skewed"),
        out_scales=2,
    ),
    Case(
        "roles_half",
        "a block of one half, full to the last row, and one of a row more",
        only=_ROLES,
        body=("schedule", "rows", "delta"),
        tokens=129,
        top_k=1,
        experts=2,
        k=128,
        n=256,
        block_m=128,
        rank=16,
        routing=Experts("turns"),
        tiles={"num_stages": 3},
    ),
    Case(
        "roles_grouped",
        "blocks that share a tile of columns, the last group lower; scales that are bytes, column by column",
        only=MappingProxyType({**_ROLES, **_only(act_quant="none a8group")}),
        body=("schedule", "act_quant", "out_quant"),
        tokens=30,
        top_k=3,
        experts=5,
        hint=1,
        k=384,
        n=264,
        block_m=128,
        routing=Experts("mixed", start=2),
        tiles={"group_m": 4, "num_stages": 4},
        element="e5m2",
        scales_dtype=_E8M0,
        by_column=True,
    ),
    Case(
        "roles_of_64",
        "a step that is no group",
        only=MappingProxyType({**_ROLES, **_only(act_quant="none")}),
        body=("schedule", "rows"),
        tokens=3,
        k=192,
        n=136,
        block_m=128,
    ),
    Case(
        "roles_adapted",
        "steps of several runs, runs of several steps, and ranks of every size; blocks of one half and of two",
        only=MappingProxyType({**_ROLES, **_LORA}),
        body=_QUANTS,
        tokens=70,
        experts=2,
        hint=1,
        k=128,
        n=264,
        block_m=128,
        rank=40,
        adapters=Adapters("turns", 3, ranks=(17, -40, 100)),  # three runs, whose padding begins a step
        routing=Experts("skewed"),
    ),
    Case(
        "roles_adapted_once",
        "one adapter with some of the rows, whose vectors are of tokens",
        only=MappingProxyType({**_ROLES, **_LORA, **_only(rows="token_sorted sorted_sorted")}),
        body=("schedule", "rows", "act_quant"),
        tokens=20,
        k=128,
        n=136,
        block_m=128,
        rank=8,
        v_by_token=True,
        adapters=Adapters("one"),
    ),
    Case("roles_of_none", "no block at all", only=_ROLES, k=128, block_m=128, routing=Experts("away")),
)

# Of lanes: a ring of slots that begins anew within a tile and between tiles, blocks of both heights.
_OF_LANES = (
    Case(
        "lanes",
        "few programs of many tiles, the last of each kind not full",
        only=_only(schedule="lanes"),
        tokens=40,
        top_k=1,
        experts=2,
        hint=1,
        k=1056,
        n=72,
        block_m=32,
        routing=Experts("skewed"),
        tiles={"num_stages": 3, "num_warps": 8},
    ),
    Case("lanes_of_none", "no block at all", only=_only(schedule="lanes"), routing=Experts("away")),
    Case(
        "lanes_by_pair",
        "parts of K of several steps, which are asked for one behind the other; experts that are elsewhere",
        only=_only(schedule="lane_gemv"),
        few=2,
        top_k=3,
        k=1056,
        n=40,
        routing=Experts("mixed", start=1),
        tiles={"parts": 2, "num_stages": 2},
    ),
    Case(
        "lanes_of_all_columns",
        "eight parts of a pair, or pairs of a token",
        only=_only(schedule="lane_gemv"),
        few=1,
        top_k=7,
        experts=7,
        tiles={"parts": 1, "num_stages": 1},
    ),
)

CASES = (
    *_OF_LORA,
    *_OF_ROLES,
    *_OF_LANES,
    Case("one", "every size is one", only=_POINTERS, tokens=1, top_k=1, experts=1, k=1, n=1),
    Case("lt_tile", "a tile that is not full", k=24, n=16),
    Case("eq_tile", "one full tile", tokens=16, top_k=1, routing=_ONE, k=32, n=32),
    Case("gt_tile", "full tiles, then a row", tokens=33, top_k=1, routing=_ONE, k=96, n=64),
    Case("ragged", "no size divides", tokens=9, top_k=3, k=72, n=40, routing=Experts("mixed", start=2)),
    Case("one_more", "one column behind a tile", only=_POINTERS, tokens=17, top_k=1, routing=_ONE, k=65, n=33),
    Case("empty", "a launch without programs", tokens=0, few=0),
    Case("nothing_local", "no block at all", routing=Experts("away")),
    Case("no_valid_token", "a step of padding alone", routing=Experts(valid=0)),
    Case("some_valid", "a graph replayed for fewer tokens", core=True, body=BODY, tokens=7, routing=Experts("mixed", valid=2)),
    Case("hint_too_low", "programs that take many tiles", only=_TILED, tokens=40, hint=1, n=64),
    Case("ids_int64", "ids as torch.topk gives them", routing=Experts("mixed", ids_dtype=torch.int64)),
    Case("twice_the_expert", "an expert twice in a token", top_k=3, experts=2),
    Case("top_1", "top_k = 1 folds a dimension away", top_k=1),
    Case(
        "half_tiles",
        "a tile of half the height is full, and one of the whole height that has a row more",
        only=_only(schedule="tile box lanes"),
        tokens=33,
        top_k=1,
        experts=2,
        block_m=32,
        tiles={"tail": 1},
        routing=Experts("turns"),
    ),
    Case(
        "grouped",
        "blocks that share a tile of columns, the last group lower",
        only=_TILED,
        tokens=50,
        experts=4,
        n=96,
        tiles={"group_m": 4},
    ),
    Case("block_64", "the blocks of long prompts", only=_TILED, tokens=70, experts=2, block_m=64, tiles={"tail": 1}),
    Case("own_tiles", "the tiles that the rule takes", own_tiles=True, k=64, n=48, tokens=20),
    Case(
        "own_large_tiles",
        "the tiles of long prompts",
        only=_TILED,
        own_tiles=True,
        k=64,
        n=48,
        tokens=130,
        experts=2,
        block_m=128,
    ),
    Case("weights_bf16", "routing weights in another dtype", only=_WEIGHTED, weights_dtype=torch.bfloat16),
    Case("out_f32", "tokens in fp32", only=_only(rows="pair_token"), out_dtype=torch.float32),
    Case("packed", "nothing between rows", gap=0, b_layout="packed"),
    Case(
        "bias",
        "a bias whose last columns are in a tile that is not full, of experts that are not the first",
        only=_BIASED,
        body=_MORE,
        few=2,
        n=40,
        routing=Experts("mixed", start=2),
    ),
    Case("bias_f32", "a bias in another dtype, and full tiles", only=_BIASED, body=_MORE, few=1, n=32, bias_dtype=torch.float32),
    Case(
        "weighted_inputs",
        "routing weights in front of the activation",
        only=_only(rows="token_sorted token_pair", routed_weight="weighted"),
        body=_MORE,
        few=2,
        k=72,
        routing=Experts("mixed", start=2),
    ),
    Case(
        "plain_sums",
        "a sum of experts whose inputs were weighted",
        only=_only(rows="pair_token", routed_weight="plain"),
        body=_MORE,
    ),
    Case("unaligned", "odd strides, a base that is not 16-byte aligned", only=_POINTERS, align=1, gap=1, offset=1, k=33, n=23),
    Case("large_sums", "gates in the tails of exp", only=_ACTIVATED, body=_ENDS, few=2, scale=40.0, clamp=OTHER),
    Case(
        "nan",
        "a NaN of the gate, and one of up, stay",
        only=MappingProxyType({**_ACTIVATED, **_only(weight_quant="none")}),
        body=_ENDS,
        tokens=2,
        few=1,
        nan=True,
    ),
    Case(
        "nan_roles",
        "a NaN of the gate, and one of up, stay",
        only=MappingProxyType({**_ACTIVATED, **_ROLES, **_only(out_quant="none")}),
        body=("epilogue",),
        tokens=2,
        k=128,
        block_m=128,
        nan=True,
        clamp=OTHER,
    ),
    *(
        Case(f"far{name}", "32-bit offsets of rows, experts, adapters, scales and biases wrap", **sizes, body=body, **_FAR)
        for name, sizes in (("", _FAR_STRIDED), ("_box", {"only": _BOX, "k": 136}), ("_roles", _FAR_ROLES))
        for name, body in ((name, _QUANTS), (f"{name}_more", _MORE))
    ),
    Case(
        "fp8",
        "several groups on both axes, none of them full at the end",
        only=_FP8,
        body=_QUANTS,
        tokens=9,
        few=2,
        k=160,
        n=136,
        routing=Experts("mixed", start=1),
    ),
    Case("fp8_whole", "whole groups, so that a tile of columns has one scale", only=_FP8, body=_QUANTS, few=2, k=256, n=128),
    Case(
        "fp8_restart",
        "groups that begin anew with up, where as many would go on (vLLM #54178)",
        only=_only(weight_quant="w8group", epilogue="swiglu"),
        body=_QUANTS,
        tokens=5,
        few=1,
        k=160,
        n=80,
    ),
    Case(
        "fp8_scale_a_slice",
        "scales [E, 2], of gate and of up (vLLM #8588)",
        only=_only(weight_quant="w8tensor", epilogue="swiglu"),
        body=_QUANTS,
        few=1,
        scale_a_slice=True,
    ),
    Case(
        "fp8_scale_an_expert",
        "the input scale of each expert, of rows that have one expert (TensorRT-LLM #10778)",
        only=_only(act_quant="a8tensor", rows="sorted_pair pair_token"),
        body=_QUANTS,
        routing=Experts("mixed", start=1),
        scale_an_expert=True,
    ),
    Case("fp8_e8m0", "scales that are powers of two, bytes (vLLM #54435)", only=_FP8, body=_QUANTS, few=1, scales_dtype=_E8M0),
    Case(
        "fp8_by_column",
        "scales of x column by column (tokenspeed #189)",
        only=_only(act_quant="a8group"),
        body=_QUANTS,
        few=2,
        k=160,
        by_column=True,
    ),
    Case("fp8_e5m2", "the other FP8 type", only=_FP8, k=144, n=48, element="e5m2", scales_end_in_1=True),
    Case(
        "fp8_wide_tiles",
        "tiles of several groups",
        only=_only(schedule="tile box", weight_quant="w8group"),
        body=_QUANTS,
        n=136,
        tiles={"block_n": 256},
    ),
    Case(
        "fp8_wide_tiles_of_pairs",
        "tiles of several groups, which begin anew with up",
        only=_only(schedule="gemv diagonal", weight_quant="w8group", epilogue="swiglu"),
        body=("schedule",),
        few=1,
        n=136,
        tiles={"block_n": 256},
    ),
    Case(
        "fp8_long_tiles",
        "tiles of several groups of K, the last with fewer",
        only=_only(schedule="gemv diagonal", weight_quant="w8tensor w8channel w8group"),
        body=("schedule", "gated", "rows", "act_quant"),
        few=2,
        k=300,
        tiles={"block_k": 256},
    ),
    Case("fp8_own_tiles", "the tiles that the rule takes", only=_FP8, body=_QUANTS, own_tiles=True, few=2, k=256, n=128, gap=0),
    Case(
        "fp8_own_large_tiles",
        "the tiles of long prompts",
        only=_FP8_TILED,
        body=_QUANTS,
        own_tiles=True,
        k=256,
        n=128,
        gap=0,
        tokens=70,
        experts=2,
        block_m=128,
    ),
    Case(
        "mxfp4_e8m0",
        "scales by their type, a tile of a single group",
        only=_MX,
        few=1,
        k=96,
        n=136,
        scales_dtype=_E8M0,
        tiles={"block_k": 32},
    ),
    Case("mxfp4_wide", "a last tile of one group of eight", only=_MX, few=1, k=288, tiles={"block_n": 64, "block_k": 256}),
    Case("mxfp4_own_tiles", "the tiles that the rule takes", only=_MX, few=2, k=288, n=136, gap=0, tokens=20, own_tiles=True),
)
_FULLY = _only(epilogue="none relu2 swiglu")
_REST = MappingProxyType({"epilogue": [tag for tag in VOCABULARY["epilogue"] if tag not in _FULLY["epilogue"]]})
# What exact algebra takes: a part of every tile, two groups of scales on both axes; and tiles of a lower height.
EXACT = (
    Case(
        "exact",
        "every text",
        only=_FULLY,
        few=2,
        k=152,
        n=136,
        routing=Experts("mixed", start=1),
        tiles={"block_n": 64, "block_k": 64},
    ),
    Case(
        "exact_whole",
        "whole tiles of K",
        only=_only(schedule="gemv naive diagonal tile box", epilogue="none swiglu"),
        body=("schedule", "gated", "weight_quant", "act_quant"),
        tokens=2,
        few=1,
        k=256,
        n=128,
    ),
    Case(
        "exact_several",
        "tokens of which several experts are added up",
        only=_only(schedule="gemv diagonal", rows="pair_token", delta="none"),
        body=("schedule", "bias", "routed_weight", "weight_quant"),
        tokens=1,
        top_k=3,
        k=72,
    ),
    Case(
        "exact_shared",
        "more pairs of an expert than a program takes",
        only=_only(schedule="diagonal", rows="token_pair", epilogue="relu2 swiglu"),
        body=("schedule", "gated", "delta", "delta_quant"),
        few=6,
        tokens=6,
        experts=2,
        routing=Experts("mixed"),
        tiles={"block_n": 64, "block_k": 64},
    ),
    Case("exact_activation", "texts that differ from others in what they end with", only=_REST, few=2, k=152, n=24),
    Case(
        "exact_tail",
        "blocks of few rows in tiles of half the height",
        only=MappingProxyType({**_TILED, **_FULLY}),
        tokens=25,
        top_k=1,
        experts=2,
        n=16,
        block_m=64,
        tiles={"tail": 1},
        routing=Experts("skewed"),
    ),
    Case(
        "exact_roles",
        "two steps of both products",
        only=_ROLES,
        tokens=2,
        top_k=1,
        experts=1,
        k=256,
        n=256,
        block_m=128,
        rank=16,
    ),
    Case(
        "exact_lanes_by_pair",
        "steps of K that are several, of several parts",
        only=_only(schedule="lane_gemv"),
        few=1,
        top_k=3,
        k=1056,
        n=16,
        tiles={"parts": 2, "num_stages": 1},
    ),
    Case(
        "exact_lanes",
        "steps of K that are several, and blocks of both heights",
        only=_only(schedule="lanes"),
        tokens=25,
        top_k=1,
        experts=2,
        k=544,
        n=16,
        block_m=32,
        routing=Experts("skewed"),
    ),
)
# Arguments that the cases need not tell apart, and why.
SAME = {
    "ZERO_REST": "tests/test_fused_moe.py",
    "x_desc half_desc": "boxes of one tensor",
    "OUT_SCALE_STRIDE": "exact_roles has the other",
}


@dataclasses.dataclass(frozen=True)
class Call:
    """The operands of one call, and what it should make of them."""

    out: Guarded
    x: torch.Tensor
    w: torch.Tensor
    tables: Any
    topk_weights: torch.Tensor | None
    w_scale: torch.Tensor | None
    x_scale: torch.Tensor | None
    routed: Routed
    expected: Expected
    inputs: Mapping[str, Guarded]
    adapted: Mapping[str, Any]  # v, lora_b and runs, of a variant with adapters
    more: Mapping[str, Any]  # a bias, and the numbers of an activation, where there are any
    out_scale: Guarded | None = None  # of an FP8 out

    @property
    def operands(self) -> tuple[Any, ...]:
        """out, x, w and tables, as every launcher takes them."""
        return self.out.view, self.x, self.w, self.tables

    @property
    def scales(self) -> dict[str, torch.Tensor]:
        """Those that there are, by the names of their arguments."""
        out_scale = None if self.out_scale is None else self.out_scale.view
        given = {"w_scale": self.w_scale, "x_scale": self.x_scale, "out_scale": out_scale}
        return {name: scale for name, scale in given.items() if scale is not None}

    def verify(self) -> float:
        """The worst error over its bound.

        Raises:
            AssertionError: a row that is written is off, another one changed, or an input did.
        """
        for name, guarded in self.inputs.items():
            changed = int(guarded.changed().sum())
            assert not changed, f"{name}: {changed} elements of an input changed"
        self._verify_rest("out", self.out, self.expected.rows)
        if self.out_scale is not None:
            return self._verify_fp8(self.out_scale)
        return worst_ratio(
            self.out.view[self.expected.rows].cpu(), self.expected.out.cpu(), self.expected.bound.cpu()
        )


    def _verify_rest(self, name: str, written: Guarded, rows: torch.Tensor) -> None:
        mine = torch.zeros(written.view.shape[0], dtype=torch.bool)
        mine[rows] = True
        stray = int((written.changed() & ~positions(written, mine.to(self.x.device))).sum())
        assert not stray, f"{name}: {stray} elements changed outside of the rows of local pairs"

    def _verify_fp8(self, out_scale: Guarded) -> float:
        """Codes times scales are what some rows within their bounds become, scales included."""
        rows, out, bound = (found.cpu() for found in self.expected)
        width, scales, given = quant.group()[1], out_scale.view.cpu(), None
        if scales.dim() == 1:  # read
            self._verify_rest("out_scale", out_scale, rows[:0])
            order = sorted(self.routed.local, key=lambda item: (item.expert, item.pair))
            expert_of = torch.tensor([order[row].expert % scales.shape[0] for row in rows.tolist()], dtype=torch.int64)
            scales, width, given = scales[expert_of, None], out.shape[1], scales
        else:
            self._verify_rest("out_scale", out_scale, rows)
            scales = scales[rows]
        codes = self.out.view[rows.to(self.x.device)].cpu()
        found = codes.double() * scales.double().repeat_interleave(width, 1)[:, : out.shape[1]]
        compare_exactly(found, out)
        for i in range(len(rows)):
            of_row = None if given is None else float(scales[i])
            low, high = as_fp8(out[i] - bound[i], out[i] + bound[i], codes.dtype, width, of_row)
            wrong = int(((found[i] < low) | (found[i] > high) | found[i].isnan()).sum())
            assert not wrong, f"{wrong} of {len(low)} numbers of row {int(rows[i])} are off"
        return 0.0


def make(package: ModuleType, case: Case, tags: Tags, device: str) -> Call:
    """The operands of ``case`` for a variant, with tables of the reference; the numbers depend on the case alone."""
    case = case.of(tags)
    dtype = getattr(torch, str(VOCABULARY["dtype"][tags["dtype"]]["torch_dtype"]))
    by_one = tags["schedule"] in BY_PAIR
    tokens = min(case.tokens, case.few) if by_one else case.tokens
    reads, writes = tags["rows"].split("_")
    routed = draw(case.routing, tokens, case.top_k, case.experts, case.random(), device)
    numbers, num_pairs = case.generator(), tokens * case.top_k
    of_weights, of_x = quant.scales_of(tags)
    unit = case.align * (2 if of_weights and case.align > 1 else 1)
    pad = -(-case.k // unit) * unit + (case.gap if unit == case.align else 2 * case.gap)

    def memory(shape: Sequence[int], strides: Sequence[int], kind: torch.dtype = dtype) -> torch.Tensor:
        if max(strides) * max(shape[0], 1) >= _HUGE // 2:
            return allocate_sparse(shape, strides, kind, device)
        return allocate(shape, strides, kind, device, offset=case.offset)

    adapters = None
    if tags.get("delta", "none") != "none":
        adapters = draw_adapters(case.adapters, tokens, case.random(), device)
    of_token = [None] * tokens if adapters is None else adapters.of_token
    order = moe_runs(routed.local, of_token, top_k=case.top_k, block_m=case.block_m).order
    sources = {
        "token": [pair // case.top_k for pair, _ in routed.local],
        "sorted": range(len(order)),
        "pair": [pair for pair, _ in routed.local],
    }[reads]
    element = quant.element(case.element)
    x_shape = (tokens if reads == "token" else num_pairs, case.k)
    x = memory(x_shape, (case.row_stride or pad, 1), element if of_x else dtype)
    x_scale, x_numbers = None, x
    if of_x:
        shape = (case.experts,) if case.scale_an_expert else quant.x_scale_shape(of_x, x_shape, quant.group()[1])
        if case.row_stride and len(shape) == 2 and shape[1] > 1:
            x_scale = memory(shape, (case.row_stride, 1), case.scales_dtype)
        else:
            x_scale = quant.allocate_x_scale(shape, device, case.scales_dtype, case.by_column)
    expert_of = dict(zip(sources, [expert for _, expert in (order if reads == "sorted" else routed.local)], strict=True))
    for row in sorted(set(sources)):
        x[row] = quant.as_dtype(torch.randn(case.k, generator=numbers), x)
        if x_scale is not None and not case.scale_an_expert:
            each = x_scale[row] if x_scale.dim() > 1 else x_scale
            each.copy_(quant.draw_scales(each, 1.0, numbers))
    if x_scale is not None and case.scale_an_expert:
        for expert in sorted(set(expert_of.values())):
            x_scale[expert] = quant.draw_scales(x_scale[expert], 1.0, numbers)
        x_numbers = x.double()
        for row, expert in expert_of.items():
            x_numbers[row] *= x_scale[expert].double()
    elif x_scale is not None and sources:
        x_numbers = dequantise(x, x_scale, quant.group_of(of_x, x_shape, (1, quant.group()[1])))
    slices, clamp = slices_of(tags["epilogue"]), clamp_of(tags["epilogue"], case.clamp)
    height = case.n * slices
    w_shape, size = (case.experts, height, case.k), case.scale * case.k**-0.5
    w_row, w_width, w_kind = pad, case.k, element if of_weights else dtype
    if of_weights == "mx":
        w_row, w_width, w_kind = -(-pad // 2), case.k // 2, torch.uint8
    w = memory((case.experts, height, w_width), (case.expert_stride or height * w_row, w_row, 1), w_kind)
    w_scale, w_numbers = None, w
    if of_weights:
        shape = (case.experts, *quant.scale_shape(of_weights, w_shape[1:], quant.group(), slices))
        if case.scales_end_in_1 and of_weights == "channel":
            shape = (*shape, 1)
        if case.scale_a_slice:
            shape = (*shape, slices)
        kind = torch.uint8 if of_weights == "mx" and case.scales_dtype == torch.float32 else case.scales_dtype
        inner = row_major(shape)[1:]
        w_scale = memory(shape, (case.scale_stride or math.prod(shape[1:]), *inner), kind)
    for expert in sorted({item.expert for item in routed.local}):
        if w_scale is not None and of_weights == "mx":
            quant.draw_mxfp4(w[expert], w_scale[expert], size, numbers)
            continue
        drawn = torch.randn(height, case.k, generator=numbers)
        w[expert] = quant.as_dtype(drawn if of_weights else drawn * size, w)
        if case.nan:
            w[expert, :: height - 1] = torch.nan
        if w_scale is not None:
            w_scale[expert] = quant.draw_scales(w_scale[expert], size, numbers)
    if w_scale is not None:
        w_numbers = quant.dequantise_slices(w, w_scale, of_weights, slices)
    scaled = of_weights not in (None, "mx")  # MXFP4 is exact in 16 bits
    bias = None
    if tags.get("bias", "none") == "bias":
        bias = draw_bias(routed, height, case.bias_dtype, numbers, device, gap=case.scale_stride or case.gap, offset=case.offset)
    weights = None
    if tags["routed_weight"] == "weighted":
        weights = allocate((tokens, case.top_k), (case.top_k, 1), case.weights_dtype, device)
        for pair, _ in routed.local:
            weights.view(-1)[pair] = torch.rand((), generator=numbers).to(weights)

    slots: dict[str, Any] = {}
    delta, b = None, None
    if adapters is not None:
        of_b = VOCABULARY["delta_quant"][tags.get("delta_quant", "none")]["b_scales"]
        v, b, delta = _make_delta(case, slices, order, adapters, by_one, numbers, dtype, device, of_b)
        slots = {"v": v, **b.named("lora_b", "b_scale")}

    out_rows = tokens if writes == "token" else num_pairs
    out_row = case.row_stride or -(-case.n // case.align) * case.align + case.gap
    of_out, out_scale = None if tags.get("out_quant", "none") == "none" else of_x, None
    out = memory((out_rows, case.n), (out_row, 1), element if of_out else case.out_dtype or dtype)
    if of_out:
        shape = (case.out_scales,) if of_out == "tensor" else quant.x_scale_shape(of_out, out.shape, quant.group()[1])
        out_scale = allocate(shape, row_major(shape), torch.float32, device)
        if of_out == "tensor":
            out_scale.copy_(0.02 * 3.0 ** torch.arange(case.out_scales))
    short = of_x is not None and device != "cpu"  # gemv has no such x
    if writes == "token":
        count = routed.num_valid
        expected = moe_gemm_sum(
            x_numbers,
            w_numbers,
            routed.local,
            num_tokens=count,
            top_k=case.top_k,
            topk_weights=weights,
            dtype=out.dtype,
            scaled=scaled,
            short=short,
            delta=delta,
            bias=bias,
        )
    else:
        expected = moe_gemm(
            x_numbers,
            w_numbers,
            routed.local,
            top_k=case.top_k,
            rows=tags["rows"],
            epilogue=tags["epilogue"],
            topk_weights=weights,
            dtype=dtype,
            scaled=scaled,
            short=short,
            order=order,
            delta=delta,
            interleaved=tags.get("layout") == "interleaved",
            bias=bias,
            clamp=clamp,
        )
    tables, runs, ints = tables_of(package, case, routed, by_one, device, adapters)
    if b is not None:
        slots["runs"] = runs
        ints |= {"v": slots["v"], **b.each("lora_b", "b_scale")}
    given = {"x": x, "w": w, "topk_weights": weights, "topk_ids": routed.topk_ids, **ints}
    given |= {"w_scale": w_scale, "x_scale": x_scale, "bias": bias}
    inputs = {name: _seal(tensor) for name, tensor in given.items() if tensor is not None}
    more = {**({} if bias is None else {"bias": bias}), **(clamp.given if clamp else {})}
    sealed = None if out_scale is None else _seal(out_scale)
    return Call(_seal(out), x, w, tables, weights, w_scale, x_scale, routed, expected, inputs, slots, more, sealed)


def _seal(tensor: torch.Tensor) -> Guarded:
    return seal(tensor, sparse=tensor.untyped_storage().nbytes() >= _HUGE)


def _make_delta(
    case: Case,
    slices: int,
    order: Sequence[Any],
    adapters: Drawn,
    by_one: bool,
    numbers: torch.Generator,
    dtype: torch.dtype,
    device: str,
    of_b: Any,
) -> tuple[torch.Tensor, Factors, Delta]:
    """v and the second factors as a variant takes them, NaN where nothing may be read; and what they are.

    Parts are such that every order of adding them up is exact.
    """
    num_pairs = len(adapters.of_token) * case.top_k
    of_pair = (num_pairs, slices, case.rank)
    shape = (case.parts, *of_pair) if by_one else of_pair
    if case.v_by_token:
        shape = (len(adapters.of_token), slices, case.rank)
    v = allocate(shape, row_major(shape), torch.float32 if by_one else dtype, device)
    counted = adapters.counted(case.rank)
    by_pair = torch.full(of_pair, torch.nan, dtype=torch.float64, device=device)
    for place, (pair, _) in enumerate(order):
        token = pair // case.top_k
        if (adapter := adapters.of_token[token]) is not None:
            parts = (16 * torch.randn(case.parts, slices, case.rank, generator=numbers)).round() / 64
            parts[:, :, counted[adapter] :] = torch.nan
            by_pair[pair] = parts.sum(0).to(by_pair)
            if by_one:
                v[:, pair] = parts.to(v)
            elif not case.v_by_token:
                v[place] = parts.sum(0).to(v)
            elif v[token].isnan().all():
                v[token] = parts.sum(0).to(v)
            else:
                by_pair[pair] = v[token].to(by_pair)
    live = live_of(order, adapters.of_token, case.top_k)
    form = (of_b, case.element, case.scales_end_in_1)
    shape = (adapters.loras, case.experts, case.n, case.rank)
    b = factors(shape, slices, case.b_layout, live, numbers, dtype, device, *form, counted=counted, of_columns=True)
    return v, b, Delta(by_pair, b.numbers, adapters.of_token, b.scales is not None, counted)


def tables_of(
    package: ModuleType, case: Any, routed: Routed, by_one: bool, device: str, adapters: Drawn | None = None
) -> tuple[Any, Any, dict[str, torch.Tensor]]:
    """The tables of the reference as a variant takes them, and the runs of adapters in them, poison behind what counts."""
    tables = package.no_tables(
        routed.topk_ids,
        num_experts=routed.num_experts,
        valid_tokens=routed.valid_tokens,
        local_expert_start=routed.start,
    )
    given = () if adapters is None else (adapters.token_lora_mapping, adapters.adapter_enabled)
    if by_one:
        runs = None if adapters is None else package.MoeRuns(*given, None, None, adapters.loras, adapters.lora_ranks)
        return tables, runs, {}
    num_pairs, (tokens, top_k) = routed.topk_ids.numel(), routed.topk_ids.shape
    of_token = [None] * tokens if adapters is None else adapters.of_token
    wanted = moe_runs(routed.local, of_token, top_k=top_k, block_m=case.block_m)
    pairs = allocate((num_pairs,), (1,), torch.int32, device)
    pairs[: len(wanted.order)] = torch.tensor([item.pair for item in wanted.order], dtype=torch.int32).to(device)
    entries = [_NO_ROWS, *(entry for block in wanted.blocks.tolist() for entry in (block, _NO_ROWS))]
    blocks = allocate((max(len(entries), num_pairs), 3), (3, 1), torch.int32, device)
    blocks[: len(entries)] = torch.tensor(entries, dtype=torch.int32).to(device)
    count = torch.tensor([len(entries)], dtype=torch.int32, device=device)
    hint = routed.topk_ids.shape[0] if case.hint is None else case.hint
    made = {"pairs": pairs, "blocks": blocks, "num_blocks": count}
    tables = tables._replace(**made, block_m=case.block_m, tokens_hint=hint)
    if adapters is None:
        return tables, None, made
    run_of_row, runs = allocate((num_pairs,), (1,), torch.int32, device), allocate((num_pairs, 2), (2, 1), torch.int32, device)
    run_of_row[: len(wanted.order)] = wanted.run_of_row.to(device)
    written = torch.nonzero(wanted.runs[:, 0] >= 0).flatten()
    listed = wanted.runs if adapters.lora_ranks is None else with_ranks(wanted.runs, adapters.lora_ranks.tolist())
    runs[written.to(device)] = listed[written].to(device)
    made |= {"run_of_row": run_of_row, "runs": runs}
    return tables, package.MoeRuns(*given, run_of_row, runs, adapters.loras, adapters.lora_ranks), made


def check(
    package: ModuleType, launcher: Callable[..., None], tags: Tags, case: Case, device: str
) -> float:
    """Run ``case`` on a variant's launcher; return the worst error over its bound.

    Raises:
        AssertionError: the variant is wrong.
    """
    call = make(package, case, tags, device)
    keywords = {} if call.topk_weights is None else {"topk_weights": call.topk_weights}
    config = None if case.own_tiles else tiles(launcher, case.of(tags).tiles)
    launcher(*call.operands, config=config, **keywords, **call.scales, **call.adapted, **call.more)
    return call.verify()


def tiles(launcher: Callable[..., None], changes: Mapping[str, int] | None = None) -> Any:
    """The tiles of the cases, as a variant's launcher takes them."""
    config = sys.modules[launcher.__module__].Config
    streamed = {} if "num_stages" in config._fields else {"block_n": 8}
    known = {**_TILES, **streamed, **(changes or {})}
    return config(**{field: known[field] for field in config._fields if field in known})
