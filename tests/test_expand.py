"""Axes to variants, what a variant knows, and the specs of this repository."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import pickle
import re
from pathlib import Path

import project
import pytest

from kernelgen.compiled.which import which
from kernelgen.core import names
from kernelgen.core.diagnostics import CATALOGUE, Failure
from kernelgen.core.model import VARIANT_ATTRIBUTES, VOCABULARY, Record, Variant
from kernelgen.core.names import Identifier
from kernelgen.emit import build

SPECS = Path(__file__).parent.parent / "specs"


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    specs = {"toy.yaml": project.SPEC, "tuned/h200/toy.yaml": project.TUNED}
    return build.package(project.make(tmp_path_factory.mktemp("toy"), specs)).families[0]


@pytest.fixture(scope="module")
def package():
    return build.package(SPECS)


def test_variants_come_in_the_order_of_the_spec(toy) -> None:
    assert [variant.module for variant in toy.variants] == [
        "bf16_r16_small",
        "bf16_r16_large",
        "bf16_r32_small",
        "bf16_r32_large",
        "f16_r16_small",
        "f16_r32_small",
    ]
    assert all(variant.name == f"toy_{variant.module}" for variant in toy.variants)


def test_a_variant_knows_its_tags_and_what_they_stand_for(toy) -> None:
    variant = toy.variants[2]
    assert (variant.dtype, variant.rank, variant.size) == ("bf16", "r32", "small")
    assert (variant.torch_dtype, variant.block_rank, variant.max_rank) == ("bfloat16", 32, 32)
    assert variant.tiled_rank is False and variant.chunk_k is None
    with pytest.raises(AttributeError, match="weighted"):
        _ = variant.weighted
    with pytest.raises(dataclasses.FrozenInstanceError):
        variant.name = "other"


def test_values_can_be_copied_compared_and_used_as_keys(toy) -> None:
    variant = toy.variants[0]
    for copied in (pickle.loads(pickle.dumps(variant)), copy.deepcopy(variant)):
        assert copied == variant and hash(copied) == hash(variant)
    assert len(set(toy.variants)) == 6


def test_tuned_data_is_read_in_the_order_of_the_tunables(toy) -> None:
    first = toy.tuned[0].entries[0]
    assert (first.problem.k, first.problem.weighted) == (64, True)
    assert (first.schedule, first.config, first.best.us) == ("toy", Record({"block_n": 64}), 1.5)
    assert first.runner_up.config.block_n == 128
    assert toy.tuned[0].entries[1].runner_up is None


def test_a_problem_is_measured_once_for_the_same_tags(tmp_path: Path) -> None:
    spec = project.SPEC.replace("  size:", "  add_inputs: [set, add]\n  size:")
    first = project.TUNED.index("  - problem")
    second = project.TUNED.index("  - problem", first + 1)
    entry = project.TUNED[first:second]
    other = entry.replace("    schedule", "    tags: {add_inputs: set}\n    schedule", 1)
    specs = {"toy.yaml": spec, "tuned/h200/toy.yaml": project.TUNED + other}
    read = build.package(project.make(tmp_path, specs)).families[0].tuned[0].entries
    assert [one.tags.add_inputs for one in read] == ["add", "add", "set"]
    assert [one.facts.adds for one in read] == [True, True, False]


GROUPS = "  weight_quant: [none, w8group]\nquant: {group_k: 16, elements: [e4m3]}\nexclude:"


@pytest.mark.parametrize(
    ("excluded", "codes"),
    [
        ("{rank: r16, weight_quant: none}", ["KG026", "KG026"]),
        ("{rank: r32, weight_quant: w8group}", ["KG026"]),
        ("{rank: r32, weight_quant: [w8group, none]}", ["KG018", "KG026"]),
        ("{weight_quant: w8group}", ["KG018"]),
    ],
)
def test_fp8_is_judged_by_the_variants_that_there_are(excluded: str, codes: list[str], tmp_path: Path) -> None:
    spec = project.SPEC.replace("exclude:", f"{GROUPS}\n  - when: {excluded}\n    why: nobody asked")
    spec = spec.replace("[sm_90]", "[sm_90, sm_80]")
    with pytest.raises(Failure) as failed:
        build.package(project.make(tmp_path, {"toy.yaml": spec}))
    assert sorted(fault.code for fault in failed.value.diagnostics) == codes


def test_all_tags_of_an_axis_have_the_same_facts() -> None:
    for axis, tags in VOCABULARY.items():
        assert len({tuple(facts) for facts in tags.values()}) == 1, axis


def test_no_attribute_of_a_variant_hides_an_axis() -> None:
    assert not VARIANT_ATTRIBUTES & set(VOCABULARY)
    assert {field.name for field in dataclasses.fields(Variant)} <= VARIANT_ATTRIBUTES


@pytest.mark.parametrize(
    "text", ["", "A", "1a", "_a", "a-b", "a b", "a\n", "é", "in", "nul", "a" * 41]
)
def test_what_cannot_be_a_name(text: str) -> None:
    with pytest.raises(ValueError):
        Identifier(text)


@pytest.mark.parametrize(
    "path",
    [
        "generated/../x.py",
        "/generated/x.py",
        "generated/./x.py",
        "generated//x.py",
        "generated/a b.py",
        "generated/nul.py",
        "generated/a\n.py",
        "generated/x\\y.py",
        "generated/",
        "other/x.py",
        "tests/x.py",
        "",
    ],
)
def test_what_cannot_be_an_output_path(path: str) -> None:
    assert names.path_fault(path)


NO_FP8 = {"weight_quant": "none", "act_quant": "none"}
# Of weights and of activations: what is served, with every rank.
FP8 = [
    ("tensor", "none"),
    ("channel", "none"),
    ("group", "none"),
    ("none", "tensor"),
    ("none", "token"),
    ("none", "a8group"),
    ("tensor", "a8tensor"),
    ("channel", "token"),
    ("group", "a8group"),
]


def test_every_case_of_fp8_has_a_variant(package) -> None:
    """Each rank and kind of scales, both kinds of route and both projections."""
    for (weights, x), rank in itertools.product(FP8, (1, 16, 17, 32, 33, 64, 65, 128, 129, 512)):
        case = {"rank": str(rank), "weight_quant": weights, "act_quant": x, "dtype": "bf16"}
        for assignment, form in itertools.product(("naive", "sorted"), ("plain", "weighted")):
            flags = {"assignment": assignment, "routed_weight": form}
            assert which(package, "moe_lora", {**case, **flags}).variants
    with pytest.raises(Failure, match="KG041"):
        which(package, "moe_lora", {"weight_quant": "channel", "act_quant": "group", "dtype": "bf16"})


def test_the_specs_of_this_repository(package) -> None:
    family = next(family for family in package.families if family.name == "moe_lora")
    kinds = {v.weight_quant + v.act_quant for v in family.variants} - {"nonenone"}
    assert len(kinds) == len(FP8)
    sixteen_bit = [v for v in family.variants if v.weight_quant == v.act_quant == "none"]
    assert len(sixteen_bit) == 112
    assert not any("none" in variant.name for variant in family.variants)
    assert len({variant.name for variant in package.variants}) == len(package.variants)


def test_every_case_has_a_variant(package) -> None:
    """Ranks 1 to 512, every dtype, assignment and flag, in 16 bits."""
    family = next(family for family in package.families if family.name == "moe_lora")
    others = [axis for axis in family.axes if axis.name not in ("schedule", "rank", *NO_FP8)]
    buckets = {}
    for rank in range(1, 513):
        variants = which(package, "moe_lora", {"rank": str(rank), **NO_FP8}).variants
        bucket = {variant.rank for variant in variants}
        assert len(bucket) == 1
        limit = variants[0].max_rank
        assert rank > 128 if limit is None else limit / 2 < rank <= limit or rank <= limit == 16
        buckets.setdefault(bucket.pop(), rank)
    assert sorted(buckets) == ["r128", "r16", "r32", "r64", "rany"]
    for tags in itertools.product(*(axis.tags for axis in others)):
        case = dict(zip((axis.name for axis in others), tags, strict=True))
        for bucket, rank in buckets.items():
            served = which(package, "moe_lora", {"rank": str(rank), **NO_FP8, **case}).variants
            assert served and all(v.rank == bucket and getattr(v, a) == t for v in served for a, t in case.items())


README = (SPECS / "README.md").read_text()


def test_the_readme_of_specs_has_every_code_and_every_axis() -> None:
    """And no other; a code that nothing gives is not in the catalogue."""
    rows = re.findall(r"^\| `(KG\d+)` \| (.*) \|$", README, re.MULTILINE)
    assert dict(rows) == dict(CATALOGUE) and len(rows) == len(CATALOGUE)
    source = "".join(file.read_text() for file in (SPECS.parent / "kernelgen").rglob("*.py") if file.name != "diagnostics.py")
    assert set(re.findall(r"\bKG\d+\b", source)) == set(CATALOGUE)
    axes = dict(re.findall(r"^\| `(\w+)` \| (`[^|]*) \|", README, re.MULTILINE))
    for axis, tags in VOCABULARY.items():
        assert re.findall(r"\w+", axes[axis]) == list(tags), axis
