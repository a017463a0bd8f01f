"""A projection of an MoE layer with its adapters, for warm-up."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, NamedTuple

import torch

from . import _operands as operands
from ._scales import SCALES, meta_x_scales
from ._warmup import FloatDtype, IdsDtype, kinds_of_scales
from .moe_lora._op import moe_lora
from .moe_lora._problem import scale_shape
from .moe_lora._table import QUANT, VARIANTS
from .moe_route._op import MoeRoute, moe_route

__all__ = ["MoeShape"]

_Assignments = Annotated[tuple[str, ...], operands.Several(operands.Choice(("auto", "naive", "sorted")))]
_X_SCALES = kinds_of_scales(VARIANTS, "x_scales", expert="tensor", group_by_column="group")


class MoeShape(NamedTuple):
    """One projection of an MoE layer with its adapters, as ``moe_lora`` will be called on it; weights are contiguous."""

    k: operands.Size  # input width
    n: operands.Size  # output width of one slice
    slices: operands.Size
    rank: operands.Size
    top_k: operands.Size
    num_experts: operands.Size
    max_loras: operands.Size
    dtype: Annotated[torch.dtype, operands.Choice(VARIANTS.dtypes)] = torch.bfloat16
    mul_routed_weight: operands.Bool = False
    add_inputs: operands.Bool = True
    adapter_enabled: operands.Bool = False  # whether moe_route is given one
    global_experts: operands.Count = 0  # entries of expert_map, 0 without one
    assignments: _Assignments = ("auto",)  # as moe_route is called
    topk_ids_dtype: IdsDtype = torch.int32
    topk_weights_dtype: FloatDtype = torch.float32
    weight_scales: Annotated[str | None, kinds_of_scales(VARIANTS, "weight_scales")] = None  # of FP8 adapters
    x_scales: Annotated[str | None, _X_SCALES] = None  # of an FP8 x
    fp8_dtype: Annotated[torch.dtype, operands.Choice(QUANT.elements)] = torch.float8_e4m3fn  # of both
    x_scales_dtype: Annotated[torch.dtype, operands.Choice(SCALES)] = torch.float32

    def check(self, label: str) -> None:
        """Raise ValueError where a field, of a shape called ``label``, is no such thing."""
        operands.check_fields("warmup", label, self)

    def call(self, num_tokens: int) -> None:
        """Make every call that a batch of ``num_tokens`` can make."""
        for route in self.routes(num_tokens):
            self._call(route)

    def routes(self, num_tokens: int) -> Iterator[MoeRoute]:
        """The routes of a batch: of each assignment, with the rank and without."""
        for assignment in self.assignments:
            for rank in (None, self.rank):
                yield self._route(num_tokens, assignment, rank)

    def _route(self, num_tokens: int, assignment: str, rank: int | None) -> MoeRoute:
        def ints(*size: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
            return torch.empty(size, dtype=dtype, device="meta")

        return moe_route(
            ints(num_tokens, self.top_k, dtype=self.topk_ids_dtype),
            ints(num_tokens),
            num_experts=self.num_experts,
            max_loras=self.max_loras,
            adapter_enabled=ints(self.max_loras + 1) if self.adapter_enabled else None,
            expert_map=ints(self.global_experts) if self.global_experts else None,
            assignment=assignment,
            rank=rank,
        )

    def _call(self, route: MoeRoute) -> None:
        def empty(*size: int, dtype: torch.dtype = self.dtype) -> torch.Tensor:
            return torch.empty(size, dtype=dtype, device="meta")

        num_tokens = route.num_tokens
        rows = num_tokens * self.top_k if self.mul_routed_weight else num_tokens
        a_shape = (self.max_loras, self.num_experts, self.rank, self.k)
        b_shape = (self.max_loras, self.num_experts, self.n, self.rank)
        of_weights = of_x = self.dtype
        a_scale = b_scale = None
        if self.weight_scales is not None:
            of_weights = self.fp8_dtype
            a_scale, b_scale = (
                [empty(*scale_shape(self.weight_scales, size), dtype=torch.float32)] * self.slices
                for size in (a_shape, b_shape)
            )
        if self.x_scales is not None:
            of_x = self.fp8_dtype
        weights = empty(num_tokens, self.top_k, dtype=self.topk_weights_dtype) if self.mul_routed_weight else None
        for x_scale in meta_x_scales(self.x_scales, (rows, self.k), QUANT, self.x_scales_dtype, self.num_experts):
            moe_lora(
                empty(num_tokens, self.top_k, self.slices * self.n),
                empty(rows, self.k, dtype=of_x),
                [empty(*a_shape, dtype=of_weights)] * self.slices,
                [empty(*b_shape, dtype=of_weights)] * self.slices,
                route,
                topk_weights=weights,
                add_inputs=self.add_inputs,
                mul_routed_weight=self.mul_routed_weight,
                a_scale=a_scale,
                b_scale=b_scale,
                x_scale=x_scale,
            )
