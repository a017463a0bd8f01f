"""What a case of dense LoRA gives to a variant of lora_shrink or lora_expand.

Everything that a kernel must not read is poison (NaN): rows of x and y of tokens without an adapter, weights of adapters
that no token has, what lies between and around rows, table entries behind the last block, the workspace. Everything that it
must not write is compared bit for bit.
"""

from __future__ import annotations

import dataclasses
import math
import random
from types import MappingProxyType, ModuleType
from typing import Any, Callable, Mapping, Sequence

import torch

from kernelgen.core.model import VOCABULARY
from kernelgen.families import quant
from kernelgen.families.buffers import Guarded, allocate, allocate_sparse, poison_, row_major, seal
from kernelgen.families.case import Case as BaseCase
from kernelgen.families.case import Tags
from kernelgen.families.moe_lora.reference import dequantise
from kernelgen.families.moe_route.reference import Live, moe_route

HUGE = 2**31 + 64  # elements: out of reach of a 32-bit offset
_WORKSPACE = 2**16


@dataclasses.dataclass(frozen=True)
class Case(BaseCase):
    """Sizes and layouts of one call.

    Attributes:
        widths: columns of each slice.
        rank: a number, or by its relation to the bucket: "one", "part" of it, or "full".
        adapters: how the adapter of each token is drawn, a key of ``ADAPTERS``.
        layout: how x, the weights and out lie in memory, a key of ``LAYOUTS``.
        parts, ranks, together: of the tiles of lora_shrink.
        offset: column of the first slice.
        y_dtype: None: that of the activations.
        y_parts: sums of so many parts of K that y is given in, as behind a lora_shrink; None: y is whole.
        four: weights are [L, 1, *, *].
        spread: elements of x are multiplied by powers of two from 2^-spread to 2^spread.
        nan_token: x and y of this token are NaN.
        own_tiles: the variant chooses its tiles itself.
        element: of FP8 operands.
        scales_end_in_1: the scales of channels end in a dimension of 1.
        x_scale_dtype: of the scales of x.
        by_column: the scales of x lie column by column.
        block_n, tiles: of the tiles of lora_expand, and how many of them a program takes.
        held: tokens behind those of the call, which the route of an engine lists too.
        ranked: how many ranks of the first factors of each adapter count, over and over again; empty: no table of ranks is given.
        packed: slices of these factors lie one behind the other, by those ranks.
    """

    tokens: int = 5
    loras: int = 3
    k: int = 70
    widths: tuple[int, ...] = (40,)
    rank: int | str = "full"
    adapters: str = "spread"
    layout: str = "padded"
    block_m: int = 16
    parts: int = 1
    ranks: int = 128
    together: bool = True
    scaling: float = 0.75
    offset: int = 0
    y_dtype: torch.dtype | None = torch.float32
    y_parts: int | None = None
    out_dtype: torch.dtype | None = None
    four: bool = False
    spread: int = 0
    nan_token: int | None = None
    workspace: bool = True
    own_tiles: bool = False
    element: str = "e4m3"
    scales_end_in_1: bool = False
    x_scale_dtype: torch.dtype = torch.float32
    by_column: bool = False
    block_n: int = 32
    tiles: int = 2
    held: int = 0
    ranked: tuple[int, ...] = ()
    packed: bool = False


@dataclasses.dataclass(frozen=True)
class Operand:
    """A tensor, its scales where it is FP8, and the numbers that it stands for."""

    tensor: torch.Tensor
    numbers: torch.Tensor
    scales: torch.Tensor | None = None


