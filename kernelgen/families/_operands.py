"""What an op takes, declared once: its checks follow from it, and what a call that is remembered hangs on.

An ``Op`` stands beside each front door, with a named tuple of all its arguments, ``Given``, whose fields are annotated with what
they have to be. That tuple is what the front door makes of a call, and what checks, binding and launches are given. What it
declares is checked where a call is not known yet: at the first call of a kind,
and where Python trips over an argument. A later call of the same kind is found by what its arguments look like, all of them,
and costs one comparison in C; so no argument can be left out of either.

Shapes are written as text: ``"T, top_k, S*N"``. A name is a size, which is that of the first operand that has it, or of an
integer that is given, and at least 1, but for that of a batch, T; ``*`` is any size; ``>=L`` at least so many, and
``slots>=L`` the same number in all operands that say so.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import types
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import (
    Annotated,
    Any,
    Generic,
    NamedTuple,
    NoReturn,
    ParamSpec,
    TypeVar,
    Union,
    get_args,
    get_origin,
    get_type_hints,
)

import torch

from . import _runtime as runtime
from ._runtime import describe, fail

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
IDS = (torch.int32, torch.int64)
ROWS, PAIRS, CONTIGUOUS, FREE = "rows", "pairs", "contiguous", "free"  # how a tensor may lie in memory, see Tensor

OPS: dict[str, Op[..., Any]] = {}  # every front door of the package, by name

NONE = (None, False, "none")  # of facts: what a variant is without

Dtype = torch.dtype | tuple[torch.dtype, ...] | str
Tensors = Sequence[torch.Tensor]  # one a slice


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A tensor, or a sequence of tensors, one a slice.

    Attributes:
        shape: of one, or of several forms. None: any; the op itself says more about it.
        dtype: one, any of several, or the name of one that operands share. None: as with shapes.
        also: dtypes that it may have in place of the one that is shared.
        strides: ROWS: the last is 1, the others are free; PAIRS: and so is that of pairs, [T, top_k, *]; CONTIGUOUS; FREE.
        optional: may be None.
        made: may be None, and is then made by the front door.
        made_if: the flag that is set where it was, so that nothing else lies there.
        written: by the kernels; no element is another, or one of another operand.
        slices: "alike": a sequence of tensors of one layout; "any": of tensors that fit one by one; "": no sequence.
        count: how many tensors a sequence has, as a size of a shape.
        only_with: the flag that asks for it; it is needed with it and refused without.
        scaled_by: the operand that holds its scales, or "bundle.part": with them it is FP8.
        packed: with them it may be uint8 too, of two numbers a byte, half as wide as its shape says.
        asks: facts of a variant that a call asks for with it; so of other operands.
    """

    shape: str | tuple[str, ...] | None
    dtype: Dtype | None
    strides: str = ROWS
    also: tuple[torch.dtype, ...] = ()
    optional: bool = False
    made: bool = False
    made_if: str = ""
    written: bool = False
    slices: str = ""
    count: str = "S"
    only_with: str = ""
    scaled_by: str = ""
    packed: bool = False
    asks: tuple[str, ...] = ()
    name: str = ""

    @property
    def is_optional(self) -> bool:
        return self.optional or bool(self.only_with)

    @property
    def is_written(self) -> bool:
        return self.written

    @property
    def kind(self) -> str:
        return "a sequence of tensors, one a slice" if self.slices else "a tensor"

    @functools.cached_property
    def forms(self) -> tuple[tuple[_Dim, ...], ...]:
        texts = (self.shape,) if isinstance(self.shape, str) else self.shape or ()
        return tuple(tuple(_Dim.read(part) for part in text.split(",") if part.strip()) for text in texts)

    def admit(self, op: str, value: object, values: Mapping[str, Any], label: str = "") -> None:
        """Raise ValueError unless ``value`` is of the right type, and there where it is needed."""
        label, wanted = label or self.name, self.kind
        if self.only_with and value is None and values[self.only_with]:
            fail(op, label, None, wanted, f"{self.only_with} needs it")
        if self.only_with and value is not None and not values[self.only_with]:
            fail(op, label, _say(value), None, f"it is used with {self.only_with} alone")
        if value is None and (self.is_optional or self.made):
            return
        if not self.slices:
            if not isinstance(value, torch.Tensor):
                fail(op, label, _say(value), wanted)
            return
        if not isinstance(value, (list, tuple)):
            fail(op, label, _say(value), wanted, "[tensor] is one slice" if isinstance(value, torch.Tensor) else "")
        if not value:
            fail(op, label, "no slice", "at least one")
        for i, item in enumerate(value):
            if not isinstance(item, torch.Tensor):
                absent = "a slice that is absent takes weights of zeros, or a call for the slices that are there"
                fail(op, f"{label}[{i}]", _say(item), "a tensor", absent if item is None else "")

    def has_pairs(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor has two numbers a byte."""
        return self.packed and tensor.dtype == torch.uint8

    def shape_of(self, tensor: torch.Tensor) -> tuple[int, ...]:
        """The shape of the numbers of a tensor."""
        shape = tuple(tensor.shape)
        return (*shape[:-1], 2 * shape[-1]) if shape and self.has_pairs(tensor) else shape

    def tensors(self, value: Any, label: str = "") -> Iterator[tuple[str, Tensor, torch.Tensor]]:
        """(what an error calls it, its declaration, it) of each tensor that was given."""
        label = label or self.name
        if self.slices:
            yield from ((f"{label}[{i}]", self, tensor) for i, tensor in enumerate(value or ()))
        elif value is not None:
            yield label, self, value


@dataclasses.dataclass(frozen=True)
class Int:
    """A whole number from ``low`` to ``high``; ``size``: the name that it has in shapes."""

    low: int = 0
    high: int = 2**31 - 1
    optional: bool = False
    size: str = ""
    one_of: tuple[int, ...] = ()
    name: str = ""

    def admit(self, op: str, value: object, values: Mapping[str, Any], label: str = "") -> None:
        """Raise ValueError unless ``value`` is such a number."""
        if value is None and self.optional:
            return
        wanted = " or ".join(map(str, self.one_of)) or f"a whole number from {self.low} to {self.high}"
        right = isinstance(value, int) and not isinstance(value, bool) and self.low <= value <= self.high
        if not right or (self.one_of and value not in self.one_of):
            fail(op, label or self.name, _say(value), wanted + (", or None" if self.optional else ""))


@dataclasses.dataclass(frozen=True)
class Flag:
    """True or False. ``public``: the caller gives it; else the front door finds it out."""

    public: bool = True
    asks: tuple[str, ...] = ()
    name: str = ""

    def admit(self, op: str, value: object, values: Mapping[str, Any], label: str = "") -> None:
        """Raise ValueError unless ``value`` is one of both."""
        if not isinstance(value, bool):
            fail(op, label or self.name, _say(value), "True or False")


_LARGEST = torch.finfo(torch.float32).max


@dataclasses.dataclass(frozen=True)
class Number:
    """A number, finite in float32, that may differ from call to call: a bound call is passed it, and does not hang on it.

    Attributes:
        low: the least that it may be.
        only_with: a choice, and its word that the number is for: with any other word it is None.
        default: what it is with that word where it is not given; None: it has to be.
    """

    public: bool = True
    low: float = -_LARGEST
    only_with: tuple[str, str] | None = None
    default: float | None = None
    name: str = ""

    @property
    def optional(self) -> bool:
        return self.only_with is not None

    def admit(self, op: str, value: object, values: Mapping[str, Any], label: str = "") -> None:
        """Raise ValueError unless ``value`` is such a number."""
        wanted = "a finite number, in float32 too" if self.low == -_LARGEST else f"a finite number from {self.low:g} on"
        if self.only_with is not None and value is None:
            choice, word = self.only_with
            if values[choice] == word and self.default is None:
                fail(op, label or self.name, None, wanted, f'{choice} "{word}" needs it')
            return
        if self.only_with is not None and values[self.only_with[0]] != self.only_with[1]:
            fail(op, label or self.name, _say(value), None, 'it is for {} "{}" alone'.format(*self.only_with))
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not self.low <= value <= _LARGEST:
            fail(op, label or self.name, _say(value), wanted)


@dataclasses.dataclass(frozen=True)
class Choice:
    """One of several words, dtypes or None; ``sizes``: what each stands for in shapes, under the name ``size``."""

    words: tuple[str | torch.dtype | None, ...]
    size: str = ""
    sizes: tuple[int, ...] = ()
    asks: tuple[str, ...] = ()
    name: str = ""

    def admit(self, op: str, value: object, values: Mapping[str, Any], label: str = "") -> None:
        """Raise ValueError unless ``value`` is one of them."""
        if not isinstance(value, (str, torch.dtype, type(None))) or value not in self.words:
            wanted = " or ".join(f'"{word}"' if isinstance(word, str) else str(word) for word in self.words)
            fail(op, label or self.name, _say(value), wanted)


@dataclasses.dataclass(frozen=True)
class Device:
    """A device, or its name."""

    name: str = ""

    def admit(self, op: str, value: object, values: Mapping[str, Any], label: str = "") -> None:
        """Raise ValueError unless ``value`` is one."""
        try:
            right = isinstance(value, (str, torch.device)) and torch.device(value) is not None
        except RuntimeError:
            right = False
        if not right:
            fail(op, label or self.name, _say(value), "a device, or its name")


@dataclasses.dataclass(frozen=True)
class Several:
    """A tuple of at least one ``item``."""

    item: Int | Choice
    optional: bool = False
    name: str = ""

    def admit(self, op: str, value: object, values: Mapping[str, Any], label: str = "") -> None:
        """Raise ValueError unless ``value`` is such a tuple."""
        label = label or self.name
        if value is None and self.optional:
            return
        if not isinstance(value, tuple) or not value:
            fail(op, label, _say(value) if value != () else "none", "a tuple of at least one" + (", or None" * self.optional))
        for i, item in enumerate(value):
            self.item.admit(op, item, values, f"{label}[{i}]")


@dataclasses.dataclass(frozen=True)
class Bundle:
    """Operands that come together, as a named tuple of the class ``of``, which is a ``bundle``, or of one of its ``kinds``.

    Attributes:
        kinds: classes that go by the name of ``of``; none: it is the only one.
        open: classes of those whose kind a graph of torch.compile leaves open; ``settled()``, when the graph runs, is of one.
        sizes: further sizes that its numbers tell, by the names that shapes of its parts have for them.
        whole: called with the op's name, the bundle's and the bundle, raises ValueError where its parts do not go together.
        goes_with: another bundle, and what is called with the op's name, this one's, both, and raises ValueError where they do
            not go together; asked at later calls too.
    """

    of: type
    maker: str = ""  # which front door makes it, for the hint of an error
    optional: bool = False
    kinds: tuple[type, ...] = ()
    open: tuple[type, ...] = ()
    sizes: Callable[[Any], Mapping[str, int]] | None = None
    whole: Callable[[str, str, Any], None] | None = None
    goes_with: tuple[str, Callable[[str, str, Any, Any], None]] | None = None
    asks: tuple[str, ...] = ()
    name: str = ""

    @property
    def is_written(self) -> bool:
        return any(isinstance(part, Tensor) and part.written for part in self.parts.values())

    @property
    def kind(self) -> str:
        return f"a {self.of.__name__}"

    def parts_of(self, kind: Any) -> list[Operand]:
        """What a kind has, in the order of its fields."""
        return [part for part in declared(kind if isinstance(kind, type) else type(kind)) if part is not None]

    @functools.cached_property
    def parts(self) -> dict[str, Operand]:
        """Of all kinds, by name."""
        found: dict[str, Operand] = {}
        for part in itertools.chain.from_iterable(map(self.parts_of, self._classes.values())):
            if part.name not in found or getattr(part, "optional", False):
                found[part.name] = part
        return found

    @functools.cached_property
    def _classes(self) -> dict[str, Any]:
        """By name, all that there are in a graph of torch.compile."""
        classes = (*(self.kinds or (self.of,)), *self.open)
        return {kind.__name__: kind for kind in classes}

    @functools.cached_property
    def _fields(self) -> tuple[str, ...]:
        """Those of all of them."""
        return tuple(dict.fromkeys(itertools.chain.from_iterable(kind._fields for kind in self._classes.values())))

    def in_schema(self, letters: Iterator[str]) -> list[str]:
        """The arguments of an op of torch that it is: the name of its kind, None where there is none, and all fields.

        Raises:
            TypeError: a field declares nothing.
        """
        kinds = self._classes.values()
        for field in self._fields:
            if field not in self.parts:
                raise TypeError(f"{self.name}.{field}: not annotated with an operand, as a graph of torch.compile takes it")
        some = {field for field in self._fields if self.optional or not all(field in kind._fields for kind in kinds)}
        parts = [_in_schema(self.parts[field], f"{self.name}_{field}", letters, field in some) for field in self._fields]
        return [f"str{'?' if self.optional else ''} {self.name}", *parts]

    @functools.cached_property
    def flat(self) -> Callable[[Any], tuple[Any, ...]]:
        """What makes these arguments of a bundle, in a graph too."""
        fields = self._fields

        def flat(value: Any) -> tuple[Any, ...]:
            if value is None:
                return (None,) * (1 + len(fields))
            return (type(value).__name__, *[getattr(value, field, None) for field in fields])

        return flat

    @functools.cached_property
    def whole_again(self) -> Callable[..., Any]:
        """What makes a bundle of these arguments, with nothing left open."""
        classes, still_open = self._classes, self.open
        places = {name: [self._fields.index(field) for field in kind._fields] for name, kind in classes.items()}

        def whole_again(kind: str | None, *parts: Any) -> Any:
            if kind is None:
                return None
            value = classes[kind]._make([parts[place] for place in places[kind]])
            return value.settled() if classes[kind] in still_open else value

        return whole_again

    def admit(self, op: str, value: Any, values: Mapping[str, Any], label: str = "") -> None:
        """Raise ValueError unless ``value`` is such a bundle, of parts of the right types."""
        label = label or self.name
        if value is None and self.optional:
            return
        if not isinstance(value, self.kinds or self.of):
            fail(op, label, _say(value), self.kind, f"make it with {self.maker}")
        for part in self.parts_of(value):
            part.admit(op, getattr(value, part.name), {}, f"{label}.{part.name}")
        field = edited(value)
        if field is not None:
            old, hint = getattr(value.__dict__["origin"], field), f"its tables are of that; make others with {self.maker}"
            fail(op, f"{label}.{field}", _say(getattr(value, field)), f"{_say(old)}, as it was", hint)
        if self.whole is not None:
            self.whole(op, label, value)
        if self.goes_with is not None and values.get(self.goes_with[0]) is not None:
            self.goes_with[1](op, label, value, values[self.goes_with[0]])

    def tensors(self, value: Any, label: str = "") -> Iterator[tuple[str, Tensor, torch.Tensor]]:
        """As of a Tensor."""
        label = label or self.name
        for part in self.parts_of(value) if value is not None else ():
            if isinstance(part, Tensor):
                yield from part.tensors(getattr(value, part.name), f"{label}.{part.name}")


Operand = Tensor | Int | Flag | Number | Choice | Device | Several | Bundle

Size = Annotated[int, Int(1)]
Count = Annotated[int, Int()]
Bool = Annotated[bool, Flag()]


@functools.cache
def declared(of: Any) -> tuple[Operand | None, ...]:
    """The operands that the fields of a named tuple are annotated with, which go by the names of the fields, and may be None
    where these may; None: a field that says nothing."""
    hints = get_type_hints(of, include_extras=True)
    return tuple(_declared(field, hints[field]) for field in of._fields)


def _declared(field: str, hint: Any) -> Operand | None:
    kinds = hint.__args__ if get_origin(hint) in (Union, types.UnionType) else (hint,)
    found = [each for kind in kinds for each in getattr(kind, "__metadata__", ()) if isinstance(each, Operand)]
    if not found:
        return None
    if len(found) > 1:
        raise TypeError(f"{field}: annotated with {len(found)} operands: {', '.join(type(each).__name__ for each in found)}")
    optional = any(type(None) in (kind, *get_args(getattr(kind, "__origin__", None))) for kind in kinds)
    changes: dict[str, Any] = {"name": field}
    if optional and getattr(found[0], "optional", None) is False and not getattr(found[0], "only_with", ""):
        changes["optional"] = True
    return dataclasses.replace(found[0], **changes)


class _Looks:
    """What a named tuple of tensors and numbers looks like: one object for all that look the same, each at 16 bytes or not.

    A call that depends on the tuple is remembered by it. It is worked out when it is first asked for.
    """

    def __init__(self) -> None:
        self._known = runtime.Calls()

    def __get__(self, bundle: Any, owner: type) -> _Look:
        tensors, changing = _of_bundle(bundle)
        hint = (edited(bundle), *map(_kind, bundle), *[tensor.data_ptr() & 15 != 0 for tensor in tensors])
        looks: _Look = self._known.get(hint, tensors) or self._known.put(hint, tensors, _Look(tuple(map(_reach, tensors))))
        if not changing:
            bundle.__dict__["looks"] = looks  # where Python finds it first, from now on
        return looks


class _Look:
    """``reaches``: bytes from the beginning of each tensor to its end."""

    __slots__ = ("reaches",)

    def __init__(self, reaches: tuple[int, ...]) -> None:
        self.reaches = reaches


class _Memory:
    """Where the tensors of a named tuple begin."""

    def __get__(self, bundle: Any, owner: type) -> tuple[int, ...]:
        tensors, changing = _of_bundle(bundle)
        memory = tuple([tensor.data_ptr() for tensor in tensors])
        if not changing:
            bundle.__dict__["memory"] = memory
        return memory


def _of_bundle(bundle: Any) -> tuple[list[torch.Tensor], bool]:
    """The tensors of a named tuple, and whether they may become others."""
    tensors, changing = [], False
    for part in bundle:
        if isinstance(part, torch.Tensor):
            tensors.append(part)
        elif isinstance(part, (list, tuple)):
            tensors += part
            changing |= isinstance(part, list)
    return tensors, changing


_Class = TypeVar("_Class")
_Parts = TypeVar("_Parts")


def bundle(tables: Sequence[str] = (), free: Sequence[str] = ()) -> Callable[[_Class], _Class]:
    """A named tuple with ``looks`` and ``memory``, see _Looks and _Memory, which a copy of it does not take over.

    Args:
        tables: fields that were worked out of all the others, but for those that are ``free``. One that is edited, by
            ``_replace``, has all of these as it had them, or none of the tables.
    """

    def make(cls: Any) -> Any:
        def replace(self: Any, **changes: Any) -> Any:
            changed = cls._replace(self, **changes)
            if tables and not torch.compiler.is_compiling():
                changed.__dict__["origin"] = self.__dict__.get("origin", self)
            return changed

        body = {"__doc__": cls.__doc__, "__module__": cls.__module__, "__qualname__": cls.__qualname__}
        body |= {"looks": _Looks(), "memory": _Memory(), "_tables": tuple(tables), "_replace": replace, "__replace__": replace}
        body |= {"_hang": tuple(field for field in cls._fields if field not in free)}
        return type(cls.__name__, (cls,), {**body, "__reduce__": lambda self: (self.__class__, tuple(self))})

    return make


def edited(bundle: Any) -> str | None:
    """The field of an edited bundle with which its tables were not made; None: there is none."""
    origin = bundle.__dict__.get("origin")
    if origin is None or not any(getattr(bundle, table) is getattr(origin, table) is not None for table in bundle._tables):
        return None
    for field in bundle._hang:
        new, old = getattr(bundle, field), getattr(origin, field)
        if new is not old and not (isinstance(old, int) and new.__class__ is old.__class__ and new == old):
            return str(field)
    return None


def alike(bundle: _Parts, kept: list[object]) -> _Parts:
    """``bundle`` itself, of whose like the looks are ``kept``, once they are known."""
    if kept:
        bundle.looks = kept[0]  # type: ignore[attr-defined]
    else:
        kept.append(bundle.looks)  # type: ignore[attr-defined]
    return bundle


def part_of(kind: Callable[..., _Parts], given: object) -> _Parts:
    """A named tuple of the class ``kind``, of fields that ``given`` has."""
    fields: tuple[str, ...] = kind._fields  # type: ignore[attr-defined]
    return kind(*[getattr(given, field) for field in fields])


def _kind(part: object) -> object:
    if isinstance(part, (list, tuple)):
        return part.__class__, len(part)
    return (part.__class__, part) if isinstance(part, (int, str, type(None))) else part.__class__


def check_fields(op: str, label: str, given: object) -> None:
    """Raise ValueError where a field of a named tuple, which errors call ``label``, is not what it is declared."""
    of: Any = type(given)
    for field in declared(of):
        if field is not None:
            field.admit(op, getattr(given, field.name), {}, f"{label}.{field.name}")


class Strides(NamedTuple):
    """Of weights of adapters, or of their scales, [L, E, rows, *]: elements from one to the next; 0 where there is none."""

    adapter: int = 0
    expert: int = 0
    row: int = 0

    @classmethod
    def of(cls, tensor: torch.Tensor) -> Strides:
        """Those of a tensor [L, E] or more."""
        return cls(*tensor.stride()[:3])


class Sizes:
    """The sizes and dtypes of a call by name, and which operand each of them is of."""

    def __init__(self, known: Mapping[str, Any]) -> None:
        self._values = {name: value for name, value in known.items() if value is not None}
        self._sources: dict[str, str] = {}

    def __getitem__(self, name: str) -> Any:
        return self._values[name]

    def get(self, name: str) -> Any:
        return self._values.get(name)

    def set(self, name: str, value: Any, source: str) -> None:
        if name not in self._values:
            self._values[name] = value
            self._sources[name] = source

    def source_of(self, name: str, form: Sequence[_Dim], operand: str) -> str:
        """``operand``, and what else told the size of this name in a shape of it."""
        beside = [other for dim in form if name in dim.names for other in dim.names if other != name]
        others = dict.fromkeys(source for other in beside if (source := self._sources.get(other, operand)) not in ("", operand))
        return " with ".join((operand, *others))

    def come_from(self, names: Sequence[str], operand: str) -> str:
        """A hint: which sizes are those of which other operand."""
        found: dict[str, list[str]] = {}
        for name in dict.fromkeys(names):
            source = self._sources.get(name, operand)
            if source and source != operand:
                found.setdefault(source, []).append(f"{name} = {self._values[name]}".replace("torch.", ""))
        return "; ".join(f"{', '.join(sizes)} as in {source}" for source, sizes in found.items())


@dataclasses.dataclass(frozen=True)
class _Dim:
    """A size in a shape: a product of names and a number, or at least that; no names and no number: any."""

    text: str
    names: tuple[str, ...]
    number: int
    least: bool
    own: str  # the name of a size that is at least the product; "": it has none

    @staticmethod
    def read(text: str) -> _Dim:
        text = text.strip()
        own, least, product = text.rpartition(">=")
        factors = [] if text == "*" else product.split("*")
        numbers = [int(factor) for factor in factors if factor.strip().isdigit()]
        names = tuple(factor.strip() for factor in factors if not factor.strip().isdigit())
        return _Dim(text, names, math.prod(numbers), bool(least), own)

    def fits(self, size: int, sizes: Sizes, new: dict[str, int]) -> bool:
        """Whether ``size`` can be this; what follows for the one name that is not known yet goes to ``new``."""
        if self.text == "*":
            return True
        if self.own and new.setdefault(self.own, sizes.get(self.own) or size) != size:
            return False
        product, unknown = self.number, []
        for name in self.names:
            value = new[name] if name in new else sizes.get(name)
            if value is None:
                unknown.append(name)
            else:
                product *= value
        if not unknown:
            return size >= product if self.least else size == product
        if self.least or len(unknown) > 1 or product == 0:
            return size >= 1
        new[unknown[0]] = size // product
        return size % product == 0 and (size > 0 or unknown[0] == "T")  # a batch may be empty, nothing else

    def say(self, sizes: Sizes) -> str:
        if self.own and sizes.get(self.own) is not None:
            return str(sizes.get(self.own))
        values = [sizes.get(name) for name in self.names]
        text = self.text.removeprefix(self.own)
        if text == "*" or None in values:
            return text.replace("*", " * ") if self.names else text
        return (">= " if self.least else "") + str(self.number * math.prod(values))


_Bound = TypeVar("_Bound")
_Given = TypeVar("_Given")  # a named tuple of all arguments of a call
_Arguments = ParamSpec("_Arguments")  # that it is made of


@dataclasses.dataclass(frozen=True)
class Op(Generic[_Arguments, _Given]):
    """A front door and what it takes.

    Attributes:
        name: as the user calls it.
        of: a named tuple of all arguments, whose fields are annotated with what they have to be: what a call is given, from the
            front door to the launch.
        spec: where a variant is added.
        dtypes: by name, what a dtype that operands share may be.
        fp8: what an operand with scales may be made of.
        first: operands whose sizes the others are to fit; then the order of the operands decides.
        tells: operands whose sizes tell the layers of a model apart.
        aligned: operands of which it matters whether they begin at a 16-byte boundary.
        sizes: further sizes, from all arguments, once their types are right.
        launches: kernels, so that tensors are where those run; False: it is plain torch.
    """

    name: str
    of: Callable[_Arguments, _Given]
    spec: str = ""
    dtypes: Mapping[str, tuple[torch.dtype, ...]] = dataclasses.field(default_factory=dict)
    fp8: tuple[torch.dtype, ...] = ()
    first: tuple[str, ...] = ()
    tells: tuple[str, ...] = ()
    aligned: tuple[str, ...] = ()
    sizes: Callable[[Mapping[str, Any]], Mapping[str, int]] | None = None
    launches: bool = True

    def __post_init__(self) -> None:
        OPS[self.name] = self

    @functools.cached_property
    def operands(self) -> tuple[Operand, ...]:
        """What the fields of ``of`` declare, in their order.

        Raises:
            TypeError: a field declares nothing, or more than one operand, or something speaks of an operand that there is not.
        """
        of: Any = self.of
        found = declared(of)
        if None in found:
            raise TypeError(f"{self.name}: {of._fields[found.index(None)]}: not annotated with an operand")
        operands = tuple(operand for operand in found if operand is not None)
        self._check_references(operands)
        return operands

    def _check_references(self, operands: Sequence[Operand]) -> None:
        """Raise TypeError where something is said of an operand or a shared dtype that there is not: it would hold of nothing."""
        known = {operand.name for operand in operands}
        parts = [part for o in operands for part in (o.parts.values() if isinstance(o, Bundle) else (o,))]
        named = [(name, known) for name in (*self.tells, *self.aligned)]
        named += [(name, known | {part.name for part in parts}) for name in self.first]
        for part in (part for part in parts if isinstance(part, Tensor)):
            others = (part.scaled_by.partition(".")[0], part.made_if, part.only_with)
            named += [(name, known) for name in others if name]
            named += [(part.dtype, {*self.dtypes})] if isinstance(part.dtype, str) else []
        for name, there in named:
            if name not in there:
                raise TypeError(f"{self.name}: a declaration speaks of {name!r}, which is none of {', '.join(sorted(there))}")

    def has(self, name: str, part: str | None = None) -> bool:
        """Whether calls are given such an operand, or a bundle with such a part."""
        operand = next((each for each in self.operands if each.name == name), None)
        return operand is not None and (part is None or (isinstance(operand, Bundle) and part in operand.parts))

    def given(self, **arguments: Any) -> _Given:
        """What a call is given, of arguments by name; of those that are left out, flags are not set, and what may be None is.

        Raises:
            TypeError: an argument is missing, or none of this op.
        """
        left = {o.name: False if isinstance(o, Flag) else None for o in self.operands if isinstance(o, Flag) or _may_be_none(o)}
        of: Callable[..., _Given] = self.of
        return of(**{**left, **arguments})

    def given_to(self, variant: str, facts: Mapping[str, Any], **arguments: Any) -> _Given:
        """As ``given``, of a call of one variant, which has these facts.

        Raises:
            ValueError: an argument that may be None is, and the variant needs it.
        """
        given = self.given(**arguments)
        for operand, is_needed in self.hang_on(facts):
            if is_needed and getattr(given, operand.name) is None:
                fail(variant, operand.name, None, operand.kind, "this variant takes it, another does without")
        return given

    def hang_on(self, facts: Mapping[str, Any]) -> Iterator[tuple[Tensor | Bundle, bool]]:
        """What may be None, but for the facts of a variant that ask for it; whether they do, all of them."""
        for operand in self.operands:
            if isinstance(operand, (Tensor, Bundle)) and _may_be_none(operand):
                asked = [facts[fact] not in NONE for fact in operand.asks if fact in facts]
                if asked:
                    yield operand, all(asked)

    def shapes(self, **sizes: int) -> dict[str, tuple[int, ...]]:
        """The shapes of all tensors that these sizes tell, each in the first form that they do; of a sequence that of one."""
        found: dict[str, tuple[int, ...]] = {}
        for operand in self.operands:
            for form in operand.forms if isinstance(operand, Tensor) else ():
                if all(dim.text != "*" and set(dim.names) <= sizes.keys() for dim in form):
                    shape = tuple(dim.number * math.prod(sizes[name] for name in dim.names) for dim in form)
                    found.setdefault(operand.name, shape)
        return found

    def check(self, op: str, given: _Given, **known: Any) -> Sizes:
        """The sizes of a call, once all that is declared here holds.

        Args:
            op: what the caller called: this op, or a variant of it.
            given: all arguments.
            known: sizes and dtypes that are fixed; None: those that are not.

        Raises:
            ValueError: says which argument does not fit, what it is and what was wanted.
        """
        values = given._asdict()  # type: ignore[attr-defined]
        for operand in self.operands:
            operand.admit(op, values[operand.name], values)
        tensors = self._tensors(values)
        for label, _, tensor in tensors:
            if tensor.layout != torch.strided:
                fail(op, label, describe(tensor), "a strided tensor")
            if tensor.is_neg():  # torch's lazy minus: numbers whose signs are not those in memory
                lazy = f"{describe(tensor)}, negated lazily"
                fail(op, label, lazy, "numbers as they lie in memory", "resolve_neg() makes them so")
        if self.launches:
            _check_places(op, tensors)
        sizes = Sizes(known)
        for label, operand, value in _flat(self.operands, values):
            _numbers(op, label, operand, value, sizes)
        bundles = [(o, values[o.name]) for o in self.operands if isinstance(o, Bundle) and values[o.name] is not None]
        further = [o.sizes(value) for o, value in bundles if o.sizes is not None]
        further += [self.sizes(values)] if self.sizes is not None else []
        for name, value in itertools.chain.from_iterable(found.items() for found in further):
            sizes.set(name, value, "")
        order = {name: place for place, name in enumerate(self.first)}
        waiting = sorted(tensors, key=lambda found: order.get(found[1].name, len(order)))
        for label, operand, tensor in _in_order(waiting, sizes):
            self._check_tensor(op, label, operand, tensor, values, sizes)
        for label, operand, value in _flat(self.operands, values):
            if isinstance(operand, Tensor) and operand.slices == "alike" and value:
                _check_alike(op, label, value)
        if tensors:
            _check_memory(op, tensors)
        return sizes

    def _tensors(self, values: Mapping[str, Any]) -> list[_Found]:
        given = [operand for operand in self.operands if isinstance(operand, (Tensor, Bundle))]
        return [found for operand in given for found in operand.tensors(values[operand.name])]

    def _check_tensor(
        self, op: str, label: str, operand: Tensor, tensor: torch.Tensor, values: Mapping[str, Any], sizes: Sizes
    ) -> None:
        dtypes = self._dtypes(operand, values, sizes)
        shape = operand.shape_of(tensor)
        found = ((form, _bindings(form, shape, sizes)) for form in operand.forms)
        form, new = next(((form, new) for form, new in found if new is not None), ((), None))
        fits = (not operand.forms or new is not None) and (dtypes is None or tensor.dtype in dtypes)
        if not fits or not _lies_right(operand, tensor):
            names = [name for form in operand.forms for dim in form for name in (*dim.names, dim.own) if name]
            shared = isinstance(operand.dtype, str) and sizes.get(operand.dtype) is not None
            origin = sizes.come_from([*names, *([operand.dtype] if shared else [])], label)  # type: ignore[list-item]
            hints = (origin, _empty(operand, tensor, sizes), self._of_dtype(operand, tensor, dtypes, values))
            fail(op, label, describe(tensor), _wanted(operand, dtypes, sizes, tensor), "; ".join(filter(None, hints)))
        for name, size in (new or {}).items():
            sizes.set(name, size, sizes.source_of(name, form, label))
        if isinstance(operand.dtype, str) and tensor.dtype not in operand.also and not self._is_scaled(operand, values):
            sizes.set(operand.dtype, tensor.dtype, label)

    def _is_scaled(self, operand: Tensor, values: Mapping[str, Any]) -> bool:
        name, _, part = operand.scaled_by.partition(".")
        scale = values.get(name)
        return (getattr(scale, part, None) if part else scale) is not None

    def _dtypes(self, operand: Tensor, values: Mapping[str, Any], sizes: Sizes) -> tuple[torch.dtype, ...] | None:
        if self._is_scaled(operand, values):
            return (*self.fp8, torch.uint8) if operand.packed else self.fp8
        if not isinstance(operand.dtype, str):
            return operand.dtype if operand.dtype is None or isinstance(operand.dtype, tuple) else (operand.dtype,)
        known = sizes.get(operand.dtype)
        return (*(self.dtypes[operand.dtype] if known is None else (known,)), *operand.also)

    def _of_dtype(
        self, operand: Tensor, tensor: torch.Tensor, dtypes: tuple[torch.dtype, ...] | None, values: Mapping[str, Any]
    ) -> str:
        """What to do about a dtype."""
        if dtypes is None or tensor.dtype in dtypes:
            return ""
        if self._is_scaled(operand, values):
            return f"{operand.scaled_by} is given, so it is FP8; quantize_weights and quantize_activations make such tensors"
        if operand.scaled_by and (tensor.dtype in self.fp8 or operand.has_pairs(tensor)):
            return f"{'MXFP4' if operand.has_pairs(tensor) else 'FP8'} numbers need {operand.scaled_by}"
        return f"another dtype takes a tag of dtype: in {self.spec}" if self.spec and isinstance(operand.dtype, str) else ""

    def asks_for(self, fact: str, facts: Mapping[str, Any]) -> list[str]:
        """The operands with which a call of these facts asks for one of them; those that are FP8 ask for no dtype."""
        asks = {o.name: (o.name, *getattr(o, "asks", ())) for o in self.operands}
        scaled = {o.name: asks[o.scaled_by] for o in self.operands if isinstance(o, Tensor) and o.scaled_by}
        is_fp8 = {name: any(facts.get(kind) is not None for kind in kinds) for name, kinds in scaled.items()}
        return [name for name in asks if fact in asks[name] and not (fact == "torch_dtype" and is_fp8.get(name))]

    def refuse(self, given: _Given, error: Exception) -> NoReturn:
        """Say which argument Python tripped over with ``error``; if none is wrong, it was something else.

        Raises:
            ValueError: of the argument.
        """
        self.check(self.name, given)
        raise error

    def caller(self, bind: Callable[[_Given], runtime.Call]) -> Callable[_Arguments, None]:
        """The function of the front door behind its defaults: the bound call for such arguments, run.

        Args:
            bind: makes it from all arguments; it checks them.
        """
        return self._remember(lambda given: bind(given).plain(self.of), _CALL)

    def finder(self, bind: Callable[[_Given], _Bound]) -> Callable[_Arguments, _Bound]:
        """As ``caller``, but what was bound is returned instead."""
        return self._remember(bind, "    return call\n")

    def in_graphs(self, function: Callable[..., None]) -> Callable[_Arguments, None]:
        """``function`` of all arguments, as an op of torch that a graph of torch.compile calls; see ``runtime.op``.

        What is returned takes the same arguments; of a bundle the op takes the name of its kind, then the parts one by one.
        """
        return self._in_graphs(function, self.operands)

    def in_graphs_into(self, buffer: str, function: Callable[..., None], without: Sequence[str]) -> Callable[..., None]:
        """As ``in_graphs``, of a function that fills a tensor, its first argument ``buffer``; some others it does without."""
        others = [operand for operand in self.operands if operand.name not in without]
        return self._in_graphs(function, (Tensor(None, None, written=True, name=buffer), *others))

    def _in_graphs(self, function: Callable[..., None], operands: Sequence[Operand]) -> Callable[..., None]:
        letters = iter("abcdefghijklmnopqrstuvwxyz")
        schema, given, whole = [], [], []
        names: dict[str, Any] = {"function": function}
        for operand in operands:
            name = operand.name
            if not isinstance(operand, Bundle):
                schema.append(_in_schema(operand, name, letters))
                given.append(name)
                whole.append(f"{name} and tuple({name})" if isinstance(operand, Several) else name)
                continue
            parts = operand.in_schema(letters)
            schema += parts
            given.append(f"*{name}_flat({name})")
            whole.append(f"{name}_whole({', '.join(part.rpartition(' ')[2] for part in parts)})")
            names |= {f"{name}_flat": operand.flat, f"{name}_whole": operand.whole_again}
        flat = [part.rpartition(" ")[2] for part in schema]
        source = _IN_GRAPHS.format(
            flat=", ".join(flat),
            whole=", ".join(whole),
            names=", ".join(operand.name for operand in operands),
            given=", ".join(given),
        )
        exec(compile(source, f"<{self.name}>", "exec"), names)  # noqa: S102  (of declarations alone)
        # Of a method too: those of MoeRoute are moe_route_...
        own_name = "".join(f"_{c.lower()}" if c.isupper() else c for c in self.name).removeprefix("_").replace(".", "_")
        names["op"] = runtime.op(f"{own_name}({', '.join(schema)}) -> ()", names["together"])
        call: Callable[..., None] = names["apart"]
        return call

    def _remember(self, bind: Callable[..., Any], end: str) -> Callable[..., Any]:
        """Written out, as a loop over declarations would take longer than all the rest of a call."""
        names = ", ".join(operand.name for operand in self.operands)
        hint, tensors, numbers = [], [], []
        for operand in self.operands:
            name = operand.name
            if name in self.tells:
                hint.append(f"{name}.numel()")
            if isinstance(operand, Bundle):
                hint.append(f"{name} and {name}.looks" if operand.optional else f"{name}.looks")
            elif isinstance(operand, Number):
                hint += [f"{name} is None"] if operand.optional else []
                given = f"{name} is not None and " if operand.optional else ""
                low = "-LARGEST" if operand.low == -_LARGEST else repr(operand.low)
                numbers.append(f"        if {given}({name}.__class__ is not float or not {low} <= {name} <= LARGEST):\n")
                numbers.append(f"            {name} = number({name!r}, {name})\n")
                if operand.default is not None and operand.only_with is not None:
                    choice, word = operand.only_with
                    numbers.append(f"        if {name} is None and {choice} == {word!r}:\n")
                    numbers.append(f"            {name} = {operand.default}\n")
            elif not isinstance(operand, Tensor):
                hint.append(name)
                if isinstance(operand, Int) or (isinstance(operand, Flag) and operand.public):
                    hint.append(f"{name}.__class__")  # True == 1 == 1.0
                elif isinstance(operand, Several):
                    hint.append(f"{name} and (*map(type, {name}),)")
            elif not operand.is_optional:
                tensors.append(f"*{name}" if operand.slices else name)
                hint += [f"{name}.__class__", f"len({name})"] if operand.slices else []
        always = [each.name for each in self.operands if each.name in self.aligned and not getattr(each, "is_optional", False)]
        if always:  # nearly always all of them are; else it matters which
            which = "".join(f"{name}.data_ptr() & 15 != 0, " for name in always)
            hint.append(f"({' | '.join(f'{name}.data_ptr()' for name in always)}) & 15 and ({which})")
        writes = any(operand.is_written for operand in self.operands if isinstance(operand, (Tensor, Bundle)))
        bundles = [f", {operand.name}" for operand in self.operands if isinstance(operand, Bundle)]
        source = _REMEMBERED.format(
            names=names,
            hint="".join(f"{part}, " for part in hint),
            tensors="".join(f"{part}, " for part in tensors),
            optional="".join(self._optional()),
            numbers="".join(numbers),
            kept=f" watch(of({names}))" if writes else "",
            found=_FOUND_APART.format(bundles="".join(bundles)) if writes else _FOUND,
            end=end.format(names=names),
        )
        calls = runtime.Calls()
        made: dict[str, Any] = {
            "recent": calls.recent,
            "find": calls.find,
            "put": calls.put,
            "bind": bind,
            "LARGEST": _LARGEST,
            "number": self._number,
            "of": self.of,
            "refuse": self.refuse,
            "watch": self._watch,
        }
        exec(compile(source, f"<{self.name}>", "exec"), made)  # noqa: S102  (of declarations alone)
        function: Callable[..., Any] = made["function"]
        return function

    def _optional(self) -> Iterator[str]:
        """Lines that add the optional tensors that are given, behind one test where all are rare."""
        optional = [operand for operand in self.operands if isinstance(operand, Tensor) and operand.is_optional]
        indent = "        "
        if len(optional) > 2:
            yield f"{indent}if not ({' is '.join(operand.name for operand in optional)} is None):\n"
            indent += "    "
        scales = {operand.scaled_by for operand in self.operands if isinstance(operand, Tensor)}
        for together, group in itertools.groupby(optional, lambda operand: operand.name in scales):
            if together:  # as they nearly always come
                yield _OPTIONAL_SCALES.format(indent=indent, **_scales_given(list(group)))
                continue
            for operand in group:
                name = operand.name
                given, kind = (f"*{name}", f", {name}.__class__, len({name})") if operand.slices else (name, "")
                if name in self.aligned:
                    kind += f", any([each.data_ptr() & 15 for each in ({given},)])"
                yield f"{indent}if {name} is not None:\n"
                yield f"{indent}    tensors += ({given},); hint += ({name!r}{kind},)\n"

    def _watch(self, arguments: Any) -> Callable[..., None]:
        """What checks, at later calls that look like this one, that what is written lies apart from all else."""
        given = arguments._asdict()
        bundles = {o.name: o for o in self.operands if isinstance(o, Bundle)}
        found = [item for o in self._own for item in o.tensors(given[o.name])]
        own = [(label, o) for label, o, _ in found]  # tensors are kept alive by nobody here
        reaches = [_reach(tensor) for *_, tensor in found]
        reaches += [reach for name in bundles if given[name] is not None for reach in given[name].looks.reaches]

        def precisely(tensors: Sequence[torch.Tensor], *held: Any) -> None:
            items = [(*known, tensor) for known, tensor in zip(own, tensors, strict=True)]
            items += [item for o, value in zip(bundles.values(), held, strict=True) for item in o.tensors(value)]
            _check_memory(self.name, items)

        mate = next((o for o in bundles.values() if o.goes_with is not None and given[o.name] is not None), None)
        mates: tuple[int, ...] = ()
        together: Callable[[Any, Any], None] | None = None
        if mate is not None and mate.goes_with is not None:
            name, check = mate.goes_with
            mates, together = tuple(map(list(bundles).index, (mate.name, name))), functools.partial(check, self.name, mate.name)
        is_weight = [o.name in self.first and o.dtype is not IDS for _, o in own]
        anchor = next((i for i, (_, o) in enumerate(own) if is_weight[i] or not (o.written or any(is_weight))), 0)
        kinds = tuple(tuple(part.written for _, part, _ in o.tensors(given[name])) for name, o in bundles.items())
        new = [bool(o.made_if) and given[o.made_if] for _, o in own]
        make = _apart(tuple(None if new[i] else o.written for i, (_, o) in enumerate(own)), kinds, mates, anchor)
        watch: Callable[..., None] = make(precisely, together, *reaches)
        return watch

    @property
    def _own(self) -> list[Tensor]:
        """Tensors in the order of a remembered call: those that are always there first."""
        return sorted((o for o in self.operands if isinstance(o, Tensor)), key=lambda o: o.is_optional)

    def _number(self, name: str, value: Any) -> float:
        declared = next(o for o in self.operands if isinstance(o, Number) and o.name == name)
        dataclasses.replace(declared, only_with=None).admit(self.name, value, {})  # what it goes with is told by the hint
        return float(value)


def _may_be_none(operand: Operand) -> bool:
    if isinstance(operand, Choice):
        return None in operand.words
    return operand.is_optional if isinstance(operand, Tensor) else getattr(operand, "optional", False)


_IN_GRAPHS = """
def together({flat}):
    function({whole})

def apart({names}):
    op({given})
"""


def _in_schema(operand: Operand, name: str, letters: Iterator[str], optional: bool = False) -> str:
    """An argument of an op of torch, ``name``."""
    kinds = {Int: "SymInt", Flag: "bool", Number: "float", Choice: "str", Several: "SymInt[]"}
    if isinstance(operand, Tensor):
        kind = f"Tensor({next(letters)}!)" if operand.written else "Tensor[]" if operand.slices else "Tensor"
    elif type(operand) in kinds:
        kind = kinds[type(operand)]
    else:
        raise TypeError(f"{name}: a graph of torch.compile takes no {type(operand).__name__}")
    return f"{kind}{'?' if optional or _may_be_none(operand) else ''} {name}"


_REMEMBERED = """
def function({names}):
    try:
        hint = ({hint})
        tensors = ({tensors})
{optional}        last = recent.get(hint)
        if last is None or not last[0](*tensors):
            last = find(hint, tensors)
{numbers}    except Exception as error:
        refuse(of({names}), error)
    if last is None:
        call = bind(of({names}))
        put(hint, tensors, (call,{kept}))
    else:
{found}{end}"""
_OPTIONAL_SCALES = """{indent}if not ({names} is None):
{indent}    tensors += ({tensors},); hint += ({kinds},)
"""
_CALL = "    call.run(({names},))\n"
_FOUND = "        call = last[1][0]\n"
_FOUND_APART = """        call, check_apart = last[1]
        check_apart(tensors{bundles})
"""


def _scales_given(operands: Sequence[Any]) -> dict[str, str]:
    """Scales that come together, as parts of ``_OPTIONAL_SCALES``."""
    one = {o.name: f"*(() if {o.name} is None else ({o.name},))" for o in operands}
    return {
        "names": " is ".join(one),
        "tensors": ", ".join(f"*({o.name} or ())" if o.slices else one[o.name] for o in operands),
        "kinds": ", ".join(f"{o.name}.__class__, len({o.name} or ())" if o.slices else f"{o.name} is None" for o in operands),
    }


@functools.cache
def _apart(
    written: tuple[bool | None, ...], bundles: tuple[tuple[bool, ...], ...], mates: tuple[int, ...], anchor: int
) -> Callable[..., Any]:
    """Makes checks that what is written lies apart from all else, written out for tensors of one number and kind.

    What was found apart stays so. It is found again by the ``anchor``, a weight or else what is read: where what is written is
    in the same place, and all else the same objects or in the same places, nothing is compared. Else places are, by the bytes
    from the first to the last of each tensor; where such spans meet, ``precisely`` looks at rows and columns, and raises.

    Args:
        written: of each tensor, whether it is; None: it is new, and lies apart.
        bundles: likewise of the tensors in each bundle.
        mates: two bundles of which ``together`` is asked, or none.
        anchor: which of the tensors.
    """
    first, total = len(written), len(written) + sum(map(len, bundles))
    own = [i for i, is_written in enumerate(written) if is_written is not None]
    flags = [*written, *itertools.chain(*bundles)]
    if not any(flags):
        return lambda precisely, together, *reaches: lambda tensors, *bundles: None
    asked, others = ([i for i in own if written[i] == is_written] for is_written in (True, False))
    held = [b for b, parts in enumerate(bundles) if parts]
    same = [f"place_{i} == last_{i}" for i in asked]
    same += [f"(last_{i}() is tensor_{i} or tensor_{i}.data_ptr() == places[{i}])" for i in others]
    same += [f"(memory_{b} is last_memory_{b} or memory_{b} == last_memory_{b})" for b in held]
    kept = [*(f"place_{i}" if written[i] else f"last_{i}" for i in own), *(f"memory_{b}" for b in held), "places"]
    last = [*(f"last_{i}" for i in own), *(f"last_memory_{b}" for b in held), "places"]
    changed = [f"place_{i} != places[{i}]" for i in range(first)]
    changed += [f"memory_{b} != last_memory_{b}" for b, parts in enumerate(bundles) for _ in parts]
    meet: dict[str, list[str]] = {}  # pairs, by what must have changed for them to be compared
    for i, j in itertools.combinations([*own, *range(first, total)], 2):
        if flags[i] or flags[j]:
            key = "True" if j < first else " or ".join(dict.fromkeys((changed[i], changed[j])))
            meet.setdefault(key, []).append(f"-reach_{i} < place_{i} - place_{j} < reach_{j}")
    given = ", ".join(f"bundle_{b}" for b in range(len(bundles)))
    near = " or ".join(f"({key}) and ({' or '.join(pairs)})" for key, pairs in meet.items())
    source = f"""
def make(precisely, together, {", ".join(f"reach_{i}" for i in range(total))}):
    known = {{}}
    def check_apart(tensors, {given}):
        {_listed(f"tensor_{i}" for i in range(first))} = tensors
        {"; ".join(f"place_{i} = tensor_{i}.data_ptr()" for i in asked)}
        {"; ".join(f"memory_{b} = bundle_{b}.memory" for b in held)}
        last = known.get(id(tensor_{anchor}), never)
        {_listed(last)} = last
        if {" and ".join(same)}:
            return
        {" ".join(_AGAIN.format(i=i) for i in others)}
        {_listed(f"place_{i}" for i in range(first, total))} = {" + ".join(f"memory_{b}" for b in held) or "()"}
        if {near}:
            precisely(tensors, {given})
        {f"together({', '.join(f'bundle_{b}' for b in mates)})" if mates else ""}
        if len(known) >= 4096:
            known.clear()
        places = {_listed(f"place_{i}" if i in own else "0" for i in range(first))}
        known[id(tensor_{anchor})] = {_listed(kept)}
    return check_apart
"""
    never = [*(-1 if written[i] else lambda: None for i in own), *(None for _ in held), (-1,) * first]
    made: dict[str, Any] = {"ref": weakref.ref, "never": never}
    exec(source, made)  # noqa: S102  (of declarations alone)
    return made["make"]  # type: ignore[no-any-return]


_AGAIN = """
        if last_{i}() is tensor_{i}:
            place_{i} = places[{i}]
        else:
            place_{i}, last_{i} = tensor_{i}.data_ptr(), ref(tensor_{i})"""


def _listed(names: Iterable[str]) -> str:
    return f"({''.join(f'{name}, ' for name in names)})"


def _flat(operands: Sequence[Operand], values: Mapping[str, Any]) -> Iterator[tuple[str, Operand, Any]]:
    """(what an error calls it, its declaration, it) of all operands, parts of bundles one by one."""
    for operand in operands:
        value = values[operand.name]
        if not isinstance(operand, Bundle):
            yield operand.name, operand, value
        elif value is not None:
            parts = operand.parts_of(value)
            yield from ((f"{operand.name}.{part.name}", part, getattr(value, part.name)) for part in parts)


def _numbers(op: str, label: str, operand: Operand, value: Any, sizes: Sizes) -> None:
    """Note the sizes that are numbers, and those that tell how many slices there are."""
    if isinstance(operand, Int) and operand.size and value is not None:
        sizes.set(operand.size, value, label)
    elif isinstance(operand, Choice) and operand.size:
        sizes.set(operand.size, operand.sizes[operand.words.index(value)], label)
    elif isinstance(operand, Tensor) and operand.slices and value is not None:
        count, new = _Dim.read(operand.count), dict[str, int]()
        if not count.fits(len(value), sizes, new):
            origin = sizes.come_from(count.names, label)
            fail(op, label, f"{len(value)} tensors", f"{count.say(sizes)}, one a slice", origin)
        for name, size in new.items():
            sizes.set(name, size, label)


_Found = tuple[str, Tensor, torch.Tensor]


def _check_places(op: str, tensors: Sequence[_Found]) -> None:
    """Raise ValueError unless all tensors are on one device that kernels run on, and outside of autograd."""
    recording = torch.is_grad_enabled()
    for label, _, tensor in tensors:
        if tensor.device != tensors[0][2].device:
            fail(op, label, describe(tensor), f"one on {tensors[0][2].device}, as {tensors[0][0]}")
        if recording and tensor.requires_grad:
            hint = "there is no backward: call it under torch.no_grad() or torch.inference_mode(), or on tensor.detach()"
            fail(op, label, "a tensor that requires grad", "one that does not", hint)
    for label, _, tensor in tensors[:1]:
        if not runtime.runs_on(tensor.device):
            hint = "with TRITON_INTERPRET=1, set before triton is imported, kernels run on CPU tensors"
            fail(op, label, f"one on {tensor.device}", "one on a GPU", hint)


def _in_order(waiting: list[_Found], sizes: Sizes) -> Iterator[_Found]:
    """Each tensor when its sizes can be told: one at most is new in each dimension."""
    while waiting:
        clear = (found for found in waiting if all(_is_clear(dim, sizes) for form in found[1].forms for dim in form))
        chosen = next(clear, waiting[0])
        waiting = [found for found in waiting if found is not chosen]
        yield chosen


def _is_clear(dim: _Dim, sizes: Sizes) -> bool:
    return sum(sizes.get(name) is None for name in dim.names) < 2


def _bindings(form: Sequence[_Dim], shape: Sequence[int], sizes: Sizes) -> dict[str, int] | None:
    """What sizes are new if a shape has this form; None: it has not."""
    new: dict[str, int] = {}
    fits = len(form) == len(shape) and all(d.fits(size, sizes, new) for d, size in zip(form, shape, strict=True))
    return new if fits else None


def _empty(operand: Tensor, tensor: torch.Tensor, sizes: Sizes) -> str:
    """A hint: which sizes must not be 0."""
    for form in operand.forms:
        if len(form) == tensor.dim():
            none = [dim.say(sizes) for dim, size in zip(form, tensor.shape, strict=True) if size == 0 and "T" not in dim.names]
            return f"{', '.join(none)}: at least 1" if none else ""
    return ""


def _lies_right(operand: Tensor, tensor: torch.Tensor) -> bool:
    if tensor.numel() == 0 or operand.strides == FREE:
        return True
    if operand.strides == CONTIGUOUS:
        return tensor.is_contiguous()
    if tensor.dim() > 0 and tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
        return False
    if operand.written and overlaps_itself(tensor):
        return False
    if operand.strides != PAIRS or tensor.dim() != 3 or min(tensor.shape[:2]) < 2:
        return True
    return tensor.stride(0) == tensor.shape[1] * tensor.stride(1)


_LIES = {
    ROWS: " with last stride 1",
    PAIRS: " with last stride 1 and stride(0) == top_k * stride(1)",
    CONTIGUOUS: "",
    FREE: "",
}


def _wanted(operand: Tensor, dtypes: tuple[torch.dtype, ...] | None, sizes: Sizes, tensor: torch.Tensor) -> str:
    half = " / 2" if operand.has_pairs(tensor) else ""
    shapes = " or ".join(f"[{', '.join(dim.say(sizes) for dim in form)}{half}]" for form in operand.forms)
    kinds = "" if dtypes is None else " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
    contiguous = "contiguous" if operand.strides == CONTIGUOUS else ""
    what = " ".join(filter(None, (contiguous, shapes, kinds)))
    rows = ", rows that do not overlap" if operand.written and operand.strides in (ROWS, PAIRS) else ""
    return f"{what}{_LIES[operand.strides]}{rows} on {tensor.device}"


def _check_alike(op: str, name: str, slices: Sequence[torch.Tensor]) -> None:
    first = slices[0]
    for i, other in enumerate(slices):
        if other.shape != first.shape or other.stride() != first.stride() or other.dtype != first.dtype:
            fail(op, f"{name}[{i}]", describe(other), describe(first), "slices have one layout")


def _check_memory(op: str, tensors: Sequence[_Found]) -> None:
    """Raise ValueError where a tensor that is written shares memory with another."""
    if tensors[0][2].device.type == "meta":
        return
    spans = [(label, tensor, tensor.data_ptr(), tensor.data_ptr() + _reach(tensor)) for label, _, tensor in tensors]
    for (_, operand, _), (label, tensor, begin, end) in zip(tensors, spans, strict=True):
        if operand.written:
            for other_label, other, other_begin, other_end in spans:
                if begin < other_end and other_begin < end and other_label != label:
                    _check_apart(op, label, tensor, other_label, other)


def _check_apart(op: str, label: str, written: torch.Tensor, other_label: str, other: torch.Tensor) -> None:
    """Raise ValueError if a tensor that is written and another share memory."""
    if share_memory(written, other):
        hint = f"it is written while {other_label} is in use"
        fail(op, label, f"memory that {other_label} lies in", "memory of its own", hint)


def overlaps_itself(tensor: torch.Tensor) -> bool:
    """Whether two elements may be one in memory; True too for layouts that no op takes."""
    reach = 1
    for stride, size in sorted((stride, size) for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if size > 1):
        if stride < reach:
            return True
        reach += (size - 1) * stride
    return False


def _reach(tensor: torch.Tensor) -> int:
    """Bytes from the first element of a tensor to behind its last one."""
    if tensor.numel() == 0:
        return 0
    last = sum([(size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)])
    return (last + 1) * tensor.element_size()


def share_memory(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors have bytes in common; columns of one buffer side by side have none."""
    if one.device.type == "meta" or one.numel() == 0 or other.numel() == 0:
        return False
    apart = other.data_ptr() - one.data_ptr()
    if not -_reach(other) < apart < _reach(one):
        return False
    pitches = {_pitch(one), _pitch(other)} - {0}
    if len(pitches) != 1:
        return True
    pitch = pitches.pop()
    return apart % pitch < _width(one) or apart % pitch + _width(other) > pitch


def _pitch(tensor: torch.Tensor) -> int:
    """Bytes between rows, of which all are the same number apart; 0: there is one row."""
    strides = [stride for size, stride in zip(tensor.shape[:-1], tensor.stride(), strict=False) if size > 1]
    return math.gcd(*strides) * tensor.element_size() if strides else 0


def _width(tensor: torch.Tensor) -> int:
    return _reach(tensor[(0,) * (tensor.dim() - 1)]) if tensor.dim() > 0 else tensor.element_size()


def _say(value: object) -> str:
    if isinstance(value, torch.Tensor):
        return describe(value)
    if value is None or isinstance(value, (bool, torch.dtype)):
        return str(value)
    return f"{type(value).__name__} {value!r}" if isinstance(value, (int, float, str)) else type(value).__name__
