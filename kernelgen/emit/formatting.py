"""Rendered text to final text: checked to be the Python that generated files may be, and formatted by black.

Black takes a second for four thousand lines, and variants are much alike. So it is each *shape* that is formatted, once: the text
with the name of the variant and whole numbers blanked, as only their length matters. Shapes are cut at the functions and classes
at their top level, and functions at the statements of their body, which more of them have in common; in the rest of a text short
ones stand for these.

Where black gives each parameter of a function, or each argument of a call, a line of its own, they are put in rows. Paragraphs of
the docstring of a module, of which an arm of a template may leave out a part, are filled; what is indented stays.

Results are kept in the user's cache folder by the hash of their input.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.metadata
import re
import sys
import textwrap
import threading
from pathlib import PurePosixPath
from typing import Callable, Iterable, Mapping, NamedTuple, Sequence, TypeVar

from kernelgen.core.cache import Sealed
from kernelgen.core.diagnostics import Diagnostic
from kernelgen.core.model import Location
from kernelgen.core.processes import Fault, in_processes
from kernelgen.core.progress import progress
from kernelgen.emit import lint

LINE_LENGTH = 130
_IMPORT_LENGTH = 88  # what sorts imports breaks them there, unless it is told otherwise
_RULES = 7  # to be raised when a check changes: older cached results are then not taken
_CACHED_FILES = 4096
_PARALLEL_FROM = 16  # items; below, starting processes costs more than it saves
_STAND_IN = re.compile(r'^ *(?:@x\n *)?(?:def |class |if |""")?_part_(\d+)_(?:"""|\(\))?(?::\n +pass)?\n', re.MULTILINE)
# Statements of a function that black forms as by themselves, and what is around them as around a stand-in; blocks, unless there
# are definitions inside, behind which it leaves empty lines.
_LINES = (ast.FunctionDef, ast.Assign, ast.AugAssign, ast.AnnAssign, ast.Expr)
_BLOCKS = (ast.For, ast.While, ast.If, ast.With)
_DEEP = re.compile(r"^ {8,}(?:async +)?(?:def|class)\b", re.MULTILINE)
# A statement that lists, in brackets, an item a line; not texts, which a reader looks for, and not imports.
_LISTED = re.compile(
    r"""(?<![(\[{,]\n)^( *)((?!from ).*\(\n)((?:\1    [^\s#"'][^#\n"']*,\n){6,})(\1\)(?:| -> [^#\n]*:|:))$""", re.MULTILINE
)
_DOCSTRING = re.compile(r'\A((?:#[^\n]*\n)*""")(.*?)(?=""")', re.DOTALL)
_WHOLE = re.compile(r"(?:\w+ )?\[[^\[\]]*\]|`[^`]*`")  # is not broken over lines
_RUNS_ON = re.compile(r"(?<![.;:])\n(?!$)")  # a line whose end ends nothing
_IMPORT = re.compile(r"^(from \S+ import )([^(\n]{60,})$", re.MULTILINE)
_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


def finish(texts: Mapping[str, str], jobs: int, only_check: bool = False) -> tuple[dict[str, str], list[Diagnostic]]:
    """Check every text of ``texts`` (output path -> rendered text), and format it, on up to ``jobs`` processes.

    Args:
        texts: output path -> rendered text.
        jobs: processes, at most.
        only_check: there are faults already: nothing is formatted, which takes longer than all else.

    Returns:
        Output path -> final text, and what is wrong with the others.
    """
    cache = _Cache()
    results = {path: cache.get(path, text) for path, text in texts.items()}
    shapes = {path: _Shape(path, texts[path]) for path, found in results.items() if found is None}
    alike: dict[tuple[str, str], list[str]] = {}  # paths by the top folder, which decides what may be imported, and the shape
    for path, shape in shapes.items():
        alike.setdefault((path.split("/")[0], shape.text), []).append(path)
    firsts = [(paths[0], texts[paths[0]]) for paths in alike.values()]
    clean: list[str] = []
    faults: list[Diagnostic] = []
    for paths, found in zip(alike.values(), _map(_check, firsts, 1 if only_check else jobs, "checking"), strict=True):
        clean += () if found else paths
        faults += [fault for path in (paths if found else ()) for fault in lint.faults(path, texts[path])]
    if not (faults or only_check):
        made = _format({shapes[path].text for path in clean}, jobs)
        for path in clean:
            text = shapes[path].filled(made[shapes[path].text]) or _formatted(texts[path])
            if isinstance(text, Fault):
                faults.append(Diagnostic("KG023", Location(path), f"it cannot be formatted: {text.reason}"))
            else:
                results[path] = text
                cache.put(path, texts[path], text)
    if shapes:
        cache.trim()
    return {path: text for path, text in results.items() if text is not None}, faults


def _map(function: Callable[[_Item], _Result], items: Sequence[_Item], jobs: int, what: str) -> list[_Result | Fault]:
    shown = progress(what, lines=False)
    # A fork is cheap and needs no importable main module, but is only sound in a process of one thread.
    can_fork = sys.platform == "linux" and threading.active_count() == 1
    if jobs < 2 or len(items) < _PARALLEL_FROM or not can_fork:
        return list(shown(map(function, items), len(items)))
    import black  # noqa: F401  (before the fork, so that it is loaded once)

    return in_processes(function, items, jobs, shown)


def _check(item: tuple[str, str]) -> bool:
    return bool(lint.faults(*item))


class _Shape:
    """A text without what tells it from its like: the name of the variant, and whole numbers."""

    def __init__(self, path: str, text: str) -> None:
        name = "_".join(PurePosixPath(path).with_suffix("").parts[-2:])
        words = re.compile(rf"{re.escape(name)}|\b[1-9]\d*\b")
        self.words: list[str] = words.findall(text)
        self.text = words.sub(lambda word: ("9" if word[0].isdigit() else "X") * len(word[0]), text)
        self._blanks = re.compile(rf"X{{{len(name)}}}|\b9+\b")

    def filled(self, shape: str | Fault) -> str | None:
        """The text of this formatted ``shape``; None where black changed what is blanked."""
        if isinstance(shape, Fault) or list(map(len, self._blanks.findall(shape))) != list(map(len, self.words)):
            return None
        words = iter(self.words)
        return self._blanks.sub(lambda _: next(words), shape)


class _Cut(NamedTuple):
    """A text with stand-ins for some of its statements, and what these stand for, each a text by itself."""

    rest: str
    parts: Sequence[str]

    @classmethod
    def of_module(cls, text: str) -> _Cut:
        """``text`` without its functions and classes, and without all down to its docstring."""
        kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
        body = _body(text)
        return cls._of(text, [node for node in body if isinstance(node, kinds) or (node is body[0] and _is_text(node))])

    @classmethod
    def of_function(cls, text: str) -> _Cut:
        """``text``, a function, without the statements of its body that lie on lines of their own."""
        nodes = _body(text)
        if len(nodes) != 1 or not isinstance(nodes[0], ast.FunctionDef):
            return cls(text, ())
        body, last = nodes[0].body, nodes[0].lineno
        kinds = _LINES if _DEEP.search(text) else (*_LINES, *_BLOCKS)
        alone = []
        for node, behind in zip(body, [*body[1:], None], strict=True):
            end = node.end_lineno or node.lineno
            is_alone = _begin(node) > last and (behind is None or _begin(behind) > end)
            if is_alone and isinstance(node, kinds) and (node is body[0] or not _is_text(node)):
                alone.append(node)
            last = end
        return cls._of(text, alone, "    ")

    @classmethod
    def _of(cls, text: str, nodes: Iterable[ast.stmt], indent: str = "") -> _Cut:
        lines, at = text.split("\n"), 0
        rest: list[str] = []
        parts: list[str] = []
        for node in nodes:
            begin, end = _begin(node) - 1, node.end_lineno or node.lineno
            if _is_text(node) and not indent:
                begin = 0  # with the header
            if lines[end - 1].endswith("..."):  # black has rules for what stands next to such a one
                continue
            for number, line in enumerate(lines[end:], end + 1):  # with the comments at its end
                if line.strip():
                    if not line.startswith(f"{indent} "):
                        break
                    end = number
            rest += [*lines[at:begin], *(f"{indent}{line}" for line in _stand_in(node, f"_part_{len(parts)}_"))]
            parts.append("\n".join([*(["def _():"] if indent else []), *lines[begin:end]]) + "\n")
            at = end
        return cls("\n".join(rest + lines[at:]), parts)

    def joined(self, made: Mapping[str, str | Fault]) -> str | Fault:
        """The text, of which rest and parts were ``made`` into others."""
        pieces = [made[piece] for piece in (self.rest, *self.parts)]
        texts = [piece for piece in pieces if isinstance(piece, str)]
        if len(texts) < len(pieces):
            return next(piece for piece in pieces if isinstance(piece, Fault))
        if not self.parts:
            return texts[0]
        return _STAND_IN.sub(lambda stand_in: texts[1 + int(stand_in[1])].removeprefix("def _():\n"), texts[0])


def _body(text: str) -> Sequence[ast.stmt]:
    return () if "# fmt:" in text or "_part_" in text else ast.parse(text).body


def _begin(node: ast.stmt) -> int:
    """The first line of a statement."""
    decorators: list[ast.expr] = getattr(node, "decorator_list", [])
    return min([node.lineno, *(decorator.lineno for decorator in decorators)])


def _stand_in(node: ast.stmt, name: str) -> list[str]:
    """A short statement next to which black leaves the same empty lines."""
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
        head = f"class {name}:" if isinstance(node, ast.ClassDef) else f"def {name}():"
        return [*(["@x"] if node.decorator_list else []), head, "    pass"]
    if _is_text(node):
        return [f'"""{name}"""']
    return [f"if {name}:", "    pass"] if hasattr(node, "body") else [name]


def _is_text(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


def _format(shapes: Iterable[str], jobs: int) -> dict[str, str | Fault]:
    """Each of the ``shapes``, formatted."""
    modules = {shape: _Cut.of_module(shape) for shape in shapes}
    parts = dict.fromkeys(part for cut in modules.values() for part in (cut.rest, *cut.parts))
    functions = {part: _Cut.of_function(part) for part in parts}
    pieces = list(dict.fromkeys(piece for cut in functions.values() for piece in (cut.rest, *cut.parts)))
    made = dict(zip(pieces, _map(_black, pieces, jobs, "formatting"), strict=True))
    made = {part: cut.joined(made) for part, cut in functions.items()}
    return {shape: in_rows(cut.joined(made)) for shape, cut in modules.items()}


def _formatted(text: str) -> str | Fault:
    return in_rows(_black(text))


def in_rows(text: str | Fault) -> str | Fault:
    """``text`` as black made it, but what it lists item by item stands in rows, constants in others than the rest, and the
    paragraphs of its docstring are filled.
    """
    if isinstance(text, Fault):
        return text
    return _DOCSTRING.sub(_filled, _IMPORT.sub(_by_line, _LISTED.sub(_in_rows, text)))


def _filled(docstring: re.Match[str]) -> str:
    summary, *more = docstring[2].split("\n\n")
    paragraphs = (part if part.startswith("\n") or re.search("^ ", part, re.MULTILINE) else _fill(part) for part in more)
    return docstring[1] + "\n\n".join((summary, *paragraphs))


def _fill(paragraph: str) -> str:
    """What runs on over lines, in lines that are full; where one ends with a sentence or an item, the next begins another."""
    words = _RUNS_ON.sub(" ", _WHOLE.sub(lambda whole: whole[0].replace(" ", "\0"), paragraph))
    filled = (textwrap.fill(line, LINE_LENGTH, break_long_words=False, break_on_hyphens=False) for line in words.split("\n"))
    return "\n".join(filled).replace("\0", " ")


def _in_rows(listed: re.Match[str]) -> str:
    indent, head, items, end = listed.groups()
    rows: list[str] = []
    was_constant = None
    for item in map(str.strip, items.splitlines()):
        is_constant = item.partition(":")[0].rstrip(",").isupper()
        if is_constant == was_constant and len(f"{indent}    {rows[-1]} {item}") <= LINE_LENGTH:
            rows[-1] += f" {item}"
        else:
            rows.append(item)
        was_constant = is_constant
    return f"{indent}{head}{''.join(f'{indent}    {row}' + chr(10) for row in rows)}{end}  # fmt: skip"


def _by_line(imported: re.Match[str]) -> str:
    if len(imported[0]) <= _IMPORT_LENGTH:
        return imported[0]
    return f"{imported[1]}(\n{''.join(f'    {name},' + chr(10) for name in imported[2].split(', '))})"


def _black(text: str) -> str | Fault:
    import black
    from black.mode import TargetVersion

    mode = black.Mode(line_length=LINE_LENGTH, target_versions={TargetVersion.PY310})
    try:
        made: str = black._format_str_once(text, mode=mode)  # format_str does it twice, for rare trailing commas
    except Exception as error:  # black raises many kinds
        return Fault(f"{type(error).__name__}: {error}")
    return made


class _Cache:
    """Final texts by what they were made of."""

    def __init__(self) -> None:
        self.texts = Sealed("format", _CACHED_FILES)
        self.rules = f"black {importlib.metadata.version('black')}, rules {_RULES}"

    def _key(self, path: str, raw: str) -> str:
        # The path decides which imports are allowed, so it is part of the key.
        return hashlib.sha256("\0".join((self.rules, path, raw)).encode()).hexdigest()

    def get(self, path: str, raw: str) -> str | None:
        return self.texts.get(self._key(path, raw))

    def put(self, path: str, raw: str, text: str) -> None:
        self.texts.put(self._key(path, raw), text)

    def trim(self) -> None:
        self.texts.trim()
