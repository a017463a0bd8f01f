"""Ops that fill tables, in buffers that front doors make: what the schedules of each do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

from . import _runtime as runtime
from ._operands import Op


class Filling:
    """Launches of one variant. Of a family: ``op``, and ``check``, the problem of a call by the name of the variant, what scratch
    it needs, and what is given."""

    op: ClassVar[Op[..., Any]]
    check: ClassVar[Callable[[str, Callable[[int, int], int], Any], Any]]

    def __init__(self, kernel: Any) -> None:
        self.name = runtime.variant_of(kernel)

    def scratch_size(self, num_pairs: int, num_groups: int) -> int:
        """int32 elements of scratch that a call needs."""
        raise NotImplementedError

    def bind(self, problem: Any) -> runtime.Call:
        """The launches for tables of these sizes, ready to be made again and again."""
        raise NotImplementedError

    def launch(self, **arguments: Any) -> None:
        """One call, checked.

        Raises:
            ValueError: something does not fit; nothing was launched.
        """
        given = self.op.given(**arguments)
        self.bind(type(self).check(self.name, self.scratch_size, given)).run(given)
