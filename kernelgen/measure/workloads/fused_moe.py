"""The base MoE: its operands, what is right for them, and the front doors."""

from __future__ import annotations

import dataclasses
import functools
import importlib
from typing import Any, Callable

import torch

from kernelgen.families.activation import OSS
from kernelgen.measure.models import Model
from kernelgen.measure.operands import (
    FP8,
    MAX_ACTIVATIONS,
    WEIGHT_BYTES,
    Matrix,
    experts,
    groups_hit,
    matrix,
    normal,
    sets,
)
from kernelgen.measure.suite import Act, Quant, matrix_bytes, scale_shape
from kernelgen.measure.suites.fused_moe import Cell
from kernelgen.measure.truth import Truth, WrongResult, chunks, error_limit, matrices, rows_of, sample
from kernelgen.measure.workload import Case, Prepared, Weights
from kernelgen.measure.workloads.ours import Op, Package

CHECKED = 12  # tokens or pairs
_CHUNK = 8  # pairs whose weights are gathered in fp64 at a time
H_SCALE = 0.25  # of all rows between the products, where it is given: the largest of them do not saturate


@dataclasses.dataclass(frozen=True)
class Experts:
    """The weights of a layer: w13 [E, 2 * I, H] (gate over up; of relu2 [E, I, H]), w2 [E, H, I]; of FP8, with scales."""

    w13: torch.Tensor
    w2: torch.Tensor
    w13_scale: torch.Tensor | None = None
    w2_scale: torch.Tensor | None = None


@dataclasses.dataclass(frozen=True)
class Batch:
    """One call: who goes where, rows x for what the cell does with them, and its output."""

    topk_ids: torch.Tensor  # [T, top_k] int32
    topk_weights: torch.Tensor  # [T, top_k] float32
    weights: Experts | None  # where the cell has a product
    x: torch.Tensor
    x_scale: torch.Tensor | None
    out: torch.Tensor

    @property
    def experts(self) -> Experts:
        """The weights of a cell with a product."""
        assert self.weights is not None
        return self.weights


def draw_experts(model: Model, quant: Quant, device: torch.device) -> Experts:
    """Weights that keep the size of activations."""
    halves, found = 2 if model.gated else 1, []
    shapes = ((halves * model.intermediate, model.hidden), (model.hidden, model.intermediate))
    for rows, columns in shapes:
        found.append(matrix(quant, model.experts, rows, columns, size=columns**-0.5, device=device))
    (w13, w13_scale), (w2, w2_scale) = found
    return Experts(w13, w2, w13_scale, w2_scale)


def experts_bytes(model: Model, quant: Quant) -> float:
    """Of all weights of a layer."""
    halves = 2 if model.gated else 1
    w13, w2 = (halves * model.intermediate, model.hidden), (model.hidden, model.intermediate)
    return model.experts * (matrix_bytes(quant, *w13) + matrix_bytes(quant, *w2))


def activate(x: torch.Tensor, gated: bool, clamped: bool = False) -> torch.Tensor:
    """What comes between the products: silu(gate) * up, gpt-oss' clamped one, or relu(x) ** 2."""
    if not gated:
        return x.relu() ** 2
    gate, up = x.chunk(2, dim=-1)
    if clamped:
        gate = gate.clamp(max=OSS.limit)
        return gate * torch.sigmoid(OSS.alpha * gate) * (up.clamp(-OSS.limit, OSS.limit) + OSS.beta)
    return torch.nn.functional.silu(gate) * up


