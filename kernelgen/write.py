"""The tree to disk, as one step.

What is ours is what the manifest lists, with the hash that it lists; nothing else is ever overwritten or deleted. A commit

1. stages every new file, and the new manifest, beside the old ones, and makes them durable;
2. writes a journal of what is to be done: from here on the build has happened;
3. carries the journal out by renames and deletions, each of which can be done twice;
4. removes the journal.

Killed before 2, the old tree stands; after it, the next build carries the journal out first.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import hashlib
import json
import os
import stat
from pathlib import Path
from typing import Any, Iterator, Mapping

from kernelgen import names
from kernelgen.diagnostics import Diagnostic, Failure, failure, os_failure
from kernelgen.model import Location, Tree

try:
    import fcntl
except ImportError:  # not on Windows: there, builds of one folder are not to run at the same time
    fcntl = None  # type: ignore[assignment]

_SCHEMA_VERSION = 1
_JOURNAL = f"{names.STAGING}/journal.json"
_ABSENT = ""  # stands for the hash of a file that is not there


class Disk:
    """The system calls that change something, so that a test can fail or stop at each."""

    def make_folder(self, path: Path) -> None:
        path.mkdir(exist_ok=True)

    def write(self, path: Path, data: bytes) -> None:
        """Write a new file and make its content durable."""
        with path.open("wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())

    def rename(self, old: Path, new: Path) -> None:
        os.replace(old, new)

    def remove(self, path: Path) -> None:
        path.unlink()

    def remove_folder(self, path: Path) -> None:
        path.rmdir()

    def sync_folder(self, path: Path) -> None:
        """Make the names in a folder durable, where the system can."""
        with contextlib.suppress(OSError):
            handle = os.open(path, os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)


_DISK = Disk()


@dataclasses.dataclass(frozen=True)
class Change:
    """A file to be written (``text``), or removed (None); ``old`` is the hash of what is there now."""

    path: str
    text: str | None
    old: str


@dataclasses.dataclass(frozen=True)
class Plan:
    """How the disk differs from a tree.

    Attributes:
        changes: what is to be done; the manifest comes last.
        unchanged: number of files that are as they should be.
        blocked: what forbids to do it: files that are not ours, or that were edited.
        interrupted: whether a build was stopped before it was done.
    """

    changes: tuple[Change, ...]
    unchanged: int
    blocked: tuple[Diagnostic, ...]
    interrupted: bool

    @property
    def written(self) -> tuple[str, ...]:
        """Paths of the files that are new or differ, without the manifest."""
        texts = (change for change in self.changes if change.text is not None)
        return tuple(change.path for change in texts if change.path != names.MANIFEST)

    @property
    def removed(self) -> tuple[str, ...]:
        """Paths of the files that no spec makes any more."""
        return tuple(change.path for change in self.changes if change.text is None)

    @property
    def is_clean(self) -> bool:
        """Whether there is nothing to do."""
        return not (self.changes or self.blocked or self.interrupted)


def plan(tree: Tree, out: Path) -> Plan:
    """Compare ``tree`` with what is below ``out``; changes nothing.

    Raises:
        Failure: something cannot be read, or the manifest is broken; exit code 2.
    """
    with _system_errors(out):
        ours = _read_manifest(out)
        orphans = [] if tree.partial else [path for path in ours if path not in tree.files]
        wanted: dict[str, str | None] = {**tree.files, **dict.fromkeys(orphans)}
        folders = _Folders(out)
        changes: list[Change] = []
        blocked: list[Diagnostic] = []
        for path, text in wanted.items():
            try:
                folders.check(path)
                changes.append(Change(path, text, _hash_on_disk(out / path)))
                _check_ours(changes[-1], ours.get(path))
            except _Blocked as reason:
                blocked.append(Diagnostic(reason.code, Location(path), reason.message, reason.hint))
        changes = [change for change in changes if change.old != _hash(change.text)]
        unchanged = len(tree.files) - sum(change.text is not None for change in changes)
        kept = ours if tree.partial else {}
        hashes = {**kept, **{path: _hash(text) for path, text in tree.files.items()}}
        manifest = Change(
            names.MANIFEST, _manifest_text(hashes), _hash_on_disk(out / names.MANIFEST)
        )
        if manifest.old != _hash(manifest.text):
            changes.append(manifest)
        return Plan(tuple(changes), unchanged, tuple(blocked), (out / names.STAGING).exists())


def sync(tree: Tree, out: Path, disk: Disk = _DISK) -> Plan:
    """Make the disk below ``out`` agree with ``tree``, and return what was done.

    Raises:
        Failure: a file is in the way, or a system call failed; the old tree stands. Exit code 2.
    """
    first = plan(tree, out)
    if first.is_clean:
        return first
    with _system_errors(out), _lock(out, disk):
        _recover(out, disk)
        current = plan(tree, out)
        if current.blocked:
            raise Failure(current.blocked, exit_code=2)
        if current.changes:
            _stage(current, out, disk)
            _carry_out(out, disk)
        return current


def differences(plan: Plan, out: Path) -> Iterator[str]:
    """The lines of a unified diff from the disk to the tree that ``plan`` was made for."""
    for change in plan.changes:
        if change.path == names.MANIFEST:
            continue
        old = (out / change.path).read_text("utf-8") if change.old else ""
        new = change.text or ""
        yield from difflib.unified_diff(
            old.splitlines(keepends=True),
            new.splitlines(keepends=True),
            f"a/{change.path}" if change.old else "/dev/null",
            "/dev/null" if change.text is None else f"b/{change.path}",
        )


class _Blocked(Exception):
    def __init__(self, code: str, message: str, hint: str) -> None:
        self.code, self.message, self.hint = code, message, hint


def _check_ours(change: Change, listed: str | None) -> None:
    if change.old in (_ABSENT, listed, _hash(change.text)):
        return
    if listed is None:
        hint = "move it away, or rename what makes a file of this name"
        raise _Blocked("KG030", "kernelgen did not write this file, and leaves it alone", hint)
    hint = "move your change to the template or the spec, delete the file, and build again"
    raise _Blocked("KG031", "this generated file was edited by hand", hint)


class _Folders:
    """Checks the way to a file: real folders, and no other name that differs by case alone."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.listings: dict[str, dict[str, str]] = {}

    def check(self, path: str) -> None:
        parts = path.split("/")
        for depth, part in enumerate(parts):
            folder = "/".join(parts[:depth])
            listing = self.listing(folder)
            if listing.get(part.lower(), part) != part and part not in listing.values():
                message = f"{listing[part.lower()]!r} is there, which differs by case alone"
                raise _Blocked("KG030", message, "rename it")

    def listing(self, folder: str) -> dict[str, str]:
        """Lower-case name -> name, of what is in a folder."""
        known = self.listings.get(folder)
        if known is None:
            known = self.listings[folder] = self._list(folder)
        return known

    def _list(self, folder: str) -> dict[str, str]:
        place = self.out / folder
        if folder and place.is_symlink():
            message = f"{folder} is a symbolic link; generated files go to real folders"
            raise _Blocked("KG030", message, "remove the link")
        if not place.exists():
            return {}
        if not place.is_dir():
            raise _Blocked("KG030", f"{folder} is not a folder", "move it away")
        return {name.lower(): name for name in sorted(os.listdir(place))}


