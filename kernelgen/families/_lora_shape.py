"""A linear layer with its adapters, for warm-up."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, NamedTuple

import torch

from . import _operands as operands
from . import _scales
from ._lora import lora, lora_route
from ._warmup import kinds_of_scales
from .lora_expand._op import lora_expand
from .lora_shrink._op import lora_shrink
from .lora_shrink._table import QUANT, VARIANTS

__all__ = ["LoraShape"]

_OUT = operands.Choice((None, *VARIANTS.dtypes, torch.float32))


class LoraShape(NamedTuple):
    """A linear layer with its adapters, as ``lora`` will be called on it; all tensors are contiguous."""

    k: operands.Size  # input width
    widths: Annotated[tuple[int, ...], operands.Several(operands.Int(1))]  # output width of each slice
    rank: operands.Size
    max_loras: operands.Size
    dtype: Annotated[torch.dtype, operands.Choice(VARIANTS.dtypes)] = torch.bfloat16
    out_width: Annotated[int | None, operands.Int(1)] = None  # columns of out; None: offset_start and those of the slices
    offset_start: operands.Count = 0
    add_inputs: operands.Bool = True
    separate: operands.Bool = False  # lora_shrink and lora_expand are called instead, with what is done between them
    gathered: operands.Size = 1  # parts of the rank, which are joined between them
    weight_scales: Annotated[str | None, kinds_of_scales(VARIANTS, "weight_scales")] = None  # of FP8 adapters
    x_scales: Annotated[str | None, kinds_of_scales(VARIANTS, "x_scales", group_by_column="group")] = None  # of an FP8 x
    fp8_dtype: Annotated[torch.dtype, operands.Choice(QUANT.elements)] = torch.float8_e4m3fn  # of both
    x_scales_dtype: Annotated[torch.dtype, operands.Choice(_scales.SCALES)] = torch.float32
    out_dtype: Annotated[torch.dtype | None, _OUT] = None  # float32, or that of the activations

    def check(self, label: str) -> None:
        """Raise ValueError where a field, of a shape called ``label``, is no such thing."""
        operands.check_fields("warmup", label, self)

    def call(self, num_tokens: int) -> None:
        """Make the call of a batch of ``num_tokens``."""

        def empty(*size: int, dtype: torch.dtype = self.dtype) -> torch.Tensor:
            return torch.empty(size, dtype=dtype, device="meta")

        route = lora_route(empty(num_tokens, dtype=torch.int32), max_loras=self.max_loras)
        slices, end = len(self.widths), self.offset_start + sum(self.widths)
        of_weights = self.dtype if self.weight_scales is None else self.fp8_dtype
        out = empty(num_tokens, self.out_width or end, dtype=self.out_dtype or self.dtype)
        x = empty(num_tokens, self.k, dtype=self.dtype if self.x_scales is None else self.fp8_dtype)
        a = [empty(self.max_loras, self.rank, self.k, dtype=of_weights)] * slices
        full_rank = self.rank * self.gathered
        b = [empty(self.max_loras, width, full_rank, dtype=of_weights) for width in self.widths]

        def scales(weights: Sequence[torch.Tensor]) -> list[torch.Tensor] | None:
            if self.weight_scales is None:
                return None
            shapes = [_scales.scale_shape(self.weight_scales, w.shape, QUANT) for w in weights]
            return [empty(*size, dtype=torch.float32) for size in shapes]

        a_scale, b_scale = scales(a), scales(b)
        at, adds = self.offset_start, self.add_inputs
        for x_scale in _scales.meta_x_scales(self.x_scales, x.shape, QUANT, self.x_scales_dtype):
            if self.separate:
                y = empty(slices, num_tokens, self.rank, dtype=torch.float32)
                lora_shrink(y, x, a, route, x_scale=x_scale, a_scale=a_scale)
            else:
                lora(
                    out,
                    x,
                    a,
                    b,
                    route,
                    offset_start=at,
                    add_inputs=adds,
                    x_scale=x_scale,
                    a_scale=a_scale,
                    b_scale=b_scale,
                )
        if self.separate:
            y = empty(slices, num_tokens, full_rank, dtype=torch.float32)
            lora_expand(out, y, b, route, offset_start=at, add_inputs=adds, b_scale=b_scale)
