"""What the benchmark asks of a workload and of whatever it measures."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
from typing import Any, Callable, ContextManager, Generic, Mapping, Protocol, Sequence, TypeVar

import torch

from kernelgen.measure.suite import Work
from kernelgen.measure.truth import Truth


class Unsupported(Exception):
    """An implementation does not do this cell's work; the message says why. No row comes of it."""


Batch = TypeVar("Batch")


@dataclasses.dataclass(frozen=True)
class Case(Generic[Batch]):
    """A cell with its operands. ``batches`` differ in routing, rows and weights; calls take turns on them.

    ``work`` and ``counts`` (further columns of its rows) are worked out when asked for, as they read the operands.
    """

    cell: Any
    batches: tuple[Batch, ...]
    work: Callable[[], Work]
    counts: Callable[[], Mapping[str, Any]] = dict

    @property
    def device(self) -> torch.device:
        """Where its operands are."""
        return next(value for value in vars(self.batches[0]).values() if isinstance(value, torch.Tensor)).device


@dataclasses.dataclass(frozen=True)
class Prepared:
    """One implementation, ready to be called on each batch of a case."""

    calls: tuple[Callable[[], None], ...]
    variant: str = ""  # which of its kernels serves the cell
    config: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    note: str = ""  # where its work differs from the cell's
    applies_weights: bool = True
    keeps_rows: bool = True  # rows that are not written stay as they are
    launches: bool = True  # False: there is nothing to launch for this cell
    truths: Callable[[], Sequence[Truth]] | None = None  # where it has outputs of its own, in place of those of the workload
    check: Callable[[], None] | None = None  # run after the first call, for what no output shows
    within: Callable[[], ContextManager[Any]] = contextlib.nullcontext  # what the calls are made in


class Workload(Protocol):
    """What the cells of a suite ask for. It is made of a device, a number of batches (None: so many that one replay passes the
    cache), and what to call before weights are freed.
    """

    def case(self, cell: Any) -> Case[Any]:
        """The operands of ``cell``, the same each time."""

    def truths(self, case: Case[Any], prepared: Prepared) -> Sequence[Truth]:
        """What the outputs of the first batch have to hold after a call."""


class Implementation(Protocol):
    """Kernels that can be timed; one object lives for the whole run."""

    name: str

    def versions(self) -> dict[str, str]:
        """Name and version of what is measured."""

    def prepare(self, case: Case[Any]) -> Prepared:
        """Everything outside the timed call.

        Raises:
            Unsupported: it does not do this work.
        """

    def release(self) -> None:
        """Drop all that hangs on weights that are about to be freed."""


def check(workload: Workload, case: Case[Any], prepared: Prepared) -> float | None:
    """Make the first call, and compare: the largest relative error of a row; None where there is no ``out``.

    Raises:
        WrongResult: it computed something else.
    """
    truths = workload.truths(case, prepared) if prepared.truths is None else prepared.truths()
    with prepared.within():
        prepared.calls[0]()
        if prepared.check is not None:
            prepared.check()
    return max((truth.error(prepared.keeps_rows) for truth in truths), default=None)


class Weights:
    """What is shared by cells next to each other: weights of one owner at a time, in as many copies as make up a size."""

    def __init__(self, device: torch.device, size: float, on_release: Callable[[], None]) -> None:
        self._device = device
        self._size = size
        self._on_release = on_release
        self._owner: Any = None
        self._copies: dict[Any, tuple[Any, ...]] = {}

    def copies(self, owner: Any, name: Any, one: float, draw: Callable[[], Any]) -> tuple[Any, ...]:
        """Copies of ``one`` bytes each, at least one; ``draw`` makes one."""
        if owner != self._owner:
            self.release()
            self._owner = owner
        if name not in self._copies:
            self._copies[name] = tuple(draw() for _ in range(max(1, -int(-self._size // one))))
        return self._copies[name]

    def release(self) -> None:
        """Free all, and whatever implementations derived from it."""
        self._copies, self._owner = {}, None
        self._on_release()
        gc.collect()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
