"""Adapters that come and go under load, for as long as is asked for: every answer is right, and nothing is left behind."""

from __future__ import annotations

import gc
import os
import random
import time
from typing import Protocol

import psutil
import torch
from tiny import prompt

__all__ = ["NAMES", "RANKS", "Served", "come_and_go"]

MINUTES = float(os.environ.get("KERNELGEN_LOAD_MINUTES", "0"))
ROUNDS = 3  # at least
NAMES = "abcde"
RANKS = (8, 16, 4, 8, 16)


class Served(Protocol):
    """An engine over a model with the adapters ``NAMES``."""

    def ask(self, label: str, prompt: list[int], name: str | None) -> None:
        """A request of an adapter, which is loaded if it is not."""

    def turn(self) -> bool:
        """A step; requests that it finished are right. Whether requests are left."""

    def reload(self, name: str) -> None:
        """Have an adapter leave and come again, where the engine lets it."""

    def leave(self) -> None:
        """Have all adapters leave."""


def live() -> tuple[int, int]:
    """Pieces of memory that tensors lie in, and their bytes; routes of every number of rows that there was are views of one."""
    gc.collect()
    kinds = (torch.Tensor, torch.nn.Parameter)  # and no stand-ins of torch.compile
    tensors = [thing for thing in gc.get_objects() if type(thing) in kinds and thing.device.type == "cpu"]
    pieces = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return len(pieces), sum(pieces.values())


def come_and_go(engine: Served) -> None:
    """Waves of requests of two adapters and of none. A round ends with no adapter, and leaves what the last one did."""
    chance, begin, asked = random.Random(0), time.monotonic(), 0
    levels: list[tuple[int, int]] = []
    sizes: list[int] = []
    while len(levels) < ROUNDS or time.monotonic() - begin < 60 * MINUTES:
        for wave in range(3):
            for name in (*chance.sample(NAMES, 2), None):
                engine.ask(f"request {asked}", prompt(asked, chance.choice((3, 9))), name)
                asked += 1
            for _ in range(2):
                engine.turn()
            if wave == 1:  # under requests that wait for one
                engine.reload(chance.choice(NAMES))
        while engine.turn():
            pass
        engine.ask("the last of a round", prompt(0, 3), None)  # as engines keep what was in their last batch
        while engine.turn():
            pass
        engine.leave()
        levels.append(live())
        sizes.append(psutil.Process().memory_info().rss)
    assert levels[1:] == levels[1:2] * len(levels[1:]), levels
    if MINUTES:
        third = len(sizes) // 3
        assert max(sizes[-third:]) < 1.02 * max(sizes[third:-third]), sizes
    print(f"{asked} requests in {len(levels)} rounds; tensors' memory {levels[-1]}; MiB {sizes[1] >> 20} to {sizes[-1] >> 20}")
