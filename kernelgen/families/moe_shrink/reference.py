"""Rank vectors of a layer with adapters in fp64, and how far a right kernel can be from them.

For every local pair p = t * top_k + j of expert e that has an adapter l, and every slice s:

    v[p, s] = x[from(p)] . A_s[l, e]^T

formed in fp32 as in ``lora_shrink``, and rounded to the dtype of v where v is in the order of the tables. FP8 operands stand for
their numbers times their scales: ``dequantise`` them first.
"""

from __future__ import annotations

from typing import NamedTuple, Sequence

import torch

from kernelgen.families.lora_shrink.reference import dot
from kernelgen.families.moe_align.reference import Local
from kernelgen.families.moe_gemm.reference import cast_error
from kernelgen.families.moe_runs.reference import Adapters


class Expected(NamedTuple):
    """What v should hold, fp64; a right kernel is never further off than ``bound``."""

    value: torch.Tensor  # [num_pairs, S, rank], of "token_token" [T, S, rank]
    bound: torch.Tensor
    written: torch.Tensor  # which of them, bool


def moe_shrink(
    x: torch.Tensor,
    lora_a: Sequence[torch.Tensor],
    order: Sequence[Local],
    adapters: Adapters,
    *,
    num_pairs: int,
    rows: str,
    dtype: torch.dtype,
    scaled: bool = False,
    counted: Sequence[int] | None = None,
) -> Expected:
    """The exact vectors for operands as they are, and the bound on a kernel's error.

    Args:
        x: [T, K] or [num_pairs, K], in the order that ``rows`` names first: "token", "pair" or "sorted".
        lora_a: S tensors [L, E, rank, K].
        order: local pairs in the order of the tables; of "token_token" a pair of each token.
        adapters: of each token.
        rows: "token_sorted", "sorted_sorted", "token_pair", "pair_pair" or "token_token"; those of pairs are not rounded.
        dtype: of v.
        scaled: operands were dequantised; a kernel applies their scales, which are below 2^24, in fp32.
        counted: of each adapter, the ranks that are written; None: all.
    """
    top_k, (reads, writes) = num_pairs // max(len(adapters), 1), rows.split("_")
    shape = (len(adapters) if writes == "token" else num_pairs, len(lora_a), lora_a[0].shape[2])
    value, bound = (torch.zeros(shape, dtype=torch.float64, device=x.device) for _ in range(2))
    written = torch.zeros(shape, dtype=torch.bool)
    for place, (pair, expert) in enumerate(order):
        adapter = adapters[pair // top_k]
        if adapter is None:
            continue
        places = {"token": pair // top_k, "pair": pair, "sorted": place}
        row, to = places[reads], places[writes]
        written[to, :, : None if counted is None else counted[adapter]] = True
        for s, a in enumerate(lora_a):
            total, error = dot(a[adapter, expert], x[row], scaled)
            if writes != "pair":
                error = error + cast_error(total.abs() + error, dtype)
            value[to, s], bound[to, s] = total, error
    return Expected(value, bound, written)
