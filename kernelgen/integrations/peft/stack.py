"""Several adapters, side by side."""

from __future__ import annotations

from typing import Mapping, Sequence

import torch

from .adapter import (
    Adapter,
    AdapterError,
    ExpertShape,
    Factors,
    LayerBuffers,
    SliceBuffers,
    checked_shape,
)

_MOST = 1 << 20  # adapters, or their rank


def stack_adapters(
    adapters: Sequence[Adapter],
    shape: ExpertShape,
    *,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    rank: int | None = None,
    max_loras: int | None = None,
) -> dict[int, LayerBuffers]:
    """The buffers of every layer that some adapter changes; adapter l of ``adapters`` is slot l.

    Smaller ranks are padded with zeros. Where no adapter has an ``a`` of its own for gate and for up (the fused layout),
    both slices share one tensor; where in every adapter all experts share a factor, its buffer has a stride of 0 over E.

    Args:
        dtype: bfloat16 or float16, that of the activations; or float32, float64.
        rank: rank of the buffers; None: the largest of the adapters, rounded up to 8 so that rows stay 16-byte aligned.
        max_loras: slots L; None: as many as adapters. Slots without an adapter are zero and disabled.

    Raises:
        AdapterError: an adapter has a larger rank than the buffers, or there are more adapters than slots, or an adapter is of
            other experts than ``shape``, or its numbers are too large or too small for ``dtype``.
        ValueError: an argument is none of those named here.
    """
    if dtype not in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        raise ValueError(f"dtype: got {dtype}, wanted bfloat16, float16, float32 or float64")
    for name, number in (("rank", rank), ("max_loras", max_loras)):
        if number is not None and (type(number) is not int or not 0 < number <= _MOST):
            raise ValueError(
                f"{name}: got {number!r}, wanted a whole number from 1 to {_MOST}, or None"
            )
    shape = checked_shape(shape)
    if not isinstance(adapters, (list, tuple)) or not all(isinstance(a, Adapter) for a in adapters):
        raise ValueError(
            f"adapters: got {_kinds(adapters)}, wanted a list of what read_adapter returns"
        )
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, TypeError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(
            f"device: got {device!r}, wanted one that torch can use here ({reason})"
        ) from None
    if torch.empty(0, device=device).is_meta:
        raise ValueError("device: got meta, wanted one that holds numbers")
    for adapter in adapters:
        _check(adapter, shape)
    widest = max((adapter.rank for adapter in adapters), default=0)
    rank = max(8, -(-widest // 8) * 8) if rank is None else rank
    slots = len(adapters) if max_loras is None else max_loras
    if len(adapters) > slots or widest > rank:
        raise AdapterError(
            f"got {len(adapters)} adapters of rank up to {widest}, wanted at most {slots} of rank up to {rank}"
        )

    def stack(layer: int, name: str, side: str) -> torch.Tensor:
        wide, tall = shape.widths(name)
        size = (rank, wide) if side == "a" else (tall, rank)
        sources = {
            slot: getattr(adapter.layers[layer][name], side)
            for slot, adapter in enumerate(adapters)
            if name in adapter.layers.get(layer, {})
        }
        shared = bool(sources) and all(source.stride(0) == 0 for source in sources.values())
        buffer = torch.zeros(
            slots, 1 if shared else shape.num_experts, *size, dtype=dtype, device=device
        )
        for slot, source in sources.items():
            source = source[:1] if shared else source
            stored = source.detach().to(device, dtype)
            lost = source.flatten(1).any(1) & ~stored.flatten(1).any(1).cpu()  # of an expert
            if not stored.isfinite().all() or lost.any():
                largest = source[lost].abs().max() if lost.any() else source.abs().max()
                raise AdapterError(
                    f"{adapters[slot].name}: layer {layer}, {name}, {side}: got numbers up to {largest:g}, scaling "
                    f"included, wanted numbers that {dtype} can hold\n  hint: torch.bfloat16 has the range of float32"
                )
            buffer[slot, :, : source.shape[1], : source.shape[2]] = stored
        return buffer.expand(-1, shape.num_experts, -1, -1)

    def buffers(layer: int) -> LayerBuffers:
        parts = [adapter.layers.get(layer, {}) for adapter in adapters]
        shared = all(
            p["gate"].a is p["up"].a if "gate" in p and "up" in p else not p.keys() & {"gate", "up"}
            for p in parts
        )
        gate_a = stack(layer, "gate", "a")
        up_a = gate_a if shared else stack(layer, "up", "a")
        enabled, ranks = (torch.zeros(slots, dtype=torch.int32) for _ in range(2))
        enabled[: len(parts)] = torch.tensor([bool(p) for p in parts], dtype=torch.int32)
        of_adapters = [max((factors.a.shape[1] for factors in p.values()), default=0) for p in parts]
        ranks[: len(parts)] = torch.tensor(of_adapters, dtype=torch.int32)
        return LayerBuffers(
            SliceBuffers((gate_a, up_a), (stack(layer, "gate", "b"), stack(layer, "up", "b"))),
            SliceBuffers((stack(layer, "down", "a"),), (stack(layer, "down", "b"),)),
            enabled.to(device),
            ranks.to(device) if any(-(-r // 16) < -(-rank // 16) for r in of_adapters) else None,
        )

    return {
        layer: buffers(layer)
        for layer in sorted({i for adapter in adapters for i in adapter.layers})
    }


def _kinds(adapters: object) -> str:
    kinds = [adapters] if not isinstance(adapters, (list, tuple)) else adapters
    return ", ".join(dict.fromkeys(type(one).__name__ for one in kinds))


def _check(adapter: Adapter, shape: ExpertShape) -> None:
    """Adapters may be made by hand, too."""
    layers = adapter.layers if isinstance(adapter.layers, Mapping) else {None: adapter.layers}
    for layer, parts in layers.items():
        if type(layer) is not int or not isinstance(parts, Mapping):
            raise AdapterError(
                f"{adapter.name}: layers: got {layer!r}: {type(parts).__name__}, wanted the number of a layer and its parts"
            )
        for name, factors in parts.items():
            where = f"{adapter.name}: layer {layer}, {name}: got"
            if name not in ("gate", "up", "down"):
                raise AdapterError(f"{where} a part that is not known, wanted gate, up or down")
            found = factors if isinstance(factors, Factors) else (factors,)
            if len(found) != 2 or not all(
                isinstance(factor, torch.Tensor) and factor.is_floating_point() for factor in found
            ):
                kinds = ", ".join(str(getattr(f, "dtype", type(f).__name__)) for f in found)
                raise AdapterError(f"{where} {kinds}, wanted Factors of floating-point numbers")
            (a, b), (wide, tall) = factors, shape.widths(name)
            r = b.shape[-1] if b.dim() else None
            if (*a.shape, *b.shape) != (shape.num_experts, r, wide, shape.num_experts, tall, r):
                raise AdapterError(
                    f"{where} factors {list(a.shape)} and {list(b.shape)}, wanted those of {shape}"
                )
            if a.is_meta or b.is_meta:
                raise AdapterError(f"{where} factors on meta, wanted numbers")
