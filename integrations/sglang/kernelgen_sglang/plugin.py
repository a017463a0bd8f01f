"""The entry point: called by SGLang in each of its processes."""

from __future__ import annotations

import logging

from .shared import gate
from .versions import Refused, seams_for

__all__ = ["register"]

log = logging.getLogger(__package__)
_LORA = "sglang.srt.lora"


def register() -> None:
    """Hook what SGLang makes of its LoRA: ``start`` then decides, where the layers of a model are known.

    ``KERNELGEN_SGLANG=0`` in the environment leaves SGLang as it is, as does a release that is not known, with a line in the log.
    """
    if not gate.is_on("KERNELGEN_SGLANG"):
        log.warning("kernelgen: SGLang is left as it is, by KERNELGEN_SGLANG=0")
        return
    import sglang
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    try:
        seams_for(sglang.__version__)
    except Refused as reason:
        log.warning("kernelgen: SGLang is left as it is: %s", reason)
        return
    from . import experts, start

    for target, hook, kind in (
        ("lora_manager.LoRAManager.init_lora_modules", start.choose, HookType.BEFORE),
        ("lora_manager.LoRAManager.init_state", start.prepare, HookType.AFTER),
        ("mem_pool.LoRAMemoryPool.load_lora_weight_to_buffer", start.clear, HookType.BEFORE),
        ("layers.FusedMoEWithLoRA._forward_with_lora", experts.forward_with_lora, HookType.AROUND),
        ("lora_moe_runners.build_lora_hooks", experts.build_lora_hooks, HookType.AROUND),
        ("moe.runner.MoeLoraRunner.from_layer", experts.from_layer, HookType.AROUND),
    ):
        HookRegistry.register(f"{_LORA}.{target}", hook, kind)
