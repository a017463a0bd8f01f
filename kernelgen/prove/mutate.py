"""Mutants of generated kernels: small faults that the cases must notice. ``kernelgen mutate`` lists the living.

A mutant is the text of a variant with one expression or statement of a ``@triton.jit`` function changed. It is written beside
the variant in a copy of the generated package, and meets every case that fits the variant: the cases of a body are spread
over its variants, and a fault in a template is in all of them. It is killed when a case fails, in any way. Last come the cases
of exact algebra. A fault of the order of launches changes no number: it meets the cases where that order is watched.
"""

from __future__ import annotations

import ast
import collections
import contextlib
import copy
import dataclasses
import fnmatch
import functools
import importlib
import itertools
import random
import re
import shutil
import sys
import tempfile
import unittest
from pathlib import Path
from typing import Callable, Iterable, Iterator, Mapping, Sequence
from unittest import mock

from kernelgen.core import names
from kernelgen.core.model import SCHEDULE
from kernelgen.core.processes import Fault, Progress, in_processes, no_progress
from kernelgen.families.case import Case, Variant
from kernelgen.prove.testing import Suite
from kernelgen.prove.verify import nothing_named, start_worker, suites

NO_WAIT = "wait for launches dropped"


@dataclasses.dataclass(frozen=True)
class Excuse:
    """Changes that leave a kernel right, so that no case can notice them.

    Attributes:
        operator: of the mutant.
        before: a regular expression that its text matches.
        why: what makes the change harmless.
        line: a regular expression that is found in the line where it begins.
        function: the kernel, where it matters.
        module: a regular expression that is found in its module.
    """

    operator: str
    before: str
    why: str
    line: str = ""
    function: str = ""
    module: str = ""

    def of(self, mutant: Mutant) -> bool:
        """Whether a mutant is one of these."""
        fits = mutant.operator == self.operator and re.fullmatch(self.before, mutant.before) is not None
        fits = fits and re.search(self.line, mutant.statement) is not None and self.function in ("", mutant.function)
        return fits and re.search(self.module, mutant.text) is not None


_IMPLICIT = "Triton converts here anyway"
_FP32 = "the other operand is fp32"
_ROWS = "rows of a block do not mix, and one that is not live is not stored"
_TAIL = "B's mask drops the ranks behind the last one too"
_WORK = "the expand drops such pairs too; this saves work"
_RULE = "no case is so large; tests/test_kernel_rules.py asks for it of every text"
_DISGUISE = "a size in disguise: a block has a row"
_TWICE = "a token that is not valid is dropped where its ids are loaded, and behind that"
_RIGHT, _LEFT, _MOVED_BOUND = "right side dropped", "left side dropped", "bound moved"
_NO_MASK, _NO_CAST = "mask dropped", "cast dropped"

