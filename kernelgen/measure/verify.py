"""Is the result right? Compared with the formula in fp64 before anything is timed."""

from __future__ import annotations

import dataclasses

import torch

from kernelgen.measure.inputs import DTYPES, Batch, Case, Operands
from kernelgen.measure.workloads import GROUP

_SAMPLED_PAIRS = 128
_CHUNK = 16  # pairs whose weights are gathered in fp64 at a time


class WrongResult(Exception):
    """An implementation that computed something else; the message says how far off."""


def error_limit(case: Case) -> float:
    """The relative error of a row up to which a result counts: two roundings to the activation dtype, and as much again."""
    return 2.0 * torch.finfo(DTYPES[case.cell.dtype]).eps


def delta(batch: Batch, operands: Operands, pairs: torch.Tensor, weighted: bool) -> torch.Tensor:
    """What LoRA adds to the rows of live ``pairs`` [n]: [n, S * N] in fp64."""
    top_k = batch.topk_ids.shape[1]
    adapter = batch.mapping.long()[pairs // top_k]
    expert = batch.topk_ids.reshape(-1).long()[pairs]
    rows = pairs if operands.projection.weighted else pairs // top_k
    chunks = []
    for at in range(0, len(pairs), _CHUNK):
        part = slice(at, at + _CHUNK)
        who = adapter[part], expert[part]
        x = _activations(operands, rows[part])[:, :, None]
        weights = operands.weights
        a_s = matrices(weights.lora_a, weights.a_scale, who)
        b_s = matrices(weights.lora_b, weights.b_scale, who)
        columns = [b @ (a @ x) for a, b in zip(a_s, b_s, strict=True)]
        chunks.append(torch.cat(columns, 1)[:, :, 0])
    result = torch.cat(chunks)
    if weighted and operands.projection.weighted:
        result *= batch.topk_weights.reshape(-1)[pairs].double()[:, None]
    return result


def _activations(operands: Operands, rows: torch.Tensor) -> torch.Tensor:
    """Rows of x [n, K] in fp64."""
    x = operands.x[rows].double()
    scale = operands.x_scale
    if scale is None:
        return x
    if scale.dim() == 1:
        return x * scale.double()
    return x * _spread(scale[rows].double(), -1, x.shape[-1])


def matrices(
    weights: tuple[torch.Tensor, ...],
    scales: tuple[torch.Tensor, ...],
    who: tuple[torch.Tensor, ...],
) -> list[torch.Tensor]:
    """The matrices [n, out, in] of ``who``, (adapters, experts) or (adapters,), in fp64; FP8 times its scales."""
    found = [w[who].double() for w in weights]
    for i, scale in enumerate(scales):
        own = scale[who].double()
        own = own.reshape(*own.shape, *[1] * (3 - own.dim()))
        own = _spread(_spread(own, -2, found[i].shape[-2]), -1, found[i].shape[-1])
        found[i] = found[i] * own
    return found


def _spread(scales: torch.Tensor, dim: int, size: int) -> torch.Tensor:
    """One scale for each of ``size`` rows or columns: scales that are so many, one for all, or one a group."""
    if scales.shape[dim] in (1, size):
        return scales
    return scales.repeat_interleave(GROUP, dim).narrow(dim, 0, size)


def poison(operands: Operands, adds: bool) -> torch.Tensor:
    """Return what ``out`` holds; where the call overwrites, fill it with NaN first."""
    if not adds:
        operands.out.fill_(float("nan"))
    return operands.out.clone()


@dataclasses.dataclass(frozen=True)
class Expected:
    """What a call has to do: ``delta`` [n, S * N] fp64 is for the rows ``pairs`` [n], a sample of the live ones."""

    live: torch.Tensor  # [P] bool
    pairs: torch.Tensor
    delta: torch.Tensor


def expect(batch: Batch, operands: Operands, weighted: bool = True) -> Expected:
    """Draw a sample and compute what is right for it; that is most of the work of ``verify``."""
    live = (batch.mapping >= 0).repeat_interleave(batch.topk_ids.shape[1])
    pairs = live.nonzero()[:, 0]
    pairs = pairs[torch.randperm(len(pairs), device=pairs.device)[:_SAMPLED_PAIRS]]
    if len(pairs) == 0:
        return Expected(live, pairs, operands.out.new_empty((0, operands.out.shape[2])).double())
    return Expected(live, pairs, delta(batch, operands, pairs, weighted))


def compare(
    case: Case,
    expected: Expected,
    operands: Operands,
    before: torch.Tensor,
    *,
    adds: bool,
    keeps_rows: bool = True,
) -> float:
    """The largest relative error of a sampled row of ``out``, which was ``before``.

    Raises:
        WrongResult: an error above the limit, a live element that is not finite, or a row that had to stay and changed.
    """
    flat = operands.out.flatten(0, 1)
    before = before.flatten(0, 1)
    live = expected.live
    if not torch.isfinite(flat[live]).all():
        raise WrongResult("an element of a live row was not written, or is not finite")
    if keeps_rows and not torch.equal(
        flat[~live].view(torch.int16), before[~live].view(torch.int16)
    ):
        raise WrongResult("a row without an adapter changed")
    if len(expected.pairs) == 0:
        return 0.0
    wanted = expected.delta
    if adds:
        wanted = wanted + before[expected.pairs].double()
    error = (flat[expected.pairs].double() - wanted).norm(dim=1) / wanted.norm(dim=1)
    worst = float(error.max())
    if not worst <= error_limit(case):
        raise WrongResult(f"relative error {worst:.2g} of a row, at most {error_limit(case):.2g}")
    return worst


def verify(
    case: Case,
    batch: Batch,
    operands: Operands,
    before: torch.Tensor,
    *,
    adds: bool,
    weighted: bool,
    keeps_rows: bool,
) -> float:
    """``compare`` with what is right for a new sample.

    Raises:
        WrongResult: as ``compare``.
    """
    expected = expect(batch, operands, weighted)
    return compare(case, expected, operands, before, adds=adds, keeps_rows=keeps_rows)


def verify_blocks(
    batch: Batch, pairs: torch.Tensor, blocks: torch.Tensor, num_blocks: torch.Tensor
) -> None:
    """Check the tables of a route: each live pair in exactly one block, and in a block of its adapter and expert.

    Raises:
        WrongResult: they do not.
    """
    top_k = batch.topk_ids.shape[1]
    live = (batch.mapping >= 0).repeat_interleave(top_k).nonzero()[:, 0]
    used = blocks[: int(num_blocks)].long()
    rows = used[:, 3]
    owner = torch.arange(len(used), device=rows.device).repeat_interleave(rows)
    within = torch.arange(len(owner), device=rows.device) - (rows.cumsum(0) - rows)[owner]
    listed = pairs.long()[used[owner, 2] + within]
    right = (
        torch.equal(listed.sort().values, live)
        and torch.equal(batch.mapping.long()[listed // top_k], used[owner, 0])
        and torch.equal(batch.topk_ids.reshape(-1).long()[listed], used[owner, 1])
    )
    if not right:
        raise WrongResult(
            "the tables of the route do not hold each live pair once, in its own block"
        )
