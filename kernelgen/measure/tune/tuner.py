"""Searches of many problems at once: kernels are compiled ahead in some processes, candidates timed on GPUs in others.

All searches advance together, round by round: when the time is up, every problem has had its share. Whatever was measured
is in the state file at once, and the tuned file is written whenever a problem has new times.
"""

from __future__ import annotations

import heapq
import multiprocessing.connection
import time
from collections import deque
from typing import Any, Callable, Hashable, Iterable, Mapping, NamedTuple, Protocol, Sequence

from kernelgen.measure.tune import tuned_file
from kernelgen.measure.tune.crew import Crew, Event
from kernelgen.measure.tune.hints import Hints
from kernelgen.measure.tune.jobs import CompileJob, GaugeJob, Sizes
from kernelgen.measure.tune.problem import Problem, alike
from kernelgen.measure.tune.search import FINAL, Ask, Found, Search, search
from kernelgen.measure.tune.space import Candidate, Named, Space
from kernelgen.measure.tune.state import Key, Measured, State, key

_FINAL_SECONDS = 0.4  # that the last timing of a problem takes, about
_MOST_RESERVED = 0.3  # of the budget, for last timings
_QUEUED = 4  # compile jobs waiting, for each process


class Kernels(Protocol):
    """See ``kernels.Kernels``."""

    def problems(self, cell: Any) -> list[Problem]:
        """What tiles are looked up by in a cell."""

    def sizes(self, cell: Any, problem: Problem, schedules: Sequence[str]) -> Sizes:
        """What the package makes of a problem, and the rule's tiles."""

    def digests(self, cell: Any, problem: Problem, schedule: str, tiles: Named) -> list[str]:
        """What names the kernels of a candidate."""


class Status(NamedTuple):
    """How far the run is."""

    problems: int
    timed: int  # problems with a time
    finished: int  # problems whose search has ended
    measured: int  # candidates that were timed in this run
    compiled: int  # kernels
    dropped: int  # of them: they spill, do not fit or do not compile
    waiting: int  # kernels that are wanted and not compiled yet


class Loss(NamedTuple):
    """Microseconds of a problem with the rule's choice, and with the best."""

    problem: Problem
    rule_us: float
    best_us: float


class _Queued(NamedTuple):
    """Kernels to compile, in the order of round and task, and of ``number``, which no two share."""

    round: int
    task: int
    number: int
    job: CompileJob
    digests: tuple[str, ...]


class _Task:
    """The search for one problem, between two asks."""

    def __init__(self, index: int, cell: Any, problem: Problem) -> None:
        self.index = index
        self.cells = [cell]  # that have the problem
        self.problem = problem
        self.owner = tuple(getattr(cell, name, None) for name in ("model", "rank", "slots"))  # of weights, which cells share
        self.found = Found()
        self.rule: Candidate | None = None  # what the package takes without tuned data
        self.search: Search
        self.ask: Ask | None = None
        self.times: dict[Candidate, float | None] = {}
        self.digests: dict[Candidate, list[str]] = {}  # of what is still to be measured
        self.missing: set[str] = set()
        self.job: list[Candidate] = []
        self.blame = 0  # place in the job of what a dying process was at; -1: known already

    @property
    def round(self) -> int:
        return self.ask.round if self.ask is not None else 0


