"""How the tiles of the second product of dense LoRA are searched."""

from kernelgen.families.lora_tune import Expand
from kernelgen.measure.tune.hints import Tuning

TUNING = Tuning("lora", {"ranks": (16, 32, 64, 128)}, hints=Expand)
