"""Compiling ahead of the timing, in worker processes that share Triton's cache on disk."""

from __future__ import annotations

import itertools
import multiprocessing
import queue
from typing import Any, Callable, Sequence

from kernelgen.measure.workloads import Cell

Load = Callable[[str], Any]


def compile_all(
    todo: Sequence[tuple[Cell, str]],
    load: Load,
    workers: int,
    on_done: Callable[[], None],
) -> None:
    """Compile what each (cell, implementation) needs; ``load`` makes an implementation from its name, in a worker.

    A worker that dies leaves its cells to be compiled when they are timed. ``on_done`` is called once for each.
    """
    context = multiprocessing.get_context("spawn")
    groups: Any = context.Queue()
    done: Any = context.Queue()
    # What shares weights stays together.
    for (name, *_), group in itertools.groupby(todo, _shared):
        groups.put((name, [cell for cell, _ in group]))
    for _ in range(workers):
        groups.put(None)
    processes = [
        context.Process(target=_worker, args=(groups, load, done), daemon=True)
        for _ in range(workers)
    ]
    for process in processes:
        process.start()
    while any(process.is_alive() for process in processes) or not done.empty():
        try:
            done.get(timeout=0.2)
        except queue.Empty:
            continue
        on_done()


def _shared(item: tuple[Cell, str]) -> tuple[Any, ...]:
    cell, name = item
    return name, cell.model, cell.slots, cell.rank, cell.site


def _worker(groups: Any, load: Load, done: Any) -> None:
    import torch

    from kernelgen.measure.runner import ContextLost, warm

    loaded: dict[str, Any] = {}
    while (group := groups.get()) is not None:
        name, cells = group
        if name not in loaded:
            loaded[name] = load(name)
        try:
            warm(cells, loaded[name], torch.device("cuda"), lambda: done.put(None))
        except ContextLost:
            return
