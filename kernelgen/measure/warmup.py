"""Compiling ahead of the timing, in worker processes that share Triton's cache on disk."""

from __future__ import annotations

import functools
import itertools
import os
from typing import Any, Callable, Sequence

from kernelgen.core.processes import in_processes
from kernelgen.measure.suite import Cell

Load = Callable[[str], Any]
_Group = tuple[str, Sequence[Cell]]  # an implementation, and cells of one model


def compile_all(suite: str, todo: Sequence[tuple[Cell, str]], load: Load, workers: int, on_done: Callable[[], None]) -> None:
    """Compile what each (cell, implementation) needs; ``load`` makes an implementation from its name, in a worker.

    A worker that dies leaves its cells to be compiled when they are timed. ``on_done`` is called once for each.
    """
    # What shares weights stays together.
    groups = [(name, [cell for cell, _ in cells]) for (name, *_), cells in itertools.groupby(todo, _shared)]

    def keep(group: _Group, _: object) -> None:
        for _cell in group[1]:
            on_done()

    in_processes(functools.partial(_compile, suite, load), groups, workers, keep=keep, method="spawn")


def _shared(item: tuple[Cell, str]) -> tuple[Any, ...]:
    cell, name = item
    return name, cell.model, cell.site, getattr(cell, "rank", None), getattr(cell, "slots", None)


def _compile(suite: str, load: Load, group: _Group) -> None:
    import torch

    from kernelgen.measure import implementations
    from kernelgen.measure.runner import ContextLost, warm

    name, cells = group
    try:
        loaded = _loaded(load, name)
        warm(cells, implementations.workload(suite, torch.device("cuda"), 1, loaded.release), loaded)
    except ContextLost:
        os._exit(1)  # the next group gets a new process


@functools.cache
def _loaded(load: Load, name: str) -> Any:
    return load(name)
