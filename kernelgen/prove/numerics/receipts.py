"""Receipts of numerics: the terms of what each kernel's text makes, kept in ``numerics.lock``, and what has changed of them.

A receipt is of one case of exact algebra on one text: small, with several steps of each loop and a part of a tile at its end.
It has the different terms among some numbers of each result: rows with and without an adapter have one each.
"""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import functools
import hashlib
import json
import re
import sys
import threading
import time
from pathlib import Path
from types import FrameType, ModuleType
from typing import TYPE_CHECKING, Any, Iterator, Mapping, NamedTuple, Sequence

import numpy as np

from kernelgen.core import names
from kernelgen.core.diagnostics import Diagnostic, failure, os_failure
from kernelgen.core.model import SCHEDULE, Location
from kernelgen.core.processes import Fault, Progress, in_processes, no_progress
from kernelgen.core.read import parse_json, read_file
from kernelgen.core.write import replace_file
from kernelgen.emit.rooms import laboratory, serve
from kernelgen.families.case import Case, Variant
from kernelgen.prove.numerics.terms import difference, text
from kernelgen.prove.testing import Suite
from kernelgen.prove.verify import is_named, nothing_named, start_worker, suites

if TYPE_CHECKING:  # they import triton, which a worker tells first whether to interpret
    from kernelgen.prove.numerics.tape import Node, Tape

FILE = "numerics.lock"  # beside the folder generated
SCHEMA_VERSION = 1
ACCEPT = "if this is meant, accept it with kernelgen numerics --update"
_SAMPLE = 6  # numbers of each result whose terms are looked at
_GOLDEN = 0.618  # of a result: they lie in rows and columns of all kinds

Terms = tuple[str, ...]
Receipts = dict[tuple[str, str], Terms]  # by variant and case
_Task = tuple[str, str, str]  # family, variant, case


def terms(tape: Tape, *, sample: int | None = _SAMPLE, tiles: bool = True) -> Terms:
    """The different terms of what was made, each behind the name of the operand that it went to.

    Args:
        sample: of so many numbers of each result; None: of one of every row that a program stored.
        tiles: with the tiles of products of matrices.

    Raises:
        Lost: a term has no form that could be told.
    """
    from kernelgen.prove.numerics.trace import trace

    made: dict[str, None] = {}
    for name, stores in _results(tape).items():
        for node, lane in _first_of_rows(stores) if sample is None else _some(stores, sample):
            term = text(trace(tape, node, lane, tiles))
            made[f"{name}: {'' if tape.fused else 'each rounded by itself: '}{term}"] = None
    return tuple(made)


_Stores = list[tuple["Node", Any]]  # nodes, and their lanes that were stored


def _results(tape: Tape) -> dict[str, _Stores]:
    found: dict[str, _Stores] = {}
    for node, lanes, addresses in tape.results():
        if addresses.size:
            found.setdefault(tape.name_of(int(addresses[0])), []).append((node, lanes))
    return dict(sorted(found.items()))


def _some(stores: _Stores, sample: int) -> Iterator[tuple[Node, int]]:
    ends = np.cumsum([lanes.size for _, lanes in stores])
    for place in np.unique((np.arange(sample) * _GOLDEN % 1 * ends[-1]).astype(np.int64)):
        number = int(np.searchsorted(ends, place, side="right"))
        node, lanes = stores[number]
        yield node, int(lanes[place - ends[number]])