class Workload:
    """Weights are shared by the cells of a model."""

    def __init__(self, device: torch.device, count: int | None = None, on_free: Callable[[], None] = lambda: None) -> None:
        self._device, self._count = device, count
        self._weights = Weights(device, WEIGHT_BYTES if count is None else 0.0, on_free)

    def case(self, cell: Cell) -> Case[Batch]:
        """The operands of ``cell``."""
        copies = self._copies(cell)
        torch.manual_seed(cell.seed)
        drawn = cell.model.experts * (1.0 - (1.0 - cell.model.top_k / cell.model.experts) ** cell.tokens)
        count = self._count or sets(cell.work(drawn).bytes)
        topk_ids = experts(cell, count, self._device)
        topk_weights = torch.rand(topk_ids.shape, device=self._device).softmax(-1)
        ring = self._rows(cell, count)
        batches = tuple(
            Batch(topk_ids[i], topk_weights[i], copies[i % len(copies)], *ring[i % len(ring)]) for i in range(count)
        )

        @functools.cache
        def hit() -> float:
            return groups_hit(topk_ids, cell.model.experts)

        return Case(cell, batches, lambda: cell.work(hit()), lambda: {"experts_hit": round(hit(), 1)})

    def truths(self, case: Case[Batch], prepared: Prepared) -> list[Truth]:
        """Of a sample of tokens, what the first batch has to leave in ``out``: of whole layers and of sums."""
        del prepared
        batch, cell = case.batches[0], case.cell
        if cell.site == "align":
            return []
        return layer_truths(cell, batch, functools.partial(activate, gated=cell.model.gated, clamped=clamped(cell)))

    def _copies(self, cell: Cell) -> tuple[Experts | None, ...]:
        if cell.site not in ("layer", "w13", "w2"):
            return (None,)
        size = experts_bytes(cell.model, cell.quant)
        torch.manual_seed(cell.model.experts + cell.model.hidden)
        draw = functools.partial(draw_experts, cell.model, cell.quant, self._device)
        return self._weights.copies((cell.model, cell.quant), "experts", size, draw)

    def _rows(self, cell: Cell, count: int) -> list[tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]]:
        """(x, its scales where it is FP8, out), of which batches take turns."""
        m, device = cell.model, self._device
        tokens, pairs = (cell.tokens,), (cell.tokens, m.top_k)
        x_shape, act, out_shape = {
            "layer": ((cell.tokens, m.hidden), cell.act, (*tokens, m.hidden)),
            "w13": ((cell.tokens, m.hidden), cell.act, (*pairs, m.intermediate)),
            "w2": ((cell.pairs, m.intermediate), cell.act, (*pairs, m.hidden)),
            "align": ((1, 1), "none", (1, 1)),
            "quant": ((cell.pairs, m.intermediate), "none", (cell.pairs, m.intermediate)),
            "sum": ((cell.pairs, m.hidden), "none", (*tokens, m.hidden)),
        }[cell.site]
        one, found = 2.0 * x_shape[0] * x_shape[1], []
        for _ in range(min(count, sets(one, MAX_ACTIVATIONS))):
            x: Matrix = matrix(act, *x_shape, group_rows=1, device=device)
            found.append((*x, normal(*out_shape, device=device)))
        return found


def poisoned(out: torch.Tensor, rows: torch.Tensor, wanted: torch.Tensor, act: Act = "none") -> Truth:
    """What ``out`` [R, N], filled with NaN, has to hold; ``act``: the scales of rows that become FP8 on the way."""
    out.fill_(float("nan"))
    limit = error_limit(torch.bfloat16)
    if act != "none":
        limit += torch.finfo(FP8).eps / 4  # half a step at most, and a third of that is its root mean square
    return Truth(out, out.clone(), None, rows, wanted, limit)


Between = Callable[[torch.Tensor], torch.Tensor]


def layer_truths(cell: Cell, batch: Batch, between: Between) -> list[Truth]:
    """Of a sample of tokens, what a whole layer or a sum has to leave in ``out``; ``between``: the products."""
    tokens = sample(torch.ones(cell.tokens, dtype=torch.bool, device=batch.out.device), CHECKED)
    pairs = tokens[:, None] * cell.model.top_k + torch.arange(cell.model.top_k, device=tokens.device)
    if cell.site == "sum":
        y = batch.x[pairs].double()
    else:
        found = [second_rows(batch, part, first_rows(batch, part, between)) for part in chunks(pairs.flatten(), _CHUNK)]
        y = torch.cat(found).view(*pairs.shape, -1)
    wanted = (batch.topk_weights[tokens].double()[:, :, None] * y).sum(1)
    return [poisoned(batch.out, tokens, wanted, cell.act if cell.site == "layer" else "none")]


