"""PEFT's patterns of module names, matched without backtracking.

A key of ``rank_pattern`` or ``alpha_pattern`` is a regular expression that someone else wrote, and PEFT asks
``re.match(rf"(.*\\.)?({key})$", name)``, one key after the other. ``re`` backtracks: ``(a|a)*b`` takes exponential time. So
a key is read here as what it is (names, ``.``, ``\\b``, classes, groups, repeats) and all ways to match it are followed
at once: bit i of a mask says that the name's first i characters can be matched (the bit-parallel matching of Cameron et al.,
"Bitwise data parallelism in regular expression matching", 2014). Whether there is a match is the same question either way;
look-around, back references and flags, for which that is not so, are refused. Keys that are names, of which a file may have one
for each of its modules, are looked up. All steps are counted, and too many are refused. ``target_modules`` may be such an
expression too, of whole names.
"""

from __future__ import annotations

import re
from typing import Callable, Iterable, Iterator

from .adapter import AdapterError

_LONGEST = 100_000  # characters of all patterns that are more than names
_DEEPEST = 20  # groups in groups
_MOST_STEPS = 10_000_000  # for all names, some seconds
_NAME = re.compile(r"\^?(?P<name>(?:[\w-]|\\?\.)+)", re.ASCII)
_ANY = "\0"
_WORD = re.compile(r"\w")
_TOKEN = re.compile(
    r"(?P<literal>[^\\\[\](){}|*+?^$.]|\\[^0-9A-Za-z])"
    r"|(?P<one>\.|\\[dDsSwW]|\[\^?(?:\w-\w|\\[dDsSwW]|\\[^0-9A-Za-z]|[\w.])+-?\])"
    r"|(?P<open>\((?:\?:)?(?!\?))|(?P<close>\))|(?P<bar>\|)|(?P<start>\^)|(?P<end>\$)|(?P<edge>\\b)"
    r"|(?P<repeat>[*+?]|\{[0-9]{1,6}(?:,[0-9]{0,6})?\})\??(?![*+?{])",
    re.ASCII,
)


class Patterns:
    """The keys of one ``rank_pattern`` or ``alpha_pattern``, in order.

    Raises:
        AdapterError: one is no pattern of names, and the message begins with it; or they are too many.
    """

    def __init__(self, texts: Iterable[str]) -> None:
        self._steps = 0
        # Length -> (whether from ^, where any character does) -> name with those places blank -> index.
        self._names: dict[int, dict[tuple[bool, tuple[int, ...]], dict[str, int]]] = {}
        self._others: list[tuple[int, _Match]] = []
        length = 0
        for index, text in enumerate(texts):
            if match := _NAME.fullmatch(text):
                name = match["name"].replace("\\.", "\1").replace(".", _ANY).replace("\1", ".")
                kind = text[0] == "^", tuple(i for i, char in enumerate(name) if char == _ANY)
                alike = self._names.setdefault(len(name), {}).setdefault(kind, {})
                alike.setdefault(name, index)
                continue
            try:
                if (length := length + len(text)) > _LONGEST:
                    raise AdapterError(
                        f"got more than {_LONGEST} characters with this, wanted fewer"
                    )
                self._others.append((index, _Parser(text, self._count).parse()))
            except AdapterError as error:
                short = text if len(text) <= 80 else f"{text[:77]}..."
                raise AdapterError(f"{short!r}: {error}") from None

    def first(self, name: str) -> int | None:
        """The index of the first pattern that PEFT matches to ``name``: to the whole of it, or to all behind one of its dots.

        Raises:
            AdapterError: the patterns take too many steps.
        """
        best = min(self._named(name), default=None)
        text = _Text(name)
        for index, match in self._others:
            if best is not None and best < index:
                break
            if match(1 | text.places(".") << 1, text) >> len(name) & 1:
                return index
        return best

    def _named(self, name: str) -> Iterator[int]:
        for start in (0, *(place + 1 for place, char in enumerate(name) if char == ".")):
            for (whole, wild), alike in self._names.get(len(name) - start, {}).items():
                self._count(1 + len(wild))
                chars = list(name[start:])
                for place in wild:
                    chars[place] = _ANY
                index = alike.get("".join(chars))
                if index is not None and not (whole and start):
                    yield index

    def _count(self, steps: int = 1) -> None:
        self._steps += steps
        if self._steps > _MOST_STEPS:
            raise AdapterError(
                f"got patterns that take more than {_MOST_STEPS} steps, wanted fewer, or simpler ones"
            )


