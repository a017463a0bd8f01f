"""Packages of some families: they import and work, and what they lack is named."""

from __future__ import annotations

import dataclasses
import importlib
import itertools
import sys
from pathlib import Path
from types import ModuleType
from typing import Callable, Iterable, Iterator

import pytest
import torch

from kernelgen.core import names
from kernelgen.core.diagnostics import Failure
from kernelgen.core.locate import SPECS, template_folders
from kernelgen.core.model import Package, Tree
from kernelgen.emit import build
from kernelgen.emit.assemble import assemble
from kernelgen.emit.render import Renderer
from kernelgen.prove.testing import Suite

EVERY = build.package(SPECS)
RENDERER = Renderer(template_folders(SPECS))
ROOMS = build.rooms(SPECS)
FAMILIES = sorted(family.name for family in EVERY.families)
NEEDS = {  # of a front door
    "lora_expand": {"lora_shrink", "moe_route"},
    "lora_shrink": {"moe_route"},
    "moe_act": {"moe_align", "moe_route"},
    "moe_add": {"moe_route"},
    "moe_gemm": {"moe_align", "moe_runs"},
    "moe_lora": {"moe_route"},
    "moe_lora_expand": {"moe_route"},
    "moe_lora_shrink": {"moe_route"},
    "moe_permute": {"moe_align"},
    "moe_quant": {"moe_align"},
    "moe_runs": {"moe_align"},
    "moe_shrink": {"moe_align", "moe_runs"},
    "moe_sum": {"moe_align", "moe_route"},
}
LAYER = {"moe_align", "moe_gemm", "moe_permute", "moe_quant", "moe_runs", "moe_shrink", "moe_sum"}
COMPOSITES = {  # by what they import
    "fused_moe": LAYER,
    "FusedMoeShape": LAYER,
    "lora": {"lora_expand", "lora_shrink", "moe_route"},
    "LoraShape": {"lora_expand", "lora_shrink", "moe_route"},
    "MoeShape": {"moe_lora", "moe_route"},
    "ShardedMoeShape": {"moe_lora", "moe_lora_expand", "moe_lora_shrink", "moe_route"},
    "launches": set(),
    "overlap": set(),
    "quantize_mxfp4": set(),
    "quantize_weights": set(),
    "warmup": set(),
}


def tree_of(families: Iterable[str]) -> Tree:
    """The tree of these families, with one variant of each kernel, as fewer are quicker to make."""
    chosen = []
    for family in EVERY.families:
        if family.name in families:
            # Of those with adapters, as they use every tunable.
            adapted_last = sorted(family.variants, key=lambda variant: getattr(variant, "delta", None) == "lora")
            one = {variant.kernel: variant for variant in adapted_last}
            chosen.append(dataclasses.replace(family, variants=tuple(one.values())))
    return assemble(Package(tuple(chosen)), RENDERER, ROOMS)


@pytest.fixture
def imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Tree], ModuleType]]:
    """Imports the package of a tree, under a name of its own."""
    monkeypatch.syspath_prepend(str(tmp_path))
    count = itertools.count()

    def load(tree: Tree) -> ModuleType:
        name = f"subset_{tmp_path.name}_{next(count)}"
        for path, text in tree.files.items():
            if path.startswith(f"{names.PACKAGE}/"):
                file = tmp_path / path.replace(names.PACKAGE, name, 1)
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_text(text)
        importlib.invalidate_caches()
        return importlib.import_module(name)

    yield load
    for module in [module for module in sys.modules if module.startswith(f"subset_{tmp_path.name}_")]:
        del sys.modules[module]


def closed(*families: str) -> set[str]:
    """These families, and those that they need."""
    return {*families, *(other for name in families for other in NEEDS.get(name, ()))}


def around(family: str) -> tuple[frozenset[str], frozenset[str]]:
    """The family alone, with what it needs, and all without it."""
    return frozenset(closed(family)), frozenset(name for name in FAMILIES if family not in closed(name))


SUBSETS = dict.fromkeys(itertools.chain.from_iterable(map(around, sorted(FAMILIES, key=lambda name: name[::-1]))))


@pytest.mark.slow(keep=10)
@pytest.mark.parametrize("subset", SUBSETS, ids=lambda subset: f"{len(subset)} from {min(subset)}")
def test_a_package_of_some_families_has_what_they_make(
    subset: frozenset[str], imported: Callable[[Tree], ModuleType]
) -> None:
    """Each family alone, with what it needs, and all without each of them."""
    package = imported(tree_of(subset))
    there = {name for name, needs in COMPOSITES.items() if closed(*needs) <= subset} | subset
    for name in {*FAMILIES, *COMPOSITES}:
        assert hasattr(package, name) == (name in there) == (name in package.__all__), name
    for name in package.__all__:
        getattr(package, name)
    for name in COMPOSITES.keys() - there:
        with pytest.raises(AttributeError) as raised:
            getattr(package, name)
        assert all(f"specs/{need}.yaml" in str(raised.value) for need in COMPOSITES[name] - subset)
    for name in subset:
        importlib.import_module(f"{package.__name__}.{name}")
    with pytest.raises(AttributeError, match="is no part of this package"):
        _ = package.nothing


