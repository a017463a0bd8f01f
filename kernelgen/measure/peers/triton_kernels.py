"""triton_kernels: its routing and grouped products. Its SwiGLU takes gate and up in turns, and up + 1: so does what is right."""

from __future__ import annotations

import contextlib
import functools
from typing import Any, Iterator, NamedTuple

import torch

from kernelgen.families.activation import OSS
from kernelgen.measure.peers.installed import MXFP4, Peer, layer_only
from kernelgen.measure.suites import fused_moe as of_fused_moe
from kernelgen.measure.workload import Case, Prepared, Unsupported
from kernelgen.measure.workloads import fused_moe


class FusedMoe(Peer):
    """Routing from logits, which are made of the given weights; a product with its activation, and one that sums."""

    name = "triton_kernels"

    def __init__(self) -> None:
        self._products = self.module("triton_kernels.matmul_ogs")
        self._flags = self.module("triton_kernels.matmul_ogs_details.opt_flags")
        self._routing = self.module("triton_kernels.routing")
        self._swiglu = self.module("triton_kernels.swiglu")
        self._tensor = self.module("triton_kernels.tensor")
        self._layout = self.module("triton_kernels.tensor_details.layout")

    def prepare(self, case: Case[fused_moe.Batch]) -> Prepared:
        cell: of_fused_moe.Cell = case.cell
        mxfp4 = layer_only(cell, MXFP4)
        if mxfp4 and torch.cuda.get_device_capability(case.device) != (9, 0):
            raise Unsupported("MXFP4 weights on Hopper only")
        specs = self._products.FnSpecs("swiglu", self._swiglu.swiglu_fn, ("alpha", "limit"))
        between = self._products.FusedActivation(specs, (OSS.alpha, OSS.limit) if mxfp4 else (1.0, None), 2)
        logits = [_logits(batch, cell.model.experts) for batch in case.batches]
        weights = {id(batch.experts): self._laid_out(batch.experts) for batch in case.batches}

        def call(b: fused_moe.Batch, scores: torch.Tensor) -> None:
            data, gather, scatter = self._routing.routing(scores, cell.model.top_k)
            product, (w13, w2) = self._products.matmul_ogs, weights[id(b.experts)]
            h = product(b.x, w13.data, None, data, gather_indx=gather, precision_config=w13.config, fused_activation=between)
            options = {"scatter_indx": scatter, "precision_config": w2.config, "gammas": data.gate_scal}
            b.out.copy_(product(h, w2.data, None, data, **options))

        calls = tuple(functools.partial(call, *pair) for pair in zip(case.batches, logits, strict=True))
        truths = functools.partial(fused_moe.layer_truths, cell, case.batches[0], functools.partial(_in_turns, clamped=mxfp4))
        within = self._unsplit if mxfp4 else contextlib.nullcontext
        return Prepared(calls, note="routing included; gate and up in turns", truths=truths, within=within)

    def _laid_out(self, w: fused_moe.Experts) -> list[_Weights]:
        """Matrices [E, in, out]; of MXFP4 swizzled, with groups in fours, as vLLM does it on Hopper."""
        found = []
        for codes, scale in ((w.w13, w.w13_scale), (w.w2, w.w2_scale)):
            if scale is None:
                found.append(_Weights(codes.transpose(1, 2), None))
                continue
            wrap, convert = self._tensor.wrap_torch_tensor, self._tensor.convert_layout
            values, value_options = self._layout.make_default_matmul_mxfp4_w_layout(mx_axis=1)
            scales, scale_options = self._layout.make_default_matmul_mxfp4_w_scale_layout(mx_axis=1)
            fours = torch.nn.functional.pad(scale, (0, -scale.shape[2] % 4)).transpose(1, 2)
            data = convert(wrap(codes.transpose(1, 2), dtype=self._tensor.FP4), values, **value_options)
            config = self._products.PrecisionConfig(weight_scale=convert(wrap(fours), scales, **scale_options))
            found.append(_Weights(data, config))
        return found

    @contextlib.contextmanager
    def _unsplit(self) -> Iterator[None]:
        """Sums in one piece, as vLLM has it for MXFP4 on Hopper."""
        self._flags.update_opt_flags_constraints({"split_k": 1})
        try:
            yield
        finally:
            self._flags.reset_opt_flags_constraints()


class _Weights(NamedTuple):
    data: Any
    config: Any  # with their scales


def _logits(batch: fused_moe.Batch, experts: int) -> torch.Tensor:
    """Scores [T, E] whose largest are those of the experts of each token, and whose softmax over these are its weights."""
    scores = torch.full((len(batch.topk_ids), experts), -1e4, device=batch.topk_ids.device)
    return scores.scatter_(1, batch.topk_ids.long(), batch.topk_weights.log())


def _in_turns(x: torch.Tensor, clamped: bool) -> torch.Tensor:
    gate, up = x[..., ::2], x[..., 1::2]
    if clamped:
        return fused_moe.activate(torch.cat([gate, up], -1), gated=True, clamped=True)
    return torch.nn.functional.silu(gate) * (up + 1)


PEERS: dict[str, Any] = {"fused_moe": FusedMoe}
