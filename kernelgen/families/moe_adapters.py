"""How cases of a layer with adapters draw the adapter of each token, and lay out their factors."""

from __future__ import annotations

import dataclasses
import random
from typing import Callable, Mapping, NamedTuple, Sequence

import torch

from kernelgen.families.buffers import allocate, allocate_sparse
from kernelgen.families.moe_align.reference import Local
from kernelgen.families.moe_runs.reference import adapters_of

HUGE = 2**31 + 64  # elements: out of reach of a 32-bit offset


@dataclasses.dataclass(frozen=True)
class Adapters:
    """How the adapters of tokens are drawn.

    Attributes:
        kind: a key of ``KINDS``.
        loras: adapters in the factors.
        disabled: of them, those that are; empty: no table of enabled adapters is given.
    """

    kind: str = "mixed"
    loras: int = 3
    disabled: tuple[int, ...] = ()


MIXED = Adapters()


class Drawn(NamedTuple):
    """The adapters of a batch on the device, and of which token there is one."""

    token_lora_mapping: torch.Tensor
    adapter_enabled: torch.Tensor | None
    loras: int
    of_token: list[int | None]


def _spread(tokens: int, loras: int, rng: random.Random) -> list[int]:
    return [rng.randrange(loras) for _ in range(tokens)]


def _mixed(tokens: int, loras: int, rng: random.Random) -> list[int]:
    """What is no adapter beside adapters: just out of range, on both sides, and far."""
    away = {1: -1, 4: loras, 6: -(2**31), 8: 2**31 - 1}
    return [away.get(token % 9, adapter) for token, adapter in enumerate(_spread(tokens, loras, rng))]


KINDS: Mapping[str, Callable[[int, int, random.Random], list[int]]] = {
    "spread": _spread,
    "mixed": _mixed,
    "one": lambda tokens, loras, rng: [loras - 1] * tokens,
    "none": lambda tokens, loras, rng: [-1] * tokens,
}


def draw(how: Adapters, tokens: int, rng: random.Random, device: str) -> Drawn:
    """The adapters of a batch as they were asked for."""
    mapping, enabled = torch.tensor(KINDS[how.kind](tokens, how.loras, rng), dtype=torch.int32), None
    if how.disabled:
        enabled = torch.tensor([int(adapter not in how.disabled) for adapter in range(how.loras)], dtype=torch.int32)
    of_token = adapters_of(mapping, how.loras, enabled)
    return Drawn(mapping.to(device), None if enabled is None else enabled.to(device), how.loras, of_token)


# Strides of factors over L and E, from the elements of a matrix and the experts.
LAYOUTS: Mapping[str, Callable[[int, int], tuple[int, int]]] = {
    "packed": lambda size, experts: (experts * size, size),
    "shared": lambda size, experts: (size, 0),
    "huge_adapters": lambda size, experts: (HUGE, size),
    "huge_experts": lambda size, experts: (size, HUGE),
    "huge_shared": lambda size, experts: (HUGE, 0),
}


def factors(
    shape: Sequence[int],
    slices: int,
    layout: str,
    live: Sequence[tuple[int, int]],
    numbers: torch.Generator,
    dtype: torch.dtype,
    device: str,
) -> list[torch.Tensor]:
    """A tensor [L, E, rows, columns] a slice; NaN for each (adapter, expert) that is not ``live``."""
    rows, columns = shape[2:]
    strides = (*LAYOUTS[layout](rows * columns, shape[1]), columns, 1)
    make = allocate_sparse if max(strides) >= HUGE else allocate
    made = [make(shape, strides, dtype, device) for _ in range(slices)]
    for factor in made:
        for adapter, expert in live:
            factor[adapter, expert] = (torch.randn(rows, columns, generator=numbers) * columns**-0.5).to(factor)
    return made


def live_of(local: Sequence[Local], of_token: Sequence[int | None], top_k: int) -> list[tuple[int, int]]:
    """Each (adapter, expert) that some pair has."""
    found = {(of_token[pair // top_k], expert) for pair, expert in local}
    return sorted((adapter, expert) for adapter, expert in found if adapter is not None)
