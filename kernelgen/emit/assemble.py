"""Families to the whole output tree, in memory."""

from __future__ import annotations

import dataclasses
import fnmatch
from typing import Container, Iterator

from kernelgen.core import names
from kernelgen.core.diagnostics import Diagnostic, did_you_mean, failure
from kernelgen.core.model import Family, Package, Tree, Variant
from kernelgen.emit import wiring
from kernelgen.emit.compose import compose, exports_of
from kernelgen.emit.outputs import Output, Outputs
from kernelgen.emit.render import Renderer
from kernelgen.emit.rooms import Rooms


def assemble(
    package: Package, renderer: Renderer, rooms: Rooms, only: str | None = None, jobs: int = 1, present: Container[str] = ()
) -> Tree:
    """The output of ``package``, formatted and checked.

    Args:
        package: the families with their variants.
        renderer: renders them.
        rooms: have their host code.
        only: a glob on the names of variants. The tree then holds those, those that are there, and the families that they need.
        jobs: processes to format with.
        present: the paths of the files that are there, for ``only``.

    Raises:
        Failure: templates or what they made are at fault, or ``only`` matches nothing; exit code 2.
    """
    outputs = Outputs(renderer, rooms)
    for fault in renderer.faults(package):
        outputs.add_fault(fault)
    families = _families(package, _chosen(package, only, present), outputs)
    compose(families, outputs)
    for fault in wiring.faults(package, families, outputs):
        outputs.add_fault(fault)
    return Tree(dict(sorted({**outputs.finish(jobs), names.TYPED: ""}.items())))


def source(variant: Variant, family: Family, renderer: Renderer) -> str:
    """The final text of one variant's module.

    Raises:
        Failure: its template, or what it made, is at fault; exit code 2.
    """
    output = _variant_output(variant, family)
    outputs = Outputs(renderer, Rooms(()))
    outputs.render([output])
    return outputs.finish()[output.path]


def select(package: Package, only: str) -> tuple[Variant, ...]:
    """The variants whose name matches the glob ``only``.

    Raises:
        Failure: there is none; exit code 2.
    """
    chosen = tuple(v for v in package.variants if fnmatch.fnmatchcase(v.name, only))
    if not chosen:
        hint = did_you_mean(only, [v.name for v in package.variants], "kernelgen list shows the names")
        raise failure("KG040", only, "no variant has a name like this", hint)
    return chosen


def _chosen(package: Package, only: str | None, present: Container[str]) -> set[Variant]:
    """The variants that are asked for."""
    if only is None:
        return set(package.variants)
    there = {v for v in package.variants if names.family_path(v.family, v.module) in present}
    return {*select(package, only), *there}


def _families(package: Package, chosen: set[Variant], outputs: Outputs) -> tuple[Family, ...]:
    """Render the ``chosen`` variants, and what they need of their families and of others; return the families as rendered."""
    while True:
        families = tuple(
            dataclasses.replace(family, variants=variants)
            for family in package.families
            if (variants := tuple(v for v in family.variants if v in chosen))
        )
        for family in families:
            _make(family, outputs)
        needed = {variant for family in families for variant in _needed(family, package, outputs)}
        if needed <= chosen:
            return families
        chosen = chosen | needed


def _needed(family: Family, package: Package, outputs: Outputs) -> Iterator[Variant]:
    """The variants of what the modules of ``family`` import: of the same family those by name, of another family all."""
    others: dict[str, Family] = {other.name: other for other in package.families}
    missing: dict[str, str] = {}
    for module, outline in outputs.modules_of(family.name):
        for wanted in outline.imports:
            if wanted.top == family.name:
                own = others[family.name].variants
                yield from (v for v in own if v.module in (*wanted.module[1:2], wanted.name))
            elif wanted.top in others:
                yield from others[wanted.top].variants
            elif outputs.rooms.has(wanted.top):
                missing.setdefault(wanted.top, f"{'.'.join(module)} imports {wanted.name} from it")
    for name, why in missing.items():
        message = f"{family.name} needs {name}, of which there is no spec: {why}"
        hint = f"add {names.spec_label(name)}, or take {family.spec} away"
        outputs.add_fault(Diagnostic("KG028", family.location, message, hint))


def _make(family: Family, outputs: Outputs) -> None:
    """The modules of ``family`` and its test: copied from its room, and rendered."""
    for source in outputs.rooms.modules(family.name):
        outputs.copy(names.family_path(family.name, source.stem), source)
    front = outputs.modules.get((family.name, names.FRONT_DOOR))
    if front is not None:
        family = dataclasses.replace(family, exports=exports_of(family, front))
        for fault in wiring.front_faults(family, front, outputs):
            outputs.add_fault(fault)
    rendered = [_variant_output(variant, family) for variant in family.variants]
    for stem, template in outputs.renderer.templates_in(names.FAMILY_TEMPLATE_FOLDER):
        if (stem != names.TUNED_TABLE or family.has_tunables) and (stem != "__init__" or family.exports):
            rendered.append(Output(names.family_path(family.name, stem), template, family.spec, family))
    if outputs.renderer.has(names.TEST_TEMPLATE):
        rendered.append(Output(names.test_path(family.name), names.TEST_TEMPLATE, family.spec, family))
    outputs.render(rendered)


def _variant_output(variant: Variant, family: Family) -> Output:
    path = names.family_path(variant.family, variant.module)
    template = family.kernel(variant.kernel).template
    return Output(path, template, f"{family.spec}, variant {variant.name}", variant, family.axes)
