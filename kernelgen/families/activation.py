"""The activation between the two projections of an expert in fp64, and how far a right kernel can be from it.

    relu2: relu(x) ** 2         swiglu:       silu(gate) * up
    silu:  x * sigmoid(x)       swiglu_clamp: g * sigmoid(alpha * g) * (u + beta), g = min(gate, limit),
    gelu, gelu_tanh                           u = max(-limit, min(up, limit))
                                geglu, geglu_tanh: gelu(gate) * up

gelu(x) is x * (1 + erf(x / sqrt(2))) / 2, and by tanh x * sigmoid(2 * sqrt(2 / pi) * (x + 0.044715 * x ** 3)). The constants are
the nearest numbers of float32, as a kernel has them.

The bound. What is clamped is no further off than it was. An operation rounds once, to 2^-23 where it truncates; exp is off by 4
units and by one for each unit of its argument, and by what its argument is off; a quotient by 2; erf by 4.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from kernelgen.core.model import VOCABULARY

_FP32 = 2.0**-23  # relative error of an fp32 operation that truncates
_FP32_TINY = 2.0**-149  # and its absolute error where it underflows
_SLOPE = 1.13  # the largest there is: of gelu; of silu, whatever alpha, 1.1
_TINY = 2.0**-118  # what is left of x * sigmoid(u) where exp overflows
_ROOT, _TWICE, _CUBE = (float(torch.tensor(c, dtype=torch.float32)) for c in (0.5**0.5, 1.5957691216057308, 0.044715))


class Clamp(NamedTuple):
    """The numbers of swiglu_clamp, as a kernel takes them."""

    limit: float
    alpha: float = 1.0
    beta: float = 0.0

    @property
    def given(self) -> dict[str, float]:
        """The arguments of a call."""
        return self._asdict()


OSS = Clamp(7.0, 1.702, 1.0)  # of gpt-oss
LOW = Clamp(0.75, 1.702, 1.0)  # which some sums of every case are beyond
OTHER = Clamp(3.5, 0.625, -0.5)  # of no model


def slices(epilogue: str) -> int:
    """Of the first projection: the gate and up, or the one that there is."""
    return int(VOCABULARY["epilogue"][epilogue]["slices"] or 1)


def clamp_of(epilogue: str, clamp: Clamp = LOW) -> Clamp | None:
    """``clamp`` where the activation has one."""
    return clamp if VOCABULARY["epilogue"][epilogue]["clamped"] else None


def activate(
    value: torch.Tensor, error: torch.Tensor, epilogue: str, clamp: Clamp | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """What sums [.., slices * N] that are off by ``error`` become, and how far that is off."""
    facts = VOCABULARY["epilogue"][epilogue]
    if facts["act"] is None:
        return value, error
    if facts["act"] == "relu2":
        value = value.clamp(min=0.0)
        square = value * value
        return square, (2 * value + error) * error + _FP32 * (value + error) ** 2 + _FP32_TINY
    if not facts["gated"]:
        return _act(value, error, str(facts["act"]))
    (gate, up), (gate_error, up_error) = value.chunk(2), error.chunk(2)
    alpha = 1.0
    if clamp is not None:
        limit, alpha, beta = (float(torch.tensor(number, dtype=torch.float32)) for number in clamp)
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit) + beta
        up_error = up_error + _FP32 * (up.abs() + up_error)
    act, act_error = _act(gate, gate_error, str(facts["act"]), alpha)
    product = act * up
    apart = act.abs() * up_error + (up.abs() + up_error) * act_error
    return product, apart + _FP32 * (product.abs() + apart) + _FP32_TINY


def _act(x: torch.Tensor, error: torch.Tensor, act: str, alpha: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    moved = _SLOPE * error
    if act == "gelu":
        value = 0.5 * x * (1.0 + torch.erf(_ROOT * x))
        return value, moved + 8 * _FP32 * (x.abs() + error) + _TINY  # where erf is near -1 that is all there is
    if act == "silu":
        inside, roundings = alpha * x, 1.0
    else:
        inside, roundings = _TWICE * (x + _CUBE * x * x * x), 6.0
    value = x * torch.sigmoid(inside)
    off = roundings * inside.abs() + 8
    return value, moved + off * _FP32 * (value.abs() + moved) + _TINY
