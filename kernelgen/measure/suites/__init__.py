"""The suites of the benchmark, by name; a module each, which holds its ``SUITE``. Imports no torch."""

from __future__ import annotations

import importlib

from kernelgen.measure.suite import Suite

NAMES = ("moe_lora", "lora", "fused_moe", "layer")


def find(name: str) -> Suite:
    """The suite ``name``, one of ``NAMES``."""
    suite: Suite = importlib.import_module(f"{__name__}.{name}").SUITE
    return suite
