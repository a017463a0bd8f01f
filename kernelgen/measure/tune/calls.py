"""The calls of a suite with the tiles of candidates: recorded, to know their kernels without a GPU, or made, to time them."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any, Iterator, Mapping, Sequence

import torch

from kernelgen.core.diagnostics import failure
from kernelgen.measure import implementations, suites
from kernelgen.measure.suite import Cell
from kernelgen.measure.truth import Truth
from kernelgen.measure.tune import hints
from kernelgen.measure.tune import problem as problems
from kernelgen.measure.tune.jobs import Sizes
from kernelgen.measure.tune.problem import Problem
from kernelgen.measure.tune.space import Named
from kernelgen.measure.workload import Case, Prepared, Unsupported
from kernelgen.measure.workloads.ours import Call, Op, Package

_Forced = Mapping[Any, tuple[tuple[str, "tuple[int, ...] | None"], ...]]
_META = torch.device("meta")


class Calls:
    """The calls of ``suite`` in the generated package in the folder ``package``, whose kernels of ``family`` are searched."""

    def __init__(self, suite: str, family: str, package: Path) -> None:
        self._suite, self._family, self._package = suites.find(suite), family, package
        self._tuning = hints.of(family)
        self._form = self._tuning.form
        self._ours = functools.cache(self._load)
        self.runtime = self._ours(self._form).runtime
        self._recorded = functools.lru_cache(maxsize=64)(self._record)
        self._meta = implementations.workload(suite, _META, 1)

    def problems(self, cell: Cell) -> list[Problem]:
        """What tiles of the family are looked up by in ``cell``."""
        return list(map(problems.of_key, (key._asdict() for key in self._keys(cell))))

    def sizes(self, cell: Cell, problem: Problem, schedules: Sequence[str]) -> Sizes:
        """What the package makes of a problem, where launches are compiled for a target.

        Raises:
            Failure: no variant serves it.
        """
        (rule,) = self._taken(cell, problem, self._form, ())
        rules = {}
        for schedule in schedules:
            taken = self._taken(cell, problem, self._form_of(schedule), ((schedule, None),))
            if taken and taken[0].schedule == schedule:
                rules[schedule] = dict(taken[0].config._asdict())
        if not rules:
            raise failure("KG041", self._family, f"no variant serves {problem}", "see the excludes of the spec")
        first = rule.schedule if rule.schedule in rules else next(iter(rules))
        shared_memory = self.runtime.traits(_META).shared_memory
        return Sizes(shared_memory, rules, first, self._tuning.hints.facts(self._ours(self._form).kg, problem))

    def requests(self, cell: Cell, problem: Problem, schedule: str, tiles: Named) -> list[Any]:
        """The launches of a candidate, recorded where they are compiled for a target."""
        op = self._recorded(cell, self._form_of(schedule))
        with self.runtime.compile_only() as requests, self.runtime.choosing(self._forced(cell, problem, schedule, tiles)):
            op.call()
        return list(requests)

    def is_of_family(self, request: Any) -> bool:
        """Whether a launch is of a kernel whose tiles are searched."""
        module: str = request.launcher.kernel.fn.__module__
        return module.split(".")[-2] == self._family

    def prepare(self, cells: Sequence[Cell], problem: Problem) -> Preparation:
        """The operands of cells that have a problem on the GPU, and what is right for them; those before are dropped."""
        device = torch.device("cpu" if self.runtime.INTERPRETED else "cuda")
        workload = implementations.workload(self._suite.name, device)
        return Preparation(self, problem, cells, [workload.case(cell) for cell in cells], workload)

    def ops(self, schedule: str, case: Case[Any]) -> list[Op]:
        """The calls of a case with what ``schedule`` needs."""
        return self._ours(self._form_of(schedule)).ops(case)

    def choosing(self, cell: Cell, problem: Problem, schedule: str, tiles: Named) -> Any:
        """Inside, calls take these tiles for the problem."""
        return self.runtime.choosing(self._forced(cell, problem, schedule, tiles))

    def _load(self, form: str) -> Package:
        made = implementations.load(self._suite.name, f"kernelgen:{form}" if form else "kernelgen", self._package)
        assert isinstance(made, Package)
        return made

    def _form_of(self, schedule: str) -> str:
        return schedule if schedule in self._suite.forms else self._form

    def _record(self, cell: Cell, form: str) -> Op:
        with self.runtime.compile_only():
            return self._ours(form).ops(self._meta.case(cell))[0]

    def _keys(self, cell: Cell) -> list[Any]:
        return list(dict.fromkeys(choice.key for choice in self._choices(self._recorded(cell, self._form).call, {})))

    def _choices(self, call: Call, forced: _Forced) -> Iterator[Any]:
        """What a call would choose for kernels of the family."""
        try:
            choices = self._ours(self._form).choices(call, forced)
        except Unsupported:
            return
        yield from (choice for choice in choices if type(choice.key).__module__.split(".")[-2] == self._family)

    def _key(self, cell: Cell, problem: Problem) -> Any:
        return next(key for key in self._keys(cell) if problems.of_key(key._asdict()) == problem)

    def _taken(self, cell: Cell, problem: Problem, form: str, wanted: Any) -> list[Any]:
        """What is chosen for a problem where ``wanted`` is forced, and a variant of that schedule is launched."""
        key = self._key(cell, problem)
        op = self._recorded(cell, form)
        forced = {(type(key), key): wanted}
        taken = [choice for choice in self._choices(op.call, forced) if choice.key == key][:1]
        if not taken or not wanted or not self._has_schedules(wanted[0][0]):
            return taken
        with self.runtime.compile_only() as requests, self.runtime.choosing(forced):
            op.call()
        name = f"{self._family}_{wanted[0][0]}_"
        return taken if any(request.launcher.kernel.fn.__name__.startswith(name) for request in requests) else []

    def _has_schedules(self, schedule: str) -> bool:
        return schedule != self._family

    def _forced(self, cell: Cell, problem: Problem, schedule: str, tiles: Named) -> _Forced:
        key = self._key(cell, problem)
        return {(type(key), key): ((schedule, tuple(tiles.values())),)}


class Preparation:
    """Checked calls of candidates for one problem, in cells that have it; what is right is worked out once."""

    def __init__(self, calls: Calls, problem: Problem, cells: Sequence[Cell], cases: Sequence[Case[Any]], workload: Any) -> None:
        self._calls, self._problem = calls, problem
        self._cells = list(zip(cells, cases, strict=True))
        self._workload = workload
        self._ops = functools.cache(self._make)

    def choosing(self, schedule: str, tiles: Named) -> Any:
        """What calls of a candidate are made in."""
        return self._calls.choosing(self._cells[0][0], self._problem, schedule, tiles)

    def calls(self, schedule: str) -> list[Call]:
        """The calls of ``schedule``, of all cells in turns; the first of each is made, and compared with the formula.

        Raises:
            WrongResult: one gives something else.
        """
        made = []
        for ops, truths in self._ops(schedule):
            for truth in truths:
                truth.restore()  # timing has added to it many times over
            ops[0].call()
            if ops[0].check is not None:
                ops[0].check()
            for truth in truths:
                truth.error()
            made.append([op.call for op in ops])
        longest = max(map(len, made))
        return [own[turn % len(own)] for turn in range(longest) for own in made]

    def _make(self, schedule: str) -> list[tuple[list[Op], Sequence[Truth]]]:
        found = []
        for _, case in self._cells:
            ops = self._calls.ops(schedule, case)
            truths = self._workload.truths(case, Prepared(())) if ops[0].truths is None else ops[0].truths()
            found.append((ops, truths))
        return found
