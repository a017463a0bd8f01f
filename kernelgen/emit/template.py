"""What a template may be and do: a language smaller than Jinja's, with a bound on everything that it can spend.

A template is refused before it runs where its text says what it may not, or is too large for a parser (``Environment._parse``).
What only shows while it runs is noted with its place, and stands for nothing from there on, so that one run finds more than one
fault. Loops, calls and output are paid from a budget: no template runs for long.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import re
import sys
from types import FrameType
from typing import Any, Iterable, Iterator, Mapping, NoReturn, Sequence

import jinja2
from jinja2 import nodes
from jinja2.environment import TemplateModule
from jinja2.runtime import Context, LoopContext, Macro, Undefined
from markupsafe import Markup

from kernelgen.core.diagnostics import Diagnostic, Nearest, did_you_mean
from kernelgen.core.model import Location, Record, Variant
from kernelgen.core.names import Symbol

MAX_CHARACTERS = 200_000  # of a template
MAX_TOKENS = 200  # of one expression or statement
MAX_BRACKETS = 16  # inside of each other
MAX_BLOCKS = 16  # inside of each other
MAX_CALLS = 32  # of macros, inside of each other
MAX_DIGITS = 18  # of a number
MAX_RANGE = 10_000
MAX_OUTPUT = 4_000_000  # characters; a turn of a loop and a call of a macro cost some more than they write
_STEP = 16
_STATEMENTS = (
    nodes.Template,
    nodes.Output,
    nodes.TemplateData,
    nodes.If,
    nodes.For,
    nodes.Macro,
    nodes.Import,
)
_EXPRESSIONS = (
    nodes.Name,
    nodes.Getattr,
    nodes.Const,
    nodes.MarkSafe,
    nodes.Tuple,
    nodes.Call,
    nodes.Keyword,
    nodes.Filter,
    nodes.CondExpr,
    nodes.Compare,
    nodes.Operand,
    nodes.And,
    nodes.Or,
    nodes.Not,
)
_BLOCKS = {"if": 1, "for": 1, "macro": 1, "endif": -1, "endfor": -1, "endmacro": -1}
TAGS = ("if", "elif", "else", "endif", "for", "endfor", "macro", "endmacro", "import")
_LOOP = ("index", "index0", "first", "last", "length")


class Refused(Exception):
    """A template whose text says what templates may not say; with every fault of it."""

    def __init__(self, faults: Iterable[Diagnostic]) -> None:
        self.faults = tuple(faults)
        super().__init__(f"{len(self.faults)} faults")


class TooMuch(Exception):
    """A template that would run, or write, without end."""


class Unserved(Exception):
    """A template refuses its variant: it has no arm for the tag of ``axis``. ``where``: the place that says so."""

    where = Location("")

    def __init__(self, axis: str) -> None:
        self.axis = axis
        super().__init__(f"a tag of {axis} is refused")


class Environment(jinja2.Environment):
    """Jinja with the policy of this module.

    Attributes:
        traces: whether marks in the output say which line of a template made what follows.
        lines: of each template that was read, by its label: its name as places have it.
        imports: of each template, by its name: what it imports, and in which line.
        asks: of each template, by its name: the attributes that it reads.
        faults: what the last run did wrong.
    """

    def __init__(self, loader: jinja2.BaseLoader, traces: bool = False) -> None:
        super().__init__(
            loader=loader,
            undefined=type("_Missing", (_Nothing,), {"of": self}),
            line_statement_prefix="#%",
            line_comment_prefix="##",
            trim_blocks=True,
            lstrip_blocks=True,
            keep_trailing_newline=True,
            autoescape=True,  # tells text of templates (Markup) from other strings
            finalize=self._checked,
            cache_size=-1,
            auto_reload=False,
        )
        self.context_class = _Context
        self.globals = {"range": self._range, "refuse": self._refuse}
        self.filters = {"length": self._length, "_each": self._each}
        self.traces = traces
        self.lines: dict[str, list[str]] = {}
        self.imports: dict[str, list[tuple[str, int]]] = {}
        self.asks: dict[str, frozenset[str]] = {}
        self.faults: list[Diagnostic] = []
        self._left = self._depth = 0

    def run(self, template: str, values: Mapping[str, Any]) -> str:
        """What ``template`` makes of ``values``; ``faults`` are then those of this run.

        Raises:
            Exception: of any kind: it failed, at the place that ``place_of`` finds.
        """
        self.faults = []
        self._left, self._depth = MAX_OUTPUT, 0
        made = self.get_template(template)
        return "".join(made.root_render_func(made.new_context(dict(values))))

    def place_of(self, error: BaseException) -> Location | None:
        """The line of a template at which ``error`` was raised."""
        trace, found = error.__traceback__, None
        while trace is not None:
            found = self._place(trace.tb_frame, trace.tb_lineno) or found
            trace = trace.tb_next
        return found

    def location(self, label: str, line: int, word: str = "") -> Location:
        """The place of ``word`` in a line of a template; without one, or where it is not there, the line."""
        lines = self.lines.get(label, [])
        text = lines[line - 1] if 0 < line <= len(lines) else ""
        found = re.search(rf"(?<!\w){re.escape(word)}(?!\w)", text) if 0 < len(word) <= len(text) else None
        if found:
            return Location(label, line, found.start() + 1, len(word), text)
        start = len(text) - len(text.lstrip())
        return Location(label, line, start + 1, max(1, len(text.strip())), text)

    def report(self, message: str, word: str = "", hint: str | Nearest = "") -> None:
        """Note what the running template does wrong."""
        frame: FrameType | None = sys._getframe(1)
        while frame is not None:
            where = self._place(frame, frame.f_lineno, word)
            if where is not None:
                self.faults.append(Diagnostic("KG022", where, message, hint))
                return
            frame = frame.f_back
        raise TypeError(message)  # of a constant, when it is compiled; it comes again when it runs

    def getattr(self, obj: Any, attribute: str) -> Any:
        """An attribute of a model or of a loop, or a macro of an imported template; nothing else has any."""
        if isinstance(obj, Undefined):
            return obj
        known = _attributes(obj)
        if attribute in known:
            return getattr(obj, attribute)
        self.report(f"{_called(obj)} has no {attribute!r}", attribute, did_you_mean(attribute, known))
        return self.undefined()

    def call_of(self, context: Context, callee: Any, arguments: Sequence[Any], named: Mapping[str, Any]) -> Any:
        """A call of a macro, of ``range`` or of ``refuse``; nothing else can be called, whatever it is called."""
        if isinstance(callee, Undefined):
            return callee
        if not isinstance(callee, Macro) and callee not in (self._range, self._refuse):
            self.report(f"{_called(callee)} cannot be called", hint="only macros can")
            return self.undefined()
        if self._depth == MAX_CALLS:
            raise TooMuch(f"more than {MAX_CALLS} macros call each other; one of them calls itself")
        self._depth += 1
        result = Context.call(context, callee, *arguments, **named)
        self._depth -= 1
        self._spend(_STEP + (len(result) if isinstance(result, str) else 0))
        return result

    def _spend(self, characters: int) -> None:
        self._left -= characters
        if self._left < 0:
            raise TooMuch(f"it takes more steps, or writes more, than a file of {MAX_OUTPUT} characters may")

    def _place(self, frame: FrameType, line: int, word: str = "") -> Location | None:
        template = frame.f_globals.get("__jinja_template__")
        if template is None or frame.f_code.co_filename != template.filename:
            return None
        return self.location(template.filename, template.get_corresponding_lineno(line), word)

    # ---- what templates are given

    def _checked(self, value: object) -> object:
        """What may be printed."""
        if isinstance(value, Markup):
            self._spend(len(value))
            return value
        if value is None or isinstance(value, (int, Symbol)):
            return value
        if not isinstance(value, Undefined):
            told = f"the text {str(value)[:60]!r}" if isinstance(value, str) else _called(value)
            self.report(f"a template may print whole numbers, booleans, None and identifiers, not {told}")
        return Markup()

    def _length(self, value: Any) -> int:
        try:
            return len(value)
        except TypeError:
            if not isinstance(value, Undefined):
                self.report(f"{_called(value)} has no length", "length")
            return 0

    def _refuse(self, axis: str) -> NoReturn:
        raise Unserved(str(axis))

    def _range(self, *bounds: Any) -> range:
        try:
            numbers = range(*bounds)
            if len(numbers) <= MAX_RANGE:
                return numbers
            self.report(f"a range of {len(numbers)}; at most {MAX_RANGE}", "range")
        except (TypeError, ValueError, OverflowError):
            self.report("range wants one to three whole numbers that are not too large", "range")
        return range(0)

    def _each(self, value: Any, cost: int) -> Iterator[Any]:
        """The turns of a loop, each of which is paid for."""
        try:
            items = iter(value)
        except TypeError:
            self.report(f"{_called(value)} cannot be looped over")
            return
        for item in items:
            self._spend(cost)
            yield item

    # ---- reading

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        assert name is not None and filename is not None
        self.lines[filename] = source.splitlines()
        self._check_size(source, filename)
        tree = super()._parse(source, name, filename)
        callable_names = {"range", "refuse"} | {macro.name for macro in tree.find_all(nodes.Macro)}
        modules = {node.target for node in tree.find_all(nodes.Import)}
        faults = [
            Diagnostic("KG021", self.location(filename, node.lineno, word), reason)
            for node in _walk(tree)
            for reason, word in _refusals(node, callable_names, modules)
        ]
        macros: dict[str, int] = {}
        for macro in tree.find_all(nodes.Macro):
            if macros.setdefault(macro.name, macro.lineno) != macro.lineno:
                where = self.location(filename, macro.lineno, macro.name)
                first = f"the other is in line {macros[macro.name]}"
                faults.append(Diagnostic("KG021", where, f"two macros are called {macro.name}", first))
        if not source.strip():
            faults.append(Diagnostic("KG021", Location(filename), "this template is empty", "write it, or remove it"))
        if faults:
            raise Refused(faults)
        self.imports[name] = [(node.template.value, node.lineno) for node in tree.find_all(nodes.Import)]  # type: ignore[attr-defined]
        self.asks[name] = frozenset(node.attr for node in tree.find_all(nodes.Getattr))
        _mark_literals(tree)
        for loop in list(tree.find_all(nodes.For)):
            cost = nodes.Const(_STEP + sum(len(data.data) for part in loop.body for data in _texts(part)))
            loop.iter = nodes.Filter(loop.iter, "_each", [cost], [], None, None, lineno=loop.lineno)
        if self.traces:
            for output in list(tree.find_all(nodes.Output)):
                output.nodes = [piece for node in output.nodes for piece in _traced(node, filename)]
        tree.set_environment(self)
        return tree

    def _check_size(self, source: str, label: str) -> None:
        """Refuse what would lead a parser, or the compiler behind it, too deep."""
        if len(source) > MAX_CHARACTERS:
            raise Refused([Diagnostic("KG021", Location(label), f"more than {MAX_CHARACTERS} characters", "split it")])
        tokens = brackets = blocks = 0
        is_first = False
        for line, kind, text in self.lexer.tokeniter(source, label, label):
            if kind == "whitespace":
                continue
            if kind.endswith("_begin"):
                tokens = brackets = 0
                is_first = kind in ("block_begin", "linestatement_begin")
                continue
            if kind == "name" and is_first:
                blocks += _BLOCKS.get(text, 0)
            elif kind == "operator":
                brackets += (text in "([{") - (text in ")]}")
            elif kind in ("integer", "float") and len(text) > MAX_DIGITS:
                fault = Diagnostic("KG021", self.location(label, line, text), f"a number of more than {MAX_DIGITS} digits")
                raise Refused([fault])
            is_first = False
            tokens += 1
            for size, most, what in (
                (tokens, MAX_TOKENS, "words and signs in one expression"),
                (brackets, MAX_BRACKETS, "brackets inside of each other"),
                (blocks, MAX_BLOCKS, "blocks inside of each other"),
            ):
                if size > most:
                    fault = Diagnostic("KG021", self.location(label, line), f"more than {most} {what}")
                    raise Refused([dataclasses.replace(fault, hint="compute it in the model, or use a macro")])


class _Context(Context):
    def call(self, callee: Any, /, *arguments: Any, **named: Any) -> Any:
        environment = self.environment
        assert isinstance(environment, Environment)
        return environment.call_of(self, callee, arguments, named)


class _Nothing(Undefined):
    """What stands for a value that there is not: noted where it comes up, then nothing to print, loop over or ask."""

    of: Environment

    def __init__(self, hint: str | None = None, obj: Any = None, name: str | None = None, exc: Any = None) -> None:
        super().__init__(hint, name=name)
        if hint is not None or name is not None:
            self.of.report(hint or f"{name!r} is undefined", name or "")

    def _nothing(self, *arguments: Any, **named: Any) -> Any:
        return self

    def __str__(self) -> str:
        return ""

    __getattr__ = __call__ = __getitem__ = _nothing
    __lt__ = __le__ = __gt__ = __ge__ = Undefined.__eq__  # type: ignore[assignment]


def _attributes(obj: object) -> Sequence[str]:
    """What a template may ask ``obj`` for."""
    if isinstance(obj, TemplateModule):
        return [name for name in vars(obj) if not name.startswith("_")]
    if isinstance(obj, LoopContext):
        return _LOOP
    if isinstance(obj, Record):
        return [*obj.names, *Record.__slots__]
    own = _attributes_of(type(obj))  # type: ignore[arg-type]
    return [*own, *obj.tags.names, *obj.facts.names] if isinstance(obj, Variant) else own


@functools.cache
def _attributes_of(kind: type) -> Sequence[str]:
    """What all objects of a class of the model can be asked for."""
    if not dataclasses.is_dataclass(kind):
        return ()
    own = [name for name, value in inspect.getmembers(kind) if isinstance(value, property)]
    return [*own, *(field.name for field in dataclasses.fields(kind))]


def _called(obj: object) -> str:
    """``obj`` in the words of a message; the same for all variants of a family."""
    if isinstance(obj, Variant):
        return f"a variant of {obj.family}"
    kind = type(obj).__name__
    return f"{'an' if kind[0].lower() in 'aeiou' else 'a'} {kind}"


def _walk(node: nodes.Node) -> Iterator[nodes.Node]:
    yield node
    for child in node.iter_child_nodes():
        yield from _walk(child)


def _texts(node: nodes.Node) -> Iterator[nodes.TemplateData]:
    return (inner for inner in _walk(node) if isinstance(inner, nodes.TemplateData))


def _traced(node: nodes.Expr, label: str) -> Iterator[nodes.Expr]:
    """What prints ``node``, with a mark in front of each line of it."""
    if isinstance(node, nodes.TemplateData):
        lines = node.data.split("\n")
        node.data = "\n".join(_mark(label, node.lineno + i) + line for i, line in enumerate(lines))
    else:
        yield nodes.TemplateData(_mark(label, node.lineno), lineno=node.lineno)
    yield node


def _mark(label: str, line: int) -> str:
    return f"\0{label}\0{line}\0"


class Trace:
    """Which line of which template made a place of an output.

    Attributes:
        text: the output, without marks.
    """

    def __init__(self, marked: str) -> None:
        self._lines: list[list[tuple[int, str, int]]] = []  # of each line: (start, template, its line)
        label, made_by, plain = "", 0, []
        for line in marked.split("\n"):
            text, *rest = re.split("\0(.*?)\0(.*?)\0", line)
            starts = [(0, label, made_by)]
            for name, number, piece in zip(rest[::3], rest[1::3], rest[2::3], strict=True):
                label, made_by = name, int(number)
                starts.append((len(text), label, made_by))
                text += piece
            self._lines.append(starts)
            plain.append(text)
        self.text = "\n".join(plain)

    def of(self, line: int, column: int) -> tuple[str, int] | None:
        """The template, by its label, and its line; None where there is no such place."""
        if not 0 < line <= len(self._lines):
            return None
        label, made_by = [(label, by) for start, label, by in self._lines[line - 1] if start < column or not start][-1]
        return (label, made_by) if made_by else None


def _refusals(node: nodes.Node, callable_names: set[str], modules: set[str]) -> Iterator[tuple[str, str]]:
    """Why templates may not say this, and the word that it is about."""
    if not isinstance(node, (*_STATEMENTS, *_EXPRESSIONS)):
        yield f"templates do without {type(node).__name__}; compute it in the model", ""
    if isinstance(node, nodes.Getattr) and node.attr.startswith("_"):
        yield f"private attribute {node.attr}", node.attr
    if isinstance(node, nodes.Filter) and node.name != "length":
        yield f"templates do without the filter {node.name}; compute it in the model", node.name
    if isinstance(node, nodes.For) and node.recursive:
        yield "templates do without loops that call themselves", "recursive"
    if isinstance(node, nodes.Import) and not (
        isinstance(node.template, nodes.Const) and isinstance(node.template.value, str)
    ):
        yield "an import names its template", ""
    if isinstance(node, nodes.Call):
        callee = node.node
        is_macro = isinstance(callee, nodes.Name) and callee.name in callable_names
        is_imported = (
            isinstance(callee, nodes.Getattr)
            and isinstance(callee.node, nodes.Name)
            and callee.node.name in modules
        )
        if not (is_macro or is_imported):
            word = callee.attr if isinstance(callee, nodes.Getattr) else getattr(callee, "name", "")
            yield "only macros can be called; compute it in the model", word


def _mark_literals(node: nodes.Node) -> None:
    """Mark the string literals of a template as its own text, which may be printed."""
    for field, value in node.iter_fields():
        if isinstance(node, nodes.Import) and field == "template":
            continue
        if isinstance(value, list):
            setattr(node, field, [_marked(item) for item in value])
        else:
            setattr(node, field, _marked(value))
    for child in node.iter_child_nodes():
        if not isinstance(child, nodes.MarkSafe):
            _mark_literals(child)


def _marked(value: Any) -> Any:
    if isinstance(value, nodes.Const) and isinstance(value.value, str):
        return nodes.MarkSafe(value, lineno=value.lineno)
    return value
