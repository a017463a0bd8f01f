"""Dense LoRA (Punica): tokens by adapter, and both products as one op, each launched while the kernel in front of it runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, NamedTuple, overload

import torch

from . import _operands as operands
from . import _runtime as runtime
from ._routing import LoraRanks
from ._scales import scale_operand
from .lora_expand import _problem as expand
from .lora_expand._op import mode_of as expand_mode
from .lora_expand._op import variant_of as expand_variant
from .lora_expand._table import VARIANTS as EXPAND
from .lora_shrink import _problem as shrink
from .lora_shrink._op import modes_of as shrink_modes
from .lora_shrink._op import variant_of as shrink_variant
from .lora_shrink._table import QUANT
from .lora_shrink._table import VARIANTS as SHRINK
from .moe_route._held import HeldRoute, held_route
from .moe_route._op import (
    MoeRoute,
    MoeWorkspace,
    Route,
    dense_plan,
    in_graph,
    made,
    moe_workspace,
)

__all__ = ["HeldRoute", "lora", "lora_route", "lora_workspace"]


@overload
def lora_route(
    token_lora_mapping: torch.Tensor,
    *,
    max_loras: int,
    workspace: MoeWorkspace | None = None,
    block_m: int | None = None,
) -> MoeRoute: ...


@overload
def lora_route(
    token_lora_mapping: torch.Tensor,
    *,
    max_loras: int,
    workspace: MoeWorkspace | None = None,
    capacity: int,
    valid_tokens: torch.Tensor | None = None,
) -> HeldRoute: ...


def lora_route(
    token_lora_mapping: torch.Tensor,
    *,
    max_loras: int,
    workspace: MoeWorkspace | None = None,
    block_m: int | None = None,
    capacity: int | None = None,
    valid_tokens: torch.Tensor | None = None,
) -> MoeRoute | HeldRoute:
    """Tokens by adapter, on the device only: no host sync, and a captured CUDA graph stays right when adapters change.

    It is the route of a layer with one expert; all linear layers that see the same tokens share it.

    Args:
        token_lora_mapping: [T] int32, the adapter of each token; -1, or any that is not in [0, max_loras): none.
        max_loras: adapter slots in the weights (L).
        workspace: buffers from ``lora_workspace``; None allocates.
        block_m: rows of a block (16, 32, 64 or 128), None: from the mean number of tokens of an adapter.
        capacity: the most tokens of any batch: a ``HeldRoute`` is made, whose ``refill`` makes the tables of other batches in
            place, and whose ``first(T)`` is the route of T rows, for CUDA graphs of every size. Its tables are its own, with
            blocks of every height, and the mapping may be int64; of a ``workspace`` it has the scratch. None: a route of this
            batch.
        valid_tokens: with a ``capacity``, [1] int32 on the device: how many of the T tokens count. None: all.

    Raises:
        ValueError: a shape, dtype, device or option that does not fit; nothing was launched.
    """
    if capacity is not None:
        if block_m is not None:
            runtime.fail("lora_route", "block_m", block_m, None, "with a capacity there are blocks of every height")
        return held_route(token_lora_mapping, valid_tokens, max_loras, capacity, workspace)
    if valid_tokens is not None:
        runtime.fail("lora_route", "valid_tokens", "a tensor", None, "it is used with a capacity alone")
    source = (None, token_lora_mapping, None, None)
    if torch.compiler.is_compiling():
        return in_graph(source, 1, max_loras, "sorted", None, block_m, workspace)
    return made(dense_plan(token_lora_mapping, max_loras, block_m, workspace), source, workspace)


def lora_workspace(
    *,
    max_tokens: int,
    max_loras: int,
    max_rank: int,
    num_slices: int,
    device: torch.device | str,
    fp8: bool = False,
) -> MoeWorkspace:
    """Buffers that serve every batch of up to ``max_tokens`` tokens, so that neither a route nor an op on it allocates.

    Use one workspace per stream: an op writes its scratch into it. ``fp8``: operands are FP8, for which K may be shared out in
    batches of any size.

    Raises:
        ValueError: an argument that does not fit.
    """
    _SPACE.check("lora_workspace", _Space(max_tokens, max_loras, max_rank, num_slices, device, fp8))
    sizes = {"num_experts": 1, "max_loras": max_loras, "max_rank": 1, "num_slices": 1}
    tables = moe_workspace(max_tokens=max_tokens, top_k=1, device=device, **sizes).tables
    in_parts = max_tokens if fp8 else min(max_tokens, shrink.MAX_TOKENS_IN_PARTS)
    in_parts *= shrink.max_parts(num_slices)
    rows = max(max_tokens * num_slices, in_parts)
    parts = torch.empty(rows * max_rank, dtype=torch.float32, device=device)
    return MoeWorkspace(tables, parts, views={})


def lora(
    out: torch.Tensor,
    x: torch.Tensor,
    lora_a: Sequence[torch.Tensor],
    lora_b: Sequence[torch.Tensor],
    route: MoeRoute,
    *,
    scaling: float = 1.0,
    offset_start: int = 0,
    columns: Sequence[int] | None = None,
    column_stride: int = 1,
    add_inputs: bool = True,
    x_scale: torch.Tensor | None = None,
    a_scale: Sequence[torch.Tensor] | None = None,
    b_scale: Sequence[torch.Tensor] | None = None,
    lora_ranks: torch.Tensor | None = None,
    scalings: torch.Tensor | None = None,
    packed: bool = False,
) -> None:
    """Apply the LoRA adapters of a batch to a linear layer of S slices, in place.

    For every token t of an adapter l, and every slice s: out[t, columns of s] (+)= (scaling * (x[t] . A_s[l]^T)) . B_s[l]^T.
    The same bits as ``lora_shrink`` and ``lora_expand``, and for a token the same in every batch. Rows of other tokens, and
    columns in front of the first slice and behind the last, keep their bytes.

    Args:
        out: [T, *] bfloat16, float16 or float32, last stride 1.
        x: [T, K] bfloat16 or float16, last stride 1; in the dtype of ``out``, unless that is float32, and of the weights.
        lora_a: S tensors [L, rank, K] (or [L, 1, rank, K]) of one layout; the stride over L is free.
        lora_b: S tensors [L, N_s, rank] (or [L, 1, N_s, rank]), of as many slots L; widths N_s and strides over L are free.
        route: from ``lora_route``.
        scaling: applied in float32, once, to the rank vectors.
        offset_start: column of ``out`` where the first slice begins; each other begins where the one before it ends.
        columns: in place of it, the column of ``out`` where each slice begins. A slice of which ``lora_a`` and ``lora_b`` hold
            None is absent then: it has no adapters, and costs nothing.
        column_stride: from one column of a slice to the next, in ``out``: columns=(0, 1), column_stride=2 for interleaved ones.
        add_inputs: add to ``out``, or overwrite.
        x_scale, a_scale, b_scale: of FP8 operands, as ``lora_shrink`` and ``lora_expand`` take them; an FP8 x goes with an
            ``out`` in bfloat16, and with weights in either.
        lora_ranks, scalings, packed: of adapters that say on the device how many ranks they have, by how much they are scaled
            and, with their ranks, where their slices begin, as ``lora_shrink`` takes them.

    Raises:
        ValueError: something does not fit, or no variant serves it; nothing was launched.
    """
    if columns is not None:
        columns, lora_a, lora_b, a_scale, b_scale = _present(columns, lora_a, lora_b, a_scale, b_scale)
        if columns == () == lora_a:
            return
    request = (scaling, offset_start, columns, column_stride, add_inputs, x_scale, a_scale, b_scale, lora_ranks, scalings, packed)
    (_in_graphs if torch.compiler.is_compiling() else _apply)(out, x, lora_a, lora_b, route, *request)  # type: ignore[arg-type]


def _present(columns: Any, lora_a: Any, lora_b: Any, *scales: Any) -> tuple[Any, ...]:
    """What there is of the slices that are not absent; all of it where it does not fit, as checks then say."""
    given = (tuple(columns) if isinstance(columns, list) else columns, lora_a, lora_b, *scales)
    if not all(of is None or (isinstance(of, (list, tuple)) and len(of) == len(columns)) for of in given):
        return given
    if lora_a is None or lora_b is None or not any(a is None is b for a, b in zip(lora_a, lora_b, strict=True)):
        return given
    here = [i for i, factor in enumerate(lora_a) if factor is not None or lora_b[i] is not None]
    return tuple(None if of is None else tuple(of[i] for i in here) for of in given)


class _Space(NamedTuple):
    max_tokens: operands.Count
    max_loras: operands.Size
    max_rank: operands.Size
    num_slices: operands.Size
    device: Annotated[torch.device | str, operands.Device()]
    fp8: operands.Bool


_SPACE = operands.Op("lora_workspace", _Space, launches=False)


class Given(NamedTuple):
    """What lora is given."""

    out: Annotated[torch.Tensor, operands.Tensor("T, *", "D", also=(torch.float32,), written=True, asks=("torch_dtype",))]
    x: Annotated[torch.Tensor, operands.Tensor("T, K", "D", scaled_by="x_scale")]
    lora_a: Annotated[
        operands.Tensors,
        operands.Tensor(("slots>=L, rank, K", "slots>=L, 1, rank, K"), "D", slices="alike", scaled_by="a_scale"),
    ]
    lora_b: Annotated[
        operands.Tensors,
        operands.Tensor(("slots>=L, >=1, rank", "slots>=L, 1, >=1, rank"), "D", slices="any", scaled_by="b_scale"),
    ]
    route: Route
    scaling: Annotated[float, operands.Number()]
    offset_start: operands.Count
    columns: expand.Columns
    column_stride: operands.Size
    add_inputs: operands.Bool
    x_scale: Annotated[torch.Tensor | None, scale_operand()]
    a_scale: Annotated[operands.Tensors | None, scale_operand(slices="any")]
    b_scale: Annotated[operands.Tensors | None, scale_operand(slices="any")]
    lora_ranks: LoraRanks
    scalings: shrink.Scalings
    packed: operands.Bool


OP = operands.Op(
    "lora",
    Given,
    spec="specs/lora_shrink.yaml and specs/lora_expand.yaml",
    dtypes={"D": tuple(dtype for dtype in SHRINK.dtypes if dtype in EXPAND.dtypes)},
    fp8=QUANT.elements,
    first=("lora_a", "lora_b"),
    tells=("out", "x"),
)


def _bind(given: Given) -> runtime.Call:
    first, last, dtype = problems(given)
    if first.num_tokens == 0:
        return runtime.NOTHING
    return bind(first, last, given.route, dtype, given.add_inputs)


def problems(given: Given) -> tuple[shrink.Problem, expand.Problem, torch.dtype]:
    """The sizes of both products and the dtype of their 16-bit operands, once everything about a call is known to fit.

    Raises:
        ValueError: says which argument does not fit, what it is and what was wanted.
    """
    sizes = OP.check("lora", given)
    modes, mode = shrink_modes("lora", given), expand_mode("lora", given)
    first = shrink.problem_of("lora", operands.part_of(shrink.Operands, given), sizes, modes)
    last = expand.problem_of("lora", operands.part_of(expand.Operands, given), sizes, mode)
    return first, last, sizes.get("D") or torch.bfloat16  # of FP8 operands, in front of an out in fp32


def bind(
    first: shrink.Problem,
    last: expand.Problem,
    route: MoeRoute,
    dtype: torch.dtype,
    add_inputs: bool = True,
    lora_shrink: shrink.Config | None = None,
    lora_expand: expand.Config | None = None,
) -> runtime.Call:
    """The launches for checked calls of these sizes, ready to be made again and again; tiles of None: those that are chosen."""
    config = lora_shrink or shrink.choose(first, route)
    tiles = lora_expand or expand.choose(last, route, first.k)
    parts, pdl = first.parts(config), runtime.traits(first.device).pdl
    y, scratch = first.scratch(route, parts)
    one = shrink_variant("lora", dtype, first.rank, first.weight_scales, first.x_scales)
    other = expand_variant("lora", dtype, add_inputs, last.rank, last.weight_scales)
    sums_first = expand.sums_first(last, tiles, parts)
    # What they are given has the same names here, but for the rank vectors between them.
    calls = [one.bind_product(first, route, config, pdl).through(runtime.GIVEN, y_ptr=y)]
    if sums_first:
        calls.append(one.bind_total(first, route, parts, pdl, y).through(runtime.GIVEN, y_ptr=y))
    product = other.bind(last, route, tiles, shrink.ONE_PART if sums_first else parts, pdl)
    calls.append(product.through(runtime.GIVEN, y_ptr=y, scalings_ptr=runtime.GIVEN.scalings))
    return runtime.InOrder(calls, scratch)


_apply = OP.caller(_bind)
_in_graphs = OP.in_graphs(_apply)
