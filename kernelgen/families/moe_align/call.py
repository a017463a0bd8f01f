"""A call of moe_align: that of a layer, or the ids of one whose experts are spread over GPUs."""

from __future__ import annotations

from types import ModuleType

from kernelgen.families.call import BATCH as SIZES
from kernelgen.families.call import Asked, ints
from kernelgen.families.moe_call import layer

__all__ = ["SIZES", "call"]


def call(package: ModuleType, asked: Asked) -> None:
    """The tables, or the ids in front of them."""
    if asked.tag("schedule") == "local_ids":
        package.local_ids(ints(asked.sizes["num_tokens"], asked.sizes["top_k"]), ints(asked.sizes["num_experts"]))
    else:
        layer(package, asked)
