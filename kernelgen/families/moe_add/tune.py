"""How the tiles of the sum of a base product and a LoRA delta are searched."""

from kernelgen.measure.tune.hints import Tuning

TUNING = Tuning("layer", {"sites": ("w13",), "ranks": (16,), "base": (0.0,)}, form="overlap")
