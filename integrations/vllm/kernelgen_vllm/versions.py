"""Which releases of vLLM are served: their private parts are known, each in one module, and any other vLLM keeps its own."""

from __future__ import annotations

import functools
import importlib
from types import ModuleType

from packaging.version import InvalidVersion, Version

# By (major, minor): the module with the private parts of that release.
SEAMS = {(0, 32): "seams_0_32", (0, 33): "seams_0_32"}


class Refused(Exception):
    """Why vLLM is left as it is."""


def seams_for(version: str) -> str:
    """The name of the module with the private parts of a release.

    Raises:
        Refused: there is none.
    """
    known = ", ".join(f"{major}.{minor}" for major, minor in SEAMS)
    try:
        parsed = Version(version)
    except InvalidVersion:
        raise Refused(f"vLLM {version} is no release; served are {known}") from None
    if parsed.is_prerelease or parsed.release[:2] not in SEAMS:
        raise Refused(f"vLLM {version} is not known; served are {known}")
    return SEAMS[parsed.release[:2]]  # type: ignore[index]


@functools.cache
def seams() -> ModuleType:
    """The private parts of the vLLM that is installed.

    Raises:
        Refused: they are not known, or not as they are known to be.
    """
    import vllm

    module = importlib.import_module(f"{__package__}.{seams_for(vllm.__version__)}")
    return module
