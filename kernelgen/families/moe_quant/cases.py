"""Cases of rows that become FP8 numbers: compared bit for bit, as every step of theirs is one rounding."""

from __future__ import annotations

import dataclasses
import sys
from types import MappingProxyType, ModuleType
from typing import Any, Callable

import torch

from kernelgen.families import quant
from kernelgen.families.buffers import Guarded, allocate, positions, row_major, seal
from kernelgen.families.case import Case as BaseCase
from kernelgen.families.case import Tags, compare_exactly
from kernelgen.families.lora_inputs import dtype_of
from kernelgen.families.moe_experts import SPREAD, Experts, Routed, draw
from kernelgen.families.moe_gemm.cases import Case as GemmCase
from kernelgen.families.moe_gemm.cases import tables_of
from kernelgen.families.moe_quant.reference import moe_quant

BODY = ("order", "act_quant")


@dataclasses.dataclass(frozen=True)
class Case(BaseCase):
    """Sizes and layout of one call; memory that must not be read is NaN.

    Attributes:
        hint: tokens that the grid is sized for, None: all.
        gap, offset: elements between rows, and before the first behind a 16-byte boundary.
        element: of the codes.
        special: a number in the first row of each expert.
        scales: how many there are where they are given, 1 or one an expert; and of which dtype.
    """

    tokens: int = 5
    top_k: int = 2
    experts: int = 3
    n: int = 80
    block_m: int = 16
    routing: Experts = SPREAD
    hint: int | None = None
    gap: int = 16
    offset: int = 0
    element: str = "e4m3"
    special: float | None = None
    scale: float = 1.0
    scales: int = 1
    scales_dtype: torch.dtype = torch.float32
    own_tiles: bool = False


_SORTED = MappingProxyType({"order": ("sorted",)})
_PAIR = MappingProxyType({"order": ("pair",)})
_GIVEN = MappingProxyType({"act_quant": ("a8tensor",)})

