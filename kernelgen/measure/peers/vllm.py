"""vLLM, with the tables, tiles, buffers and arguments that it gives its kernels itself."""

from __future__ import annotations

import functools
import json
import sys
from pathlib import Path
from typing import Any

import torch
import triton.language as tl

from kernelgen.measure.peers.installed import GROUPS, Peer, layer_only, operator, refuse_fp8
from kernelgen.measure.suites import fused_moe as of_fused_moe
from kernelgen.measure.suites import lora as of_lora
from kernelgen.measure.suites.moe_lora import Cell
from kernelgen.measure.workload import Case, Prepared, Unsupported
from kernelgen.measure.workloads import fused_moe, lora
from kernelgen.measure.workloads.moe_lora import Batch

_SPARSITY = 8  # naive while pairs * 8 <= experts * adapters


class _Vllm(Peer):
    name = "vllm"


class MoeLora(_Vllm):
    """Its fused MoE-LoRA op."""

    def __init__(self) -> None:
        self._ops = self.module("vllm.lora.ops.triton_ops")
        self._root = Path(self.module("vllm").__path__[0])

    def release(self) -> None:
        """Its table of pointers is keyed by address, and never invalidated."""
        module = sys.modules.get("vllm.lora.ops.triton_ops.fused_moe_lora_op")
        getattr(module, "_LORA_PTR_DICT", {}).clear()

    def prepare(self, case: Case[Batch]) -> Prepared:
        cell: Cell = case.cell
        refuse_fp8(cell.quant, cell.act)
        if cell.site == "route":
            raise Unsupported("its routing op is CUDA code outside of the kernels that are timed")
        pairs = cell.pairs
        naive = pairs * _SPARSITY <= cell.model.experts * cell.slots
        tiles = _moe_tiles(self._root, cell.model, cell.tokens, case.device)
        shrink, expand = _lora_tiles(tiles, cell.rank)
        active = torch.tensor([cell.slots + 1], dtype=torch.int32)
        enabled = torch.ones(cell.slots + 1, dtype=torch.int32, device=case.device)

        def call_of(batch: Batch) -> functools.partial[None]:
            naive_tables = (None, batch.topk_ids.reshape(-1), None)
            tables = naive_tables if naive else align(batch, cell, shrink[0])
            ids = torch.full_like(enabled, -1)
            used = torch.unique(batch.mapping)
            ids[: used.numel()] = used
            arguments = [
                (
                    operands.out,
                    operands.x,
                    operands.weights.a,
                    operands.weights.b,
                    batch.topk_weights,
                    *tables,
                    batch.mapping,
                    cell.rank,
                    cell.model.top_k,
                    ids,
                    active,
                    enabled,
                    *shrink,
                    *expand,
                    operands.projection.weighted,
                    False,
                    0,
                    cell.add,
                )
                for operands in batch.operands
            ]
            return functools.partial(self._run, arguments)

        return Prepared(
            tuple(call_of(batch) for batch in case.batches),
            variant=_path(cell, pairs, naive),
            config=tiles,
            note="" if naive or cell.site != "layer" else "without its routing op",
        )

    def _run(self, arguments: list[tuple[Any, ...]]) -> None:
        for call in arguments:
            self._ops.fused_moe_lora(*call)


def _path(cell: Cell, pairs: int, naive: bool) -> str:
    form = "naive" if naive else "sorted"
    if cell.rank > 128:
        return f"two_kernel_{form}"
    if naive and cell.rank <= 64 and pairs * cell.rank <= 1024:
        return "small_batch"
    return f"one_shot_{form}"


def _moe_tiles(root: Path, model: Any, tokens: int, device: torch.device) -> dict[str, int]:
    """The tiles of the base MoE kernel, which its LoRA takes over: its tuned file, else its defaults."""
    gpu = torch.cuda.get_device_name(device).replace(" ", "_") if device.type == "cuda" else "cpu"
    name = f"E={model.experts},N={model.intermediate},device_name={gpu}.json"
    path = root / "model_executor/layers/fused_moe/configs" / name
    if path.exists():
        tuned = {int(m): c for m, c in json.loads(path.read_text()).items() if m.isdigit()}
        return dict(tuned[min(tuned, key=lambda m: abs(m - tokens))])
    few = tokens <= 64
    return {
        "BLOCK_SIZE_M": (
            16 if tokens <= 32 else 32 if tokens <= 96 else 64 if tokens <= 512 else 128
        ),
        "BLOCK_SIZE_N": 64 if few else 128,
        "BLOCK_SIZE_K": 128 if few else 64,
        "GROUP_SIZE_M": 16 if tokens // max(model.experts, 1) > 128 else 1,
        "num_warps": 4 if tokens <= 128 else 8,
        "num_stages": 4 if tokens <= 32 else 3,
    }


