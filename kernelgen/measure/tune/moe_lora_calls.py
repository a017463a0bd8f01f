"""The calls of candidates of MoE-LoRA."""

from __future__ import annotations

import functools
import importlib
from typing import Any, Callable

import torch

from kernelgen.diagnostics import failure
from kernelgen.measure.inputs import DTYPES, FP8, WEIGHT_BYTES, Case, WeightPool, make_case
from kernelgen.measure.ours import NAIVE_SCHEDULES, Forced, Ours
from kernelgen.measure.tune.calls import Prepare
from kernelgen.measure.tune.jobs import Sizes
from kernelgen.measure.tune.space import Named
from kernelgen.measure.verify import compare, expect
from kernelgen.measure.workloads import GROUP, Act, Cell, Quant, scale_shape


class MoeLoraCalls:
    """See ``Calls``."""

    def __init__(self, package: str) -> None:
        self._ours = Ours(package)
        self._kg = importlib.import_module(package)
        self._runtime = importlib.import_module(f"{package}._runtime")
        self._problems = importlib.import_module(f"{package}.moe_lora._problem")
        self._call = functools.lru_cache(maxsize=64)(self._uncached_call)
        self._pool: WeightPool | None = None

    def forget_tuned(self) -> None:
        vars(self._problems)["TUNED"] = ()

    def sizes(self, cell: Cell, schedules: tuple[str, ...]) -> Sizes:
        rules = {}
        block_m = 0
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
            raise failure("KG041", "moe_lora", f"no variant serves {case}", "see the excludes of the spec")
        # The front door takes another schedule where the rule's has no variant.
        return Sizes(block_m, shared_memory, rules, rule if rule in rules else next(iter(rules)))

    def requests(self, cell: Cell, schedule: str, config: Named) -> list[Any]:
        problem, route, arguments = self._call(cell, _assignment(schedule))
        module = self._ours.variant(cell, problem.weighted, schedule)
        with self._runtime.compile_only() as requests:
            module.bind(problem, route, module.Config(**config))(*arguments)
        return list(requests)

    def prepare(self, cell: Cell) -> Prepare:
        device = torch.device("cpu" if self._runtime.INTERPRETED else "cuda")
        if self._pool is None:
            self._pool = WeightPool(device, WEIGHT_BYTES, lambda: None)
        return _Preparation(self._ours, make_case(cell, self._pool, device))

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



class _Preparation:
    """Checked calls of candidates on one case; the routes and what is right are worked out once."""

    def __init__(self, ours: Ours, case: Case) -> None:
        self._ours = ours
        self._case = case
        self._routes: dict[bool, list[Any]] = {}
        operands = case.batches[0].operands[0]
        self._expected = expect(case.batches[0], operands)
        self._before = operands.out.clone()

    def __call__(self, schedule: str, config: Named) -> list[Callable[[], None]]:
        """A call for each batch.

        Raises:
            WrongResult: the first gives something else than the formula.
        """
        forced = Forced(schedule, dict(config))
        naive = schedule in NAIVE_SCHEDULES
        if naive not in self._routes:
            self._routes[naive] = self._ours.routes(self._case, forced)
        calls = self._ours.bound(self._case, self._routes[naive], forced)
        operands = self._case.batches[0].operands[0]
        operands.out.copy_(self._before)  # timing has added to it many times over
        calls[0]()
        compare(self._case, self._expected, operands, self._before, adds=self._case.cell.add)
        return calls
