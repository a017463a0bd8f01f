"""Whether the modules of a package fit each other and the specs: each asks only for what there is, and nothing lies idle."""

from __future__ import annotations

import ast
import dataclasses
import functools
import itertools
import re
import sys
from typing import Callable, Iterator, Mapping, Sequence, TypeVar

from kernelgen.core import names
from kernelgen.core.diagnostics import Diagnostic, Failure, did_you_mean
from kernelgen.core.locate import room_label
from kernelgen.core.model import SCALES, SCHEDULE, VOCABULARY, Axis, Family, Kernel, Location, Package, Record, Variant
from kernelgen.core.names import Identifier
from kernelgen.emit.outline import (
    BUNDLE,
    TENSOR,
    VARIANTS,
    Declaration,
    Declared,
    Made,
    Mentioned,
    Outline,
    Question,
    Word,
    module_of,
    outline,
)
from kernelgen.emit.outputs import Outputs
from kernelgen.emit.render import Renderer
from kernelgen.emit.rooms import Rooms
from kernelgen.emit.template import Unserved
from kernelgen.spec.expand import variant_of

_Known = TypeVar("_Known")
_DOCUMENTS = re.compile(r'"""[\s\S]*?"""|#.*')
_WORDS = re.compile(r'"""[\s\S]*?"""|"[^"\n]*"|#.*')  # in quotes too
_BIND = "bind"  # what a front door calls of a variant that it chose,
_SCHEDULE = "schedule"  # of what
_LAUNCHER = "Launcher"  # what launches a kernel
_GROUPS = {"group_n": SCALES.keys() - {"act_quant"}, "group_k": SCALES.keys()}  # the axes that the sizes of groups are of
_ASKED_BY = {"max_rank": "rank"}  # a fact that calls ask for by another name
_HELD_TO = ("torch_dtype", "max_rank")  # facts that tensors fit or not: a launcher hands them to its checks
_FACTS = {SCHEDULE, *VOCABULARY, *(fact for tags in VOCABULARY.values() for facts in tags.values() for fact in facts)}


def faults(package: Package, families: Sequence[Family], outputs: Outputs) -> Iterator[Diagnostic]:
    """What does not fit in the ``outputs`` of ``families``, which are those of ``package`` as far as they are rendered."""
    if outputs.faults:  # what is missing because it failed would be told again
        return
    missing = list(_import_faults(outputs)) or [*_ask_faults(outputs), *_circle_faults(outputs)]
    missing += _idle_faults(families, outputs)
    missing += [*_record_faults(outputs), *_read_faults(outputs), *_operand_faults(package, outputs), *_size_faults(outputs)]
    missing += [*_handed_faults(outputs), *_spoken_faults(outputs), *_op_faults(outputs), *_lookup_faults(package, outputs)]
    missing += [] if missing else [fault for family in families for fault in _asking_faults(family, outputs)]
    missing += [fault for family in families for fault in _launcher_faults(family, outputs)]
    yield from missing
    yield from _group_faults(package, outputs)
    unheeded = [] if missing else [fault for family in package.families for fault in _unheeded(family, outputs)]
    yield from unheeded
    for family in families:
        choice = [] if missing else list(_choice_faults(family, outputs))
        yield from (fault for fault in choice if fault.location not in {f.location for f in unheeded})
        yield from _tunable_faults(family, outputs)
        yield from _tuned_faults(family, outputs)


def _group_faults(package: Package, outputs: Outputs) -> Iterator[Diagnostic]:
    """Families that a module at the top of the package hands the same FP8 operands, and that have groups of other sizes."""
    told = set[tuple[str, str]]()
    tops = {place[0]: {wanted.top for wanted in made.imports} for place, made in outputs.modules.items() if len(place) == 1}
    for (module, called), (key, axes) in itertools.product(tops.items(), _GROUPS.items()):
        of = [family for family in package.families if family.name in called and "group" in family.scales(*axes)]
        for family in of:
            mine, other = getattr(family.quant, key), getattr(of[0].quant, key)
            if mine != other and (family.name, key) not in told:
                told.add((family.name, key))
                where = family.settings.get(f"quant.{key}", family.location)
                message = f"{key} {mine}, and {other} in {of[0].spec}: {module} hands both the same scales of groups"
                yield Diagnostic("KG026", where, message, f"{key}: {other} here, or {mine} there")


def _unheeded(family: Family, outputs: Outputs) -> Iterator[Diagnostic]:
    twins = Twins(family, outputs.renderer, outputs.rooms)
    yield from setting_faults(twins)
    for axis in family.axes:
        yield from axis_faults(axis, twins)


def setting_faults(twins: Twins) -> Iterator[Diagnostic]:
    """Keys of ``numerics`` and ``quant`` that do not concern the family, or not all of it."""
    family = twins.family
    scales, is_read = family.scales(*SCALES), "QUANT" in twins.host_words
    concerned = {
        "numerics.intermediate": "intermediate_dtype" in twins.asked,
        "numerics.strict": not family.numerics.strict or twins.heed_strictness,
        "quant.elements": bool(scales) and is_read,
        "quant.group_n": "group" in family.scales(*_GROUPS["group_n"]) and (is_read or "group_n" in twins.asked),
        "quant.group_k": "group" in scales and (is_read or "group_k" in twins.asked),
    }
    for key, where in family.settings.items():
        if not concerned.get(key, True):
            yield Diagnostic("KG029", where, f"{key} makes no difference to kernels of {family.name}", "drop it")


