"""What kernels do to their floats under Triton's interpreter, kept operation by operation.

Each float in a kernel carries a ``Node``: the operation that made it, and the nodes of its operands. A store notes which lane of
which node went where, so that a later load, of another program or kernel, finds it. Nothing is calculated here.
"""

from __future__ import annotations

import contextlib
import dataclasses
from typing import Any, Callable, Iterator, Mapping

import numpy as np
import torch
import triton.language as tl
from numpy.typing import NDArray

from kernelgen.families._repairs import widened
from kernelgen.prove.exact.kernels import kernel_line, replaced
from kernelgen.prove.exact.memory import Memory
from kernelgen.prove.memory import Lost, tensors, unwrapped

Array = NDArray[Any]
_LANES = 32  # bits of a note that are the lane of a store


class Node:
    """A tensor of floats, or of what they compare to, as an operation made it."""

    __slots__ = ("detail", "kind", "of", "shape")

    def __init__(self, kind: str, of: tuple[Node, ...], shape: tuple[int, ...], detail: Any = None) -> None:
        self.kind = kind
        self.of = of
        self.shape = shape
        self.detail = detail


@dataclasses.dataclass(frozen=True)
class Load:
    """Where a load read: addresses, which lanes are on, and what was stored there before: a note + 1, or 0 of an input."""

    addresses: Array
    lanes: Array
    notes: Array


@dataclasses.dataclass(frozen=True)
class Operand:
    """A tensor that a launch was given, by the name of the parameter; ``part``: which of a tuple."""

    name: str
    part: int | None
    tensor: torch.Tensor

    @property
    def short(self) -> str:
        return self.name.removesuffix("_ptrs").removesuffix("_ptr").removesuffix("_desc")

    @property
    def first(self) -> int:
        return self.tensor.data_ptr()

    @property
    def end(self) -> int:
        span = sum((size - 1) * stride for size, stride in zip(self.tensor.shape, self.tensor.stride(), strict=True))
        return self.first + (span + 1) * self.tensor.element_size()


class Tape:
    """What launches did.

    Attributes:
        operands: of all launches, in their order.
        stores: of floats: launch, addresses and node of each.
        fused: whether a launch lets the compiler round a product and a sum as one.
    """

    def __init__(self) -> None:
        self.operands: list[Operand] = []
        self.stores: list[tuple[int, Array, Node]] = []
        self.launches = 0
        self.fused = False
        self._memory = Memory()
        self._loaded: dict[int, int] = {}  # the launch that loaded last, by store

    def launch(self, named: Mapping[str, Any], options: Mapping[str, Any]) -> None:
        """Note what a launch was given."""
        self.launches += 1
        self.fused |= bool(options.get("enable_fp_fusion", True))
        for name, value in named.items():
            for label, tensor in tensors(name, value):
                part = label.removeprefix(name).strip("[]")
                self._memory.storage(tensor)
                self.operands.append(Operand(name, int(part) if part.isdigit() else None, tensor))

    def load(self, addresses: Array, lanes: Array) -> Load:
        """Note a load."""
        notes = np.zeros(addresses.shape, np.uint64)
        notes[lanes] = self._memory.noted(addresses[lanes])
        for store in np.unique(notes[notes > 0] - np.uint64(1) >> np.uint64(_LANES)):
            self._loaded[int(store)] = self.launches
        return Load(np.array(addresses), np.array(lanes), notes)

    def store(self, addresses: Array, lanes: Array, node: Node) -> None:
        """Note a store."""
        notes = (np.uint64(len(self.stores)) << np.uint64(_LANES)) + np.arange(addresses.size, dtype=np.uint64)
        self.stores.append((self.launches, np.where(lanes, addresses, 0), node))
        self._memory.write(addresses[lanes], notes.reshape(addresses.shape)[lanes])

    def stored(self, note: int) -> tuple[Node, int]:
        """What a note is of: a node, and a lane of it."""
        return self.stores[note >> _LANES][2], note & (1 << _LANES) - 1

    def name_of(self, address: int) -> str:
        """The parameter of the last launch that was given the tensor of an address."""
        return next(each.short for each in reversed(self.operands) if each.first <= address < each.end)

    def results(self) -> Iterator[tuple[Node, Array, Array]]:
        """Stores that no later launch read: the node, its lanes that still stand, and their addresses."""
        for number, (launch, addresses, node) in enumerate(self.stores):
            if self._loaded.get(number, launch) > launch:
                continue
            flat = addresses.ravel()
            lanes = np.flatnonzero(flat)
            notes = self._memory.noted(flat[lanes]) - np.uint64(1)
            standing = notes >> np.uint64(_LANES) == number
            yield node, lanes[standing], flat[lanes[standing]]


