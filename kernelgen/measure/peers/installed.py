"""What peers have in common: how they are found, which version they are, and what none of them does."""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
from types import ModuleType
from typing import Any, Callable

import torch

from kernelgen.core.diagnostics import failure
from kernelgen.measure.suites import fused_moe
from kernelgen.measure.workload import Unsupported


class Peer:
    """An implementation of another system; ``name`` is that of its package, too."""

    name: str

    def versions(self) -> dict[str, str]:
        """The installed version; a folder of kernels laid out by hand has none."""
        try:
            return {self.name: importlib.metadata.version(self.name)}
        except importlib.metadata.PackageNotFoundError:
            return {self.name: "laid out"}

    def release(self) -> None:
        """Nothing hangs on weights."""

    def module(self, path: str) -> ModuleType:
        """A module of it.

        Raises:
            Failure: it cannot be imported.
        """
        try:
            return importlib.import_module(path)
        except ImportError as error:
            hint = "install it, or put its kernels on PYTHONPATH"
            raise failure("KG071", self.name, f"it cannot be imported: {error}", hint) from error


GROUPS, MXFP4 = ("group", "group"), ("mx", "none")
_FORMS = {GROUPS: "FP8 in groups", MXFP4: "MXFP4 weights"}


def layer_only(cell: fused_moe.Cell, *forms: tuple[str, str]) -> bool:
    """What peers do about cells of the base MoE: whole layers with a gate, of 16 bits or of ``forms`` (weights, activations).

    Returns whether it is of one of ``forms``.

    Raises:
        Unsupported: it is another cell.
    """
    if cell.site != "layer" or not cell.model.gated:
        raise Unsupported("whole layers with a gate only")
    form = (cell.quant, cell.act)
    if form not in (("none", "none"), *forms):
        raise Unsupported(", or ".join(["16-bit operands", *(_FORMS[served] for served in forms)]) + " only")
    return form != ("none", "none")


def operator(path: str) -> Callable[..., None]:
    """A C++ operator of torch.ops, called with None for what its schema has beside the arguments that are given."""
    found: Any = functools.reduce(getattr, path.split("."), torch.ops).default
    count = len(found._schema.arguments)

    def call(*arguments: Any) -> None:
        found(*arguments, *[None] * (count - len(arguments)))

    return call


def refuse_fp8(*scales: str) -> None:
    """What peers do about FP8 operands of LoRA: none of them applies the scales of its weights right.

    Raises:
        Unsupported: there are such operands.
    """
    if any(kind != "none" for kind in scales):
        raise Unsupported("16-bit operands only")
