"""Writing a file in one step: whoever reads it, and whatever ends the writing, sees the old one or the new one."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path


def replace_file(file: Path, content: str | bytes, mode: int = 0o666) -> None:
    """Put ``content`` at ``file``, text in UTF-8; where that fails nothing is left of it.

    Raises:
        OSError: it cannot be written.
    """
    part = file.with_name(f"{file.name}.{os.getpid()}")
    try:
        with os.fdopen(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | getattr(os, "O_BINARY", 0), mode), "wb") as stream:
            stream.write(content.encode() if isinstance(content, str) else content)
        os.replace(part, file)
    except BaseException:
        with contextlib.suppress(OSError):
            part.unlink()
        raise
