"""How cases draw the routing of a batch."""

from __future__ import annotations

import dataclasses
import itertools
import random
from typing import Callable, Mapping, NamedTuple

import torch

from kernelgen.families.moe_experts import far_ids
from kernelgen.families.moe_route.reference import Live, live_pairs

ENABLED = (2, 1, -256, 7)  # what adapters that are not disabled have: any number but 0


@dataclasses.dataclass(frozen=True)
class Routing:
    """How the experts and the adapter of each token are drawn.

    Attributes:
        kind: a key of ``KINDS``.
        disabled: adapters that are loaded but disabled; empty: no table of enabled adapters is given.
        expert_map: ids are global, and only some of the experts are here.
        ids_dtype: int32 or int64.
    """

    kind: str = "spread"
    disabled: tuple[int, ...] = ()
    expert_map: bool = False
    ids_dtype: torch.dtype = torch.int32


SPREAD = Routing()


class Sizes(NamedTuple):
    tokens: int
    top_k: int
    experts: int
    loras: int


class Routed(NamedTuple):
    """The routing of a batch on the device, and what is live."""

    topk_ids: torch.Tensor
    token_lora_mapping: torch.Tensor
    adapter_enabled: torch.Tensor | None
    expert_map: torch.Tensor | None
    sizes: Sizes
    live: list[Live]

    @property
    def tensors(self) -> dict[str, torch.Tensor | None]:
        """All tensors, by name."""
        return {
            "topk_ids": self.topk_ids,
            "token_lora_mapping": self.token_lora_mapping,
            "adapter_enabled": self.adapter_enabled,
            "expert_map": self.expert_map,
        }

    @property
    def arguments(self) -> dict[str, object]:
        """What ``moe_route`` takes by keyword."""
        return {
            "num_experts": self.sizes.experts,
            "max_loras": self.sizes.loras,
            "adapter_enabled": self.adapter_enabled,
            "expert_map": self.expert_map,
        }


_Ids = list[list[int | None]]  # None: one of far_ids
_Draw = tuple[_Ids, list[int]]  # experts and adapter of each token


def _spread(sizes: Sizes, rng: random.Random) -> _Draw:
    experts: _Ids = [
        [rng.randrange(sizes.experts) for _ in range(sizes.top_k)] for _ in range(sizes.tokens)
    ]
    return experts, [rng.randrange(sizes.loras) for _ in experts]


def _mixed(sizes: Sizes, rng: random.Random) -> _Draw:
    """Every kind of row that is not live, next to live ones; adapters and experts just out of range, and far, among them."""
    experts, adapters = _spread(sizes, rng)
    for token, row in enumerate(experts):
        turn, place = divmod(token, 8)
        away = {1: -1, 4: sizes.experts, 7: None}
        if place in away:
            row[rng.randrange(sizes.top_k)] = away[place]
            # not the last adapter for the first id out of range: it must not land on the next one's expert 0
            adapters[token] = (turn + sizes.loras - (2 if place == 4 else 1)) % sizes.loras
        if place == 7:
            row[:] = [None] * sizes.top_k
        adapters[token] = {0: -1, 2: sizes.loras, 5: -(2**31), 6: 2**31 - 1}.get(place, adapters[token])
    return experts, adapters


def _one_group(sizes: Sizes, rng: random.Random) -> _Draw:
    row: list[int | None] = [sizes.experts - 1] * sizes.top_k
    return [list(row) for _ in range(sizes.tokens)], [sizes.loras - 1] * sizes.tokens


def _last(sizes: Sizes, rng: random.Random) -> _Draw:
    experts, adapters = _one_group(sizes, rng)
    return experts, [adapter if token % 2 else -1 for token, adapter in enumerate(adapters)]


def _duplicates(sizes: Sizes, rng: random.Random) -> _Draw:
    experts, adapters = _spread(sizes, rng)
    return [[row[0]] * (sizes.top_k - 1) + row[-1:] for row in experts], adapters


def _none(sizes: Sizes, rng: random.Random) -> _Draw:
    return _spread(sizes, rng)[0], [-1] * sizes.tokens


KINDS: Mapping[str, Callable[[Sizes, random.Random], _Draw]] = {
    "spread": _spread,
    "mixed": _mixed,
    "one_group": _one_group,
    "last": _last,
    "duplicates": _duplicates,
    "none": _none,
}


def draw(routing: Routing, sizes: Sizes, rng: random.Random, device: str) -> Routed:
    """A batch with the routing that was asked for."""
    drawn, adapters = KINDS[routing.kind](sizes, rng)
    far, expert_map = itertools.cycle(far_ids(routing.ids_dtype)), None
    experts = [[next(far) if expert is None else expert for expert in row] for row in drawn]
    if routing.expert_map:
        expert_map = _some_experts(sizes.experts, rng)
        here, known = range(sizes.experts), expert_map.tolist()
        places = {local: i for i, local in enumerate(known) if local in here}
        places[sizes.experts] = len(known)  # out of range stays so
        elsewhere = [i for i, local in enumerate(known) if local not in here]
        for t, row in enumerate(experts):
            for j, expert in enumerate(row):
                on_another_rank = expert in here and (t + j) % 3 == 0
                row[j] = elsewhere[t % len(elsewhere)] if on_another_rank else places.get(expert, expert)
    enabled = None
    if routing.disabled:
        enabled = torch.tensor([ENABLED[adapter % len(ENABLED)] for adapter in range(sizes.loras)], dtype=torch.int32)
        enabled[list(routing.disabled)] = 0
    topk_ids = torch.tensor(experts, dtype=routing.ids_dtype).reshape(sizes.tokens, sizes.top_k)
    mapping = torch.tensor(adapters, dtype=torch.int32)
    live = live_pairs(
        topk_ids,
        mapping,
        num_experts=sizes.experts,
        max_loras=sizes.loras,
        adapter_enabled=enabled,
        expert_map=expert_map,
    )
    enabled, expert_map = (None if t is None else t.to(device) for t in (enabled, expert_map))
    return Routed(topk_ids.to(device), mapping.to(device), enabled, expert_map, sizes, live)


def _some_experts(experts: int, rng: random.Random) -> torch.Tensor:
    """A map of twice as many global experts, and one, of which ``experts`` are here, in another order."""
    away = itertools.cycle((-1, experts, *far_ids(torch.int32)))
    table = [*range(experts), *itertools.islice(away, experts + 1)]
    rng.shuffle(table)
    return torch.tensor(table, dtype=torch.int32)
