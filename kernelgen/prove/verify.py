"""The generated tests as a command: every variant on its cases and every law, with the worst error over its bound; or every
variant in exact algebra, where it equals its reference.

What is run is what ``tests/generated`` holds, in processes of their own: Triton interprets or compiles, not both.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import functools
import importlib.util
import os
import sys
import time
import unittest
from pathlib import Path
from typing import Any, Callable, Iterator, Sequence

from kernelgen.core import names
from kernelgen.core.diagnostics import Diagnostic, Failure, did_you_mean, failure
from kernelgen.core.locate import find_specs, place_below, place_in_room
from kernelgen.core.model import Location
from kernelgen.core.processes import Fault, Progress, in_processes, no_progress
from kernelgen.emit.rooms import laboratory, serve
from kernelgen.prove.testing import Suite, Variant

DEVICES = ("cpu", "cuda")
_LAW = "law"
_Task = tuple[str, str]  # family, and the name of a variant or "law"


@dataclasses.dataclass(frozen=True)
class Outcome:
    """One case of a variant, or one law of a family.

    Attributes:
        subject: the name of the variant, or "law".
        case: the name of the case or the law.
        ratio: the worst error over its bound, at most 1.
        error: what is wrong; empty if nothing is.
        skipped: it needs a GPU.
    """

    family: str
    subject: str
    case: str
    ratio: float = 0.0
    error: str = ""
    skipped: bool = False
    seconds: float = 0.0


@dataclasses.dataclass(frozen=True)
class Result:
    """What ``run`` found out."""

    device: str
    outcomes: Sequence[Outcome]
    seconds: float
    exact: bool = False

    @property
    def findings(self) -> list[Diagnostic]:
        """The variants that are wrong."""
        return [
            Diagnostic("KG060", Location(names.test_path(o.family)), f"{o.subject}, {o.case}: {o.error}")
            for o in self.outcomes
            if o.error
        ]

    def as_json(self) -> dict[str, Any]:
        """The fields of a report."""
        return {
            "device": self.device,
            "exact": self.exact,
            "seconds": round(self.seconds, 1),
            "outcomes": [dataclasses.asdict(outcome) for outcome in self.outcomes],
            "findings": [finding.as_json() for finding in self.findings],
        }

    def summary(self) -> str:
        """One line for a reader."""
        ran = [outcome for outcome in self.outcomes if not outcome.skipped]
        wrong = len(self.findings)
        worst = max((outcome.ratio for outcome in ran), default=0.0)
        how = "equal to the reference in exact algebra" if self.exact else f"the largest error is {worst:.3f} of its bound"
        return (
            f"{self.device}: {len(ran)} checks in {self.seconds:.0f} s, {wrong} wrong, "
            f"{len(self.outcomes) - len(ran)} skipped; {how}"
        )

    def table(self) -> tuple[list[tuple[str, ...]], tuple[str, ...]]:
        """For a reader: rows, and what their columns are called."""
        return list(self._rows()), ("variant", "checks", "wrong", "worst error / bound", "in case", "seconds")

    def _rows(self) -> Iterator[tuple[str, ...]]:
        """A line a variant, and one for the laws of a family."""
        subjects: dict[tuple[str, str], list[Outcome]] = {}
        for outcome in self.outcomes:
            if not outcome.skipped:
                subjects.setdefault((outcome.family, outcome.subject), []).append(outcome)
        for (family, subject), outcomes in subjects.items():
            wrong = sum(bool(outcome.error) for outcome in outcomes)
            worst = max(outcomes, key=lambda outcome: outcome.ratio)
            name = f"{family}, laws" if subject == _LAW else subject
            ratio, case = ("", "") if subject == _LAW else (f"{worst.ratio:.3f}", worst.case)
            seconds = f"{sum(outcome.seconds for outcome in outcomes):.1f}"
            yield name, str(len(outcomes)), str(wrong), ratio, case, seconds


def run(
    out: Path,
    *,
    specs: Path | None = None,
    only: str | None = None,
    device: str = "cpu",
    exact: bool = False,
    workers: int = 1,
    progress: Progress = no_progress,
) -> Result:
    """Run the generated tests of the package in ``out``.

    Args:
        out: the folder that holds generated/ and tests/generated/.
        specs: the folder of the specs, beside which rooms may be; None: the usual one.
        only: a glob on the names of variants; laws are then left out.
        device: "cpu" interprets, "cuda" compiles and runs on the GPU.
        exact: instead, every variant on the cases of exact algebra, without laws.
        workers: processes.

    Raises:
        Failure: there is nothing to run, no such device, or a room without cases or laws; exit code 2.
    """
    start = time.monotonic()
    require_device(device)
    tasks = list(_tasks(suites(out), only, exact))
    if not tasks:
        named = {family for family, suite in suites(out).items() if any(is_named(variant, only) for variant in suite.variants)}
        if named:
            message = "no case of these variants is one of exact algebra"
            raise failure("KG040", ", ".join(sorted(named)), message, "say in EXACT of cases.py which are, as other rooms do")
        raise nothing_named(out, only)
    specs = specs or find_specs()
    for family, subject in tasks:
        laboratory(family, "laws" if subject == _LAW else "cases", specs)
    work = functools.partial(_run, out.resolve(), specs.resolve(), device, exact)
    done = in_processes(work, tasks, workers, progress, method="spawn")
    outcomes = [outcome for task, found in zip(tasks, done, strict=True) for outcome in _told(task, found)]
    return Result(device, outcomes, time.monotonic() - start, exact)


@functools.cache
def suites(out: Path) -> dict[str, Suite]:
    """The suites of ``out``/tests/generated, by family.

    Raises:
        Failure: there are none, or they cannot be imported; exit code 2.
    """
    folder = out / names.TESTS
    found = {}
    for file in sorted(folder.glob("test_*.py")):
        spec = importlib.util.spec_from_file_location(f"_verify_{file.stem}", file)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(module)
            found[module.SUITE.family] = module.SUITE
        except Failure:  # of a room
            raise
        except Exception as error:  # a template can be wrong in any way
            where = place_below(error, out.resolve()) or Location(str(file))
            fault = Diagnostic("KG061", where, f"no suite of tests: {type(error).__name__}: {error}")
            raise Failure([fault], exit_code=2) from error
    if not found:
        raise failure("KG001", str(folder), "there are no generated tests", "run kernelgen build")
    return found


def is_named(variant: Variant, only: str | None) -> bool:
    """Whether its name is like ``only``; None: any is."""
    return only is None or fnmatch.fnmatchcase(variant.name, only)


def nothing_named(out: Path, only: str | None) -> Failure:
    """What to raise where no variant has a name like ``only``."""
    known = [variant.name for suite in suites(out).values() for variant in suite.variants]
    hint = did_you_mean(only or "", known, "kernelgen list shows the names")
    return failure("KG040", only or "", "no variant has a name like this", hint)


def require_device(device: str) -> None:
    """Raise Failure where kernels cannot run on it; exit code 2."""
    if device not in DEVICES:
        raise failure("KG061", device, f"no such device; known: {', '.join(DEVICES)}")
    if device == "cuda":
        import torch

        if not torch.cuda.is_available():
            hint = "--device cpu interprets the kernels"
            raise failure("KG061", device, "torch sees no GPU here", hint)


def _tasks(found: dict[str, Suite], only: str | None, exact: bool) -> Iterator[_Task]:
    for family, suite in found.items():
        for variant in suite.variants:
            if is_named(variant, only) and (not exact or suite.exact_cases(variant)):
                yield family, variant.name
        if only is None and not exact:
            yield family, _LAW


@functools.cache
def start_worker(out: Path, device: str) -> None:
    """Make this process one that runs kernels on ``device``; further calls do nothing.

    Raises:
        RuntimeError: triton is here already, and was told otherwise.
    """
    if "triton" in sys.modules and sys.modules["triton"].knobs.runtime.interpret != (device == "cpu"):
        raise RuntimeError("triton was imported before it was told whether to interpret")
    os.environ["TRITON_INTERPRET"] = "1" if device == "cpu" else "0"
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # a process is a core; numpy reads it where it is imported
    sys.path.insert(0, str(out))
    import torch

    torch.set_num_threads(1)
    if device == "cpu":
        from kernelgen.prove import interpreter

        interpreter.install()


def _run(out: Path, specs: Path, device: str, exact: bool, task: _Task) -> list[Outcome]:
    start_worker(out, device)
    serve(specs)
    family, subject = task
    suite = suites(out)[family]
    if subject == _LAW:
        laws = [(law.name, functools.partial(suite.uphold, law, device)) for law in suite.laws]
        return [_outcome(family, subject, name, check) for name, check in laws]
    variant = next(variant for variant in suite.variants if variant.name == subject)
    check: Callable[..., float | None] = suite.check_exactly if exact else suite.check
    cases = suite.exact_cases(variant) if exact else [case for met, case in suite.pairs if met == variant]
    return [_outcome(family, subject, case.name, functools.partial(check, variant, case, device)) for case in cases]


def _told(task: _Task, found: list[Outcome] | Fault) -> list[Outcome]:
    """The outcomes of a task; of one that ended its process, that it did."""
    return [Outcome(*task, "any", error=found.reason)] if isinstance(found, Fault) else found


def _outcome(family: str, subject: str, case: str, check: Callable[[], float | None]) -> Outcome:
    start = time.monotonic()
    ratio, error = 0.0, ""
    try:
        ratio = check() or 0.0
    except unittest.SkipTest:
        return Outcome(family, subject, case, skipped=True)
    except Exception as fault:  # a kernel can fail in any way
        said = " ".join(str(fault).split())
        error = f"{type(fault).__name__}: {said[:500]}"
        if not isinstance(fault, AssertionError) and (place := place_in_room(fault)) is not None:
            error += f", in {place}"
    return Outcome(family, subject, case, ratio, error, seconds=time.monotonic() - start)
