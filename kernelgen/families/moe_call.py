"""A call of a base MoE layer, of which several families are asked."""

from __future__ import annotations

from types import ModuleType
from typing import Any

from kernelgen.families.call import Asked, dtype_of, scales_of, sized

FEW_TOKENS = 4  # for which a layer does without tables


def layer(package: ModuleType, asked: Asked, **options: Any) -> None:
    """A whole layer, as warm-up makes it."""
    epilogue = asked.tag("epilogue")
    activation = "swiglu" if epilogue in (None, "none") else epilogue
    sizes = sized(asked, "hidden", "intermediate", "num_experts", "top_k")
    num_tokens = asked.sizes["num_tokens"]
    package.FusedMoeShape(*sizes, activation, dtype_of(asked), **{**scales_of(asked), **options}).call(num_tokens, [num_tokens])
