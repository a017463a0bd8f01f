"""Which version of a package is on the path."""

from __future__ import annotations

import importlib.metadata


def version(package: str) -> str:
    """The installed version; a folder of kernels laid out by hand has none."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "laid out"