class Tuner:
    """One run over ``cells``. Crews are given, so that tests can do without a GPU."""

    def __init__(
        self,
        hints: type[Hints],
        cells: Sequence[Any],
        space: Space,
        kernels: Kernels,
        target: str,
        compilers: Crew,
        gauges: Crew,
        state: State,
        earlier: Mapping[Key, tuned_file.Entry],
        save: Callable[[list[tuned_file.Entry]], None],
        budget: float | None,
        on_status: Callable[[Status], None] = lambda status: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._hints = hints
        self._space = space
        self._kernels = kernels
        self._target = target
        self._compilers = compilers
        self._gauges = gauges
        self._state = state
        self._earlier = earlier
        self._save = save
        self._on_status = on_status
        self._clock = clock
        self._started = clock()
        self._budget = budget
        self._by_key: dict[Key, _Task] = {}
        for cell in cells:
            for problem in kernels.problems(cell):
                known = self._by_key.get(key(problem))
                if known is None:
                    self._by_key[key(problem)] = _Task(len(self._by_key), cell, problem)
                else:
                    known.cells.append(cell)
        self.tasks = list(self._by_key.values())
        self._unopened = deque(self.tasks)
        self._open: set[_Task] = set()
        self._ready: set[_Task] = set()
        self._verdicts: dict[str, str | None] = {}
        self._waiting: dict[str, set[_Task]] = {}  # by digest
        self._queue: list[_Queued] = []
        self._compiling: dict[int, tuple[str, ...]] = {}
        self._measuring: dict[int, _Task] = {}
        self._loaded: dict[int, Hashable] = {}
        self._entries = dict(earlier)
        self._timed: set[int] = set()
        self._count = self._measured = self._dropped = 0
        self._hurry = False
        self._next_write = 0.0

    def run(self) -> bool:
        """Search until all searches have ended, or the time is up; return whether none was cut short."""
        for name, problem in self._state.problems.items():
            self._note(name, problem)
        for task in self.tasks:
            if self._state.found(task.problem).ranking():
                self._timed.add(task.index)
        try:
            while self._unopened or self._open:
                if self._left() <= 0.0:
                    return False
                if not self._hurry and self._left() < self._reserve():
                    self._hurry = True
                    self._cut_short()
                self._open_tasks()
                self._deal_compiles()
                self._deal_measurements()
                self._on_status(self.status())
                if self._open:
                    self._wait()
            return not self._hurry
        finally:
            self._save(list(self._entries.values()))

    def status(self) -> Status:
        """How far it is."""
        finished = len(self.tasks) - len(self._unopened) - len(self._open)
        counts = (self._measured, len(self._verdicts), self._dropped, len(self._waiting))
        return Status(len(self.tasks), len(self._timed), finished, *counts)

    def losses(self) -> list[Loss]:
        """What the rule loses against the best, for each problem where both were timed."""
        found = []
        for task in self.tasks:
            entry = self._entries.get(key(task.problem))
            known = self._state.found(task.problem)
            us = None if task.rule is None else known.us(task.rule)
            if entry is not None and us is not None:
                found.append(Loss(task.problem, us, entry.best.us))
        return found

    def _left(self) -> float:
        if self._budget is None:
            return float("inf")
        return self._started + self._budget - self._clock()

    def _reserve(self) -> float:
        """Seconds that last timings will take."""
        gauges = max(1, len(self._gauges.hellos))
        return min(
            len(self.tasks) * _FINAL_SECONDS / gauges, _MOST_RESERVED * (self._budget or 0.0)
        )

    # A task goes: opened -> (waits for kernels -> waits for a GPU -> is measured) for every ask -> closed.

    def _open_tasks(self) -> None:
        most = _QUEUED * max(1, len(self._compilers.hellos))
        while self._unopened and len(self._queue) < most:
            task = self._unopened.popleft()
            self._open.add(task)
            self._begin(task)

    def _begin(self, task: _Task) -> None:
        schedules = self._space.schedules
        sizes = self._kernels.sizes(task.cells[0], task.problem, schedules)
        space = Space({name: self._space.tunables[name] for name in schedules if name in sizes.rules})
        subject = self._hints(task.problem, space, sizes)
        known = self._earlier.get(key(task.problem))
        choices = [known.best, known.runner_up] if known is not None else []
        own = [choice.candidate for choice in choices if choice is not None]
        starts = dict.fromkeys([*filter(subject.accepts, own), *subject.starts(sizes.rules)])
        task.rule = space.near(sizes.rule, sizes.rules[sizes.rule])
        task.search = search(
            space,
            task.found,
            list(starts),
            sensible=subject.accepts,
            neighbours=lambda: self._neighbours(task),
            kinds=self._hints.KINDS,
            hurry=lambda: self._hurry,
        )
        self._ask(task, next(task.search))

    def _neighbours(self, task: _Task) -> Iterable[Candidate]:
        """What is best for half and twice the tokens, and for other shapes with the same of what matters."""
        tokens = int(task.problem["num_tokens"])
        for near in (tokens // 2, tokens * 2):
            other = self._by_key.get(key({**task.problem, "num_tokens": near}))
            if other is not None:
                yield from other.found.best(2)
        for other in self.tasks:
            if other is not task and alike(other.problem) == alike(task.problem):
                yield from other.found.best(1)

    def _ask(self, task: _Task, ask: Ask) -> None:
        """Look up what is known, have the kernels of the rest compiled."""
        task.ask = ask
        known = self._state.found(task.problem)
        task.times = {
            c: known.rough[c] for c in ask.candidates if not ask.final and c in known.rough
        }
        if ask.final and all(c in known.final for c in ask.candidates):
            task.times = {c: known.final[c] for c in ask.candidates}
        task.digests, task.missing = {}, set()
        for candidate in ask.candidates:
            if candidate in task.times:
                continue
            named = self._space.named(candidate)
            digests = self._kernels.digests(task.cells[0], task.problem, candidate.schedule, named)
            task.digests[candidate] = digests
            unknown = [d for d in digests if d not in self._verdicts]
            new = [(i, d) for i, d in enumerate(digests) if d in unknown and d not in self._waiting]
            for digest in unknown:
                self._waiting.setdefault(digest, set()).add(task)
            task.missing.update(unknown)
            if new:
                self._count += 1
                places, names = zip(*new, strict=True)
                job = CompileJob(self._target, task.cells[0], task.problem, candidate.schedule, named, places)
                heapq.heappush(self._queue, _Queued(ask.round, task.index, self._count, job, names))
        if not task.missing:
            self._sift(task)

    def _sift(self, task: _Task) -> None:
        """All kernels of an ask are compiled: drop what is not fit, and wait for a GPU with the rest."""
        dropped = []
        for candidate, digests in list(task.digests.items()):
            faults = [fault for d in digests if (fault := self._verdicts[d]) is not None]
            if faults:
                del task.digests[candidate]
                task.times[candidate] = None
                dropped.append(Measured(task.problem, candidate, None, False, faults[0]))
        self._state.add(dropped)
        if task.digests:
            self._ready.add(task)
        else:
            self._advance(task)

    def _advance(self, task: _Task) -> None:
        """Tell the search the times that it asked for."""
        try:
            ask = task.search.send(task.times)
        except StopIteration:
            self._open.discard(task)
        else:
            self._ask(task, ask)

    def _cut_short(self) -> None:
        """Go on to the last timings: searches not begun, kernels not compiled and refinements not timed are given up."""
        self._unopened.clear()

        def is_final(item: _Queued) -> bool:
            waiting = (task for name in item.digests for task in self._waiting[name])
            return any(task.round == FINAL for task in waiting)

        for item in self._queue:
            if not is_final(item):
                for digest in item.digests:
                    del self._waiting[digest]
        self._queue = [item for item in self._queue if item.digests[0] in self._waiting]
        heapq.heapify(self._queue)
        busy = set(self._measuring.values())
        for task in sorted(self._open - busy, key=lambda task: task.index):
            if task.round == FINAL or (task.round == 1 and task in self._ready):
                continue
            for waiting in self._waiting.values():
                waiting.discard(task)
            self._ready.discard(task)
            task.missing = set()
            task.digests = {
                candidate: digests
                for candidate, digests in task.digests.items()
                if task.round == 1 and self._verdicts.keys() >= set(digests)
            }
            self._sift(task)

    def _deal_compiles(self) -> None:
        for member in self._compilers.idle():
            if not self._queue:
                return
            item = heapq.heappop(self._queue)
            self._compiling[member] = item.digests
            self._compilers.give(member, item.job)

    def _deal_measurements(self) -> None:
        for member in self._gauges.idle():
            if not self._ready:
                return
            loaded = self._loaded.get(member)
            elsewhere = {owner for gauge, owner in self._loaded.items() if gauge != member}
            task = min(
                self._ready,
                key=lambda t: (t.round, t.owner != loaded, t.owner in elsewhere, t.index),
            )
            self._ready.discard(task)
            self._measuring[member] = task
            self._loaded[member] = task.owner
            assert task.ask is not None
            task.job, task.blame = list(task.digests), 0
            named = tuple((c.schedule, self._space.named(c)) for c in task.job)
            self._gauges.give(member, GaugeJob(tuple(task.cells), task.problem, named, task.ask.final))

    def _wait(self) -> None:
        crews = (self._compilers, self._gauges)
        timeout = min(1.0, max(0.0, self._left()))
        multiprocessing.connection.wait(
            [waitable for crew in crews for waitable in crew.waitables()], timeout
        )
        for event in self._compilers.events():
            self._on_compiler(event)
        for event in self._gauges.events():
            self._on_gauge(event)

    def _on_compiler(self, event: Event) -> None:
        if event.kind == "reply":
            self._judge(*event.reply)
        elif event.kind in ("done", "died"):
            for digest in self._compiling.pop(event.member, ()):
                if digest not in self._verdicts:
                    self._judge(digest, "the compiler ended its process")

    def _judge(self, digest: str, fault: str | None) -> None:
        self._verdicts[digest] = fault
        self._dropped += fault is not None
        for task in sorted(self._waiting.pop(digest, ()), key=lambda task: task.index):
            task.missing.discard(digest)
            if not task.missing:
                self._sift(task)

    def _on_gauge(self, event: Event) -> None:
        if event.kind == "died":
            self._loaded.pop(event.member, None)
        task = self._measuring.get(event.member)
        if task is None or event.kind == "ready":
            return
        assert task.ask is not None
        if event.kind == "reply":
            place, us, failed, fatal = event.reply
            self._take(task, task.job[place], us, failed)
            task.blame = -1 if fatal else place + 1
            return
        del self._measuring[event.member]
        if event.kind == "died" and not task.ask.final:
            if 0 <= task.blame < len(task.job):
                self._take(task, task.job[task.blame], None, "the process ended")
            task.digests = {c: d for c, d in task.digests.items() if c not in task.times}
        else:
            task.digests = {}
        if task.digests:
            self._ready.add(task)  # what is left of it
        else:
            self._advance(task)
        self._write(task)

    def _take(
        self, task: _Task, candidate: Candidate, us: float | None, failed: str | None
    ) -> None:
        assert task.ask is not None
        self._measured += 1
        task.times[candidate] = us
        if us is not None:
            self._timed.add(task.index)
        self._state.add([Measured(task.problem, candidate, us, task.ask.final, failed)])

    def _note(self, name: Key, problem: Problem) -> None:
        entry = tuned_file.entry(problem, self._state.found(problem), self._hints.KINDS)
        if entry is not None:
            self._entries[name] = entry

    def _write(self, task: _Task) -> None:
        """Bring the file up to date, at most once in a second; the state file has everything at once."""
        self._note(key(task.problem), task.problem)
        if self._clock() >= self._next_write:
            self._save(list(self._entries.values()))
            self._next_write = self._clock() + 1.0
