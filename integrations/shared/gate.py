"""What a plugin serves: releases of an engine whose private parts are known, unless it is switched off."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping

from packaging.version import InvalidVersion, Version

__all__ = ["Refused", "Releases", "interpreted", "is_on"]


class Refused(Exception):
    """Why an engine is left as it is."""


@dataclasses.dataclass(frozen=True)
class Releases:
    """The releases of an engine that are served: by the first parts of their number, the module with their private parts."""

    engine: str
    modules: Mapping[tuple[int, ...], str]

    def module_for(self, version: str) -> str:
        """The name of the module with the private parts of a release.

        Raises:
            Refused: there is none.
        """
        known = ", ".join(".".join(map(str, release)) for release in self.modules)
        try:
            parsed = Version(version)
        except InvalidVersion:
            raise Refused(f"{self.engine} {version} is no release; served are {known}") from None
        if not parsed.is_prerelease and not parsed.is_postrelease:
            for release, module in self.modules.items():
                if parsed.release[: len(release)] == release:
                    return module
        raise Refused(f"{self.engine} {version} is not known; served are {known}")


def is_on(switch: str, default: str = "1") -> bool:
    """Whether a variable of the environment is not 0."""
    return os.environ.get(switch, default) != "0"


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, on tensors of a CPU: for tests."""
    return os.environ.get("TRITON_INTERPRET") == "1"
