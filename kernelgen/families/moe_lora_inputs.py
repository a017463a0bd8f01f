"""What a case of fused MoE-LoRA gives to a variant, and how the result is held against the reference.

Everything that a kernel must not read is poison (NaN): rows of x, weights and routing weights of pairs that are not live, what
lies between and around rows, table entries behind the last block, the workspace. Everything that it must not write is
compared bit for bit. Rows of ``out`` are numbers, as a NaN that something is added to may keep its bits; but NaN where a variant
overwrites them.
"""

from __future__ import annotations

import dataclasses
import math
import sys
from types import MappingProxyType, ModuleType
from typing import Any, Callable, Mapping, Sequence

import torch

from kernelgen.core.model import VOCABULARY
from kernelgen.families import quant
from kernelgen.families.buffers import (
    Guarded,
    allocate,
    allocate_sparse,
    poison_,
    positions,
    row_major,
    seal,
)
from kernelgen.families.case import Case as BaseCase
from kernelgen.families.case import Tags, worst_ratio
from kernelgen.families.moe_lora.reference import Expected, dequantise, moe_lora
from kernelgen.families.moe_route.reference import moe_route
from kernelgen.families.moe_routing import SPREAD, Routed, Routing, Sizes, draw

# Tiles that small shapes can be less than, equal to and greater than.
_TILES: Mapping[str, int] = MappingProxyType(
    {
        "block_k": 32,
        "split_k": 64,
        "block_n": 32,
        "expand_tiles": 2,
        "shrink_stages": 2,
        "expand_stages": 2,
        "num_warps": 4,
        "shrink_warps": 4,
        "expand_warps": 4,
    }
)
_HUGE = 2**31 + 64  # elements: out of reach of a 32-bit offset
_WORKSPACE = 2**18


@dataclasses.dataclass(frozen=True)
class Case(BaseCase):
    """Sizes and layouts of one call.

    Attributes:
        naive_tokens: at most so many for a variant whose blocks are single pairs, where more show nothing more.
        rank: a number, or by its relation to the bucket: "one", "part" of it, or "full".
        routing: how experts and adapters are drawn.
        layout: how x, the weights and out lie in memory; a key of ``LAYOUTS``.
        scale: factor on B.
        spread: elements of x are multiplied by powers of two from 2^-spread to 2^spread.
        nan_token: x of this token is NaN.
        block_n, split_k: columns of a tile, and of a part of K; None: few.
        own_tiles: the variant chooses its tiles itself.
        element: of FP8 operands.
        scales_end_in_1: the scales of channels are [L, E, out, 1].
        x_scale_an_expert: a scale for all of x is one of the rows of each expert.
        x_scale_dtype: of the scales of x.
        by_column: the scales of x lie column by column.
        special: the first number of the last rank of A of the first live pair, if any.
        far_parts: the tables are so long, and in use at their end, that parts lie out of reach of 32-bit offsets.
    """

    tokens: int = 4
    naive_tokens: int = 3
    top_k: int = 2
    experts: int = 3
    loras: int = 2
    slices: int = 1
    k: int = 40
    n: int = 24
    rank: int | str = "full"
    routing: Routing = SPREAD
    layout: str = "padded"
    weights_dtype: torch.dtype = torch.float32
    block_m: int = 16
    scale: float = 1.0
    spread: int = 0
    nan_token: int | None = None
    block_n: int | None = None
    split_k: int | None = None
    own_tiles: bool = False
    far_parts: bool = False
    element: str = "e4m3"
    scales_end_in_1: bool = False
    x_scale_an_expert: bool = False
    x_scale_dtype: torch.dtype = torch.float32
    by_column: bool = False
    special: float | None = None


