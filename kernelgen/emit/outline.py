"""What a generated module imports from its package, defines and exports: as much as its neighbours need to know of it."""

from __future__ import annotations

import ast
import collections
import dataclasses
import functools
import itertools
import re
import sys
from typing import Any, Iterator, Mapping, NamedTuple, Sequence, TypeGuard

from kernelgen.core.names import OPERANDS, PACKAGE, TABLE

MAX_WORD = 400  # characters: longer than the names of modules
VARIANTS = "VARIANTS"  # of the table of a family: which variants there are
TENSOR = (OPERANDS, "Tensor")  # declares a tensor, or a sequence of such
BUNDLE = (OPERANDS, "Bundle")  # operands that come together


class Wanted(NamedTuple):
    """A name of another module of the package: ``name`` of ``module``, which is empty for the package itself.

    ``at_once``: whether it is wanted while the module itself is imported, which fails where the name is not there yet.
    """

    module: tuple[str, ...]
    name: str
    line: int  # of the statement
    at: tuple[int, int]  # line and column of the name
    at_once: bool

    @property
    def top(self) -> str:
        """The module at the top of the package that this is about."""
        return self.module[0] if self.module else self.name


class Mentioned(NamedTuple):
    """Attributes and texts."""

    attributes: frozenset[str]
    texts: frozenset[str]


class Told(NamedTuple):
    """A name in a text, and where it stands."""

    name: str
    line: int
    column: int


class Question(NamedTuple):
    """A call that asks the variants of a family for one of them: ``get`` or ``find`` of its ``VARIANTS``.

    Attributes:
        family: whose variants, by the module that their table is of.
        facts: that it names, and the constants that may be asked for; None: or something else.
        others: that may come in a dictionary, as far as the module writes such out; None: it does not.
    """

    family: tuple[str, ...]
    method: str
    facts: Mapping[str, tuple[object, ...] | None]
    others: frozenset[str] | None
    line: int
    column: int


class Made(NamedTuple):
    """A call of a name: that of a class, maybe.

    Attributes:
        of: the module and the name of what is called.
        given: what its arguments by place are called, up to one that could be any number of them; "": it has no name, None: it
            is written out.
        names: of the others.
        is_whole: whether these are all that are given.
        rest: of arguments by place the first that could be any number; "": there is none, or it is all of them.
    """

    of: tuple[str, ...]
    given: tuple[str | None, ...]
    names: tuple[str, ...]
    is_whole: bool
    rest: str
    line: int
    column: int


class Size(NamedTuple):
    """The name of a size in the shape of a tensor that is declared, in how many texts of it, and where it first stands."""

    name: str
    number: int
    line: int
    column: int


class Word(NamedTuple):
    """Of a text that says where operands are found: a word, and its line; or the place of a name, for all words of its text."""

    text: str
    of: tuple[str, ...]
    line: int

    @property
    def field(self) -> str:
        """Where a launcher finds the operand: ``x_ptr`` is the field x, ``x_ptr=bundle.part`` that of the bundle."""
        name, _, path = self.text.partition("=")
        return (path or name.removesuffix("_ptrs").removesuffix("_ptr")).partition(".")[0]


class Operand(NamedTuple):
    """An operand that a launcher finds, by this word, in what calls of ``op`` are given."""

    op: tuple[str, ...]
    word: Word


class Declaration(NamedTuple):
    """What is said of an operand: by what makes it, by an annotation, or by a name for one of these.

    Attributes:
        of: who says the rest: a class of operands, a name, or a function that makes one; as far as the package has it.
        is_written, may_be_none: so it says.
        asks: the facts that ask for it.
        speaks: the other fields of which it speaks.
        dtype: the name of one that operands share.
        given: the texts that a function is given by place.
        classes: that it is given too: those of a bundle.
        hands_on: of a function: these are facts that ask for what it makes.
    """

    of: tuple[str, ...]
    is_written: bool
    may_be_none: bool
    asks: tuple[str, ...]
    speaks: tuple[Told, ...]
    dtype: Told | None
    given: tuple[Told, ...]
    classes: tuple[tuple[str, ...], ...]
    hands_on: bool
    line: int
    column: int


class Of(NamedTuple):
    """An op: the named tuple of its calls, the dtypes that operands share (None: not written out), and the operands it names."""

    record: tuple[str, ...]
    dtypes: tuple[str, ...] | None
    names: tuple[Told, ...]


class Signature(NamedTuple):
    """The parameters of a function, by name whether each has a default, and how many of them may come by place."""

    parameters: Mapping[str, bool]
    number: int


class Declared(NamedTuple):
    """A field that declares an operand."""

    record: str
    field: str
    says: Declaration
    line: int
    column: int


class Launched(NamedTuple):
    """What a launcher hands to its ``schedule``, of a class, by name; ``value``: what that is called, "": it has no name."""

    of: tuple[str, ...]
    name: str
    value: str
    line: int
    column: int


class Parameter(NamedTuple):
    """A parameter of a kernel, and where it stands."""

    kernel: str
    name: str
    line: int
    column: int


