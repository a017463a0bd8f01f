"""SGLang. Its LoRA kernels write a delta, without routing weights."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any, Callable

import torch
import triton.language as tl

from kernelgen.measure.peers.installed import GROUPS, Peer, layer_only, refuse_fp8
from kernelgen.measure.suites import fused_moe as of_fused_moe
from kernelgen.measure.suites.moe_lora import Cell
from kernelgen.measure.workload import Case, Prepared, Unsupported
from kernelgen.measure.workloads import fused_moe
from kernelgen.measure.workloads.moe_lora import Adapters, Batch, Operands

_DECODE_TOKENS = 64  # its decode plan up to here, its prefill plan above
_SMALL_ROUTE, _LARGE_ROUTE = (
    512,
    16384,
)  # pairs between which its MoE path asks for the large route builder


class MoeLora(Peer):
    """Its grouped lora_a and lora_b kernels, with its own plan for the GPU."""

    name = "sglang"

    def __init__(self) -> None:
        common = "sglang.kernels.ops.lora.common"
        self._a, self._b = (self.module(f"{common}.{kernel}") for kernel in ("lora_a", "lora_b"))
        self._build_route = self.module(f"{common}.routing").build_route
        self._workspace = self.module("sglang.srt.lora.workspace").LoraWorkspace
        root = Path(self.module("sglang").__path__[0])
        self._plans = json.loads((root / "srt/lora/moe/configs/sm90.plans.json").read_text())
        self._merged: dict[int, tuple[Adapters, torch.Tensor, torch.Tensor]] = {}

    def release(self) -> None:
        """Its layout of the weights."""
        self._merged.clear()

    def prepare(self, case: Case[Batch]) -> Prepared:
        cell: Cell = case.cell
        refuse_fp8(cell.quant, cell.act)
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

    def _merge(self, weights: Adapters) -> tuple[torch.Tensor, torch.Tensor]:
        """Its layout: all slices in one tensor, adapters and experts in one dimension."""
        known = self._merged.get(id(weights))
        if known is None:
            a, b = (
                (torch.cat(parts, 2) if len(parts) > 1 else parts[0]).flatten(0, 1)
                for parts in (weights.a, weights.b)
            )
            known = self._merged[id(weights)] = (weights, a, b)
        return known[1], known[2]


class FusedMoe(Peer):
    """The kernels of its Triton experts, as its runner calls them one after the other, with its tuned tiles."""

    name = "sglang"

    def __init__(self) -> None:
        runner = "sglang.srt.layers.moe.moe_runner.triton_utils"
        self._kernels = self.module("sglang.kernels.ops.moe.fused_moe_triton_kernels")
        self._tiles = self.module(f"{runner}.fused_moe_triton_config")
        self._align = self.module(f"{runner}.moe_align_block_size").moe_align_block_size
        self._between = self.module("sglang.kernels.ops.activation.activation").silu_and_mul

    def prepare(self, case: Case[fused_moe.Batch]) -> Prepared:
        cell: of_fused_moe.Cell = case.cell
        fp8 = layer_only(cell, GROUPS)
        w, block = case.batches[0].experts, [128, 128] if fp8 else None
        sizes = (w.w13.shape, w.w2.shape, cell.model.top_k, "fp8_w8a8" if fp8 else None, cell.tokens)
        first, (second, _) = self._tiles.try_get_optimal_moe_config(*sizes, block_shape=block, return_down_config=True)
        first, second = dict(first), dict(second or first)
        up_tma, down_tma = first.pop("USE_TMA", False), second.pop("USE_TMA", False)
        flags = {"use_fp8_w8a8": fp8, **dict.fromkeys(("use_int8_w8a8", "use_int8_w8a16", "use_int4_w4a16"), False)}
        product = functools.partial(
            self._kernels.invoke_fused_moe_kernel,
            compute_type=tl.bfloat16,
            per_channel_quant=False,
            block_shape=block,
            **flags,
        )

        def call(b: fused_moe.Batch) -> None:
            (num_tokens, top_k), (experts, width, inter) = b.topk_ids.shape, b.experts.w2.shape
            size, routing = first["BLOCK_SIZE_M"], (b.topk_weights, b.topk_ids)
            tables = self._align(b.topk_ids, size, experts)
            padding = min(num_tokens * top_k, experts + 1) * (size - 1) if down_tma else 0
            rows = b.out.new_empty(num_tokens * top_k + padding, 2 * inter)
            scales, tma = (b.x_scale, b.experts.w13_scale, None), {"c_sorted": down_tma, "b_use_tma": up_tma}
            product(b.x, b.experts.w13, None, rows, *scales, *routing, *tables, False, top_k, first, **tma)
            h = rows.new_empty(len(rows), inter)
            self._between(rows, h)
            y = b.out.new_empty(num_tokens, top_k, width)
            scales, tma = (None, b.experts.w2_scale, None), {"a_use_tma": down_tma, "b_use_tma": down_tma}
            product(h, b.experts.w2, None, y, *scales, *routing, *tables, True, 1, second, **tma)
            self._kernels.moe_sum_reduce_triton(y, b.out, 1.0)

        calls = tuple(functools.partial(call, batch) for batch in case.batches)
        return Prepared(calls, config={"up": first, "down": second})


PEERS: dict[str, Any] = {"moe_lora": MoeLora, "fused_moe": FusedMoe}
