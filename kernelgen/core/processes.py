"""Other processes, which end with this one, and work on many items in them: for functions that may end the process they run in.

An interrupt does not reach them: this process decides. Each leads a process group of its own, so that it ends with all that it
started, a compiler for one. It ends when this process ends, however that was: by an exception, a signal, or killed.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import multiprocessing
import os
import signal
import threading
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, Callable, Generator, Hashable, Iterable, Iterator, Literal, Sequence, TypeVar

Progress = Callable[[Iterable[Any], int], Iterable[Any]]  # (items as they get done, how many)
Method = Literal["fork", "spawn"]  # a fork sees all that this process has; what is spawned imports anew, and is sent the rest
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


def start(method: Method, function: Callable[..., None], *arguments: Any) -> BaseProcess:
    """Start a process that runs ``function``, and that ends when this one does."""
    context: Any = multiprocessing.get_context(method)
    if method == "spawn":
        resource_tracker.ensure_running()  # which would let interrupts in below
    process: BaseProcess = context.Process(target=_follow, args=(function, arguments), daemon=True)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # which it inherits, and keeps
    try:
        process.start()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return process


def end(process: BaseProcess) -> None:
    """End a process and what it started, whatever they do."""
    if process.is_alive():
        with contextlib.suppress(ProcessLookupError):  # it leads no group yet
            os.killpg(process.pid or 0, signal.SIGKILL)
        process.kill()
    process.join()


def _follow(function: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    os.setpgid(0, 0)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    function(*arguments)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os.killpg(0, signal.SIGKILL)


def in_processes(
    function: Callable[[_Item], _Result],
    items: Sequence[_Item],
    workers: int = 1,
    progress: Progress = no_progress,
    keep: Callable[[_Item, _Result | Fault], None] = lambda item, result: None,
    apart: Callable[[_Item], Hashable] = lambda item: None,
    method: Method = "fork",
) -> list[_Result | Fault]:
    """``function`` of every item, in order; a ``Fault`` where it raised or ended its process. Results must pickle.

    ``keep`` is given each result as soon as it is there, so that an interrupted run need not lose those it has. Items that
    ``apart`` tells from each other never meet in a process. Where processes are spawned, function and items must pickle.
    """
    groups: dict[Hashable, list[int]] = {}
    for index, item in enumerate(items):
        groups.setdefault(apart(item), []).append(index)
    results: dict[int, _Result | Fault] = {}
    with contextlib.closing(_results(groups.values(), workers, method, (function, items))) as done:
        for index, result in progress(done, len(items)):
            results[index] = result
            keep(items[index], result)
    return [results[index] for index in range(len(items))]


def _results(
    groups: Iterable[Sequence[int]], workers: int, method: Method, work: tuple[Any, ...]
) -> Generator[tuple[int, Any], None, None]:
    """Each item's index with its result, as they come; a group has processes of its own."""
    for group in groups:
        left = collections.deque(group)
        team: list[_Worker] = []
        try:
            for _ in range(min(workers, len(left))):
                team.append(_Worker(method, work))
                team[-1].give(left.popleft())
            while busy := {worker.connection: worker for worker in team if worker.item is not None}:
                for connection in wait(list(busy)):
                    worker = busy[connection]  # type: ignore[index]
                    item, result = worker.item, worker.take()
                    if left:
                        worker.give(left.popleft())
                    yield item, result  # type: ignore[misc]
        finally:
            for worker in team:
                worker.end()


class _Worker:
    """A process that works on one item at a time; when it has ended, the next item is given to a new one."""

    item: int | None = None  # that it works on
    process: BaseProcess | None = None
    connection: Connection

    def __init__(self, method: Method, work: tuple[Any, ...]) -> None:
        self.method = method
        self.work = work

    def give(self, item: int) -> None:
        if self.process is None:
            self.connection, theirs = multiprocessing.Pipe()
            self.process = start(self.method, _serve, theirs, *self.work)
            theirs.close()  # so that the end of the process shows
        self.item = item
        with contextlib.suppress(OSError):  # it has ended, which shows when its result is taken
            self.connection.send(item)

    def take(self) -> Any:
        """The result of the item, once the connection has something."""
        self.item = None
        try:
            return self.connection.recv()
        except (EOFError, OSError):
            process = self.process
            self.end()
            assert process is not None
            return Fault(f"it ended its process, exit code {process.exitcode}")

    def end(self) -> None:
        if self.process is not None:
            end(self.process)
            self.process = None
            self.connection.close()


def _serve(connection: Connection, function: Callable[[Any], Any], items: Sequence[Any]) -> None:
    with contextlib.suppress(EOFError):
        while True:
            result = _result(function, items[connection.recv()])
            try:
                connection.send(result)
            except Exception as error:  # it does not pickle
                connection.send(_fault(error))


def _result(function: Callable[[Any], Any], item: Any) -> Any:
    with _quiet():
        try:
            return function(item)
        except Exception as error:  # told by the caller, whatever it is
            return _fault(error)


def _fault(error: Exception) -> Fault:
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
