"""What the modules have that generated files import, known without importing torch or triton.

``members.ini`` has the public names of every release that pyproject.toml allows. ``python -m kernelgen.emit.members`` prints it
with those of the installed releases added.
"""

from __future__ import annotations

import configparser
import functools
import importlib
import sys
import textwrap
from pathlib import Path
from typing import Mapping

_FILE = Path(__file__).with_suffix(".ini")
_SECTION = "members"


@functools.cache
def _listed() -> Mapping[str, frozenset[str]]:
    parser = configparser.ConfigParser(delimiters="=")
    parser.read(_FILE, "utf-8")
    return {module: frozenset(names.split()) for module, names in parser[_SECTION].items()}


@functools.cache
def members(module: str) -> frozenset[str] | None:
    """The public names of ``module``; None where there is no such module, or they are not known."""
    if module.split(".")[0] in sys.stdlib_module_names:
        return installed(module) or None
    return _listed().get(module)


def installed(module: str) -> frozenset[str]:
    """The public names that ``module`` has here; none where it cannot be imported."""
    try:
        return frozenset(name for name in dir(importlib.import_module(module)) if not name.startswith("_"))
    except ImportError:
        return frozenset()


def listing() -> str:
    """``members.ini``, with the names that are installed here."""
    lines = [f"[{_SECTION}]"]
    for module, known in _listed().items():
        names = " ".join(sorted(known | installed(module)))
        lines += [f"{module} =", textwrap.indent(textwrap.fill(names, 116, break_on_hyphens=False), "    ")]
    return "\n".join(lines)


if __name__ == "__main__":
    print(listing())
