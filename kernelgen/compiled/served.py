"""Which variant a call gets, with which tiles: the generated package is asked, whose front doors launch nothing then."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, Mapping, NamedTuple

import torch

from kernelgen.compiled.stand_in import compiling_for, import_package
from kernelgen.compiled.which import Answer
from kernelgen.core.diagnostics import failure
from kernelgen.core.model import Variant
from kernelgen.core.table import inline
from kernelgen.core.targets import PRIMARY, TARGETS
from kernelgen.emit.rooms import laboratory


class Launch(NamedTuple):
    """One kernel that the call launches."""

    kernel: str
    num_warps: int
    num_stages: int


@dataclasses.dataclass(frozen=True)
class Served:
    """What a call gets.

    Attributes:
        variant: what runs.
        tiles: what was chosen for it; empty: it has none to choose.
        problem: what the tiles were looked up by.
        measured: whether they were measured for it; else they are the rule's.
        launches: its kernels, in their order.
    """

    variant: Variant
    tiles: Mapping[str, int]
    problem: Mapping[str, Any]
    measured: bool
    launches: tuple[Launch, ...]

    def as_json(self) -> dict[str, Any]:
        launches = [launch._asdict() for launch in self.launches]
        return {
            "variant": self.variant.name,
            "tiles": dict(self.tiles),
            "problem": {name: str(value) if isinstance(value, torch.dtype) else value for name, value in self.problem.items()},
            "measured": self.measured,
            "launches": launches,
        }

    def rows(self) -> list[tuple[str, str]]:
        """For a reader."""
        rows = [("variant", str(self.variant.name))]
        if self.tiles:
            source = "measured for" if self.measured else "by the rule, as nothing was measured for"
            rows.append(("tiles", inline(self.tiles)))
            rows.append(("why", f"{source} {inline(self.problem)}"))
        return rows + [("kernel", f"{k.kernel}: {k.num_warps} warps, {k.num_stages} stages") for k in self.launches]


def ask(out: Path, answer: Answer) -> tuple[Served, ...]:
    """What a call of the case of ``answer`` gets of its family, of the package in ``out`` on a card like an H200: a variant, or
    those of a layer that calls the family several times, in their order.

    Raises:
        Failure: there is no package (exit code 2), or no call like this (1).
    """
    generated = import_package(out, interpreted=True)
    runtime, inside = generated._runtime, f"{generated.__name__}.{answer.family.name}"
    with compiling_for(TARGETS[PRIMARY]), runtime.choosing({}) as choices, runtime.compile_only() as requests:
        try:
            laboratory(answer.family.name, "call").call(generated, answer)
        except (ValueError, RuntimeError) as error:  # of torch: sizes that no tensor has
            raise failure("KG041", answer.family.spec, f"a call like this is refused: {error}", exit_code=1) from error
    launches: dict[str, list[Any]] = {}
    for request in requests:
        folder, _, module = request.launcher.kernel.fn.__module__.rpartition(".")
        if folder == inside:
            launches.setdefault(module, []).append(request)
    chosen: dict[str, list[Any]] = {}
    for choice in choices:
        if type(choice.key).__module__.startswith(inside + "."):
            chosen.setdefault(choice.schedule, []).append(choice)
    found = []
    for module, made in launches.items():
        (variant,) = (variant for variant in answer.family.variants if variant.module == module)
        kernels = tuple(dict.fromkeys(map(_launch, made)))
        if not chosen.get(variant.kernel):
            found.append(Served(variant, {}, {}, False, kernels))
            continue
        choice = chosen[variant.kernel].pop(0)
        found.append(Served(variant, choice.config._asdict(), choice.key._asdict(), choice.measured, kernels))
    return tuple(found)


def _launch(request: Any) -> Launch:
    return Launch(request.launcher.kernel.fn.__name__, request.options.num_warps, request.options.num_stages)