EQUIVALENT: Sequence[Excuse] = (
    Excuse(
        _RIGHT, r"(K|N|RANK) % \w+", "the masked path is right everywhere, only slower", r"\bif\b"
    ),
    Excuse(_NO_CAST, r"\w+\.to\((out|v|h|y)_ptr\.dtype\.element_ty\)|(h|y|total)\.to\(.*\)", _IMPLICIT, r"[tg]l\.store"),
    Excuse(_NO_CAST, r"tl\.load\(rows \+ n, .*\)\.to\(tl\.float32\)", _FP32, r"^y = "),
    Excuse(_NO_MASK, r"tl\.load\(topk_ids_ptr \+ pair, mask=token < valid, .*", _TWICE),
    Excuse(_MOVED_BOUND, r"token < valid", _TWICE, r"^expert = tl\.load\(topk_ids_ptr|^here = \(token < valid\)"),
    Excuse(_LEFT, r"\(token < valid\) & \(expert >= LOCAL_EXPERT_START\)", _TWICE, r"^here = "),
    Excuse(_LEFT, r"here & is_live\( ?pair, here,.*", "is_live is False for pairs that are not here"),
    Excuse(_NO_CAST, r"tl\.load\(x_rows \+ N.*\)\.to\(tl\.float32\)", _FP32, r"^up = "),
    Excuse(_NO_CAST, r"tl\.load\((out|delta)_rows?( \+ [nN].*|, .*)\)\.to\(tl\.float32\)", _FP32),
    Excuse(_NO_CAST, r"tl\.load\(delta_ptr.*\)\.to\(tl\.float32\)", _FP32, r"^y \+= "),
    Excuse(_MOVED_BOUND, r"code > LARGEST|code < -LARGEST", "at the bound both choices are the same"),
    Excuse(_NO_CAST, r"tl\.load\(x_ptr \+ row.*\)\.to\(tl\.float32\)", "its largest is exact, and a scale in fp32 divides it"),
    Excuse(_NO_CAST, r"slices\[s\]\[1\]\.to\(parts_ptr.*\)", _IMPLICIT),
    Excuse(_NO_CAST, r"(old|a|b|x)\.to\(tl\.float32\)", _FP32),
    Excuse(_NO_CAST, r"v\.to\(tl\.\w+\)\.to\(tl\.float32\)", _FP32),
    Excuse(_NO_CAST, r"tl\.load\(topk_weights_ptr.*\)\.to\(tl\.float32\)", _FP32),
    Excuse(_NO_CAST, r".*\.to\(tl\.int32\)", "flags add up as int32, ids compare in any width"),
    Excuse(_NO_CAST, r"tl\.load\(expert_map_ptr.*\.to\(tl\.int64\)", _RULE),
    Excuse(_NO_CAST, r"\w+\.to\(tl\.int64\)", _RULE, r"^(next_)?parts? = "),
    Excuse(_NO_MASK, r"tl\.load\( ?(x_rows|topk_weights_ptr).*mask=live(\[:, None\])?,.*", _ROWS),
    Excuse(_LEFT, r"live\[:, None\] & (k_mask|inside)", _ROWS, r"^x = tl\.load"),
    Excuse(_NO_MASK, r"tl\.load\(part_rows( \+ r0)?, mask=v_mask.*", _ROWS),
    Excuse(_LEFT, r"live\[:, None\] & \(r < .*", _ROWS, "^v_mask = "),
    Excuse(_RIGHT, r"live\[:, None\] & \(r < .*", _TAIL, r"^v_mask = "),
    Excuse("condition dropped", r"live\[:, None\] if RANK == BLOCK_R else.*", _TAIL, "^v_mask = "),
    Excuse(_MOVED_BOUND, r"r < RANK.*", _TAIL, r"^v_mask = |parts|tl\.where"),
    Excuse(_MOVED_BOUND, r"RANK == BLOCK_R", _TAIL, "^v_mask = "),
    Excuse(_MOVED_BOUND, r"RANK == BLOCK_R", _TAIL, "^if RANK == BLOCK_R:", "kernel"),
    Excuse("condition dropped", r"RANK == BLOCK_R", _TAIL, "^if RANK == BLOCK_R:", "kernel"),
    Excuse(_RIGHT, r"\(part < PARTS\) & \(r < RANK\)\[None, :\]", _TAIL),
    Excuse(_RIGHT, r"RANK - r0", _TAIL, "^v_mask = "),
    Excuse("choice dropped", r"tl\.where\(\(r < RANK\).*", _TAIL),
    Excuse("clamp dropped", r"tl\.minimum\( ?(N|K|RANK), rows \* (N|K|RANK) ?\)", _DISGUISE),
    Excuse(_LEFT, r"rows \* (N|K|RANK)", _DISGUISE),
    Excuse(_MOVED_BOUND, r"PARTS > \d+", "both ways to add parts are right"),
    Excuse(_MOVED_BOUND, r"row < end", "it is the last row once more, with the same bits", r"^live = "),
    Excuse("condition never holds", r".* % \w+ == 0|.*RANK == BLOCK_R|ONE_GROUP", "the other way is right everywhere"),
    Excuse("choice dropped", r"tl\.where\( ?(.+), tl\.load\(.*mask=\1, other=0\.0.*", "the load has that mask"),
    Excuse(_NO_CAST, r"(s|tl\.where\(live, listed, 0\))\.to\(tl\.int64\)", "the other summand is 64 bits wide", function="total"),
    Excuse(_NO_CAST, r"\(part \* .*\)\.to\(tl\.int64\)", _RULE, r"^row = "),
    Excuse(_NO_CAST, r".*\(rank - RANK\)\)\.to\(tl\.int64\)", "rows of one adapter are in reach of 32 bits", r"^a_ptr \+= "),
    Excuse("number moved", r"1", "any number below the first expert is elsewhere", r"LOCAL_EXPERT_START - 1"),
    Excuse("condition never holds", r"SCALE_STRIDE == 0", "scales that lie 0 apart are one"),
    Excuse("sign turned", r".*ROWS - 1", "one program more has no rows", r"tl\.range\(tl\.program_id"),
    Excuse("parts beyond eight dropped", r"tl\.static_range\(1, PARTS\)", "one load adds up more", "", "expand", "PARTS > 8"),
    Excuse("division exchanged", r"BLOCK_M // 2", "a block of few rows is then a whole one: halves save work"),
    Excuse(_NO_MASK, r"tl\.load\(parts_ptr \+ cells, mask=kept.*", "there are parts behind, and what is not kept is not stored"),
    Excuse("choice dropped", r"tl\.where\(live, listed, 0\)", "a row that is not live is not stored", function="total"),
    Excuse("choice dropped", r"tl\.where\(live, listed, 0\)", "a row that is not live is not read or stored", module="b_ptrs"),
    Excuse("condition never holds", r"m0 >= rows", "a program without rows stores nothing; it returns to save work"),
    Excuse(
        _NO_CAST,
        r"\(?(num_)?(pairs?|first \+ of_j)\)?\.to\([tg]l\.int64\)",
        _RULE,
        r"v_rows? = |_rank_vector|^v = ",
    ),
    *(
        Excuse(operator, r"tl\.num_programs\(0\).*|tl\.program_id\(0\)", "any number above 0 does", r"^rows = tl\.num_programs")
        for operator in (_RIGHT, "sign turned", "other axis")
    ),
    Excuse("number moved", r"256", "a step more has a mask, and 257 times 256 columns are more than K", r"^STEPS: "),
    Excuse(_NO_CAST, r"next_part\.to\(tl\.int64\)", _RULE),
    Excuse(_NO_CAST, r"of_expert\.to\(gl\.int64\)", "it is 64 bits wide as it comes"),
    Excuse(_NO_CAST, r"part\.to\(tl\.int64\)", _RULE, r"^v_row = "),
    Excuse(_NO_CAST, r"chunk.*\.to\(tl\.int64\)", "a batch has fewer than 2^31 counters"),
    Excuse(_RIGHT, r"BLOCK_M // ROWS", "a part behind its block has no rows", r"^PARTS: "),
    *(
        Excuse(operator, before, "it is the last part once more, with the same bits", r"^live = \(m < ")
        for operator, before in ((_MOVED_BOUND, r"part < parts"), (_RIGHT, r"\(m < .*\) & \(part < parts\)"))
    ),
    Excuse(_RIGHT, r"num_pairs \+ ROWS \* COLUMNS - 1", "columns behind the last pair are empty", r"^length = "),
    Excuse(_RIGHT, r"last_block - block", "entries behind the last have a mask", r"^for b0 in "),
    Excuse("clamp dropped", r"tl\.maximum\(count - row, 0\)", "all of its blocks have rows", module="_(two|three)_launch_"),
    Excuse(_MOVED_BOUND, r"rows > 0", "all of its blocks have rows", r"^tl\.store\(entry \+ 1", module="_(two|three)_launch_"),
    *(Excuse(operator, r"own \+ 1", "a block that is not there has no rows") for operator in (_LEFT, _RIGHT)),
    Excuse(_LEFT, r"live & \(group > 0\)", "a row that is not there has no adapter", r"^opens = "),
    Excuse(_MOVED_BOUND, r"m0 >= rows", "a program without rows stores nothing; it returns to save work"),
    Excuse(_LEFT, r"\(pair >= 0\) & \(pair < num_pairs\)", "padding is never negative"),
    Excuse("id cut to 32 bits", r"tl\.load\(topk_ids_ptr \+ pair\)", _WORK, function="shrink"),
    Excuse("update dropped", r"live &= tl\.load\(adapter_enabled.*", _WORK, function="shrink"),
)

