"""The kernels behind a candidate: which the generated package would launch, and what they cost, without a GPU."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any, Callable, Iterator, Sequence

import triton

from kernelgen.compiled.resources import usage
from kernelgen.compiled.stand_in import compiling_for
from kernelgen.core.diagnostics import did_you_mean, failure
from kernelgen.core.targets import TARGETS
from kernelgen.measure.suite import Cell
from kernelgen.measure.tune.calls import Calls
from kernelgen.measure.tune.jobs import CompileJob, Sizes, Verdict
from kernelgen.measure.tune.problem import Problem
from kernelgen.measure.tune.space import Named


class Kernels:
    """The kernels of ``family`` in the calls of a suite, compiled for ``target``."""

    def __init__(self, suite: str, family: str, package: Path, target: str) -> None:
        if triton.knobs.runtime.interpret:
            raise failure("KG061", "cuda", "TRITON_INTERPRET is set, and interpreted kernels cannot be timed", "unset it")
        if target not in TARGETS:
            raise failure("KG061", target, "no such target", did_you_mean(target, list(TARGETS)))
        self._target = TARGETS[target]
        self._calls = Calls(suite, family, package)

    def problems(self, cell: Cell) -> list[Problem]:
        """What tiles of the family are looked up by in ``cell``."""
        with compiling_for(self._target):
            return self._calls.problems(cell)

    def sizes(self, cell: Cell, problem: Problem, schedules: Sequence[str]) -> Sizes:
        """What the package makes of a problem: the tiles of each schedule that can serve it."""
        with compiling_for(self._target):
            return self._calls.sizes(cell, problem, schedules)

    def digests(self, cell: Cell, problem: Problem, schedule: str, tiles: Named) -> list[str]:
        """What names the kernels of a candidate, in the order of its launches; equal ones are one kernel."""
        return [_digest(request) for request in self._requests(cell, problem, schedule, tiles)]

    def compile(self, job: CompileJob) -> Iterator[Verdict]:
        """Compile into Triton's cache on disk, and judge."""
        requests = self._requests(job.cell, job.problem, job.schedule, job.config)
        for place in job.wanted:
            yield Verdict(_digest(requests[place]), self._fault(requests[place]))

    def _fault(self, request: Any) -> str | None:
        try:
            with compiling_for(self._target):
                used = usage(request.compile(), self._target)
        except Exception as error:  # of many kinds, from every pass of the compiler
            return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        if not self._calls.is_of_family(request):
            return None  # it is as it is, whatever is searched
        if used.spill_bytes:
            return f"spills {used.spill_bytes} bytes"
        if used.shared_bytes > self._target.program_shared:
            return f"takes {used.shared_bytes} bytes of shared memory"
        return None

    def _requests(self, cell: Cell, problem: Problem, schedule: str, tiles: Named) -> list[Any]:
        with compiling_for(self._target):
            return self._calls.requests(cell, problem, schedule, tiles)


def _digest(request: Any) -> str:
    _, *rest = request.key
    return f"{request.launcher.kernel.fn.__name__} {rest}"


def compiler(suite: str, family: str, package: Path) -> tuple[None, Callable[[CompileJob], Iterator[Verdict]]]:
    """What a process of the crew that compiles runs: CompileJob -> Verdict for each kernel."""
    kernels = functools.cache(lambda target: Kernels(suite, family, package, target))

    def serve(job: CompileJob) -> Iterator[Verdict]:
        yield from kernels(job.target).compile(job)

    return None, serve
