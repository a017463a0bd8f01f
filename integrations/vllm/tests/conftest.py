"""Serving on a CPU: kernels run in Triton's interpreter, the engine in this process. ``tools/engines vllm`` brings vLLM."""

from __future__ import annotations

import os

os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("KERNELGEN_VLLM_MXFP4", "1")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