def axis_faults(axis: Axis, twins: Twins) -> Iterator[Diagnostic]:
    """What no template heeds, of templates that make what they are asked for: an axis, or a tag of it."""
    family = twins.family
    if axis.name == SCHEDULE:
        return
    if twins.are_unread(axis.name):
        message = f"no template of {family.name} reads the axis {axis.name}: its tags make no difference"
        hint = f"drop the axis, or read v.{axis.name} in the kernel and in the front door"
        yield Diagnostic("KG029", axis.location, message, hint)
        return
    ignored = _WORDS if axis.name in VOCABULARY else _DOCUMENTS  # of a free axis, a word in quotes is enough
    for kernel in family.kernels:
        used = {getattr(variant, axis.name) for variant in family.variants if variant.kernel == kernel.name}
        for tag, other in itertools.combinations((tag for tag in axis.tags if tag in used), 2):
            if twins.are_same(kernel, axis.name, tag, other, ignored):
                message = f"templates/{kernel.template} makes the same of {axis.name} {tag} and {other}"
                hint = f'read what they stand for, say {{{{ refuse("{axis.name}") }}}} where one has no arm, or drop it'
                yield Diagnostic("KG029", axis.tag_locations[axis.tags.index(other)], message, hint)


class Twins:
    """The variants of a family, beside those that differ from one of them in one tag, whether or not the spec has them."""

    def __init__(self, family: Family, renderer: Renderer, rooms: Rooms) -> None:
        self.family = family
        self._renderer = renderer
        self._rooms = rooms
        self._made: dict[tuple[Kernel, Record], str | None] = {}

    def are_same(self, kernel: Kernel, axis: str, one: str, other: str, ignored: re.Pattern[str] = _WORDS) -> bool:
        """Whether the template of ``kernel`` refuses neither tag, and makes the same of both, whatever the other tags.

        ``ignored`` does not count, outside of kernels: by default words in quotes, as a launcher names its case.
        """
        if self._host_tells(kernel, axis, one, other):
            return False
        own = [variant.tags for variant in self.family.variants if variant.kernel == kernel.name]
        bases = [tags for tags in own if getattr(tags, axis) in (one, other)] or own
        seen = False
        for tags in bases:
            pair = (Record({**dict(tags), Identifier(axis): Identifier(tag)}) for tag in (one, other))
            first, second = (self._text(kernel, tags) for tags in pair)
            if first is not None and second is not None:
                if first != second and not _says_the_same(first, second, ignored):
                    return False
                seen = True
        return seen

    def _host_tells(self, kernel: Kernel, axis: str, one: str, other: str) -> bool:
        """Whether what launches variants of ``kernel`` asks for a number, or the dtype, that tells both tags apart."""
        host, tags = self._hosts[kernel], VOCABULARY.get(axis, {})
        first, second = tags.get(one, {}), tags.get(other, {})
        asked = [fact for fact in first if fact in host and (fact == "torch_dtype" or not isinstance(first[fact], str))]
        return any(first[fact] != second.get(fact) for fact in asked)

    def are_unread(self, axis: str) -> bool:
        """Whether no template refuses a tag of ``axis``, and each makes the same of all that are known."""
        meaning = VOCABULARY.get(axis, {})
        first, *others = meaning or [""]
        if not self.asked.union(*self._hosts.values()) & {axis, "tags", *meaning.get(first, ())}:
            return True
        return bool(others) and all(
            self.are_same(kernel, axis, first, other, _DOCUMENTS) for kernel in self.family.kernels for other in others
        )

    @functools.cached_property
    def _hosts(self) -> dict[Kernel, set[str]]:
        """The texts in the classes of the room that launch the variants of each kernel."""
        return {kernel: self._host(kernel) for kernel in self.family.kernels}

    def _host(self, kernel: Kernel) -> set[str]:
        own = (variant.tags for variant in self.family.variants if variant.kernel == kernel.name)
        text = next((text for tags in own if (text := self._text(kernel, tags)) is not None), "")
        made = outline(names.family_path(self.family.name, kernel.name), text)
        sources = {source.stem: source.file for source in self._rooms.modules(self.family.name)}
        found = set[str]()
        for wanted in () if made is None else made.imports:
            if wanted.module[:1] == (self.family.name,) and wanted.module[-1] in sources:
                of = outline(wanted.module[-1], sources[wanted.module[-1]].read_text("utf-8"))
                found |= set() if of is None or wanted.name not in of.classes else of.classes[wanted.name].texts
        return found

    @functools.cached_property
    def asked(self) -> set[str]:
        """What the templates of the family read."""
        templates = {kernel.template for kernel in self.family.kernels}
        return {word for template in templates if self._renderer.has(template) for word in self._renderer.asks(template)}

    @functools.cached_property
    def host_words(self) -> set[str]:
        """What the modules of the room mention."""
        sources = self._rooms.modules(self.family.name)
        made = (outline(source.stem, source.file.read_text("utf-8")) for source in sources)
        return {word for each in made if each is not None for word in _words(each)}

    @property
    def heed_strictness(self) -> bool:
        """Whether ``numerics.strict`` makes a difference to every variant."""
        numerics = dataclasses.replace(self.family.numerics, strict=not self.family.numerics.strict)
        others = Twins(dataclasses.replace(self.family, numerics=numerics), self._renderer, self._rooms)
        keys = ((self.family.kernel(variant.kernel), variant.tags) for variant in self.family.variants)
        return all(self._text(*key) != others._text(*key) for key in keys)

    def _text(self, kernel: Kernel, tags: Record) -> str | None:
        """What is made of the variant of ``tags``; None: nothing."""
        variant = variant_of(self.family, tags)
        key = kernel, tags
        if key not in self._made:
            try:
                made = self._renderer.render(kernel.template, self.family.spec, variant)
                self._made[key] = made.replace(variant.name, "_")
            except (Unserved, Failure):
                self._made[key] = None
        return self._made[key]


