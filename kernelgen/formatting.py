"""Rendered text to final text: checked to be the Python that generated files may be, and formatted by black.

Formatting costs about a millisecond a line, so results are kept in the user's cache folder by the hash of their input.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import sys
import threading
from typing import Mapping, Sequence

from kernelgen import lint
from kernelgen.diagnostics import Diagnostic
from kernelgen.forks import Fault, in_processes
from kernelgen.model import Location
from kernelgen.progress import progress
from kernelgen.sealed import Sealed

LINE_LENGTH = 100
_RULES = 2  # to be raised when a check changes: older cached results are then not taken
_CACHED_FILES = 4096
_PARALLEL_FROM = 16  # files; below, starting processes costs more than it saves


def finish(texts: Mapping[str, str], jobs: int, only_check: bool = False) -> tuple[dict[str, str], list[Diagnostic]]:
    """Check every text of ``texts`` (output path -> rendered text), and format it, on up to ``jobs`` processes.

    Args:
        texts: output path -> rendered text.
        jobs: processes, at most.
        only_check: there are faults already: nothing is formatted, which takes longer than all else.

    Returns:
        Output path -> final text, and what is wrong with the others.
    """
    cache = _Cache()
    results = {path: cache.get(path, text) for path, text in texts.items()}
    new = [(path, texts[path]) for path, found in results.items() if found is None]
    faults: list[Diagnostic] = []
    for (path, raw), result in zip(new, map(_check, new) if only_check else _map(new, jobs), strict=True):
        if isinstance(result, Fault):
            faults.append(Diagnostic("KG023", Location(path), f"it cannot be formatted: {result.reason}"))
        elif isinstance(result, str):
            results[path] = result
            cache.put(path, raw, result)
        else:
            faults += result
    if new:
        cache.trim()
    return {path: text for path, text in results.items() if text is not None}, faults


def _map(new: Sequence[tuple[str, str]], jobs: int) -> list[str | list[Diagnostic] | Fault]:
    shown = progress("formatting", lines=False)
    # A fork is cheap and needs no importable main module, but is only sound in a process of one thread.
    can_fork = sys.platform == "linux" and threading.active_count() == 1
    if jobs < 2 or len(new) < _PARALLEL_FROM or not can_fork:
        return list(shown(map(_finish, new), len(new)))
    import black  # noqa: F401  (before the fork, so that it is loaded once)

    return in_processes(_finish, new, jobs, shown)


def _check(item: tuple[str, str]) -> list[Diagnostic]:
    return lint.faults(*item)


def _finish(item: tuple[str, str]) -> str | list[Diagnostic] | Fault:
    faults = _check(item)
    if faults:
        return faults
    import black
    from black.mode import TargetVersion

    mode = black.Mode(line_length=LINE_LENGTH, target_versions={TargetVersion.PY310})
    try:
        text: str = black._format_str_once(item[1], mode=mode)  # format_str does it twice, for rare trailing commas
    except Exception as error:  # black raises many kinds
        return Fault(f"{type(error).__name__}: {error}")
    return text


class _Cache:
    """Final texts by what they were made of."""

    def __init__(self) -> None:
        self.texts = Sealed("format", _CACHED_FILES)
        self.rules = f"black {importlib.metadata.version('black')}, rules {_RULES}"

    def _key(self, path: str, raw: str) -> str:
        # The path decides which imports are allowed, so it is part of the key.
        return hashlib.sha256("\0".join((self.rules, path, raw)).encode()).hexdigest()

    def get(self, path: str, raw: str) -> str | None:
        return self.texts.get(self._key(path, raw))

    def put(self, path: str, raw: str, text: str) -> None:
        self.texts.put(self._key(path, raw), text)

    def trim(self) -> None:
        self.texts.trim()
