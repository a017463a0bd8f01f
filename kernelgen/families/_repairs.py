"""Repairs of Triton's interpreter, so that what a kernel computes under it is what it computes on a GPU.

The stock interpreter takes the bits of bfloat16 and float8 for integers in a product, a reduction and a cast, makes masks of
the type of what was compared, and patches ``triton.language`` anew at each call of a helper. ``install()`` mends this for the
process. With it:

* bfloat16 and float8 arithmetic, reductions and casts round to nearest even, and casts to float8 saturate, as on the GPU.
* programmatic dependent launch is a no-op, as programs run one after the other.
* programs run about three times as fast.

It reaches into private parts of Triton, known for 3.6 to 3.9; each is looked up first, so that a version without it fails
with a message rather than with wrong numbers. The generated package has a copy of this module, and installs it where kernels
are interpreted; the first copy of a process serves all.
"""

from __future__ import annotations

import ast
import functools
import importlib
import linecache
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
import triton
import triton.language as tl
from numpy.typing import NDArray

_KNOWN = "3.6 to 3.9"
_MARK = "_repaired_by_kernelgen"
_OF_TWO = (  # operations of the language
    *("add", "sub", "mul", "truediv", "floordiv", "mod", "and_", "or_", "xor_"),
    *("less_than", "less_equal", "greater_than", "greater_equal", "equal", "not_equal"),
)
_PARTS = {
    "InterpreterBuilder": (
        "cast_impl",
        "create_fp_to_fp",
        "create_dot",
        "binary_op",
        "unary_op",
        "create_fma",
        "create_splat",
    ),
    "ReduceOps": ("apply_impl",),
    "ScanOps": ("apply_impl",),
    "FunctionRewriter": ("rewrite_ast", "_compile_and_exec"),
    "interpreter_semantic": ("to_tensor",),
    "_LangPatchScope": (),
    "TensorHandle": (),
    "_patch_lang": (),
    "_patch_lang_core": (),
    "_patch_lang_tensor": (),
    "_patch_attr": (),
    "TritonSemantic": ("binary_op_type_checking_impl", "broadcast_impl_value", *_OF_TWO),
    "_get_np_dtype": (),
}


def install() -> None:
    """Repair the interpreter of this process, once.

    Raises:
        RuntimeError: Triton was imported without TRITON_INTERPRET=1, or lacks a part that the repairs replace.
    """
    if not triton.knobs.runtime.interpret:
        raise RuntimeError("kernels are not interpreted: set TRITON_INTERPRET=1 before triton is imported")
    from triton.runtime import interpreter

    if hasattr(interpreter, _MARK):
        return
    require_parts(interpreter, _PARTS)
    _speed_up_dtypes(interpreter)
    _speed_up_shapes()
    _speed_up_values(interpreter)
    _speed_up_operands(interpreter)
    _speed_up_calls(interpreter)
    _speed_up_rewriting(interpreter)
    _repair_numbers(interpreter)
    _repair_language(interpreter)
    _ignore_dependent_launch()
    setattr(interpreter, _MARK, True)


