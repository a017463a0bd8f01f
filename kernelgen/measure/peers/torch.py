"""What PyTorch alone offers."""

from __future__ import annotations

import functools
from typing import Any, Callable

import torch

from kernelgen.core.diagnostics import failure
from kernelgen.measure.peers.installed import Peer, refuse_fp8
from kernelgen.measure.suites import fused_moe as of_fused_moe
from kernelgen.measure.suites import lora as of_lora
from kernelgen.measure.suites import moe_lora as of_moe_lora
from kernelgen.measure.workload import Case, Prepared, Unsupported
from kernelgen.measure.workloads import fused_moe, lora, moe_lora

_MAX_GROUPS = 1023


class _Torch(Peer):
    name = "torch"

    def versions(self) -> dict[str, str]:
        """The environment tells it."""
        return {}


class _Grouped(_Torch):
    """Of products of groups of rows, sorted beforehand."""

    def __init__(self) -> None:
        product = getattr(torch.nn.functional, "grouped_mm", None) or getattr(torch, "_grouped_mm", None)
        if product is None:
            raise failure("KG071", "torch", f"{torch.__version__} has no grouped_mm")
        self._product: Callable[..., torch.Tensor] = product


class MoeLora(_Grouped):
    """Gather, two grouped products a slice, scatter-add."""

    def prepare(self, case: Case[moe_lora.Batch]) -> Prepared:
        cell: of_moe_lora.Cell = case.cell
        refuse_fp8(cell.quant, cell.act)
        if cell.site not in ("w13", "w2") or not cell.add:
            raise Unsupported("it is composed for w13 and w2 with --add only")
        if cell.slots * cell.model.experts > _MAX_GROUPS:
            raise Unsupported(f"grouped_mm takes at most {_MAX_GROUPS} groups")
        calls = tuple(self._call(cell, batch) for batch in case.batches)
        return Prepared(calls, variant="grouped_mm", note="sorted beforehand")

    def _call(self, cell: of_moe_lora.Cell, batch: moe_lora.Batch) -> Callable[[], None]:
        operands, top_k = batch.operands[0], cell.model.top_k
        adapter = batch.mapping.long().repeat_interleave(top_k)
        live = batch.live.nonzero()[:, 0]
        group = adapter[live] * cell.model.experts + batch.topk_ids.reshape(-1).long()[live]
        group, order = group.sort(stable=True)
        ends = torch.bincount(group, minlength=cell.slots * cell.model.experts).cumsum(0).to(torch.int32)
        pairs = live[order]
        x, out, p = operands.x, operands.out.flatten(0, 1), operands.projection
        rows = pairs if p.weighted else pairs // top_k
        weight = batch.topk_weights.reshape(-1)[pairs].to(x.dtype)[:, None]
        matrices = [
            (a.flatten(0, 1).transpose(1, 2), b.flatten(0, 1).transpose(1, 2))
            for a, b in zip(operands.weights.a, operands.weights.b, strict=True)
        ]

        def call() -> None:
            gathered = x.index_select(0, rows)
            slices = [self._product(self._product(gathered, a, offs=ends), b, offs=ends) for a, b in matrices]
            y = slices[0] if len(slices) == 1 else torch.cat(slices, 1)
            out.index_add_(0, pairs, y * weight if p.weighted else y)

        return call


class Lora(_Torch):
    """``mm`` and ``addmm_`` a slice, for one adapter."""

    def prepare(self, case: Case[lora.Batch]) -> Prepared:
        cell: of_lora.Cell = case.cell
        refuse_fp8(cell.quant)
        if cell.active > 1:
            raise Unsupported("one adapter only")
        return Prepared(tuple(functools.partial(_add, batch) for batch in case.batches), variant="mm, addmm_")


def _add(batch: lora.Batch) -> None:
    begin = 0
    for a, b in zip(batch.a, batch.b, strict=True):
        batch.out[:, begin : begin + b.shape[1]].addmm_(batch.x @ a[0].T, b[0].T)
        begin += b.shape[1]


class FusedMoe(_Grouped):
    """Gather, a grouped product, the activation, another, and the weighted sum."""

    def prepare(self, case: Case[fused_moe.Batch]) -> Prepared:
        cell: of_fused_moe.Cell = case.cell
        refuse_fp8(cell.quant, cell.act)
        if cell.site != "layer":
            raise Unsupported("whole layers only")
        if cell.model.experts > _MAX_GROUPS:
            raise Unsupported(f"grouped_mm takes at most {_MAX_GROUPS} groups")
        calls = tuple(self._call(cell, batch) for batch in case.batches)
        return Prepared(calls, variant="grouped_mm", note="sorted beforehand")

    def _call(self, cell: of_fused_moe.Cell, batch: fused_moe.Batch) -> Callable[[], None]:
        ids = batch.topk_ids.reshape(-1).long()
        order = ids.argsort(stable=True)
        ends = torch.bincount(ids, minlength=cell.model.experts).cumsum(0).to(torch.int32)
        place = torch.empty_like(order)
        place[order] = torch.arange(len(order), device=order.device)
        tokens, weights = order // cell.model.top_k, batch.topk_weights[:, :, None]
        w13, w2 = batch.experts.w13.transpose(1, 2), batch.experts.w2.transpose(1, 2)

        def call() -> None:
            h = fused_moe.activate(self._product(batch.x.index_select(0, tokens), w13, offs=ends), cell.model.gated)
            y = self._product(h, w2, offs=ends).index_select(0, place).view(*weights.shape[:2], -1)
            batch.out.copy_((y * weights).sum(1))

        return call


PEERS: dict[str, Any] = {"moe_lora": MoeLora, "lora": Lora, "fused_moe": FusedMoe}
