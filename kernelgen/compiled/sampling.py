"""Which kernels stand for all of them, when there is no time for all.

Kernels are put in an order in which the schedules take turns, and within a schedule its forms: kernels whose lists of
parameters differ. So the first ones meet every schedule, and a few more every form. Which of a form comes first differs
by target, so that targets look at different tags. The order is made for each family by itself: another family changes none.
"""

from __future__ import annotations

import collections
import hashlib
from typing import Callable, Hashable, Iterable, Iterator, Sequence, TypeVar

from kernelgen.compiled.requests import Case
from kernelgen.core.targets import PRIMARY

_CHECKED = 96  # kernels of a check, where what has to be in it is not more already
_CHECKED_TUNED = 16  # likewise of the tuned tiles
_SHARE = 7  # of the kernels for a target that is not the primary one, one in so many is locked

_Group = TypeVar("_Group", bound=Hashable)


def checked(known: Iterable[Case], turn: int = 0, turns: int = 1) -> list[Case]:
    """What a check compiles: every schedule for every target, then the primary target up to a fixed number.

    Checks that each have a ``turn`` of ``turns`` share the schedules for other targets out.
    """
    plain, tuned = _by_target(known)
    others = {name: cases for name, cases in plain.items() if name != PRIMARY}
    schedules = [_first(cases, _count(cases, _schedule)) for cases in others.values()]
    chosen = [case for cases in schedules for case in cases[turn::turns]]
    primary = plain.get(PRIMARY, [])
    count = max(_count(primary, _schedule), _CHECKED - len(chosen))
    return [*_first(primary, count), *chosen, *_first(tuned, _CHECKED_TUNED)]


def locked(known: Iterable[Case]) -> list[Case]:
    """What the lock has to hold: all for the primary target; for another every form, and a share of each family."""
    plain, _ = _by_target(known)
    chosen = list(plain.pop(PRIMARY, []))
    for cases in plain.values():
        for family in _grouped(cases, lambda case: case.variant.family).values():
            chosen += _first(family, max(_count(family, _form), -(-len(family) // _SHARE)))
    return chosen


def _by_target(known: Iterable[Case]) -> tuple[dict[str, list[Case]], list[Case]]:
    """The kernels of each target, each once; and those with tuned tiles."""
    plain: dict[str, dict[str, Case]] = {}
    tuned: dict[str, Case] = {}
    for case in known:
        kernels = tuned if case.probe.is_tuned else plain.setdefault(case.target.name, {})
        kernels.setdefault(case.digest, case)
    return {name: list(kernels.values()) for name, kernels in plain.items()}, list(tuned.values())


def _first(cases: Sequence[Case], count: int) -> list[Case]:
    """The first ``count`` in the order that the module speaks of; families take turns too."""
    forms = _turns(sorted(cases, key=_lot), _form)
    schedules = _turns((case for _, case in sorted(forms, key=_turn)), _schedule)
    return [case for _, case in sorted(schedules, key=_turn)][:count]


def _turns(cases: Iterable[Case], group: Callable[[Case], Hashable]) -> Iterator[tuple[int, Case]]:
    """Each case with how many of its group come before it."""
    seen: collections.Counter[Hashable] = collections.Counter()
    for case in cases:
        yield seen[group(case)], case
        seen[group(case)] += 1


def _turn(pair: tuple[int, Case]) -> tuple[int, str]:
    return pair[0], _lot(pair[1])


def _lot(case: Case) -> str:
    """What decides among equals: the same in every run, another one for each target."""
    return hashlib.sha256(f"{case.target.name} {case.row}".encode()).hexdigest()


def _schedule(case: Case) -> Hashable:
    return case.variant.family, case.variant.kernel, case.row.kernel


def _form(case: Case) -> Hashable:
    return _schedule(case), case.parameters


def _grouped(cases: Iterable[Case], group: Callable[[Case], _Group]) -> dict[_Group, list[Case]]:
    groups: dict[_Group, list[Case]] = {}
    for case in cases:
        groups.setdefault(group(case), []).append(case)
    return groups


def _count(cases: Iterable[Case], group: Callable[[Case], Hashable]) -> int:
    return len({group(case) for case in cases})
