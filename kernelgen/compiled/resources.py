"""What a compiled kernel uses, read from what the compiler made; no GPU is needed."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import tempfile
from typing import Any, Mapping

import triton

from kernelgen.core.targets import Target

RULES = 2  # to be raised when something else is read, or a kernel is compiled in another way
_TENSOR_COLUMNS = 512  # of a Blackwell multiprocessor

# What a reader of the machine code would look for: name -> pattern, in PTX or in AMD's assembly.
_PTX = {
    "wgmma": r"\bwgmma\.mma_async",
    "tcgen05": r"\btcgen05\.mma",
    "mma": r"\bmma\.sync",
    "cp_async": r"\bcp\.async\.c[ag]",
    "load_16b": r"\bld\.global\.\S*v4\.b32|\bld\.global\.\S*v2\.b64",
    "load_32b": r"\bld\.global\.\S*v8\.b32|\bld\.global\.\S*v4\.b64",
}
_AMDGCN = {
    "mma": r"\bv_mfma_",
    "load_16b": r"\b(?:global|buffer)_load_dwordx4",
}


@dataclasses.dataclass(frozen=True)
class Usage:
    """Resources of one compiled kernel.

    Attributes:
        registers: 32-bit registers of a lane; on AMD, vector registers with the accumulators.
        spill_bytes: memory of a lane that stands in for registers.
        shared_bytes: shared memory of a program.
        instructions: how many of the kinds that matter there are in the text.
    """

    registers: int
    spill_bytes: int
    shared_bytes: int
    instructions: Mapping[str, int] = dataclasses.field(default_factory=dict)

    @property
    def locked(self) -> list[int]:
        """The figures that the lock holds."""
        return [self.registers, self.shared_bytes, self.spill_bytes]


def usage(compiled: Any, target: Target) -> Usage:
    """The usage of Triton's compiled kernel.

    Raises:
        ValueError: more of something is used than the target has, of which no spec speaks.
    """
    columns = getattr(compiled.metadata, "tmem_size", None) or 0
    if columns > _TENSOR_COLUMNS:
        raise ValueError(f"{columns} columns of tensor memory; the target has {_TENSOR_COLUMNS}")
    if target.backend == "cuda":
        text, kinds = compiled.asm["ptx"], _PTX
        dump = _read(triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", compiled.asm["cubin"])
        registers, spill = _largest(r"\bREG:(\d+)", dump), _largest(r"\bSTACK:(\d+)", dump)
    else:
        text, kinds = compiled.asm["amdgcn"], _AMDGCN
        registers = _largest(r"\.vgpr_count:\s*(\d+)", text)
        spill = _largest(r"\.private_segment_fixed_size:\s*(\d+)", text)
    found = {kind: len(re.findall(pattern, text)) for kind, pattern in kinds.items()}
    instructions = {kind: count for kind, count in found.items() if count}
    return Usage(registers, spill, compiled.metadata.shared, instructions)


def machine_code(compiled: Any) -> str:
    """The instructions of Triton's kernel, compiled for an NVIDIA GPU."""
    return _read(triton.knobs.nvidia.nvdisasm.path, "-c", compiled.asm["cubin"])


def _read(tool: str, option: str, cubin: bytes) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        done = subprocess.run([tool, option, file.name], capture_output=True, text=True, check=True)
    return done.stdout


def _largest(pattern: str, text: str) -> int:
    return max(map(int, re.findall(pattern, text)))
