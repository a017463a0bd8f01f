"""The space that is searched: the tunables of a spec, and steps between their values. Imports no torch."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path
from typing import Any, Iterable, Iterator, Mapping, NamedTuple, Sequence

from kernelgen.core.diagnostics import Failure, failure, os_failure
from kernelgen.core.read import read_file
from kernelgen.spec.limits import MAX_BYTES

Named = Mapping[str, int]  # tunable -> value


class Candidate(NamedTuple):
    """A schedule with a value for each of its tunables, in the order of the spec."""

    schedule: str
    values: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Space:
    """Schedule -> tunable -> its values, rising."""

    tunables: Mapping[str, Mapping[str, tuple[int, ...]]]

    @property
    def schedules(self) -> tuple[str, ...]:
        return tuple(self.tunables)

    def named(self, candidate: Candidate) -> dict[str, int]:
        """The values of ``candidate`` by tunable."""
        return dict(zip(self.tunables[candidate.schedule], candidate.values, strict=True))

    def near(self, schedule: str, wanted: Named) -> Candidate:
        """The candidate with the values of ``wanted``, each the next declared one where it is not declared itself."""
        values = []
        for name, declared in self.tunables[schedule].items():
            above = [value for value in declared if value >= wanted[name]]
            values.append(above[0] if above else declared[-1])
        return Candidate(schedule, tuple(values))

    def declares(self, candidate: Candidate) -> bool:
        """Whether the spec (still) has this schedule, these tunables and these values."""
        declared = self.tunables.get(candidate.schedule)
        return (
            declared is not None
            and len(declared) == len(candidate.values)
            and all(v in d for v, d in zip(candidate.values, declared.values(), strict=True))
        )

    def moves(self, candidate: Candidate) -> Iterator[Candidate]:
        """All candidates that are one step of one tunable away."""
        for i, declared in enumerate(self.tunables[candidate.schedule].values()):
            at = declared.index(candidate.values[i])
            for value in declared[max(0, at - 1) : at + 2]:
                if value != candidate.values[i]:
                    changed = (*candidate.values[:i], value, *candidate.values[i + 1 :])
                    yield Candidate(candidate.schedule, changed)

    def joined(self, base: Candidate, steps: Iterable[Candidate]) -> Candidate:
        """``base`` with all that ``steps``, each a move from it, change; of two for one tunable the first counts."""
        values = list(base.values)
        for step in reversed([*steps]):
            for i, value in enumerate(step.values):
                if value != base.values[i]:
                    values[i] = value
        return Candidate(base.schedule, tuple(values))

    def grid(self, schedule: str, base: Named, changes: Sequence[Named]) -> Iterator[Candidate]:
        """``base`` with each of ``changes``, as far as they are declared."""
        for change in changes:
            candidate = self.near(schedule, {**base, **change})
            named = self.named(candidate)
            if all(named[name] == value for name, value in change.items()):
                yield candidate


def products(*choices: Sequence[Named]) -> list[dict[str, int]]:
    """Every combination of one of each of ``choices``, as one mapping."""
    return [
        {name: value for part in combination for name, value in part.items()}
        for combination in itertools.product(*choices)
    ]


def read(spec: Path, family: str) -> Space:
    """The space that ``spec`` declares for ``family``; ``kernelgen build`` judges a spec in full.

    Raises:
        Failure: it cannot be read, is of another family, or has no tunables.
    """
    data = content(spec)
    if isinstance(data, dict) and data.get("family") == family and not data.get("tunables"):
        raise failure("KG070", str(spec), f"{family} has no tunables: there is nothing to search", "declare them in the spec")
    try:
        found = data["family"]
        tunables = {
            str(schedule): {str(name): tuple(sorted(values)) for name, values in names.items()}
            for schedule, names in data["tunables"].items()
        }
    except (KeyError, TypeError, AttributeError) as error:
        raise failure("KG070", str(spec), f"not a spec with tunables: {error!r}", "kernelgen build says more") from error
    if found != family:
        raise failure("KG013", str(spec), f"the spec of {found}, wanted {family}")
    return Space(tunables)


def content(file: Path) -> Any:
    """What a YAML file holds.

    Raises:
        Failure: it cannot be read, or is not well-formed.
    """
    from kernelgen.spec.parse import parse  # not for --help

    try:
        root, faults = parse(str(file), read_file(file, MAX_BYTES))
    except OSError as error:
        raise os_failure(error, file) from error
    if root is None or faults:
        raise Failure(faults, exit_code=2)
    return root.plain()