def _says_the_same(text: str, other: str, ignored: re.Pattern[str]) -> bool:
    return ignored.sub("", text) == ignored.sub("", other) and _kernels(text) == _kernels(other)


def _kernels(text: str) -> list[str]:
    try:
        nodes = [node for node in ast.parse(text).body if isinstance(node, ast.FunctionDef)]
    except (SyntaxError, ValueError, RecursionError, MemoryError):  # told when the file is checked
        return []
    return [ast.dump(node) for node in nodes if any("jit" in ast.dump(line) for line in node.decorator_list)]


def _choice_faults(family: Family, outputs: Outputs) -> Iterator[Diagnostic]:
    """A front door that chooses no variant, or not by every axis."""
    asks = _host_words(family, outputs)
    idle = [] if VARIANTS in asks else [variant for variant in family.variants if variant.module not in asks]
    if idle:
        told = f"{idle[0].name} and {len(idle) - 1} more" if len(idle) > 1 else idle[0].name
        message = f"no module of the room of {family.name} names {told}: nothing can choose it"
        where = outputs.place_in((family.name, names.FRONT_DOOR), 0)
        yield Diagnostic("KG029", where, message, "choose among the VARIANTS of its _table")
        return
    for axis in family.axes:
        asked = _ASKED_BY.get(axis.fact, axis.fact)
        if axis.name != SCHEDULE and not {asked, VARIANTS} <= asks:
            message = f"the front door of {family.name} does not choose by the axis {axis.name}"
            hint = f"drop the axis, or ask VARIANTS for {asked} in a module of its room"
            yield Diagnostic("KG029", axis.location, message, hint)


    every = [(place, question) for place, made in outputs.modules.items() for question in made.questions]
    questions = [(place, question) for place, question in every if question.family == (family.name,)]
    for place, question in questions:
        yield from _question_faults(family, place, question, asks, outputs)
    for axis in family.axes:
        written = [question.facts.get(_ASKED_BY.get(axis.fact, axis.fact)) for _, question in questions]
        if not written or None in written or axis.fact in _ASKED_BY:
            continue
        values = {value for constants in written for value in constants or ()}
        for tag, where in zip(axis.tags, axis.tag_locations, strict=True):
            value = VOCABULARY.get(axis.name, {}).get(tag, {}).get(axis.fact, tag)
            if value not in values:
                message = f"the front door of {family.name} asks for no variant of {axis.name} {tag}: nothing can choose it"
                yield Diagnostic("KG029", where, message, f"drop the tag, or ask VARIANTS for {axis.fact}={value!r} somewhere")


def _question_faults(
    family: Family, place: tuple[str, ...], question: Question, words: set[str], outputs: Outputs
) -> Iterator[Diagnostic]:
    """A choice among the variants of ``family`` that leaves an axis out, or asks for what none tells.

    An axis of which the ``words`` of its room say nothing is told where the spec has it.
    """
    known = {_ASKED_BY.get(axis.fact, axis.fact): axis for axis in family.axes}
    where = outputs.place_in(place, question.line, question.method, question.column)
    for fact in question.facts:
        if fact not in known.keys() | _FACTS:
            yield Diagnostic("KG029", where, f"no axis of {family.name} tells {fact!r}", did_you_mean(fact, list(known), ""))
    for fact, axis in known.items():
        if question.others is not None and fact not in question.facts.keys() | question.others and {fact, VARIANTS} <= words:
            message = f"this asks for no {fact}: variants of {family.name} that differ in {axis.name} would share its answer"
            hint = f"{VARIANTS}.{question.method}(..., {fact}=...), or drop the axis in {family.spec}"
            yield Diagnostic("KG029", where, message, hint)


def _host_words(family: Family, outputs: Outputs) -> set[str]:
    """What the modules of the room of ``family`` mention."""
    return {word for made in _room(family, outputs) for word in _words(made)}


def _words(made: Outline) -> Iterator[str]:
    yield from made.words
    yield from (wanted.name for wanted in made.imports)


def _places(family: Family, outputs: Outputs) -> list[tuple[str, ...]]:
    """Of the modules of the room of ``family``."""
    stems = (source.stem for source in outputs.rooms.modules(family.name))
    return [(family.name, stem) for stem in stems if (family.name, stem) in outputs.modules]


def _room(family: Family, outputs: Outputs) -> list[Outline]:
    return [outputs.modules[place] for place in _places(family, outputs)]


