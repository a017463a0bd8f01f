"""Cases of the second product of dense LoRA: each closes a hole in the tests of engines, or stands for a bug of theirs."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any, Callable

import torch

from kernelgen.buffers import positions, seal
from kernelgen.cases import lora_inputs
from kernelgen.cases.base import Tags, worst_ratio
from kernelgen.cases.lora_inputs import HUGE, LAYOUTS, Case
from kernelgen.reference.lora_expand import lora_expand

BODY = ("rank", "add_inputs")

_RANY = {"rank": ("rany",)}

CASES = (
    Case("one", "every size is one", tokens=1, loras=1, widths=(1,), rank="one"),
    Case("lt_tile", "a tile that is not full", tokens=3, widths=(28,), rank="part"),
    Case("eq_tile", "one full tile", tokens=16, adapters="one", widths=(64,)),
    Case("gt_tile", "full tiles, then a row and a column", tokens=33, adapters="one", widths=(65,)),
    Case("ragged", "no size divides", core=True, widths=(70, 33), rank="part", offset=5),
    Case(
        "query_key_value",
        "slices of unequal width, as of grouped-query attention",
        core=True,
        widths=(128, 64, 64),
    ),
    Case("narrow_first", "a first slice below a tile", widths=(8, 100)),
    Case("empty", "a launch without programs", tokens=0),
    Case("nothing_live", "base tokens only, adapters loaded (vLLM #42008)", adapters="none"),
    Case("mixed", "live rows beside rows without an adapter", core=True, tokens=9, adapters="mixed"),
    Case("last_adapter", "the last adapter of a mixed batch (vLLM #32235)", adapters="last"),
    Case("one_adapter", "a single slot", loras=1),
    Case("offset", "columns in front of the first slice", offset=24, widths=(40, 40)),
    Case("y_16_bit", "rank vectors in 16 bits, as an all-reduce may leave them", y_dtype=None, widths=(40, 24)),
    Case("packed", "nothing between rows", layout="packed", widths=(40, 24)),
    Case("shared", "weights stored once for all adapters: stride 0", layout="shared"),
    Case("unaligned", "odd strides, a base that is not 16-byte aligned", layout="odd", widths=(23, 9), offset=1),
    Case("huge_adapters", "32-bit offsets of adapters wrap", loras=2, layout="huge_adapters", widths=(40, 24)),
    Case("huge_rows", "32-bit offsets of rows wrap (vLLM #53028)", tokens=3, layout="huge_rows"),
    Case("four_dimensions", "weights [L, 1, N, rank]", four=True),
    Case("rank_one", "a rank far below its bucket", rank="one"),
    Case("rank_24_any", "a small rank in a tiled kernel", only=_RANY, rank=24),
    Case("rank_129", "one rank behind a tile", only=_RANY, rank=129),
    Case("rank_512", "the largest rank (vLLM #55158)", only=_RANY, rank=512, tokens=2),
    Case("wide_blocks", "64 rows a block", tokens=66, adapters="one", block_m=64),
    Case("nan_row", "a NaN stays in the rows of its token", adapters="one", nan_token=1),
    Case("own_tiles", "the tiles that the variant chooses", core=True, own_tiles=True, widths=(200, 70)),
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


def check(package: ModuleType, launcher: Callable[..., None], tags: Tags, case: Case, device: str) -> float:
    """Run ``case`` on a variant's launcher; return the worst error over its bound.

    Raises:
        AssertionError: the variant is wrong.
    """
    batch, numbers, dtype = lora_inputs.draw(case, device), case.generator(), lora_inputs.dtype_of(tags)
    adds, rank, width = tags["add_inputs"] == "add", lora_inputs.rank_of(case, tags), sum(case.widths)
    y = lora_inputs.make_y(case, tags, batch, numbers)
    b = lora_inputs.make_weights(case, tags, batch, case.widths, rank, numbers)
    out = LAYOUTS[case.layout].matrix((case.tokens, case.offset + width + 3), dtype, device)
    columns = out[:, case.offset : case.offset + width]
    for token in batch.live if adds else ():
        columns[token] = (4 * torch.randn(width, generator=numbers)).to(out)
    route, tables = lora_inputs.route_of(package, case, batch, device)
    inputs = lora_inputs.sealed({"y": y, **{f"lora_b[{s}]": w for s, w in enumerate(b)}})
    expected = lora_expand(out, y, b, batch.adapters, offset_start=case.offset, add_inputs=adds)
    sparse = out.untyped_storage().nbytes() >= HUGE
    guarded = seal(out if sparse else columns, sparse=sparse)
    config = None if case.own_tiles else tiles(launcher)
    launcher(out, y, lora_inputs.given(case, b), route, offset_start=case.offset, config=config)
    lora_inputs.unchanged({**inputs, **tables})
    rows = batch.rows()
    stray = int((guarded.changed() & ~positions(guarded, rows)).sum())
    assert not stray, f"out: {stray} elements changed outside of the columns of tokens with an adapter"
    written = slice(case.offset, case.offset + width)
    exact, bound = (t[rows][:, written] for t in expected)
    return worst_ratio(columns[rows], exact, bound)


def tiles(launcher: Callable[..., None]) -> Any:
    """Tiles that small shapes can be less than, equal to and greater than."""
    return sys.modules[launcher.__module__].Config(32, 2, 2, 4)
