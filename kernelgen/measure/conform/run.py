"""The cases and the exact algebra of this package, pointed at somebody else's kernels: what of theirs is not as the op is.

An adapter is a module with ``ADAPTERS``: for each family that the system has an op of, how a call of ours is made as theirs.
Kernels are interpreted, with the checks that this package's own have: numbers against the fp64 reference, elements in the field,
bounds, 32-bit offsets that wrap, writes outside of live rows. Each finding comes with a file that makes the call again, which
needs the system, torch and triton alone on a GPU.
"""

from __future__ import annotations

import base64
import collections
import contextlib
import dataclasses
import functools
import importlib
import importlib.util
import io
import sys
import time
import traceback
from pathlib import Path
from typing import Any, Callable, Iterator, Mapping, NamedTuple, Sequence
from unittest import mock

import torch
from torch.utils._pytree import tree_leaves, tree_map

from kernelgen.core.diagnostics import Diagnostic, failure
from kernelgen.core.model import Location
from kernelgen.core.processes import Progress, no_progress
from kernelgen.families import case as cases
from kernelgen.families.case import Case, Tags, Variant
from kernelgen.measure.workload import Unsupported
from kernelgen.prove.memory import beside, hints_hold
from kernelgen.prove.testing import Suite
from kernelgen.prove.verify import is_named, start_worker, suites

SYSTEMS = ("vllm", "sglang")
_EMBEDDED = 2**20  # bytes of operands that a file may hold


class Adapter(NamedTuple):
    """How calls of a family are made as those of another system.

    Attributes:
        calls: by what they are called in a report. A call gets the tags of a variant and the operands of its launcher; it raises
            ``Unsupported`` where the system does not claim to serve such operands.
        only: axis -> the tags that the system claims to serve.
        forget: what is remembered between calls of different cases, where it is not meant to be; called before each.
    """

    calls: Mapping[str, Callable[..., None]]
    only: Mapping[str, Sequence[str]] = {}
    forget: Callable[[], None] = lambda: None


@dataclasses.dataclass(frozen=True)
class Finding:
    """A call of another system that is not as the op is.

    Attributes:
        variant: of this package, which states the op.
        error: what is wrong: how many elements, where the worst of them is, its value, and what was wanted; or what was raised.
        file: makes the call again; empty where its operands are too large for one.
    """

    system: str
    call: str
    variant: str
    case: str
    why: str
    seed: int
    error: str
    file: str = ""


@dataclasses.dataclass(frozen=True)
class Result:
    """What ``run`` found out: ``met`` counts calls, ``unclaimed`` those that the system does not claim to serve."""

    system: str
    met: int
    unclaimed: int
    found: Sequence[Finding]
    seconds: float

    @property
    def findings(self) -> list[Diagnostic]:
        """What the system does otherwise."""
        return [Diagnostic("KG073", Location(f.call), f"{f.case} as {f.variant}: {f.error}", f.file) for f in self.found]

    def as_json(self) -> dict[str, Any]:
        """The fields of a report."""
        return {**dataclasses.asdict(self), "findings": [finding.as_json() for finding in self.findings]}

    def summary(self) -> str:
        """One line for a reader."""
        kinds = collections.Counter(finding.call for finding in self.found)
        told = "; ".join(f"{call} {count}" for call, count in kinds.items())
        return (
            f"{self.system}: {self.met} calls in {self.seconds:.0f} s, {len(self.found)} not as the op is"
            f"{f' ({told})' if told else ''}, {self.unclaimed} that it does not claim to serve"
        )


@dataclasses.dataclass
class _Call:
    """A call of theirs: its arguments as they were, and as they are."""

    module: str
    function: str
    before: tuple[Any, ...]
    after: tuple[Any, ...]
    named: tuple[str, ...]


_made: list[_Call] = []


def theirs(module: str, function: str, *arguments: Any, **named: Any) -> None:
    """Call a function of the system, which reaches all tensors among its arguments; for adapters."""
    values = (*arguments, *named.values())
    held = [value for value in tree_leaves(values) if isinstance(value, torch.Tensor)]
    size = sum(tensor.untyped_storage().nbytes() for tensor in held)
    before = tree_map(_Copies(_made), values) if size <= _EMBEDDED else ()
    _made.append(_Call(module, function, before, values, tuple(named)))
    token = beside.set([tensor for tensor in held if tensor.numel() and tensor.device.type == "cpu"])
    told = hints_hold.set(False)  # of columns modulo N systems say that they are consecutive, and drop those that are not
    try:
        getattr(importlib.import_module(module), function)(*arguments, **named)
    finally:
        hints_hold.reset(told)
        beside.reset(token)


def adapters_of_tokens(route: Any, device: torch.device) -> torch.Tensor:
    """The adapter of each token of a dense layer [T], -1 where it has none, from the blocks of a route; for adapters."""
    mapping = torch.full((route.num_tokens,), -1, dtype=torch.int32, device=device)
    for adapter, _, first, rows in route.blocks[: int(route.num_blocks)].tolist():
        listed = route.pairs[first : first + rows]
        mapping[listed[listed < route.num_tokens].long()] = adapter
    return mapping


