"""Texts that can be made again, in a folder of the user's cache, each behind a digest of itself.

Not being able to read or write them costs time, nothing else.
"""

from __future__ import annotations

import contextlib
import hashlib
import os

from kernelgen import locate


class Sealed:
    """The texts of one folder, by keys that are names of files; ``most``: when there are more, ``trim`` drops the older half."""

    def __init__(self, folder: str, most: int) -> None:
        self.folder = locate.cache_folder() / folder
        self.most = most

    def get(self, key: str) -> str | None:
        """The text that was put under ``key``, if it is whole."""
        try:
            seal, _, text = (self.folder / key).read_text("utf-8").partition("\n")
        except (OSError, UnicodeDecodeError):
            return None
        return text if seal == _seal(text) else None

    def put(self, key: str, text: str) -> None:
        """Keep ``text``."""
        file = self.folder / key
        part = file.with_name(f"{file.name}.{os.getpid()}")
        with contextlib.suppress(OSError):
            self.folder.mkdir(parents=True, exist_ok=True)
            part.write_text(f"{_seal(text)}\n{text}", "utf-8")
            part.replace(file)

    def trim(self) -> None:
        """Drop the older half once there are too many."""
        with contextlib.suppress(OSError):
            files = sorted(self.folder.iterdir(), key=lambda file: file.stat().st_mtime)
            if len(files) > self.most:
                for file in files[: len(files) // 2]:
                    file.unlink()


def _seal(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
