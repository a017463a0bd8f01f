"""LoRA adapters of mixture-of-experts layers, from the folders that PEFT and others save to the buffers that ``moe_lora`` reads.

``read_adapter`` reads one folder, ``stack_adapters`` puts several side by side. What is read is stated in ``keys`` (the names of
tensors) and ``layouts`` (their shapes); whatever is not understood is refused, by name. Nothing of PEFT is needed, only
safetensors.
"""

from .adapter import Adapter, AdapterError, ExpertShape, Factors, LayerBuffers, SliceBuffers
from .read import read_adapter
from .stack import stack_adapters

__all__ = [
    "Adapter",
    "AdapterError",
    "ExpertShape",
    "Factors",
    "LayerBuffers",
    "SliceBuffers",
    "read_adapter",
    "stack_adapters",
]
