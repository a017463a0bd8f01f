"""MoE-LoRA: its operands, what is right for them, and the front doors."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, Callable

import torch

from kernelgen.measure.models import Projection
from kernelgen.measure.operands import (
    DTYPES,
    MAX_ACTIVATIONS,
    WEIGHT_BYTES,
    experts,
    groups_hit,
    mappings,
    matrix,
    normal,
    sets,
)
from kernelgen.measure.suite import matrix_bytes
from kernelgen.measure.suites.moe_lora import PROJECTIONS, SCHEDULES, Cell
from kernelgen.measure.truth import Truth, WrongResult, chunks, error_limit, matrices, rows_of, sample
from kernelgen.measure.workload import Case, Prepared, Unsupported, Weights
from kernelgen.measure.workloads.ours import Op, Package

NAIVE = ("small_batch",)  # schedules that take pairs one by one
_CHUNK = 16  # pairs whose weights are gathered in fp64 at a time


@dataclasses.dataclass(frozen=True)
class Adapters:
    """One copy of the adapters of a projection: S tensors [L, E, rank, K] and S of [L, E, N, rank]; of FP8, with scales."""

    a: tuple[torch.Tensor, ...]
    b: tuple[torch.Tensor, ...]
    a_scale: tuple[torch.Tensor, ...] = ()
    b_scale: tuple[torch.Tensor, ...] = ()


@dataclasses.dataclass(frozen=True)
class Operands:
    """What one projection of one call reads and writes: x [T or P, K], out [T, top_k, S * N]."""

    projection: Projection
    x: torch.Tensor
    out: torch.Tensor
    weights: Adapters
    x_scale: torch.Tensor | None = None

    @property
    def tensors(self) -> tuple[Any, ...]:
        """In the order of the op."""
        return self.out, self.x, self.weights.a, self.weights.b

    @property
    def scales(self) -> dict[str, Any]:
        """As keywords of the op: those that there are."""
        found = {"a_scale": self.weights.a_scale, "b_scale": self.weights.b_scale, "x_scale": self.x_scale}
        return {name: scales for name, scales in found.items() if scales is not None and scales != ()}


@dataclasses.dataclass(frozen=True)
class Batch:
    """One call: who goes where, and the operands of each projection of the cell."""

    topk_ids: torch.Tensor  # [T, top_k] int32
    mapping: torch.Tensor  # [T] int32, -1: no adapter
    topk_weights: torch.Tensor  # [T, top_k] float32
    operands: tuple[Operands, ...]

    @property
    def live(self) -> torch.Tensor:
        """[P] bool: pairs with an adapter."""
        return (self.mapping >= 0).repeat_interleave(self.topk_ids.shape[1])


class Workload:
    """Weights are shared by the cells of a model, a rank and a number of slots."""

    def __init__(self, device: torch.device, count: int | None = None, on_free: Callable[[], None] = lambda: None) -> None:
        self._device, self._count = device, count
        self._weights = Weights(device, WEIGHT_BYTES if count is None else 0.0, on_free)

    def case(self, cell: Cell) -> Case[Batch]:
        """The operands of ``cell``."""
        device, tokens = self._device, cell.tokens
        copies = [self._copies(cell, site) for site in PROJECTIONS[cell.site]]
        torch.manual_seed(cell.seed)
        count = self._count or sets(cell.work(cell.groups, tokens, cell.pairs).bytes)
        topk_ids = experts(cell, count, device)
        mapping = mappings(tokens, count, cell.active, cell.slots, cell.base, device)
        topk_weights = torch.rand(topk_ids.shape, device=device).softmax(-1)
        rings = [self._activations(cell, p, count) for p in cell.projections]
        batches = tuple(
            Batch(
                topk_ids[i],
                mapping[i],
                topk_weights[i],
                tuple(
                    Operands(p, *ring[i % len(ring)][:2], weights[i % len(weights)], ring[i % len(ring)][2])
                    for p, ring, weights in zip(cell.projections, rings, copies, strict=True)
                ),
            )
            for i in range(count)
        )

        @functools.cache
        def hit() -> float:
            group = torch.where(mapping[:, :, None] >= 0, mapping[:, :, None].long() * cell.model.experts + topk_ids, -1)
            return groups_hit(group, cell.slots * cell.model.experts)

        def work() -> Any:
            live = (mapping >= 0).sum().item() / count
            return cell.work(hit(), live, live * cell.model.top_k)

        return Case(cell, batches, work, lambda: {"groups": round(hit(), 1)})

    def truths(self, case: Case[Batch], prepared: Prepared) -> list[Truth]:
        """Of a sample of live pairs, what the first batch has to leave in each ``out``."""
        batch = case.batches[0]
        return [truth(case.cell, batch, operands, prepared.applies_weights) for operands in batch.operands]

    def _copies(self, cell: Cell, site: Any) -> tuple[Adapters, ...]:
        p = cell.model.projection(site)
        one = matrix_bytes(cell.quant, cell.rank, p.k) + matrix_bytes(cell.quant, p.n, cell.rank)
        owner, name = (cell.model, cell.rank, cell.slots, cell.dtype), (site, cell.quant)

        def draw() -> Adapters:
            shape, found = (cell.slots, cell.model.experts), []
            for rows, columns in ((cell.rank, p.k), (p.n, cell.rank)):
                options = {"size": columns**-0.5, "dtype": DTYPES[cell.dtype], "device": self._device}
                drawn = [matrix(cell.quant, *shape, rows, columns, **options) for _ in range(p.slices)]
                found.append((tuple(w for w, _ in drawn), tuple(s for _, s in drawn if s is not None)))
            (a, a_scale), (b, b_scale) = found
            return Adapters(a, b, a_scale, b_scale)

        torch.manual_seed(cell.rank * cell.model.experts + p.k)
        return self._weights.copies(owner, name, one * p.slices * cell.slots * cell.model.experts, draw)

    def _activations(self, cell: Cell, p: Projection, count: int) -> list[tuple[torch.Tensor, torch.Tensor, Any]]:
        """(x, out, the scales of x where it is FP8), of which batches take turns."""
        rows = cell.pairs if p.weighted else cell.tokens
        one = matrix_bytes(cell.act, rows, p.k, 1) + 2.0 * cell.pairs * p.slices * p.n
        found, dtype = [], DTYPES[cell.dtype]
        for _ in range(min(count, sets(one, MAX_ACTIVATIONS))):
            out = normal(cell.tokens, cell.model.top_k, p.slices * p.n, size=0.5, dtype=dtype, device=self._device)
            x, scale = matrix(cell.act, rows, p.k, dtype=dtype, group_rows=1, device=self._device)
            found.append((x, out, scale))
        return found


def truth(cell: Cell, batch: Batch, operands: Operands, weighted: bool = True) -> Truth:
    """Where the call overwrites, ``out`` is filled with NaN first."""
    if not cell.add:
        operands.out.fill_(float("nan"))
    out = operands.out.flatten(0, 1)
    before, pairs = out.clone(), sample(batch.live)
    wanted = delta(batch, operands, pairs, weighted)
    if cell.add:
        wanted = wanted + before[pairs].double()
    return Truth(out, before, batch.live, pairs, wanted, error_limit(out.dtype))


def delta(batch: Batch, operands: Operands, pairs: torch.Tensor, weighted: bool) -> torch.Tensor:
    """What LoRA adds to the rows of live ``pairs`` [n]: [n, S * N] in fp64."""
    top_k, p, w = batch.topk_ids.shape[1], operands.projection, operands.weights
    found = [torch.empty((0, p.slices * p.n), dtype=torch.float64, device=pairs.device)]
    for part in chunks(pairs, _CHUNK):
        who = batch.mapping.long()[part // top_k], batch.topk_ids.reshape(-1).long()[part]
        x = rows_of(operands.x, operands.x_scale, part if p.weighted else part // top_k)[:, :, None]
        columns = [
            matrices(w.b[s], w.b_scale[s] if w.b_scale else None, who)
            @ (matrices(w.a[s], w.a_scale[s] if w.a_scale else None, who) @ x)
            for s in range(p.slices)
        ]
        found.append(torch.cat(columns, 1)[:, :, 0])
    result = torch.cat(found)
    if weighted and p.weighted:
        result *= batch.topk_weights.reshape(-1)[pairs].double()[:, None]
    return result


class Ours(Package):
    """``moe_lora`` and ``moe_route``; ``form``: a schedule."""

    SCHEDULES = SCHEDULES

    def ops(self, case: Case[Batch]) -> list[Op]:
        cell: Cell = case.cell
        space = self.kg.moe_workspace(
            max_tokens=cell.tokens,
            top_k=cell.model.top_k,
            num_experts=cell.model.experts,
            max_loras=cell.slots,
            max_rank=cell.rank,
            num_slices=max([p.slices for p in cell.projections], default=1),
            device=case.device,
        )
        if cell.site in ("w13", "w2"):
            # Tables of its own for each batch; the scratch is shared, as on a stream of an engine.
            spaces = [space._replace(tables=torch.empty_like(space.tables)) for _ in case.batches]
            routes = [self._route(cell, batch, own) for batch, own in zip(case.batches, spaces, strict=True)]
            pairs = zip(case.batches, routes, strict=True)
            return [Op(self._projection(cell, batch, batch.operands[0], route)) for batch, route in pairs]
        if self.form:
            raise Unsupported(f"{self.form} is asked for on w13 and w2 only")
        check = functools.partial(self._check_route, cell, case.batches[0], space) if cell.site == "route" else None
        return [Op(functools.partial(self._layer, cell, batch, space), check=check) for batch in case.batches]

    def _route(self, cell: Cell, batch: Batch, space: Any) -> Any:
        options = {"assignment": "naive" if self.form in NAIVE else "sorted"} if self.form in SCHEDULES else {}
        sizes = {"num_experts": cell.model.experts, "max_loras": cell.slots, "rank": cell.rank}
        return self.kg.moe_route(batch.topk_ids, batch.mapping, workspace=space, **sizes, **options)

    def _layer(self, cell: Cell, batch: Batch, space: Any) -> None:
        route = self._route(cell, batch, space)
        for operands in batch.operands:
            self._projection(cell, batch, operands, route)()

    def _projection(self, cell: Cell, batch: Batch, operands: Operands, route: Any) -> Callable[[], None]:
        weighted = operands.projection.weighted
        if self.form == "apart":
            return self._apart(cell, batch, operands, route)
        return functools.partial(
            self.kg.moe_lora,
            *operands.tensors,
            route,
            topk_weights=batch.topk_weights if weighted else None,
            add_inputs=cell.add,
            mul_routed_weight=weighted,
            **operands.scales,
        )

    def _apart(self, cell: Cell, batch: Batch, operands: Operands, route: Any) -> Callable[[], None]:
        """Its two products as ops."""
        if not cell.add or (cell.quant, cell.act) != ("none", "none"):
            raise Unsupported("the two products add, and are of 16 bits")
        p, w = operands.projection, operands.weights
        y = torch.empty(p.slices, cell.pairs, cell.rank, dtype=torch.float32, device=operands.x.device)
        options = {"topk_weights": batch.topk_weights, "mul_routed_weight": True} if p.weighted else {}

        def call() -> None:
            self.kg.moe_lora_shrink(y, operands.x, w.a, route)
            self.kg.moe_lora_expand(operands.out, y, w.b, route, **options)

        return call

    def _check_route(self, cell: Cell, batch: Batch, space: Any) -> None:
        route = self._route(cell, batch, space)
        check_blocks(batch, route.pairs, route.blocks, route.num_blocks)


def check_blocks(batch: Batch, pairs: torch.Tensor, blocks: torch.Tensor, num_blocks: torch.Tensor) -> None:
    """Check the tables of a route: each live pair in exactly one block, and in a block of its adapter and expert.

    Raises:
        WrongResult: they do not.
    """
    live, top_k = batch.live.nonzero()[:, 0], batch.topk_ids.shape[1]
    used = blocks[: int(num_blocks)].long()
    rows = used[:, 3]
    owner = torch.arange(len(used), device=rows.device).repeat_interleave(rows)
    within = torch.arange(len(owner), device=rows.device) - (rows.cumsum(0) - rows)[owner]
    listed = pairs.long()[used[owner, 2] + within]
    right = (
        torch.equal(listed.sort().values, live)
        and torch.equal(batch.mapping.long()[listed // top_k], used[owner, 0])
        and torch.equal(batch.topk_ids.reshape(-1).long()[listed], used[owner, 1])
    )
    if not right:
        raise WrongResult("the tables of the route do not hold each live pair once, in its own block")
