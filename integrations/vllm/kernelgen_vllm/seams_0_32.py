"""The private parts of vLLM 0.32 and 0.33 that the plugin touches: all of them, and only here.

| part | what for |
| --- | --- |
| ``PunicaWrapperBase`` | what wrappers are; ``_embeddings_indices``, ``indices_len``, ``_select_full_linear_output`` of it |
| ``PunicaWrapperGPU`` | its methods are what layers call: ours have their parameters |
| ``LoRAModelManager._create_lora_modules`` | behind it all layers are there: warm-up, and the line of what serves which |
| ``LoRAConfig.compute_hash`` | keys the graphs that vLLM keeps on disk: those with our ops are others |
| ``ParallelLMHead.weight`` | how wide logits are, in front of what ``LogitsProcessorWithLoRA`` cuts off |
| ``TritonExperts.apply`` | the experts of a layer, see ``experts`` |
| ``FusedMoEWithLoRA.set_lora`` | behind it an adapter of theirs is in its slot |
| ``moe_kernel_quantize_input`` | makes FP8 of tokens that were gathered from other GPUs |
| ``select_mxfp4_moe_backend`` of ``quantization.mxfp4`` | chooses the experts of a layer in MXFP4, see ``early`` and ``mxfp4`` |
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from vllm.config import get_current_vllm_config
from vllm.config.lora import LoRAConfig
from vllm.distributed import tensor_model_parallel_all_gather, tensor_model_parallel_all_reduce
from vllm.lora import layers
from vllm.lora.model_manager import LoRAModelManager
from vllm.lora.punica_wrapper.punica_base import PunicaWrapperBase
from vllm.lora.punica_wrapper.punica_gpu import PunicaWrapperGPU
from vllm.model_executor.layers.fused_moe.experts.triton_moe import TritonExperts
from vllm.model_executor.layers.fused_moe.utils import moe_kernel_quantize_input
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.platforms import current_platform
from vllm.utils.import_utils import resolve_obj_by_qualname
from vllm.utils.torch_utils import async_tensor_h2d

from .versions import Refused

__all__ = [
    "CLASSIFIERS",
    "PADS_ADAPTERS",
    "SHARDED",
    "PunicaWrapperBase",
    "TritonExperts",
    "backend_of_mxfp4_as_loaded",
    "check",
    "is_hooked",
    "keyed_as",
    "layers",
    "logits_width",
    "lora_config",
    "own_wrapper",
    "quantized",
    "replace_experts",
    "tensor_model_parallel_all_gather",
    "tensor_model_parallel_all_reduce",
    "to_device",
    "when_experts_are_set",
    "when_layers_are_made",
]

CLASSIFIERS = getattr(layers, "BaseClassificationHeadWithLoRA", layers.ClassificationHeadWithLoRA)  # since 0.33
PADS_ADAPTERS = not hasattr(layers.FusedMoEWithLoRA, "_tp_shard_size")  # to what a GPU has of weights in MXFP4; until 0.33
SHARDED = tuple(kind for name, kind in vars(layers).items() if name.endswith("WithShardedLoRA"))


def check(wrapper: type) -> None:
    """See that the methods of a wrapper are called as they are here: a release may be patched.

    Raises:
        Refused: vLLM's own has a method of other parameters.
    """
    for name, ours in vars(wrapper).items():
        own = getattr(PunicaWrapperGPU, name, None)
        if name.startswith("_") or own is None or not callable(ours):
            continue
        wanted, found = (list(inspect.signature(method).parameters) for method in (ours, own))
        if wanted != found:
            raise Refused(f"PunicaWrapperGPU.{name} takes {', '.join(found)}; known is {', '.join(wanted)}")


def own_wrapper() -> type[PunicaWrapperBase]:
    """The class of the wrapper that vLLM would have."""
    own: type[PunicaWrapperBase] = resolve_obj_by_qualname(type(current_platform)._kernelgen_own_wrapper())
    return own


def to_device(host: Any, device: Any) -> Any:
    """A copy of an array of numpy on a device, which the host does not wait for."""
    return async_tensor_h2d(host, device=device)


def when_layers_are_made(action: Callable[[LoRAModelManager], None]) -> None:
    """Have ``action`` called with each manager, once its ``modules``, by name, are all LoRA layers of the model."""
    own = LoRAModelManager._create_lora_modules

    def _create_lora_modules(self: LoRAModelManager) -> None:
        own(self)
        action(self)

    LoRAModelManager._create_lora_modules = _create_lora_modules


def keyed_as(factor: str) -> None:
    """Keep graphs that vLLM stores from one that runs without the plugin, or with another release of it."""
    own = LoRAConfig.compute_hash

    def compute_hash(self: LoRAConfig) -> str:
        return f"{own(self)}-{factor}"

    LoRAConfig.compute_hash = compute_hash


def logits_width(layer: Any, model: Any) -> int:
    """Columns of the logits of a ``LogitsProcessorWithLoRA``, with those that pad the vocabulary."""
    if layer.sharded_to_full_mapping is not None:
        return len(layer.sharded_to_full_mapping)
    return int(next(head.weight.shape[0] for head in model.modules() if isinstance(head, ParallelLMHead)))


def is_hooked(experts: TritonExperts, num_tokens: int) -> bool:
    """Whether the rows of the second product are another's to add up: since 0.33."""
    uses = getattr(experts, "_uses_post_gemm2_hook", None)
    return uses is not None and uses(num_tokens)


def lora_config() -> LoRAConfig:
    """Of the model that is made."""
    return get_current_vllm_config().lora_config


def backend_of_mxfp4_as_loaded() -> Any:
    """That which leaves weights in MXFP4 as they are loaded."""
    from vllm.model_executor.layers.fused_moe.oracle.mxfp4 import Mxfp4MoeBackend

    return Mxfp4MoeBackend.EMULATION


def replace_experts(apply: Callable[..., None]) -> None:
    """Have ``apply`` be that of ``TritonExperts``, which keeps its own as ``_kernelgen_own_apply``."""
    TritonExperts._kernelgen_own_apply = TritonExperts.apply
    TritonExperts.apply = apply


def quantized(experts: TritonExperts, x: Any) -> tuple[Any, Any]:
    """Tokens in FP8, and their scales, where vLLM leaves it to the experts."""
    scheme = (experts.a1_scale, experts.quant_dtype, experts.per_act_token_quant, experts.block_shape)
    q, scale = moe_kernel_quantize_input(x, *scheme)
    return q, scale


def when_experts_are_set(action: Callable[[Any, int], None]) -> None:
    """Have ``action`` called with each layer of experts, and the slot, that an adapter was put in."""
    for kind in (layers.FusedMoEWithLoRA, layers.FusedMoE3DWithLoRA):
        kind.set_lora = _behind(kind.set_lora, action)


def _behind(own: Callable[..., None], action: Callable[[Any, int], None]) -> Callable[..., None]:
    def set_lora(self: Any, index: int, lora_a: Any, lora_b: Any) -> None:
        own(self, index, lora_a, lora_b)
        action(self, index)

    return set_lora
