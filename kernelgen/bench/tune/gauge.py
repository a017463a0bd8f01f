"""Timing of candidates on one GPU: each is checked first, then replayed from a CUDA graph over weights out of the L2 cache."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Callable, Iterator

import torch

from kernelgen.bench import environment, registry
from kernelgen.bench.inputs import WEIGHT_BYTES, Case, WeightPool, make_case
from kernelgen.bench.ours import NAIVE_SCHEDULES, Forced, Ours
from kernelgen.bench.runner import context_is_lost
from kernelgen.bench.timing import capture, replay
from kernelgen.bench.tune.jobs import GaugeJob, Hello, Reading
from kernelgen.bench.verify import compare, expect

_ROUGH = (0.01, 5)  # seconds of replays, and how many there are at least
_FINAL = (0.05, 11)


class Gauge:
    """Times candidates on one device; weights stay as long as the cells use them."""

    def __init__(self, package: Path, device: torch.device) -> None:
        self._device = device
        self._ours = Ours(registry.import_package(package))
        self._pool = WeightPool(self._device, WEIGHT_BYTES, lambda: None)

    def hello(self) -> Hello:
        """The GPU and what runs on it."""
        major, minor = torch.cuda.get_device_capability()
        versions = environment.versions([self._ours])
        kept = ("kernelgen", "torch", "triton", "cuda", "driver")
        return Hello(
            torch.cuda.get_device_name(),
            f"sm_{major}{minor}",
            {name: versions[name] for name in kept if name in versions},
        )

    def measure(self, job: GaugeJob) -> Iterator[Reading]:
        """A reading of each candidate."""
        try:
            case = make_case(job.cell, self._pool, self._device)
            prepare = _Preparation(self._ours, case)
        except Exception as error:  # out of memory, say
            yield from (_failure(place, error) for place in range(len(job.candidates)))
            return
        if job.final:
            yield from _in_turns(prepare, job)
            return
        for place, (schedule, config) in enumerate(job.candidates):
            try:
                graph = capture(prepare(schedule, config))
                spread = replay({place: (graph, len(case.batches))}, *_ROUGH)[place]
            except Exception as error:
                yield (failed := _failure(place, error))
                if failed.fatal:
                    return
            else:
                yield Reading(place, round(spread.median, 3))


class _Preparation:
    """Checked calls of candidates on one case; the routes and what is right are worked out once."""

    def __init__(self, ours: Ours, case: Case) -> None:
        self._ours = ours
        self._case = case
        self._routes: dict[bool, list[Any]] = {}
        operands = case.batches[0].operands[0]
        self._expected = expect(case.batches[0], operands)
        self._before = operands.out.clone()

    def __call__(self, schedule: str, config: dict[str, int]) -> list[Callable[[], None]]:
        """A call for each batch.

        Raises:
            WrongResult: the first gives something else than the formula.
        """
        forced = Forced(schedule, config)
        naive = schedule in NAIVE_SCHEDULES
        if naive not in self._routes:
            self._routes[naive] = self._ours.routes(self._case, forced)
        calls = self._ours.bound(self._case, self._routes[naive], forced)
        operands = self._case.batches[0].operands[0]
        operands.out.copy_(self._before)  # timing has added to it many times over
        calls[0]()
        compare(self._case, self._expected, operands, self._before, adds=self._case.cell.add)
        return calls


def _in_turns(prepare: _Preparation, job: GaugeJob) -> Iterator[Reading]:
    graphs = {}
    for place, (schedule, config) in enumerate(job.candidates):
        try:
            calls = prepare(schedule, config)
            graphs[place] = capture(calls), len(calls)
        except Exception as error:
            yield (failed := _failure(place, error))
            if failed.fatal:
                return
    for place, spread in replay(graphs, *_FINAL).items():
        yield Reading(place, round(spread.median, 3))


def _failure(place: int, error: Exception) -> Reading:
    first = (str(error).strip().splitlines() or [""])[0]
    text = f"{type(error).__name__}: {first}"[:200]
    return Reading(place, None, text, context_is_lost())


def gauge(package: Path) -> tuple[Hello, Callable[[GaugeJob], Iterator[Reading]]]:
    """What a process of the crew that measures runs: GaugeJob -> Reading for each candidate."""
    instrument = Gauge(package, torch.device("cuda"))
    return instrument.hello(), instrument.measure
