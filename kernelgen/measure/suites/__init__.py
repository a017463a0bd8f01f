"""The suites of the benchmark, by name; a module each, which holds its ``SUITE``. Imports no torch.

A family may bring a suite of its own name: ``suite.py`` of its room.
"""

from __future__ import annotations

import importlib

from kernelgen.emit.rooms import laboratory, rooms_with
from kernelgen.measure.suite import Suite

NAMES = ("moe_lora", "lora", "fused_moe", "layer")


def names() -> list[str]:
    """All suites: of several families, then those of rooms."""
    return [*NAMES, *rooms_with("suite")]


def find(name: str) -> Suite:
    """The suite ``name``, one of ``names``."""
    module = importlib.import_module(f"{__name__}.{name}") if name in NAMES else laboratory(name, "suite", kind=Suite)
    suite: Suite = module.SUITE
    return suite
