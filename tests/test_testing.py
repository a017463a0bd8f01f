"""The harness: which case meets which variant, and that a kernel cannot scribble, skip or peek without being noticed."""

from __future__ import annotations

import collections
import functools
import importlib
import inspect
import itertools
import json
import subprocess
import sys
import types
import unittest
from pathlib import Path
from typing import Any, Callable, Iterable

import conftest
import pytest
import torch

import generated
from kernelgen.core.diagnostics import Failure
from kernelgen.emit import build
from kernelgen.emit.rooms import laboratory
from kernelgen.families import moe_lora_inputs
from kernelgen.families.buffers import allocate, allocate_sparse, bits, poison_, positions, row_major, seal
from kernelgen.families.moe_lora import cases as moe_lora
from kernelgen.families.moe_lora_inputs import Case, Layout
from kernelgen.families.moe_route import cases as moe_route
from kernelgen.prove import layouts, testing
from kernelgen.prove.testing import Suite, Variant

ROOT = Path(__file__).resolve().parent.parent
AXES = "schedule dtype assignment add_inputs routed_weight rank"
TAGS = {
    "dtype": "bf16",
    "assignment": "sorted",
    "add_inputs": "add",
    "routed_weight": "plain",
    "rank": "r16",
}
CASE = Case("harness", "", own_tiles=True, tokens=6, slices=2)


def suite() -> Suite:
    rows = itertools.product(
        ("one_shot sorted", "two_kernel sorted", "small_batch naive"),
        ("bf16", "f16"),
        ("add", "set"),
        ("plain", "weighted"),
        ("r16", "r64", "rany"),
    )
    lines = [
        " ".join((body.split()[0], dtype, body.split()[1], *rest)) for body, dtype, *rest in rows
    ]
    return Suite("generated", "moe_lora", AXES, "\n".join(lines))


def test_every_case_meets_every_body_it_fits() -> None:
    met = collections.defaultdict(set)
    for variant, case in suite().pairs:
        met[case.name].add((variant.tags["schedule"], variant.tags["rank"]))
    for case in moe_lora.CASES:
        if case.body:
            continue  # bodies of its own
        fitting = {
            (v.tags["schedule"], v.tags["rank"]) for v in suite().variants if case.fits(v.tags)
        }
        assert met[case.name] == fitting, case.name


def test_a_case_may_name_bodies_of_its_own() -> None:
    met = collections.defaultdict(set)
    rows = [
        f"{schedule} {assignment} {rank} {scales}"
        for schedule, assignment in (("one_shot", "sorted"), ("small_batch", "naive"))
        for rank in ("r16", "r64")
        for scales in ("none none", "w8channel none", "w8group a8group")
    ]
    axes = "schedule assignment rank weight_quant act_quant"
    found = Suite("generated", "moe_lora", axes, "\n".join(rows))
    for variant, case in found.pairs:
        if "act_quant" in case.body and "none none" not in " ".join(variant.tags.values()):
            met[case.name].add(tuple(map(variant.told, case.body)))
    assert met["w8_nan"] == {
        (schedule, *scales)
        for schedule in ("one_shot", "small_batch")
        for scales in (("w8channel", "none"), ("w8group", "a8group"))
    }
    assert met["a8_rows"] == {(s, "w8group", "a8group") for s in ("one_shot", "small_batch")}
    for variant, case in found.pairs:
        is_fp8 = variant.tags["weight_quant"] != "none"
        assert case.core or is_fp8 == ("act_quant" in case.body), (variant, case)


def test_every_variant_meets_half_of_the_core_cases_and_the_others_are_spread() -> None:
    plan = collections.defaultdict(list)
    for variant, case in suite().pairs:
        plan[variant.name].append(case)
    core = [case.name for case in moe_lora.CASES if case.core]
    assert core and len(plan) == len(suite().variants)
    for cases in plan.values():
        assert len(set(cases)) == len(cases) and len(core) // 2 <= sum(case.core for case in cases) <= len(core) // 2 + 1
    for name in core:
        met = [variant for variant, case in suite().pairs if case.name == name]
        for axis, tags in zip(suite().axes.split(), zip(*(v.tags.values() for v in suite().variants), strict=True), strict=True):
            assert {variant.tags[axis] for variant in met} == set(tags), (name, axis)
    sizes = [len(cases) for cases in plan.values()]
    assert max(sizes) - min(sizes) <= 3
    for tag in (
        "bf16",
        "f16",
        "add",
        "set",
    ):  # each turn takes each tag for about half of the cases
        with_tag = sum(tag in v.tags.values() for v, case in suite().pairs if not case.core)
        assert 0.4 < with_tag / sum(not case.core for _, case in suite().pairs) < 0.6


