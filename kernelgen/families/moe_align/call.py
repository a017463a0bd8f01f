"""A call of moe_align: that of a layer."""

from __future__ import annotations

from kernelgen.families.call import BATCH as SIZES
from kernelgen.families.moe_call import layer as call

__all__ = ["SIZES", "call"]
