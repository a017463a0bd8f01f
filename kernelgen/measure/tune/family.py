"""What the search asks of a family of kernels; all else is the same for every family. Imports no torch."""

from __future__ import annotations

from typing import Any, Hashable, Mapping, Protocol

from kernelgen.measure.tune.jobs import Sizes
from kernelgen.measure.tune.space import Candidate, Named, Space

# Sizes, then tags of the axes that are not at their first one.
Problem = dict[str, "int | bool | str"]


class Subject(Protocol):
    """A cell under search, with what the package and the device make of it."""

    def accepts(self, candidate: Candidate) -> bool:
        """Whether the tiles can be right, can win and are not the same as others: known without compiling."""

    def starts(self, rules: Mapping[str, Named]) -> list[Candidate]:
        """The package's own choice for each schedule, and what is worth a look around it; best guesses first."""


class Family(Protocol):
    """One family."""

    @property
    def name(self) -> str:
        """Of its spec, its tuned file and its folder in the package."""

    @property
    def order(self) -> tuple[str, ...]:
        """The sizes of a problem, as entries of the tuned file are sorted by them."""

    @property
    def kinds(self) -> tuple[tuple[str, ...], ...]:
        """Schedules by the kind of route that they take: the best of each kind is kept."""

    @property
    def alike(self) -> tuple[str, ...]:
        """Attributes of cells; what is best for one is worth a try for another that has the same."""

    def problem(self, cell: Any) -> Problem:
        """What a tuned choice is looked up by."""

    def subject(self, cell: Any, space: Space, sizes: Sizes) -> Subject:
        """The cell under search in ``space``."""

    def owner(self, cell: Any) -> Hashable:
        """Cells of one owner share weights."""
