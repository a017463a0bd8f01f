"""What the kernels ask of a server and what they promise, in the words of SGLang's contract for kernels of plugins.

All that is asked is checked at start, and every reason to leave LoRA to SGLang is told at once.
"""

from __future__ import annotations

from typing import Any

import torch

from .shared.gate import interpreted
from .versions import seams

__all__ = ["FEATURES", "NUMERICS", "REQUIRES", "isa_of", "refusals"]

_sglang = seams()

REQUIRES = _sglang.Requirements(
    isas=frozenset({"sm_80", "sm_86", "sm_87", "sm_89", "sm_90", "sm_100", "sm_103", "sm_120", "sm_121", "gfx942", "gfx950"}),
    tp_sizes=frozenset(),  # any
    dtypes=frozenset({"bfloat16", "float16"}),
    decode_graph_backends=frozenset(),  # any
    server_args={"lora_backend": frozenset(_sglang.BACKENDS)},
)

# What a server may be asked for besides; all else that ``asked`` knows is refused.
FEATURES = frozenset(
    {_sglang.Feature.PIPELINE_PARALLEL, _sglang.Feature.EXPERT_PARALLEL, _sglang.Feature.SPECULATIVE_DECODING}
)

# Of a delta, as a share of the largest that its layer gives a row: a rank vector and the sum are rounded to the dtype, once each,
# here and in SGLang. A row without an adapter has the bits that it has without LoRA, unless the experts under it are replaced.
NUMERICS = _sglang.Numerics(_sglang.NumericsKind.TOLERANCE, {"bfloat16": 2.0**-6, "float16": 2.0**-9})


def isa_of(device: torch.device) -> str:
    """What a GPU is called: sm_90, gfx942."""
    if torch.version.hip is not None:
        return str(torch.cuda.get_device_properties(device).gcnArchName).partition(":")[0]
    return "sm_{}{}".format(*torch.cuda.get_device_capability(device))


def refusals(manager: Any) -> list[str]:
    """Every reason why the LoRA of a model is left to SGLang; none: it is not."""
    name, dtype = manager.lora_backend.name, str(manager.dtype).removeprefix("torch.")
    refused = (feature for feature, is_so in _sglang.asked().items() if is_so and feature not in FEATURES)
    why = [f"{getattr(feature, 'value', feature)} is asked for" for feature in refused]
    if name not in REQUIRES.server_args["lora_backend"]:
        why.append(f"the LoRA backend is {name}")
    if dtype not in REQUIRES.dtypes:
        why.append(f"adapters are of {dtype}, kernels are for {' and '.join(sorted(REQUIRES.dtypes))}")
    if manager.device.type == "cuda":
        isa = isa_of(manager.device)
        if isa not in REQUIRES.isas:
            why.append(f"there are no kernels for {isa}")
    elif not interpreted():
        why.append(f"there are no kernels for a device of the type {manager.device.type}")
    if "kv_b_proj" in manager.target_modules:
        why.append("adapters are on kv_b_proj, whose weights SGLang absorbs")
    why += sorted(set(filter(None, map(_refuses, manager.base_model.modules()))))
    return why


def _refuses(module: Any) -> str | None:
    """Why LoRA on a layer is left to SGLang, with all others, as one backend is for all."""
    if type(module).__name__.startswith("Inkling"):
        return "Inkling has LoRA layers of its own"
    if isinstance(module, _sglang.FusedMoE) and module.moe_runner_config.apply_router_weight_on_input:
        return "experts have their routing weight applied to the input"
    return None
