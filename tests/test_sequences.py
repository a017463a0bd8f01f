"""Calls of every front door in sequences: each does what it does where nothing was called before it, and what dispatch.lock says.

A call is remembered, and found again by what its arguments look like. So each good call is changed in one thing that its op
declares, as far as it can be: another value, dtype, stride, address, slice, field of a route, size of the layer. Both are then
called in turns, either of them first. What a call does is what it launches: kernels, grids, constants, options, and which of
its tensors go where; or how it is refused. Nothing runs.

``dispatch.lock`` has what each of them does, and what calls of the sizes of a real model take: a change of dispatch shows there,
call by call. ``python -m pytest tests/test_sequences.py --renew`` writes it anew.
"""

from __future__ import annotations

import ast
import collections
import contextlib
import dataclasses
import fcntl
import fnmatch
import functools
import hashlib
import importlib
import inspect
import itertools
import re
import traceback
import types
from pathlib import Path
from typing import Any, Iterator, Mapping, NamedTuple, Sequence

import pytest
import torch
import triton
from doors import CHOSEN, EXPERTS, GOOD, Arguments, Door, K, N, by_hand, forget

import generated as kg
from generated import _operands as operands
from generated import _runtime as runtime
from generated import _warmup as warmup
from generated._operands import Bundle, Choice, Flag, Int, Number, Several, Tensor
from generated.moe_align._op import NO_PAIRS
from generated.moe_gemm import _op as gemm
from generated.moe_gemm import _problem as gemm_problem
from generated.moe_route._op import PairRoute
from kernelgen.compiled.stand_in import compiling_for
from kernelgen.compiled.which import BY_SIZES, Answer, Known, which
from kernelgen.core.diagnostics import Failure
from kernelgen.core.targets import TARGETS
from kernelgen.emit import build
from kernelgen.emit.rooms import laboratory, rooms_with
from kernelgen.prove.testing import Suite

FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
# Sizes with which there are strides that say nothing.
SMALL = {"tokens": (1,), "top_k": (1,), "slices": (1,)}
# From where one slice begins to where the next one does: on both sides of what it takes by itself, and column by column.
FAR = (N - 9, N - 1, 2 * N - 19, 2 * N - 17, 2 * N - 3, 2 * N - 1)
# Other sizes of the layer; each by itself.
SIZES = {
    "tokens": (0, 1, 7, 70),
    "top_k": (1, 3),
    "experts": (5,),
    "loras": (1, 4),
    "k": (48, 33),
    "n": (40, 128),
    "rank": (8, 17, 130),
    "slices": (1, 3),
}


