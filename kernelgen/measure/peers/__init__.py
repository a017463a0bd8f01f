"""The systems to compare with, each called as it calls itself: a module each, of its name, with a class for each suite.

A peer is what is importable under its own name: an installation, or its kernels laid out in a folder on PYTHONPATH.
"""

from __future__ import annotations

import importlib
from typing import Mapping

from kernelgen.measure.workload import Implementation


def load(name: str, suite: str) -> Implementation:
    """The peer ``name`` for the cells of ``suite``, which counts it among its peers.

    Raises:
        Failure: it is not importable here.
    """
    classes: Mapping[str, type[Implementation]] = importlib.import_module(f"{__name__}.{name}").PEERS
    return classes[suite]()