@dataclasses.dataclass(frozen=True)
class Outline:
    """Of one module.

    Attributes:
        imports: what it imports from the package, wherever in the text.
        asks: the attributes that it reads of what it imports so, if that is a module.
        defined: the names that it binds at its top level, and the lines where it first does.
        exports: ``__all__``; None: it has none.
        words: names, attributes, parameters and short texts, wherever.
        reads: of these the attributes, names and parameters that are no constants of a kernel.
        fields: of the classes at its top level, by name: what they declare, in this order.
        classes: of these the attributes and texts in them, and in what else of the module they use.
        parameters: of the kernels at its top level that are launched.
        stores: of these those through which the kernels store, as far as they say so themselves.
        gives: what others may be launched with: keywords of calls, and the words of texts that are nothing but names, or
            name=path.
        questions: which variants it asks for.
        asked: the facts that operands ask for, ``asks`` of their declarations.
        shapes: sizes of the tensors that it declares, but for sequences of any layout, which share sizes among themselves.
        sizes: how many texts have each name: those that could be a shape, or one name, and others in brackets, as docstrings do.
        records: the named tuples at its top level, by name: their fields, and whether each has a default.
        stands: names at its top level that are called with what another takes: an op with the fields of its named tuple, what an
            op makes with those of the op, a class with those of its base.
        declares: names at its top level of what declares operands: ops, what they make, bundles.
        makes: calls of what is imported from the package, or is a class here, or such a name.
        operands: of launchers, as far as they are written out.
        texts: names at its top level that stand for such texts.
        declared: what the fields of its named tuples declare.
        says: what names and functions at its top level declare, or make.
        ops: at its top level.
        facts: that it reads of variants, and of which family.
        reads_sizes: of those that the check of an op found; (): of some op.
        tells_sizes: names that sizes have here: in shapes, beside a size or a count, as keys.
        signatures: of the functions at its top level that take no arguments of any name.
        launched: by its launchers.
        launches_take: parameters of what its classes have for that, beside those of any name.
        places: of what it imports from the package, by the names that this has here.
    """

    imports: tuple[Wanted, ...]
    asks: tuple[Wanted, ...]
    defined: Mapping[str, int]
    exports: tuple[str, ...] | None
    words: frozenset[str]
    reads: frozenset[str]
    fields: Mapping[str, tuple[str, ...]]
    classes: Mapping[str, Mentioned]
    parameters: tuple[Parameter, ...]
    stores: frozenset[str]
    gives: frozenset[str]
    questions: tuple[Question, ...]
    asked: tuple[Told, ...]
    shapes: tuple[Size, ...]
    sizes: Mapping[str, int]
    records: Mapping[str, Mapping[str, bool]]
    stands: Mapping[str, tuple[str, ...]]
    declares: tuple[str, ...]
    makes: tuple[Made, ...]
    operands: tuple[Operand, ...]
    texts: Mapping[str, tuple[Word, ...]]
    declared: tuple[Declared, ...]
    says: Mapping[str, Declaration]
    ops: tuple[Of, ...]
    facts: tuple[tuple[tuple[str, ...], Told], ...]
    reads_sizes: tuple[tuple[tuple[str, ...], Told], ...]
    tells_sizes: frozenset[str]
    signatures: Mapping[str, Signature]
    launched: tuple[Launched, ...]
    launches_take: frozenset[str]
    places: Mapping[str, tuple[str, ...]]


def module_of(path: str) -> tuple[str, ...]:
    """The place of the file ``path`` in the package; that of its face is empty."""
    parts = path.removeprefix(f"{PACKAGE}/").removesuffix(".py").split("/")
    return tuple(parts[:-1] if parts[-1] == "__init__" else parts)