@dataclasses.dataclass(frozen=True)
class Layout:
    """How the operands of a case lie in memory; sizes in elements.

    Attributes:
        align: rows are padded to a multiple of this,
        gap: and then lie so far apart; experts and adapters too.
        offset: where the memory starts behind a 16-byte boundary.
        expert_major: all adapters of an expert lie together.
        expert, lora: strides over E and L of the weights, where they are given.
        row: stride between rows of x and of out, where it is given.
    """

    align: int = 8
    gap: int = 8
    offset: int = 0
    expert_major: bool = False
    expert: int | None = None
    lora: int | None = None
    row: int | None = None

    def rows(self, columns: int) -> int:
        return -(-columns // self.align) * self.align + self.gap

    def of_x(self, shape: Sequence[int]) -> tuple[int, ...]:
        return (self.row or self.rows(shape[1]), 1)

    def of_out(self, shape: Sequence[int]) -> tuple[int, ...]:
        return row_major(shape, row=self.row or self.rows(shape[2]))

    def of_weights(self, shape: Sequence[int]) -> tuple[int, ...]:
        loras, experts, rows, columns = shape
        row = self.rows(columns)
        matrix = rows * row + self.gap
        expert, lora = (loras * matrix, matrix) if self.expert_major else (matrix, experts * matrix)
        expert = expert if self.expert is None else self.expert
        return (lora if self.lora is None else self.lora, expert, row, 1)

    def of_scales(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Strides of the scales of weights, contiguous behind (L, E)."""
        inner = row_major(shape[2:]) if len(shape) > 2 else ()
        matrix = math.prod(shape[2:]) + self.gap
        expert = matrix if self.expert is None else self.expert
        return (shape[1] * matrix if self.lora is None else self.lora, expert, *inner)


LAYOUTS: Mapping[str, Layout] = MappingProxyType(
    {
        "padded": Layout(),
        "packed": Layout(align=1, gap=0),
        "odd": Layout(align=1, gap=1, offset=1),
        "shared": Layout(expert=0),
        "expert_major": Layout(expert_major=True),
        "huge_adapters": Layout(lora=_HUGE // 2),
        "huge_experts": Layout(expert=_HUGE // 2, lora=2**16),
        "huge_rows": Layout(row=_HUGE // 2),
    }
)


@dataclasses.dataclass(frozen=True)
class Call:
    """The operands of one call, and what it should make of them."""

    out: Guarded
    x: torch.Tensor
    lora_a: tuple[torch.Tensor, ...]
    lora_b: tuple[torch.Tensor, ...]
    topk_weights: torch.Tensor | None
    scales: Mapping[str, Any]  # a_scale, b_scale, x_scale: those that there are
    routed: Routed
    expected: Expected
    inputs: Mapping[str, Guarded]

    @property
    def operands(self) -> tuple[Any, ...]:
        """out, x, lora_a and lora_b, as every launcher takes them."""
        return self.out.view, self.x, self.lora_a, self.lora_b

    @property
    def keywords(self) -> dict[str, Any]:
        """The other operands that there are, as launchers take them."""
        weights = {} if self.topk_weights is None else {"topk_weights": self.topk_weights}
        return {**weights, **self.scales}

    def live_rows(self) -> torch.Tensor:
        """bool [T, top_k]."""
        rows = torch.zeros(self.out.view.shape[:2], dtype=torch.bool)
        for pair, _, _ in self.routed.live:
            rows[divmod(pair, rows.shape[1])] = True
        return rows.to(self.x.device)

    def verify(self) -> float:
        """The worst error over its bound.

        Raises:
            AssertionError: a live element is off, another one changed, or an input did.
        """
        for name, guarded in self.inputs.items():
            changed = int(guarded.changed().sum())
            assert not changed, f"{name}: {changed} elements of an input changed"
        rows = self.live_rows()
        stray = int((self.out.changed() & ~positions(self.out, rows)).sum())
        assert not stray, f"out: {stray} elements changed outside of the live rows"
        exact, bound = self.expected
        return worst_ratio(self.out.view[rows], exact[rows], bound[rows])


def make(case: Case, tags: Tags, device: str) -> Call:
    """The operands of ``case`` for a variant; the numbers depend on the case alone."""
    weighted, adds = tags["routed_weight"] == "weighted", tags["add_inputs"] == "add"
    dtype = getattr(torch, str(VOCABULARY["dtype"][tags["dtype"]]["torch_dtype"]))
    tokens = min(case.tokens, case.naive_tokens) if tags["assignment"] == "naive" else case.tokens
    sizes = Sizes(tokens, case.top_k, case.experts, case.loras)
    routed = draw(case.routing, sizes, case.random(), device)
    layout, rank, top_k = LAYOUTS[case.layout], rank_of(case, tags), case.top_k
    numbers = case.generator()

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=numbers)

    def memory(
        shape: Sequence[int], strides: Sequence[int], of: torch.dtype = dtype
    ) -> torch.Tensor:
        if max(strides) >= _HUGE // 2:
            return allocate_sparse(shape, strides, of, device)
        return allocate(shape, strides, of, device, offset=layout.offset)

    of_weights, of_x = quant.scales_of(tags)
    element = quant.element(case.element)
    rows = sorted({p if weighted else p // top_k for p, _, _ in routed.live})
    x_shape = (tokens * top_k if weighted else tokens, case.k)
    x = memory(x_shape, layout.of_x(x_shape), element if of_x else dtype)
    x_scale, x_numbers = None, x
    if of_x:
        shape = (case.experts,) if case.x_scale_an_expert else quant.x_scale_shape(of_x, x_shape, quant.group()[1])
        x_scale = quant.allocate_x_scale(shape, device, case.x_scale_dtype, case.by_column)
    for row in rows:
        powers = torch.randint(-case.spread, case.spread + 1, (case.k,), generator=numbers)
        x[row] = quant.as_dtype(normal(case.k) * 2.0**powers, x)
        if case.nan_token == (row // top_k if weighted else row):
            x[row] = math.nan
        if x_scale is not None and not case.x_scale_an_expert:
            each = x_scale[row] if x_scale.dim() > 1 else x_scale
            each.copy_(quant.draw_scales(each, 1.0, numbers))
    if x_scale is not None and case.x_scale_an_expert:
        x_scale.copy_(quant.draw_scales(x_scale, 1.0, numbers))
        x_numbers = x.double()
        for pair, _, expert in routed.live:
            x_numbers[pair] *= x_scale[expert].double()
    elif x_scale is not None and rows:
        x_numbers = dequantise(x, x_scale, quant.group_of(of_x, x_shape, (1, quant.group()[1])))

    lora_a: list[torch.Tensor] = []
    lora_b: list[torch.Tensor] = []
    a_scale: list[torch.Tensor] = []
    b_scale: list[torch.Tensor] = []
    numbers_a: list[torch.Tensor] = []  # what the elements of lora_a stand for
    numbers_b: list[torch.Tensor] = []
    pairs = sorted({(item.adapter, item.expert) for item in routed.live})
    for _ in range(case.slices):
        a_shape = (case.loras, case.experts, rank, case.k)
        b_shape = (case.loras, case.experts, case.n, rank)
        for shape, size, matrices, scales, stand_for in (
            (a_shape, 1.0 / math.sqrt(case.k), lora_a, a_scale, numbers_a),
            (b_shape, case.scale / math.sqrt(rank), lora_b, b_scale, numbers_b),
        ):
            strides = layout.of_weights(shape)
            matrix = memory(shape, strides, element if of_weights else dtype)
            for adapter, expert in pairs:
                drawn = normal(*shape[2:])
                matrix[adapter, expert] = quant.as_dtype(
                    drawn if of_weights else drawn * size, matrix
                )
            matrices.append(matrix)
            stand_for.append(matrix)
            if case.special is not None and scales is a_scale and pairs:
                matrix[pairs[0]][-1, 0] = case.special
            if of_weights:
                shape_of_scales = (
                    *shape[:2],
                    *quant.scale_shape(of_weights, shape[2:], quant.group()),
                )
                if case.scales_end_in_1:
                    shape_of_scales = (*shape_of_scales, 1)
                strides = layout.of_scales(shape_of_scales)
                if layout.gap:
                    each = memory(shape_of_scales, strides, torch.float32)
                else:  # its end is the end of its memory
                    each = poison_(torch.empty(shape_of_scales, device=device))
                for adapter, expert in pairs:
                    drawn = quant.draw_scales(each[adapter, expert], size, numbers)
                    each[adapter, expert] = drawn
                scales.append(each)
                group = quant.group_of(of_weights, shape[2:], quant.group())
                stand_for[-1] = dequantise(matrix, each, group)

    out_shape = (tokens, top_k, case.slices * case.n)
    out = memory(out_shape, layout.of_out(out_shape))
    topk_weights = None
    if weighted:
        weights_shape = (tokens, top_k)
        topk_weights = allocate(weights_shape, (top_k, 1), case.weights_dtype, device)
    live = {pair for pair, _, _ in routed.live}
    for pair in range(tokens * top_k):
        t, j = divmod(pair, top_k)
        old, weight = normal(out_shape[2]), normal(1)
        if adds or pair not in live:
            out[t, j] = old.to(out)
        if topk_weights is not None and pair in live:
            topk_weights[t, j] = weight.to(topk_weights)[0]

    operands = {"x": x, **{f"lora_a[{s}]": a for s, a in enumerate(lora_a)}}
    operands |= {f"lora_b[{s}]": b for s, b in enumerate(lora_b)}
    operands |= {f"a_scale[{s}]": each for s, each in enumerate(a_scale)}
    operands |= {f"b_scale[{s}]": each for s, each in enumerate(b_scale)}
    tables = {"topk_weights": topk_weights, "x_scale": x_scale, **routed.tensors}
    inputs = {
        name: _seal(tensor) for name, tensor in {**operands, **tables}.items() if tensor is not None
    }
    expected = moe_lora(
        out,
        x_numbers,
        numbers_a,
        numbers_b,
        routed.live,
        topk_weights=topk_weights,
        add_inputs=adds,
        scaled=bool(of_weights or of_x),
    )
    of_call: dict[str, Any] = {}
    if of_weights:
        of_call |= {"a_scale": tuple(a_scale), "b_scale": tuple(b_scale)}
    if x_scale is not None:
        of_call["x_scale"] = x_scale
    weights = tuple(lora_a), tuple(lora_b)
    return Call(_seal(out), x, *weights, topk_weights, of_call, routed, expected, inputs)


def _seal(tensor: torch.Tensor) -> Guarded:
    return seal(tensor, sparse=tensor.untyped_storage().nbytes() >= _HUGE)


def rank_of(case: Case, tags: Tags) -> int:
    """The rank of the weights of ``case`` for a variant."""
    if isinstance(case.rank, int):
        return case.rank
    largest = VOCABULARY["rank"][tags["rank"]]["max_rank"]
    full = 256 if largest is None else int(largest)
    return {"one": 1, "part": full * 25 // 32, "full": full}[case.rank]


def check(
    package: ModuleType, launcher: Callable[..., None], tags: Tags, case: Case, device: str
) -> float:
    """Run ``case`` on a variant's launcher; return the worst error over its bound.

    The tables of a sorted route are made by the reference, so that a fault is that of the variant.

    Raises:
        AssertionError: the variant is wrong.
    """
    call = make(case, tags, device)
    route, tables = route_of(package, call, tags, case)
    config = None if case.own_tiles else tiles(launcher, rank_of(case, tags))
    if config is not None:
        changes = {"block_n": case.block_n, "split_k": case.split_k}
        config = config._replace(**{n: value for n, value in changes.items() if value is not None and n in config._fields})
    launcher(*call.operands, route, config=config, **call.keywords)
    call = dataclasses.replace(call, inputs={**call.inputs, **tables})
    return call.verify()


def route_of(
    package: ModuleType, call: Call, tags: Tags, case: Case
) -> tuple[Any, dict[str, Guarded]]:
    """The route for a variant, with a poisoned workspace, and its tables."""
    routed, device = call.routed, str(call.x.device)
    ids, mapping = routed.topk_ids, routed.token_lora_mapping
    route = package.moe_route(ids, mapping, **routed.arguments, assignment="naive")
    route = route._replace(parts=poison_(torch.empty(_WORKSPACE, device=device)))
    if tags["assignment"] == "naive":
        return route, {}
    tables = moe_route(routed.live, block_m=case.block_m)
    num_pairs, num_blocks, first = ids.numel(), len(tables.blocks), 0
    if case.far_parts:
        capacity = _HUGE // call.lora_a[0].shape[2]
        pairs = allocate_sparse((capacity,), (1,), torch.int32, device)
        parts = allocate_sparse((2 * _HUGE,), (1,), torch.float32, device)
        route, first = route._replace(parts=parts), capacity - num_pairs
    else:
        pairs = allocate((num_pairs,), (1,), torch.int32, device)
    pairs[first : first + len(tables.pairs)] = tables.pairs.to(device)
    blocks = allocate((num_blocks + 2, 4), (4, 1), torch.int32, device)
    blocks[:num_blocks] = tables.blocks.to(device)
    blocks[:num_blocks, 2] += first
    count = torch.tensor([num_blocks], dtype=torch.int32, device=device)
    made = {"pairs": pairs, "blocks": blocks, "num_blocks": count}
    route = package.TableRoute(**route._asdict(), **made, block_m=case.block_m, max_blocks=num_blocks + 2)
    kept = {
        name: seal(table)
        for name, table in made.items()
        if not (case.far_parts and name == "pairs")
    }
    return route, kept


def tiles(launcher: Callable[..., None], rank: int) -> Any:
    """The tiles of the cases, as a variant's launcher takes them."""
    config = sys.modules[launcher.__module__].Config
    half = max(8, 2 ** (rank - 1).bit_length() // 2)
    known = {**_TILES, "shrink_block_r": min(half, 64)}
    missing = set(config._fields) - set(known) - set(config._field_defaults)
    if missing:
        raise KeyError(f"no tile for {', '.join(sorted(missing))}: add it in {__name__}")
    return config(**{field: known[field] for field in config._fields if field in known})
