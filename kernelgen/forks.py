"""Work on many items in other processes: for functions that cannot be sent to one, and that may end the one they run in."""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import multiprocessing
import os
from concurrent.futures.process import BrokenProcessPool
from typing import Any, Callable, Iterable, Iterator, Sequence, TypeVar

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
) -> list[_Result | Fault]:
    """``function`` of every item, in order; a ``Fault`` where it raised or ended its process. Results must pickle.

    ``keep`` is given each result as soon as it is there, so that an interrupted run need not lose those it has.
    """
    global _work
    _work = (function, items)
    results: dict[int, _Result | Fault] = {}

    def take(index: int, result: _Result | Fault) -> None:
        results[index] = result
        keep(items[index], result)

    try:
        with _pool(workers) as pool:
            futures = {pool.submit(_one, index): index for index in range(len(items))}
            for future in progress(concurrent.futures.as_completed(futures), len(items)):
                with contextlib.suppress(BrokenProcessPool):
                    take(futures[future], future.result())
        # A process that ends takes down its pool: what is left is done one by one, to find out which item it was.
        for index in sorted(set(range(len(items))) - results.keys()):
            try:
                with _pool(1) as pool:
                    take(index, pool.submit(_one, index).result())
            except BrokenProcessPool:
                take(index, Fault("it ended its process"))
    finally:
        _work = (str, ())
    return [results[index] for index in range(len(items))]


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