def _hash(text: str | None) -> str:
    return _ABSENT if text is None else hashlib.sha256(text.encode()).hexdigest()


def _hash_on_disk(path: Path) -> str:
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return _ABSENT
    if not stat.S_ISREG(mode):
        raise _Blocked("KG030", "not a regular file", "move it away")
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _manifest_text(hashes: Mapping[str, str]) -> str:
    document = {"schema_version": _SCHEMA_VERSION, "files": hashes}
    return json.dumps(document, indent=1, sort_keys=True) + "\n"


def _read_manifest(out: Path) -> dict[str, str]:
    hint = "restore it; or delete it and the generated files, and build again"
    document = _read_json(out / names.MANIFEST, names.MANIFEST, hint)
    if document is None:
        return {}
    files = document.get("files")
    if not isinstance(files, dict) or not all(isinstance(value, str) for value in files.values()):
        raise failure("KG032", names.MANIFEST, "not a manifest of kernelgen", hint)
    for path in files:
        reason = names.path_fault(path)
        if reason:
            raise failure("KG032", names.MANIFEST, f"lists {path!r}, which {reason}", hint)
    return files


def _read_json(file: Path, label: str, hint: str) -> dict[str, Any] | None:
    """The JSON object in ``file``; None when it is not there."""
    try:
        document = json.loads(file.read_bytes())
    except FileNotFoundError:
        return None
    except (ValueError, RecursionError):
        raise failure("KG032", label, "not a JSON document", hint) from None
    if not isinstance(document, dict) or document.get("schema_version") != _SCHEMA_VERSION:
        message = f"not a document of schema version {_SCHEMA_VERSION}"
        raise failure("KG032", label, message, hint)
    return document


