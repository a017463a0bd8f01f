"""What a spec means: frozen values, no input or output.

A ``Family`` has axes; one choice of a tag on every axis is a ``Variant``. What a tag stands for is in ``VOCABULARY``, one
entry a tag: a new tag or a new axis with a meaning is a new entry there. Axes that are not in it are plain tags.
"""

from __future__ import annotations

import dataclasses
from types import MappingProxyType
from typing import Any, Iterator, Mapping, NamedTuple, TypeAlias

from kernelgen.core.names import Identifier, Symbol, spec_label

Fact: TypeAlias = "bool | int | Identifier | None"  # what a template may ask of a variant


class Location(NamedTuple):
    """A place in a text file: line and column count from 1, 0 means the file as a whole."""

    path: str
    line: int = 0
    column: int = 0
    length: int = 1
    text: str = ""  # the whole line

    def __str__(self) -> str:
        return f"{self.path}:{self.line}:{self.column}" if self.line else self.path


class Record:
    """An immutable, ordered set of named values, read as attributes."""

    __slots__ = ("names", "values")

    names: tuple[Identifier, ...]
    values: tuple[Any, ...]

    def __init__(self, fields: Mapping[Identifier, Any]) -> None:
        object.__setattr__(self, "names", tuple(fields))
        object.__setattr__(self, "values", tuple(fields.values()))

    def __getattr__(self, name: str) -> Any:
        try:
            return self.values[self.names.index(name)]
        except ValueError:
            raise AttributeError(f"no {name!r}; there are {', '.join(self.names)}") from None

    def __setattr__(self, name: str, value: object) -> None:
        raise dataclasses.FrozenInstanceError(f"cannot assign to {name!r}")

    def __iter__(self) -> Iterator[tuple[Identifier, Any]]:
        return zip(self.names, self.values, strict=True)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Record) and tuple(self) == tuple(other)

    def __hash__(self) -> int:
        return hash(tuple(self))

    def __repr__(self) -> str:
        return f"Record({dict(self)})"

    def __reduce__(self) -> tuple[Any, ...]:
        return Record, (dict(self),)


def _facts(**facts: bool | int | str | None) -> Mapping[str, Fact]:
    return MappingProxyType(
        {name: Identifier(f) if isinstance(f, str) else f for name, f in facts.items()}
    )


def _bucket(rank: int) -> Mapping[str, Fact]:
    return _facts(block_rank=rank, max_rank=rank, tiled_rank=False)


def _rows(
    reads_token: bool = False,
    reads_sorted: bool = False,
    writes_sorted: bool = False,
    sums: bool = False,
    by_token: bool = False,
) -> Mapping[str, Fact]:
    return _facts(
        reads_token=reads_token, reads_sorted=reads_sorted, writes_sorted=writes_sorted, sums=sums, by_token=by_token
    )


def _activation(act: str | None, gated: bool = False, clamped: bool = False) -> Mapping[str, Fact]:
    return _facts(act=act, gated=gated, clamped=clamped, slices=2 if gated else 1)


