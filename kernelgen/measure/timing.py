"""Time on the GPU by CUDA-graph replays, on the host by calls in a row, and the ceilings of the machine."""

from __future__ import annotations

import dataclasses
import functools
import gc
import statistics
import time
from typing import Callable, Hashable, Mapping, Sequence, TypeVar

import torch

Call = Callable[[], None]
Name = TypeVar("Name", bound=Hashable)
MIN_REPLAYS, _MAX_REPLAYS = 7, 40
REPLAY_SECONDS = 0.03  # of replays for one implementation of a cell
_HOST_CALLS = 200
_HOST_ROUNDS = 5
_HOST_SECONDS = 0.05  # of GPU work queued by one round of host timing


@dataclasses.dataclass(frozen=True)
class Spread:
    """Microseconds a call, over the replays."""

    median: float
    p10: float
    p90: float
    replays: int


def capture(calls: Sequence[Call]) -> torch.cuda.CUDAGraph:
    """``calls`` in a row as one graph; each runs once before, so that everything is compiled and allocated."""
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.stream(
        stream
    ):  # torch.cuda.graph would also empty the allocator's cache, each time
        graph.capture_begin()
        try:
            for call in calls:
                call()
        finally:
            graph.capture_end()
    torch.cuda.current_stream().wait_stream(stream)
    graph.replay()
    torch.cuda.synchronize()
    return graph


def replay(
    graphs: Mapping[Name, tuple[torch.cuda.CUDAGraph, int]],
    seconds: float = REPLAY_SECONDS,
    least: int = MIN_REPLAYS,
) -> dict[Name, Spread]:
    """Time the graphs in turns, so that a drift of the machine meets all alike; each is given with its number of calls.

    Each gets ``seconds`` of replays, at least ``least`` and at most 40.
    """
    rounds = {}
    for name, (graph, _) in graphs.items():
        once = _elapsed([_timed(graph.replay)])[0] * 1e-6
        rounds[name] = int(min(_MAX_REPLAYS, max(least, seconds / max(once, 1e-6))))
    events: dict[Name, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {n: [] for n in graphs}
    for i in range(max(rounds.values(), default=0)):
        for name, (graph, _) in graphs.items():
            if i < rounds[name]:
                events[name].append(_timed(graph.replay))
    return {name: _spread(_elapsed(events[name]), calls) for name, (_, calls) in graphs.items()}


def host_us(calls: Sequence[Call], gpu_us: float) -> float:
    """Microseconds of host time of an eager call: up to 200 calls in a row without a sync, median of up to five rounds."""
    count = int(min(_HOST_CALLS, max(8, _HOST_SECONDS * 1e6 / max(gpu_us, 1e-3))))
    turns = [calls[i % len(calls)] for i in range(count)]
    times = []
    gc.disable()
    try:
        for _ in range(_HOST_ROUNDS if count == _HOST_CALLS else 2):
            torch.cuda.synchronize()
            start = time.perf_counter()
            for call in turns:
                call()
            times.append((time.perf_counter() - start) / count * 1e6)
        torch.cuda.synchronize()
    finally:
        gc.enable()
    return statistics.median(times)


def ceilings() -> dict[str, float]:
    """What this GPU reaches now: copy_gb_s, bytes read + written by a large copy, and bf16_tflop_s of a large product; where it
    multiplies FP8, fp8_tflop_s too.
    """
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda").random_()
    target = torch.empty_like(source)
    copy = _median_us(lambda: target.copy_(source), 10)
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    product = torch.empty_like(a)
    flops = 2e-6 * 8192**3
    found = {
        "copy_gb_s": round(2 * source.numel() / copy * 1e-3, 1),
        "bf16_tflop_s": round(flops / _median_us(lambda: torch.mm(a, b, out=product), 20), 1),
    }
    if torch.version.hip is None and torch.cuda.get_device_capability() >= (8, 9):
        one, x, w = torch.ones((), device="cuda"), a.to(torch.float8_e4m3fn), b.to(torch.float8_e4m3fn).t()
        fp8 = functools.partial(torch._scaled_mm, x, w, scale_a=one, scale_b=one, out_dtype=torch.bfloat16, use_fast_accum=True)
        found["fp8_tflop_s"] = round(flops / _median_us(fp8, 20), 1)
    return found


def _timed(run: Callable[[], object]) -> tuple[torch.cuda.Event, torch.cuda.Event]:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    start.record()
    run()
    end.record()
    return start, end


def _elapsed(events: Sequence[tuple[torch.cuda.Event, torch.cuda.Event]]) -> list[float]:
    torch.cuda.synchronize()
    return [start.elapsed_time(end) * 1e3 for start, end in events]


def _spread(times: Sequence[float], calls: int) -> Spread:
    ordered = sorted(t / calls for t in times)
    last = len(ordered) - 1
    return Spread(
        statistics.median(ordered),
        ordered[round(0.1 * last)],
        ordered[round(0.9 * last)],
        len(ordered),
    )


def _median_us(run: Callable[[], object], repeats: int) -> float:
    run()
    torch.cuda.synchronize()
    return statistics.median(_elapsed([_timed(run) for _ in range(repeats)]))
