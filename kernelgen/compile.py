"""Compilation of every kernel for every target, without a GPU, and what it costs in registers, spills and shared memory.

A variant is called on its probes as a user would call it; what it would launch is compiled in other processes. Kernels that
differ by name alone are compiled once, and what was measured is remembered in the user's cache folder, so that a second run
compiles what changed. The figures are held against the limits of the spec and the target, and against ``kernels.lock``.

A check compiles everything for the primary target, and for each other one every seventh kernel, from another start each: seven
divides the number of tags of no axis, so the sample meets every body with every flag. The lock itself is written from all.
Tuned tiles, of which there are many and which change with each tuning, are held against the limits alone, not the lock.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import tempfile
from pathlib import Path
from typing import Any, Callable, Iterable, Iterator, Literal, Mapping, Sequence, TypeVar

import triton

from kernelgen import locate
from kernelgen.diagnostics import Diagnostic, failure
from kernelgen.forks import Fault, Progress, in_processes, no_progress
from kernelgen.lock import COLUMNS, FILE, Lock, Section, coverage, drift
from kernelgen.model import Location
from kernelgen.requests import Case, cases, cases_of
from kernelgen.resources import RULES, Usage, usage
from kernelgen.targets import PRIMARY, TARGETS

Mode = Literal["report", "check", "update"]
Outcome = Usage | Fault
_SAMPLE = 7
_Result = TypeVar("_Result")


@dataclasses.dataclass(frozen=True)
class Result:
    """What ``run`` found out: the cases that were compiled, now or earlier, and what is wrong."""

    outcomes: Sequence[tuple[Case, Outcome]]
    skipped: int
    compiled: int
    findings: Sequence[Diagnostic]

    def as_json(self) -> dict[str, Any]:
        """The fields of a report."""
        return {
            "triton": triton.__version__,
            "kernels": [
                {**case.row._asdict(), "target": case.target.name, **dataclasses.asdict(outcome)}
                for case, outcome in self.outcomes
            ],
            "skipped": self.skipped,
            "findings": [finding.as_json() for finding in self.findings],
        }

    def summary(self) -> str:
        """One line for a reader."""
        left_out = f", {self.skipped} left out" if self.skipped else ""
        return (
            f"triton {triton.__version__}: {len(self.outcomes)} kernels, {self.compiled} compiled"
            f" now{left_out}, {len(self.findings)} findings"
        )

    def rows(self) -> Iterator[tuple[str, ...]]:
        """A table for a reader, its head first."""
        yield "variant", "kernel", "probe", "target", *COLUMNS, "instructions"
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
        full: leave nothing out; so it is anyway with ``only`` or ``targets``, and to update.
        workers: processes to compile in.
        progress: shows how far it is.

    Raises:
        Failure: a spec is at fault (exit code 1), or the package or the lock cannot be read (2).
    """
    lock = Lock(out / FILE)
    section = lock.sections.get(triton.__version__)
    complete = only is None and not targets
    known = cases(specs, out, only, targets)
    wanted = known if full or mode == "update" or not complete else list(_sample(known))
    results, compiled = compile_cases(wanted, workers, progress)
    outcomes = [(case, results[case.digest]) for case in known if case.digest in results]

    findings = [finding for case, outcome in outcomes for finding in _limits(case, outcome)]
    if mode == "check":
        findings += drift(lock, triton.__version__, _figures(outcomes))
        rows = [(case.row, case.target.name) for case in known if not case.probe.is_tuned]
        findings += coverage(lock, triton.__version__, rows, complete)
    elif mode == "update":
        before = {} if complete or section is None else section
        lock.sections[triton.__version__] = _merged(before, _figures(outcomes))
        lock.write()
    return Result(outcomes, len(known) - len(outcomes), compiled, findings)


def compile_cases(
    wanted: Iterable[Case], workers: int = 1, progress: Progress = no_progress
) -> tuple[Mapping[str, Outcome], int]:
    """Compile what is not remembered.

    Returns:
        Outcomes by digest, of these cases and of all that are remembered; and how many were compiled now.
    """
    memory = _Memory()
    new = {case.digest: case for case in wanted if case.digest not in memory.known}
    results = _compiled(_usage, list(new.values()), workers, progress)
    memory.add(dict(zip(new, results, strict=True)))
    return memory.known, len(new)


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


def _usage(case: Case) -> Usage:
    return usage(case.compile(), case.target)


def _compiled(
    function: Callable[[Case], _Result],
    wanted: Sequence[Case],
    workers: int = 1,
    progress: Progress = no_progress,
) -> list[_Result | Fault]:
    """``function`` of every case, where Triton keeps what it makes for as long as that takes."""
    with tempfile.TemporaryDirectory(prefix="kernelgen") as folder, triton.knobs.cache.scope():
        triton.knobs.cache.dir = folder
        return in_processes(function, wanted, workers, progress)


def _sample(known: Iterable[Case]) -> Iterator[Case]:
    groups: dict[tuple[str, bool], dict[str, Case]] = {}
    for case in known:
        group = case.target.name, case.probe.is_tuned
        groups.setdefault(group, {}).setdefault(case.digest, case)
    for start, (group, distinct) in enumerate(groups.items()):
        step = 1 if group == (PRIMARY, False) else _SAMPLE
        yield from list(distinct.values())[start % step :: step]


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


def _figures(outcomes: Iterable[tuple[Case, Outcome]]) -> Section:
    section: Section = {}
    for case, outcome in outcomes:
        if isinstance(outcome, Usage) and not case.probe.is_tuned:
            section.setdefault(case.row, {})[case.target.name] = outcome.locked
    return section


def _merged(before: Section, now: Section) -> Section:
    """Both, the later where they meet; targets in their usual order."""
    merged = dict(before)
    for row, found in now.items():
        figures = merged.get(row, {}) | found
        merged[row] = {name: figures[name] for name in TARGETS if name in figures}
    return merged


class _Memory:
    """Outcomes of earlier runs, by digest. Not being able to read or write them costs time, nothing else."""

    def __init__(self) -> None:
        self._file = locate.cache_folder() / f"usage-{triton.__version__}-{RULES}.json"
        self.known: dict[str, Outcome] = {}
        with contextlib.suppress(OSError, ValueError, TypeError, AttributeError):
            remembered = json.loads(self._file.read_text("utf-8"))
            self.known = {digest: Usage(**fields) for digest, fields in remembered.items()}

    def add(self, new: Mapping[str, Outcome]) -> None:
        """Take in what was compiled; a failure is remembered for this run alone."""
        self.known.update(new)
        if not new:
            return
        found = [(key, value) for key, value in self.known.items() if isinstance(value, Usage)]
        kept = {digest: dataclasses.asdict(value) for digest, value in found[-_REMEMBERED:]}
        part = self._file.with_name(f"{self._file.name}.{os.getpid()}")
        with contextlib.suppress(OSError):
            self._file.parent.mkdir(parents=True, exist_ok=True)
            part.write_text(json.dumps(kept), "utf-8")
            part.replace(self._file)


_REMEMBERED = 20_000
