"""What a case gives to a variant of moe_lora_shrink or moe_lora_expand.

Everything that a kernel must not read is poison (NaN): rows of x and y of pairs that are not live, weights that no pair has,
what lies between and around rows, table entries behind the last block, the workspace. Everything that it must not write is
compared bit for bit.
"""

from __future__ import annotations

import dataclasses
import math
from types import ModuleType
from typing import Any, Mapping, Sequence

import torch

from kernelgen.core.model import VOCABULARY
from kernelgen.families.buffers import Guarded, allocate, allocate_sparse, poison_, seal
from kernelgen.families.case import Case as BaseCase
from kernelgen.families.case import Tags
from kernelgen.families.lora_inputs import dtype_of
from kernelgen.families.moe_lora_inputs import LAYOUTS
from kernelgen.families.moe_route.reference import moe_route
from kernelgen.families.moe_routing import SPREAD, Routed, Routing, Sizes, draw

HUGE = 2**31 + 64  # elements: out of reach of a 32-bit offset
_WORKSPACE = 2**17


@dataclasses.dataclass(frozen=True)
class Case(BaseCase):
    """Sizes and layouts of one call.

    Attributes:
        few: at most so many tokens for a variant whose programs take single pairs, where more show nothing more.
        rank: a number, or by its relation to the bucket: "one", "part" of it, or "full".
        layout: how x, the weights and out lie in memory, a key of ``LAYOUTS`` of fused MoE-LoRA.
        split: columns of K of a program.
        row_a_pair: x has a row a pair, not a token.
        shards: into which the ranks of y are gathered; 0: y has three dimensions.
        gap: elements between the rows of y, and between its slices.
        far: of y, the third of its "slices", or the last of its "rows", is out of reach of 32-bit offsets.
        offset: column of the first slice.
        spread: elements of x are multiplied by powers of two from 2^-spread to 2^spread.
        nan_token: x, or y, of this token is NaN.
        workspace: whether there is one.
        own_tiles: the variant chooses its tiles itself.
    """

    tokens: int = 4
    few: int = 3
    top_k: int = 2
    experts: int = 3
    loras: int = 2
    slices: int = 1
    k: int = 70
    n: int = 40
    rank: int | str = "full"
    routing: Routing = SPREAD
    layout: str = "padded"
    block_m: int = 16
    split: int = 64
    row_a_pair: bool = False
    weights_dtype: torch.dtype = torch.float32
    shards: int = 0
    gap: int = 0
    far: str = ""
    offset: int = 0
    spread: int = 0
    nan_token: int | None = None
    workspace: bool = True
    own_tiles: bool = False


