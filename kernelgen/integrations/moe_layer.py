"""A whole MoE layer with the LoRA adapters that were read for it, behind its router: ``fused_moe``, which adds them inside of its
products. All of it stays on the device and is safe in a CUDA graph.

An engine whose base products are its own adds adapters to their rows instead, for every pair p = t * top_k + j of expert e:

    rows[p]  = x[t] . W13[e]^T
    rows[p] += adapter's delta, by slices gate and up               moe_lora
    h[p]     = act(rows[p])                                         moe_act
    y[p]     = w[p] * (h[p] . W2[e]^T)
    y[p]    += w[p] * adapter's delta                               moe_lora
    out[t]   = sum over j of y[t * top_k + j]                       moe_sum
"""

from __future__ import annotations

import dataclasses
from types import ModuleType
from typing import Any

import torch

from .peft import ExpertShape, LayerBuffers, SliceBuffers, UngatedShape


@dataclasses.dataclass(frozen=True)
class MoeLayer:
    """The weights of one layer's experts, and the adapters on them.

    Attributes:
        kernels: the generated package, under whatever name it was imported.
        w13: [E, 2 * I, H], the gate, then the linear half, or both in turns, as ``layout`` says; [E, I, H] without a gate; MXFP4
            has half as many columns, uint8 of two numbers each.
        w2: [E, H, I], likewise.
        lora: the adapters, from ``stack_adapters``, their numbers finite; None: this layer has none. On FP8 weights in bfloat16.
        w13_scale, w2_scale: of FP8 or MXFP4 weights, as ``fused_moe`` takes them.
        h_scale: likewise, of the activations between the two products, where it is given.
        activation, limit, alpha, beta: as ``fused_moe`` takes them.
        layout, w13_bias, w2_bias, apply_router_weight_on_input: of gpt-oss and of Llama 4, likewise.

    Raises:
        ValueError: weights and adapters are not of the same experts, dtype and device.
    """

    kernels: ModuleType
    w13: torch.Tensor
    w2: torch.Tensor
    lora: LayerBuffers | None
    w13_scale: torch.Tensor | None = None
    w2_scale: torch.Tensor | None = None
    h_scale: torch.Tensor | None = None
    activation: str = "swiglu"
    limit: float | None = None
    alpha: float | None = None
    beta: float | None = None
    layout: str = "halves"
    w13_bias: torch.Tensor | None = None
    w2_bias: torch.Tensor | None = None
    apply_router_weight_on_input: bool = False

    def __post_init__(self) -> None:
        for name, weight in (("w13", self.w13), ("w2", self.w2)):
            _check_tensor(name, weight)
        if not hasattr(self.kernels, "fused_moe"):
            raise ValueError(
                f"kernels: got {type(self.kernels).__name__}, wanted the generated package"
            )
        sizes = _sizes(self.w13), _sizes(self.w2)
        slices = _slices(self.w13, self.w2)
        if slices is None:
            raise ValueError(
                f"w13, w2: got {sizes[0]} and {sizes[1]}, wanted [E, 2 * I, H], or without a gate [E, I, H], and [E, H, I]"
            )
        kinds = [(weight.dtype, weight.device) for weight in (self.w13, self.w2)]
        if kinds[0] != kinds[1]:
            found = " and ".join(f"{dtype} on {device}" for dtype, device in kinds)
            raise ValueError(f"w13, w2: got {found}, wanted one dtype and device for both")
        if self.lora is not None:
            check_adapters("lora", self.lora, self.w2, gated=slices == 2)

    def __call__(
        self,
        hidden: torch.Tensor,
        topk_ids: torch.Tensor,
        topk_weights: torch.Tensor,
        token_lora_mapping: torch.Tensor | None,
        *,
        x_scale: torch.Tensor | None = None,
        workspace: Any = None,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The output [T, H] of the experts for ``hidden`` [T, H].

        Args:
            topk_ids, topk_weights: [T, top_k], contiguous.
            token_lora_mapping: [T] int32, the adapter of each token, -1: none; None: no token has one.
            x_scale: of an FP8 ``hidden``, as ``fused_moe`` takes it.
            workspace: from the package's ``fused_moe_workspace``, with ``max_rank`` for the adapters; None allocates.
            out: [T, H] in any float dtype; None makes it, in the dtype of ``hidden``, of an FP8 one in bfloat16.

        Raises:
            ValueError: something does not fit; ``out`` is as it was.
        """
        kg, lora = self.kernels, self.lora
        tensors = {"hidden": hidden, "topk_ids": topk_ids, "topk_weights": topk_weights}
        for name, tensor in tensors.items():
            _check_tensor(name, tensor)
        if topk_ids.dim() != 2:
            raise ValueError(f"topk_ids: got {list(topk_ids.shape)}, wanted [T, top_k]")
        if out is None:
            out = torch.empty_like(hidden, dtype=_dtype_beside(hidden))
        adapters = None
        if lora is not None and token_lora_mapping is not None:
            adapters = kg.FusedMoeLora(token_lora_mapping, *lora.gate_up, *lora.down, lora.adapter_enabled, lora.lora_ranks)
        layer = (hidden, self.w13, self.w2, topk_ids, topk_weights)
        scales = {"w13_scale": self.w13_scale, "w2_scale": self.w2_scale, "x_scale": x_scale, "h_scale": self.h_scale}
        gate: dict[str, Any] = {"activation": self.activation, "limit": self.limit, "alpha": self.alpha, "beta": self.beta}
        gate |= {"layout": self.layout, "apply_router_weight_on_input": self.apply_router_weight_on_input}
        scales |= {"w13_bias": self.w13_bias, "w2_bias": self.w2_bias}
        kg.fused_moe(*layer, **gate, out=out, workspace=workspace, lora=adapters, **scales)
        return out


def check_adapters(name: str, lora: LayerBuffers, w2: torch.Tensor, *, gated: bool = True) -> None:
    """Find out before anything runs what would stop a layer in the middle.

    Raises:
        ValueError: ``lora`` is not of the experts or the device of ``w2`` [E, H, I], or of another dtype than goes with it; the
            message begins with ``name``.
    """
    if not isinstance(lora, LayerBuffers):
        raise ValueError(
            f"{name}: got {type(lora).__name__}, wanted what stack_adapters returns for a layer"
        )
    shape = (ExpertShape if gated else UngatedShape)(*_sizes(w2))
    _check_tensor(f"{name}: adapter_enabled", lora.adapter_enabled)
    if lora.adapter_enabled.dim() != 1:
        raise ValueError(
            f"{name}: adapter_enabled: got {list(lora.adapter_enabled.shape)}, wanted [L]"
        )
    slots = lora.adapter_enabled.shape[0]
    for names, slices in ((shape.slices, lora.gate_up), (("down",), lora.down)):
        if not isinstance(slices, SliceBuffers) or not all(
            isinstance(side, (tuple, list)) and len(side) == len(names) for side in slices
        ):
            raise ValueError(
                f"{name}: got {slices!r:.60}, wanted SliceBuffers with a tensor each of {' and '.join(names)}"
            )
        for part, a, b in zip(names, *slices, strict=True):
            for factor in (a, b):
                _check_tensor(f"{name}: {part}", factor)
            wide, tall = shape.widths(part)
            rank = a.shape[2] if a.dim() == 4 else None
            sizes = (slots, shape.num_experts, rank, wide), (slots, shape.num_experts, tall, rank)
            if (tuple(a.shape), tuple(b.shape)) != sizes:
                raise ValueError(
                    f"{name}: {part}: got {list(a.shape)} and {list(b.shape)}, wanted adapters of {shape}, {slots} of one rank"
                )
            for factor in (a, b):
                wanted = _dtype_beside(w2)
                if (factor.dtype, factor.device) != (wanted, w2.device):
                    raise ValueError(
                        f"{name}: {part}: got {factor.dtype} on {factor.device}, wanted {wanted} on {w2.device}, beside "
                        f"weights in {w2.dtype}"
                    )


def _slices(w13: torch.Tensor, w2: torch.Tensor) -> int | None:
    """How many the first product has: a gate and up, or up alone; None: the weights are not of one layer."""
    first, second = _sizes(w13), _sizes(w2)
    if len(second) != 3:
        return None
    experts, hidden, inter = second
    return next((count for count in (1, 2) if first == [experts, count * inter, hidden]), None)


def _sizes(weights: torch.Tensor) -> list[int]:
    """The shape of the numbers of weights; MXFP4 has two a byte."""
    *rows, columns = weights.shape
    return [*rows, 2 * columns if weights.dtype == torch.uint8 else columns]


def _dtype_beside(tensor: torch.Tensor) -> torch.dtype:
    """Of numbers of 16 bits beside these."""
    return torch.bfloat16 if tensor.element_size() == 1 else tensor.dtype


def _check_tensor(name: str, value: object) -> None:
    if not isinstance(value, torch.Tensor):
        raise ValueError(f"{name}: got {type(value).__name__}, wanted a tensor")
