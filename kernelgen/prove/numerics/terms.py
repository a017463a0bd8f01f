"""Terms of numerics: how one number of a result came about, in a form that is the same for the same order of sums.

A term is nested tuples, an operation in front of what it is of:

* ``("operand", name, places)``: a number of an operand; a place is (first, ((axis, step), ...), size);
* ``("chain", kind, axis, width, low, ("end", high), size, x, y, before)``: products of ``x`` and ``y`` (or ``x`` alone) for
  places of ``axis`` from ``low`` to ``high``, in tiles of ``width`` one after the other, added to ``before``; inside of a tile
  the order is that of the hardware (``dot``), or of the compiler (``sum``);
* ``("add", first, second, ...)``: one after the other; an item ("run", number, term) stands for many that are alike, one after
  the other, in which ("at", first, step, number) is a whole number;
* ``("round", dtype, term)`` and other operations on one number or two.

A place that no sum runs over is told by how far it is from the first such place of the operand, so that all rows have one term;
what runs to the end of a dimension is told without its size.
"""

from __future__ import annotations

import collections
import itertools
import re
from typing import Any, Callable, Iterator, Mapping, Sequence

from numpy.typing import NDArray

from kernelgen.prove.memory import Lost

Term = Any
_AXES, _RUNS = "ijklpqrstuvw", "nmabcdefgh"
_COMMUTE = ("mul", "max", "min")
ZERO: Term = ("number", 0.0)
PERMUTED = "_permuted"  # behind the kind of a chain: the places of a tile are in another order than that of its columns


def _mapped(term: Term, change: Callable[[Term], Term]) -> Term:
    """A term with its parts changed, innermost first."""
    if not isinstance(term, tuple):
        return term
    return change(tuple(_mapped(each, change) for each in term))


def _is(term: Term, kind: str) -> bool:
    return isinstance(term, tuple) and bool(term) and term[0] == kind


def _rank(term: Term) -> tuple[bool, bool, str]:
    """The order of factors, which commute: sums first, operands last."""
    return _is(term, "operand") or _is(term, "number"), "'chain'" not in repr(term), re.sub(r"-?\d+", "", repr(term))


def _ordered(term: Term) -> Term:
    """Factors in one order, and of two that are added the sum in front."""
    if _is(term, "mul") and ("number", 1.0) in term:
        return term[2] if term[1] == ("number", 1.0) else term[1]
    if term and term[0] in _COMMUTE:
        return (term[0], *sorted(term[1:], key=_rank))
    if _is(term, "fma"):
        return (term[0], *sorted(term[1:3], key=_rank), term[3])
    if not _is(term, "add"):
        return term
    items = term[1:]
    if len(items) == 2 and not _is(items[0], "add") and (_is(items[1], "add") or _rank(items[0]) > _rank(items[1])):
        items = items[::-1]
    return ("add", *(items[0][1:] if _is(items[0], "add") else items[:1]), *items[1:])


def chained(kind: str, lanes: NDArray[Any], width: int, axis: int, x: Term, y: Term, before: Term) -> Term:
    """A sum over an axis, behind ``before``: one chain with it, if it is the same sum up to here.

    ``lanes``: those of the axis that count. The axis is told by the places of the first operand that it runs over.
    """
    low, high = int(lanes[0]), int(lanes[-1]) + 1
    if high - low != lanes.size:
        raise Lost("a sum over places with gaps between them")
    x = _mapped(x, _ordered)
    if y is not None:
        x, y = sorted((x, _mapped(y, _ordered)), key=_rank)
    start, size = next(((first, size) for first, steps, size in _places((x, y)) if (axis, 1) in steps), (0, -1))

    def from_start(term: Term) -> Term:
        if len(term) == 3 and isinstance(term[0], int) and isinstance(term[1], tuple):
            return (term[0] - start * dict(term[1]).get(axis, 0), *term[1:])
        return term

    x, y, low, high = _mapped(x, from_start), _mapped(y, from_start), low + start, high + start
    if _is(before, "chain") and (before[1:4], before[6:9]) == ((kind, axis, width), (size, x, y)):
        first, (_, end) = before[4:6]
        if end == low and (end - first) % width == 0:
            return (*before[:4], first, ("end", high), *before[6:])
    return ("chain", kind, axis, width, low, ("end", high), size, x, y, None if before == ZERO else before)


