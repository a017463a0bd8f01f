"""The entry point: called by vLLM in each of its processes, possibly more than once."""

from __future__ import annotations

import logging

from . import early
from .shared import gate
from .versions import MXFP4, Refused, seams_for

__all__ = ["register"]

WRAPPER = f"{__package__}.punica.kernelgen_wrapper"
# Below vLLM's own, whose level and format it has.
log = logging.getLogger(f"vllm.{__package__}")


def register() -> None:
    """Have vLLM ask ``punica.kernelgen_wrapper`` for the object that its LoRA layers call; what it cannot serve gets vLLM's own.

    ``KERNELGEN_VLLM=0`` in the environment leaves vLLM as it is, as does a release that is not known, or a device that kernels
    are not for, with one line in the log. All else that is replaced is so where the first wrapper is asked for: this runs early.
    But what experts in MXFP4 run on is chosen before.
    """
    if not gate.is_on("KERNELGEN_VLLM"):
        # A warning, as is each line here: vLLM sets its log up later, and until then nothing below is seen.
        log.warning("kernelgen: vLLM is left as it is, by KERNELGEN_VLLM=0")
        return
    import vllm
    from vllm.platforms import current_platform

    try:
        seams_for(vllm.__version__)
        if not current_platform.is_cuda_alike() and not (current_platform.is_cpu() and gate.interpreted()):
            raise Refused(f"its platform is {current_platform.device_name}, kernels are for GPUs of NVIDIA and AMD")
    except Refused as reason:
        log.warning("kernelgen: vLLM is left as it is: %s", reason)
        return
    platform = type(current_platform)
    if not hasattr(platform, "_kernelgen_own_wrapper"):
        platform._kernelgen_own_wrapper = platform.get_punica_wrapper
        platform.get_punica_wrapper = classmethod(lambda cls: WRAPPER)
        if gate.is_on(MXFP4, "0"):
            early.when_imported("vllm.model_executor.layers.quantization.mxfp4", early.choose_mxfp4_experts)

