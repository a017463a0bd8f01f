"""What calls of all families share, for those who ask which variant a call gets.

``call.py`` of a room makes one: on tensors of the ``meta`` device, by the front door, of the sizes that are asked for. torch is
imported where a call is made, so that words can be judged without.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol, Sequence

if TYPE_CHECKING:
    import torch

BATCH = {"num_tokens": 256, "top_k": 8, "num_experts": 128}
LAYER = {**BATCH, "hidden": 2048, "intermediate": 768}  # of Qwen3-30B-A3B


class Asked(Protocol):
    """A case, as far as it is said or assumed."""

    @property
    def sizes(self) -> Any:
        """Those of the call, by name."""

    def tags(self, axis: str) -> Sequence[str]:
        """All that the case leaves of an axis."""

    def tag(self, axis: str) -> str | None:
        """The tag of the call on an axis; None: there is no such axis, or the sizes decide."""

    def fact(self, name: str, default: object = None) -> object:
        """What the tags stand for under a name."""


def sized(asked: Asked, *names: str) -> list[int]:
    """The sizes of these names; 1: what the family does not look at."""
    return [asked.sizes.get(name, 1) for name in names]


def dtype_of(asked: Asked) -> torch.dtype:
    """The dtype of activations."""
    import torch

    dtype: torch.dtype = getattr(torch, str(asked.fact("torch_dtype", "bfloat16")))
    return dtype


def scales_of(asked: Asked) -> dict[str, Any]:
    """Of what there is a scale each, as shapes of warm-up are told."""
    return {"weight_scales": asked.fact("weight_scales"), "x_scales": asked.fact("x_scales")}


def empty(asked: Asked, *size: int) -> torch.Tensor:
    """Numbers in the dtype of activations."""
    return _meta(size, dtype_of(asked))


def ints(*size: int) -> torch.Tensor:
    """Numbers in int32."""
    import torch

    return _meta(size, torch.int32)


def floats(*size: int) -> torch.Tensor:
    """Numbers in float32."""
    import torch

    return _meta(size, torch.float32)


def _meta(size: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    import torch

    return torch.empty(tuple(size), dtype=dtype, device="meta")
