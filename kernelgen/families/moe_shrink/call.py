"""A call of moe_shrink: a batch of Qwen3-30B-A3B with four adapters."""

from __future__ import annotations

from types import ModuleType

from kernelgen.families.call import Asked, empty
from kernelgen.families.moe_call import FEW_TOKENS
from kernelgen.families.moe_lora_call import ROUTE, runs

SIZES = {**ROUTE, "k": 2048, "slices": 2}
_DOWN = {"k": 768, "slices": 1}
AT = {("rows", "pair_pair"): _DOWN, ("rows", "sorted_sorted"): _DOWN}


def call(package: ModuleType, asked: Asked) -> None:
    """The front door, on the tables of the batch."""
    sizes = asked.sizes
    by_one = asked.tags("schedule") == ["pairs"] or sizes["num_tokens"] <= FEW_TOKENS
    tables, found = runs(package, asked, **({"block_m": 0} if by_one else {}))
    of_tokens = (asked.tag("rows") or "token").startswith("token")
    x_rows = "token" if of_tokens else "pair" if by_one else "sorted"
    x, x_scale = empty(asked, sizes["num_tokens"] * (1 if of_tokens else sizes["top_k"]), sizes["k"]), None
    if asked.fact("x_scales"):
        x, x_scale = package.quantize_activations(x, asked.fact("x_scales"))
    shared = asked.tag("rows") == "token_token" or asked.tags("schedule") == ["tokens"]
    a = empty(asked, sizes["max_loras"], 1 if shared else sizes["num_experts"], sizes["rank"], sizes["k"])
    given = [a] if asked.fact("weight_scales") is None else package.quantize_weights(a, asked.fact("weight_scales"))
    lora_a, *a_scale = ([each.expand(-1, sizes["num_experts"], *each.shape[2:])] * sizes["slices"] for each in given)
    package.moe_shrink(x, lora_a, tables, found, x_rows=x_rows, a_scale=next(iter(a_scale), None), x_scale=x_scale)
