"""PEFT's own answer: one sequence at a time, each under its own adapter."""

from __future__ import annotations

import contextlib
import copy
from pathlib import Path
from typing import Any, Callable, Iterator, Sequence

import torch

from kernelgen.integrations.gates import takes_rows
from kernelgen.integrations.transformers import MoeCall, expert_layers


class PeftModels:
    """A model under each of its adapters, as PEFT runs it, in one dtype.

    Top-k routing is a step function: where two experts are closer than rounding, either choice is right, and one choice more
    or less changes everything behind it. So the model is given the experts that were served, and weighs them itself.
    """

    def __init__(self, model: Any, folders: Sequence[Path], dtype: torch.dtype) -> None:
        from peft import PeftModel

        self._names = expert_layers(model)
        self._rows = {layer: takes_rows(model.get_submodule(name)) for layer, name in self._names.items()}

        def load(folder: Path | None) -> Any:
            bare = copy.deepcopy(model).to(dtype)
            bare.set_experts_implementation("eager")  # the only one that knows float64
            if folder is None:
                return bare
            return PeftModel.from_pretrained(bare, str(folder), autocast_adapter_dtype=False).eval()

        self._models = [load(folder) for folder in folders]
        self._bare = load(None)

    @torch.no_grad()
    def logits(
        self, adapter: int, ids: torch.Tensor, routing: Sequence[torch.Tensor]
    ) -> torch.Tensor:
        """Logits [n, vocabulary] of the sequence ``ids`` [n]; ``routing``: [n, top_k] experts of each layer."""
        model = self._model(adapter)
        with _routed(model, routing):
            logits: torch.Tensor = model(input_ids=ids.unsqueeze(0), use_cache=False).logits[0]
            return logits

    @torch.no_grad()
    def moe_layer(self, adapter: int, call: MoeCall) -> torch.Tensor:
        """The output [T, H] of the experts of one layer for the input that was served."""
        experts = _base(self._model(adapter)).get_submodule(self._names[call.layer])
        dtype = next(experts.parameters()).dtype
        routed = call.topk_ids, call.topk_weights.to(dtype)
        out: torch.Tensor = experts(call.hidden.to(dtype), *(() if self._rows[call.layer] else routed))
        return out

    def _model(self, adapter: int) -> Any:
        return self._bare if adapter < 0 else self._models[adapter]


def _base(model: Any) -> Any:
    return model.base_model.model if hasattr(model, "peft_config") else model


@contextlib.contextmanager
def _routed(model: Any, routing: Sequence[torch.Tensor]) -> Iterator[None]:
    """Make the routers take these experts."""

    def choice(ids: torch.Tensor) -> Callable[..., tuple[torch.Tensor, ...]]:
        def choose(
            router: Any, _: Any, output: tuple[torch.Tensor, ...]
        ) -> tuple[torch.Tensor, ...]:
            logits = output[0]
            wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
            weights = wide.softmax(-1).gather(1, ids)
            if getattr(router, "norm_topk_prob", True):
                weights = weights / weights.sum(-1, keepdim=True)
            return logits, weights.to(output[1].dtype), ids

        return choose

    hooks = [
        layer.mlp.gate.register_forward_hook(choice(ids))
        for layer, ids in zip(_base(model).model.layers, routing, strict=True)
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
