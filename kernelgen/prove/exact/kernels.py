"""Kernels under Triton's interpreter, calculated in the field beside their numbers.

Each operation that makes floats has a rule for their elements; one that has none is refused where it runs. Casts change nothing,
lanes that a mask turns off hold the element of ``other``. What compares, and what chooses by it, goes by the numbers; what is
no algebra is the same random function as in a formula. A number that is put together of bits is the number that they are.
"""

from __future__ import annotations

import contextlib
import traceback
from typing import Any, Callable, Iterator, Mapping

import numpy as np
import triton.language as tl
from numpy.typing import NDArray

from kernelgen.families._repairs import widened
from kernelgen.prove.exact import field
from kernelgen.prove.exact.field import Elements
from kernelgen.prove.exact.formulas import Formulas
from kernelgen.prove.memory import Lost, beside, tensors, unwrapped

_Rule = Callable[..., Elements]  # from the operands of an operation


def _elements(value: Any) -> Elements:
    """Those of a float in a kernel."""
    found: Elements | None = getattr(value, "elements", None)
    if found is not None:
        return found
    if "number" in value.attr:  # of the kernel's text, kept from before
        return _constant(value)
    raise Lost("the elements of an operand were lost")


def _constant(value: Any) -> Elements:
    """Those of numbers of the text, which its types hold."""
    numbers = widened(value.data, value.dtype.scalar)
    if numbers.size == 1:
        return np.full(numbers.shape, field.of_float(numbers.item()), np.uint64)
    different, place = np.unique(numbers, return_inverse=True)
    elements: Elements = np.array([field.of_float(float(n)) for n in different], np.uint64)[place]
    return elements.reshape(numbers.shape)


def _choose(first_wins: Callable[..., NDArray[np.bool_]]) -> _Rule:
    def rule(x: Any, y: Any) -> Elements:
        return np.where(first_wins(_numbers(x), _numbers(y)), _elements(x), _elements(y))

    return rule


def _numbers(value: Any) -> NDArray[Any]:
    return widened(value.data, value.dtype.scalar)


def _divided(x: Any, y: Any) -> Elements:
    return field.multiply(_elements(x), field.inverse(_elements(y)))


def _function(name: str) -> _Rule:
    return lambda x: field.function(name, _elements(x))


def _dot(x: Any, y: Any, acc: Any, *options: Any) -> Elements:
    return field.add(field.product(_elements(x), _elements(y)), _elements(acc))


def _fma(x: Any, y: Any, z: Any) -> Elements:
    return field.add(field.multiply(_elements(x), _elements(y)), _elements(z))


def _same(x: Any, *kind: Any) -> Elements:
    return _elements(x)


_RULES: Mapping[str, _Rule] = {
    "get_null_value": lambda kind: np.zeros(1, np.uint64),
    **dict.fromkeys(("create_fp_ext", "create_fp_trunc", "create_fp_to_fp"), _same),
    **{name: lambda x, kind: field.of_integers(x.data) for name in ("create_si_to_fp", "create_ui_to_fp")},
    "create_fadd": lambda x, y: field.add(_elements(x), _elements(y)),
    "create_fsub": lambda x, y: field.subtract(_elements(x), _elements(y)),
    "create_fmul": lambda x, y: field.multiply(_elements(x), _elements(y)),
    "create_fneg": lambda x: field.negative(_elements(x)),
    "create_fma": _fma,
    **dict.fromkeys(("create_fdiv", "create_precise_divf", "create_approx_divf"), _divided),
    "create_fabs": lambda x: np.where(_numbers(x) < 0, field.negative(_elements(x)), _elements(x)),
    **{name: _choose(np.greater_equal) for name in ("create_maximumf", "create_maxnumf")},
    **{name: _choose(np.less_equal) for name in ("create_minimumf", "create_minnumf")},
    "create_select": lambda mask, x, y: np.where(mask.data, _elements(x), _elements(y)),
    "create_exp": _function("exp"),
    "create_erf": _function("erf"),
    "create_dot": _dot,
    "create_reshape": lambda x, shape, *reorder: _elements(x).reshape(shape),
    "create_trans": lambda x, axes: np.transpose(_elements(x), axes),
    "create_expand_dims": lambda x, axis: np.expand_dims(_elements(x), axis),
    **{name: lambda x, shape: np.broadcast_to(_elements(x), shape) for name in ("create_broadcast", "create_spread")},
    "create_splat": lambda kind, x: np.full(kind.shape, _elements(x)),
    "create_unsplat": lambda x: _elements(x)[:1],
    "create_cat": lambda x, y: np.concatenate([_elements(x), _elements(y)]),
    "create_join": lambda x, y: np.stack([_elements(x), _elements(y)], -1),
    "create_gather": lambda x, index, axis: np.take_along_axis(_elements(x), index.data, axis),
}
_CONSTANTS = ("get_fp16", "get_bf16", "get_fp32", "get_fp64")


