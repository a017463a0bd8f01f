"""A projection of an MoE layer whose adapters are sharded, for warm-up."""

from __future__ import annotations

from typing import Annotated, NamedTuple

import torch

from . import _operands as operands
from . import _runtime as runtime
from ._moe_shape import MoeShape
from .moe_lora_expand._op import moe_lora_expand
from .moe_lora_shrink._op import moe_lora_shrink
from .moe_route._op import MoeRoute

__all__ = ["ShardedMoeShape"]


class ShardedMoeShape(NamedTuple):
    """A projection whose adapters are sharded, as ``moe_lora_shrink`` and ``moe_lora_expand`` will be called on it."""

    shape: MoeShape  # of what this GPU has; rank: that of its lora_a
    gathered: operands.Size = 1  # parts of the rank, side by side in front of the expand; 1: what is summed has all of it
    offset: operands.Count = 0
    out_width: Annotated[int | None, operands.Int(1)] = None  # columns of out; None: offset and those of the slices

    def check(self, label: str) -> None:
        """Raise ValueError where a field, of a shape called ``label``, is no such thing."""
        operands.check_fields("warmup", label, self)
        if not isinstance(self.shape, MoeShape):
            runtime.fail("warmup", f"{label}.shape", type(self.shape).__name__, "a MoeShape")
        self.shape.check(f"{label}.shape")

    def call(self, num_tokens: int) -> None:
        """Make every call that a batch of ``num_tokens`` can make."""
        for route in self.shape.routes(num_tokens):
            self._call(route)

    def _call(self, route: MoeRoute) -> None:
        shape, parts = self.shape, self.gathered

        def empty(*size: int, dtype: torch.dtype = shape.dtype) -> torch.Tensor:
            return torch.empty(size, dtype=dtype, device="meta")

        num_tokens, num_pairs = route.num_tokens, route.num_tokens * shape.top_k
        experts = (shape.max_loras, shape.num_experts)
        y = empty(shape.slices, num_pairs, shape.rank, dtype=torch.float32)
        x = empty(num_pairs if shape.mul_routed_weight else num_tokens, shape.k)
        moe_lora_shrink(y, x, [empty(*experts, shape.rank, shape.k)] * shape.slices, route)
        weights = empty(num_tokens, shape.top_k, dtype=shape.topk_weights_dtype) if shape.mul_routed_weight else None
        moe_lora_expand(
            empty(num_tokens, shape.top_k, self.out_width or self.offset + shape.slices * shape.n),
            y if parts == 1 else empty(parts, *y.shape, dtype=torch.float32),
            [empty(*experts, shape.n, shape.rank * parts)] * shape.slices,
            route,
            offset=self.offset,
            topk_weights=weights,
            add_inputs=shape.add_inputs,
            mul_routed_weight=shape.mul_routed_weight,
        )