def _places(term: Term) -> Iterator[tuple[int, Any, int]]:
    """Where operands are read, in the order of the text."""
    if _is(term, "operand"):
        yield from term[2]
    elif isinstance(term, tuple):
        for each in term:
            yield from _places(each)


def finished(term: Term) -> Term:
    """A term in the form that is compared: one order of factors, places told by the first, and what repeats told once."""
    term = _mapped(term, _ordered)
    return _mapped(_told(term, {}, {}, _begins(term)), _folded)


def without_tiles(term: Term) -> Term:
    """A term in which products of matrices are of no tiles: they go on from one tile to the next in the order of their places.

    To call before ``finished``. A matrix unit adds its instructions' sums up in this order, whatever the tile that they are of.
    """

    def joined(term: Term) -> Term:
        if not _is(term, "chain") or term[8] is None or term[1].endswith(PERMUTED):
            return term
        kind, axis, _, low, (_, high), size, x, y, before = term[1:]
        made = ("chain", kind, axis, 0, low, ("end", high), size, x, y, before)
        if _is(before, "chain") and before[1:4] == made[1:4] and before[6:9] == made[6:9] and before[5] == ("end", low):
            return (*before[:5], ("end", high), *before[6:])
        return made

    return _mapped(term, joined)


def _begins(term: Term) -> dict[str, int]:
    """Where the first sum over an operand begins, by its name: 0, unless a number is of a part of it."""
    found: dict[str, int] = {}

    def look(term: Term) -> Term:
        if _is(term, "chain"):
            name = _named(term[7])
            found[name] = min(term[4], found.get(name, term[4]))
        return term

    _mapped(term, look)
    return found


def _named(term: Term) -> str:
    """The first operand of a term."""
    if _is(term, "operand"):
        return str(term[1])
    return next(filter(None, map(_named, term)), "") if isinstance(term, tuple) else ""


def _told(term: Term, firsts: dict[Any, int], axes: dict[int, int], begins: dict[str, int]) -> Term:
    """Axes numbered by how deep they are, places told by the first of their operand, sums of a part as from 0."""
    if _is(term, "operand"):
        _, name, places = term
        found = []
        for number, (first, steps, size) in enumerate(places):
            told = tuple((axes[axis], step) for axis, step in steps if axis in axes)
            base = 0 if told else firsts.setdefault((name, number), first)
            found.append((first - base, told, size))
        return ("operand", name, tuple(found))
    if _is(term, "chain"):
        kind, axis, width, low, (_, high), size, x, y, before = term[1:]
        inner, begin = {**axes, axis: len(axes)}, begins[_named(x)]
        x, y = _told(x, firsts, inner, begins), _told(y, firsts, inner, begins)
        before = _told(before, firsts, axes, begins)
        return ("chain", kind, len(axes), width, low - begin, ("end", high - begin), size - begin, x, y, before)
    return tuple(_told(each, firsts, axes, begins) for each in term) if isinstance(term, tuple) else term


def _folded(term: Term) -> Term:
    """A sum in which what repeats is a run, and runs that repeat are one of runs."""
    if not _is(term, "add"):
        return term
    items = list(term[1:])
    while True:
        folded, rest = [], items
        while rest:
            count, steps = _run(rest)
            folded.append(_repeated(rest[0], steps) if count > 1 else rest[0])
            rest = rest[count:]
        if len(folded) == len(items):
            return ("add", *items)
        items = folded