_Rule = Callable[..., Node]
_NOTHING = Node("number", (), (), np.asarray(0.0))  # what a product begins at that is given nothing


def _shape(handle: Any) -> tuple[int, ...]:
    return tuple(np.shape(handle.data))


def _node(value: Any) -> Node:
    """That of a float in a kernel."""
    found: Node | None = getattr(value, "node", None)
    if found is not None:
        return found
    if "number" in value.attr:  # of the kernel's text, kept from before
        return _number(value)
    raise Lost("the term of an operand was lost")


def _mask(value: Any) -> Node:
    return getattr(value, "node", None) or Node("mask", (), _shape(value), np.asarray(value.data))


def _number(value: Any) -> Node:
    return Node("number", (), _shape(value), np.asarray(widened(value.data, value.dtype.scalar), np.float64))


def _cast(made: Any, x: Any, *kind: Any) -> Node:
    """Rounds where it narrows; what is wider holds all that it was, and a number of the text may be one that it rounds to."""
    source, target, node = x.dtype.scalar, made.dtype.scalar, _node(x)
    if source.primitive_bitwidth < target.primitive_bitwidth or source == target:
        return node
    if node.kind == "number" and np.array_equal(_number(made).detail, node.detail):
        return node
    return Node("round", (node,), _shape(made), _short(target))


def _short(dtype: Any) -> str:
    return {"fp8e4nv": "e4m3", "fp8e5": "e5m2", "fp16": "f16", "fp32": "f32", "fp64": "f64"}.get(str(dtype), str(dtype))


def _dot(made: Any, x: Any, y: Any, acc: Any, precision: Any = None, imprecise: Any = 0) -> Node:
    kind = _short(x.dtype.scalar)
    if kind == "f32":
        kind = str(getattr(precision, "name", precision)).lower()
    return Node("dot", (_node(x), _node(y), _node(acc)), _shape(made), kind)


def _add(made: Any, x: Any, y: Any) -> Node:
    """Triton lets a product that is given nothing to begin at begin at what is added to it."""
    first, second = _node(x), _node(y)
    for product, other in ((first, second), (second, first)):
        if product.kind == "dot" and product.of[2] is _NOTHING:
            return Node("dot", (*product.of[:2], other), _shape(made), product.detail)
    return Node("add", (first, second), _shape(made))


def _select(made: Any, mask: Any, x: Any, y: Any) -> Node:
    return Node("select", (_mask(mask), _node(x), _node(y)), _shape(made))


def _operation(kind: str, count: int = 2) -> _Rule:
    return lambda made, *operands: Node(kind, tuple(map(_node, operands[:count])), _shape(made))


def _logic(kind: str) -> _Rule:
    return lambda made, *operands: Node(kind, tuple(map(_mask, operands)), _shape(made))


def _moved(kind: str, detail: Callable[..., Any] = lambda *_: None) -> _Rule:
    """What has the numbers of its first operand in other places."""
    return lambda made, x, *how: Node(kind, (_node(x),), _shape(made), detail(*how))


