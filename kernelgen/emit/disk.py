"""The disk: what is there, and the system calls that change it."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import hashlib
import os
import shutil
import sys
from pathlib import Path
from typing import Any

from kernelgen.core.diagnostics import Failure, failure
from kernelgen.core.read import parse_json, read_file

SCHEMA_VERSION = 1
ABSENT = ""  # stands for the hash of a file that is not there
_FILE_MODE = 0o644  # whatever the umask
_FOLDER_MODE = 0o755
_AT_FDCWD = -100
_EXCHANGE = 2  # RENAME_EXCHANGE of Linux, RENAME_SWAP of macOS
_UNSUPPORTED = {errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP}
_UNSUPPORTED |= {errno.EXDEV, errno.EBUSY, errno.EPERM, errno.EMLINK}


def is_unsupported(error: OSError) -> bool:
    """Whether a link or a swap failed because the file system has none, or none across these folders."""
    return error.errno in _UNSUPPORTED


class InTheWay(Exception):
    """Something on disk that is not ours to replace: a code of the catalogue, what, and what to do about it."""

    def __init__(self, code: str, message: str, hint: str) -> None:
        self.code, self.message, self.hint = code, message, hint


def hash_text(text: str | None) -> str:
    """The hash of a file of this text; of None: that of no file."""
    return ABSENT if text is None else hashlib.sha256(text.encode()).hexdigest()


def hash_file(path: Path, through_links: bool = False) -> str:
    """The hash of what is at ``path``, or where a link there leads.

    Raises:
        InTheWay: it is not a regular file, or larger than any that a build makes.
    """
    if path.is_symlink() and not through_links:
        raise InTheWay("KG030", "not a regular file", "move it away")
    try:
        return hashlib.sha256(read_file(path)).hexdigest()
    except FileNotFoundError:
        return ABSENT
    except Failure as failed:
        raise InTheWay("KG030", failed.diagnostics[0].message, "move it away") from None


def read_document(file: Path, label: str, hint: str) -> dict[str, Any] | None:
    """The JSON object in ``file``, of our schema version; None when it is not there.

    Raises:
        Failure: it is something else; exit code 2.
    """
    try:
        document = parse_json(read_file(file))
    except FileNotFoundError:
        return None
    except ValueError:
        raise failure("KG032", label, "not a JSON document", hint) from None
    if not isinstance(document, dict) or document.get("schema_version") != SCHEMA_VERSION:
        message = f"not a document of schema version {SCHEMA_VERSION}"
        raise failure("KG032", label, message, hint)
    return document


class Disk:
    """The calls that change something, one method each, so that a test can fail or stop at each."""

    def make_folder(self, path: Path) -> None:
        """Make a folder, if there is none."""
        if not path.is_dir():
            path.mkdir(exist_ok=True)  # another build may be as far as this one
            path.chmod(_FOLDER_MODE)

    def write(self, path: Path, data: bytes) -> None:
        """Write a new file and make its content durable."""
        with path.open("wb") as stream:
            path.chmod(_FILE_MODE)
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())

    def link(self, old: Path, new: Path) -> None:
        """Give a file, or a symbolic link itself, a second name."""
        if os.link not in os.supports_follow_symlinks:
            raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP), str(old))
        os.link(old, new, follow_symlinks=False)

    def copy(self, old: Path, new: Path) -> None:
        """Make a file, or a symbolic link, that is as another one; its content is durable."""
        if old.is_symlink():
            os.symlink(os.readlink(old), new)
        elif old.is_file():
            self.write(new, old.read_bytes())
            shutil.copystat(old, new)
        else:
            raise OSError(errno.ENOTSUP, "neither a file nor a symbolic link", str(old))

    def copy_attributes(self, old: Path, new: Path) -> None:
        """Give a folder of ours the owner, mode, times and extended attributes of another."""
        wanted, found = old.stat(), new.stat()
        if (wanted.st_uid, wanted.st_gid) != (found.st_uid, found.st_gid):
            os.chown(new, wanted.st_uid, wanted.st_gid)
        shutil.copystat(old, new)

    def rename(self, old: Path, new: Path) -> None:
        """Rename a file, over another if there is one."""
        os.replace(old, new)

    def swap(self, one: Path, other: Path) -> None:
        """Exchange two folders in one step; where only one is there, it takes the name of the other."""
        if not other.exists():
            os.rename(one, other)
        elif not one.exists():
            os.rename(other, one)
        else:
            _exchange(one, other)

    def remove(self, path: Path) -> None:
        """Remove a file."""
        path.unlink()

    def remove_folder(self, path: Path) -> None:
        """Remove an empty folder."""
        path.rmdir()

    def remove_tree(self, path: Path) -> None:
        """Remove a folder with all that is in it."""
        shutil.rmtree(path)

    def sync_folder(self, path: Path) -> None:
        """Make the names in a folder durable, where the system can."""
        with contextlib.suppress(OSError):
            handle = os.open(path, os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)


def _exchange(one: Path, other: Path) -> None:
    names = os.fsencode(one), os.fsencode(other)
    try:
        libc = ctypes.CDLL(None, use_errno=True)
        if sys.platform == "darwin":
            failed = libc.renamex_np(*names, ctypes.c_uint(_EXCHANGE))
        else:
            first, second = ((ctypes.c_int(_AT_FDCWD), name) for name in names)
            failed = libc.renameat2(*first, *second, ctypes.c_uint(_EXCHANGE))
    except (AttributeError, TypeError):  # no such call; on Windows, no such library
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS), str(one)) from None
    if failed:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), str(one), None, str(other))
