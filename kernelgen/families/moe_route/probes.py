"""What the tables of MoE-LoRA are compiled for."""

from __future__ import annotations

from types import ModuleType
from typing import Callable, Iterator, Mapping

import torch

from kernelgen.core.model import Variant
from kernelgen.families.probe import Probe, meta

_TOKENS = {8: 16, 64: 16, 512: 32, 4096: 64}  # all sorts, the first of them small and large; with their block_m


def probes(package: ModuleType, variant: Variant) -> Iterator[Probe]:
    """The front door picks the variant by the size of the batch: what it does not pick launches nothing."""
    sizes = {"top_k": 8, "num_experts": 128, "max_loras": 4}
    if variant.schedule == "held":
        yield from _held(package)
        return
    for num_tokens, block_m in _TOKENS.items():
        yield Probe(
            f"t{num_tokens}_m{block_m}",
            {"num_tokens": num_tokens, "block_m": block_m, **sizes},
            _call(package, variant, num_tokens, block_m, sizes),
            flops=0.0,
            bytes=4.0 * num_tokens * (2 * sizes["top_k"] + 1),
        )


def _held(package: ModuleType) -> Iterator[Probe]:
    """Of a few adapters and of many; as engines have ids and counts."""
    for max_loras, valid in ((4, None), (200, meta(1))):
        sizes = {"capacity": 8192, "max_loras": max_loras}

        def hold(valid: torch.Tensor | None = valid, sizes: Mapping[str, int] = sizes) -> None:
            package.lora_route(meta(8192, dtype=torch.int64), valid_tokens=valid, **sizes)

        yield Probe(f"l{max_loras}", sizes, hold, flops=0.0, bytes=20.0 * 8192)


def _call(
    package: ModuleType, variant: Variant, num_tokens: int, block_m: int, sizes: Mapping[str, int]
) -> Callable[[], None]:
    enabled = meta(sizes["max_loras"])

    def sort() -> None:
        ids, adapters = meta(num_tokens, sizes["top_k"]), meta(num_tokens)
        counts = {name: sizes[name] for name in ("num_experts", "max_loras")}
        options = {"assignment": "sorted", "block_m": block_m, "adapter_enabled": enabled}
        package.moe_route(ids, adapters, **counts, **options)

    def convert() -> None:
        width = num_tokens * sizes["top_k"]
        package.MoeRoute.from_tables(
            meta(sizes["max_loras"], width),
            meta(sizes["max_loras"], width // block_m),
            meta(sizes["max_loras"]),
            block_size=block_m,
            num_tokens=num_tokens,
            adapter_enabled=enabled,
            lora_ids=meta(sizes["max_loras"] + 1),
            **sizes,
        )

    return convert if variant.schedule == "from_tables" else sort
