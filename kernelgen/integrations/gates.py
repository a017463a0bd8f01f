"""What a model's experts compute between their products: an activation that the kernels have, or none of them."""

from __future__ import annotations

import itertools
from typing import Any, Iterator, NamedTuple

import torch
from torch.nn.functional import gelu


class Activation(NamedTuple):
    """An activation of ``fused_moe``, and the numbers that come with it."""

    activation: str
    limit: float | None = None
    alpha: float | None = None
    beta: float | None = None

    def of(self, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        """What it makes of a gate and the linear half; without a gate, of the former."""
        if self.activation == "relu2":
            return gate.relu().square()
        if self.limit is not None and self.alpha is not None and self.beta is not None:
            gate, up = gate.clamp(max=self.limit), up.clamp(-self.limit, self.limit)
            return gate * torch.sigmoid(self.alpha * gate) * (up + self.beta)
        if self.activation in ("silu", "gelu", "gelu_tanh"):
            up = torch.ones_like(gate)
        if self.activation in ("silu", "swiglu"):
            return gate * torch.sigmoid(gate) * up
        return gelu(gate, approximate="tanh" if self.activation.endswith("tanh") else "none") * up


def activation_of(experts: Any) -> Activation | None:
    """The activation between the products of experts, of a gate before its linear half, or of up alone.

    None: none that the kernels have.

    It is not told by names, but found by what becomes of numbers, in float64: of gates and ups of every size that float32 has, of
    either sign, so that a limit shows wherever it is.
    """
    sizes = 2.0 ** torch.arange(-12, 127, 0.25, dtype=torch.float64)
    few = torch.cat([torch.linspace(-12, 12, 97, dtype=torch.float64), sizes[::8], -sizes[::8]])
    pairs = [torch.cartesian_prod(few, few), *(torch.stack([s * sizes, t * sizes.flip(0)], 1) for s in (1, -1) for t in (1, -1))]
    gate, up = torch.cat([*pairs, torch.stack([sizes, torch.ones_like(sizes)], 1)]).unbind(1)
    try:
        with torch.no_grad():
            found = between(experts, torch.stack([gate, up], 1) if has_gate(experts) else gate[:, None])[:, 0]
    except (AttributeError, IndexError, RuntimeError, TypeError, ValueError):
        return None
    return next((one for one in _candidates(experts) if _same(found, one.of(gate, up))), None)


def between(experts: Any, rows: torch.Tensor) -> torch.Tensor:
    """What a model's own experts make of the rows of their first product."""
    if takes_rows(experts):
        gate, up = rows.chunk(2, -1)
        return up * experts.act_fn(gate)  # type: ignore[no-any-return]
    return experts._apply_gate(rows) if has_gate(experts) else experts.act_fn(rows)  # type: ignore[no-any-return]


def takes_rows(experts: Any) -> bool:
    """Whether their forward takes weighted tokens, all for each expert, and nothing else."""
    return type(experts).__name__ == "Llama4TextExperts"


def has_gate(experts: Any) -> bool:
    """Whether the first product of experts has a gate beside the linear half."""
    return bool(getattr(experts, "has_gate", True))


def _candidates(experts: Any) -> Iterator[Activation]:
    if not has_gate(experts):
        yield from map(Activation, ("relu2", "silu", "gelu", "gelu_tanh"))
        return
    yield from map(Activation, ("swiglu", "geglu", "geglu_tanh"))

    def numbers(*names: str) -> list[float]:
        found = (getattr(experts, name, None) for name in names)
        return [float(number) for number in found if isinstance(number, (int, float))]

    for limit, alpha in itertools.product(numbers("limit", "swiglu_limit"), [1.0, *numbers("alpha", "swiglu_alpha")]):
        yield from (Activation("swiglu_clamp", limit, alpha, beta) for beta in (0.0, 1.0))


def _same(found: torch.Tensor, wanted: torch.Tensor) -> bool:
    return found.dtype == wanted.dtype and found.shape == wanted.shape and torch.allclose(found, wanted, rtol=1e-9, atol=1e-12)
