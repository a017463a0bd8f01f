"""Problems: what tiles are looked up by, as a tuned file writes it. Imports no torch."""

from __future__ import annotations

from typing import Any, Iterator, Mapping

from kernelgen.core.model import TUNED_AXES, VOCABULARY

# Sizes, then tags of the axes that are not at their first one.
Problem = dict[str, "int | bool | str"]
_LAST = ("max_loras", "rank", "num_tokens")  # sizes that entries of a file are sorted by in the end


def of_key(key: Mapping[str, Any]) -> Problem:
    """The problem that a key of the generated package, by field, is: facts of tags become the tags."""
    facts = {fact for axis in TUNED_AXES for meant in VOCABULARY[axis].values() for fact in meant}
    sizes = {name: value for name, value in key.items() if name not in facts}
    return {**sizes, **dict(_tags(key))}


def _tags(key: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for axis in TUNED_AXES:
        first = next(iter(VOCABULARY[axis]))
        for tag, meant in VOCABULARY[axis].items():
            if tag != first and meant.keys() <= key.keys() and all(key[name] == fact for name, fact in meant.items()):
                yield axis, tag


def tags(problem: Mapping[str, Any]) -> dict[str, str]:
    """The tags among its sizes."""
    return {name: tag for name, tag in problem.items() if isinstance(tag, str)}


def order(problem: Mapping[str, Any]) -> tuple[Any, ...]:
    """Where the entries of a file stand: layer by layer, then by adapters, rank and tokens."""
    own = tags(problem)
    first = [value for name, value in problem.items() if name not in _LAST and name not in own]
    return *first, *(problem.get(name, 0) for name in _LAST), tuple(own.items())


def alike(problem: Mapping[str, Any]) -> tuple[tuple[str, Any], ...]:
    """What problems have in common of which one's best tiles are worth a try for the other: all but the sizes of the layer."""
    return tuple((k, v) for k, v in problem.items() if k in ("num_tokens", "rank", "block_m") or isinstance(v, (bool, str)))
