"""Rendered text to final text: formatted by black, and checked to be the Python that generated files may be.

Formatting costs about a millisecond a line, so results are kept in the user's cache folder by the hash of their input.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.metadata
import sys
import threading
from typing import Mapping, Sequence

from kernelgen.diagnostics import Diagnostic
from kernelgen.forks import Fault, in_processes
from kernelgen.model import Location
from kernelgen.names import PACKAGE
from kernelgen.sealed import Sealed

LINE_LENGTH = 100
_RULES = 1  # to be raised when a check below changes: older cached results are then not taken
_CACHED_FILES = 4096
_PARALLEL_FROM = 16  # files; below, starting processes costs more than it saves

_STANDARD = frozenset(
    [
        "__future__",
        "collections",
        "contextlib",
        "dataclasses",
        "enum",
        "functools",
        "importlib",
        "itertools",
        "math",
        "os",
        "sys",
        "threading",
        "types",
        "typing",
        "warnings",
        "weakref",
    ]
)
_PACKAGE_IMPORTS = _STANDARD | {"torch", "triton"}
_TEST_IMPORTS = _PACKAGE_IMPORTS | {"kernelgen", "pytest", PACKAGE}
_FORBIDDEN_NAMES = frozenset(
    [
        "__builtins__",
        "__import__",
        "breakpoint",
        "compile",
        "eval",
        "exec",
        "globals",
        "input",
        "locals",
        "open",
        "vars",
    ]
)


def finish(texts: Mapping[str, str], jobs: int) -> tuple[dict[str, str], list[Diagnostic]]:
    """Format and check every text of ``texts`` (output path -> rendered text), on up to ``jobs`` processes.

    Returns:
        Output path -> final text, and what is wrong with the others.
    """
    cache = _Cache()
    results = {path: cache.get(path, text) for path, text in texts.items()}
    new = [(path, texts[path]) for path, found in results.items() if found is None]
    faults: list[Diagnostic] = []
    for (path, raw), result in zip(new, _map(new, jobs), strict=True):
        if isinstance(result, Diagnostic):
            faults.append(result)
        elif isinstance(result, Fault):
            faults.append(Diagnostic("KG023", Location(path), f"it cannot be formatted: {result.reason}"))
        else:
            results[path] = result
            cache.put(path, raw, result)
    if new:
        cache.trim()
    return {path: text for path, text in results.items() if text is not None}, faults


def _map(new: Sequence[tuple[str, str]], jobs: int) -> list[str | Diagnostic | Fault]:
    # A fork is cheap and needs no importable main module, but is only sound in a process of one thread.
    can_fork = sys.platform == "linux" and threading.active_count() == 1
    if jobs < 2 or len(new) < _PARALLEL_FROM or not can_fork:
        return list(map(_finish, new))
    import black  # noqa: F401  (before the fork, so that it is loaded once)

    return in_processes(_finish, new, jobs)


def _finish(item: tuple[str, str]) -> str | Diagnostic:
    import black
    from black.mode import TargetVersion

    path, raw = item
    mode = black.Mode(line_length=LINE_LENGTH, target_versions={TargetVersion.PY310})
    try:
        text = black._format_str_once(raw, mode=mode)  # format_str does it twice, for rare trailing commas
    except (
        Exception
    ):  # black raises many kinds on what is not Python, and its message names no rule
        text = raw
    return check(path, text) or text


def check(path: str, text: str, rendered: bool = True) -> Diagnostic | None:
    """The first reason why ``text`` is not acceptable as the generated file ``path``, or None.

    ``rendered``: a template and a spec had a say in it; False for a copy, which may use any name, and numpy.
    """
    lines = text.split("\n")
    for number, line in enumerate(lines, 1):
        if not line.isprintable():
            return _fault(path, number, line, "a character that cannot be seen")
    try:
        tree = ast.parse(text)
    except SyntaxError as error:
        number = error.lineno or 0
        line = lines[number - 1] if 0 < number <= len(lines) else ""
        return _fault(path, number, line, f"not Python: {error.msg}", error.offset or 1)
    allowed = _PACKAGE_IMPORTS if path.startswith(f"{PACKAGE}/") else _TEST_IMPORTS
    if not rendered:
        allowed |= {"numpy"}  # which Triton's interpreter needs
    for node in ast.walk(tree):
        for module in _imports(node):
            if module.split(".")[0] not in allowed:
                message = f"import of {module}, which generated files do without"
                return _fault(path, node.lineno, lines[node.lineno - 1], message)  # type: ignore[attr-defined]
        if rendered and isinstance(node, ast.Name) and node.id in _FORBIDDEN_NAMES:
            message = f"use of {node.id}, which generated files do without"
            return _fault(path, node.lineno, lines[node.lineno - 1], message, node.col_offset + 1)
    return None


def _imports(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom) and node.level == 0:
        return [node.module or ""]
    return []


def _fault(path: str, line: int, text: str, message: str, column: int = 1) -> Diagnostic:
    where = Location(path, line, min(column, len(text) + 1), 1, text)
    return Diagnostic("KG023", where, message, "mend the template that its third line names")


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