_CONFUSED = {
    "adapter": "expert",
    "expert": "adapter",
    "A_STRIDE_L": "A_STRIDE_E",
    "A_STRIDE_E": "A_STRIDE_R",
    "A_STRIDE_R": "A_STRIDE_E",
    "B_STRIDE_L": "B_STRIDE_E",
    "B_STRIDE_E": "B_STRIDE_N",
    "B_STRIDE_N": "B_STRIDE_E",
    "X_STRIDE": "K",
    "first": "rows",
    "MAX_LORAS": "NUM_EXPERTS",
    "NUM_EXPERTS": "MAX_LORAS",
}
_MOVED: Mapping[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
}
_TURNED: Mapping[type[ast.cmpop], type[ast.cmpop]] = {ast.Lt: ast.Gt, ast.LtE: ast.GtE, ast.Gt: ast.Lt, ast.GtE: ast.LtE}
_EXCHANGED: Mapping[type[ast.operator], type[ast.operator]] = {
    ast.FloorDiv: ast.Mod,
    ast.Mod: ast.FloorDiv,
}
_ORDER = ("mbarrier.", "copy_", "commit_", "wait_rows", "fence_")  # what roles of warps hand shared memory to each other by
_HALVED = (ast.Add, ast.Sub, ast.Mult, ast.BitAnd, ast.BitOr, ast.FloorDiv, ast.Mod)


