"""For vLLM's own tests, as a plugin of pytest: they ask for wrappers by class, and for the class of their platform."""

from __future__ import annotations

import os

os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_configure() -> None:
    from vllm.lora.punica_wrapper import punica_cpu
    from vllm.plugins import load_general_plugins

    load_general_plugins()
    from kernelgen_vllm.punica import PunicaWrapper

    punica_cpu.PunicaWrapperCPU = PunicaWrapper
