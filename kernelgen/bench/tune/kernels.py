"""The kernels behind a candidate: which the generated package would launch, and what they cost, without a GPU."""

from __future__ import annotations

import functools
import importlib
from pathlib import Path
from typing import Any, Callable, Iterator

import torch
import triton

from kernelgen.bench import registry
from kernelgen.bench.implementation import Unavailable
from kernelgen.bench.inputs import DTYPES, FP8
from kernelgen.bench.ours import NAIVE_SCHEDULES, Ours
from kernelgen.bench.tune.jobs import CompileJob, Sizes, Verdict
from kernelgen.bench.tune.space import Named
from kernelgen.bench.workloads import GROUP, Act, Cell, Quant, scale_shape
from kernelgen.resources import usage
from kernelgen.stand_in import compiling_for
from kernelgen.targets import TARGETS


class Kernels:
    """The kernels of the generated package in the folder ``package``, compiled for ``target``."""

    def __init__(self, package: Path, target: str) -> None:
        if triton.knobs.runtime.interpret:
            raise Unavailable("kernels are interpreted: unset TRITON_INTERPRET")
        if target not in TARGETS:
            raise Unavailable(f"no target {target}; known are {', '.join(TARGETS)}")
        self._target = TARGETS[target]
        self._ours = Ours(registry.import_package(package))
        self._kg = importlib.import_module(self._ours.package)
        self._runtime = importlib.import_module(f"{self._ours.package}._runtime")
        self._problems = importlib.import_module(f"{self._ours.package}.moe_lora._problem")
        self._problems.TUNED.clear()  # here, what the rules say
        self._call = functools.lru_cache(maxsize=64)(self._uncached_call)

    def sizes(self, cell: Cell, schedules: tuple[str, ...]) -> Sizes:
        """The block size of the cell's route, and the tiles of each schedule that can serve it."""
        rules = {}
        block_m = 0
        with compiling_for(self._target):
            shared_memory = self._runtime.traits(torch.device("meta")).shared_memory
            problem, route, _ = self._call(cell, "auto")
            rule, _ = self._problems.plan(problem, route)
            for schedule in schedules:
                try:
                    problem, route, _ = self._call(cell, _assignment(schedule))
                except ValueError:  # too many groups to sort
                    continue
                if not self._ours.serves(cell, problem.weighted, schedule):
                    continue
                block_m = max(block_m, route.block_m)
                rules[schedule] = self._problems.choose(schedule, problem, route)._asdict()
        if not rules:
            case = f"{cell.site} of rank {cell.rank}, weights {cell.quant}, activations {cell.act}"
            raise Unavailable(f"no variant serves {case}: see the excludes of the spec")
        # The front door takes another schedule where the rule's has no variant.
        return Sizes(block_m, shared_memory, rules, rule if rule in rules else next(iter(rules)))

    def digests(self, cell: Cell, schedule: str, config: Named) -> list[str]:
        """What names the kernels of a candidate, in the order of its launches; equal ones are one kernel."""
        return [_digest(request) for request in self._requests(cell, schedule, config)]

    def compile(self, job: CompileJob) -> Iterator[Verdict]:
        """Compile into Triton's cache on disk, and judge."""
        requests = self._requests(job.cell, job.schedule, job.config)
        for place in job.wanted:
            yield Verdict(_digest(requests[place]), self._fault(requests[place]))

    def _fault(self, request: Any) -> str | None:
        try:
            with compiling_for(self._target):
                used = usage(request.compile(), self._target)
        except Exception as error:  # of many kinds, from every pass of the compiler
            return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        if used.spill_bytes:
            return f"spills {used.spill_bytes} bytes"
        if used.shared_bytes > self._target.program_shared:
            return f"takes {used.shared_bytes} bytes of shared memory"
        return None

    def _requests(self, cell: Cell, schedule: str, config: Named) -> list[Any]:
        with compiling_for(self._target):
            problem, route, arguments = self._call(cell, _assignment(schedule))
            module = self._ours.variant(cell, problem.weighted, schedule)
            with self._runtime.compile_only() as requests:
                module.bind(problem, route, module.Config(**config))(*arguments)
        return list(requests)

    def _uncached_call(self, cell: Cell, assignment: str) -> tuple[Any, Any, tuple[Any, ...]]:
        """(problem, route, arguments of the bound call), without data."""
        (p,) = cell.projections
        slots, experts, top_k = cell.slots, cell.model.experts, cell.model.top_k

        def empty(*shape: int, dtype: torch.dtype = DTYPES[cell.dtype]) -> torch.Tensor:
            return torch.empty(shape, dtype=dtype, device="meta")

        def operand(scales: Quant | Act, *shape: int, group_rows: int = GROUP) -> tuple[Any, Any]:
            """An operand, and its scales where it is FP8."""
            if scales == "none":
                return empty(*shape), None
            *batch, rows, columns = shape
            of = scale_shape(scales, rows, columns, group_rows)
            return empty(*shape, dtype=FP8), empty(*batch, *of, dtype=torch.float32)

        out = empty(cell.tokens, top_k, p.slices * p.n)
        rows = cell.tokens * top_k if p.weighted else cell.tokens
        x, x_scale = operand(cell.act, rows, p.k, group_rows=1)
        if x_scale is not None and not x_scale.dim():
            x_scale = x_scale[None]
        a, a_scale = operand(cell.quant, slots, experts, cell.rank, p.k)
        b, b_scale = operand(cell.quant, slots, experts, p.n, cell.rank)
        lora_a, lora_b = (a,) * p.slices, (b,) * p.slices
        scales = [(s,) * p.slices for s in (a_scale, b_scale) if s is not None]
        if x_scale is not None:
            scales.append(x_scale)
        topk_weights = empty(cell.tokens, top_k, dtype=torch.float32) if p.weighted else None
        with self._runtime.compile_only():
            route = self._kg.moe_route(
                empty(cell.tokens, top_k, dtype=torch.int32),
                empty(cell.tokens, dtype=torch.int32),
                num_experts=experts,
                max_loras=slots,
                assignment=assignment,
                rank=cell.rank,
            )
        problem = self._problems.check(
            "tune",
            out,
            x,
            lora_a,
            lora_b,
            route,
            dtype=out.dtype,
            naive=route.block_m == 0,
            max_rank=None,
            topk_weights=topk_weights,
            weighted=p.weighted,
            adds=cell.add,
            scales=self._problems.find_scales(
                "tune",
                x,
                lora_a,
                lora_b,
                None if a_scale is None else (a_scale,) * p.slices,
                None if b_scale is None else (b_scale,) * p.slices,
                x_scale,
            ),
        )
        return problem, route, (out, x, lora_a, lora_b, route, topk_weights, *scales)


def _assignment(schedule: str) -> str:
    return "naive" if schedule in NAIVE_SCHEDULES else "sorted"


def _digest(request: Any) -> str:
    _, *rest = request.key
    return f"{request.launcher.kernel.fn.__name__} {rest}"


def compiler(package: Path) -> tuple[None, Callable[[CompileJob], Iterator[Verdict]]]:
    """What a process of the crew that compiles runs: CompileJob -> Verdict for each kernel."""
    kernels = functools.cache(lambda target: Kernels(package, target))

    def serve(job: CompileJob) -> Iterator[Verdict]:
        yield from kernels(job.target).compile(job)

    return None, serve
