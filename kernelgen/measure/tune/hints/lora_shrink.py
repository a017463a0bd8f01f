"""See ``lora``."""

from kernelgen.measure.tune.hints.lora import Shrink

FAMILY = Shrink
