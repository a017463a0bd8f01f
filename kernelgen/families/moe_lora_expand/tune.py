"""How the tiles of the second product of MoE-LoRA as an op of its own are searched."""

from kernelgen.measure.tune.hints import Tuning

TUNING = Tuning("moe_lora", {"sites": ("w13", "w2"), "add": True, "ranks": (16, 64)}, form="apart")
