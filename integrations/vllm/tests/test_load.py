"""Adapters that come and go under load: three of five at a time, on two slots."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny import ATTENTION, Model
from under_load import NAMES, RANKS, come_and_go

pytest.importorskip("vllm")
from test_serving import Engine, check


class Served:
    def __init__(self, model: Model) -> None:
        self.engine = Engine(model, max_cpu_loras=3, block_size=32)
        self.waiting: dict[str, str | None] = {}

    def ask(self, label: str, prompt: list[int], name: str | None) -> None:
        self.waiting[label] = name
        self.engine.add(label, prompt, name, max_tokens=3)

    def turn(self) -> bool:
        for label, output in self.engine.step().items():
            check(self.engine.model, self.waiting.pop(label), output)
        assert bool(self.waiting) == self.engine.engine.has_unfinished_requests()
        return bool(self.waiting)

    def reload(self, name: str) -> None:
        self.engine.engine.remove_lora(self.engine.numbers[name])
        self.engine.engine.add_lora(self.engine.request(name))

    def leave(self) -> None:
        for number in self.engine.numbers.values():
            self.engine.engine.remove_lora(number)


def test_adapters_come_and_go(tmp_path: Path) -> None:
    model = Model(tmp_path, "gpt_oss", torch.float16)
    for i, name in enumerate(NAMES):
        model.adapter(name, RANKS[i], i, (*ATTENTION, "experts"))
    engine = Served(model)
    for name in (None, *NAMES):
        model.logprobs(name, [0])  # the merged models are there before anything is counted
    come_and_go(engine)
