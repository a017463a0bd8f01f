"""Serving a mixed batch: one prefill of all prompts, then tokens one by one with a key-value cache."""

from __future__ import annotations

import dataclasses
from typing import Any, Callable, Sequence

import torch

from kernelgen.integrations.transformers import MoeCall, MoeLora


@dataclasses.dataclass(frozen=True)
class Request:
    """A prompt [n] and the slot of its adapter, -1: none."""

    adapter: int
    prompt: torch.Tensor


@dataclasses.dataclass(frozen=True)
class Served:
    """What came out of one request of n tokens: its prompt, and the generated ones that were fed back."""

    adapter: int
    ids: torch.Tensor  # [n]
    logits: torch.Tensor  # [n, vocabulary]
    routing: tuple[torch.Tensor, ...]  # [n, top_k] experts, for each layer


@dataclasses.dataclass(frozen=True)
class Step:
    """One forward pass over the padded columns [B, C] of the batch; its tokens in the MoE layers are T = B * C."""

    ids: torch.Tensor  # [B, C]
    fed: torch.Tensor  # [B, C] bool, False: padding
    logits: torch.Tensor  # [B, C, vocabulary]
    mapping: torch.Tensor  # [T] int32, the adapter of each token
    calls: tuple[MoeCall, ...]  # one a layer


@torch.no_grad()
def serve(
    model: Any,
    server: MoeLora,
    requests: Sequence[Request],
    new_tokens: int,
    done: Callable[[], None],
) -> tuple[list[Served], list[Step]]:
    """Serve the requests as one batch, greedily.

    ``done`` is called after each of the ``1 + new_tokens`` forward passes.
    """
    lengths = torch.tensor([len(request.prompt) for request in requests])
    adapters = torch.tensor([request.adapter for request in requests], dtype=torch.int32)
    ids = torch.nn.utils.rnn.pad_sequence([r.prompt for r in requests], batch_first=True)
    fed = torch.arange(ids.shape[1]) < lengths.unsqueeze(1)
    positions = torch.arange(ids.shape[1]).expand_as(ids)
    last = lengths - 1
    mask = fed
    cache = None
    steps: list[Step] = []
    for _ in range(1 + new_tokens):
        mapping = (
            torch.where(fed, adapters.unsqueeze(1), -1).flatten().to(model.device, torch.int32)
        )
        calls: list[MoeCall] = []
        with server.batch(mapping, calls):
            output = model(
                input_ids=ids.to(model.device),
                attention_mask=mask.long().to(model.device),
                position_ids=positions.to(model.device),
                past_key_values=cache,
                use_cache=True,
            )
        cache = output.past_key_values
        steps.append(Step(ids, fed, output.logits, mapping, tuple(calls)))
        ids = output.logits.cpu()[torch.arange(len(requests)), last].argmax(-1, keepdim=True)
        positions = (lengths + len(steps) - 1).unsqueeze(1)
        fed = torch.ones_like(ids, dtype=torch.bool)
        last = torch.zeros_like(lengths)
        mask = torch.cat([mask, fed], dim=1)
        done()
    return [_served(row, request.adapter, steps) for row, request in enumerate(requests)], steps


def _served(row: int, adapter: int, steps: Sequence[Step]) -> Served:
    """One row of the batch, its padding taken out."""

    def join(part: Callable[[Step], torch.Tensor]) -> torch.Tensor:
        tensors = [part(step)[row] for step in steps]
        return torch.cat(
            [t[step.fed[row].to(t.device)] for t, step in zip(tensors, steps, strict=True)]
        )

    def experts(layer: int) -> torch.Tensor:
        return join(lambda step: step.calls[layer].topk_ids.view(*step.ids.shape, -1))

    routing = tuple(experts(layer) for layer in range(len(steps[0].calls)))
    return Served(adapter, join(lambda step: step.ids), join(lambda step: step.logits), routing)