def test_a_family_without_what_it_needs_is_refused_by_name() -> None:
    for name, needs in NEEDS.items():
        for missing in needs:
            with pytest.raises(Failure) as failed:
                tree_of(closed(name) - {missing})
            (fault,) = (one for one in failed.value.diagnostics if one.location.path.endswith(f"/{name}.yaml"))
            assert fault.code == "KG028" and f"{name} needs {missing}" in fault.message
            assert f"specs/{missing}.yaml" in str(fault.hint)


def test_only_brings_what_is_needed_and_the_front_door_names_what_is_not_there(
    imported: Callable[[Tree], ModuleType], device: str
) -> None:
    package = imported(build.tree(SPECS, only="moe_lora_*_sorted_add_plain_r64"))
    assert {name for name in package.variants() if not name.startswith("moe_lora_")} == {
        "moe_route_from_tables",
        "moe_route_held",
        "moe_route_one_launch",
        "moe_route_two_launch",
        "moe_route_three_launch",
    }
    _call_moe_lora(package, device, rank=64)
    with pytest.raises(ValueError, match="a variant that serves it"):
        _call_moe_lora(package, device, rank=129)
    variants = importlib.import_module(f"{package.__name__}.moe_lora._table").VARIANTS
    facts = dict(zip(variants.facts, next(iter(variants.modules)), strict=True))
    rank = facts.pop("max_rank")
    found, none = (variants.find(rank=rank, **facts, biased=biased) for biased in (False, True))  # which no axis here tells
    assert found is not None and none is None


@pytest.mark.parametrize(("elements", "group_k"), [("[e5m2]", 64), ("[e4m3]", 32)])
def test_cases_are_in_the_formats_that_a_spec_says(
    elements: str, group_k: int, imported: Callable[[Tree], ModuleType], tmp_path: Path, device: str
) -> None:
    specs = tmp_path / "specs"
    specs.mkdir()
    (specs / "moe_align.yaml").write_text((SPECS / "moe_align.yaml").read_text())
    text = (SPECS / "moe_quant.yaml").read_text()
    for old, new in (("[e4m3, e5m2]", elements), ("group_k: 128", f"group_k: {group_k}")):
        assert text.count(old) == 1
        text = text.replace(old, new)
    (specs / "moe_quant.yaml").write_text(text)
    package, (_, family) = imported(build.tree(specs)), build.package(specs).families
    suite = Suite.of(package.__name__, family)
    pairs = [pair for pair in suite.pairs if (pair[0].tags["order"], pair[0].tags["act_quant"]) == ("pair", "a8group")]
    assert len(pairs) > 9 and all(suite.check(*pair, device) <= 1 for pair in pairs if not pair[1].needs_gpu)
    for law in suite.laws:
        suite.uphold(law, device)


def _call_moe_lora(package: ModuleType, device: str, rank: int) -> None:
    """A delta of moe_lora on whole numbers so small that every sum is exact, and the result rounded once."""
    tokens, top_k, experts, adapters, k, n = 6, 2, 4, 3, 32, 16
    generator = torch.Generator().manual_seed(0)

    def whole(*size: int) -> torch.Tensor:
        return torch.randint(-1, 2, size, generator=generator).to(device, torch.bfloat16)

    ids = torch.randint(experts, (tokens, top_k), generator=generator, dtype=torch.int32)
    adapter = torch.randint(-1, adapters, (tokens,), generator=generator, dtype=torch.int32)
    x, a, b = whole(tokens, k), whole(adapters, experts, rank, k), whole(adapters, experts, n, rank)
    out, exact = (torch.zeros(tokens, top_k, n, dtype=dtype, device=device) for dtype in (torch.bfloat16, torch.float64))
    for t, j in itertools.product(range(tokens), range(top_k)):
        if adapter[t] >= 0:
            where = int(adapter[t]), int(ids[t, j])
            exact[t, j] = b[where].double() @ (a[where].double() @ x[t].double())
    routing = {"num_experts": experts, "max_loras": adapters, "assignment": "sorted"}
    package.moe_lora(out, x, [a], [b], package.moe_route(ids.to(device), adapter.to(device), **routing))
    assert torch.equal(out, exact.to(torch.bfloat16))
