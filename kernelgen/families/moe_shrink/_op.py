"""Rank vectors for products that add their adapters themselves."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .. import _runtime as runtime
from ..moe_align._op import MoeTables
from ..moe_runs._op import MoeRuns
from ._problem import OP, Given, check, choose, part_count, vector_dtype
from ._table import VARIANTS


def moe_shrink(
    x: torch.Tensor,
    lora_a: Sequence[torch.Tensor],
    tables: MoeTables,
    runs: MoeRuns,
    *,
    x_rows: str,
    v: torch.Tensor | None = None,
    a_scale: Sequence[torch.Tensor] | None = None,
    x_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """The rank vectors of a batch: v[p, s] = x[from(p)] . A_s[l, e]^T for every local pair p that has an adapter l.

    They are for ``moe_gemm``. Those of other pairs keep their bytes, and are not read.

    Args:
        x: [T, K] with ``x_rows="token"``, else [T * top_k, K]; bfloat16 or float16, last stride 1.
        lora_a: S tensors [L, E, rank, K] of one layout, in the dtype of ``x``, of an FP8 one in bfloat16, or in FP8; the strides
            over L and E are free, 0 shares.
        tables, runs: from ``moe_runs``.
        x_rows: where the row of a pair stands in x: at its "token"; with tables at its place there ("sorted"), without
            them at the "pair" itself.
        v: [T * top_k, S, rank] in the dtype of ``x``, of an FP8 one in bfloat16, and the order of the tables; with tables, where
            x is of tokens and all experts share one ``lora_a``, also [T, S, rank], a row a token and once for all its pairs;
            without tables [parts, T * top_k, S, rank] float32, parts of sums. None: a new tensor, of tokens where it can be.
        a_scale: S tensors float32, for FP8 factors (float8_e4m3fn or float8_e5m2), each of which stands for its number times its
            scale: [L, E]; or [L, E, rank], with a last dimension of 1 or without; or, a scale a group,
            [L, E, ceil(rank / group_n), ceil(K / group_k)].
        x_scale: float32 or float8_e8m0fnu, for an FP8 x (float8_e4m3fn or float8_e5m2) of tokens, which stands for its numbers
            times scales: [1]; or [T, 1]; or [T, ceil(K / group_k)], row by row or column by column.

    Returns:
        v.

    Raises:
        ValueError: something does not fit, or no variant serves it; nothing was launched.
    """
    rest = (x, lora_a, tables, runs, x_rows, a_scale, x_scale)
    if v is None:
        try:
            v = _vectors(x, lora_a, tables, x_rows, a_scale)
        except (AttributeError, IndexError, TypeError) as error:
            OP.refuse(Given(v, *rest), error)  # type: ignore[arg-type]
    (_in_graphs if torch.compiler.is_compiling() else _apply)(v, *rest)
    return v


def _vectors(
    x: torch.Tensor,
    lora_a: Sequence[torch.Tensor],
    tables: MoeTables,
    x_rows: str,
    a_scale: Sequence[torch.Tensor] | None,
) -> torch.Tensor:
    by_table = tables.block_m != 0
    shape = vector_shape(lora_a, tables.num_tokens, tables.top_k, by_table, x_rows, a_scale)
    return torch.empty(shape, dtype=vector_dtype(x, lora_a) if by_table else torch.float32, device=lora_a[0].device)


def vector_shape(
    lora_a: Sequence[torch.Tensor],
    num_tokens: int,
    top_k: int,
    by_table: bool,
    x_rows: str,
    a_scale: Sequence[torch.Tensor] | None,
) -> tuple[int, ...]:
    """The shape of v: of tokens where all experts share one matrix, and its scales, and tokens can be told from pairs."""
    rank, k = lora_a[0].shape[2:]
    shared = all(given[0].stride(1) == 0 for given in (lora_a, a_scale) if given is not None)
    by_token = by_table and x_rows == "token" and top_k > 1 and shared
    of_rows = (num_tokens if by_token else num_tokens * top_k, len(lora_a), rank)
    return of_rows if by_table else (part_count(k), *of_rows)


def bind(given: Given, op: str = "moe_shrink") -> runtime.Call:
    """The launch for calls that look like this one, of ``op``.

    Raises:
        ValueError: as ``moe_shrink``.
    """
    problem = check(op, given)
    schedule = "pairs" if problem.parts else "tokens" if problem.by_token else "runs"
    variant = VARIANTS.get(
        op,
        schedule=schedule,
        torch_dtype=vector_dtype(given.x, given.lora_a),
        rows=problem.rows,
        weight_scales=problem.weight_scales,
        x_scales=problem.x_scales,
    )
    if problem.num_pairs == 0:
        return runtime.NOTHING
    call: runtime.Call = variant.bind(problem, choose(schedule, problem))
    return call


_apply = OP.caller(bind)
_in_graphs = OP.in_graphs(_apply)
