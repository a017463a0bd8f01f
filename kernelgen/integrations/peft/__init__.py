"""LoRA adapters of mixture-of-experts and linear layers, from what PEFT and others save to the buffers that kernels read.

``read_adapter`` reads one, ``stack_adapters`` and ``stack_linears`` put several side by side, with ``AdapterSlots`` they come and
go. What is read is stated in ``keys`` (the names of tensors) and ``layouts`` (their shapes); whatever is not understood is
refused, by name. Nothing of PEFT is needed, only safetensors.
"""

from .adapter import (
    Adapter,
    AdapterError,
    ExpertPart,
    ExpertShape,
    Factors,
    LayerBuffers,
    LinearBuffers,
    LinearShape,
    SliceBuffers,
    UngatedShape,
)
from .files import AdapterFiles
from .read import read_adapter
from .slots import AdapterSlots, PackedAdapter
from .stack import stack_adapters, stack_linears

__all__ = [
    "Adapter",
    "AdapterError",
    "AdapterFiles",
    "AdapterSlots",
    "ExpertPart",
    "ExpertShape",
    "Factors",
    "LayerBuffers",
    "LinearBuffers",
    "LinearShape",
    "PackedAdapter",
    "SliceBuffers",
    "UngatedShape",
    "read_adapter",
    "stack_adapters",
    "stack_linears",
]