@functools.cache
def suites() -> dict[str, Suite]:
    return {family.name: Suite.of("generated", family) for family in build.package(ROOT / "specs").families}


@pytest.mark.parametrize("family", sorted(file.stem for file in (ROOT / "specs").glob("*.yaml")))
def test_quick_tests_meet_every_template_body_and_kind_of_case(family: str) -> None:
    found = suites()[family]
    quick = [pair for pair in found.pairs if (pair[0].name, pair[1].name) in found.quick]
    assert len(quick) == len(found.quick)

    def kinds(pairs: Iterable[tuple[Variant, testing.Case]]) -> set[tuple[str | None, str]]:
        return {(variant.tags.get("schedule"), case.name) for variant, case in pairs}

    def tags_of_bodies(pairs: Iterable[tuple[Variant, testing.Case]]) -> set[tuple[object, ...]]:
        runs = ((variant, case) for variant, case in pairs if not case.needs_gpu)
        return {(v.tags.get("schedule"), case.name, name, v.told(name)) for v, case in runs for name in case.body}

    assert kinds(quick) == kinds(found.pairs)
    assert tags_of_bodies(quick) == tags_of_bodies(found.pairs)
    met = {mark for variant, case in quick if not case.needs_gpu for mark in found.marks(variant)}
    assert met == {mark for variant in found.variants for mark in found.marks(variant)}
    assert any((axis, tag) in mark for mark in met for axis, tag in found.variants[0].tags.items())
    exact = {name: {v for v, case in found.exact if case.name == name} for name in {case.name for _, case in found.exact}}
    for name, variants in exact.items():
        texts = {tuple(tag for axis, tag in v.tags.items() if axis != "dtype") for v in variants}
        assert len(texts) == len(variants), f"{name}: a text twice"
    for case in {case for _, case in found.exact if case.body and case not in {case for _, case in found.pairs}}:
        fitting = {tuple(map(v.told, case.body)) for v in found.variants if case.fits(v.tags)}
        assert {tuple(map(v.told, case.body)) for v in exact[case.name]} == fitting, f"{case.name}: a body is left out"
    kept = [(v, case) for v, case in found.exact if (v.name, case.name) in found.quick_exact]
    assert {case.name for _, case in kept} == exact.keys()
    assert {mark for v, _ in kept for mark in found.marks(v)} == {mark for v, _ in found.exact for mark in found.marks(v)}


def test_only_what_is_not_quick_is_left_out() -> None:
    found = suites()["moe_act"]
    module = types.SimpleNamespace(SUITE=found)

    def item(slow: pytest.Mark | None = None, **params: Any) -> Any:
        given = {"callspec": types.SimpleNamespace(params=params)} if params else {}
        return types.SimpleNamespace(get_closest_marker={"slow": slow}.get, module=module, **given)

    kept = [(v.name, c.name) for v, c in found.pairs if conftest.is_quick(item(variant=v, case=c))]
    assert len(kept) < len(found.pairs) and set(kept) == found.quick
    assert conftest.is_quick(item()) and conftest.is_quick(item(law=found.laws[0]))
    assert not conftest.is_quick(item(law=testing.Law(print, slow=True)))
    assert not conftest.is_quick(item(pytest.mark.slow.mark))
    slow = item(pytest.mark.slow(keep=2).mark)
    assert [conftest.is_quick(slow, number, 5) for number in range(5)] == [True, False, False, True, False]
    assert all(conftest.is_quick(slow, number, 2) for number in range(2))


@pytest.mark.parametrize("family", sorted(file.stem for file in (ROOT / "specs").glob("*.yaml")))
def test_every_case_and_law_of_a_room_is_met(family: str) -> None:
    """What a room defines is in its lists, and what is in them fits a variant: else no run of the tests meets it."""
    found, cases, laws = suites()[family], laboratory(family, "cases"), laboratory(family, "laws")
    exact = getattr(cases, "EXACT", ())
    stated = [law.name for law in found.laws]
    assert len({case.name for case in (*cases.CASES, *exact)}) == len({*cases.CASES, *exact}) and len({*stated}) == len(stated)
    assert all(case.why for case in (*cases.CASES, *exact))
    written = [name for name, value in vars(laws).items() if _parameters(value) == ["package", "variants", "device"]]
    follows = ["tensors_lie_anywhere"] if hasattr(laws, "good") else []  # from the good call of a room
    assert sorted([*written, *follows]) == sorted(stated)
    tuples = (value for value in vars(cases).values() if isinstance(value, tuple))
    listed = {case.name for value in tuples for case in value if isinstance(case, testing.Case)}
    met = {case.name for _, case in (*found.pairs, *found.exact)}
    assert listed == {case.name for case in (*cases.CASES, *exact)} == met


