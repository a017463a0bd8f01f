"""Cells in, rows out: prepare, check, time, cell by cell and all implementations of a cell in turns."""

from __future__ import annotations

import dataclasses
import gc
import time
from typing import Any, Callable, Sequence

import torch

from kernelgen.measure.document import Document
from kernelgen.measure.suite import Cell, Row
from kernelgen.measure.timing import Spread, capture, host_us, replay
from kernelgen.measure.truth import WrongResult
from kernelgen.measure.workload import Case, Implementation, Prepared, Unsupported, Workload, check


class ContextLost(Exception):
    """The GPU context of this process is gone: an implementation accessed memory that is not its own, say."""


@dataclasses.dataclass(frozen=True)
class Run:
    """How to go through the cells; ``check_only`` times nothing, which is all that a CPU can do."""

    check_only: bool = False
    seconds: float | None = None  # no cell is begun after that


def run(
    workload: Workload,
    cells: Sequence[Cell],
    implementations: Sequence[Implementation],
    document: Document,
    how: Run,
    on_cell: Callable[[Cell, list[Row]], None],
) -> bool:
    """Measure what ``document`` does not hold yet; ``on_cell`` gets the new rows of each cell, in order.

    Returns whether all cells were reached in time.

    Raises:
        ContextLost: after the row of the culprit was handed to ``on_cell``.
    """
    started = time.monotonic()
    gc.collect()
    gc.freeze()  # what is imported stays: later collections need not walk it
    try:
        for cell in cells:
            todo = [i for i in implementations if not document.has(cell, i.name)]
            if todo and how.seconds is not None and time.monotonic() - started > how.seconds:
                return False
            rows: list[Row] = []
            try:
                if todo:
                    _measure(workload, cell, todo, document.ceilings, how, rows)
            finally:
                on_cell(cell, rows)
        return True
    finally:
        gc.unfreeze()


def warm(cells: Sequence[Cell], workload: Workload, implementation: Implementation) -> None:
    """Compile what ``cells`` need into Triton's cache on disk, by one call each; what fails shows when it is timed.

    Raises:
        ContextLost: nothing more can be compiled in this process.
    """
    for cell in cells:
        try:
            prepared = implementation.prepare(workload.case(cell))
            with prepared.within():
                prepared.calls[0]()
            torch.cuda.synchronize()
        except Exception as error:
            if context_is_lost():
                raise ContextLost(str(error)) from error


def _measure(
    workload: Workload,
    cell: Cell,
    implementations: Sequence[Implementation],
    ceilings: dict[str, float],
    how: Run,
    rows: list[Row],
) -> None:
    case: Case[Any] | None = None
    ready: list[tuple[Prepared, Row]] = []
    for implementation in implementations:
        row = _empty_row(cell, implementation.name)
        try:
            if case is None:
                case = workload.case(cell)
            row.update(_facts(case, ceilings))
            prepared = implementation.prepare(case)
            row.update(variant=prepared.variant, config=prepared.config, note=prepared.note)
            row["error"] = check(workload, case, prepared)
            ready.append((prepared, row))
        except Unsupported:
            continue
        except Exception as error:
            rows.append(row)
            _fail(row, error)
            continue
        rows.append(row)
    if not how.check_only:
        _time(ready)


def _facts(case: Case[Any], ceilings: dict[str, float]) -> Row:
    """Columns that do not depend on who is measured."""
    work = case.work()
    facts: Row = {"sets": len(case.batches), **case.counts(), "bytes": round(work.bytes), "flops": round(work.flops)}
    if ceilings:
        facts["floor_us"] = round(work.floor_us(ceilings), 3)
    return facts


def _time(ready: Sequence[tuple[Prepared, Row]]) -> None:
    graphs: dict[str, tuple[torch.cuda.CUDAGraph, int]] = {}
    for prepared, row in ready:
        try:
            if prepared.launches:
                with prepared.within():
                    graphs[row["impl"]] = (capture(prepared.calls), len(prepared.calls))
        except Exception as error:
            _fail(row, error)
    spreads = replay(graphs)
    for prepared, row in ready:
        if row["failed"]:
            continue
        spread = spreads.get(row["impl"], Spread(0.0, 0.0, 0.0, 0))
        with prepared.within():
            host = host_us(prepared.calls, spread.median)
        row.update(
            us=round(spread.median, 3),
            us_p10=round(spread.p10, 3),
            us_p90=round(spread.p90, 3),
            replays=spread.replays,
            host_us=round(host, 2),
        )


def _empty_row(cell: Cell, impl: str) -> Row:
    return {
        **cell.columns(),
        "impl": impl,
        **dict.fromkeys(("us", "us_p10", "us_p90", "replays", "floor_us", "host_us", "error")),
        "variant": "",
        "config": {},
        "note": "",
        "failed": None,
    }


def _fail(row: Row, error: Exception) -> None:
    """Note why ``row`` has no time.

    Raises:
        ContextLost: no later row of this process can have one.
    """
    lines = str(error).strip().splitlines() or [type(error).__name__]
    text = lines[0] if isinstance(error, WrongResult) else f"{type(error).__name__}: {lines[0]}"
    row["failed"] = text[:300]
    if context_is_lost():
        raise ContextLost(f"{row['impl']} on {row['model']} {row['site']}: {text}") from error


def context_is_lost() -> bool:
    """Whether nothing runs on the GPU any more: after a fault inside a kernel every later call of the process fails."""
    if not torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        return False
    try:
        torch.cuda.synchronize()
        torch.zeros(1, device="cuda").item()
    except RuntimeError as error:
        return not isinstance(error, torch.cuda.OutOfMemoryError)
    return False
