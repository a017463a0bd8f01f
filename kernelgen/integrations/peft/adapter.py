"""What an adapter is once it is read, and once it is stacked with others."""

from __future__ import annotations

import dataclasses
from typing import Any, Mapping, NamedTuple

import torch


class AdapterError(ValueError):
    """An adapter that cannot be served as it is written; the message names the folder, what was found and what was wanted."""


class ExpertShape(NamedTuple):
    """The experts of a model: ``hidden`` is the width of x, ``intermediate`` the width of gate and of up."""

    num_experts: int
    hidden: int
    intermediate: int

    def widths(self, part: str) -> tuple[int, int]:
        """(in, out) of "gate", "up", "gate_up" or "down"."""
        if part == "down":
            return self.intermediate, self.hidden
        return self.hidden, self.intermediate * (2 if part == "gate_up" else 1)

    def all_widths(self) -> set[tuple[int, int]]:
        """Those of every projection."""
        return {self.widths(part) for part in ("gate", "gate_up", "down")}


def checked_shape(shape: Any) -> ExpertShape:
    """Three sizes as an ExpertShape.

    Raises:
        ValueError: they are something else.
    """
    sizes = tuple(shape) if isinstance(shape, (tuple, list)) else ()
    if len(sizes) != 3 or not all(type(size) is int and 0 < size < 1 << 31 for size in sizes):
        raise ValueError(f"shape: got {shape!r}, wanted an ExpertShape of sizes from 1 to 2^31 - 1")
    return ExpertShape(*sizes)


class Factors(NamedTuple):
    """One low-rank update of E experts, scaling folded into ``b``: delta W[e] = b[e] . a[e].

    A factor that all experts share has a stride of 0 over E.
    """

    a: torch.Tensor  # [E, r, in] float32
    b: torch.Tensor  # [E, out, r] float32


@dataclasses.dataclass(frozen=True)
class Adapter:
    """One adapter: ``layers[i]`` maps "gate", "up" and "down" of decoder layer i to their factors, where it has any.

    ``other`` names what has LoRA factors and belongs to no routed expert (attention, routers, shared experts), or to experts
    outside of the ``prefix`` that was asked for: they are the caller's to serve.
    """

    name: str
    layers: Mapping[int, Mapping[str, Factors]]
    other: tuple[str, ...]

    @property
    def rank(self) -> int:
        """The largest rank in it, 0 if it has no experts."""
        return max(
            (f.a.shape[1] for layer in self.layers.values() for f in layer.values()), default=0
        )


class SliceBuffers(NamedTuple):
    """``lora_a`` and ``lora_b`` of one ``moe_lora`` call, one tensor a slice."""

    a: tuple[torch.Tensor, ...]  # [L, E, rank, in]
    b: tuple[torch.Tensor, ...]  # [L, E, out, rank]


class LayerBuffers(NamedTuple):
    """All adapters of one decoder layer; slot l of the buffers is adapter l."""

    gate_up: SliceBuffers  # two slices, gate and up
    down: SliceBuffers  # one slice
    adapter_enabled: torch.Tensor  # [L] int32, 0: the adapter leaves this layer alone
    # [L] int32, the largest rank of each adapter in this layer, behind which factors are zero; None: kernels would gain nothing
    lora_ranks: torch.Tensor | None = None
