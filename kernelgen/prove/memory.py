"""What the programs of one launch may touch, and whether their order can change the result."""

from __future__ import annotations

import contextlib
import contextvars
from typing import Any, Iterator, Sequence, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

# Tensors that kernels may touch beside their arguments: by addresses that stand in a table.
beside: contextvars.ContextVar[Sequence[torch.Tensor]] = contextvars.ContextVar("beside", default=())
# Whether what a kernel tells the compiler of numbers must be so of lanes, too, that a mask drops.
hints_hold: contextvars.ContextVar[bool] = contextvars.ContextVar("hints_hold", default=True)


class MemoryFault(Exception):
    """An access that would be an error, or undefined, on a GPU."""


class OutOfBounds(MemoryFault):
    """An access outside of the tensors that were passed to the launch."""


class Race(MemoryFault):
    """Programs, or lanes of one, whose result depends on the order in which they run."""


class Lost(Exception):
    """What shadows of numbers in a kernel do not know, where it is needed."""


@contextlib.contextmanager
def unwrapped(kind: type[Exception]) -> Iterator[None]:
    """Inside, what a kernel raises of a kind is raised as it is: the interpreter wraps it, once for each function called."""
    from triton.runtime.interpreter import InterpreterError

    try:
        yield
    except InterpreterError as error:
        cause: BaseException | None = error
        while isinstance(cause, InterpreterError):
            cause = cause.__cause__
        if isinstance(cause, kind):
            raise cause from None
        raise


_T = TypeVar("_T")
_Lanes = tuple[NDArray[Any], NDArray[Any]]  # the address of each lane, and whether a mask leaves it on


def _met(by_extent: dict[int, list[_T]], extent: int) -> Iterator[_T]:
    """What may lie where something of this extent does; -1: in several."""
    for of in by_extent if extent == -1 else {extent, -1} & by_extent.keys():
        yield from by_extent[of]