def _lora_tiles(tiles: dict[str, int], rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Its shrink and expand tiles: block m, n, k, group m, warps, stages, split k."""
    width = 1 << (rank - 1).bit_length()
    rest = (
        tiles.get("GROUP_SIZE_M", 8),
        tiles.get("num_warps", 4),
        tiles.get("num_stages", 3),
        tiles.get("SPLIT_K", 1),
    )
    m, n, k = tiles["BLOCK_SIZE_M"], tiles["BLOCK_SIZE_N"], tiles["BLOCK_SIZE_K"]
    return (m, min(n, width), k, *rest), (m, n, max(16, min(k, width)), *rest)


def align(batch: Batch, cell: Cell, block: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(sorted_token_ids [L, EM], expert_ids [L, EM / block], num_tokens_post_padded [L]), as its CUDA op makes them."""
    experts, slots, top_k = cell.model.experts, cell.slots, cell.model.top_k
    pairs = batch.topk_ids.numel()
    device = batch.topk_ids.device
    size = pairs * block if pairs < experts else pairs + experts * (block - 1)
    sorted_ids = torch.full((slots, size), pairs, dtype=torch.int32, device=device)
    adapter = batch.mapping.long().repeat_interleave(top_k)
    live = (adapter >= 0).nonzero()[:, 0]
    group = adapter[live] * experts + batch.topk_ids.reshape(-1).long()[live]
    group, order = group.sort(stable=True)
    count = torch.bincount(group, minlength=slots * experts)
    padded = ((count + block - 1) // block * block).view(slots, experts)
    ends = padded.cumsum(1)
    starts = (ends - padded).reshape(-1)
    within = torch.arange(len(group), device=device) - (count.cumsum(0) - count)[group]
    sorted_ids[group // experts, starts[group] + within] = live[order].to(torch.int32)
    first = torch.arange(0, size, block, device=device).expand(slots, -1).contiguous()
    owner = torch.searchsorted(ends, first, right=True)
    expert_ids = torch.where(first < ends[:, -1:], owner, -1).to(torch.int32)
    return sorted_ids, expert_ids.contiguous(), ends[:, -1].to(torch.int32).contiguous()


class Lora(_Vllm):
    """Its shrink and expand with the metadata and the buffer of its Punica wrapper."""

    def __init__(self) -> None:
        self._ops = self.module("vllm.lora.ops.triton_ops")
        self._metadata = self.module("vllm.lora.ops.triton_ops.lora_kernel_metadata")

    def prepare(self, case: Case[lora.Batch]) -> Prepared:
        cell: of_lora.Cell = case.cell
        refuse_fp8(cell.quant)
        meta = self._metadata.LoRAKernelMeta.make(cell.slots, cell.tokens, case.device)
        meta.prepare_tensors(case.batches[0].mapping)
        arguments = meta.meta_args(cell.tokens, False)
        y = torch.empty((len(cell.layer.widths), cell.tokens, cell.rank), device=case.device)

        def call(b: lora.Batch) -> None:
            self._ops.lora_shrink(b.x, list(b.a), y, *arguments, 1.0)
            self._ops.lora_expand(y, list(b.b), b.out, *arguments, offset_start=0, add_inputs=True)

        return Prepared(tuple(functools.partial(call, batch) for batch in case.batches))


class FusedMoe(_Vllm):
    """The kernels of its Triton experts as ``fused_experts`` calls them, with its tuned tiles where it has a file of them."""

    def __init__(self) -> None:
        self._moe = self.module("vllm.model_executor.layers.fused_moe.fused_moe")

    def prepare(self, case: Case[fused_moe.Batch]) -> Prepared:
        cell: of_fused_moe.Cell = case.cell
        fp8 = layer_only(cell, GROUPS)
        w, block = case.batches[0].experts, [128, 128] if fp8 else None
        dtype = "fp8_w8a8" if fp8 else None
        tiles = self._moe.try_get_optimal_moe_config(w.w13.shape, w.w2.shape, cell.model.top_k, dtype, cell.tokens, block)
        flags = {"use_fp8_w8a8": fp8, **dict.fromkeys(("use_int8_w8a8", "use_int8_w8a16", "use_int4_w4a16"), False)}
        product = functools.partial(
            self._moe.invoke_fused_moe_triton_kernel,
            compute_type=tl.bfloat16,
            per_channel_quant=False,
            block_shape=block,
            **flags,
        )
        total = operator("_moe_C.moe_sum")
        between = operator("_C.silu_and_mul_per_block_quant" if fp8 else "_C.silu_and_mul")

        def call(b: fused_moe.Batch) -> None:
            (num_tokens, top_k), (experts, width, inter) = b.topk_ids.shape, b.experts.w2.shape
            shape = (tiles, num_tokens, top_k, experts, None)
            tables = self._moe._prepare_expert_assignment(b.topk_ids, *shape, block_shape=block)
            rows = b.out.new_empty(num_tokens, top_k, 2 * inter)
            product(b.x, b.experts.w13, rows, b.x_scale, b.experts.w13_scale, None, *tables, False, top_k, tiles)
            h, h_scale = b.x.new_empty(num_tokens * top_k, inter), None
            if fp8:
                h_scale = torch.empty(num_tokens * top_k, inter // 128, device=h.device)
                between(h, rows.flatten(0, 1), h_scale, 128, None, False)
            else:
                between(h, rows.flatten(0, 1))
            y = b.out.new_empty(num_tokens, top_k, width)
            product(h, b.experts.w2, y, h_scale, b.experts.w2_scale, b.topk_weights, *tables, True, 1, tiles)
            total(y, b.out)

        return Prepared(tuple(functools.partial(call, batch) for batch in case.batches), config=dict(tiles))


PEERS: dict[str, Any] = {"moe_lora": MoeLora, "lora": Lora, "fused_moe": FusedMoe}
