"""Cases of the second product of dense LoRA: each closes a hole in the tests of engines, or stands for a bug of theirs."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import sys
from types import ModuleType
from typing import Any, Callable, Iterator, Mapping
from unittest import mock

import torch

from kernelgen.families import lora_inputs
from kernelgen.families.buffers import positions, seal
from kernelgen.families.case import Tags, worst_ratio
from kernelgen.families.lora_expand.reference import lora_expand
from kernelgen.families.lora_inputs import HUGE, LAYOUTS, Case

BODY = ("rank", "add_inputs")

_RANY = {"rank": ("rany",)}
_SCALES = ("weight_quant",)
_W8: Mapping[str, Any] = {"body": _SCALES, "only": {"weight_quant": ("w8tensor", "w8channel", "w8group")}}
_W8_CHANNEL: Mapping[str, Any] = {"body": _SCALES, "only": {"weight_quant": ("w8channel",)}}
_W8_GROUP: Mapping[str, Any] = {"body": ("tiled_rank", *_SCALES), "only": {"weight_quant": ("w8group",)}}

_SIXTEEN_BIT = (
    Case("one", "every size is one", tokens=1, loras=1, widths=(1,), rank="one"),
    Case("lt_tile", "a tile that is not full", tokens=3, widths=(28,), rank="part"),
    Case("eq_tile", "one full tile", tokens=16, adapters="one", widths=(64,)),
    Case("gt_tile", "full tiles, then a row and a column", tokens=33, adapters="one", widths=(65,)),
    Case("ragged", "no size divides", widths=(70, 33), rank="part", offset=5),
    Case(
        "query_key_value",
        "slices of unequal width, as of grouped-query attention",
        widths=(128, 64, 64),
    ),
    Case("narrow_first", "a first slice below a tile", widths=(8, 100)),
    Case("empty", "a launch without programs", tokens=0),
    Case("nothing_live", "base tokens only, adapters loaded (vLLM #42008)", adapters="none"),
    Case("mixed", "live rows beside others, of a route that lists more", core=True, tokens=9, held=2, adapters="mixed"),
    Case("last_adapter", "the last adapter of a mixed batch (vLLM #32235)", adapters="last"),
    Case("one_adapter", "a single slot", loras=1),
    Case("offset", "columns in front of the first slice", offset=24, widths=(40, 40)),
    Case("y_16_bit", "rank vectors in 16 bits, as an all-reduce may leave them", y_dtype=None, widths=(40, 24)),
    Case("y_in_parts", "parts of K to add up, whose last quarter is short", core=True, y_parts=11, rank="part", held=2),
    Case("y_in_two_parts", "parts that are no more than quarters", y_parts=2, widths=(64, 128), rank="part"),
    Case("out_f32", "out in fp32, as of a head", core=True, out_dtype=torch.float32, adapters="mixed", widths=(40, 24)),
    Case("packed", "nothing between rows", layout="packed", widths=(40, 24)),
    Case("shared", "weights stored once for all adapters: stride 0", layout="shared"),
    Case("unaligned", "odd strides, a base that is not 16-byte aligned", layout="odd", widths=(23, 9), offset=1),
    Case("huge_adapters", "32-bit offsets of adapters wrap", adapters="last", layout="huge_adapters", widths=(40, 24)),
    Case("huge_rows", "32-bit offsets of rows wrap (vLLM #53028)", tokens=3, layout="huge_rows"),
    Case("four_dimensions", "weights [L, 1, N, rank]", four=True),
    Case("rank_one", "a rank far below its bucket", rank="one"),
    Case("rank_24_any", "a small rank in a tiled kernel", only=_RANY, rank=24),
    Case("rank_129", "one rank behind a tile", only=_RANY, rank=129),
    Case("rank_512", "the largest rank (vLLM #55158)", only=_RANY, rank=512, tokens=2),
    Case("wide_blocks", "64 rows a block", tokens=66, adapters="one", block_m=64),
    Case("nan_row", "a NaN stays in the rows of its token", adapters="one", nan_token=1),
    Case("own_tiles", "the tiles that the variant chooses", core=True, own_tiles=True, widths=(200, 70)),
    Case("lone_tiles", "full tiles, one a program", own_tiles=True, widths=(128, 64)),
    Case(
        "model_sized",
        "long loops, many programs",
        needs_gpu=True,
        own_tiles=True,
        tokens=160,
        widths=(4096, 1024, 1024),
        adapters="mixed",
    ),
)
_FP8 = (
    Case("w8_lone_tiles", "full tiles, one a program", **_W8, own_tiles=True, widths=(128, 64)),
    Case("w8_one", "every size is one", **_W8, tokens=1, loras=1, widths=(1,), rank="one"),
    Case(
        "w8_query_key_value",
        "scales of slices of unequal width (vLLM takes the strides of slice 0 for all), and e5m2",
        **_W8,
        held=2,
        element="e5m2",
        widths=(300, 40, 130),
    ),
    Case(
        "w8_wide_tiles",
        "tiles of several groups, behind the last",
        **_W8_GROUP,
        layout="packed",
        loras=1,
        block_n=256,
        widths=(384, 100),
    ),
    Case(
        "w8_lone_wide", "the same, one a program", **_W8_GROUP, layout="packed", loras=1, block_n=256, tiles=1, widths=(384,)
    ),
    Case("w8_even_wide_tiles", "tiles of two whole groups", **_W8_GROUP, block_n=256, tiles=1, widths=(512,)),
    Case("w8_tile_a_group", "tiles of a group each, several to a program", **_W8_GROUP, widths=(512,), block_n=128),
    Case("w8_lone_tile_a_group", "tiles of a group each, one a program", **_W8_GROUP, widths=(256,), block_n=128, tiles=1),
    Case("w8_rank_groups", "ranks of two groups", body=_SCALES, only={**_W8_GROUP["only"], **_RANY}, rank=129, widths=(150,)),
    Case("w8_packed", "nothing behind the last scale", **_W8, layout="packed", loras=1, widths=(60, 24)),
    Case("w8_unaligned", "odd strides and base", **_W8, layout="odd", widths=(23, 9)),
    Case("w8_huge_adapters", "32-bit offsets of scales wrap", **_W8, layout="huge_adapters", adapters="last"),
    Case("w8_out_1", "scales [L, N, 1]", **_W8_CHANNEL, scales_end_in_1=True, widths=(33, 20)),
    Case("w8_empty", "a launch without programs", **_W8, tokens=0),
    Case(
        "w8_model_sized",
        "long loops, many programs",
        **_W8,
        needs_gpu=True,
        own_tiles=True,
        tokens=160,
        widths=(4096, 1024, 1024),
        adapters="mixed",
    ),
)
_NO_FP8 = {"weight_quant": ("none",)}
# FP8 meets the core cases, and its own: sizes and layouts are the business of the text that it shares with 16 bits.
CASES = (
    *(c if c.core else dataclasses.replace(c, only={**c.only, **_NO_FP8}) for c in _SIXTEEN_BIT),
    *_FP8,
)
# What exact algebra takes: a part of every tile, two groups of scales on both axes.
EXACT = (
    Case("exact", "every text", tokens=3, widths=(150, 33), rank="part", offset=5),
    Case("exact_parts", "parts of K that are not added up yet", body=("rank", *_SCALES), tokens=2, widths=(40,), y_parts=7),
)
# Arguments that the cases need not tell apart, and why.
SAME = {
    "COLUMN_STRIDE": "a law has columns apart, slices_lie_anywhere",
}


def check(package: ModuleType, launcher: Callable[..., None], tags: Tags, case: Case, device: str) -> float:
    """Run ``case`` on a variant's launcher; return the worst error over its bound.

    Raises:
        AssertionError: the variant is wrong.
    """
    batch, numbers, dtype = lora_inputs.draw(case, device), case.generator(), lora_inputs.dtype_of(tags)
    adds, rank, width = tags["add_inputs"] == "add", lora_inputs.rank_of(case, tags), sum(case.widths)
    y = lora_inputs.make_y(case, tags, batch, numbers)
    b = lora_inputs.make_weights(case, tags, batch, case.widths, rank, numbers)
    parts = None if case.y_parts is None else lora_inputs.make_parts(case, batch, y, numbers)
    out = LAYOUTS[case.layout].matrix((case.tokens, case.offset + width + 3), case.out_dtype or dtype, device)
    columns = out[:, case.offset : case.offset + width]
    for token, adapter in enumerate(batch.adapters):
        if adds or adapter is None:  # a NaN that something is added to may keep its bits
            columns[token] = (4 * torch.randn(width, generator=numbers)).to(out)
    route, tables = lora_inputs.route_of(package, case, batch, device)
    inputs = lora_inputs.sealed({"y": y, **lora_inputs.tensors_of("b", b)})
    options: dict[str, Any] = dict(lora_inputs.scales_of("b_scale", b))
    flags: dict[str, Any] = {"add_inputs": adds, "scaled": bool(options), "dtype": dtype}
    stands_for = [w.numbers for w in b]
    expected = lora_expand(out, y, stands_for, batch.adapters, offset_start=case.offset, **flags)
    sparse = out.untyped_storage().nbytes() >= HUGE
    guarded = seal(out if sparse else columns, sparse=sparse)
    config = None if case.own_tiles else tiles(launcher, case)
    weights = lora_inputs.given(case, b)
    with contextlib.nullcontext() if parts is None else _in_parts(package, launcher, case, *parts):
        launcher(out, y, weights, route, offset_start=case.offset, config=config, **options)
    lora_inputs.unchanged({**inputs, **tables})
    rows = batch.rows()
    stray = int((guarded.changed() & ~positions(guarded, rows)).sum())
    assert not stray, f"out: {stray} elements changed outside of the columns of tokens with an adapter"
    written = slice(case.offset, case.offset + width)
    exact, bound = (t[rows][:, written] for t in expected)
    return worst_ratio(columns[rows], exact, bound)


@contextlib.contextmanager
def _in_parts(
    package: ModuleType, launcher: Callable[..., None], case: Case, y: torch.Tensor, scalings: torch.Tensor
) -> Iterator[None]:
    """Inside, calls of a variant read parts in the place of y, as ``lora`` lets them behind a lora_shrink."""
    schedule = sys.modules[launcher.__module__].schedule
    kinds = importlib.import_module(f"{package.__name__}.lora_shrink._problem")
    parts = kinds.Parts(y.shape[0], -(-y.shape[0] // 4))
    bind, given = schedule.bind, package._runtime.GIVEN

    def bound(problem: Any, route: Any, config: Any) -> Any:
        call = bind(problem, route, config, parts)
        return call.through(given, y_ptr=y, scaling=case.scaling, scalings_ptr=scalings)

    with mock.patch.object(schedule, "bind", bound):
        yield


def tiles(launcher: Callable[..., None], case: Case) -> Any:
    """Tiles that small shapes can be less than, equal to and greater than."""
    return sys.modules[launcher.__module__].Config(max(16, case.block_m // 2), case.block_n, case.tiles, 2, 4)
