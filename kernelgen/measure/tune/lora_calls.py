"""The calls of candidates of the two products of dense LoRA: the whole of ``lora``, with the tiles of one of them."""

from __future__ import annotations

import dataclasses
import functools
import importlib
from typing import Any, Callable

import torch

from kernelgen.diagnostics import failure
from kernelgen.measure.dense import Case, Dense, Operands, route_of
from kernelgen.measure.layers import Cell
from kernelgen.measure.tune.calls import Prepare
from kernelgen.measure.tune.jobs import Sizes
from kernelgen.measure.tune.lora import SHRINK
from kernelgen.measure.tune.space import Named


class LoraCalls:
    """See ``Calls``; ``family``: whose tiles are searched."""

    def __init__(self, package: str, family: str) -> None:
        self._family = family
        self._kg = importlib.import_module(package)
        self._runtime = importlib.import_module(f"{package}._runtime")
        self._lora = importlib.import_module(f"{package}._lora")
        self._own = importlib.import_module(f"{package}.{family}._problem")
        self._recorded = functools.lru_cache(maxsize=64)(self._uncached_case)

    def forget_tuned(self) -> None:
        vars(self._own)["TUNED"] = ()

    def sizes(self, cell: Cell, schedules: tuple[str, ...]) -> Sizes:
        case, route = self._recorded(cell)
        try:
            shrink, expand = self._lora.problems(*_operands(case.sets[0]), route)
        except ValueError as error:
            raise failure("KG041", self._family, str(error)) from error
        rule = self._own.choose(shrink, route) if self._family == SHRINK else self._own.choose(expand, route, shrink.k)
        shared_memory = self._runtime.traits(torch.device("meta")).shared_memory
        return Sizes(route.block_m, shared_memory, {self._family: rule._asdict()}, self._family)

    def requests(self, cell: Cell, schedule: str, config: Named) -> list[Any]:
        case, route = self._recorded(cell)
        with self._runtime.compile_only() as requests:
            self._call(case.sets[0], route, config)(case.sets[0])
        return list(requests)

    def prepare(self, cell: Cell) -> Prepare:
        return _Preparation(cell, self._call, self._kg, torch.device("cpu" if self._runtime.INTERPRETED else "cuda"))

    def _uncached_case(self, cell: Cell) -> tuple[Case, Any]:
        case = Dense(torch.device("meta"), sets=1).case(cell)
        with self._runtime.compile_only():
            return case, self._kg.lora_route(case.mapping, max_loras=cell.slots)

    def _call(self, operands: Operands, route: Any, config: Named) -> Callable[[Operands], None]:
        """The call of a candidate for operands of these sizes."""
        given = _operands(operands)
        tiles = {self._family: self._own.Config(**config)}
        bound = self._lora.bind(*self._lora.problems(*given, route), route, operands.out.dtype, **tiles)

        def call(o: Operands) -> None:
            bound(o.out, o.x, o.lora_a, o.lora_b, route, 1.0, None, o.a_scale or None, o.b_scale or None)

        return call


def _operands(o: Operands) -> tuple[Any, ...]:
    return o.out, o.x, o.lora_a, o.lora_b, None, o.a_scale or None, o.b_scale or None


class _Preparation:
    """Checked calls of candidates on one case."""

    def __init__(self, cell: Cell, call: Callable[..., Callable[[Operands], None]], kg: Any, device: torch.device) -> None:
        self._call = call
        self._dense = Dense(device)
        case = self._dense.case(cell)
        of_one = dataclasses.replace(case, mapping=torch.zeros_like(case.mapping))
        self._batches = [(batch, route_of(kg, batch)) for batch in (case, of_one)]
        self._before = case.sets[0].out.clone()

    def __call__(self, schedule: str, config: Named) -> list[Callable[[], None]]:
        """A call for each set of operands: of all adapters, and of one, in turns.

        Raises:
            WrongResult: the first of either gives something else than the formula.
        """
        made = []
        for case, route in self._batches:
            first = case.sets[0]
            prepared = case.prepared(self._call(first, route, config))
            first.out.copy_(self._before)  # timing has added to it many times over
            self._dense.check(case, prepared)
            made.append(prepared.calls)
        return [of_all if i % 2 else of_one for i, (of_all, of_one) in enumerate(zip(*made, strict=True))]
