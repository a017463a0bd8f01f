"""How cases draw the routing of a base MoE layer: T tokens, of which the first few are valid, and the experts of each."""

from __future__ import annotations

import dataclasses
import random
from typing import Callable, Mapping, NamedTuple

import torch

from kernelgen.reference.moe_align import Local, local_pairs


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


_Draw = Callable[[int, int, int, random.Random], list[list[int]]]  # (tokens, top_k, experts) -> local ids


def _spread(tokens: int, top_k: int, experts: int, rng: random.Random) -> list[list[int]]:
    return [[rng.randrange(experts) for _ in range(top_k)] for _ in range(tokens)]


def _mixed(tokens: int, top_k: int, experts: int, rng: random.Random) -> list[list[int]]:
    """Ids of other ranks beside local ones: just out of range, on both sides, and far."""
    rows = _spread(tokens, top_k, experts, rng)
    for token, row in enumerate(rows):
        away = {0: -1, 2: experts, 3: experts + 7, 5: -4}.get(token % 7)
        if away is not None:
            row[rng.randrange(top_k)] = away
        if token % 7 == 5:
            row[:] = [away or 0] * top_k
    return rows


def _one(tokens: int, top_k: int, experts: int, rng: random.Random) -> list[list[int]]:
    return [[experts - 1] * top_k for _ in range(tokens)]


def _away(tokens: int, top_k: int, experts: int, rng: random.Random) -> list[list[int]]:
    return [[experts] * top_k for _ in range(tokens)]


def _skewed(tokens: int, top_k: int, experts: int, rng: random.Random) -> list[list[int]]:
    """Most pairs on one expert, the others on few."""
    return [[0 if rng.random() < 0.8 else rng.randrange(experts) for _ in range(top_k)] for _ in range(tokens)]


KINDS: Mapping[str, _Draw] = {
    "spread": _spread,
    "mixed": _mixed,
    "one": _one,
    "away": _away,
    "skewed": _skewed,
}


def draw(how: Experts, tokens: int, top_k: int, experts: int, rng: random.Random, device: str) -> Routed:
    """A batch with the routing that was asked for; tokens that are not valid have local experts too."""
    rows = KINDS[how.kind](tokens, top_k, experts, rng)
    ids = torch.tensor(rows, dtype=how.ids_dtype).reshape(tokens, top_k) + how.start
    count = tokens if how.valid is None else min(how.valid, tokens)
    local = local_pairs(ids, num_experts=experts, local_expert_start=how.start, valid_tokens=count)
    valid = None if how.valid is None else torch.tensor([how.valid], dtype=torch.int32, device=device)
    return Routed(ids.to(device), valid, experts, how.start, count, local)