def _launcher_faults(family: Family, outputs: Outputs) -> Iterator[Diagnostic]:
    """Modules of variants without the functions that others call."""
    called = _BIND in _host_words(family, outputs)
    given = {word for made in _room(family, outputs) for word in made.gives}
    words = (told for place in _places(family, outputs) for told in _words_of_launchers(place, outputs))
    given |= {word.text.partition("=")[0] for _, _, word in words}
    for variant in family.variants:
        path = names.family_path(family.name, variant.module)
        made = outputs.modules.get(module_of(path))
        if made is None:
            continue
        if variant.name not in made.defined:
            message = "no launcher: the module of a variant defines a function of the name of the variant"
            line, word = _nearest(variant.name, made)
            hint = f"def {{{{ v.name }}}}(...){f', not {word}' if word else ''}; {variant.name} of {path} is missing"
            yield Diagnostic("KG023", outputs.place(path, line, word=word), message, hint)
        if called and _SCHEDULE not in made.defined:
            line, word = _nearest(_SCHEDULE, made)
            message = f"no {_SCHEDULE}, whose {_BIND} the front door of {family.name} calls"
            yield Diagnostic("KG023", outputs.place(path, line, word=word), message, f"define it; {path} has none")
        for kernel, name, line, column in made.parameters if _LAUNCHER not in made.words else ():  # else lint sees its launches
            if name not in given:
                message = f"{kernel} has a parameter {name!r} that no module of the room of {family.name} launches it with"
                yield Diagnostic("KG023", outputs.place(path, line, column, name), message, did_you_mean(name, sorted(given), ""))


def front_faults(family: Family, front: Outline, outputs: Outputs) -> Iterator[Diagnostic]:
    """A front door that lacks its function."""
    if front.exports is None and family.name not in front.defined:
        line, word = _nearest(family.name, front)
        message = f"the front door of {family.name} defines no {family.name}"
        hint = f"name it so{f', not {word}' if word else ''}, or say in __all__ what it exports"
        yield Diagnostic("KG023", outputs.place_in((family.name, names.FRONT_DOOR), line, word), message, hint)


def _tunable_faults(family: Family, outputs: Outputs) -> Iterator[Diagnostic]:
    """Tunables that no kernel uses, or that are not as the fields of their class: values are handed to it in this order."""
    configs = outputs.modules.get((family.name, names.CONFIGS))
    for kernel in family.kernels:
        declared = tuple(tunable.name for tunable in kernel.tunables)
        name = names.config_class(None if kernel.name == family.name else kernel.name)
        known = configs.fields.get(name) if configs is not None else None
        if known is not None and known != declared and (declared or family.tuned):
            message = f"{kernel.name} has the tunables {', '.join(known) or 'none'}, in this order"
            yield Diagnostic("KG027", kernel.tunables_location, message, f"the spec has {', '.join(declared) or 'none'}")
            continue
        used = _read_by(family, kernel, outputs)
        idle = [tunable for tunable in kernel.tunables if used and tunable.name not in used]
        for tunable in idle:
            message = f"{kernel.name} does not use the tunable {tunable.name}"
            otherwise = f"drop it, or read config.{tunable.name} in templates/{kernel.template}"
            yield Diagnostic("KG027", tunable.location, message, did_you_mean(tunable.name, sorted(used), otherwise))
        if known is None and declared and not idle:
            message = f"nothing holds the tunables of {kernel.name}"
            hint = f"write a NamedTuple {name} of {', '.join(declared)} in {room_label(f'{family.name}/{names.CONFIGS}')}"
            yield Diagnostic("KG027", kernel.tunables_location, message, hint)


def _read_by(family: Family, kernel: Kernel, outputs: Outputs) -> set[str]:
    """What the modules of the variants of ``kernel`` read, beside the constants of kernels, and what launches them does."""
    read = [made.reads for made in _modules_of(family, kernel, outputs)]
    return set().union(*read, *(host.attributes for host in _hosts_of(family, kernel, outputs)))


def _hosts_of(family: Family, kernel: Kernel, outputs: Outputs) -> list[Mentioned]:
    """The classes of the room that the modules of the variants of ``kernel`` import."""
    wanted = {(w.module, w.name) for made in _modules_of(family, kernel, outputs) for w in made.imports}
    own = ((outputs.modules.get(module), name) for module, name in wanted if module[:1] == (family.name,))
    return [made.classes[name] for made, name in own if made is not None and name in made.classes]


def _modules_of(family: Family, kernel: Kernel, outputs: Outputs) -> Iterator[Outline]:
    modules = (outputs.modules.get((family.name, v.module)) for v in family.variants if v.kernel == kernel.name)
    return (made for made in modules if made is not None)


def _tuned_faults(family: Family, outputs: Outputs) -> Iterator[Diagnostic]:
    """Measured problems that are not as the key that they are looked up by, name by name."""
    configs = outputs.modules.get((family.name, names.CONFIGS))
    if configs is None:
        return
    key = configs.fields.get(names.KEY, ())
    for tuned in family.tuned:
        sizes = () if not tuned.entries else (*tuned.entries[0].problem.names, *tuned.entries[0].facts.names)
        if sizes and sizes != key:
            message = f"problems of {', '.join(sizes)}; {family.name} looks them up by {', '.join(key) or 'nothing'}"
            yield Diagnostic("KG025", tuned.location, message, "measure again: kernelgen tune writes what it looks up")


