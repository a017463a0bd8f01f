"""An interpreter of Gluon: kernels whose warps have roles run on the CPU, and an order that could go wrong on a GPU is an error.

Triton has none. Here a kernel's text runs as Python, with the operations below in place of Gluon's; what works on tensors
and global memory is Triton's interpreter, as it is repaired, watched and followed in exact algebra. Each role is a thread, of
which one runs at a time, until it waits at a barrier. Copies are in flight as long as any role can run, and arrive one by one.

Values do not tell a right order from a lucky one, so order itself is kept: every access to shared memory has to *come after*
those that it depends on, by a chain of barriers, whatever the speed of warps and copies. Each agent (a role, its tensor core
products, a copy) counts its accesses, and each role knows up to which count those of the others come before it: what it did
itself, what it waited for, and what those knew who arrived. So one run shows what could go wrong in any run of these inputs.

* ``Race``: shared memory is read that nobody wrote, or where the write does not come before; it is written where a read or a
  write does not come before; a tensor core reads what threads wrote without a fence; a program ends with copies in flight.
* ``Deadlock``: no role can go on, and no copy is in flight; it says where each waits.
* ``MemoryFault``: more arrivals than a barrier counts, one without a count, slots of a ring that are not there, or that are never
  used, sums that are not waited for.

Within a role, threads are one: barriers among them are the compiler's. Layouts are taken for right, as it checks them.
"""

from __future__ import annotations

import collections
import functools
import inspect
import math
import sys
import threading
import types
from typing import Any, Callable, Mapping, Sequence

import numpy as np
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from kernelgen.prove.memory import MemoryFault, OutOfBounds, Race

__all__ = ["Deadlock", "install"]

_Clock = dict[Any, int]  # by agent: how many of its accesses come before


class Deadlock(MemoryFault):
    """Roles that wait for each other, or for copies that nobody asked for."""


class _Stopped(BaseException):
    """Ends the thread of a role, because another one failed."""


def _merge(clock: _Clock, other: Mapping[Any, int]) -> None:
    for agent, count in other.items():
        clock[agent] = max(count, clock.get(agent, 0))


def _number(value: Any) -> int:
    return int(value)


def _line() -> str:
    """Where the kernel is."""
    frame = sys._getframe(1)
    while frame.f_code.co_filename == __file__ and frame.f_back is not None:
        frame = frame.f_back
    return f"line {frame.f_lineno} of {frame.f_code.co_filename.replace(chr(92), '/').rpartition('/')[2]}"


class _Role:
    """What one partition of the warps knows, and where it stands."""

    def __init__(self, name: str, clock: Mapping[Any, int]) -> None:
        self.name = name
        self.clock: _Clock = dict(clock)
        self.fenced: _Clock = {}  # what came before its last fence
        self.products = 0
        self.rows: list[Any] = []  # copies that its threads asked for,
        self.groups: list[list[Any]] = []  # and those before, as they were committed
        self.waits: tuple[_Barrier, int, str] | None = None
        self.done = False
        self.error: BaseException | None = None
        self.go = threading.Semaphore(0)

    def tick(self) -> tuple[Any, int]:
        self.clock[self.name] = self.clock.get(self.name, 0) + 1
        return self.name, self.clock[self.name]

    @property
    def ready(self) -> bool:
        return self.waits is None or self.waits[0].passes(self.waits[1])


class _Barrier:
    """An mbarrier: a phase completes with so many arrivals, and with all bytes that are expected."""

    def __init__(self) -> None:
        self.count = self.pending = self.bytes = self.completed = 0
        self.arriving: _Clock = {}
        self.released: _Clock = {}
        self.fencing: _Clock = {}  # what those who arrive had fenced
        self.fenced: _Clock = {}

    def passes(self, parity: int) -> bool:
        """Whether the phase of a parity is complete; that in front of the first counts as complete."""
        return self.completed % 2 != parity

    def arrive(self, count: int, clock: Mapping[Any, int], fenced: Mapping[Any, int]) -> None:
        if self.count == 0:
            raise MemoryFault(f"{_line()}: a barrier is used that was given no count")
        self.pending -= count
        if self.pending < 0:
            raise MemoryFault(f"{_line()}: {count} arrivals at a barrier of {self.count} that lacks {self.pending + count}")
        _merge(self.arriving, clock)
        _merge(self.fencing, fenced)
        self.complete()

    def complete(self) -> None:
        if self.pending == 0 and self.bytes == 0:
            self.completed += 1
            self.pending = self.count
            _merge(self.released, self.arriving)
            _merge(self.fenced, self.fencing)
            self.arriving, self.fencing = {}, {}


