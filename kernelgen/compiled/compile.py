"""Compilation of every kernel for every target, without a GPU, and what it costs in registers, spills and shared memory.

A variant is called on its probes as a user would call it; what it would launch is compiled in other processes. Kernels that
differ by name alone are one. The figures are held against the limits of the spec and the target, and against ``kernels.lock``.

What was measured is remembered as it comes, so that an interrupted run goes on where it was, and a new family costs its own
kernels: ``usage-<triton>-<rules>.jsonl`` in the user's cache folder (``KERNELGEN_CACHE_DIR``), a line a kernel. A file of
another machine is taken in by appending it to one's own.

How much of the whole is compiled. Kernels are put in an order in which those of a schedule take turns, and among these the
forms of it (the lists of parameters), and which comes first differs by target; so the first ones of a target are few and
meet every schedule, the next ones every form, and the order of a family does not depend on others.

- ``update``: everything for the primary target; for each other one every form of each schedule, and a share of the rest.
- ``check``: a number that does not grow with the variants, from the start of the same order; of other targets than the primary
  one a part, which changes with the lock.
- ``full`` or ``only`` or ``targets``: everything that is asked for.

Tuned tiles, of which there are many and which change with each tuning, are held against the limits alone, not the lock.
"""

from __future__ import annotations

import dataclasses
import tempfile
import zlib
from pathlib import Path
from typing import Any, Callable, Iterable, Iterator, Literal, Mapping, Sequence, TypeVar

import triton

from kernelgen.compiled import sampling
from kernelgen.compiled.compile_cache import Remembered
from kernelgen.compiled.lock import COLUMNS, FILE, Lock, Row, Section, coverage, drift
from kernelgen.compiled.requests import Case, cases, cases_of
from kernelgen.compiled.resources import Usage, usage
from kernelgen.core.diagnostics import Diagnostic, failure
from kernelgen.core.model import Location
from kernelgen.core.processes import Fault, Progress, in_processes, no_progress
from kernelgen.core.targets import TARGETS

Mode = Literal["report", "check", "update"]
Outcome = Usage | Fault
_Result = TypeVar("_Result")
_TURNS = 2  # of checks under one release, until they have met all schedules for other targets


@dataclasses.dataclass(frozen=True)
class Result:
    """What ``run`` found out: the cases that were compiled, now or earlier, and what is wrong.

    Attributes:
        outcomes: those that were asked for or remembered.
        known: all that there are to compile.
        compiled: how many kernels were compiled now.
        findings: what is wrong.
    """

    outcomes: Sequence[tuple[Case, Outcome]]
    known: Sequence[Case]
    compiled: int
    findings: Sequence[Diagnostic]

    def shares(self) -> dict[str, tuple[int, int]]:
        """For each target, and for tuned tiles: how many different kernels were judged, of how many."""
        judged = {case.digest for case, _ in self.outcomes}
        kernels: dict[str, set[str]] = {}
        for case in self.known:
            label = "tuned tiles" if case.probe.is_tuned else case.target.name
            kernels.setdefault(label, set()).add(case.digest)
        return {label: (len(digests & judged), len(digests)) for label, digests in kernels.items()}

    def as_json(self) -> dict[str, Any]:
        """The fields of a report."""
        return {
            "triton": triton.__version__,
            "kernels": [
                {**case.row._asdict(), "target": case.target.name, **dataclasses.asdict(outcome)}
                for case, outcome in self.outcomes
            ],
            "shares": {label: {"judged": n, "of": of} for label, (n, of) in self.shares().items()},
            "compiled": self.compiled,
            "findings": [finding.as_json() for finding in self.findings],
        }

    def summary(self) -> str:
        """One line for a reader; it says how much of the whole was judged."""
        shares = self.shares()
        judged, known = map(sum, zip((0, 0), *shares.values(), strict=True))
        parts = [f"{n} of {of} for {label}" for label, (n, of) in shares.items() if n < of]
        detail = f" ({', '.join(parts)})" if parts else ""
        return (
            f"triton {triton.__version__}: {judged} of {known} kernels, {self.compiled} compiled now,"
            f" {len(self.findings)} findings{detail}"
        )

    def table(self) -> tuple[list[tuple[str, ...]], tuple[str, ...]]:
        """For a reader: rows, and what their columns are called."""
        return list(self._rows()), ("variant", "kernel", "probe", "target", *COLUMNS, "instructions")

    def _rows(self) -> Iterator[tuple[str, ...]]:
        """A line a kernel."""
        for case, outcome in self.outcomes:
            if isinstance(outcome, Usage):
                kinds = " ".join(f"{name}={n}" for name, n in outcome.instructions.items())
                yield *case.row, case.target.name, *map(str, outcome.locked), kinds


