"""Compiling without a GPU: a driver that names a target to Triton, and the generated package, imported for it."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Iterator

import triton
from triton.backends.compiler import GPUTarget

from kernelgen.core import names
from kernelgen.core.diagnostics import Diagnostic, Failure, failure
from kernelgen.core.locate import place_below
from kernelgen.core.model import Location
from kernelgen.core.targets import TARGETS, Target


class Driver:
    """As much of a driver of Triton's as compiling asks for. Every target is a device of its own, as caches go by device."""

    def __init__(self, target: Target) -> None:
        self._target = GPUTarget(target.backend, target.arch, target.warp_size)
        self._device = list(TARGETS).index(target.name)

    def get_current_device(self) -> int:
        return self._device

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return self._target


@contextlib.contextmanager
def compiling_for(target: Target) -> Iterator[None]:
    """Inside, Triton compiles for ``target``; nothing can be launched."""
    # reset_active() would ask for a real driver, so what was active is put back by hand.
    config = triton.runtime.driver
    before = config._active
    config.set_active(Driver(target))
    try:
        yield
    finally:
        config._active = before


def import_package(out: Path, interpreted: bool = False) -> ModuleType:
    """The generated package below the folder ``out``, under a name that cannot meet another copy of it.

    Args:
        out: the folder.
        interpreted: whether its kernels may be interpreted, as for those who only ask what would be launched.

    Raises:
        Failure: it is not there or cannot be imported, or kernels are interpreted in this process; exit code 2.
    """
    if triton.knobs.runtime.interpret and not interpreted:
        message = "kernels are interpreted, so there is nothing to compile"
        raise failure("KG050", "TRITON_INTERPRET", message, "unset TRITON_INTERPRET")
    folder = (out / names.PACKAGE).resolve()
    file = folder / "__init__.py"
    if not file.is_file():
        raise failure("KG001", str(file), "there is no generated package", "run kernelgen build")
    name = f"{names.PACKAGE}_{hashlib.sha256(str(folder).encode()).hexdigest()[:12]}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(
        name, file, submodule_search_locations=[str(folder)]
    )
    assert spec is not None and spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except BaseException as error:
        del sys.modules[name]
        if not isinstance(error, Exception):
            raise
        message = f"it cannot be imported: {type(error).__name__}: {error}"  # a template can be wrong in any way
        where = place_below(error, folder) or Location(str(file))
        raise Failure([Diagnostic("KG061", where, message)], exit_code=2) from error
    return module
