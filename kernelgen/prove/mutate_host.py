"""Mutants of host code: faults of dispatch that tests must notice. ``kernelgen mutate --host`` lists the living.

A mutant is a module of Python of the generated package with one place changed: a check left out, a condition turned round, a
bound moved, a part of a key that is fixed, two operands exchanged, a number or a default that is another. It stands in a copy of
the package, in a process of its own, where the tests of dispatch meet it; those of its family come first. It is killed when one
of them fails, in any way.
"""

from __future__ import annotations

import ast
import compileall
import contextlib
import dataclasses
import fnmatch
import importlib
import importlib.util
import io
import itertools
import os
import random
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Callable, Iterator, Mapping, Sequence

from kernelgen.core import names
from kernelgen.core.diagnostics import failure
from kernelgen.core.processes import Progress, no_progress
from kernelgen.prove.mutate import Change, Excuse, Mutant, changed, with_changes

# Host code that is no dispatch: repairs of the interpreter, and what is told of a call.
LEFT_OUT = ("_repairs.py", "_launches.py", "_tuned.py", "_table.py")

EQUIVALENT: Sequence[Excuse] = ()

_MOVED: Mapping[type[ast.cmpop], type[ast.cmpop]] = {
    **{ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt},
    **{ast.Eq: ast.NotEq, ast.NotEq: ast.Eq, ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In},
}
_EXCHANGED: Mapping[type[ast.operator], type[ast.operator]] = {
    **{ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Add, ast.FloorDiv: ast.Mult, ast.Mod: ast.FloorDiv},
}
_OTHER_END = {"min": "max", "max": "min"}
_KEYS = ("Key", "Problem", "_Shape", "Plan")  # classes of what is known of a call
_REFUSES = ("fail", "refuse", "check", "admit")


def mutants(source: str) -> list[Mutant]:
    """All mutants of a module, in the order of their places."""
    found: list[Mutant] = []
    for name, node in _functions(ast.parse(source), ""):
        found += changed(source, name, (change for inner in _inside(node) for change in _changes(inner)))
    return found


