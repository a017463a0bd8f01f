"""Compilation without a GPU: what is compiled, how it is judged, and how the lock is kept."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import shutil
import types
from pathlib import Path
from typing import Any, Callable

import pytest
import triton

from kernelgen.compiled import compile as compiler
from kernelgen.compiled import sampling
from kernelgen.compiled.compile import Result, assembly, compile_cases, run
from kernelgen.compiled.compile_cache import Remembered
from kernelgen.compiled.explain import explain
from kernelgen.compiled.lock import FILE, Lock, Row, coverage
from kernelgen.compiled.requests import Case, cases, cases_of
from kernelgen.compiled.resources import Usage
from kernelgen.core import model
from kernelgen.core.diagnostics import Failure
from kernelgen.core.targets import TARGETS
from kernelgen.families.probe import Probe

ROOT = Path(__file__).parent.parent.parent
SMALL = "moe_lora_small_batch_bf16_naive_{}_plain_r16"
ADD, SET = SMALL.format("add"), SMALL.format("set")


@pytest.fixture(scope="module", autouse=True)
def memory(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Remembered figures of these tests alone, shared by them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KERNELGEN_CACHE_DIR", str(tmp_path_factory.mktemp("memory")))
        yield


@pytest.fixture(scope="module")
def specs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The specs without tuned data, which comes and goes."""
    folder = tmp_path_factory.mktemp("project") / "specs"
    shutil.copytree(ROOT / "specs", folder, ignore=shutil.ignore_patterns("tuned"))
    return folder


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """A folder with the generated package, and room for a lock."""
    (tmp_path / "generated").symlink_to(ROOT / "generated")
    return tmp_path


Small = Callable[..., Result]


@pytest.fixture
def small(specs: Path, out: Path) -> Small:
    """``run`` on two variants and two targets, if not told otherwise."""

    def small(mode: Any = "check", **options: Any) -> Result:
        options = {"only": SMALL.format("*"), "targets": ["sm_90", "gfx942"], **options}
        return run(specs, out, mode=mode, **options)

    return small


@pytest.fixture
def figures(small: Small, monkeypatch: pytest.MonkeyPatch) -> dict[str, Usage]:
    """Of the two variants, by digest; from here on they are what a compilation finds, which takes no time."""
    found = {case.digest: used for case, used in small("report").outcomes if isinstance(used, Usage)}
    monkeypatch.setattr(compiler, "_usage", lambda case: found[case.digest])
    return found


def codes(result: Result) -> list[str]:
    return [finding.code for finding in result.findings]


def test_targets_are_those_of_specs_and_of_the_runtime() -> None:
    from generated import _runtime

    assert tuple(TARGETS) == model.TARGETS
    for target in TARGETS.values():
        assert _runtime._SHARED_MEMORY[target.arch] == target.program_shared


@pytest.mark.parametrize(
    "name, warps, registers, shared, programs, limit",
    [
        ("sm_90", 4, 32, 0, 16, "warps"),
        ("sm_90", 4, 128, 0, 4, "registers"),
        ("sm_90", 4, 129, 0, 3, "registers"),
        ("sm_90", 8, 255, 0, 1, "registers"),
        ("sm_90", 4, 64, 112 * 1024, 2, "shared memory"),
        ("sm_90", 4, 64, 114 * 1024, 1, "shared memory"),
        ("sm_90", 1, 16, 0, 32, "programs"),
        ("sm_89", 4, 40, 0, 12, "warps"),
        ("gfx942", 4, 128, 0, 4, "registers"),
        ("gfx942", 4, 129, 0, 3, "registers"),
        ("gfx942", 4, 64, 32 * 1024, 2, "shared memory"),
    ],
)
def test_occupancy(
    name: str, warps: int, registers: int, shared: int, programs: int, limit: str
) -> None:
    residency = TARGETS[name].resident_programs(warps, registers, shared)
    assert (residency.programs, residency.limited_by) == (programs, limit)


