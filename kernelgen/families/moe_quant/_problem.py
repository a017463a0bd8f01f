"""What the variants of moe_quant share: the sizes of a call, its checks, and which tiles serve it."""

from __future__ import annotations

from typing import Annotated, NamedTuple

import torch

from .. import _operands as operands
from .. import _runtime as runtime
from .._scales import SCALES, check_fp8, check_x_scale, find_x_mode, is_fp32
from ..moe_align._op import Tables
from ._table import QUANT, VARIANTS
from ._tuned import TUNED


class Config(NamedTuple):
    """Tiles of moe_quant: whole rows."""

    rows: int
    num_warps: int


CONFIGS = {"moe_quant": Config}


class Given(NamedTuple):
    """What moe_quant is given."""

    codes: Annotated[torch.Tensor, operands.Tensor("T*top_k, N", QUANT.elements, written=True)]
    scale: Annotated[torch.Tensor, operands.Tensor(None, SCALES, operands.CONTIGUOUS, written=True, asks=("x_scales",))]
    x: Annotated[torch.Tensor, operands.Tensor("T*top_k, N", "D", asks=("torch_dtype",))]
    tables: Tables
    order: Annotated[str, operands.Choice(("sorted", "pair"), asks=("by_table",))]


OP = operands.Op("moe_quant", Given, spec=VARIANTS.spec, dtypes={"D": VARIANTS.dtypes}, first=("x",), tells=("x",))


class Problem(NamedTuple):
    """The sizes of one checked call; strides count elements."""

    num_pairs: int
    top_k: int
    num_experts: int
    local_expert_start: int
    tokens_hint: int
    block_m: int
    n: int
    codes_stride: int
    x_stride: int
    scale_stride: int  # over experts, 0: one for all
    largest: float  # number of the type of the codes
    device: torch.device
    x_scales: str  # of what there is a scale each


def check(variant: str, given: Given, *, mode: str | None = None, dtype: torch.dtype | None = None) -> Problem:
    """The sizes of a call, once everything about it is known to fit; mode and dtype of None: any.

    Raises:
        ValueError: says which argument does not fit, what it is and what was wanted.
    """
    sizes = OP.check(variant, given, D=dtype)
    codes, scale, x, tables, order = given
    if order == "sorted" and tables.block_m == 0:
        runtime.fail(variant, "tables", "none", "tables", "make them with moe_align")
    found = find_x_mode(variant, x, scale, QUANT, mode, tables.num_experts, "scale")
    if mode not in (None, found):
        runtime.fail(variant, "scale", runtime.describe(scale), f"a scale a {mode}")
    check_fp8(variant, "codes", codes, found, QUANT)
    if not runtime.traits(codes.device).e4m3:
        runtime.fail(variant, "codes", codes.dtype, "a GPU that makes FP8 numbers", "it needs sm_89 or newer")
    stride, _ = check_x_scale(variant, found, x, scale, QUANT, tables.num_experts, "scale")
    if found != "tensor" and not (is_fp32(scale, codes.device) and scale.is_contiguous()):
        runtime.fail(variant, "scale", runtime.describe(scale), "contiguous float32", "it is written")
    return Problem(
        num_pairs=tables.num_tokens * tables.top_k,
        top_k=tables.top_k,
        num_experts=tables.num_experts,
        local_expert_start=tables.local_expert_start,
        tokens_hint=min(tables.tokens_hint, tables.num_tokens),
        block_m=tables.block_m,
        n=sizes["N"],
        codes_stride=codes.stride(0),
        x_stride=x.stride(0),
        scale_stride=stride,
        largest=torch.finfo(codes.dtype).max,
        device=codes.device,
        x_scales=found,
    )


class Key(NamedTuple):
    """What measured tiles are looked up by: the sizes of specs/tuned, and what its tags stand for."""

    num_tokens: int  # the next power of two
    top_k: int
    block_m: int  # of the tables, 0: there are none
    n: int
    x_scales: str


def choose(problem: Problem) -> Config:
    """The tiles for a call: those that were measured, else the rule's."""
    tokens = min(runtime.next_power_of_2(problem.tokens_hint), 4096)  # the largest that is measured
    key, device = Key(tokens, problem.top_k, problem.block_m, problem.n, problem.x_scales), runtime.traits(problem.device)
    return runtime.choose(TUNED, key, device, CONFIGS, lambda _: ("moe_quant", _rule(problem)))[1]


def _rule(problem: Problem) -> Config:
    """A few thousand numbers a program, 16 or more a lane."""
    size = runtime.next_power_of_2(problem.n)
    rows = max(1, min(8, 4096 // size)) if problem.block_m >= 32 else 1
    return Config(rows, max(1, min(8, rows * size // 512)))
