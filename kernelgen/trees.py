"""The trees of earlier builds by what they were made of, in the user's cache folder.

A build that has nothing to do reads the tree there and compares it with the disk. Not being able to read or write it
costs time, nothing else.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import os
import sys
from pathlib import Path
from typing import Iterator

from kernelgen import locate
from kernelgen.model import Tree

_KEPT = 8  # trees
_MOST_BYTES = 8 << 20  # of a file that decides a tree
_LIBRARIES = ("black", "jinja2", "pydantic", "PyYAML")


def made_of(specs: Path, only: str | None) -> str | None:
    """A digest of all that decides a tree: specs, templates, kernelgen and what it builds on; None where it cannot be told."""
    digest = hashlib.sha256(f"{sys.version}\0{only}\0".encode())
    try:
        for library in _LIBRARIES:
            digest.update(f"{library} {importlib.metadata.version(library)}\0".encode())
        for file in _files(specs):
            if not file.is_file() or file.stat().st_size > _MOST_BYTES:
                return None
            content = file.read_bytes()
            digest.update(f"{os.fspath(file)!r} {len(content)}\0".encode())
            digest.update(content)
    except (OSError, ValueError, importlib.metadata.PackageNotFoundError):
        return None
    return digest.hexdigest()


def _files(specs: Path) -> Iterator[Path]:
    for folder in (specs, specs / "tuned"):
        yield from sorted(folder.glob("*.y*ml"))
    for folder in locate.template_folders(specs):
        yield from sorted(file for file in folder.rglob("*") if not file.is_dir())
    yield from sorted(Path(__file__).parent.rglob("*.py"))


def get(key: str | None) -> Tree | None:
    """The tree that was put under ``key``."""
    if key is None:
        return None
    try:
        seal, _, text = _file(key).read_text("utf-8").partition("\n")
        if seal == _seal(text):
            return Tree(**json.loads(text))
    except (OSError, ValueError, TypeError):
        pass
    return None


def put(key: str | None, tree: Tree) -> None:
    """Keep ``tree``, and only so many of the others."""
    if key is None:
        return
    file, text = _file(key), json.dumps({"files": dict(tree.files), "partial": tree.partial})
    part = file.with_name(f"{file.name}.{os.getpid()}")
    with contextlib.suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(f"{_seal(text)}\n{text}", "utf-8")
        part.replace(file)
        newest = sorted(file.parent.iterdir(), key=lambda known: known.stat().st_mtime, reverse=True)
        for old in newest[_KEPT:]:
            old.unlink()


def _file(key: str) -> Path:
    return locate.cache_folder() / "trees" / key


def _seal(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
