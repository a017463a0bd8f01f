"""YAML text to a tree of values that know their place.

Built on PyYAML's events, which it makes of a text within the limits only: aliases, anchors and tags are refused, duplicate
keys are seen, nothing is recursed into. Scalars follow the core schema of YAML 1.2 (``on`` and ``012`` are not
a boolean and an octal number).
"""

from __future__ import annotations

import dataclasses
import math
import re
from typing import Any, Iterator, Mapping, TypeAlias

import yaml

from kernelgen.core.diagnostics import Diagnostic
from kernelgen.core.model import Location
from kernelgen.spec.limits import MAX_BYTES, excess

_INVISIBLE = re.compile(
    "[^\t\n\r\x20-\x7e\xa0-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]"  # not printable in YAML
    "|[\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff]"  # breaks, joins, direction
    "|\r(?!\n)"
)
_INT = re.compile(r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_WORDS: Mapping[str, bool | None] = {
    **dict.fromkeys(("", "~", "null", "Null", "NULL")),
    **dict.fromkeys(("true", "True", "TRUE"), True),
    **dict.fromkeys(("false", "False", "FALSE"), False),
}

Scalar: TypeAlias = "bool | int | float | str | None"
Step: TypeAlias = "str | int"
_Mark: TypeAlias = Any  # of PyYAML, or of its binding to libyaml


@dataclasses.dataclass(frozen=True)
class Key:
    """A key of a mapping."""

    text: str
    location: Location


@dataclasses.dataclass(frozen=True)
class Node:
    """A scalar, a list or a mapping, and its place. ``keys`` holds the keys of a mapping."""

    location: Location
    value: Scalar | list[Node] | dict[str, Node]
    keys: dict[str, Key] = dataclasses.field(default_factory=dict)

    def plain(self) -> Any:
        """The value without places."""
        if isinstance(self.value, list):
            return [node.plain() for node in self.value]
        if isinstance(self.value, dict):
            return {key: node.plain() for key, node in self.value.items()}
        return self.value

    def at(self, *path: Step) -> Node:
        """The node at ``path``, or the deepest one on the way to it."""
        node = self
        for step in path:
            inside = node.value
            if isinstance(inside, dict) and step in inside:
                node = inside[str(step)]
            elif isinstance(inside, list) and isinstance(step, int) and step < len(inside):
                node = inside[step]
            else:
                break
        return node

    def key_at(self, *path: Step) -> Location:
        """The place of the key that ``path`` ends in."""
        key = self.at(*path[:-1]).keys.get(str(path[-1]))
        return key.location if key else self.at(*path).location


class _Parser:
    def __init__(self, path: str, text: str) -> None:
        self.path = path
        self.text = text
        self.lines = [line.rstrip("\r") for line in text.split("\n")]
        self.faults: list[Diagnostic] = []
        self.usable = True  # whether the tree stands for what was written

    def location(self, mark: _Mark, end: _Mark = None) -> Location:
        if mark is None:
            return Location(self.path)
        if mark.line >= len(self.lines):
            return Location(self.path, len(self.lines), len(self.lines[-1]) + 1)
        text = self.lines[mark.line]
        length = end.column - mark.column if end and end.line == mark.line else 1
        return Location(self.path, mark.line + 1, mark.column + 1, max(1, length), text)

    def span(self, start: int, end: int) -> Location:
        """The place of the characters from ``start`` to ``end``; of the first one where they are in several lines."""
        line = self.text.count("\n", 0, start)
        column = start - self.text.rfind("\n", 0, start)
        length = 1 if "\n" in self.text[start:end] else end - start
        return Location(self.path, line + 1, column, length, self.lines[line])

    def fault(self, code: str, where: Location, message: str, hint: str = "") -> None:
        self.faults.append(Diagnostic(code, where, message, hint))


def parse(path: str, data: bytes) -> tuple[Node | None, list[Diagnostic]]:
    """The tree of one YAML document, and its faults.

    Args:
        path: what messages call the file.
        data: its bytes.

    Returns:
        The root and the faults; the root is None when nothing can be said about the content.
    """
    if len(data) > MAX_BYTES:
        message = f"{len(data)} bytes; at most {MAX_BYTES} are read"
        return None, [Diagnostic("KG004", Location(path), message)]
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        before = data[: error.start].decode("utf-8")
        line = before.count("\n") + 1
        where = Location(path, line, len(before) - before.rfind("\n"))
        hint = "save the file as UTF-8"
        return None, [
            Diagnostic("KG002", where, f"byte 0x{data[error.start]:02x} is not UTF-8", hint)
        ]
    parser = _Parser(path, text)
    parser.faults += _invisible(parser, text)
    passed = excess(text)
    if passed and not parser.faults:
        parser.fault("KG004", parser.span(passed.start, passed.end), passed.message)
    if parser.faults:
        return None, parser.faults
    try:
        root = _build(parser, text)
    except yaml.YAMLError as error:
        where = parser.location(getattr(error, "problem_mark", None))
        problem = getattr(error, "problem", None) or "not YAML"
        context = getattr(error, "context", None)
        message = f"{problem} ({context})" if context else str(problem)
        parser.fault("KG005", where, message)
        root = None
    return root, parser.faults


def _invisible(parser: _Parser, text: str) -> Iterator[Diagnostic]:
    line, line_start, counted = 0, 0, 0
    for number, match in enumerate(_INVISIBLE.finditer(text)):
        if number == 10:
            return
        at = match.start()
        line += text.count("\n", counted, at)
        line_start = text.rfind("\n", 0, at) + 1
        counted = at
        where = Location(parser.path, line + 1, at - line_start + 1, 1, parser.lines[line])
        yield Diagnostic("KG003", where, f"character U+{ord(match[0]):04X} is not allowed here")


@dataclasses.dataclass
class _Open:
    """A collection whose end has not been seen."""

    node: Node
    key: Key | None = None

    def add(self, parser: _Parser, child: Node) -> None:
        if isinstance(self.node.value, list):
            self.node.value.append(child)
        elif self.key is None:
            self._take_key(parser, child)
        else:
            assert isinstance(self.node.value, dict)
            if self.key.text not in self.node.keys:
                self.node.keys[self.key.text] = self.key
                self.node.value[self.key.text] = child
            self.key = None

    def _take_key(self, parser: _Parser, child: Node) -> None:
        text = child.value if isinstance(child.value, str) else None
        if text is None:
            parser.fault("KG010", child.location, "a key must be a plain word")
            parser.usable, text = False, ""
        elif text in self.node.keys:
            first = self.node.keys[text].location.line
            message = f"key {text!r} is given twice"
            parser.fault("KG007", child.location, message, f"the first is in line {first}")
        self.key = Key(text, child.location)


def _build(parser: _Parser, text: str) -> Node | None:
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    stack: list[_Open] = []
    root: Node | None = None
    documents = 0
    for event in yaml.parse(text, Loader=loader):
        where = parser.location(event.start_mark, event.end_mark)
        if isinstance(event, yaml.DocumentStartEvent):
            documents += 1
            if documents > 1:
                parser.fault("KG006", where, "a second document", "one file holds one family")
                return None
        if isinstance(event, yaml.CollectionEndEvent):
            node = stack.pop().node
        elif isinstance(event, yaml.NodeEvent):
            parser.usable &= _is_bare(parser, event, where)
            if isinstance(event, yaml.ScalarEvent):
                node = Node(where, _scalar(parser, event, where))
            elif isinstance(event, yaml.AliasEvent):
                node = Node(where, None)
            else:
                here = parser.location(event.start_mark)
                empty: Any = [] if isinstance(event, yaml.SequenceStartEvent) else {}
                stack.append(_Open(Node(here, empty)))
                continue
        else:
            continue
        if stack:
            stack[-1].add(parser, node)
        else:
            root = node
    if root is None and parser.usable:
        parser.fault("KG009", Location(parser.path), "the file is empty")
    return root if parser.usable else None


def _is_bare(parser: _Parser, event: Any, where: Location) -> bool:
    """Whether a node is without anchor, alias and tag."""
    if isinstance(event, yaml.AliasEvent):
        parser.fault("KG006", where, f"alias *{event.anchor}", "write the value again")
    elif event.anchor is not None:
        parser.fault("KG006", where, f"anchor &{event.anchor}", "specs have no aliases")
    elif event.tag is not None:
        parser.fault("KG006", where, f"tag {event.tag}", "leave the tag out")
    else:
        return True
    return False


def _scalar(parser: _Parser, event: yaml.ScalarEvent, where: Location) -> Scalar:
    text: str = event.value
    if event.style:  # quoted, or a block
        return text
    if text in _WORDS:
        return _WORDS[text]
    if _INT.fullmatch(text):
        return int(text, 0) if text[:2] in ("0o", "0x") else int(text)
    if _FLOAT.fullmatch(text):
        number = float(text)
        if not math.isfinite(number):
            parser.fault("KG004", where, "a number that is out of range")
            return 0.0
        return number
    return text
