"""Command lines that nobody means: each ends with a code of its own, says why, and is a document under --json."""

from __future__ import annotations

import errno
import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import project
import pytest
import torch

from kernelgen import cli, doctor
from kernelgen.core import read
from kernelgen.core.diagnostics import Failure
from kernelgen.emit import disk, rooms
from kernelgen.measure import document as documents
from kernelgen.measure import suites
from kernelgen.measure.tune import space

ROOT = Path(__file__).parent.parent
LINES = 250
WORDS = [
    "", " ", "-", "--", "-1", "0", "1", "07", "1e3", "nan", "1_000", "99999999999999999999999", "²", "٣",
    "\udcff\udcfe", "é\u0301", "\N{RIGHT-TO-LEFT OVERRIDE}", "\x1b[2J", "\N{PILE OF POO}" * 99, "x" * 20_000,
    "*", "[", "[!", "{a,b}", "toy_f16_r16_small", "toy", "cpu", "cuda", "sm_90", "gfx950", "bf16", "16,64", ",", "5m", "-h",
    "nowhere/at/all", "../..", "~", "$HOME", "%s", "\\", "--rank", "--rank=", "--=", "--json=1",
]  # fmt: skip


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("KERNELGEN_CACHE_DIR", str(tmp_path / "cache"))
    project.make(tmp_path / "work")
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "work"


def places(work: Path) -> list[str]:
    """Files and folders in the way of whoever takes them for something else."""
    for name, content in {"text": b"text", "deep.json": b"[" * 100_000, "bytes": b"\xff\xfe\0", "list.json": b"[]"}.items():
        (work / name).write_bytes(content)
    (work / "folder").mkdir()
    (work / "sealed").mkdir(mode=0)
    (work / "loop").symlink_to("loop")
    (work / "dangling").symlink_to("nothing")
    (work / "twice").symlink_to("specs")
    os.mkfifo(work / "pipe")
    with open(work / "huge", "wb") as huge:
        huge.truncate(1 << 40)
    inside = ["text", "deep.json", "bytes", "list.json", "folder", "sealed", "loop", "dangling", "twice", "pipe", "huge"]
    outside = ["x" * 300, "new/folder", "/dev/null", "/dev/zero", "/proc/self/mem", "\udcff"]
    return [*inside, "specs", "templates", "specs/toy.yaml", "text/below", *outside]


@pytest.mark.parametrize("name", ["/dev/zero", "pipe", "huge", "folder", "deep.json"])
def test_what_has_no_end_is_not_read(name: str, work: Path, kernelgen, monkeypatch: pytest.MonkeyPatch) -> None:
    absent = subprocess.CompletedProcess([], 1, "", "ModuleNotFoundError: No module named 'torch'")
    monkeypatch.setattr(doctor, "_run", lambda program: absent)
    places(work)
    lines = [["report", name], ["report", name, "--markdown"], ["bench", "moe_lora", "--check-only", "--model-config", name]]
    for words in lines:
        code, _, stderr = kernelgen(*words)
        assert code == 2 and name in stderr and ("hint: " in stderr or "is a directory" in stderr), f"{words}: {stderr}"
    with pytest.raises(Failure, match=name):
        documents.resume(Path(name), suites.find("moe_lora"), {}, {})
    with pytest.raises(Failure, match=name):
        space.content(Path(name))
    read = {"kernels.lock": "doctor", "specs/kernelgen.schema.json": "schema --check", "generated/.manifest.json": "build"}
    read |= {"specs/toy.yaml": "list", "specs/tuned/h200/toy.yaml": "build --check"}
    read["families/toy/_op.py"] = "build --check"
    for file, command in read.items():
        place = work / file
        place.parent.mkdir(parents=True, exist_ok=True)
        kept = place.read_bytes() if place.exists() else None
        place.unlink(missing_ok=True)
        place.symlink_to(name if name.startswith("/") else work / name)
        code, stdout, stderr = kernelgen(*command.split())
        assert code and "KG0" in stdout + stderr, f"{file}: {code} {stdout}{stderr}"
        place.unlink()
        if kept is not None:
            place.write_bytes(kept)


CALL = "SIZES = {'n': 1}\n\n\ndef call(package, asked):\n    "