def require_parts(interpreter: Any, parts: Mapping[str, Sequence[str]]) -> None:
    """Raise RuntimeError for what this Triton's interpreter lacks of ``parts``: names, and the attributes of each."""
    for owner, names in parts.items():
        found = getattr(interpreter, owner, None)
        missing = [name for name in names if not hasattr(found, name)]
        if found is None or missing:
            part = owner if found is None else f"{owner}.{missing[0]}"
            raise RuntimeError(
                f"triton {triton.__version__}: triton.runtime.interpreter has no {part}, which repairs of its numbers "
                f"replace; they are known to fit triton {_KNOWN}"
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
    of_tensors: dict[str, tuple[Any, Any]] = {}

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
            of_tensors[kind.name] = self.shape, self.numel
        self.handle, self.type, self.dtype = data, kind, kind.scalar
        self.shape, self.numel = of_tensors[kind.name]

    tl.block_type.__init__, tl.tensor.__init__ = make_type, make_tensor


def _speed_up_values(interpreter: Any) -> None:
    """What is asked of each value and type is answered for the usual ones first."""
    stock_unwrap, stock_equal = tl.core._unwrap_if_constexpr, tl.dtype.__eq__
    usual = frozenset({bool, int, float, str, type(None), tl.tensor, tl.dtype, tl.block_type})

    def unwrap(value: Any) -> Any:
        return value if type(value) in usual else stock_unwrap(value)

    def equal(self: Any, other: Any) -> bool:
        same: bool = self.name == other.name if type(other) is tl.dtype else stock_equal(self, other)
        return same

    handle = interpreter.TensorHandle
    stock_check = handle.__post_init__
    fitting: set[tuple[Any, str]] = set()

    def check(self: Any) -> None:
        pair = self.data.dtype, self.dtype.name
        if pair not in fitting:
            stock_check(self)
            fitting.add(pair)

    tl.core._unwrap_if_constexpr, tl.dtype.__eq__ = unwrap, equal
    handle.__post_init__ = check


def _speed_up_operands(interpreter: Any) -> None:
    """What two operands come to, and what is made of them, is found once for their types, as is the tensor of a number."""
    semantic, handle = interpreter.TritonSemantic, interpreter.TensorHandle

    def key(value: Any) -> str:
        return value.type.name if isinstance(value, tl.tensor) else repr(value)

    def spread(self: Any, value: Any, shape: Any) -> Any:
        data = np.broadcast_to(value.data, shape)
        return handle(data, tl.int1 if data.dtype == np.bool_ else value.dtype.scalar)

    def fit(self: Any, value: Any, wanted: Any) -> Any:
        if isinstance(wanted, tl.tensor):  # a number
            return wanted
        if value.type.name == wanted.name:
            return value
        if value.dtype.name != wanted.scalar.name:
            value = self.cast(value, wanted.scalar)
        if value.type.name == wanted.name:
            return value
        return tl.tensor(self.builder.create_spread(value.handle, wanted.shape), wanted)

    def once(stock: Callable[..., Any]) -> Callable[..., Any]:
        known: dict[tuple[Any, ...], Any] = {}

        def pair(self: Any, left: Any, right: Any, *rules: Any, **named: Any) -> Any:
            asked = key(left), key(right), rules, *named.items()
            if asked in known:
                x, y = known[asked]
                return fit(self, left, x), fit(self, right, y)
            found = stock(self, left, right, *rules, **named)
            for before, after in zip((left, right), found, strict=True):
                if not isinstance(before, tl.tensor):
                    after.handle.set_attr("number", True)
            if len(known) == 10_000:  # numbers may have no end
                known.clear()
            known[asked] = tuple(
                after.type if isinstance(before, tl.tensor) else after
                for before, after in zip((left, right), found, strict=True)
            )
            return found

        return pair

    def found_once(stock: Callable[..., Any]) -> Callable[..., Any]:
        known: dict[tuple[Any, ...], Any] = {}

        def operation(self: Any, left: Any, right: Any, *rules: Any, **named: Any) -> Any:
            asked = key(left), key(right), rules, *named.items()
            if asked not in known:
                if len(known) == 10_000:
                    known.clear()
                made, known[asked] = noted(stock, self, left, right, *rules, **named)
                return made
            if known[asked] is None:
                return stock(self, left, right, *rules, **named)
            create, x, y, kind = known[asked]
            made = getattr(self.builder, create)(fit(self, left, x).handle, fit(self, right, y).handle)
            return self.tensor(made, kind)

        return operation

    def noted(stock: Callable[..., Any], self: Any, left: Any, right: Any, *rules: Any, **named: Any) -> tuple[Any, Any]:
        """What an operation makes, and how, if that is one call of the builder on the operands as they were fitted."""
        builder, fitted = _Noted(self.builder), []

        def pair(*operands: Any, **kinds: Any) -> Any:
            fitted.append(self.binary_op_type_checking_impl(*operands, **kinds))
            return fitted[-1]

        beside = type(self)(builder)
        beside.binary_op_type_checking_impl = pair
        made = stock(beside, left, right, *rules, **named)
        if len(fitted) != 1 or len(builder.calls) != 1:
            return made, None
        (pair_made,), ((create, operands, result),) = fitted, builder.calls
        if [*map(id, operands)] != [id(each.handle) for each in pair_made] or result is not made.handle:
            return made, None
        wanted = (t.type if isinstance(given, tl.tensor) else t for t, given in zip(pair_made, (left, right), strict=True))
        return made, (create, *wanted, made.type)

    interpreter.InterpreterBuilder.create_spread = spread
    for name in ("binary_op_type_checking_impl", "broadcast_impl_value"):
        setattr(semantic, name, once(getattr(semantic, name)))
    for name in _OF_TWO:
        setattr(semantic, name, found_once(getattr(semantic, name)))


class _Noted:
    """A builder, and what it was called for: names, operands and results."""

    def __init__(self, builder: Any) -> None:
        self._builder, self.calls = builder, list[tuple[str, tuple[Any, ...], Any]]()

    def __getattr__(self, name: str) -> Any:
        member = getattr(self._builder, name)
        if not name.startswith("create_"):
            return member

        def call(*operands: Any, **named: Any) -> Any:
            made = member(*operands, **named)
            self.calls.append((name, (*operands, *named.values()), made))
            return made

        return call


def _speed_up_calls(interpreter: Any) -> None:
    """What stands between a kernel and a function of the language, two calls and a dictionary, goes."""

    def patch(owner: Any, name: str, member: Any, builder: Any, scope: Any) -> None:
        function, semantic = getattr(member, "__wrapped__", member), interpreter.TritonSemantic(builder)

        def call(*arguments: Any, **named: Any) -> Any:
            named["_semantic"] = semantic
            return function(*arguments, **named)

        scope.set_attr(owner, name, call)

    interpreter._patch_attr = patch


def _speed_up_rewriting(interpreter: Any) -> None:
    """A kernel's lines are told by its code, not by tokens, and its tree is gone through once, not four times."""
    rewriter = interpreter.FunctionRewriter
    stock = rewriter.rewrite_ast

    def rewrite(self: Any) -> Any:
        code = self.fn.__code__
        if not hasattr(code, "co_positions"):  # Python 3.10
            return stock(self)
        end = max(place[1] or 0 for place in code.co_positions())
        linecache.checkcache(code.co_filename)
        lines = linecache.getlines(code.co_filename, self.fn.__globals__)[code.co_firstlineno - 1 : end]
        start = next((i for i, line in enumerate(lines) if line.startswith("def ")), None)
        if start is None:  # inside of something else, or its text is gone
            return stock(self)
        self.filename, self.def_file_lineno = code.co_filename, code.co_firstlineno + start
        tree = ast.parse("\n" * (self.def_file_lineno - 1) + "".join(lines[start:]))
        for node in ast.walk(tree):
            if isinstance(node, ast.Assign) and len(node.targets) == 1:
                node.value = tensor_of(node)
            elif isinstance(node, ast.Assign) or (isinstance(node, ast.Compare) and len(node.ops) > 1):
                return stock(self)  # refuses the first, and makes something of the second since 3.9
        return self._compile_and_exec(tree)

    def tensor_of(assigned: ast.Assign) -> ast.expr:
        """``interpreter_semantic.to_tensor(value, False)``, which Triton makes of a value."""
        place = {name: getattr(assigned, name) for name in ("lineno", "col_offset", "end_lineno", "end_col_offset")}
        semantic = ast.Name("interpreter_semantic", ast.Load(), **place)
        function = ast.Attribute(semantic, "to_tensor", ast.Load(), **place)
        return ast.Call(function, [assigned.value, ast.Constant(False, **place)], [], **place)

    rewriter.rewrite_ast = rewrite


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


_NARROW = frozenset({"bf16", *(dtype.name for dtype in _FLOAT8)})


def is_narrow(dtype: tl.dtype) -> bool:
    return dtype.name in _NARROW


def widened(data: NDArray[Any], dtype: tl.dtype) -> NDArray[Any]:
    if dtype == tl.bfloat16:
        return (data.astype(np.uint32) << 16).view(np.float32)
    if dtype in _FLOAT8:
        data = _float8_values(dtype)[data]
    return data


def narrowed(data: NDArray[Any], dtype: tl.dtype, toward_zero: bool = False) -> NDArray[Any]:
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
        if not (is_narrow(old) or is_narrow(new)):
            if rounding == toward_zero:
                return stock_fp_to_fp(self, source, to, rounding)
            return stock_cast(self, source, to)
        values = widened(source.data, old)
        if is_narrow(new):
            return handle(narrowed(values, new, rounding == toward_zero), new)
        return handle(values.astype(numpy_dtype(new)), new)

    def dot(self: Any, a: Any, b: Any, acc: Any, *options: Any) -> Any:
        # The sum of a tile is rounded to fp32 once, so that a row's bits do not depend on its place in the tile.
        x = widened(a.data, a.dtype.scalar).astype(np.float64)
        y = widened(b.data, b.dtype.scalar).astype(np.float64)
        return handle(np.matmul(x, y).astype(acc.data.dtype) + acc.data, acc.dtype.scalar)

    def in_float32(stock: Callable[..., Any]) -> Callable[..., Any]:
        def repaired(self: Any, *arguments: Any) -> Any:
            for a in arguments:
                if isinstance(a, handle) and is_narrow(narrow := a.dtype.scalar):
                    break
            else:
                return stock(self, *arguments)
            wide = [
                handle(widened(a.data, a.dtype.scalar), tl.float32) if isinstance(a, handle) else a
                for a in arguments
            ]
            result = stock(self, *wide).data
            return handle(narrowed(result, narrow) if result.dtype == np.float32 else result, narrow)

        return repaired

    def of_tensors_in_float32(stock: Callable[..., Any]) -> Callable[..., Any]:
        def retype(tensor: Any, data: NDArray[Any], dtype: tl.dtype) -> Any:
            kind = tl.block_type(dtype, tensor.shape) if tensor.type.is_block() else dtype
            return tl.tensor(handle(data, dtype), kind)

        def repaired(self: Any, inputs: Any) -> Any:
            narrow = next((t.dtype for t in inputs if is_narrow(t.dtype)), None)
            if narrow is None:
                return stock(self, inputs)
            wide = tuple(
                retype(t, widened(t.handle.data, t.dtype), tl.float32) if t.dtype == narrow else t
                for t in inputs
            )
            results = stock(self, wide)
            results = results if isinstance(results, (list, tuple)) else (results,)
            return tuple(
                retype(t, narrowed(t.handle.data, narrow), narrow) if t.dtype == tl.float32 else t
                for t in results
            )

        return repaired

    def of_bits(stock: Callable[..., Any]) -> Callable[..., Any]:
        # What tl.sort is made of, which else goes number by number.
        def repaired(self: Any, inputs: Any) -> Any:
            if self.combine_fn is not tl.standard._xor_combine:
                return stock(self, inputs)
            (found,) = inputs
            bits = np.bitwise_xor.reduce(found.handle.data, axis=self.axis, keepdims=self.keep_dims)
            return self.to_tensor(bits, found.dtype)

        return repaired

    builder.cast_impl = cast
    builder.create_fp_to_fp = cast
    builder.create_dot = dot
    for name in ("binary_op", "unary_op", "create_fma"):
        setattr(builder, name, in_float32(getattr(builder, name)))
    for owner in (interpreter.ReduceOps, interpreter.ScanOps):
        owner.apply_impl = of_tensors_in_float32(owner.apply_impl)
    interpreter.ReduceOps.apply_impl = of_bits(interpreter.ReduceOps.apply_impl)


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
    # What kernels import from, and what they may name, are two modules.
    for cuda in (importlib.import_module("triton.language.extra.cuda"), tl.extra.cuda):
        for name in ("gdc_wait", "gdc_launch_dependents"):
            setattr(cuda, name, lambda **options: None)
