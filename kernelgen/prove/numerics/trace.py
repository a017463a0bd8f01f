"""From what kernels did to the term of one element: back from where it was stored, over all vectors that it is a sum of.

A ``_Vector`` is the terms of many numbers of one form: over the axes of the sums that they are in, outermost first. It is found
from a node of the tape and the places in it that are asked for. What is zero because a mask says so is left out of sums: adding
it changes nothing. ``trace`` makes of it a term without vectors, in which axes have names.
"""

from __future__ import annotations

import itertools
from typing import Any, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from kernelgen.prove.memory import Lost
from kernelgen.prove.numerics.tape import Load, Node, Operand, Tape
from kernelgen.prove.numerics.terms import PERMUTED, ZERO, Term, chained, finished, without_tiles

_Places = tuple[NDArray[np.int64], ...]
_ZERO_IF_ANY = ("mul",)
_ZERO_IF_FIRST = ("round", "neg", "abs", "div", "div_rn", "sqrt")
_ZERO_IF_ALL = ("add", "sub")


class _Vector:
    """Terms of one form over ``shape``. ``detail``: the numbers, the places of an operand, the masks of several forms, a name."""

    __slots__ = ("_zero", "detail", "kind", "of", "shape", "width")

    def __init__(self, kind: str, of: Sequence[_Vector], shape: tuple[int, ...], detail: Any = None, width: int = 0) -> None:
        self.kind = kind
        self.of = tuple(of)
        self.shape = shape
        self.detail = detail
        self.width = width  # of the axis that is summed over
        self._zero: Any = None

    @property
    def zero(self) -> Any:
        """Which are zero whatever the operands are."""
        if self._zero is None:
            self._zero = np.broadcast_to(self._find_zero(), self.shape)
        return self._zero

    def _find_zero(self) -> Any:
        if self.kind == "number":
            return self.detail == 0
        if self.kind in _ZERO_IF_ANY:
            return self.of[0].zero | self.of[1].zero
        if self.kind in _ZERO_IF_FIRST:
            return self.of[0].zero
        if self.kind in _ZERO_IF_ALL:
            return self.of[0].zero & self.of[1].zero
        if self.kind == "fma":
            return (self.of[0].zero | self.of[1].zero) & self.of[2].zero
        if self.kind == "sum":
            return self.of[0].zero.all(-1)
        if self.kind == "dot":
            return (self.of[0].zero | self.of[1].zero).all(-1) & self.of[2].zero
        if self.kind == "cases":
            return np.select(list(self.detail), [each.zero for each in self.of], False)
        return False