class _Text:
    """A name, as masks of the places where a character is."""

    def __init__(self, name: str) -> None:
        self.length = len(name)
        self._chars: dict[str, int] = {}
        self._classes: dict[re.Pattern[str], int] = {}
        for place, char in enumerate(name):
            self._chars[char] = self._chars.get(char, 0) | 1 << place

    @property
    def edges(self) -> int:
        """Where a word begins or ends."""
        words = self.places(_WORD)
        return (words ^ words << 1) & (2 << self.length) - 1

    def places(self, one: str | re.Pattern[str]) -> int:
        """Where a character is, or one of a class."""
        if isinstance(one, str):
            return self._chars.get(one, 0)
        if one not in self._classes:
            masks = (mask for char, mask in self._chars.items() if one.match(char))
            self._classes[one] = sum(masks)
        return self._classes[one]


_Match = Callable[
    [int, _Text], int
]  # (up to where it is matched, of what) -> up to where, with this


class _Parser:
    """Reads one pattern."""

    def __init__(self, text: str, count: Callable[[], None]) -> None:
        self._text, self._count, self._at = text, count, 0

    def parse(self) -> _Match:
        match = self._alternatives(0)
        if self._at < len(self._text):
            raise self._fault()
        return match

    def _fault(self) -> AdapterError:
        rest = self._text[self._at : self._at + 30]
        return AdapterError(
            f"got {rest!r} at character {self._at}, wanted names, '.', classes, groups, and repeats of these"
        )

    def _next(self, *kinds: str) -> re.Match[str] | None:
        """The token that follows, if it is one of some ``kinds``; then it is passed."""
        self._count()
        token = _TOKEN.match(self._text, self._at)
        if token is None or token.lastgroup not in kinds:
            return None
        self._at = token.end()
        return token

    def _alternatives(self, depth: int) -> _Match:
        if depth > _DEEPEST:
            raise self._fault()
        branches = [self._sequence(depth)]
        while self._next("bar"):
            branches.append(self._sequence(depth))

        def match(at: int, text: _Text) -> int:
            ends = 0
            for branch in branches:
                ends |= branch(at, text)
            return ends

        return match if len(branches) > 1 else branches[0]

    def _sequence(self, depth: int) -> _Match:
        parts: list[_Match] = []
        while token := self._next("literal", "one", "start", "end", "edge", "open"):
            part = self._item(token, depth)
            if repeat := self._next("repeat"):
                part = self._repeated(part, token, repeat["repeat"])
            parts.append(part)

        def match(at: int, text: _Text) -> int:
            for part in parts:
                self._count()
                if not at:
                    break
                at = part(at, text)
            return at

        return match

    def _item(self, token: re.Match[str], depth: int) -> _Match:
        if token.lastgroup == "start":
            return lambda at, text: at & 1
        if token.lastgroup == "end":
            return lambda at, text: at & 1 << text.length
        if token.lastgroup == "edge":
            return lambda at, text: at & text.edges
        if token.lastgroup == "open":
            inner = self._alternatives(depth + 1)
            if not self._next("close"):
                raise self._fault()
            return inner
        one = self._one(token)
        return lambda at, text: (at & text.places(one)) << 1

    def _one(self, token: re.Match[str]) -> str | re.Pattern[str]:
        if token.lastgroup == "literal":
            return token[0][-1]
        try:
            return re.compile(token[0])
        except re.error as error:
            raise AdapterError(f"got {token[0]!r}: {error}") from None

    def _repeated(self, part: _Match, token: re.Match[str], repeat: str) -> _Match:
        low, comma, high = repeat.strip("{}").partition(",")
        least = int(low) if low.isdigit() else int(low == "+")
        most = (
            1
            if low == "?"
            else int(high) if high else None if comma or not low.isdigit() else least
        )
        if most is not None and most < least:
            raise self._fault()
        one = self._one(token) if token.lastgroup in ("literal", "one") else None

        def match(at: int, text: _Text) -> int:
            for _ in range(least):
                self._count()
                before, at = at, part(at, text)
                if at == before:
                    break
            if (
                most is None and one is not None
            ):  # on through every run of its characters that begins at a bit, by carries
                run = text.places(one)
                return (at & run) + run ^ run | at
            ends, new = at, at
            for _ in range(text.length + 1 if most is None else most - least):
                self._count()
                new = part(new, text) & ~ends
                if not new:
                    break
                ends |= new
            return ends

        return match
