"""A call of moe_sum: a batch of Qwen3-30B-A3B."""

from __future__ import annotations

from types import ModuleType

from kernelgen.families.call import BATCH, Asked, empty, floats, ints
from kernelgen.families.probe import delta_beside

SIZES = {**BATCH, "hidden": 2048}
OPEN = ("routed_weight",)


def call(package: ModuleType, asked: Asked) -> None:
    """The front door."""
    num_tokens, top_k, width = (asked.sizes[name] for name in ("num_tokens", "top_k", "hidden"))
    y = empty(asked, num_tokens, top_k, width)
    package.moe_sum(
        y,
        ints(num_tokens, top_k),
        topk_weights=floats(num_tokens, top_k) if asked.fact("weighted") else None,
        out=None if asked.fact("zeroes") else empty(asked, num_tokens, width),
        num_experts=asked.sizes["num_experts"],
        bias=empty(asked, asked.sizes["num_experts"], width) if asked.fact("biased") else None,
        **(delta_beside(package, y) if asked.fact("adapted") else {}),
    )
