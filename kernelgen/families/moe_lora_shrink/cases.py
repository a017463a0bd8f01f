"""Cases of the first product of MoE-LoRA: each closes a hole in the tests of serving engines, or stands for a bug of theirs."""

from __future__ import annotations

import itertools
import sys
from types import ModuleType
from typing import Any, Callable, Mapping

import torch

from kernelgen.families.buffers import positions, seal
from kernelgen.families.case import Tags, worst_ratio
from kernelgen.families.lora_inputs import sealed, unchanged
from kernelgen.families.moe_lora_apart import Case, make
from kernelgen.families.moe_lora_shrink.reference import moe_lora_shrink
from kernelgen.families.moe_routing import Routing

BODY = ("schedule", "rank")

_ANY_RANK: Mapping[str, Any] = {"body": ("schedule",)}  # what has nothing to do with the rank
_RANY = {"rank": ("rany",)}
_BLOCKS = {"schedule": ("blocks",)}
_ONE_GROUP = Routing("one_group")

CASES = (
    Case("one", "every size is one", tokens=1, top_k=1, experts=1, loras=1, k=1, rank="one"),
    Case("lt_tile", "a tile that is not full", tokens=3, k=20, rank="part"),
    Case("eq_tile", "one full tile", tokens=16, top_k=1, routing=_ONE_GROUP, k=64),
    Case("gt_tile", "full tiles, then a row", tokens=33, top_k=1, routing=_ONE_GROUP, k=128),
    Case(
        "ragged", "no size divides", core=True, tokens=5, slices=2, k=150, rank="part", routing=Routing("mixed"), gap=3
    ),
    Case(
        "in_one", "all of K in one program", core=True, tokens=5, slices=2, k=150, split=192, routing=Routing("mixed")
    ),
    Case("short_part", "a last part that is short, of whole tiles", k=192, split=128),
    Case("most_parts", "more parts of K than are common", k=600, tokens=2, **_ANY_RANK),
    Case("a_row_a_pair", "x of the second projection", row_a_pair=True, tokens=5, top_k=3, **_ANY_RANK),
    Case("slices_3", "the third slice", slices=3),
    Case(
        "part_of_a_buffer",
        "slices that are further apart than they are large (vLLM #42718)",
        slices=2,
        gap=8,
        **_ANY_RANK,
    ),
    Case("part_of_a_buffer_in_one", "as it is, without parts", slices=2, gap=8, k=64, split=128, rank="part", **_ANY_RANK),
    Case("empty", "a launch without programs", tokens=0, **_ANY_RANK),
    Case(
        "nothing_live", "base tokens only: y must be 0, not what it was", routing=Routing("none"), slices=2, **_ANY_RANK
    ),
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
    Case("packed", "nothing between rows", layout="packed", slices=2, **_ANY_RANK),
    Case("shared_experts", "weights stored once for all experts: stride 0", layout="shared", **_ANY_RANK),
    Case("expert_major", "strides in another order", layout="expert_major", loras=3, **_ANY_RANK),
    Case("unaligned", "odd strides, a base that is not 16-byte aligned", layout="odd", k=33, slices=2),
    Case("huge_adapters", "32-bit offsets of adapters wrap", loras=3, routing=_ONE_GROUP, layout="huge_adapters", **_ANY_RANK),
    Case("huge_experts", "32-bit offsets of experts wrap (vLLM #53028)", routing=_ONE_GROUP, layout="huge_experts", **_ANY_RANK),
    Case("huge_rows", "32-bit offsets of rows wrap (vLLM #39585)", tokens=3, layout="huge_rows", **_ANY_RANK),
    Case("no_workspace", "parts in memory of their own", k=200, workspace=False, **_ANY_RANK),
    *(
        Case(f"far_{what}{where}", "32-bit offsets of y wrap", slices=3, far=what, tokens=2, split=split, **_ANY_RANK)
        for what, (where, split) in itertools.product(("slices", "rows"), (("", 64), ("_in_one", 128)))
    ),
    Case("apart", "slices that share no product", slices=3, card="gfx942"),
    Case("rank_one", "a rank far below its bucket", rank="one", slices=2),
    Case("rank_8", "half a rank of 16", rank=8, slices=2),
    Case("rank_24_any", "a small rank in a tiled kernel", only=_RANY, rank=24),
    Case("rank_129", "one rank behind a tile", only=_RANY, rank=129, tokens=2),
    Case(
        "wide_blocks", "64 rows a block", only=_BLOCKS, tokens=66, top_k=1, routing=_ONE_GROUP, block_m=64, **_ANY_RANK
    ),
    Case("wide_range", "sums in 16 bits", spread=8, k=96, **_ANY_RANK),
    Case("nan_row", "a NaN stays with the pairs of its token", nan_token=1, routing=_ONE_GROUP, **_ANY_RANK),
    Case("own_tiles", "the tiles that the variant chooses", core=True, own_tiles=True, k=600),
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
        k=2048,
        routing=Routing("mixed"),
    ),
)
EXACT = (  # what exact algebra takes
    *(case for case in CASES if case.name in ("ragged", "in_one")),
    Case("exact_parts", "parts of K that add up in their order", body=("schedule",), tokens=2, k=256),
)
# Arguments that the cases need not tell apart, and why.
SAME = {
    "BLOCK": "launches have one",
}


def check(package: ModuleType, launcher: Callable[..., None], tags: Tags, case: Case, device: str) -> float:
    """Run ``case`` on a variant's launcher; return the worst error over its bound.

    Raises:
        AssertionError: the variant is wrong.
    """
    batch, numbers = make(case, tags, device), case.generator()
    x, a, y = batch.make_x(numbers), batch.make_weights(batch.rank, case.k, numbers), batch.make_y()
    route, tables = batch.route(package)
    routing = {name: tensor for name, tensor in batch.routed.tensors.items() if tensor is not None}
    inputs = sealed({"x": x, **{f"lora_a[{s}]": w for s, w in enumerate(a)}, **routing})
    value, bound = moe_lora_shrink(x, a, batch.routed.live, num_pairs=batch.num_pairs)
    guarded = seal(y, sparse=bool(case.far))
    launcher(y, x, a, route, config=None if case.own_tiles else tiles(launcher, case))
    unchanged({**inputs, **tables})
    stray = int((guarded.changed() & ~positions(guarded, torch.ones(y.shape[:2], dtype=torch.bool))).sum())
    assert not stray, f"y: {stray} elements changed beside it"
    rows = batch.rows()
    assert not y[:, ~rows].any(), "y is not 0 where a pair is not live"
    return worst_ratio(y[:, rows], value[:, rows], bound[:, rows])


def tiles(launcher: Callable[..., None], case: Case) -> Any:
    """Tiles that small shapes can be less than, equal to and greater than."""
    config = sys.modules[launcher.__module__].Config
    known = {"block_r": 8, "block_k": 32 if case.split == 128 else 64, "split_k": case.split, "stages": 2, "num_warps": 4}
    return config(**{name: known[name] for name in config._fields if name in known})
