"""What is measured of dense LoRA: linear layers of models, and cells of them with adapters and a batch. Imports no torch."""

from __future__ import annotations

import dataclasses
import itertools
from types import MappingProxyType
from typing import Any, Iterator, Mapping, Sequence

from kernelgen.measure.workloads import Quant

DEFAULT_RANKS, DEFAULT_TOKENS = (16, 64), (1, 16, 64, 256, 1024, 4096)


@dataclasses.dataclass(frozen=True)
class Layer:
    """A linear layer: K inputs, and the outputs of each of its slices."""

    k: int
    widths: tuple[int, ...]


def _layers(hidden: int, keys: int, intermediate: int) -> Mapping[str, Layer]:
    return MappingProxyType(
        {
            "qkv": Layer(hidden, (hidden, keys, keys)),
            "o": Layer(hidden, (hidden,)),
            "gate_up": Layer(hidden, (intermediate, intermediate)),
            "down": Layer(intermediate, (hidden,)),
        }
    )


MODELS: Mapping[str, Mapping[str, Layer]] = MappingProxyType(
    {
        "llama-3-8b": _layers(4096, 1024, 14336),
        "llama-3-70b": _layers(8192, 1024, 28672),
        "llama-3-70b-tp8": MappingProxyType(
            {
                "qkv": Layer(8192, (1024, 128, 128)),
                "o": Layer(1024, (8192,)),
                "gate_up": Layer(8192, (3584, 3584)),
                "down": Layer(3584, (8192,)),
            }
        ),
        "tiny": _layers(128, 64, 192),
    }
)
SITES = ("qkv", "o", "gate_up", "down")


@dataclasses.dataclass(frozen=True)
class Cell:
    """One point of the sweep; the same cell always gets the same operands.

    Attributes:
        active, slots: adapters that the batch uses, in turns over its tokens, and that the weights hold.
        scales: of FP8 weights ("tensor", "channel" or "group"); None: bfloat16.
    """

    model: str
    site: str
    rank: int
    tokens: int
    active: int = 4
    slots: int = 4
    scales: Quant | None = None

    def columns(self) -> dict[str, Any]:
        """The cell as the columns of a result row that identify it."""
        return dataclasses.asdict(self)

    @property
    def layer(self) -> Layer:
        return MODELS[self.model][self.site]

    @property
    def bytes(self) -> float:
        """That must move, if each byte moved once; ``out`` is read and written."""
        k, width, slices = self.layer.k, sum(self.layer.widths), len(self.layer.widths)
        weights = min(self.active, self.tokens) * self.rank * (slices * k + width)
        return (1.0 if self.scales else 2.0) * weights + 2.0 * self.tokens * (k + 2 * width)


def cells(
    models: Sequence[str],
    sites: Sequence[str] = SITES,
    ranks: Sequence[int] = DEFAULT_RANKS,
    tokens: Sequence[int] = DEFAULT_TOKENS,
    adapters: Sequence[tuple[int, int]] = ((4, 4), (1, 4)),
    scales: Quant | None = None,
) -> Iterator[Cell]:
    """All cells; ``adapters`` are pairs of active and slots."""
    for model, site, rank, (active, slots), count in itertools.product(models, sites, ranks, adapters, tokens):
        yield Cell(model, site, rank, count, active, slots, scales)
