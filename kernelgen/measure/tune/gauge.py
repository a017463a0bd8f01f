"""Timing of candidates on one GPU: each is checked first, then replayed from a CUDA graph over weights out of the L2 cache."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Callable, Iterator

import torch

import kernelgen
from kernelgen.measure import environment
from kernelgen.measure.runner import context_is_lost
from kernelgen.measure.timing import capture, replay
from kernelgen.measure.tune.calls import Calls, Preparation
from kernelgen.measure.tune.jobs import Device, GaugeJob, Hello, Reading
from kernelgen.measure.tune.space import Named

_ROUGH = (0.01, 5)  # seconds of replays, and how many there are at least
_FINAL = (0.1, 21)


class Gauge:
    """Times candidates of ``family`` in the calls of a suite on the first GPU."""

    def __init__(self, suite: str, family: str, package: Path) -> None:
        self._calls = Calls(suite, family, package)

    def hello(self) -> Hello:
        """The GPU and what runs on it."""
        traits = self._calls.runtime.traits(torch.device("cuda", 0))
        sizes = traits.num_sms, traits.shared_memory
        device = Device(traits.label, torch.cuda.get_device_name(0), traits.target, *sizes)
        versions = {"kernelgen": kernelgen.__version__, **environment.versions([])}
        kept = ("kernelgen", "torch", "triton", "cuda", "driver")
        return Hello(device, {name: versions[name] for name in kept if name in versions})

    def measure(self, job: GaugeJob) -> Iterator[Reading]:
        """A reading of each candidate."""
        try:
            prepared = self._calls.prepare(job.cells, job.problem)
        except Exception as error:  # out of memory, say
            yield from (_failure(place, error) for place in range(len(job.candidates)))
            return
        if job.final:
            yield from _in_turns(prepared, job)
            return
        for place, (schedule, tiles) in enumerate(job.candidates):
            try:
                spread = replay({place: _graph(prepared, schedule, tiles)}, *_ROUGH)[place]
            except Exception as error:
                yield (failed := _failure(place, error))
                if failed.fatal:
                    return
            else:
                yield Reading(place, round(spread.median, 3))


def _graph(prepared: Preparation, schedule: str, tiles: Named) -> tuple[Any, int]:
    with prepared.choosing(schedule, tiles):
        made = prepared.calls(schedule)
        return capture(made), len(made)


def _in_turns(prepared: Preparation, job: GaugeJob) -> Iterator[Reading]:
    graphs = {}
    for place, (schedule, tiles) in enumerate(job.candidates):
        try:
            graphs[place] = _graph(prepared, schedule, tiles)
        except Exception as error:
            yield (failed := _failure(place, error))
            if failed.fatal:
                return
    replay(graphs, *_FINAL)  # a card that has been at work for a while lowers its clock, more so for some than for others
    for place, spread in replay(graphs, *_FINAL).items():
        yield Reading(place, round(spread.median, 3))


def _failure(place: int, error: Exception) -> Reading:
    first = (str(error).strip().splitlines() or [""])[0]
    text = f"{type(error).__name__}: {first}"[:200]
    return Reading(place, None, text, context_is_lost())


def gauge(suite: str, family: str, package: Path) -> tuple[Hello, Callable[[GaugeJob], Iterator[Reading]]]:
    """What a process of the crew that measures runs: GaugeJob -> Reading for each candidate."""
    instrument = Gauge(suite, family, package)
    return instrument.hello(), instrument.measure
