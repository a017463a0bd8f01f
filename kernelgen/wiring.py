"""Whether the modules of a package fit each other and the specs: each asks only for what there is, and nothing lies idle."""

from __future__ import annotations

from typing import Iterator, Sequence

from kernelgen import names
from kernelgen.diagnostics import Diagnostic, did_you_mean
from kernelgen.model import SCHEDULE, VOCABULARY, Family, Kernel, Package, Variant
from kernelgen.outline import Outline, module_of
from kernelgen.outputs import Outputs
from kernelgen.render import Renderer

_BIND = "bind"  # what a front door calls of a variant that it chose


def faults(package: Package, families: Sequence[Family], outputs: Outputs) -> Iterator[Diagnostic]:
    """What does not fit in the ``outputs`` of ``families``, which are those of ``package`` as far as they are rendered."""
    if outputs.faults:  # what is missing because it failed would be told again
        return
    idle = [fault for family in package.families for fault in _axis_faults(family, outputs.renderer)]
    yield from idle
    for family in families:
        yield from _launcher_faults(family, outputs)
        yield from _front_faults(family, outputs)
        yield from (fault for fault in _key_faults(family, outputs) if fault.location not in {f.location for f in idle})
        yield from _tunable_faults(family, outputs)
        yield from _tuned_faults(family, outputs)
    yield from _import_faults(outputs)


def _axis_faults(family: Family, renderer: Renderer) -> Iterator[Diagnostic]:
    """Axes that decide nothing: no template of the family reads them, or what their tags stand for."""
    shared = renderer.templates_in(names.family_template_folder(family.name))
    templates = {kernel.template for kernel in family.kernels} | {template for _, template in shared}
    asked = {word for template in templates if renderer.has(template) for word in renderer.asks(template)}
    for axis in family.axes:
        facts = {fact for meaning in VOCABULARY.get(axis.name, {}).values() for fact in meaning}
        if axis.name != SCHEDULE and not asked & {axis.name, "tags", *facts}:
            message = f"no template of {family.name} reads the axis {axis.name}: its tags make no difference"
            hint = f"drop the axis, or read v.{axis.name} in the kernel and in the front door"
            yield Diagnostic("KG029", axis.location, message, hint)


def _launcher_faults(family: Family, outputs: Outputs) -> Iterator[Diagnostic]:
    """Modules of variants without the functions that others call."""
    front = outputs.modules.get((family.name,))
    for variant in family.variants:
        path = names.family_path(family.name, variant.module)
        made = outputs.modules.get(module_of(path))
        if made is None:
            continue
        if variant.name not in made.defined:
            message = "no launcher: the module of a variant defines a function of the name of the variant"
            line, word = _nearest(variant.name, made)
            hint = f"def {{{{ v.name }}}}(...){f', not {word}' if word else ''}; {variant.name} of {path} is missing"
            yield Diagnostic("KG023", outputs.place(path, line, word=word), message, hint)
        if front is not None and _BIND in front.words and _BIND not in made.defined:
            line, word = _nearest(_BIND, made)
            message = f"no function {_BIND}, which the front door of {family.name} calls"
            yield Diagnostic("KG023", outputs.place(path, line, word=word), message, f"define it; {path} has none")


def _front_faults(family: Family, outputs: Outputs) -> Iterator[Diagnostic]:
    """Front doors that lack their function, or never name a variant."""
    path = names.family_path(family.name, "__init__")
    front = outputs.modules.get((family.name,))
    if front is None:
        return
    if front.exports is None and family.name not in front.defined:
        line, word = _nearest(family.name, front)
        message = f"the front door of {family.name} defines no {family.name}"
        hint = f"name it so{f', not {word}' if word else ''}, or say in __all__ what it exports"
        yield Diagnostic("KG023", outputs.place(path, line, word=word), message, hint)
    variants = {variant.module for variant in family.variants}
    shared = [made for place, made in outputs.modules_of(family.name) if not place[1:] or place[1] not in variants]
    named = {word for made in shared for word in (*made.words, *(wanted.name for wanted in made.imports))}
    idle = [variant for variant in family.variants if variant.module not in named]
    if idle:
        told = f"{idle[0].name} and {len(idle) - 1} more" if len(idle) > 1 else idle[0].name
        message = f"no module of {family.name} names {told}: nothing can choose it"
        yield Diagnostic("KG029", outputs.place(path), message, "name the module of every variant in the front door")