@functools.lru_cache(maxsize=2000)  # modules that no spec changes are of every package that a process makes
def outline(path: str, text: str) -> Outline | None:
    """The outline of the module in the file ``path`` of a package; of a ``text`` that is not Python: None."""
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None
    folder = path.removeprefix(f"{PACKAGE}/").split("/")[:-1]
    imports: list[Wanted] = []
    places: dict[str, tuple[str, ...]] = {}  # of what names stand for
    reads: list[ast.Attribute] = []
    words, attributes, names, constants, gives = set[str](), set[str](), set[str](), set[str](), set[str]()
    asked: list[Told] = []
    shapes = set[int]()  # nodes of the texts of shapes, and of keys that are read: sizes, and no constants that a kernel is given
    sizes: collections.Counter[str] = collections.Counter()
    calls: list[ast.Call] = []
    choices: list[ast.Assign] = []
    bound = set[str]()  # to anything else
    at_once = {id(node) for node in _at_once(tree.body)}
    now = {id(node) for node in _now(tree.body)}
    defined: dict[str, int] = {}
    for name, line in _defined(tree.body):
        defined.setdefault(name, line)
    inside = nodes(tree)
    for node in inside:
        if isinstance(node, ast.Name):
            names.add(node.id)
            if not isinstance(node.ctx, ast.Load):
                bound.add(node.id)
        elif isinstance(node, ast.Attribute):
            attributes.add(node.attr)
            if isinstance(node.value, ast.Name) and isinstance(node.ctx, ast.Load):
                reads.append(node)
        elif isinstance(node, ast.Global):
            for name in node.names:
                defined.setdefault(name, sys.maxsize)  # when a function is called
        elif isinstance(node, ast.arg):
            bound.add(node.arg)
            (constants if is_constant(node) else names).add(node.arg)
        elif isinstance(node, ast.keyword):
            words.add(node.arg or "")
            gives.add(node.arg or "")
            if node.arg == "asks":
                asked += _texts(node.value)
        elif isinstance(node, ast.Call):
            calls.append(node)
            if _place(node.func, places) == TENSOR and node.args:
                shapes.update(map(id, ast.walk(node.args[0])))
        elif isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Load):
            shapes.add(id(node.slice))
        elif isinstance(node, ast.Assign) and isinstance(node.value, ast.IfExp):
            choices.append(node)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            words.add(node.value[:MAX_WORD])
            parts = [word.partition("=") for word in node.value[:MAX_WORD].split()]
            are_names = all(name.isidentifier() and path.replace(".", "_").isidentifier() == bool(to) for name, to, path in parts)
            if are_names and id(node) not in shapes:
                gives.update(name for name, *_ in parts)
            sizes.update(_sizes(node.value))
        elif isinstance(node, ast.ImportFrom) and node.level > 0:
            base = tuple(folder[: len(folder) + 1 - node.level])
            module = (*base, *(node.module.split(".") if node.module else ()))
            for alias in node.names:
                at = alias.lineno, alias.col_offset + 1
                imports.append(Wanted(module, alias.name, node.lineno, at, id(node) in at_once))
                places[alias.asname or alias.name] = (*module, alias.name)
    asks = []
    for read in reads:
        name = read.value.id if isinstance(read.value, ast.Name) else ""
        if name in places.keys() - bound:
            at = read.end_lineno or 0, (read.end_col_offset or 0) - len(read.attr.encode()) + 1
            asks.append(Wanted(places[name], read.attr, read.lineno, at, id(read) in now))
    fields = {node.name: _fields(node) for node in tree.body if isinstance(node, ast.ClassDef)}
    own = {name: (*module_of(path), name) for name in fields}
    stands = dict(_stands(tree.body, {**own, **places}))
    known = {**own, **{name: (*module_of(path), name) for name in stands}, **places}
    known = {name: place for name, place in known.items() if name not in bound - stands.keys()}
    listed = exports(tree)
    facts, reads_sizes = _looked_up(tree, inside, known, places)
    at_top = {**{name: (*module_of(path), name) for name in defined}, **places}
    return Outline(
        tuple(imports),
        tuple(asks),
        defined,
        None if listed is None else tuple(listed),
        frozenset(words | attributes | names | constants),
        frozenset(attributes | names - constants),
        fields,
        _classes(tree.body),
        tuple(_parameters(tree.body)),
        frozenset(itertools.chain.from_iterable(map(_stores, tree.body))),
        frozenset(gives),
        tuple(_questions(calls, places, tree)),
        tuple(asked),
        tuple(_shapes(calls, places)),
        sizes,
        {node.name: _record(node) for node in tree.body if isinstance(node, ast.ClassDef) and _is_record(node)},
        stands,
        tuple(_declares(tree.body, stands, places)),
        tuple(_makes(calls, choices, known, tree)),
        tuple(_operands(calls, known, tree, places)),
        dict(_said_texts(tree, places)),
        tuple(_declared(tree.body, at_top)),
        dict(_says(tree.body, at_top)),
        tuple(_ops(tree.body, at_top)),
        facts,
        reads_sizes,
        frozenset(_tells_sizes(inside, calls, places)),
        dict(_signatures(tree.body)),
        tuple(_launched(tree.body, calls, places)),
        frozenset(arg.arg for node in inside if _is_launch(node) for arg in (*node.args.args, *node.args.kwonlyargs)),
        places,
    )


_QUESTIONS = ("get", "find", "refuse")  # of a table of variants


def _texts(node: ast.expr) -> list[Told]:
    """The texts that are written out in a tuple, or alone."""
    items = node.elts if isinstance(node, (ast.Tuple, ast.List)) else [node]
    texts = (item for item in items if isinstance(item, ast.Constant) and isinstance(item.value, str))
    return [Told(str(item.value), item.lineno, item.col_offset + 2) for item in texts]


def _questions(calls: Sequence[ast.Call], places: Mapping[str, tuple[str, ...]], tree: ast.Module) -> Iterator[Question]:
    for call in calls:
        if not isinstance(call.func, ast.Attribute) or call.func.attr not in _QUESTIONS:
            continue
        of = call.func.value
        *family, table, name = places.get(of.id, ("", "")) if isinstance(of, ast.Name) else ("", "")
        if (table, name) == (TABLE, VARIANTS):
            facts = {keyword.arg: _written_out(keyword.value) for keyword in call.keywords if keyword.arg is not None}
            others = frozenset(_keys(nodes(tree)) if len(facts) < len(call.keywords) else ())
            is_known = bool(others) or len(facts) == len(call.keywords)
            at = call.func.end_lineno or 0, (call.func.end_col_offset or 0) - len(call.func.attr) + 1
            yield Question(tuple(family), call.func.attr, facts, others if is_known else None, *at)


_SHAPE = re.compile(r"[\w\s,*>=]{1,100}")
_IN_BRACKETS = re.compile(r"\[([^\[\]]{1,100})\]")
_SIZE = re.compile(r"[A-Za-z_]\w*")


def _sizes(text: str) -> set[str]:
    parts = [text] if _SHAPE.fullmatch(text) else _IN_BRACKETS.findall(text)
    return {name for part in parts for name in _SIZE.findall(part)}


