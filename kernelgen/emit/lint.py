"""What the Python of a generated file must be: plain, of allowed imports, and without names that there are not."""

from __future__ import annotations

import ast
import builtins
import collections
import functools
import symtable
import warnings
from typing import Any, Iterable, Iterator, Mapping, Sequence

from kernelgen.core.diagnostics import Diagnostic, Nearest, did_you_mean
from kernelgen.core.model import Location
from kernelgen.core.names import PACKAGE
from kernelgen.emit import outline
from kernelgen.emit.members import members
from kernelgen.emit.outline import export_lists, exports, is_constant

_STANDARD = frozenset(
    [
        "__future__",
        "collections",
        "contextlib",
        "dataclasses",
        "enum",
        "functools",
        "importlib",
        "itertools",
        "linecache",
        "logging",
        "math",
        "os",
        "sys",
        "threading",
        "types",
        "typing",
        "warnings",
        "weakref",
    ]
)
_PACKAGE_IMPORTS = _STANDARD | {"torch", "triton"}
_TEST_IMPORTS = _PACKAGE_IMPORTS | {"kernelgen", "pytest", PACKAGE}
_FORBIDDEN_NAMES = frozenset(
    [
        "__builtins__",
        "__import__",
        "breakpoint",
        "compile",
        "eval",
        "exec",
        "globals",
        "input",
        "locals",
        "open",
        "vars",
    ]
)
_Nodes = Mapping[type[ast.AST], Sequence[Any]]  # of a tree, by kind
_SHOWN = 80  # characters of a name
_ALWAYS = frozenset(dir(builtins)) | {"__file__", "__path__"}  # what every module can read


@functools.lru_cache(maxsize=2000)  # as of ``outline``
def faults(path: str, text: str, rendered: bool = True) -> tuple[Diagnostic, ...]:
    """Why ``text`` is not acceptable as the generated file ``path``.

    ``rendered``: a template and a spec had a say in it; False for a copy, which may use any builtin, and numpy.
    """
    return tuple(_Lint(path, text).faults(rendered))


