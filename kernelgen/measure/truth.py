"""Is the result right? Compared with the formula in fp64 before anything is timed."""

from __future__ import annotations

import dataclasses
from typing import Sequence

import torch

from kernelgen.families.quant import dequantise_mxfp4
from kernelgen.measure.suite import GROUP

SAMPLED = 128  # rows


class WrongResult(Exception):
    """An implementation that computed something else; the message says how far off."""


def error_limit(dtype: torch.dtype) -> float:
    """The relative error of a row up to which a result counts: two roundings to the dtype of activations, and as much again."""
    return 2.0 * torch.finfo(dtype).eps


@dataclasses.dataclass(frozen=True)
class Truth:
    """What an output has to hold after a call.

    Attributes:
        out: [R, N].
        before: what it held.
        live: [R] bool, the rows that are written; None: all.
        rows: [n], a sample of these.
        wanted: [n, N] fp64.
        limit: the relative error of a row up to which it counts.
    """

    out: torch.Tensor
    before: torch.Tensor
    live: torch.Tensor | None
    rows: torch.Tensor
    wanted: torch.Tensor
    limit: float

    def restore(self) -> None:
        """Undo what calls have done to the output."""
        self.out.copy_(self.before)

    def error(self, keeps_rows: bool = True) -> float:
        """The largest relative error of a sampled row.

        Raises:
            WrongResult: it is above the limit, a live element is not finite, or a row that had to stay changed.
        """
        written = self.out if self.live is None else self.out[self.live]
        if not torch.isfinite(written).all():
            raise WrongResult("an element of a live row was not written, or is not finite")
        if keeps_rows and self.live is not None:
            now, then = (rows[~self.live].contiguous().view(torch.uint8) for rows in (self.out, self.before))
            if not torch.equal(now, then):
                raise WrongResult("a row without an adapter changed")
        if len(self.rows) == 0:
            return 0.0
        error = (self.out[self.rows].double() - self.wanted).norm(dim=1) / self.wanted.norm(dim=1)
        worst = float(error.max())
        if not worst <= self.limit:
            raise WrongResult(f"relative error {worst:.2g} of a row, at most {self.limit:.2g}")
        return worst


def sample(live: torch.Tensor, most: int = SAMPLED) -> torch.Tensor:
    """Some of the places where ``live`` holds."""
    rows = live.nonzero()[:, 0]
    return rows[torch.randperm(len(rows), device=rows.device)[:most]]


def chunks(rows: torch.Tensor, most: int) -> list[torch.Tensor]:
    """``rows``, a few at a time: what is gathered in fp64 for them is large."""
    return [rows[at : at + most] for at in range(0, len(rows), most)]


def rows_of(x: torch.Tensor, scale: torch.Tensor | None, rows: torch.Tensor) -> torch.Tensor:
    """Rows of x [R, K] in fp64; FP8 times its scales, [1], [R, 1] or one a group of columns."""
    wide = x[rows].double()
    if scale is None:
        return wide
    if scale.dim() == 1:
        return wide * scale.double()
    return wide * _spread(scale[rows].double(), -1, x.shape[-1])


def matrices(weights: torch.Tensor, scale: torch.Tensor | None, who: Sequence[torch.Tensor]) -> torch.Tensor:
    """The matrices [n, out, in] of ``who``, (adapters, experts) or one of both, in fp64; FP8 or MXFP4 times its scales."""
    if weights.dtype == torch.uint8 and scale is not None:
        return dequantise_mxfp4(weights[tuple(who)], scale[tuple(who)])
    found = weights[tuple(who)].double()
    if scale is None:
        return found
    own = scale[tuple(who)].double()
    own = own.reshape(*own.shape, *[1] * (3 - own.dim()))
    return found * _spread(_spread(own, -2, found.shape[-2]), -1, found.shape[-1])


def _spread(scales: torch.Tensor, dim: int, size: int) -> torch.Tensor:
    """One scale for each of ``size`` rows or columns: scales that are so many, one for all, or one a group."""
    if scales.shape[dim] in (1, size):
        return scales
    return scales.repeat_interleave(GROUP, dim).narrow(dim, 0, size)
