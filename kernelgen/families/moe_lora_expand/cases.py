"""Cases of the second product of MoE-LoRA: each closes a hole in the tests of engines, or stands for a bug of theirs."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any, Callable, Mapping

import torch

from kernelgen.families.buffers import allocate, positions, seal
from kernelgen.families.case import Tags, worst_ratio
from kernelgen.families.lora_inputs import sealed, unchanged
from kernelgen.families.moe_lora_apart import HUGE, Case, make
from kernelgen.families.moe_lora_expand.reference import moe_lora_expand
from kernelgen.families.moe_lora_inputs import LAYOUTS
from kernelgen.families.moe_routing import Routing

BODY = ("schedule", "rank")

_ANY_RANK: Mapping[str, Any] = {"body": ("schedule",)}  # what has nothing to do with the rank
_RANY = {"rank": ("rany",)}
_BLOCKS = {"schedule": ("blocks",)}
_WEIGHTED = {"routed_weight": ("weighted",)}
_ONE_GROUP = Routing("one_group")

CASES = (
    Case("one", "every size is one", tokens=1, top_k=1, experts=1, loras=1, n=1, rank="one"),
    Case("lt_tile", "a tile that is not full", tokens=3, n=28, rank="part"),
    Case("eq_tile", "one full tile", tokens=16, top_k=1, routing=_ONE_GROUP, n=64),
    Case("gt_tile", "full tiles, then a row and a column", tokens=33, top_k=1, routing=_ONE_GROUP, n=65),
    Case(
        "ragged",
        "no size divides",
        core=True,
        tokens=5,
        slices=2,
        n=70,
        rank="part",
        routing=Routing("mixed"),
        offset=5,
    ),
    Case(
        "second_shard",
        "columns in front of the first slice (vLLM ignores its offset)",
        offset=24,
        slices=2,
        **_ANY_RANK,
    ),
    Case("gathered", "ranks of two GPUs, as an all-gather leaves them", core=True, shards=2, rank=16, slices=2),
    Case("gathered_part", "shards whose ranks are no power of two", shards=3, rank=12, slices=2, tokens=3),
    Case("gathered_8", "a rank a shard", shards=8, rank=8, tokens=2, **_ANY_RANK),
    Case("gathered_gaps", "shards that are parts of larger buffers (vLLM #42718)", shards=2, rank=16, gap=5, slices=2),
    Case("gathered_many", "shards of a tiled rank", only=_RANY, shards=4, rank=192, tokens=2),
    Case(
        "part_of_a_buffer",
        "slices that are further apart than they are large (vLLM #42718)",
        slices=2,
        gap=8,
        **_ANY_RANK,
    ),
    Case("slices_3", "the third slice", slices=3),
    Case("empty", "a launch without programs", tokens=0, **_ANY_RANK),
    Case("nothing_live", "base tokens only, adapters loaded (vLLM #42008)", routing=Routing("none"), **_ANY_RANK),
    Case(
        "mixed",
        "live pairs beside pairs without an adapter, with a disabled one, with experts that are elsewhere",
        core=True,
        tokens=8,
        few=8,
        loras=3,
        routing=Routing("mixed", disabled=(0,)),
    ),
    Case(
        "last_adapter", "the last adapter of a mixed batch (vLLM #32235)", loras=4, routing=Routing("last"), **_ANY_RANK
    ),
    Case("twice_the_expert", "an expert twice in a token", routing=Routing("duplicates"), top_k=3, **_ANY_RANK),
    Case(
        "expert_parallel",
        "global ids, and experts on another GPU (vLLM PR 40867)",
        tokens=8,
        few=8,
        routing=Routing("mixed", expert_map=True),
        **_ANY_RANK,
    ),
    Case(
        "ids_int64",
        "ids as torch.topk gives them, some of whose lower halves name experts (vLLM #50845)",
        tokens=8,
        few=8,
        routing=Routing("mixed", ids_dtype=torch.int64),
        **_ANY_RANK,
    ),
    Case("weights_bf16", "weights in another dtype", only=_WEIGHTED, weights_dtype=torch.bfloat16, **_ANY_RANK),
    Case("packed", "nothing between rows", layout="packed", slices=2, **_ANY_RANK),
    Case("shared_experts", "weights stored once for all experts: stride 0", layout="shared", **_ANY_RANK),
    Case("expert_major", "strides in another order", layout="expert_major", loras=3, **_ANY_RANK),
    Case("unaligned", "odd strides, a base that is not 16-byte aligned", layout="odd", n=23, slices=2, offset=1),
    Case("huge_adapters", "32-bit offsets of adapters wrap", loras=3, routing=_ONE_GROUP, layout="huge_adapters", **_ANY_RANK),
    Case("huge_experts", "32-bit offsets of experts wrap (vLLM #53028)", routing=_ONE_GROUP, layout="huge_experts", **_ANY_RANK),
    Case("huge_rows", "32-bit offsets of rows wrap (vLLM #39585)", tokens=3, layout="huge_rows", **_ANY_RANK),
    Case("far_slices", "32-bit offsets of the slices of y wrap", slices=3, far="slices", tokens=2, **_ANY_RANK),
    Case("far_rows", "32-bit offsets of the rows of y wrap", slices=2, far="rows", tokens=2, **_ANY_RANK),
    Case("gathered_far", "32-bit offsets of shards wrap", shards=3, rank=12, far="slices", tokens=2, **_ANY_RANK),
    Case("rank_one", "a rank far below its bucket", rank="one"),
    Case("rank_24_any", "a small rank in a tiled kernel", only=_RANY, rank=24),
    Case("rank_129", "one rank behind a tile", only=_RANY, rank=129, tokens=2),
    Case("rank_512", "the largest rank (vLLM #55158)", only=_RANY, rank=512, tokens=1),
    Case(
        "wide_blocks", "64 rows a block", only=_BLOCKS, tokens=66, top_k=1, routing=_ONE_GROUP, block_m=64, **_ANY_RANK
    ),
    Case("nan_row", "a NaN stays with the pairs of its token", nan_token=1, routing=_ONE_GROUP, **_ANY_RANK),
    Case("own_tiles", "the tiles that the variant chooses", core=True, own_tiles=True, n=200, slices=2),
    Case(
        "model_sized",
        "long loops, many programs",
        needs_gpu=True,
        own_tiles=True,
        tokens=160,
        few=16,
        top_k=4,
        experts=8,
        loras=3,
        slices=2,
        n=768,
        routing=Routing("mixed"),
        offset=768,
    ),
)
EXACT = tuple(case for case in CASES if case.name in ("ragged",))  # what exact algebra takes, on every text


def check(package: ModuleType, launcher: Callable[..., None], tags: Tags, case: Case, device: str) -> float:
    """Run ``case`` on a variant's launcher; return the worst error over its bound.

    Raises:
        AssertionError: the variant is wrong.
    """
    batch, numbers, top_k = make(case, tags, device), case.generator(), case.top_k
    tokens, width = batch.routed.sizes.tokens, case.slices * case.n
    y = batch.make_y()
    together = batch.fill(y, numbers)
    b = batch.make_weights(case.n, batch.rank, numbers)
    shape = (tokens, top_k, case.offset + width + 3)
    out = batch.matrix(shape, LAYOUTS[case.layout].of_out(shape))
    columns = out[:, :, case.offset : case.offset + width]
    weights = None
    if tags["routed_weight"] == "weighted":
        weights = allocate((tokens, top_k), (top_k, 1), case.weights_dtype, device)
    for pair in range(batch.num_pairs):  # a NaN that something is added to may keep its bits
        columns[divmod(pair, top_k)] = (4 * torch.randn(width, generator=numbers)).to(out)
        if weights is not None and pair in batch.live:
            weights[divmod(pair, top_k)] = torch.randn(1, generator=numbers).to(weights)[0]
    route, tables = batch.route(package)
    routing = {name: tensor for name, tensor in batch.routed.tensors.items() if tensor is not None}
    inputs = sealed({"y": y, **{f"lora_b[{s}]": w for s, w in enumerate(b)}, **routing})
    live = batch.routed.live
    adds = tags["add_inputs"] == "add"
    exact, bound = moe_lora_expand(out, together, b, live, offset=case.offset, topk_weights=weights, add_inputs=adds)
    sparse = out.untyped_storage().nbytes() >= HUGE
    guarded = seal(out if sparse else columns, sparse=sparse)
    keywords = {} if weights is None else {"topk_weights": weights}
    config = None if case.own_tiles else tiles(launcher, case)
    launcher(out, y, b, route, **keywords, offset=case.offset, config=config)
    unchanged({**inputs, **tables})
    rows = batch.rows().view(tokens, top_k)
    stray = int((guarded.changed() & ~positions(guarded, rows)).sum())
    assert not stray, f"out: {stray} elements changed outside of the columns of live pairs"
    written = slice(case.offset, case.offset + width)
    return worst_ratio(columns[rows], exact[rows][:, written], bound[rows][:, written])


def tiles(launcher: Callable[..., None], case: Case) -> Any:
    """Tiles that small shapes can be less than, equal to and greater than."""
    config = sys.modules[launcher.__module__].Config
    known = {"block_n": 32, "tiles": 4 // case.slices, "stages": 2, "num_warps": 4}
    return config(**{name: known[name] for name in config._fields if name in known})
