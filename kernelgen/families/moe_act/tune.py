"""How the tiles of the activation of a layer with adapters are searched."""

from kernelgen.measure.tune.hints import Tuning

TUNING = Tuning("layer", {"sites": ("layer",), "ranks": (16,), "base": (0.0,)}, form="separate")
