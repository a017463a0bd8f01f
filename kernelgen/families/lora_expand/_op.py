"""The second product of dense LoRA."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from .. import _operands as operands
from .. import _runtime as runtime
from ..lora_shrink._problem import kind_of_scales
from ..moe_route._op import MoeRoute
from ._problem import OP, Given, Operands, choose, problem_of
from ._table import QUANT, VARIANTS


def lora_expand(
    out: torch.Tensor,
    y: torch.Tensor,
    lora_b: Sequence[torch.Tensor],
    route: MoeRoute,
    *,
    offset_start: int = 0,
    columns: Sequence[int] | None = None,
    column_stride: int = 1,
    add_inputs: bool = True,
    b_scale: Sequence[torch.Tensor] | None = None,
) -> None:
    """Columns of a batch from its rank vectors: out[t, columns of s] (+)= y[s, t] . B_s[l]^T, for every token t of an adapter l.

    y is rounded to the dtype of ``lora_b`` in front of the product (FP8: to that of ``out``, or bfloat16). Rows of other tokens,
    and columns in front of the first slice and behind the last, keep their bytes.

    Args:
        out: [T, *] bfloat16, float16 or float32, last stride 1.
        y: contiguous [S, T, rank] float32, or in the dtype of ``lora_b``; rows of tokens without an adapter are not read.
        lora_b: S tensors [L, N_s, rank] (or [L, 1, N_s, rank]) in the dtype of ``out``, bfloat16 or float16 where that is
            float32; widths N_s and strides over L are free.
        route: from ``lora_route``.
        offset_start: column of ``out`` where the first slice begins; each other begins where the one before it ends.
        columns: in place of it, the column of ``out`` where each slice begins.
        column_stride: from one column of a slice to the next, in ``out``: columns=(0, 1), column_stride=2 for interleaved ones.
        add_inputs: add to ``out``, or overwrite.
        b_scale: S tensors float32, for FP8 weights (float8_e4m3fn or float8_e5m2): [L]; or [L, N_s], with a last dimension of 1
            or without; or [L, ceil(N_s / group_n), ceil(rank / group_k)].

    Raises:
        ValueError: something does not fit, or no variant serves it; nothing was launched.
    """
    columns = tuple(columns) if isinstance(columns, list) else columns
    where = (offset_start, columns, column_stride)
    (_in_graphs if torch.compiler.is_compiling() else _apply)(out, y, lora_b, route, 1.0, *where, add_inputs, b_scale)  # type: ignore[arg-type]


def _bind(given: Given) -> runtime.Call:
    sizes, route = OP.check("lora_expand", given), given.route
    problem = problem_of("lora_expand", operands.part_of(Operands, given), sizes, mode_of("lora_expand", given))
    dtype = sizes.get("D") or torch.bfloat16  # of FP8 weights, in front of an out in fp32
    variant = variant_of("lora_expand", dtype, given.add_inputs, problem.rank, problem.weight_scales)
    if problem.num_tokens == 0:
        return runtime.NOTHING
    call: runtime.Call = variant.bind(problem, route, choose(problem, route))
    return call


def mode_of(op: str, given: Any) -> str | None:
    """Of what FP8 factors of such a call have a scale each, by the shapes.

    Raises:
        ValueError: no mode has scales of such shapes.
    """
    return None if given.b_scale is None else kind_of_scales(op, "b_scale", given.b_scale, given.lora_b, QUANT)


def variant_of(
    op: str, dtype: torch.dtype, add_inputs: bool, rank: int, weight_scales: str | None
) -> Any:
    """The variant of the smallest rank bucket that holds the rank."""
    return VARIANTS.get(op, torch_dtype=dtype, adds=add_inputs, rank=rank, weight_scales=weight_scales)


_apply = OP.caller(_bind)
_in_graphs = OP.in_graphs(_apply)