def _functions(node: ast.AST, inside: str) -> Iterator[tuple[str, ast.AST]]:
    """(its name, it) of each function that is not inside of another, and each other statement of a module or a class."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ClassDef):
            yield from _functions(child, f"{inside}{child.name}.")
        elif isinstance(child, (ast.FunctionDef, ast.Assign, ast.AnnAssign)):
            yield f"{inside}{getattr(child, 'name', '')}".rstrip("."), child


def _inside(node: ast.AST) -> Iterator[ast.AST]:
    """A node and those in it; not annotations, and nothing of what is only said."""
    yield node
    for field, value in ast.iter_fields(node):
        if field in ("annotation", "returns", "decorator_list"):
            continue
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST) and not isinstance(child, ast.JoinedStr):
                if isinstance(child, ast.Call) and _says(child):
                    continue
                yield from _inside(child)


def _says(node: ast.AST) -> bool:
    """Whether it is the call that refuses, whose words are not dispatch, or is that as a statement."""
    node = node.value if isinstance(node, ast.Expr) else node
    return isinstance(node, ast.Call) and ast.unparse(node.func).rpartition(".")[2] == "fail"


def _changes(node: ast.AST) -> Iterator[Change]:
    """The ways to change a place."""
    if isinstance(node, ast.If):
        refuses = len(node.body) == 1 and not node.orelse and (isinstance(node.body[0], ast.Raise) or _says(node.body[0]))
        yield from [] if refuses else [("condition never holds", node.test, ast.Constant(False))]
        yield "condition turned", node.test, ast.UnaryOp(ast.Not(), node.test)
    elif isinstance(node, ast.IfExp):
        yield "condition turned", node.test, ast.UnaryOp(ast.Not(), node.test)
    elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
        called = ast.unparse(node.value.func).rpartition(".")[2].strip("_")
        kind = "check" if called.startswith(_REFUSES) else "statement"
        yield f"{kind} dropped", node, ast.Pass()
    elif isinstance(node, ast.Raise) and ast.unparse(node) != "raise NotImplementedError":
        yield "check dropped", node, ast.Pass()
    elif isinstance(node, ast.AugAssign):
        yield "statement dropped", node, ast.Pass()
    elif isinstance(node, ast.Compare) and type(node.ops[0]) in _MOVED:
        yield "bound moved", node, with_changes(node, ops=[_MOVED[type(node.ops[0])](), *node.ops[1:]])
    elif isinstance(node, ast.BoolOp):
        yield "or for and, and for or", node, with_changes(node, op=ast.Or() if isinstance(node.op, ast.And) else ast.And())
        for i in range(len(node.values)):
            rest = [*node.values[:i], *node.values[i + 1 :]]
            yield "side dropped", node, rest[0] if len(rest) == 1 else with_changes(node, values=rest)
    elif isinstance(node, ast.BinOp) and type(node.op) in _EXCHANGED:
        yield "operator exchanged", node, with_changes(node, op=_EXCHANGED[type(node.op)]())
    elif isinstance(node, (ast.GeneratorExp, ast.ListComp, ast.SetComp, ast.DictComp)):
        for comp in node.generators:
            yield from (("filter dropped", test, ast.Constant(True)) for test in comp.ifs)
    elif isinstance(node, ast.Call):
        yield from _changed_calls(node)
    elif isinstance(node, ast.Tuple) and isinstance(node.ctx, ast.Load):
        yield from (("operands exchanged", node, with_changes(node, elts=order)) for order in _exchanged(node.elts))
    elif isinstance(node, ast.FunctionDef):
        for default in (*node.args.defaults, *(d for d in node.args.kw_defaults if d is not None)):
            yield from _changed_default(default)
    elif isinstance(node, (ast.Assign, ast.AnnAssign)) and node.value is not None:
        yield from _changed_default(node.value)
    elif isinstance(node, ast.Constant) and isinstance(node.value, (int, float)) and not isinstance(node.value, bool):
        yield "number changed", node, ast.Constant(node.value + 1)


def _changed_calls(node: ast.Call) -> Iterator[Change]:
    called = ast.unparse(node.func).rpartition(".")[2]
    yield from (("operands exchanged", node, with_changes(node, args=order)) for order in _exchanged(node.args))
    for order in _exchanged([word.value for word in node.keywords]):
        words = [ast.keyword(word.arg, value) for word, value in zip(node.keywords, order, strict=True)]
        yield "operands exchanged", node, with_changes(node, keywords=words)
    if called in _OTHER_END:
        yield "least for most, and most for least", node, with_changes(node, func=ast.Name(_OTHER_END[called]))
    if called in _KEYS:
        for i, word in enumerate(node.keywords):
            fixed = ast.keyword(word.arg, ast.Constant(1))
            yield "part fixed", node, with_changes(node, keywords=[*node.keywords[:i], fixed, *node.keywords[i + 1 :]])
        for i, part in enumerate(node.args):
            if not isinstance(part, ast.Starred):
                fixed_args = [*node.args[:i], ast.Constant(1), *node.args[i + 1 :]]
                yield "part fixed", node, with_changes(node, args=fixed_args)


def _exchanged(parts: Sequence[ast.expr]) -> Iterator[list[ast.expr]]:
    """Neighbours that are names, the other way round."""
    for i, (one, other) in enumerate(itertools.pairwise(parts)):
        if all(isinstance(part, (ast.Name, ast.Attribute)) for part in (one, other)):
            yield [*parts[:i], other, one, *parts[i + 2 :]]


def _changed_default(node: ast.expr) -> Iterator[Change]:
    if isinstance(node, ast.Constant) and isinstance(node.value, bool):
        yield "default changed", node, ast.Constant(not node.value)


@dataclasses.dataclass(frozen=True)
class Fate:
    """What became of a mutant of a module; ``killer``: what failed, empty if it lives."""

    module: str
    mutant: Mutant
    killer: str


class Bench:
    """A copy of the generated package, of which one module at a time is a mutant; a context.

    Args:
        root: of the project, with generated/ and tests/.
    """

    def __init__(self, root: Path) -> None:
        self._root = root

    def __enter__(self) -> Bench:
        self._folder = tempfile.TemporaryDirectory(prefix="kernelgen")
        self._copy = Path(self._folder.name, names.PACKAGE)
        shutil.copytree(self._root / names.PACKAGE, self._copy, ignore=shutil.ignore_patterns("__pycache__"))
        compileall.compile_dir(self._copy, quiet=1)
        return self

    def __exit__(self, *error: object) -> None:
        self._folder.cleanup()

    def modules(self) -> list[str]:
        """The paths of host modules in the package."""
        found = [*self._copy.glob("_*.py"), *self._copy.glob("*/_*.py")]
        paths = [path for path in found if path.name not in (*LEFT_OUT, "__init__.py")]
        return sorted(path.relative_to(self._copy).as_posix() for path in paths)

    def source(self, module: str) -> str:
        """The text of a module."""
        return (self._root / names.PACKAGE / module).read_text("utf-8")

    def fate(self, module: str, mutant: Mutant, limit: float = 1200.0) -> Fate:
        """Run the tests of dispatch on a mutant, in a process of its own."""
        path = self._copy / module
        compiled = Path(importlib.util.cache_from_source(str(path)))
        kept = compiled.read_bytes()
        compiled.unlink()
        path.write_text(mutant.text, "utf-8")
        try:
            return Fate(module, mutant, self._killer(module, limit))
        finally:
            shutil.copy2(self._root / names.PACKAGE / module, path)
            compiled.write_bytes(kept)

    def _killer(self, module: str, limit: float) -> str:
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(reader)
            with contextlib.suppress(BaseException):
                os.write(writer, (_first_failure(self._root, self._copy.parent, module) or "lives").encode()[:4000])
            os._exit(0)
        os.close(writer)
        begin = time.monotonic()
        with open(reader, "rb") as pipe:
            os.set_blocking(reader, False)
            told = b""
            while not told and time.monotonic() - begin < limit:
                told = pipe.read() or b""
                if os.waitpid(child, os.WNOHANG)[0]:
                    told = told or pipe.read() or b"it ended"
                    return "" if told == b"lives" else told.decode()
                time.sleep(0.02)
            if not told:
                os.kill(child, 9)
            os.waitpid(child, 0)
            return "" if told == b"lives" else told.decode() or "the time"


def tests_of(module: str, package: Path) -> list[list[str]]:
    """What is run for a mutant of a module, of pytest's arguments, one after the other: what is likeliest to fail comes first.

    Last come the cases of its family, or of two of those whose kernels call what is in it.
    """
    name = (module.partition("/")[0] if "/" in module else Path(module).stem).strip("_")
    sequences, doors = "tests/test_sequences.py", "tests/test_front_doors.py"
    families, layers = [name], []
    if "/" not in module:
        layers = [[f"tests/test_{layer}.py" for layer in ("order", "ops", "lora", "fused_moe", "quant", "which")]]
        layers.append(["tests/test_tune.py", "-k", "takes_tiles"])
        line = f"from ..{Path(module).stem} import"
        families = sorted({path.parent.name for path in package.glob("*/[!_]*.py") if line in path.read_text("utf-8")})
    own = [[f"tests/generated/test_{family}.py", "--quick"] for family in families[:2]]
    return [[sequences, "-k", name], [doors, "-k", name], [sequences], [doors], *layers, *own]


def _first_failure(root: Path, folder: Path, module: str) -> str:
    """The first test that fails on the package in ``folder``; empty: none does."""
    sys.dont_write_bytecode = True
    os.chdir(root)
    sys.path.insert(0, str(folder))
    import pytest

    class Watch:
        failed = ""

        def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
            if report.failed:
                self.failed = self.failed or report.nodeid

    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        try:
            importlib.import_module(names.PACKAGE)
        except Exception:
            return "import"
        for arguments in tests_of(module, folder / names.PACKAGE):
            watch = Watch()
            code = pytest.main(["-x", "-q", "-p", "no:cacheprovider", *arguments], plugins=[watch])
            if code not in (0, 5):
                return watch.failed or f"pytest: {code}"
    return ""


def excused(mutant: Mutant) -> str:
    """Why no test can notice the mutant, as ``EQUIVALENT`` explains; else nothing."""
    return next((excuse.why for excuse in EQUIVALENT if excuse.of(mutant)), "")


def run(
    root: Path,
    only: Sequence[str] = ("*",),
    *,
    sample: int = 0,
    seed: int = 0,
    progress: Progress = no_progress,
    lives: Callable[[str], None] = lambda line: None,
) -> list[tuple[str, Fate]]:
    """Try mutants of host code; of each its module, and what became of it. As ``mutate.run`` does, in this process.

    Args:
        root: the folder that holds ``generated/`` and ``tests/``.
        only: globs on the paths of modules.
        sample: so many of each module, drawn by ``seed``; 0: all.
        seed: of the drawing.
        progress: shows how far it is.
        lives: is told of each mutant that no test notices, at once.

    Raises:
        Failure: no module has such a path, or there are no tests (exit code 2).
    """
    if not (root / "tests").is_dir():
        hint = "mutants of host code meet those of the repository: run it there"
        raise failure("KG001", str(root), "there are no tests in it", hint)
    os.environ.setdefault("TRITON_INTERPRET", "1")
    import torch

    from kernelgen.prove import interpreter

    interpreter.install()
    torch.set_num_threads(1)
    found: list[tuple[str, Fate]] = []
    with Bench(root.resolve()) as bench:
        chosen: list[tuple[str, Mutant]] = []
        for module in bench.modules():
            if any(fnmatch.fnmatchcase(module, glob) for glob in only):
                all_of = [mutant for mutant in mutants(bench.source(module)) if not excused(mutant)]
                some = random.Random(f"{seed} {module}").sample(all_of, min(sample, len(all_of))) if sample else all_of
                chosen += [(module, mutant) for mutant in sorted(some, key=lambda m: m.line)]
        if not chosen:
            raise failure("KG040", " or ".join(only), "no module of host code has a path like this", "one is moe_sum/_problem.py")
        for module, mutant in progress(chosen, len(chosen)):
            fate = bench.fate(module, mutant)
            found.append((module, fate))
            if not fate.killer:
                lives(f"{module} {mutant}")
    return found
