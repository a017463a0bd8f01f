"""The trees of earlier builds by what they were made of: a build with nothing to do reads one and compares it with the disk."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import sys
from pathlib import Path
from typing import Iterator

from kernelgen.core import locate, names
from kernelgen.core.cache import Sealed
from kernelgen.core.diagnostics import Failure
from kernelgen.core.model import Tree
from kernelgen.core.read import parse_json, read_file

_KEPT = 8  # trees, at most
_LIBRARIES = ("black", "jinja2", "pydantic", "PyYAML")


def made_of(specs: Path, *chosen: object) -> str | None:
    """A digest of all that decides a tree: what is ``chosen``, specs, templates, kernelgen and what it builds on.

    None where it cannot be told.
    """
    digest = hashlib.sha256(f"{sys.version}\0{chosen!r}\0".encode())
    try:
        for library in _LIBRARIES:
            digest.update(f"{library} {importlib.metadata.version(library)}\0".encode())
        for file in _files(specs):
            content = read_file(file)
            digest.update(f"{os.fspath(file)!r} {len(content)}\0".encode())
            digest.update(content)
    except (OSError, ValueError, Failure, importlib.metadata.PackageNotFoundError):
        return None
    return digest.hexdigest()


def _files(specs: Path) -> Iterator[Path]:
    for pattern in ("*.y*ml", "tuned/*.y*ml", "tuned/*/*.y*ml"):
        yield from sorted(specs.glob(pattern))
    for folder in locate.template_folders(specs):
        yield from sorted(file for file in folder.rglob("*") if not file.is_dir())
    for folder in locate.room_folders(specs)[:-1]:
        yield from sorted(folder.rglob("_*.py"))
    for pattern in ("*.py", "*.ini"):
        yield from sorted(Path(__file__).parent.parent.rglob(pattern))


def get(key: str | None) -> Tree | None:
    """The tree that was put under ``key``."""
    text = None if key is None else _kept().get(key)
    if text is None:
        return None
    try:
        files = parse_json(text)
        sound = all(names.path_fault(path) is None and isinstance(content, str) for path, content in files.items())
    except (ValueError, AttributeError):
        return None
    return Tree(files) if files and sound else None


def put(key: str | None, tree: Tree) -> None:
    """Keep ``tree``."""
    if key is not None:
        _kept().put(key, json.dumps(dict(tree.files)))
        _kept().trim()


def _kept() -> Sealed:
    return Sealed("trees", _KEPT)