def first_rows(batch: Batch, pairs: torch.Tensor, between: Between) -> torch.Tensor:
    """What the experts of ``pairs`` make of the rows of their tokens: [n, I] in fp64."""
    w, who = batch.experts, (batch.topk_ids.reshape(-1).long()[pairs],)
    x = rows_of(batch.x, batch.x_scale, pairs // batch.topk_ids.shape[1])
    return between((matrices(w.w13, w.w13_scale, who) @ x[:, :, None])[:, :, 0])


def second_rows(batch: Batch, pairs: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
    """What they make of rows h [n, I]: [n, H] in fp64."""
    w, who = batch.experts, (batch.topk_ids.reshape(-1).long()[pairs],)
    return (matrices(w.w2, w.w2_scale, who) @ h[:, :, None])[:, :, 0]


class Ours(Package):
    """``fused_moe``, or one of the ops that it is made of, as it calls them."""

    def ops(self, case: Case[Batch]) -> list[Op]:
        """The sites of the suite are the methods behind it."""
        make: Callable[[Case[Batch], Batch], Op] = getattr(self, f"_{case.cell.site}")
        return [make(case, batch) for batch in case.batches]

    def _layer(self, case: Case[Batch], batch: Batch) -> Op:
        model, w, scales = case.cell.model, batch.experts, {"x_scale": batch.x_scale}
        if case.cell.act == "tensor":
            scales["h_scale"] = torch.full((1,), H_SCALE, device=case.device)
        space = self.kg.fused_moe_workspace(
            max_tokens=case.cell.tokens,
            top_k=model.top_k,
            num_experts=model.experts,
            hidden=model.hidden,
            intermediate=model.intermediate,
            fp8_activations=batch.x_scale is not None,
            device=case.device,
        )
        operands = (batch.x, w.w13, w.w2, batch.topk_ids, batch.topk_weights)
        options = {**activation(case.cell), "out": batch.out, "workspace": space, **scales}
        return Op(functools.partial(self.kg.fused_moe, *operands, w13_scale=w.w13_scale, w2_scale=w.w2_scale, **options))

    def _w13(self, case: Case[Batch], batch: Batch) -> Op:
        tables, place = self._tables(case, batch)
        w, out = batch.experts, batch.out.flatten(0, 1)
        rows = {"x_rows": "token", "out_rows": "pair" if place is None else "sorted", **activation(case.cell)}
        scales = {"w_scale": w.w13_scale, "x_scale": batch.x_scale}

        def truths() -> list[Truth]:
            pairs = sample(torch.ones(len(out), dtype=torch.bool, device=out.device), CHECKED)
            between = functools.partial(activate, gated=case.cell.model.gated, clamped=clamped(case.cell))
            wanted = torch.cat([first_rows(batch, part, between) for part in chunks(pairs, _CHUNK)])
            return [poisoned(out, pairs if place is None else place()[pairs], wanted)]

        return Op(functools.partial(self.kg.moe_gemm, out, batch.x, w.w13, tables, **rows, **scales), truths)

    def _w2(self, case: Case[Batch], batch: Batch) -> Op:
        tables, place = self._tables(case, batch)
        w, top_k, out = batch.experts, case.cell.model.top_k, batch.out.flatten(0, 1)
        scales = {"w_scale": w.w2_scale, "x_scale": batch.x_scale}

        def of(pairs: torch.Tensor) -> torch.Tensor:
            return second_rows(batch, pairs, rows_of(batch.x, batch.x_scale, pairs if place is None else place()[pairs]))

        def of_pairs() -> list[Truth]:
            pairs = sample(torch.ones(len(out), dtype=torch.bool, device=out.device), CHECKED)
            return [poisoned(out, pairs, torch.cat([of(part) for part in chunks(pairs, _CHUNK)]))]

        if place is not None:
            call = functools.partial(self.kg.moe_gemm, out, batch.x, w.w2, tables, x_rows="sorted", **scales)
            return Op(call, of_pairs)
        if case.cell.quant == "mx" and not self._by_lanes(case, batch):  # by moe_sum
            return Op(functools.partial(self.kg.moe_gemm, out, batch.x, w.w2, tables, x_rows="pair", **scales), of_pairs)
        sums = out[: case.cell.tokens]

        def of_tokens() -> list[Truth]:
            tokens = torch.arange(len(sums), device=out.device)
            y = torch.stack([of(tokens * top_k + j) for j in range(top_k)], 1)
            return [poisoned(sums, tokens, (batch.topk_weights.double()[:, :, None] * y).sum(1))]

        rows = {"x_rows": "pair", "out_rows": "token", "topk_weights": batch.topk_weights}
        return Op(functools.partial(self.kg.moe_gemm, sums, batch.x, w.w2, tables, **rows, **scales), of_tokens)

    def _align(self, case: Case[Batch], batch: Batch) -> Op:
        call = functools.partial(self.kg.moe_align, batch.topk_ids, num_experts=case.cell.model.experts)

        def check() -> None:
            place_of_pairs(call(), batch.topk_ids)

        return Op(call, None, check)

    def _quant(self, case: Case[Batch], batch: Batch) -> Op:
        tables, place = self._tables(case, batch)
        codes = torch.zeros_like(batch.x, dtype=FP8)
        rows, columns = batch.x.shape
        sizes = scale_shape(case.cell.act, rows, columns, 1) or (1,)
        scale = torch.full(sizes, H_SCALE, device=case.device)
        order = "pair" if place is None else "sorted"

        def check() -> None:
            wide = batch.x.double()
            error = (rows_of(codes, scale, torch.arange(rows, device=codes.device)) - wide).norm(dim=1) / wide.norm(dim=1)
            if not float(error.max()) <= torch.finfo(FP8).eps / 2:
                raise WrongResult(f"relative error {float(error.max()):.2g} of a row of FP8")

        return Op(functools.partial(self.kg.moe_quant, codes, scale, batch.x, tables, order=order), list, check)

    def _sum(self, case: Case[Batch], batch: Batch) -> Op:
        y = batch.x.view(*batch.topk_ids.shape, -1)
        options = {"num_experts": case.cell.model.experts, "topk_weights": batch.topk_weights, "out": batch.out}
        return Op(functools.partial(self.kg.moe_sum, y, batch.topk_ids, **options))

    def _by_lanes(self, case: Case[Batch], batch: Batch) -> bool:
        """Whether lanes widen the weights of few tokens."""
        if case.cell.quant != "mx":
            return False
        layer = importlib.import_module(f"{self.kg.__name__}._fused_moe")
        weights = [w for w in (batch.experts.w13, batch.experts.w2) if w is not None]
        return bool(layer.lanes_serve(batch.x, weights, case.cell.model.top_k))

    def _tables(self, case: Case[Batch], batch: Batch) -> tuple[Any, Callable[[], torch.Tensor] | None]:
        """Tables, and what finds where in them each pair is; None: few tokens need none."""
        cell, experts = case.cell, case.cell.model.experts
        layer = importlib.import_module(f"{self.kg.__name__}._fused_moe")
        halves, fp8 = 3 if cell.model.gated else 2, cell.quant != "none"
        size = halves * cell.model.hidden * cell.model.intermediate * 16 // {"none": 8, "mx": 32}.get(cell.quant, 16)
        on_units = cell.act != "none" or cell.quant == "mx"
        most = layer.few_tokens(cell.quant, self._by_lanes(case, batch), cell.act != "none")
        block_m = layer.layer_block_m(cell.tokens, cell.tokens, cell.model.top_k, experts, size, fp8, on_units, most)
        if block_m == 0:
            return self.kg.no_tables(batch.topk_ids, num_experts=experts), None
        tables = self.kg.moe_align(batch.topk_ids, num_experts=experts, block_m=block_m)
        return tables, functools.cache(functools.partial(place_of_pairs, tables, batch.topk_ids))


def clamped(cell: Any) -> bool:
    """Whether the activation is that of gpt-oss, which MXFP4 weights go with."""
    return bool(cell.quant == "mx")


def activation(cell: Any) -> dict[str, Any]:
    """As the ops take it."""
    if clamped(cell):
        return {"activation": "swiglu_clamp", **OSS.given}
    return {"activation": "swiglu" if cell.model.gated else "relu2"}


def place_of_pairs(tables: Any, topk_ids: torch.Tensor) -> torch.Tensor:
    """Where in the tables each pair is, [P].

    Raises:
        WrongResult: not each pair is there once, in a block of its expert.
    """
    count = topk_ids.numel()
    listed, used = tables.pairs[:count].long(), tables.blocks[: 3 * int(tables.num_blocks)].view(-1, 3).long()
    rows = used[:, 2]
    owner = torch.arange(len(used), device=rows.device).repeat_interleave(rows)
    within = torch.arange(len(owner), device=rows.device) - (rows.cumsum(0) - rows)[owner]
    place = torch.empty_like(listed)
    place[listed] = torch.arange(count, device=listed.device)
    there = listed[(used[owner, 1] + within).clamp(max=count - 1)]
    if len(there) != count or not torch.equal(there.sort().values, torch.arange(count, device=there.device)):
        raise WrongResult("the tables do not hold each pair once")
    if not torch.equal(topk_ids.reshape(-1).long()[there], used[owner, 0]):
        raise WrongResult("a pair is in a block of another expert")
    return place
