"""Every known tag, put into every spec: it works, or the build refuses it at its line. No template ignores one."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import itertools
import re
import shutil
import sys
import unittest
from pathlib import Path

import pytest
import torch

from kernelgen.compiled.stand_in import import_package
from kernelgen.core import names
from kernelgen.core.diagnostics import Diagnostic
from kernelgen.core.locate import SPECS
from kernelgen.core.model import SCHEDULE, VOCABULARY, Family, Package, Variant
from kernelgen.emit import assemble, build, formatting, lint, wiring, write
from kernelgen.emit.outputs import Outputs
from kernelgen.prove.testing import Suite
from kernelgen.spec import expand as expansion
from kernelgen.spec import load
from kernelgen.spec.expand import expand

EVERY = build.package(SPECS).families
RENDERER = build.renderer(SPECS)
SERVED = {("moe_lora_expand", "add_inputs", "set"), ("moe_quant", "dtype", "f16")}  # by what there is for others: laws hold too


def with_tag(family: Family, axis: str, tag: str) -> str:
    """The spec of ``family`` with one more tag, on an axis that it has or on one more axis, beside ``none`` where that has it."""
    text = (SPECS / f"{family.name}.yaml").read_text()
    if any(known.name == axis for known in family.axes):
        return re.sub(rf"(?m)^(  {axis}: \[.*)\]", rf"\1, {tag}]", text)
    tags = f"none, {tag}" if "none" in VOCABULARY[axis] and tag != "none" else tag
    return text.replace("axes:\n", f"axes:\n  {axis}: [{tags}]\n", 1)


def twins_of(family: Family) -> wiring.Twins:
    return wiring.Twins(family, RENDERER, build.rooms(SPECS))


def answer(folder: Path, axis: str, tag: str) -> tuple[list[Diagnostic], dict[Variant, str]]:
    """Why a build refuses the spec in ``folder``, as far as the ``tag`` of the ``axis`` is concerned; else a variant of each
    schedule that it adds, and its text."""
    families, faults = load.load(folder)
    package, found = expand(families)
    if faults or found:
        return [*faults, *found], {}
    (family,) = package.families
    twins = twins_of(family)
    unheeded = [fault for known in family.axes if known.name == axis for fault in wiring.axis_faults(known, twins)]
    if unheeded:
        return unheeded, {}
    outputs = Outputs(RENDERER, build.rooms(SPECS))
    tagged = [variant for variant in family.variants if getattr(variant, axis) == tag]
    outputs.render(assemble._variant_output(variant, family) for variant in tagged)
    if outputs.faults:
        return outputs.faults, {}
    one = {variant.kernel: variant for variant in tagged}.values()
    return [], {variant: outputs._rendered[names.family_path(family.name, variant.module)] for variant in one}


@pytest.mark.slow(keep=11)
@pytest.mark.parametrize("family", sorted(EVERY, key=lambda family: len(family.variants)), ids=lambda family: family.name)
def test_a_known_tag_works_or_is_refused_at_its_line(family: Family, tmp_path: Path, device: str) -> None:
    file = tmp_path / f"{family.name}.yaml"
    for axis, tags in VOCABULARY.items():
        has = next((known.tags for known in family.axes if known.name == axis), ())
        for tag in tags.keys() - set(has):
            text = with_tag(family, axis, tag)
            file.write_text(text)
            line = next(number for number, line in enumerate(text.splitlines(), 1) if line.startswith(f"  {axis}: "))
            faults, served = answer(tmp_path, axis, tag)
            places = {(fault.location.path, fault.location.line) for fault in faults}
            assert served or places == {(str(file), line)}, f"{axis} {tag}: {places}"
            for variant, made in served.items():
                run(family, variant, made, tmp_path, device)


@pytest.mark.parametrize("family", EVERY, ids=lambda family: family.name)
def test_a_template_tells_all_known_tags_apart_or_refuses_them(family: Family) -> None:
    twins = twins_of(family)
    for kernel, axis in itertools.product(family.kernels, family.axes):
        if axis.name != SCHEDULE:
            pairs = itertools.combinations(VOCABULARY[axis.name], 2)
            assert not [pair for pair in pairs if twins.are_same(kernel, axis.name, *pair)], f"{kernel.template}, {axis.name}"


EXCLUDED = sorted((family for family in EVERY if family.excludes), key=lambda family: len(family.excludes))


@pytest.mark.slow(keep=3)
@pytest.mark.parametrize("family", EXCLUDED, ids=lambda family: family.name)
def test_what_an_exclude_leaves_out_works_or_is_refused_in_the_spec(family: Family, tmp_path: Path, device: str) -> None:
    """Each exclude is taken away. Of what comes back variants of each of its tags and each schedule are built, and with each
    schedule one runs.
    """
    runs: dict[str, tuple[Variant, str]] = {}
    for number, exclude in enumerate(family.excludes):
        back = left_out_by(family, number)
        assert back, f"{exclude.location}: others leave out all that this does"
        outputs = Outputs(RENDERER, build.rooms(SPECS))
        for room in outputs.rooms.families:  # its own, and what that imports
            for source in outputs.rooms.modules(room):
                outputs.copy(names.family_path(room, source.stem), source)
        met, chosen = set[tuple[str, str]](), []
        for variant in back:
            tags = {(axis, getattr(variant, axis)) for axis in exclude.when} | {(SCHEDULE, variant.kernel)}
            chosen += [] if tags <= met else [variant]
            met |= tags
        for variant in chosen:
            outputs.render([assemble._variant_output(variant, family)])
            path = names.family_path(family.name, variant.module)
            if path in outputs._rendered:
                assert not lint.faults(path, outputs._rendered[path]), f"{exclude.location}: {variant.name}"
                runs[variant.kernel] = variant, outputs._rendered[path]
        faults = [*outputs.faults, *wiring._launcher_faults(dataclasses.replace(family, variants=tuple(chosen)), outputs)]
        assert {(Path(fault.location.path), fault.code) for fault in faults} <= {(SPECS / f"{family.name}.yaml", "KG029")}, faults
        assert all(fault.location.line and fault.hint for fault in faults)
    for variant, text in runs.values():
        run(family, variant, text, tmp_path, device)


def left_out_by(family: Family, number: int) -> list[Variant]:
    """What an exclude of ``family`` alone leaves out."""
    others, when = [*family.excludes], family.excludes[number].when
    del others[number]
    axes = (dataclasses.replace(axis, tags=when.get(axis.name, axis.tags)) for axis in family.axes)
    left, _ = expansion._left(dataclasses.replace(family, axes=tuple(axes), excludes=tuple(others)))
    return [expansion.variant_of(family, tags) for tags in left]


def run(family: Family, variant: Variant, text: str, tmp_path: Path, device: str) -> None:
    """A case of ``family`` on a variant that its package lacks."""
    file = tmp_path / f"{variant.module}.py"
    file.write_text(text)
    spec = importlib.util.spec_from_file_location(f"{names.PACKAGE}.{family.name}.{variant.module}", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    table = importlib.import_module(f"{names.PACKAGE}.{family.name}._table").VARIANTS
    values = (getattr(torch, str(cell.value)) if cell.is_dtype else cell.value for cell in variant.cells)
    with pytest.MonkeyPatch.context() as patched:
        patched.setitem(table._of, variant.module, tuple(values))
        patched.setitem(sys.modules, spec.name, module)
        spec.loader.exec_module(module)
        suite = Suite.of(names.PACKAGE, dataclasses.replace(family, variants=(variant,)))
        cases = suite.cases_for(suite.variants[0])
        assert cases, variant.name
        package = importlib.import_module(names.PACKAGE)
        suite.check_launcher(package, getattr(module, variant.name), suite.variants[0], cases[0], device)


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        *((family.name, "numerics", "strict: true") for family in EVERY),
        *((family.name, "numerics", "intermediate: activation") for family in EVERY),
        *((family.name, "quant", "elements: [e5m2]") for family in EVERY),
        ("moe_quant", "quant", "group_n: 128"),
        ("moe_sum", "quant", "group_k: 128"),
    ],
)
def test_a_setting_that_a_spec_does_not_state_is_refused_at_its_line(name: str, key: str, value: str, tmp_path: Path) -> None:
    """It states all that its kernels heed, and of that another value is taken."""
    text = (SPECS / f"{name}.yaml").read_text()
    if f"\n{key}:\n" not in text:
        text += f"\n{key}:\n"
    setting = value.split(":")[0]
    refused = re.search(rf"(?m)^  {setting}: ", text) is None
    text = re.sub(rf"(?m)^  {setting}: .*\n", "", text).replace(f"\n{key}:\n", f"\n{key}:\n  {value}\n")
    (tmp_path / f"{name}.yaml").write_text(text)
    families, faults = load.load(tmp_path)
    package, found = expand(families)
    found = [*faults, *found, *wiring.setting_faults(twins_of(package.families[0]))]
    line = text.splitlines().index(f"  {value}") + 1
    assert [(fault.code, fault.location.line) for fault in found] == ([("KG029", line)] if refused else [])


@pytest.mark.parametrize(
    ("name", "group", "where"),
    [("moe_quant", "group_k", "_fused_moe"), ("moe_shrink", "group_n", "_fused_moe"), ("lora_shrink", "group_k", "_lora")],
)
def test_families_of_one_call_have_groups_of_one_size(name: str, group: str, where: str, tmp_path: Path) -> None:
    text = (SPECS / f"{name}.yaml").read_text().replace(f"{group}: 128", f"{group}: 64")
    (tmp_path / f"{name}.yaml").write_text(text)
    (changed,) = expand(load.load(tmp_path)[0])[0].families
    package = Package(tuple(changed if family.name == name else family for family in EVERY))
    outputs = Outputs(RENDERER, build.rooms(SPECS))
    for source in outputs.rooms.shared():
        outputs.copy(names.package_path(source.stem), source)
    found = [fault for fault in wiring._group_faults(package, outputs) if fault.message.startswith(f"{group} 64, and 128 in")]
    line = text.splitlines().index(f"  {group}: 64") + 1
    assert [(fault.code, fault.location.line) for fault in found] == [("KG026", line)] and where in found[0].message


@pytest.mark.parametrize(("name", "axis", "tag"), sorted(SERVED))
def test_a_tag_that_is_served_works(
    name: str, axis: str, tag: str, tmp_path: Path, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each new variant has cases, each kernel of them passes one, and the laws hold: front doors find them."""
    monkeypatch.setattr(formatting, "_black", lambda text: text)  # it takes longest
    monkeypatch.setenv("KERNELGEN_CACHE_DIR", str(tmp_path / "cache"))
    specs = tmp_path / "specs"
    specs.mkdir()
    for needed in ("moe_align", "moe_route"):
        shutil.copy(SPECS / f"{needed}.yaml", specs)
    (specs / f"{name}.yaml").write_text(with_tag(next(family for family in EVERY if family.name == name), axis, tag))
    write.sync(build.tree(specs), tmp_path)
    package = import_package(tmp_path, interpreted=True)
    suite = Suite.of(package.__name__, next(family for family in build.package(specs).families if family.name == name))
    new = [variant for variant in suite.variants if variant.tags[axis] == tag]
    assert new and all(suite.cases_for(variant) for variant in new)
    for variant in {variant.tags.get(SCHEDULE): variant for variant in new}.values():
        suite.check(variant, suite.cases_for(variant)[0], device)
    for law in suite.laws:
        with contextlib.suppress(unittest.SkipTest):  # of a family that is not here
            suite.uphold(law, device)
