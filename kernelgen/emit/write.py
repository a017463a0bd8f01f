"""The tree against the disk.

What is ours is what the manifest lists, with the hash that it lists, and what an unfinished commit left; nothing else is ever
overwritten or deleted.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import json
import os
from pathlib import Path
from typing import Iterator, Mapping

from kernelgen.core import names
from kernelgen.core.diagnostics import Diagnostic, Failure, failure, os_failure
from kernelgen.core.model import Location, Tree
from kernelgen.core.read import read_file
from kernelgen.emit.commit import Change, commit, finish, leftovers, recover
from kernelgen.emit.disk import (
    ABSENT,
    SCHEMA_VERSION,
    Disk,
    InTheWay,
    hash_file,
    hash_text,
    read_document,
)

try:
    import fcntl
except ImportError:  # not on Windows: there, builds of one folder are not to run at the same time
    fcntl = None  # type: ignore[assignment]

_DISK = Disk()


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


def plan(tree: Tree, out: Path, through_links: bool = False) -> Plan:
    """Compare ``tree`` with what is below ``out``; changes nothing, and waits for a build that is changing it.

    Args:
        tree: what is to be there.
        out: where.
        through_links: whether what links lead to counts; else they are in the way, as they are of ``sync``.

    Raises:
        Failure: something cannot be read, or the manifest is broken; exit code 2.
    """
    with _system_errors(out), _lock(out, shared=True):
        return _plan(tree, out, through_links)


def present(out: Path) -> frozenset[str]:
    """The paths below ``out`` that earlier builds made.

    Raises:
        Failure: the manifest cannot be read, or is broken; exit code 2.
    """
    with _system_errors(out):
        return frozenset(_read_manifest(out))


def _plan(tree: Tree, out: Path, through_links: bool = False) -> Plan:
    ours = {**_read_manifest(out), **leftovers(out)}
    orphans = [path for path in ours if path not in tree.files]
    wanted: dict[str, str | None] = {**tree.files, **dict.fromkeys(orphans)}
    folders = _Folders(out, through_links)
    changes: list[Change] = []
    blocked: list[Diagnostic] = []
    for path, text in wanted.items():
        try:
            folders.check(path)
            changes.append(Change(path, text, hash_file(out / path, through_links)))
            _check_ours(changes[-1], ours.get(path))
        except InTheWay as reason:
            blocked.append(Diagnostic(reason.code, Location(path), reason.message, reason.hint))
    changes = [change for change in changes if change.old != hash_text(change.text)]
    unchanged = len(tree.files) - sum(change.text is not None for change in changes)
    hashes = {path: hash_text(text) for path, text in tree.files.items()}
    try:
        manifest = Change(names.MANIFEST, _manifest_text(hashes), hash_file(out / names.MANIFEST, through_links))
        changes += [manifest] if manifest.old != hash_text(manifest.text) else []
    except InTheWay as reason:
        blocked.append(Diagnostic(reason.code, Location(names.MANIFEST), reason.message, reason.hint))
    return Plan(tuple(changes), unchanged, tuple(blocked), (out / names.STAGING).exists())


def sync(tree: Tree, out: Path, disk: Disk = _DISK) -> Plan:
    """Make the disk below ``out`` agree with ``tree``, and return what was done.

    Raises:
        Failure: a file is in the way, or a system call failed; the old tree stands. Exit code 2.
    """
    with _system_errors(out):
        for folder in (*reversed(out.parents), out):
            if not folder.exists():
                disk.make_folder(folder)
        with _lock(out):
            recover(out, disk)
            current = _plan(tree, out)
            if current.blocked:
                raise Failure(current.blocked, exit_code=2)
            if current.changes:
                commit(current.changes, out, disk)
            finish(out, disk)
            return current


def differences(plan: Plan, out: Path) -> Iterator[str]:
    """The lines of a unified diff from the disk to the tree that ``plan`` was made for."""
    for change in plan.changes:
        if change.path == names.MANIFEST:
            continue
        old = read_file(out / change.path).decode() if change.old else ""
        new = change.text or ""
        yield from difflib.unified_diff(
            old.splitlines(keepends=True),
            new.splitlines(keepends=True),
            f"a/{change.path}" if change.old else "/dev/null",
            "/dev/null" if change.text is None else f"b/{change.path}",
        )


def _check_ours(change: Change, listed: str | None) -> None:
    if change.old in (ABSENT, listed, hash_text(change.text)):
        return
    if listed is None:
        hint = "move it away, or rename what makes a file of this name"
        raise InTheWay("KG030", "kernelgen did not write this file, and leaves it alone", hint)
    hint = "move your change to the template or the spec, delete the file, and build again"
    raise InTheWay("KG031", "this generated file was edited by hand", hint)


class _Folders:
    """Checks the way to a file: real folders, and no other name that differs by case alone."""

    def __init__(self, out: Path, through_links: bool) -> None:
        self.out = out
        self.through_links = through_links
        self.listings: dict[str, dict[str, str]] = {}

    def check(self, path: str) -> None:
        parts = path.split("/")
        for depth, part in enumerate(parts):
            folder = "/".join(parts[:depth])
            listing = self.listing(folder)
            if listing.get(part.lower(), part) != part and part not in listing.values():
                message = f"{listing[part.lower()]!r} is there, which differs by case alone"
                raise InTheWay("KG030", message, "rename it")

    def listing(self, folder: str) -> dict[str, str]:
        """Lower-case name -> name, of what is in a folder."""
        known = self.listings.get(folder)
        if known is None:
            known = self.listings[folder] = self._list(folder)
        return known

    def _list(self, folder: str) -> dict[str, str]:
        place = self.out / folder
        if folder and place.is_symlink() and not self.through_links:
            message = f"{folder} is a symbolic link; generated files go to real folders"
            raise InTheWay("KG030", message, "remove the link")
        if not place.exists():
            return {}
        if not place.is_dir():
            raise InTheWay("KG030", f"{folder} is not a folder", "move it away")
        return {name.lower(): name for name in sorted(os.listdir(place))}


def _manifest_text(hashes: Mapping[str, str]) -> str:
    document = {"schema_version": SCHEMA_VERSION, "files": hashes}
    return json.dumps(document, indent=1, sort_keys=True) + "\n"


def _read_manifest(out: Path) -> dict[str, str]:
    hint = "restore it; or delete it and the generated files, and build again"
    document = read_document(out / names.MANIFEST, names.MANIFEST, hint)
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


@contextlib.contextmanager
def _lock(out: Path, shared: bool = False) -> Iterator[None]:
    """Keep other builds of the same folder waiting. Nothing is left behind, however this process ends."""
    if fcntl is None or not out.is_dir():
        yield
        return
    handle = os.open(out, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # some network file systems cannot
            fcntl.flock(handle, fcntl.LOCK_SH if shared else fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


@contextlib.contextmanager
def _system_errors(out: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise os_failure(error, error.filename or out) from None
    except InTheWay as reason:  # on a file of our own: the manifest, the journal
        raise failure(reason.code, str(out), reason.message, reason.hint) from None
