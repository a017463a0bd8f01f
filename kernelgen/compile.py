"""Compilation of every kernel for every target, without a GPU, and what it costs in registers, spills and shared memory.

A variant is called on its probes as a user would call it; what it would launch is compiled in other processes. Kernels that
differ by name alone are compiled once, and what was measured is remembered in the user's cache folder, so that a second run
compiles what changed. The figures are held against the limits of the spec and the target, and against ``kernels.lock``.

A check compiles everything for the primary target, and for each other one every seventh kernel, from another start each: seven
divides the number of tags of no axis, so the sample meets every body with every flag. The lock itself is written from all.
"""

from __future__ import annotations

import ast
import concurrent.futures
import contextlib
import dataclasses
import functools
import hashlib
import inspect
import json
import multiprocessing
import os
import tempfile
import textwrap
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any, Callable, Iterable, Iterator, Literal, Mapping, Sequence, TypeVar, Union

import triton
from triton.runtime.jit import JITFunction

from kernelgen import build, locate
from kernelgen.assemble import select
from kernelgen.diagnostics import Diagnostic, failure
from kernelgen.lock import COLUMNS, FILE, Figures, Lock, Row, Section
from kernelgen.model import Family, Location, Package, Variant
from kernelgen.probes import Probe, probes
from kernelgen.resources import Usage, usage
from kernelgen.stand_in import compiling_for, import_package
from kernelgen.targets import PRIMARY, TARGETS, Target

Mode = Literal["report", "check", "update"]
Progress = Callable[[Iterable[Any], int], Iterable[Any]]  # (items as they get done, how many)
_SAMPLE = 7
_RULES = (
    1  # to be raised when ``usage`` reads something else: remembered figures are then not taken
)
_REMEMBERED = 20_000
_Result = TypeVar("_Result")


@dataclasses.dataclass(frozen=True)
class Case:
    """One kernel of one variant, as one probe launches it on one target."""

    family: Family
    row: Row
    target: Target
    probe: Probe
    request: Any  # the package's CompileRequest
    digest: str  # of everything that the compiler sees

    def __str__(self) -> str:
        return f"{self.row.variant}: kernel {self.row.kernel} on probe {self.row.probe}"


@dataclasses.dataclass(frozen=True)
class Fault:
    """Why a case gave no result."""

    reason: str


Outcome = Union[Usage, Fault]


@dataclasses.dataclass(frozen=True)
class Result:
    """What ``run`` found out: the cases that were compiled, now or earlier, and what is wrong."""

    outcomes: Sequence[tuple[Case, Outcome]]
    skipped: int
    compiled: int
    findings: Sequence[Diagnostic]

    def as_json(self) -> dict[str, Any]:
        """The fields of a report."""
        rows = [
            {
                **case.row._asdict(),
                "target": case.target.name,
                **dataclasses.asdict(outcome),
            }
            for case, outcome in self.outcomes
        ]
        return {
            "triton": triton.__version__,
            "kernels": rows,
            "skipped": self.skipped,
            "findings": [finding.as_json() for finding in self.findings],
        }

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
    progress: Progress = lambda items, total: items,
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
    package = build.package(specs)
    lock = Lock(out / FILE)
    cases = list(_cases(package, import_package(out), only, targets))
    is_all = full or mode == "update" or only is not None or bool(targets)
    known, compiled = compile_cases(cases if is_all else _sample(cases), workers, progress)
    outcomes = [(case, known[case.digest]) for case in cases if case.digest in known]

    findings = [finding for case, outcome in outcomes for finding in _limits(case, outcome)]
    section = lock.sections.get(triton.__version__, {})
    if mode == "check":
        findings += _drift(lock, outcomes)
        findings += _coverage(lock, cases, complete=only is None and not targets)
    elif mode == "update":
        complete = only is None and not targets
        lock.sections[triton.__version__] = _merged({} if complete else section, outcomes)
        lock.write()
    return Result(outcomes, len(cases) - len(outcomes), compiled, findings)


def compile_cases(
    cases: Iterable[Case], workers: int = 1, progress: Progress = lambda items, total: items
) -> tuple[Mapping[str, Outcome], int]:
    """Compile what is not remembered.

    Returns:
        Outcomes by digest, of these cases and of all that are remembered; and how many were compiled now.
    """
    memory = _Memory()
    new = list({case.digest: case for case in cases if case.digest not in memory.known}.values())
    results = _in_processes(new, _usage, workers, progress)
    memory.add(zip((case.digest for case in new), results))
    return memory.known, len(new)


def _usage(case: Case) -> Usage:
    return usage(case.request.compile(), case.target)


def assembly(
    specs: Path, out: Path, variant: str, kind: Literal["ptx", "sass", "amdgcn"], target: str
) -> dict[str, str]:
    """The assembly of the kernels of ``variant`` on its first probe, by kernel.

    Raises:
        Failure: no such variant, or not for this target, or it does not compile; exit code 2.
    """
    found = cases_of(specs, out, variant, target)
    chosen = [case for case in found if case.row.probe == found[0].row.probe]
    texts = _in_processes(chosen, lambda case: case.request.compile().asm[kind], 1)
    for case, text in zip(chosen, texts):
        if isinstance(text, Fault):
            raise failure("KG050", case.family.spec, f"{case} for {target}: {text.reason}")
    return {case.row.kernel: text for case, text in zip(chosen, texts)}


