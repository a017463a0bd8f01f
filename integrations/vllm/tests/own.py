"""For vLLM's own tests, as a plugin of pytest: what they want of a CPU, and of wrappers, beside numbers.

They make layers without what loading a model does with their weights, which on a CPU brings the product, and they ask for the
class of the wrapper by name.
"""

from __future__ import annotations

import importlib.util
import os
import sys
import types

os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_configure() -> None:
    if importlib.util.find_spec("ray") is None:  # which their fixtures shut down
        sys.modules["ray"] = types.SimpleNamespace(shutdown=lambda: None)  # type: ignore[assignment]
    import torch
    from vllm.lora.punica_wrapper import punica_cpu
    from vllm.model_executor.layers.linear import LinearBase
    from vllm.plugins import load_general_plugins

    load_general_plugins()
    from kernelgen_vllm.punica import PunicaWrapper

    punica_cpu.PunicaWrapperCPU = PunicaWrapper
    LinearBase.cpu_linear = staticmethod(torch.nn.functional.linear)
