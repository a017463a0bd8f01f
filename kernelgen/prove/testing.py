"""What the generated tests call: which case meets which variant, and the checks themselves.

Every case meets each combination of the body, tags of axes or facts (for MoE-LoRA: schedule and rank bucket). Core cases meet
half of its variants, such that each variant meets some of them; other cases meet one, that with the fewest cases so far, so that
dtypes and flags take turns.
In exact algebra every kernel's text meets the cases that its family names for it, ``EXACT``.

``Suite.quick`` is a part of that for a person who waits: each template still meets each kind of case, those with a body of
their own with each tag of it, and each body some case.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import importlib
import math
import unittest
import zlib
from types import ModuleType
from typing import TYPE_CHECKING, Any, Callable, Hashable, Iterator, Mapping, Sequence, TypeVar

import torch

from kernelgen.core import names
from kernelgen.core.model import SCHEDULE
from kernelgen.core.targets import TARGETS
from kernelgen.emit.rooms import laboratory
from kernelgen.families.case import Case, Law, Variant
from kernelgen.families.quant import formats_of
from kernelgen.families.tiles import on_card
from kernelgen.prove.layouts import tensors_lie_anywhere

if TYPE_CHECKING:
    from kernelgen.core.model import Family

_Key = TypeVar("_Key", bound=Hashable)

__all__ = ["Case", "Law", "Suite", "Variant"]


@dataclasses.dataclass(frozen=True)
class Suite:
    """The tests of one family of a generated package.

    Attributes:
        package: the name under which the package is imported.
        family: its family.
        axes: the names of the axes, with blanks between.
        rows: a line a variant, its tags in the order of the axes.
    """

    package: str
    family: str
    axes: str
    rows: str

    @classmethod
    def of(cls, package: str, family: Family) -> Suite:
        """The suite of a family as its spec has it."""
        rows = "\n".join(" ".join(v.tags.values) for v in family.variants)
        return cls(package, family.name, " ".join(axis.name for axis in family.axes), rows)

    @functools.cached_property
    def variants(self) -> tuple[Variant, ...]:
        axes = self.axes.split()
        found = []
        for row in self.rows.strip().splitlines():
            tags = row.split()
            name = str(names.variant_name(self.family, tags))
            module = str(names.module_name(tags))
            found.append(Variant(self.family, name, module, dict(zip(axes, tags, strict=True))))
        return tuple(found)

    @functools.cached_property
    def pairs(self) -> tuple[tuple[Variant, Case], ...]:
        """Which variant meets which case."""
        return tuple((variant, case) for variant, cases in self._plan().items() for case in cases)

    @functools.cached_property
    def quick(self) -> frozenset[tuple[str, str]]:
        """Names of variants and cases: a part of the pairs in which each template meets each kind of case that it meets at all,
        and each tag of the body that the case names.

        Variants are chosen such that each body, and each tag with each template, is among those that meet a case.
        """
        kinds: dict[tuple[str | None, Case], list[Variant]] = {}
        for variant, case in self.pairs:
            kinds.setdefault((variant.tags.get(SCHEDULE), case), []).append(variant)
        met: collections.Counter[tuple[tuple[str, object], ...]] = collections.Counter()
        chosen = set()

        def choose(variant: Variant, case: Case) -> None:
            chosen.add((variant.name, case.name))
            met.update(() if case.needs_gpu else self.marks(variant))

        for (_, case), variants in sorted(kinds.items(), key=lambda item: len(item[1])):
            missing = {(name, variant.told(name)) for name in case.body for variant in variants}
            while True:
                # the exact sum, which is the same in whatever order a set gives its marks
                rare = {v: math.fsum(1 / (1 + met[mark]) ** 2 for mark in self.marks(v)) for v in variants}
                best = max(variants, key=lambda v: (sum(v.told(name) == value for name, value in missing), rare[v]))
                choose(best, case)
                missing = {(name, value) for name, value in missing if best.told(name) != value}
                if not missing or case.needs_gpu:
                    break
        for variant, case in self.pairs:
            if not case.needs_gpu and not self.marks(variant) <= met.keys():
                choose(variant, case)
        return frozenset(chosen)

    def marks(self, variant: Variant) -> frozenset[tuple[tuple[str, object], ...]]:
        """What of a variant ``quick`` is to meet: its bodies and its tags, each with the template, as pairs of axis and tag."""
        if variant not in self._marked:
            bodies = {tuple(case.body or self._cases.BODY) for case in self._cases.CASES}
            sets = [*bodies, *((SCHEDULE, axis) for axis in variant.tags)]
            told = (tuple((name, value) for name in names if (value := variant.told(name)) is not None) for names in sets)
            self._marked[variant] = frozenset(told)
        return self._marked[variant]

    @functools.cached_property
    def _marked(self) -> dict[Variant, frozenset[tuple[tuple[str, object], ...]]]:
        return {}

    @functools.cached_property
    def exact(self) -> tuple[tuple[Variant, Case], ...]:
        """Which variant meets which case in exact algebra: one of those whose kernels differ in dtypes alone."""
        texts: dict[tuple[str, ...], Variant] = {}
        for variant in self.variants:
            texts.setdefault(text_of(variant), variant)
        return tuple((variant, case) for variant in texts.values() for case in self.exact_cases(variant))

    def exact_cases(self, variant: Variant) -> list[Case]:
        """The cases of its family that a variant meets in exact algebra: those with a body of their own, on one text of each."""
        return [case for case, texts in self._exact_texts.items() if text_of(variant) in texts]

    @functools.cached_property
    def _exact_texts(self) -> dict[Case, set[tuple[str, ...]]]:
        found: dict[Case, set[tuple[str, ...]]] = {}
        for case in getattr(self._cases, "EXACT", ()):
            fitting = [variant for variant in self.variants if case.fits(variant.tags)]
            if case.body and case not in self._cases.CASES:
                bodies: dict[tuple[object, ...], Variant] = {}
                for variant in fitting:
                    bodies.setdefault(tuple(map(variant.told, case.body)), variant)
                fitting = list(bodies.values())
            found[case] = {text_of(variant) for variant in fitting}
        return found

    @functools.cached_property
    def quick_exact(self) -> frozenset[tuple[str, str]]:
        """A part of ``exact`` that meets each case with each template and with each tag of its body, each body, and each tag with
        each template."""
        met: dict[tuple[Variant, Case], set[Any]] = {}
        for variant, case in self.exact:
            of_case = ((case, name, variant.told(name)) for name in (SCHEDULE, *(case.body or ())))
            met[variant, case] = {*self.marks(variant), case, *of_case}
        return frozenset((variant.name, case.name) for variant, case in _cover(met))

    @functools.cached_property
    def each_text(self) -> tuple[tuple[Variant, Case], ...]:
        """A part of the pairs that meets each body, and each tag with each template; of no gigabytes, as many run at once."""
        pairs = sorted(self.pairs, key=lambda pair: not pair[1].core)
        return tuple(_cover({pair: set(self.marks(pair[0])) for pair in pairs if not (pair[1].needs_gpu or pair[1].is_far)}))

    @property
    def laws(self) -> Sequence[Law]:
        """What holds between variants, and between calls."""
        room = laboratory(self.family, "laws")
        return [*room.LAWS, *([Law(tensors_lie_anywhere)] if hasattr(room, "good") else [])]

    @property
    def laws_are_also_of(self) -> Sequence[str]:
        """Other families, whose kernels run in these laws."""
        return tuple(getattr(laboratory(self.family, "laws"), "ALSO", ()))

    def check(
        self,
        variant: Variant,
        case: Case,
        device: str,
        through: Callable[[Callable[..., None]], Callable[..., None]] = lambda launcher: launcher,
    ) -> float:
        """Run a case on a variant, ``through`` what is made of its launcher; return the worst error over its bound, at most 1.

        Raises:
            AssertionError: the variant is wrong.
            SkipTest: the case needs a GPU.
        """
        _skip_without_gpu(case, device)
        package = importlib.import_module(self.package)
        return self.check_launcher(package, through(variant.launcher(package)), variant, case, device)

    def check_exactly(self, variant: Variant, case: Case, device: str) -> None:
        """Run a case on a variant in exact algebra, and compare the order of its sums with numerics.lock; that of its launches is
        watched, as on a GPU that has dependent launch.

        Raises:
            AssertionError: a kernel made other elements than the reference, in another order than numerics.lock has, or the
                variant is wrong in numbers.
            Lost: an operation has no rule in exact algebra.
            Race: a launch touches what one in front of it may not be done with.
            SkipTest: kernels are not interpreted.
        """
        if device != "cpu":
            raise unittest.SkipTest("exact algebra interprets kernels")
        from kernelgen.prove.exact import exact_algebra  # imports triton
        from kernelgen.prove.numerics import receipts, tape
        from kernelgen.prove.order import launches_of

        package = importlib.import_module(self.package)
        with launches_of(package), exact_algebra() as algebra, tape.taped() as taken:
            self.check(variant, case, device)
        assert algebra.compared, f"{case}: nothing was compared in exact algebra"
        receipts.compare(package, variant.name, case.name, taken)

    def check_arguments(self, device: str) -> None:
        """See that the quick cases tell the arguments of kernels apart, but for what the family has a reason for, ``SAME``.

        Raises:
            AssertionError: says which are the same in all of them.
            SkipTest: kernels are not interpreted.
        """
        if device != "cpu":
            raise unittest.SkipTest("launches are noted where kernels are interpreted")
        from kernelgen.prove.arguments import findings  # imports triton

        found = list(findings(self, getattr(self._cases, "SAME", {})))
        assert not found, "cases in which these differ are missing:\n" + "\n".join(found)

    def check_launcher(
        self,
        package: ModuleType,
        launcher: Callable[..., None],
        variant: Variant,
        case: Case,
        device: str,
    ) -> float:
        """As ``check``, for any launcher that should do what the variant's does."""
        card = on_card(package, TARGETS[case.card]) if case.card else contextlib.nullcontext()
        try:
            with formats_of(package, self.family), card:
                ratio: float = self._cases.check(package, launcher, variant.tags, case, device)
        finally:
            if device != "cpu":
                torch.cuda.empty_cache()  # some cases take gigabytes, and other processes run too
        return ratio

    def cases_for(self, variant: Variant) -> Sequence[Case]:
        """All cases that fit a variant and need no GPU, those that it meets anyway first."""
        own = [case for met, case in self.pairs if met == variant]
        others = [case for case in self._cases.CASES if case.fits(variant.tags) and case not in own]
        return [case for case in own + others if not case.needs_gpu]

    def uphold(self, law: Law, device: str) -> None:
        """Raise AssertionError if the law is broken, SkipTest if it needs a GPU, or a family that was not generated."""
        _skip_without_gpu(law, device)
        package = importlib.import_module(self.package)
        try:
            with formats_of(package, self.family):
                law.run(package, self.variants, device)
        except AttributeError as error:
            if error.name not in getattr(package, "LEFT_OUT", {}):
                raise
            raise unittest.SkipTest(str(error)) from None

    @functools.cached_property
    def _cases(self) -> Any:
        return laboratory(self.family, "cases")

    def _plan(self) -> dict[Variant, list[Case]]:
        plan: dict[str, list[Case]] = {variant.name: [] for variant in self.variants}
        cases: dict[tuple[str, ...], list[Case]] = {}
        shares_core = sum(case.core for case in self._cases.CASES) > 1
        for case in self._cases.CASES:
            cases.setdefault(tuple(case.body or self._cases.BODY), []).append(case)
        for told, members in cases.items():
            for number, body in enumerate(self._bodies(told)):
                turn = 3 * number % len(body)
                for case in members:
                    fitting = [v for v in body[turn:] + body[:turn] if case.fits(v.tags)]
                    if not case.core:
                        fitting = sorted(fitting, key=lambda v: len(plan[v.name]))[:1]
                    elif shares_core:  # by a number that is no order of tags, so that each half has some of each
                        order = {v: (sum(c.core for c in plan[v.name]), zlib.crc32(v.name.encode())) for v in fitting}
                        fitting = sorted(fitting, key=order.__getitem__)[: (len(fitting) + 1) // 2]
                    for variant in fitting:
                        plan[variant.name].append(case)
        return {variant: plan[variant.name] for variant in self.variants}

    def _bodies(self, told: Sequence[str]) -> Sequence[list[Variant]]:
        """The variants, by their tags or facts; what they lack does not tell them apart."""
        bodies: dict[tuple[object, ...], list[Variant]] = {}
        for variant in self.variants:
            bodies.setdefault(tuple(map(variant.told, told)), []).append(variant)
        return list(bodies.values())


def text_of(variant: Variant) -> tuple[str, ...]:
    """What tells the texts of a family's kernels apart: all tags but the dtype, which is a name in them."""
    return tuple(tag for axis, tag in variant.tags.items() if axis != "dtype")


def _cover(met: Mapping[_Key, set[Any]]) -> Iterator[_Key]:
    """Some keys, whose sets together have all that is in any."""
    missing: set[Any] = set().union(*met.values())
    while missing:
        key = max(met, key=lambda key: len(met[key] & missing))
        missing -= met[key]
        yield key


def _skip_without_gpu(item: Case | Law, device: str) -> None:
    if item.needs_gpu and device == "cpu":
        raise unittest.SkipTest("needs a GPU")
