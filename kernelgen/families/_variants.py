"""The variants of a family, as its spec has them, and the choice among them: by what the tags of their axes stand for."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, NoReturn

import torch

from . import _runtime as runtime
from ._operands import NONE, OPS


class Found(NamedTuple):
    """The module of a variant, and the largest rank that it takes; None: any."""

    module: str
    max_rank: int | None = None

    @property
    def block_rank(self) -> int:
        """Ranks of a tile."""
        return 128 if self.max_rank is None else self.max_rank


class Variants:
    """The variants of one family.

    Args:
        package: of the family.
        spec: the file that says which there are.
        facts: of each axis what a call is asked for; the fact of ``rank`` is ``max_rank``, and asked for by ``rank``.
        modules: facts -> module.
        chunk_k: columns of a product that all schedules add up by themselves, so that they agree bit for bit; None: any.
    """

    def __init__(
        self,
        package: str | None,
        spec: str,
        facts: Sequence[str],
        modules: Mapping[tuple[Any, ...], str],
        chunk_k: int | None = None,
    ) -> None:
        self.spec = spec
        self.facts = tuple(facts)
        self.modules = modules
        self.chunk_k = chunk_k
        self._package = package
        self._ranks = self.values("max_rank") if "max_rank" in facts else (None,)

    def values(self, fact: str) -> tuple[Any, ...]:
        """What there is of a fact: ranks by size, any rank last; else in the order of the spec; None where no axis tells it."""
        if fact not in self.facts:
            return (None,)
        place = self.facts.index(fact)
        found = dict.fromkeys(key[place] for key in self.modules)
        return tuple(sorted(found, key=lambda rank: rank or float("inf")) if fact == "max_rank" else found)

    @property
    def strict(self) -> bool:
        """Whether all schedules add in one order."""
        return self.chunk_k is not None

    @functools.cached_property
    def _of(self) -> dict[str, tuple[Any, ...]]:
        return {module: key for key, module in self.modules.items()}

    def of(self, variant: str) -> dict[str, Any]:
        """What the variant of this name has of each fact; with ``max_rank`` also its ``block_rank``."""
        module = variant.removeprefix(f"{str(self._package).rpartition('.')[2]}_")
        found = dict(zip(self.facts, self._of[module], strict=True))
        if "max_rank" in found:
            found["block_rank"] = Found(module, found["max_rank"]).block_rank
        return found

    @property
    def dtypes(self) -> tuple[torch.dtype, ...]:
        """The dtypes that the axis dtype has."""
        return self.values("torch_dtype")

    def find(self, *, rank: int = 0, **facts: Any) -> Found | None:
        """The variant of these facts, of the smallest bucket that holds the rank; None: there is none."""
        if any(value not in NONE for name, value in facts.items() if name not in self.facts):
            return None
        for max_rank in self._ranks:
            if max_rank is None or rank <= max_rank:
                module = self.modules.get(tuple(max_rank if name == "max_rank" else facts[name] for name in self.facts))
                if module is not None:
                    return Found(module, max_rank)
        return None

    def get(self, op: str, *, rank: int = 0, **facts: Any) -> Any:
        """What launches the variant of these facts.

        Raises:
            ValueError: there is none; by the name of ``op``.
        """
        found = self.find(rank=rank, **facts)
        if found is None:
            self.refuse(op, rank=rank, **facts)
        return self.load(found)

    def load(self, found: Found) -> Any:
        """What launches a variant: ``schedule`` of its module."""
        return importlib.import_module(f".{found.module}", self._package).schedule

    def refuse(self, op: str, *, rank: int = 0, **facts: Any) -> NoReturn:
        """Say what call no variant serves, and which arguments and facts of it would have to differ alone.

        Raises:
            ValueError: always.
        """
        asked = {**facts, "rank": rank} if "max_rank" in self.facts else facts
        got = ", ".join(_say(name, value) for name, value in asked.items() if value not in (None, False))
        served = {name: values for name, values in self._served(rank, facts) if values}
        hints = [_say(name, *values) for name, values in served.items()]
        near = f"there are variants with {', or with '.join(hints)}; else " if hints else ""
        what = dict.fromkeys(label for name in served or asked for label in self._asked_by(op, name, facts))
        hint = f"{near}add a tag in {self.spec}, or drop an exclude"
        runtime.fail(op, ", ".join(what) or "case", got, "a variant that serves it", hint)

    def _asked_by(self, op: str, fact: str, facts: Mapping[str, Any]) -> Iterator[str]:
        """What the caller calls the arguments that ask for a fact."""
        labels = op.labels if isinstance(op, runtime.Caller) else {}
        own, caller = OPS[str(self._package).rpartition(".")[2]], OPS[str(op)]
        known = {operand.name for operand in caller.operands}
        for name in own.asks_for(fact, facts):
            label = labels.get(name, name)
            if label.partition(".")[0] in known:
                yield label
        yield from caller.asks_for(fact, facts)

    def _served(self, rank: int, facts: Mapping[str, Any]) -> Iterator[tuple[str, list[Any]]]:
        """Of each fact the values with which the others are served."""
        for name in facts:
            if name in self.facts:
                yield name, [value for value in self.values(name) if self.find(rank=rank, **{**facts, name: value})]


def _say(fact: str, *values: object) -> str:
    return f"{fact.removeprefix('torch_')} {' or '.join(str(value).removeprefix('torch.') for value in values)}"
