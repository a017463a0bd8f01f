"""A call of moe_gemm: those of a layer, or one product."""

from __future__ import annotations

from types import ModuleType

from kernelgen.families.call import LAYER as SIZES
from kernelgen.families.call import Asked, empty, floats, ints, scales_of
from kernelgen.families.moe_call import FEW_TOKENS, layer
from kernelgen.families.moe_experts import BY_PAIR

AT = {("delta", "lora"): {"rank": 16, "max_loras": 4}}
OPEN = ("routed_weight",)  # a layer has both kinds of products

__all__ = ["AT", "OPEN", "SIZES", "call"]


def call(package: ModuleType, asked: Asked) -> None:
    """A whole layer, or the product whose rows the case says."""
    adapted = bool(asked.fact("adapted"))
    if len(asked.tags("rows")) == 1 and not any(scales_of(asked).values()) and not adapted:
        _product(package, asked)
    else:
        of_adapters = {name: asked.sizes[name] for name in ("rank", "max_loras") if adapted}
        layer(package, asked, lora_scales=asked.fact("b_scales"), **of_adapters)


def _product(package: ModuleType, asked: Asked) -> None:
    sizes = asked.sizes
    num_tokens, top_k, experts = (sizes[name] for name in ("num_tokens", "top_k", "num_experts"))
    k, n = sizes["hidden"], sizes["intermediate"]
    x_rows, _, out_rows = asked.tags("rows")[0].partition("_")
    if x_rows != "token":
        k, n = n, k
    pairs, wide = num_tokens * top_k, 2 if asked.fact("gated") else 1
    schedules = set(asked.tags("schedule"))
    by_one = out_rows == "token" or schedules <= {*BY_PAIR}
    by_one |= "sorted" not in (x_rows, out_rows) and bool(schedules & {*BY_PAIR}) and num_tokens <= FEW_TOKENS
    tables = (package.no_tables if by_one else package.moe_align)(ints(num_tokens, top_k), num_experts=experts)
    package.moe_gemm(
        empty(asked, num_tokens if out_rows == "token" else pairs, n),
        empty(asked, num_tokens if x_rows == "token" else pairs, k),
        empty(asked, experts, wide * n, k),
        tables,
        x_rows=x_rows,
        out_rows=out_rows,
        activation=None if asked.tag("epilogue") == "none" else asked.tag("epilogue"),
        topk_weights=floats(num_tokens, top_k) if asked.fact("weighted") else None,
        limit=1.0 if asked.fact("clamped") else None,
    )