@dataclasses.dataclass(frozen=True)
class Mutant:
    """A change of one place in a module.

    Attributes:
        operator: what kind of change.
        function: the kernel, without the name of its variant.
        line: in the module, from 1.
        statement: the text of that line.
        before, after: the text of the place.
        text: the whole module, changed.
    """

    operator: str
    function: str
    line: int
    statement: str
    before: str
    after: str
    text: str = dataclasses.field(repr=False)

    @property
    def change(self) -> tuple[str, ...]:
        """What it is, wherever it stands."""
        return self.operator, self.function, self.statement, self.before, self.after

    def __str__(self) -> str:
        return f"{self.function}:{self.line}: {self.operator}: {self.before}  ->  {self.after}"


@dataclasses.dataclass(frozen=True)
class Fate:
    """What became of a mutant; ``killer`` is the case that failed, empty if it lives."""

    variant: str
    mutant: Mutant
    killer: str


def mutants(source: str, variant: str = "") -> list[Mutant]:
    """All mutants of the kernels in a module, in the order of their places."""
    found: list[Mutant] = []
    for function in ast.parse(source).body:
        if isinstance(function, ast.FunctionDef) and _is_kernel(function):
            name = function.name.removeprefix(variant).strip("_")
            wide = _wide(function)
            changes = (change for node in _places(function) for change in _changes(node) if not _is_wide_anyway(change, wide))
            found += changed(source, name, changes)
    return found


def _wide(function: ast.FunctionDef) -> set[str]:
    """Names of a kernel that are 64 bits wide from the first."""
    made = [node for node in ast.walk(function) if isinstance(node, ast.Assign)]
    wide = [each for each in made if re.search(r"\.to\([tg]l\.int64\)( - \w+)?$", ast.unparse(each.value))]
    return {ast.unparse(target) for each in wide for target in each.targets}


def _is_wide_anyway(change: Change, wide: set[str]) -> bool:
    """Whether it drops a cast to 64 bits of what has them."""
    operator, place, _ = change
    cast = re.fullmatch(r"(\w+)\.to\([tg]l\.int64\)", ast.unparse(place)) if operator == _NO_CAST else None
    return cast is not None and cast[1] in wide


def changed(source: str, function: str, changes: Iterable[Change]) -> Iterator[Mutant]:
    """A mutant of a module for each of these changes, which are in ``function``."""
    lines = source.splitlines(keepends=True)
    starts = list(itertools.accumulate(map(len, lines), initial=0))

    def offset(line: int, column: int) -> int:
        return starts[line - 1] + len(lines[line - 1].encode()[:column].decode())

    for operator, place, node in changes:
        assert place.end_lineno is not None and place.end_col_offset is not None
        begin, end = offset(place.lineno, place.col_offset), offset(place.end_lineno, place.end_col_offset)
        after = ast.unparse(node)
        if isinstance(place, ast.expr):
            after = f"({after})"
        before, text = " ".join(source[begin:end].split()), source[:begin] + after + source[end:]
        yield Mutant(operator, function, place.lineno, lines[place.lineno - 1].strip(), before, after, text)


def _is_kernel(function: ast.FunctionDef) -> bool:
    return any(ast.unparse(each).startswith(("triton.jit", "gluon.jit")) for each in function.decorator_list)


def _places(node: ast.AST) -> Iterator[ast.expr | ast.stmt]:
    """The expressions and statements of a body; of what only runs under dependent launch the statements alone."""
    body = node.body if isinstance(node, ast.FunctionDef) else ast.iter_child_nodes(node)
    for child in body:
        if isinstance(child, ast.If) and ast.unparse(child.test) == "PDL":
            yield from child.body
            continue
        if isinstance(child, (ast.expr, ast.stmt)):
            yield child
        yield from _places(child)


