"""Which adapter each row of a step has: the route of linear layers, made once a step, outside of CUDA graphs."""

from __future__ import annotations

import itertools
import weakref
from typing import Any

import torch

from . import kernels as kg

__all__ = ["Rows"]

_rows: weakref.WeakValueDictionary[int, Rows] = weakref.WeakValueDictionary()
_numbers = itertools.count()


class Rows:
    """The adapters of up to ``capacity`` rows, at fixed addresses; vLLM takes it for its own ``LoRAKernelMeta``.

    Attributes:
        token_lora_mapping: [capacity] int32, -1 behind the batch and for rows without an adapter. Others read it.
        no_lora_flag_cpu: [1] bool on the host: no row has an adapter. Others read it.
        handle: int64 on the host, which stands for this object in a graph of torch.compile: a number that is read when it
            runs, as a tensor is an input of the graph.
    """

    def __init__(self, capacity: int, max_loras: int, device: torch.device | str) -> None:
        none = torch.empty(0, dtype=torch.int64, device=device)  # as slots come, so that it is compiled
        self._held = kg.lora_route(none, max_loras=max_loras, capacity=capacity)
        self.token_lora_mapping: torch.Tensor = self._held.first(capacity).token_lora_mapping
        self.no_lora_flag_cpu = torch.tensor([True], device="cpu")
        self.any = False  # the same as a number
        number = next(_numbers)
        self.handle = torch.tensor([number], device="cpu")
        _rows[number] = self

    def fill(self, slots: torch.Tensor, any_lora: bool) -> None:
        """Take the adapters of a step.

        Args:
            slots: [n] int32 or int64, the slot of each row, -1: none; n is at most the capacity, and rows behind have none.
            any_lora: whether a row has one, which the host knows.
        """
        self._held.refill(slots)
        self.any = any_lora
        self.no_lora_flag_cpu.fill_(not any_lora)

    def first(self, num_rows: int) -> Any:
        """The route of an op on the first rows."""
        return self._held.first(num_rows)

    @staticmethod
    def of(handle: torch.Tensor) -> Rows:
        """That of a handle."""
        return _rows[int(handle)]