@dataclasses.dataclass(frozen=True)
class Batch:
    """The operands of a case that both products have."""

    case: Case
    tags: Tags
    routed: Routed
    rank: int
    device: str

    @property
    def num_pairs(self) -> int:
        return self.routed.sizes.tokens * self.case.top_k

    @property
    def live(self) -> list[int]:
        """The live pairs."""
        return [pair for pair, _, _ in self.routed.live]

    def matrix(self, shape: Sequence[int], strides: Sequence[int]) -> torch.Tensor:
        """All poison, in the dtype of the activations."""
        if max(strides) >= HUGE // 2 - 64:
            return allocate_sparse(shape, strides, dtype_of(self.tags), self.device)
        first = LAYOUTS[self.case.layout].offset
        return allocate(shape, strides, dtype_of(self.tags), self.device, offset=first)

    def make_x(self, numbers: torch.Generator) -> torch.Tensor:
        """[T or T * top_k, K], numbers where a pair is live."""
        case, sharing = self.case, 1 if self.case.row_a_pair else self.case.top_k
        shape = (self.num_pairs // sharing, case.k)
        x = self.matrix(shape, LAYOUTS[case.layout].of_x(shape))
        for row in sorted({pair // sharing for pair in self.live}):
            powers = torch.randint(-case.spread, case.spread + 1, (case.k,), generator=numbers)
            x[row] = (torch.randn(case.k, generator=numbers) * 2.0**powers).to(x)
            if row * sharing // case.top_k == case.nan_token:
                x[row] = math.nan
        return x

    def make_weights(self, rows: int, columns: int, numbers: torch.Generator) -> tuple[torch.Tensor, ...]:
        """A tensor [L, E, rows, columns] a slice, numbers where some pair has the adapter and the expert."""
        made = []
        for _ in range(self.case.slices):
            shape = (self.case.loras, self.case.experts, rows, columns)
            weights = self.matrix(shape, LAYOUTS[self.case.layout].of_weights(shape))
            for adapter, expert in sorted({(adapter, expert) for _, adapter, expert in self.routed.live}):
                weights[adapter, expert] = (torch.randn(rows, columns, generator=numbers) / math.sqrt(columns)).to(weights)
            made.append(weights)
        return tuple(made)

    def make_y(self) -> torch.Tensor:
        """[S, T * top_k, rank], or [shards, S, T * top_k, rank / shards]; all poison."""
        case, shards = self.case, max(self.case.shards, 1)
        row = self.rank // shards + case.gap
        size = HUGE // 2 if case.far == "slices" else self.num_pairs * row + case.gap
        shape = [shards, case.slices, self.num_pairs, self.rank // shards]
        strides = [case.slices * size, size, row, 1]
        if case.far == "rows":
            strides[1:3] = row, HUGE // 3
        of_y = slice(None) if case.shards else slice(1, None)
        if case.far:
            return allocate_sparse(shape[of_y], strides[of_y], torch.float32, self.device)
        return allocate(shape[of_y], strides[of_y], torch.float32, self.device)

    def fill(self, y: torch.Tensor, numbers: torch.Generator) -> torch.Tensor:
        """Give y numbers where a pair is live; return it as [S, T * top_k, rank]."""
        shards = y if y.dim() == 4 else y[None]
        for pair in self.live:
            shards[:, :, pair] = torch.randn(shards[:, :, pair].shape, generator=numbers).to(y)
            if pair // self.case.top_k == self.case.nan_token:
                shards[:, :, pair] = math.nan
        return shards.permute(1, 2, 0, 3).reshape(self.case.slices, self.num_pairs, self.rank)

    def route(self, package: ModuleType) -> tuple[Any, Mapping[str, Guarded]]:
        """A route with tables of the reference and a poisoned workspace, and its tables."""
        routed, device, block_m = self.routed, self.device, self.case.block_m
        ids, mapping = routed.topk_ids, routed.token_lora_mapping
        route = package.moe_route(ids, mapping, **routed.arguments, assignment="naive")
        if self.case.workspace:
            route = route._replace(parts=poison_(torch.empty(_WORKSPACE, device=device)))
        if self.tags["schedule"] == "pairs":
            return route, {}
        tables = moe_route(routed.live, block_m=block_m)
        num_blocks = len(tables.blocks)
        pairs = allocate((self.num_pairs,), (1,), torch.int32, device)
        pairs[: len(tables.pairs)] = tables.pairs.to(device)
        blocks = allocate((num_blocks + 2, 4), (4, 1), torch.int32, device)
        blocks[:num_blocks] = tables.blocks.to(device)
        count = torch.tensor([num_blocks], dtype=torch.int32, device=device)
        made = {"pairs": pairs, "blocks": blocks, "num_blocks": count}
        route = package.TableRoute(**route._asdict(), **made, block_m=block_m, max_blocks=num_blocks + 2)
        return route, {name: seal(table) for name, table in made.items()}

    def rows(self) -> torch.Tensor:
        """bool [T * top_k]: live pairs."""
        rows = torch.zeros(self.num_pairs, dtype=torch.bool)
        rows[self.live] = True
        return rows.to(self.device)


def make(case: Case, tags: Tags, device: str) -> Batch:
    """The batch of ``case`` for a variant; the numbers depend on the case alone."""
    tokens = min(case.tokens, case.few) if tags["schedule"] == "pairs" else case.tokens
    sizes = Sizes(tokens, case.top_k, case.experts, case.loras)
    return Batch(case, tags, draw(case.routing, sizes, case.random(), device), rank_of(case, tags), device)


def rank_of(case: Case, tags: Tags) -> int:
    """The rank of the weights of ``case`` for a variant."""
    if isinstance(case.rank, int):
        return case.rank
    largest = VOCABULARY["rank"][tags["rank"]]["max_rank"]
    full = 256 if largest is None else int(largest)
    return {"one": 1, "part": full * 25 // 32, "full": full}[case.rank]