def _run(items: Sequence[Term]) -> tuple[int, list[int]]:
    """How many of the first items go on alike, and the steps of their numbers; the last may end early."""
    numbers = [list(_numbers(item)) for item in itertools.takewhile(lambda item: _shape(item) == _shape(items[0]), items)]
    if len(numbers) < 2:
        return 1, []
    first, second = numbers[:2]
    steps = [b - a for (a, _), (b, _) in zip(first, second, strict=True)]
    for place, (_, is_end) in enumerate(first):
        if is_end and steps[place] < steps[place - 1]:  # where it begins goes before
            steps[place] = steps[place - 1]
    if not any(steps):
        return 1, []
    for count, found in enumerate(numbers[1:], 1):
        wanted = [a + count * step for (a, _), step in zip(first, steps, strict=True)]
        pairs = [(got, want, is_end) for (got, is_end), want in zip(found, wanted, strict=True)]
        if any(got != want and not (is_end and got < want) for got, want, is_end in pairs):
            return count, steps
        if any(got != want for got, want, _ in pairs):
            return count + 1, steps
    return len(numbers), steps


def _shape(term: Term) -> Term:
    if _is(term, "at"):  # runs are alike that go on in the same steps
        return ("at", _shape(term[1]), *term[2:])
    if isinstance(term, tuple):
        return tuple(map(_shape, term))
    return int if type(term) is int else term


def _numbers(term: Term, is_end: bool = False) -> Iterator[tuple[int, bool]]:
    """The whole numbers of a term, and whether each is where a sum ends."""
    if type(term) is int:
        yield term, is_end
    elif _is(term, "at"):
        yield from _numbers(term[1])
    elif isinstance(term, tuple):
        for each in term:
            yield from _numbers(each, _is(term, "end") and type(each) is int)


def _repeated(term: Term, steps: Sequence[int]) -> Term:
    """A run, whose number is above those of runs in it: numbers that change are ("at", first, step, run)."""
    number, rest = 1 + _highest(term), iter(steps)

    def stepped(term: Term) -> Term:
        if _is(term, "at"):
            return ("at", stepped(term[1]), *term[2:])
        if isinstance(term, tuple):
            return tuple(map(stepped, term))
        if type(term) is not int or not (step := next(rest)):
            return term
        return ("at", term, step, number)

    return ("run", number, stepped(term))


def _highest(term: Term) -> int:
    """The highest number of a run in a term."""
    if not isinstance(term, tuple):
        return 0
    return max(term[1] if _is(term, "run") else 0, *map(_highest, term), 0)


# Text.


def text(term: Term) -> str:
    """A term in one line; sums that are in it twice and more stand in front, with a name."""
    counts: collections.Counter[Term] = collections.Counter()

    def count(term: Term) -> None:
        if isinstance(term, tuple) and not _is(term, "run"):  # what is in a run counts on
            counts[term] += 1
            if counts[term] == 1:
                for each in term:
                    count(each)

    count(term)
    names: dict[Term, str] = {}
    lines = []
    for each in sorted((t for t, n in counts.items() if n > 1 and _is_long(t)), key=lambda t: len(repr(t))):
        said = _text(each, names)
        names[each] = f"t{len(names) + 1}"
        lines.append(f"{names[each]} = {said}")
    return "; ".join([*lines, _text(term, names)])


def _is_long(term: Term) -> bool:
    """Whether a name for it is shorter: an operation that has a sum in it."""
    return bool(term) and term[0] in ("chain", "add", "mul", "div", "select", "min", "max", "round") and "'chain'" in repr(term)