def test_kernels_that_differ_by_name_alone_are_compiled_once(specs: Path) -> None:
    """add and set differ in what the expand writes; their shrinks are one."""
    digests = {
        (mode, case.row.kernel): case.digest
        for mode, variant in (("add", ADD), ("set", SET))
        for case in cases_of(specs, ROOT, variant, "sm_90")
    }
    assert digests["add", "shrink"] == digests["set", "shrink"]
    assert digests["add", "expand"] != digests["set", "expand"]
    other = {case.row.kernel: case.digest for case in cases_of(specs, ROOT, ADD, "sm_80")}
    assert other["shrink"] != digests["add", "shrink"]


TUNED = """\
family: moe_lora
device: {name: NVIDIA H200, target: sm_90, multiprocessors: 132, shared_memory: 232448}
versions: {triton: VERSION}
entries:
  - problem: {k: 512, n: 256, slices: 2, rank: 24, num_experts: 8, top_k: 2, max_loras: 3, num_tokens: 64, weighted: false}
    schedule: one_shot
    config: {block_n: 64, block_k: 128, shrink_stages: 3, expand_stages: 2, num_warps: 8, weight_policy: 1}
    us: 5.0
    runner_up:
      schedule: one_shot
      config: {block_n: 128, block_k: 32, shrink_stages: 2, expand_stages: 2, num_warps: 4, weight_policy: 0}
      us: 6.0
"""


@pytest.mark.slow
def test_tuned_tiles_are_compiled_for_the_primary_target(specs: Path, tmp_path: Path) -> None:
    shutil.copytree(specs, tmp_path / "specs")
    (tmp_path / "templates").symlink_to(ROOT / "templates")
    (tmp_path / "specs/tuned/h200").mkdir(parents=True, exist_ok=True)
    file = tmp_path / "specs/tuned/h200/moe_lora.yaml"

    def found() -> dict[tuple[str, str], Case]:
        known = cases(tmp_path / "specs", ROOT, "moe_lora_*_bf16_*_plain_r32", ["sm_90", "sm_80"])
        return {(c.row.probe, c.target.name): c for c in known if c.probe.is_tuned}

    file.write_text(TUNED.replace("VERSION", "3.5.1"))
    assert not found(), "they were measured with another version of Triton"
    file.write_text(TUNED.replace("VERSION", triton.__version__))
    tuned = found()
    name = "t64_k512_n256_s2_r24_e8_top2_l3"
    assert set(tuned) == {(f"first_{name}", "sm_90"), (f"second_{name}", "sm_90")}
    first = tuned[f"first_{name}", "sm_90"]
    assert first.row.variant == "moe_lora_one_shot_bf16_sorted_add_plain_r32"
    assert first.request.options.num_warps == 8

    (tmp_path / "generated").symlink_to(ROOT / "generated")
    chosen = {"only": first.row.variant, "targets": ["sm_90"]}
    assert not run(tmp_path / "specs", tmp_path, mode="update", **chosen).findings
    checked = run(tmp_path / "specs", tmp_path, mode="check", **chosen)  # no line of the lock is about tuned tiles
    assert not checked.findings and any(case.probe.is_tuned for case, _ in checked.outcomes)


def test_update_then_check_is_clean_and_compiles_nothing(small: Small) -> None:
    assert not small("update").findings
    again = small()
    assert not again.findings and again.compiled == 0
    assert again.shares() == {"sm_90": (3, 3), "gfx942": (3, 3)}
    assert len(again.outcomes) == 8  # 2 variants, 2 kernels, 2 targets