_RULES: Mapping[str, _Rule] = {
    "get_null_value": lambda made, *_: _number(made),
    **dict.fromkeys(("get_fp16", "get_bf16", "get_fp32", "get_fp64"), lambda made, *_: _number(made)),
    **dict.fromkeys(("create_fp_ext", "create_fp_trunc", "create_fp_to_fp"), _cast),
    **dict.fromkeys(("create_si_to_fp", "create_ui_to_fp"), lambda made, *_: _number(made)),
    "create_bitcast": lambda made, x, kind: _node(x) if x.dtype.scalar.is_floating() else Node("bits", (), _shape(made)),
    "create_fadd": _add,
    "create_fsub": _operation("sub"),
    "create_fmul": _operation("mul"),
    "create_fma": _operation("fma", 3),
    "create_fneg": _operation("neg", 1),
    "create_fabs": _operation("abs", 1),
    **dict.fromkeys(("create_fdiv", "create_approx_divf"), _operation("div")),
    "create_precise_divf": _operation("div_rn"),
    **dict.fromkeys(("create_maximumf", "create_maxnumf"), _operation("max")),
    **dict.fromkeys(("create_minimumf", "create_minnumf"), _operation("min")),
    **{f"create_{name}": _operation(name, 1) for name in ("exp", "exp2", "log", "log2", "erf", "sqrt", "rsqrt", "floor", "ceil")},
    "create_select": _select,
    "create_dot": _dot,
    "create_reshape": _moved("reshape"),
    "create_trans": _moved("trans", lambda axes, *_: tuple(axes)),
    "create_expand_dims": _moved("reshape"),
    **dict.fromkeys(("create_broadcast", "create_spread"), _moved("broadcast")),
    "create_splat": lambda made, kind, x: Node("broadcast", (_node(x),), _shape(made)),
    "create_unsplat": lambda made, x: Node("part", (_node(x),), _shape(made), 0),
    "create_join": lambda made, x, y: Node("join", (_node(x), _node(y)), _shape(made)),
    "create_cat": lambda made, x, y: Node("cat", (_node(x), _node(y)), _shape(made)),
    "create_gather": lambda made, x, index, axis: Node("gather", (_node(x),), _shape(made), (np.array(index.data), axis)),
}
_COMPARED = {f"create_fcmp{how}": _operation(how[1:].lower()) for how in ("OLT", "OGT", "OLE", "OGE", "OEQ", "ONE")}
_COMPARED |= {f"create_fcmpU{how}": _operation(how.lower()) for how in ("LT", "GT", "LE", "GE", "EQ", "NE")}
_LOGIC = {f"create_{how}": _logic(how) for how in ("and", "or", "xor")}
_MASKS_MOVED = ("create_reshape", "create_trans", "create_expand_dims", "create_broadcast", "create_splat")


