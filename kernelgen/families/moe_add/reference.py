"""out[p] + delta[p] for live pairs, a base product and a LoRA delta, in fp64; with the bound of one fp32 sum and a cast."""

from __future__ import annotations

from typing import Sequence

import torch

from kernelgen.families.moe_gemm.reference import Expected, cast_error
from kernelgen.families.moe_route.reference import Live


def moe_add(out: torch.Tensor, delta: torch.Tensor, live: Sequence[Live]) -> Expected:
    """The rows of live pairs; ``out`` and ``delta`` [T, top_k, N], rows counted as pairs."""
    rows = torch.tensor([item.pair for item in live], dtype=torch.int64)
    total = out.flatten(0, 1)[rows].double() + delta.flatten(0, 1)[rows].double()
    error = 2.0**-23 * total.abs()
    return Expected(rows, total, error + cast_error(total.abs() + error, out.dtype))