def _shapes(calls: Sequence[ast.Call], places: Mapping[str, tuple[str, ...]]) -> Iterator[Size]:
    for call in calls:
        if _place(call.func, places) == TENSOR and call.args:
            layouts = [each.value for each in call.keywords if each.arg == "slices"]
            if not any(isinstance(each, ast.Constant) and each.value == "any" for each in layouts):
                forms = _texts(call.args[0])
                for name, number in collections.Counter(name for form in forms for name in _sizes(form.name)).items():
                    first = next(form for form in forms if name in _sizes(form.name))
                    yield Size(name, number, first.line, first.column + first.name.index(name))


_SPEAKS = ("scaled_by", "only_with", "made_if")  # of other fields


def _declared(body: Sequence[ast.stmt], places: Mapping[str, tuple[str, ...]]) -> Iterator[Declared]:
    for node in (node for node in body if isinstance(node, ast.ClassDef) and _is_record(node)):
        for line in node.body:
            match line:
                case ast.AnnAssign(ast.Name(field), annotation) if says := _declaration(annotation, places):
                    yield Declared(node.name, field, says, line.lineno, line.col_offset + 1)


def _says(body: Sequence[ast.stmt], places: Mapping[str, tuple[str, ...]]) -> Iterator[tuple[str, Declaration]]:
    for node in body:
        for name, value in _assigned(node):
            if says := _declaration(value, places):
                yield name, says
        if isinstance(node, ast.FunctionDef):
            made = [inner.value for inner in nodes(node) if isinstance(inner, ast.Return) and inner.value is not None]
            found = [_declaration(value, places, node.args.vararg) for value in made if isinstance(value, ast.Call)]
            same = {says and (says.of, says.asks, says.hands_on, says.is_written, says.may_be_none) for says in found}
            if found and found[0] and len(found) == len(made) and len(same) == 1:
                yield node.name, found[0]


def _declaration(
    node: ast.expr, places: Mapping[str, tuple[str, ...]], handed: ast.arg | None = None
) -> Declaration | None:
    """``handed``: what the function around it is given by place."""
    at = node.lineno, node.col_offset + 1
    match node:
        case ast.Subscript(_, ast.Tuple([kind, made])) if says := _declaration(made, places):  # Annotated
            return says._replace(may_be_none=says.may_be_none or "None" in ast.unparse(kind))
        case ast.BinOp(one, ast.BitOr(), ast.Constant(None)) if says := _declaration(one, places):
            return says._replace(may_be_none=True)
        case ast.Call(func, args, keywords) if of := _place(func, places):
            said = {keyword.arg: keyword.value for keyword in keywords}
            asks = tuple(told.name for told in _texts(said["asks"])) if "asks" in said else ()
            speaks = tuple(told for name in _SPEAKS if name in said for told in _texts(said[name])[:1])
            given = tuple(told for argument in args for told in _texts(argument))
            is_handed_on = handed is not None and "asks" in said and ast.unparse(said["asks"]) == handed.arg
            may_be_none = bool(said.keys() & {"optional", "only_with"})
            dtype = next(iter(_texts(said.get("dtype", args[1] if len(args) > 1 else func))), None) if of == TENSOR else None
            inside = [inner for value in (*args, *said.values()) for inner in nodes(value)]
            classes = tuple(found for inner in inside if isinstance(inner, ast.Name) and (found := places.get(inner.id)))
            more = (dtype, given, classes, is_handed_on)
            return Declaration(of, "written" in said, may_be_none, asks, speaks, *more, *at)
        case ast.Name() | ast.Attribute() if of := _place(node, places):
            return Declaration(of, False, False, (), (), None, (), (), False, *at)
    return None


_OP = (OPERANDS, "Op")


def _ops(body: Sequence[ast.stmt], places: Mapping[str, tuple[str, ...]]) -> Iterator[Of]:
    for _, value in (each for node in body for each in _assigned(node)):
        match value:
            case ast.Call(func, [_, ast.Name(record), *_], keywords) if record in places and _place(func, places) == _OP:
                said = {keyword.arg: keyword.value for keyword in keywords}
                dtypes, names = said.get("dtypes"), [said[name] for name in ("first", "tells", "aligned") if name in said]
                keys = [told.name for key in dtypes.keys if key for told in _texts(key)] if isinstance(dtypes, ast.Dict) else []
                is_whole = dtypes is None or (isinstance(dtypes, ast.Dict) and len(keys) == len(dtypes.keys))
                told = (told for value in names for told in _texts(value))
                yield Of(places[record], tuple(keys) if is_whole else None, tuple(told))


_Reads = tuple[tuple[tuple[str, ...], Told], ...]


def _looked_up(
    tree: ast.Module, inside: Sequence[ast.AST], known: Mapping[str, tuple[str, ...]], places: Mapping[str, tuple[str, ...]]
) -> tuple[_Reads, _Reads]:
    """The facts of variants, and the sizes of a check, that are read by a name which is written out."""
    reads = [each for node in inside if isinstance(node, (ast.Subscript, ast.Call)) and (each := _key(node)) is not None]
    if not reads:
        return (), ()
    scopes = _Scopes(tree)
    attributes: dict[str, tuple[str, ...]] = {}
    for node in inside:
        match node:
            case ast.Assign([ast.Attribute(ast.Name("self"), name)], value) if family := _family_of(value, places):
                attributes[name] = family
    handed = {arg.arg for arg in inside if isinstance(arg, ast.arg) and arg.annotation and _is_sizes(arg.annotation, places)}
    facts, sizes = list[tuple[tuple[str, ...], Told]](), list[tuple[tuple[str, ...], Told]]()
    for of, told in reads:
        match scopes.value_of(of) if isinstance(of, ast.Name) else of:
            case ast.Attribute(ast.Name("self"), name) if name in attributes:
                facts.append((attributes[name], told))
            case ast.Call(ast.Attribute(ast.Name(op), "check")) if op in known:
                sizes.append((known[op], told))
            case ast.Call() as call if family := _family_of(call, places):
                facts.append((family, told))
            case None if isinstance(of, ast.Name) and of.id in handed:
                sizes.append(((), told))
    return tuple(facts), tuple(sizes)


