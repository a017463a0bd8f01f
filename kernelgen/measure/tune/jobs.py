"""What is sent to the processes of a search, and what they reply. Imports no torch."""

from __future__ import annotations

from typing import Any, NamedTuple


class CompileJob(NamedTuple):
    """Kernels of one candidate to compile for ``target``: ``wanted`` are their places among its launches."""

    target: str
    cell: Any  # of the suite
    problem: dict[str, Any]  # of the cell, that the tiles are for
    schedule: str
    config: dict[str, int]
    wanted: tuple[int, ...]


class Verdict(NamedTuple):
    """Why a kernel is dropped; None if it is fit to be timed."""

    digest: str
    fault: str | None


class GaugeJob(NamedTuple):
    """Candidates for a problem, as (schedule, tiles), in all its cells; with ``final`` they are timed in turns, longer."""

    cells: tuple[Any, ...]
    problem: dict[str, Any]
    candidates: tuple[tuple[str, dict[str, int]], ...]
    final: bool


class Reading(NamedTuple):
    """Microseconds a call of one candidate, the median of its replays; or why there are none."""

    place: int
    us: float | None
    failed: str | None = None
    fatal: bool = False  # nothing runs on the GPU of this process any more


class Device(NamedTuple):
    """A GPU as a tuned file describes it; ``label`` names the folder of its files."""

    label: str
    name: str
    target: str
    multiprocessors: int
    shared_memory: int


class Hello(NamedTuple):
    """What a gauge measures with."""

    device: Device
    versions: dict[str, str]


class Sizes(NamedTuple):
    """What the package makes of a problem."""

    shared_memory: int  # bytes that one program may take
    rules: dict[str, dict[str, int]]  # schedule -> the tiles that it takes where nothing was measured, of those that serve
    rule: str  # the schedule that is taken then
    facts: dict[str, int]  # what the hints of the family ask
