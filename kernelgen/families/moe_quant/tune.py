"""How the tiles of rows that become FP8 between the products are searched."""

from kernelgen.measure.tune.hints import Tuning

TUNING = Tuning("fused_moe", {"sites": ("quant",), "quant": ("group",), "act": ("group",)})
