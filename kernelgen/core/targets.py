"""GPUs that kernels are compiled for: what a multiprocessor of each holds, and what a card of each can do at most.

The names are those of ``targets:`` in a spec. Figures of cards are from data sheets, for 16-bit matrix products without sparsity.
"""

from __future__ import annotations

import dataclasses
from typing import Literal, Mapping


@dataclasses.dataclass(frozen=True)
class Target:
    """One architecture. A warp is what runs in step: 32 lanes on NVIDIA, a wavefront of 64 on AMD."""

    name: str
    backend: Literal["cuda", "hip"]
    arch: int | str  # as Triton calls it
    warp_size: int
    warps: int  # that a multiprocessor can hold
    programs: int  # likewise
    program_shared: int  # bytes of shared memory that one program may take
    shared: int  # bytes that a multiprocessor has for its programs
    shared_reserved: int  # bytes that the system takes for each program
    lane_registers: int  # that one lane may have
    registers: int  # 32-bit registers of a quarter of a multiprocessor
    register_unit: int  # registers are given to a warp in multiples of this
    card: str
    sms: int
    bandwidth: float  # bytes a second
    flops: float  # a second

    def resident_programs(self, num_warps: int, registers: int, shared_bytes: int) -> Residency:
        """How many programs of ``num_warps`` warps a multiprocessor holds at once, and what sets the limit."""
        warp_registers = _round_up(max(registers, 1) * self.warp_size, self.register_unit)
        by_registers = 4 * (self.registers // warp_registers) // num_warps
        limits = {
            "warps": self.warps // num_warps,
            "programs": self.programs,
            "registers": by_registers,
            "shared memory": self.shared // max(shared_bytes + self.shared_reserved, 1),
        }
        limit = min(limits, key=lambda name: limits[name])
        return Residency(limits[limit], limits[limit] * num_warps / self.warps, limit)

    @property
    def balance(self) -> float:
        """Flops a byte above which matrix units, not memory, set the time."""
        return self.flops / self.bandwidth


@dataclasses.dataclass(frozen=True)
class Residency:
    """Programs on a multiprocessor at once, the part of its warps that they are, and what limits them."""

    programs: int
    occupancy: float
    limited_by: str


def _round_up(value: int, unit: int) -> int:
    return -(-value // unit) * unit


def _nvidia(
    arch: int,
    *,
    warps: int,
    programs: int,
    shared_kib: int,
    card: str,
    sms: int,
    bandwidth: float,
    flops: float,
) -> Target:
    return Target(
        name=f"sm_{arch}",
        backend="cuda",
        arch=arch,
        warp_size=32,
        warps=warps,
        programs=programs,
        program_shared=(shared_kib - 1) * 1024,
        shared=shared_kib * 1024,
        shared_reserved=1024,
        lane_registers=255,
        registers=16384,
        register_unit=256,
        card=card,
        sms=sms,
        bandwidth=bandwidth,
        flops=flops,
    )


def _amd(
    arch: str, *, shared_kib: int, card: str, sms: int, bandwidth: float, flops: float
) -> Target:
    return Target(
        name=arch,
        backend="hip",
        arch=arch,
        warp_size=64,
        warps=32,
        programs=32,
        program_shared=shared_kib * 1024,
        shared=shared_kib * 1024,
        shared_reserved=0,
        lane_registers=512,
        registers=512 * 64,
        register_unit=8 * 64,
        card=card,
        sms=sms,
        bandwidth=bandwidth,
        flops=flops,
    )


_ALL = (
    _nvidia(
        80,
        warps=64,
        programs=32,
        shared_kib=164,
        card="A100",
        sms=108,
        bandwidth=2.04e12,
        flops=312e12,
    ),
    _nvidia(
        89,
        warps=48,
        programs=24,
        shared_kib=100,
        card="L40S",
        sms=142,
        bandwidth=864e9,
        flops=362e12,
    ),
    _nvidia(
        90,
        warps=64,
        programs=32,
        shared_kib=228,
        card="H200",
        sms=132,
        bandwidth=4.8e12,
        flops=989e12,
    ),
    _nvidia(
        100,
        warps=64,
        programs=32,
        shared_kib=228,
        card="B200",
        sms=148,
        bandwidth=8e12,
        flops=2.25e15,
    ),
    _nvidia(
        120,
        warps=48,
        programs=24,
        shared_kib=100,
        card="RTX PRO 6000",
        sms=188,
        bandwidth=1.79e12,
        flops=504e12,
    ),
    _amd("gfx942", shared_kib=64, card="MI300X", sms=304, bandwidth=5.3e12, flops=1.307e15),
    _amd("gfx950", shared_kib=160, card="MI355X", sms=256, bandwidth=8e12, flops=2.5e15),
)
TARGETS: Mapping[str, Target] = {target.name: target for target in _ALL}
PRIMARY = "sm_90"  # where every kernel is always checked
