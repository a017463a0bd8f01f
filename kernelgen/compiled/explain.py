"""What limits a variant on a target, worked out without a GPU: the resources of its kernels, and the roofline of its probes."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, Iterator, Sequence

from kernelgen.compiled.compile import compile_cases
from kernelgen.compiled.requests import Case, cases_of
from kernelgen.compiled.resources import Usage
from kernelgen.core.diagnostics import failure
from kernelgen.core.model import Location
from kernelgen.core.processes import Fault
from kernelgen.core.targets import TARGETS, Residency, Target
from kernelgen.emit import build
from kernelgen.families.probe import Probe


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One kernel on one probe, and how many of its programs a multiprocessor holds."""

    name: str
    num_warps: int
    usage: Usage
    residency: Residency


@dataclasses.dataclass(frozen=True)
class Roofline:
    """One probe: its kernels, what it moves and computes, and the time that no schedule can beat on a card of the target."""

    probe: Probe
    target: Target
    kernels: Sequence[Kernel]

    @property
    def intensity(self) -> float:
        """Flops a byte."""
        return self.probe.flops / self.probe.bytes

    @property
    def bound_us(self) -> float:
        """Microseconds: the longer of moving the bytes and of computing."""
        moving = self.probe.bytes / self.target.bandwidth
        return 1e6 * max(moving, self.probe.flops / self.target.flops)

    @property
    def bound_by(self) -> str:
        return "memory" if self.intensity < self.target.balance else "matrix units"


@dataclasses.dataclass(frozen=True)
class Explanation:
    """A variant on a target; ``spec`` is the line that brings in its schedule, ``tunables`` what that can change."""

    variant: str
    spec: Location
    tunables: Sequence[str]
    rooflines: Sequence[Roofline]

    def as_json(self) -> dict[str, Any]:
        """The fields of a report."""
        target = self.rooflines[0].target
        return {
            "variant": self.variant,
            "spec": str(self.spec),
            "tunables": list(self.tunables),
            "target": target.name,
            "card": dataclasses.asdict(target),
            "probes": [_roofline_json(roofline) for roofline in self.rooflines],
        }

    def lines(self) -> Iterator[str]:
        """The same for a reader."""
        target = self.rooflines[0].target
        yield f"{self.variant} on {target.name} ({target.card})"
        yield f"spec: {self.spec}; tunables: {', '.join(self.tunables) or 'none'}"
        for roofline in self.rooflines:
            probe = roofline.probe
            yield ""
            yield f"{probe.name}: " + ", ".join(f"{name} {n}" for name, n in probe.sizes.items())
            yield (
                f"  {probe.bytes / 1e6:.2f} MB, {probe.flops / 1e9:.2f} Gflop,"
                f" {roofline.intensity:.1f} flop/byte (the card: {target.balance:.0f}):"
                f" at least {roofline.bound_us:.2f} us, bound by {roofline.bound_by}"
            )
            for kernel in roofline.kernels:
                used, residency = kernel.usage, kernel.residency
                yield (
                    f"  {kernel.name}: {kernel.num_warps} warps, {used.registers} registers,"
                    f" {used.spill_bytes} bytes spilled, {used.shared_bytes} bytes of shared memory;"
                    f" {residency.programs} programs a multiprocessor ({residency.occupancy:.0%}"
                    f" of its warps), limited by {residency.limited_by}"
                )


def _roofline_json(roofline: Roofline) -> dict[str, Any]:
    return {
        "probe": roofline.probe.name,
        "sizes": dict(roofline.probe.sizes),
        "bytes": roofline.probe.bytes,
        "flops": roofline.probe.flops,
        "intensity": roofline.intensity,
        "bound_us": roofline.bound_us,
        "bound_by": roofline.bound_by,
        "kernels": [dataclasses.asdict(kernel) for kernel in roofline.kernels],
    }


def explain(specs: Path, out: Path, variant: str, target: str) -> Explanation:
    """Explain ``variant`` of the package in ``out`` on ``target``.

    Raises:
        Failure: no such variant, or not for this target, or it does not compile; exit code 2.
    """
    family, found = build.find(build.package(specs), variant)
    kernel = family.kernel(found.kernel)
    cases = cases_of(specs, out, variant, target)
    outcomes, _ = compile_cases(cases)
    by_probe: dict[str, list[tuple[Case, Usage]]] = {}
    for case in cases:
        outcome = outcomes[case.digest]
        if isinstance(outcome, Fault):
            raise failure("KG050", family.spec, f"{case} for {target}: {outcome.reason}")
        by_probe.setdefault(case.probe.name, []).append((case, outcome))
    rooflines = [
        Roofline(pairs[0][0].probe, TARGETS[target], [_kernel(*pair) for pair in pairs])
        for pairs in by_probe.values()
    ]
    return Explanation(variant, kernel.location, [t.name for t in kernel.tunables], rooflines)


def _kernel(case: Case, used: Usage) -> Kernel:
    num_warps = case.request.options.num_warps
    residency = case.target.resident_programs(num_warps, used.registers, used.shared_bytes)
    return Kernel(case.row.kernel, num_warps, used, residency)
