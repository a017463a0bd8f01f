"""From what calls launch to specs of just that: the package is asked, and the specs that come with kernelgen are narrowed."""

from __future__ import annotations

import itertools
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any, Iterator, Mapping, Sequence

from kernelgen.compiled.stand_in import compiling_for
from kernelgen.compiled.which import BY_SIZES
from kernelgen.core import names
from kernelgen.core.model import SCHEDULE, Family, Variant
from kernelgen.core.targets import PRIMARY, TARGETS

Tags = tuple[str, ...]
_WHY = "no call of this model asks for it"


def launched(kernels: ModuleType, shapes: Sequence[Any], max_tokens: int) -> dict[str, set[str]]:
    """Family -> the modules of its variants that calls of these shapes launch, for up to ``max_tokens`` tokens."""
    runtime, found = kernels._runtime, dict[str, set[str]]()
    with compiling_for(TARGETS[PRIMARY]):
        for shape, tokens in itertools.product(shapes, kernels._warmup.ends(max_tokens)):
            with runtime.compile_only() as requests:
                shape.call(tokens)
            for request in requests:
                family, _, module = _inside(kernels, request.launcher.kernel.fn.__module__).partition(".")
                if module:
                    found.setdefault(family, set()).add(module)
    return found


def imported(kernels: ModuleType, shapes: Sequence[Any]) -> set[str]:
    """The families without which the package has no such shapes: those whose modules they import, over any others."""
    families: set[str] = set()
    todo, seen = [type(shape).__module__ for shape in shapes], set()
    while todo:
        module = todo.pop()
        if module in seen or not module.startswith(f"{kernels.__name__}."):
            continue
        seen.add(module)
        families |= {_inside(kernels, module).partition(".")[0]} if "." in _inside(kernels, module) else set()
        values = list(vars(sys.modules[module]).values())
        todo += [value.__name__ if isinstance(value, ModuleType) else str(getattr(value, "__module__", "")) for value in values]
    return families


def chosen(family: Family, modules: set[str], dtype: str) -> list[Variant]:
    """The variants that are needed: those of these modules, in every schedule, as another device may choose another; or one,
    without which a family cannot be; all of one that has schedules alone, which its host code names.
    """
    if [axis.name for axis in family.axes] == [SCHEDULE]:
        return list(family.variants)

    def meaning(variant: Variant) -> list[str]:
        return [tag for axis, tag in variant.tags if axis not in BY_SIZES]

    needed = [meaning(variant) for variant in family.variants if variant.module in modules]
    of_dtype = [variant for variant in family.variants if getattr(variant, "dtype", dtype) == dtype]
    return [v for v in family.variants if meaning(v) in needed] or (of_dtype or list(family.variants))[:1]


def spec(source: str, family: Family, variants: Sequence[Variant], head: str) -> str:
    """The text of a spec with these variants alone.

    Args:
        source: that of the whole family.
        head: a comment in front.
    """
    axes = {axis.name: [tag for tag in axis.tags if any(getattr(v, axis.name) == tag for v in variants)] for axis in family.axes}
    wanted = {tuple(getattr(variant, axis) for axis in axes) for variant in variants}
    blocks = dict(_blocks(source))
    tags = {tag for axis in axes.values() for tag in axis}
    lines = [f"# {head}", *blocks.pop("")[1:], f"family: {family.name}", "", "axes:"]
    lines += [f"  {axis}: [{', '.join(some)}]" for axis, some in axes.items()]
    excludes = list(_excludes(axes, wanted))
    lines += ["", "exclude:"] if excludes else []
    for when in excludes:
        lists = {axis: some[0] if len(some) == 1 else f"[{', '.join(some)}]" for axis, some in when.items()}
        said = ", ".join(f"{axis}: {some}" for axis, some in lists.items())
        lines += [f"  - when: {{{said}}}", f"    why: {_WHY}"]
    scales = {tag for tag in tags if re.match(r"[wa]8", tag)}
    for key, block in blocks.items():
        if key == "quant":
            grouped = {"group_n": "w8group" in scales, "group_k": bool(scales & {"w8group", "a8group"})}
            kept = [line for line in block[1:] if grouped.get(line.strip().partition(":")[0], True)]
            lines += ["", *block[:1], *kept] if scales else []
        elif key == "tunables":
            kernels = {variant.kernel for variant in variants}
            lines += ["", *block[:1], *_of_kernels(block[1:], {str(kernel) for kernel in kernels})]
        elif key not in ("family", "axes", "exclude"):
            lines += ["", *block]
    return "\n".join(lines) + "\n"


