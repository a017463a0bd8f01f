"""The order of launches: what a kernel touches before those in front of it are done, where it may run beside them.

A kernel under programmatic dependent launch may begin as soon as all programs of the one in front of it have called
``gdc_launch_dependents``, or ended; only behind ``gdc_wait`` is that one complete, and what it wrote there to be read. A second
stream runs whenever it likes, but for events. None of it changes a number where launches are interpreted one after the other, so
the order itself is kept, as for the roles of a kernel in Gluon (``kernelgen.prove.gluon``): each launch knows, before and behind
its wait, which others are complete, by whatever way. An access to memory that another one may still write, or a write to what it
may still read, is a ``Race``, whether it would show in a run or not.

    with launches_of(package) as chain:
        some calls of front doors, one after the other; chain.stream() and chain.event() for those on two streams

* A launch without the attribute begins when all that was launched on its stream is complete, and all events that this waited for.
* One with it knows at first what all programs of its predecessor knew when they let it begin: that those before are complete only
  where its predecessor waited for them first.
* In front of the first there is a launch of the caller that may still write everything, but for what stands still (``STILL``).
* Behind the last there may be one that reads at once what the caller wrote, as whose pairs are whose: it may not begin before.

https://docs.nvidia.com/cuda/parallel-thread-execution/#parallel-synchronization-and-communication-instructions-griddepcontrol
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import re
from types import ModuleType
from typing import Any, Iterator, Mapping
from unittest import mock

import numpy as np
import torch
import triton.language as tl
from numpy.typing import NDArray

from kernelgen.prove.memory import Race

__all__ = ["Chain", "install", "launches_of"]

_Bytes = NDArray[np.uint64]  # addresses
_Complete = int  # bit i: launch i is complete, and what it wrote can be read

# Operands that no kernel writes: weights, adapters and their scales, and what says of whom they are.
STILL = re.compile(r"(w|a|b)(_scale)?_ptrs?(\[\d+\])?|(adapter_enabled|expert_map|lora_ranks|scalings)_ptr")


class _Launch:
    """A launch, what it knows to be complete, and what it touched."""

    def __init__(self, number: int, name: str, tensors: Mapping[str, torch.Tensor], begin: _Complete, waited: _Complete) -> None:
        self.number = number
        self.name = name
        self.tensors = tensors  # kept, so that no other takes their place
        self.known = (begin, waited)  # before its wait, and behind it
        self.lets_begin = self.ends = begin  # what its dependent knows, and who waits for its end
        self.touched: dict[tuple[bool, bool], list[_Bytes]] = {}  # by whether it waited, and whether it writes
        self.program: Any = None
        self.has_waited = self.has_let = False

    def __str__(self) -> str:
        return f"{self.name} (launch {self.number})"

    def enter(self, program: Any) -> None:
        """A program goes on; when it is another one, that before it has ended."""
        if program != self.program:
            self.leave()
            self.program, self.has_waited, self.has_let = program, False, False

    def leave(self) -> None:
        self.ends |= self.known[self.has_waited]
        self.let()

    def let(self) -> None:
        if not self.has_let:  # again it does nothing
            self.lets_begin |= self.known[self.has_waited]
        self.has_let = True

    def bytes(self, waited: bool, writes: bool) -> _Bytes:
        """What it touched so, in order."""
        found = self.touched.get((waited, writes), [])
        if len(found) > 1:
            self.touched[waited, writes] = found = [np.unique(np.concatenate(found))]
        return found[0] if found else np.zeros(0, np.uint64)

    def describe(self, address: int) -> str:
        """An element, by the smallest operand that it is of."""
        spans = ((t.untyped_storage().nbytes(), name, t) for name, t in self.tensors.items() if _holds(t, address))
        _, name, tensor = min(spans, default=(0, "", None), key=lambda span: span[0])
        return f"{name}[{(address - tensor.data_ptr()) // tensor.element_size()}]" if tensor is not None else "no operand"


def _holds(tensor: torch.Tensor, address: int) -> bool:
    span = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return 0 <= address - tensor.data_ptr() < (span + 1) * tensor.element_size()


class Stream:
    """What stands for a stream."""

    device = torch.device("cpu")

    def __init__(self, chain: Chain) -> None:
        self._chain = chain
        self.complete: _Complete = 0  # when all is that was asked for
        self.last: _Launch | None = None  # nothing stands behind it

    def wait_event(self, event: Event) -> None:
        self.complete |= event.complete
        self.last = None  # a launch behind a wait depends on more than one

    def wait_stream(self, other: Stream) -> None:
        self.complete |= other.complete
        self.last = None

    def record_event(self, event: Event | None = None) -> Event:
        event = event or self._chain.event()
        event.record(self)
        return event


class Event:
    """What stands for an event."""

    def __init__(self, chain: Chain) -> None:
        self._chain = chain
        self.complete: _Complete = 0

    def record(self, stream: Stream | None = None) -> None:
        self.complete = (stream or self._chain.current).complete

    def wait(self, stream: Stream | None = None) -> None:
        (stream or self._chain.current).wait_event(self)


class Chain:
    """Launches in the order in which they are made; the first is the caller's.

    Attributes:
        dependent: names of kernels that were launched with the attribute.
    """

    def __init__(self) -> None:
        caller = _Launch(0, "the caller", {}, 0, 0)
        self._launches = [caller]
        self.dependent: list[str] = []
        self._running: _Launch | None = None
        self.main = self.current = Stream(self)
        self.main.complete, self.main.last = 1, caller

    def stream(self) -> Stream:
        """Another stream; nothing is known to be complete there."""
        return Stream(self)

    def event(self) -> Event:
        """An event that was not recorded yet."""
        return Event(self)

    @contextlib.contextmanager
    def on(self, stream: Stream | None) -> Iterator[None]:
        """What is launched inside goes to a stream."""
        before, self.current = self.current, stream or self.current
        try:
            yield
        finally:
            self.current = before

    def begin(self, name: str, tensors: Mapping[str, torch.Tensor], dependent: bool) -> None:
        """A launch begins."""
        stream, number = self.current, len(self._launches)
        start = waited = stream.complete
        if dependent:
            self.dependent.append(name)
        if dependent and stream.last is not None:
            start, waited = stream.last.lets_begin, stream.last.ends | 1 << stream.last.number
        self._running = _Launch(number, name, tensors, start, waited | start)
        self._launches.append(self._running)

    def check_last(self) -> None:
        """Raise if what is launched next may begin before what the caller wrote is there."""
        last = self.main.last
        if last is not None and last.number and not last.lets_begin & 1:
            raise Race(f"{last} lets the next launch begin before gdc_wait: what that reads at once may not be written yet")

    def touch(self, program: Any, kind: str, addresses: _Bytes, size: int) -> None:
        """Lanes of a program load, store, or both at once."""
        launch = self._running
        if launch is None or addresses.size == 0:
            return
        launch.enter(program)
        every: _Bytes = np.add.outer(np.unique(addresses), np.arange(size, dtype=np.uint64)).ravel()
        for writes in ((False,), (True,), (False, True))[("load", "store", "atomic").index(kind)]:
            launch.touched.setdefault((launch.has_waited, writes), []).append(every)

    def wait(self, program: Any) -> None:
        if self._running is not None:
            self._running.enter(program)
            self._running.has_waited = True

    def let_begin(self, program: Any) -> None:
        if self._running is not None:
            self._running.enter(program)
            self._running.let()

    def end(self) -> None:
        """A launch ends: raise where it touched what another one has, that it does not come after."""
        launch, self._running = self._running, None
        if launch is None:
            return
        launch.leave()
        stream = self.current
        stream.complete |= launch.ends | 1 << launch.number
        stream.last = launch
        for waited in (False, True):
            known = launch.known[waited]
            reads, writes = launch.bytes(waited, False), launch.bytes(waited, True)
            if not known & 1:
                _check_caller(launch, waited, reads, "reads", "written")
                _check_caller(launch, waited, writes, "writes", "read")
            for other in self._launches[1 : launch.number]:
                if not known >> other.number & 1:
                    for also in (False, True):
                        _compare(launch, waited, reads, "reads", other, other.bytes(also, True), "written")
                        _compare(launch, waited, writes, "writes", other, other.bytes(also, False), "read")
                        _compare(launch, waited, writes, "writes", other, other.bytes(also, True), "written")


def _check_caller(launch: _Launch, waited: bool, touched: _Bytes, does: str, done: str) -> None:
    seen: set[str] = set()
    for address in touched.tolist():
        place = launch.describe(address)
        name = place.rpartition("[")[0]
        if name not in seen and not (does == "reads" and STILL.fullmatch(name)):
            what = f"{place}, which what is launched in front of it may not have {done} yet"
            raise Race(f"{launch} {does} {what}: {_why(launch, waited, 0)}")
        seen.add(name)


def _compare(launch: _Launch, waited: bool, mine: _Bytes, does: str, other: _Launch, its: _Bytes, done: str) -> None:
    both = np.intersect1d(mine, its, assume_unique=True)
    if both.size:
        place, there = launch.describe(int(both[0])), other.describe(int(both[0]))
        what = f"{place}, which as {there} {other} may not have {done} yet"
        raise Race(f"{launch} {does} {what}: {_why(launch, waited, other.number)}")


def _why(launch: _Launch, waited: bool, other: int) -> str:
    if waited:
        return "its gdc_wait is for the launch in front of it, which ends without waiting for that"
    if launch.known[True] >> other & 1:
        return "it has to come behind gdc_wait"
    return "nothing that it comes behind waits for that: neither a launch in front of it nor an event"


_watching: Chain | None = None


def watching() -> Chain | None:
    """The chain that launches are noted in."""
    return _watching


@functools.cache
def install() -> None:
    """Let kernels that are imported from now on tell of waits; further calls do nothing."""
    from triton.runtime.interpreter import interpreter_builder

    # What kernels import from, and what they may name, are two modules.
    modules = importlib.import_module("triton.language.extra.cuda"), tl.extra.cuda

    def told(what: str) -> Any:
        def tell(**options: Any) -> None:
            if _watching is not None:
                getattr(_watching, what)(interpreter_builder.grid_idx)

        return tell

    for name, what in (("gdc_wait", "wait"), ("gdc_launch_dependents", "let_begin")):
        for cuda in modules:
            setattr(cuda, name, told(what))


@contextlib.contextmanager
def launches_of(package: ModuleType) -> Iterator[Chain]:
    """Inside, a generated package launches as on a GPU that has dependent launch, and the order of launches is watched.

    Raises:
        Race: at the end, where the last launch lets what comes behind it begin too early.
    """
    global _watching
    runtime: Any = package._runtime
    stock = runtime.traits
    chain = _watching = Chain()
    fakes = {
        "Stream": Stream,
        "Event": Event,
        "stream": chain.on,
        "current_stream": lambda device=None: chain.current,
    }
    try:
        with contextlib.ExitStack() as stack:
            stack.enter_context(mock.patch.object(runtime, "traits", lambda device: stock(device)._replace(pdl=True)))
            for name, fake in fakes.items():
                stack.enter_context(mock.patch.object(torch.cuda, name, fake))
            with runtime.compile_only():  # what is remembered was bound without
                pass
            yield chain
        chain.check_last()
    finally:
        _watching = None
        with runtime.compile_only():
            pass
