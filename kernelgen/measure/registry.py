"""Implementations by name: the generated package, one of its schedules, or a peer."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

from kernelgen.diagnostics import failure
from kernelgen.measure import peers
from kernelgen.measure.implementation import Implementation
from kernelgen.measure.ours import Forced, Ours


def load(name: str, package: Path) -> Implementation:
    """``kernelgen``, ``kernelgen:SCHEDULE``, or the name of a peer; ``package`` is the folder of the generated package.

    Raises:
        Failure: it cannot be imported here.
    """
    if name in peers.NAMES:
        return peers.load(name)
    module = import_package(package)
    schedule = name.partition(":")[2]
    return Ours(module, Forced(schedule) if schedule else None)


def import_package(package: Path) -> str:
    """Import the generated package in the folder ``package``; return the name, the same in all processes.

    Triton's cache on disk goes by the names of modules, among others.

    Raises:
        Failure: there is none.
    """
    folder = package.resolve()
    if not (folder / "__init__.py").is_file():
        raise failure("KG001", str(package), "not a generated package", "run kernelgen build")
    if str(folder.parent) not in sys.path:
        sys.path.insert(0, str(folder.parent))
    importlib.import_module(folder.name)
    return folder.name
