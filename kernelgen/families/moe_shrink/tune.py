"""How the tiles of rank vectors of a layer that adds its adapters inside its products are searched."""

from kernelgen.measure.tune.hints import Tuning

TUNING = Tuning("layer", {"sites": ("layer",), "ranks": (16,), "base": (0.0,)})
