"""Rows as FP8 numbers and fp32 scales, in plain torch: every number and scale is exact, for there is one rounding at a time.

    scale = fp32(max |x| / largest)     of the finite numbers that share it; 1 where all are zero
    code  = fp8(fp32(x * fp32(1 / scale)))        to nearest, even in the middle; saturated; NaN stays NaN
"""

from __future__ import annotations

import torch

_SMALLEST = torch.finfo(torch.float32).tiny


def moe_quant(
    x: torch.Tensor, width: int, dtype: torch.dtype, given: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes [rows, N] in ``dtype`` and scales [rows, ceil(N / width)] of x [rows, N].

    Args:
        width: columns that share a scale.
        dtype: float8_e4m3fn or float8_e5m2.
        given: a scale for each row, [rows]; None: they are found.
    """
    columns = x.shape[1]
    largest = torch.finfo(dtype).max
    codes, scales = [], []
    for start in range(0, columns, width):
        part = x[:, start : start + width].double()
        highest = part.abs().where(part.isfinite(), 0.0).amax(1, keepdim=True)
        scale = (highest / largest).float().clamp(min=_SMALLEST).where(highest > 0, 1.0)
        if given is not None:
            scale = given[:, None]
        inverse = (1.0 / scale.double()).float()
        code = (part * inverse.double()).float().clamp(-largest, largest)
        codes.append(code.to(dtype))
        scales.append(scale)
    return torch.cat([code.float() for code in codes], 1).to(dtype), torch.cat(scales, 1)