def run(
    specs: Path,
    out: Path,
    *,
    only: str | None = None,
    targets: Sequence[str] = (),
    mode: Mode = "report",
    full: bool = False,
    workers: int = 1,
    progress: Progress = no_progress,
) -> Result:
    """Compile the variants in ``out`` and judge what they use.

    Args:
        specs: the folder of the specs, which say the targets and the spills that are allowed.
        out: the folder of the generated package and of the lock.
        only: a glob on the names of variants.
        targets: names of targets; none are all that a spec declares.
        mode: "check" also compares with the lock; "update" writes what was found to the lock instead.
        full: leave nothing out; so it is anyway with ``only`` or ``targets``.
        workers: processes to compile in.
        progress: shows how far it is.

    Raises:
        Failure: a spec is at fault (exit code 1), or the package or the lock cannot be read (2).
    """
    lock = Lock(out / FILE)
    complete = only is None and not targets
    known = cases(specs, out, only, targets)
    standard = sampling.locked(known) if complete else [c for c in known if not c.probe.is_tuned]
    if full or not complete:
        wanted = known
    else:
        wanted = standard if mode == "update" else sampling.checked(known, *_turn(lock))
    results, compiled = compile_cases(wanted, workers, progress)
    outcomes = [(case, results[case.digest]) for case in known if case.digest in results]

    findings = [finding for case, outcome in outcomes for finding in _limits(case, outcome)]
    lines = _lines(known)
    if mode == "check":
        findings += drift(lock, triton.__version__, _figures(outcomes, lines))
        have = [(lines[case.digest], case.target.name) for case in standard]
        every = {(lines[case.digest], case.target.name) for case in known if not case.probe.is_tuned}
        findings += coverage(lock, triton.__version__, every, have, complete)
    elif mode == "update":
        before = {} if complete else lock.sections.get(triton.__version__, {})
        lock.sections[triton.__version__] = _merged(before, _figures(outcomes, lines))
        lock.write()
    return Result(outcomes, known, compiled, findings)


def compile_cases(
    wanted: Iterable[Case], workers: int = 1, progress: Progress = no_progress
) -> tuple[Mapping[str, Outcome], int]:
    """Compile what is not remembered.

    Returns:
        Outcomes by digest, of these cases and of all that are remembered; and how many were compiled now.
    """
    remembered = Remembered()
    new = {case.digest: case for case in wanted if case.digest not in remembered.usages}

    def keep(case: Case, outcome: Outcome) -> None:
        if isinstance(outcome, Usage):  # a failure may be one of the machine
            remembered.add(case.digest, outcome)

    results = _compiled(_usage, list(new.values()), workers, progress, keep)
    return {**remembered.usages, **dict(zip(new, results, strict=True))}, len(new)


def assembly(specs: Path, out: Path, variant: str, kind: str, target: str) -> dict[str, str]:
    """The assembly of the kernels of ``variant`` on its first probe, by kernel; ``kind`` is ptx, sass or amdgcn.

    Raises:
        Failure: no such variant, or not for this target, or it does not compile; exit code 2.
    """
    found = cases_of(specs, out, variant, target)
    kinds = ("amdgcn",) if TARGETS[target].backend == "hip" else ("ptx", "sass")
    if kind not in kinds:
        raise failure("KG040", f"--{kind}", f"{target} has none", f"it has {', '.join(kinds)}")
    chosen = [case for case in found if case.probe.name == found[0].probe.name]
    texts: dict[str, str] = {}
    for case, text in zip(chosen, _compiled(lambda c: c.compile().asm[kind], chosen), strict=True):
        if isinstance(text, Fault):
            raise failure("KG050", case.family.spec, f"{case} for {target}: {text.reason}")
        texts[case.row.kernel] = text
    return texts


def _turn(lock: Lock) -> tuple[int, int]:
    """The turn of this check, and how many there are: two a release in the lock, of which every lock has the other."""
    releases = sorted(lock.sections)
    if triton.__version__ not in releases:
        return 0, 1
    which = zlib.crc32(repr(lock.sections).encode()) % _TURNS
    return _TURNS * releases.index(triton.__version__) + which, _TURNS * len(releases)


def _usage(case: Case) -> Usage:
    return usage(case.compile(), case.target)


def _compiled(
    function: Callable[[Case], _Result],
    wanted: Sequence[Case],
    workers: int = 1,
    progress: Progress = no_progress,
    keep: Callable[[Case, _Result | Fault], None] = lambda case, result: None,
) -> list[_Result | Fault]:
    """``function`` of every case, where Triton keeps what it makes for as long as that takes.

    Each target has processes of its own: Triton 3.6 converts FP8 as the first target of a process does, for all others too.
    """
    with tempfile.TemporaryDirectory(prefix="kernelgen") as folder, triton.knobs.cache.scope():
        triton.knobs.cache.dir = folder
        return in_processes(function, wanted, workers, progress, keep, lambda case: case.target.name)


def _limits(case: Case, outcome: Outcome) -> Iterator[Diagnostic]:
    where, target = Location(case.family.location.path), case.target
    if isinstance(outcome, Fault):
        message = f"{case} does not compile for {target.name}: {outcome.reason}"
        yield Diagnostic("KG050", where, message)
        return
    spill, allowed = outcome.spill_bytes, case.family.resources.max_spill_bytes
    if spill > allowed:
        message = f"{case} spills {spill} bytes a lane for {target.name}; allowed are {allowed}"
        hint = "take smaller tiles or more warps, or raise resources.max_spill_bytes"
        yield Diagnostic("KG051", where, message, hint)
    if outcome.shared_bytes > target.program_shared:
        has = f"{target.name} has {target.program_shared}"
        message = f"{case} takes {outcome.shared_bytes} bytes of shared memory; {has}"
        yield Diagnostic("KG052", where, message, "take smaller tiles or fewer stages")


def _lines(known: Iterable[Case]) -> dict[str, Row]:
    """The line of the lock that a kernel has, by digest: the first of those that are the same."""
    lines: dict[str, Row] = {}
    for case in known:
        if not case.probe.is_tuned:
            lines.setdefault(case.digest, case.row)
    return lines


def _figures(outcomes: Iterable[tuple[Case, Outcome]], lines: Mapping[str, Row]) -> Section:
    section: Section = {}
    for case, outcome in outcomes:
        if isinstance(outcome, Usage) and not case.probe.is_tuned:
            section.setdefault(lines[case.digest], {})[case.target.name] = outcome.locked
    return section


def _merged(before: Section, now: Section) -> Section:
    """Both, the later where they meet."""
    return {row: before.get(row, {}) | now.get(row, {}) for row in {**before, **now}}
