"""What the first product of dense LoRA is compiled for."""

from __future__ import annotations

from types import ModuleType
from typing import Iterator

from kernelgen.core.model import TunedEntry, Variant
from kernelgen.families.lora_probe import Operands, Sizes, of_measured, of_rule
from kernelgen.families.probe import Probe, tensors

_TOKENS = (16, 4096, 16384)


def probes(package: ModuleType, variant: Variant) -> Iterator[Probe]:
    """With the tiles of the rule."""
    return of_rule(package, variant, _operands, _TOKENS)


def tuned(package: ModuleType, variant: Variant, entry: TunedEntry) -> Iterator[Probe]:
    """With tiles that were measured."""
    return of_measured(package, variant, _operands, entry)


def _operands(package: ModuleType, variant: Variant, sizes: Sizes) -> Operands:
    known = {"T": sizes.num_tokens, "L": sizes.max_loras, "K": sizes.k, "rank": sizes.rank, "S": len(sizes.widths)}
    given = tensors(package, variant, **known)
    y, x, a = (given.pop(name) for name in ("y", "x", "lora_a"))
    return Operands(y, x, a, given, 1, y.numel() * sizes.k)
