"""Calls of every front door in sequences: each does what it does where nothing was called before it.

A call is remembered, and found again by what its arguments look like. So each good call is changed in one thing that its op
declares, as far as it can be: another value, dtype, stride, address, slice, field of a route, size of the layer. Both are then
called in turns, either of them first. What a call does is what it launches: kernels, grids, constants, options, and which of
its tensors go where; or how it is refused. Nothing runs.
"""

from __future__ import annotations

import contextlib
from typing import Any, Iterator

import pytest
import torch
from doors import GOOD, Arguments, Door, by_hand, forget
from triton.tools.tensor_descriptor import TensorDescriptor

import generated as kg
from generated import _operands as operands
from generated import _runtime as runtime
from generated._operands import Bundle, Choice, Flag, Int, Number, Tensor

FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
# Other sizes of the layer; each by itself.
SIZES = {
    "tokens": (0, 1, 7, 70),
    "top_k": (1, 3),
    "experts": (5,),
    "loras": (1, 4),
    "k": (48, 33),
    "n": (40, 128),
    "rank": (8, 17, 130),
    "slices": (1, 3),
}


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """What would have been launched; nothing is."""
    found: list[Any] = []
    monkeypatch.setattr(runtime.Launcher, "launch", lambda self, *call: found.append((self, *call)))
    forget()
    yield found
    forget()


Asked = tuple[Door, Arguments]  # a front door, and its arguments


def done(asked: Asked, log: list[Any]) -> Any:
    """What a call does."""
    door, values = asked
    given = {name: _again(value) for name, value in values.items()}
    log.clear()
    try:
        result = door.function(**given)
    except ValueError as error:
        assert not log, f"{error}: launched all the same"
        return str(error)
    places = {}
    for name, value in given.items():
        for i, tensor in enumerate(_tensors(value)):
            places.setdefault(tensor.untyped_storage()._cdata, f"{name} {i}")
    return [_said(part, places) for part in ([(launch[0].kernel.fn.__qualname__, *launch[1:]) for launch in log], result)]


def _again(value: Any) -> Any:
    """A bundle as it is made anew for each batch: what it looks like is not known yet."""
    if not hasattr(value, "_hang"):
        return value
    made = by_hand(value)
    vars(made).update({name: known for name, known in vars(value).items() if name not in ("looks", "memory")})
    return made


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)


def _said(value: Any, places: dict[int, str]) -> Any:
    """A value for a comparison: of a tensor, whose memory it lies in, and how."""
    if isinstance(value, torch.Tensor):
        place = places.get(value.untyped_storage()._cdata, "new")
        return place, value.storage_offset(), tuple(value.shape), value.stride(), value.dtype, value.device
    if isinstance(value, TensorDescriptor):
        return _said(value.base, places), value.shape, value.strides, value.block_shape
    if isinstance(value, kg.HeldRoute):
        return _said((value.capacity, value.max_loras, value._tables, value._parts), places)
    if isinstance(value, (list, tuple)):
        return [type(value).__name__, *(_said(item, places) for item in value)]
    return (type(value), value) if isinstance(value, (int, float)) else value


def changes(door: Door) -> Iterator[tuple[str, Arguments]]:
    """(what is another, the arguments) of calls that differ from a good one in one thing."""
    for operand in door.operands:
        for label, value in _others(operand, door.good[operand.name]):
            yield f"{operand.name}: {label}", {**door.good, operand.name: value}
    for name, dtype in ((name, dtype) for name, dtypes in door.op.dtypes.items() for dtype in dtypes):
        cast = {o.name: _cast(o, door.good[o.name], name, dtype) for o in door.operands if isinstance(o, (Tensor, Bundle))}
        yield f"{name}: {dtype}", {**door.good, **cast}


