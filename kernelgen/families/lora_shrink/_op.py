"""The first product of dense LoRA."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from .. import _operands as operands
from .. import _runtime as runtime
from .._scales import find_x_mode
from ..moe_route._op import MoeRoute
from ._problem import (
    OP,
    Given,
    Modes,
    Operands,
    choose,
    kind_of_scales,
    problem_of,
)
from ._table import QUANT, VARIANTS


def lora_shrink(
    y: torch.Tensor,
    x: torch.Tensor,
    lora_a: Sequence[torch.Tensor],
    route: MoeRoute,
    *,
    scaling: float = 1.0,
    zero_rest: bool = False,
    x_scale: torch.Tensor | None = None,
    a_scale: Sequence[torch.Tensor] | None = None,
    lora_ranks: torch.Tensor | None = None,
    scalings: torch.Tensor | None = None,
    packed: bool = False,
) -> None:
    """The rank vectors of a batch: y[s, t] = scaling * (x[t] . A_s[l]^T), for every token t of an adapter l.

    Rows of y of tokens without an adapter keep their bytes, or become zero; ``lora_expand`` does not read them.

    Args:
        y: contiguous [S, T, rank] float32.
        x: [T, K] bfloat16 or float16, last stride 1.
        lora_a: S tensors [L, rank, K] (or [L, 1, rank, K]) of one layout, in the dtype of ``x``; the stride over L is free.
        route: from ``lora_route``.
        scaling: applied in float32, once, here and not in ``lora_expand``.
        zero_rest: rows of tokens without an adapter become zero, as what sums or gathers rows over GPUs may want them.
        x_scale: float32 or float8_e8m0fnu, for an FP8 x: [1]; or [T, 1]; or [T, ceil(K / group_k)], row by row or column by
            column.
        a_scale: S tensors float32, for FP8 weights (float8_e4m3fn or float8_e5m2): [L]; or [L, rank], with a last dimension of
            1 or without; or [L, ceil(rank / group_n), ceil(K / group_k)].
        lora_ranks: [>= L] int32 on the device, how many ranks of each adapter count: those behind are not read, and zero in y.
        scalings: [>= L] float32 on the device, by which the rank vectors of each adapter are multiplied too.
        packed: the slices of an adapter lie one behind the other in a tensor [L, S * rank, K], slice s from row
            s * lora_ranks[l] on; ``lora_a`` are its S views of rank rows each.

    Raises:
        ValueError: something does not fit, or no variant serves it; nothing was launched.
    """
    request = (scaling, zero_rest, a_scale, x_scale, lora_ranks, scalings, packed)
    (_in_graphs if torch.compiler.is_compiling() else _apply)(y, x, lora_a, route, *request)


def _bind(given: Given) -> runtime.Call:
    sizes, route = OP.check("lora_shrink", given), given.route
    problem = problem_of("lora_shrink", operands.part_of(Operands, given), sizes, modes_of("lora_shrink", given))
    dtype = sizes.get("D") or torch.bfloat16  # of a product of FP8 with FP8
    variant = variant_of("lora_shrink", dtype, problem.rank, problem.weight_scales, problem.x_scales)
    if problem.num_tokens == 0:
        return runtime.NOTHING
    call: runtime.Call = variant.bind(problem, route, choose(problem, route))
    if not given.zero_rest:
        return call
    return runtime.InOrder((runtime.OnHost(torch.Tensor.zero_, runtime.GIVEN.y), call))


def modes_of(op: str, given: Any) -> Modes:
    """Of what FP8 operands of such a call have a scale each, by the shapes.

    Raises:
        ValueError: no mode has scales of such shapes.
    """
    of_weights = of_x = None
    if given.a_scale is not None:
        of_weights = kind_of_scales(op, "a_scale", given.a_scale, given.lora_a, QUANT)
    if given.x_scale is not None:
        # Where K is one group, a scale a token has the same shape: groups of weights go with groups of x.
        of_x = find_x_mode(op, given.x, given.x_scale, QUANT, "group" if of_weights == "group" else None)
    return Modes(of_weights, of_x)


def variant_of(
    op: str, dtype: torch.dtype, rank: int, weight_scales: str | None, x_scales: str | None
) -> Any:
    """The variant of the smallest rank bucket that holds the rank."""
    return VARIANTS.get(op, torch_dtype=dtype, rank=rank, weight_scales=weight_scales, x_scales=x_scales)


_apply = OP.caller(_bind)
_in_graphs = OP.in_graphs(_apply)
