"""Limits on a YAML text, counted on the text itself before a library reads it, so that no release of a library moves them.

What counts is where collections open and close, and where scalars begin and end: indentation, brackets, quotes, comments and
block scalars. Nothing else is judged here: a text that is not well-formed is for the parser to refuse. The time is that of the
length of the text, whatever it says.
"""

from __future__ import annotations

import dataclasses
import re
from typing import Iterator, Literal, NamedTuple, TypeAlias

MAX_BYTES = 1 << 20
MAX_DEPTH = 16
MAX_VALUES = 60_000
MAX_SCALAR = 2000  # characters, as they are written between the quotes
MAX_KEY = 1000  # YAML allows 1024
MAX_DIGITS = 18

# A key is a scalar or a collection once more, when what follows shows that it is one.
Kind: TypeAlias = Literal["plain", "quoted", "block", "alias", "empty", "list", "mapping", "key"]

_BLANK = re.compile(r"(?:[ \t\r\n]+|#[^\n]*)*")
_QUOTED = {
    '"': re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"', re.DOTALL),
    "'": re.compile(r"'[^']*(?:''[^']*)*'"),
}
_PROPERTY = re.compile(r"[&*!][^\s,\[\]{}]*")  # an anchor, an alias, a tag
_HEADER = re.compile(r"[|>](?:([1-9])[+-]?|[+-]?([1-9])?)[ \t]*(?:#[^\n]*)?\r?(?:\n|\Z)")
# What ends a plain scalar, or its part in a line: in a block, and between brackets.
_PLAIN_END = re.compile(r":(?=\s|\Z)|[ \t]#|\r?\n|\Z")
_PLAIN_END_IN_FLOW = re.compile(r"[,\[\]{}]|:(?=[\s,\[\]{}]|\Z)|[ \t]#|\r?\n|\Z")
_LINE_END = re.compile(r"\n|\Z")
_TEXT = re.compile(r"[^ \t\r\n]|\Z")
_CONTENT = re.compile(r"[^ \r\n]|\Z")
_MARKER = re.compile(r"(?:---|\.\.\.)(?=\s|\Z)")
_INT = re.compile(r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+")


class Value(NamedTuple):
    """A part of a text: a scalar, a collection that opens, or an indicator after which a value is missing.

    ``depth`` is the number of collections that are open there, with itself.
    """

    kind: Kind
    start: int
    end: int
    depth: int


class Excess(NamedTuple):
    """A place in a text, and the limit that is passed there."""

    start: int
    end: int
    message: str


def excess(text: str) -> Excess | None:
    """The first limit that ``text`` passes, or None."""
    number = 0
    for value in values(text):
        number += value.kind != "key"
        message = _fault(text, value, number)
        if message:
            return Excess(value.start, value.end, message)
    return None


def _fault(text: str, value: Value, number: int) -> str | None:
    length = value.end - value.start
    if value.depth > MAX_DEPTH:
        return f"nested deeper than {MAX_DEPTH}"
    if number > MAX_VALUES:
        return f"more than {MAX_VALUES} values"
    if length > MAX_KEY and value.kind == "key":
        return f"a key of {length} characters; at most {MAX_KEY}"
    if length > MAX_SCALAR:
        return f"a text of {length} characters; at most {MAX_SCALAR}"
    if length > MAX_DIGITS and value.kind == "plain" and _INT.fullmatch(text, value.start, value.end):
        return f"a number of more than {MAX_DIGITS} digits"
    return None


def values(text: str) -> Iterator[Value]:
    """The parts of ``text`` in their order, up to where no scanner could go on; a mapping comes behind its first key."""
    scanner = _Scanner(text)
    while scanner.find_token():
        scanner.take_token()
        yield from scanner.found
        scanner.found.clear()
    scanner.miss()
    yield from scanner.found


@dataclasses.dataclass
class _Open:
    """A collection that is open: by its bracket, or as ``-`` or ``:`` made it in ``column``."""

    sign: str
    column: int
    key: int | None = None  # where the key began that a bracket may be the end of


class _Scanner:
    """Where a scan is: at ``at``, in the line that begins at ``line``."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.at = self.line = 0
        self.is_first = True  # of the tokens in its line
        self.open: list[_Open] = []
        self.brackets = 0  # among the open
        self.key: int | None = None  # where in this line a key may have begun
        self.due: int | None = None  # the indicator whose value has not come
        self.found: list[Value] = []

    def find_token(self) -> bool:
        """Go on to the next token; whether there is one."""
        blank = _BLANK.match(self.text, self.at)
        assert blank is not None
        self.go_to(blank.end())
        return self.at < len(self.text)

    def go_to(self, at: int) -> None:
        newline = self.text.rfind("\n", self.at, at)
        if newline >= 0:
            self.line, self.is_first, self.key = newline + 1, True, None
        self.at = at

    def take_token(self) -> None:
        text, at = self.text, self.at
        sign = text[at]
        column = at - self.line
        is_separate = not text[at + 1 : at + 2].strip()
        if self.is_first and not self.brackets:
            self.unindent(column, sign == "-" and is_separate)
        self.is_first = False
        if column == 0 and _MARKER.match(text, at):
            self.miss()
            self.open, self.brackets, self.key = [], 0, None
            self.at += 3
        elif column == 0 and sign == "%":
            self.at = _place(_LINE_END, text, at)
        elif sign in "[{":
            self.opens(_Open(sign, column, at if self.key is None else self.key), at)
            self.brackets += 1
            self.key = None
            self.at += 1
        elif sign in "]},":
            self.miss()
            self.close(sign)
            self.at += 1
        elif sign in "-?" and is_separate:
            self.indicated(sign, at)
        elif sign == ":" and (is_separate or self.brackets):
            self.indicated(sign, at if self.key is None else self.key)
        elif sign in "\"'":
            self.quoted(_QUOTED[sign].match(text, at))
        elif sign in "|>" and not self.brackets:
            self.block(_HEADER.match(text, at))
        elif sign in "&*!":
            self.property()
        elif sign in "%@`|>":
            self.at = len(text)  # cannot start a token
        else:
            self.plain()

    def miss(self) -> None:
        """The value that an indicator waited for in vain."""
        if self.due is not None:
            self.found.append(Value("empty", self.due, self.due + 1, len(self.open)))
            self.due = None

    def unindent(self, column: int, is_entry: bool) -> None:
        """Close what a line that begins in ``column`` closes."""
        if self.open:
            top = self.open[-1]
            if column < top.column or (column == top.column and not (is_entry and top.sign == ":")):
                self.miss()
        while self.open and self.open[-1].column > column:
            self.open.pop()
        if self.open[1:] and self.open[-2].column == column and not is_entry:
            self.open.pop()  # entries in the column of the key that they belong to

    def opens(self, collection: _Open, at: int) -> None:
        self.open.append(collection)
        self.due = None
        kind: Kind = "list" if collection.sign in "-[" else "mapping"
        self.found.append(Value(kind, at, at + 1, len(self.open)))

    def close(self, sign: str) -> None:
        """Close what a comma or a bracket closes."""
        self.key = None
        if self.brackets and self.open[-1].sign == ":":
            self.open.pop()
        if self.brackets and sign != ",":
            key = self.open.pop().key
            self.key = key if key is not None and key >= self.line else None
            self.brackets -= 1

    def indicated(self, sign: str, start: int) -> None:
        """What ``-``, ``?`` or ``:`` says, whose entry or key begins at ``start``."""
        top = self.open[-1] if self.open else _Open("", -1)
        column = start - self.line
        if start < self.at:
            self.found.append(Value("key", start, self.at, len(self.open)))
        if self.brackets:
            opens = sign != "-" and top.sign == "["
        else:
            opens = column > top.column or (sign == "-" and top.sign == ":" and column == top.column)
        if opens:
            self.opens(_Open("-" if sign == "-" else ":", column), start)
            if sign == ":" and start == self.at:
                self.due = start
        self.miss()
        self.due, self.key = self.at, None
        self.at += 1

    def quoted(self, match: re.Match[str] | None) -> None:
        if match is None:
            self.at = len(self.text)
        else:
            self.scalar("quoted", match.start(), match.end())

    def property(self) -> None:
        match = _PROPERTY.match(self.text, self.at)
        assert match is not None
        if match[0][0] == "*":
            self.scalar("alias", match.start(), match.end())
        else:
            self.key = self.at if self.key is None else self.key
            self.at = match.end()

    def block(self, header: re.Match[str] | None) -> None:
        """A block scalar: the lines that are indented as its first one, or as its header says."""
        if header is None:
            self.at = len(self.text)
            return
        text, start = self.text, header.end()
        parent = self.open[-1].column if self.open else -1
        told = header[1] or header[2]
        if told:
            indent = max(parent, 0) + int(told)
        else:
            first = _place(_CONTENT, text, start)
            line = max(text.rfind("\n", start, first) + 1, start)
            blank = max(len(spaces.rstrip("\r")) for spaces in text[start:line].split("\n"))
            indent = max(parent + 1, 1, blank, first - line)
        end = _place(re.compile(rf"^ {{0,{indent - 1}}}[^ \r\n]|\Z", re.MULTILINE), text, start)
        self.scalar("block", self.at, end)
        self.line, self.is_first, self.key = end, True, None

    def plain(self) -> None:
        """A plain scalar: it goes on in lines that are indented deeper than what it is in."""
        text, start = self.text, self.at
        ends = _PLAIN_END_IN_FLOW if self.brackets else _PLAIN_END
        indent = -1 if self.brackets or not self.open else self.open[-1].column
        end = _place(ends, text, start + 1)
        while text[end : end + 1] in ("\r", "\n"):
            more = _place(_TEXT, text, end)
            column = more - text.rfind("\n", end, more) - 1
            ended = more == len(text) or text[more] == "#" or column <= indent
            if ended or (column == 0 and _MARKER.match(text, more)):
                break
            end = _place(ends, text, more)
        self.scalar("plain", start, end)

    def scalar(self, kind: Kind, start: int, end: int) -> None:
        self.due = None
        if self.key is None:
            self.key = start
        self.go_to(end)  # over a line: it is no key
        self.is_first = False
        written = len(self.text[start:end].rstrip())
        self.found.append(Value(kind, start, start + written, len(self.open)))


def _place(pattern: re.Pattern[str], text: str, start: int) -> int:
    """Where the first match is of a pattern that matches at the end."""
    match = pattern.search(text, start)
    assert match is not None
    return match.start()
