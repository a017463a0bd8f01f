"""What linear layers call, as ops that a graph of torch.compile sees nothing of.

Inside, Python runs at each step, so that a step without adapters launches nothing, and tiles fit the rows that there are.
"""

from __future__ import annotations

from typing import Any

import torch

from . import kernels as kg
from .kernels import _runtime as runtime
from .rows import Rows

__all__ = ["expand", "linear", "shrink"]

Slices = list[torch.Tensor]


def _linear(out: torch.Tensor, x: torch.Tensor, a: Slices, b: Slices, scaling: float, add: bool, rows: Rows) -> None:
    if rows.any:
        kg.lora(out, x, a, b, rows.first(x.shape[0]), scaling=scaling, add_inputs=add)


def _shrink(y: torch.Tensor, x: torch.Tensor, a: Slices, scaling: float, rows: Rows) -> None:
    if rows.any:
        kg.lora_shrink(y, x, a, rows.first(x.shape[0]), scaling=scaling, zero_rest=True)
    else:
        y.zero_()


def _expand(out: torch.Tensor, y: torch.Tensor, b: Slices, offset: int, add: bool, rows: Rows) -> None:
    if rows.any:
        kg.lora_expand(out, y, b, rows.first(y.shape[1]), offset_start=offset, add_inputs=add)


def _op(schema: str, function: Any) -> Any:
    """``function``, whose last argument is of the class Rows; in a graph as an op that takes their handle."""
    in_graph = runtime.op(f"{schema[:-1]}, Tensor rows) -> ()", lambda *given: function(*given[:-1], Rows.of(given[-1])))

    def call(*given: Any) -> None:
        if torch.compiler.is_compiling():
            in_graph(*given[:-1], given[-1].handle)
        else:
            function(*given)

    return call


linear = _op("linear(Tensor(a!) out, Tensor x, Tensor[] a, Tensor[] b, float scaling, bool add)", _linear)
shrink = _op("shrink(Tensor(a!) y, Tensor x, Tensor[] a, float scaling)", _shrink)
expand = _op("expand(Tensor(a!) out, Tensor y, Tensor[] b, int offset, bool add)", _expand)
