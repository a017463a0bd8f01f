"""Which releases of SGLang are served: their private parts are known, each in one module, and any other SGLang keeps its own."""

from __future__ import annotations

import functools
import importlib
from types import ModuleType

from .shared.gate import Refused, Releases

__all__ = ["Refused", "seams", "seams_for"]

seams_for = Releases("SGLang", {(0, 5, 23): "seams_0_5_23"}).module_for


@functools.cache
def seams() -> ModuleType:
    """The private parts of the SGLang that is installed.

    Raises:
        Refused: they are not known.
    """
    import sglang

    return importlib.import_module(f"{__package__}.{seams_for(sglang.__version__)}")
