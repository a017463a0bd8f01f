"""triton_kernels: its routing and grouped products. Its SwiGLU takes gate and up in turns, and up + 1: so does what is right."""

from __future__ import annotations

import functools
from typing import Any

import torch

from kernelgen.measure.peers.installed import Peer, layer_only
from kernelgen.measure.suites import fused_moe as of_fused_moe
from kernelgen.measure.workload import Case, Prepared
from kernelgen.measure.workloads import fused_moe


class FusedMoe(Peer):
    """Routing from logits, which are made of the given weights; a product with its activation, and one that sums."""

    name = "triton_kernels"

    def __init__(self) -> None:
        self._products = self.module("triton_kernels.matmul_ogs")
        self._routing = self.module("triton_kernels.routing")
        self._swiglu = self.module("triton_kernels.swiglu")

    def prepare(self, case: Case[fused_moe.Batch]) -> Prepared:
        cell: of_fused_moe.Cell = case.cell
        layer_only(cell)
        specs = self._products.FnSpecs("swiglu", self._swiglu.swiglu_fn, ("alpha", "limit"))
        between = self._products.FusedActivation(specs, (1.0, None), 2)
        logits = [_logits(batch, cell.model.experts) for batch in case.batches]

        def call(b: fused_moe.Batch, scores: torch.Tensor) -> None:
            data, gather, scatter = self._routing.routing(scores, cell.model.top_k)
            product = self._products.matmul_ogs
            w13, w2 = b.experts.w13.transpose(1, 2), b.experts.w2.transpose(1, 2)
            h = product(b.x, w13, None, data, gather_indx=gather, fused_activation=between)
            b.out.copy_(product(h, w2, None, data, scatter_indx=scatter, gammas=data.gate_scal))

        calls = tuple(functools.partial(call, *pair) for pair in zip(case.batches, logits, strict=True))
        truths = functools.partial(fused_moe.layer_truths, cell, case.batches[0], _in_turns)
        return Prepared(calls, note="routing included; gate and up in turns", truths=truths)


def _logits(batch: fused_moe.Batch, experts: int) -> torch.Tensor:
    """Scores [T, E] whose largest are those of the experts of each token, and whose softmax over these are its weights."""
    scores = torch.full((len(batch.topk_ids), experts), -1e4, device=batch.topk_ids.device)
    return scores.scatter_(1, batch.topk_ids.long(), batch.topk_weights.log())


def _in_turns(x: torch.Tensor) -> torch.Tensor:
    gate, up = x[..., ::2], x[..., 1::2] + 1
    return torch.nn.functional.silu(gate) * up


PEERS: dict[str, Any] = {"fused_moe": FusedMoe}
