"""What the benchmark asks of whatever it measures."""

from __future__ import annotations

import dataclasses
from typing import Any, Callable, Protocol

from kernelgen.measure.workloads import Cell


class Unsupported(Exception):
    """An implementation does not do this cell's work; the message says why. No row comes of it."""


def refuse_fp8(cell: Cell) -> None:
    """What peers do about FP8 operands: none of them applies the scales of LoRA weights right.

    Raises:
        Unsupported: the cell has such operands.
    """
    if cell.is_fp8:
        raise Unsupported("16-bit operands only")


@dataclasses.dataclass(frozen=True)
class Prepared:
    """One implementation, ready to be called on each batch of a case."""

    calls: tuple[Callable[[], None], ...]
    variant: str = ""  # which of its kernels serves the cell
    config: dict[str, Any] = dataclasses.field(default_factory=dict)
    note: str = ""  # where its work differs from the cell's
    applies_weights: bool = True
    keeps_rows: bool = True  # rows without an adapter stay as they are
    launches: bool = True  # False: there is nothing to launch for this cell
    check: Callable[[], None] | None = (
        None  # run after the first call, where no ``out`` shows the result
    )


class Workload(Protocol):
    """What the cells of a benchmark ask for: operands, and what is right."""

    def case(self, cell: Any) -> Any:
        """The operands of ``cell``."""

    def describe(self, case: Any, ceilings: dict[str, float]) -> dict[str, Any]:
        """Columns of a row that do not depend on who is measured; ``floor_us`` among them where there are ceilings."""

    def check(self, case: Any, prepared: Prepared) -> float | None:
        """Make the first call, and compare; the relative error, None for what has no ``out``.

        Raises:
            WrongResult: it computed something else.
        """


class Implementation(Protocol):
    """Kernels that can be timed; one object lives for the whole run."""

    name: str

    def versions(self) -> dict[str, str]:
        """Name and version of what is measured."""

    def prepare(self, case: Any) -> Prepared:
        """Everything outside the timed call, for a case of the workload.

        Raises:
            Unsupported: it does not do this work.
        """

    def release(self) -> None:
        """Drop all that hangs on weights that are about to be freed."""
