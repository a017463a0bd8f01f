"""What the variants of moe_permute share: the sizes of a call, its checks, and which tiles serve it."""

from __future__ import annotations

from typing import Annotated, NamedTuple

import torch

from .. import _operands as operands
from .. import _runtime as runtime
from .._scales import (
    SCALES,
    check_fp8,
    check_x_scale,
    find_x_mode,
    is_fp32,
    x_scale_shape,
)
from ..moe_align._op import Tables
from ._table import QUANT, VARIANTS
from ._tuned import TUNED


class Config(NamedTuple):
    """Tiles of moe_permute: whole rows."""

    rows: int
    num_warps: int


CONFIGS = {"moe_permute": Config}


class Given(NamedTuple):
    """What moe_permute is given."""

    out: Annotated[torch.Tensor, operands.Tensor("T*top_k, K", "D", written=True)]
    out_scale: Annotated[torch.Tensor, operands.Tensor(None, (torch.float32,), operands.CONTIGUOUS, written=True)]
    x: Annotated[torch.Tensor, operands.Tensor("T, K", "D")]
    x_scale: Annotated[torch.Tensor, operands.Tensor(None, SCALES, operands.FREE, asks=("x_scales",))]
    tables: Tables


OP = operands.Op("moe_permute", Given, spec=VARIANTS.spec, dtypes={"D": QUANT.elements}, first=("x",), tells=("x",))


class Problem(NamedTuple):
    """The sizes of one checked call; strides count elements."""

    num_pairs: int
    top_k: int
    num_experts: int
    tokens_hint: int
    block_m: int
    k: int
    out_stride: int
    x_stride: int
    x_scale_stride: int  # over rows
    x_scale_next: int  # over groups
    device: torch.device
    x_scales: str  # of what there is a scale each


def check(variant: str, given: Given, *, mode: str | None = None) -> Problem:
    """The sizes of a call, once everything about it is known to fit. A mode of None: any.

    Raises:
        ValueError: says which argument does not fit, what it is and what was wanted.
    """
    sizes = OP.check(variant, given)
    out, out_scale, x, x_scale, tables = given
    if tables.block_m == 0:
        runtime.fail(variant, "tables", "none", "tables", "make them with moe_align")
    found = find_x_mode(variant, x, x_scale, QUANT, mode or "token")
    if found != (mode or found) or found == "tensor":
        wanted = "a scale a token or a group" if mode is None else f"a scale a {mode}"
        runtime.fail(variant, "x_scale", runtime.describe(x_scale), wanted, "one for all rows stays where it is")
    check_fp8(variant, "x", x, found, QUANT)
    stride, following = check_x_scale(variant, found, x, x_scale, QUANT)
    shape = x_scale_shape(found, out.shape, QUANT)
    if tuple(out_scale.shape) != shape or not (is_fp32(out_scale, out.device) and out_scale.is_contiguous()):
        runtime.fail(variant, "out_scale", runtime.describe(out_scale), f"contiguous {list(shape)} float32", "it is written")
    return Problem(
        num_pairs=tables.num_tokens * tables.top_k,
        top_k=tables.top_k,
        num_experts=tables.num_experts,
        tokens_hint=min(tables.tokens_hint, tables.num_tokens),
        block_m=tables.block_m,
        k=sizes["K"],
        out_stride=out.stride(0),
        x_stride=x.stride(0),
        x_scale_stride=stride,
        x_scale_next=following or 1,
        device=x.device,
        x_scales=found,
    )


class Key(NamedTuple):
    """What measured tiles are looked up by: the sizes of specs/tuned, and what its tags stand for."""

    num_tokens: int  # the next power of two
    top_k: int
    block_m: int
    k: int
    x_scales: str


def choose(problem: Problem) -> Config:
    """The tiles for a call: those that were measured, else the rule's."""
    tokens = min(runtime.next_power_of_2(problem.tokens_hint), 4096)  # the largest that is measured
    key, device = Key(tokens, problem.top_k, problem.block_m, problem.k, problem.x_scales), runtime.traits(problem.device)
    return runtime.choose(TUNED, key, device, CONFIGS, lambda _: ("moe_permute", _rule(problem)))[1]


def _rule(problem: Problem) -> Config:
    """Some ten thousand bytes a program, 64 or more a lane."""
    size = runtime.next_power_of_2(problem.k)
    rows = max(1, min(8, 16384 // size))
    return Config(rows, max(1, min(8, rows * size // 2048)))
