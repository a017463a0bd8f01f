"""Which modules a package has beside its families, and what its face exports.

A module at the top of the package says by its imports which families it needs. Where one of them is absent, the module is left
out, with those that need it, and the face says so to who asks for what they export. A module that exports nothing is there for
others: where none of them imports it, it is left out too.
"""

from __future__ import annotations

import keyword
from typing import Iterable, Iterator, Mapping, Sequence

from kernelgen.core import names
from kernelgen.core.diagnostics import Diagnostic
from kernelgen.core.locate import FAMILIES
from kernelgen.core.model import Family, Location, Module, Package
from kernelgen.core.names import Identifier, Symbol
from kernelgen.emit.outline import Outline
from kernelgen.emit.outputs import Output, Outputs

_FACE = "__init__"


def compose(families: Sequence[Family], outputs: Outputs) -> None:
    """Add the modules at the top of the package of these ``families``, whose own modules are among the ``outputs``."""
    templates = dict(outputs.renderer.templates_in(names.PACKAGE_TEMPLATE_FOLDER))
    face = templates.pop(_FACE, None)
    package = Package(tuple(families))
    outputs.render(_output(stem, template, package) for stem, template in templates.items())
    for source in outputs.rooms.shared():
        outputs.copy(names.package_path(source.stem), source)
    if outputs.faults:
        return
    own = {family.name for family in families}
    modules = {stem: outline for (stem, *inner), outline in outputs.modules.items() if not inner and stem not in own}
    absent = [name for name in outputs.rooms.families if name not in own]
    needs = _needs(modules, absent, outputs)
    for stem in modules:
        if needs[stem]:
            outputs.remove(names.package_path(stem))
    if face is not None:
        parts = [Module(family.name, _exports(family, outputs)) for family in families]
        left_out = [Module(name, (name,), (name,)) for name in map(Identifier, absent)]
        for stem, outline in modules.items():
            exports = _symbols(outline)
            if needs[stem]:
                left_out.append(Module(Symbol(stem), exports, tuple(sorted(needs[stem]))))
            elif exports:
                parts.append(Module(Symbol(stem), exports))
        for fault in _export_faults(parts):
            outputs.add_fault(fault)
        outputs.render([_output(_FACE, face, Package(tuple(families), tuple(sorted(parts)), tuple(sorted(left_out))))])
    idle = modules.keys() - _reached(modules, outputs)
    for source in outputs.rooms.shared():
        if source.stem in idle and not needs[source.stem] and source.file.parent != FAMILIES:
            fault = Diagnostic("KG020", Location(source.label), "no module imports this one", "import it, or remove it")
            outputs.add_fault(fault)
    for stem in idle:
        outputs.remove(names.package_path(stem))


def _output(stem: str, template: str, package: Package) -> Output:
    return Output(names.package_path(stem), template, names.spec_label(), package)


def _needs(
    modules: Mapping[str, Outline], absent: Sequence[str], outputs: Outputs
) -> Mapping[str, set[Identifier]]:
    """The families that each of the ``modules`` needs and that are absent, or lack what it imports."""
    needs: dict[str, set[Identifier]] = {stem: set() for stem in modules}
    for stem, outline in modules.items():
        for wanted in outline.imports:
            is_there = wanted.module in outputs.modules or wanted.top in modules
            if not is_there and (wanted.top in absent or (wanted.top,) in outputs.modules):
                needs[stem].add(Identifier(wanted.top))
    for _ in modules:  # as many steps as a chain of imports can have
        for stem, outline in modules.items():
            needs[stem].update(*(needs[wanted.top] for wanted in outline.imports if wanted.top in modules))
    return needs


def exports_of(family: Family, front: Outline) -> tuple[Symbol, ...]:
    """What a front door exports: unless it says so itself, the function that is named as the family."""
    return (family.name,) if front.exports is None else _symbols(front)


def _exports(family: Family, outputs: Outputs) -> tuple[Symbol, ...]:
    front = outputs.modules.get((family.name,))
    return (family.name,) if front is None else exports_of(family, front)


def _symbols(outline: Outline) -> tuple[Symbol, ...]:
    """What a module exports; a text that is no name is told when the module is checked."""
    return tuple(Symbol(name) for name in outline.exports or () if name.isidentifier() and not keyword.iskeyword(name))


def _export_faults(modules: Iterable[Module]) -> Iterator[Diagnostic]:
    owners: dict[str, str] = dict.fromkeys(Package(()).exports, "the package itself")
    for module in modules:
        for name in module.exports:
            other = owners.setdefault(name, module.name)
            if other != module.name:
                message = f"{module.name} and {other} both export {name}"
                yield Diagnostic("KG019", Location(names.package_path(_FACE)), message, "rename one of them")


def _reached(modules: Mapping[str, Outline], outputs: Outputs) -> set[str]:
    """Those of the ``modules`` that the face or a family imports, by itself or by another of them."""
    todo = [outline for place, outline in outputs.modules.items() if place[:1] not in {(stem,) for stem in modules}]
    reached: set[str] = set()
    while todo:
        new = {wanted.top for wanted in todo.pop().imports} & modules.keys() - reached
        reached |= new
        todo += [modules[stem] for stem in new]
    return reached
