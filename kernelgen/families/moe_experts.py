"""How cases draw the routing of a base MoE layer: T tokens, of which the first few are valid, and the experts of each."""

from __future__ import annotations

import dataclasses
import itertools
import random
from typing import Callable, Mapping, NamedTuple

import torch

from kernelgen.families.buffers import allocate
from kernelgen.families.moe_align.reference import Local, local_pairs

BY_PAIR = ("gemv", "naive", "diagonal", "lane_gemv")  # schedules of moe_gemm that take pairs as they come, without tables


@dataclasses.dataclass(frozen=True)
class Experts:
    """How the experts of each token are drawn.

    Attributes:
        kind: a key of ``KINDS``.
        start: the global id of the first local expert.
        valid: how many tokens are valid: None, all, and no such tensor is given; else that many.
        ids_dtype: int32 or int64.
    """

    kind: str = "spread"
    start: int = 0
    valid: int | None = None
    ids_dtype: torch.dtype = torch.int32


SPREAD = Experts()


class Routed(NamedTuple):
    """The routing of a batch on the device, and what is local."""

    topk_ids: torch.Tensor
    valid_tokens: torch.Tensor | None
    num_experts: int
    start: int
    num_valid: int  # tokens
    local: list[Local]


_Ids = list[list[int | None]]  # local ones, of each token; None: one of far_ids
_Draw = Callable[[int, int, int, random.Random], _Ids]  # (tokens, top_k, experts) -> ids


def far_ids(dtype: torch.dtype, first: int = 0) -> list[int]:
    """Ids of no expert: the ends of the type; of 64 bits, in front, some whose lower halves name experts from ``first`` on."""
    info = torch.iinfo(dtype)
    high = [2**32 + first, 2**32 + first + 1, first - 2**32] if info.bits > 32 else []
    return [*high, info.max, info.min]


def _spread(tokens: int, top_k: int, experts: int, rng: random.Random) -> _Ids:
    return [[rng.randrange(experts) for _ in range(top_k)] for _ in range(tokens)]


def _mixed(tokens: int, top_k: int, experts: int, rng: random.Random) -> _Ids:
    """Ids of other ranks beside local ones: just out of range, on both sides, and far."""
    rows = _spread(tokens, top_k, experts, rng)
    away = {0: -1, 1: None, 2: experts, 3: experts + 7}
    for token, row in enumerate(rows):
        if token % 7 in away:
            row[rng.randrange(top_k)] = away[token % 7]
        elif token % 7 == 5:
            row[:] = [None] * top_k
    return rows


def _one(tokens: int, top_k: int, experts: int, rng: random.Random) -> _Ids:
    return [[experts - 1] * top_k for _ in range(tokens)]


def _away(tokens: int, top_k: int, experts: int, rng: random.Random) -> _Ids:
    return [[experts] * top_k for _ in range(tokens)]


def _skewed(tokens: int, top_k: int, experts: int, rng: random.Random) -> _Ids:
    """Most pairs on one expert, the others on few."""
    return [[0 if rng.random() < 0.8 else rng.randrange(experts) for _ in range(top_k)] for _ in range(tokens)]


def _turns(tokens: int, top_k: int, experts: int, rng: random.Random) -> _Ids:
    """Experts take turns: the pairs of each are known, and those of one are one more where they do not divide."""
    return [[(token * top_k + j) % experts for j in range(top_k)] for token in range(tokens)]


KINDS: Mapping[str, _Draw] = {
    "spread": _spread,
    "mixed": _mixed,
    "one": _one,
    "away": _away,
    "skewed": _skewed,
    "turns": _turns,
}


def draw(how: Experts, tokens: int, top_k: int, experts: int, rng: random.Random, device: str) -> Routed:
    """A batch with the routing that was asked for; tokens that are not valid have local experts too."""
    far = itertools.cycle(far_ids(how.ids_dtype, how.start))
    rows = KINDS[how.kind](tokens, top_k, experts, rng)
    named = [[next(far) if expert is None else expert + how.start for expert in row] for row in rows]
    ids = torch.tensor(named, dtype=how.ids_dtype).reshape(tokens, top_k)
    count = tokens if how.valid is None else min(how.valid, tokens)
    local = local_pairs(ids, num_experts=experts, local_expert_start=how.start, valid_tokens=count)
    valid = None if how.valid is None else torch.tensor([how.valid], dtype=torch.int32, device=device)
    return Routed(ids.to(device), valid, experts, how.start, count, local)


def draw_bias(
    routed: Routed,
    width: int,
    dtype: torch.dtype,
    numbers: torch.Generator,
    device: str,
    *,
    gap: int = 0,
    offset: int = 0,
) -> torch.Tensor:
    """A bias [E, width] of the experts that have pairs; that of others is poison, as it must not be read."""
    bias = allocate((routed.num_experts, width), (width + gap, 1), dtype, device, offset=offset)
    for expert in sorted({item.expert for item in routed.local}):
        bias[expert] = torch.randn(width, generator=numbers).to(bias)
    return bias
