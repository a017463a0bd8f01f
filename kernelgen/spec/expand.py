"""Axes to variants: one pure function."""

from __future__ import annotations

import dataclasses
import math
from typing import Container, Iterator, Mapping, Sequence

from kernelgen.core.diagnostics import Diagnostic
from kernelgen.core.model import (
    QUANT_AXES,
    SCALES,
    SCHEDULE,
    VOCABULARY,
    WITHOUT_E4M3,
    Fact,
    Family,
    Package,
    Record,
    Variant,
)
from kernelgen.core.names import Identifier, module_name, variant_name

MAX_COMBINATIONS = 4_000_000
MAX_VARIANTS = 2_000


def expand(families: Sequence[Family]) -> tuple[Package, list[Diagnostic]]:
    """Give every family its variants, in the order of the spec's axes and tags, and judge the result.

    Returns:
        The package of the families, and what is wrong with excludes, sizes and names.
    """
    faults: list[Diagnostic] = []
    expanded = []
    for family in families:
        combinations = math.prod(len(axis.tags) for axis in family.axes)
        if combinations > MAX_COMBINATIONS:
            message = f"{combinations} combinations of tags; at most {MAX_COMBINATIONS}"
            faults.append(Diagnostic("KG004", family.axes[0].location, message))
            continue
        left, useful = _left(family)
        variants = tuple(variant_of(family, tags) for tags in left)
        faults += _coverage_faults(family, variants, useful)
        expanded.append(dataclasses.replace(family, variants=variants))
        faults += _fp8_faults(expanded[-1])
    package = Package(tuple(expanded))
    return package, faults + list(_name_faults(package))


def _left(family: Family) -> tuple[list[Record], set[int]]:
    """The combinations that no exclude takes, and the numbers of the excludes that take one which none above takes.

    Axis by axis: of what an exclude takes as a whole the rest is looked at only where one above it may take a part.
    """
    names = [axis.name for axis in family.axes]
    places: dict[str, int] = {name: place for place, name in enumerate(names)}
    left, useful = list[Record](), set[int]()
    excluded = [(i, exclude.when, max(places[name] for name in exclude.when)) for i, exclude in enumerate(family.excludes)]
    nobody = len(excluded)

    def walk(values: tuple[Identifier, ...], still: Sequence[tuple[int, Mapping[str, Sequence[str]], int]], taken: int) -> None:
        """What begins with ``values``; ``still``: excludes that may take some of it; ``taken``: the first that takes all."""
        depth = len(values)
        if taken < nobody and not still:
            useful.add(taken)
        elif depth == len(names):
            left.append(Record(dict(zip(names, values, strict=True))))
        else:
            for tag in family.axes[depth].tags:
                fitting = [of for of in still if tag in of[1].get(names[depth], (tag,))]
                first = min([taken, *(i for i, _, last in fitting if last == depth)])
                walk((*values, tag), [of for of in fitting if of[2] > depth and of[0] < first], first)

    walk((), excluded, nobody)
    return left, useful


def variant_of(family: Family, tags: Record) -> Variant:
    """The variant of ``family`` that has these ``tags``, whether or not its spec has it."""
    return Variant(
        family.name,
        variant_name(family.name, tags.values),
        module_name(tags.values),
        Identifier(dict(tags).get(SCHEDULE, family.name)),
        tags,
        _facts(family, tags),
    )


def _facts(family: Family, tags: Record) -> Record:
    facts: dict[Identifier, Fact] = {
        Identifier("group_n"): family.quant.group_n,
        Identifier("group_k"): family.quant.group_k,
        Identifier("chunk_k"): family.numerics.chunk_k,
    }
    for axis, tag in tags:
        for name, fact in VOCABULARY.get(axis, {}).get(tag, {}).items():
            facts[Identifier(name)] = fact
    if Identifier("torch_dtype") in facts:
        facts[Identifier("intermediate_dtype")] = facts[Identifier("torch_dtype")]  # numerics.intermediate: activation
    return Record(facts)


