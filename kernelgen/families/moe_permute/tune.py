"""How the tiles of rows in the order of tables are searched."""

from kernelgen.measure.tune.hints import Tuning

TUNING = Tuning("fused_moe", {"sites": ("permute",), "quant": ("group",), "act": ("group",)})
