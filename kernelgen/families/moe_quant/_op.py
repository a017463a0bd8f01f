"""Rows between the two products of a base MoE layer to FP8 numbers."""

from __future__ import annotations

import torch

from .. import _runtime as runtime
from ..moe_align._op import MoeTables
from ._problem import OP, Given, check, choose
from ._table import VARIANTS


def moe_quant(codes: torch.Tensor, scale: torch.Tensor, x: torch.Tensor, tables: MoeTables, *, order: str = "sorted") -> None:
    """Rows of local pairs as FP8 numbers ``codes``, each of which stands for it times its ``scale``; others keep their bytes.

    A scale is the largest magnitude of its numbers over the largest FP8 number, as ``quantize_activations`` makes them.

    Args:
        codes: [T * top_k, N] float8_e4m3fn or float8_e5m2, last stride 1.
        scale: float32, contiguous: [T * top_k, 1] or [T * top_k, ceil(N / group_k)], which are written; or [1], or [E] of the
            expert of each row, which is read: what is beyond the largest FP8 number times it saturates.
        x: [T * top_k, N] bfloat16, last stride 1.
        tables: from ``moe_align``; with ``order="pair"`` also from ``no_tables``.
        order: where the row of a pair stands: at its place in the tables ("sorted") or at the "pair" itself.

    Raises:
        ValueError: something does not fit, or no variant serves it; nothing was launched.
    """
    (_in_graphs if torch.compiler.is_compiling() else _apply)(codes, scale, x, tables, order)


def bind(given: Given, op: str = "moe_quant") -> runtime.Call:
    """The launch for calls that look like this one, of ``op``.

    Raises:
        ValueError: as ``moe_quant``.
    """
    problem = check(op, given)
    by_table, dtype = given.order == "sorted", given.x.dtype
    variant = VARIANTS.get(op, torch_dtype=dtype, by_table=by_table, x_scales=problem.x_scales)
    if problem.num_pairs == 0:
        return runtime.NOTHING
    call: runtime.Call = variant.bind(problem, choose(problem))
    return call


_apply = OP.caller(bind)
_in_graphs = OP.in_graphs(_apply)
