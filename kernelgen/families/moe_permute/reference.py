"""Rows of tokens in the order of tables, in plain torch.

    out[i] = x[t] for the pair p = t * top_k + j at place i
"""

from __future__ import annotations

from collections.abc import Sequence

import torch


def moe_permute(x: torch.Tensor, pairs: Sequence[int], top_k: int) -> torch.Tensor:
    """Row pairs[i] // top_k of x, for each i."""
    return x[[pair // top_k for pair in pairs]]
