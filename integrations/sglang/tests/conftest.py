"""Serving on a CPU: kernels are interpreted, the scheduler is in this process. ``tools/engines sglang`` brings SGLang."""

from __future__ import annotations

import os

os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("SGLANG_USE_CPU_ENGINE", "1")
os.environ.setdefault("SGLANG_TEST_RETRACT", "1")  # requests are retracted now and then, though there is memory

import stubs

stubs.install()
stubs.unpin()
stubs.interpret_experts()
