"""Workloads and implementations by name: those of the generated package, and the peers."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any, Callable

import torch

from kernelgen.emit.rooms import laboratory
from kernelgen.measure import peers, suites
from kernelgen.measure.suite import OURS
from kernelgen.measure.workload import Implementation, Workload


def workload(
    suite: str, device: torch.device, count: int | None = None, on_free: Callable[[], None] = lambda: None
) -> Workload:
    """The workload of a suite; see ``Workload``."""
    made: Workload = _module(suite).Workload(device, count, on_free)
    return made


def load(suite: str, name: str, package: Path) -> Implementation:
    """``kernelgen``, ``kernelgen:FORM``, or the name of a peer; ``package`` is the folder of the generated package.

    Raises:
        Failure: it cannot be imported here.
    """
    ours, _, form = name.partition(":")
    if ours != OURS:
        return peers.load(name, suite)
    made: Implementation = _module(suite).Ours(package, form)
    return made


def _module(suite: str) -> Any:
    if suite in suites.NAMES:
        return importlib.import_module(f"kernelgen.measure.workloads.{suite}")
    return laboratory(suite, "workload")
