"""Whether what was served equals what PEFT computes."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, Callable, Sequence

import torch

from kernelgen.integrations.peft import Adapter
from kernelgen.integrations.transformers import MoeCall, MoeLora

from . import bounds
from .oracle import PeftModels
from .serve import Served, Step

# An implementation may be this much farther from the truth than another one of the same precision (FlashAttention's rule).
_RULE = 2.0


@dataclasses.dataclass(frozen=True)
class Result:
    """One adapter (or none), over all of its requests."""

    adapter: int
    requests: int
    tokens: int
    layer: float  # worst |served - PEFT in float64| / bound of an element of an MoE layer; must not exceed 1
    effect: float  # the most that the adapter moves a logit
    error: float  # worst |served - PEFT in float64| of a logit
    allowed: float  # twice the same for PEFT in the dtype that is served
    top: int  # tokens whose likeliest successor is PEFT's
    ties: int  # tokens where it is not, but by a margin below the error allowed

    @property
    def agrees(self) -> bool:
        """Whether every element and every token is within its bound."""
        return (
            self.layer <= 1.0 and self.error <= self.allowed and self.top + self.ties == self.tokens
        )


class Comparison:
    """PEFT in float64 as the truth, PEFT in the served dtype as the yardstick of whole-model error."""

    def __init__(self, model: Any, adapters: Sequence[Adapter], folders: Sequence[Path]) -> None:
        self._model = model
        self._adapters = adapters
        self._truth = PeftModels(model, folders, torch.float64)
        self._yardstick = PeftModels(model, folders, model.dtype)

    def compare(
        self, slot: int, served: Sequence[Served], steps: Sequence[Step], done: Callable[[], None]
    ) -> Result:
        """One adapter, -1: the requests without any; ``done`` is called after each request and after the layers."""
        mine = [request for request in served if request.adapter == slot]
        effect = error = allowed = 0.0
        top = ties = 0
        for request in mine:
            ids = request.ids.to(request.logits.device)
            truth = self._truth.logits(slot, ids, request.routing)
            bare = self._truth.logits(-1, ids, request.routing)
            yardstick = self._yardstick.logits(slot, ids, request.routing)
            effect = max(effect, _worst(truth - bare))
            error = max(error, _worst(request.logits - truth))
            limit = _RULE * _worst(yardstick - truth)
            allowed = max(allowed, limit)
            choice = request.logits.argmax(-1, keepdim=True)
            margin = truth.max(-1).values - truth.gather(1, choice).squeeze(1)
            top += int((margin == 0).sum())
            ties += int(
                ((margin > 0) & (margin <= 2 * limit)).sum()
            )  # both logits may be off by the limit
            done()
        layer = max(
            self._layer(slot, step.mapping == slot, call) for step in steps for call in step.calls
        )
        done()
        return Result(
            slot, len(mine), sum(len(r.ids) for r in mine), layer, effect, error, allowed, top, ties
        )

    def untouched(self, server: MoeLora, steps: Sequence[Step]) -> bool:
        """Whether tokens without an adapter come out of every MoE layer bit for bit as in a batch without adapters."""
        for step in steps:
            for call in step.calls:
                with torch.no_grad(), server.batch(torch.full_like(step.mapping, -1)):
                    experts = self._model.model.layers[call.layer].mlp.experts
                    alone = experts(call.hidden, call.topk_ids, call.topk_weights)
                rows = step.mapping < 0
                if not torch.equal(alone[rows].view(torch.int16), call.out[rows].view(torch.int16)):
                    return False
        return True

    @torch.no_grad()
    def _layer(self, slot: int, rows: torch.Tensor, call: MoeCall) -> float:
        if not rows.any():
            return 0.0
        mine = MoeCall(call.layer, *(tensor[rows] for tensor in call[1:]))
        experts = self._model.model.layers[call.layer].mlp.experts
        factors = {} if slot < 0 else self._adapters[slot].layers.get(call.layer, {})
        moved = {name: type(f)(*(t.to(rows.device) for t in f)) for name, f in factors.items()}
        bound = bounds.moe_layer(mine, experts.gate_up_proj, experts.down_proj, moved).error
        difference = (mine.out - self._truth.moe_layer(slot, mine)).abs()
        return float((difference / bound).nan_to_num(nan=torch.inf).max())


def _worst(difference: torch.Tensor) -> float:
    return float(difference.abs().nan_to_num(nan=torch.inf).max())