class _Tile:
    """A tile of shared memory, read and written as a whole, or written in two halves of its rows."""

    def __init__(self, shape: Sequence[int], dtype: Any, of: _Tile | None = None) -> None:
        self.shape = list(shape)
        self.dtype = dtype
        self.memory = of or self  # what keeps what is there, of a tile that is another one under another type
        self.value: Any = None
        self.wrote: tuple[Any, int, str] | None = None
        self.by_threads = False
        self.read: dict[Any, tuple[int, str]] = {}
        self.halves: list[_Tile] = []

    def write(self, role: _Role, agent: Any, count: int, value: Any, by_threads: bool) -> None:
        if self.halves or [int(size) for size in value.shape] != self.shape or value.dtype != self.dtype:
            got = f"{value.dtype} {[int(size) for size in value.shape]}"
            raise OutOfBounds(f"{_line()}: {got} is written to shared memory of {self.dtype} {self.shape}")
        memory = self.memory
        before = {} if memory.wrote is None else {memory.wrote[0]: memory.wrote[1:]}
        for what, accesses in (("written", before), ("read", memory.read)):
            for other, (number, line) in accesses.items():
                if role.clock.get(other, 0) < number:
                    raise Race(f"{role.name}, {_line()}: writes shared memory that may still be {what} in {line}")
        memory.wrote, memory.value, memory.by_threads, memory.read = (agent, count, _line()), value, by_threads, {}

    def look(self, role: _Role, agent: Any, count: int, by_tensor_core: bool) -> Any:
        if self.halves:
            low, high = (half.look(role, agent, count, by_tensor_core) for half in self.halves)
            return tl.reshape(tl.permute(tl.join(low, high), (2, 0, 1)), self.shape)
        memory = self.memory
        if memory.wrote is None:
            raise Race(f"{role.name}, {_line()}: reads shared memory that nobody wrote")
        writer, number, line = memory.wrote
        if role.clock.get(writer, 0) < number:
            raise Race(f"{role.name}, {_line()}: reads shared memory that may not be written yet, in {line}")
        if memory.value.dtype != self.dtype:
            raise MemoryFault(f"{role.name}, {_line()}: reads {memory.value.dtype}, written in {line}, as {self.dtype}")
        if by_tensor_core and memory.by_threads and role.fenced.get(writer, 0) < number:
            raise Race(f"{role.name}, {_line()}: a tensor core reads what threads wrote in {line}, without a fence")
        memory.read[agent] = (count, _line())
        return memory.value

    # What a kernel calls.

    def store(self, value: Any) -> None:
        role = _running()
        self.write(role, *role.tick(), value, by_threads=True)

    def load(self, layout: Any = None) -> Any:
        role = _running()
        return self.look(role, *role.tick(), by_tensor_core=False)

    def slice(self, start: Any, length: Any, dim: Any = 0) -> _Tile:
        rows, (first, place) = self.shape[0] // 2, divmod(_number(start), self.shape[0] // 2)
        if (_number(length), place, _number(dim)) != (rows, 0, 0) or not 0 <= first < 2 or self.wrote is not None:
            raise OutOfBounds(f"{_line()}: {start}, {length} of shared memory {self.shape} is no half of its rows")
        if not self.halves:
            self.halves = [_Tile([rows, *self.shape[1:]], self.dtype) for _ in range(2)]
        return self.halves[first]

    def permute(self, order: Sequence[int]) -> _View:
        return _View(self, tuple(map(int, order)))


class _View:
    """A tile whose dimensions are in another order."""

    def __init__(self, tile: _Tile, order: tuple[int, ...]) -> None:
        self.tile = tile
        self.order = order

    def load(self, layout: Any = None) -> Any:
        return tl.trans(self.tile.load(), *self.order)


class _Memory:
    """Tiles or barriers that lie one behind the other."""

    def __init__(self, parts: list[Any]) -> None:
        self.parts = parts

    def index(self, place: Any) -> Any:
        number = _number(place)
        if not 0 <= number < len(self.parts):
            raise OutOfBounds(f"{_line()}: slot {number} of {len(self.parts)}")
        return self.parts[number]