def _import_faults(outputs: Outputs) -> Iterator[Diagnostic]:
    """What modules import from each other and is not there."""
    for place, made in outputs.modules.items():
        for wanted in made.imports:
            if (*wanted.module, wanted.name) in outputs.modules:
                continue
            of = outputs.modules.get(wanted.module)
            name = _called(wanted.module)
            if of is None:
                known = [".".join(other) for other in outputs.modules if other]
                where = outputs.place_in(place, wanted.line, (wanted.module or ("",))[-1])
                yield Diagnostic("KG023", where, f"there is no module {name}", did_you_mean(name, known, ""))
            elif wanted.module == place or wanted.name not in of.defined:  # of itself: a module below it
                where = outputs.place_in(place, wanted.at[0], wanted.name, wanted.at[1])
                known = [*of.defined.keys() - {wanted.name}, *(m[-1] for m in outputs.modules if m and m[:-1] == wanted.module)]
                yield Diagnostic("KG023", where, f"{name} has no {wanted.name!r}", did_you_mean(wanted.name, known, ""))


def _ask_faults(outputs: Outputs) -> Iterator[Diagnostic]:
    """What modules read of each other and is not there."""
    for place, made in outputs.modules.items():
        for wanted in made.asks:
            of = outputs.modules.get(wanted.module)
            if of is None or wanted.name.startswith("__") or (*wanted.module, wanted.name) in outputs.modules:
                continue
            own = wanted.module[-1:]  # the face may have a function of the name of the module
            if not {wanted.name, "__getattr__", *own} & of.defined.keys():
                where = outputs.place_in(place, wanted.at[0], wanted.name, wanted.at[1])
                hint = did_you_mean(wanted.name, of.defined, "")
                yield Diagnostic("KG023", where, f"{_called(wanted.module)} has no {wanted.name!r}", hint)


def _idle_faults(families: Sequence[Family], outputs: Outputs) -> Iterator[Diagnostic]:
    """Modules of rooms that nothing imports."""
    wanted = {wanted for made in outputs.modules.values() for wanted in made.imports}
    imported = {place for of in wanted for place in (of.module, (*of.module, of.name))}
    for family in families:
        for source in outputs.rooms.modules(family.name):
            if (family.name, source.stem) not in imported and source.stem not in (names.FRONT_DOOR, names.CONFIGS):
                yield Diagnostic("KG020", Location(source.label), "no module imports this one", "import it, or remove it")


def _record_faults(outputs: Outputs) -> Iterator[Diagnostic]:
    """Named tuples and functions of other modules that are given what they do not have, or one thing in the place of another."""
    declare = {_record_of((*place, name), outputs) for place, made in outputs.modules.items() for name in made.declares}
    for place, made in outputs.modules.items():
        told = set[tuple[int, int]]()
        for call in made.makes:
            record = _record_of(call.of, outputs)
            if (call.line, call.column) in told:
                continue
            if record is not None:
                fields, kind = outputs.modules[record[:-1]].records[record[-1]], "fields"
                message = _fields_fault(call, fields) or _places_fault(call, list(fields), is_strict=record in declare)
                name = call.of[-1] if call.of[-1] in outputs.modules[call.of[:-1]].fields else record[-1]
            else:
                _, function = _defined_at(call.of, outputs, lambda made: made.signatures)
                if function is None:
                    continue
                fields, kind, name = function.parameters, "parameters", call.of[-1]
                message = _fields_fault(call, fields, function.number) or _places_fault(call, list(fields), is_strict=False)
            if message:
                told.add((call.line, call.column))
                where = outputs.place_in(place, call.line, call.of[-1], call.column)
                yield Diagnostic("KG023", where, f"{name} {message}", f"its {kind} are {', '.join(fields)}")


def _record_of(place: tuple[str, ...], outputs: Outputs) -> tuple[str, ...] | None:
    """The named tuple whose fields what is defined at ``place`` takes."""
    for _ in range(8):
        made = outputs.modules.get(place[:-1])
        if made is None or place[-1] in made.records:
            return None if made is None else place
        place = made.stands.get(place[-1], ())
        if not place:
            return None
    return None


def _fields_fault(call: Made, fields: Mapping[str, bool], most: int | None = None) -> str:
    """``most``: of them may come by place; None: all."""
    known = list(fields)
    number = len(call.given)
    wrong = [name for name in call.names if name not in known or name in known[:number]]
    left = [name for name, has_default in fields.items() if not has_default and name not in {*known[:number], *call.names}]
    if wrong:
        return f"has no {wrong[0]!r} to be given here"
    if number > (len(known) if most is None else most):
        return f"is given {number} values, and has {len(known) if most is None else most}"
    return f"is given no {left[0]!r}" if left and call.is_whole else ""


