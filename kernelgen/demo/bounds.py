"""A bound on the rounding error of an MoE layer with adapters, element by element.

Running error analysis: every quantity is carried as its exact value and a bound on how far the computed one may be from it,
through the very steps that are served. A constant occurs only where a format or the length of a sum says so.
"""

from __future__ import annotations

from typing import Callable, Mapping, NamedTuple

import torch

from kernelgen.integrations.peft import Factors
from kernelgen.integrations.transformers import MoeCall

_SILU_SLOPE = 1.1  # |d silu(x) / dx| < 1.0999 everywhere


class Approx(NamedTuple):
    """A tensor as computed: |computed - value| <= error, both float64."""

    value: torch.Tensor
    error: torch.Tensor

    @property
    def most(self) -> torch.Tensor:
        """The largest magnitude that the computed value can have."""
        return self.value.abs() + self.error


def exact(value: torch.Tensor) -> Approx:
    """A tensor without error."""
    value = value.double()
    return Approx(value, torch.zeros_like(value))


def rounded(x: Approx, dtype: torch.dtype) -> Approx:
    """After rounding to nearest in ``dtype``, gradual underflow included."""
    info = torch.finfo(dtype)
    half_ulp = info.eps / 2
    return Approx(x.value, x.error + half_ulp * x.most + half_ulp * info.smallest_normal)


def linear(x: Approx, weight: Approx) -> Approx:
    """x . weight^T, accumulated in float32 in any order."""
    growth = 1.0 + _gamma(weight.value.shape[-1])
    error = growth * (x.most @ weight.most.T) - x.value.abs() @ weight.value.abs().T
    return Approx(x.value @ weight.value.T, error)


def product(x: Approx, y: Approx) -> Approx:
    """x * y, rounded to float32."""
    value = x.value * y.value
    return rounded(Approx(value, x.most * y.most - value.abs()), torch.float32)


def total(x: Approx, y: Approx) -> Approx:
    """x + y, rounded to float32."""
    return rounded(Approx(x.value + y.value, x.error + y.error), torch.float32)


def activation(
    x: Approx, function: Callable[[torch.Tensor], torch.Tensor], slope: float, dtype: torch.dtype
) -> Approx:
    """function(x), whose slope is at most ``slope``, faithfully rounded: to a neighbour, so twice the error of the nearest."""
    exact_of_approximate = Approx(function(x.value), slope * x.error)
    return rounded(rounded(exact_of_approximate, dtype), dtype)


def swiglu(gate: Approx, up: Approx, dtype: torch.dtype) -> Approx:
    """silu(gate) * up, each step rounded to ``dtype``."""
    silu = activation(gate, torch.nn.functional.silu, _SILU_SLOPE, dtype)
    return rounded(product(silu, up), dtype)


def lora(x: Approx, factors: Factors, dtype: torch.dtype) -> Approx:
    """(x . a^T) . b^T with the factors stored in ``dtype`` and the intermediate rounded to it."""
    a = rounded(exact(factors.a), dtype)
    b = rounded(rounded(exact(factors.b), torch.float32), dtype)  # scaled in float32, then stored
    return linear(rounded(linear(x, a), dtype), b)


def moe_layer(
    call: MoeCall,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    factors: Mapping[str, Factors],
    gate: Callable[..., Approx] = swiglu,
    biases: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> Approx:
    """The output [T, H] of one MoE layer, all tokens under one adapter.

    Args:
        call: what went in; its activations have the dtype that is served.
        gate_up: [E, 2 * I, H], without a gate [E, I, H], the base weight; down: [E, H, I].
        factors: "gate", "up" and "down" of the adapter, those it has; empty: the base model.
        gate: what is between the two products, of gate and up, or of up alone.
        biases: [E, 2 * I] and [E, H], of both products.
    """
    dtype, (num_tokens, top_k) = call.hidden.dtype, call.topk_ids.shape
    shape = (num_tokens * top_k, down.shape[1])
    out = Approx(
        *(torch.zeros(shape, dtype=torch.float64, device=down.device) for _ in Approx._fields)
    )
    expert_of_pair = call.topk_ids.flatten()
    for expert in torch.unique(expert_of_pair).tolist():
        pairs = (expert_of_pair == expert).nonzero().squeeze(1)
        own = {name: Factors(f.a[expert], f.b[expert]) for name, f in factors.items()}
        x = exact(call.hidden[pairs // top_k])
        weight = exact(call.topk_weights.flatten()[pairs].unsqueeze(1))
        halves = {}
        slices = ("gate", "up") if gate_up.shape[1] == 2 * down.shape[2] else ("up",)
        for index, (name, base) in enumerate(zip(slices, gate_up[expert].chunk(len(slices)), strict=True)):
            halves[name] = rounded(linear(x, exact(base)), dtype)
            if biases is not None:
                bias = biases[0][expert].chunk(len(slices))[index]
                halves[name] = rounded(total(halves[name], exact(bias)), dtype)
            if name in own:
                halves[name] = rounded(total(halves[name], lora(x, own[name], dtype)), dtype)
        inter = gate(*halves.values(), dtype)
        y = rounded(linear(inter, exact(down[expert])), dtype)
        if biases is not None:
            y = rounded(total(y, exact(biases[1][expert])), dtype)
        y = rounded(product(y, weight), dtype)
        if "down" in own:
            y = rounded(total(y, product(lora(inter, own["down"], dtype), weight)), dtype)
        out.value[pairs], out.error[pairs] = y
    pairs_of_token = Approx(*(part.view(num_tokens, top_k, -1) for part in out))
    error = pairs_of_token.error.sum(1) + _gamma(top_k) * pairs_of_token.most.sum(1)
    return rounded(Approx(pairs_of_token.value.sum(1), error), dtype)


def _gamma(terms: int) -> float:
    """Relative growth of a float32 sum of ``terms`` products, whatever its order."""
    half_ulp = torch.finfo(torch.float32).eps / 2
    return terms * half_ulp / (1 - terms * half_ulp)