def cases_of(specs: Path, out: Path, variant: str, target: str) -> list[Case]:
    """Every case of one variant on one target.

    Raises:
        Failure: no such variant, or the spec does not declare the target; exit code 2.
    """
    package = build.package(specs)
    family, _ = build.find(package, variant)
    if target not in family.targets:
        declared = ", ".join(family.targets)
        raise failure("KG040", family.spec, f"{target} is not a target of {variant}", declared)
    return list(_cases(package, import_package(out), variant, [target]))


def _cases(
    package: Package, generated: ModuleType, only: str | None, targets: Sequence[str]
) -> Iterator[Case]:
    chosen = select(package, only) if only is not None else package.variants
    families = {family.name: family for family in package.families}
    for name, target in TARGETS.items():
        if targets and name not in targets:
            continue
        with compiling_for(target):
            for variant in chosen:
                if name in families[variant.family].targets:
                    yield from _variant_cases(generated, families[variant.family], variant, target)


def _variant_cases(
    generated: ModuleType, family: Family, variant: Variant, target: Target
) -> Iterator[Case]:
    for probe in probes(generated, family, variant):
        if probe.is_tuned and target.name != PRIMARY:
            continue
        with generated._runtime.compile_only() as requests:
            probe.call()
        for request in requests:
            function = request.launcher.kernel.fn.__name__
            if function.startswith(f"{variant.name}_"):
                kernel = function.removeprefix(f"{variant.name}_")
                row = Row(variant.name, kernel, probe.name)
                yield Case(family, row, target, probe, request, _digest(request, target))


def _digest(request: Any, target: Target) -> str:
    """The same for kernels that differ by their name alone."""
    identity = (
        _RULES,
        triton.__version__,
        target.name,
        _text(request.launcher.kernel),
        request.key[1:],
    )
    return hashlib.sha256(repr(identity).encode()).hexdigest()


def _text(kernel: JITFunction[Any]) -> str:
    return _function_text(kernel.fn, "".join(kernel.raw_src))


@functools.lru_cache(maxsize=None)
def _function_text(function: FunctionType, source: str) -> str:
    """Its syntax, the functions that it calls and the values that it reads, without its name and comments."""
    tree = ast.parse(textwrap.dedent(source).replace(function.__name__, "kernel"))
    parts = [ast.dump(tree)]
    used = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    for name in sorted(used & function.__globals__.keys()):
        value = function.__globals__[name]
        if isinstance(value, JITFunction):
            if not value.fn.__module__.startswith("triton."):
                parts.append(f"{name}: {_text(value)}")
        elif not inspect.ismodule(value) and not callable(value):
            parts.append(f"{name} = {value!r}")
    return "\n".join(parts)


def _sample(cases: Iterable[Case]) -> Iterator[Case]:
    by_target: dict[str, dict[str, Case]] = {}
    for case in cases:
        by_target.setdefault(case.target.name, {}).setdefault(case.digest, case)
    for start, (target, distinct) in enumerate(by_target.items()):
        step = 1 if target == PRIMARY else _SAMPLE
        yield from list(distinct.values())[start % step :: step]


def _limits(case: Case, outcome: Outcome) -> Iterator[Diagnostic]:
    where = Location(case.family.location.path)
    name = case.target.name
    if isinstance(outcome, Fault):
        yield Diagnostic("KG050", where, f"{case} does not compile for {name}: {outcome.reason}")
        return
    allowed = case.family.resources.max_spill_bytes
    if outcome.spill_bytes > allowed:
        message = (
            f"{case} spills {outcome.spill_bytes} bytes a lane for {name}; allowed are {allowed}"
        )
        hint = "take smaller tiles or more warps, or raise resources.max_spill_bytes"
        yield Diagnostic("KG051", where, message, hint)
    if outcome.shared_bytes > case.target.program_shared:
        has = f"{name} has {case.target.program_shared}"
        message = f"{case} takes {outcome.shared_bytes} bytes of shared memory; {has}"
        yield Diagnostic("KG052", where, message, "take smaller tiles or fewer stages")


def _figures(outcomes: Iterable[tuple[Case, Outcome]]) -> Section:
    section: Section = {}
    for case, outcome in outcomes:
        if isinstance(outcome, Usage):
            section.setdefault(case.row, {})[case.target.name] = outcome.locked
    return section


def _merged(section: Section, outcomes: Iterable[tuple[Case, Outcome]]) -> Section:
    """``section`` with what was found; targets in their usual order."""
    merged = dict(section)
    for row, found in _figures(outcomes).items():
        figures = merged.get(row, {}) | found
        merged[row] = {name: figures[name] for name in TARGETS if name in figures}
    return merged


