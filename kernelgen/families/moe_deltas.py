"""How cases draw what LoRA wrote beside a base product: rows of the pairs that are live on a route, in memory that is NaN."""

from __future__ import annotations

import random
from types import ModuleType
from typing import Any, Mapping, NamedTuple

import torch

from kernelgen.families.buffers import allocate, allocate_sparse
from kernelgen.families.moe_experts import Routed

_ENABLED = (1, 0, 1, 1)  # of up to four adapters


class Beside(NamedTuple):
    """A delta, its route, and its rows by pair."""

    delta: torch.Tensor
    route: Any
    rows: Mapping[int, torch.Tensor]

    @property
    def arguments(self) -> dict[str, Any]:
        """Those of an op that adds it."""
        return {"delta": self.delta, "route": self.route}


def draw(
    package: ModuleType,
    routed: Routed,
    like: torch.Tensor,
    rng: random.Random,
    numbers: torch.Generator,
    *,
    offset: int = 0,
    sparse: bool = False,
) -> Beside:
    """A delta of the shape of ``like`` [T, top_k, N], its rows 8 elements further apart, of tokens of three or four adapters, of
    which one is disabled, or of none.
    """
    tokens, top_k, width = like.shape
    make, row = {} if sparse else {"offset": offset}, like.stride(1 if top_k > 1 else 0) + 8
    strides = (top_k * row, row if top_k > 1 else 1, 1)  # of one pair a token nothing lies in between
    delta = (allocate_sparse if sparse else allocate)((tokens, top_k, width), strides, like.dtype, str(like.device), **make)
    enabled = _ENABLED[: 3 + tokens % 2]
    adapters = [rng.randrange(-1, len(enabled)) for _ in range(tokens)]
    rows = {}
    for pair, _ in routed.local:
        token, j = divmod(pair, top_k)
        if adapters[token] >= 0 and enabled[adapters[token]]:
            delta[token, j] = torch.randn(width, generator=numbers).to(delta)
            rows[pair] = delta[token, j]

    def ints(values: list[int]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int32, device=like.device)

    options: dict[str, Any] = {"adapter_enabled": ints(list(enabled)), "assignment": "naive"}
    if routed.start:
        options["expert_map"] = ints([-1] * routed.start + list(range(routed.num_experts)))
    mapping = ints(adapters)
    route = package.moe_route(routed.topk_ids, mapping, num_experts=routed.num_experts, max_loras=len(enabled), **options)
    return Beside(delta, route, rows)
