"""A call of dense LoRA, of which both products are asked."""

from __future__ import annotations

from types import ModuleType

from kernelgen.families.call import Asked, dtype_of, scales_of, sized

# A layer of Llama-3-8B and four adapters.
SIZES = {"num_tokens": 256, "rank": 16, "max_loras": 4, "k": 4096, "n": 4096, "slices": 1}


def call(package: ModuleType, asked: Asked) -> None:
    """Both products, as warm-up makes them."""
    sizes, adds = asked.sizes, bool(asked.fact("adds", True))
    widths = (sizes["n"],) * sizes["slices"]
    rank, max_loras = sized(asked, "rank", "max_loras")
    shape = package.LoraShape(sizes["k"], widths, rank, max_loras, dtype_of(asked), add_inputs=adds, **scales_of(asked))
    shape.call(sizes["num_tokens"])
