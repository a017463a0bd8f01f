"""A call of moe_permute: that of a layer with FP8 activations."""

from __future__ import annotations

from types import ModuleType

from kernelgen.families.call import LAYER as SIZES
from kernelgen.families.call import Asked
from kernelgen.families.moe_call import layer

__all__ = ["SIZES", "call"]


def call(package: ModuleType, asked: Asked) -> None:
    """A whole layer, whose weights have the scales that go with those of its activations."""
    of_x = asked.fact("x_scales")
    layer(package, asked, weight_scales="channel" if of_x == "token" else of_x)
