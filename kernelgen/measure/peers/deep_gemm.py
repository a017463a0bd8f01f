"""DeepGEMM: its grouped products over rows that vLLM's kernels put in order, as vLLM calls them."""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl

from kernelgen.measure.peers.installed import GROUPS, Peer, layer_only
from kernelgen.measure.suites import fused_moe as of_fused_moe
from kernelgen.measure.workload import Case, Prepared, Unsupported
from kernelgen.measure.workloads import fused_moe

_LEAST_TOKENS = 64  # below, it pads more rows than there are
_ALIGN = 128  # rows of an expert are a multiple of it


class FusedMoe(Peer):
    """Scatter, a product, the activation, a product, gather."""

    name = "deep_gemm"

    def __init__(self) -> None:
        self._products = self.module("deep_gemm")
        layers = "vllm.model_executor.layers"
        self._rows = self.module(f"{layers}.fused_moe.deep_gemm_utils")
        self._count = self.module(f"{layers}.fused_moe.utils").count_expert_num_tokens
        self._quantise = self.module(f"{layers}.quantization.utils.fp8_utils").silu_mul_per_token_group_quant_fp8_colmajor

    def prepare(self, case: Case[fused_moe.Batch]) -> Prepared:
        cell: of_fused_moe.Cell = case.cell
        fp8 = layer_only(cell, GROUPS)
        if cell.tokens < _LEAST_TOKENS:
            raise Unsupported(f"{_LEAST_TOKENS} tokens at least")
        self._products.set_mk_alignment_for_contiguous_layout(_ALIGN)
        run = self._fp8 if fp8 else self._bf16
        return Prepared(tuple(functools.partial(run, batch) for batch in case.batches))

    def _bf16(self, b: fused_moe.Batch) -> None:
        inter = b.experts.w2.shape[2]
        ones = torch.ones(len(b.x), 1, device=b.x.device)
        a, _, ends, place = self._scatter(b, ones, b.x.shape[1])
        c, h, y = (a.new_empty(len(a), width) for width in (2 * inter, inter, b.x.shape[1]))
        self._products.m_grouped_bf16_gemm_nt_contiguous(a, b.experts.w13, c, ends, use_psum_layout=True)
        _silu_and_mul[(b.topk_ids.numel(), triton.cdiv(inter, 1024))](h, c, place, inter, 1024)
        self._products.m_grouped_bf16_gemm_nt_contiguous(h, b.experts.w2, y, ends, use_psum_layout=True)
        self._rows.ep_gather(y, b.topk_ids, b.topk_weights, place, None, b.out)

    def _fp8(self, b: fused_moe.Batch) -> None:
        w, inter = b.experts, b.experts.w2.shape[2]
        a, a_scale, ends, place = self._scatter(b, b.x_scale, 128)
        c, y = (b.out.new_empty(len(a), width) for width in (2 * inter, b.x.shape[1]))
        product = functools.partial(self._products.m_grouped_fp8_gemm_nt_contiguous, use_psum_layout=True)
        product((a, a_scale), (w.w13, w.w13_scale), c, ends)
        options = {"use_ue8m0": False, "expert_ends": ends, "expert_alignment": _ALIGN}
        h = self._quantise(c, a.new_empty(len(a), inter), **options)
        product(h, (w.w2, w.w2_scale), y, ends)
        self._rows.ep_gather(y, b.topk_ids, b.topk_weights, place, None, b.out)

    def _scatter(self, b: fused_moe.Batch, scale: Any, group: int) -> tuple[torch.Tensor, ...]:
        """Rows by expert, their scales, where each expert ends, and where each pair is."""
        pairs, experts, device = b.topk_ids.numel(), len(b.experts.w2), b.x.device
        count = triton.cdiv(pairs + min(pairs, experts) * (_ALIGN - 1), _ALIGN) * _ALIGN
        rows = b.x.new_empty(count, b.x.shape[1])
        scales = torch.zeros(count, triton.cdiv(b.x.shape[1], group), device=device)
        start, ends = (torch.empty(experts, dtype=torch.int32, device=device) for _ in range(2))
        place = torch.empty_like(b.topk_ids)
        each = self._count(b.topk_ids, experts, None)
        options = {"align_m": _ALIGN, "block_size": group, "use_psum_layout": True}
        self._rows.ep_scatter(b.x, scale, b.topk_ids, each, None, start, rows, scales, ends, place, **options)
        return rows, scales, ends, place


@triton.jit  # type: ignore[untyped-decorator]
def _silu_and_mul(h, c, place, inter: tl.constexpr, block: tl.constexpr):  # type: ignore[no-untyped-def]
    """h[r] = silu(c[r, : inter]) * c[r, inter :] for the row r of a pair: those of the padding are left out."""
    row = tl.load(place + tl.program_id(0)).to(tl.int64)
    columns = tl.program_id(1) * block + tl.arange(0, block)
    gate = tl.load(c + row * 2 * inter + columns, mask=columns < inter).to(tl.float32)
    up = tl.load(c + row * 2 * inter + inter + columns, mask=columns < inter).to(tl.float32)
    tl.store(h + row * inter + columns, (gate / (1 + tl.exp(-gate)) * up).to(tl.bfloat16), mask=columns < inter)


PEERS: dict[str, Any] = {"fused_moe": FusedMoe}
