"""What the numbers were measured on."""

from __future__ import annotations

import os
import platform
import subprocess
from pathlib import Path
from typing import Any, Sequence

import torch
import triton

from kernelgen.measure.workload import Implementation


def machine(device: torch.device) -> dict[str, Any]:
    """The kind of machine; nothing that names this one."""
    described: dict[str, Any] = {"cpu": _cpu(), "cpu_cores": os.cpu_count()}
    if device.type == "cuda":
        gpu = torch.cuda.get_device_properties(device)
        described |= {
            "gpu": gpu.name,
            "sms": gpu.multi_processor_count,
            "l2_bytes": gpu.L2_cache_size,
            "memory_bytes": gpu.total_memory,
        }
    return described


def versions(implementations: Sequence[Implementation]) -> dict[str, str]:
    """What ran."""
    found = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton.__version__,
    }
    if torch.version.cuda:
        found |= {"cuda": torch.version.cuda, "driver": _driver()}
    for implementation in implementations:
        found |= implementation.versions()
    return found


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def _driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        shown = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return shown.stdout.split("\n")[0].strip()
