"""Adapters that come and go under load, for as long as is asked for: every answer is right, and nothing is left behind."""

from __future__ import annotations

import gc
import os
import random
import time
from pathlib import Path

import psutil
import pytest
import torch
from tiny import ATTENTION, Model, prompt

pytest.importorskip("vllm")
from test_serving import Engine, check

MINUTES = float(os.environ.get("KERNELGEN_LOAD_MINUTES", "0"))
ROUNDS = 3  # at least


def live() -> tuple[int, int]:
    """Pieces of memory that tensors lie in, and their bytes; routes of every number of rows that there was are views of one."""
    gc.collect()
    kinds = (torch.Tensor, torch.nn.Parameter)  # and no stand-ins of torch.compile
    tensors = [thing for thing in gc.get_objects() if type(thing) in kinds and thing.device.type == "cpu"]
    pieces = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return len(pieces), sum(pieces.values())


def test_adapters_come_and_go(tmp_path: Path) -> None:
    """Three of five at a time, on two slots. A round ends with none, and leaves what the last one did: tensors, and memory."""
    model, names, chance = Model(tmp_path, "gpt_oss", torch.float16), "abcde", random.Random(0)
    for i, name in enumerate(names):
        model.adapter(name, (8, 16, 4)[i % 3], i, (*ATTENTION, "experts"))
    engine = Engine(model, max_cpu_loras=3, block_size=32)
    for name in (None, *names):
        model.logprobs(name, [0])  # the merged models are there before anything is counted
    levels, sizes, begin, asked = [], [], time.monotonic(), 0
    while len(levels) < ROUNDS or time.monotonic() - begin < 60 * MINUTES:
        waiting: dict[str, str | None] = {}
        for wave in range(3):
            for name in (*chance.sample(names, 2), None):
                waiting[label := f"request {asked}"] = name
                engine.add(label, prompt(asked, chance.choice((3, 9))), name, max_tokens=3)
                asked += 1
            for _ in range(2):
                for label, output in engine.step().items():
                    check(model, waiting.pop(label), output)
            if wave == 1:  # under requests that wait for one
                engine.engine.remove_lora(engine.numbers[chance.choice(names)])
                engine.engine.add_lora(engine.request(chance.choice(names)))
        while engine.engine.has_unfinished_requests():
            for label, output in engine.step().items():
                check(model, waiting.pop(label), output)
        assert not waiting
        del output
        for number in engine.numbers.values():
            engine.engine.remove_lora(number)
        levels.append(live())
        sizes.append(psutil.Process().memory_info().rss)
    assert levels[1:] == levels[1:2] * len(levels[1:]), levels
    if MINUTES:
        third = len(sizes) // 3
        assert max(sizes[-third:]) < 1.02 * max(sizes[third:-third]), sizes
    print(f"{asked} requests in {len(levels)} rounds; tensors' memory {levels[-1]}; MiB {sizes[1] >> 20} to {sizes[-1] >> 20}")