def _others(operand: operands.Operand, good: Any) -> Iterator[tuple[str, Any]]:
    """(what is another, it) of an operand, by what it declares."""
    if isinstance(operand, Flag):
        yield f"{not good}", not good
    elif isinstance(operand, Int):
        near = operand.one_of or ([None] if good is None else [good - 1, good + 1, good + 16, 0, 1])
        values = dict.fromkeys(value for value in near if value is None or operand.low <= value <= operand.high)
        values |= {None: None} if operand.optional else {}
        yield from ((f"{value}", value) for value in values if value != good)
    elif isinstance(operand, Number):
        yield from ((f"{value!r}", value) for value in (2.5, 2, -0.0))
    elif isinstance(operand, Choice):
        yield from ((f"{word}", word) for word in operand.words if word != good)
    elif isinstance(operand, Bundle) and good is not None:
        yield from [("none", None)] if operand.optional else []
        yield "one like it", by_hand(good)
        for part in operand.parts_of(good):
            for label, value in _others(part, getattr(good, part.name)):
                yield f"{part.name}: {label}", by_hand(good, **{part.name: value})
        for kind in operand.kinds:
            if kind is not type(good) and set(kind._fields) <= set(good._fields):
                yield f"a {kind.__name__}", kind(*(getattr(good, field) for field in kind._fields))
    elif isinstance(operand, Tensor) and good is not None:
        yield from [("none", None)] if operand.is_optional or operand.made else []
        if not operand.slices:
            yield from _other_tensors(operand, good)
            return
        yield "of another class", tuple(good) if isinstance(good, list) else list(good)
        yield "a slice less", good[:-1]
        for i, old in enumerate(good):
            for label, tensor in _other_tensors(operand, old):
                yield f"{i}: {label}", [*good[:i], tensor, *good[i + 1 :]]
        for alike in zip(*(_other_tensors(operand, old) for old in good), strict=True):
            yield f"all: {alike[0][0]}", [tensor for _, tensor in alike]


def _cast(operand: Tensor | Bundle, good: Any, name: str, dtype: torch.dtype) -> Any:
    """An operand whose dtype is shared under a name, or in whose parts it is, in another dtype."""
    if isinstance(operand, Bundle) and good is not None:
        parts = [part for part in operand.parts_of(good) if isinstance(part, Tensor)]
        return by_hand(good, **{part.name: _cast(part, getattr(good, part.name), name, dtype) for part in parts})
    if good is None or isinstance(operand, Bundle) or operand.dtype != name:
        return good
    if isinstance(good, torch.Tensor):
        return good.to(dtype) if good.itemsize > 1 else good
    return type(good)(_cast(operand, slice_, name, dtype) for slice_ in good)


def _other_tensors(operand: Tensor, good: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """(what is another, it) of one tensor."""
    yield "elsewhere", good.clone()
    for dtype in operand.dtype if isinstance(operand.dtype, tuple) else ():
        if dtype != good.dtype:
            yield f"{dtype}", good.to(dtype)
    if good.dtype in FP8:
        yield from ((f"{dtype}", good.view(dtype)) for dtype in FP8 if dtype != good.dtype)
    if good.numel() == 0:
        return
    buffer = torch.zeros(good.numel() + 1, dtype=good.dtype, device=good.device)
    yield "from an odd address", buffer[1:].view(good.shape)
    if good.dim() > 0:
        yield "with one more", torch.cat((good, good[:1]))
    for d in range(1, good.dim()):
        wide = torch.zeros((*good.shape[:d], good.shape[d] + 8, *good.shape[d + 1 :]), dtype=good.dtype, device=good.device)
        yield f"with more room in dimension {d}", wide.narrow(d, 0, good.shape[d])
    if good.dim() > 2 and not operand.written:
        yield "one for all", good[:1].expand(good.shape)
        yield "turned", torch.zeros_like(good.transpose(0, 1).contiguous()).transpose(0, 1)


def calls(name: str, device: str) -> Iterator[tuple[str, Asked]]:
    """(what is another, the call) of a front door: one thing, a size of the layer, or a call of another kind."""
    door = Door.of(name, device)
    for label, given in changes(door):
        yield label, (door, given)
    for size, values in SIZES.items():
        for value in values:
            with contextlib.suppress(ValueError):  # what a call is made of has no such size
                other = Door.of(name, device, **{size: value})
                yield f"{size}: {value}", (other, other.good)
    for kind in GOOD:
        if kind != name and GOOD[kind][0] == GOOD[name][0]:
            other = Door.of(kind, device)
            yield kind, (other, other.good)


@pytest.mark.parametrize("name", GOOD)
def test_a_call_does_what_it_does_alone(name: str, device: str, log: list[Any]) -> None:
    door = Door.of(name, device)
    usual = door, door.good
    forget()
    alone = done(usual, log)
    assert not isinstance(alone, str), alone
    others = []
    for label, asked in calls(name, device):
        forget()
        others.append((label, asked, done(asked, log)))
        if not isinstance(others[-1][-1], str):  # what is refused is not remembered
            assert done(asked, log) == others[-1][-1], f"{label}: again"
            assert done(usual, log) == alone, f"the usual behind {label}"
            assert done(asked, log) == others[-1][-1], f"{label}: behind the usual, itself at first"
    forget()
    done(usual, log)
    for label, asked, other in others:  # all are remembered, each is as it is alone
        assert done(usual, log) == alone, f"the usual in front of {label}"
        assert done(asked, log) == other, f"{label}: behind the usual"
