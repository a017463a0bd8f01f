"""How the tiles of the sum of the experts of a token are searched."""

from kernelgen.measure.tune.hints import Tuning

TUNING = Tuning("fused_moe", {"sites": ("sum",)})
