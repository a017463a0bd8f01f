"""Whole MoE layers with adapters: their operands, what is right for them, and ``MoeLayer``."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, Callable

import torch

from kernelgen.integrations.moe_layer import MoeLayer
from kernelgen.integrations.peft import LayerBuffers, SliceBuffers
from kernelgen.measure.operands import WEIGHT_BYTES, experts, groups_hit, mappings, matrix, normal, sets
from kernelgen.measure.suites.layer import Cell
from kernelgen.measure.suites.moe_lora import PROJECTIONS
from kernelgen.measure.truth import Truth, matrices, rows_of, sample
from kernelgen.measure.workload import Case, Prepared, Unsupported, Weights
from kernelgen.measure.workloads import fused_moe
from kernelgen.measure.workloads.fused_moe import CHECKED, H_SCALE, Experts, activate, activation, clamped, poisoned
from kernelgen.measure.workloads.ours import Op, Package

FEW_TOKENS = 4  # that stream weights pair by pair, as fused_moe does


@dataclasses.dataclass(frozen=True)
class Batch:
    """One call: who goes where, the rows of tokens, and the output: [T, H] of a layer, [T, top_k, 2 * I] of the first product."""

    topk_ids: torch.Tensor  # [T, top_k] int32
    topk_weights: torch.Tensor  # [T, top_k] float32
    mapping: torch.Tensor  # [T] int32, -1: no adapter
    weights: Experts
    lora: LayerBuffers | None
    x: torch.Tensor
    x_scale: torch.Tensor | None
    out: torch.Tensor


class Workload:
    """Weights and adapters are shared by the cells of a model."""

    def __init__(self, device: torch.device, count: int | None = None, on_free: Callable[[], None] = lambda: None) -> None:
        self._device, self._count = device, count
        self._weights = Weights(device, WEIGHT_BYTES if count is None else 0.0, on_free)

    def case(self, cell: Cell) -> Case[Batch]:
        """The operands of ``cell``."""
        model, device = cell.model, self._device
        torch.manual_seed(model.experts + model.hidden)
        draw = functools.partial(fused_moe.draw_experts, model, cell.quant, device)
        weights = self._weights.copies((model, cell.quant), "experts", fused_moe.experts_bytes(model, cell.quant), draw)
        loras: tuple[LayerBuffers | None, ...] = (None,)
        if cell.rank:
            size = 2.0 * cell.slots * model.experts * cell.rank * (3 * model.hidden + 3 * model.intermediate)
            draw_adapters = functools.partial(_adapters, cell, device)
            loras = self._weights.copies((model, cell.quant), (cell.rank, cell.slots), size, draw_adapters)
        torch.manual_seed(cell.seed)
        count = self._count or sets(cell.work(min(model.experts, cell.pairs), 0.0).bytes)
        topk_ids = experts(cell, count, device)
        topk_weights = torch.rand(topk_ids.shape, device=device).softmax(-1)
        mapping = mappings(cell.tokens, count, cell.active, cell.slots, cell.base, device)
        shape = (cell.tokens, model.hidden) if cell.site == "layer" else (cell.tokens, model.top_k, 2 * model.intermediate)
        out = normal(*shape, device=device)  # which is written whole, and read by nobody
        batches = tuple(
            Batch(
                topk_ids[i],
                topk_weights[i],
                mapping[i],
                weights[i % len(weights)],
                loras[i % len(loras)],
                *matrix(cell.act, cell.tokens, model.hidden, group_rows=1, device=device),
                out,
            )
            for i in range(count)
        )

        def work() -> Any:
            group = torch.where(mapping[:, :, None] >= 0, mapping[:, :, None].long() * model.experts + topk_ids, -1)
            return cell.work(groups_hit(topk_ids, model.experts), groups_hit(group, max(1, cell.slots) * model.experts))

        return Case(cell, batches, work)

    def truths(self, case: Case[Batch], prepared: Prepared) -> list[Truth]:
        """Of a sample of rows, what the first batch has to leave in ``out``."""
        del prepared
        return _truths(case.cell, case.batches[0])


def _truths(cell: Cell, batch: Batch) -> list[Truth]:
    top_k = cell.model.top_k
    out = batch.out.flatten(0, -2)
    rows = sample(torch.ones(len(out), dtype=torch.bool, device=out.device), CHECKED)
    if cell.site == "w13":
        return [poisoned(out, rows, torch.stack([_pair(cell, batch, int(pair), False) for pair in rows]))]
    tokens = [
        sum(batch.topk_weights[t, j].double() * _pair(cell, batch, int(t) * top_k + j, True) for j in range(top_k)) for t in rows
    ]
    return [poisoned(out, rows, torch.stack(tokens), cell.act)]  # type: ignore[arg-type]


def _adapters(cell: Cell, device: torch.device) -> LayerBuffers:
    found = []
    for site in PROJECTIONS["layer"]:
        p = cell.model.projection(site)
        batch = (cell.slots, cell.model.experts)
        a = tuple(normal(*batch, cell.rank, p.k, size=p.k**-0.5, device=device) for _ in range(p.slices))
        b = tuple(normal(*batch, p.n, cell.rank, size=cell.rank**-0.5, device=device) for _ in range(p.slices))
        found.append(SliceBuffers(a, b))
    return LayerBuffers(found[0], found[1], torch.ones(cell.slots, dtype=torch.int32, device=device))


def _pair(cell: Cell, batch: Batch, pair: int, whole: bool) -> torch.Tensor:
    """What the expert and the adapter of a pair make of its token, in fp64: all of it, or the first product."""
    token, expert = pair // batch.topk_ids.shape[1], batch.topk_ids.reshape(-1)[[pair]].long()
    adapter = int(batch.mapping[token])

    def product(w: torch.Tensor, scale: torch.Tensor | None, x: torch.Tensor, lora: SliceBuffers | None) -> torch.Tensor:
        y = matrices(w, scale, (expert,))[0] @ x
        if lora is None or adapter < 0:
            return y
        slices = zip(lora.a, lora.b, strict=True)
        return y + torch.cat([b[adapter, expert][0].double() @ (a[adapter, expert][0].double() @ x) for a, b in slices])

    lora, w = batch.lora, batch.weights
    x = rows_of(batch.x, batch.x_scale, torch.tensor([token], device=batch.x.device))[0]
    rows = product(w.w13, w.w13_scale, x, lora and lora.gate_up)
    return product(w.w2, w.w2_scale, activate(rows, True, clamped(cell)), lora and lora.down) if whole else rows


class Ours(Package):
    """``MoeLayer``, with the form "bare" without its adapters, or with the form "separate" the ops of an engine with products of
    its own, ours in their place; of the first product ``moe_gemm`` and ``moe_lora``, and with the form "overlap" both at once.
    """

    def ops(self, case: Case[Batch]) -> list[Op]:
        cell: Cell = case.cell
        if not cell.model.gated:
            raise Unsupported("MoeLayer has a gate")
        adapted = cell.site == "layer" and cell.rank > 0
        asked = {"overlap": cell.site == "w13", "separate": adapted, "bare": adapted}
        if not asked.get(self.form, True):
            raise Unsupported("overlap is asked for on w13, bare and separate on layers with adapters")
        if self.form == "bare":
            bare = [dataclasses.replace(batch, lora=None) for batch in case.batches]
            return [Op(self._layer(case, batch), functools.partial(_truths, cell, bare[0])) for batch in bare]
        if self.form and cell.quant != "none":
            raise Unsupported("the separate ops have no base product of FP8 or MXFP4")
        make = self._first if cell.site == "w13" else self._separate if self.form else self._layer
        return [Op(make(case, batch)) for batch in case.batches]

    def _layer(self, case: Case[Batch], batch: Batch) -> Callable[[], Any]:
        model, cell = case.cell.model, case.cell
        w, h_scale = batch.weights, torch.full((1,), H_SCALE, device=case.device) if cell.act == "tensor" else None
        layer = MoeLayer(self.kg, w.w13, w.w2, batch.lora, w.w13_scale, w.w2_scale, h_scale, **activation(cell))
        sizes = {"top_k": model.top_k, "num_experts": model.experts, "hidden": model.hidden, "intermediate": model.intermediate}
        options = {"max_tokens": cell.tokens, "dtype": batch.out.dtype, "device": case.device}
        options |= {"max_rank": cell.rank if batch.lora else 0, "fp8_activations": batch.x_scale is not None}
        space = self.kg.fused_moe_workspace(**sizes, **options)
        mapping = batch.mapping if batch.lora else None
        given = {"x_scale": batch.x_scale, "out": batch.out, "workspace": space}
        return functools.partial(layer, batch.x, batch.topk_ids, batch.topk_weights, mapping, **given)

    def _separate(self, case: Case[Batch], batch: Batch) -> Callable[[], None]:
        (tokens, top_k), model, kg, lora = batch.topk_ids.shape, case.cell.model, self.kg, batch.lora
        assert lora is not None
        sizes, space = {"num_experts": model.experts}, self._space(case)
        make_tables = kg.no_tables if tokens <= FEW_TOKENS else kg.moe_align
        of_route = {"max_loras": case.cell.slots, "adapter_enabled": lora.adapter_enabled, "rank": case.cell.rank, **sizes}
        rows = batch.x.new_empty(tokens, top_k, 2 * model.intermediate)
        h, y = batch.x.new_empty(tokens * top_k, model.intermediate), batch.x.new_empty(tokens, top_k, model.hidden)
        weighted = {"topk_weights": batch.topk_weights}

        def layer() -> None:
            route = kg.moe_route(batch.topk_ids, batch.mapping, workspace=space, **of_route)
            tables = make_tables(batch.topk_ids, **sizes)
            kg.moe_gemm(rows, batch.x, batch.weights.w13, tables, x_rows="token")
            kg.moe_lora(rows, batch.x, *lora.gate_up, route)
            kg.moe_act(h, rows, batch.topk_ids, activation="swiglu", **sizes)
            kg.moe_gemm(y, h, batch.weights.w2, tables, x_rows="pair", **weighted)
            kg.moe_lora(y, h, *lora.down, route, mul_routed_weight=True, **weighted)
            kg.moe_sum(y, batch.topk_ids, out=batch.out, **sizes)

        return layer

    def _first(self, case: Case[Batch], batch: Batch) -> Callable[[], None]:
        cell, kg, lora = case.cell, self.kg, batch.lora
        assert lora is not None
        sizes = {"num_experts": cell.model.experts}
        tables = (kg.no_tables if cell.tokens <= FEW_TOKENS else kg.moe_align)(batch.topk_ids, **sizes)
        space = self._space(case)
        route = kg.moe_route(batch.topk_ids, batch.mapping, max_loras=cell.slots, rank=cell.rank, workspace=space, **sizes)
        delta = torch.empty_like(batch.out)

        def base() -> None:
            kg.moe_gemm(batch.out, batch.x, batch.weights.w13, tables, x_rows="token")

        def in_sequence() -> None:
            base()
            kg.moe_lora(batch.out, batch.x, *lora.gate_up, route)

        if not self.form:
            return in_sequence
        stream, events = None, None
        if case.device.type == "cuda":
            stream, events = _side_stream(), (_event(), _event())

        def beside() -> None:
            kg.overlap(base, lambda: kg.moe_lora(delta, batch.x, *lora.gate_up, route, add_inputs=False), stream, events)
            kg.moe_add(batch.out, delta, route)

        return beside

    def _space(self, case: Case[Batch]) -> Any:
        model, cell = case.cell.model, case.cell
        sizes = {"top_k": model.top_k, "num_experts": model.experts, "max_loras": cell.slots}
        return self.kg.moe_workspace(max_tokens=cell.tokens, max_rank=cell.rank, num_slices=2, device=case.device, **sizes)


def _event() -> torch.cuda.Event:
    return torch.cuda.Event()  # type: ignore[no-untyped-call]


@functools.cache
def _side_stream() -> torch.cuda.Stream:
    return torch.cuda.Stream()  # type: ignore[no-untyped-call]
