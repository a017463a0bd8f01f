"""A call of moe_runs: a batch of Qwen3-30B-A3B with four adapters."""

from __future__ import annotations

from kernelgen.families.call import BATCH
from kernelgen.families.moe_lora_call import runs as call

SIZES = {**BATCH, "max_loras": 4}

__all__ = ["SIZES", "call"]
