"""What is known of the tiles of families, so that less is searched: a module each, of the family's name, for those that have one.

A family without does well: its search begins with the rule's tiles and goes on step by step, and what does not compile, spills,
does not fit or is wrong is dropped anyway. Imports no torch.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
from typing import Any, ClassVar, Mapping

from kernelgen.measure.tune.jobs import Sizes
from kernelgen.measure.tune.problem import Problem
from kernelgen.measure.tune.space import Candidate, Named, Space


@dataclasses.dataclass(frozen=True)
class Hints:
    """A problem under search, with what the package and the device make of it."""

    problem: Problem
    space: Space
    sizes: Sizes

    # Schedules by what a call must be to take them: the best of each kind is kept. Nothing: they stand in for each other.
    KINDS: ClassVar[tuple[tuple[str, ...], ...]] = ()

    @staticmethod
    def facts(package: Any, problem: Problem) -> dict[str, int]:
        """What the hints ask of the generated package."""
        del package, problem
        return {}

    def size(self, name: str) -> int:
        """One of the problem's sizes."""
        return int(self.problem[name])

    def accepts(self, candidate: Candidate) -> bool:
        """Whether the tiles can be right, can win and are not the same as others: known without compiling."""
        return candidate.schedule in self.sizes.rules and self.space.declares(candidate)

    def starts(self, rules: Mapping[str, Named]) -> list[Candidate]:
        """The package's own choice for each schedule, and what is worth a look around it; best guesses first."""
        return [self.space.near(schedule, tiles) for schedule, tiles in rules.items()]


def of(family: str) -> type[Hints]:
    """The hints of ``family``."""
    name = f"{__name__}.{family}"
    if importlib.util.find_spec(name) is None:
        return Hints
    known: type[Hints] = importlib.import_module(name).FAMILY
    return known
