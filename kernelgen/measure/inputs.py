"""The tensors of a cell: weights that rotate past the L2 cache, and batches that differ in routing."""

from __future__ import annotations

import dataclasses
import gc
import math
from typing import Callable

import torch

from kernelgen.measure.workloads import (
    PROJECTIONS,
    Cell,
    Projection,
    Quant,
    Site,
    Work,
    expected_groups,
    scale_shape,
    work,
)

DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16}
FP8 = torch.float8_e4m3fn
FP8_SIZE = 48.0  # of a code: far from both ends of e4m3
TOUCHED_BYTES = (
    200e6  # by one replay, three times the L2 of an H200: every weight comes from memory
)
WEIGHT_BYTES = 1.6e9  # of distinct weights to draw from
MAX_SETS = 512
_MAX_ACTIVATIONS = 16
_HOT_SHARE, _HOT_PAIRS = 0.25, 0.9  # skewed routing


@dataclasses.dataclass(frozen=True)
class Weights:
    """One copy of the adapters of a projection: S tensors [L, E, rank, K] and S of [L, E, N, rank]; of FP8, with scales."""

    lora_a: tuple[torch.Tensor, ...]
    lora_b: tuple[torch.Tensor, ...]
    a_scale: tuple[torch.Tensor, ...] = ()
    b_scale: tuple[torch.Tensor, ...] = ()


@dataclasses.dataclass(frozen=True)
class Operands:
    """What one projection of one call reads and writes: x [T or P, K], out [T, top_k, S * N]."""

    projection: Projection
    x: torch.Tensor
    out: torch.Tensor
    weights: Weights
    x_scale: torch.Tensor | None = None


@dataclasses.dataclass(frozen=True)
class Batch:
    """One call: who goes where, and the operands of each projection of the cell."""

    topk_ids: torch.Tensor  # [T, top_k] int32
    mapping: torch.Tensor  # [T] int32, -1: no adapter
    topk_weights: torch.Tensor  # [T, top_k] float32
    operands: tuple[Operands, ...]


@dataclasses.dataclass(frozen=True)
class Case:
    """A cell with its tensors; ``batches`` differ in routing and weights and are called in turn."""

    cell: Cell
    device: torch.device
    batches: tuple[Batch, ...]
    work: Work
    groups: float  # (adapter, expert) pairs hit by a call, on average


class WeightPool:
    """The weights of one (model, rank, slots) at a time, shared by all cells that use them."""

    def __init__(
        self, device: torch.device, pool_bytes: float, on_release: Callable[[], None]
    ) -> None:
        self._device = device
        self._bytes = pool_bytes
        self._on_release = on_release
        self._owner: tuple[object, ...] | None = None
        self._copies: dict[tuple[Site, Quant], tuple[Weights, ...]] = {}

    def copies(self, cell: Cell, site: Site) -> tuple[Weights, ...]:
        """As many copies as make up the pool's size, at least one."""
        owner = (cell.model, cell.rank, cell.slots, cell.dtype)
        if owner != self._owner:
            self.release()
            self._owner = owner
        key = site, cell.quant
        if key not in self._copies:
            p = cell.model.projection(site)
            one = (2.0 if cell.quant == "none" else 1.0) * p.slices * cell.slots * cell.model.experts * cell.rank * (p.k + p.n)
            count = max(1, math.ceil(self._bytes / one))
            torch.manual_seed(cell.rank * cell.model.experts + p.k)
            self._copies[key] = tuple(self._draw(cell, p) for _ in range(count))
        return self._copies[key]

    def release(self) -> None:
        """Free all weights, and whatever implementations derived from them."""
        self._copies, self._owner = {}, None
        self._on_release()
        gc.collect()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def _draw(self, cell: Cell, p: Projection) -> Weights:
        batch = cell.slots, cell.model.experts

        def draw(rows: int, columns: int) -> tuple[torch.Tensor, ...]:
            size = columns**-0.5 if cell.quant == "none" else FP8_SIZE
            shape = (*batch, rows, columns)
            drawn = (_normal(shape, size, cell, self._device) for _ in range(p.slices))
            return tuple(w if cell.quant == "none" else to_fp8(w) for w in drawn)

        def scales(rows: int, columns: int) -> tuple[torch.Tensor, ...]:
            if cell.quant == "none":
                return ()
            shape = (*batch, *scale_shape(cell.quant, rows, columns))
            return tuple(draw_scales(shape, columns**-0.5, self._device) for _ in range(p.slices))

        sizes = (cell.rank, p.k), (p.n, cell.rank)
        return Weights(*(draw(*size) for size in sizes), *(scales(*size) for size in sizes))


