"""Repairs of Triton's interpreter, so that a kernel that passes under it is right on a GPU.

The stock interpreter computes bfloat16 and float8 on their bit patterns, reads and writes outside of tensors without a word,
lets 32-bit offsets wrap, and patches ``triton.language`` anew at each call of a helper. ``install()`` mends this for the
process. With it:

* bfloat16 and float8 arithmetic, reductions and casts round to nearest even, and casts to float8 saturate, as on the GPU.
* a load, store or atomic outside of the tensors that were passed to the launch raises ``OutOfBounds``, as does a gather
  outside of its source; lanes that a mask turns off and that name no ``other`` hold values that show up (NaN, a large
  integer) instead of zero.
* two programs of a launch that store to one address, or one that loads what another stores, raise ``Race``.
* 32-bit signed integer arithmetic that wraps raises ``IntegerOverflow``.
* programmatic dependent launch is a no-op, as programs run one after the other.

It reaches into private parts of Triton, known for 3.6 to 3.9; each is looked up first, so that a version without it fails
with a message rather than with wrong numbers.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, Callable, ClassVar

import numpy as np
import torch
import triton
import triton.language as tl
from numpy.typing import NDArray

from kernelgen.memory import Launch, MemoryFault, OutOfBounds, Race, tensors

__all__ = ["IntegerOverflow", "MemoryFault", "OutOfBounds", "Race", "install"]

_KNOWN = "3.6 to 3.9"
_PARTS = {
    "InterpreterBuilder": (
        "cast_impl",
        "create_fp_to_fp",
        "create_dot",
        "binary_op",
        "unary_op",
        "create_fma",
        "create_add",
        "create_sub",
        "create_mul",
        "create_gather",
        "create_masked_load",
        "create_masked_store",
        "create_atomic_rmw",
        "create_atomic_cas",
    ),
    "ReduceOps": ("apply_impl",),
    "ScanOps": ("apply_impl",),
    "GridExecutor": ("__call__", "_init_args_hst", "_restore_args_dev"),
    "_LangPatchScope": (),
    "TensorHandle": (),
    "InterpreterError": (),
    "interpreter_builder": ("options",),
    "_patch_lang": (),
    "_patch_lang_core": (),
    "_patch_lang_tensor": (),
    "_get_np_dtype": (),
}


class IntegerOverflow(MemoryFault):
    """A 32-bit signed integer operation whose result does not fit."""


@functools.cache
def install() -> None:
    """Repair the interpreter of this process; further calls do nothing.

    Raises:
        RuntimeError: Triton was imported without TRITON_INTERPRET=1, or lacks a part that the repairs replace.
    """
    if not triton.knobs.runtime.interpret:
        raise RuntimeError(
            "kernels are not interpreted: set TRITON_INTERPRET=1 before triton is imported"
        )
    from triton.runtime import interpreter

    _require_parts(interpreter)
    _speed_up_dtypes(interpreter)
    _speed_up_shapes()
    _repair_numbers(interpreter)
    _repair_language(interpreter)
    _watch_integers(interpreter)
    _watch_memory(interpreter)
    _ignore_dependent_launch()


def _require_parts(interpreter: Any) -> None:
    for owner, names in _PARTS.items():
        found = getattr(interpreter, owner, None)
        missing = [name for name in names if not hasattr(found, name)]
        if found is None or missing:
            part = owner if found is None else f"{owner}.{missing[0]}"
            raise RuntimeError(
                f"triton {triton.__version__}: triton.runtime.interpreter has no {part}, which the repairs of "
                f"kernelgen/interpreter.py replace; they are known to fit triton {_KNOWN}"
            )


def _speed_up_dtypes(interpreter: Any) -> None:
    # The stock function makes its table anew at each call: a tenth of all time.
    stock = interpreter._get_np_dtype
    known: dict[str, np.dtype[Any]] = {}

    def numpy_dtype(dtype: Any) -> np.dtype[Any]:
        scalar = dtype.scalar
        if scalar.is_ptr():
            return np.dtype(np.uint64)
        if scalar.name not in known:
            known[scalar.name] = stock(scalar)
        return known[scalar.name]

    interpreter._get_np_dtype = numpy_dtype


def _speed_up_shapes() -> None:
    """What a type and a tensor derive from their shape is derived once a shape: a fifth of all time."""
    stock_type, stock_tensor = tl.block_type.__init__, tl.tensor.__init__
    types: dict[tuple[Any, ...], dict[str, Any]] = {}
    of_tensors: dict[str, dict[str, Any]] = {}

    def make_type(self: Any, element_ty: Any, shape: Any) -> None:
        sizes = (getattr(size, "value", size) for size in shape)
        key = element_ty.name, *((type(size), size) for size in sizes)  # a size must be an int
        if key not in types:
            stock_type(self, element_ty, shape)
            types[key] = dict(vars(self))
        vars(self).update(types[key], element_ty=element_ty)

    def make_tensor(self: Any, data: Any, kind: Any) -> None:
        if kind.name not in of_tensors:
            stock_tensor(self, data, kind)
            of_tensors[kind.name] = {**vars(self), "handle": None}
        vars(self).update(of_tensors[kind.name], handle=data, type=kind, dtype=kind.scalar)

    tl.block_type.__init__, tl.tensor.__init__ = make_type, make_tensor


# Numbers. Triton holds bfloat16 as uint16 and float8 as uint8: widen to float32, compute, round back.

_FLOAT8 = {
    tl.float8e4nv: torch.float8_e4m3fn,
    tl.float8e5: torch.float8_e5m2,
    tl.float8e4b8: torch.float8_e4m3fnuz,
    tl.float8e5b16: torch.float8_e5m2fnuz,
}


@functools.cache
def _float8_values(dtype: tl.dtype) -> NDArray[np.float32]:
    values: NDArray[np.float32] = (
        torch.arange(256, dtype=torch.uint8).view(_FLOAT8[dtype]).float().numpy()
    )
    return values


def _is_narrow(dtype: tl.dtype) -> bool:
    return dtype == tl.bfloat16 or dtype in _FLOAT8


def _widen(data: NDArray[Any], dtype: tl.dtype) -> NDArray[Any]:
    if dtype == tl.bfloat16:
        return (data.astype(np.uint32) << 16).view(np.float32)
    if dtype in _FLOAT8:
        data = _float8_values(dtype)[data]
    return data


def _narrow(data: NDArray[Any], dtype: tl.dtype, toward_zero: bool = False) -> NDArray[Any]:
    data = np.ascontiguousarray(data, dtype=np.float32)
    if dtype == tl.bfloat16:
        bits = data.view(np.uint32)
        half = 0 if toward_zero else 0x7FFF + ((bits >> 16) & 1)
        return np.where(np.isnan(data), np.uint16(0x7FC0), ((bits + half) >> 16).astype(np.uint16))
    if toward_zero:
        raise NotImplementedError(f"casts to {dtype} that round toward zero")
    largest = torch.finfo(_FLOAT8[dtype]).max  # cvt.rn.satfinite: saturates, NaN stays NaN
    clamped = torch.from_numpy(np.clip(data, -largest, largest))
    return clamped.to(_FLOAT8[dtype]).view(torch.uint8).numpy()


def _repair_numbers(interpreter: Any) -> None:
    builder, handle = interpreter.InterpreterBuilder, interpreter.TensorHandle
    numpy_dtype = interpreter._get_np_dtype
    stock_cast, stock_fp_to_fp = builder.cast_impl, builder.create_fp_to_fp
    toward_zero = interpreter._ir.ROUNDING_MODE.RTZ

    def cast(self: Any, source: Any, to: Any, rounding: Any = None) -> Any:
        old, new = source.dtype.scalar, to.scalar
        if not (_is_narrow(old) or _is_narrow(new)):
            if rounding == toward_zero:
                return stock_fp_to_fp(self, source, to, rounding)
            return stock_cast(self, source, to)
        values = _widen(source.data, old)
        if _is_narrow(new):
            return handle(_narrow(values, new, rounding == toward_zero), new)
        return handle(values.astype(numpy_dtype(new)), new)

    def dot(self: Any, a: Any, b: Any, acc: Any, *options: Any) -> Any:
        # The sum of a tile is rounded to fp32 once, so that a row's bits do not depend on its place in the tile.
        x = _widen(a.data, a.dtype.scalar).astype(np.float64)
        y = _widen(b.data, b.dtype.scalar).astype(np.float64)
        return handle(np.matmul(x, y).astype(acc.data.dtype) + acc.data, acc.dtype.scalar)

    def in_float32(stock: Callable[..., Any]) -> Callable[..., Any]:
        def repaired(self: Any, *arguments: Any) -> Any:
            dtypes = [a.dtype.scalar for a in arguments if isinstance(a, handle)]
            narrow = next((d for d in dtypes if _is_narrow(d)), None)
            if narrow is None:
                return stock(self, *arguments)
            wide = [
                handle(_widen(a.data, a.dtype.scalar), tl.float32) if isinstance(a, handle) else a
                for a in arguments
            ]
            result = stock(self, *wide).data
            return handle(_narrow(result, narrow) if result.dtype == np.float32 else result, narrow)

        return repaired

    def of_tensors_in_float32(stock: Callable[..., Any]) -> Callable[..., Any]:
        def retype(tensor: Any, data: NDArray[Any], dtype: tl.dtype) -> Any:
            kind = tl.block_type(dtype, tensor.shape) if tensor.type.is_block() else dtype
            return tl.tensor(handle(data, dtype), kind)

        def repaired(self: Any, inputs: Any) -> Any:
            narrow = next((t.dtype for t in inputs if _is_narrow(t.dtype)), None)
            if narrow is None:
                return stock(self, inputs)
            wide = tuple(
                retype(t, _widen(t.handle.data, t.dtype), tl.float32) if t.dtype == narrow else t
                for t in inputs
            )
            results = stock(self, wide)
            results = results if isinstance(results, (list, tuple)) else (results,)
            return tuple(
                retype(t, _narrow(t.handle.data, narrow), narrow) if t.dtype == tl.float32 else t
                for t in results
            )

        return repaired

    builder.cast_impl = cast
    builder.create_fp_to_fp = cast
    builder.create_dot = dot
    for name in ("binary_op", "unary_op", "create_fma"):
        setattr(builder, name, in_float32(getattr(builder, name)))
    for owner in (interpreter.ReduceOps, interpreter.ScanOps):
        owner.apply_impl = of_tensors_in_float32(owner.apply_impl)


def _repair_language(interpreter: Any) -> None:
    """Patch triton.language once and for good; add what 3.6 lacks."""
    stock_patch, stock_core = interpreter._patch_lang, interpreter._patch_lang_core
    stock_tensor, builder = interpreter._patch_lang_tensor, interpreter.InterpreterBuilder
    float8 = {"fp8e4b8": tl.float8e4b8, "fp8e5b16": tl.float8e5b16}

    def patch_tensor(tensor: Any, scope: Any) -> None:
        stock_tensor(tensor, scope)
        # 3.6 calls int() on an array of one element, which numpy 2.4 refuses
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    def patch_core(language: Any, scope: Any) -> None:
        stock_core(language, scope)
        stock_to_ir = language.dtype.to_ir
        scope.set_attr(
            language.dtype, "to_ir", lambda self, b: float8.get(self.name) or stock_to_ir(self, b)
        )

    done = False

    def patch_once(function: Any) -> Any:
        nonlocal done
        if not done:
            stock_patch(_SeesLanguage)
            done = True
        return interpreter._LangPatchScope()  # nothing to restore

    stock_splat = builder.create_splat

    def splat(self: Any, kind: Any, value: Any) -> Any:
        result = stock_splat(self, kind, value)
        if value.data.dtype == np.bool_:  # stock takes the type of what was compared, which no mask may be
            return interpreter.TensorHandle(result.data.astype(np.bool_), tl.int1)
        return result

    builder.create_splat = splat
    for name, dtype in float8.items():
        if not hasattr(builder, f"get_{name}_ty"):
            setattr(builder, f"get_{name}_ty", lambda self, dtype=dtype: dtype)
    interpreter._patch_lang_tensor = patch_tensor
    interpreter._patch_lang_core = patch_core
    interpreter._patch_lang = patch_once


class _SeesLanguage:
    """What ``_patch_lang`` asks of a kernel: the modules that it can name."""

    __globals__: ClassVar = {"tl": tl, "core": tl.core}


def _ignore_dependent_launch() -> None:
    import triton.language.extra.cuda as cuda

    for name in ("gdc_wait", "gdc_launch_dependents"):
        setattr(cuda, name, lambda **options: None)


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

    builder.create_add = watched(builder.create_add, np.add)
    builder.create_sub = watched(builder.create_sub, np.subtract)
    builder.create_mul = watched(builder.create_mul, np.multiply)


# Memory. A launch knows the extents of its tensors and notes which program loads and stores where.

_UNDEFINED = 1_000_003  # what an undefined integer reads as: out of any bounds, far from overflow


def _undefined(shape: tuple[int, ...], dtype: tl.dtype, numpy_dtype: np.dtype[Any]) -> NDArray[Any]:
    if _is_narrow(dtype):
        return np.broadcast_to(_narrow(np.array([np.nan]), dtype), shape)
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

    def program(self: Any) -> int:
        x, y, z = self.grid_idx
        return int((x * self.grid_dim[1] + y) * self.grid_dim[2] + z)

    def touch(
        self: Any, kind: str, pointers: Any, lanes: NDArray[Any], size: int
    ) -> tuple[NDArray[Any], int]:
        """The addresses of the lanes that are on, and the extent that they lie in."""
        addresses = pointers.data
        if not lanes.all():
            addresses, lanes = np.broadcast_arrays(addresses, lanes)
            addresses = addresses[lanes]
        addresses = addresses.ravel()
        if current is None or addresses.size == 0:
            return addresses, -1
        return addresses, current.place(kind, self.grid_idx, addresses, size)

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
        current = Launch(dict(found for name, a in named for found in tensors(name, a)))
        return on_host

    def restore(
        self: Any, arguments: Any, on_host: Any, keywords: Any, keywords_on_host: Any
    ) -> None:
        # Arguments in host memory were passed as they are: copying a storage onto itself would touch all its pages.
        values = (*arguments, *keywords.values())
        if any(t.device.type != "cpu" for value in values for _, t in tensors("", value)):
            stock_restore(self, arguments, on_host, keywords, keywords_on_host)

    def call(self: Any, *arguments: Any, **keywords: Any) -> Any:
        nonlocal current
        try:
            with np.errstate(all="ignore"):  # as a GPU does
                result = stock_call(self, *arguments, **keywords)
            if current is not None:
                current.check_races()
            return result
        except interpreter.InterpreterError as error:
            cause: BaseException | None = error
            while isinstance(cause, interpreter.InterpreterError):
                cause = cause.__cause__
            if isinstance(cause, MemoryFault):
                raise cause from None
            raise
        finally:
            current = None

    builder.create_masked_load, builder.create_masked_store = load, store
    builder.create_atomic_rmw, builder.create_atomic_cas = rmw, cas
    builder.create_gather = gather
    executor.__call__, executor._init_args_hst = call, init
    executor._restore_args_dev = restore
