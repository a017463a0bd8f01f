"""What is replaced in vLLM before a model is made, without importing anything of it: that would be too early."""

from __future__ import annotations

import importlib.abc
import importlib.util
import sys
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

__all__ = ["choose_mxfp4_experts", "when_imported"]


def when_imported(name: str, action: Callable[[ModuleType], None]) -> None:
    """Have ``action`` called with a module: now, if it is imported, or else as it will be."""
    if name in sys.modules:
        action(sys.modules[name])
    else:
        sys.meta_path.insert(0, _Finder(name, action))


class _Finder(importlib.abc.MetaPathFinder):
    def __init__(self, name: str, action: Callable[[ModuleType], None]) -> None:
        self._name, self._action = name, action

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != self._name:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is None or spec.loader is None:
            return None
        own = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            own(module)
            self._action(module)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def choose_mxfp4_experts(module: Any) -> None:
    """Have ``mxfp4.choice`` asked in front of vLLM's own choice of the kernels of experts in MXFP4."""
    own = getattr(module, "select_mxfp4_moe_backend", None)
    if own is None:
        return

    def select_mxfp4_moe_backend(config: Any, *given: Any, **more: Any) -> Any:
        from . import mxfp4

        return mxfp4.choice(config) or own(config, *given, **more)

    module.select_mxfp4_moe_backend = select_mxfp4_moe_backend
