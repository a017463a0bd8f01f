"""The disk: one step or none, whatever fails; what is not ours stays as it is."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import project
import pytest

from kernelgen import build, names, write
from kernelgen.diagnostics import Failure
from kernelgen.model import Tree

OLD = Tree(
    {
        "generated/__init__.py": "old\n",
        "generated/a/__init__.py": "same\n",
        "generated/a/gone.py": "gone\n",
        "generated/b/only.py": "gone too\n",
        "tests/generated/test_a.py": "old\n",
    }
)
NEW = Tree(
    {
        "generated/__init__.py": "new\n",
        "generated/a/__init__.py": "same\n",
        "generated/a/added.py": "added\n",
        "generated/c/only.py": "added too\n",
        "tests/generated/test_a.py": "new\n",
    }
)


def on_disk(out: Path) -> dict[str, str]:
    """The generated files, without the manifest and what an interrupted build left."""
    return {
        path: data.decode()
        for path, data in project.files(out).items()
        if path != names.MANIFEST and not path.startswith(names.STAGING)
    }


def codes(failed: pytest.ExceptionInfo[Failure]) -> list[str]:
    assert failed.value.exit_code == 2
    return [fault.code for fault in failed.value.diagnostics]


@pytest.fixture
def out(tmp_path: Path) -> Path:
    write.sync(OLD, tmp_path)
    return tmp_path


class Stop(BaseException):
    """Stands for the death of the process: nothing after it reaches the disk."""


class Counting(write.Disk):
    """Counts the steps; with ``after``, does that many and then fails at each."""

    def __init__(self, after: int | None = None, failure: BaseException | None = None) -> None:
        self.after = after
        self.failure = failure or Stop()
        self.steps: list[str] = []

    def step(self, name: str) -> None:
        if self.after is not None and len(self.steps) >= self.after:
            raise self.failure
        self.steps.append(name)

    def make_folder(self, path: Path) -> None:
        self.step("make_folder")
        super().make_folder(path)

    def write(self, path: Path, data: bytes) -> None:
        if self.after is not None and len(self.steps) >= self.after:
            path.write_bytes(data[: len(data) // 2])  # a torn write
        self.step("write")
        super().write(path, data)

    def rename(self, old: Path, new: Path) -> None:
        self.step("rename")
        super().rename(old, new)

    def remove(self, path: Path) -> None:
        self.step("remove")
        super().remove(path)

    def remove_folder(self, path: Path) -> None:
        self.step("remove_folder")
        super().remove_folder(path)

    def sync_folder(self, path: Path) -> None:
        self.step("sync_folder")
        super().sync_folder(path)


def test_a_build_writes_what_changed_and_removes_what_no_spec_makes(out: Path) -> None:
    inode = (out / "generated/a/__init__.py").stat().st_ino
    plan = write.sync(NEW, out)
    assert on_disk(out) == NEW.files
    assert sorted(plan.written) == [
        "generated/__init__.py",
        "generated/a/added.py",
        "generated/c/only.py",
        "tests/generated/test_a.py",
    ]
    assert sorted(plan.removed) == ["generated/a/gone.py", "generated/b/only.py"]
    assert plan.unchanged == 1
    assert (out / "generated/a/__init__.py").stat().st_ino == inode
    assert not (out / "generated/b").exists() and not (out / names.STAGING).exists()
    manifest = json.loads((out / names.MANIFEST).read_text())
    assert list(manifest["files"]) == sorted(NEW.files)


def test_nothing_to_do_touches_nothing(out: Path) -> None:
    disk = Counting(after=0)
    assert write.sync(OLD, out, disk).is_clean and disk.steps == []


def test_stopped_at_any_step_the_next_build_repairs(tmp_path: Path) -> None:
    def prepared(name: str) -> Path:
        out = tmp_path / name
        write.sync(OLD, out)
        (out / "generated/a/foreign.txt").write_text("mine")
        return out

    counting = Counting()
    write.sync(NEW, prepared("all"), counting)
    committed = counting.steps.index("rename")
    assert len(counting.steps) > 20
    foreign = {"generated/a/foreign.txt": "mine"}
    for after in range(len(counting.steps)):
        out = prepared(str(after))
        with pytest.raises(Stop):
            write.sync(NEW, out, Counting(after))
        found = write.plan(NEW, out)
        assert not found.is_clean or after >= len(counting.steps) - 1
        if after <= committed:
            assert on_disk(out) == OLD.files | foreign
        else:
            left = on_disk(out)
            for path in {*left, *OLD.files, *NEW.files}:
                assert left.get(path) in (
                    OLD.files.get(path),
                    NEW.files.get(path),
                    foreign.get(path),
                )
        # the next build may be of either tree
        again = OLD if after % 2 else NEW
        write.sync(again, out)
        assert on_disk(out) == again.files | foreign
        assert write.plan(again, out).is_clean and not (out / names.STAGING).exists()


def test_a_repair_can_be_stopped_too(tmp_path: Path) -> None:
    for first in range(14, 26, 3):
        for second in range(0, 12):
            out = tmp_path / f"{first}-{second}"
            write.sync(OLD, out)
            with pytest.raises(Stop):
                write.sync(NEW, out, Counting(first))
            try:
                write.sync(NEW, out, Counting(second))
            except Stop:
                write.sync(NEW, out)
            assert on_disk(out) == NEW.files and write.plan(NEW, out).is_clean


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EACCES, errno.EROFS])
def test_a_system_call_that_fails_leaves_the_old_tree(number: int, tmp_path: Path) -> None:
    for after in range(0, 12, 3):
        out = tmp_path / str(after)
        write.sync(OLD, out)
        with pytest.raises(Failure) as failed:
            write.sync(NEW, out, Counting(after, OSError(number, os.strerror(number))))
        assert codes(failed) == ["KG001"] and on_disk(out) == OLD.files
        write.sync(NEW, out)
        assert on_disk(out) == NEW.files


def foreign(out: Path) -> None:
    (out / "generated/a/added.py").write_text("mine")


def edited(out: Path) -> None:
    (out / "generated/__init__.py").write_text("edited")


def edited_orphan(out: Path) -> None:
    (out / "generated/a/gone.py").write_text("edited")


def linked_file(out: Path) -> None:
    (out / "target").write_text("mine")
    (out / "generated/a/added.py").symlink_to(out / "target")


def linked_folder(out: Path) -> None:
    (out / "elsewhere").mkdir()
    (out / "generated/c").symlink_to(out / "elsewhere")


def dangling_link(out: Path) -> None:
    (out / "generated/a/added.py").symlink_to(out / "nothing")


def folder_in_the_way(out: Path) -> None:
    (out / "generated/a/added.py").mkdir()


def file_in_the_way(out: Path) -> None:
    (out / "generated/c").write_text("mine")


def other_case(out: Path) -> None:
    (out / "generated/a/Added.py").write_text("mine")


def other_case_of_a_folder(out: Path) -> None:
    (out / "generated/C").mkdir()


def pipe(out: Path) -> None:
    os.mkfifo(out / "generated/a/added.py")


@pytest.mark.parametrize(
    ("prepare", "code"),
    [
        (foreign, "KG030"),
        (edited, "KG031"),
        (edited_orphan, "KG031"),
        (linked_file, "KG030"),
        (linked_folder, "KG030"),
        (dangling_link, "KG030"),
        (folder_in_the_way, "KG030"),
        (file_in_the_way, "KG030"),
        (other_case, "KG030"),
        (other_case_of_a_folder, "KG030"),
        (pipe, "KG030"),
    ],
)
def test_what_is_not_ours_is_never_touched(prepare, code: str, out: Path) -> None:
    prepare(out)
    listing = {path: path.lstat() for path in out.rglob("*")}
    assert [fault.code for fault in write.plan(NEW, out).blocked] == [code]
    with pytest.raises(Failure) as failed:
        write.sync(NEW, out)
    assert codes(failed) == [code]
    assert {path: path.lstat().st_mtime_ns for path in out.rglob("*")} == {
        path: found.st_mtime_ns for path, found in listing.items()
    }


def test_a_foreign_file_that_is_as_it_should_be_becomes_ours(tmp_path: Path) -> None:
    for path, text in NEW.files.items():
        file = tmp_path / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    assert write.sync(NEW, tmp_path).written == ()
    write.sync(OLD, tmp_path)
    assert on_disk(tmp_path) == OLD.files


def test_a_file_that_someone_deleted_comes_back(out: Path) -> None:
    (out / "generated/a/gone.py").unlink()
    assert write.sync(OLD, out).written == ("generated/a/gone.py",)
    (out / "generated/a/gone.py").unlink()
    write.sync(NEW, out)
    assert on_disk(out) == NEW.files


def test_foreign_files_and_folders_of_removed_files_stay(out: Path) -> None:
    (out / "generated/b/notes.txt").write_text("mine")
    (out / "generated/__pycache__").mkdir()
    cache = out / "generated/a/__pycache__"
    cache.mkdir()
    for name in ("gone.cpython-311.pyc", "gone_not.cpython-311.pyc"):
        (cache / name).write_bytes(b"")
    write.sync(NEW, out)
    assert (out / "generated/b/notes.txt").exists() and (out / "generated/__pycache__").exists()
    assert [file.name for file in cache.iterdir()] == ["gone_not.cpython-311.pyc"]


def test_a_partial_tree_leaves_the_rest_alone(out: Path) -> None:
    part = Tree({"generated/a/added.py": "added\n"}, partial=True)
    plan = write.sync(part, out)
    assert (plan.written, plan.removed) == (("generated/a/added.py",), ())
    assert on_disk(out) == {**OLD.files, **part.files}
    write.sync(NEW, out)
    assert on_disk(out) == NEW.files


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "[" * 100_000,
        '{"schema_version": 2, "files": {}}',
        '{"schema_version": 1}',
        '{"schema_version": 1, "files": {"generated/x.py": 1}}',
        '{"schema_version": 1, "files": {"../outside": "HASH"}}',
        '{"schema_version": 1, "files": {"generated/../../outside": "HASH"}}',
        '{"schema_version": 1, "files": {"/outside": "HASH"}}',
        '<<<<<<< HEAD\n{"schema_version": 1, "files": {}}\n=======\n',
    ],
)
def test_a_broken_manifest_is_told(text: str, out: Path) -> None:
    (out / names.MANIFEST).write_text(text)
    (out.parent / "outside").write_text("mine")
    with pytest.raises(Failure) as failed:
        write.sync(NEW, out)
    assert codes(failed) == ["KG032"] and on_disk(out) == OLD.files
    assert (out.parent / "outside").read_text() == "mine"


@pytest.mark.parametrize(
    ("change", "code"),
    [
        (lambda staging, step: (staging / step["staged"]).unlink(), "KG032"),
        (lambda staging, step: (staging / step["staged"]).write_text("torn"), "KG032"),
        (lambda staging, step: (staging / "journal.json").write_text("{"), "KG032"),
        (lambda staging, step: (staging.parent / "__init__.py").write_text("edited"), "KG031"),
    ],
    ids=["lost", "torn", "journal", "edited since"],
)
def test_an_interrupted_build_that_cannot_be_finished_is_told(change, code: str, out: Path) -> None:
    counting = Counting()
    write.sync(NEW, out, counting)
    write.sync(OLD, out)
    with pytest.raises(Stop):
        write.sync(NEW, out, Counting(counting.steps.index("rename") + 1))
    staging = out / names.STAGING
    steps = json.loads((staging / "journal.json").read_text())["steps"]
    change(staging, next(step for step in steps if step["path"] == "generated/__init__.py"))
    before = project.files(out)
    with pytest.raises(Failure) as failed:
        write.sync(NEW, out)
    assert codes(failed) == [code] and project.files(out) == before


def test_a_journal_cannot_lead_outside(out: Path) -> None:
    (out.parent / "victim").write_text("mine")
    staging = out / names.STAGING
    staging.mkdir()
    step = {"path": "generated/../../victim", "old": write._hash("mine"), "new": "", "staged": "0"}
    (staging / "journal.json").write_text(json.dumps({"schema_version": 1, "steps": [step]}))
    with pytest.raises(Failure) as failed:
        write.sync(NEW, out)
    assert codes(failed) == ["KG032"] and (out.parent / "victim").read_text() == "mine"


def test_the_diff_shows_every_change(out: Path) -> None:
    text = "".join(write.differences(write.plan(NEW, out), out))
    assert "--- a/generated/__init__.py\n+++ b/generated/__init__.py\n" in text
    assert "--- /dev/null\n+++ b/generated/a/added.py\n" in text
    assert "--- a/generated/a/gone.py\n+++ /dev/null\n" in text
    assert text.count("\n+added") == 2 and names.MANIFEST not in text


def _build(folder: Path, *arguments: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "kernelgen", "build", "-j1", *arguments]
    return subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("KERNELGEN_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("PYTHONPATH", str(Path(write.__file__).parent.parent))
    return tmp_path


def test_builds_at_the_same_time_end_in_one_tree(workplace: Path) -> None:
    specs = project.make(workplace / "work")
    builds = [_build(workplace / "work") for _ in range(6)]
    for process in builds:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors.decode()
    assert build.check(specs, workplace / "work").is_clean


def test_killed_at_any_time_the_next_build_repairs(workplace: Path) -> None:
    specs = project.make(workplace / "start")
    assert _build(workplace / "start").wait() == 0
    old = on_disk(workplace / "start")
    (specs / "toy.yaml").write_text(project.SPEC.replace("large", "medium"))
    start = time.monotonic()
    assert _build(workplace / "start", "--out", str(workplace / "new")).wait() == 0
    span = time.monotonic() - start
    new = on_disk(workplace / "new")
    for i in range(6):
        work = workplace / str(i)
        shutil.copytree(workplace / "start", work)
        process = _build(work)
        time.sleep(span * (0.5 + i / 12))
        process.kill()
        process.wait()
        assert on_disk(work) in (old, new) or (work / names.STAGING / "journal.json").exists()
        assert _build(work).wait() == 0
        assert on_disk(work) == new and not (work / names.STAGING).exists()