def _parameters(value: object) -> list[str]:
    return list(inspect.signature(value).parameters) if inspect.isfunction(value) else []


def test_a_good_call_that_leaves_an_operand_out_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    good = {name: torch.ones(1, 1) for name in ("h", "x", "topk_ids")}
    monkeypatch.setattr(layouts, "laboratory", lambda *_: types.SimpleNamespace(good=lambda device: good))
    with pytest.raises(AssertionError, match=r"good of moe_act .* leaves out activation, layout, num_experts, local"):
        layouts.tensors_lie_anywhere(generated, [types.SimpleNamespace(family="moe_act")], "cpu")  # type: ignore[list-item]


def test_a_law_is_skipped_for_want_of_a_family_and_of_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generated, "LEFT_OUT", {"moe_none": "moe_none"}, raising=False)

    def without(name: str, package: Any, variants: Any, device: str) -> None:
        raise AttributeError(name=name)

    for name, raised in (("moe_none", unittest.SkipTest), ("moe_gemn", AttributeError)):
        with pytest.raises(raised):
            suite().uphold(testing.Law(functools.partial(without, name)), "cpu")


def test_a_family_without_cases_is_told() -> None:
    with pytest.raises(Failure, match=r"families/toy/cases\.py: error\[KG062\]: there is no such module"):
        Suite("generated", "toy", "dtype", "bf16").pairs  # noqa: B018


@pytest.mark.parametrize("layout", moe_lora_inputs.LAYOUTS.values(), ids=moe_lora_inputs.LAYOUTS)
def test_layouts_do_not_overlap_but_where_they_share(layout: Layout) -> None:
    shape = (2, 3, 4, 10)
    strides = layout.of_weights(shape)
    offsets = {
        sum(i * stride for i, stride in zip(index, strides, strict=True))
        for index in itertools.product(*map(range, shape))
    }
    shared = 3 if layout.expert == 0 else 1
    assert len(offsets) * shared == 2 * 3 * 4 * 10
    out = layout.of_out((3, 2, 10))
    assert out[0] == 2 * out[1] and out[1] >= 10 and out[2] == 1


# Buffers


def test_guarded_memory() -> None:
    view = allocate((3, 2, 10), row_major((3, 2, 10), row=13), torch.bfloat16, "cpu", offset=1)
    assert view.isnan().all() and view.data_ptr() % 16 == 2
    view[1] = 1.0
    guarded = seal(view)
    assert guarded.base.numel() > view.numel() and not guarded.changed().any()
    rows = torch.zeros(3, 2, dtype=torch.bool)
    rows[1] = True
    view[1] += 1
    assert (guarded.changed() & positions(guarded, rows)).sum() == 20
    assert not (guarded.changed() & ~positions(guarded, rows)).any()
    guarded.base[view.storage_offset() + 10] = 0.0  # between two rows
    assert (guarded.changed() & ~positions(guarded, rows)).sum() == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
def test_a_nan_that_is_read_and_written_shows(dtype: torch.dtype) -> None:
    read, written = (allocate((5,), (1,), dtype, "cpu") for _ in range(2))
    guarded = seal(written)
    assert written.float().isnan().all()
    written.copy_(read)
    assert guarded.changed().sum() == 5


def test_poison_is_no_number_and_no_index() -> None:
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        assert poison_(torch.zeros(5, dtype=dtype)).isnan().all()
    for dtype in (torch.int32, torch.int64):
        assert (poison_(torch.zeros(5, dtype=dtype)) > 2**30).all()
    nan = poison_(torch.zeros(2))
    assert torch.equal(bits(nan), bits(nan.clone())) and not torch.equal(nan, nan.clone())


def test_sparse_memory_takes_no_memory() -> None:
    resource = pytest.importorskip("resource")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    view = allocate_sparse((2, 8), (2**32, 1), torch.float16, "cpu")
    view.fill_(1.0)
    assert seal(view, sparse=True).view[1, 7] == 1
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**17  # KiB


# A launcher of torch, and ways to be wrong that only the surroundings show


def torch_launcher(
    out: torch.Tensor,
    x: torch.Tensor,
    lora_a: tuple[torch.Tensor, ...],
    lora_b: tuple[torch.Tensor, ...],
    route: Any,
    *,
    config: None,
    also: Callable[..., None] = lambda *arguments: None,
) -> None:
    n = lora_b[0].shape[2]
    for adapter, expert, first, rows in route.blocks[: int(route.num_blocks)].tolist():
        for pair in route.pairs[first : first + rows].tolist():
            t, j = divmod(pair, route.top_k)
            for s, (a, b) in enumerate(zip(lora_a, lora_b, strict=True)):
                v = (a[adapter, expert].float() @ x[t].float()).to(x.dtype)
                columns = out[t, j, s * n : (s + 1) * n]
                columns += b[adapter, expert].float() @ v.float()
    also(out, x, lora_a, route)


