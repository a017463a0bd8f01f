"""Which variant serves a case, and why.

Which of the variants that may serve a case a call gets, and with which tiles, the generated package itself is asked
(``served``). What a call fixes and a case does not say is assumed, and told.
"""

from __future__ import annotations

import dataclasses
from typing import Iterable, Mapping, Sequence

from kernelgen.core.diagnostics import Diagnostic, Failure, did_you_mean, failure
from kernelgen.core.model import (
    SCHEDULE,
    TAG_HINTS,
    VOCABULARY,
    Axis,
    Exclude,
    Family,
    Package,
    TunedEntry,
    Variant,
)
from kernelgen.emit.rooms import laboratory, rooms_with

# What a call means that does not say otherwise.
PLAIN = {"add_inputs": "add", "routed_weight": "plain", "weight_quant": "none", "act_quant": "none"}
BY_SIZES = (SCHEDULE, "assignment")  # axes that the front doors decide

_ABOVE_BUCKETS = 256  # a rank that no bucket holds but that of any


@dataclasses.dataclass(frozen=True)
class Answer:
    """The variants that may serve a case.

    Attributes:
        family: theirs.
        variants: one, if the tags decide.
        reasons: for every axis, why its tags.
        sizes: those of a call, among them the rank; none of a family of which no call is known.
        assumed: what of it the case does not say, axes and sizes.
        measured: what was measured for such a case.
    """

    family: Family
    variants: tuple[Variant, ...]
    reasons: Mapping[str, str]
    sizes: Mapping[str, int]
    assumed: Mapping[str, str | int]
    measured: tuple[TunedEntry, ...]

    def tags(self, axis: str) -> list[str]:
        """Those of the variants on an axis."""
        return list(dict.fromkeys(getattr(variant, axis) for variant in self.variants))

    def tag(self, axis: str) -> str | None:
        """The tag of a call on an axis; None: there is no such axis, or the sizes decide."""
        assumed = self.assumed.get(axis)
        tags = self.tags(axis) if any(known.name == axis for known in self.family.axes) else []
        return str(assumed) if assumed is not None else tags[0] if len(tags) == 1 else None

    def fact(self, name: str, default: object = None) -> object:
        """What the tags of a call stand for under a name."""
        for axis in self.family.axes:
            facts = VOCABULARY.get(axis.name, {}).get(self.tag(axis.name) or "", {})
            if name in facts:
                return facts[name]
        return default


@dataclasses.dataclass(frozen=True)
class Known:
    """What ``call.py`` of a room says of the calls of its family; nothing where there is none.

    Attributes:
        sizes: of a call, and what is assumed of them.
        at: an axis and its tag, of which a case is: what is assumed instead, or beside.
        open: axes that a call has several tags of, as it makes several launches.
    """

    sizes: Mapping[str, int]
    at: Mapping[tuple[str, str], Mapping[str, int]]
    open: Sequence[str]

    @classmethod
    def of(cls, family: Family) -> Known:
        """That of ``family``."""
        room = laboratory(family.name, "call") if family.name in rooms_with("call") else None
        return cls(getattr(room, "SIZES", {}), getattr(room, "AT", {}), getattr(room, "OPEN", ()))

    @property
    def words(self) -> list[str]:
        """All sizes that a case can say."""
        return list(dict.fromkeys([*self.sizes, *(size for sizes in self.at.values() for size in sizes)]))

    def usual(self, tags: Mapping[str, Sequence[str]]) -> dict[str, int]:
        """The sizes of a call of these tags, as they are assumed."""
        usual = dict(self.sizes)
        for (axis, tag), sizes in self.at.items():
            if tags.get(axis) == (tag,):
                usual |= sizes
        return usual