_ACCEPT = "if this is meant, accept it with kernelgen compile --update"


def _drift(lock: Lock, outcomes: Iterable[tuple[Case, Outcome]]) -> Iterator[Diagnostic]:
    section = lock.sections.get(triton.__version__, {})
    for row, now in _figures(outcomes).items():
        was = section.get(row, {})
        changes = [
            f"{target} {column} {before} -> {after}"
            for target, values in now.items()
            for column, before, after in zip(COLUMNS, was.get(target, values), values)
            if before != after
        ]
        if changes:
            message = f"{row.variant}: kernel {row.kernel} on probe {row.probe}: " + ", ".join(
                changes
            )
            yield Diagnostic("KG054", lock.place(triton.__version__, row), message, _ACCEPT)


def _coverage(lock: Lock, cases: Iterable[Case], complete: bool) -> Iterator[Diagnostic]:
    """Rows that the lock lacks, and, where all rows are known, those that it has too many."""
    file = Location(str(lock.file))
    section = lock.sections.get(triton.__version__)
    if section is None:
        message = f"there are no figures for triton {triton.__version__}"
        yield Diagnostic("KG055", file, message, "add them with kernelgen compile --update")
        return
    wanted: dict[Row, set[str]] = {}
    for case in cases:
        wanted.setdefault(case.row, set()).add(case.target.name)
    for row, targets in wanted.items():
        missing = targets - section.get(row, {}).keys()
        if missing:
            yield Diagnostic(
                "KG055", file, f"{row}: no figures for {', '.join(sorted(missing))}", _ACCEPT
            )
    if complete:
        for row in section.keys() - wanted.keys():
            where = lock.place(triton.__version__, row)
            yield Diagnostic("KG055", where, f"{row}: there is no such kernel any more", _ACCEPT)


class _Memory:
    """Outcomes of earlier runs, by digest. Not being able to read or write them costs time, nothing else."""

    def __init__(self) -> None:
        self._file = locate.cache_folder() / f"usage-{triton.__version__}.json"
        self.known: dict[str, Outcome] = {}
        with contextlib.suppress(OSError, ValueError, TypeError):
            remembered = json.loads(self._file.read_text("utf-8"))
            self.known = {digest: Usage(**fields) for digest, fields in remembered.items()}

    def add(self, new: Iterable[tuple[str, Outcome]]) -> None:
        """Take in what was compiled; failures are remembered for this run alone."""
        before = len(self.known)
        self.known.update(new)
        if len(self.known) == before:
            return
        found = [(key, value) for key, value in self.known.items() if isinstance(value, Usage)]
        part = self._file.with_name(f"{self._file.name}.{os.getpid()}")
        with contextlib.suppress(OSError):
            self._file.parent.mkdir(parents=True, exist_ok=True)
            kept = {digest: dataclasses.asdict(value) for digest, value in found[-_REMEMBERED:]}
            part.write_text(json.dumps(kept), "utf-8")
            part.replace(self._file)


# What the processes work on; they are forks, since neither kernels nor functions can be sent.
_work: tuple[Sequence[Case], Callable[[Case], Any]] = ((), str)


def _in_processes(
    cases: Sequence[Case],
    function: Callable[[Case], _Result],
    workers: int,
    progress: Progress = lambda items, total: items,
) -> list[_Result | Fault]:
    """``function`` of every case, in other processes: a compiler may end its process when it fails."""
    global _work
    results: dict[int, _Result | Fault] = {}
    with contextlib.ExitStack() as stack:
        stack.enter_context(triton.knobs.cache.scope())
        triton.knobs.cache.dir = stack.enter_context(
            tempfile.TemporaryDirectory(prefix="kernelgen")
        )
        _work = (cases, function)
        stack.callback(_forget)
        pool = stack.enter_context(_pool(workers))
        futures = {pool.submit(_one, index): index for index in range(len(cases))}
        for future in progress(concurrent.futures.as_completed(futures), len(cases)):
            with contextlib.suppress(BrokenProcessPool):
                results[futures[future]] = future.result()
        for index in sorted(set(range(len(cases))) - results.keys()):
            with _pool(1) as alone:
                try:
                    results[index] = alone.submit(_one, index).result()
                except BrokenProcessPool:
                    results[index] = Fault("the compiler ended its process")
    return [results[index] for index in range(len(cases))]


def _forget() -> None:
    global _work
    _work = ((), str)


def _pool(workers: int) -> concurrent.futures.ProcessPoolExecutor:
    return concurrent.futures.ProcessPoolExecutor(workers, multiprocessing.get_context("fork"))


def _one(index: int) -> Any:
    cases, function = _work
    case = cases[index]
    with compiling_for(case.target), _quiet():
        try:
            return function(case)
        except Exception as error:  # of many kinds, from every pass of the compiler
            said = " ".join(str(error).split())
            return Fault(f"{type(error).__name__}: {said[-300:]}")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """What a failing compiler prints from C++ is no use beside its exception."""
    saved, nothing = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 2)
    try:
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(nothing)