class _Lint:
    def __init__(self, path: str, text: str) -> None:
        self.path = path
        self.text = text
        self.lines = text.split("\n")

    def faults(self, rendered: bool) -> Iterator[Diagnostic]:
        for number, line in enumerate(self.lines, 1):
            if not line.isprintable() and not line.lstrip("\t").isprintable():
                yield self._fault(number, 1, "a character that cannot be seen")
                return
        try:
            tree = ast.parse(self.text)
            table = symtable.symtable(self.text, self.path, "exec")
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", SyntaxWarning)
                compile(self.text, self.path, "exec", dont_inherit=True)  # what a grammar allows: a return outside of a function
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
            at = (error.lineno or 0, error.offset or 1) if isinstance(error, SyntaxError) else (0, 1)
            reason = error.msg if isinstance(error, SyntaxError) else "it is nested too deep"
            yield self._fault(*at, f"not Python: {reason}")
            return
        nodes: dict[type[ast.AST], list[Any]] = collections.defaultdict(list)  # most are of kinds that nobody judges
        for node in outline.nodes(tree):
            nodes[type(node)].append(node)
        yield from self._import_faults(nodes, rendered)
        yield from self._key_faults(nodes)
        yield from self._name_faults(nodes, table, exports(tree) or {})
        yield from self._export_faults(nodes, tree)
        yield from self._member_faults(nodes, table)
        yield from self._launch_faults(nodes)
        yield from self._loop_faults(nodes)
        yield from self._idle_faults(nodes, tree) if rendered else ()

    def _import_faults(self, nodes: _Nodes, rendered: bool) -> Iterator[Diagnostic]:
        allowed = _PACKAGE_IMPORTS if self.path.startswith(f"{PACKAGE}/") else _TEST_IMPORTS
        if not rendered:
            allowed |= {"ast", "numpy"}  # which repairs of Triton's interpreter need
        for node in _imports(nodes):
            for module in _modules(node):
                if module.split(".")[0] not in allowed:
                    message = f"import of {module}, which generated files do without"
                    yield self._fault_at(node, message)
            if isinstance(node, ast.ImportFrom) and any(alias.name == "*" for alias in node.names):
                yield self._fault_at(node, "import of *; name what is imported")
        for name in nodes[ast.Name] if rendered else ():
            if name.id in _FORBIDDEN_NAMES:
                yield self._fault_at(name, f"use of {name.id}, which generated files do without", name.id)

    def _key_faults(self, nodes: _Nodes) -> Iterator[Diagnostic]:
        """Constants that are a key of a dictionary twice, with another value."""
        for node in nodes[ast.Dict]:
            seen: dict[str, ast.expr] = {}
            for key, value in zip(node.keys, node.values, strict=True):
                parts = key.elts if isinstance(key, ast.Tuple) else [key]
                if key is None or not all(isinstance(part, ast.Constant) for part in parts):
                    continue
                text = ast.unparse(key)
                if seen.setdefault(text, value) is not value:
                    yield self._fault_at(key, f"the key {text[:_SHOWN]} stands twice in one dictionary, with another value")

    def _name_faults(
        self, nodes: _Nodes, table: symtable.SymbolTable, exported: Mapping[str, ast.expr]
    ) -> Iterator[Diagnostic]:
        """Names that nothing binds where they are read, and exports that are none."""
        bound, everywhere, unbound = set(_ALWAYS), set(_ALWAYS), []
        for scope in _scopes(table):
            for symbol in scope.get_symbols():
                name = symbol.get_name()
                if symbol.is_assigned() or symbol.is_imported() or symbol.is_parameter():
                    everywhere.add(name)
                    if scope is table or symbol.is_declared_global():
                        bound.add(name)
                elif symbol.is_global() and symbol.is_referenced():
                    unbound.append((name, scope))
        missing = [(name, scope) for name, scope in unbound if name not in bound]
        names: Sequence[ast.Name] = nodes[ast.Name]
        for name, scope in missing:
            read = next((n for n in names if n.id == name and n.lineno >= scope.get_lineno()), None)
            if read is not None:
                known = {*bound, *scope.get_identifiers()} - {name}
                yield self._fault_at(read, f"undefined name {name[:_SHOWN]!r}", name, _near(name, known))
        told = {name for name, _ in missing}
        for read in names:  # annotations are in no scope
            if read.id not in everywhere and read.id not in told:
                told.add(read.id)
                yield self._fault_at(read, f"undefined name {read.id[:_SHOWN]!r}", read.id, _near(read.id, everywhere))
        for name, where in exported.items():
            if name not in bound - _ALWAYS:
                message = f"__all__ has {name[:_SHOWN]!r}, which is not defined"
                yield self._fault_at(where, message, name, _near(name, bound - _ALWAYS))

    def _export_faults(self, nodes: _Nodes, tree: ast.Module) -> Iterator[Diagnostic]:
        """What becomes of ``__all__`` and cannot be read off the text."""
        read = {id(target) for _, target, _ in export_lists(tree)}
        for name in nodes[ast.Name]:
            if name.id == "__all__" and id(name) not in read:
                message = "__all__ is not a list of names that are written out"
                yield self._fault_at(name, message, name.id, '__all__ = ["a", "b"], at the top level')

    def _member_faults(self, nodes: _Nodes, table: symtable.SymbolTable) -> Iterator[Diagnostic]:
        """What modules are asked for and do not have."""
        modules: dict[str, str] = {}  # name in this file -> module
        imported = set()
        for node in _imports(nodes):
            if isinstance(node, ast.Import):
                for alias in node.names:
                    imported.add(alias.name)
                    modules[alias.asname or alias.name.split(".")[0]] = alias.name if alias.asname else alias.name.split(".")[0]
                    *parents, last = alias.name.split(".")
                    if parents and _lacks(".".join(parents), last):
                        yield self._missing(node, ".".join(parents), last)
            elif node.level == 0 and node.module:
                for alias in node.names:
                    if members(f"{node.module}.{alias.name}"):
                        modules[alias.asname or alias.name] = f"{node.module}.{alias.name}"
                    elif alias.name != "*" and _lacks(node.module, alias.name):
                        yield self._missing(node, node.module, alias.name)
        inner = (symbol for scope in _scopes(table) if scope is not table for symbol in scope.get_symbols())
        for symbol in inner:
            if symbol.is_local() and not symbol.is_imported():
                modules.pop(symbol.get_name(), None)

        def module_of(node: ast.expr) -> str | None:
            if isinstance(node, ast.Name):
                return modules.get(node.id)
            parent = module_of(node.value) if isinstance(node, ast.Attribute) else None
            return f"{parent}.{node.attr}" if parent and isinstance(node, ast.Attribute) else None

        for member in nodes[ast.Attribute]:
            if isinstance(member.ctx, ast.Load):
                module = module_of(member.value)
                if module and f"{module}.{member.attr}" not in imported and _lacks(module, member.attr):
                    yield self._missing(member, module, member.attr)

    def _launch_faults(self, nodes: _Nodes) -> Iterator[Diagnostic]:
        """Launches that are bound with other parameters than their kernel has."""
        kernels = {node.name: node for node in nodes[ast.FunctionDef]}
        launched: dict[str, str] = {}  # by the name of its launcher
        for node in nodes[ast.Assign]:
            match node:
                case ast.Assign([ast.Name(name)], ast.Call(ast.Attribute(_, "Launcher"), [ast.Name(kernel), *_])):
                    launched[name] = kernel
        for node in nodes[ast.Call]:
            match node:
                case ast.Call(ast.Attribute(ast.Name(name), "bind"), _, given) if launched.get(name) in kernels:
                    kernel = launched[name]
                    names, wanted = {keyword.arg for keyword in given}, _constants(kernels[kernel])
                    known = [each.arg for each in kernels[kernel].args.args]
                    for keyword in given:
                        if keyword.arg is not None and keyword.arg not in known:
                            message = f"{kernel[:_SHOWN]} has no parameter {keyword.arg[:_SHOWN]!r}"
                            yield self._fault_at(keyword, message, keyword.arg, _near(keyword.arg, known))
                    missing = [constant for constant in wanted if constant not in names]
                    if missing and None not in names:
                        yield self._fault_at(node, f"the constant {missing[0][:_SHOWN]!r} of {kernel[:_SHOWN]} is not given")

    def _loop_faults(self, nodes: _Nodes) -> Iterator[Diagnostic]:
        """Names that a loop of a kernel sets to one that it changes later.

        Triton looks for what a loop carries by what its first turn changes: such a name, set so in front of the loop too, has the
        same value there, and keeps it in all turns. What waits by it never ends.
        """
        kernels = [node for node in nodes[ast.FunctionDef] if any(".jit" in ast.unparse(each) for each in node.decorator_list)]
        for loop in (node for kernel in kernels for node in ast.walk(kernel) if isinstance(node, ast.For | ast.While)):
            inside = [node for part in loop.body for node in ast.walk(part)]
            stores = [node for node in inside if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)]
            for node in inside:
                for target, value in _renamed(node):
                    lines = [store.lineno for store in stores if store.id == value.id]
                    if lines and min(lines) >= value.lineno and target.id != value.id:
                        message = f"{target.id[:_SHOWN]} is set to {value.id[:_SHOWN]}, which the loop changes later"
                        yield self._fault_at(value, message, value.id, "calculate it: Triton would not carry it around the loop")

    def _idle_faults(self, nodes: _Nodes, tree: ast.Module) -> Iterator[Diagnostic]:
        """What a kernel takes or works out, and a module with kernels imports, and does not read."""
        kernels = [node for node in tree.body if isinstance(node, ast.FunctionDef) and outline.is_kernel(node)]
        for kernel in kernels:
            inside = [node for node in outline.nodes(kernel) if isinstance(node, ast.Name)]
            read = {node.id for node in inside if isinstance(node.ctx, ast.Load)}
            stored = {node.id: node for node in reversed(inside) if isinstance(node.ctx, ast.Store)}
            for name, node in {**stored, **{each.arg: each for each in kernel.args.args}}.items():
                if name not in read and not name.startswith("_"):
                    hint = "drop it, or call it _ where others stand beside it"
                    yield self._fault_at(node, f"{kernel.name[:_SHOWN]} does not use {name[:_SHOWN]!r}", name, hint)
        used = {name.id for name in nodes[ast.Name]}
        for statement in _imports(nodes) if kernels else ():
            for alias in statement.names:
                name = (alias.asname or alias.name).partition(".")[0]
                if name not in used | {"annotations"}:
                    yield self._fault_at(alias, f"{name[:_SHOWN]!r} is imported and not used", name, "drop it")

    def _missing(self, node: ast.AST, module: str, name: str) -> Diagnostic:
        return self._fault_at(node, f"{module} has no {name!r}", name, _near(name, members(module) or ()))

    def _fault_at(self, node: ast.AST, message: str, word: str = "", hint: str | Nearest = "") -> Diagnostic:
        line, column = node.lineno, node.col_offset  # type: ignore[attr-defined]
        if isinstance(node, ast.Attribute):
            line, column = node.end_lineno or line, (node.end_col_offset or 0) - len(word)
        start = len(self.lines[line - 1].encode()[:column].decode(errors="ignore"))
        if not isinstance(node, (ast.Attribute, ast.Name)):
            start = max(start, self.lines[line - 1].find(word))
        return self._fault(line, start + 1, message, word, hint)

    def _fault(self, line: int, column: int, message: str, word: str = "", hint: str | Nearest = "") -> Diagnostic:
        text = self.lines[line - 1] if 0 < line <= len(self.lines) else ""
        where = Location(self.path, line, min(column, len(text) + 1), max(1, len(word)), text)
        return Diagnostic("KG023", where, message, hint)


