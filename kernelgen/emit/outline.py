"""What a generated module imports from its package, defines and exports: as much as its neighbours need to know of it."""

from __future__ import annotations

import ast
import dataclasses
from typing import Iterator, Mapping, NamedTuple, Sequence

from kernelgen.core.names import PACKAGE

MAX_WORD = 400  # characters: longer than the names of modules


class Import(NamedTuple):
    """One name that is imported from the package: ``name`` of ``module``, which is empty for the package itself."""

    module: tuple[str, ...]
    name: str
    line: int

    @property
    def top(self) -> str:
        """The module at the top of the package that this is about."""
        return self.module[0] if self.module else self.name


@dataclasses.dataclass(frozen=True)
class Outline:
    """Of one module.

    Attributes:
        imports: what it imports from the package, wherever in the text.
        defined: the names that it binds at its top level, and the lines where it does.
        exports: ``__all__``; None: it has none.
        words: names, attributes, parameters and short texts, wherever.
        fields: of the classes at its top level, by name: what they declare, in this order.
    """

    imports: tuple[Import, ...]
    defined: Mapping[str, int]
    exports: tuple[str, ...] | None
    words: frozenset[str]
    fields: Mapping[str, tuple[str, ...]]


def module_of(path: str) -> tuple[str, ...]:
    """The place of the file ``path`` in the package; that of its face is empty."""
    parts = path.removeprefix(f"{PACKAGE}/").removesuffix(".py").split("/")
    return tuple(parts[:-1] if parts[-1] == "__init__" else parts)


def outline(path: str, text: str) -> Outline | None:
    """The outline of the module in the file ``path`` of a package; of a ``text`` that is not Python: None."""
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None
    folder = path.removeprefix(f"{PACKAGE}/").split("/")[:-1]
    imports: list[Import] = []
    words: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            words.add(node.id)
        elif isinstance(node, ast.Attribute):
            words.add(node.attr)
        elif isinstance(node, (ast.arg, ast.keyword)):
            words.add(node.arg or "")
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            words.add(node.value[:MAX_WORD])
        elif isinstance(node, ast.ImportFrom) and node.level > 0:
            base = tuple(folder[: len(folder) + 1 - node.level])
            module = (*base, *(node.module.split(".") if node.module else ()))
            imports += (Import(module, alias.name, node.lineno) for alias in node.names)
    fields = {node.name: _fields(node) for node in tree.body if isinstance(node, ast.ClassDef)}
    return Outline(tuple(imports), dict(_defined(tree.body)), exports(tree), frozenset(words), fields)


def exports(tree: ast.Module) -> tuple[str, ...] | None:
    """The names of ``__all__``, where a module has one."""
    for node in tree.body:
        if isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == "__all__" for t in node.targets):
            found = [item.value for item in getattr(node.value, "elts", ()) if isinstance(item, ast.Constant)]
            return tuple(name for name in found if isinstance(name, str))
    return None


def _defined(body: Sequence[ast.stmt]) -> Iterator[tuple[str, int]]:
    """The names that statements bind, but for those inside of functions and classes."""
    for node in body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            yield node.name, node.lineno
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            yield from ((alias.asname or alias.name.partition(".")[0], node.lineno) for alias in node.names)
        else:
            for inner in ast.walk(node):
                if isinstance(inner, ast.Name) and isinstance(inner.ctx, ast.Store):
                    yield inner.id, inner.lineno
                elif isinstance(inner, (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef)):
                    yield from _defined([inner])


def _fields(node: ast.ClassDef) -> tuple[str, ...]:
    return tuple(
        line.target.id
        for line in node.body
        if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name)
    )
