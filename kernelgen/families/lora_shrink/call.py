"""A call of lora_shrink: see ``lora_call``."""

from kernelgen.families.lora_call import SIZES, call

__all__ = ["SIZES", "call"]