def _renamed(node: ast.AST) -> Iterator[tuple[ast.Name, ast.Name]]:
    """The names that an assignment sets to other names as they are."""
    if isinstance(node, ast.Assign) and len(node.targets) == 1:
        sides = [side.elts if isinstance(side, ast.Tuple) else [side] for side in (node.targets[0], node.value)]
        for target, value in zip(*sides, strict=False):
            if isinstance(target, ast.Name) and isinstance(value, ast.Name):
                yield target, value


def _constants(kernel: ast.FunctionDef) -> list[str]:
    """The parameters that are annotated as constants."""
    return [each.arg for each in kernel.args.args if is_constant(each)]


def _scopes(table: symtable.SymbolTable) -> Iterator[symtable.SymbolTable]:
    yield table
    for child in table.get_children():
        yield from _scopes(child)


def _lacks(module: str, name: str) -> bool:
    known = members(module)
    return known is not None and name not in known and not name.startswith("_") and not members(f"{module}.{name}")


def _near(word: str, known: Iterable[str]) -> Nearest:
    return did_you_mean(word, sorted(known), "")


def _imports(nodes: _Nodes) -> list[ast.Import | ast.ImportFrom]:
    return sorted([*nodes[ast.Import], *nodes[ast.ImportFrom]], key=lambda node: node.lineno)


def _modules(node: ast.Import | ast.ImportFrom) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    return [node.module or ""] if node.level == 0 else []