def _places_fault(call: Made, fields: Sequence[str], *, is_strict: bool) -> str:
    """Values that are called as another field; ``is_strict``: all that are not called as theirs, which cannot be told apart."""
    given = [name.lstrip("_") if name else name for name in call.given]
    for field, name in zip(fields, given, strict=False):
        is_other = name in fields and given.index(name) != fields.index(name)
        if name not in (field, None) and (is_strict or is_other):
            got = repr(name) if name else "what has no name"
            return f"is given {got} in the place of {field!r}: call it so, or say {field}=..."
    if is_strict and call.rest:
        return f"is given {call.rest}, of which cannot be told what it holds: write that out"
    return ""


def _words_of_launchers(
    place: tuple[str, ...], outputs: Outputs
) -> Iterator[tuple[tuple[str, ...] | None, tuple[str, ...], Word]]:
    """What launchers of a module are told of operands: the named tuple of a call, the module that says it, and the word."""
    for operand in outputs.modules[place].operands:
        record, known = _record_of(operand.op, outputs), {operand.word.of}
        todo = [(place, operand.word)]
        for at, word in todo:
            if not word.of:
                yield record, at, word
                continue
            at, words = _defined_at(word.of, outputs, lambda made: made.texts)
            todo += [(at[:-1], each) for each in words or () if each.of not in known or not each.of]
            known |= {each.of for each in words or ()}


def _defined_at(
    place: tuple[str, ...], outputs: Outputs, of: Callable[[Outline], Mapping[str, _Known]]
) -> tuple[tuple[str, ...], _Known | None]:
    """Where what is imported at ``place`` is defined, and what is known of it there; None: nothing."""
    for _ in range(8):
        made = outputs.modules.get(place[:-1])
        if made is None or place[-1] in of(made) or place[-1] not in made.places:
            return place, None if made is None else of(made).get(place[-1])
        place = made.places[place[-1]]
    return place, None


def _settled(says: Declaration, outputs: Outputs) -> Declaration:
    """What a declaration says, with all that the names in it stand for; what these say is as if it stood where the name does."""
    for _ in range(8):
        _, inner = _defined_at(says.of, outputs, lambda made: made.says)
        if inner is None:
            return says
        asks = tuple(told.name for told in says.given) if inner.hands_on else inner.asks
        line, column = says.line, says.column
        says = inner._replace(
            may_be_none=says.may_be_none or inner.may_be_none,
            asks=says.asks or asks,
            speaks=(*says.speaks, *(told._replace(line=line, column=column) for told in inner.speaks)),
            dtype=says.dtype or (inner.dtype and inner.dtype._replace(line=line, column=column)),
            hands_on=False,
            line=line,
            column=column,
        )
    return says


def _handed_faults(outputs: Outputs) -> Iterator[Diagnostic]:
    """Launchers that hand on what no call is given, or two operands in the place of each other."""
    for place, made in outputs.modules.items():
        room = outputs.modules.get(made.launched[0].of[:-1]) if made.launched else None
        words = _words_of_launchers(made.launched[0].of[:-1], outputs) if room is not None else ()
        records = {record for record, _, _ in words}
        if room is None or not records or None in records:
            continue
        fields = {field for record in records if record for field in outputs.modules[record[:-1]].records[record[-1]]}
        values = {each.name: each.value for each in made.launched}
        for each in made.launched:
            where = outputs.place_in(place, each.line, each.name, each.column)
            if each.name not in fields | room.launches_take:
                message = f"a launcher is given {each.name!r}, which no call has"
                yield Diagnostic("KG023", where, message, did_you_mean(each.name, sorted(fields), ""))
            elif each.value != each.name and values.get(each.value) == each.name:
                message = f"a launcher is given {each.value!r} in the place of {each.name!r}"
                yield Diagnostic("KG023", where, message, f"say {each.name}={each.name}")


def _declared_in(record: tuple[str, ...], outputs: Outputs) -> dict[str, tuple[Declared, Declaration]]:
    """The fields of a named tuple that declare operands, and all that they say."""
    of = (each for each in outputs.modules[record[:-1]].declared if each.record == record[-1])
    return {each.field: (each, _settled(each.says, outputs)) for each in of}


def _read_faults(outputs: Outputs) -> Iterator[Diagnostic]:
    """Launchers that look for operands in fields that there are not in what calls are given."""
    for place in outputs.modules:
        for record, at, word in _words_of_launchers(place, outputs):
            if record is None:
                continue
            fields = [*outputs.modules[record[:-1]].records[record[-1]]]
            name, _, path = word.text.partition("=")
            where = outputs.place_in(at, word.line, word.text)
            if word.field not in fields:
                message = f"a launcher reads {word.field!r} of {record[-1]}, which has no such field"
                yield Diagnostic("KG023", where, message, did_you_mean(word.field, fields, ""))
            elif "." in path and _tensor_of(record, word.field, outputs) is not None:
                message = f"a launcher reads {path!r} of {record[-1]}, whose {word.field!r} is a tensor"
                yield Diagnostic("KG023", where, message, f"say {name}={word.field}")


def _tensor_of(record: tuple[str, ...], field: str, outputs: Outputs) -> tuple[Declared, Declaration] | None:
    """A field that declares a tensor, or a sequence of such, and all that it says."""
    found = _declared_in(record, outputs).get(field)
    return found if found is not None and found[1].of == TENSOR else None