Change = tuple[str, ast.expr | ast.stmt, ast.AST]  # operator, place, what stands there then


def _changes(node: ast.expr | ast.stmt) -> Iterator[Change]:
    """The ways to change an expression or a statement."""
    if isinstance(node, ast.Expr) and ast.unparse(node) == "gdc_wait()":
        yield NO_WAIT, node, ast.Pass()
    elif isinstance(node, ast.Call):
        for operator, changed in _changed_calls(node):
            yield operator, node, changed
    elif isinstance(node, ast.BinOp):
        if isinstance(node.op, _HALVED):
            yield "right side dropped", node, node.left
        if isinstance(node.op, (ast.Add, ast.Mult, ast.BitAnd)):
            yield "left side dropped", node, node.right
        if isinstance(node.op, ast.Div) and (power := re.fullmatch(r"1\.0 \+ (\w+\.exp)\(-(.*)\)", ast.unparse(node.right))):
            rest = ast.parse(f"1.0 + {power[1]}({power[2]})", mode="eval").body
            yield "sigmoid that cancels", node, ast.BinOp(node.left, ast.Sub(), ast.BinOp(node.left, ast.Div(), rest))
        if isinstance(node.op, (ast.BitAnd, ast.BitOr)):
            yield "and for or", node, with_changes(node, op=ast.BitOr() if isinstance(node.op, ast.BitAnd) else ast.BitAnd())
        if isinstance(node.op, (ast.Add, ast.Sub)):
            yield "sign turned", node, with_changes(node, op=ast.Sub() if isinstance(node.op, ast.Add) else ast.Add())
        for side in ("left", "right"):
            if isinstance(number := getattr(node, side), ast.Constant) and isinstance(number.value, int):
                yield "number moved", number, ast.Constant(number.value + 1)
        if type(node.op) in _EXCHANGED:
            yield "division exchanged", node, with_changes(node, op=_EXCHANGED[type(node.op)]())
    elif isinstance(node, ast.Compare) and type(node.ops[0]) in _MOVED:
        if isinstance(node.ops[0], ast.NotEq) and ast.unparse(node.comparators[0]) == "0":
            yield "any other than one dropped", node, with_changes(node, ops=[ast.Eq()], comparators=[ast.Constant(1)])
        yield "bound moved", node, with_changes(node, ops=[_MOVED[type(node.ops[0])]()])
        if type(node.ops[0]) in _TURNED:
            yield "comparison turned", node, with_changes(node, ops=[_TURNED[type(node.ops[0])]()])
    elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load) and node.id in _CONFUSED:
        yield "names confused", node, with_changes(node, id=_CONFUSED[node.id])
    elif isinstance(node, ast.IfExp):
        yield "condition dropped", node, node.body
    elif isinstance(node, ast.If):
        yield "condition dropped", node.test, ast.Constant(True)
        yield "condition never holds", node.test, ast.Constant(False)
    elif isinstance(node, ast.Return) and node.value is None:
        yield "exit dropped", node, ast.Pass()
    elif isinstance(node, ast.AugAssign):
        yield "update dropped", node, ast.Pass()
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub) and not isinstance(node.operand, ast.Constant):
        yield "sign dropped", node, node.operand
    elif isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Constant) and isinstance(node.slice.value, int):
        yield "index moved", node, with_changes(node, slice=ast.Constant(node.slice.value + 1))


