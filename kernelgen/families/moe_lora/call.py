"""A call of moe_lora: a projection of Qwen3-30B-A3B."""

from __future__ import annotations

from types import ModuleType

from kernelgen.families.call import Asked
from kernelgen.families.moe_lora_call import DOWN as AT
from kernelgen.families.moe_lora_call import PRODUCT as SIZES
from kernelgen.families.moe_lora_call import route, shape

__all__ = ["AT", "SIZES", "call"]


def call(package: ModuleType, asked: Asked) -> None:
    """The front door, on the route of the batch."""
    shape(package, asked)._call(route(package, asked))
