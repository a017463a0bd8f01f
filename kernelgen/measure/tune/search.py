"""The search for one problem, as a coroutine: it asks for measurements in batches and is told their results.

Round 1 measures what the rule says and what is worth a look around it. Each later round moves one tunable by one step
around the two best candidates and the best of every schedule that is near, makes all the moves at once that helped in the
round before, and tries what turned out best for neighbouring problems, until a round gains nothing. In the end the best
are timed once more, in turns and for longer, and that decides.
"""

from __future__ import annotations

import dataclasses
import itertools
from typing import Callable, Generator, Iterable, Mapping, Sequence

from kernelgen.measure.tune.space import Candidate, Space

FINAL = 99  # the round of the last timing
_MAX_ROUNDS = 6
_GAIN = 0.01  # a round that gains less is the last one
_NEAR = 1.15  # a schedule farther from the best than that is not refined
_FINALISTS = 3
_ROUGHLY = 1.01

Times = Mapping[Candidate, "float | None"]  # microseconds; None: wrong, failed or left out


@dataclasses.dataclass(frozen=True)
class Ask:
    """Candidates to measure; with ``final`` they are timed in turns, for longer."""

    round: int
    candidates: tuple[Candidate, ...]

    @property
    def final(self) -> bool:
        return self.round == FINAL


@dataclasses.dataclass
class Found:
    """What is known of one problem so far: microseconds by candidate."""

    rough: dict[Candidate, float | None] = dataclasses.field(default_factory=dict)
    final: dict[Candidate, float] = dataclasses.field(default_factory=dict)

    def us(self, candidate: Candidate) -> float | None:
        """Microseconds of a candidate, of the last timing where it took part."""
        return self.final.get(candidate, self.rough.get(candidate))

    def ranking(self) -> list[tuple[float, Candidate]]:
        """(us, candidate), the best first; the best of many rough times is a lucky one, so that those count 1 % more."""
        rated = [(us, us, candidate) for candidate, us in self.final.items()]
        rated += [
            (us * _ROUGHLY, us, candidate)
            for candidate, us in self.rough.items()
            if us is not None and candidate not in self.final
        ]
        return [(us, candidate) for _, us, candidate in sorted(rated)]

    def best(self, count: int, schedules: Iterable[str] | None = None) -> list[Candidate]:
        """The best few, of these schedules only if they are given."""
        wanted = None if schedules is None else set(schedules)
        ranked = (c for _, c in self.ranking() if wanted is None or c.schedule in wanted)
        return list(itertools.islice(ranked, count))


Search = Generator[Ask, Times, None]


def search(
    space: Space,
    found: Found,
    starts: Sequence[Candidate],
    *,
    sensible: Callable[[Candidate], bool],
    neighbours: Callable[[], Iterable[Candidate]],
    kinds: Sequence[Sequence[str]],
    hurry: Callable[[], bool],
) -> Search:
    """Fill ``found``.

    Args:
        starts: candidates of the first round.
        sensible: whether a candidate is worth compiling.
        neighbours: what is best for neighbouring problems by now.
        kinds: schedules that stand in for each other; the best of each kind is timed in the end.
        hurry: whether the time left is for the last timing alone.
    """
    batch = tuple(starts)
    bases: list[Candidate] = []
    for number in range(1, _MAX_ROUNDS + 1):
        before = _best_us(found)
        found.rough.update((yield Ask(number, batch)))
        after = _best_us(found)
        if after is None or hurry():
            break
        if number > 1 and before is not None and after > before * (1.0 - _GAIN):
            break
        wanted = [*neighbours(), *(_leap(space, found, base) for base in bases)]
        bases = _bases(space, found, after)
        wanted += [move for base in bases for move in space.moves(base)]
        batch = tuple(c for c in dict.fromkeys(wanted) if c not in found.rough and sensible(c))
        if not batch:
            break
    finalists = dict.fromkeys(
        [*found.best(_FINALISTS), *(c for kind in kinds for c in found.best(1, kind))]
    )
    if finalists:
        times = yield Ask(FINAL, tuple(finalists))
        found.final.update((c, us) for c, us in times.items() if us is not None)


def _best_us(found: Found) -> float | None:
    return min((us for us in found.rough.values() if us is not None), default=None)


def _bases(space: Space, found: Found, best_us: float) -> list[Candidate]:
    """What to move from: the two best of the best schedule, and the best of each that is near."""
    bases = []
    for schedule in space.schedules:
        first, second = (*found.best(2, [schedule]), None, None)[:2]
        us = None if first is None else found.us(first)
        if first is not None and us is not None and us <= _NEAR * best_us:
            bases.append(first)
            if second is not None and us == best_us:
                bases.append(second)
    return bases


def _leap(space: Space, found: Found, base: Candidate) -> Candidate:
    """All moves from ``base`` that helped, made at once."""
    start = found.us(base) or 0.0
    times = [(us, move) for move in space.moves(base) if (us := found.us(move)) is not None]
    return space.joined(base, [move for us, move in sorted(times) if us < start])