@contextlib.contextmanager
def _lock(out: Path, disk: Disk) -> Iterator[None]:
    """Keep other builds of the same folder waiting. Nothing is left behind, however this process ends."""
    for folder in (*reversed(out.parents), out):
        if not folder.exists():
            disk.make_folder(folder)
    handle = os.open(out, os.O_RDONLY) if fcntl else -1
    try:
        if fcntl:
            with contextlib.suppress(OSError):  # some network file systems cannot
                fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        if fcntl:
            os.close(handle)


@contextlib.contextmanager
def _system_errors(out: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise os_failure(error, error.filename or out) from None
    except _Blocked as reason:  # on a file of our own: the manifest, the journal
        raise failure(reason.code, str(out), reason.message, reason.hint) from None


def _stage(plan: Plan, out: Path, disk: Disk) -> None:
    """Everything that can fail for want of space, and the journal as the last step."""
    staging = out / names.STAGING
    for folder in (staging.parent, staging):
        disk.make_folder(folder)
    steps = []
    try:
        for number, change in enumerate(plan.changes):
            staged = f"{number:05}"
            if change.text is not None:
                disk.write(staging / staged, change.text.encode())
            new = _hash(change.text)
            steps.append({"path": change.path, "old": change.old, "new": new, "staged": staged})
        journal = json.dumps({"schema_version": _SCHEMA_VERSION, "steps": steps}, indent=1)
        disk.write(staging / "part", journal.encode())
        disk.sync_folder(staging)
        disk.rename(staging / "part", out / _JOURNAL)
    except BaseException:
        with contextlib.suppress(OSError):
            _discard(staging, disk)
        raise
    disk.sync_folder(staging)


def _recover(out: Path, disk: Disk) -> None:
    """Finish a build that was stopped after its journal; forget one that was stopped before."""
    staging = out / names.STAGING
    if (out / _JOURNAL).exists():
        _carry_out(out, disk)
    elif staging.is_dir():
        _discard(staging, disk)


def _carry_out(out: Path, disk: Disk) -> None:
    staging = out / names.STAGING
    steps = _read_journal(out)
    touched = set()
    for step in steps:
        target = out / step["path"]
        if _hash_on_disk(target) == step["new"]:
            continue
        if step["new"]:
            for folder in reversed(target.relative_to(out).parents):
                disk.make_folder(out / folder)
            disk.rename(staging / step["staged"], target)
        else:
            disk.remove(target)
            _remove_bytecode(target, disk)
        touched.add(target.parent)
    for folder in sorted(touched):
        disk.sync_folder(folder)
    for step in steps:
        if not step["new"]:
            _remove_empty(out, step["path"], disk)
    disk.remove(out / _JOURNAL)
    _discard(staging, disk)


def _read_journal(out: Path) -> list[dict[str, str]]:
    """The steps of the journal, each still possible.

    Raises:
        Failure: the journal is broken, or a file was changed since; exit code 2.
    """
    hint = f"delete {names.STAGING}, look at the files, and build again"
    document = _read_json(out / _JOURNAL, _JOURNAL, hint)
    steps = document.get("steps") if document else None
    fields = {"path", "old", "new", "staged"}
    if not isinstance(steps, list) or not all(
        isinstance(step, dict)
        and set(step) == fields
        and all(isinstance(value, str) for value in step.values())
        and "/" not in step["staged"]
        and (step["path"] == names.MANIFEST or names.path_fault(step["path"]) is None)
        for step in steps
    ):
        raise failure("KG032", _JOURNAL, "not a journal of kernelgen", hint)
    folders = _Folders(out)
    for step in steps:
        folders.check(step["path"])
        current = _hash_on_disk(out / step["path"])
        if current == step["new"]:
            continue
        if current != step["old"]:
            message = "this file was changed after a build was interrupted"
            raise failure("KG031", step["path"], message, "move it away, and build again")
        if step["new"] and _hash_on_disk(out / names.STAGING / step["staged"]) != step["new"]:
            raise failure("KG032", _JOURNAL, f"the text of {step['path']} is lost", hint)
    return steps


def _discard(staging: Path, disk: Disk) -> None:
    for name in sorted(os.listdir(staging)):
        disk.remove(staging / name)
    disk.remove_folder(staging)


def _remove_bytecode(module: Path, disk: Disk) -> None:
    for cached in sorted((module.parent / "__pycache__").glob(f"{module.stem}.*.pyc")):
        disk.remove(cached)


def _remove_empty(out: Path, path: str, disk: Disk) -> None:
    """Remove the folders that the removal of ``path`` left empty."""
    roots = (names.PACKAGE, names.TESTS)
    folder = path.rpartition("/")[0]
    while folder and folder not in roots:
        for place in (out / folder / "__pycache__", out / folder):
            if place.is_dir() and not os.listdir(place):
                disk.remove_folder(place)
        folder = folder.rpartition("/")[0]
