"""The second product of dense LoRA in fp64, and how far a right kernel can be from it.

For every token t of an adapter l, and every slice s:

    out[t, columns of s] = round(out[t, columns of s] + round(y[s, t]) . B_s[l]^T)     without the old out where it is overwritten

``round`` of y is to the 16 bits of the operands, of the sum to the dtype of ``out``. Rows of other tokens keep their bytes, and
so do other columns. The sum is bounded as in ``lora_shrink``; the old value and the last cast each round once more.
"""

from __future__ import annotations

from typing import Sequence

import torch

from kernelgen.families.lora_shrink.reference import FP32, Expected, dot


def lora_expand(
    out: torch.Tensor,
    y: torch.Tensor,
    lora_b: Sequence[torch.Tensor],
    adapters: Sequence[int | None],
    *,
    offset_start: int,
    add_inputs: bool,
    scaled: bool = False,
    dtype: torch.dtype | None = None,
) -> Expected:
    """The exact output for operands as they are, and the bound on a kernel's error.

    Args:
        out: [T, *], its old values.
        y: [S, T, rank].
        lora_b: S tensors [L, N_s, rank].
        adapters: of each token, None: it has none.
        dtype: that y is rounded to, None: that of ``out``.
        scaled: weights were dequantised; a kernel applies their scales, which are below 2^24, in fp32.
    """
    exact, bound = out.double(), torch.zeros(out.shape, dtype=torch.float64, device=out.device)
    info, rounded = torch.finfo(out.dtype), y.to(dtype or out.dtype)
    for token, adapter in enumerate(adapters):
        begin = offset_start
        for s, b in enumerate(lora_b):
            columns = slice(begin, begin + b.shape[1])
            begin = columns.stop
            if adapter is None:
                continue
            value, error = dot(b[adapter], rounded[s, token], scaled)
            if add_inputs:
                value = value + exact[token, columns]
                error = error + FP32 * (value.abs() + error)
            exact[token, columns] = value
            cast = (value.abs() + error) * (info.eps / 2) + info.smallest_normal * info.eps / 2
            bound[token, columns] = error + cast
    return Expected(exact, bound)
