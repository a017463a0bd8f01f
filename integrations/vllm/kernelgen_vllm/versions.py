"""Which releases of vLLM are served: their private parts are known, each in one module, and any other vLLM keeps its own."""

from __future__ import annotations

import functools
import importlib
from types import ModuleType

from .shared.gate import Refused, Releases

__all__ = ["MXFP4", "Refused", "seams", "seams_for"]

MXFP4 = "KERNELGEN_VLLM_MXFP4"  # the switch for experts in MXFP4
seams_for = Releases("vLLM", {(0, 32): "seams_0_32", (0, 33): "seams_0_32"}).module_for


@functools.cache
def seams() -> ModuleType:
    """The private parts of the vLLM that is installed.

    Raises:
        Refused: they are not known, or not as they are known to be.
    """
    import vllm

    return importlib.import_module(f"{__package__}.{seams_for(vllm.__version__)}")
