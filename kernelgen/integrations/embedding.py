"""LoRA adapters on an embedding: the first product is a look-up, as a token is a 1 among zeros."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch

from .peft import LinearBuffers


def embedding_lora(
    kernels: ModuleType,
    out: torch.Tensor,
    ids: torch.Tensor,
    layer: LinearBuffers,
    token_lora_mapping: torch.Tensor,
    route: Any,
    scale: float = 1.0,
) -> None:
    """Add the adapters of a batch to what the base embedding gave: out[t] += scale * B[l] . A[l][:, ids[t]]; on the device only.

    Args:
        kernels: the generated package, under whatever name it was imported.
        out: [T, H], rows of tokens without an adapter keep their bytes.
        ids: [T] int32 or int64, tokens.
        layer: of the embedding, from ``stack_linears`` or ``AdapterSlots``: one slice.
        token_lora_mapping: [T] int32, the adapter of each token, -1: none.
        route: of that mapping, from the package's ``lora_route``.
        scale: by which the base embedding multiplies its rows, as those of Gemma do.

    Raises:
        ValueError: something does not fit; ``out`` is as it was.
    """
    if len(layer.a) != 1 or ids.shape != token_lora_mapping.shape or ids.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"ids, layer: got {ids.dtype} {list(ids.shape)} and {len(layer.a)} slices, wanted int32 or int64 "
            f"{list(token_lora_mapping.shape)}, as token_lora_mapping, and one slice"
        )
    y = layer.a[0][token_lora_mapping.clamp(0, len(layer.a[0]) - 1), :, ids]
    kernels.lora_expand(out, scale * y.float()[None], layer.b, route, offset_start=layer.offset_start)