def _key(node: ast.AST) -> tuple[ast.expr, Told] | None:
    """What is looked up, and by which text."""
    match node:
        case ast.Subscript(of, ast.Constant(str()) as key, ast.Load()) | ast.Call(ast.Attribute(of, "get"), [key]):
            told = _texts(key)
            return (of, told[0]) if told and isinstance(of, (ast.Name, ast.Attribute, ast.Call)) else None
    return None


def _family_of(value: ast.expr, places: Mapping[str, tuple[str, ...]]) -> tuple[str, ...]:
    """The family whose variants are asked what they have of each fact; (): of none."""
    match value:
        case ast.Call(ast.Attribute(ast.Name(name), "of")) if places.get(name, ())[-2:] == (TABLE, VARIANTS):
            return places[name][:-2]
    return ()


def _is_sizes(annotation: ast.expr, places: Mapping[str, tuple[str, ...]]) -> bool:
    return _place(annotation, places) == (OPERANDS, "Sizes")


_NAMES_SIZES = ("size", "count")


def _tells_sizes(
    inside: Sequence[ast.AST], calls: Sequence[ast.Call], places: Mapping[str, tuple[str, ...]]
) -> Iterator[str]:
    for call in calls:
        if _place(call.func, places) == TENSOR and call.args:
            yield from (name for form in _texts(call.args[0]) for name in _SIZE.findall(form.name))
        for keyword in call.keywords:
            if keyword.arg in _NAMES_SIZES:
                yield from (name for told in _texts(keyword.value) for name in _SIZE.findall(told.name))
    for node in inside:
        match node:
            case ast.AnnAssign(ast.Name(name), _, ast.Constant(str(text))) if name in _NAMES_SIZES:
                yield text
            case ast.arguments():
                own = node.args[len(node.args) - len(node.defaults) :]
                named = zip((*own, *node.kwonlyargs), (*node.defaults, *node.kw_defaults), strict=True)
                yield from (told.name for arg, value in named if arg.arg in _NAMES_SIZES and value for told in _texts(value))
    yield from _keys(inside)


def _signatures(body: Sequence[ast.stmt]) -> Iterator[tuple[str, Signature]]:
    for node in body:
        if isinstance(node, ast.FunctionDef) and not (node.args.vararg or node.args.kwarg or node.args.posonlyargs):
            own = node.args
            needed = len(own.args) - len(own.defaults)
            parameters = {arg.arg: place >= needed for place, arg in enumerate(own.args)}
            parameters |= {arg.arg: value is not None for arg, value in zip(own.kwonlyargs, own.kw_defaults, strict=True)}
            yield node.name, Signature(parameters, len(own.args))


_SCHEDULE, _LAUNCH = "schedule", "launch"


def _launched(
    body: Sequence[ast.stmt], calls: Sequence[ast.Call], places: Mapping[str, tuple[str, ...]]
) -> Iterator[Launched]:
    made = [value for node in body for name, value in _assigned(node) if name == _SCHEDULE and isinstance(value, ast.Call)]
    of = _place(made[0].func, places) if made else None
    for call in calls if of else ():
        match call.func:
            case ast.Attribute(ast.Name(name), attribute) if of and (name, attribute) == (_SCHEDULE, _LAUNCH):
                for keyword in call.keywords:
                    if keyword.arg is not None:
                        value = keyword.value.id if isinstance(keyword.value, ast.Name) else ""
                        yield Launched(of, keyword.arg, value, keyword.lineno, keyword.col_offset + 1)


def _is_launch(node: ast.AST) -> TypeGuard[ast.FunctionDef]:
    return isinstance(node, ast.FunctionDef) and node.name == _LAUNCH


_OF_OPS = ("caller", "finder", "in_graphs")  # what an op makes, and is called as its named tuple is


def _stands(body: Sequence[ast.stmt], places: Mapping[str, tuple[str, ...]]) -> Iterator[tuple[str, tuple[str, ...]]]:
    known = dict(places)
    for node in (node for node in body if isinstance(node, ast.ClassDef) and not _is_record(node)):
        base = next((known[base.id] for base in node.bases if isinstance(base, ast.Name) and base.id in known), None)
        if base is not None:
            yield node.name, base
    for name, value in (each for node in body for each in _assigned(node)):
        match value:
            case ast.Call(ast.Attribute(ast.Name(of), "Op"), [_, ast.Name(record), *_]) if places.get(of) == (OPERANDS,):
                found = known.get(record)
            case ast.Call(ast.Attribute(ast.Name(op), made)) if made in _OF_OPS:
                found = known.get(op)
            case _:
                continue
        if found is not None:
            known[name] = (*found[:-1], name)
            yield name, found


