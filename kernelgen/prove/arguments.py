"""Whether what the cases of a family launch its kernels with tells their arguments apart.

A kernel that takes one argument for another, or a number in its place, is wrong where they differ, and only there: two strides
that are the same in every case may be exchanged, and a size that is always 3 may stand in the text. Nothing runs for it: the
launches of the cases are noted, by the templates that they are of.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import re
from typing import TYPE_CHECKING, Any, Callable, Iterator, Mapping
from unittest import mock

from kernelgen.core.model import SCHEDULE
from kernelgen.prove.memory import tensors

if TYPE_CHECKING:
    from kernelgen.prove.testing import Suite

# What no case has to change: tests/test_order.py launches for GPUs that have dependent launch, and how many loads are under way
# changes no number.
_ANYWHERE = re.compile(r"PDL|\w*STAGES")


class _Launched(Exception):
    """The launches of a case are made: a comparison of what they did is not wanted, and would fail."""


def findings(suite: Suite, reasons: Mapping[str, str]) -> Iterator[str]:
    """What the cases of ``suite.quick`` do not tell apart, a line each.

    Args:
        reasons: an argument that may always be the same, or two with a blank between, and why; one without need is told too.
    """
    found: dict[str, str] = {}
    for kernel, launches in _launches(suite).items():
        for what, line in _indistinct(launches):
            found.setdefault(what, f"{kernel}: {line}")
    yield from (line for what, line in found.items() if what not in reasons)
    yield from (f"{what}: the cases tell it apart, no reason is needed" for what in reasons if what not in found)


def _launches(suite: Suite) -> dict[str, list[dict[str, Any]]]:
    """The arguments of each launch of each kernel, by schedule and kernel."""
    from triton.runtime.interpreter import GridExecutor

    made: dict[str, list[dict[str, Any]]] = {}
    name = schedule = ""

    def note(self: Any, *arguments: Any, **keywords: Any) -> None:
        if self.fn.__name__.startswith(f"{name}_"):
            given = {**dict(zip(self.arg_names, arguments, strict=False)), **keywords}
            kernel = f"{schedule} {self.fn.__name__.removeprefix(f'{name}_')}".strip()
            made.setdefault(kernel, []).append({n: _plain(given[n]) for n in self.arg_names if n in given})

    with mock.patch.object(GridExecutor, "__call__", note):
        for variant, case in suite.pairs:
            if (variant.name, case.name) in suite.quick and not case.needs_gpu:
                name, schedule = variant.name, variant.tags.get(SCHEDULE, "")
                with contextlib.suppress(_Launched, AssertionError):
                    suite.check(variant, case, "cpu", _then_stops)
    return made


def _then_stops(launcher: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(launcher)
    def launch(*arguments: Any, **keywords: Any) -> None:
        launcher(*arguments, **keywords)
        raise _Launched

    return launch


def _plain(argument: Any) -> Any:
    """What is compared of an argument: a number or None as it is, of others where their tensors begin."""
    if argument is None or isinstance(argument, (int, float)):
        return argument
    return tuple(tensor.data_ptr() for _, tensor in tensors("", argument)) or repr(argument)


def _indistinct(launches: list[dict[str, Any]]) -> Iterator[tuple[str, str]]:
    """Numbers that are the same in all launches that have them, and arguments that are each other's in all that have both."""
    names = list(dict.fromkeys(n for given in launches for n in given if not _ANYWHERE.fullmatch(n)))
    values = {name: [given[name] for given in launches if name in given] for name in names}
    same = {name for name, found in values.items() if len(set(found)) == 1 and isinstance(found[0], (int, float, type(None)))}
    yield from ((name, f"{name} is {values[name][0]} in every case") for name in names if name in same)
    for a, b in itertools.combinations([name for name in names if name not in same], 2):
        both = [(given[a], given[b]) for given in launches if a in given and b in given]
        if any(x is not None for x, _ in both) and all(type(x) is type(y) and x == y for x, y in both):
            yield f"{a} {b}", f"{a} is {b} in every case"