def which(package: Package, name: str | None, case: Mapping[str, str]) -> Answer:
    """The variants of a family that may serve ``case``.

    Args:
        package: all families.
        name: the family; None: the only one whose words ``case`` uses.
        case: axis to a tag, or to what a tag stands for (``rank: 24``, ``dtype: bfloat16``); size to a number. What it
            leaves out is as in a call that does not say it, or else may be anything.

    Raises:
        Failure: a word is unknown (exit code 2), or no variant serves the case (1).
    """
    family = _family(package, name, case)
    known = Known.of(family)
    words = _words(family)
    for word in case:
        if word not in words:
            message = f"{family.name} has no axis or size {word!r}"
            raise failure("KG014", family.spec, message, did_you_mean(word, words))
    tags: dict[str, tuple[str, ...]] = {}
    reasons: dict[str, str] = {}
    for axis in family.axes:
        plain = None if axis.name in known.open else PLAIN.get(axis.name)
        if axis.name in case:
            tags[axis.name], reasons[axis.name] = _tags(axis, case[axis.name])
        elif plain in axis.tags:
            tags[axis.name], reasons[axis.name] = (str(plain),), "as a call that does not say otherwise"
        else:
            tags[axis.name] = axis.tags
    fitting = [
        variant
        for variant in family.variants
        if all(getattr(variant, axis) in allowed for axis, allowed in tags.items())
    ]
    served = _nearest(fitting, {axis: tags[axis] for axis in case if len(tags.get(axis, ())) > 1})
    if not served:
        raise Failure(_why_not(family, tags))
    for axis in family.axes:
        if axis.name not in reasons:
            left = dict.fromkeys(getattr(variant, axis.name) for variant in served)
            reasons[axis.name] = _open_reason(axis, list(left))
    given = _sizes_of(known, case)
    assumed = {size: value for size, value in known.usual(tags).items() if size not in given}
    sizes = {**assumed, **given} if known.sizes else given
    left_open: dict[str, str | int] = {
        axis.name: next(tag for tag in axis.tags if any(getattr(variant, axis.name) == tag for variant in served))
        for axis in family.axes
        if axis.name not in (*BY_SIZES, *sizes) and len({getattr(variant, axis.name) for variant in served}) > 1
    }
    return Answer(family, served, reasons, sizes, {**left_open, **assumed}, _measured(family, served, tags, case))


def _measured(
    family: Family, served: Sequence[Variant], tags: Mapping[str, Sequence[str]], case: Mapping[str, str]
) -> tuple[TunedEntry, ...]:
    if not _measured_sizes(family) & set(case):
        return ()
    return tuple(
        entry
        for tuned in family.tuned
        for entry in tuned.entries
        if any(variant.kernel == entry.schedule for variant in served)
        and all(
            str(value).lower() == case[size].lower()
            for size, value in entry.problem
            if size in case
        )
        and all(tag in tags[axis] for axis, tag in entry.tags)
    )


def _sizes_of(known: Known, case: Mapping[str, str]) -> dict[str, int]:
    """The sizes that a case gives; a bucket stands for the largest rank that it holds, that of any rank for one above them."""
    sizes: dict[str, int] = {}
    for word, value in case.items():
        if value.isascii() and value.isdecimal() and 1 <= int(value) < 2**31:
            sizes[word] = int(value)
        elif word == "rank" and value in VOCABULARY["rank"]:
            sizes[word] = int(VOCABULARY["rank"][value]["max_rank"] or _ABOVE_BUCKETS)
        elif word in known.sizes:
            raise failure("KG015", word, f"got {value!r}, wanted a whole number of at least 1")
    return sizes


def _family(package: Package, name: str | None, case: Mapping[str, str]) -> Family:
    known = [family.name for family in package.families]
    if name is None:
        fitting = [family for family in package.families if set(case) <= set(_words(family))]
        if len(fitting) == 1:
            return fitting[0]
        message = "this case may be of several families" if fitting else "no family has all of this"
        raise failure("KG040", "which", message, f"name one: {', '.join(known)}")
    for family in package.families:
        if family.name == name:
            return family
    raise failure("KG040", name, "no such family", did_you_mean(name, known))