@contextlib.contextmanager
def kernels_in(formulas: Formulas) -> Iterator[None]:
    """Inside, launches read and write the elements in the memory of ``formulas``."""
    from triton.runtime import interpreter

    interpreter._patch_lang(None)  # for good, so that what follows is on top
    builder, handle, memory = interpreter.InterpreterBuilder, interpreter.TensorHandle, formulas.memory

    def load(pointers: Any, mask: Any, other: Any, *policy: Any, **options: Any) -> Elements:
        addresses, lanes = pointers.data, np.broadcast_to(mask.data, pointers.data.shape)
        if other is None:
            elements = field.function("undefined", addresses)
        else:  # one without elements is of the interpreter's own making: what surrounds a descriptor
            elements = other.elements if hasattr(other, "elements") else _constant(other)
        elements = np.array(np.broadcast_to(elements, addresses.shape))
        elements[lanes] = memory.read(addresses[lanes])
        return elements

    def store(self: Any, pointers: Any, value: Any, mask: Any, *policy: Any, **options: Any) -> Any:
        if pointers.get_element_ty().is_floating():
            addresses = pointers.data
            lanes, elements = (np.broadcast_to(part, addresses.shape) for part in (mask.data, _elements(value)))
            memory.write(addresses[lanes], elements[lanes])
        return stock["create_masked_store"](self, pointers, value, mask, *policy, **options)

    def split(self: Any, x: Any) -> Any:
        made = stock["create_split"](self, x)
        if x.dtype.scalar.is_floating():
            for i, part in enumerate(made):
                part.elements = _elements(x)[..., i]
        return made

    def followed(name: str, rule: _Rule | None) -> Callable[..., Any]:
        """An operation that notes the elements of the floats that it makes."""

        def operation(self: Any, *operands: Any, **options: Any) -> Any:
            made = stock[name](self, *operands, **options)
            if isinstance(made, handle) and made.dtype.scalar.is_floating() and made.data.dtype != np.bool_:
                try:
                    if rule is not None:
                        made.elements = np.broadcast_to(rule(*operands, **options), made.data.shape)
                    elif name in _CONSTANTS or (name == "create_bitcast" and not operands[0].dtype.scalar.is_floating()):
                        made.elements = _constant(made)
                    else:
                        _elements(made)
                except Lost as error:
                    raise Lost(f"{name.removeprefix('create_')} {kernel_line()}: {error}") from None
            return made

        return operation

    rules = {**_RULES, "create_masked_load": load}
    names = [name for name in dir(builder) if name.startswith("create_") or name in (*_CONSTANTS, *rules)]
    stock = {name: getattr(builder, name) for name in names}
    changed: dict[tuple[Any, str], Any] = {(builder, name): followed(name, rules.get(name)) for name in names}
    changed[builder, "create_masked_store"] = store
    changed[builder, "create_split"] = split
    changed[interpreter.ReduceOps, "apply_impl"] = _reduced(interpreter.ReduceOps.apply_impl)
    changed[interpreter.ScanOps, "apply_impl"] = _integers_alone(interpreter.ScanOps.apply_impl)
    changed[interpreter.GridExecutor, "__call__"] = _launched(interpreter.GridExecutor.__call__, formulas)
    changed[tl.tensor, "T"] = property(_transposed(tl.tensor.T.fget))
    with replaced(changed):
        yield


def _reduced(stock: Callable[..., Any]) -> Callable[..., Any]:
    def reduced(self: Any, inputs: Any) -> Any:
        made = stock(self, inputs)
        if not inputs[0].dtype.is_floating():
            return made
        elements = _elements(inputs[0].handle)
        if self.combine_fn is tl.standard._sum_combine:
            found = field.total(elements, self.axis, self.keep_dims)
        elif self.combine_fn is tl.standard._elementwise_max:
            numbers = _numbers(inputs[0].handle)
            highest = numbers == np.max(numbers, self.axis, keepdims=True)
            found = np.where(highest, elements, np.uint64(2**63)).min(self.axis, keepdims=self.keep_dims)
        else:
            raise Lost(f"reduce {kernel_line()}: exact algebra has no rule for it")
        result = made[0] if isinstance(made, (list, tuple)) else made
        result.handle.elements = np.broadcast_to(found, result.handle.data.shape)
        return made

    return reduced


def _integers_alone(stock: Callable[..., Any]) -> Callable[..., Any]:
    def scanned(self: Any, inputs: Any) -> Any:
        if any(each.dtype.is_floating() for each in inputs):
            raise Lost(f"scan {kernel_line()}: exact algebra has no rule for it")
        return stock(self, inputs)

    return scanned


def _transposed(stock: Callable[..., Any]) -> Callable[..., Any]:
    def transposed(self: Any) -> Any:
        made = stock(self)
        if self.dtype.is_floating():
            made.handle.elements = np.transpose(_elements(self.handle))
        return made

    return transposed


def _launched(stock: Callable[..., Any], formulas: Formulas) -> Callable[..., Any]:
    def launched(self: Any, *arguments: Any, **options: Any) -> Any:
        for value in (*arguments, *options.values(), *beside.get()):
            for _, tensor in tensors("", value):
                formulas.memory.storage(tensor)
        formulas.paused = True
        try:
            with unwrapped(Lost):
                return stock(self, *arguments, **options)
        finally:
            formulas.paused = False

    return launched


@contextlib.contextmanager
def replaced(changed: Mapping[tuple[Any, str], Any]) -> Iterator[None]:
    """Inside, attributes, by (owner, name), are others."""
    before = {(owner, name): getattr(owner, name) for owner, name in changed}
    for (owner, name), value in changed.items():
        setattr(owner, name, value)
    try:
        yield
    finally:
        for (owner, name), value in before.items():
            setattr(owner, name, value)


def kernel_line() -> str:
    """The line of the kernel that runs."""
    for frame in reversed(traceback.extract_stack()):
        path = frame.filename.replace("\\", "/")
        if "/triton/" not in path and "/kernelgen/prove/" not in path and "/_repairs.py" not in path:
            return f"in line {frame.lineno} of {path.rsplit('/', 1)[-1]}"
    return "in no kernel"
