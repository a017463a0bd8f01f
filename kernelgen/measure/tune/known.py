"""The families that can be tuned. Imports no torch before ``calls_of`` does."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Mapping

from kernelgen.measure.tune.family import Family
from kernelgen.measure.tune.lora import EXPAND, SHRINK, LoraProduct
from kernelgen.measure.tune.moe_lora import MoeLora

if TYPE_CHECKING:
    from kernelgen.measure.tune.calls import Calls

_MOE_LORA = MoeLora()
FAMILIES: Mapping[str, Family] = {
    family.name: family for family in (_MOE_LORA, LoraProduct(SHRINK), LoraProduct(EXPAND))
}


def calls_of(family: str, package: Path) -> Calls:
    """The calls of candidates of ``family`` in the generated package in the folder ``package``.

    Raises:
        Failure: there is no such package.
    """
    from kernelgen.measure import registry
    from kernelgen.measure.tune.lora_calls import LoraCalls
    from kernelgen.measure.tune.moe_lora_calls import MoeLoraCalls

    module = registry.import_package(package)
    return MoeLoraCalls(module) if family == _MOE_LORA.name else LoraCalls(module, family)