def _key_faults(family: Family, outputs: Outputs) -> Iterator[Diagnostic]:
    """Keys that stand twice in a dictionary; of two variants, a fault of the first axis on which they differ."""
    variants: dict[str | None, Variant] = {variant.module: variant for variant in family.variants}
    told = set()
    for place, made in outputs.modules_of(family.name):
        for twice in made.twice:
            first, second = map(variants.get, twice.values)
            if first is None or second is None:
                message = f"the key {twice.key} stands twice in one dictionary, with another value"
                yield Diagnostic("KG023", outputs.place_in(place, twice.line), message, "drop one of them")
                continue
            axis = next(axis for axis in family.axes if getattr(first, axis.name) != getattr(second, axis.name))
            if axis.name not in told:
                told.add(axis.name)
                message = f"{first.name} and {second.name} have one key in the front door, {twice.key}"
                hint = f"drop the axis {axis.name}, or let the front door read it"
                yield Diagnostic("KG029", axis.location, message, hint)


def _tunable_faults(family: Family, outputs: Outputs) -> Iterator[Diagnostic]:
    """Tunables that no kernel uses, or that are not as the fields of their class: values are handed to it in this order."""
    configs = outputs.modules.get((family.name, names.CONFIGS))
    for kernel in family.kernels:
        declared = tuple(tunable.name for tunable in kernel.tunables)
        name = names.config_class(None if kernel.name == family.name else kernel.name)
        known = configs.fields.get(name, ()) if configs is not None else ()
        if known and known != declared and (declared or family.tuned):
            message = f"{kernel.name} has the tunables {', '.join(known)}, in this order"
            yield Diagnostic("KG027", kernel.tunables_location, message, f"the spec has {', '.join(declared) or 'none'}")
        words = _words(family, kernel, outputs)
        for tunable in kernel.tunables:
            if words and tunable.name not in words:
                message = f"{kernel.name} does not use the tunable {tunable.name}"
                hint = did_you_mean(tunable.name, sorted(words), f"drop it, or use it in templates/{kernel.template}")
                yield Diagnostic("KG027", tunable.location, message, hint)


def _words(family: Family, kernel: Kernel, outputs: Outputs) -> set[str]:
    """What the modules of the variants of ``kernel`` mention, in lower case."""
    modules = (outputs.modules.get((family.name, v.module)) for v in family.variants if v.kernel == kernel.name)
    return {word.lower() for made in modules if made is not None for word in made.words}


def _tuned_faults(family: Family, outputs: Outputs) -> Iterator[Diagnostic]:
    """Measured problems that are not as the key that they are looked up by, name by name."""
    configs = outputs.modules.get((family.name, names.CONFIGS))
    if configs is None:
        return
    key = configs.fields.get(names.KEY, ())
    for tuned in family.tuned:
        sizes = () if not tuned.entries else (*tuned.entries[0].problem.names, *tuned.entries[0].facts.names)
        if sizes and sizes != key:
            message = f"problems of {', '.join(sizes)}; {family.name} looks them up by {', '.join(key) or 'nothing'}"
            yield Diagnostic("KG025", tuned.location, message, "measure again: kernelgen tune writes what it looks up")


def _import_faults(outputs: Outputs) -> Iterator[Diagnostic]:
    """What modules import from each other and is not there."""
    for place, made in outputs.modules.items():
        for wanted in made.imports:
            if (*wanted.module, wanted.name) in outputs.modules:
                continue
            of = outputs.modules.get(wanted.module)
            name = ".".join(wanted.module) or "the package"
            if of is None:
                known = [".".join(other) for other in outputs.modules if other]
                where = outputs.place_in(place, wanted.line, (wanted.module or ("",))[-1])
                yield Diagnostic("KG023", where, f"there is no module {name}", did_you_mean(name, known, ""))
            elif wanted.module == place or wanted.name not in of.defined:  # of itself: a module below it
                where = outputs.place_in(place, wanted.line, wanted.name)
                known = [*of.defined.keys() - {wanted.name}, *(m[-1] for m in outputs.modules if m and m[:-1] == wanted.module)]
                yield Diagnostic("KG023", where, f"{name} has no {wanted.name!r}", did_you_mean(wanted.name, known, ""))


def _nearest(name: str, made: Outline) -> tuple[int, str]:
    """Line and name of what ``made`` defines and could be meant; (0, "") without any."""
    near = did_you_mean(name, made.defined, "").nearest
    return (made.defined[near], near) if near else (0, "")
