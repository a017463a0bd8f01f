"""SGLang's grouped lora_a and lora_b kernels, with its own plan for the GPU. They write a delta, without routing weights."""

from __future__ import annotations

import functools
import importlib
import json
from pathlib import Path
from typing import Any, Callable

import torch

from kernelgen.measure.implementation import Prepared, Unsupported, refuse_fp8
from kernelgen.measure.inputs import Batch, Case, Operands, Weights
from kernelgen.measure.peers.installed import unavailable, version
from kernelgen.measure.workloads import Cell

_DECODE_TOKENS = 64  # its decode plan up to here, its prefill plan above
_SMALL_ROUTE, _LARGE_ROUTE = (
    512,
    16384,
)  # pairs between which its MoE path asks for the large route builder


class Peer:
    name = "sglang"

    def __init__(self) -> None:
        try:
            common = "sglang.kernels.ops.lora.common"
            self._a = importlib.import_module(f"{common}.lora_a")
            self._b = importlib.import_module(f"{common}.lora_b")
            self._build_route = importlib.import_module(f"{common}.routing").build_route
            self._workspace = importlib.import_module("sglang.srt.lora.workspace").LoraWorkspace
        except ImportError as error:
            raise unavailable("sglang", error) from error
        root = Path(importlib.import_module("sglang").__path__[0])
        self._plans = json.loads((root / "srt/lora/moe/configs/sm90.plans.json").read_text())
        self._merged: dict[int, tuple[Weights, torch.Tensor, torch.Tensor]] = {}

    def versions(self) -> dict[str, str]:
        return {"sglang": version("sglang")}

    def release(self) -> None:
        self._merged.clear()

    def prepare(self, case: Case) -> Prepared:
        cell = case.cell
        refuse_fp8(cell)
        if cell.projections and cell.add:
            raise Unsupported("it writes deltas only; compare with --set")
        plan = self._plan(cell)
        tiles = plan["tiles"][0]["sites"]
        block = tiles["routing_block_size"]
        scratch = self._workspace()

        def route_of(batch: Batch, view: str, **options: Any) -> Any:
            pairs = batch.topk_ids.numel()
            large = view == "aligned" and _SMALL_ROUTE < pairs < _LARGE_ROUTE
            return self._build_route(
                batch.mapping,
                group_ids=batch.topk_ids,
                groups_per_slot=cell.model.experts,
                max_loras=cell.slots,
                block_size=block,
                view=view,
                capacity=0 if large else None,
                **options,
            )

        def route(batch: Batch) -> Any:
            return route_of(batch, "aligned", workspace=scratch, tensor_prefix="bench")

        if cell.site == "route":
            calls = [functools.partial(route, batch) for batch in case.batches]
            return Prepared(tuple(calls), variant=plan["name"], config={"block_size": block})

        def call_of(batch: Batch) -> Callable[[], None]:
            raw = route_of(batch, "raw")
            steps = [self._projection(plan, cell, operands, raw) for operands in batch.operands]
            if cell.site != "layer":
                return functools.partial(steps[0], route_of(batch, "aligned"))

            def layer() -> None:
                made = route(batch)
                for step in steps:
                    step(made)

            return layer

        return Prepared(
            tuple(call_of(batch) for batch in case.batches),
            variant=plan["name"],
            config={name: tile for name, tile in tiles.items() if name != "b_activation"},
            note="without routing weights" if any(p.weighted for p in cell.projections) else "",
            applies_weights=False,
            keeps_rows=False,
        )

    def _plan(self, cell: Cell) -> dict[str, Any]:
        domain = self._plans["domain"]
        tuned = (
            cell.model.hidden <= domain["max_hidden"]
            and cell.model.experts <= domain["max_local_experts"]
        )
        phase = "decode" if cell.tokens <= _DECODE_TOKENS else "prefill"
        for plan in (self._plans["scenarios"] if tuned else []) + self._plans["fallback"]:
            if (
                plan.get("layout") in (None, "per_expert")
                and plan.get("phase") in (None, phase)
                and cell.rank <= (plan.get("max_rank") or cell.rank)
            ):
                found: dict[str, Any] = plan
                return found
        raise Unsupported("none of its plans serves this cell")

    def _projection(
        self, plan: dict[str, Any], cell: Cell, operands: Operands, raw: Any
    ) -> Callable[[Any], None]:
        """The pair of launches of one projection, still without its aligned route."""
        p = operands.projection
        site = "down" if p.weighted else "gate_up"
        tiles = plan["tiles"][0]["sites"]
        a_tiles, b_tiles = tiles[f"{site}_a"], dict(tiles[f"{site}_b"])
        per_row = plan["plan"].get(f"{site}_a_family", "grouped") == "per_row"
        pairs = cell.tokens * cell.model.top_k
        edges = tuple(s * p.n for s in range(p.slices + 1))
        geometry = self._b.slice_geometry(
            edges, b_tiles["BLOCK_SIZE_N"], operands.x.device, out_offsets=edges[:-1]
        )
        a, b = self._merge(operands.weights)
        bridge = operands.x.new_empty(pairs, p.slices * cell.rank)
        delta = operands.out.view(pairs, p.slices * p.n)

        def step(route: Any) -> None:
            if per_row:
                self._a.per_row_lora_a(
                    operands.x, a, bridge, raw, config=a_tiles, pair_input=p.weighted
                )
            else:
                self._a.grouped_lora_a(
                    operands.x, a, bridge, route, config=a_tiles, pair_input=p.weighted
                )
            self._b.grouped_lora_b(
                bridge,
                b,
                delta,
                route,
                geometry=geometry,
                config=b_tiles,
                add_inplace=False,
                zero_sentinel=True,
            )

        return step

    def _merge(self, weights: Weights) -> tuple[torch.Tensor, torch.Tensor]:
        """Its layout: all slices in one tensor, adapters and experts in one dimension."""
        known = self._merged.get(id(weights))
        if known is None:
            a, b = (
                (torch.cat(parts, 2) if len(parts) > 1 else parts[0]).flatten(0, 1)
                for parts in (weights.lora_a, weights.lora_b)
            )
            known = self._merged[id(weights)] = (weights, a, b)
        return known[1], known[2]
