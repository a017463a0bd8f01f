"""The generated package, through its front doors; or one schedule of it, for tuning."""

from __future__ import annotations

import dataclasses
import functools
import importlib
from typing import Any, Callable, Sequence

import torch

import kernelgen
from kernelgen.measure.implementation import Prepared, Unsupported
from kernelgen.measure.inputs import Batch, Case, Operands
from kernelgen.measure.verify import verify_blocks
from kernelgen.measure.workloads import Cell
from kernelgen.names import variant_name

NAIVE_SCHEDULES = ("small_batch",)
_SCHEDULES = (*NAIVE_SCHEDULES, "one_shot", "two_kernel")
_TILES = (
    "BLOCK_",
    "SPLIT_",
    "STAGES",
    "TILES",
    "PDL",
)  # constants of a kernel that are choices, not sizes


@dataclasses.dataclass(frozen=True)
class Forced:
    """A choice in place of the package's own; ``config`` None takes the tiles it would take with this schedule."""

    schedule: str
    config: dict[str, int] | None = None
    block_m: int | None = None


class Ours:
    """The generated package ``package``, imported under that name."""

    def __init__(self, package: str, forced: Forced | None = None) -> None:
        self.package = package
        self.forced = forced
        self.name = "kernelgen" if forced is None else f"kernelgen:{forced.schedule}"
        self._kg = importlib.import_module(package)
        self._runtime = importlib.import_module(f"{package}._runtime")

    def versions(self) -> dict[str, str]:
        return {"kernelgen": kernelgen.__version__}

    def release(self) -> None:
        pass

    def prepare(self, case: Case) -> Prepared:
        cell = case.cell
        if self.forced is not None and not cell.projections:
            raise Unsupported("a schedule is forced on projections only")
        if not all(
            any(self.serves(cell, p.weighted, schedule) for schedule in _SCHEDULES)
            for p in cell.projections
        ):
            raise Unsupported("the spec leaves this case out")
        calls: list[Callable[[], None]]
        workspace = self._workspace(case)
        if cell.site in ("route", "layer"):
            calls = [
                functools.partial(self._layer, cell, batch, workspace) for batch in case.batches
            ]
        else:
            routes = self.routes(case, self.forced)
            if self.forced is not None:
                calls = self.bound(case, routes, self.forced)
            else:
                calls = [
                    self._projection(cell, batch, batch.operands[0], route)
                    for batch, route in zip(case.batches, routes, strict=True)
                ]
        variant, config = self._observe(calls[0])
        check = None
        if cell.site == "route" and variant:
            check = functools.partial(self._check_route, cell, case.batches[0], workspace)
        return Prepared(tuple(calls), variant, config, launches=bool(variant), check=check)

    def routes(self, case: Case, forced: Forced | None) -> list[Any]:
        """The route of each batch: the front door's choice, or what the forced schedule needs."""
        workspace = self._workspace(case)
        # Tables of its own for each batch; the scratch is shared, as on a stream of an engine.
        return [
            self._route(
                case.cell,
                batch,
                workspace._replace(tables=torch.empty_like(workspace.tables)),
                forced,
            )
            for batch in case.batches
        ]

    def bound(self, case: Case, routes: Sequence[Any], forced: Forced) -> list[Callable[[], None]]:
        """One call of the forced schedule for each batch of a projection, checked and bound once for all.

        Raises:
            Unsupported: no variant has this schedule.
        """
        sizes = importlib.import_module(f"{self.package}.moe_lora._problem")
        batch = case.batches[0]
        operands = batch.operands[0]
        weighted = operands.projection.weighted
        weights = operands.weights
        scales = (weights.a_scale or None, weights.b_scale or None, operands.x_scale)
        module = self.variant(case.cell, weighted, forced.schedule)
        problem = sizes.check(
            forced.schedule,
            *_tensors(operands),
            routes[0],
            dtype=operands.out.dtype,
            naive=forced.schedule in NAIVE_SCHEDULES,
            max_rank=None,
            topk_weights=batch.topk_weights,
            weighted=weighted,
            adds=case.cell.add,
            scales=sizes.find_scales(
                forced.schedule, operands.x, weights.lora_a, weights.lora_b, *scales
            ),
        )
        if forced.config is None:
            config = sizes.choose(forced.schedule, problem, routes[0])
        else:
            config = module.Config(**forced.config)
        call = module.bind(problem, routes[0], config)
        return [
            functools.partial(
                call,
                *_tensors(batch.operands[0]),
                route,
                batch.topk_weights if weighted else None,
                *_scales(batch.operands[0]).values(),
            )
            for batch, route in zip(case.batches, routes, strict=True)
        ]

    def _workspace(self, case: Case) -> Any:
        cell = case.cell
        return self._kg.moe_workspace(
            max_tokens=cell.tokens,
            top_k=cell.model.top_k,
            num_experts=cell.model.experts,
            max_loras=cell.slots,
            max_rank=cell.rank,
            num_slices=max([p.slices for p in cell.projections], default=1),
            device=case.device,
        )

    def _route(self, cell: Cell, batch: Batch, workspace: Any, forced: Forced | None = None) -> Any:
        options: dict[str, Any] = {}
        if forced is not None:
            naive = forced.schedule in NAIVE_SCHEDULES
            options = {"assignment": "naive" if naive else "sorted", "block_m": forced.block_m}
        return self._kg.moe_route(
            batch.topk_ids,
            batch.mapping,
            num_experts=cell.model.experts,
            max_loras=cell.slots,
            workspace=workspace,
            rank=cell.rank,
            **options,
        )

    def _layer(self, cell: Cell, batch: Batch, workspace: Any) -> None:
        route = self._route(cell, batch, workspace)
        for operands in batch.operands:
            self._projection(cell, batch, operands, route)()

    def _projection(
        self, cell: Cell, batch: Batch, operands: Operands, route: Any
    ) -> Callable[[], None]:
        weighted = operands.projection.weighted
        return functools.partial(
            self._kg.moe_lora,
            *_tensors(operands),
            route,
            topk_weights=batch.topk_weights if weighted else None,
            add_inputs=cell.add,
            mul_routed_weight=weighted,
            **_scales(operands),
        )

    def variant(self, cell: Cell, weighted: bool, schedule: str) -> Any:
        """The module of the variant of ``schedule`` that serves ``cell``."""
        names = self._names(cell, weighted, schedule)
        known = self._kg.variants()
        name = next((name for name in names if name in known), None)
        if name is None:
            raise Unsupported(f"there is no variant {names[0]}")
        return importlib.import_module(f"{self.package}.moe_lora.{name.removeprefix('moe_lora_')}")

    def serves(self, cell: Cell, weighted: bool, schedule: str) -> bool:
        """Whether ``schedule`` has a variant for ``cell``."""
        return not set(self._kg.variants()).isdisjoint(self._names(cell, weighted, schedule))

    def _names(self, cell: Cell, weighted: bool, schedule: str) -> list[str]:
        """What the variants are called that could serve ``cell``, by rising rank."""
        buckets = [f"r{r}" for r in (16, 32, 64, 128) if cell.rank <= r]
        return [self._name(cell, weighted, schedule, rank) for rank in (*buckets, "rany")]

    def _name(self, cell: Cell, weighted: bool, schedule: str, rank: str) -> str:
        tags = (
            schedule,
            cell.dtype,
            "naive" if schedule in NAIVE_SCHEDULES else "sorted",
            "add" if cell.add else "set",
            "weighted" if weighted else "plain",
            rank,
            cell.quant if cell.quant == "none" else f"w8{cell.quant}",
            cell.act if cell.act == "none" else f"a8{cell.act}",
        )
        return variant_name("moe_lora", tags)

    def _observe(self, call: Callable[[], None]) -> tuple[str, dict[str, Any]]:
        """(variants, tiles by kernel) of what ``call`` launches, without running it."""
        with self._runtime.compile_only() as requests:
            call()
        tiles: dict[str, dict[str, Any]] = {}
        for request in requests:
            kernel = request.launcher.kernel
            function = kernel.fn.__name__
            owners = (v for v in self._kg.variants() if function.startswith(v))
            variant = max(owners, key=len, default=function)
            constants = zip(
                kernel.arg_names[len(request.arguments) :], request.constants, strict=True
            )
            chosen = {k.lower(): v for k, v in constants if any(part in k for part in _TILES)}
            part = function.removeprefix(variant).strip("_") or "kernel"
            chosen["num_warps"] = request.options.num_warps
            tiles.setdefault(variant, {})[part] = chosen
        only = tiles[min(tiles)] if len(tiles) == 1 else tiles
        return " + ".join(tiles), only

    def _check_route(self, cell: Cell, batch: Batch, workspace: Any) -> None:
        route = self._route(cell, batch, workspace)
        verify_blocks(batch, route.pairs, route.blocks, route.num_blocks)


def _scales(operands: Operands) -> dict[str, Any]:
    """The scales that ``operands`` have, in the order of the arguments."""
    weights = operands.weights
    found = {"a_scale": weights.a_scale, "b_scale": weights.b_scale, "x_scale": operands.x_scale}
    return {name: scales for name, scales in found.items() if scales is not None and scales != ()}


def _tensors(operands: Operands) -> tuple[Any, ...]:
    weights = operands.weights
    return operands.out, operands.x, weights.lora_a, weights.lora_b