def _operand_faults(package: Package, outputs: Outputs) -> Iterator[Diagnostic]:
    """Operands that ask for what no axis tells."""
    known = _FACTS | {"rank"} | {axis.name for family in package.families for axis in family.axes}
    for place, made in outputs.modules.items():
        asked = list(made.asked)
        for says in (*made.says.values(), *(each.says for each in made.declared)):
            _, inner = _defined_at(says.of, outputs, lambda made: made.says)
            asked += says.given if inner is not None and inner.hands_on else ()
        for told in asked:
            if told.name not in known:
                where = outputs.place_in(place, told.line, told.name, told.column)
                hint = did_you_mean(told.name, sorted(known), "")
                yield Diagnostic("KG029", where, f"no axis tells {told.name!r}, which this operand asks for", hint)


def _spoken_faults(outputs: Outputs) -> Iterator[Diagnostic]:
    """Operands that speak of others that there are not."""
    for place, made in outputs.modules.items():
        for record in dict.fromkeys(each.record for each in made.declared):
            fields = [*made.records[record]]
            for field, (_, says) in _declared_in((*place, record), outputs).items():
                for told in says.speaks:
                    if told.name.partition(".")[0] not in fields:
                        where = outputs.place_in(place, told.line, told.name, told.column)
                        message = f"{field} speaks of {told.name!r}, and {record} has no such field"
                        yield Diagnostic("KG023", where, message, did_you_mean(told.name, fields, ""))


def _op_faults(outputs: Outputs) -> Iterator[Diagnostic]:
    """Ops that name operands that there are not, and operands that share a dtype which their op does not have."""
    for place, made in outputs.modules.items():
        for op in made.ops:
            record = _record_of(op.record, outputs)
            if record is None:
                continue
            declared = _declared_in(record, outputs)
            kinds = [_record_of(of, outputs) for _, says in declared.values() for of in says.classes if says.of == BUNDLE]
            known = [field for of in (record, *kinds) if of for field in outputs.modules[of[:-1]].records[of[-1]]]
            for told in op.names:
                if told.name not in known:
                    where = outputs.place_in(place, told.line, told.name, told.column)
                    message = f"an op speaks of {told.name!r}, and {record[-1]} has no such field"
                    yield Diagnostic("KG023", where, message, did_you_mean(told.name, known, ""))
            for field, (_, says) in declared.items():
                if says.dtype is not None and op.dtypes is not None and says.dtype.name not in op.dtypes:
                    where = outputs.place_in(record[:-1], says.dtype.line, says.dtype.name, says.dtype.column)
                    message = f"{field} shares the dtype {says.dtype.name!r}, which its op does not have"
                    hint = did_you_mean(says.dtype.name, op.dtypes, "say in dtypes what it may be")
                    yield Diagnostic("KG023", where, message, hint)


def _lookup_faults(package: Package, outputs: Outputs) -> Iterator[Diagnostic]:
    """Facts that no variant has, and sizes that nothing tells, which are looked up; and facts that a launcher leaves aside."""
    facts: dict[str, set[str]] = {family.name: {axis.fact for axis in family.axes} for family in package.families}
    for place, made in outputs.modules.items():
        for (family,), told in made.facts:
            known = facts.get(family, set()) | {"block_rank"}  # of a rank
            if family in facts and told.name not in known:
                where = outputs.place_in(place, told.line, told.name, told.column)
                hint = did_you_mean(told.name, sorted(known), "")
                yield Diagnostic("KG029", where, f"no axis of {family} tells {told.name!r}", hint)
        for op, told in made.reads_sizes:
            record = _record_of(op, outputs) if op else None
            near = _reached(place, outputs) if record is None else _declaring(record, outputs) | {op[:-1]}
            if all(told.name not in outputs.modules[other].tells_sizes for other in near):
                where = outputs.place_in(place, told.line, told.name, told.column)
                hint = did_you_mean(told.name, sorted({size.name for size in made.shapes}), "")
                yield Diagnostic("KG029", where, f"no operand tells the size {told.name!r}", hint)
    for of in package.families:
        read = {told.name for made in outputs.modules.values() for (family,), told in made.facts if family == of.name}
        for axis in of.axes:
            if read & facts[of.name] and axis.fact in _HELD_TO and axis.fact not in read:
                message = f"no launcher of {of.name} looks up its {axis.fact}: called by itself, it would take what others serve"
                what = f'hand facts["{axis.fact}"] to what checks a call, and refuse there what differs'
                yield Diagnostic("KG029", axis.location, message, what)


def _declaring(record: tuple[str, ...], outputs: Outputs) -> set[tuple[str, ...]]:
    """The modules in which stands what the fields of a named tuple declare."""
    modules, todo = set[tuple[str, ...]](), [record]
    for each in todo:
        modules.add(each[:-1])
        for declared in outputs.modules[each[:-1]].declared:
            says: Declaration | None = declared.says if declared.record == each[-1] else None
            while says is not None:
                kinds = (_record_of(of, outputs) for of in says.classes)
                todo += [kind for kind in dict.fromkeys(kinds) if kind is not None and kind not in todo]
                at, says = _defined_at(says.of, outputs, lambda made: made.says)
                modules |= {at[:-1]} & outputs.modules.keys()
    return modules


