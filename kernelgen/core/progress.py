"""How far the work on many items is, on stderr: a bar on a terminal, else a line now and then; nothing of what is short, and
nothing at all with ``--quiet`` or ``--json``.
"""

from __future__ import annotations

import os
import sys
import time
from typing import Any, Callable, Iterable, Iterator

import click

from kernelgen.core.processes import Progress, no_progress

_SHORT = 0.5  # seconds: what takes less is not shown
_BAR, _LINE = 0.1, 15.0  # seconds from one sign to the next


def has_bars() -> bool:
    """Whether the command that runs shows bars."""
    return is_wanted() and sys.stderr.isatty() and os.environ.get("TERM") != "dumb"


def is_wanted() -> bool:
    """Whether the command that runs says how far it is."""
    context = click.get_current_context(silent=True)
    return context is None or not (context.params.get("quiet") or context.params.get("as_json"))


def progress(label: str, lines: bool = True) -> Progress:
    """Shows ``label`` and how many of the items are done; ``lines``: where there are no bars, too."""

    def watch(items: Iterable[Any], total: int) -> Iterable[Any]:
        if not has_bars():
            if not (lines and is_wanted()):
                return no_progress(items, total)
            return _watch(items, _LINE, _LINE, lambda done: click.echo(f"{label}: {done} of {total}", err=True))
        return _with_bar(items, label, total)

    return watch


def _with_bar(items: Iterable[Any], label: str, total: int) -> Iterator[Any]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bars

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    # without a thread of its own, as processes are forked meanwhile
    bars = Bars(*columns, console=Console(stderr=True), transient=True, auto_refresh=False)
    task = bars.add_task(label, total=total)

    def show(done: int) -> None:
        bars.start()
        bars.update(task, completed=done, refresh=True)

    try:
        yield from _watch(items, _SHORT, _BAR, show)
    finally:
        bars.stop()


def _watch(items: Iterable[Any], first: float, every: float, show: Callable[[int], None]) -> Iterator[Any]:
    due = time.monotonic() + first
    for done, item in enumerate(items, 1):
        yield item
        if time.monotonic() >= due:
            show(done)
            due = time.monotonic() + every
