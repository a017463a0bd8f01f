"""Changes to disk, as one step.

A commit

1. stages the new texts, and a copy of each folder that is to change: hard links of what is there, or copies where there can be
   no links, and the changes carried out;
2. writes a journal of what may be at each place from here on;
3. swaps each copy with its folder, by one system call each;
4. takes along what others put into the old folder since it was copied.

``finish`` then removes the journal and the old folders. Killed anywhere, each folder is the old or the new one, and the
journal tells the next build which texts are ours. Where folders cannot be swapped (a mount, a file system that cannot), step 3
carries the changes out in the folder itself, file by file, and back again if one fails. A folder that this user may not change
is found in step 1, where nothing has happened yet.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import os
from pathlib import Path
from typing import Mapping, Sequence

from kernelgen.core import names
from kernelgen.core.diagnostics import failure
from kernelgen.emit.disk import (
    SCHEMA_VERSION,
    Disk,
    InTheWay,
    hash_file,
    hash_text,
    is_unsupported,
    read_document,
)

# In the order of their swaps. Between the two, the new package is complete, and its tests are still the old ones.
_FOLDERS = (names.PACKAGE, names.TESTS)
_TEXTS = f"{names.STAGING}/texts"
_COPIES = f"{names.STAGING}/copies"
_REPLACED = f"{names.STAGING}/replaced"  # what was changed in the folder itself, as it was
_JOURNAL = f"{names.STAGING}/journal.json"
_NEXT_JOURNAL = f"{names.STAGING}/journal.next"


@dataclasses.dataclass(frozen=True)
class Change:
    """A file to be written (``text``), or removed (None); ``old`` is the hash of what is there now."""

    path: str
    text: str | None
    old: str


@dataclasses.dataclass(frozen=True)
class _Journal:
    """What an unfinished commit may have left.

    Attributes:
        files: path -> the hashes of what kernelgen may have put there.
        swaps: folder whose copy is complete -> a path in it, and the hash of its new text: when the copy has another
            one, it is the old folder.
    """

    files: Mapping[str, Sequence[str]]
    swaps: Mapping[str, tuple[str, str]]


def leftovers(out: Path) -> dict[str, str]:
    """The files that are as an unfinished commit found or made them, but for the manifest: path -> hash.

    Raises:
        Failure: the journal is broken; exit code 2.
    """
    found = {}
    for path, hashes in _read_journal(out).files.items():
        with contextlib.suppress(InTheWay, NotADirectoryError):
            value = hash_file(out / path)
            if value and value in hashes and path != names.MANIFEST:
                found[path] = value
    return found


def recover(out: Path, disk: Disk) -> None:
    """Clean up after an unfinished commit, all but the journal: with that, a plan knows its files as ours."""
    if (out / names.STAGING).is_symlink():
        raise InTheWay("KG030", f"{names.STAGING} is a symbolic link", "remove the link")
    journal = _read_journal(out)
    for folder, (path, new) in journal.swaps.items():
        if hash_file(out / _COPIES / path) != new:
            _take_along(folder, out, journal, disk)
    if journal.swaps:  # the next copies are not to be taken for these
        _write_journal(dataclasses.replace(journal, swaps={}), out, disk)
    _clean(out, disk)


def commit(changes: Sequence[Change], out: Path, disk: Disk) -> None:
    """Carry out ``changes``, and leave the journal and what is old to ``finish``.

    Raises:
        Failure: a file was changed since the plan was made; the old files stand. Exit code 2.
        OSError: a system call failed; the old files stand.
    """
    parts = {
        folder: [change for change in changes if change.path.startswith(f"{folder}/")]
        for folder in _FOLDERS
    }
    parts = {folder: part for folder, part in parts.items() if part}
    try:
        _stage(changes, out, disk)
        for folder, part in parts.items():
            _copy(folder, part, out, disk)
        for change in changes:
            if hash_file(out / change.path) != change.old:
                message = "this file was changed while its successor was made"
                raise failure("KG031", change.path, message, "build again")
        files = {path: list(hashes) for path, hashes in _read_journal(out).files.items()}
        for change in changes:
            files.setdefault(change.path, []).extend((change.old, hash_text(change.text)))
        swaps = {folder: (part[-1].path, hash_text(part[-1].text)) for folder, part in parts.items()}
        journal = _Journal(files, swaps)
        _write_journal(journal, out, disk)
    except BaseException:
        with contextlib.suppress(OSError):
            _clean(out, disk)
        raise
    _carry_out(parts, journal, out, disk)


def finish(out: Path, disk: Disk) -> None:
    """Remove what a commit keeps until it is certain, and what an interrupted one left half done."""
    for path in _read_journal(out).files:
        if _part(out / path).exists():
            disk.remove(_part(out / path))
        if not os.path.lexists(out / path):
            _remove_empty(out, path, disk)
    if (out / _JOURNAL).exists():
        disk.remove(out / _JOURNAL)
    _clean(out, disk)


def _stage(changes: Sequence[Change], out: Path, disk: Disk) -> None:
    """Everything that takes space."""
    for change in changes:
        if change.text is not None:
            _make_parents(f"{_TEXTS}/{change.path}", out, disk)
            disk.write(out / _TEXTS / change.path, change.text.encode())


def _copy(folder: str, changes: Sequence[Change], out: Path, disk: Disk) -> None:
    """Make the folder as it is to be beside the one that is there."""
    copies = out / _COPIES
    _make_parents(f"{_COPIES}/{folder}", out, disk)
    _make_parents(folder, out, disk)
    if (out / folder).exists():
        _link(out / folder, copies / folder, disk)
    _apply(changes, out / _TEXTS, copies, disk)
    for place, _, _ in os.walk(copies / folder):
        disk.sync_folder(Path(place))


def _link(folder: Path, copy: Path, disk: Disk) -> None:
    """Make ``copy`` a folder of the very same files.

    Raises:
        Failure: a folder is not this user's to change, so that it could be neither replaced nor removed; exit code 2.
    """
    if not os.access(folder, os.W_OK | os.X_OK):
        hint = "make it yours, or remove it: a __pycache__ is made again when it is needed"
        raise failure("KG001", str(folder), "this folder cannot be changed by this user, nor what it is in be replaced", hint)
    disk.make_folder(copy)
    for name in sorted(os.listdir(folder)):
        place = folder / name
        with contextlib.suppress(FileNotFoundError):  # gone since the listing
            if place.is_dir() and not place.is_symlink():
                _link(place, copy / name, disk)
            else:
                _link_file(place, copy / name, disk)
    disk.copy_attributes(folder, copy)


def _link_file(old: Path, new: Path, disk: Disk) -> None:
    try:
        disk.link(old, new)
    except OSError as error:
        if not is_unsupported(error):
            raise
        disk.copy(old, new)


def _carry_out(
    parts: Mapping[str, Sequence[Change]], journal: _Journal, out: Path, disk: Disk
) -> None:
    """From the old folders to the new ones; a failure leaves the old ones."""
    swapped: list[str] = []
    changed: list[str] = []
    try:
        for folder, changes in parts.items():
            if _swap(folder, out, disk):
                swapped.append(folder)
                disk.sync_folder((out / folder).parent)
                continue
            left = {name: swap for name, swap in journal.swaps.items() if name != folder}
            journal = dataclasses.replace(journal, swaps=left)
            _write_journal(journal, out, disk)
            _keep(changes, out, disk)
            changed.append(folder)
            _apply(changes, out / _COPIES, out, disk)
    except BaseException:
        for folder in reversed(changed):
            _put_back(parts[folder], out, disk)
        for folder in reversed(swapped):
            _swap(folder, out, disk)
            _take_along(folder, out, journal, disk)
        raise
    for folder in swapped:
        _take_along(folder, out, journal, disk)


def _keep(changes: Sequence[Change], out: Path, disk: Disk) -> None:
    """Put the files that are to be changed aside, under second names."""
    for change in changes:
        if change.old:
            _make_parents(f"{_REPLACED}/{change.path}", out, disk)
            _link_file(out / change.path, out / _REPLACED / change.path, disk)


def _put_back(changes: Sequence[Change], out: Path, disk: Disk) -> None:
    """Undo ``changes`` as far as they came; what cannot be undone is for the next build, which has the journal."""
    for change in reversed(changes):
        place = out / change.path
        with contextlib.suppress(OSError, InTheWay):
            if _part(place).exists():
                disk.remove(_part(place))
            if change.old and hash_file(place) != change.old:
                _make_parents(change.path, out, disk)
                _move(out / _REPLACED / change.path, place, disk)
            elif not change.old:
                if place.exists():
                    disk.remove(place)
                _remove_empty(out, change.path, disk)


def _swap(folder: str, out: Path, disk: Disk) -> bool:
    """Exchange a folder and its copy; False: it cannot be done here."""
    try:
        disk.swap(out / _COPIES / folder, out / folder)
    except OSError as error:
        if is_unsupported(error):
            return False
        raise
    return True


def _apply(changes: Sequence[Change], source: Path, root: Path, disk: Disk) -> None:
    """Carry out the changes below ``root``, with the new files from below ``source``."""
    for change in changes:
        target = root / change.path
        if change.text is None:
            for cached in sorted((target.parent / "__pycache__").glob(f"{target.stem}.*.pyc")):
                disk.remove(cached)
            disk.remove(target)
        else:
            _make_parents(change.path, root, disk)
            _move(source / change.path, target, disk)
    for change in changes:
        if change.text is None:
            _remove_empty(root, change.path, disk)
    for folder in sorted({(root / change.path).parent for change in changes}):
        disk.sync_folder(folder)


def _move(old: Path, new: Path, disk: Disk) -> None:
    try:
        disk.rename(old, new)
    except OSError as error:
        if error.errno != errno.EXDEV:  # the folder is a mount of its own
            raise
        disk.write(_part(new), old.read_bytes())
        disk.rename(_part(new), new)


def _part(file: Path) -> Path:
    return file.with_name(f".{file.name}.kernelgen-part")


def _take_along(path: str, out: Path, journal: _Journal, disk: Disk) -> None:
    """Move over what others made, or replaced, in the old folder since it was copied; but for bytecode."""
    old = out / _COPIES / path
    if not old.is_dir() or old.name == "__pycache__":
        return
    entries = sorted(os.listdir(old))
    if not entries:
        _make_parents(f"{path}/", out, disk)
    for name in entries:
        inner = f"{path}/{name}"
        place = out / _COPIES / inner
        if place.is_dir() and not place.is_symlink():
            _take_along(inner, out, journal, disk)
        elif inner not in journal.files and _is_to_stay(place, out / inner):
            _make_parents(inner, out, disk)
            disk.rename(place, out / inner)


def _is_to_stay(one: Path, other: Path) -> bool:
    """Whether ``one`` is not the file ``other``, and came later, or is what that is a copy of."""
    try:
        there = other.lstat()
    except FileNotFoundError:
        return True
    here = one.lstat()
    if os.path.samestat(here, there):
        return False
    return here.st_ctime_ns >= there.st_ctime_ns or _is_copy(one, other)


def _is_copy(one: Path, other: Path) -> bool:
    if one.is_symlink() or other.is_symlink():
        return one.is_symlink() and other.is_symlink() and os.readlink(one) == os.readlink(other)
    return hash_file(one) == hash_file(other)


def _make_parents(path: str, root: Path, disk: Disk) -> None:
    parts = path.split("/")
    for depth in range(1, len(parts)):
        disk.make_folder(root.joinpath(*parts[:depth]))


def _remove_empty(root: Path, path: str, disk: Disk) -> None:
    """Remove the folders that the removal of ``path`` left empty."""
    folder = path.rpartition("/")[0]
    while folder not in _FOLDERS:
        for place in (root / folder / "__pycache__", root / folder):
            if place.is_dir() and not os.listdir(place):
                disk.remove_folder(place)
        folder = folder.rpartition("/")[0]


def _clean(out: Path, disk: Disk) -> None:
    """Remove everything but the journal, and with it the staging folder if there is none."""
    for part in (_TEXTS, _COPIES, _REPLACED):
        if (out / part).exists():
            disk.remove_tree(out / part)
    if (out / _NEXT_JOURNAL).exists():
        disk.remove(out / _NEXT_JOURNAL)
    staging = out / names.STAGING
    if staging.exists() and not os.listdir(staging):
        disk.remove_folder(staging)


def _write_journal(journal: _Journal, out: Path, disk: Disk) -> None:
    document = {"schema_version": SCHEMA_VERSION, **dataclasses.asdict(journal)}
    disk.write(out / _NEXT_JOURNAL, json.dumps(document, indent=1, sort_keys=True).encode())
    disk.rename(out / _NEXT_JOURNAL, out / _JOURNAL)
    disk.sync_folder(out / names.STAGING)


def _read_journal(out: Path) -> _Journal:
    hint = f"delete {names.STAGING}, look at the files, and build again"
    document = read_document(out / _JOURNAL, _JOURNAL, hint)
    if document is None:
        return _Journal({}, {})
    files, swaps = document.get("files"), document.get("swaps")
    if (
        isinstance(files, dict)
        and all(names.path_fault(path) is None for path in files)
        and all(isinstance(hashes, list) for hashes in files.values())
        and isinstance(swaps, dict)
        and set(swaps) <= set(_FOLDERS)
        and all(isinstance(swap, list) and len(swap) == 2 for swap in swaps.values())
        and all(isinstance(path, str) and path in files for path, _ in swaps.values())
    ):
        return _Journal(files, swaps)
    raise failure("KG032", _JOURNAL, "not a journal of kernelgen", hint)
