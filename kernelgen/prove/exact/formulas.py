"""Formulas in torch, calculated in the field beside their numbers: the references of the families, as they stand.

What moves numbers moves their elements, by the same operation. What chooses among numbers chooses by the numbers and takes the
element of the chosen one. What has no rule makes numbers without elements, which is an error where somebody asks for them.
"""

from __future__ import annotations

import functools
from typing import Any, Callable, Mapping, Sequence

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from kernelgen.prove.exact import field
from kernelgen.prove.exact.field import Elements
from kernelgen.prove.exact.memory import Memory
from kernelgen.prove.memory import Lost

# Numbers go elsewhere, and stay what they are.
_MOVES = ("clone", "index", "index_put_", "index_select", "cat", "stack", "where", "repeat", "gather", "flip", "_unsafe_view")
# What is new and holds nothing yet, or numbers that are drawn: random elements.
_NEW = ("empty", "empty_strided", "empty_like", "new_empty", "new_empty_strided", "rand", "randn", "set_")

_Read = Callable[[Any], Elements]  # the elements of a tensor or a number


def _of_numbers(tensor: torch.Tensor) -> Elements:
    """The elements of numbers that a program names."""
    if not tensor.is_floating_point():
        return field.of_integers(tensor.numpy())
    found = [field.of_float(number) for number in tensor.double().flatten().tolist()]
    return np.array(found, np.uint64).reshape(tuple(tensor.shape))


def _filled(value: Callable[..., float]) -> Callable[..., Elements]:
    return lambda read, *args, **options: read(float(value(*args)))


def _divided(read: _Read, x: Any, y: Any) -> Elements:
    return field.multiply(read(x), field.inverse(read(y)))


def _clamped(read: _Read, x: torch.Tensor, low: float | None = None, high: float | None = None) -> Elements:
    elements = read(x)
    if low is not None:
        elements = np.where((x < low).numpy(), read(low), elements)
    if high is not None:
        elements = np.where((x > high).numpy(), read(high), elements)
    return elements


def _power(read: _Read, x: Any, y: Any) -> Elements:
    if not isinstance(y, torch.Tensor) and y == 2:
        return field.multiply(read(x), read(x))
    return field.function("pow", field.multiply(field.function("base", read(x)), read(y)))


def _highest(read: _Read, x: torch.Tensor, axis: Sequence[int] = (), keepdim: bool = False) -> Elements:
    highest = torch.amax(x, list(axis), keepdim=True)
    chosen = np.where((x == highest).numpy(), read(x), np.uint64(2**63))
    return np.asarray(chosen.min(tuple(axis) or None, keepdims=keepdim))


def _sum(read: _Read, x: torch.Tensor, axis: Any = None, keepdim: bool = False, **dtype: Any) -> Elements:
    return field.total(read(x), tuple(axis) if axis else None, keepdim)


def _logistic(read: _Read, x: torch.Tensor) -> Elements:
    one = read(1.0)
    return field.inverse(field.add(one, field.function("exp", field.negative(read(x)))))


_RULES: Mapping[str, Callable[..., Elements]] = {
    "lift_fresh": lambda read, x: _of_numbers(x),
    "zeros": _filled(lambda *_: 0),
    "zeros_like": _filled(lambda *_: 0),
    "new_zeros": _filled(lambda *_: 0),
    "ones": _filled(lambda *_: 1),
    "ones_like": _filled(lambda *_: 1),
    "full": _filled(lambda size, value: value),
    "new_full": _filled(lambda x, size, value: value),
    "scalar_tensor": _filled(lambda value: value),
    "_to_copy": lambda read, x, **dtype: read(x),
    "copy_": lambda read, x, y, non_blocking=False: read(y),
    "fill_": lambda read, x, y: read(y),
    "zero_": lambda read, x: read(0.0),
    "add": lambda read, x, y: field.add(read(x), read(y)),
    "sub": lambda read, x, y: field.subtract(read(x), read(y)),
    "rsub": lambda read, x, y: field.subtract(read(y), read(x)),
    "mul": lambda read, x, y: field.multiply(read(x), read(y)),
    "div": _divided,
    "reciprocal": lambda read, x: field.inverse(read(x)),
    "neg": lambda read, x: field.negative(read(x)),
    "abs": lambda read, x: np.where((x < 0).numpy(), field.negative(read(x)), read(x)),
    "pow": _power,
    "round": lambda read, x: field.function("round", read(x)),
    "exp": lambda read, x: field.function("exp", read(x)),
    "erf": lambda read, x: field.function("erf", read(x)),
    "sigmoid": _logistic,
    "clamp": _clamped,
    "maximum": lambda read, x, y: np.where((x < y).numpy(), read(y), read(x)),
    "minimum": lambda read, x, y: np.where((y < x).numpy(), read(y), read(x)),
    "amax": _highest,
    "max": _highest,
    "sum": _sum,
    "mv": lambda read, x, y: field.product(read(x), read(y)[:, None])[:, 0],
    "mm": lambda read, x, y: field.product(read(x), read(y)),
    "bmm": lambda read, x, y: field.product(read(x), read(y)),
}


class Formulas(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Operations of torch on the CPU note in ``memory`` the elements of what they make."""

    def __init__(self, memory: Memory) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.memory = memory
        self.paused = False  # kernels run

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled here, and the compiler takes seconds to import

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name, changes, calculates = _kind(func)
        if self.paused or not calculates:
            return func(*args, **kwargs)
        if changes:  # what chooses must see the numbers as they were
            elements = self._calculate(name, func, args, kwargs) if _is_float(args[0]) else ""
        made = func(*args, **kwargs)
        results = [made] if isinstance(made, torch.Tensor) else tree_leaves(made)
        if not changes:
            elements = self._calculate(name, func, args, kwargs) if any(map(_is_float, results)) else ""
        for tensor in results:
            if _is_float(tensor):
                if isinstance(elements, str):
                    self.memory.storage(tensor).lost = elements
                else:
                    self.memory.write_tensor(tensor, elements)
        return made

    def read(self, value: Any) -> Elements:
        """The elements of a tensor, or of a number that a program names."""
        if not isinstance(value, torch.Tensor):
            return np.array(field.of_float(float(value)), np.uint64)
        if not value.is_floating_point():
            return _of_numbers(value)
        return self.memory.read_tensor(value)

    def _calculate(self, name: str, func: Any, args: Any, kwargs: Any) -> Elements | str:
        """The elements of what an operation makes, or how they were lost."""
        rule = _RULES.get(name) or _RULES.get(name.removesuffix("_"))
        try:
            with np.errstate(all="ignore"):
                if name in _MOVES:
                    return self._moved(func, args, kwargs)
                return rule(self.read, *args, **kwargs) if rule else f"torch.{name}"
        except Lost as error:
            return str(error)

    def _moved(self, func: Any, args: Any, kwargs: Any) -> Elements:
        def of(value: Any) -> Any:
            if _is_float(value):
                return torch.from_numpy(self.read(value).view(np.int64))
            return field.of_float(value) if isinstance(value, float) else value

        moved: torch.Tensor = func(*tree_map(of, args), **tree_map(of, kwargs))
        return moved.numpy().view(np.uint64)


@functools.cache
def _kind(func: Any) -> tuple[str, bool, bool]:
    """The name of an operation, whether it changes an operand, and whether it makes elements."""
    name = func._schema.name.removeprefix("aten::")
    return name, func._schema.is_mutable, name not in _NEW and (not func.is_view or name == "lift_fresh")


def _is_float(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.is_floating_point() and value.numel() > 0