@dataclasses.dataclass(frozen=True)
class Layout:
    """How operands lie in memory; sizes in elements.

    Attributes:
        align: rows are padded to a multiple of this,
        gap: and then lie so far apart; adapters too.
        first: where the memory starts behind a 16-byte boundary.
        lora: stride over L of the weights, where it is given.
        row: stride between rows of x and of out, where it is given.
    """

    align: int = 8
    gap: int = 8
    first: int = 0
    lora: int | None = None
    row: int | None = None

    def rows(self, columns: int) -> int:
        return -(-columns // self.align) * self.align + self.gap

    def matrix(self, shape: Sequence[int], dtype: torch.dtype, device: str) -> torch.Tensor:
        """[T, columns], all poison."""
        return self._memory(shape, (self.row or self.rows(shape[1]), 1), dtype, device)

    def weights(self, shape: Sequence[int], dtype: torch.dtype, device: str) -> torch.Tensor:
        """[L, rows, columns], all poison."""
        row = self.rows(shape[2])
        lora = shape[1] * row + self.gap if self.lora is None else self.lora
        return self._memory(shape, (lora, row, 1), dtype, device)

    def scales(self, shape: Sequence[int], device: str) -> torch.Tensor:
        """[L, ...], all poison."""
        inner = row_major(shape[1:]) if len(shape) > 1 else ()
        lora = math.prod(shape[1:]) + self.gap if self.lora is None else self.lora
        return self._memory(shape, (lora, *inner), torch.float32, device)

    def _memory(
        self, shape: Sequence[int], strides: Sequence[int], dtype: torch.dtype, device: str
    ) -> torch.Tensor:
        if max(strides) >= HUGE // 4:
            return allocate_sparse(shape, strides, dtype, device)
        return allocate(shape, strides, dtype, device, offset=self.first)


LAYOUTS: Mapping[str, Layout] = MappingProxyType(
    {
        "padded": Layout(),
        "packed": Layout(align=1, gap=0),
        "odd": Layout(align=1, gap=1, first=1),
        "shared": Layout(lora=0),
        "huge_adapters": Layout(lora=HUGE // 2),
        "huge_rows": Layout(row=HUGE // 2),
    }
)


def _mixed(tokens: int, loras: int, rng: random.Random) -> list[int]:
    """Every kind of token without an adapter next to those with one; adapters just out of range, and far, among them."""
    away = {0: -1, 2: loras, 5: 2**31 - 1, 6: -(2**31)}
    return [away.get(t % 8, rng.randrange(loras)) for t in range(tokens)]


_Draw = Callable[[int, int, random.Random], "list[int]"]
ADAPTERS: Mapping[str, _Draw] = MappingProxyType(
    {
        "spread": lambda tokens, loras, rng: [rng.randrange(loras) for _ in range(tokens)],
        "mixed": _mixed,
        "one": lambda tokens, loras, rng: [loras - 1] * tokens,
        "last": lambda tokens, loras, rng: [loras - 1 if t % 2 else -1 for t in range(tokens)],
        "none": lambda tokens, loras, rng: [-1] * tokens,
    }
)


@dataclasses.dataclass(frozen=True)
class Batch:
    """The tokens of a case.

    Attributes:
        mapping: the adapter of each token, as a caller gives it.
        adapters: of each token, None: it has none.
    """

    mapping: torch.Tensor
    adapters: tuple[int | None, ...]

    @property
    def live(self) -> list[int]:
        return [token for token, adapter in enumerate(self.adapters) if adapter is not None]

    @property
    def named(self) -> list[int]:
        """The adapters that some token has."""
        return sorted({adapter for adapter in self.adapters if adapter is not None})

    def rows(self) -> torch.Tensor:
        """bool [T]: tokens with an adapter."""
        rows = torch.zeros(len(self.adapters), dtype=torch.bool)
        rows[self.live] = True
        return rows.to(self.mapping.device)


def draw(case: Case, device: str) -> Batch:
    """The tokens of ``case``."""
    drawn = ADAPTERS[case.adapters](case.tokens, case.loras, case.random())
    adapters = tuple(a if 0 <= a < case.loras else None for a in drawn)
    return Batch(torch.tensor(drawn, dtype=torch.int32).to(device), adapters)


def route_of(
    package: ModuleType, case: Case, batch: Batch, device: str
) -> tuple[Any, Mapping[str, Guarded]]:
    """A route with tables of the reference and a poisoned workspace, and its tables."""
    live = [Live(t, a, 0) for t, a in enumerate(batch.adapters) if a is not None]
    live += [Live(case.tokens + i, adapter, 0) for i, adapter in enumerate((batch.named * case.held)[: case.held])]
    tables = moe_route(live, block_m=case.block_m)
    num_blocks = len(tables.blocks)
    pairs = allocate((case.tokens + case.held,), (1,), torch.int32, device)
    pairs[: len(live)] = tables.pairs.to(device)
    blocks = allocate((num_blocks + 2, 4), (4, 1), torch.int32, device)
    blocks[:num_blocks] = tables.blocks.to(device)
    count = torch.tensor([num_blocks], dtype=torch.int32, device=device)
    parts = poison_(torch.empty(_WORKSPACE, device=device)) if case.workspace else None
    route = package.EngineRoute(pairs, blocks, count, parts, case.tokens, 1, 1, case.loras, case.block_m, num_blocks + 2)
    return route, {
        "pairs": seal(pairs),
        "blocks": seal(blocks),
        "num_blocks": seal(count),
    }


def lone_route(package: ModuleType, tokens: int, loras: int, parts: torch.Tensor | None, device: str) -> Any:
    """A route of the last of ``tokens`` alone, with the last adapter."""
    pairs = torch.full((tokens + 15,), tokens - 1, dtype=torch.int32, device=device)
    blocks = torch.tensor([[loras - 1, 0, 0, 1]], dtype=torch.int32, device=device)
    return package.EngineRoute(pairs, blocks, torch.ones_like(blocks[0, :1]), parts, tokens, 1, 1, loras, 16, 1)


def dtype_of(tags: Tags) -> torch.dtype:
    """Of the activations of a variant."""
    dtype: torch.dtype = getattr(torch, str(VOCABULARY["dtype"][tags["dtype"]]["torch_dtype"]))
    return dtype


def rank_of(case: Case, tags: Tags) -> int:
    """The rank of the weights of ``case`` for a variant."""
    if isinstance(case.rank, int):
        return case.rank
    largest = VOCABULARY["rank"][tags["rank"]]["max_rank"]
    full = 256 if largest is None else int(largest)
    return {"one": 1, "part": full * 25 // 32, "full": full}[case.rank]


def make_x(case: Case, tags: Tags, batch: Batch, numbers: torch.Generator) -> Operand:
    """[T, K], numbers where a token has an adapter."""
    device, shape = str(batch.mapping.device), (case.tokens, case.k)
    kind = quant.scales_of(tags)[1]
    dtype = quant.element(case.element) if kind else dtype_of(tags)
    x, scales = LAYOUTS[case.layout].matrix(shape, dtype, device), None
    if kind:
        size = quant.x_scale_shape(kind, shape, quant.group()[1])
        scales = quant.allocate_x_scale(size, device, case.x_scale_dtype, case.by_column)
    for token in batch.live:
        powers = torch.randint(-case.spread, case.spread + 1, (case.k,), generator=numbers)
        x[token] = quant.as_dtype(torch.randn(case.k, generator=numbers) * 2.0**powers, x)
        if token == case.nan_token:
            x[token] = math.nan
        if scales is not None:
            each = scales[token] if scales.dim() > 1 else scales
            each.copy_(quant.draw_scales(each, 1.0, numbers))
    if scales is None or not batch.live:
        return Operand(x, x, scales)
    return Operand(x, dequantise(x, scales, quant.group_of(kind, shape, (1, quant.group()[1]))), scales)


def make_weights(
    case: Case, tags: Tags, batch: Batch, heights: Sequence[int], columns: int, numbers: torch.Generator
) -> tuple[Operand, ...]:
    """Weights [L, height, columns] of each slice, numbers where some token has the adapter."""
    device, made, kind = str(batch.mapping.device), [], quant.scales_of(tags)[0]
    layout, size = LAYOUTS[case.layout], 1.0 / math.sqrt(columns)
    dtype = quant.element(case.element) if kind else dtype_of(tags)
    for height in heights:
        shape = (case.loras, height, columns)
        weights = layout.weights(shape, dtype, device)
        for adapter in batch.named:
            drawn = torch.randn(shape[1:], generator=numbers)
            weights[adapter] = quant.as_dtype(drawn if kind else drawn * size, weights)
        if not kind:
            made.append(Operand(weights, weights))
            continue
        inner = (*quant.scale_shape(kind, shape[1:], quant.group()), *((1,) if case.scales_end_in_1 else ()))
        scales = layout.scales((case.loras, *inner), device)
        for adapter in batch.named:
            scales[adapter] = quant.draw_scales(scales[adapter], size, numbers)
        stands_for = dequantise(weights, scales, quant.group_of(kind, shape[1:], quant.group()))
        made.append(Operand(weights, stands_for, scales))
    return tuple(made)


def with_ranks(case: Case, a: Sequence[Operand], device: str) -> tuple[tuple[Operand, ...], torch.Tensor]:
    """First factors [L, rank, K] with ranks that do not count, which are poison and stand for zero; and a table of ranks."""
    loras, rank, columns = a[0].tensor.shape
    table = [case.ranked[adapter % len(case.ranked)] for adapter in range(loras)]
    shape = (loras, len(a) * rank, columns)
    packed = allocate(shape, row_major(shape), a[0].tensor.dtype, device)
    made = []
    for s, factor in enumerate(a):
        given = packed[:, s * rank : (s + 1) * rank] if case.packed else factor.tensor.clone()
        numbers = factor.numbers.clone()
        for adapter, counted in enumerate(min(max(own, 0), rank) for own in table):
            numbers[adapter, counted:] = 0.0
            if case.packed:
                packed[adapter, s * counted : (s + 1) * counted] = factor.tensor[adapter, :counted]
            else:
                given[adapter, counted:].fill_(math.nan)
        made.append(Operand(given, numbers, factor.scales))
    return tuple(made), torch.tensor(table, dtype=torch.int32, device=device)


def make_y(case: Case, tags: Tags, batch: Batch, numbers: torch.Generator | None) -> torch.Tensor:
    """[S, T, rank], numbers where a token has an adapter; all poison without ``numbers``."""
    shape = (len(case.widths), case.tokens, rank_of(case, tags))
    dtype = case.y_dtype or dtype_of(tags)
    y = allocate(shape, row_major(shape), dtype, str(batch.mapping.device))
    for token in batch.live if numbers is not None else ():
        y[:, token] = torch.randn((shape[0], shape[2]), generator=numbers).to(y)
        if token == case.nan_token:
            y[:, token] = math.nan
    return y


def make_parts(case: Case, batch: Batch, y: torch.Tensor, numbers: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Parts of y [parts, S, T, rank] that add up exactly in every order, and a scaling an adapter; y becomes what they make."""
    shape = (case.y_parts or 1, *y.shape)
    parts = allocate(shape, row_major(shape), torch.float32, str(batch.mapping.device))
    scalings = torch.tensor([0.5 * (adapter + 1) for adapter in range(case.loras)], device=y.device)
    for token in batch.live:
        drawn = (16 * torch.randn(shape[0], shape[1], shape[3], generator=numbers)).round() / 64
        parts[:, :, token] = drawn.to(parts)
        y[:, token] = parts[:, :, token].sum(0) * (case.scaling * scalings[batch.adapters[token]])
    return parts, scalings


def given(case: Case, weights: Sequence[Operand]) -> tuple[torch.Tensor, ...]:
    """Weights as a caller gives them."""
    return tuple(w.tensor.unsqueeze(1) if case.four else w.tensor for w in weights)


def scales_of(name: str, weights: Sequence[Operand]) -> dict[str, tuple[torch.Tensor, ...]]:
    """Their scales, where there are any, as a keyword of a launcher."""
    scales = tuple(w.scales for w in weights if w.scales is not None)
    return {name: scales} if scales else {}


def tensors_of(name: str, weights: Sequence[Operand]) -> dict[str, torch.Tensor]:
    """All their tensors, with names."""
    found = {f"lora_{name}[{s}]": w.tensor for s, w in enumerate(weights)}
    scales = {f"{name}_scale[{s}]": w.scales for s, w in enumerate(weights) if w.scales is not None}
    return {**found, **scales}


def sealed(tensors: Mapping[str, torch.Tensor]) -> dict[str, Guarded]:
    """Inputs, noted bit for bit."""
    return {
        name: seal(tensor, sparse=tensor.untyped_storage().nbytes() >= HUGE)
        for name, tensor in tensors.items()
    }


def unchanged(inputs: Mapping[str, Guarded]) -> None:
    """Raise AssertionError where an input changed."""
    for name, guarded in inputs.items():
        changed = int(guarded.changed().sum())
        assert not changed, f"{name}: {changed} elements of an input changed"