# axis -> tag -> facts. All tags of an axis have the same facts. torch_dtype is also the word of triton.language.
VOCABULARY: Mapping[str, Mapping[str, Mapping[str, Fact]]] = MappingProxyType(
    {
        "dtype": {
            "bf16": _facts(torch_dtype="bfloat16"),
            "f16": _facts(torch_dtype="float16"),
        },
        "assignment": {"naive": _facts(), "sorted": _facts()},
        "add_inputs": {"add": _facts(adds=True), "set": _facts(adds=False)},
        "routed_weight": {"plain": _facts(weighted=False), "weighted": _facts(weighted=True)},
        "rows": {  # of a grouped product: which one is read, and where the result goes
            "token_sorted": _rows(reads_token=True, writes_sorted=True),
            "sorted_pair": _rows(reads_sorted=True),
            "sorted_sorted": _rows(reads_sorted=True, writes_sorted=True),
            "token_pair": _rows(reads_token=True),
            "pair_pair": _rows(),
            "pair_token": _rows(sums=True),
            "token_token": _rows(reads_token=True, by_token=True),
        },
        "epilogue": {  # an activation: of the sums, or of a gate, whose rows of the weights come before those of up
            "none": _activation(None),
            "relu2": _activation("relu2"),
            "silu": _activation("silu"),
            "gelu": _activation("gelu"),
            "gelu_tanh": _activation("gelu_tanh"),
            "swiglu": _activation("silu", gated=True),
            "swiglu_clamp": _activation("silu", gated=True, clamped=True),
            "geglu": _activation("gelu", gated=True),
            "geglu_tanh": _activation("gelu_tanh", gated=True),
        },
        "order": {"pair": _facts(by_table=False), "sorted": _facts(by_table=True)},
        "delta": {"none": _facts(adapted=False), "lora": _facts(adapted=True)},
        "rest": {"keep": _facts(zeroes=False), "zero": _facts(zeroes=True)},
        "rank": {
            "r16": _bucket(16),
            "r32": _bucket(32),
            "r64": _bucket(64),
            "r128": _bucket(128),
            "rany": _facts(block_rank=128, max_rank=None, tiled_rank=True),
        },
        # Which scales there are: of FP8 or MXFP4 weights, and of FP8 activations. None: no such scales, 16-bit numbers.
        "weight_quant": {
            "none": _facts(weight_scales=None),
            "w8tensor": _facts(weight_scales="tensor"),
            "w8channel": _facts(weight_scales="channel"),
            "w8group": _facts(weight_scales="group"),
            "mxfp4": _facts(weight_scales="mx"),
        },
        "act_quant": {
            "none": _facts(x_scales=None),
            "a8tensor": _facts(x_scales="tensor"),
            "a8token": _facts(x_scales="token"),
            "a8group": _facts(x_scales="group"),
        },
        "out_quant": {  # o8: the result is FP8, with scales as activations have them
            "none": _facts(writes_fp8=False),
            "o8": _facts(writes_fp8=True),
        },
        "layout": {  # of the rows of gate and up; none: all of gate, then all of up
            "none": _facts(interleaved=False),
            "interleaved": _facts(interleaved=True),
        },
        "bias": {"none": _facts(biased=False), "bias": _facts(biased=True)},
        "delta_quant": {  # of the factors that a delta is made with
            "none": _facts(b_scales=None),
            "b8tensor": _facts(b_scales="tensor"),
            "b8channel": _facts(b_scales="channel"),
            "b8group": _facts(b_scales="group"),
        },
    }
)
TAG_HINTS: Mapping[str, str] = MappingProxyType(
    {
        "rank": "a bucket is a power of two from r16 to r128; above 128, rany tiles the rank",
        "dtype": "activations are bf16 or f16",
        "weight_quant": "none, or w8tensor, w8channel, w8group: FP8 weights with a scale for each of these; mxfp4: four bits",
        "act_quant": "none, or a8tensor, a8token, a8group: FP8 activations with a scale for each of these",
        "out_quant": "none, or o8: FP8 results, with scales as activations have them",
        "delta_quant": "none, or b8tensor, b8channel, b8group: FP8 factors of adapters with a scale for each of these",
    }
)
QUANT_AXES = ("weight_quant", "act_quant")
# The fact that says which scales there are, of each axis that has such: of weights, of activations, of the factors of a delta.
SCALES: Mapping[str, str] = {"weight_quant": "weight_scales", "act_quant": "x_scales", "delta_quant": "b_scales"}
TUNED_AXES = ("add_inputs", *QUANT_AXES, "out_quant")  # a measurement is of one tag of each of them; of dtypes it serves all
SCHEDULE = "schedule"  # the axis whose tags choose the template