class Launch:
    """What one launch may touch, and what its programs did.

    Lanes of a program have no order but by a barrier. Which thread a lane is of, Triton chooses anew for each load and each
    store, by the alignment and the dtype that it knows; so what a program touches that it stored since its last barrier is a
    race, be it the same lane of a tensor of the same shape. What it stores where it loaded since is one where another lane may
    have yet to load it: a lane may put a new number in the place of the one that it read, as no other reads that.
    """

    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        self.names: list[str] = []
        first: list[int] = []
        end: list[int] = []
        for begin, stop, name in sorted(_extent(name, tensor) for name, tensor in tensors.items()):
            if end and begin < end[-1]:  # views of one buffer
                end[-1] = max(end[-1], stop)
                self.names[-1] += f" or {name}"
            else:
                first.append(begin)
                end.append(stop)
                self.names.append(name)
        self.first = np.array(first, dtype=np.uint64)
        self.end = np.array(end, dtype=np.uint64)
        self.stores: list[tuple[NDArray[Any], int, NDArray[Any]]] = []  # addresses, program, values
        self.loads: list[tuple[NDArray[Any], int, int]] = []  # addresses, program, extent
        self.written: set[int] = set()  # extents
        self.has_atomics = False  # they may order the programs
        self._running: Any = None  # the program, and what it stored and loaded since its last barrier, by extent
        self._since: dict[int, list[NDArray[Any]]] = {}
        self._read: dict[int, list[_Lanes]] = {}

    def barrier(self) -> None:
        """The lanes of the running program meet."""
        self._since, self._read = {}, {}

    def touch(self, kind: str, program: Any, addresses: NDArray[Any], size: int, lanes: _Lanes) -> int:
        """Lanes of a program load, store, or both at once: the extent that they lie in, -1: in several.

        Args:
            kind: "load", "store" or "atomic".
            program: which one.
            addresses: of the lanes that are on.
            size: bytes of each.
            lanes: the addresses of all lanes, and which of them are on.

        Raises:
            OutOfBounds: one lies in none.
            Race: the program stored there, or other lanes loaded what these store, and no barrier came since.
        """
        extent = self._place(kind, program, addresses, size)
        if program != self._running:
            self._running, self._since, self._read = program, {}, {}
        for before in _met(self._since, extent):
            again = np.isin(addresses, before)
            if again.any():
                does = {"load": "loads", "store": "stores", "atomic": "updates"}[kind]
                raise self._unordered(program, f"{does} what its lanes stored", addresses[again])
        if kind == "load":
            self._read.setdefault(extent, []).append(lanes)
        else:
            for read in _met(self._read, extent):
                self._check_read(program, addresses, lanes, read)
            self._since.setdefault(extent, []).append(addresses)
        return extent

    def _check_read(self, program: Any, addresses: NDArray[Any], lanes: _Lanes, read: _Lanes) -> None:
        """Raise if a lane that loaded what is stored now is not the one that stores it."""
        there, on = np.broadcast_arrays(*read)
        lost = np.isin(there, addresses) & on
        if there.size > 1 and lost.any() and there.shape == np.broadcast_shapes(*(part.shape for part in lanes)):
            lost &= (there != lanes[0]) | ~lanes[1]  # a number by itself is loaded by every thread
        if lost.any():
            raise self._unordered(program, "stores what its lanes loaded", there[lost])

    def _unordered(self, program: Any, does: str, addresses: NDArray[Any]) -> Race:
        where = self._describe(int(addresses[0]))
        return Race(f"{where}: program {program} {does} since its last tl.debug_barrier(); lanes have no order without one")

    def _place(self, kind: str, program: Any, addresses: NDArray[Any], size: int) -> int:
        last = np.uint64(size - 1)
        low = int(np.searchsorted(self.first, addresses.min(), side="right")) - 1
        if low >= 0 and addresses.max() + last < self.end[low]:
            return low
        extent = np.searchsorted(self.first, addresses, side="right").astype(np.int64) - 1
        inside = extent >= 0
        inside[inside] = addresses[inside] + last < self.end[extent[inside]]
        if not inside.all():
            lanes = f"{int((~inside).sum())} of {addresses.size} lanes"
            where = self._describe(int(addresses[~inside][0]))
            raise OutOfBounds(f"{kind} by program {program}: {lanes}, the first {where}")
        return -1

    def check_races(self) -> None:
        """Raise if the order of programs, or of the lanes of a store, can change the result."""
        if not self.stores:
            return
        sizes = [addresses.size for addresses, _, _ in self.stores]
        addresses = np.concatenate([store[0] for store in self.stores])
        order = np.argsort(addresses, kind="stable")
        addresses = addresses[order]
        program = np.repeat([store[1] for store in self.stores], sizes)[order]
        again = addresses[1:] == addresses[:-1]
        across = again & (program[1:] != program[:-1])
        if across.any():
            i = int(np.argmax(across))
            self._fail(addresses[i], "stored by programs", program[i], program[i + 1])
        if again.any():
            store = np.repeat(np.arange(len(sizes)), sizes)[order]
            bits = np.array([v.tobytes() for s in self.stores for v in s[2]], dtype=object)[order]
            lanes = again & (store[1:] == store[:-1]) & (bits[1:] != bits[:-1])
            if lanes.any():
                i = int(np.argmax(lanes))
                self._fail(addresses[i], "stored by two lanes of program", program[i])
        if not self.has_atomics:
            self._check_loads(addresses, program)

    def _check_loads(self, stored: NDArray[Any], writer: NDArray[Any]) -> None:
        for addresses, program, extent in self.loads:
            if not {extent, -1} & self.written and extent >= 0:
                continue
            at = np.minimum(np.searchsorted(stored, addresses), stored.size - 1)
            stale = (stored[at] == addresses) & (writer[at] != program)
            if stale.any():
                i = int(np.argmax(stale))
                self._fail(addresses[i], "stored and loaded by programs", writer[at[i]], program)

    def _fail(self, address: Any, what: str, *programs: Any) -> None:
        who = " and ".join(str(int(program)) for program in programs)
        raise Race(f"{self._describe(int(address))}: {what} {who}")

    def _describe(self, address: int) -> str:
        gaps = [
            max(int(first) - address, address - int(end) + 1)
            for first, end in zip(self.first, self.end, strict=True)
        ]
        if not gaps:
            return "where no tensor is"
        near = int(np.argmin(gaps))
        first, end = int(self.first[near]), int(self.end[near])
        return (
            f"{address - first:+d} bytes from the start of {self.names[near]} ({end - first} bytes)"
        )


def _extent(name: str, tensor: torch.Tensor) -> tuple[int, int, str]:
    span = 1 + sum(
        (size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
    )
    return tensor.data_ptr(), tensor.data_ptr() + span * tensor.element_size(), name


def tensors(name: str, argument: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of an argument: itself, those of a tuple, and the base of a descriptor or a reinterpreted tensor."""
    if isinstance(argument, tuple):
        for i, item in enumerate(argument):
            yield from tensors(f"{name}[{i}]", item)
    elif isinstance(argument, torch.Tensor):
        if argument.numel():
            yield name, argument
    elif hasattr(argument, "base"):
        yield from tensors(name, argument.base)
