"""Compile everything that serving a model needs, before the first request.

The rule. What a model fixes enters a compile key: K, N, rank, slices, experts, adapter slots, top_k, strides, dtypes,
which optional tensors there are. What changes from step to step does not: the routing never, and the number of tokens
only through sizes that are rounded to powers of two: of T for the tiles, of the pairs T * top_k for the sort. Between two
powers of two T has the same tiles, and the pairs pass at most one power of two; so both ends have all keys in between.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Annotated, NamedTuple, Protocol

import torch

from . import _operands as operands
from . import _runtime as runtime
from ._variants import Variants

__all__ = ["warmup"]

# Fields that shapes have in common.
IdsDtype = Annotated[torch.dtype, operands.Choice(operands.IDS)]
FloatDtype = Annotated[torch.dtype, operands.Choice(operands.FLOATS)]


class _Warmup(NamedTuple):
    max_tokens: operands.Size
    device: Annotated[torch.device | str, operands.Device()]


_WARMUP = operands.Op("warmup", _Warmup, launches=False)


def kinds_of_scales(variants: Variants, fact: str, **layouts: str) -> operands.Choice:
    """Of what there may be a scale each: what there are variants for, and further ``layouts`` of these."""
    kinds = variants.values(fact)
    return operands.Choice((*kinds, *(layout for layout, kind in layouts.items() if kind in kinds)))


class Shape(Protocol):
    """What a model fixes of a layer: ``MoeShape``, ``ShardedMoeShape``, ``FusedMoeShape`` or ``LoraShape``."""

    def check(self, label: str) -> None:
        """Raise ValueError where a field, of a shape called ``label``, is no such thing."""

    def call(self, num_tokens: int) -> None:
        """Make every call that a batch of ``num_tokens`` can make, on the meta device."""


def requests(
    shapes: Sequence[Shape], *, max_tokens: int = 8192, device: torch.device | None = None
) -> list[runtime.CompileRequest]:
    """The compile keys that batches of 0 to ``max_tokens`` tokens need, each once; nothing is compiled or run."""
    found: dict[object, runtime.CompileRequest] = {}
    for shape in shapes:
        for num_tokens in ends(max_tokens):
            with runtime.compile_only(device) as log:
                shape.call(num_tokens)
            found.update({request.key: request for request in log})
    return list(found.values())


def ends(max_tokens: int) -> Iterator[int]:
    """The smallest and the largest number of tokens that round up to each power of two."""
    first = last = 1
    while first <= max_tokens:
        yield from {first, min(last, max_tokens)}
        first, last = last + 1, 2 * last


def warmup(
    shapes: Sequence[Shape], *, max_tokens: int = 8192, device: torch.device | str = "cuda"
) -> int:
    """Compile exactly what these shapes need for up to ``max_tokens`` tokens; return how many kernels that is.

    Afterwards no number of tokens and no routing compiles anything, if tensors are 16-byte aligned and weights
    contiguous. Run it before capturing CUDA graphs. Interpreted kernels are not compiled: then it is 0.

    Raises:
        ValueError: a field of a shape that does not fit, or a device that is no GPU.
    """
    if not isinstance(shapes, (list, tuple)) or hasattr(shapes, "check"):
        runtime.fail("warmup", "shapes", type(shapes).__name__, "a list of shapes")
    for i, shape in enumerate(shapes):
        if not hasattr(shape, "check"):
            runtime.fail("warmup", f"shapes[{i}]", type(shape).__name__, "MoeShape, ShardedMoeShape, FusedMoeShape or LoraShape")
        shape.check(f"shapes[{i}]")
    _WARMUP.check("warmup", _Warmup(max_tokens, device))
    if runtime.INTERPRETED:
        return 0
    device = torch.device(device)
    if device.type != "cuda" or not torch.cuda.is_available():
        runtime.fail("warmup", "device", device, "a GPU", "kernels are compiled for no other device")
    if device.index is None:
        device = torch.device(device.type, torch.cuda.current_device())
    wanted = requests(shapes, max_tokens=max_tokens, device=device)
    with torch.cuda.device(device):
        for request in wanted:
            request.compile().run  # noqa: B018  (this property loads the module)
    return len(wanted)
