"""A call of moe_lora_shrink: both products of a projection, each by itself."""

from __future__ import annotations

from kernelgen.families.moe_lora_call import DOWN as AT
from kernelgen.families.moe_lora_call import PRODUCT as SIZES
from kernelgen.families.moe_lora_call import apart as call

__all__ = ["AT", "SIZES", "call"]
