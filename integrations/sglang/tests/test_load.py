"""Adapters that come and go under load: at most three of five at a time, on two slots."""

from __future__ import annotations

from pathlib import Path

import torch
from engine import Engine
from tiny import ATTENTION, Model
from under_load import NAMES, RANKS, come_and_go

MODULES = {"qkv_proj", "o_proj", "gate_up_proj", "down_proj"}


class Served:
    def __init__(self, model: Model) -> None:
        self.engine = Engine(model, MODULES, max_loras_per_batch=3, max_loaded_loras=3)  # none takes a slot of them
        self.waiting: dict[str, str | None] = {}

    def ask(self, label: str, prompt: list[int], name: str | None) -> None:
        if name is not None and name not in self.engine.refs:
            self._make_room()
            self.engine.load(name)
        self.waiting[label] = name
        self.engine.add(label, prompt, name, max_tokens=3)

    def _make_room(self) -> None:
        """SGLang itself waits for the requests of an adapter that is to leave."""
        while len(self.engine.refs) == 3:
            for name in set(self.engine.refs) - set(self.waiting.values()):
                self.engine.unload(name)
                return
            self.turn()

    def turn(self) -> bool:
        self.engine.step()
        for label in self.engine.finished():
            self.engine.check(label, self.waiting.pop(label))
            del self.engine.requests[label], self.engine.steps[label]
        return bool(self.waiting)

    def reload(self, name: str) -> None:
        if name in self.engine.refs and name not in self.waiting.values():
            self.engine.unload(name)
            self.engine.load(name)

    def leave(self) -> None:
        for name in list(self.engine.refs):
            self.engine.unload(name)


def test_adapters_come_and_go(tmp_path: Path) -> None:
    model = Model(tmp_path, "qwen3_moe", torch.float16)
    for i, name in enumerate(NAMES):
        model.adapter(name, RANKS[i], i, (*ATTENTION, "experts"))
    engine = Served(model)
    try:
        for name in (None, *NAMES):
            model.logprobs(name, [0])  # the merged models are there before anything is counted
        come_and_go(engine)
    finally:
        engine.engine.close()