def _text(term: Term, names: Mapping[Term, str]) -> str:
    if term in names:
        return names[term]
    kind, *of = term

    def say(term: Term) -> str:
        return _text(term, names)

    if kind == "operand":
        name, places = of
        return f"{name}[{', '.join(_said(place) for place in places)}]"
    if kind in ("number", "numbers", "mask"):
        return " or ".join(f"{n:.9g}" for n in (of[0] if isinstance(of[0], tuple) else of))
    if kind == "round":
        return f"{of[0]}({say(of[1])})"
    if kind == "chain":
        name, axis, width, low, (_, high), size, x, y, before = of
        if width == 0:
            bounds = "" if (low, high) == (0, size) else f" {_count(low)}..{_count(high)}"
        elif _is_one(low, high, width):
            bounds = f"{'' if low == 0 else f' at {_count(low)}'} in {width}"
        else:
            bounds = f"{'' if (low, high) == (0, size) else f' {_count(low)}..{_count(high)}'} by {width}"
        product = say(x) if y is None else f"{say(x)} * {say(y)}"
        behind = "" if before is None else f", from {say(before)}"
        called = name if y is None else f"dot_{name}"
        return f"{called}({_AXES[axis]}{bounds}: {product}{behind})"
    if kind == "run":
        return f"each {_RUNS[of[0] - 1]}({say(of[1])})"
    if kind == "add":
        parts = []
        for number, item in enumerate(of):
            if _is(item, "run"):
                parts.append(say(item) if number else "sum" + say(item).removeprefix("each"))
            else:
                parts.append(say(item))
        return f"({' + '.join(parts)})" if len(parts) > 1 else parts[0]
    if kind in ("sub", "mul", "div"):
        sign = {"sub": "-", "mul": "*", "div": "/"}[kind]
        return f"({say(of[0])} {sign} {say(of[1])})"
    return f"{kind}({', '.join(map(say, of))})"


def _is_one(low: Any, high: Any, width: int) -> bool:
    """Whether a sum is of one tile."""
    if isinstance(low, int) and isinstance(high, int):
        return high - low <= width
    return isinstance(low, tuple) and isinstance(high, tuple) and low[2:] == high[2:] and _is_one(low[1], high[1], width)


def _count(number: Any) -> str:
    """A whole number, or one of a run: first + step * n."""
    if not isinstance(number, tuple):
        return str(number)
    _, first, step, run = number
    turn = f"{'-' if step == -1 else '' if step == 1 else step}{_RUNS[run - 1]}"
    return turn if first == 0 else f"{turn}+{_count(first)}".replace("+-", "-")


def _said(place: Any) -> str:
    first, steps, _ = place
    parts = [f"{'' if step == 1 else _count(step)}{_AXES[axis]}" for axis, step in steps] or ["."]
    if first != 0:
        parts.append(_count(first))
    return "+".join(parts).replace("+-", "-")


def difference(old: str, new: str) -> str:
    """Where two texts of terms first differ: the innermost operation around it, as it was and as it is."""
    same = next((i for i, (a, b) in enumerate(zip(old, new, strict=False)) if a != b), min(len(old), len(new)))
    heads, opened = [], []
    for place, letter in enumerate(old[:same]):
        if letter in "([":
            opened.append(place)
        elif letter in ")]" and opened:
            opened.pop()
    for place in opened:
        head = re.search(r"\w*(?: \w)?$", old[:place])
        if head is not None and head.group().strip():
            heads.append(head.group().strip())
    where = opened[-1] if opened else 0
    begin = re.search(r"[\w ]*$", old[:where])
    at = begin.start() if begin is not None else 0
    at = at + len(old[at:where]) - len(old[at:where].lstrip())
    return f"in {' of '.join(reversed(heads)) or 'the whole'}: was {_closed(old, at)}, is {_closed(new, at)}"


def _closed(term: str, begin: int) -> str:
    """The operation that begins here, to where its parenthesis closes."""
    depth = 0
    for place in range(begin, len(term)):
        depth += (term[place] in "([") - (term[place] in ")]")
        if depth == 0 and term[place] in ")]":
            return term[begin : place + 1]
        if depth < 0:
            return term[begin:place]
    return term[begin:]
