"""Kinds of values on the command line of what measures."""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING, Any, Sequence

import click

if TYPE_CHECKING:
    Kind = click.ParamType[Any]
else:
    Kind = click.ParamType  # generic in some versions only

_UNITS = {"": 1.0, "s": 1.0, "m": 60.0, "h": 3600.0}


class Numbers(Kind):
    """Integers with commas between them."""

    name = "N,N,..."

    def __init__(self, least: int = 1) -> None:
        self.least = least

    def convert(self, value: Any, param: Any, ctx: Any) -> tuple[int, ...]:
        if not isinstance(value, str):
            return tuple(value)
        try:
            numbers = tuple(int(part) for part in value.split(","))
        except ValueError:
            self.fail(f"{value!r}: wanted whole numbers with commas between them", param, ctx)
        if min(numbers) < self.least:
            self.fail(f"{value!r}: each is at least {self.least}", param, ctx)
        return numbers


class Shares(Kind):
    """Numbers from 0 to 1 with commas between them."""

    name = "X,X,..."

    def convert(self, value: Any, param: Any, ctx: Any) -> tuple[float, ...]:
        if not isinstance(value, str):
            return tuple(value)
        try:
            shares = tuple(float(part) for part in value.split(","))
        except ValueError:
            self.fail(f"{value!r}: wanted numbers with commas between them", param, ctx)
        if not all(0.0 <= share <= 1.0 for share in shares):
            self.fail(f"{value!r}: each is from 0 to 1", param, ctx)
        return shares


class Words(Kind):
    """Words out of a list, with commas between them."""

    name = "A,B,..."

    def __init__(self, known: Sequence[str]) -> None:
        self.known = tuple(known)

    def convert(self, value: Any, param: Any, ctx: Any) -> tuple[str, ...]:
        if not isinstance(value, str):
            return tuple(value)
        words = tuple(word.strip() for word in value.split(","))
        for word in words:
            if word not in self.known:
                self.fail(f"{word!r} is none of {', '.join(self.known)}", param, ctx)
        return words


class Seconds(click.FloatRange):
    """A number in a range; nan is in none."""

    def convert(self, value: Any, param: Any, ctx: Any) -> float:
        number: float = super().convert(value, param, ctx)
        if math.isnan(number):
            self.fail(f"{value!r} is no number", param, ctx)
        return number


class Duration(Kind):
    """Seconds, from a text such as 90s, 5m or 1h."""

    name = "TIME"

    def convert(self, value: Any, param: Any, ctx: Any) -> float:
        if not isinstance(value, str):
            return float(value)
        match = re.fullmatch(r"(\d{1,9}(?:\.\d*)?)([smh]?)", value.strip())
        if match is None or float(match[1]) <= 0:
            self.fail(f"{value!r}: wanted a time such as 90s, 5m or 1h", param, ctx)
        return float(match[1]) * _UNITS[match[2]]
