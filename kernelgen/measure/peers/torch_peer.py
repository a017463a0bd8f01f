"""What PyTorch alone offers: gather, two grouped products a slice, scatter-add; the sort is made beforehand."""

from __future__ import annotations

from typing import Callable

import torch

from kernelgen.diagnostics import failure
from kernelgen.measure.implementation import Prepared, Unsupported, refuse_fp8
from kernelgen.measure.inputs import Batch, Case

_MAX_GROUPS = 1023


class Peer:
    name = "torch"

    def __init__(self) -> None:
        product = getattr(torch.nn.functional, "grouped_mm", None) or getattr(
            torch, "_grouped_mm", None
        )
        if product is None:
            raise failure("KG071", "torch", f"{torch.__version__} has no grouped_mm")
        self._product = product

    def versions(self) -> dict[str, str]:
        return {}

    def release(self) -> None:
        pass

    def prepare(self, case: Case) -> Prepared:
        cell = case.cell
        refuse_fp8(cell)
        if cell.site not in ("w13", "w2") or not cell.add:
            raise Unsupported("it is composed for w13 and w2 with --add only")
        if cell.slots * cell.model.experts > _MAX_GROUPS:
            raise Unsupported(f"grouped_mm takes at most {_MAX_GROUPS} groups")
        calls = tuple(self._call(case, batch) for batch in case.batches)
        return Prepared(calls, variant="grouped_mm", note="sorted beforehand")

    def _call(self, case: Case, batch: Batch) -> Callable[[], None]:
        cell, operands = case.cell, batch.operands[0]
        experts, top_k = cell.model.experts, cell.model.top_k
        adapter = batch.mapping.long().repeat_interleave(top_k)
        live = (adapter >= 0).nonzero()[:, 0]
        group = adapter[live] * experts + batch.topk_ids.reshape(-1).long()[live]
        group, order = group.sort(stable=True)
        ends = torch.bincount(group, minlength=cell.slots * experts).cumsum(0).to(torch.int32)
        pairs = live[order]
        x, out, p = operands.x, operands.out.flatten(0, 1), operands.projection
        rows = pairs if p.weighted else pairs // top_k
        weight = batch.topk_weights.reshape(-1)[pairs].to(x.dtype)[:, None]
        matrices = [
            (a.flatten(0, 1).transpose(1, 2), b.flatten(0, 1).transpose(1, 2))
            for a, b in zip(operands.weights.lora_a, operands.weights.lora_b, strict=True)
        ]

        def call() -> None:
            gathered = x.index_select(0, rows)
            slices = [
                self._product(self._product(gathered, a, offs=ends), b, offs=ends)
                for a, b in matrices
            ]
            y = slices[0] if len(slices) == 1 else torch.cat(slices, 1)
            out.index_add_(0, pairs, y * weight if p.weighted else y)

        return call
