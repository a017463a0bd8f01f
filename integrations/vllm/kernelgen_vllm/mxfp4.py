"""Experts of gpt-oss in MXFP4, with KERNELGEN_VLLM_MXFP4=1: weights stay as they are loaded, where the kernels serve the layer.

vLLM chooses the kernels of a layer as it is made, and repacks its weights for them once they are loaded: beside adapters for
those of Marlin. Of what it has, emulation alone leaves them as they are.
"""

from __future__ import annotations

import functools
import types
from typing import Any

import torch

from . import experts
from .punica import see
from .shared import gate
from .shared.calls import empty
from .versions import Refused, seams

__all__ = ["Experts", "choice"]

_vllm = seams()


class Experts(_vllm.TritonExperts):  # type: ignore[name-defined,misc]
    """Experts whose weights are uint8 [E, rows, columns / 2], two numbers a byte, with scales [E, rows, columns / 32].

    Tokens come in bfloat16.
    """

    kernelgen_mxfp4 = True
    apply = experts.apply
    quant_dtype = None
    expects_unquantized_inputs = True
    _supports_current_device = staticmethod(lambda: True)
    _supports_quant_scheme = staticmethod(lambda weight_key, activation_key: True)

    def _kernelgen_own_apply(self, *given: Any) -> None:
        raise RuntimeError(
            "kernelgen: got a call that no kernel serves, of MXFP4 weights that stayed as they were loaded; "
            "wanted one of a layer with adapters; KERNELGEN_VLLM_EXPERTS=0 has vLLM's own kernels"
        )


def choice(moe: Any) -> tuple[Any, type] | None:
    """The backend and the experts of a ``FusedMoEConfig`` in MXFP4; None: vLLM chooses, and the line at start says why."""
    reason = _refusal(moe) if moe.is_lora_enabled else "there are no adapters"
    if reason is None:
        return _vllm.backend_of_mxfp4_as_loaded(), Experts
    moe.kernelgen_refusal = reason
    return None


def _refusal(moe: Any) -> str | None:
    """Why the kernels do not serve a layer, or are not to; None: they do."""
    if not gate.is_on("KERNELGEN_VLLM_EXPERTS"):
        return "KERNELGEN_VLLM_EXPERTS=0"
    if moe.moe_backend != "auto":
        return f"moe_backend={moe.moe_backend} was asked for"
    lora = _vllm.lora_config()
    try:
        see(lora)
    except Refused as reason:
        return str(reason)
    numbers = types.SimpleNamespace(clamp_limit=moe.swiglu_limit, alpha=moe.swiglu_alpha, beta=moe.swiglu_beta)
    act = experts.activation_of(moe.activation, numbers)
    if act is None or "layout" not in act or not moe.has_bias or moe.in_dtype != torch.bfloat16:
        return "the layer is not gpt-oss's in bfloat16"
    if moe.intermediate_size_per_partition % 32 and not _vllm.PADS_ADAPTERS:
        return "a scale is of columns of two GPUs: vLLM would cut adapters elsewhere than weights"
    num, width, inter = moe.num_local_experts, _whole(moe.hidden_dim), _whole(moe.intermediate_size_per_partition)
    new = functools.partial(empty, dtype=torch.uint8)
    w1, w2 = new(num, 2 * inter, width // 2), new(num, width, inter // 2)
    options = {"w13_scale": new(num, 2 * inter, width // 32), "w2_scale": new(num, width, inter // 32)}
    options |= {f"{w}_bias": empty(num, rows, dtype=moe.in_dtype) for w, rows in (("w13", 2 * inter), ("w2", width))}
    rank, loras = lora.max_lora_rank, lora.max_loras
    sizes = (num, rank, width), (num, 2 * inter, rank), (num, rank, inter), (num, width, rank)
    factors = {name: (empty(loras, *size, dtype=lora.lora_dtype),) for name, size in zip(experts.FACTORS, sizes, strict=True)}
    context = types.SimpleNamespace(
        **factors,
        adapter_enabled=empty(loras + 1, dtype=torch.int32),
        top_k=moe.experts_per_token,
        fully_sharded=lora.fully_sharded_loras,
    )
    layer, device = experts.Layer(act, options), torch.device(moe.device)
    refusals = (experts.refusal_of(layer, context, w1, w2, adapted, device) for adapted in (False, True))
    return next(filter(None, refusals), None)


def _whole(size: int) -> int:
    """A number of columns, with those that fill the last scale's."""
    return -(-size // 32) * 32