def _declares(
    body: Sequence[ast.stmt], stands: Mapping[str, tuple[str, ...]], places: Mapping[str, tuple[str, ...]]
) -> Iterator[str]:
    classes = {node.name for node in body if isinstance(node, ast.ClassDef)}
    yield from stands.keys() - classes
    for node in body:
        made = [each.func for each in getattr(node, "decorator_list", ()) if isinstance(each, ast.Call)]
        if isinstance(node, ast.ClassDef) and any(_place(each, places) == (OPERANDS, "bundle") for each in made):
            yield node.name


def _assigned(node: ast.AST) -> Iterator[tuple[str, ast.expr]]:
    """The names that an assignment binds to what is written out beside them."""
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    todo = [(target, node.value) for target in targets if isinstance(node, (ast.Assign, ast.AnnAssign))]
    for target, value in todo:
        if isinstance(target, ast.Name) and value is not None:
            yield target.id, value
        elif isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple) and len(target.elts) == len(value.elts):
            is_plain = not any(isinstance(each, ast.Starred) for each in (*target.elts, *value.elts))
            todo += zip(target.elts, value.elts, strict=True) if is_plain else ()


class _Scopes:
    """What names stand for in the functions of a module, as far as that is said once."""

    def __init__(self, tree: ast.Module) -> None:
        at_top = [node for node in tree.body if not isinstance(node, (ast.FunctionDef, ast.ClassDef))]
        functions = (node for node in nodes(tree) if isinstance(node, (ast.FunctionDef, ast.Lambda)))
        self._known = [_said_once([inner for node in at_top for inner in nodes(node)])]
        self._around: dict[int, list[int]] = {}  # of nodes, from the outermost on
        for function in functions:
            inside = nodes(function)
            for node in inside:
                self._around.setdefault(id(node), [0]).append(len(self._known))
            self._known.append(_said_once(inside))
        self._laid: dict[int, list[ast.expr]] = {}

    def value_of(self, name: ast.Name) -> ast.expr | None:
        """What ``name`` is where it stands; None: that cannot be told."""
        scopes = (self._known[scope] for scope in reversed(self._around.get(id(name), [0])))
        return next((known[name.id] for known in scopes if name.id in known), None)

    def lay_out(self, arguments: Sequence[ast.expr]) -> list[ast.expr]:
        """Arguments by place, and those of tuples among them; the first that could be any number is the last."""
        laid: list[ast.expr] = []
        for argument in arguments:
            laid += self._laid_out(argument) if isinstance(argument, ast.Starred) else [argument]
            if len(laid) > _MOST:
                return [*laid[:_MOST], ast.Starred(argument)]
            if laid and isinstance(laid[-1], ast.Starred):
                break
        return laid

    def _laid_out(self, argument: ast.Starred) -> list[ast.expr]:
        value = self.value_of(argument.value) if isinstance(argument.value, ast.Name) else argument.value
        if not isinstance(value, (ast.Tuple, ast.List)):
            return [argument]
        if id(value) not in self._laid:
            self._laid[id(value)] = [argument]  # of a tuple of itself
            self._laid[id(value)] = self.lay_out(value.elts)
        return self._laid[id(value)]


_BY_NAME = ("given", "given_to")  # of an op: fields by name, others have defaults
_MOST = 255  # values that a call is given


def _said_once(inside: Sequence[ast.AST]) -> Mapping[str, ast.expr | None]:
    """The names that are bound, and what to; None: that cannot be told."""
    known = {name: value for node in inside for name, value in _assigned(node)}
    stores = [node.id for node in inside if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load)]
    counts = collections.Counter([*stores, *(node.arg for node in inside if isinstance(node, ast.arg))])
    return {name: known.get(name) if count == 1 else None for name, count in counts.items()}


def _makes(
    calls: Sequence[ast.Call], choices: Sequence[ast.Assign], places: Mapping[str, tuple[str, ...]], tree: ast.Module
) -> Iterator[Made]:
    """``choices``: names of one of two."""
    scopes: _Scopes | None = None  # few modules have to be known so well
    either = {target.id for node in choices for target in node.targets if isinstance(target, ast.Name)}
    for call in calls:
        called, args = call.func, call.args
        if isinstance(called, ast.Attribute) and called.attr == "_make" and len(args) == 1:
            called, args = called.value, [ast.Starred(args[0])]
        takes_some = isinstance(called, ast.Attribute) and called.attr in _BY_NAME and _place(called.value, places) is not None
        if takes_some and isinstance(called, ast.Attribute):
            called, args = called.value, []
        if isinstance(called, ast.Name) and called.id in either:
            scopes = scopes or _Scopes(tree)
            called = scopes.value_of(called) or called
        for each in (called.body, called.orelse) if isinstance(called, ast.IfExp) else (called,):
            of = _place(each, places)
            if of is None:
                continue
            laid = args
            if any(isinstance(argument, ast.Starred) for argument in args):
                scopes = scopes or _Scopes(tree)
                laid = scopes.lay_out(args)
            given = tuple(_name_of(argument) for argument in laid if not isinstance(argument, ast.Starred))
            names = tuple(keyword.arg for keyword in call.keywords if keyword.arg is not None)
            is_whole = len(given) == len(laid) and len(names) == len(call.keywords) and not takes_some
            rest = "" if len(given) == len(laid) or (len(args) == 1 and laid == args) else ast.unparse(laid[-1])
            yield Made(of, given, names, is_whole, rest, call.lineno, call.col_offset + 1)