class _Sums:
    """What tensor cores sum up, until it is waited for."""

    def __init__(self, value: Any, number: int) -> None:
        self.value = value
        self.number = number

    def __getattr__(self, name: str) -> Any:
        raise MemoryFault(f"{_line()}: sums are used that were not waited for")

    def _unusable(self, *others: Any) -> Any:
        raise MemoryFault(f"{_line()}: sums are used that were not waited for")

    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __truediv__ = __rtruediv__ = __getitem__ = _unusable


class _Copy:
    """A copy in flight."""

    def __init__(self, barrier: _Barrier, clock: _Clock, size: int) -> None:
        self.barrier = barrier
        self.clock = clock
        self.size = size

    def complete(self) -> None:
        self.barrier.bytes -= self.size
        _merge(self.barrier.arriving, self.clock)
        self.barrier.complete()


class _Program:
    """One program of a launch."""

    def __init__(self) -> None:
        self.main = self.running = _Role("the program", {})
        self.roles: list[_Role] = []
        self.flying: collections.deque[_Copy] = collections.deque()
        self.copies = 0
        self.rings: list[list[_Barrier]] = []
        self.back = threading.Semaphore(0)
        self.stopped = False

    def copy(self) -> Any:
        """The agent of another copy."""
        self.copies += 1
        return "copy", self.copies

    def block(self, barrier: _Barrier, parity: int) -> None:
        """Return when a barrier lets the running role pass."""
        role = self.running
        role.waits = (barrier, parity, _line())
        while not role.ready:
            if role is self.main:
                self.land([role])
            else:
                self.back.release()
                role.go.acquire()
                if self.stopped:
                    raise _Stopped
        role.waits = None

    def land(self, waiting: Sequence[_Role]) -> None:
        """Let one copy arrive."""
        if not self.flying:
            places = [f"{role.name} waits in {role.waits[2]}" for role in waiting if role.waits is not None]
            raise Deadlock("; ".join(places))
        self.flying.popleft().complete()

    def fork(self, tasks: Sequence[tuple[Callable[..., Any], Any]]) -> None:
        """Run roles until all have ended."""
        self.roles = [_Role(f"role {i} ({task.__name__})", self.main.clock) for i, (task, _) in enumerate(tasks)]
        threads = [
            threading.Thread(target=self._play, args=(role, *task), daemon=True)
            for role, task in zip(self.roles, tasks, strict=True)
        ]
        for thread in threads:
            thread.start()
        try:
            while alive := [role for role in self.roles if not role.done]:
                chosen = next((role for role in alive if role.ready), None)
                if chosen is None:
                    self.land(alive)
                    continue
                self.running = chosen
                chosen.go.release()
                self.back.acquire()
                if chosen.error is not None:
                    raise chosen.error
        finally:
            self.running, self.stopped = self.main, True
            for role in self.roles:
                role.go.release()
            for thread in threads:
                thread.join()
        for role in self.roles:
            _merge(self.main.clock, role.clock)

    def _play(self, role: _Role, task: Callable[..., Any], arguments: Any) -> None:
        role.go.acquire()
        if self.stopped:
            return
        try:
            with np.errstate(all="ignore"):  # as a GPU does; of each thread
                task(*arguments)
        except _Stopped:
            return
        except BaseException as error:
            role.error = error
        role.done = True
        self.back.release()

    def end(self) -> None:
        flying = len(self.flying) + sum(len(group) for role in (self.main, *self.roles) for group in (role.rows, *role.groups))
        if flying:
            raise Race(f"a program ends with {flying} copies in flight")
        for ring in self.rings:
            turns = [barrier.completed for barrier in ring]
            if max(turns) > 1 and min(turns) == 0:
                raise MemoryFault(f"of {len(ring)} slots {turns.count(0)} are never used, others {max(turns)} times")


_program: _Program | None = None


def _here() -> _Program:
    if _program is None:
        raise RuntimeError("a function of Gluon is called outside of a launch")
    return _program


def _running() -> _Role:
    return _here().running


# The operations.


def _allocate(dtype: Any, shape: Sequence[int], layout: Any = None, value: Any = None) -> _Memory:
    first, *tile = map(_number, shape)
    if layout is not _BARRIERS:
        return _Memory([_Tile(tile, dtype) for _ in range(first)])
    ring = [_Barrier() for _ in range(first)]
    _here().rings.append(ring)
    return _Memory(ring)