def _changed_calls(node: ast.Call) -> Iterator[tuple[str, ast.AST]]:
    called = re.sub(r"^gl\.", "tl.", ast.unparse(node.func))
    if called.startswith(_ORDER):
        yield "order dropped", ast.Constant(None)
    if called in ("tl.load", "tl.store") and any(word.arg == "mask" for word in node.keywords):
        kept = [word for word in node.keywords if word.arg not in ("mask", "other")]
        yield "mask dropped", with_changes(node, keywords=kept)
    if called == "tl.store":
        yield "store dropped", ast.Constant(None)
    if called == "tl.load" and re.match(r"topk_ids_ptr", ast.unparse(node.args[0])):
        yield "id cut to 32 bits", ast.Call(ast.Attribute(node, "to", ast.Load()), [ast.parse("tl.int32", mode="eval").body], [])
    if called.endswith(".to") and isinstance(node.func, ast.Attribute) and not _is_widened_again(node):
        yield "cast dropped", node.func.value
    if called in ("tl.minimum", "tl.maximum"):
        yield "clamp dropped", node.args[0]
        yield "only the clamp", node.args[1]
        other = {"minimum": "maximum", "maximum": "minimum"}[called[3:]]
        yield "clamp turned", with_changes(node, func=with_changes(node.func, attr=other))
    if called in ("tl.program_id", "tl.num_programs"):
        yield "other axis", with_changes(node, args=[ast.Constant(1)])
    if called == "tl.zeros":
        yield "sum does not begin at zero", ast.BinOp(node, ast.Add(), ast.Constant(1))
    if called in ("tl.range", "tl.static_range") and len(node.args) > 1:
        begin, end, *step = node.args
        by = step[0] if step else ast.Constant(1)
        yield "first turn dropped", with_changes(node, args=[ast.BinOp(begin, ast.Add(), by), end, *step])
        yield "last turn dropped", with_changes(node, args=[begin, ast.BinOp(end, ast.Sub(), by), *step])
        if re.fullmatch(r"\w*PARTS", ast.unparse(end)):
            most = ast.Call(ast.Name("min", ast.Load()), [end, ast.Constant(8)], [])
            yield "parts beyond eight dropped", with_changes(node, args=[begin, most, *step])
    if called == "tl.debug_barrier":
        yield "barrier dropped", ast.Constant(None)
    if called == "tl.where":
        test, bound, x = node.args
        for sign, clamp in (("<", "maximum"), (">", "minimum")):
            if ast.unparse(test) == f"{ast.unparse(x)} {sign} {ast.unparse(bound)}":
                yield "NaN dropped", with_changes(node, func=with_changes(node.func, attr=clamp), args=[x, bound])
        yield "choice dropped", node.args[1]
        yield "other choice", node.args[2]


def _is_widened_again(cast: ast.Call) -> bool:
    """Whether a cast of weights from memory is of one that was made: of 8 bits every type in between holds all numbers."""
    assert isinstance(cast.func, ast.Attribute)
    inner = cast.func.value
    while isinstance(inner, ast.Call) and isinstance(inner.func, ast.Attribute) and inner.func.attr == "to":
        inner = inner.func.value
    return inner is not cast.func.value and "eviction_policy=WEIGHTS" in ast.unparse(inner)


def with_changes(node: ast.AST, **changes: object) -> ast.AST:
    """A copy of a node with other fields."""
    changed = copy.copy(node)
    for name, value in changes.items():
        setattr(changed, name, value)
    return changed


