"""Which version of a peer is on the path, and what to say where there is none."""

from __future__ import annotations

import importlib.metadata

from kernelgen.diagnostics import Failure, failure


def version(package: str) -> str:
    """The installed version; a folder of kernels laid out by hand has none."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "laid out"


def unavailable(peer: str, error: ImportError) -> Failure:
    """What is raised where ``peer`` cannot be imported."""
    return failure("KG071", peer, f"it cannot be imported: {error}", "install it, or put its kernels on PYTHONPATH")
