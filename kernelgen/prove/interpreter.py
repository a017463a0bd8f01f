"""Triton's interpreter, repaired, and watched: a kernel that passes under it is right on a GPU.

``install()`` does for the process what ``_repairs`` does, which the generated package does by itself, and adds what tests
want to know, which the stock interpreter lets pass without a word. With it:

* a load, store or atomic outside of the tensors that were passed to the launch raises ``OutOfBounds``, as does a gather
  outside of its source; lanes that a mask turns off and that name no ``other`` hold values that show up (NaN, a large
  integer) instead of zero.
* two programs of a launch that store to one address, or one that loads what another stores, raise ``Race``, as does a program
  that touches what it stored since its last ``tl.debug_barrier()``.
* 32-bit signed integer arithmetic that wraps raises ``IntegerOverflow``; integers divided by zero are a large one.
* a hint of equal or consecutive numbers that is not so raises ``WrongHint``.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, Callable

import numpy as np
import triton.language as tl
from numpy.typing import NDArray

from kernelgen.families import _repairs
from kernelgen.families._repairs import is_narrow, narrowed
from kernelgen.prove import gluon, order
from kernelgen.prove.memory import Launch, MemoryFault, OutOfBounds, Race, beside, hints_hold, tensors, unwrapped

__all__ = ["IntegerOverflow", "MemoryFault", "OutOfBounds", "Race", "WrongHint", "install"]

_PARTS = {
    "InterpreterBuilder": (
        "create_add",
        "create_sub",
        "create_mul",
        "create_sdiv",
        "create_udiv",
        "create_srem",
        "create_urem",
        "create_gather",
        "create_masked_load",
        "create_masked_store",
        "create_atomic_rmw",
        "create_atomic_cas",
        "create_barrier",
    ),
    "TensorHandle": ("set_attr",),
    "GridExecutor": ("__call__", "_init_args_hst", "_restore_args_dev"),
    "InterpreterError": (),
    "interpreter_builder": ("options",),
}


class IntegerOverflow(MemoryFault):
    """A 32-bit signed integer operation whose result does not fit."""


class WrongHint(MemoryFault):
    """What a kernel tells the compiler of numbers is not so."""


@functools.cache
def install() -> None:
    """Repair and watch the interpreter of this process; further calls do nothing.

    Raises:
        RuntimeError: Triton was imported without TRITON_INTERPRET=1, or lacks a part that is replaced.
    """
    _repairs.install()
    from triton.runtime import interpreter

    _repairs.require_parts(interpreter, _PARTS)
    _watch_integers(interpreter)
    _watch_hints(interpreter)
    _watch_memory(interpreter)
    order.install()
    gluon.install()


def _watch_integers(interpreter: Any) -> None:
    builder = interpreter.InterpreterBuilder
    # Triton computes what its own check needs at each operation, an eighth of all time, and throws it away.
    shared = interpreter.interpreter_builder
    shared.options = dataclasses.replace(shared.options, sanitize_overflow=False)

    def watched(stock: Callable[..., Any], operation: np.ufunc) -> Callable[..., Any]:
        def checked(self: Any, left: Any, right: Any) -> Any:
            result = stock(self, left, right)
            if result.data.dtype == np.int32:
                exact = operation(left.data, right.data, dtype=np.int64)
                if not np.array_equal(exact, result.data):
                    worst = exact.flat[np.argmax(np.abs(exact - result.data))]
                    raise IntegerOverflow(
                        f"int32 {operation.__name__} gives {worst} in program {self.grid_idx}"
                    )
            return result

        return checked

    def undefined_by_zero(stock: Callable[..., Any]) -> Callable[..., Any]:
        def divided(self: Any, left: Any, right: Any) -> Any:
            result = stock(self, left, right)
            if not np.all(right.data):
                kind = result.data.dtype
                result.data = np.where(right.data == 0, min(_UNDEFINED, np.iinfo(kind).max), result.data).astype(kind)
            return result

        return divided

    for name in ("create_sdiv", "create_udiv", "create_srem", "create_urem"):
        setattr(builder, name, undefined_by_zero(getattr(builder, name)))
    builder.create_add = watched(builder.create_add, np.add)
    builder.create_sub = watched(builder.create_sub, np.subtract)
    builder.create_mul = watched(builder.create_mul, np.multiply)


def _watch_hints(interpreter: Any) -> None:
    handle = interpreter.TensorHandle
    stock = handle.set_attr

    def set_attr(self: Any, name: str, values: Any) -> None:
        stock(self, name, values)
        if name in ("tt.constancy", "tt.contiguity") and hints_hold.get():
            for axis, run in enumerate(values):
                first = np.arange(self.data.shape[axis]) // run * run
                steps = np.moveaxis(self.data - np.take(self.data, first, axis), axis, -1)
                if (steps != (np.arange(steps.shape[-1]) - first) * (name == "tt.contiguity")).any():
                    raise WrongHint(f"{name[3:]} of {run} is said, and is not so, of {self.data.tolist()}")

    handle.set_attr = set_attr


# Memory. A launch knows the extents of its tensors and notes which program loads and stores where.

_UNDEFINED = 1_000_003  # what an undefined integer reads as: out of any bounds, far from overflow


def _undefined(shape: tuple[int, ...], dtype: tl.dtype, numpy_dtype: np.dtype[Any]) -> NDArray[Any]:
    if is_narrow(dtype):
        return np.broadcast_to(narrowed(np.array([np.nan]), dtype), shape)
    if np.issubdtype(numpy_dtype, np.floating):
        return np.full(shape, np.nan, numpy_dtype)
    if numpy_dtype == np.bool_:
        return np.ones(shape, numpy_dtype)
    return np.full(shape, min(_UNDEFINED, np.iinfo(numpy_dtype).max), numpy_dtype)


def _watch_memory(interpreter: Any) -> None:
    builder, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
    handle, numpy_dtype = interpreter.TensorHandle, interpreter._get_np_dtype
    stock_load, stock_store = builder.create_masked_load, builder.create_masked_store
    stock_rmw, stock_cas = builder.create_atomic_rmw, builder.create_atomic_cas
    stock_gather = builder.create_gather
    stock_call, stock_init = executor.__call__, executor._init_args_hst
    stock_restore = executor._restore_args_dev
    current: Launch | None = None
    dependent = False  # it may begin before the launch in front of it has ended

    def program(self: Any) -> int:
        x, y, z = self.grid_idx
        return int((x * self.grid_dim[1] + y) * self.grid_dim[2] + z)

    def touch(
        self: Any, kind: str, pointers: Any, lanes: NDArray[Any], size: int
    ) -> tuple[NDArray[Any], int]:
        """The addresses of the lanes that are on, and the extent that they lie in."""
        addresses = pointers.data
        every = addresses, lanes
        if not lanes.all():
            addresses, lanes = np.broadcast_arrays(addresses, lanes)
            addresses = addresses[lanes]
        addresses = addresses.ravel()
        if current is None or addresses.size == 0:
            return addresses, -1
        if (chain := order.watching()) is not None:
            chain.touch(self.grid_idx, kind, addresses, size)
        return addresses, current.touch(kind, self.grid_idx, addresses, size, every)

    def load(self: Any, pointers: Any, mask: Any, other: Any, *policy: Any, **options: Any) -> Any:
        dtype = pointers.get_element_ty()
        kind, lanes = numpy_dtype(dtype), np.asarray(mask.data)
        addresses, extent = touch(self, "load", pointers, lanes, kind.itemsize)
        if current is not None and addresses.size:
            current.loads.append((addresses, program(self), extent))
        if other is None and not lanes.all():
            other = handle(_undefined(pointers.data.shape, dtype, kind), dtype)
        return stock_load(self, pointers, mask, other, *policy, **options)

    def store(self: Any, pointers: Any, value: Any, mask: Any, *policy: Any, **options: Any) -> Any:
        lanes = np.asarray(mask.data)
        addresses, extent = touch(self, "store", pointers, lanes, value.data.dtype.itemsize)
        if current is not None and addresses.size:
            shape = np.broadcast_shapes(pointers.data.shape, lanes.shape)
            values = np.broadcast_to(value.data, shape)[np.broadcast_to(lanes, shape)]
            current.stores.append((addresses, program(self), values))
            current.written.add(extent)
        return stock_store(self, pointers, value, mask, *policy, **options)

    def rmw(self: Any, op: Any, pointers: Any, value: Any, mask: Any, *order: Any) -> Any:
        touch(self, "atomic", pointers, np.asarray(mask.data), value.data.dtype.itemsize)
        if current is not None:
            current.has_atomics = True
        return stock_rmw(self, op, pointers, value, mask, *order)

    def cas(self: Any, pointers: Any, compare: Any, value: Any, *order: Any) -> Any:
        touch(self, "atomic", pointers, np.array([True]), value.data.dtype.itemsize)
        if current is not None:
            current.has_atomics = True
        return stock_cas(self, pointers, compare, value, *order)

    def barrier(self: Any) -> None:
        if current is not None:
            current.barrier()

    def gather(self: Any, source: Any, index: Any, axis: int) -> Any:
        size = source.data.shape[axis]
        if index.data.min() < 0 or index.data.max() >= size:
            wrong = f"{index.data.min()} to {index.data.max()}"
            raise OutOfBounds(f"gather by program {self.grid_idx}: {wrong} in a tensor of {size}")
        return stock_gather(self, source, index, axis)

    def init(self: Any, arguments: Any, keywords: Any) -> Any:
        nonlocal current
        on_host = stock_init(self, arguments, keywords)
        named = [*zip(self.arg_names, on_host[0], strict=False), *on_host[1].items()]
        found = dict(found for name, a in named for found in tensors(name, a))
        current = Launch({**found, **{f"operand {i}": tensor for i, tensor in enumerate(beside.get())}})
        if (chain := order.watching()) is not None:
            chain.begin(self.fn.__name__, found, dependent)
        return on_host

    def restore(
        self: Any, arguments: Any, on_host: Any, keywords: Any, keywords_on_host: Any
    ) -> None:
        # Arguments in host memory were passed as they are: copying a storage onto itself would touch all its pages.
        values = (*arguments, *keywords.values())
        if any(t.device.type != "cpu" for value in values for _, t in tensors("", value)):
            stock_restore(self, arguments, on_host, keywords, keywords_on_host)

    def call(self: Any, *arguments: Any, **keywords: Any) -> Any:
        nonlocal current, dependent
        dependent = bool(keywords.get("launch_pdl"))
        try:
            with unwrapped(MemoryFault), np.errstate(all="ignore"):  # as a GPU does
                result = stock_call(self, *arguments, **keywords)
            if current is not None:
                current.check_races()
            if (chain := order.watching()) is not None:
                chain.end()
            return result
        finally:
            current = None

    builder.create_masked_load, builder.create_masked_store = load, store
    builder.create_atomic_rmw, builder.create_atomic_cas = rmw, cas
    builder.create_gather, builder.create_barrier = gather, barrier
    executor.__call__, executor._init_args_hst = call, init
    executor._restore_args_dev = restore
