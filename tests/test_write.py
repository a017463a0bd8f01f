"""The disk: one step or none, whatever fails; what is not ours stays as it is."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import random
import shutil
import stat
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Callable, Iterator

import project
import pytest

import kernelgen
from kernelgen.core import names
from kernelgen.core.diagnostics import Failure
from kernelgen.core.model import Tree
from kernelgen.emit import build, write
from kernelgen.emit.disk import Disk, hash_text

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


STEPS = [name for name in vars(Disk) if not name.startswith("_")]
Snapshot = dict[str, tuple[int, Any]]


def on_disk(out: Path) -> dict[str, str]:
    """The files, without the manifest."""
    files = project.files(out)
    return {path: data.decode() for path, data in files.items() if path != names.MANIFEST}


def snapshot(folder: Path) -> Snapshot:
    """Everything in a folder, the folder included: mode, and content, target or entries."""
    found: Snapshot = {}
    for path in (folder, *folder.rglob("*")):
        if not os.path.lexists(path):
            continue
        mode = path.lstat().st_mode
        if stat.S_ISLNK(mode):
            content: Any = os.readlink(path)
        elif stat.S_ISDIR(mode):
            content = sorted(os.listdir(path))
        else:
            content = path.read_bytes()
        found[str(path.relative_to(folder))] = (mode, content)
    return found


def both(out: Path) -> tuple[Snapshot, Snapshot]:
    return snapshot(out / names.PACKAGE), snapshot(out / names.TESTS)


def add_foreign(out: Path) -> dict[Path, int]:
    """Put what is not ours into the output folders; each path with its inode."""
    for path in ("generated/a/notes.txt", "generated/__pycache__/x.pyc", "tests/generated/mine.py"):
        (out / path).parent.mkdir(exist_ok=True)
        (out / path).write_text("mine")
    (out / "generated/own/empty").mkdir(parents=True)
    (out / "generated/own").chmod(0o2750)
    (out / "generated/own/dangling").symlink_to("nowhere")
    (out / "generated/own/folder").symlink_to("../a")
    foreign = [out / "generated/a/notes.txt", out / "generated/__pycache__/x.pyc"]
    foreign += [out / "tests/generated/mine.py", *(out / "generated/own").glob("[df]*")]
    return {path: path.lstat().st_ino for path in foreign}


def codes(failed: pytest.ExceptionInfo[Failure]) -> list[str]:
    assert failed.value.exit_code == 2
    return [fault.code for fault in failed.value.diagnostics]


class Stop(BaseException):
    """Stands for the death of the process: nothing after it reaches the disk."""


class Counting(Disk):
    """Counts the steps; with ``after``, does that many and then fails: at each, or with ``once`` at one."""

    def __init__(
        self, after: int | None = None, failure: BaseException | None = None, once: bool = False
    ) -> None:
        self.after = after
        self.failure = failure or Stop()
        self.once = once
        self.steps: list[str] = []

    def step(self, name: str, path: Path) -> None:
        number = len(self.steps)
        if self.after is not None and (number == self.after if self.once else number >= self.after):
            if number == self.after:
                _tear(name, path)
            if self.once:
                self.steps.append("failed")
            raise self.failure
        self.steps.append(name)


def _tear(name: str, path: Path) -> None:
    """Do a half of what is not one system call."""
    if name == "write":
        path.write_bytes(b"torn")
    elif name == "make_folder":
        path.mkdir(exist_ok=True)
    elif name == "remove_tree":
        files = sorted(file for file in path.rglob("*") if not file.is_dir())
        for file in files[::2]:
            file.unlink()


def _counted(name: str) -> Callable[..., None]:
    def method(self: Counting, *paths: Any) -> None:
        self.step(name, paths[0])
        getattr(Disk, name)(self, *paths)

    return method


for _name in STEPS:
    setattr(Counting, _name, _counted(_name))


class NoSwap(Counting):
    def swap(self, one: Path, other: Path) -> None:
        raise OSError(errno.ENOSYS, "no such call")


class NoLinks(Counting):
    def link(self, old: Path, new: Path) -> None:
        raise OSError(errno.EPERM, "no hard links")


class Mounted(NoSwap):
    """The output folders are mounts."""

    def link(self, old: Path, new: Path) -> None:
        raise OSError(errno.EXDEV, "another device")

    def rename(self, old: Path, new: Path) -> None:
        if names.STAGING in str(old) and names.STAGING not in str(new):
            raise OSError(errno.EXDEV, "another device")
        super().rename(old, new)


@pytest.fixture(autouse=True)
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda handle: None)


@pytest.fixture
def memory(tmp_path: Path) -> Iterator[Path]:
    """A folder in memory, where the system has such: for tests that make thousands of folders."""
    if not os.access("/dev/shm", os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        yield Path(folder)


@pytest.fixture(scope="session")
def swaps(tmp_path_factory: pytest.TempPathFactory) -> None:
    """For tests of what holds where folders can be swapped."""
    folder = tmp_path_factory.mktemp("swaps")
    (folder / "one").mkdir()
    (folder / "other").mkdir()
    try:
        Disk().swap(folder / "one", folder / "other")
    except OSError as error:
        pytest.skip(f"this file system cannot swap folders: {error}")


@pytest.fixture
def out(tmp_path: Path) -> Path:
    write.sync(OLD, tmp_path)
    return tmp_path


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


def test_what_is_not_ours_keeps_its_identity(out: Path, swaps: None) -> None:
    foreign = add_foreign(out)
    before = {path: state for path, state in snapshot(out / "generated").items() if "own" in path}
    (out / "generated").chmod(0o775)
    counting = Counting()
    write.sync(NEW, out, counting)
    assert counting.steps.count("swap") == 2
    assert {path: path.lstat().st_ino for path in foreign} == foreign
    after = snapshot(out / "generated")
    assert {path: state for path, state in after.items() if "own" in path} == before
    assert stat.S_IMODE((out / "generated").stat().st_mode) == 0o775
    assert (out / "generated/a/notes.txt").stat().st_nlink == 1


def test_only_a_folder_that_changes_is_swapped(out: Path, swaps: None) -> None:
    inode = (out / names.TESTS).stat().st_ino
    kernel = Tree({**OLD.files, "generated/__init__.py": "new\n"})
    counting = Counting()
    write.sync(kernel, out, counting)
    (out / "generated/a/gone.py").unlink()  # the manifest stays as it is
    write.sync(kernel, out, counting)
    assert counting.steps.count("swap") == 1 + 1
    # the hash of a text is in the manifest, so one of the tests is a change of both
    assert (out / names.TESTS).stat().st_ino == inode
    assert on_disk(out) == kernel.files


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o077])
def test_modes_do_not_depend_on_the_umask(umask: int, tmp_path: Path) -> None:
    before = os.umask(umask)
    try:
        write.sync(OLD, tmp_path)
        write.sync(NEW, tmp_path)
    finally:
        os.umask(before)
    for state in both(tmp_path):
        assert {mode for mode, _ in state.values()} == {stat.S_IFDIR | 0o755, stat.S_IFREG | 0o644}


# ---- interrupted


@pytest.fixture(scope="session")
def states(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any, Any]:
    """A folder with the old tree and foreign files; its snapshots with the old and with the new tree."""
    out = tmp_path_factory.mktemp("states") / "old"
    write.sync(OLD, out)
    add_foreign(out)
    shutil.copytree(out, out.parent / "new", symlinks=True)
    write.sync(NEW, out.parent / "new")
    return out, both(out), both(out.parent / "new")


def test_stopped_at_any_step_each_folder_is_old_or_new(
    memory: Path, swaps: None, states: tuple[Path, Any, Any]
) -> None:
    start, old, new = states
    finished: tuple[tuple[Snapshot, Snapshot], ...] = (old, (new[0], old[1]), new)
    shutil.copytree(start, memory / "all", symlinks=True)
    counting = Counting()
    write.sync(NEW, memory / "all", counting)
    seen = []
    for after in range(len(counting.steps)):
        out = memory / str(after)
        shutil.copytree(start, out, symlinks=True)
        with pytest.raises(Stop):
            write.sync(NEW, out, Counting(after))
        seen.append(finished.index(both(out)))
        plan = write.plan(NEW, out)
        assert not plan.blocked and (not plan.is_clean or after == len(counting.steps) - 1)
        # the next build may be of either tree, or of a third
        if after % 3 == 0:
            write.sync(Tree({"generated/a/added.py": "added\n"}), out)
        again = OLD if after % 2 else NEW
        write.sync(again, out)
        assert both(out) == (old if after % 2 else new)
        assert write.plan(again, out).is_clean and not (out / names.STAGING).exists()
        shutil.rmtree(out)
    assert seen == sorted(seen) and set(seen) == {0, 1, 2}


IN_PLACE = [NoSwap, Mounted]


def test_where_files_cannot_be_linked_they_are_copied(memory: Path, swaps: None, states: tuple[Path, Any, Any]) -> None:
    start, old, new = states
    shutil.copytree(start, memory / "all", symlinks=True)
    foreign = {path: path.lstat().st_ino for path in (memory / "all").rglob("*.txt")}
    counting = NoLinks()
    write.sync(NEW, memory / "all", counting)
    assert both(memory / "all") == new and counting.steps.count("swap") == 2
    assert {path: path.lstat().st_ino for path in foreign} == foreign
    for after in range(0, len(counting.steps), 3):
        out = memory / str(after)
        shutil.copytree(start, out, symlinks=True)
        with pytest.raises(Stop):
            write.sync(NEW, out, NoLinks(after))
        assert both(out) in (old, (new[0], old[1]), new)
        write.sync(OLD, out, NoLinks())
        assert both(out) == old and write.plan(OLD, out).is_clean
        shutil.rmtree(out)


@pytest.mark.parametrize("disk", IN_PLACE)
def test_where_folders_cannot_be_swapped_a_failure_is_undone(
    disk: type[Counting], memory: Path, states: tuple[Path, Any, Any]
) -> None:
    start, old, new = states
    counting = disk()
    shutil.copytree(start, memory / "all", symlinks=True)
    write.sync(NEW, memory / "all", counting)
    for after in range(IN_PLACE.index(disk), len(counting.steps), 2):
        out = memory / str(after)
        shutil.copytree(start, out, symlinks=True)
        with pytest.raises(Failure) as failed:
            write.sync(NEW, out, disk(after, OSError(errno.EACCES, "not allowed"), once=True))
        assert codes(failed) == ["KG001"]
        assert both(out) in (old, new), counting.steps[after]
        write.sync(NEW, out, disk())
        assert both(out) == new and not (out / names.STAGING).exists()
        shutil.rmtree(out)


@pytest.mark.parametrize("disk", IN_PLACE)
def test_where_folders_cannot_be_swapped_the_next_build_repairs(
    disk: type[Counting], memory: Path, states: tuple[Path, Any, Any]
) -> None:
    start, old, new = states
    shutil.copytree(start, memory / "all", symlinks=True)
    foreign = {path: path.lstat().st_ino for path in (memory / "all").rglob("*.txt")}
    counting = disk()
    write.sync(NEW, memory / "all", counting)
    assert both(memory / "all") == new and "swap" not in counting.steps
    assert {path: path.lstat().st_ino for path in foreign} == foreign
    for after in range(0, len(counting.steps), 2):
        out = memory / str(after)
        shutil.copytree(start, out, symlinks=True)
        with pytest.raises(Stop):
            write.sync(NEW, out, disk(after))
        left = on_disk(out)
        for path in {*OLD.files, *NEW.files}:
            assert left.get(path) in (OLD.files.get(path), NEW.files.get(path))
        with contextlib.suppress(Stop):
            write.sync(NEW, out, disk(after // 2))
        again = OLD if after % 4 else NEW
        write.sync(again, out, disk())
        assert both(out) == (old if after % 4 else new) and write.plan(again, out).is_clean
        assert not (out / names.STAGING).exists()
        shutil.rmtree(out)


def test_a_repair_can_be_stopped_too(
    memory: Path, swaps: None, states: tuple[Path, Any, Any]
) -> None:
    start, old, _ = states
    third = Tree({**OLD.files, "generated/d/x.py": "x\n", "tests/generated/test_a.py": "third\n"})
    counting = Counting()
    shutil.copytree(start, memory / "all", symlinks=True)
    write.sync(NEW, memory / "all", counting)
    swap = counting.steps.index("swap")
    for first in (swap, swap + 1, swap + 3):
        for second in range(first % 2, 60, 5):
            out = memory / f"{first}-{second}"
            shutil.copytree(start, out, symlinks=True)
            with pytest.raises(Stop):
                write.sync(NEW, out, Counting(first))
            with contextlib.suppress(Stop):
                write.sync(third, out, Counting(second))
            write.sync(OLD, out)
            assert both(out) == old and write.plan(OLD, out).is_clean
            shutil.rmtree(out)


FAILURES = [errno.ENOSPC, errno.EIO, errno.EACCES, errno.EROFS]


@pytest.mark.parametrize("number", FAILURES)
def test_a_system_call_that_fails_leaves_one_tree(
    number: int, memory: Path, swaps: None, states: tuple[Path, Any, Any]
) -> None:
    start, old, new = states
    counting = Counting()
    shutil.copytree(start, memory / "all", symlinks=True)
    write.sync(NEW, memory / "all", counting)
    last = len(counting.steps) - 1 - counting.steps[::-1].index("swap")
    for after in range(FAILURES.index(number), len(counting.steps), len(FAILURES)):
        for once in (True, False) if after <= counting.steps.index("swap") else (True,):
            out = memory / f"{after}-{once}"
            shutil.copytree(start, out, symlinks=True)
            error = OSError(number, os.strerror(number))
            with pytest.raises(Failure) as failed:
                write.sync(NEW, out, Counting(after, error, once))
            # a swap that cannot be made durable is undone
            assert codes(failed) == ["KG001"] and both(out) == (old if after <= last + 1 else new)
            write.sync(NEW, out)
            assert both(out) == new and not (out / names.STAGING).exists()
            shutil.rmtree(out)


class Late(Counting):
    """While the copy is made, someone else works in the folder."""

    def swap(self, one: Path, other: Path) -> None:
        if (other / "own").exists() and not (other / "late.txt").exists():
            (other / "late.txt").write_text("late")
            (other / "a/__init__.py").write_text("edited in place")
            (other / "own/draft").write_text("second draft")
            os.replace(other / "own/draft", other / "own/text")
            (other / "own/new/empty").mkdir(parents=True)
            (other / "own/new/text").write_text("late")
            (other / "own/new/link").symlink_to("text")
        super().swap(one, other)


def test_what_others_do_while_the_copy_is_made_is_not_lost(out: Path, swaps: None) -> None:
    (out / "generated/own").mkdir()
    (out / "generated/own/text").write_text("first draft")
    start = out.parent / f"{out.name}-start"
    shutil.copytree(out, start)
    counting = Late()
    write.sync(NEW, out, counting)
    for after in (None, *range(counting.steps.index("swap") + 1, len(counting.steps))):
        if after is not None:
            shutil.rmtree(out)
            shutil.copytree(start, out)
            with pytest.raises(Stop):
                write.sync(NEW, out, Late(after))
            (out / "generated/a/__init__.py").write_text("same\n")
            write.sync(NEW, out)
        own = out / "generated/own"
        assert (out / "generated/late.txt").read_text() == "late"
        assert (own / "text").read_text() == "second draft"
        assert (own / "new/text").read_text() == "late" and (own / "new/empty").is_dir()
        assert os.readlink(own / "new/link") == "text"
        if after is None:
            assert (out / "generated/a/__init__.py").read_text() == "edited in place"


def test_what_others_do_until_a_commit_fails_is_not_lost(out: Path, swaps: None) -> None:
    """In a folder that was new already, and is the old one again."""

    class Failing(Counting):
        def swap(self, one: Path, other: Path) -> None:
            if other == out / names.TESTS and "swap" in self.steps:
                (out / names.PACKAGE / "late.txt").write_text("late")
                raise OSError(errno.EIO, "no such disk")
            super().swap(one, other)

    before = both(out)
    with pytest.raises(Failure):
        write.sync(NEW, out, Failing())
    late = out / names.PACKAGE / "late.txt"
    assert late.read_text() == "late"
    late.unlink()
    assert both(out) == before


@pytest.mark.parametrize("path", ["generated/a/gone.py", min(NEW.files.keys() - OLD.files.keys())])
def test_a_file_that_is_edited_while_its_successor_is_made_stays(path: str, out: Path) -> None:
    """Or made, where there was none."""

    class Editing(Counting):
        def sync_folder(self, folder: Path) -> None:
            (out / path).parent.mkdir(exist_ok=True)
            (out / path).write_text("edited")

    with pytest.raises(Failure) as failed:
        write.sync(NEW, out, Editing())
    assert codes(failed) == ["KG031"]
    assert on_disk(out) == {**OLD.files, path: "edited"}
    assert not (out / names.STAGING).exists()


def as_nobody(work: Callable[[], list[str]]) -> list[str]:
    """What ``work`` returns in a process of a user who is not root."""
    reads, writes = os.pipe()
    child = os.fork()
    if not child:
        with contextlib.suppress(BaseException), open(writes, "w") as stream:
            if os.getuid() == 0:
                os.setgid(65534)
                os.setuid(65534)
            json.dump(work(), stream)
            stream.flush()
        os._exit(0)
    os.close(writes)
    with open(reads) as stream:
        found: list[str] = json.load(stream)
    os.waitpid(child, 0)
    return found


def _give(path: Path, uid: int) -> None:
    if os.getuid() == 0:
        os.chown(path, uid, uid)


def locked_folder(out: Path) -> None:
    (out / "generated/b").chmod(0o555)


def locked_package(out: Path) -> None:
    (out / "generated").chmod(0o555)


def bytecode_of_root(out: Path) -> None:
    (out / "generated/__pycache__").chmod(0o755)
    for path in (out / "generated/__pycache__/x.pyc", out / "generated/__pycache__"):
        _give(path, 0)
    if os.getuid():
        (out / "generated/__pycache__").chmod(0o555)


@pytest.mark.parametrize("disk", [Counting, NoSwap, NoLinks, Mounted])
@pytest.mark.parametrize("lock", [locked_folder, locked_package, bytecode_of_root])
def test_a_folder_that_this_user_may_not_change_is_told_before_anything_is_done(
    lock: Callable[[Path], None], disk: type[Counting], states: tuple[Path, Any, Any]
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        out = Path(folder) / "out"
        shutil.copytree(states[0], out, symlinks=True)
        for path in (Path(folder), out, *out.rglob("*")):
            if not path.is_symlink():
                _give(path, 65534)
        lock(out)
        before = both(out)

        def work() -> list[str]:
            try:
                write.sync(NEW, out, disk())
            except Failure as failed:
                return [fault.code for fault in failed.diagnostics] + [str(failed.exit_code), str(failed)]
            return []

        code, exit_code, text = as_nobody(work)
        assert (code, exit_code) == ("KG001", "2") and "hint:" in text and str(out / "generated") in text
        assert both(out) == before and not (out / names.STAGING).exists()
        for path in (out / "generated", *(out / "generated").iterdir()):
            if path.is_dir() and not path.is_symlink():
                path.chmod(0o755)


# ---- what is not ours


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


HASH = hash_text("mine")


@pytest.mark.parametrize(
    "text",
    [
        "{",
        '{"schema_version": 1}',
        '{"schema_version": 1, "files": [], "swaps": {}}',
        '{"schema_version": 1, "files": {"generated/x.py": "HASH"}, "swaps": {}}',
        '{"schema_version": 1, "files": {"generated/../../victim": ["HASH"]}, "swaps": {}}',
        '{"schema_version": 1, "files": {}, "swaps": {"generated": ["generated/x.py", "HASH"]}}',
        '{"schema_version": 1, "files": {}, "swaps": {"generated": [["x"], "HASH"]}}',
        '{"schema_version": 1, "files": {"generated/x.py": ["HASH"]}, '
        '"swaps": {"..": ["generated/x.py", ""]}}',
    ],
)
def test_a_broken_journal_is_told_and_leads_nowhere(text: str, out: Path) -> None:
    (out.parent / "victim").write_text("mine")
    (out / names.STAGING).mkdir()
    (out / names.STAGING / "journal.json").write_text(text.replace("HASH", HASH))
    with pytest.raises(Failure) as failed:
        write.sync(NEW, out)
    assert codes(failed) == ["KG032"] and on_disk(out) == OLD.files
    assert (out.parent / "victim").read_text() == "mine"


def test_a_staging_folder_that_leads_elsewhere_is_told(out: Path) -> None:
    (out / "elsewhere/copies").mkdir(parents=True)
    (out / names.STAGING).symlink_to("elsewhere")
    with pytest.raises(Failure) as failed:
        write.sync(NEW, out)
    assert codes(failed) == ["KG030"] and (out / "elsewhere/copies").exists()


def test_what_others_made_after_an_interruption_stays(out: Path) -> None:
    class Stopping(NoSwap):
        def rename(self, old: Path, new: Path) -> None:
            if new == out / names.MANIFEST:
                self.after = len(self.steps)
            super().rename(old, new)

    with pytest.raises(Stop):
        write.sync(NEW, out, Stopping())
    assert (out / "generated/a/added.py").exists() and write.plan(OLD, out).interrupted
    (out / "generated/a/added.py").write_text("mine")
    assert "generated/a/added.py" not in write.sync(OLD, out).removed
    assert on_disk(out) == {**OLD.files, "generated/a/added.py": "mine"}


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
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("KERNELGEN_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("PYTHONPATH", str(Path(kernelgen.__file__).parent.parent))
    return tmp_path


def test_builds_at_the_same_time_end_in_one_tree(desk: Path) -> None:
    specs = project.make(desk / "work")
    builds = [_build(desk / "work") for _ in range(6)]
    for process in builds:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors.decode()
    assert build.check(specs, desk / "work").is_clean


@pytest.mark.slow
def test_a_build_that_is_killed_leaves_the_old_tree_or_the_new_one(
    desk: Path, swaps: None
) -> None:
    specs = project.make(desk / "start")
    assert _build(desk / "start").wait() == 0
    shutil.copytree(desk / "start", desk / "new")
    (desk / "new/specs/toy.yaml").write_text(project.SPEC.replace("large", "medium"))
    start = time.monotonic()
    assert _build(desk / "new").wait() == 0
    span = time.monotonic() - start
    old, new = both(desk / "start"), both(desk / "new")
    (specs / "toy.yaml").write_text(project.SPEC.replace("large", "medium"))
    for i in range(2):
        work = desk / str(i)
        shutil.copytree(desk / "start", work)
        process = _build(work)
        time.sleep(span * (0.7 + i / 5))
        process.kill()
        process.wait()
        assert both(work) in (old, (new[0], old[1]), new)
        assert _build(work).wait() == 0
        assert both(work) == new and not (work / names.STAGING).exists()


COMMITS = """
import itertools, pathlib, sys
from kernelgen.emit import write
from kernelgen.core.model import Tree