@pytest.fixture
def log(device: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """What would have been launched, or made zero, on an H200 with a Triton that has Gluon; nothing is."""
    found: list[Any] = []
    on_host = runtime.OnHost._run

    def run(self: Any, given: Any, scratch: Any = None) -> None:
        if self._function is not torch.Tensor.zero_:
            return on_host(self, given, scratch)
        found.append(runtime._found(self._source, runtime._named(given, self._record), scratch))

    monkeypatch.setattr(runtime.Launcher, "launch", lambda self, *call: found.append((self, *call)))
    monkeypatch.setattr(runtime.OnHost, "_run", run)
    monkeypatch.setattr(NO_PAIRS, "run", NO_PAIRS._run)
    for module in (gemm, gemm_problem):
        monkeypatch.setattr(module, "has_gluon", lambda: True)
    traits = runtime.traits(torch.device(device))._replace(pdl=True, label="h200")
    monkeypatch.setattr(runtime, "traits", lambda of: traits)
    forget()
    yield found
    forget()


@dataclasses.dataclass(frozen=True)
class Lock:
    """``dispatch.lock``: a section for each front door, and in it a line for each call, with a digest of what it does."""

    renews: bool

    def compare(self, section: str, calls: Mapping[str, object]) -> None:
        """Raise AssertionError where a section has other calls, or they did something else."""
        lines = {
            label: f"{hashlib.sha256(str(found).encode()).hexdigest()[:8]} {found.by if isinstance(found, Refused) else '-'}"
            for label, found in calls.items()
        }
        if self.renews:
            with _LOCK.open("a") as held:  # several processes may renew it
                fcntl.flock(held, fcntl.LOCK_EX)
                self._write({**self._sections(), section: lines})
            return
        known = self._sections().get(section, {})
        differs = [label for label in {**known, **lines} if known.get(label) != lines.get(label)]
        told = [f"{label}: {calls.get(label, 'there is no such call')}" for label in differs]
        hint = "if it is meant: python -m pytest tests/test_sequences.py --renew"
        assert not told, f"{section}: {len(told)} calls are not as in dispatch.lock; {hint}\n" + "\n".join(told[:3])

    def refused(self) -> set[str]:
        """The checks that refuse a call."""
        return {line.partition(" ")[2] for section in self._sections().values() for line in section.values()}

    def differs(self, op: str, *labels: str) -> bool:
        """Whether a call of an op, of one of these labels, does otherwise than the usual one."""
        sections = [name for name, (of, *_) in {**GOOD, **CHOSEN}.items() if of == op]
        return any(label in self._sections()[name] for name in sections for label in labels)

    def _sections(self) -> dict[str, dict[str, str]]:
        return _read() if self.renews else _known()

    def _write(self, sections: Mapping[str, Mapping[str, str]]) -> None:
        blocks = ("\n".join([name, *(f"  {of} {label}" for label, of in sections[name].items())]) for name in sorted(sections))
        _LOCK.write_text(_HEAD + "\n".join(blocks) + "\n", "utf-8")


def _read() -> dict[str, dict[str, str]]:
    sections: dict[str, dict[str, str]] = {}
    section: dict[str, str] = {}
    for line in _LOCK.read_text("utf-8").splitlines()[_HEAD.count("\n") :] if _LOCK.exists() else ():
        if line.startswith(" "):
            digest, by, label = line.strip().split(" ", 2)
            section[label] = f"{digest} {by}"
        elif line:
            section = sections[line] = {}
    return sections


_known = functools.cache(_read)
_LOCK = Path(__file__).with_name("dispatch.lock")
_HEAD = """\
# What front doors do with the calls of tests/test_sequences.py: a digest of launches, or of words and the check that refuses.
# Calls that do as the usual one are left out. Renewed by: python -m pytest tests/test_sequences.py --renew
"""


@pytest.fixture
def lock(request: pytest.FixtureRequest, device: str) -> Lock:
    """Digests are of what is interpreted: on tensors on the CPU, with the traits of an H200."""
    if device != "cpu":
        pytest.skip("dispatch.lock is of interpreted kernels")
    return Lock(request.config.getoption("--renew"))


Asked = tuple[Door, Arguments]  # a front door, and its arguments


def done(asked: Asked, log: list[Any]) -> Any:
    """What a call does."""
    door, values = asked
    given = {name: _again(value) for name, value in values.items()}
    log.clear()
    try:
        result = door.function(**given)
    except ValueError as error:
        assert not log, f"{error}: launched all the same"
        return Refused(where_of(error), str(error))
    places = {}
    for name, value in given.items():
        for place, tensor in _tensors(name, value):
            places.setdefault(tensor.untyped_storage()._cdata, place)
    return Done([_launch(call, places) for call in log], _said(result, places))


class Done(NamedTuple):
    """What a call does that is not refused."""

    launches: list[Any]
    result: Any

    def __str__(self) -> str:
        lines = [f"{of} x {grid}: {'; '.join(map(_line, named))}" for of, grid, *named in self.launches]
        return "\n".join([*lines, f"returns {self.result}"] if self.result is not None else lines)


class Refused(NamedTuple):
    """Why a call is refused; ``by``: the check that refuses it."""

    by: str
    words: str

    def __str__(self) -> str:
        return self.words


def where_of(error: ValueError) -> str:
    """The check that an error is of."""
    frames = [(frame.f_code, line) for frame, line in traceback.walk_tb(error.__traceback__)]
    code, line = frames[-2] if frames[-1][0].co_name == "fail" else frames[-1]
    return _check_at(code.co_filename, line)


@functools.cache
def _check_at(file: str, line: int) -> str:
    module = Path(file).relative_to(PACKAGE).as_posix()
    return next(name for name, lines in checks()[module].items() if line in lines)


PACKAGE = Path(kg.__file__).parent


@functools.cache
def checks() -> dict[str, dict[str, range]]:
    """By module of host code, every call that refuses: its name, which is the function and what it says there, and its lines."""
    found: dict[str, dict[str, range]] = {}
    for path in [*PACKAGE.glob("_*.py"), *PACKAGE.glob("*/_*.py")]:
        module = path.relative_to(PACKAGE).as_posix()
        functions = [node for node in ast.walk(ast.parse(path.read_text("utf-8"))) if isinstance(node, ast.FunctionDef)]
        inside = {call.lineno: (f.name, call) for f in functions for call in ast.walk(f) if _refuses(call)}
        number: collections.Counter[str] = collections.Counter()
        found[module] = {}
        for line, (function, call) in sorted(inside.items()):
            name = f"{module.removesuffix('.py')}.{function}:{_words(call)}"
            number[name] += 1
            name += "" if number[name] == 1 else f"-{number[name]}"
            found[module][name] = range(line, (call.end_lineno or line) + 1)
    return found


def _words(call: ast.Call) -> str:
    """What a check is of, and what it wants; in one word."""
    said = [ast.unparse(part) for part in (call.args[1:2] + call.args[3:4])]
    return ":".join(re.sub(r"\W+", "-", text).strip("-")[:40] for text in said)


def _refuses(call: ast.AST) -> bool:
    return isinstance(call, ast.Call) and ast.unparse(call.func) in ("fail", "runtime.fail")


def _launch(call: tuple[Any, ...], places: dict[int, str]) -> tuple[Any, ...]:
    """Kernel, grid, operands and constants by name, options."""
    if isinstance(call, torch.Tensor):
        return "zeros", 1, {"of": _said(call, places)}
    launcher, grid, given, fixed, options = call
    code = launcher.kernel.fn.__code__
    own = [name for name in code.co_varnames[: code.co_argcount] if name not in launcher.constants]
    operands = {name: _said(value, places) for name, value in zip(own, given, strict=True)}
    constants = dict(zip(launcher.constants, fixed, strict=True))
    chosen = {name: value for name, value in options._asdict().items() if value != options._field_defaults.get(name)}
    return launcher.kernel.fn.__name__, grid, operands, constants, chosen


def _line(named: dict[str, Any]) -> str:
    return ", ".join(f"{name}={value}" for name, value in named.items())


def _again(value: Any) -> Any:
    """A bundle as it is made anew for each batch: what it looks like is not known yet."""
    if not hasattr(value, "_hang"):
        return value
    made = by_hand(value)
    vars(made).update({name: known for name, known in vars(value).items() if name not in ("looks", "memory")})
    return made


def _tensors(name: str, value: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """(where it is in an argument, it) of each tensor."""
    if isinstance(value, torch.Tensor):
        yield name, value
    elif isinstance(value, (list, tuple)):
        for part, item in zip(getattr(value, "_fields", range(len(value))), value, strict=True):
            yield from _tensors(f"{name}.{part}", item)


def _said(value: Any, places: dict[int, str]) -> Any:
    """A value for a comparison: of a tensor, whose memory it lies in, and how."""
    if isinstance(value, torch.Tensor):
        place, dtype = places.get(value.untyped_storage()._cdata, "new"), str(value.dtype).removeprefix("torch.")
        start = f"+{value.storage_offset()}" if value.storage_offset() else ""
        return f"{place}{start} {dtype}{list(value.shape)} by {list(value.stride())} on {value.device}"
    if hasattr(value, "block_shape"):  # a descriptor, of Triton or of Gluon
        layout = str(getattr(value, "layout", ""))
        return "boxes", _said(value.base, places), value.shape, value.strides, value.block_shape, layout
    if isinstance(value, kg.HeldRoute):
        return _said((value.capacity, value.max_loras, value._tables, value._parts), places)
    if isinstance(value, (list, tuple)):
        kind = type(value).__name__
        return ([] if kind == "list" else [kind]) + [_said(item, places) for item in value]
    return value if isinstance(value, (str, bool, int, float, type(None))) else str(value)


def changes(door: Door) -> Iterator[tuple[str, Arguments]]:
    """(what is another, the arguments) of calls that differ from a good one in one thing."""
    for operand in door.operands:
        for label, value in _others(operand, door.good[operand.name]):
            if not door.op.launches and isinstance(operand, Int) and value == operand.high:
                continue  # more memory than there is
            yield f"{operand.name}: {label}", {**door.good, operand.name: value}
    yield from _without_scales(door)
    yield from _moved_slices(door)
    yield from _in_place_of_another(door)
    for name, dtype in ((name, dtype) for name, dtypes in door.op.dtypes.items() for dtype in dtypes):
        cast = {o.name: _cast(o, door.good[o.name], name, dtype) for o in door.operands if isinstance(o, (Tensor, Bundle))}
        yield f"{name}: {dtype}", {**door.good, **cast}


def _others(operand: operands.Operand, good: Any) -> Iterator[tuple[str, Any]]:
    """(what is another, it) of an operand, by what it declares."""
    if isinstance(operand, Flag):
        yield f"{not good}", not good
    elif isinstance(operand, Int):
        near = operand.one_of or ([operand.low + 1] if good is None else [good - 1, good + 1, good + 16, 0, 1, operand.high])
        values = dict.fromkeys(value for value in near if value is None or operand.low <= value <= operand.high)
        values |= {None: None} if operand.optional else {}
        yield from ((f"{value}", value) for value in values if value != good)
    elif isinstance(operand, Number):
        yield from ((f"{value!r}", value) for value in (2.5, 2, -0.0))
        yield from [("none", None)] if operand.optional else []
    elif isinstance(operand, Several) and good is not None:
        ends = [(*good[:-1], good[-1] + more) for more in (1, 2, *FAR)]
        yield from ((f"{value}", value) for value in (good[:-1], (*good, 0), *ends, *(end[::-1] for end in (good, *ends))))
    elif isinstance(operand, Choice):
        yield from ((f"{word}", word) for word in operand.words if word != good)
    elif isinstance(operand, Bundle) and good is not None:
        yield from [("none", None)] if operand.optional else []
        yield "one like it", by_hand(good)
        known = [part.name for part in operand.parts_of(good)]
        yield from ((f"{field}: none", by_hand(good, **{field: None})) for field in good._fields if field not in known)
        for part in operand.parts_of(good):
            for label, value in _others(part, getattr(good, part.name)):
                yield f"{part.name}: {label}", by_hand(good, **{part.name: value})
        for kind in operand.kinds:
            if kind is not type(good) and set(kind._fields) <= set(good._fields):
                yield f"a {kind.__name__}", kind(*(getattr(good, field) for field in kind._fields))
    elif isinstance(operand, Tensor) and good is not None:
        yield from [("none", None)] if operand.is_optional or operand.made else []
        if not operand.slices:
            yield from _other_tensors(operand, good)
            return
        yield "of another class", tuple(good) if isinstance(good, list) else list(good)
        yield "a slice less", good[:-1]
        for i, old in enumerate(good):
            for label, tensor in _other_tensors(operand, old):
                yield f"{i}: {label}", [*good[:i], tensor, *good[i + 1 :]]
        for alike in zip(*(_other_tensors(operand, old) for old in good), strict=True):
            yield f"all: {alike[0][0]}", [tensor for _, tensor in alike]


def _without_scales(door: Door) -> Iterator[tuple[str, Arguments]]:
    """Of FP8 operands one by one, each in 16 bits and without its scales."""
    for operand in door.operands:
        scale, good = getattr(operand, "scaled_by", ""), door.good[operand.name]
        if scale in door.good and door.good[scale] is not None:
            plain = [tensor.bfloat16() for tensor in good] if operand.slices else good.bfloat16()
            yield f"{operand.name}: in 16 bits", {**door.good, operand.name: plain, scale: None}


def _moved_slices(door: Door) -> Iterator[tuple[str, Arguments]]:
    """Of two lists, the last slice of one in front of the other: the same tensors, one behind the other."""
    lists = [o for o in door.operands if isinstance(o, Tensor) and o.slices and door.good[o.name]]
    for one, other in itertools.pairwise(lists):
        first, second = door.good[one.name], door.good[other.name]
        moved = {one.name: first[:-1], other.name: type(second)((*first[-1:], *second))}
        yield f"{one.name}: its last slice to {other.name}", {**door.good, **moved}


def _in_place_of_another(door: Door) -> Iterator[tuple[str, Arguments]]:
    """Of two tensors that are read and look alike, the first for both."""
    read = {o.name: door.good[o.name] for o in door.operands if isinstance(o, Tensor) and not (o.written or o.slices)}
    for (one, first), (other, second) in itertools.combinations([found for found in read.items() if found[1] is not None], 2):
        if (first.shape, first.dtype) == (second.shape, second.dtype):
            yield f"{other}: that of {one}", {**door.good, other: first}


def _cast(operand: Tensor | Bundle, good: Any, name: str, dtype: torch.dtype) -> Any:
    """An operand whose dtype is shared under a name, or in whose parts it is, in another dtype."""
    if isinstance(operand, Bundle) and good is not None:
        parts = [part for part in operand.parts_of(good) if isinstance(part, Tensor)]
        return by_hand(good, **{part.name: _cast(part, getattr(good, part.name), name, dtype) for part in parts})
    if good is None or isinstance(operand, Bundle) or operand.dtype != name:
        return good
    if isinstance(good, torch.Tensor):
        return good.to(dtype) if good.itemsize > 1 else good
    return type(good)(_cast(operand, slice_, name, dtype) for slice_ in good)


def _other_tensors(operand: Tensor, good: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """(what is another, it) of one tensor."""
    yield "elsewhere", good.clone()
    for dtype in (*(operand.dtype if isinstance(operand.dtype, tuple) else ()), *operand.also):
        if dtype != good.dtype:
            yield f"{dtype}", good.to(dtype)
    if good.dtype in FP8:
        yield from ((f"{dtype}", good.view(dtype)) for dtype in FP8 if dtype != good.dtype)
    if good.numel() == 0:
        return
    if operand.dtype is None and not operand.forms:
        yield from _other_scales(good)
    buffer = torch.zeros(good.numel() + 1, dtype=good.dtype, device=good.device)
    yield "from an odd address", buffer[1:].view(good.shape)
    if good.dim() == 2 and good.itemsize > 1:
        yield "sparse", good.to_sparse()
        if good.is_floating_point() and good.itemsize > 1:
            yield "negated lazily", torch._neg_view(good)
    if len(operand.forms) > 1 and good.dim() > 1:
        yield "flat", good.flatten()
        yield "flat, but for one", good.flatten()[:-1]
    if operand.written and good.shape[0] > 2:
        yield "short", good[:2].clone()
    for d in range(good.dim()):
        yield f"with one more in dimension {d}", torch.cat((good, good.narrow(d, 0, 1)), d)
        if good.shape[d] > 1 and any(len(form) > d and form[d].least for form in operand.forms):
            yield f"with one less in dimension {d}", good.narrow(d, 0, good.shape[d] - 1).clone()
    for d in range(1, good.dim()):
        wide = torch.zeros((*good.shape[:d], good.shape[d] + 8, *good.shape[d + 1 :]), dtype=good.dtype, device=good.device)
        yield f"with more room in dimension {d}", wide.narrow(d, 0, good.shape[d])
    if good.dim() == 2:
        yield "column by column", good.t().contiguous().t()
    if good.dim() > 2 and not operand.written:
        yield from (("one for all" + f" in dimension {d}" * (d > 0), good.narrow(d, 0, 1).expand(good.shape)) for d in range(2))
        yield "turned", torch.zeros_like(good.transpose(0, 1).contiguous()).transpose(0, 1)


def _other_scales(good: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """Scales of other dtypes, and of something else each: what they are of is told by their shape."""
    of_bytes = torch.float8_e8m0fnu
    yield "powers of two", good.view(of_bytes) if good.dtype == torch.uint8 else good.to(of_bytes)
    yield "in 16 bits", good.bfloat16()
    yield from ((f"one in dimension {d}", good.narrow(d, 0, 1)) for d in range(good.dim()) if good.shape[d] > 1)
    yield from [("without the last dimension", good[..., 0])] if good.dim() > 1 else []
    yield "with a last dimension of 1", good[..., None]
    yield "with a last dimension of 1, and more room", torch.stack([good] * 9, -1)[..., :1]
    yield from ((label, good.flatten()[:number]) for label, number in {"one": 1, "one an expert": EXPERTS}.items())


def calls(name: str, door: Door, device: str) -> Iterator[tuple[str, Asked]]:
    """(what is another, the call) of a front door: one thing, a size of the layer, or a call of another kind."""
    for label, given in changes(door):
        yield label, (door, given)
    for label, other in _of_sizes(name, device, SIZES):
        yield label, (other, other.good)
    for kind in GOOD:
        if kind != name and name in GOOD and GOOD[kind][0] == GOOD[name][0]:
            other = Door.of(kind, device)
            yield kind, (other, other.good)


def _of_sizes(name: str, device: str, sizes: Mapping[str, Sequence[int]]) -> Iterator[tuple[str, Door]]:
    for size, values in sizes.items():
        for value in values:
            with contextlib.suppress(ValueError):  # what a call is made of has no such size
                yield f"{size}: {value}", Door.of(name, device, **{size: value})


def calls_of_two(name: str, door: Door, device: str, others: Sequence[tuple[str, Asked]]) -> Iterator[tuple[str, Asked]]:
    """Likewise with two things that are others, of which the first is a word or a flag, and the second a number, or is left out
    (of an operand two words); or a size, or a result that is to be made, and how one of the tensors lies.

    Args:
        others: calls of one other thing each, that are not refused.
    """
    of_words = [(label, given) for label, (of, given) in others if of is door and _is_word(_named(door, label))]
    by_operand = itertools.groupby(of_words, lambda found: found[0].partition(": ")[0])
    words = [found for _, group in by_operand for found in itertools.islice(group, 2)]
    numbers = [(label, given) for label, (of, given) in others if of is door and _is_number(_named(door, label), label)]
    for (word, one), (number, other) in itertools.product(words, numbers):
        changed = {of: value for of, value in other.items() if value is not door.good[of]}
        if not any(one[of] is not door.good[of] for of in changed):
            yield f"{word}; {number}", (door, {**one, **changed})
    made = {o.name: None for o in door.operands if isinstance(o, Tensor) and o.made and door.good[o.name] is not None}
    asked = [(f"{of}: none", dataclasses.replace(door, good={**door.good, of: None})) for of in made]
    for label, other in [*_of_sizes(name, device, SMALL), *asked]:
        for lies, given in changes(other):
            if _LIES.search(lies):
                yield f"{label}; {lies}", (other, given)


_LIES = re.compile("more room|column by column|turned|one for all")


def _named(door: Door, label: str) -> Any:
    """The operand that a label speaks of first, or its part."""
    name, _, rest = label.partition(": ")
    operand = next((operand for operand in door.operands if operand.name == name), None)
    return operand.parts.get(rest.partition(": ")[0], operand) if isinstance(operand, Bundle) else operand


def _is_word(operand: Any) -> bool:
    return isinstance(operand, (Flag, Choice))


def _is_number(operand: Any, label: str) -> bool:
    return isinstance(operand, Int) or label.endswith(": none")


def twins(door: Door, label: str, given: Arguments) -> Arguments | None:
    """Of a call whose last slice of something is another, the one that has the first slice there too."""
    name, _, rest = label.partition(": ")
    operand = next((operand for operand in door.operands if operand.name == name), None)
    if not (isinstance(operand, Tensor) and operand.slices and rest.startswith("1: ")):
        return None
    return {**given, name: type(given[name])([given[name][0]] * len(given[name]))}


# Ops with measured tiles.
MEASURED = {"lora", *(room for room in rooms_with("tune") if importlib.import_module(f"generated.{room}._tuned").TUNED)}


@pytest.fixture
def tuned(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if everything had been measured in high blocks: roles of warps first, then boxes."""

    class Everything(dict[Any, Any]):
        def __contains__(self, key: Any) -> bool:
            return key is not None and bool(key.block_m == 128)

        def __getitem__(self, key: Any) -> Any:
            return (("warp_specialised", (4, 1, 1)), ("box", (128, 64, 3, 4, 1, 0, 64, 2)), ("tile", None))

    on = runtime.traits(torch.device("cpu"))
    measured = runtime.Measured(on.label, on.target, on.num_sms, on.shared_memory, Everything())
    monkeypatch.setattr(gemm_problem, "TUNED", (measured,))


@pytest.mark.parametrize("name", [name for name, (op, *_) in {**GOOD, **CHOSEN}.items() if op in MEASURED])
def test_what_was_measured_is_taken_where_it_serves(
    name: str, device: str, log: list[Any], lock: Lock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Routes and tables of other kinds, and in blocks of other heights, as if all problems had been measured."""
    calls: dict[str, object] = {}

    def known(tables: Sequence[runtime.Measured], key: object, device: object) -> runtime.Fastest:
        fastest = [found for table in tables for found in itertools.chain(*table.fastest.values()) if found[1] is not None]
        return tuple(dict(fastest).items()) if key is not None else ()

    monkeypatch.setattr(runtime, "measured", known)
    door = Door.of(name, device)
    bundles = tuple(operand.name for operand in door.operands if isinstance(operand, Bundle))
    asked = [
        (label, (door, given))
        for label, given in changes(door)
        if label.startswith(bundles) and _is_number(_named(door, label), label)
    ]
    asked += [(label, (of_size, of_size.good)) for label, of_size in _of_sizes(name, device, SIZES)]
    for label, call in [("usual", (door, door.good)), *asked]:
        forget()
        found = done(call, log)
        calls |= {label: found} if isinstance(found, Done) and found not in calls.values() else {}
    lock.compare(f"{name} measured", calls)


@pytest.mark.parametrize("name", CHOSEN)
def test_a_call_that_has_a_choice_does_what_it_does_alone(
    name: str, device: str, log: list[Any], lock: Lock, tuned: None
) -> None:
    test_a_call_does_what_it_does_alone(name, device, log, lock)


@pytest.mark.parametrize("name", GOOD)
def test_a_call_does_what_it_does_alone(name: str, device: str, log: list[Any], lock: Lock) -> None:
    door = Door.of(name, device)
    usual = door, door.good
    forget()
    alone = done(usual, log)
    assert isinstance(alone, Done), alone
    others: list[tuple[str, Asked, Any]] = []
    for label, asked in calls(name, door, device):
        forget()
        others.append((label, asked, done(asked, log)))
        same = twins(door, label, asked[1])
        if same is not None:
            forget()
            for _ in range(2):  # so that it is the last of its kind, too
                done((door, same), log)
            assert done(asked, log) == others[-1][-1], f"{label}: behind one that has a slice twice"
    for label, asked in calls_of_two(name, door, device, [(label, asked) for label, asked, _ in taken(others)]):
        forget()
        others.append((label, asked, done(asked, log)))
    forget()
    assert done(usual, log) == alone
    for label, asked, other in others:  # each as alone, with all in front of it remembered
        assert done(asked, log) == other, f"{label}: behind the usual, and all in front of it"
    for label, asked, other in reversed(taken(others)):  # and in turns with the usual one, when all are
        assert done(usual, log) == alone, f"the usual, and {label} is remembered"
        assert done(asked, log) == other, f"{label}: behind the usual, when it is remembered"
    forget()
    for label, asked, other in taken(others):
        if label.endswith(": none"):
            assert done(asked, log) == other, f"{label}: behind all in front of it"
    assert done(usual, log) == alone, "the usual behind all others"
    still = {f"{of.by}, and another": Together(met) for of, met in refused_again(door, others, log)}
    one, two = ([(label, other) for label, _, other in others if ("; " in label) is of_two] for of_two in (False, True))
    together = {f"{first}; and another": Together(dict(group)) for first, group in itertools.groupby(two, _first)}
    lock.compare(name, {"usual": alone, **{label: other for label, other in one if other != alone}, **together, **still})


def taken(others: Sequence[tuple[str, Asked, Any]]) -> list[tuple[str, Asked, Any]]:
    """Calls that are not refused, and so remembered."""
    return [found for found in others if isinstance(found[-1], Done)]


def refused_again(
    door: Door, others: Sequence[tuple[str, Asked, Any]], log: list[Any]
) -> Iterator[tuple[Refused, dict[str, Any]]]:
    """(why the first call is refused, what such calls do) of each check: with another word, or without another argument."""
    free = [(label, given) for label, (of, given), _ in others if of is door and "; " not in label]
    free = [(label, given) for label, given in free if _is_word(_named(door, label)) or label.endswith(": none")]
    first = {found.by: (asked, found) for _, asked, found in reversed(others) if isinstance(found, Refused) and asked[0] is door}
    for (_, given), refused in first.values():
        changed = {of for of, value in given.items() if value is not door.good[of]}
        met = {}
        for label, other in free:
            more = {of: value for of, value in other.items() if value is not door.good[of]}
            if not changed & more.keys():
                met[label] = done((door, {**given, **more}), log)
        yield refused, met


def _first(found: tuple[str, Any]) -> str:
    return found[0].partition("; ")[0]


class Together(NamedTuple):
    """What calls do that have one line in the lock."""

    calls: dict[str, Any]

    def __str__(self) -> str:
        return "\n".join(f"{label}: {found}" for label, found in self.calls.items())


# Traits of a device on which each of them is another.
OTHER = {"num_sms": 20, "shared_memory": 65536, "pdl": False, "full_warps": 4, "warp_sums": 2048, "max_stages": 2}
OTHER |= {"mixed_pointers": False, "target": "small", "label": "small", "e4m3": False}


@pytest.mark.slow(keep=40)
@pytest.mark.parametrize("name", [*GOOD, *CHOSEN])
def test_a_call_asks_the_device_that_it_is_on(
    name: str, device: str, log: list[Any], lock: Lock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two devices of other traits, the second has tensors without memory; each has the tiles that it has alone."""
    traits, on_other = runtime.traits(torch.device(device)), OTHER
    monkeypatch.setattr(runtime, "traits", lambda of: traits._replace(**on_other) if of.type == "meta" else traits)
    door = Door.of(name, device)
    usual, other = ((door, _on(door.good, where)) for where in (device, "meta"))
    calls = {"on a device without memory, where nothing runs": done(other, log)}
    with runtime.compile_only():
        alone = []
        on_other = {**OTHER, "e4m3": True}
        for asked in (usual, other):
            forget()
            alone.append(done(asked, log))
        forget()
        for i in (0, 0, 1, 1, 0, 1):
            assert done((usual, other)[i], log) == alone[i], ("the usual device", "another device")[i]
        calls["on another device"] = alone[1]
        for label, given in _far_apart(door, other[1]):
            forget()
            calls[label] = done((door, given), log)
        for trait, value in OTHER.items() if door.op.launches else ():
            on_other = {trait: value}
            forget()
            calls[f"on a device with another {trait}"] = done(other, log)
        for label, given in changes(door):
            if label.endswith("e5m2"):  # which there is where there is no e4m3
                forget()
                calls[f"on a device without e4m3, {label}"] = done((door, _on(given, "meta")), log)
    lock.compare(f"{name} elsewhere", calls)


def _far_apart(door: Door, given: Arguments) -> Iterator[tuple[str, Arguments]]:
    """Operands of which two rows, or matrices, are 2^31 elements apart."""
    for operand in door.operands:
        good = given[operand.name]
        slices = good if isinstance(operand, Tensor) and operand.slices and good else [good]
        if isinstance(operand, Tensor) and isinstance(slices[0], torch.Tensor):
            for d in range(slices[0].dim()):
                far = [torch.empty_strided(t.shape, _strides(t, d), dtype=t.dtype, device="meta") for t in slices]
                yield f"{operand.name}: far apart in dimension {d}", {**given, operand.name: far if operand.slices else far[0]}


def _strides(tensor: torch.Tensor, d: int) -> list[int]:
    """Those of rows; of the last dimension, of columns."""
    if d == tensor.dim() - 1:
        return [*torch.empty(tensor.shape[:-1], device="meta").stride(), 2**31]
    return [2**31 if i == d else stride if i > d else 2**32 for i, stride in enumerate(tensor.stride())]


@pytest.mark.slow(keep=3)
@pytest.mark.parametrize("family", sorted({op for op, _ in GOOD.values()} & set(rooms_with("cases"))))
def test_a_launcher_is_offered_what_others_take(family: str, device: str, log: list[Any], lock: Lock) -> None:
    """Launchers of variants, each tag of an axis once, with the good calls of the family's front door."""
    calls: dict[str, object] = {}
    met: set[tuple[str, str]] = set()
    for variant in Suite.of("generated", spec_of(family)).variants:
        if met.issuperset(variant.tags.items()):
            continue
        met |= variant.tags.items()
        launcher = variant.launcher(kg)
        known = inspect.signature(launcher).parameters
        for name in (name for name, (op, _) in GOOD.items() if op == family and name not in kg.variants()):
            for size, value in (("k", K), ("rank", 130), ("k", 33)):
                door = Door.of(name, device, **{size: value})
                offered = {of: value for of, value in door.good.items() if of in known}
                if any(of not in offered and parameter.default is parameter.empty for of, parameter in known.items()):
                    continue
                door = dataclasses.replace(door, function=launcher, good=offered)
                free = {o.name for o in door.op.operands if getattr(o, "is_optional", False) or getattr(o, "optional", False)}
                optional = [of for of, value in offered.items() if value is not None and of in free]
                changed = [("", {}), *((f", without {of}", {of: None}) for of in optional)]
                scales = [o.name for o in door.operands if isinstance(o, Tensor) and o.dtype is None is o.shape and not o.slices]
                there = [(of, offered[of].flatten()) for of in scales if offered[of] is not None and value == K]
                changed += [(f", {of} of experts", {of: scale[:EXPERTS]}) for of, scale in there]
                for what, other in changed:
                    forget()
                    calls[f"{variant}: {name}, {size} {value}{what}"] = done((door, {**offered, **other}), log)
    lock.compare(f"launchers of {family}", calls)


def _on(value: Any, device: str) -> Any:
    """A value on a device: tensors, in whatever holds them."""
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {name: device if name == "device" else _on(item, device) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        made = [_on(item, device) for item in value]
        return type(value)(*made) if hasattr(value, "_fields") else type(value)(made)
    return value


# With a workspace for as many tokens, of layers as models have them; in front of each threshold, and behind it.
WITH_ROOM = [name for name, (op, *_) in {**GOOD, **CHOSEN}.items() if re.match("(moe_)?lora($|_shrink|_expand)|fused_moe$", op)]
OF_MODELS = [{"k": 2048, "n": 512, "experts": 8, "top_k": 4}, {"k": 14336, "n": 2048, "rank": 320, "loras": 5}]


@pytest.mark.slow(keep=8)
@pytest.mark.parametrize("name", [name for name in WITH_ROOM if "placed" not in name and "engine" not in name])
def test_a_workspace_has_room(name: str, log: list[Any], lock: Lock, tuned: None) -> None:
    """Nothing is made at a call that brings one; pair by pair, of few. Without memory, as many tokens are as few."""
    calls: dict[str, object] = {}
    most = 300 if isinstance(Door.of(name, "cpu").good.get("route"), PairRoute) else 20000
    with runtime.compile_only():
        for layer, tokens in itertools.product(OF_MODELS, (1, 4, 5, 16, 17, 300, 4096, 4097, 20000)):
            door = Door.of(name, "meta", **layer, tokens=tokens)
            forget()
            label = f"{tokens} of k {layer['k']}"
            calls[label] = found = done((door, door.good), log)
            made = isinstance(found, Refused) or (tokens <= most and "'new" in str(found.launches))
            assert not made, f"{label}: {str(found)[:400]}"
    lock.compare(f"{name} with room", calls)


@pytest.mark.parametrize("name", ["moe_align", "moe_align mapped", "moe_runs", "moe_route", "lora_route", "lora_route held"])
def test_tables_of_many(name: str, log: list[Any], lock: Lock) -> None:
    """On both sides of each threshold, without a workspace, and with one that is as large as it says."""
    calls: dict[str, object] = {}
    with runtime.compile_only():
        numbers = (1, 4, 5, 64, 65, 256, 257, 2048, 2049, 8192, 8193, 40000)
        for tokens, (experts, loras) in itertools.product(numbers, {4: 3, 200: 8, 257: 3, 1500: 3}.items()):
            door = Door.of(name, "meta", tokens=tokens, experts=experts, loras=loras)
            settled = {option: None for option in ("workspace", "block_m", "num_tokens_hint") if option in door.good}
            asked = [("usual", {}), ("settled", settled)]
            asked += [("hinted", {**settled, "num_tokens_hint": 48})] if "num_tokens_hint" in settled else []
            asked += [(f"auto {r}", {"assignment": "auto", "rank": r}) for r in (16, 17) if "assignment" in door.good]
            for label, changed in asked:
                forget()
                calls[f"{tokens} of {experts}, {label}"] = done((door, {**door.good, **changed}), log)
    lock.compare(f"{name} of many", calls)


def test_lanes_take_a_layer_of_as_many_columns_as_they_have(log: list[Any], lock: Lock) -> None:
    """On both sides of their limit: a layer is planned for them where both products can have them."""
    calls: dict[str, object] = {}
    with runtime.compile_only():
        for k, top_k in itertools.product((4096, 4160, 8192, 8224), (2, 3, 8)):
            door = Door.of("fused_moe of lanes", "meta", k=k, top_k=top_k)
            forget()
            calls[f"k {k}, top_k {top_k}"] = found = done((door, door.good), log)
            assert isinstance(found, Done), str(found)
    lock.compare("fused_moe of lanes of many columns", calls)


@pytest.mark.parametrize("name", [name for name in GOOD if name.endswith("workspace")])
def test_a_workspace_is_as_large_as_it_was(name: str, log: list[Any], lock: Lock) -> None:
    door = Door.of(name, "meta")
    calls: dict[str, object] = {}
    for label, given in [("usual", door.good), *changes(door)]:
        for tokens in (1, 5, 4096, 4097, 20000):
            calls[f"{label}; {tokens}"] = done((door, {**given, "max_tokens": tokens}), log)
    lock.compare(f"{name} of many", calls)


SHAPES: dict[str, Any] = {
    "MoeShape": kg.MoeShape(256, 128, 2, 16, 2, 4, 3),
    "ShardedMoeShape": kg.ShardedMoeShape(kg.MoeShape(256, 128, 2, 16, 2, 4, 3, mul_routed_weight=True), gathered=2),
    "LoraShape": kg.LoraShape(256, (128, 64), 16, 3),
    "FusedMoeShape": kg.FusedMoeShape(256, 128, 4, 2, rank=16, max_loras=3, lora_ranks=True),
    "MoeShape fp8": kg.MoeShape(256, 128, 1, 16, 2, 4, 3, weight_scales="group", x_scales="group", mul_routed_weight=True),
    "LoraShape fp8": kg.LoraShape(256, (128, 64), 16, 3, weight_scales="group", x_scales="group", separate=True),
    "FusedMoeShape fp8": kg.FusedMoeShape(256, 128, 4, 2, weight_scales="group", x_scales="group"),
}


@pytest.mark.slow(keep=5)
@pytest.mark.parametrize("name", SHAPES)
def test_warm_up_makes_the_calls_that_it_made(name: str, log: list[Any], lock: Lock) -> None:
    """Of a layer with all that it can have, each thing another."""
    usual = SHAPES[name]
    shapes = [("usual", usual)]
    for field in operands.declared(type(usual)):
        if field is not None:
            values = _others(field, getattr(usual, field.name)) if not isinstance(field, operands.Several) else ()
            few = itertools.islice((found for found in values if not isinstance(found[1], int) or found[1] < 1000), 3)
            shapes += [(f"{field.name}: {label}", usual._replace(**{field.name: value})) for label, value in few]
    calls: dict[str, object] = {"sizes": str([list(warmup.ends(most)) for most in (1, 2, 3, 20)])}
    for label, shape in shapes:
        for tokens in (0, 1, 20) if label == "usual" else (20,):
            with runtime.compile_only():
                log.clear()
                try:
                    shape.check(name)
                    shape.call(tokens)
                    calls[f"{label}; {tokens}"] = Done([_launch(call, {}) for call in log], None)
                except ValueError as error:
                    calls[f"{label}; {tokens}"] = Refused(where_of(error), str(error))
    lock.compare(f"warm-up of {name}", calls)


def test_a_graph_is_told_what_it_was(lock: Lock) -> None:
    """Of each op of torch.compile what it takes, and what it writes."""
    names = sorted(name for library in runtime._libraries for name in library._op_defs)
    spaces = [name.split("::") for name in names]
    ops = {name: getattr(getattr(torch.ops, of), name).default for of, name in spaces}
    lock.compare("ops of torch.compile", {name: str(op._schema) for name, op in ops.items()})


@pytest.mark.slow(keep=30)
@pytest.mark.parametrize("name", [name for name in {**GOOD, **CHOSEN} if name not in kg.variants()])
def test_a_graph_does_what_a_call_does(
    name: str, device: str, log: list[Any], lock: Lock, monkeypatch: pytest.MonkeyPatch, tuned: None
) -> None:
    door = Door.of(name, device)
    calls: dict[str, object] = {}
    some = [(label, given) for label, given in changes(door) if _is_word(_named(door, label)) or label.endswith(": none")]
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    for label, given in [("usual", door.good), *some]:
        forget()
        calls[label] = done((door, given), log)
    lock.compare(f"{name} in a graph", calls)


ROOT = Path(__file__).parent.parent
LARGEST = ({"n": 2**30, "rank": 1, "slices": 2}, {"num_tokens": 2**24})
TOKENS = (1, 3, 16, 32, 100, 256, 1500, 5000)


def of_a_model(family: str) -> Iterator[tuple[str, Answer]]:
    """(the case, the call) of a model's sizes, as ``kernelgen which`` makes it: each tag once, for few tokens and for many."""
    spec = spec_of(family)
    axes = [axis.name for axis in spec.axes if axis.name not in BY_SIZES]
    met: set[tuple[str, str]] = set()
    for variant in spec.variants:
        tags = {axis: str(getattr(variant, axis)) for axis in axes}
        if not met.issuperset(tags.items()) or not axes:
            met |= tags.items()
            sizes = Known.of(spec).sizes
            given = [{"num_tokens": tokens} for tokens in TOKENS if "num_tokens" in sizes] or [{}]
            given += [{size: 2**30} for size in sizes if size != "slices"] if len(met) == len(axes) else []
            given += [{"rank": 320, "num_tokens": tokens} for tokens in (3, 256, 5000) if {"rank", "num_tokens"} <= sizes.keys()]
            given += [some for some in LARGEST if some.keys() <= sizes.keys()] if len(met) == len(axes) else []
            for some in given:
                case = {**tags, **{size: str(value) for size, value in some.items()}}
                label = " ".join([*tags.values(), *(f"{size}={value}" for size, value in some.items())])
                with contextlib.suppress(Failure):  # no call has these tags together
                    yield label, which(shipped(), family, case)


def spec_of(family: str) -> Any:
    return next(found for found in shipped().families if found.name == family)


@functools.cache
def shipped() -> Any:
    return build.package(ROOT / "specs")


# (what it is called, its traits, which calls it gets): that of the lock, one of which all is another, one of less memory alone.
DEVICES: tuple[tuple[str, dict[str, Any], str], ...] = (
    ("", {}, ""),
    (" elsewhere", {**OTHER, "e4m3": True}, r"=(3|256|5000|16777216|1073741824)\b"),
    (" in less memory", {"shared_memory": 101376, "target": "sm_120", "warp_sums": 2048}, r"num_tokens=(16|256|1500)$"),
)


def test_a_target_has_the_traits_that_it_had(lock: Lock, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where kernels are compiled without a GPU; and the same where one is found."""
    monkeypatch.setattr(runtime, "INTERPRETED", False)
    traits: dict[str, object] = {}
    for name, target in TARGETS.items():
        with compiling_for(target):
            traits[name] = without = runtime.traits(torch.device("meta"))
            found = {"max_shared_mem": without.shared_memory, "multiprocessor_count": target.sms}
            of_device = types.SimpleNamespace(get_device_properties=lambda index, found=found: found)
            monkeypatch.setattr(triton.runtime.driver.active, "utils", of_device, raising=False)
            monkeypatch.setattr(torch.cuda, "get_device_name", lambda index, card=target.card: card)
            monkeypatch.setattr(torch.version, "hip", "7" if target.backend == "hip" else None)
            named = types.SimpleNamespace(gcnArchName=f"{target.arch}:sramecc+")
            monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index, named=named: named)
            monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index, arch=target.arch: divmod(arch, 10))
            label = runtime.device_label(target.card)
            assert runtime._traits.__wrapped__(0) == without._replace(num_sms=target.sms, label=label), name
    lock.compare("traits of targets", traits)
    monkeypatch.setattr(runtime, "_traits", lambda index: index)
    with runtime.compile_only(torch.device("cuda", 1)):
        assert runtime.traits(torch.device("meta")) == 1, "those of the device that is warmed up"


@pytest.mark.slow(keep=8)
@pytest.mark.parametrize("family", sorted(rooms_with("call")))
def test_a_model_gets_what_it_got(family: str, lock: Lock, log: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    traits = runtime.traits(torch.device("cpu"))
    calls: dict[str, object] = {}
    for label, answer in of_a_model(family):
        for where, other, of in DEVICES:
            if not re.search(of, label):
                continue
            monkeypatch.setattr(runtime, "traits", lambda of, other=other: traits._replace(**other))
            with runtime.compile_only(), runtime.choosing({}) as choices:
                log.clear()
                try:
                    laboratory(family, "call").call(kg, answer)
                    calls[label + where] = Done([_launch(call, {}) for call in log], choices)
                except ValueError as error:
                    calls[label + where] = Refused(where_of(error), str(error))
    lock.compare(f"{family} of a model", calls)


# Checks that refuse what no call here is: where they are tested. What is behind a star may be several.
_DOORS, _LAWS = "tests/test_front_doors.py", "laws of the families"
_TILES = "launchers of box and warp_specialised, of operands that the front door gives to others"
_BEFORE = "another check refuses such calls before"
ELSEWHERE = {
    "_lora.lora_route:*": _DOORS,
    "_mxfp4.check_codes:*": _DOORS,
    "_operands._check_apart:*": _DOORS,
    "_operands._check_places:label:one-that-does-not": _DOORS,
    "_operands.admit:*": _DOORS,
    "_overlap.overlap:*": _DOORS,
    "_quantize.quantize_weights:*": _DOORS,
    "_runtime.check_tile:*": _LAWS,
    "_runtime.given:*": _DOORS,
    "_scales.factor_scale_strides:label:f-len*": _BEFORE,
    "_sharded_moe_shape.check:*": _DOORS,
    "_warmup.warmup:*": _DOORS,
    "moe_gemm/_launch.bind:parts:*": "tests/test_gluon.py",
    "moe_gemm/_op.bind:out_scale:None": _DOORS,
    "moe_gemm/_op.bind:x_rows-out_rows:*": _DOORS,
    "moe_gemm/_problem._check_delta:v:*": _DOORS,
    "moe_gemm/_problem.problem_of:rows:*": _TILES,
    "moe_lora_expand/_problem.check:y:*": _DOORS,
    "moe_permute/_problem.check:x_scale:*": _DOORS,
    "moe_sum/_op.bind:out:*": _DOORS,
    "_scales.check_fp8:label:or-join*": "codes of MXFP4 with scales of FP8, which no call here has",
    "moe_route/_launch.bind:pairs:*": _DOORS,
}


def test_every_check_refuses_a_call(lock: Lock) -> None:
    known = {name for of_module in checks().values() for name in of_module}
    missing = known - lock.refused()
    left = {name for name in missing if not any(fnmatch.fnmatchcase(name, pattern) for pattern in ELSEWHERE)}
    assert not left, f"no call is refused by {sorted(left)}"
    stale = [pattern for pattern in ELSEWHERE if not fnmatch.filter(missing, pattern)]
    assert not stale, f"calls are refused by {stale}"


def test_where_tensors_begin_matters_where_an_op_says_so(lock: Lock) -> None:
    said = {(op.name, name) for op in operands.OPS.values() for name in op.aligned}
    labels = ("{}: from an odd address", "{}: all: from an odd address")
    found = {(op, name) for op, name in said if lock.differs(op, *(label.format(name) for label in labels))}
    assert said == found
