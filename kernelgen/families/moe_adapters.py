"""How cases of a layer with adapters draw the adapter of each token, and lay out their factors."""

from __future__ import annotations

import dataclasses
import math
import random
from typing import Callable, Mapping, NamedTuple, Sequence

import torch

from kernelgen.families import quant
from kernelgen.families.buffers import allocate, allocate_sparse, row_major
from kernelgen.families.moe_align.reference import Local
from kernelgen.families.moe_lora.reference import dequantise
from kernelgen.families.moe_routing import ENABLED
from kernelgen.families.moe_runs.reference import adapters_of

HUGE = 2**31 + 64  # elements: out of reach of a 32-bit offset


@dataclasses.dataclass(frozen=True)
class Adapters:
    """How the adapters of tokens are drawn.

    Attributes:
        kind: a key of ``KINDS``.
        loras: adapters in the factors.
        disabled: of them, those that are; empty: no table of enabled adapters is given.
        ranks: how many ranks of each count, over and over again; empty: no table of ranks is given.
    """

    kind: str = "mixed"
    loras: int = 3
    disabled: tuple[int, ...] = ()
    ranks: tuple[int, ...] = ()


MIXED = Adapters()
RANKED = Adapters("turns", 4, ranks=(17, -40, 16, 100))


class Drawn(NamedTuple):
    """The adapters of a batch on the device, and of which token there is one."""

    token_lora_mapping: torch.Tensor
    adapter_enabled: torch.Tensor | None
    loras: int
    of_token: list[int | None]
    lora_ranks: torch.Tensor | None

    def counted(self, rank: int) -> list[int]:
        """Of each adapter, the ranks of its buffers that are read: those that count, up to the next multiple of 16."""
        counts = [rank] * self.loras if self.lora_ranks is None else self.lora_ranks.tolist()
        return [min(-(-max(count, 0) // 16) * 16, rank) for count in counts]


def _spread(tokens: int, loras: int, rng: random.Random) -> list[int]:
    """Any adapter; the third token has the last one."""
    drawn = [rng.randrange(loras) for _ in range(tokens)]
    return [*drawn[:2], *(loras - 1 for _ in drawn[2:3]), *drawn[3:]]


def _mixed(tokens: int, loras: int, rng: random.Random) -> list[int]:
    """What is no adapter beside adapters: just out of range, on both sides, and far."""
    return _beside_none(_spread(tokens, loras, rng), loras)


def _turns(tokens: int, loras: int, rng: random.Random) -> list[int]:
    """Likewise, and adapters take turns: the first four tokens that have one have four."""
    counted = [token - sum(other % 9 in (1, 4, 6, 8) for other in range(token)) for token in range(tokens)]
    return _beside_none([number % loras for number in counted], loras)


def _beside_none(adapters: Sequence[int], loras: int) -> list[int]:
    away = {1: -1, 4: loras, 6: -(2**31), 8: 2**31 - 1}
    return [away.get(token % 9, adapter) for token, adapter in enumerate(adapters)]


KINDS: Mapping[str, Callable[[int, int, random.Random], list[int]]] = {
    "spread": _spread,
    "mixed": _mixed,
    "turns": _turns,
    "one": lambda tokens, loras, rng: [loras - 1] * tokens,
    "uneven": lambda tokens, loras, rng: [loras - 1 if token % 8 == 3 else 0 for token in range(tokens)],
    "none": lambda tokens, loras, rng: [-1] * tokens,
}


def draw(how: Adapters, tokens: int, rng: random.Random, device: str) -> Drawn:
    """The adapters of a batch as they were asked for."""
    mapping, enabled = torch.tensor(KINDS[how.kind](tokens, how.loras, rng), dtype=torch.int32), None
    if how.disabled:
        flags = [0 if adapter in how.disabled else ENABLED[adapter % len(ENABLED)] for adapter in range(how.loras)]
        enabled = torch.tensor(flags, dtype=torch.int32)
    of_token, ranks = adapters_of(mapping, how.loras, enabled), None
    if how.ranks:
        ranks = torch.tensor([how.ranks[adapter % len(how.ranks)] for adapter in range(how.loras)], dtype=torch.int32).to(device)
    return Drawn(mapping.to(device), None if enabled is None else enabled.to(device), how.loras, of_token, ranks)


# Strides of factors over L and E, from the elements of a matrix and the experts.
LAYOUTS: Mapping[str, Callable[[int, int], tuple[int, int]]] = {
    "padded": lambda size, experts: (experts * size, size),
    "packed": lambda size, experts: (experts * size, size),  # nothing between rows; of all others 16 elements
    "shared": lambda size, experts: (size, 0),
    "huge_adapters": lambda size, experts: (HUGE // 2, size),
    "huge_experts": lambda size, experts: (size, HUGE // 2),
    "huge_both": lambda size, experts: (HUGE // 2, HUGE // 2 + 16 * size),
    "huge_shared": lambda size, experts: (HUGE // 2, 0),
}


class Factors(NamedTuple):
    """Factors of adapters as an op takes them, a tensor a slice."""

    given: list[torch.Tensor]  # [L, E, rows, columns]
    scales: list[torch.Tensor] | None  # of FP8 ones
    numbers: list[torch.Tensor]  # what they stand for

    def named(self, factor: str, scale: str) -> dict[str, list[torch.Tensor]]:
        """Those that there are, by these names of arguments."""
        return {factor: self.given, **({} if self.scales is None else {scale: self.scales})}

    def each(self, factor: str, scale: str) -> dict[str, torch.Tensor]:
        """The same, one by one."""
        return {f"{name}[{s}]": one for name, several in self.named(factor, scale).items() for s, one in enumerate(several)}


def factors(
    shape: Sequence[int],
    slices: int,
    layout: str,
    live: Sequence[tuple[int, int]],
    numbers: torch.Generator,
    dtype: torch.dtype,
    device: str,
    scales: str | None = None,
    element: str = "e4m3",
    ends_in_1: bool = False,
    counted: Sequence[int] | None = None,
    of_columns: bool = False,
) -> Factors:
    """A tensor [L, E, rows, columns] a slice; NaN where an (adapter, expert) is not ``live``, and in ranks that are not read.

    Args:
        scales: of what there is a scale each, of FP8 factors.
        element: their type.
        ends_in_1: scales of rows have a last dimension of one.
        counted: of each adapter, the ranks that are read; None: all.
        of_columns: ranks are columns, not rows.
    """
    rows, columns = shape[2:]

    def memory(inner: Sequence[int], kind: torch.dtype, padding: int = 0) -> torch.Tensor:
        of_matrix = row_major(inner, row=inner[-1] + padding) if len(inner) > 1 else (1,) * len(inner)
        size = inner[0] * of_matrix[0] if inner else 1
        strides = (*LAYOUTS[layout](size, shape[1]), *of_matrix)
        make = allocate_sparse if max(strides) >= HUGE // 2 else allocate
        return make((*shape[:2], *inner), strides, kind, device)

    def forget(matrix: torch.Tensor, adapter: int) -> None:
        if counted is not None:
            (matrix.T if of_columns else matrix)[counted[adapter] :].fill_(math.nan)

    kind, padding = quant.element(element) if scales else dtype, 0 if layout == "packed" else 16
    made = [memory((rows, columns), kind, padding) for _ in range(slices)]
    if scales is None:
        for factor in made:
            for key in live:
                factor[key] = (torch.randn(rows, columns, generator=numbers) * columns**-0.5).to(factor)
                forget(factor[key], key[0])
        return Factors(made, None, made)
    inner = quant.scale_shape(scales, (rows, columns), quant.group())
    if ends_in_1 and scales == "channel":
        inner = (*inner, 1)
    of_made = [memory(inner, torch.float32) for _ in range(slices)]
    for factor, scale in zip(made, of_made, strict=True):
        for key in live:
            factor[key] = quant.as_dtype(torch.randn(rows, columns, generator=numbers), factor)
            forget(factor[key], key[0])
            scale[key] = quant.draw_scales(scale[key], columns**-0.5, numbers)
    group = quant.group_of(scales, (rows, columns), quant.group())
    return Factors(made, of_made, [dequantise(*each, group) for each in zip(made, of_made, strict=True)])


def live_of(local: Sequence[Local], of_token: Sequence[int | None], top_k: int) -> list[tuple[int, int]]:
    """Each (adapter, expert) that some pair has."""
    found = {(of_token[pair // top_k], expert) for pair, expert in local}
    return sorted((adapter, expert) for adapter, expert in found if adapter is not None)