out, *texts = sys.argv[1:]
trees = [
    Tree({
        f"{folder}/{name}{i}.py": text
        for folder in ("generated", "generated/a", "tests/generated")
        for name in ("same", text)
        for i in range(4)
    })
    for text in texts
]
for tree in itertools.islice(itertools.cycle(trees), 500):
    write.sync(tree, pathlib.Path(out))
    print(len(tree.files), flush=True)
"""


def _commits(out: Path) -> subprocess.Popen[str]:
    """A process that commits one of two trees after the other; it has done one when this returns."""
    command = [sys.executable, "-c", COMMITS, str(out), "x", "y"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout and process.stdout.readline()
    return process


def _texts(state: Snapshot) -> set[str]:
    """Which of the trees a folder is of."""
    files = [entry for entry in state.items() if entry[0].endswith(".py")]
    assert len(files) % 8 == 0
    return {name.rpartition("/")[2][0] for name, _ in files} - {"s"} | {
        content.decode() for _, (_, content) in files
    }


def test_killed_in_the_middle_of_a_commit_each_folder_is_of_one_tree(
    desk: Path, swaps: None
) -> None:
    rng = random.Random(0)
    out = desk / "out"
    between = 0
    for _ in range(24):
        process = _commits(out)
        time.sleep(rng.random() * 0.06)
        process.kill()
        process.communicate()
        states = both(out)
        package, tests = map(_texts, states)
        assert len(package) == len(tests) == 1 and not {*package, *tests} - {"x", "y"}
        assert len(states[0]) == 2 * 8 + 3 and len(states[1]) == 8 + 1
        between += (out / names.STAGING).exists()
    assert between
    write.sync(OLD, out)
    assert on_disk(out) == OLD.files and write.plan(OLD, out).is_clean
    assert not (out / names.STAGING).exists()


def test_commits_at_the_same_time_wait_for_each_other(desk: Path) -> None:
    out = desk / "out"
    processes = [_commits(out) for _ in range(3)]
    time.sleep(1)
    running = [process.poll() is None for process in processes]
    for process in processes:
        process.kill()
        process.communicate()
    assert all(running)
    write.sync(OLD, out)
    assert on_disk(out) == OLD.files and write.plan(OLD, out).is_clean