@pytest.mark.parametrize(
    ("command", "text", "told"),
    [
        ("which", "X = (\n", "call.py:1:5: error[KG062]: it cannot be imported: SyntaxError"),
        ("which", "X = 1\nraise SystemExit(0)\n", "call.py:2:1: error[KG062]: it cannot be imported: SystemExit: 0"),
        ("which", "def f():\n    return Y\n\n\nX = f()\n", "call.py:2:5: error[KG062]: it cannot be imported: NameError"),
        ("which", "X = 1\n", "call.py: error[KG062]: it has no SIZES"),
        ("which", CALL.replace("{'n': 1}", "3") + "...\n", "call.py: error[KG062]: its SIZES is of the wrong type: int"),
        ("which", CALL.replace(", asked", "") + "...\n", "call.py: error[KG062]: its call is to take 2 arguments: too many"),
        ("which", CALL + "asked.x.y\n", "call.py:5:5: error[KG062]: it raised AttributeError"),
        ("which", CALL + "raise SystemExit(0)\n", "call.py:5:5: error[KG062]: it raised SystemExit: 0"),
        ("tune", "TUNING = 3\n", "tune.py: error[KG062]: its TUNING is of the wrong type: int"),
        ("tune", "TUNING = 1 / 0\n", "tune.py:1:1: error[KG062]: it cannot be imported: ZeroDivisionError"),
        ("bench", "def f():\n    return Y\n\n\nSUITE = f()\n", "suite.py:2:5: error[KG062]: it cannot be imported: NameError"),
    ],
)
def test_a_module_of_a_room_that_is_wrong_is_told_with_its_place(
    command: str, text: str, told: str, work: Path, kernelgen, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever folder a command runs in: rooms are those beside its specs."""
    module = {"which": "call", "tune": "tune", "bench": "suite"}[command]
    (work / f"families/toy/{module}.py").write_text(text)
    if "it raised" in told:
        assert kernelgen("build")[0] == 0
    monkeypatch.chdir(ROOT)
    try:
        code, _, stderr = kernelgen(command, "toy", "--specs", str(work / "specs"))
    finally:
        rooms.serve(ROOT / "specs")
    assert code == 2 and stderr.startswith(f"families/toy/{told}"), stderr


def test_a_front_door_that_cannot_be_imported_is_told_with_its_line(work: Path, kernelgen) -> None:
    (work / "families/toy/_op.py").write_text(project.FRONT + "\n\nX = 1 / 0\n")
    (work / "families/toy/call.py").write_text(CALL + "...\n")
    assert kernelgen("build")[0] == 0
    try:
        code, _, stderr = kernelgen("which", "toy")
    finally:
        rooms.serve(ROOT / "specs")
    assert code == 2 and "toy/_op.py:14:1: error[KG061]: it cannot be imported: ZeroDivisionError" in stderr, stderr


def test_a_pipe_that_was_a_file_a_moment_ago_is_not_waited_for(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    places(work)
    is_file = os.stat(work / "text")
    monkeypatch.setattr(Path, "stat", lambda self, **_: is_file)
    monkeypatch.setattr(Path, "lstat", lambda self: is_file)
    with pytest.raises(Failure, match="KG001"):
        read.read_file(work / "pipe")
    with pytest.raises(disk.InTheWay):
        disk.hash_file(work / "pipe")


@pytest.mark.parametrize("option", ["--out", "--specs"])
@pytest.mark.parametrize("place", ["text", "text/below", "dangling", "dangling/below"])
def test_what_is_in_the_way_of_a_folder_is_named(place: str, option: str, work: Path, kernelgen) -> None:
    places(work)
    code, _, stderr = kernelgen("build", option, place)
    told = {"text": "a file, where a folder is wanted", "dangling": "a link to what is not there"}
    first = place.partition("/")[0]
    assert code == 2 and stderr.startswith(f"{first}: error[KG001]: {told[first]}"), stderr
    assert (work / "text").read_text() == "text" and not (work / "nothing").exists()


@pytest.mark.parametrize("written", [0, 3])
def test_a_full_disk_leaves_nothing_of_a_new_family(
    written: int, work: Path, kernelgen, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, replace, left = set(work.rglob("*")), os.replace, [None] * written

    def full(*arguments: Any) -> None:
        if not left:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        left.pop()
        replace(*arguments)

    monkeypatch.setattr(os, "replace", full)
    code, _, stderr = kernelgen("new", "other")
    assert code == 2 and "error[KG001]: No space left" in stderr and set(work.rglob("*")) == before
    (work / "templates").rename(work / "kept")
    (work / "templates").symlink_to("nothing")
    monkeypatch.undo()
    monkeypatch.chdir(work)
    assert kernelgen("new", "other")[2].startswith("templates: error[KG001]: a link to what is not there")
    assert not (work / "families/other").exists() and not (work / "nothing").exists()


def line(rng: random.Random, paths: list[str]) -> list[str]:
    """A command with some of its options and arguments, right and wrong."""
    name = rng.choice(cli.commands.list_commands(click.Context(cli.commands)))
    command = cli.commands.get_command(click.Context(cli.commands), name)
    assert command is not None
    words = [name]
    for parameter in command.params:
        if isinstance(parameter, click.Option):
            if rng.random() < 0.7 or parameter.name == "check_only":  # which would run kernels, for minutes
                continue
            words.append(rng.choice([*parameter.opts, *parameter.secondary_opts]))
            if parameter.is_flag:
                continue
        for _ in range(rng.randrange(5) if parameter.nargs == -1 else rng.random() < 0.9):
            words.append(value(rng, parameter, paths))
    if rng.random() < 0.2:
        words.insert(rng.randrange(len(words) + 1), rng.choice(WORDS))
    return [*words, "--json"] if rng.random() < 0.5 else words


def value(rng: random.Random, parameter: click.Parameter, paths: list[str]) -> str:
    right = {"specs": "specs", "jobs": "1", "variant": "toy_f16_r16_small", "only": "toy_*", "arch": "sm_90"}
    if rng.random() < 0.5 and parameter.name in right:
        return right[parameter.name]
    if rng.random() < 0.5 and isinstance(parameter.type, click.Choice):
        return str(rng.choice(list(parameter.type.choices)))
    return rng.choice(paths if isinstance(parameter.type, click.Path) and rng.random() < 0.8 else WORDS)


@pytest.mark.skipif(torch.cuda.is_available(), reason="some of them would measure")
@pytest.mark.slow(keep=1)
@pytest.mark.parametrize("seed", range(4))
def test_any_command_line_ends_well(seed: int, work: Path, kernelgen, monkeypatch: pytest.MonkeyPatch) -> None:
    absent = subprocess.CompletedProcess([], 1, "", "ModuleNotFoundError: No module named 'torch'")
    monkeypatch.setattr(doctor, "_run", lambda program: absent)  # it takes seconds
    paths, rng = places(work), random.Random(seed)
    for _ in range(LINES):
        words = line(rng, paths)
        code, stdout, stderr = kernelgen(*words)
        said = f"{words}: {code}\n{stdout[-500:]}\n{stderr[-2000:]}"
        assert code in (0, 1, 2), said
        assert "Traceback" not in stderr and "KG082" not in stderr + stdout, said
        if code == 2 and "--json" in words:
            assert json.loads(stdout)["errors"], said
        elif code == 2:
            assert stderr, said


@pytest.mark.slow
def test_without_what_runs_kernels(work: Path) -> None:
    """What is missing is named, by every command that needs it; the others do without."""
    needs = [["verify"], ["compile"], ["explain", "toy_f16_r16_small"], ["show", "toy_f16_r16_small", "--ptx"], ["tune"]]
    does_without = [["list"], ["show", "toy_f16_r16_small"], ["which", "--rank", "16"], ["doctor"]]
    program = f"""
import sys
sys.modules["torch"] = sys.modules["triton"] = sys.modules["numpy"] = None
from kernelgen import cli
from kernelgen.core import entry
for words in {needs + does_without}:
    sys.argv = ["kernelgen", *words, "--json"]
    print(entry.exit_code(cli.commands))
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-m", "kernelgen", "build"], env=environment, check=True, capture_output=True)
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    said = done.stdout.splitlines()
    documents = [json.loads(text) for text in said[::2]]
    assert [document.get("errors", [{}])[0].get("code") for document in documents] == ["KG081"] * len(needs) + [None] * 4
    assert said[1::2] == ["2"] * len(needs) + ["0", "0", "0", "0"]