def run(also: Callable[..., None] | None = None, case: Case = CASE) -> float:
    launcher = torch_launcher if also is None else functools.partial(torch_launcher, also=also)
    return moe_lora.check(generated, launcher, TAGS, case, "cpu")


def test_a_right_launcher_passes() -> None:
    assert 0 < run() <= 1


def guard_row(out: torch.Tensor, *rest: Any) -> None:
    out.as_strided((1,), (1,), out.storage_offset() - 1)[0] = 0.0


def gap(out: torch.Tensor, *rest: Any) -> None:
    out.as_strided((1,), (1,), out.storage_offset() + out.shape[2])[0] = 0.0


def dead_row(out: torch.Tensor, x: torch.Tensor, lora_a: Any, route: Any) -> None:
    dead = (route.token_lora_mapping < 0).nonzero()[0, 0]
    out[dead, 0, 0] = 0.0


def dead_row_keeps_its_value_but_not_its_bits(out: torch.Tensor, *rest: Any) -> None:
    out[0, 0, 0] = float("nan")  # it held another NaN


MIXED = Case(
    "mixed_harness", "", own_tiles=True, tokens=6, routing=moe_lora_inputs.Routing("mixed")
)


@pytest.mark.parametrize(
    "also, said",
    [
        (guard_row, "outside of the live rows"),
        (gap, "outside of the live rows"),
        (dead_row, "outside of the live rows"),
        (dead_row_keeps_its_value_but_not_its_bits, "outside of the live rows"),
        (lambda out, x, a, route: x[3].zero_(), "x: .* elements of an input changed"),
        (lambda out, x, a, route: a[0][0].zero_(), r"lora_a\[0\]: .* elements of an input changed"),
        (lambda out, x, a, route: route.pairs.zero_(), "pairs: .* elements of an input changed"),
        (lambda out, x, a, route: out[3].fill_(float("nan")), "elements are off"),
        (lambda out, x, a, route: out.add_(x[0, 0]), "outside of the live rows|elements are off"),
    ],
    ids=lambda value: getattr(value, "__name__", "") or value,
)
def test_harm_is_noticed(also: Callable[..., None], said: str) -> None:
    with pytest.raises(AssertionError, match=said):
        run(also, MIXED)


def test_what_must_not_be_read_is_poison() -> None:
    call = moe_lora_inputs.make(MIXED, {**TAGS, "routed_weight": "weighted"}, "cpu")
    live = {item.pair for item in call.routed.live}
    groups = {(item.adapter, item.expert) for item in call.routed.live}
    assert 0 < len(live) < 12 and call.topk_weights is not None
    for pair in range(12):
        assert bool(call.x[pair].isnan().any()) == (pair not in live)
        assert bool(call.topk_weights.flatten()[pair].isnan()) == (pair not in live)
    for adapter, expert in itertools.product(range(MIXED.loras), range(MIXED.experts)):
        for weights in (call.lora_a[0], call.lora_b[0]):
            assert bool(weights[adapter, expert].isnan().any()) == ((adapter, expert) not in groups)


# The command


@pytest.mark.slow
def test_verify(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "kernelgen", "verify", "--out", str(ROOT), "-j", "1", "--json"]
    done = subprocess.run(
        [*command, "--only", "moe_route_from_tables"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    outcomes = report["outcomes"]
    met = [case for case in moe_route.CASES if case.fits({"schedule": "from_tables"})]
    assert len(outcomes) == len(met) and not report["findings"]
    assert not any(outcome["error"] or outcome["skipped"] for outcome in outcomes)
    nothing = subprocess.run(
        [*command, "--only", "no_such*"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert nothing.returncode == 2 and "KG040" in nothing.stdout


def test_a_wrong_variant_is_a_finding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    verify = importlib.import_module("kernelgen.prove.verify")

    def wrong() -> float:
        raise AssertionError("3 of 4 elements\nare off")

    outcome = verify._outcome("moe_lora", "moe_lora_x", "ragged", wrong)
    result = verify.Result("cpu", [outcome], 1.0)
    assert str(result.findings[0]) == (
        "tests/generated/test_moe_lora.py: error[KG060]: "
        "moe_lora_x, ragged: AssertionError: 3 of 4 elements are off"
    )
    assert result.table()[0][0][:3] == ("moe_lora_x", "1", "1")
