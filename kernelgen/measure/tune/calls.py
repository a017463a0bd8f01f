"""The calls of candidates: recorded, to know their kernels without a GPU, or made, to time them."""

from __future__ import annotations

from typing import Any, Callable, Protocol

from kernelgen.measure.tune.jobs import Sizes
from kernelgen.measure.tune.space import Named

# The calls of a candidate, each on operands of its own; raises WrongResult where the first gives something else than the formula.
Prepare = Callable[[str, Named], "list[Callable[[], None]]"]


class Calls(Protocol):
    """What the generated package makes of candidates."""

    def forget_tuned(self) -> None:
        """From now on the package takes what its rules say."""

    def sizes(self, cell: Any, schedules: tuple[str, ...]) -> Sizes:
        """What the package makes of a cell, where launches are compiled for a target.

        Raises:
            Failure: no variant serves it.
        """

    def requests(self, cell: Any, schedule: str, config: Named) -> list[Any]:
        """The launches of a candidate, recorded where they are compiled for a target."""

    def prepare(self, cell: Any) -> Prepare:
        """The operands of a cell on the GPU, and what is right for them; those of the last cell are dropped."""