class Bench:
    """A copy of the generated package that mutants are tried in; a context."""

    def __init__(self, out: Path) -> None:
        self._out = out
        self._suites = suites(out)
        self._tried = 0
        self._cases: dict[str, list[Case]] = {}  # of a variant; the last killer comes first
        self._right: set[tuple[str, str, bool]] = set()  # variants and cases that the text passes as it is, exactly or not

    def __enter__(self) -> Bench:
        self._folder = tempfile.TemporaryDirectory(prefix="kernelgen")
        self._name = f"mutated_{Path(self._folder.name).name}"
        target = Path(self._folder.name, self._name)
        shutil.copytree(
            self._out / names.PACKAGE, target, ignore=shutil.ignore_patterns("__pycache__")
        )
        sys.path.insert(0, self._folder.name)
        self.package = importlib.import_module(self._name)
        return self

    def __exit__(self, *error: object) -> None:
        sys.path.remove(self._folder.name)
        self._folder.cleanup()

    def variants(self) -> Iterator[tuple[Suite, Variant]]:
        """All variants of all families."""
        for suite in self._suites.values():
            for variant in suite.variants:
                yield suite, variant

    def source(self, variant: Variant) -> str:
        """The text of a variant's module."""
        path = names.family_path(variant.family, variant.module)
        return (self._out / path).read_text("utf-8")

    def place(self, variant: Variant, text: str) -> tuple[str, Variant]:
        """Put a changed text of a variant beside it: the name of the package, and the variant whose module it is."""
        self._tried += 1
        module = f"mutant_{self._tried}"
        Path(self._folder.name, self._name, variant.family, f"{module}.py").write_text(text, "utf-8")
        importlib.invalidate_caches()
        return self._name, dataclasses.replace(variant, module=module)

    @contextlib.contextmanager
    def swapped(self, package: str, variant: Variant, text: str) -> Iterator[None]:
        """Inside, the kernels of a changed text stand in the place of a variant's in a package, for front doors too."""
        places = ((package, variant), self.place(variant, text))
        own, changed = (importlib.import_module(f"{name}.{v.family}.{v.module}") for name, v in places)
        with contextlib.ExitStack() as stack:
            for name, kernel in vars(own).items():
                if hasattr(kernel, "fn"):
                    stack.enter_context(mock.patch.dict(vars(kernel), vars(getattr(changed, name))))
            yield

    def fate(self, suite: Suite, variant: Variant, mutant: Mutant, only: Sequence[Case] = ()) -> Fate:
        """Try a mutant on all cases that fit the variant, or on some.

        Raises:
            RuntimeError: what kills it does not pass without it.
        """
        package, changed = self.place(variant, mutant.text)
        try:
            changed.launcher(self.package)
        except Exception:
            return Fate(variant.name, mutant, "import")
        if variant.name not in self._cases:
            self._cases[variant.name] = list(suite.cases_for(variant))
        cases, of_order, dependent = list(only) or self._cases[variant.name], mutant.operator == NO_WAIT, False
        for i, case in enumerate(cases):
            try:
                dependent |= self._meet(suite, changed, case, of_order)
            except Exception:  # however it fails, it is noticed
                self._require_right(suite, variant, case, False)
                cases.insert(0, cases.pop(i))
                return Fate(variant.name, mutant, case.name)
        if of_order and not dependent:  # by itself it is not; tests/test_order.py tries it in front doors
            return Fate(variant.name, mutant, "not launched dependent")
        for case in [] if only or of_order else suite.exact_cases(variant):
            try:
                dataclasses.replace(suite, package=package).check_exactly(changed, case, "cpu")
            except Exception:
                self._require_right(suite, variant, case, True)
                return Fate(variant.name, mutant, f"{case.name}, exactly")
        return Fate(variant.name, mutant, "" if only or of_order else self._broken_law(suite, variant, mutant))

    def _broken_law(self, suite: Suite, variant: Variant, mutant: Mutant) -> str:
        """The law that does not hold with a mutant in the place of its variant; empty: all do."""
        also = [other for other in self._suites.values() if suite.family in other.laws_are_also_of]
        for whose in (suite, *also):
            for law in whose.laws:
                try:
                    with self.swapped(suite.package, variant, mutant.text), contextlib.suppress(unittest.SkipTest):
                        whose.uphold(law, "cpu")
                except Exception:
                    whose.uphold(law, "cpu")  # raises where it does not hold without the mutant
                    return law.name
        return ""

    def _meet(self, suite: Suite, variant: Variant, case: Case, of_order: bool = False) -> bool:
        """Run a case; whether something was launched dependent, where the order of launches is watched."""
        from kernelgen.prove.order import launches_of  # imports triton, which a worker tells first whether to interpret

        with launches_of(self.package) if of_order else contextlib.nullcontext() as chain:
            suite.check_launcher(self.package, variant.launcher(self.package), variant, case, "cpu")
        return chain is not None and bool(chain.dependent)

    def _require_right(self, suite: Suite, variant: Variant, case: Case, exactly: bool) -> None:
        """Raise where a case fails without any mutant too: it would kill all."""
        if (variant.name, case.name, exactly) in self._right:
            return
        try:
            if exactly:
                dataclasses.replace(suite, package=self._name).check_exactly(variant, case, "cpu")
            else:
                self._meet(suite, variant, case)
        except Exception as error:
            raise RuntimeError(f"{variant.name} fails {case} as it is: {error}") from error
        self._right.add((variant.name, case.name, exactly))


def excused(mutant: Mutant) -> bool:
    """Whether no case can notice the mutant, as ``EQUIVALENT`` explains."""
    return any(excuse.of(mutant) for excuse in EQUIVALENT)


_TWINS = 4  # other texts in which a change is tried
_Places = tuple[tuple[str, int], ...]  # names of variants, and numbers of their mutants


def _every(variants: Iterable[tuple[Suite, Variant]], source: Callable[[Variant], str], jobs: int) -> Iterator[_Places]:
    """All mutants of variants, a variant in as many parts as there are processes."""
    for _, variant in variants:
        places = [(variant.name, i) for i, m in enumerate(mutants(source(variant), variant.name)) if not excused(m)]
        yield from (tuple(places[part::jobs]) for part in range(jobs))