class _Copies:
    """Copies tensors; one that an earlier call had, and that is as it was, is the same copy."""

    def __init__(self, made: Sequence[_Call]) -> None:
        self._known: list[tuple[Any, Any]] = []
        for call in made:
            self._known += zip(tree_leaves(call.after), tree_leaves(call.before), strict=False)

    def __call__(self, value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        for after, before in self._known:
            if after is value and isinstance(before, torch.Tensor) and _same_bits(before, value):
                return before
        copy = value.clone()
        self._known.append((value, copy))
        return copy


def _same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.shape == other.shape and one.dtype == other.dtype and torch.equal(_bits(one), _bits(other))


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.uint8) if tensor.dim() else tensor.reshape(1).view(torch.uint8)


def run(
    system: str,
    out: Path,
    *,
    path: Path | None = None,
    only: str | None = None,
    files: Path | None = None,
    progress: Progress = no_progress,
) -> Result:
    """Meet a system with the cases.

    Args:
        system: a name in ``SYSTEMS``, or the path of a Python file that has ``ADAPTERS``.
        out: the folder that holds generated/ and tests/generated/.
        path: the folder in which the system lies, if it is not installed.
        only: a glob on the names of variants.
        files: the folder that gets a file for each finding.

    Raises:
        Failure: there is no such system, it cannot be imported, or no variant has such a name; exit code 2.
    """
    if path is not None and not path.is_dir():
        raise failure("KG001", str(path), "not a folder", "give the one in which the system's sources lie")
    start_worker(out, "cpu")
    begin = time.monotonic()
    found_in = [] if path is None else [str(path)]
    with mock.patch.object(sys, "path", [*found_in, *sys.path]):
        adapters = _adapters(system)
        tasks = [task for family, adapter in adapters.items() for task in _tasks(suites(out)[family], adapter, only)]
        met, unclaimed, found = 0, 0, []
        label = Path(system).stem
        for suite, adapter, call, variant, case in progress(tasks, len(tasks)):
            for exactly in (False, True) if case in suite.exact_cases(variant) else (False,):
                try:
                    finding = _meet(label, suite, adapter, call, variant, case, exactly, files)
                except Unsupported:
                    unclaimed += 1
                    continue
                met += 1
                found += [] if finding is None else [finding]
    return Result(label, met, unclaimed, found, time.monotonic() - begin)


def _adapters(system: str) -> Mapping[str, Adapter]:
    try:
        if system in SYSTEMS:
            module = importlib.import_module(f"{__package__}.{system}")
        else:
            spec = importlib.util.spec_from_file_location(Path(system).stem, system)
            if spec is None or spec.loader is None:
                raise ImportError("it is no Python file")
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
        adapters: Mapping[str, Adapter] = module.ADAPTERS
    except (ImportError, OSError, AttributeError) as error:
        hint = f"a name of {', '.join(SYSTEMS)}, whose kernels are installed or lie in --path; or a file that has ADAPTERS"
        raise failure("KG071", system, f"it cannot be imported: {error}", hint) from error
    return adapters


_Task = tuple[Suite, Adapter, str, Variant, Case]


def _tasks(suite: Suite, adapter: Adapter, only: str | None) -> Iterator[_Task]:
    """Every call with every case for each schedule and each kind of scales; dtypes, flags and ranks take turns."""
    claimed = [
        variant
        for variant in suite.variants
        if is_named(variant, only) and all(variant.tags.get(axis) in tags for axis, tags in adapter.only.items())
    ]
    met: dict[tuple[Any, ...], list[Variant]] = {}
    for variant in claimed:
        for case in dict.fromkeys((*suite.cases_for(variant), *suite.exact_cases(variant))):
            met.setdefault((case, *(variant.tags.get(axis) for axis in _FORMS)), []).append(variant)
    turns: collections.Counter[Variant] = collections.Counter()
    for (case, *_), variants in met.items():
        variant = min(variants, key=turns.__getitem__)
        turns[variant] += 1
        for name in adapter.calls:
            yield suite, adapter, name, variant, case


_FORMS = ("schedule", "weight_quant", "act_quant")