def _coverage_faults(
    family: Family, variants: Sequence[Variant], useful: Container[int]
) -> Iterator[Diagnostic]:
    if len(variants) > MAX_VARIANTS:
        message = f"{len(variants)} variants; at most {MAX_VARIANTS}"
        yield Diagnostic("KG004", family.axes[0].location, message)
    if not variants:
        message = "every combination is excluded"
        yield Diagnostic("KG018", family.axes[0].location, message)
        return
    for i, exclude in enumerate(family.excludes):
        if i not in useful:
            message = "this exclude leaves nothing out that is not left out above"
            yield Diagnostic("KG017", exclude.location, message)
    for axis in family.axes:
        used = {getattr(variant, axis.name) for variant in variants}
        for tag, where in zip(axis.tags, axis.tag_locations, strict=True):
            if tag not in used:
                message = f"every combination with {axis.name} {tag} is excluded"
                yield Diagnostic("KG018", where, message, "remove the tag, or narrow an exclude")


def _fp8_faults(family: Family) -> Iterator[Diagnostic]:
    """What no kernel can do right: one scale for a tile that belongs to two groups, a type that a target lacks."""
    places = {axis.name: dict(zip(axis.tags, axis.tag_locations, strict=True)) for axis in family.axes}
    scales = {getattr(variant, SCALES[axis]) for variant in family.variants for axis, _ in variant.tags if axis in SCALES}
    if scales - {None, "mx"} and family.quant.elements == ("e4m3",):
        for target, where in zip(family.targets, family.target_locations, strict=True):
            if target in WITHOUT_E4M3:
                message = f"{target} has no e4m3, and it is the only element of quant:"
                yield Diagnostic("KG026", where, message, "drop the target, or add e5m2 to elements:")
    told = set()
    for variant, axis, tag in ((v, axis, tag) for v in family.variants for axis, tag in v.tags if axis in QUANT_AXES):
        if "group" in VOCABULARY[axis][tag].values():
            for message, hint in _group_faults(family, variant):
                if (axis, message) not in told:
                    told.add((axis, message))
                    yield Diagnostic("KG026", places[axis][tag], f"{tag}: {message}", hint)


def _group_faults(family: Family, variant: Variant) -> Iterator[tuple[str, str]]:
    """Why ``variant`` could not have scales of groups: what, and what to do about it."""
    tags, quant = dict(variant.tags), family.quant
    rank = tags.get(Identifier("rank"))
    if rank is not None and quant.group_k % variant.block_rank:
        message = f"group_k {quant.group_k} is no multiple of {variant.block_rank}, the tile of rank {rank}"
        yield message, "a tile would need two scales: take another group_k, drop the rank, or exclude it for this tag"
    kernel = family.kernel(variant.kernel)
    tunables = {tunable.name: tunable.values for tunable in kernel.tunables}
    # a tile of rows belongs to one group, and so does at least one tile of columns
    for size in tunables.get(Identifier("shrink_block_r"), ()):
        if quant.group_n % size:
            message = f"group_n {quant.group_n} is no multiple of shrink_block_r {size} of {kernel.name}"
            yield message, "a tile would need two scales"
    sizes = tunables.get(Identifier("block_k"), ())
    if sizes and all(quant.group_k % size for size in sizes):
        yield f"no block_k of {kernel.name} divides group_k {quant.group_k}", "add one that does"


def _name_faults(package: Package) -> Iterator[Diagnostic]:
    owners: dict[str, Family] = {family.name: family for family in package.families}
    for family in package.families:
        for variant in family.variants:
            other = owners.setdefault(variant.name, family)
            if other is not family:
                message = f"variant {variant.name} has the name of something in {other.spec}"
                yield Diagnostic("KG019", family.location, message, "rename a family or a tag")
        if len({variant.name for variant in family.variants}) < len(family.variants):
            message = "two variants have one name, because tags join to the same words"
            yield Diagnostic("KG019", family.axes[0].location, message, "rename a tag")