def measured(
    specs: Path, family: Family, variants: Sequence[Variant], sizes: Mapping[str, set[int]]
) -> Iterator[tuple[str, str]]:
    """Device -> the text of what was measured on it for calls of these ``sizes`` and variants, where anything was.

    A size that a problem has and ``sizes`` does not may be any.
    """
    kernels = {variant.kernel for variant in variants}
    tags = {tag for variant in variants for tag in variant.tags}
    for known in family.tuned:
        text = (specs / names.TUNED / known.device.label / f"{family.name}.yaml").read_text(encoding="utf-8")
        head, *blocks = re.split(r"^(?=  - problem:)", text, flags=re.MULTILINE)
        kept = []
        for block, entry in zip(blocks, known.entries, strict=True):
            fits = all(size not in sizes or value in sizes[size] for size, value in entry.problem)
            if not fits or entry.schedule not in kernels or not set(entry.tags) <= tags:
                continue
            if entry.runner_up is not None and entry.runner_up.schedule not in kernels:
                block = re.sub(r"^    runner_up:.*\n", "", block, flags=re.MULTILINE)
            kept.append(block)
        if kept:
            yield known.device.label, head + "".join(kept)


def _inside(kernels: ModuleType, module: str) -> str:
    """A module by its name below the package, "" if it is not there."""
    prefix = f"{kernels.__name__}."
    return module[len(prefix) :] if module.startswith(prefix) else ""


def _blocks(source: str) -> Iterator[tuple[str, list[str]]]:
    """The keys of a spec with their lines; "": the comments in front."""
    for block in re.split(r"^(?=[a-z_]+:)", source, flags=re.MULTILINE):
        lines = block.rstrip("\n").splitlines()
        if lines:
            yield ("" if lines[0].startswith("#") else lines[0].partition(":")[0]), lines


def _of_kernels(lines: Sequence[str], kernels: set[str]) -> Iterator[str]:
    kernel = ""
    for line in lines:
        if re.match(r"  \w", line):
            kernel = line.strip().rstrip(":")
        if kernel in kernels:
            yield line


def _excludes(axes: Mapping[Any, Sequence[str]], wanted: set[Tags]) -> Iterator[dict[str, list[str]]]:
    """What takes all combinations out but those that are wanted: as often as it can, by pairs of tags that never meet."""
    order = list(axes)
    rest = [tags for tags in itertools.product(*axes.values()) if tags not in wanted]
    pairs = [(i, j) for i, j in itertools.permutations(range(len(order)), 2)]
    while rest:
        best: tuple[int, dict[str, list[str]]] = 0, {}
        for i, j in pairs:
            for tag in axes[order[i]]:
                never = [other for other in axes[order[j]] if not any((t[i], t[j]) == (tag, other) for t in wanted)]
                count = sum(t[i] == tag and t[j] in never for t in rest)
                if count > best[0]:
                    best = count, {order[i]: [tag], order[j]: [t for t in never if any((r[i], r[j]) == (tag, t) for r in rest)]}
        when = best[1] or {axis: [tag] for axis, tag in zip(order, rest[0], strict=True)}
        yield when
        rest = [tags for tags in rest if not all(tags[order.index(axis)] in some for axis, some in when.items())]
