"""The activation between the two projections of an expert: its words, numbers of one of them, how a gate lies."""

from __future__ import annotations

from types import MappingProxyType
from typing import NamedTuple

from . import _operands as operands

# word -> slices of the first projection: the gate and the linear half, or the one that there is
SLICES = MappingProxyType(
    {
        "relu2": 1,
        "silu": 1,
        "gelu": 1,
        "gelu_tanh": 1,
        "swiglu": 2,
        "swiglu_clamp": 2,
        "geglu": 2,
        "geglu_tanh": 2,
    }
)
_CLAMP = ("activation", "swiglu_clamp")


class Clamp(NamedTuple):
    """The numbers of "swiglu_clamp" of one call; None: those of another activation."""

    limit: float | None = None
    alpha: float | None = None
    beta: float | None = None


CLAMP = (
    operands.Number("limit", low=0.0, only_with=_CLAMP),
    operands.Number("alpha", only_with=_CLAMP, default=1.0),
    operands.Number("beta", only_with=_CLAMP, default=0.0),
)


LAYOUT = operands.Choice("layout", ("halves", "interleaved"), asks=("interleaved",))


def choice(*asks: str, none: bool = False, size: str = "S") -> operands.Choice:
    """The operand ``activation``, which tells the number of slices; ``none``: a product may do without."""
    words, counts = tuple(SLICES), tuple(SLICES.values())
    if none:
        return operands.Choice("activation", (None, *words), size, (1, *counts), asks=asks)
    return operands.Choice("activation", words, size, counts, asks=asks)
