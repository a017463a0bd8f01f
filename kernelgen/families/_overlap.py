"""LoRA beside the base product: on a second stream, into a buffer of its own, which is then added."""

from __future__ import annotations

from collections.abc import Callable

import torch

from . import _runtime as runtime

__all__ = ["overlap"]


def overlap(
    base_fn: Callable[[], None],
    lora_fn: Callable[[], None],
    stream: torch.cuda.Stream | None,
    events: tuple[torch.cuda.Event, torch.cuda.Event] | None,
) -> None:
    """Run ``lora_fn`` on ``stream`` beside ``base_fn`` on the current one; what follows on the current stream sees both.

    In eager code and inside of a captured CUDA graph. ``lora_fn`` calls ``moe_lora`` with ``add_inputs=False`` on a buffer of
    its own, with a workspace of its own; afterwards ``moe_add(out, delta, route)`` adds it. It may read whatever was written on
    the current stream before. A buffer that it allocates must not be freed before the current stream has used it, so it is
    best made beforehand, and once: it needs no zeroes, as rows that LoRA does not write are not added.

    Args:
        stream: not the current one. None: one after the other, on the current stream.
        events: two events that nobody else uses meanwhile, made once: they cost nothing to record again. None with no stream.

    Raises:
        ValueError: an argument of another type, or a stream without events; nothing was run.
    """
    for label, function in (("base_fn", base_fn), ("lora_fn", lora_fn)):
        if not callable(function):
            runtime.fail("overlap", label, type(function).__name__, "a function of no arguments")
    if stream is not None and not isinstance(stream, torch.cuda.Stream):
        runtime.fail("overlap", "stream", type(stream).__name__, "a torch.cuda.Stream, or None")
    right = isinstance(events, (tuple, list)) and [isinstance(event, torch.cuda.Event) for event in events] == [True, True]
    if (events is not None and not right) or (events is None) != (stream is None):
        got = type(events).__name__ if isinstance(events, (tuple, list)) else events
        runtime.fail("overlap", "events", got, "two torch.cuda.Events with a stream, None without one")
    if stream is None or events is None:
        base_fn()
        lora_fn()
        return
    begin, end = events
    current = torch.cuda.current_stream(stream.device)
    begin.record(current)
    stream.wait_event(begin)
    with torch.cuda.stream(stream):
        lora_fn()
        end.record(stream)
    base_fn()
    current.wait_event(end)