def _reinterpret(memory: _Memory, dtype: Any, shape: Sequence[int], layout: Any = None) -> _Memory:
    first, *tile = map(_number, shape)
    if first != len(memory.parts):
        raise OutOfBounds(f"{_line()}: {len(memory.parts)} tiles of shared memory are taken for {first}")
    for part in memory.parts:
        if math.prod(part.shape) * part.dtype.primitive_bitwidth != math.prod(tile) * dtype.primitive_bitwidth:
            raise OutOfBounds(f"{_line()}: {part.dtype} {part.shape} of shared memory is taken for {dtype} {tile}")
    return _Memory([_Tile(tile, dtype, part) for part in memory.parts])


_BARRIERS = object()


def _warp_specialize(tasks: Any, worker_num_warps: Any, worker_num_regs: Any = None) -> None:
    if len(worker_num_warps) != len(tasks) - 1:
        raise ValueError(f"{_line()}: {len(tasks)} roles, and warps of {len(worker_num_warps)} beside those of the program")
    _here().fork(tasks)


def _init(barrier: _Barrier, count: Any) -> None:
    barrier.count = barrier.pending = _number(count)


def _expect(barrier: _Barrier, bytes: Any, pred: Any = True) -> None:
    if pred:
        barrier.bytes += _number(bytes)
        _arrive(barrier)


def _arrive(barrier: _Barrier, *, count: Any = 1, pred: Any = True) -> None:
    if pred:
        role = _running()
        role.tick()
        barrier.arrive(_number(count), role.clock, role.fenced)


def _wait(barrier: _Barrier, phase: Any, pred: Any = True, deps: Any = ()) -> None:
    if pred:
        if barrier.count == 0:
            raise MemoryFault(f"{_line()}: a barrier is waited for that was given no count")
        _here().block(barrier, _number(phase) % 2)
        _merge(_running().clock, barrier.released)
        _merge(_running().fenced, barrier.fenced)


