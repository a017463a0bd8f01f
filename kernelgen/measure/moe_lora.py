"""The workload of ``kernelgen bench``: cases of MoE-LoRA, and what is right for them."""

from __future__ import annotations

from typing import Any, Callable

import torch

from kernelgen.measure.implementation import Prepared
from kernelgen.measure.inputs import WEIGHT_BYTES, Case, WeightPool, make_case
from kernelgen.measure.verify import poison, verify
from kernelgen.measure.workloads import Cell


class MoeLora:
    """``on_free`` is called before weights that cells share are freed. ``sets``: batches of a case, None: by the cache."""

    def __init__(self, device: torch.device, on_free: Callable[[], None], sets: int | None = None) -> None:
        self._device, self._sets = device, sets
        self._pool = WeightPool(device, WEIGHT_BYTES if sets is None else 0.0, on_free)

    def case(self, cell: Cell) -> Case:
        """The operands of ``cell``."""
        return make_case(cell, self._pool, self._device, self._sets)

    def describe(self, case: Case, ceilings: dict[str, float]) -> dict[str, Any]:
        """Columns of a row that do not depend on who is measured."""
        work = case.work
        row: dict[str, Any] = {"sets": len(case.batches), "groups": round(case.groups, 1)}
        row.update(bytes=round(work.bytes), flops=round(work.flops))
        if ceilings:
            row["floor_us"] = round(work.floor_us(ceilings["copy_gb_s"], ceilings["bf16_tflop_s"]), 3)
        return row

    def check(self, case: Case, prepared: Prepared) -> float | None:
        """The relative error of the first batch; None for what has no ``out``.

        Raises:
            WrongResult: it is wrong.
        """
        batch = case.batches[0]
        adds = case.cell.add
        before = [poison(operands, adds) for operands in batch.operands]
        prepared.calls[0]()
        if prepared.check is not None:
            prepared.check()
        rules = {"adds": adds, "weighted": prepared.applies_weights, "keeps_rows": prepared.keeps_rows}
        errors = [
            verify(case, batch, operands, kept, **rules)
            for operands, kept in zip(batch.operands, before, strict=True)
        ]
        return max(errors, default=None)
