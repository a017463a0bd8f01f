"""What the variants of moe_act share: the sizes of a call, its checks, and which tiles serve it."""

from __future__ import annotations

from typing import Annotated, NamedTuple

import torch

from .. import _operands as operands
from .. import _runtime as runtime
from .._activation import Alpha, Beta, Bias, Layout, Limit
from .._activation import choice as activation_choice
from .._live import DeltaSizes, check_delta
from .._live import delta as delta_operand
from .._routing import TopkIds
from ..moe_align._op import NumExperts, NumTokensHint, ValidTokens
from ..moe_route._op import Route
from ._table import VARIANTS
from ._tuned import TUNED


class Config(NamedTuple):
    """Tiles of moe_act."""

    rows: int
    block_n: int
    num_warps: int


CONFIGS = {"moe_act": Config}


class Given(NamedTuple):
    """What moe_act is given."""

    h: Annotated[torch.Tensor, operands.Tensor("T*top_k, N", "D", written=True)]
    x: Annotated[torch.Tensor, operands.Tensor("T, top_k, S*N", "D", operands.PAIRS, asks=("torch_dtype",))]
    topk_ids: TopkIds
    valid_tokens: ValidTokens
    activation: Annotated[str, activation_choice("epilogue")]
    layout: Layout
    num_experts: NumExperts
    local_expert_start: operands.Count
    num_tokens_hint: NumTokensHint
    delta: Annotated[torch.Tensor | None, delta_operand("T, top_k, S*N")]
    route: Route | None
    bias: Bias
    limit: Limit
    alpha: Alpha
    beta: Beta


OP = operands.Op("moe_act", Given, spec=VARIANTS.spec, dtypes={"D": VARIANTS.dtypes}, first=("topk_ids",), tells=("x",))


class Problem(NamedTuple):
    """The sizes of one checked call; strides count elements."""

    num_tokens: int
    top_k: int
    num_experts: int
    local_expert_start: int
    tokens_hint: int
    n: int
    h_stride: int
    x_stride: int
    bias_stride: int
    delta: DeltaSizes
    device: torch.device


def check(variant: str, given: Given, *, dtype: torch.dtype | None = None) -> Problem:
    """The sizes of a call, once everything about it is known to fit.

    Raises:
        ValueError: says which argument does not fit, what it is and what was wanted.
    """
    sizes = OP.check(variant, given, D=dtype)
    num_tokens, top_k = sizes["T"], sizes["top_k"]
    return Problem(
        num_tokens=num_tokens,
        top_k=top_k,
        num_experts=given.num_experts,
        local_expert_start=given.local_expert_start,
        tokens_hint=num_tokens if given.num_tokens_hint is None else given.num_tokens_hint,
        n=sizes["N"],
        h_stride=given.h.stride(0),
        x_stride=given.x.stride(1 if top_k > 1 else 0),
        bias_stride=0 if given.bias is None else given.bias.stride(0),
        delta=check_delta(variant, given.delta, given.route),
        device=given.h.device,
    )


class Key(NamedTuple):
    """What measured tiles are looked up by: the sizes of specs/tuned, and what its tags stand for."""

    num_tokens: int  # the next power of two
    top_k: int
    n: int


def choose(problem: Problem) -> Config:
    """The tiles for a call: those that were measured, else the rule's."""
    tokens = min(runtime.next_power_of_2(problem.tokens_hint), 4096)  # the largest that is measured
    key, device = Key(tokens, problem.top_k, problem.n), runtime.traits(problem.device)
    return runtime.choose(TUNED, key, device, CONFIGS, lambda _: ("moe_act", _rule(problem)))[1]


def _rule(problem: Problem) -> Config:
    """8 elements a lane of each row, in the widest tile that leaves little of it masked; of many pairs several rows at a time, so
    that a program has enough to ask for.
    """
    n, pairs = problem.n, runtime.next_power_of_2(problem.tokens_hint) * problem.top_k
    block_n = 1024
    while block_n > 64 and runtime.cdiv(n, block_n) * block_n > n * 1.03:
        block_n //= 2
    rows = 8
    while rows > 1 and pairs // rows * runtime.cdiv(n, block_n) < 8 * runtime.traits(problem.device).num_sms:
        rows //= 2
    return Config(rows, block_n, max(1, min(8, rows * block_n // 256)))