def _sampled(
    variants: Iterable[tuple[Suite, Variant]], source: Callable[[Variant], str], jobs: int, number: int, seed: int
) -> Iterator[_Places]:
    """So many mutants of each family: its variants take turns, and so do operators."""
    for family, group in itertools.groupby((variant for _, variant in variants), lambda variant: variant.family):
        rng, places, tried = random.Random(f"{seed} {family}"), [], collections.Counter[str]()
        members = sorted(group, key=lambda _: rng.random())
        for variant in itertools.islice(itertools.cycle(members), number):
            found = [(i, m.operator) for i, m in enumerate(mutants(source(variant), variant.name)) if not excused(m)]
            place, operator = min(found, key=lambda each: (tried[each[1]], rng.random()))
            tried[operator] += 1
            places.append((variant.name, place))
        yield from (tuple(places[part::jobs]) for part in range(jobs))


def _try(out: Path, places: _Places) -> list[Fate]:
    start_worker(out, "cpu")
    with Bench(out) as bench:
        found = {variant.name: (suite, variant) for suite, variant in bench.variants()}
        texts = functools.lru_cache(_TWINS + 1)(lambda name: mutants(bench.source(found[name][1]), name))
        return [_fate(bench, *found[name], texts(name)[place], texts) for name, place in places]


def _fate(bench: Bench, suite: Suite, variant: Variant, mutant: Mutant, texts: Callable[[str], list[Mutant]]) -> Fate:
    """Of a mutant, or of the same change where another text of the template has it: a fault of a template is in all of them."""
    fate = bench.fate(suite, variant, mutant)
    if fate.killer:
        return fate
    holding = [v for v in suite.variants if v != variant and mutant.statement in bench.source(v)]
    others = [v for v in holding if v.tags.get(SCHEDULE) == variant.tags.get(SCHEDULE)]
    elsewhere = [v for v in holding if v not in others][:1]  # a macro that schedules share
    plain = sorted(others, key=lambda v: sum(tag not in ("none", "plain") for tag in v.tags.values()))[:1]  # what laws take
    alike = sorted(others, key=lambda v: sum(v.tags[axis] != tag for axis, tag in variant.tags.items()))[:1]  # likewise
    holders = dict.fromkeys([*plain, *alike, *elsewhere, *sorted(others, key=lambda v: -len(suite.cases_for(v)))])
    for twin in itertools.islice(holders, _TWINS):
        for same in texts(twin.name):
            if same.change == mutant.change and (killer := bench.fate(suite, twin, same).killer):
                return Fate(variant.name, mutant, f"{killer} of {twin}")
    return fate


def run(
    out: Path,
    only: Sequence[str] = ("*",),
    *,
    sample: int = 0,
    seed: int = 0,
    workers: int = 1,
    progress: Progress = no_progress,
    lives: Callable[[str], None] = lambda line: None,
) -> list[tuple[str, Fate]]:
    """Try mutants of the variants in ``out``; of each the family, and what became of it.

    Args:
        out: the folder that holds ``generated/``.
        only: globs on the names of variants.
        sample: so many of each family, drawn by ``seed``; 0: all.
        seed: of the drawing.
        workers: processes.
        progress: shows how far it is.
        lives: is told of each mutant that no case notices, at once.

    Raises:
        Failure: no variant has such a name (exit code 2).
        RuntimeError: a case fails without any mutant.
    """
    with Bench(out) as bench:
        chosen = [found for found in bench.variants() if any(fnmatch.fnmatchcase(found[1].name, glob) for glob in only)]
        if not chosen:
            raise nothing_named(out, " or ".join(only))
        draw = functools.partial(_sampled, number=sample, seed=seed) if sample else _every
        tasks = [places for places in draw(chosen, bench.source, workers) if places]
    family_of = {variant.name: variant.family for _, variant in chosen}
    found: list[tuple[str, Fate]] = []

    def keep(places: _Places, fates: list[Fate] | Fault) -> None:
        if isinstance(fates, Fault):
            raise RuntimeError(f"{places[0][0]}: {fates.reason}")
        for fate in fates:
            found.append((family_of[fate.variant], fate))
            if not fate.killer:
                lives(f"{fate.variant} {fate.mutant}")

    in_processes(functools.partial(_try, out.resolve()), tasks, workers, progress, keep, method="spawn")
    return found
