"""Cases of rows in the order of tables: compared bit for bit, as they are copied."""

from __future__ import annotations

import dataclasses
import importlib
import sys
from types import MappingProxyType, ModuleType
from typing import Any, Callable

import torch

from kernelgen.families import quant
from kernelgen.families.buffers import Guarded, allocate, bits, positions, row_major, seal
from kernelgen.families.case import Case as BaseCase
from kernelgen.families.case import Tags, compare_exactly
from kernelgen.families.moe_experts import SPREAD, Experts, Routed, draw
from kernelgen.families.moe_gemm.cases import Case as GemmCase
from kernelgen.families.moe_gemm.cases import tables_of
from kernelgen.families.moe_permute.reference import moe_permute

BODY = ("act_quant",)


@dataclasses.dataclass(frozen=True)
class Case(BaseCase):
    """Sizes and layout of one call; memory that must not be read is NaN.

    Attributes:
        hint: tokens that the grid is sized for, None: all.
        x_gap, out_gap, offset: elements between rows, and before the first behind a 16-byte boundary.
        by_column: whether the scales of groups lie so.
    """

    tokens: int = 5
    top_k: int = 2
    experts: int = 3
    k: int = 80
    block_m: int = 16
    routing: Experts = SPREAD
    hint: int | None = None
    x_gap: int = 16
    out_gap: int = 48
    offset: int = 0
    element: str = "e4m3"  # of x
    scales_dtype: torch.dtype = torch.float32
    by_column: bool = False
    own_tiles: bool = False


_GROUPS = MappingProxyType({"act_quant": ("a8group",)})

CASES = (
    Case("one", "every size is one", tokens=1, top_k=1, experts=1, k=1),
    Case("group", "a whole group", body=BODY, k=128),
    Case("one_more", "a group, then a column", k=129),
    Case("ragged", "pairs that are elsewhere", core=True, tokens=9, top_k=3, k=300, routing=Experts("mixed", start=2)),
    Case("empty", "a launch without programs", tokens=0),
    Case("nothing_local", "no row at all", routing=Experts("away")),
    Case("some_valid", "rows behind the valid tokens", tokens=7, routing=Experts("mixed", valid=3)),
    Case("no_valid_token", "a step of padding alone", routing=Experts(valid=0)),
    Case("one_expert", "programs side by side have parts of one expert", core=True, tokens=40, routing=Experts("one")),
    Case("many_experts", "fewer parts than experts", body=BODY, tokens=2, experts=40, routing=Experts("turns")),
    Case("hint_too_low", "programs that take many rows", tokens=40, hint=1, routing=Experts("skewed")),
    Case("blocks_of_64", "blocks that are not full", tokens=70, experts=2, block_m=64),
    Case("unaligned", "odd strides, a base that is not 16-byte aligned", x_gap=1, out_gap=2, offset=1, k=33),
    Case("huge_rows", "32-bit offsets of rows wrap", x_gap=2**30, out_gap=2**30 + 16, tokens=4, top_k=1, routing=Experts("one")),
    Case("e5m2", "the other FP8 type", k=200, element="e5m2"),
    Case("by_column", "scales of groups as some quantisation kernels write them", only=_GROUPS, core=True, k=300, by_column=True),
    Case("e8m0", "scales that are powers of two, a byte", k=300, scales_dtype=torch.float8_e8m0fnu),
    Case("own_tiles", "the tiles that the rule takes", own_tiles=True, k=700, tokens=24, block_m=32),
)
EXACT = tuple(case for case in CASES if case.name in ("ragged",))  # what exact algebra takes, on every text


def check(
    package: ModuleType, launcher: Callable[..., None], tags: Tags, case: Case, device: str
) -> float:
    """Run ``case`` on a variant's launcher.

    Raises:
        AssertionError: the variant is wrong.
    """
    call = make(package, case, tags, device)
    config = None if case.own_tiles else sys.modules[launcher.__module__].Config(2, 2)
    launcher(call.out.view, call.out_scale.view, call.x, call.x_scale, call.tables, config=config)
    call.verify()
    return 0.0


@dataclasses.dataclass(frozen=True)
class Call:
    """The operands of one call, and the pairs whose rows it should write."""

    out: Guarded
    out_scale: Guarded
    x: torch.Tensor
    x_scale: torch.Tensor
    tables: Any
    routed: Routed
    order: list[int]

    def verify(self) -> None:
        """Raise AssertionError unless the rows are right to the bit, and nothing else was written."""
        top_k = self.routed.topk_ids.shape[1]
        for guarded, given in ((self.out, self.x), (self.out_scale, self.x_scale.float())):
            found = guarded.view[: len(self.order)]
            wanted = moe_permute(given.cpu(), self.order, top_k)
            compare_exactly(found, wanted)
            wrong = int((bits(found.cpu().contiguous()) != bits(wanted.contiguous())).sum())
            assert not wrong, f"{wrong} of {wanted.numel()} elements are off"
            written = torch.zeros(guarded.view.shape[0], dtype=torch.bool, device=given.device)
            written[: len(self.order)] = True
            stray = int((guarded.changed() & ~positions(guarded, written)).sum())
            assert not stray, f"{stray} elements changed outside of the rows of local pairs"


def make(package: ModuleType, case: Case, tags: Tags, device: str) -> Call:
    """The operands of ``case`` for a variant, with tables of the reference."""
    routed = draw(case.routing, case.tokens, case.top_k, case.experts, case.random(), device)
    numbers, element = case.generator(), quant.element(case.element)
    _, of_x = quant.scales_of(tags)
    local = sorted(routed.local, key=lambda item: (item.expert, item.pair))
    x = allocate((case.tokens, case.k), (case.k + case.x_gap, 1), element, device, offset=case.offset)
    read = sorted({item.pair // case.top_k for item in local})
    x[read] = torch.randn(len(read), case.k, generator=numbers).to(x)
    pairs = case.tokens * case.top_k
    out = allocate((pairs, case.k), (case.k + case.out_gap, 1), element, device, offset=case.offset)
    assert of_x is not None
    shape, to = (quant.x_scale_shape(of_x, (rows, case.k), quant.group()[1]) for rows in (case.tokens, pairs))
    x_scale = allocate(shape, (1, shape[0]) if case.by_column else row_major(shape), case.scales_dtype, device)
    for token in read:
        x_scale[token].copy_(torch.rand(shape[1], generator=numbers))
    out_scale = seal(allocate(to, row_major(to), torch.float32, device))
    given = GemmCase("tables", "", block_m=case.block_m, hint=case.hint)
    tables, _, _ = tables_of(package, given, routed, False, device)
    align = importlib.import_module(f"{package.__name__}.moe_align._op")
    most = max(int(tables.num_blocks), align.max_blocks(case.tokens, case.top_k, case.experts, case.block_m))
    tables = tables._replace(blocks=tables.blocks[:most].clone())  # behind them memory ends
    return Call(seal(out), out_scale, x, x_scale, tables, routed, [item.pair for item in local])
