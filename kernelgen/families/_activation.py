"""The activation between the two projections of an expert: its words, numbers of one of them, how a gate lies."""

from __future__ import annotations

from types import MappingProxyType
from typing import Annotated, NamedTuple

import torch

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


Bias = Annotated[torch.Tensor | None, operands.Tensor(">=E, S*N", operands.FLOATS, asks=("biased",))]  # added in front of it
Limit = Annotated[float | None, operands.Number(low=0.0, only_with=_CLAMP)]
Alpha = Annotated[float | None, operands.Number(only_with=_CLAMP, default=1.0)]
Beta = Annotated[float | None, operands.Number(only_with=_CLAMP, default=0.0)]
Layout = Annotated[str, operands.Choice(("halves", "interleaved"), asks=("interleaved",))]  # of gate and up


def choice(*asks: str, none: bool = False, size: str = "S") -> operands.Choice:
    """The operand ``activation``, which tells the number of slices; ``none``: a product may do without."""
    words, counts = tuple(SLICES), tuple(SLICES.values())
    if none:
        return operands.Choice((None, *words), size, (1, *counts), asks=asks)
    return operands.Choice(words, size, counts, asks=asks)
