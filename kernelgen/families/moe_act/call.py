"""A call of moe_act: a batch of Qwen3-30B-A3B."""

from __future__ import annotations

from types import ModuleType
from typing import Any

from kernelgen.families.call import BATCH, Asked, empty, ints
from kernelgen.families.probe import delta_beside

SIZES = {**BATCH, "intermediate": 768}


def call(package: ModuleType, asked: Asked) -> None:
    """The front door."""
    num_tokens, top_k, width = (asked.sizes[name] for name in ("num_tokens", "top_k", "intermediate"))
    x = empty(asked, num_tokens, top_k, (2 if asked.fact("gated") else 1) * width)
    options: dict[str, Any] = {"activation": asked.tag("epilogue"), "num_experts": asked.sizes["num_experts"]}
    options |= {"limit": 1.0} if asked.fact("clamped") else {}
    options |= {"layout": "interleaved"} if asked.fact("interleaved") else {}
    options |= {"bias": empty(asked, asked.sizes["num_experts"], x.shape[2])} if asked.fact("biased") else {}
    if asked.fact("adapted"):
        options |= delta_beside(package, x)
    package.moe_act(empty(asked, num_tokens * top_k, width), x, ints(num_tokens, top_k), **options)
