"""How operands are drawn: numbers, FP8 codes with their scales, the routing of a batch, and as many batches as pass the cache."""

from __future__ import annotations

import math

import torch

from kernelgen.measure.suite import GROUP, MX_GROUP, Act, Quant, scale_shape
from kernelgen.measure.suites.mixtures import MixtureCell, Routing

DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16}
FP8 = torch.float8_e4m3fn
TOUCHED_BYTES = 200e6  # by one replay, three times the L2 of an H200: every weight comes from memory
WEIGHT_BYTES = 1.6e9  # of distinct weights to draw from
MAX_SETS, MAX_ACTIVATIONS = 512, 16
_FP8_SIZE = 48.0  # of a code: far from both ends of e4m3
_HOT_SHARE, _HOT_PAIRS = 0.25, 0.9  # skewed routing
_AT_ONCE = 1 << 16  # numbers of a routing that are drawn together


def sets(bytes_a_call: float, most: int = MAX_SETS) -> int:
    """How many batches one replay needs to pass the L2 cache."""
    return min(most, max(4, math.ceil(TOUCHED_BYTES / bytes_a_call)))


def normal(*shape: int, size: float = 1.0, dtype: torch.dtype = torch.bfloat16, device: torch.device) -> torch.Tensor:
    """Random numbers of about ``size``."""
    return torch.empty(shape, dtype=dtype, device=device).normal_(0.0, size)


Matrix = tuple[torch.Tensor, "torch.Tensor | None"]  # and its scales, where it is FP8


def matrix(
    scales: Quant | Act,
    *shape: int,
    size: float = 1.0,
    dtype: torch.dtype = torch.bfloat16,
    group_rows: int = GROUP,
    device: torch.device,
) -> Matrix:
    """Matrices [..., rows, columns] of numbers of about ``size``.

    Scales of FP8 differ by up to a factor of seven, of MXFP4 by up to four: one from a wrong place shows.
    """
    if scales == "mx":
        *rows, columns = shape
        codes = torch.randint(0, 256, (*rows, columns // 2), dtype=torch.uint8, device=device)
        middle = 125 + round(math.log2(size))  # codes are about 4
        return codes, torch.randint(middle - 1, middle + 2, (*rows, columns // MX_GROUP), dtype=torch.uint8, device=device)
    if scales == "none":
        return normal(*shape, size=size, dtype=dtype, device=device), None
    codes = normal(*shape, size=_FP8_SIZE, dtype=dtype, device=device)
    largest = torch.finfo(FP8).max
    of = (*shape[:-2], *scale_shape(scales, shape[-2], shape[-1], group_rows)) or (1,)
    spread = torch.empty(of, dtype=torch.float32, device=device).uniform_(0.25, 1.75)
    return codes.clamp_(-largest, largest).to(FP8), spread.mul_(size / _FP8_SIZE)


def experts(cell: MixtureCell, count: int, device: torch.device) -> torch.Tensor:
    """The experts of each token of ``count`` batches, [count, T, top_k] int32: different ones, each set by itself."""
    logits = _log_odds(cell.routing, count, cell.model.experts, device)
    together = max(1, _AT_ONCE // (cell.tokens * cell.model.experts))
    chosen = []
    for at in range(0, count, together):
        part = logits[at : at + together]
        # Gumbel noise on log-odds: the top k are a draw without replacement.
        noise = torch.rand(len(part), cell.tokens, cell.model.experts, device=device).log().neg().log()
        chosen.append((part - noise).topk(cell.model.top_k, dim=-1).indices)
    return torch.cat(chosen).to(torch.int32)


def _log_odds(routing: Routing, count: int, experts: int, device: torch.device) -> torch.Tensor:
    if routing == "uniform":
        return torch.zeros(count, 1, experts, device=device)
    hot = max(1, round(_HOT_SHARE * experts))
    odds = torch.full((experts,), (1.0 - _HOT_PAIRS) / max(1, experts - hot), device=device)
    odds[:hot] = _HOT_PAIRS / hot
    order = torch.rand(count, experts, device=device).argsort(-1)  # other experts in each set
    return odds.log()[order].view(count, 1, experts)


def mappings(tokens: int, count: int, active: int, slots: int, base: float, device: torch.device) -> torch.Tensor:
    """The adapter of each token of ``count`` batches, [count, T] int32, -1: none. Adapters in turn over the tokens that have one,
    base tokens spread evenly; both move on from set to set.
    """
    if base >= 1.0 or active == 0:
        return torch.full((count, tokens), -1, dtype=torch.int32, device=device)
    at = torch.arange(tokens, device=device)[None] + torch.arange(count, device=device)[:, None]
    live = ((at + 1) * base).floor() == (at * base).floor()
    turn = live.cumsum(1) + torch.arange(count, device=device)[:, None]
    slot = turn % active * slots // active
    return torch.where(live, slot, -1).to(torch.int32)


def groups_hit(group: torch.Tensor, groups: int) -> float:
    """How many of ``groups`` a batch hits on average; ``group`` [sets, ...], negative: none."""
    count = group.shape[0]
    hit = torch.zeros(count, groups + 1, dtype=torch.bool, device=group.device)
    hit.scatter_(1, torch.where(group >= 0, group, groups).view(count, -1).long(), True)
    return hit[:, :groups].sum().item() / count