def _operands(
    calls: Sequence[ast.Call], known: Mapping[str, tuple[str, ...]], tree: ast.Module, places: Mapping[str, tuple[str, ...]]
) -> Iterator[Operand]:
    scopes: _Scopes | None = None
    for call in calls:
        match call:
            case ast.Call(ast.Attribute(_, "Launcher"), [_, op, value]) if of := _place(op, known):
                scopes = scopes or _Scopes(tree)
                yield from (Operand(of, word) for word in _written(value, scopes, tree, places))


def _said_texts(tree: ast.Module, places: Mapping[str, tuple[str, ...]]) -> Iterator[tuple[str, tuple[Word, ...]]]:
    texts = [each for node in tree.body for each in _assigned(node) if isinstance(each[1], (ast.Constant, ast.JoinedStr))]
    scopes = _Scopes(tree) if any(isinstance(value, ast.JoinedStr) for _, value in texts) else None
    yield from ((name, tuple(_written(value, scopes, tree, places))) for name, value in texts)


def _written(
    value: ast.expr, scopes: _Scopes | None, tree: ast.Module, places: Mapping[str, tuple[str, ...]]
) -> Iterator[Word]:
    """The words of a text, of names and of attributes of classes in it too; names from elsewhere are for their words."""
    todo = [value]
    for each in todo:
        match each:
            case ast.Constant(str(text)):
                yield from (Word(word, (), each.lineno) for word in text.split())
            case ast.JoinedStr(parts):
                todo += parts
            case ast.FormattedValue(inner):
                todo.append(inner)
            case ast.Name() if (found := scopes.value_of(each) if scopes else None) is not None:
                todo += [found] if found not in todo else []
            case ast.Attribute(ast.Name("self"), name):
                lines = (line for node in tree.body if isinstance(node, ast.ClassDef) for line in node.body)
                todo += [said for line in lines for known, said in _assigned(line) if known == name and said not in todo]
            case ast.Name() | ast.Attribute() if of := _place(each, places):
                yield Word("", of, each.lineno)


def _place(called: ast.expr, places: Mapping[str, tuple[str, ...]]) -> tuple[str, ...] | None:
    """Where what is called is defined, as far as the package has it."""
    if isinstance(called, ast.Attribute) and isinstance(called.value, ast.Name) and called.value.id in places:
        return (*places[called.value.id], called.attr)
    return places.get(called.id) if isinstance(called, ast.Name) else None


def _name_of(argument: ast.expr) -> str | None:
    if isinstance(argument, ast.Name):
        return argument.id
    if isinstance(argument, ast.Attribute):
        return argument.attr
    is_written_out = isinstance(argument, ast.Constant) or ast.unparse(argument).lstrip("-").isdigit()
    return None if is_written_out else ""


def _is_record(node: ast.ClassDef) -> bool:
    return any(ast.unparse(base).endswith("NamedTuple") for base in node.bases)


def _record(node: ast.ClassDef) -> Mapping[str, bool]:
    lines = [line for line in node.body if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name)]
    return {line.target.id: line.value is not None for line in lines if isinstance(line.target, ast.Name)}


def _written_out(node: ast.expr) -> tuple[object, ...] | None:
    """The constants that an expression may be; None: or something else."""
    if isinstance(node, ast.IfExp):
        parts = [_written_out(part) for part in (node.body, node.orelse)]
        return None if None in parts else tuple(value for part in parts for value in part or ())
    return (node.value,) if isinstance(node, ast.Constant) else None


def _keys(inside: Sequence[ast.AST]) -> Iterator[str]:
    """The keys of dictionaries that are names, as far as they are written out."""
    for node in inside:
        keys: Sequence[ast.expr | None] = ()
        if isinstance(node, ast.Dict):
            keys = node.keys
        elif isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Store):
            keys = (node.slice,)
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "dict":
            yield from (keyword.arg for keyword in node.keywords if keyword.arg is not None)
        yield from (key.value for key in keys if isinstance(key, ast.Constant) and isinstance(key.value, str))


def _classes(body: Sequence[ast.stmt]) -> Mapping[str, Mentioned]:
    classes = [node.name for node in body if isinstance(node, ast.ClassDef)]
    own: dict[str, tuple[Mentioned, set[str]]] = {}  # and the names that it uses
    for node in body if classes else ():
        if isinstance(node, (ast.ClassDef, ast.FunctionDef)):
            inside = nodes(node)
            attributes = frozenset(inner.attr for inner in inside if isinstance(inner, ast.Attribute))
            texts = (inner.value for inner in inside if isinstance(inner, ast.Constant) and isinstance(inner.value, str))
            mentioned = Mentioned(attributes, frozenset(text[:MAX_WORD] for text in texts))
            own[node.name] = mentioned, {inner.id for inner in inside if isinstance(inner, ast.Name)}
    found = {}
    for name in classes:
        reached, todo = {name}, [name]
        while todo:
            new = own[todo.pop()][1] & own.keys() - reached
            reached |= new
            todo += new
        parts = [own[each][0] for each in reached]
        found[name] = Mentioned(*(frozenset().union(*kind) for kind in zip(*parts, strict=True)))
    return found


