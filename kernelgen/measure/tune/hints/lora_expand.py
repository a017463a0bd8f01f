"""See ``lora``."""

from kernelgen.measure.tune.hints.lora import Expand

FAMILY = Expand
