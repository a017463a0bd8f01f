"""Work on many items in other processes: for functions that cannot be sent to one, and that may end the one they run in."""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import multiprocessing
import os
from concurrent.futures.process import BrokenProcessPool
from typing import Any, Callable, Generator, Hashable, Iterable, Iterator, Sequence, TypeVar

Progress = Callable[[Iterable[Any], int], Iterable[Any]]  # (items as they get done, how many)
_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


def no_progress(items: Iterable[Any], total: int) -> Iterable[Any]:
    """Shows nothing."""
    del total
    return items


@dataclasses.dataclass(frozen=True)
class Fault:
    """Why an item gave no result."""

    reason: str


# What forks work on: they see it as it was when they were made.
_work: tuple[Callable[[Any], Any], Sequence[Any]] = (str, ())


def in_processes(
    function: Callable[[_Item], _Result],
    items: Sequence[_Item],
    workers: int = 1,
    progress: Progress = no_progress,
    keep: Callable[[_Item, _Result | Fault], None] = lambda item, result: None,
    apart: Callable[[_Item], Hashable] = lambda item: None,
) -> list[_Result | Fault]:
    """``function`` of every item, in order; a ``Fault`` where it raised or ended its process. Results must pickle.

    ``keep`` is given each result as soon as it is there, so that an interrupted run need not lose those it has. Items that
    ``apart`` tells from each other never meet in a process.
    """
    global _work
    _work = (function, items)
    results: dict[int, _Result | Fault] = {}
    groups: dict[Hashable, list[int]] = {}
    for index, item in enumerate(items):
        groups.setdefault(apart(item), []).append(index)
    try:
        with contextlib.closing(_results(groups.values(), workers)) as done:
            for index, result in progress(done, len(items)):
                results[index] = result
                keep(items[index], result)
    finally:
        _work = (str, ())
    return [results[index] for index in range(len(items))]


def _results(groups: Iterable[Sequence[int]], workers: int) -> Generator[tuple[int, Any], None, None]:
    """Each item's index with its result, as they come; a group has processes of its own."""
    for group in groups:
        left = set(group)
        with _pool(workers) as pool:
            futures = {pool.submit(_one, index): index for index in group}
            for future in concurrent.futures.as_completed(futures):
                with contextlib.suppress(BrokenProcessPool):
                    result = future.result()
                    left.remove(futures[future])
                    yield futures[future], result
        # A process that ends takes down its pool: what is left is done one by one, to find out which item it was.
        for index in sorted(left):
            with _pool(1) as pool:
                try:
                    result = pool.submit(_one, index).result()
                except BrokenProcessPool:
                    result = Fault("it ended its process")
            yield index, result


@contextlib.contextmanager
def _pool(workers: int) -> Iterator[concurrent.futures.ProcessPoolExecutor]:
    fork = multiprocessing.get_context("fork")
    pool = concurrent.futures.ProcessPoolExecutor(workers, fork)
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)  # leaves something to cancel when interrupted


def _one(index: int) -> Any:
    function, items = _work
    with _quiet():
        try:
            return function(items[index])
        except Exception as error:  # told by the caller, whatever it is
            said = " ".join(str(error).split())
            return Fault(f"{type(error).__name__}: {said[-300:]}")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """What is printed below Python (a compiler's last words) is no use beside the exception."""
    saved, nothing = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 2)
    try:
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(nothing)
