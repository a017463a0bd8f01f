"""The first product of MoE-LoRA in fp64, and how far a right kernel can be from it.

For every live pair p = t * top_k + j, of adapter l and expert e, and every slice s:

    y[s, p] = x[row(p)] . A_s[l, e]^T                  row(p) is t, or p where x has a row a pair

in fp32; y of every other pair is 0. The bound is that of the sum, as in ``lora_shrink``.
"""

from __future__ import annotations

from typing import Sequence

import torch

from kernelgen.families.lora_shrink.reference import Expected, dot
from kernelgen.families.moe_route.reference import Live


def moe_lora_shrink(
    x: torch.Tensor, lora_a: Sequence[torch.Tensor], live: Sequence[Live], *, num_pairs: int
) -> Expected:
    """The exact rank vectors [S, num_pairs, rank] for operands as they are, and the bound on a kernel's error.

    Args:
        x: [T, K], or [num_pairs, K].
        lora_a: S tensors [L, E, rank, K].
        live: from ``live_pairs``.
    """
    shape = (len(lora_a), num_pairs, lora_a[0].shape[2])
    value, bound = (torch.zeros(shape, dtype=torch.float64, device=x.device) for _ in range(2))
    for pair, adapter, expert in live:
        for s, a in enumerate(lora_a):
            row = x[pair // (num_pairs // x.shape[0])]
            value[s, pair], bound[s, pair] = dot(a[adapter, expert], row, scaled=False)
    return Expected(value, bound)
