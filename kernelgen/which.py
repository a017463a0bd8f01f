"""Which variants serve a case, and why."""

from __future__ import annotations

import dataclasses
from typing import Iterable, Mapping, Sequence

from kernelgen.diagnostics import Diagnostic, Failure, did_you_mean, failure
from kernelgen.model import (
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


@dataclasses.dataclass(frozen=True)
class Answer:
    """The variants that serve a case; for every axis, why; and what was measured for such a case."""

    family: Family
    variants: tuple[Variant, ...]
    reasons: Mapping[str, str]
    measured: tuple[TunedEntry, ...]


def which(package: Package, name: str | None, case: Mapping[str, str]) -> Answer:
    """The variants of a family that serve ``case``.

    Args:
        package: all families.
        name: the family; None: the only one whose words ``case`` uses.
        case: axis to a tag, or to what a tag stands for (``rank: 24``, ``dtype: bfloat16``); size to a number, which
            selects among the measurements. What it leaves out may be anything.

    Raises:
        Failure: a word is unknown (exit code 2), or no variant serves the case (1).
    """
    family = _family(package, name, case)
    words = _words(family)
    for word in case:
        if word not in words:
            message = f"{family.name} has no axis or size {word!r}"
            raise failure("KG014", family.spec, message, did_you_mean(word, words))
    tags: dict[str, tuple[str, ...]] = {}
    reasons: dict[str, str] = {}
    for axis in family.axes:
        if axis.name in case:
            tags[axis.name], reasons[axis.name] = _tags(axis, case[axis.name])
        else:
            tags[axis.name] = axis.tags
    fitting = (
        variant
        for variant in family.variants
        if all(getattr(variant, axis) in allowed for axis, allowed in tags.items())
    )
    served = _nearest(fitting, {axis: tags[axis] for axis in case if len(tags.get(axis, ())) > 1})
    if not served:
        raise Failure(_why_not(family, tags))
    for axis in family.axes:
        if axis.name not in case:
            left = dict.fromkeys(getattr(variant, axis.name) for variant in served)
            reasons[axis.name] = _open_reason(axis, list(left))
    measured = tuple(
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
    return Answer(family, served, reasons, measured if _sizes(family) & set(case) else ())


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


def _sizes(family: Family) -> set[str]:
    return {size for tuned in family.tuned for entry in tuned.entries for size in entry.problem.names}


def _words(family: Family) -> list[str]:
    axes = [axis.name for axis in family.axes]
    return [*axes, *sorted(_sizes(family) - set(axes))]


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
    if axis.name == SCHEDULE and len(left) > 1:
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
