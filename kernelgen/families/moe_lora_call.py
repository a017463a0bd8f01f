"""A call of MoE-LoRA, of which several families are asked."""

from __future__ import annotations

from types import ModuleType
from typing import Any

from kernelgen.families.call import BATCH, Asked, dtype_of, ints, scales_of, sized

ROUTE = {**BATCH, "rank": 16, "max_loras": 4}
# Gate and up of Qwen3-30B-A3B and four adapters.
PRODUCT = {**ROUTE, "k": 2048, "n": 768, "slices": 2}
# Its down, which has the routed weight.
DOWN = {("routed_weight", "weighted"): {"k": 768, "n": 2048, "slices": 1}}


def shape(package: ModuleType, asked: Asked) -> Any:
    """The projection, as warm-up is told of it."""
    return package.MoeShape(
        *sized(asked, "k", "n", "slices", "rank", "top_k", "num_experts", "max_loras"),
        dtype=dtype_of(asked),
        mul_routed_weight=bool(asked.fact("weighted")),
        add_inputs=bool(asked.fact("adds", True)),
        assignments=(asked.tag("assignment") or "auto",),
        **scales_of(asked),
    )


def route(package: ModuleType, asked: Asked) -> Any:
    """The route of a batch, as it is made for this rank."""
    *_, found = shape(package, asked).routes(asked.sizes["num_tokens"])
    return found


def apart(package: ModuleType, asked: Asked) -> None:
    """Both products, each by itself."""
    package.ShardedMoeShape(shape(package, asked)).call(asked.sizes["num_tokens"])


def runs(package: ModuleType, asked: Asked, **options: Any) -> Any:
    """The tables of a batch with adapters, and the runs inside them."""
    num_tokens, top_k, num_experts, max_loras = sized(asked, "num_tokens", "top_k", "num_experts", "max_loras")
    ids, mapping = ints(num_tokens, top_k), ints(num_tokens)
    return package.moe_runs(ids, mapping, num_experts=num_experts, max_loras=max_loras, **options)