def make_case(cell: Cell, pool: WeightPool, device: torch.device, sets: int | None = None) -> Case:
    """The tensors of ``cell``: as many batches as one replay needs to pass the L2 cache, or ``sets``."""
    sites = PROJECTIONS[cell.site]
    copies = [pool.copies(cell, site) for site in sites]
    torch.manual_seed(cell.seed)
    pairs = cell.tokens * cell.model.top_k
    estimate = work(cell, expected_groups(cell), cell.tokens, pairs).bytes
    if sets is None:
        sets = min(MAX_SETS, max(4, math.ceil(TOUCHED_BYTES / estimate)))
    topk_ids, mapping = _assignments(cell, sets, device)
    topk_weights = torch.rand(topk_ids.shape, device=device).softmax(-1)
    activations = [_activations(cell, p, sets, device) for p in cell.projections]
    batches = tuple(
        Batch(
            topk_ids[i],
            mapping[i],
            topk_weights[i],
            tuple(
                Operands(p, x, out, weights[i % len(weights)], x_scale)
                for p, ring, weights in zip(cell.projections, activations, copies, strict=True)
                for x, x_scale, out in ring[i % len(ring) : i % len(ring) + 1]
            ),
        )
        for i in range(sets)
    )
    live = mapping >= 0
    groups = _groups_hit(cell, topk_ids, mapping)
    live_tokens = live.sum().item() / sets
    least = work(cell, groups, live_tokens, live_tokens * cell.model.top_k)
    return Case(cell, device, batches, least, groups)


def _normal(shape: tuple[int, ...], scale: float, cell: Cell, device: torch.device) -> torch.Tensor:
    return torch.empty(shape, dtype=DTYPES[cell.dtype], device=device).normal_(0.0, scale)


def to_fp8(numbers: torch.Tensor) -> torch.Tensor:
    """FP8 codes next to ``numbers``, which is overwritten."""
    largest = torch.finfo(FP8).max
    return numbers.clamp_(-largest, largest).to(FP8)


def draw_scales(shape: tuple[int, ...], size: float, device: torch.device) -> torch.Tensor:
    """Scales that make codes stand for numbers of about ``size``, and that differ: one from a wrong place shows."""
    spread = torch.empty(shape, dtype=torch.float32, device=device).uniform_(0.25, 1.75)
    return spread.mul_(size / FP8_SIZE)


def _activations(
    cell: Cell, p: Projection, sets: int, device: torch.device
) -> list[tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]]:
    """(x, its scales where it is FP8, out), of which batches take turns."""
    pairs = cell.tokens * cell.model.top_k
    rows = pairs if p.weighted else cell.tokens
    one = (2.0 if cell.act == "none" else 1.0) * rows * p.k + 2.0 * pairs * p.slices * p.n
    count = min(sets, _MAX_ACTIVATIONS, max(2, math.ceil(TOUCHED_BYTES / one)))
    shape = (cell.tokens, cell.model.top_k, p.slices * p.n)

    def draw() -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
        out = _normal(shape, 0.5, cell, device)
        if cell.act == "none":
            return _normal((rows, p.k), 1.0, cell, device), None, out
        x = to_fp8(_normal((rows, p.k), FP8_SIZE, cell, device))
        return x, draw_scales(scale_shape(cell.act, rows, p.k, 1) or (1,), 1.0, device), out

    return [draw() for _ in range(count)]


def _assignments(cell: Cell, sets: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Experts [sets, T, top_k] and adapters [sets, T], int32."""
    experts, tokens = cell.model.experts, cell.tokens
    logits = torch.zeros(sets, 1, experts, device=device)
    if cell.routing == "skewed":
        hot = max(1, round(_HOT_SHARE * experts))
        odds = torch.full((experts,), (1.0 - _HOT_PAIRS) / max(1, experts - hot), device=device)
        odds[:hot] = _HOT_PAIRS / hot
        order = torch.rand(sets, experts, device=device).argsort(-1)  # other experts in each set
        logits = odds.log()[order].view(sets, 1, experts)
    # Gumbel noise on log-odds: the top k are a draw without replacement.
    chosen = (
        [
            (logits[i : i + 1] - torch.rand(1, tokens, experts, device=device).log().neg().log())
            .topk(cell.model.top_k, dim=-1)
            .indices
            for i in range(sets)
        ]
        if tokens * experts > 1 << 16
        else [
            (logits - torch.rand(sets, tokens, experts, device=device).log().neg().log())
            .topk(cell.model.top_k, dim=-1)
            .indices
        ]
    )
    topk_ids = torch.cat(chosen).to(torch.int32)
    # Adapters in turn over the tokens that have one, base tokens spread evenly; both move on from set to set.
    at = torch.arange(tokens, device=device)[None] + torch.arange(sets, device=device)[:, None]
    live = ((at + 1) * cell.base).floor() == (at * cell.base).floor()
    turn = live.cumsum(1) + torch.arange(sets, device=device)[:, None]
    slot = turn % cell.active * cell.slots // cell.active
    return topk_ids, torch.where(live, slot, -1).to(torch.int32)


def _groups_hit(cell: Cell, topk_ids: torch.Tensor, mapping: torch.Tensor) -> float:
    sets = topk_ids.shape[0]
    groups = cell.slots * cell.model.experts
    group = mapping[:, :, None].long() * cell.model.experts + topk_ids
    hit = torch.zeros(sets, groups + 1, dtype=torch.bool, device=topk_ids.device)
    hit.scatter_(1, torch.where(group >= 0, group, groups).view(sets, -1), True)
    return hit[:, :groups].sum().item() / sets
