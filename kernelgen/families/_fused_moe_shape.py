"""A base MoE layer, for warm-up."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Annotated, Any, NamedTuple

import torch

from . import _operands as operands
from . import _runtime as runtime
from . import _scales
from ._activation import SLICES, Layout
from ._activation import choice as activation_choice
from ._fused_moe import FusedMoeLora, fused_moe
from ._warmup import FloatDtype, IdsDtype, ends, kinds_of_scales
from .moe_gemm._table import QUANT, VARIANTS

__all__ = ["FusedMoeShape"]

_Given = Annotated[torch.dtype | None, operands.Choice((None, *operands.FLOATS))]
_X_SCALES = kinds_of_scales(VARIANTS, "x_scales", expert="tensor", group_by_column="group")


class FusedMoeShape(NamedTuple):
    """A base MoE layer, with or without adapters, as ``fused_moe`` will be called on it; all tensors are contiguous."""

    hidden: operands.Size
    intermediate: operands.Size
    num_experts: operands.Size  # in the weights
    top_k: operands.Size
    activation: Annotated[str, activation_choice()] = "swiglu"
    dtype: Annotated[torch.dtype, operands.Choice(VARIANTS.dtypes)] = torch.bfloat16
    out_dtype: _Given = None  # of the caller's out; None: none is given
    valid_tokens: operands.Bool = False  # whether it is given
    local_expert_start: operands.Count = 0
    topk_ids_dtype: IdsDtype = torch.int32
    topk_weights_dtype: FloatDtype = torch.float32
    # Of FP8 weights: "tensor", "slice" (w13_scale is [E, 2]), "channel" or "group"; of MXFP4: "mx".
    weight_scales: Annotated[str | None, kinds_of_scales(VARIANTS, "weight_scales", slice="tensor")] = None
    x_scales: Annotated[str | None, _X_SCALES] = None  # of an FP8 ``hidden``; "expert": h_scale is [E]
    fp8_dtype: Annotated[torch.dtype, operands.Choice(QUANT.elements)] = torch.float8_e4m3fn  # of all that is FP8
    scales_dtype: Annotated[torch.dtype, operands.Choice(_scales.SCALES)] = torch.float32  # of all that are given
    rank: operands.Count = 0  # of adapters, 0: none are given
    max_loras: operands.Count = 0  # adapters in their factors
    adapter_enabled: operands.Bool = False  # whether it is given
    lora_ranks: operands.Bool = False  # likewise
    shared_outer: operands.Bool = False  # whether all experts share the first factors of w13 and the second of w2: stride 0
    lora_scales: Annotated[str | None, kinds_of_scales(VARIANTS, "b_scales")] = None  # of FP8 factors
    global_experts: operands.Count = 0  # in an expert_map, 0: none is given
    layout: Layout = "halves"
    bias_dtype: _Given = None  # of the biases; None: there are none
    apply_router_weight_on_input: operands.Bool = False

    def check(self, label: str) -> None:
        """Raise ValueError where a field, of a shape called ``label``, is no such thing."""
        operands.check_fields("warmup", label, self)
        if (self.rank > 0) != (self.max_loras > 0):
            runtime.fail("warmup", f"{label}.rank, max_loras", (self.rank, self.max_loras), "both, or neither")

    def call(self, num_tokens: int, hints: Sequence[int] | None = None) -> None:
        """Make every call that a batch of ``num_tokens`` can make, whatever number is expected, or with these ``hints``."""

        def empty(*size: int, dtype: torch.dtype = self.dtype) -> torch.Tensor:
            return torch.empty(size, dtype=dtype, device="meta")

        width, inter, experts = self.hidden, self.intermediate, self.num_experts
        w13, w2 = (experts, SLICES[self.activation] * inter, width), (experts, width, inter)
        slices = w13[1] // inter
        of_weights = of_x = self.dtype
        scales: dict[str, Any] = {}
        scales_dtype = self.scales_dtype
        if self.weight_scales == "mx":
            of_weights = scales_dtype = torch.uint8
            w13, w2 = (*w13[:2], width // 2), (*w2[:2], inter // 2)
        elif self.weight_scales is not None:
            of_weights = self.fp8_dtype
        if self.weight_scales is not None:
            by_slice = self.weight_scales == "slice"
            mode = "tensor" if by_slice else self.weight_scales
            for name, size, parts in (("w13_scale", w13, slices), ("w2_scale", w2, 1)):
                last = (parts,) if by_slice and parts > 1 else ()
                scales[name] = empty(*_scales.scale_shape(mode, size, QUANT, parts), *last, dtype=scales_dtype)
        if self.x_scales is not None:
            of_x = self.fp8_dtype
        if self.x_scales in ("tensor", "expert"):
            scales["h_scale"] = empty(experts if self.x_scales == "expert" else 1, dtype=self.scales_dtype)
        of_tokens = "tensor" if self.x_scales == "expert" else self.x_scales
        lora = None
        if self.rank > 0:
            loras, outer = self.max_loras, 1 if self.shared_outer else experts

            def of_all(size: Sequence[int], count: int, dtype: torch.dtype) -> list[torch.Tensor]:
                return [empty(*size, dtype=dtype).expand(-1, experts, *size[2:])] * count

            factors = {
                "a13": ((loras, outer, self.rank, width), slices),
                "b13": ((loras, experts, inter, self.rank), slices),
                "a2": ((loras, experts, self.rank, inter), 1),
                "b2": ((loras, outer, width, self.rank), 1),
            }
            kind = self.dtype if self.lora_scales is None else self.fp8_dtype
            made = {name: of_all(whole, count, kind) for name, (whole, count) in factors.items()}
            if self.lora_scales is not None:
                for name, (whole, count) in factors.items():
                    of_scales = _scales.scale_shape(self.lora_scales, whole, QUANT)
                    made[f"{name}_scale"] = of_all(of_scales, count, torch.float32)
            mapping, each = (empty(size, dtype=torch.int32) for size in (num_tokens, loras))
            enabled, ranks = (each if is_given else None for is_given in (self.adapter_enabled, self.lora_ranks))
            lora = FusedMoeLora(token_lora_mapping=mapping, **made, adapter_enabled=enabled, lora_ranks=ranks)
        if self.bias_dtype is not None:
            scales |= {f"{name}_bias": empty(*size[:2], dtype=self.bias_dtype) for name, size in (("w13", w13), ("w2", w2))}
        x_scales = _scales.meta_x_scales(of_tokens, (num_tokens, width), QUANT, self.scales_dtype)
        for x_scale, hint in itertools.product(x_scales, hints or ends(num_tokens)):
            fused_moe(
                empty(num_tokens, width, dtype=of_x),
                empty(*w13, dtype=of_weights),
                empty(*w2, dtype=of_weights),
                empty(num_tokens, self.top_k, dtype=self.topk_ids_dtype),
                empty(num_tokens, self.top_k, dtype=self.topk_weights_dtype),
                activation=self.activation,
                layout=self.layout,
                apply_router_weight_on_input=self.apply_router_weight_on_input,
                valid_tokens=empty(1, dtype=torch.int32) if self.valid_tokens else None,
                num_tokens_hint=hint,
                local_expert_start=self.local_expert_start,
                expert_map=empty(self.global_experts, dtype=torch.int32) if self.global_experts else None,
                out=None if self.out_dtype is None else empty(num_tokens, width, dtype=self.out_dtype),
                x_scale=x_scale,
                lora=lora,
                limit=1.0 if self.activation == "swiglu_clamp" else None,  # no key hangs on the number
                **scales,
            )
