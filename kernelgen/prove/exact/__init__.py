"""Exact algebra: a kernel must equal its formula, not come near it.

Beside each float goes an element of the field of 2^61 - 1. Inputs are random elements; sums, products and quotients are exact;
casts change nothing; exp and its like are fixed random functions. The formula is the reference of the family as it stands, in
which what is added and taken away again for a bound is nothing. A term that is dropped, an index that is off by one, a scale
that is applied twice changes the result for all but one in 2^40 draws, however small it is in numbers.

    with exact_algebra() as algebra:
        a case of a family: its inputs, its reference, its launch, and ``worst_ratio``, where elements are compared too
    assert algebra.compared

What the field does not see is left to numbers: rounding, overflow, NaN, subnormals, and the width of types.
"""

from __future__ import annotations

import contextlib
from typing import Iterator

import torch

from kernelgen.families import case
from kernelgen.prove.exact.formulas import Formulas
from kernelgen.prove.exact.kernels import kernels_in
from kernelgen.prove.exact.memory import Memory
from kernelgen.prove.memory import Lost

__all__ = ["Algebra", "Lost", "exact_algebra"]


class Algebra:
    """What was compared.

    Attributes:
        compared: elements that kernels made and that equal those of formulas.
    """

    def __init__(self, formulas: Formulas) -> None:
        self.compared = 0
        self._formulas = formulas

    def agree(self, actual: torch.Tensor, wanted: torch.Tensor) -> None:
        """Raise AssertionError unless two tensors have the same elements."""
        found, exact = self._formulas.read(actual), self._formulas.read(wanted)
        wrong = (found != exact).nonzero()
        assert found.shape == exact.shape, f"{found.shape} elements, wanted {exact.shape}"
        if wrong[0].size:
            first = tuple(int(axis[0]) for axis in wrong)
            raise AssertionError(
                f"exact algebra: {wrong[0].size} of {found.size} elements are not what the formula gives; the first at {first}"
            )
        self.compared += found.size


@contextlib.contextmanager
def exact_algebra() -> Iterator[Algebra]:
    """Inside, what kernels and references compute is computed in the field too, and compared where they are."""
    formulas = Formulas(Memory())
    algebra = Algebra(formulas)
    token = case.also_compare.set(algebra.agree)
    try:
        with kernels_in(formulas), formulas:
            yield algebra
    finally:
        case.also_compare.reset(token)
