"""A call of moe_add: the end of an overlap."""

from __future__ import annotations

from types import ModuleType

from kernelgen.families.call import Asked, empty
from kernelgen.families.moe_lora_call import ROUTE, route

SIZES = {**ROUTE, "n": 768, "slices": 2}


def call(package: ModuleType, asked: Asked) -> None:
    """The front door, on the route of the batch."""
    sizes = asked.sizes
    shape = (sizes["num_tokens"], sizes["top_k"], sizes["slices"] * sizes["n"])
    package.moe_add(empty(asked, *shape), empty(asked, *shape), route(package, asked))
