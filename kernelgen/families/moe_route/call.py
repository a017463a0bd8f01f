"""A call of moe_route: a batch of Qwen3-30B-A3B with four adapters."""

from __future__ import annotations

from types import ModuleType

from kernelgen.families.call import Asked, ints
from kernelgen.families.moe_lora_call import ROUTE as SIZES
from kernelgen.families.moe_lora_call import route

__all__ = ["SIZES", "call"]

_BLOCK = 16


def call(package: ModuleType, asked: Asked) -> None:
    """The route of a batch, or of the tables that an engine has, each pair in a block of its own at most."""
    if asked.tag("schedule") == "held":
        capacity = asked.sizes["num_tokens"]
        package.lora_route(ints(capacity), max_loras=asked.sizes["max_loras"], capacity=capacity)
        return
    if asked.tag("schedule") != "from_tables":
        route(package, asked)
        return
    sizes = asked.sizes
    pairs, loras = sizes["num_tokens"] * sizes["top_k"], sizes["max_loras"]
    columns = min(pairs, sizes["num_experts"]) + pairs // _BLOCK
    counts = {name: sizes[name] for name in ("num_tokens", "top_k", "num_experts", "max_loras")}
    tables = (ints(loras, columns * _BLOCK), ints(loras, columns), ints(loras))
    package.MoeRoute.from_tables(*tables, block_size=_BLOCK, **counts)