class _Reader:
    """Vectors of nodes of a tape."""

    def __init__(self, tape: Tape) -> None:
        self._tape = tape
        self._found: dict[Any, tuple[Any, _Vector]] = {}

    def read(self, node: Node, places: _Places, shape: tuple[int, ...]) -> _Vector:
        """The terms at these places of a node, an array of ``shape`` a dimension."""
        key = (id(node), *map(id, places), shape)
        if key not in self._found:
            self._found[key] = places, self._read(node, places, shape)
        return self._found[key][1]

    def _read(self, node: Node, places: _Places, shape: tuple[int, ...]) -> _Vector:
        kind = node.kind
        if kind == "number":
            numbers = node.detail[_within(node, places)] if node.shape else node.detail
            return _Vector(kind, (), shape, np.broadcast_to(numbers, shape))
        if kind == "mask":
            return _Vector(kind, (), shape, np.broadcast_to(node.detail[places] if node.shape else node.detail, shape))
        if kind in ("undefined", "bits"):
            return _Vector(kind, (), shape)
        if kind == "load":
            return self._load(node, places, shape)
        if kind == "select" and node.of[0].kind == "mask":
            mask = np.broadcast_to(node.of[0].detail, node.shape)[places]
            return self._cases([(mask, node.of[1]), (~mask, node.of[2])], node, places, shape)
        if kind == "dot":
            inner, lane, (rows, columns) = self._inner(node.of[0].shape[-1], places, shape)
            x = self.read(node.of[0], (rows, lane), inner)
            y = self.read(node.of[1], (lane, columns), inner)
            told, order = node.detail, _order(x, y)
            if order is not None:
                lane, told = np.broadcast_to(order, inner), f"{told}{PERMUTED}"
                x, y = self.read(node.of[0], (rows, lane), inner), self.read(node.of[1], (lane, columns), inner)
            return _Vector(kind, (x, y, self.read(node.of[2], places, shape)), shape, told, inner[-1])
        if kind in ("sum", "maximum"):
            axis = node.detail
            inner, lane, outer = self._inner(node.of[0].shape[axis], places, shape)
            of = self.read(node.of[0], (*outer[:axis], lane, *outer[axis:]), inner)
            if kind == "sum" and (live := ~of.zero).sum(-1).max(initial=0) == 1:  # each is that one, wherever it lies
                return self.read(node.of[0], (*places[:axis], live.argmax(-1), *places[axis:]), shape)
            return _Vector(kind, (of,), shape, None, inner[-1])
        if kind in ("reshape", "trans", "part", "broadcast", "join", "cat", "gather"):
            return self._moved(node, places, shape)
        return _Vector(kind, [self._aligned(node, of, places, shape) for of in node.of], shape, node.detail)

    def _inner(self, width: int, places: _Places, shape: tuple[int, ...]) -> tuple[tuple[int, ...], Any, list[Any]]:
        """Another axis inside: the shape with it, its lanes, and the places along it."""
        inner = (*shape, width)
        lane = np.broadcast_to(np.arange(width), inner)
        return inner, lane, [np.broadcast_to(place[..., None], inner) for place in places]

    def _aligned(self, node: Node, of: Node, places: _Places, shape: tuple[int, ...]) -> _Vector:
        """An operand of an operation on each element."""
        if of.shape != node.shape:
            own = places[len(places) - len(of.shape) :]
            places = tuple(np.zeros_like(p) if size == 1 else p for p, size in zip(own, of.shape, strict=True))
        return self.read(of, places, shape)

    def _moved(self, node: Node, places: _Places, shape: tuple[int, ...]) -> _Vector:
        of = node.of[0]
        if node.kind == "broadcast":
            return self._aligned(node, of, places, shape)
        if node.kind == "trans":
            moved: list[Any] = [None] * len(places)
            for place, axis in zip(places, node.detail, strict=True):
                moved[axis] = place
            return self.read(of, tuple(moved), shape)
        if node.kind == "reshape":
            flat = np.ravel_multi_index(places, node.shape) if node.shape else np.zeros(shape, np.int64)
            return self.read(of, tuple(np.unravel_index(flat, of.shape)) if of.shape else (), shape)
        if node.kind == "part":
            if len(of.shape) == len(node.shape):  # of one element
                return self.read(of, tuple(np.zeros_like(p) for p in places), shape)
            return self.read(of, (*places, np.full(shape, node.detail)), shape)
        if node.kind == "gather":
            index, axis = node.detail
            return self.read(of, (*places[:axis], index[places], *places[axis + 1 :]), shape)
        if node.kind == "join":
            second = places[-1] == 1
            read = [(m, self.read(o, places[:-1], shape)) for m, o in zip((~second, second), node.of, strict=True) if m.any()]
            return self._merged(read, shape)
        second = places[0] >= of.shape[0]
        parts = [(~second, of, places[0]), (second, node.of[1], places[0] - of.shape[0])]
        read = [(m, self.read(o, (np.where(m, p, 0), *places[1:]), shape)) for m, o, p in parts if m.any()]
        return self._merged(read, shape)

    def _cases(self, cases: Sequence[tuple[Any, Node]], node: Node, places: _Places, shape: tuple[int, ...]) -> _Vector:
        read = [(mask, self._aligned(node, of, _filled(places, mask), shape)) for mask, of in cases if mask.any()]
        return self._merged(read, shape)

    def _load(self, node: Node, places: _Places, shape: tuple[int, ...]) -> _Vector:
        found: Load = node.detail
        addresses, lanes, notes = found.addresses[places], found.lanes[places], found.notes[places].astype(np.int64)
        parts: list[tuple[Any, _Vector]] = []
        if not lanes.all():
            parts.append((~lanes, self._aligned(node, node.of[0], _filled(places, ~lanes), shape)))
        fresh = lanes & (notes == 0)
        while fresh.any():
            first = int(addresses[fresh][0])
            operand = next(each for each in self._tape.operands if each.first <= first < each.end)
            own = fresh & (addresses >= operand.first) & (addresses < operand.end)
            parts.append((own, self._operand(operand, np.where(own, addresses, first), shape)))
            fresh &= ~own
        stores = np.where(lanes & (notes > 0), (notes - 1) >> 32, -1)
        for store in np.unique(stores[stores >= 0]):
            mask = stores == store
            stored, _ = self._tape.stored(int(notes[mask][0]) - 1)
            lane = np.where(mask, (notes - 1) & 0xFFFFFFFF, int(notes[mask][0]) - 1 & 0xFFFFFFFF)
            at = tuple(np.unravel_index(lane, stored.shape)) if stored.shape else ()
            parts.append((mask, self.read(stored, at, shape)))
        return self._merged(parts, shape)

    def _operand(self, operand: Operand, addresses: NDArray[Any], shape: tuple[int, ...]) -> _Vector:
        tensor = operand.tensor
        rest = (addresses - operand.first).astype(np.int64) // tensor.element_size()
        where: list[Any] = [np.zeros(shape, np.int64)] * tensor.dim()
        for axis in sorted(range(tensor.dim()), key=tensor.stride, reverse=True):
            if tensor.shape[axis] > 1 and (stride := tensor.stride(axis)) > 0:
                where[axis], rest = rest // stride, rest % stride
        sizes = tuple(tensor.shape)
        if operand.part is not None:
            where, sizes = [np.full(shape, operand.part), *where], (0, *sizes)
        return _Vector("operand", (), shape, (operand.short, where, sizes))

    def _merged(self, parts: Sequence[tuple[Any, _Vector]], shape: tuple[int, ...]) -> _Vector:
        """Vectors of which each holds where its mask does: one of the same form, where all are."""
        if len(parts) == 1:
            return parts[0][1]
        made = self._unified(parts, shape)
        return made or _Vector("cases", [each for _, each in parts], shape, [mask for mask, _ in parts])

    def _unified(self, parts: Sequence[tuple[Any, _Vector]], shape: tuple[int, ...]) -> _Vector | None:
        first = parts[0][1]
        if any((v.kind, len(v.of), v.width) != (first.kind, len(first.of), first.width) for _, v in parts):
            return None
        masks = [mask for mask, _ in parts]
        if first.kind in ("number", "mask"):
            return _Vector(first.kind, (), shape, np.select(masks, [v.detail for _, v in parts], parts[-1][1].detail))
        if first.kind == "operand":
            name, _, sizes = first.detail
            if any((v.detail[0], v.detail[2]) != (name, sizes) for _, v in parts):
                return None
            where = [np.select(masks, list(each)) for each in zip(*(v.detail[1] for _, v in parts), strict=True)]
            return _Vector("operand", (), shape, (name, where, sizes))
        if first.kind == "cases" or any(v.detail != first.detail for _, v in parts):
            return None
        of = []
        for each in zip(*(v.of for _, v in parts), strict=True):
            inner = each[0].shape
            wide = [np.broadcast_to(mask[..., None], inner) if len(inner) > len(shape) else mask for mask in masks]
            if all(v is each[0] for v in each):
                of.append(each[0])
                continue
            one = self._unified(list(zip(wide, each, strict=True)), inner)
            if one is None:
                return None
            of.append(one)
        return _Vector(first.kind, of, shape, first.detail, first.width)