TARGETS = ("sm_80", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942", "gfx950")
WITHOUT_E4M3 = frozenset({"sm_80"})  # Triton knows no such type there


def _fact_of(axis: Identifier) -> Identifier:
    """A fact that tells the tags of an axis apart, else the tag itself."""
    meaning = VOCABULARY.get(axis, {})
    facts = next(iter(meaning.values()), {})
    apart = (name for name in facts if len({tag[name] for tag in meaning.values()}) == len(meaning))
    return Identifier(next(apart, axis))


@dataclasses.dataclass(frozen=True)
class Axis:
    """One axis of meaning and its tags, in the order of the spec."""

    name: Identifier
    tags: tuple[Identifier, ...]
    location: Location = dataclasses.field(compare=False)
    tag_locations: tuple[Location, ...] = dataclasses.field(compare=False)

    @property
    def fact(self) -> Identifier:
        """What a call is asked for to choose a tag; see ``_fact_of``."""
        return _fact_of(self.name)


@dataclasses.dataclass(frozen=True)
class Exclude:
    """A set of combinations that is left out: on each named axis, one of the named tags."""

    when: Mapping[str, tuple[str, ...]]
    why: str
    location: Location = dataclasses.field(compare=False)


@dataclasses.dataclass(frozen=True)
class Tunable:
    """A constexpr parameter of a kernel and the values that tuning may give it."""

    name: Identifier
    values: tuple[int, ...]
    location: Location = dataclasses.field(compare=False)


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One template of a family: a schedule, or the family itself where it has no such axis."""

    name: Identifier
    template: str
    tunables: tuple[Tunable, ...]
    location: Location = dataclasses.field(compare=False)
    tunables_location: Location = dataclasses.field(compare=False)


@dataclasses.dataclass(frozen=True)
class Choice:
    """A schedule with its tunables, and what it took: ``us`` in microseconds."""

    schedule: Identifier
    config: Record  # tunable -> int, in the order of the spec
    us: float


@dataclasses.dataclass(frozen=True)
class TunedEntry:
    """The best choice that was measured for one problem: facts are those of its tags, of the axes of ``TUNED_AXES``."""

    problem: Record  # size -> int or bool
    tags: Record
    facts: Record
    best: Choice
    runner_up: Choice | None

    @property
    def schedule(self) -> Identifier:
        return self.best.schedule

    @property
    def config(self) -> Record:
        return self.best.config


@dataclasses.dataclass(frozen=True)
class Device:
    """What was measured on: ``label`` names its folder in specs/tuned; the rest decides which other devices take its tiles."""

    label: Identifier
    name: str  # as torch calls it
    target: Identifier
    multiprocessors: int
    shared_memory: int  # bytes that one program may take


@dataclasses.dataclass(frozen=True)
class Tuned:
    """The measurements of a family on one device."""

    device: Device
    versions: tuple[tuple[str, str], ...]
    entries: tuple[TunedEntry, ...]
    location: Location = dataclasses.field(compare=False)


@dataclasses.dataclass(frozen=True)
class Numerics:
    """Decisions on precision that hold for every schedule of a family."""

    intermediate: str = "activation"  # rounded once to the activation's dtype; all that the kernels can do
    strict: bool = False  # all schedules add in one order, so that they agree bit for bit

    @property
    def chunk_k(self) -> int | None:
        """Columns of a contraction whose products every schedule adds up before it adds that to the sum; None: any."""
        return 512 if self.strict else None


@dataclasses.dataclass(frozen=True)
class Quant:
    """What FP8 operands look like: their element types, and the size of a group that shares a scale."""

    elements: tuple[Identifier, ...]
    group_n: int  # rows of a weight matrix (its output width)
    group_k: int  # columns (its input width)


@dataclasses.dataclass(frozen=True)
class Resources:
    """What a compiled variant may use, on every target."""

    max_spill_bytes: int = 0


@dataclasses.dataclass(frozen=True)
class Cell:
    """What a variant has of one fact, as a table of Python shows it."""

    fact: Identifier
    value: Fact

    @property
    def is_dtype(self) -> bool:
        return self.fact == "torch_dtype"

    @property
    def is_text(self) -> bool:
        return isinstance(self.value, str) and not self.is_dtype


@dataclasses.dataclass(frozen=True)
class Variant:
    """One kernel file: a tag on every axis of a family.

    Axes and facts are attributes: ``v.dtype`` is the tag, ``v.torch_dtype`` what it stands for.
    """

    family: Identifier
    name: Identifier
    module: Identifier
    kernel: Identifier
    tags: Record  # axis -> tag
    facts: Record

    @property
    def cells(self) -> tuple[Cell, ...]:
        """What it has of the fact of each axis."""
        return tuple(Cell(fact, getattr(self, fact)) for fact in map(_fact_of, self.tags.names))

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self.tags if name in self.tags.names else self.facts, name)


@dataclasses.dataclass(frozen=True)
class Family:
    """A spec, checked; ``variants`` is filled by ``expand``."""

    name: Identifier
    axes: tuple[Axis, ...]
    excludes: tuple[Exclude, ...]
    kernels: tuple[Kernel, ...]
    numerics: Numerics
    quant: Quant
    targets: tuple[str, ...]
    resources: Resources
    tuned: tuple[Tuned, ...]  # a device each, by label
    location: Location = dataclasses.field(compare=False)
    target_locations: tuple[Location, ...] = dataclasses.field(compare=False)
    settings: Mapping[str, Location] = dataclasses.field(compare=False)  # given of numerics and quant: section.key
    variants: tuple[Variant, ...] = ()
    exports: tuple[Symbol, ...] = ()  # of its front door

    @property
    def spec(self) -> str:
        return spec_label(self.name)

    @property
    def has_dtype(self) -> bool:
        return any(axis.name == "dtype" for axis in self.axes)

    @property
    def is_quantised(self) -> bool:
        """Whether some of its operands can be FP8."""
        return any(axis.name in SCALES for axis in self.axes)

    def scales(self, *axes: str) -> set[Fact]:
        """What its tags of these axes of ``SCALES`` have scales of, FP8 ones: "tensor", "channel", "token", "group"."""
        own = ((axis, tag) for axis in self.axes if axis.name in axes for tag in axis.tags)
        return {VOCABULARY[axis.name][tag][SCALES[axis.name]] for axis, tag in own} - {None, "mx"}

    @property
    def has_tunables(self) -> bool:
        return any(kernel.tunables for kernel in self.kernels)

    def kernel(self, name: str) -> Kernel:
        """The kernel called ``name``."""
        return next(kernel for kernel in self.kernels if kernel.name == name)


@dataclasses.dataclass(frozen=True, order=True)
class Module:
    """A module at the top of a package, or a family, by what it exports; ``needs``: the specs without which it is left out."""

    name: Symbol
    exports: tuple[Symbol, ...]
    needs: tuple[Identifier, ...] = ()


@dataclasses.dataclass(frozen=True)
class Package:
    """All families, by name; for its face also the modules that there are, and those that are left out."""

    families: tuple[Family, ...]
    modules: tuple[Module, ...] = ()
    left_out: tuple[Module, ...] = ()

    @property
    def variants(self) -> tuple[Variant, ...]:
        return tuple(variant for family in self.families for variant in family.variants)

    @property
    def exports(self) -> tuple[Symbol, ...]:
        """What the face exports: what its modules do, and ``variants``, which is its own."""
        return tuple(sorted([Symbol("variants"), *(name for module in self.modules for name in module.exports)]))


@dataclasses.dataclass(frozen=True)
class Tree:
    """The output in memory: path below the output folder -> text."""

    files: Mapping[str, str]


# What an axis cannot be called, because it is another attribute of a variant.
VARIANT_ATTRIBUTES = frozenset(
    {field.name for field in dataclasses.fields(Variant)}
    | {"group_n", "group_k", "chunk_k"}
    | {fact for tags in VOCABULARY.values() for facts in tags.values() for fact in facts}
)
