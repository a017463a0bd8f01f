"""Texts that can be made again, in a folder of the user's cache, each behind a seal that only this user can make.

Whoever can write into the folder cannot put a text of their own in front of a build: the key of the seals is a file that nobody
else can read, and a key that is not so is not used. Not being able to read or write any of this costs time, nothing else.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import hmac
import os
import secrets
import stat
from pathlib import Path

from kernelgen.core import locate
from kernelgen.core.diagnostics import Failure
from kernelgen.core.read import read_file
from kernelgen.core.write import replace_file

_KEY_FILE = "key"
_KEY_BYTES = 32


class Sealed:
    """The texts of one folder, by keys that are names of files; ``most``: when there are more, ``trim`` drops the older half."""

    def __init__(self, folder: str, most: int) -> None:
        self.folder = locate.cache_folder() / folder
        self.most = most

    def get(self, key: str) -> str | None:
        """The text that was put under ``key``, if it is whole and was put there by this user."""
        try:
            seal, _, text = read_file(self.folder / key).decode().partition("\n")
        except (OSError, UnicodeDecodeError, Failure):
            return None
        wanted = self._seal(key, text)
        return text if wanted is not None and hmac.compare_digest(seal.encode(), wanted.encode()) else None

    def put(self, key: str, text: str) -> None:
        """Keep ``text``."""
        seal = self._seal(key, text)
        if seal is not None:
            with contextlib.suppress(OSError):
                self.folder.mkdir(parents=True, exist_ok=True)
                replace_file(self.folder / key, f"{seal}\n{text}")

    def trim(self) -> None:
        """Drop the older half once there are too many."""
        with contextlib.suppress(OSError):
            files = sorted(self.folder.iterdir(), key=lambda file: file.stat().st_mtime)
            if len(files) > self.most:
                for file in files[: len(files) // 2]:
                    file.unlink()

    def _seal(self, key: str, text: str) -> str | None:
        secret = _secret(self.folder.parent)
        content = f"{self.folder.name}/{key}\n{text}".encode("utf-8", "surrogatepass")
        return None if secret is None else hmac.new(secret, content, hashlib.sha256).hexdigest()


@functools.cache
def _secret(folder: Path) -> bytes | None:
    """The key of this user's seals in ``folder``, made where there is none; None: there can be none."""
    file = folder / _KEY_FILE
    with contextlib.suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        if not _read(file):
            # Of two that do it at the same time, one makes seals that nobody takes.
            replace_file(file, secrets.token_bytes(_KEY_BYTES), 0o600)
        return _read(file)
    return None


def _read(file: Path) -> bytes | None:
    """The key in ``file``, if it is whole, and nobody else could read or write it."""
    with contextlib.suppress(OSError):
        found = file.lstat()
        is_own = not hasattr(os, "getuid") or (found.st_uid == os.getuid() and not found.st_mode & 0o077)
        if is_own and stat.S_ISREG(found.st_mode) and found.st_size == _KEY_BYTES:
            return file.read_bytes()
    return None