def _reached(place: tuple[str, ...], outputs: Outputs) -> list[tuple[str, ...]]:
    """A module, and all that it imports of the package."""
    found = [place]
    for each in found:
        wanted = (other for w in outputs.modules[each].imports for other in (w.module, (*w.module, w.name)))
        found += [other for other in dict.fromkeys(wanted) if other in outputs.modules and other not in found]
    return found


def _asking_faults(family: Family, outputs: Outputs) -> Iterator[Diagnostic]:
    """Operands that a kernel has, another of its schedule has not, and no fact asks for: nothing would see that they lack.

    And such as a kernel stores to, and are not declared so.
    """
    words = {
        (record, word.text.partition("=")[::2], word.field)
        for place in _places(family, outputs)
        for record, _, word in _words_of_launchers(place, outputs)
        if record is not None
    }
    for record, (name, path), field in sorted(words):
        found = _tensor_of(record, field, outputs) if path in ("", field) else None
        if found is None:
            continue
        operand, says = found
        where = outputs.place_in(record[:-1], operand.line, field, operand.column)
        made_of = ((v, outputs.modules.get((family.name, v.module))) for v in family.variants)
        writer = next((v for v, made in made_of if made and name in made.stores), None)
        if writer is not None and not says.is_written:
            message = f"{writer.name} stores to {field}, which is not declared as written"
            yield Diagnostic("KG029", where, message, "say written=True, or a graph of torch.compile does not know of it")
        if not says.may_be_none:
            continue
        for kernel in family.kernels:
            modules = {v: outputs.modules.get((family.name, v.module)) for v in family.variants if v.kernel == kernel.name}
            having = [v for v, made in modules.items() if made and any(name == each.name for each in made.parameters)]
            lacking = [v for v in having if not any(_is_with(v, fact) for fact in says.asks)]
            if lacking and len(having) < len(modules):
                message = f"{lacking[0].name} has {field}, which other variants have not, and no fact of it asks for {field}"
                yield Diagnostic("KG029", where, message, "say in asks the fact that the template decides it by")
                break


def _is_with(variant: Variant, fact: str) -> bool:
    known = fact in variant.tags.names or fact in variant.facts.names
    return known and getattr(variant, fact) not in (None, False, "none")


def _size_faults(outputs: Outputs) -> Iterator[Diagnostic]:
    """Sizes in the shape of one operand that nothing else of its room, or of what that imports, speaks of: slips of the pen.

    Of what is shared, the rooms count that import it.
    """
    for place, made in outputs.modules.items():
        if not made.shapes:
            continue
        near = {other for other in outputs.modules if other[:-1] == place[:-1] and len(place) > 1} | {place}
        near |= {other for other, of in outputs.modules.items() if len(place) == 1 and place in (w.module for w in of.imports)}
        near |= {wanted.module for other in near for wanted in outputs.modules[other].imports}
        texts = [outputs.modules[each].sizes for each in near if each in outputs.modules]
        known = {size.name: sum(of.get(size.name, 0) for of in texts) for size in made.shapes}
        others = sorted({size.name for size in made.shapes if known[size.name] > size.number})
        for size in made.shapes:
            if known[size.name] <= size.number:
                where = outputs.place_in(place, size.line, size.name, size.column)
                hint = did_you_mean(size.name, others, "* is any size, >=1 one that is not 0")
                yield Diagnostic("KG029", where, f"nothing else has the size {size.name!r}, and no docstring tells it", hint)


def _circle_faults(outputs: Outputs) -> Iterator[Diagnostic]:
    """Imports that lead back to a module that is being imported, and does not have yet what they want of it."""
    modules, reached = outputs.modules, dict[tuple[str, ...], int]()  # the line that a module is at

    def load(place: tuple[str, ...]) -> Iterator[Diagnostic]:
        for depth in range(len(place) + 1):
            if place[:depth] in modules and place[:depth] not in reached:
                yield from run(place[:depth])

    def run(place: tuple[str, ...]) -> Iterator[Diagnostic]:
        reached[place] = 0
        made = modules[place]
        asks = [(ask.line, True, ask) for ask in made.asks if ask.at_once and ask.module in modules]
        for line, is_read, wanted in sorted([*((new.line, False, new) for new in made.imports if new.at_once), *asks]):
            reached[place] = line
            yield from () if is_read else load(wanted.module)
            of, inner = modules.get(wanted.module), (*wanted.module, wanted.name)
            if of is not None and of.defined.get(wanted.name, sys.maxsize) < reached[wanted.module]:
                continue
            if inner in modules:
                yield from load(inner)
            elif not is_read or reached[wanted.module] < sys.maxsize:
                back = f"it imports {_called(place)}, and this leads back to it"
                message = f"{_called(wanted.module)} has no {wanted.name!r} yet: {back}"
                where = outputs.place_in(place, wanted.at[0], wanted.name, wanted.at[1])
                yield Diagnostic("KG023", where, message, "import it from where it is defined, or in the function that uses it")
        reached[place] = sys.maxsize  # it is done

    for place in modules:
        yield from load(place)


def _called(module: tuple[str, ...]) -> str:
    return ".".join(module) or "the package"


def _nearest(name: str, made: Outline) -> tuple[int, str]:
    """Line and name of what ``made`` defines and could be meant; (0, "") without any."""
    near = did_you_mean(name, made.defined, "").nearest
    return (made.defined[near], near) if near else (0, "")
