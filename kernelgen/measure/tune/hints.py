"""How the tiles of a family are searched, which ``tune.py`` of its room says. Imports no torch.

``Hints`` are what is known of the tiles, so that less is searched. A family without does well: its search begins with the
rule's tiles and goes on step by step, and what does not compile, spills, does not fit or is wrong is dropped anyway.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, Mapping

from kernelgen.emit.rooms import laboratory
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


@dataclasses.dataclass(frozen=True)
class Tuning:
    """What ``TUNING`` of a room says.

    Attributes:
        suite: in whose calls the tiles are timed.
        axes: values of its axes that the cells of a search have unless told.
        form: of the generated package, that uses the family; empty: what a call takes by itself.
        hints: what is known of the tiles.
    """

    suite: str
    axes: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    form: str = ""
    hints: type[Hints] = Hints


def of(family: str) -> Tuning:
    """How the tiles of ``family`` are searched.

    Raises:
        Failure: its room does not say; exit code 2.
    """
    found: Tuning = laboratory(family, "tune", kind=Tuning).TUNING
    return found