def _measured_sizes(family: Family) -> set[str]:
    return {size for tuned in family.tuned for entry in tuned.entries for size in entry.problem.names}


def _words(family: Family) -> list[str]:
    axes = [axis.name for axis in family.axes]
    return list(dict.fromkeys([*axes, *(Known.of(family).words or sorted(_measured_sizes(family)))]))


def _tags(axis: Axis, value: str) -> tuple[tuple[str, ...], str]:
    """The tags of ``axis`` that serve ``value``, the best one first, and why."""
    meanings = VOCABULARY.get(axis.name, {})
    tags, reason = [value], "asked for"
    if value not in meanings and value.isdecimal():
        tags, reason = _buckets(axis, int(value))
    elif value not in meanings and value not in axis.tags:
        for candidate, facts in meanings.items():
            if value.lower() in (str(fact).lower() for fact in facts.values()):
                tags, reason = [candidate], f"stands for {value}"
    served = tuple(tag for tag in tags if tag in axis.tags)
    if served:
        return served, reason
    known = list(dict.fromkeys([*meanings, *axis.tags]))
    if tags[0] not in known:
        hint = TAG_HINTS.get(axis.name) or did_you_mean(value, known)
        raise failure("KG015", axis.name, f"nothing like {value!r}", hint)
    message = f"no variant serves {axis.name} {value}"
    hint = f"add {tags[0]} to {axis.name}: in this line"
    raise Failure([Diagnostic("KG041", axis.location, message, hint)])


def _buckets(axis: Axis, size: int) -> tuple[list[str], str]:
    limits = {tag: facts.get("max_rank", 0) for tag, facts in VOCABULARY.get(axis.name, {}).items()}
    tags = [
        tag
        for tag, limit in limits.items()
        if size >= 1 and (limit is None or (isinstance(limit, int) and size <= limit))
    ]
    if not tags:
        hint = TAG_HINTS.get(axis.name) or f"tags: {', '.join(axis.tags)}"
        raise failure("KG015", axis.name, f"nothing like {size}", hint)
    if limits[tags[0]] is None:
        return tags, f"{size} is above every bucket, so it is tiled"
    return tags, f"the smallest bucket that holds {size} and has a variant"


def _nearest(
    variants: Iterable[Variant], buckets: Mapping[str, Sequence[str]]
) -> tuple[Variant, ...]:
    """Of variants that differ in their bucket alone, the first, as a call gets it."""
    found: dict[tuple[str, ...], Variant] = {}
    for variant in variants:
        others = tuple(tag for axis, tag in variant.tags if axis not in buckets)
        best = found.setdefault(others, variant)
        if _places(variant, buckets) < _places(best, buckets):
            found[others] = variant
    return tuple(found.values())


def _places(variant: Variant, buckets: Mapping[str, Sequence[str]]) -> list[int]:
    return [tags.index(getattr(variant, axis)) for axis, tags in buckets.items()]


def _open_reason(axis: Axis, left: list[str]) -> str:
    if axis.name in BY_SIZES and len(left) > 1:
        return "chosen by the sizes of a call"
    return "not given" if len(left) > 1 else "the only one that is left"


def _why_not(family: Family, tags: Mapping[str, tuple[str, ...]]) -> list[Diagnostic]:
    """The excludes that take the case out: one that takes all of it, else those that together do."""

    def covers(exclude: Exclude) -> bool:
        return all(set(tags[axis]) <= set(left_out) for axis, left_out in exclude.when.items())

    def touches(exclude: Exclude) -> bool:
        return all(set(tags[axis]) & set(left_out) for axis, left_out in exclude.when.items())

    guilty = list(filter(covers, family.excludes)) or list(filter(touches, family.excludes))
    return [
        Diagnostic(
            "KG041", exclude.location, "no variant serves the case: it is excluded", exclude.why
        )
        for exclude in guilty
    ]