CASES = (
    Case("one", "every size is one", tokens=1, top_k=1, experts=1, n=1),
    Case("group", "a whole group", n=128),
    Case("one_more", "a group, then a column", n=129),
    Case("ragged", "pairs that are elsewhere", core=True, tokens=9, top_k=3, n=300, routing=Experts("mixed", start=2)),
    Case("empty", "a launch without programs", tokens=0),
    Case("nothing_local", "no row at all", routing=Experts("away")),
    Case("some_valid", "rows behind the valid tokens", body=BODY, core=True, tokens=7, routing=Experts("mixed", valid=3)),
    Case("no_valid_token", "a step of padding alone", routing=Experts(valid=0)),
    Case("more_than_there_are", "a count beyond the batch", only=_PAIR, routing=Experts(valid=2**31 - 1)),
    Case("ids_int64", "ids as torch.topk gives them", routing=Experts("mixed", ids_dtype=torch.int64)),
    Case("hint_too_low", "programs that take many rows", only=_SORTED, tokens=40, hint=1),
    Case("blocks_of_64", "blocks that are not full", only=_SORTED, tokens=70, experts=2, block_m=64),
    Case("unaligned", "odd strides, a base that is not 16-byte aligned", gap=1, offset=1, n=33),
    Case("huge_rows", "32-bit offsets of rows wrap", gap=2**30, tokens=2, routing=Experts("one")),
    Case("e5m2", "the other FP8 type", n=200, element="e5m2"),
    *(
        Case(
            name,
            "the input scale of each expert of a checkpoint (TensorRT-LLM #10778)",
            only={**_GIVEN, **order},
            routing=Experts("mixed", start=2, ids_dtype=torch.int64),
            tokens=9,
            scales=3,
        )
        for name, order in (("scale_an_expert", _PAIR), ("scale_an_expert_of_tables", _SORTED))
    ),
    Case("e8m0", "a scale that is a power of two, a byte", only=_GIVEN, scales_dtype=torch.float8_e8m0fnu),
    Case("zeros", "a scale that must not be zero", body=BODY, special=0.0, scale=0.0),
    Case("tiny", "a scale that would underflow", body=BODY, scale=2.0**-130),
    Case("infinity", "an infinity saturates and leaves the scale alone", body=BODY, special=float("inf")),
    Case("nan", "NaN stays NaN and leaves the scale alone", body=BODY, special=float("nan")),
    Case("own_tiles", "the tiles that the rule takes", own_tiles=True, n=700, tokens=24, block_m=32),
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
    launcher(call.codes.view, call.scale.view, call.x, call.tables, config=config)
    call.verify()
    return 0.0


@dataclasses.dataclass(frozen=True)
class Call:
    """The operands of one call, and the rows that it should write."""

    codes: Guarded
    scale: Guarded
    x: torch.Tensor
    tables: Any
    routed: Routed
    rows: torch.Tensor
    width: int
    given: torch.Tensor | None  # the scales of these rows

    def verify(self) -> None:
        """Raise AssertionError unless the rows are right to the bit, and nothing else was written."""
        x, rows = self.x.cpu()[self.rows], self.rows.to(self.x.device)
        codes, scale = moe_quant(x, self.width, self.codes.view.dtype, self.given)
        found = self.codes.view[rows].cpu()
        compare_exactly(found, codes)
        same = (found.float() == codes.float()) | (found.float().isnan() & codes.float().isnan())
        assert same.all(), f"{int((~same).sum())} of {same.numel()} codes are off"
        if self.given is None:
            compare_exactly(self.scale.view[rows].cpu(), scale)
            wrong = int((self.scale.view[rows].cpu() != scale).sum())
            assert not wrong, f"{wrong} of {scale.numel()} scales are off"
        for guarded in (self.codes, self.scale):
            written = torch.zeros(guarded.view.shape[0], dtype=torch.bool)
            if guarded is self.codes or self.given is None:
                written[self.rows] = True
            stray = int((guarded.changed() & ~positions(guarded, written.to(self.x.device))).sum())
            assert not stray, f"{stray} elements changed outside of the rows of local pairs"


def make(package: ModuleType, case: Case, tags: Tags, device: str) -> Call:
    """The operands of ``case`` for a variant, with tables of the reference."""
    routed = draw(case.routing, case.tokens, case.top_k, case.experts, case.random(), device)
    numbers, by_pair = case.generator(), tags["order"] == "pair"
    _, of_x = quant.scales_of(tags)
    pairs = case.tokens * case.top_k
    shape, pitch = (pairs, case.n), case.n + case.gap
    local = routed.local if by_pair else sorted(routed.local, key=lambda item: (item.expert, item.pair))
    rows = torch.tensor([pair if by_pair else i for i, (pair, _) in enumerate(local)], dtype=torch.int64)
    x = allocate(shape, (pitch, 1), dtype_of(tags), device, offset=case.offset)
    for row in rows.tolist():
        x[row] = (case.scale * torch.randn(case.n, generator=numbers)).to(x)
        if case.special is not None and row % 2 == 0:
            x[row, case.n // 2] = case.special
    codes = allocate(shape, (pitch + 16, 1), quant.element(case.element), device, offset=case.offset)
    scale_shape = (case.scales,) if of_x == "tensor" else quant.x_scale_shape(of_x, shape, quant.group()[1])
    scale, of_rows = allocate(scale_shape, row_major(scale_shape), case.scales_dtype, device), None
    if of_x == "tensor":
        scale.copy_(0.01 * 3.0 ** torch.arange(case.scales))  # so that the largest of a hundred numbers saturates
        of_rows = scale.float().cpu()[[expert % case.scales for _, expert in local]]
    given = GemmCase("tables", "", block_m=case.block_m, hint=case.hint)
    tables, _, _ = tables_of(package, given, routed, False, device)
    width = quant.group()[1] if of_x == "group" else case.n
    return Call(seal(codes), seal(scale), x, tables, routed, rows, width, of_rows)
