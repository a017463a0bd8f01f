"""A base MoE layer, for warm-up."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from . import _operands as operands
from . import _runtime as runtime
from . import _scales
from ._fused_moe import FusedMoeLora, fused_moe
from ._warmup import ROUTING, ends, kinds_of_scales
from .moe_gemm._table import QUANT, VARIANTS

__all__ = ["FusedMoeShape"]

_FIELDS: tuple[operands.Operand, ...] = (
    *(operands.Int(name, 1) for name in ("hidden", "intermediate", "num_experts", "top_k")),
    operands.Choice("activation", ("swiglu", "relu2")),
    operands.Choice("out_dtype", (None, *operands.FLOATS)),
    operands.Flag("valid_tokens"),
    operands.Int("local_expert_start"),
    operands.Choice("dtype", VARIANTS.dtypes),
    *ROUTING,
    kinds_of_scales(VARIANTS, "weight_scales", slice="tensor"),
    kinds_of_scales(VARIANTS, "x_scales", expert="tensor", group_by_column="group"),
    operands.Choice("fp8_dtype", QUANT.elements),
    operands.Choice("scales_dtype", _scales.SCALES),
    operands.Int("rank"),
    operands.Int("max_loras"),
    operands.Flag("adapter_enabled"),
    operands.Flag("lora_ranks"),
    operands.Flag("shared_outer"),
)


class FusedMoeShape(NamedTuple):
    """A base MoE layer, with or without adapters, as ``fused_moe`` will be called on it; all tensors are contiguous."""

    hidden: int
    intermediate: int
    num_experts: int  # in the weights
    top_k: int
    activation: str = "swiglu"
    dtype: torch.dtype = torch.bfloat16
    out_dtype: torch.dtype | None = None  # of the caller's out; None: none is given
    valid_tokens: bool = False  # whether it is given
    local_expert_start: int = 0
    topk_ids_dtype: torch.dtype = torch.int32
    topk_weights_dtype: torch.dtype = torch.float32
    weight_scales: str | None = None  # of FP8 weights: "tensor", "slice" (w13_scale is [E, 2]), "channel" or "group"
    x_scales: str | None = None  # of an FP8 ``hidden``: "tensor", "expert" (h_scale is [E]), "token", "group", "group_by_column"
    fp8_dtype: torch.dtype = torch.float8_e4m3fn  # of both
    scales_dtype: torch.dtype = torch.float32  # of all that are given
    rank: int = 0  # of adapters, 0: none are given
    max_loras: int = 0  # adapters in their factors
    adapter_enabled: bool = False  # whether it is given
    lora_ranks: bool = False  # likewise
    shared_outer: bool = False  # whether all experts share the first factors of w13 and the second of w2: stride 0

    def check(self, label: str) -> None:
        """Raise ValueError where a field, of a shape called ``label``, is no such thing."""
        operands.check_fields("warmup", label, self, _FIELDS)
        if (self.rank > 0) != (self.max_loras > 0):
            runtime.fail("warmup", f"{label}.rank, max_loras", (self.rank, self.max_loras), "both, or neither")

    def call(self, num_tokens: int, hints: Sequence[int] | None = None) -> None:
        """Make every call that a batch of ``num_tokens`` can make, whatever number is expected, or with these ``hints``."""

        def empty(*size: int, dtype: torch.dtype = self.dtype) -> torch.Tensor:
            return torch.empty(size, dtype=dtype, device="meta")

        width, inter, experts = self.hidden, self.intermediate, self.num_experts
        w13, w2 = (experts, (2 if self.activation == "swiglu" else 1) * inter, width), (experts, width, inter)
        of_weights = of_x = self.dtype
        scales: dict[str, Any] = {}
        if self.weight_scales is not None:
            of_weights = self.fp8_dtype
            by_slice = self.weight_scales == "slice"
            mode = "tensor" if by_slice else self.weight_scales
            for name, size, slices in (("w13_scale", w13, w13[1] // inter), ("w2_scale", w2, 1)):
                last = (slices,) if by_slice and slices > 1 else ()
                scales[name] = empty(*_scales.scale_shape(mode, size, QUANT, slices), *last, dtype=self.scales_dtype)
        if self.x_scales is not None:
            of_x = self.fp8_dtype
        if self.x_scales in ("tensor", "expert"):
            scales["h_scale"] = empty(experts if self.x_scales == "expert" else 1, dtype=self.scales_dtype)
        kind = "tensor" if self.x_scales == "expert" else self.x_scales
        lora = None
        if self.rank > 0:
            loras, slices, outer = self.max_loras, w13[1] // inter, 1 if self.shared_outer else experts

            def factors(of: int, rows: int, columns: int, count: int) -> list[torch.Tensor]:
                return [empty(loras, of, rows, columns).expand(-1, experts, -1, -1)] * count

            a13, b13 = factors(outer, self.rank, width, slices), factors(experts, inter, self.rank, slices)
            a2, b2 = factors(experts, self.rank, inter, 1), factors(outer, width, self.rank, 1)
            mapping, each = (empty(size, dtype=torch.int32) for size in (num_tokens, loras))
            given = [each if is_given else None for is_given in (self.adapter_enabled, self.lora_ranks)]
            lora = FusedMoeLora(mapping, a13, b13, a2, b2, *given)
        x_scales = _scales.meta_x_scales(kind, (num_tokens, width), QUANT, self.scales_dtype)
        for x_scale, hint in itertools.product(x_scales, hints or ends(num_tokens)):
            fused_moe(
                empty(num_tokens, width, dtype=of_x),
                empty(*w13, dtype=of_weights),
                empty(*w2, dtype=of_weights),
                empty(num_tokens, self.top_k, dtype=self.topk_ids_dtype),
                empty(num_tokens, self.top_k, dtype=self.topk_weights_dtype),
                activation=self.activation,
                valid_tokens=empty(1, dtype=torch.int32) if self.valid_tokens else None,
                num_tokens_hint=hint,
                local_expert_start=self.local_expert_start,
                out=None if self.out_dtype is None else empty(num_tokens, width, dtype=self.out_dtype),
                x_scale=x_scale,
                lora=lora,
                **scales,
            )
