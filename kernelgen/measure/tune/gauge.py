"""Timing of candidates on one GPU: each is checked first, then replayed from a CUDA graph over weights out of the L2 cache."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Callable, Iterator

import torch

from kernelgen.measure import environment, registry
from kernelgen.measure.ours import Ours
from kernelgen.measure.runner import context_is_lost
from kernelgen.measure.timing import capture, replay
from kernelgen.measure.tune.calls import Prepare
from kernelgen.measure.tune.jobs import Device, GaugeJob, Hello, Reading
from kernelgen.measure.tune.known import calls_of

_ROUGH = (0.01, 5)  # seconds of replays, and how many there are at least
_FINAL = (0.05, 11)


class Gauge:
    """Times candidates of ``family`` on the first GPU."""

    def __init__(self, family: str, package: Path) -> None:
        self._calls = calls_of(family, package)
        name = registry.import_package(package)
        self._ours, self._runtime = Ours(name), importlib.import_module(f"{name}._runtime")

    def hello(self) -> Hello:
        """The GPU and what runs on it."""
        traits = self._runtime.traits(torch.device("cuda", 0))
        sizes = traits.num_sms, traits.shared_memory
        device = Device(traits.label, torch.cuda.get_device_name(0), traits.target, *sizes)
        versions = environment.versions([self._ours])
        kept = ("kernelgen", "torch", "triton", "cuda", "driver")
        return Hello(device, {name: versions[name] for name in kept if name in versions})

    def measure(self, job: GaugeJob) -> Iterator[Reading]:
        """A reading of each candidate."""
        try:
            prepare = self._calls.prepare(job.cell)
        except Exception as error:  # out of memory, say
            yield from (_failure(place, error) for place in range(len(job.candidates)))
            return
        if job.final:
            yield from _in_turns(prepare, job)
            return
        for place, (schedule, config) in enumerate(job.candidates):
            try:
                made = prepare(schedule, config)
                spread = replay({place: (capture(made), len(made))}, *_ROUGH)[place]
            except Exception as error:
                yield (failed := _failure(place, error))
                if failed.fatal:
                    return
            else:
                yield Reading(place, round(spread.median, 3))


def _in_turns(prepare: Prepare, job: GaugeJob) -> Iterator[Reading]:
    graphs = {}
    for place, (schedule, config) in enumerate(job.candidates):
        try:
            made = prepare(schedule, config)
            graphs[place] = capture(made), len(made)
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


def gauge(family: str, package: Path) -> tuple[Hello, Callable[[GaugeJob], Iterator[Reading]]]:
    """What a process of the crew that measures runs: GaugeJob -> Reading for each candidate."""
    instrument = Gauge(family, package)
    return instrument.hello(), instrument.measure
