"""Dense LoRA: its operands, what is right for them, and the front door."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, Callable

import torch

from kernelgen.measure.operands import mappings, matrix, normal, sets
from kernelgen.measure.suites.lora import Cell
from kernelgen.measure.truth import Truth, error_limit, matrices, sample
from kernelgen.measure.workload import Case, Prepared
from kernelgen.measure.workloads.ours import Op, Package

_CHECKED_TOKENS = 16


@dataclasses.dataclass(frozen=True)
class Batch:
    """One call: out [T, sum of widths], x [T, K], S tensors [L, rank, K] and S of [L, N_s, rank]; of FP8, with scales."""

    mapping: torch.Tensor  # int32 [T]
    out: torch.Tensor
    x: torch.Tensor
    a: tuple[torch.Tensor, ...]
    b: tuple[torch.Tensor, ...]
    a_scale: tuple[torch.Tensor, ...] = ()
    b_scale: tuple[torch.Tensor, ...] = ()

    @property
    def scales(self) -> dict[str, Any]:
        """As keywords of the op: those that there are."""
        return {"a_scale": self.a_scale, "b_scale": self.b_scale} if self.a_scale else {}


class Workload:
    """Every batch has operands of its own."""

    def __init__(self, device: torch.device, count: int | None = None, on_free: Callable[[], None] = lambda: None) -> None:
        self._device, self._count, self._on_free = device, count, on_free

    def case(self, cell: Cell) -> Case[Batch]:
        """The operands of ``cell``; its batches have one mapping, as the route is made once for many layers."""
        self._on_free()
        torch.manual_seed(cell.seed)
        mapping = mappings(cell.tokens, 1, cell.active, cell.slots, 0.0, self._device)[0]
        count = self._count or sets(cell.work.bytes)
        return Case(cell, tuple(self._batch(cell, mapping) for _ in range(count)), lambda: cell.work)

    def truths(self, case: Case[Batch], prepared: Prepared) -> list[Truth]:
        """Of some tokens, what ``out`` has to hold."""
        del prepared
        batch = case.batches[0]
        tokens = sample(torch.ones_like(batch.mapping, dtype=torch.bool), _CHECKED_TOKENS)
        before, x = batch.out.clone(), batch.x[tokens].double()[:, :, None]
        who, columns = (batch.mapping[tokens].long(),), []
        for s in range(len(batch.a)):
            a = matrices(batch.a[s], batch.a_scale[s] if batch.a_scale else None, who)
            columns.append(matrices(batch.b[s], batch.b_scale[s] if batch.b_scale else None, who) @ (a @ x))
        wanted = before[tokens].double() + torch.cat(columns, 1)[:, :, 0]
        return [Truth(batch.out, before, None, tokens, wanted, error_limit(batch.out.dtype))]

    def _batch(self, cell: Cell, mapping: torch.Tensor) -> Batch:
        k, widths, device = cell.layer.k, cell.layer.widths, self._device
        a = [matrix(cell.quant, cell.slots, cell.rank, k, size=k**-0.5, device=device) for _ in widths]
        b = [matrix(cell.quant, cell.slots, n, cell.rank, size=cell.rank**-0.5, device=device) for n in widths]
        scales = [tuple(scale for _, scale in pairs if scale is not None) for pairs in (a, b)]
        out = normal(cell.tokens, sum(widths), device=device)
        x = normal(cell.tokens, k, device=device)
        return Batch(mapping, out, x, tuple(w for w, _ in a), tuple(w for w, _ in b), *scales)


class Ours(Package):
    """``lora``, with its route made beforehand."""

    def ops(self, case: Case[Batch]) -> list[Op]:
        cell: Cell = case.cell
        sizes = {"max_rank": cell.rank, "num_slices": len(cell.layer.widths), "fp8": cell.quant != "none"}
        space = self.kg.lora_workspace(max_tokens=cell.tokens, max_loras=cell.slots, device=case.device, **sizes)
        route = self.kg.lora_route(case.batches[0].mapping, max_loras=cell.slots, workspace=space)
        return [Op(functools.partial(self.kg.lora, b.out, b.x, b.a, b.b, route, **b.scales)) for b in case.batches]