def _order(*factors: _Vector) -> NDArray[np.int64] | None:
    """An order of the products of a tile in which the places of an operand ascend, and those that are zero come last; None: as
    they are.

    A matrix unit may have a tile's columns in any order, if both factors have them in the same.
    """
    zero = np.any([each.zero.reshape(-1, each.shape[-1])[0] for each in factors], 0)
    for operand in itertools.chain.from_iterable(map(_operands, factors)):
        for where in operand.detail[1]:
            along = where.reshape(-1, where.shape[-1])[0]
            if np.unique(along[~zero]).size == np.count_nonzero(~zero) > 1:  # else it is read again, or for several numbers
                if (np.diff(along[~zero]) > 0).all():
                    return None
                return np.argsort(np.where(zero, along.max() + 1, along), kind="stable")
    return None


def _operands(vector: _Vector) -> Iterator[_Vector]:
    if vector.kind == "operand":
        yield vector
    elif vector.kind not in ("dot", "sum", "maximum"):  # of the same lanes
        yield from itertools.chain.from_iterable(map(_operands, vector.of))


def _within(node: Node, places: _Places) -> _Places:
    own = places[len(places) - len(node.shape) :]
    return tuple(np.zeros_like(p) if size == 1 else p for p, size in zip(own, node.shape, strict=True))


def _filled(places: _Places, mask: Any) -> _Places:
    """Places outside of the mask, which do not count, are one inside."""
    if mask.all():
        return places
    first = tuple(axis[0] for axis in mask.nonzero())
    return tuple(np.where(mask, place, place[first]) for place in places)


