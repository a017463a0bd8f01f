"""What a generated module imports from its package, defines and exports: as much as its neighbours need to know of it."""

from __future__ import annotations

import ast
import dataclasses
from typing import Iterator, NamedTuple, Sequence

from kernelgen.names import PACKAGE


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
        defined: the names that it binds at its top level.
        exports: ``__all__``; None: it has none.
    """

    imports: tuple[Import, ...]
    defined: frozenset[str]
    exports: tuple[str, ...] | None


def module_of(path: str) -> tuple[str, ...]:
    """The place of the file ``path`` in the package; that of its face is empty."""
    parts = path.removeprefix(f"{PACKAGE}/").removesuffix(".py").split("/")
    return tuple(parts[:-1] if parts[-1] == "__init__" else parts)


def outline(path: str, text: str) -> Outline:
    """The outline of the module in the file ``path`` of a package; of a ``text`` that is not Python: an empty one."""
    try:
        tree = ast.parse(text)
    except SyntaxError:
        return Outline((), frozenset(), None)
    return Outline(tuple(_imports(path, tree)), frozenset(_defined(tree.body)), _exports(tree))


def _imports(path: str, tree: ast.Module) -> Iterator[Import]:
    folder = path.removeprefix(f"{PACKAGE}/").split("/")[:-1]
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level > 0:
            base = tuple(folder[: len(folder) + 1 - node.level])
            for alias in node.names:
                yield Import((*base, *(node.module.split(".") if node.module else ())), alias.name, node.lineno)


def _defined(body: Sequence[ast.stmt]) -> Iterator[str]:
    """The names that statements bind, but for those inside of functions and classes."""
    for node in body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            yield node.name
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            yield from (alias.asname or alias.name.partition(".")[0] for alias in node.names)
        else:
            for inner in ast.walk(node):
                if isinstance(inner, ast.Name) and isinstance(inner.ctx, ast.Store):
                    yield inner.id
                elif isinstance(inner, (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef)):
                    yield from _defined([inner])


def _exports(tree: ast.Module) -> tuple[str, ...] | None:
    for node in tree.body:
        if isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == "__all__" for t in node.targets):
            found = [item.value for item in getattr(node.value, "elts", ()) if isinstance(item, ast.Constant)]
            return tuple(name for name in found if isinstance(name, str))
    return None