def _first_of_rows(stores: _Stores) -> Iterator[tuple[Node, int]]:
    for node, lanes in stores:
        width = node.shape[-1] if node.shape else 1
        _, firsts = np.unique(lanes // width, return_index=True)
        yield from ((node, int(lane)) for lane in lanes[firsts])


def fingerprint(term: str) -> str:
    """What a line of the lock names a term by."""
    return hashlib.sha256(term.encode()).hexdigest()[:12]


def changes(old: Terms, new: Terms) -> Iterator[str]:
    """What is no more, and what is instead: the first place where they differ, then both."""
    gone, come = [term for term in old if term not in new], [term for term in new if term not in old]
    for was, now in zip(gone, come, strict=False):
        yield f"{difference(was, now)}\n  was {was}\n  is  {now}"
    for term in gone[len(come) :]:
        yield f"there is no more {term}"
    for term in come[len(gone) :]:
        yield f"new is {term}"


def read(file: Path) -> Receipts:
    """The receipts of a lock; none where there is no file.

    Raises:
        Failure: it is no such file; exit code 2.
    """
    try:
        document = parse_json(read_file(file))
        if document["schema_version"] != SCHEMA_VERSION:
            raise ValueError(f"wanted schema_version {SCHEMA_VERSION}")
        known = document["terms"]
        return {
            (variant, case): tuple(known[name] for name in of.split())
            for variant, cases in document["variants"].items()
            for case, of in cases.items()
        }
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise os_failure(error, file) from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        hint = "restore it, or remove it and run kernelgen numerics --update"
        raise failure("KG072", str(file), f"no lock of numerics: {type(error).__name__}: {error}", hint) from None


def write(file: Path, receipts: Receipts) -> None:
    """Replace the lock: a line a term, and a line a variant."""
    known = {fingerprint(term): term for of in receipts.values() for term in of}
    variants: dict[str, dict[str, str]] = {}
    for (variant, case), of in sorted(receipts.items()):
        variants.setdefault(variant, {})[case] = " ".join(map(fingerprint, of))

    def block(entries: Mapping[str, Any]) -> str:
        return "{\n" + ",\n".join(f"{json.dumps(name)}: {json.dumps(entry)}" for name, entry in entries.items()) + "\n}"

    lines = f'"schema_version": {SCHEMA_VERSION},\n"terms": {block(dict(sorted(known.items())))},\n"variants": {block(variants)}'
    try:
        replace_file(file, "{\n" + lines + "\n}\n")
    except OSError as error:
        raise os_failure(error, file) from None


@functools.lru_cache(4)
def _locked(file: Path, changed: float) -> Receipts:
    return read(file)


def compare(package: ModuleType, variant: str, case: str, tape: Tape) -> None:
    """Raise AssertionError if a variant of a package beside a lock has other terms on a case than the lock has."""
    file = Path(str(package.__file__)).resolve().parent.parent / FILE
    if not file.exists():
        return
    known = _locked(file, file.stat().st_mtime).get((variant, case), ())
    if set(known).issuperset(terms(tape, sample=2)):
        return
    told = "\n".join(changes(known, terms(tape)))
    how = "have changed" if known else f"are not in {FILE}"
    assert not told, f"numerics of {variant} on {case} {how}: {told}\n{ACCEPT}"


@dataclasses.dataclass(frozen=True)
class Result:
    """What ``run`` found: receipts, and what the lock has otherwise."""

    receipts: Receipts
    findings: Sequence[Diagnostic]
    seconds: float

    def as_json(self) -> dict[str, Any]:
        """The fields of a report."""
        return {
            "receipts": [{"variant": v, "case": case, "terms": list(of)} for (v, case), of in self.receipts.items()],
            "findings": [finding.as_json() for finding in self.findings],
            "seconds": round(self.seconds, 1),
        }

    def summary(self) -> str:
        """One line for a reader."""
        different = len({term for of in self.receipts.values() for term in of})
        return f"{len(self.receipts)} receipts with {different} terms in {self.seconds:.0f} s, {len(self.findings)} findings"


def run(
    out: Path,
    specs: Path,
    *,
    only: str | None = None,
    update: bool = False,
    workers: int = 1,
    progress: Progress = no_progress,
) -> Result:
    """Trace kernels of the package in ``out``, and compare them with the lock beside it, or accept them.

    Args:
        only: a glob on the names of variants; receipts of others stay as they are.
        update: write what was found.

    Raises:
        Failure: nothing has such a name, or the lock cannot be read or written; exit code 2.
    """
    start = time.monotonic()
    pairs = [(v, case) for suite in suites(out).values() for v in suite.variants for case in suite.exact_cases(v)]
    tasks: list[_Task] = [(variant.family, variant.name, case.name) for variant, case in pairs if is_named(variant, only)]
    if not tasks:
        raise nothing_named(out, only)
    for family in {family for family, _, _ in tasks}:
        laboratory(family, "cases", specs)
    known = read(out / FILE)
    work = functools.partial(_run, out.resolve(), specs.resolve())
    receipts: Receipts = {}
    findings: list[Diagnostic] = []
    ran, sums = set[Sum](), dict[Sum, str]()
    for (_, variant, case), found in zip(tasks, in_processes(work, tasks, workers, progress, method="spawn"), strict=True):
        if isinstance(found, (Fault, str)):
            said = found.reason if isinstance(found, Fault) else found
            findings.append(Diagnostic("KG060", Location(variant), f"{case}: {said}"))
            continue
        receipts[variant, case] = found.terms
        ran |= found.ran
        sums |= dict.fromkeys(found.sums, variant)
        told = list(changes(known.get((variant, case), ()), receipts[variant, case]))
        if told and not update:
            findings.append(Diagnostic("KG065", Location(FILE), f"{variant} on {case}: " + "\n".join(told), ACCEPT))
    everything = {(variant.name, case.name) for variant, case in pairs}
    if update:
        write(out / FILE, {pair: of for pair, of in known.items() if pair in everything} | receipts)
    elif only is None:
        for missing in sorted(sums.keys() - ran):
            said = f"{sums[missing]}: no case comes to a sum of {missing.kernel}: {missing.statement}"
            findings.append(Diagnostic("KG065", Location(FILE), said, "write a case in EXACT whose tiles come there"))
        for variant, case in sorted(known.keys() - everything):
            findings.append(Diagnostic("KG065", Location(FILE), f"{variant} on {case}: there is no such kernel any more", ACCEPT))
    return Result(receipts, findings, time.monotonic() - start)


@dataclasses.dataclass(frozen=True)
class Explanation:
    """The terms of a variant by cases, as ``kernelgen explain --numerics`` tells them."""

    variant: str
    cases: Mapping[str, Terms]

    def as_json(self) -> dict[str, Any]:
        """The fields of a report."""
        told = {case: [{"fingerprint": fingerprint(term), "term": term} for term in of] for case, of in self.cases.items()}
        return {"variant": self.variant, "cases": told}

    def lines(self) -> Iterator[str]:
        """The same for a reader."""
        yield self.variant
        for case, of in self.cases.items():
            for term in of:
                name, _, told = term.partition(": ")
                yield ""
                yield f"{name}, case {case}, {fingerprint(term)}"
                yield from (f"  {part}" for part in told.split("; "))
        yield ""
        yield from _LEGEND


_LEGEND = (
    "dot_T(i by 64: x * y)   products over a dimension in tiles of 64, each added to the sum of those in front of it, in fp32;",
    "                        inside of a tile the order is that of the matrix unit. in 64: one tile; at 64n: where it begins",
    "sum(i in 64: ...)       one reduction; its order is the compiler's, and the same whenever the tile is",
    "sum n(...), each n(...) terms for n = 0, 1, ..., one after the other from the left",
    "bf16(...)               rounded; all else is fp32. A dot in a place is a row or column of the number's own",
)


def explain(out: Path, specs: Path, variant: str) -> Explanation:
    """Trace a variant on its cases of exact algebra.

    Raises:
        Failure: it has none, or it is wrong; exit code 2.
    """
    suite, found = next((s, v) for s in suites(out).values() for v in s.variants if v.name == variant)
    cases = suite.exact_cases(found)
    if not cases:
        raise failure("KG061", variant, "it makes whole numbers alone, which have no order of sums")
    work, tasks = functools.partial(_run, out.resolve(), specs.resolve()), [(found.family, variant, case.name) for case in cases]
    made: dict[str, Terms] = {}
    for case, told in zip(cases, in_processes(work, tasks, 1, no_progress, method="spawn"), strict=True):
        if isinstance(told, (Fault, str)):
            raise failure("KG060", variant, f"{case}: {told.reason if isinstance(told, Fault) else told}")
        made[case.name] = told.terms
    return Explanation(variant, made)


class Sum(NamedTuple):
    """A statement of kernels that adds: of a family and schedule, in a kernel without the name of its variant."""

    schedule: str
    kernel: str
    statement: str


class Traced(NamedTuple):
    """What a case tells: terms, the statements of the text that add, and those to which it came."""

    terms: Terms
    sums: set[Sum]
    ran: set[Sum]


def sums_of(source: str, variant: Variant) -> list[tuple[range, Sum]]:
    """The statements of a text that add numbers, and their lines."""
    found, schedule = [], f"{variant.family} {variant.tags.get(SCHEDULE, '')}"
    for kernel in ast.parse(source).body:
        if isinstance(kernel, ast.FunctionDef) and kernel.decorator_list:
            name = kernel.name.removeprefix(variant.name).strip("_")
            for node in ast.walk(kernel):
                if isinstance(node, (ast.Assign, ast.AugAssign)) and node.end_lineno is not None and _adds(node):
                    found.append((range(node.lineno, node.end_lineno + 1), Sum(schedule, name, ast.unparse(node))))
    return found


def _adds(node: ast.Assign | ast.AugAssign) -> bool:
    """Whether a statement adds numbers: a product of matrices, a reduction, += of a load or a sum, a list of sums that go on."""
    said = ast.unparse(node.value)
    if re.search(r"\b(dot|sum|warpgroup_mma)\(", said):
        return True
    if isinstance(node, ast.AugAssign):
        counts = re.search(r"STRIDE|BLOCK|_tile$|^1$|,\)$|_slices|minimum|zeros_like", said)  # addresses, places, tuples
        return isinstance(node.op, ast.Add) and counts is None
    return isinstance(node.value, ast.ListComp) and re.search(r"\] \+ \w+\[", said) is not None


@contextlib.contextmanager
def _lines_of(path: Path) -> Iterator[set[int]]:
    """Inside, the lines of a module that run are noted, whichever thread runs them."""
    noted: set[int] = set()

    def inside(frame: FrameType, event: str, _: Any) -> Any:
        if event == "line":
            noted.add(frame.f_lineno)
        return inside

    def called(frame: FrameType, event: str, _: Any) -> Any:
        return inside if frame.f_code.co_filename.endswith(f"/{path.parent.name}/{path.name}") else None

    before = sys.gettrace()
    threading.settrace(called)
    sys.settrace(called)
    try:
        yield noted
    finally:
        sys.settrace(before)
        threading.settrace(before)


def trace_case(suite: Suite, variant: Variant, case: Case, text: Path) -> Traced:
    """Trace a case of a variant whose kernels are in a module.

    Raises:
        Lost: a term has no form that could be told.
        AssertionError: the variant is wrong.
    """
    from kernelgen.prove.numerics.tape import taped

    sums = sums_of(text.read_text("utf-8"), variant)
    with taped() as tape, _lines_of(text) as lines:
        suite.check(variant, case, "cpu")
    return Traced(terms(tape), {each for _, each in sums}, {each for own, each in sums if not lines.isdisjoint(own)})


def _run(out: Path, specs: Path, task: _Task) -> Traced | str:
    start_worker(out, "cpu")
    serve(specs)
    family, variant, case = task
    suite = suites(out)[family]
    known = next(each for each in suite.variants if each.name == variant)
    met = next(each for each in suite.exact_cases(known) if each.name == case)
    try:
        return trace_case(suite, known, met, out / names.family_path(family, known.module))
    except Exception as error:  # a kernel can fail in any way
        return f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"