_Lanes = tuple[NDArray[np.int64], ...]  # of each axis those that count


def _term(vector: _Vector, lanes: _Lanes) -> Term:
    """The term that all lanes share; operands have their places as (first, ((axis, step), ...), size)."""
    zero = _of(vector.zero, lanes)
    if zero.all():
        return ZERO
    if zero.any():
        lanes = _narrowed(~zero, lanes)
    kind, of = vector.kind, vector.of
    if kind == "number":
        numbers = np.unique(_of(vector.detail, lanes))
        return ("number", float(numbers[0])) if numbers.size == 1 else ("numbers", tuple(map(float, numbers)))
    if kind == "mask":
        return ("mask", tuple(map(bool, np.unique(_of(vector.detail, lanes)))))
    if kind == "operand":
        name, where, sizes = vector.detail
        return ("operand", name, tuple(_place(_of(each, lanes), lanes, size) for each, size in zip(where, sizes, strict=True)))
    if kind == "cases":
        live = [(mask, each) for mask, each in zip((_of(m, lanes) for m in vector.detail), of, strict=True) if mask.any()]
        found = tuple(dict.fromkeys(_term(each, _narrowed(mask, lanes)) for mask, each in live))
        return found[0] if len(found) == 1 else ("cases", *found)
    if kind == "dot":
        every = (*lanes, np.arange(vector.width))
        zero = _of(of[0].zero, every) | _of(of[1].zero, every)
        before = _term(of[2], lanes)
        if zero.all():
            return before
        inner = _narrowed(~zero, every)
        return chained(vector.detail, inner[-1], vector.width, len(lanes), _term(of[0], inner), _term(of[1], inner), before)
    if kind in ("sum", "maximum"):
        every = (*lanes, np.arange(vector.width))
        inner = _narrowed(~_of(of[0].zero, every), every)
        if inner[-1].size == 1 and kind == "sum":
            return _term(of[0], inner)
        whole = chained(kind, inner[-1], vector.width, len(lanes), _term(of[0], inner), None, ZERO)
        return whole if kind == "sum" or inner[-1].size == vector.width else ("max", whole, ZERO)
    if kind in _ZERO_IF_ALL and (_of(of[0].zero, lanes).all() or _of(of[1].zero, lanes).all()):
        if _of(of[1].zero, lanes).all():
            return _term(of[0], lanes)
        return _term(of[1], lanes) if kind == "add" else ("neg", _term(of[1], lanes))
    return (kind, *(() if vector.detail is None else (vector.detail,)), *(_term(each, lanes) for each in of))


def _of(values: Any, lanes: _Lanes) -> Any:
    return values[np.ix_(*lanes)] if lanes else values


def _narrowed(wanted: Any, lanes: _Lanes) -> _Lanes:
    """The lanes of each axis for which something is wanted.

    Raises:
        Lost: along one axis others are wanted, depending on the lane of another.
    """
    if wanted.all():
        return lanes
    axes = range(len(lanes))
    kept = [np.flatnonzero(wanted.any(tuple(other for other in axes if other != axis))) for axis in axes]
    if not wanted[np.ix_(*kept)].all():
        raise Lost("terms of one sum differ in which of their products are zero")
    return tuple(lane[keep] for lane, keep in zip(lanes, kept, strict=True))


def _place(where: Any, lanes: _Lanes, size: int) -> tuple[int, tuple[tuple[int, int], ...], int]:
    first = int(where.flat[0])
    steps, rest = [], where - first
    for axis, lane in enumerate(lanes):
        if lane.size > 1:
            along = np.moveaxis(where, axis, 0).reshape(lane.size, -1)[:, 0]
            step, left = divmod(int(along[1] - along[0]), int(lane[1] - lane[0]))
            if left:
                raise Lost("places that are no sum of lanes")
            if step:
                steps.append((axis, step))
                rest = rest - (step * (lane - lane[0])).reshape(-1, *[1] * (len(lanes) - axis - 1))
                first -= step * int(lane[0])
    if rest.any():
        raise Lost("places that are no sum of lanes")
    return first, tuple(steps), size


def trace(tape: Tape, node: Node, lane: int, tiles: bool = True) -> Term:
    """The term of one number that was stored; ``tiles``: with those of products of matrices.

    Raises:
        Lost: it is a sum of what has no common form.
    """
    place = tuple(np.array(p) for p in np.unravel_index(lane, node.shape)) if node.shape else ()
    term = _term(_Reader(tape).read(node, place, ()), ())
    return finished(term if tiles else without_tiles(term))