def test_drift_names_kernel_target_was_and_now(small: Small, out: Path) -> None:
    small("update")
    lock = Lock(out / FILE)
    row = Row(ADD, "expand", "naive")
    lock.sections[triton.__version__][row]["gfx942"][0] += 7
    lock.write()
    (finding,) = small().findings
    now = lock.sections[triton.__version__][row]["gfx942"][0] - 7
    assert finding.code == "KG054"
    assert finding.message == (
        f"{ADD}: kernel expand on probe naive: gfx942 registers {now + 7} -> {now}"
    )
    assert "kernelgen compile --update" in finding.hint
    line = (out / FILE).read_text().split("\n")[finding.location.line - 1]
    assert line.strip().startswith(f'"{row}"')
    small("update")
    assert not small().findings


def test_what_the_lock_lacks_is_a_finding(small: Small) -> None:
    assert codes(small()) == ["KG055"], "no section for this version of Triton"
    small("update", only=ADD)
    assert [finding.message for finding in small().findings] == [
        f"{SET} expand naive: no figures for sm_90, gfx942"  # its shrink is that of ADD
    ]
    small("update", targets=["sm_90"])
    assert [finding.message for finding in small().findings] == [
        f"{SET} expand naive: no figures for gfx942"
    ]


def test_update_keeps_other_versions_and_other_variants(small: Small, out: Path) -> None:
    lock = Lock(out / FILE)
    other = Row("moe_lora_other", "kernel", "m16")
    lock.sections = {
        "1.0.0": {other: {"sm_90": [1, 2, 3]}},
        triton.__version__: {other: {"sm_90": [4, 5, 6]}},
    }
    lock.write()
    small("update")
    found = Lock(out / FILE).sections
    assert found["1.0.0"] == {other: {"sm_90": [1, 2, 3]}}
    assert found[triton.__version__][other] == {"sm_90": [4, 5, 6]}
    assert Row(ADD, "shrink", "naive") in found[triton.__version__]


def test_rows_that_no_kernel_has_are_a_finding_of_a_whole_check(out: Path) -> None:
    lock = Lock(out / FILE)
    gone, here = Row("moe_lora_gone", "kernel", "m16"), Row(ADD, "shrink", "naive")
    lock.sections = {"3.9.0": {gone: {"sm_90": [1, 0, 3]}, here: {"sm_80": [1, 0, 3]}}}
    known = {(here, "sm_80")}
    (finding,) = coverage(lock, "3.9.0", known, known, complete=True)
    assert finding.message == f"{gone}: there is no such kernel for sm_90 any more"
    assert not list(coverage(lock, "3.9.0", known, known, complete=False))


LOCK = (
    '{"schema_version": 3, "columns": ["registers", "shared_bytes", "spill_bytes"], "triton": {"3.6.0": %s}}'
)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        '{"schema_version": 1}',
        "\0",
        '{"schema_version": 3, "columns": ["registers"]}',
        "[" * 100_000,
        LOCK % "[]",
        LOCK % '{"v k p": [1, 2, 3]}',
        LOCK % '{"v k p": {"sm_90": []}}',
        LOCK % '{"v k p": {"sm_90": [1, 2, 3, 4]}}',
        LOCK % '{"v k p": {"sm_90": [true]}}',
        LOCK % '{"v p": {"sm_90": [1, 2, 3]}}',
    ],
)
def test_a_lock_that_is_none_is_an_error(small: Small, out: Path, text: str) -> None:
    (out / FILE).write_text(text)
    with pytest.raises(Failure) as failed:
        small()
    assert failed.value.exit_code == 2
    assert failed.value.diagnostics[0].code == "KG053"


def test_the_lock_has_one_line_a_kernel_and_probe(small: Small, out: Path) -> None:
    small("update")
    text = (out / FILE).read_text()
    document = json.loads(text)
    assert document["columns"] == ["registers", "shared_bytes", "spill_bytes"]
    lines = document["triton"][triton.__version__]
    # the two variants differ in their expand alone
    assert set(lines) == {f"{ADD} shrink naive", f"{ADD} expand naive", f"{SET} expand naive"}
    for line, entries in lines.items():
        assert list(entries) == ["sm_90", "gfx942"] and text.count(f'"{line}": ') == 1


