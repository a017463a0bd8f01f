"""kernelgen doctor: what it says of environments that are well, and of those that are not."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Mapping

import project
import pytest

from kernelgen import doctor
from kernelgen.emit import build

ANSWERS = {
    "import torch; print": "2.13.0+cpu",
    "import triton; print": "3.9.0",
    "is_available": "NVIDIA H200, 139 GiB",
    "interpreter": "repaired",
    "ptxas": "ptxas 12.9",
}


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project that is well, where no child process is run."""
    monkeypatch.setenv("KERNELGEN_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(doctor, "_PINNED", tmp_path)
    specs = project.make(tmp_path / "work")
    build.build(specs, specs.parent)
    answer(monkeypatch)
    return specs


def answer(monkeypatch: pytest.MonkeyPatch, changed: Mapping[str, str] = ANSWERS) -> None:
    """A child process whose program holds such a text prints this; it fails where this is an error."""
    answers = {**ANSWERS, **changed}

    def run(program: str) -> subprocess.CompletedProcess[str]:
        text = next(text for part, text in answers.items() if part in program)
        failed = "Error: " in text
        return subprocess.CompletedProcess([], int(failed), "" if failed else text, text)

    monkeypatch.setattr(doctor, "_run", run)


def found(specs: Path) -> dict[str, doctor.Check]:
    return {check.name: check for check in doctor.examine(specs, specs.parent)}


def test_where_all_is_well(work: Path) -> None:
    checks = found(work)
    wrong = {name for name, check in checks.items() if check.status != "ok"}
    assert wrong == {"lock"}, "the toy family has none"
    assert "6 variants of toy" in checks["specs"].found
    assert all(check.hint for check in checks.values() if check.status != "ok")


@pytest.mark.parametrize(
    "changed, name, status, text",
    [
        ({"import torch; print": "Error: No module named 'torch'"}, "torch", "note", "kernelgen[run]"),
        ({"import torch; print": "OSError: libcudart.so"}, "torch", "fault", "libcudart.so"),
        ({"import torch; print": "2.10.1"}, "torch", "fault", "2.11 or newer"),
        ({"import triton; print": "3.5.1"}, "triton", "fault", "3.6 or newer and below 3.10"),
        ({"import triton; print": "3.10.0"}, "triton", "fault", "below 3.10"),
        ({"is_available": "AssertionError: torch sees none"}, "gpu", "note", "torch sees none"),
        ({"interpreter": "ImportError: numpy"}, "interpreter", "fault", "numpy"),
        ({"ptxas": "RuntimeError: Cannot find ptxas"}, "compiler", "fault", "Cannot find ptxas"),
    ],
)
def test_what_is_amiss(
    work: Path,
    monkeypatch: pytest.MonkeyPatch,
    changed: dict[str, str],
    name: str,
    status: str,
    text: str,
) -> None:
    answer(monkeypatch, changed)
    check = found(work)[name]
    assert check.status == status and text in f"{check.found} {check.hint}"


def test_what_needs_torch_is_left_out_without_it(
    work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer(monkeypatch, {"import torch; print": "Error: No module named 'torch'"})
    assert not {"gpu", "interpreter", "compiler"} & found(work).keys()


def test_what_the_specs_make(work: Path) -> None:
    (work / "toy.yaml").write_text(project.SPEC.replace("large", "medium"))
    check = found(work)["generated"]
    assert (check.status, check.hint) == ("fault", "run kernelgen build") and "more" in check.found
    (work / "toy.yaml").write_text(project.SPEC.replace("r32", "r48"))
    checks = found(work)
    assert checks["specs"].status == checks["generated"].status == "fault"
    assert "KG015" in checks["specs"].found
    (work.parent / "kernels.lock").write_text("{}")
    assert "KG053" in found(work)["lock"].found


def test_packages_are_those_that_kernelgen_requires(
    work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    versions: dict[str, str | None] = {"black": "1.0", "jinja2": None}
    installed = doctor._installed
    monkeypatch.setattr(doctor, "_installed", lambda name: versions.get(name, installed(name)))
    check = found(work)["packages"]
    assert check.status == "fault" and check.hint.startswith("pip install 'black==")
    assert "'jinja2>=3.1'" in check.hint and "click" not in check.hint


def test_what_is_installed_is_told_against_what_was_tested(work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    versions = {"torch": "2.13.0+cpu", "triton": "3.9.0", "black": "1.0", "click": "8.1"}
    monkeypatch.setattr(doctor, "_installed", versions.get)
    other_python = "old==1 ; python_full_version < '3.10' \\\n    --hash=sha256:0\n"
    for build_of_torch, torch in (("cpu", "2.13.0+cpu"), ("gpu", "2.12.0")):
        (tmp_path / f"{build_of_torch}.txt").write_text(f"# pinned\ntorch=={torch}\ntriton==3.9.0\n{other_python}")
    (tmp_path / "base.txt").write_text(f"click==8.1 \\\n    --hash=sha256:0\n{other_python}")
    assert (found(work)["pinned"].status, found(work)["pinned"].found.split(" packages")[0]) == ("ok", "3 of 3")
    (tmp_path / "base.txt").write_text("black==26.10.1\nclick==8.1\nrich==13.0\n")
    versions["torch"] = "2.13.0"
    check = found(work)["pinned"]
    told = ["2 of 5", "black 1.0, pinned 26.10.1", "rich missing, pinned 13.0", "torch 2.13.0, pinned 2.12.0"]
    assert check.status == "note" and all(text in check.found for text in told)
    assert f"-r {tmp_path}/base.txt" in check.hint and "gpu.txt" in check.hint and "cpu.txt" not in check.hint
    (tmp_path / "gpu.txt").write_text("torch 2.12\n")
    assert found(work)["pinned"].status == "fault"


def test_children_really_run() -> None:
    assert doctor._run("print(1)").stdout == "1\n"
    failed = doctor._run("raise AssertionError('why')")
    assert failed.returncode == 1 and doctor._last(failed.stderr) == "AssertionError: why"
