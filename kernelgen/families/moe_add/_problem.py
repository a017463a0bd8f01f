"""What the variants of moe_add share: the sizes of a call, its checks, and which tiles serve it."""

from __future__ import annotations

from typing import Annotated, NamedTuple

import torch

from .. import _operands as operands
from .. import _runtime as runtime
from .._live import DeltaSizes, check_delta
from ..moe_route._op import Route
from ._table import VARIANTS
from ._tuned import TUNED


class Config(NamedTuple):
    """Tiles of moe_add."""

    block_n: int
    num_warps: int


CONFIGS = {"moe_add": Config}


class Given(NamedTuple):
    """What moe_add is given."""

    out: Annotated[torch.Tensor, operands.Tensor("T, top_k, N", "D", operands.PAIRS, written=True, asks=("torch_dtype",))]
    delta: Annotated[torch.Tensor, operands.Tensor("T, top_k, N", "D", operands.PAIRS)]
    route: Route


OP = operands.Op("moe_add", Given, spec=VARIANTS.spec, dtypes={"D": VARIANTS.dtypes}, tells=("out",))


class Problem(NamedTuple):
    """The sizes of one checked call; strides count elements."""

    num_pairs: int
    top_k: int
    n: int
    out_stride: int
    delta: DeltaSizes
    device: torch.device


def check(variant: str, given: Given, dtype: torch.dtype | None = None) -> Problem:
    """The sizes of a call, once everything about it is known to fit.

    Raises:
        ValueError: says which argument does not fit, what it is and what was wanted.
    """
    sizes, route = OP.check(variant, given, D=dtype), given.route
    delta_sizes = check_delta(variant, given.delta, route)
    return Problem(
        num_pairs=route.num_tokens * route.top_k,
        top_k=route.top_k,
        n=sizes["N"],
        out_stride=given.out.stride(1 if route.top_k > 1 else 0),
        delta=delta_sizes,
        device=given.out.device,
    )


class Key(NamedTuple):
    """What measured tiles are looked up by: the sizes of specs/tuned, and what its tags stand for."""

    num_tokens: int  # the next power of two
    top_k: int
    n: int


def choose(problem: Problem) -> Config:
    """The tiles for a call: those that were measured, else the rule's."""
    tokens = min(runtime.next_power_of_2(problem.num_pairs // problem.top_k), 4096)  # the largest that is measured
    key, device = Key(tokens, problem.top_k, problem.n), runtime.traits(problem.device)
    return runtime.choose(TUNED, key, device, CONFIGS, lambda _: ("moe_add", _rule(problem)))[1]


def _rule(problem: Problem) -> Config:
    """8 elements a lane, in the largest tile that leaves little of it masked."""
    n = problem.n
    block_n = 1024
    while block_n > 64 and runtime.cdiv(n, block_n) * block_n > n * 1.03:
        block_n //= 2
    return Config(block_n, max(1, min(4, block_n // 256)))
