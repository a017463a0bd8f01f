"""For vLLM's own tests, as a plugin of pytest: what they want of a CPU, and of wrappers, beside numbers.

They make layers without what loading a model does with their weights, which on a CPU brings the product, and they ask for the
class of the wrapper by name. On a GPU, those of its kernels call what is in ``own_ops``.
"""

from __future__ import annotations

import importlib.util
import os
import sys
import types
from typing import Any

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_configure() -> None:
    if importlib.util.find_spec("ray") is None:  # which their fixtures shut down
        sys.modules["ray"] = types.SimpleNamespace(shutdown=lambda: None)  # type: ignore[assignment]
    from vllm.model_executor.layers.linear import LinearBase
    from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding
    from vllm.plugins import load_general_plugins

    load_general_plugins()
    for kind in (LinearBase, VocabParallelEmbedding):
        kind.cpu_linear = staticmethod(torch.nn.functional.linear)


def pytest_collection_modifyitems(items: list[Any]) -> None:
    import own_ops
    from vllm.lora.punica_wrapper import PunicaWrapperBase

    for module in {item.module for item in items}:
        if hasattr(module, "check_punica_wrapper"):
            module.check_punica_wrapper = lambda wrapper: isinstance(wrapper, PunicaWrapperBase)
        if torch.cuda.is_available():
            own_ops.replace(module)