@contextlib.contextmanager
def taped() -> Iterator[Tape]:
    """Inside, launches under the interpreter are kept on a tape.

    Raises, where a kernel runs:
        Lost: an operation on floats that has no rule; its name and line.
    """
    from triton.language.semantic import TritonSemantic
    from triton.runtime import interpreter

    interpreter._patch_lang(None)  # for good, so that what follows is on top
    builder, handle, tape = interpreter.InterpreterBuilder, interpreter.TensorHandle, Tape()

    def load(made: Any, pointers: Any, mask: Any, other: Any, *policy: Any, **options: Any) -> Node:
        addresses = pointers.data
        lanes = np.broadcast_to(mask.data, addresses.shape)
        if other is None:
            rest = Node("undefined", (), addresses.shape)
        else:
            rest = getattr(other, "node", None) or _number(other)
        return Node("load", (rest,), addresses.shape, tape.load(addresses, lanes))

    def store(self: Any, pointers: Any, value: Any, mask: Any, *policy: Any, **options: Any) -> Any:
        if pointers.get_element_ty().is_floating():
            addresses = pointers.data
            node, lanes = _node(value), np.broadcast_to(mask.data, addresses.shape)
            if node.shape != addresses.shape:
                node = Node("broadcast", (node,), addresses.shape)
            kind = pointers.get_element_ty().scalar
            if value.dtype.scalar != kind and value.dtype.scalar.primitive_bitwidth > kind.primitive_bitwidth:
                node = Node("round", (node,), addresses.shape, _short(kind))
            tape.store(addresses, lanes, node)
        return stock["create_masked_store"](self, pointers, value, mask, *policy, **options)

    def split(self: Any, x: Any) -> Any:
        made = stock["create_split"](self, x)
        if x.dtype.scalar.is_floating():
            for i, part in enumerate(made):
                part.node = Node("part", (_node(x),), _shape(part), i)
        return made

    def followed(name: str, rule: _Rule | None) -> Callable[..., Any]:
        def operation(self: Any, *operands: Any, **options: Any) -> Any:
            made = stock[name](self, *operands, **options)
            if not isinstance(made, handle):
                return made
            is_mask = made.data.dtype == np.bool_
            if is_mask and (name in _COMPARED or any(getattr(each, "node", None) for each in operands)):
                if name in _COMPARED or name in _LOGIC or name in _MASKS_MOVED:
                    made.node = {**_COMPARED, **_LOGIC, **_RULES}[name](made, *operands, **options)
            elif made.dtype.scalar.is_floating() and not is_mask and getattr(made, "node", None) is None:
                try:
                    if rule is None:
                        raise Lost("numerics have no rule for it")
                    made.node = rule(made, *operands, **options)
                except Lost as error:
                    raise Lost(f"{name.removeprefix('create_')} {kernel_line()}: {error}") from None
            return made

        return operation

    rules = {**_RULES, "create_masked_load": load}
    names = [name for name in dir(builder) if name.startswith("create_") or name in rules]
    stock = {name: getattr(builder, name) for name in names}
    changed: dict[tuple[Any, str], Any] = {(builder, name): followed(name, rules.get(name)) for name in names}
    changed[builder, "create_masked_store"] = store
    changed[builder, "create_split"] = split
    changed[interpreter.ReduceOps, "apply_impl"] = _reduced(interpreter.ReduceOps.apply_impl)
    changed[interpreter.GridExecutor, "__call__"] = _launched(interpreter.GridExecutor.__call__, tape)
    changed[TritonSemantic, "dot"] = _multiplied(TritonSemantic.dot)
    changed[tl.tensor, "T"] = property(_transposed(tl.tensor.T.fget))
    with replaced(changed):
        yield tape


def _reduced(stock: Callable[..., Any]) -> Callable[..., Any]:
    def reduced(self: Any, inputs: Any) -> Any:
        made = stock(self, inputs)
        if not inputs[0].dtype.is_floating():
            return made
        if self.combine_fn is tl.standard._sum_combine:
            kind = "sum"
        elif self.combine_fn is tl.standard._elementwise_max:
            kind = "maximum"
        else:
            raise Lost(f"reduce {kernel_line()}: numerics have no rule for it")
        node, handle = _node(inputs[0].handle), (made[0] if isinstance(made, (list, tuple)) else made).handle
        if self.axis is None:
            node = Node("reshape", (node,), (int(np.prod(node.shape)),))
        axis = 0 if self.axis is None else self.axis % len(node.shape)
        rest = tuple(size for i, size in enumerate(node.shape) if i != axis)
        handle.node = Node("reshape", (Node(kind, (node,), rest, axis),), _shape(handle))
        return made

    return reduced


def _multiplied(stock: Callable[..., Any]) -> Callable[..., Any]:
    def multiplied(self: Any, x: Any, y: Any, acc: Any, *options: Any, **named: Any) -> Any:
        made = stock(self, x, y, acc, *options, **named)
        node = made.handle.node
        if acc is None and node.kind == "dot":
            made.handle.node = Node("dot", (*node.of[:2], _NOTHING), node.shape, node.detail)
        return made

    return multiplied


def _transposed(stock: Callable[..., Any]) -> Callable[..., Any]:
    def transposed(self: Any) -> Any:
        made = stock(self)
        if self.dtype.is_floating():
            made.handle.node = Node("trans", (_node(self.handle),), _shape(made.handle), (1, 0))
        return made

    return transposed


def _launched(stock: Callable[..., Any], tape: Tape) -> Callable[..., Any]:
    def launched(self: Any, *arguments: Any, **options: Any) -> Any:
        named = dict(zip(self.arg_names, arguments, strict=False))
        tape.launch({**named, **{name: options[name] for name in self.arg_names if name in options}}, options)
        with unwrapped(Lost):
            return stock(self, *arguments, **options)

    return launched
