"""MXFP4, as the OCP Microscaling specification v1.0 has it: 32 numbers of a row, of four bits each, share a scale.

A number is e2m1, a sign bit over 0, 0.5, 1, 1.5, 2, 3, 4 or 6; a byte has two, of which the lower bits come first. A scale is
e8m0, a byte b that is 2 ** (b - 127), and NaN for 255: then all 32 are NaN. What a number stands for has two digits and the
exponents of float32, so bfloat16 holds it exactly; beyond 2 ** 128 it is infinite in both.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NoReturn

import torch
import triton
import triton.language as tl

from . import _runtime as runtime

GROUP = 32  # numbers of a row that share a scale
SCALES = (torch.uint8, torch.float8_e8m0fnu)  # what scales are made of


def scale_shape(codes: Sequence[int]) -> tuple[int, ...]:
    """The shape of the scales of codes [..., rows, columns / 2]."""
    *rows, half = codes
    return (*rows, runtime.cdiv(2 * half, GROUP))


def fits(scale: Sequence[int], codes: torch.Tensor) -> bool:
    """Whether scales of a shape are those of weights, and these are codes."""
    return codes.dtype == torch.uint8 and tuple(scale) == scale_shape(codes.shape)


def check_codes(variant: str, label: str, codes: torch.Tensor) -> None:
    """Raise ValueError unless these are codes of whole groups."""
    columns = 2 * codes.shape[-1]
    if codes.dtype != torch.uint8:
        wanted = f"{[*codes.shape[:-1], codes.shape[-1] // 2]} uint8, two numbers a byte"
        runtime.fail(variant, label, runtime.describe(codes), wanted, "quantize_mxfp4 makes such tensors")
    if columns % GROUP:
        wanted = f"a multiple of {GROUP} columns"
        runtime.fail(variant, label, f"{columns} columns, {runtime.describe(codes)}", wanted, "so many share a scale")


def refuse_scale(variant: str, label: str, scale: torch.Tensor | None, codes: torch.Tensor) -> NoReturn:
    """Raise ValueError: these are not the scales of codes."""
    wanted = f"{list(scale_shape(codes.shape))} uint8 or float8_e8m0fnu on {codes.device}, contiguous behind E"
    runtime.fail(variant, label, None if scale is None else runtime.describe(scale), wanted, f"a scale for {GROUP} columns")


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def scale_as_bf16(scale: tl.tensor) -> tl.tensor:
    """Scales that were loaded, bytes, in bfloat16, which holds all of them; 255 is NaN, 0 is below the normal numbers."""
    byte = scale.to(tl.int32)
    bits = tl.maximum(byte << 7, 1 << 6) | ((byte + 1) >> 8 << 6)
    return bits.to(tl.int16).to(tl.bfloat16, bitcast=True)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def as_bf16(codes: tl.tensor, scale: tl.tensor) -> tl.tensor:
    """What codes [rows, columns / 2] and their scales [rows, columns / 32], in bfloat16, stand for: [rows, columns]."""
    # Bits go to their places two at a time, which two products do for a byte at once: sign to 15, and the others to 8, 7 and 6,
    # where they are the number times 2 ** -126, 0.5 below the normal numbers as it is in e2m1. Each product is exact.
    byte = codes.to(tl.uint32)
    both = ((byte * 0x01001000) & 0x80008000) | ((byte * 0x00040040) & 0x01C001C0)
    low = both.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    high = (both >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    numbers = tl.join(low, high).reshape(scale.shape[0], scale.shape[1], 32)
    numbers = numbers * 8.507059173023462e37 * scale[:, :, None]  # 2 ** 126
    return numbers.reshape(scale.shape[0], scale.shape[1] * 32)