def _copy_box(descriptor: Any, coordinates: Any, barrier: _Barrier, tile: _Tile, pred: Any = True) -> None:
    if pred:
        program, agent = _here(), _here().copy()
        value = descriptor.load(list(coordinates))
        tile.write(program.running, agent, 1, value, by_threads=False)
        clock = {**program.running.clock, agent: 1}
        program.flying.append(_Copy(barrier, clock, math.prod(tile.shape) * value.dtype.primitive_bitwidth // 8))


def _copy_rows(tile: _Tile, pointer: Any, mask: Any = None) -> None:
    program, agent = _here(), _here().copy()
    value = tl.load(pointer) if mask is None else tl.load(pointer, mask=mask, other=0)
    tile.write(program.running, agent, 1, value, by_threads=True)
    program.running.rows.append(agent)


def _commit_rows() -> None:
    role = _running()
    role.groups.append(role.rows)
    role.rows = []


def _wait_rows(num_outstanding: Any = 0) -> None:
    role = _running()
    complete = max(len(role.groups) - _number(num_outstanding), 0)
    for group in role.groups[:complete]:
        _merge(role.clock, dict.fromkeys(group, 1))
    role.groups = role.groups[complete:]


def _fence() -> None:
    role = _running()
    role.fenced = dict(role.clock)


def _multiply(a: Any, b: Any, acc: Any, *, use_acc: Any = True, is_async: Any = False, **options: Any) -> Any:
    role = _running()
    agent = f"{role.name}, products"
    operands = []
    for operand in (a, b):
        tile, order = (operand.tile, operand.order) if isinstance(operand, _View) else (operand, None)
        value = tile.look(role, agent, role.products + 1, by_tensor_core=True)
        operands.append(value if order in (None, (0, 1)) else tl.trans(value, *order))
    role.products += 1
    before = acc.value if isinstance(acc, _Sums) else acc
    if not use_acc:  # it begins at zero, whatever it is added to: in Gluon the compiler joins nothing
        before = tl.zeros([operands[0].shape[0], operands[1].shape[1]], tl.float32)
    made = _Sums(tl.dot(*operands, before), role.products)
    return made if is_async else _wait_sums(0, [made])


def _multiply_registers(a: Any, b: Any, acc: Any) -> Any:
    return tl.dot(a, b, acc)


def _wait_sums(num_outstanding: Any = 0, deps: Sequence[Any] = ()) -> Any:
    role = _running()
    complete = role.products - _number(num_outstanding)
    _merge(role.clock, {f"{role.name}, products": max(complete, 0)})
    found = [each.value if isinstance(each, _Sums) and each.number <= complete else each for each in deps]
    return found[0] if len(found) == 1 else tuple(found)


class _Language:
    """What stands for ``gl``: Triton's language, but for what knows layouts, shared memory and roles."""

    def __init__(self, interpreter: Any) -> None:
        self._interpreter = interpreter

    allocate_shared_memory = staticmethod(_allocate)
    warp_specialize = staticmethod(_warp_specialize)

    def __getattr__(self, name: str) -> Any:
        return _no_layout if name.endswith("Layout") else getattr(tl, name)

    def to_tensor(self, value: Any) -> Any:
        return self._interpreter.interpreter_semantic.to_tensor(value)

    @staticmethod
    def arange(start: Any, end: Any, layout: Any = None) -> Any:
        return tl.arange(start, end)

    @staticmethod
    def convert_layout(value: Any, layout: Any, assert_trivial: Any = False) -> Any:
        return value

    @staticmethod
    def zeros(shape: Any, dtype: Any, layout: Any = None) -> Any:
        return tl.zeros(shape, dtype)

    @staticmethod
    def static_range(*bounds: Any) -> Any:
        return range(*map(_number, bounds))


def _no_layout(*arguments: Any, **named: Any) -> None:
    return None


@functools.cache
def install() -> None:
    """Interpret Gluon's kernels in this process, where there is Gluon; further calls do nothing.

    ``kernelgen.prove.interpreter`` has to be installed.
    """
    try:
        from triton.experimental.gluon._runtime import GluonJITFunction

        from kernelgen.families import _gluon
    except (AttributeError, ImportError):
        return
    from triton.runtime import interpreter

    barriers = types.SimpleNamespace(
        init=_init, expect=_expect, arrive=_arrive, wait=_wait, MBarrierLayout=lambda: _BARRIERS
    )
    stands_for = {
        id(_gluon.gl): _Language(interpreter),
        id(_gluon.mbarrier): barriers,
        id(_gluon.copy_box): _copy_box,
        id(_gluon.copy_rows): _copy_rows,
        id(_gluon.commit_rows): _commit_rows,
        id(_gluon.wait_rows): _wait_rows,
        id(_gluon.fence_async_shared): _fence,
        id(_gluon.reinterpret): _reinterpret,
        id(_gluon.mma_v2): _multiply_registers,
        id(_gluon.warpgroup_mma): _multiply,
        id(_gluon.warpgroup_mma_wait): _wait_sums,
    }
    known: dict[int, dict[str, Any]] = {}  # by the globals of a module

    def python(kernel: Any) -> Callable[..., Any]:
        """A kernel, or a function of one, as Python."""
        names = kernel.fn.__globals__
        scope = known.get(id(names))
        if scope is None:
            scope = known[id(names)] = dict(names)
            for name, value in names.items():
                scope[name] = python(value) if isinstance(value, GluonJITFunction) else stands_for.get(id(value), value)
        return _text(kernel.fn, scope)

    def run(self: Any, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> None:
        function = python(self)

        def program(*given: Any, **named: Any) -> None:
            global _program
            _program = _Program()
            try:
                function(*given, **named)
                _program.end()
            finally:
                _program = None

        program.__name__ = self.fn.__name__
        program.__signature__ = inspect.signature(self.fn)  # type: ignore[attr-defined]
        constants = {name: "constexpr" for name, kind in self.fn.__annotations__.items() if "constexpr" in str(kind)}
        program.__annotations__ = constants
        executor = interpreter.GridExecutor(program, self.arg_names, grid)
        executor(*map(_for_triton, arguments), **{name: _for_triton(value) for name, value in options.items()})

    GluonJITFunction.run = run


def _text(function: Any, scope: dict[str, Any]) -> Callable[..., Any]:
    made = types.FunctionType(function.__code__, scope, function.__name__, function.__defaults__, function.__closure__)
    made.__kwdefaults__ = function.__kwdefaults__
    return made


def _for_triton(argument: Any) -> Any:
    """Descriptors as Triton's own."""
    if hasattr(argument, "block_shape"):
        return TensorDescriptor(argument.base, argument.shape, argument.strides, argument.block_shape)
    return argument
