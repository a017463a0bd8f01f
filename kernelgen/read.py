"""Reading files that anybody may name: a device has no end, a pipe may have no writer, and memory is finite."""

from __future__ import annotations

import stat
from pathlib import Path

from kernelgen.diagnostics import failure

MAX_DOCUMENT = 64 << 20  # bytes of a JSON document


def read_file(file: Path, most: int = MAX_DOCUMENT) -> bytes:
    """What a regular file of at most ``most`` bytes holds.

    Raises:
        OSError: it is not there, or cannot be read.
        Failure: it is something else, or is larger; exit code 2.
    """
    if not stat.S_ISREG(file.stat().st_mode):
        raise failure("KG001", str(file), "not a regular file", "name one")
    with file.open("rb") as stream:
        content = stream.read(most + 1)
    if len(content) > most:
        hint = "name another: none that is read here is so large"
        raise failure("KG004", str(file), f"larger than {most} bytes", hint)
    return content