def _meet(
    system: str, suite: Suite, adapter: Adapter, name: str, variant: Variant, case: Case, exactly: bool, files: Path | None
) -> Finding | None:
    """Make a call of a case; what is wrong with it."""
    package = importlib.import_module(suite.package)
    call = functools.partial(_as_ours, adapter.calls[name], variant.tags)
    launcher = functools.wraps(variant.launcher(package))(lambda *given, **named: call(*given, **named))
    adapter.forget()
    _made.clear()
    compared: list[tuple[torch.Tensor, torch.Tensor]] = []
    from kernelgen.prove.exact import Lost, exact_algebra

    algebra = exact_algebra() if exactly else _noting(compared)
    try:
        with algebra:
            suite.check_launcher(package, launcher, variant, case, "cpu")
        return None
    except Unsupported:
        raise
    except Lost as error:
        raise Unsupported(str(error)) from error
    except Exception as error:  # another's kernels can fail in any way
        wrong = isinstance(error, AssertionError) and str(error) and error.__cause__ is None
        cause: BaseException = error
        while cause.__cause__ is not None:  # the interpreter wraps what a kernel raises
            cause = cause.__cause__
        said = " ".join(str(cause).split())[:400]
        if exactly and wrong and not said.startswith("exact algebra"):
            return None  # off in numbers alone, which was found without: it rounds elsewhere
        told = said if wrong else f"{type(cause).__name__}: {said or _line(cause)}"
    file = ""
    if files is not None and _made and all(call.before for call in _made):
        text = _reproduction(system, name, variant, case, told, _place(compared))
        path = files / f"{system}_{name.replace(' ', '_')}_{variant.name}_{case.name}.py"
        files.mkdir(parents=True, exist_ok=True)
        path.write_text(text, "utf-8")
        file = str(path)
    return Finding(system, name, variant.name, case.name, case.why, case.seed, told, file)


def _line(error: BaseException) -> str:
    """Of the source that raised it, where it says nothing itself."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{Path(frame.filename).name}, line {frame.lineno}: {frame.line}"


def _as_ours(call: Callable[..., None], tags: Tags, *operands: Any, config: Any = None, **named: Any) -> None:
    call(tags, *operands, **named)


@contextlib.contextmanager
def _noting(compared: list[tuple[torch.Tensor, torch.Tensor]]) -> Iterator[None]:
    token = cases.also_compare.set(lambda actual, exact: compared.append((actual.clone(), exact.clone())))
    try:
        yield
    finally:
        cases.also_compare.reset(token)


class _Place(NamedTuple):
    """An element of an argument of theirs, and what it should be."""

    argument: int
    place: tuple[int, ...]
    got: float
    wanted: float


def _place(compared: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> _Place | None:
    """Where the worst element that was compared lies among their arguments: where its row is."""
    if not compared:
        return None
    actual, exact = compared[-1]
    error = (actual.double() - exact).abs().nan_to_num(torch.inf)
    worst = tuple(int(i) for i in torch.unravel_index(error.argmax(), error.shape))
    row, width = _bits(actual[worst[:-1]]), actual.shape[-1]
    leaves = enumerate(zip(tree_leaves(_made[-1].before), tree_leaves(_made[-1].after), strict=False))
    for number, (before, tensor) in leaves:
        if isinstance(tensor, torch.Tensor) and tensor.dtype == actual.dtype and not _same_bits(before, tensor):
            for first in range(tensor.shape[-1] - width + 1):
                window = tensor[..., first : first + width]
                same = (window.contiguous().view(torch.uint8) == row).all(-1).nonzero()
                if len(same):
                    index = (*same[0].tolist(), first + worst[-1])
                    return _Place(number, index, float(actual[worst]), float(exact[worst]))
    return None


def _reproduction(system: str, name: str, variant: Variant, case: Case, told: str, place: _Place | None) -> str:
    """A file that makes the calls again."""
    buffer = io.BytesIO()
    torch.save([call.before for call in _made], buffer)
    packed = base64.b64encode(buffer.getvalue()).decode()
    lines = "\n".join(packed[i : i + 120] for i in range(0, len(packed), 120))
    calls, last = [], _made[-1]
    for i, call in enumerate(_made):
        split = len(call.before) - len(call.named)
        named = f", **dict(zip({call.named}, calls[{i}][{split}:]))" if call.named else ""
        calls.append(f"importlib.import_module({call.module!r}).{call.function}(*calls[{i}][:{split}]{named})")
    shown = ""
    if place is not None:
        shown = f"""
out = tree_leaves(calls[{len(_made) - 1}])[{place.argument}]
print("{last.function}: argument {place.argument} at {place.place}: got", float(out[{place.place}]), "wanted {place.wanted:.9g}")
"""
    return f'''"""{system}, {name}: {case.why}.

Case {case.name} of kernelgen (seed {case.seed}), of the op that {variant.name} states.
{told}
"""

import base64, importlib, io, torch
from torch.utils._pytree import tree_leaves, tree_map

on_gpu = torch.cuda.is_available()
if not on_gpu:  # TRITON_INTERPRET=1; the interpreter of Triton alone is wrong in bfloat16 and FP8
    from kernelgen.prove import interpreter
    interpreter.install()

SAVED = """
{lines}
"""
calls = torch.load(io.BytesIO(base64.b64decode(SAVED)), weights_only=True)
if on_gpu:
    moved = {{}}
    tensors = [leaf for leaf in tree_leaves(calls) if isinstance(leaf, torch.Tensor)]
    moved = {{id(t): t if t.numel() == 1 and t.dtype in (torch.bool, torch.int32) else t.cuda() for t in tensors}}
    calls = tree_map(lambda leaf: moved.get(id(leaf), leaf), calls)
{chr(10).join(calls)}
{shown}'''