def test_what_the_lock_leaves_out_is_zero(out: Path) -> None:
    lock, row = Lock(out / FILE), Row(ADD, "shrink", "naive")
    figures = {"sm_80": [16, 0, 0], "sm_90": [16, 8192, 0], "gfx942": [0, 0, 4], "gfx950": [0, 0, 0]}
    lock.sections = {"3.9.0": {row: figures}}
    lock.write()
    assert '{"sm_80": [16], "sm_90": [16, 8192], "gfx942": [0, 0, 4], "gfx950": [0]}' in (out / FILE).read_text()
    assert Lock(out / FILE).sections == lock.sections


def patched_usage(change: Callable[[Case, Usage], Usage]) -> Callable[[Case], Usage]:
    measured = compiler._usage
    return lambda case: change(case, measured(case))


def test_a_spill_is_a_finding(
    small: Small, figures: dict[str, Usage], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("KERNELGEN_CACHE_DIR", str(tmp_path / "memory"))
    spilling = patched_usage(lambda case, used: dataclasses.replace(used, spill_bytes=400))
    monkeypatch.setattr(compiler, "_usage", spilling)
    findings = small("report", only=ADD, targets=["sm_90"]).findings
    assert [finding.code for finding in findings] == ["KG051"] * 2
    assert "kernel shrink on probe naive spills 400 bytes a lane for sm_90; allowed are 40" in (
        findings[0].message
    )
    assert small("update", only=ADD, targets=["sm_90"]).findings, "an update accepts no spill"


def test_too_much_shared_memory_is_a_finding(small: Small, monkeypatch: pytest.MonkeyPatch) -> None:
    def report() -> Result:
        return small("report", only=ADD, targets=["sm_90"])

    used = {case.row.kernel: outcome.shared_bytes for case, outcome in report().outcomes}
    most = max(used.values())  # which version of Triton gives which kernel how much is its own affair
    for has in (most, most - 1):
        target = dataclasses.replace(TARGETS["sm_90"], program_shared=has)
        monkeypatch.setitem(TARGETS, "sm_90", target)  # type: ignore[arg-type]
        above = [kernel for kernel, bytes_used in used.items() if bytes_used > has]
        found = report().findings
        assert [finding.code for finding in found] == ["KG052"] * len(above)
        for kernel, finding in zip(above, found, strict=True):
            assert f"kernel {kernel}" in finding.message
    assert above


def test_a_compiler_that_ends_its_process_takes_no_other_kernel_along(
    small: Small, figures: dict[str, Usage], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def dying(case: Case, used: Usage) -> Usage:
        if case.row.variant == SET and case.row.kernel == "expand":
            os._exit(1)
        return used

    monkeypatch.setenv("KERNELGEN_CACHE_DIR", str(tmp_path / "memory"))
    monkeypatch.setattr(compiler, "_usage", patched_usage(dying))
    result = small("report", targets=["sm_90"], workers=2)
    (finding,) = result.findings
    assert finding.code == "KG050"
    assert f"{SET}: kernel expand" in finding.message and "ended its process" in finding.message
    assert sum(isinstance(outcome, Usage) for _, outcome in result.outcomes) == 3


def test_a_kernel_that_does_not_compile_is_a_finding(
    small: Small, figures: dict[str, Usage], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def failing(case: Case, used: Usage) -> Usage:
        raise ValueError("no\nregisters")

    monkeypatch.setenv("KERNELGEN_CACHE_DIR", str(tmp_path / "memory"))
    monkeypatch.setattr(compiler, "_usage", patched_usage(failing))
    findings = small("report", only=ADD, targets=["sm_90"]).findings
    assert [finding.code for finding in findings] == ["KG050"] * 2
    assert findings[0].message.endswith("does not compile for sm_90: ValueError: no registers")


def test_a_damaged_memory_is_not_believed(
    small: Small, figures: dict[str, Usage], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("KERNELGEN_CACHE_DIR", str(tmp_path))
    damaged = ['["x", {"registers": 1}]', "[]", "null", '["x", 1]', '[["x"], {}]', "\0", '["x", {']
    Remembered().file.write_text("\n".join(damaged) + "\n")
    assert small("report", only=ADD, targets=["sm_90"]).compiled == 2
    assert small("report", only=ADD, targets=["sm_90"]).compiled == 0
    memory = Remembered()
    (digest, usage), *others = memory.usages.items()
    fields = dataclasses.asdict(usage)
    damaged = [[digest, {**fields, name: value}] for name, value in (("registers", "many"), ("spill_bytes", -1), ("x", 1))]
    memory.file.write_text("\n".join(map(json.dumps, damaged)) + "\n" + "[" * 100_000 + "\n")
    assert not Remembered().usages and len(others) == 1


def test_an_interrupted_run_goes_on_where_it_was(
    small: Small, figures: dict[str, Usage], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def interrupt(items: Any, total: int) -> Any:
        for number, item in enumerate(items):
            yield item
            if number == 1:
                raise KeyboardInterrupt

    monkeypatch.setenv("KERNELGEN_CACHE_DIR", str(tmp_path))
    with pytest.raises(KeyboardInterrupt):
        small("update", progress=interrupt)
    assert 2 <= len(Remembered().usages) < 6
    before = len(Remembered().usages)
    assert small("update").compiled == 6 - before


def test_what_another_machine_measured_is_taken_in_by_appending(
    small: Small, figures: dict[str, Usage], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    files = []
    for target in ("sm_90", "gfx942"):
        monkeypatch.setenv("KERNELGEN_CACHE_DIR", str(tmp_path / target))
        small("report", targets=[target])
        files.append(Remembered().file)
    with open(files[1], "ab") as file:
        file.write(files[0].read_bytes())
    assert small("report").compiled == 0


@dataclasses.dataclass(frozen=True)
class Kernel:
    """As much of a case as a sample looks at."""

    target: Any
    variant: Any
    row: Row
    parameters: tuple[str, ...]
    digest: str
    probe: Probe


def kernels(count: int, families: str = "ab", is_tuned: bool = False) -> list[Any]:
    """For each target and family two schedules of two forms each, ``count`` kernels of a form."""
    found = []
    for target in TARGETS.values():
        for family, schedule, form in itertools.product(families, "xy", "pq"):
            variant = types.SimpleNamespace(family=family, kernel=schedule)
            for number in range(count):
                row = Row(f"{family}_{schedule}_{form}_{number}", "kernel", "probe")
                probe = Probe("probe", {}, print, 0.0, 0.0, is_tuned)
                digest = f"{target.name} {is_tuned} {row}"
                found.append(Kernel(target, variant, row, (form,), digest, probe))
    return found


def by_target(chosen: list[Any]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {name: [] for name in TARGETS}
    for case in chosen:
        found[case.target.name].append(case.row.variant)
    return found


@pytest.mark.parametrize("count", [1, 9, 60])
def test_a_check_has_every_schedule_for_every_target_and_does_not_grow(count: int) -> None:
    chosen = by_target(sampling.checked(kernels(count)))
    primary = chosen.pop("sm_90")
    assert len(primary) == min(8 * count, 96 - 6 * 4)
    for names in chosen.values():
        assert sorted(name[:3] for name in names) == ["a_x", "a_y", "b_x", "b_y"]
    if count > 1:
        assert len(set(itertools.chain(*chosen.values()))) > 8, "targets look at different tags"
        assert {name[:5] for name in primary} == {"_".join(p) for p in itertools.product("ab", "xy", "pq")}


def test_checks_under_two_releases_share_the_other_targets_out() -> None:
    whole = by_target(sampling.checked(kernels(9)))
    halves = [by_target(sampling.checked(kernels(9), turn, 2)) for turn in (0, 1)]
    for target, names in whole.items():
        parts = [half[target] for half in halves]
        if target == "sm_90":
            assert all(set(names) <= set(part) for part in parts)
        else:
            assert sorted(parts[0] + parts[1]) == sorted(names) and len(parts[0]) == len(parts[1]) == 2


def test_the_lock_has_all_of_the_primary_target_and_every_form_for_the_others() -> None:
    known = kernels(9)
    chosen = by_target(sampling.locked(known))
    assert len(chosen.pop("sm_90")) == 72
    for names in chosen.values():
        assert len({name[:5] for name in names}) == 8 and len(names) == 12
    locked = {case.digest for case in sampling.locked(known)}
    assert {case.digest for case in sampling.checked(known)} <= locked


def test_another_family_changes_no_choice_of_a_family() -> None:
    alone = {case.digest for case in sampling.locked(kernels(9, "a"))}
    assert alone < {case.digest for case in sampling.locked(kernels(9, "ab"))}


def test_kernels_that_are_one_are_chosen_once_and_some_tuned_ones_are() -> None:
    known = kernels(3)
    twins = [dataclasses.replace(case, row=Row("twin", "kernel", "probe")) for case in known]
    assert sampling.checked([*known, *twins]) == sampling.checked(known)
    tuned = kernels(30, is_tuned=True)
    assert len(sampling.checked(tuned)) == 16 and not sampling.locked(tuned)


@pytest.mark.slow
def test_assembly(specs: Path) -> None:
    ptx = assembly(specs, ROOT, ADD, "ptx", "sm_90")
    assert set(ptx) == {"shrink", "expand"} and ".target sm_90" in ptx["shrink"]
    assert "Function:" in assembly(specs, ROOT, ADD, "sass", "sm_90")["expand"]
    assert "gfx942" in assembly(specs, ROOT, ADD, "amdgcn", "gfx942")["shrink"]
    with pytest.raises(Failure, match="gfx942 has none"):
        assembly(specs, ROOT, ADD, "ptx", "gfx942")


def test_explain(specs: Path) -> None:
    explained = explain(specs, ROOT, ADD, "sm_90")
    (roofline,) = explained.rooflines
    assert roofline.bound_by == "memory"
    assert [kernel.name for kernel in roofline.kernels] == ["shrink", "expand"]
    text = "\n".join(explained.lines())
    assert "specs/moe_lora.yaml:" in text and "programs a multiprocessor" in text
    assert json.loads(json.dumps(explained.as_json()))["target"] == "sm_90"


def test_nothing_is_left_behind(specs: Path) -> None:
    before = triton.knobs.cache.dir, triton.runtime.driver._active
    compile_cases(cases_of(specs, ROOT, ADD, "sm_80"))
    assert (triton.knobs.cache.dir, triton.runtime.driver._active) == before


def command(specs: Path, *words: str) -> int:
    from kernelgen.cli import commands

    return commands.main([*words, "--specs", str(specs), "--json"], standalone_mode=False) or 0


@pytest.mark.slow
def test_commands_print_one_document(
    specs: Path, out: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kernelgen.emit.build.require_current", lambda *_: None)  # tuned data would be in what is there
    found = {}
    into = "--out", str(out)
    for words, key in (
        (["compile", "--only", ADD, "--arch", "sm_90", "--update"], "kernels"),
        (["compile", "--only", ADD, "--arch", "sm_90", "--check"], "kernels"),
        (["explain", ADD, "--arch", "gfx942"], "probes"),
        (["show", ADD, "--ptx"], "ptx"),
    ):
        assert command(specs, *words, *into) == 0
        document = json.loads(capsys.readouterr().out)
        assert document["schema_version"] == 1
        found[words[0]] = document[key]
    assert [row["kernel"] for row in found["compile"]] == ["shrink", "expand"]
    assert set(found["show"]) == {"shrink", "expand"}
    (out / FILE).unlink()
    assert command(specs, "compile", "--only", ADD, "--check", "--arch", "sm_90", *into) == 1
