"""vLLM's fused MoE-LoRA op, with the tables, tiles and arguments that its Punica wrapper gives it."""

from __future__ import annotations

import functools
import importlib
import json
import sys
from pathlib import Path
from typing import Any

import torch

from kernelgen.measure.implementation import Prepared, Unsupported, refuse_fp8
from kernelgen.measure.inputs import Batch, Case
from kernelgen.measure.peers.installed import unavailable, version
from kernelgen.measure.workloads import Cell

_SPARSITY = 8  # naive while pairs * 8 <= experts * adapters


class Peer:
    name = "vllm"

    def __init__(self) -> None:
        try:
            self._ops = importlib.import_module("vllm.lora.ops.triton_ops")
        except ImportError as error:
            raise unavailable("vllm", error) from error
        self._root = Path(importlib.import_module("vllm").__path__[0])

    def versions(self) -> dict[str, str]:
        return {"vllm": version("vllm")}

    def release(self) -> None:
        module = sys.modules.get("vllm.lora.ops.triton_ops.fused_moe_lora_op")
        getattr(module, "_LORA_PTR_DICT", {}).clear()  # keyed by address, and never invalidated

    def prepare(self, case: Case) -> Prepared:
        cell = case.cell
        refuse_fp8(cell)
        if cell.site == "route":
            raise Unsupported("its routing op is CUDA code outside of the kernels that are timed")
        pairs = cell.tokens * cell.model.top_k
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
                    operands.weights.lora_a,
                    operands.weights.lora_b,
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
