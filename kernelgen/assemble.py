"""Families to the whole output tree, in memory."""

from __future__ import annotations

import ast
import dataclasses
import fnmatch
from typing import Iterable, Iterator, Mapping

from kernelgen import names
from kernelgen.diagnostics import Diagnostic, Failure, did_you_mean, failure
from kernelgen.formatting import check, finish
from kernelgen.locate import COPIED
from kernelgen.model import Family, Location, Package, Tree, Variant
from kernelgen.render import Renderer, header


@dataclasses.dataclass(frozen=True)
class _Output:
    """A file to be rendered: where it goes, from what, and the one value that its template sees."""

    path: str
    template: str
    spec: str
    value: Variant | Family | Package


def assemble(package: Package, renderer: Renderer, only: str | None = None, jobs: int = 1) -> Tree:
    """The output of ``package``, formatted and checked.

    Args:
        package: the families with their variants.
        renderer: renders them.
        only: a glob on the names of variants. The tree then holds those, and what is shared, and is partial.
        jobs: processes to format with.

    Raises:
        Failure: templates or what they made are at fault (exit code 1), or ``only`` matches nothing (2).
    """
    variants = package.variants if only is None else select(package, only)
    tree, faults = _render(_outputs(package, variants, renderer), renderer, jobs)
    for file in sorted(COPIED.glob("_[!_]*.py")):
        path = names.package_path(file.stem)
        tree[path] = header(names.spec_label(), names.copied_source(file.stem)) + file.read_text("utf-8")
        fault = check(path, tree[path], rendered=False)
        faults += [fault] if fault else []
    faults += _path_faults(tree)
    if not faults:
        faults += _tunable_faults(package, tree)
    if faults:
        raise Failure(faults)
    return Tree(dict(sorted(tree.items())), partial=only is not None)


def source(variant: Variant, family: Family, renderer: Renderer) -> str:
    """The final text of one variant's module.

    Raises:
        Failure: its template, or what it made, is at fault.
    """
    output = _variant_output(variant, family)
    texts, faults = _render([output], renderer, jobs=1)
    if faults:
        raise Failure(faults)
    return texts[output.path]


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


def _outputs(
    package: Package, variants: Iterable[Variant], renderer: Renderer
) -> Iterator[_Output]:
    families = {family.name: family for family in package.families}
    chosen = set()
    for variant in variants:
        chosen.add(variant.family)
        yield _variant_output(variant, families[variant.family])
    for family in package.families:
        if family.name not in chosen:
            continue
        for stem, template in renderer.templates_in(names.family_template_folder(family.name)):
            yield _Output(names.family_path(family.name, stem), template, family.spec, family)
        if renderer.has(names.TEST_TEMPLATE):
            test = names.test_path(family.name)
            yield _Output(test, names.TEST_TEMPLATE, family.spec, family)
    for stem, template in renderer.templates_in(names.PACKAGE_TEMPLATE_FOLDER):
        yield _Output(names.package_path(stem), template, names.spec_label(), package)


def _variant_output(variant: Variant, family: Family) -> _Output:
    path = names.family_path(variant.family, variant.module)
    template = family.kernel(variant.kernel).template
    return _Output(path, template, f"{family.spec}, variant {variant.name}", variant)


def _render(
    outputs: Iterable[_Output], renderer: Renderer, jobs: int
) -> tuple[dict[str, str], list[Diagnostic]]:
    """Final texts by path, and the faults; a fault that many variants share is told once."""
    raw: dict[str, str] = {}
    faults: dict[tuple[object, ...], Diagnostic] = {}
    for output in outputs:
        if output.path in raw:
            fault = Diagnostic("KG024", Location(output.path), "two templates write this file")
            faults[output.path,] = fault
        try:
            raw[output.path] = renderer.render(output.template, output.spec, output.value)
        except Failure as failed:
            for fault in failed.diagnostics:
                faults.setdefault((fault.location, fault.message), fault)
    texts, found = finish(raw, jobs)
    return texts, [*faults.values(), *found]


def _tunable_faults(package: Package, tree: Mapping[str, str]) -> Iterator[Diagnostic]:
    """What is measured and is not as the fields of its class, name by name: values are handed to it in this order."""
    for family in package.families:
        module = tree.get(names.family_path(family.name, names.CONFIGS))
        if module is None:
            continue
        classes = {node.name: node for node in ast.parse(module).body if isinstance(node, ast.ClassDef)}
        for kernel in family.kernels:
            name = names.config_class(None if kernel.name == family.name else kernel.name)
            known = _fields(classes[name]) if name in classes else []
            declared = [tunable.name for tunable in kernel.tunables]
            if known and known != declared and (declared or family.tuned):
                message = f"{kernel.name} has the tunables {', '.join(known)}, in this order"
                hint = f"the spec has {', '.join(declared) or 'none'}"
                yield Diagnostic("KG027", kernel.tunables_location, message, hint)
        key = _fields(classes[names.KEY]) if names.KEY in classes else []
        for tuned in family.tuned:
            sizes = [] if not tuned.entries else [*tuned.entries[0].problem.names, *tuned.entries[0].facts.names]
            if sizes and sizes != key:
                message = f"problems of {', '.join(sizes)}; {family.name} looks them up by {', '.join(key) or 'nothing'}"
                yield Diagnostic("KG025", tuned.location, message, "measure again: kernelgen tune writes what it looks up")


def _fields(node: ast.ClassDef) -> list[str]:
    return [
        line.target.id
        for line in node.body
        if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name)
    ]


def _path_faults(paths: Iterable[str]) -> Iterator[Diagnostic]:
    seen: dict[str, str] = {}
    for path in paths:
        reason = names.path_fault(path)
        if reason:
            yield Diagnostic("KG024", Location(path), reason)
        other = seen.setdefault(path.lower(), path)
        if other != path:
            yield Diagnostic("KG024", Location(path), f"differs from {other} by case alone")
