"""What the variants of moe_sum share: the sizes of a call, its checks, and which tiles serve it."""

from __future__ import annotations

from typing import Annotated, NamedTuple

import torch

from .. import _operands as operands
from .. import _runtime as runtime
from .._live import DeltaSizes, check_delta
from .._live import delta as delta_operand
from .._routing import TopkIds, TopkWeights
from ..moe_align._op import NumExperts, NumTokensHint, ValidTokens
from ..moe_route._op import Route
from ._table import VARIANTS
from ._tuned import TUNED


class Config(NamedTuple):
    """Tiles of moe_sum."""

    block_n: int
    num_warps: int


CONFIGS = {"moe_sum": Config}


class Given(NamedTuple):
    """What moe_sum is given."""

    out: Annotated[
        torch.Tensor, operands.Tensor("T, N", operands.FLOATS, made=True, made_if="zeroes", written=True, asks=("zeroes",))
    ]
    y: Annotated[torch.Tensor, operands.Tensor("T, top_k, N", "D", operands.PAIRS, also=(torch.float32,), asks=("torch_dtype",))]
    topk_ids: TopkIds
    topk_weights: TopkWeights
    valid_tokens: ValidTokens
    num_experts: NumExperts
    local_expert_start: operands.Count
    num_tokens_hint: NumTokensHint
    zeroes: Annotated[bool, operands.Flag(public=False)]
    keep_empty: operands.Bool
    delta: Annotated[torch.Tensor | None, delta_operand("T, top_k, N")]
    route: Route | None
    bias: Annotated[torch.Tensor | None, operands.Tensor(">=E, N", operands.FLOATS, asks=("biased",))]


OP = operands.Op(
    "moe_sum", Given, spec=VARIANTS.spec, dtypes={"D": VARIANTS.dtypes}, first=("topk_ids", "y"), tells=("out",)
)


class Problem(NamedTuple):
    """The sizes of one checked call; strides count elements."""

    num_tokens: int
    top_k: int
    num_experts: int
    local_expert_start: int
    tokens_hint: int
    n: int
    out_stride: int
    y_stride: int
    bias_stride: int
    delta: DeltaSizes
    keep_empty: bool
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
        out_stride=given.out.stride(0),
        y_stride=given.y.stride(1 if top_k > 1 else 0),
        bias_stride=0 if given.bias is None else given.bias.stride(0),
        keep_empty=given.keep_empty,
        delta=check_delta(variant, given.delta, given.route),
        device=given.y.device,
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
    return runtime.choose(TUNED, key, device, CONFIGS, lambda _: ("moe_sum", _rule(problem)))[1]


def _rule(problem: Problem) -> Config:
    """Enough programs for few tokens, 16 bytes a lane for many."""
    n = problem.n
    wanted = 512 if problem.tokens_hint <= 64 else 1024
    while wanted > 128 and n % wanted:
        wanted //= 2
    block_n = wanted if n % wanted == 0 else min(1024, max(64, runtime.next_power_of_2(n)))
    return Config(block_n, 4 if block_n > 512 else 2)
