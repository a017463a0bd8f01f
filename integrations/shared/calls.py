"""The calls that layers make while serving, made on tensors of the meta device: what serves them is said, and compiled, at start.

So there is no other description of these calls than what makes them.
"""

from __future__ import annotations

import dataclasses
import logging
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch

from .. import kernels as kg
from ..kernels import _runtime as runtime

__all__ = ["Calls", "compile_all", "distinct", "empty", "looks", "on_meta", "refusal", "say"]


@dataclasses.dataclass(frozen=True)
class Calls:
    """The calls that a layer makes at each step, as a shape for ``warmup``.

    Attributes:
        line: which ops serve which class of layers, and what is refused and why.
        looks: equal for layers that make the same calls.
        make: makes every call that a batch of so many rows can make, on the meta device.
    """

    line: str
    looks: tuple[Any, ...]
    make: Callable[[int], None]

    def check(self, label: str) -> None:
        """It has no fields that could be wrong."""

    def call(self, num_tokens: int) -> None:
        """Make every call that a batch of ``num_tokens`` can make."""
        self.make(num_tokens)


def distinct(found: Sequence[Calls]) -> list[Calls]:
    """One each of those that are alike, as layers of a model are."""
    return list({(calls.line, *calls.looks): calls for calls in found}.values())


def say(log: logging.Logger, version: str, found: Sequence[Calls]) -> None:
    """Which ops serve the layers of a model."""
    lines = Counter(calls.line for calls in found)
    log.info("kernelgen %s: %s", version, "; ".join(f"{number} x {line}" for line, number in lines.items()))


def compile_all(log: logging.Logger, found: Sequence[Calls], max_tokens: int, device: torch.device) -> None:
    """Compile all that the layers of a model can ask for, up to the largest batch."""
    if device.type == "cuda":
        log.info("kernelgen: %d kernels are ready", kg.warmup(distinct(found), max_tokens=max_tokens, device=device))


def refusal(make: Callable[[], None], device: torch.device) -> str | None:
    """Why calls that are made on the meta device would be refused on this one; None: they would not be."""
    try:
        with runtime.compile_only(device if device.type == "cuda" else None):
            make()
    except ValueError as error:
        return str(error)
    return None


def on_meta(value: Any) -> Any:
    """Tensors as they lie, on the meta device."""
    if isinstance(value, torch.Tensor):
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")
    return type(value)(map(on_meta, value)) if isinstance(value, (tuple, list)) else value


def looks(*values: Any) -> tuple[Any, ...]:
    """What tells the tensors of layers apart."""
    tensors = [tensor for value in values for tensor in (value if isinstance(value, (tuple, list)) else [value])]
    return tuple((tensor.shape, tensor.stride(), tensor.dtype) for tensor in tensors)


def empty(*size: int, dtype: torch.dtype) -> torch.Tensor:
    """A tensor on the meta device."""
    return torch.empty(size, dtype=dtype, device="meta")
