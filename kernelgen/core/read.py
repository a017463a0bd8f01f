"""Reading files that anybody may name: a device has no end, a pipe may have no writer, and memory is finite."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any, BinaryIO

from kernelgen.core.diagnostics import failure

MAX_DOCUMENT = 64 << 20  # bytes of a JSON document
_FLAGS = os.O_RDONLY | getattr(os, "O_BINARY", 0) | getattr(os, "O_NONBLOCK", 0)  # a pipe is not waited for


def open_file(file: Path) -> BinaryIO:
    """A regular file, to be read.

    Raises:
        OSError: it is not there, or cannot be read.
        Failure: it is something else; exit code 2.
    """
    handle = os.open(file, _FLAGS)
    if not stat.S_ISREG(os.fstat(handle).st_mode):  # of what was opened: the name may stand for another by now
        os.close(handle)
        raise failure("KG001", str(file), "not a regular file", "name one")
    return os.fdopen(handle, "rb")


def read_file(file: Path, most: int = MAX_DOCUMENT) -> bytes:
    """What a regular file of at most ``most`` bytes holds.

    Raises:
        OSError: it is not there, or cannot be read.
        Failure: it is something else, or is larger; exit code 2.
    """
    with open_file(file) as stream:
        content = stream.read(most + 1)
    if len(content) > most:
        hint = "name another: none that is read here is so large"
        raise failure("KG004", str(file), f"larger than {most} bytes", hint)
    return content


def parse_json(text: bytes | str) -> Any:
    """The value that ``text`` is in JSON.

    Raises:
        ValueError: it is not JSON, or is nested deeper than it can be read.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deep") from None
