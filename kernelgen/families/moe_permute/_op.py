"""FP8 rows of tokens in the order of the tables of a base MoE layer."""

from __future__ import annotations

import torch

from .. import _runtime as runtime
from ..moe_align._op import MoeTables
from ._problem import OP, Given, check, choose
from ._table import VARIANTS


def moe_permute(
    out: torch.Tensor, out_scale: torch.Tensor, x: torch.Tensor, x_scale: torch.Tensor, tables: MoeTables
) -> None:
    """Row i of ``out``, and its scales, are those of the token whose pair is at place i of the tables; others keep their bytes.

    What comes in front of ``moe_gemm(..., x_rows="sorted", out_rows="sorted")``, whose copies of x are then boxes.

    Args:
        out: [T * top_k, K], the dtype of x, last stride 1.
        out_scale: float32, contiguous: [T * top_k, 1] or [T * top_k, ceil(K / group_k)], as x_scale.
        x: [T, K] float8_e4m3fn or float8_e5m2, last stride 1.
        x_scale: float32 or float8_e8m0fnu: [T, 1] or [T, ceil(K / group_k)], which may lie column by column.
        tables: from ``moe_align``.

    Raises:
        ValueError: something does not fit, or no variant serves it; nothing was launched.
    """
    (_in_graphs if torch.compiler.is_compiling() else _apply)(out, out_scale, x, x_scale, tables)


def bind(given: Given, op: str = "moe_permute") -> runtime.Call:
    """The launch for calls that look like this one, of ``op``.

    Raises:
        ValueError: as ``moe_permute``.
    """
    problem = check(op, given)
    variant = VARIANTS.get(op, x_scales=problem.x_scales)
    if problem.num_pairs == 0:
        return runtime.NOTHING
    call: runtime.Call = variant.bind(problem, choose(problem))
    return call


_apply = OP.caller(bind)
_in_graphs = OP.in_graphs(_apply)