def _parameters(body: Sequence[ast.stmt]) -> Iterator[Parameter]:
    for node in body:
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_") and is_kernel(node):
            yield from (Parameter(node.name, each.arg, each.lineno, each.col_offset + 1) for each in node.args.args)


def _stores(kernel: ast.stmt) -> set[str]:
    """The parameters of a kernel from which the addresses that it stores to are made."""
    if not isinstance(kernel, ast.FunctionDef) or not is_kernel(kernel):
        return set()
    bases = {each.arg: {each.arg} for each in kernel.args.args if not is_constant(each)}

    def bases_of(address: ast.expr) -> set[str]:
        match address:
            case ast.Name(name):
                return bases.get(name, set())
            case ast.BinOp(left, ast.Add() | ast.Sub(), right):
                return bases_of(left) | bases_of(right)
            case ast.Subscript(value):
                return bases_of(value)
        return set()

    lines = [node for node in ast.walk(kernel) if isinstance(node, (ast.Assign, ast.Call))]
    for line in sorted(lines, key=lambda line: line.lineno):
        if isinstance(line, ast.Assign) and isinstance(line.targets[0], ast.Name):
            name = line.targets[0].id
            bases[name] = bases.get(name, set()) | bases_of(line.value)
    calls = [line for line in lines if isinstance(line, ast.Call) and isinstance(line.func, ast.Attribute) and line.args]
    stores = [call for call in calls if ast.unparse(call.func) == "tl.store" or ast.unparse(call.func).startswith("tl.atomic_")]
    return set().union(*(bases_of(call.args[0]) for call in stores)) & {each.arg for each in kernel.args.args}


def is_kernel(node: ast.FunctionDef) -> bool:
    """Whether a function is compiled by Triton."""
    return any(map(_is_jit, node.decorator_list))


def _is_jit(decorator: ast.expr) -> bool:
    made = decorator.func if isinstance(decorator, ast.Call) else decorator
    return isinstance(made, ast.Attribute) and made.attr == "jit"


def nodes(tree: ast.AST) -> list[ast.AST]:
    """All nodes of a tree, as ``ast.walk`` has them, in half its time."""
    found = [tree]
    for node in found:
        for field in node._fields:
            value = getattr(node, field, None)
            if isinstance(value, ast.AST):
                found.append(value)
            elif isinstance(value, list):
                found += [item for item in value if isinstance(item, ast.AST)]
    return found


def is_constant(parameter: ast.arg) -> bool:
    """Whether a parameter is a constant of a kernel."""
    return parameter.annotation is not None and ast.unparse(parameter.annotation).endswith("constexpr")


def exports(tree: ast.Module) -> dict[str, ast.expr] | None:
    """The names of ``__all__`` and where they stand; None: the module has none."""
    found: dict[str, ast.expr] | None = None
    for node, _, listed in export_lists(tree):
        found = {**(found or {}), **listed} if isinstance(node, ast.AugAssign) else listed
    return found


def export_lists(tree: ast.Module) -> Iterator[tuple[ast.stmt, ast.Name, dict[str, ast.expr]]]:
    """Where a module says what it exports, as far as that can be read: names that are written out, at its top level."""
    for node in tree.body:
        match node:
            case (
                ast.Assign([ast.Name("__all__") as target], (ast.List(names) | ast.Tuple(names)))
                | ast.AnnAssign(ast.Name("__all__") as target, _, (ast.List(names) | ast.Tuple(names)))
                | ast.AugAssign(ast.Name("__all__") as target, ast.Add(), (ast.List(names) | ast.Tuple(names)))
            ):
                texts = [name.value if isinstance(name, ast.Constant) else None for name in names]
                if all(isinstance(text, str) for text in texts):
                    yield node, target, {str(text): name for text, name in zip(texts, names, strict=True)}


def _at_once(body: Sequence[ast.stmt]) -> Iterator[ast.stmt]:
    """The statements that run when a module is imported, but for what type checkers alone see, and what may fail."""
    for node in body:
        yield node
        if isinstance(node, ast.If) and "TYPE_CHECKING" not in ast.unparse(node.test):
            yield from _at_once([*node.body, *node.orelse])
        elif isinstance(node, ast.ClassDef):
            yield from _at_once(node.body)


def _now(body: Sequence[ast.stmt]) -> Iterator[ast.AST]:
    """What of the statements of ``_at_once`` is evaluated then."""
    for node in _at_once(body):
        parts: list[Any] = [node]
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            parts = [*node.decorator_list, *node.args.defaults, *filter(None, node.args.kw_defaults)]
        elif isinstance(node, ast.ClassDef):
            parts = [*node.decorator_list, *node.bases]
        elif isinstance(node, ast.If):
            parts = [node.test]
        elif isinstance(node, (ast.Try, ast.With, ast.For, ast.While)):
            parts = []
        for part in parts:
            yield from (inner for inner in nodes(part) if not isinstance(part, ast.Lambda))


def _defined(body: Sequence[ast.stmt]) -> Iterator[tuple[str, int]]:
    """The names that statements bind, but for those inside of functions and classes."""
    for node in body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            yield node.name, node.lineno
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            yield from ((alias.asname or alias.name.partition(".")[0], node.lineno) for alias in node.names)
        else:
            for inner in nodes(node):
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
