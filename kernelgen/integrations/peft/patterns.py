"""PEFT's patterns of module names, matched in linear time.

A key of ``rank_pattern`` or ``alpha_pattern`` is a regular expression that someone else wrote, and PEFT asks
``re.match(rf"(.*\\.)?({key})$", name)``. ``re`` backtracks: a key like ``(a|a)*b`` takes exponential time. So a key is read here
as what it is in practice (names, ``.``, classes, groups, repeats) and all ways to match it are followed at once: bit i of a mask
says that the name's first i characters can be matched. Whether there is a match is the same question either way; look-around,
back references and flags, for which that is not so, are refused.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from typing import Callable

from .adapter import AdapterError

_LONGEST = 1000  # characters of a pattern
_DEEPEST = 20  # groups in groups
_TOKEN = re.compile(
    r"(?P<literal>[^\\\[\](){}|*+?^$.]|\\[^0-9A-Za-z])"
    r"|(?P<one>\.|\\[dDsSwW]|\[\^?(?:\w-\w|\\[dDsSwW]|\\[^0-9A-Za-z]|[\w.])+-?\])"
    r"|(?P<open>\((?:\?:)?(?!\?))|(?P<close>\))|(?P<bar>\|)|(?P<start>\^)|(?P<end>\$)"
    r"|(?P<repeat>[*+?]|\{[0-9]{1,6}(?:,[0-9]{0,6})?\})\??(?![*+?{])",
    re.ASCII,
)

# From where a name's first characters can be matched up to, to where one step more leads; with the masks of its characters.
_Step = Callable[[int, Mapping[str, int], int], int]


class Pattern:
    """One key of ``rank_pattern`` or ``alpha_pattern``.

    Raises:
        AdapterError: it is no pattern of names.
    """

    def __init__(self, text: str) -> None:
        self._text, self._at = text, 0
        if len(text) > _LONGEST:
            raise AdapterError(f"got {len(text)} characters, wanted at most {_LONGEST}")
        self._step = self._alternatives(0)
        if self._at < len(text):
            raise self._fault()

    def matches(self, name: str) -> bool:
        """Whether PEFT matches ``name``: the whole of it, or all that follows one of its dots."""
        masks = _masks(name)
        starts = 1 | masks.get(".", 0) << 1
        return bool(self._step(starts, masks, len(name)) >> len(name) & 1)

    def _fault(self) -> AdapterError:
        rest = self._text[self._at : self._at + 30]
        return AdapterError(
            f"got {rest!r} at character {self._at}, wanted names, '.', classes, groups, and repeats of these"
        )

    def _next(self) -> re.Match[str] | None:
        return _TOKEN.match(self._text, self._at)

    def _alternatives(self, depth: int) -> _Step:
        branches = [self._sequence(depth)]
        while (token := self._next()) and token["bar"]:
            self._at = token.end()
            branches.append(self._sequence(depth))

        def run(at: int, masks: Mapping[str, int], n: int) -> int:
            ends = 0
            for branch in branches:
                ends |= branch(at, masks, n)
            return ends

        return run

    def _sequence(self, depth: int) -> _Step:
        steps: list[_Step] = []
        while (token := self._next()) and not (token["bar"] or token["close"]):
            if token["repeat"] or depth == _DEEPEST:
                raise self._fault()
            self._at = token.end()
            step = self._item(token, depth)
            if (repeat := self._next()) and repeat["repeat"]:
                step = self._repeated(step, repeat["repeat"])
                self._at = repeat.end()
            steps.append(step)

        def run(at: int, masks: Mapping[str, int], n: int) -> int:
            for step in steps:
                if not at:
                    break
                at = step(at, masks, n)
            return at

        return run

    def _item(self, token: re.Match[str], depth: int) -> _Step:
        if token["literal"]:
            literal = token["literal"][-1]
            return lambda at, masks, n: (at & masks.get(literal, 0)) << 1
        if token["start"]:
            return lambda at, masks, n: at & 1
        if token["end"]:
            return lambda at, masks, n: at & 1 << n
        if token["open"]:
            inner = self._alternatives(depth + 1)
            if not ((close := self._next()) and close["close"]):
                raise self._fault()
            self._at = close.end()
            return inner
        try:
            one = re.compile(token["one"])
        except re.error as error:
            raise AdapterError(f"got {token['one']!r}: {error}") from None
        return lambda at, masks, n: sum(
            (at & mask) << 1 for char, mask in masks.items() if one.match(char)
        )

    def _repeated(self, step: _Step, repeat: str) -> _Step:
        low, comma, high = repeat.strip("{}").partition(",")
        least = int(low) if low.isdigit() else int(low == "+")
        most = (
            1
            if low == "?"
            else int(high) if high else least if low.isdigit() and not comma else None
        )
        if most is not None and most < least:
            raise self._fault()

        def run(at: int, masks: Mapping[str, int], n: int) -> int:
            # n + 1 rounds are as good as any more: a round either moves on, or keeps what it had.
            for _ in range(min(least, n + 1)):
                at = step(at, masks, n)
            ends = at
            for _ in range(n + 1 if most is None else min(most - least, n + 1)):
                at = step(at, masks, n) & ~ends
                if not at:
                    break
                ends |= at
            return ends

        return run


@functools.lru_cache(maxsize=1024)
def _masks(name: str) -> Mapping[str, int]:
    """Character -> a mask of the places where ``name`` has it."""
    masks: dict[str, int] = {}
    for place, char in enumerate(name):
        masks[char] = masks.get(char, 0) | 1 << place
    return masks
