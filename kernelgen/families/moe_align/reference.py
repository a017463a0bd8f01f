"""Which pairs of a base MoE layer are local, and the tables that order them."""

from __future__ import annotations

from typing import Iterator, NamedTuple, Sequence

import torch


class Local(NamedTuple):
    """A pair p = t * top_k + j whose expert is here, under its local number."""

    pair: int
    expert: int


class Tables(NamedTuple):
    """Local pairs by (expert, pair), and the blocks that they are cut into."""

    pairs: torch.Tensor  # [local pairs] int32
    blocks: torch.Tensor  # [blocks, 3] int32: expert, first, rows


def local_pairs(
    topk_ids: torch.Tensor, *, num_experts: int, local_expert_start: int, valid_tokens: int | None
) -> list[Local]:
    """The local pairs in ascending order.

    A pair is local when its token is below ``valid_tokens`` (None: all are) and its expert, less ``local_expert_start``, is
    in [0, num_experts).
    """
    num_tokens, top_k = topk_ids.shape
    count = num_tokens if valid_tokens is None else min(max(valid_tokens, 0), num_tokens)
    experts = [expert - local_expert_start for expert in topk_ids.flatten().tolist()]
    return [
        Local(pair, expert)
        for pair, expert in enumerate(experts[: count * top_k])
        if 0 <= expert < num_experts
    ]


def local_ids(topk_ids: torch.Tensor, expert_map: torch.Tensor) -> torch.Tensor:
    """expert_map[id] of each id, -1 where it is not in the map."""
    local = expert_map.tolist()
    found = [local[id] if 0 <= id < len(local) else -1 for id in topk_ids.flatten().tolist()]
    return torch.tensor(found, dtype=torch.int32).view(topk_ids.shape)


def moe_align(local: Sequence[Local], *, block_m: int) -> Tables:
    """The tables: local pairs by (expert, pair), those of an expert cut into blocks of at most ``block_m``."""
    ordered = sorted(local, key=lambda item: (item.expert, item.pair))
    blocks: list[tuple[int, int, int]] = []
    for position, (_, expert) in enumerate(ordered):
        if blocks and blocks[-1][0] == expert and blocks[-1][2] < block_m:
            blocks[-1] = (*blocks[-1][:2], blocks[-1][2] + 1)
        else:
            blocks.append((expert, position, 1))
    return Tables(
        torch.tensor([item.pair for item in ordered], dtype=torch.int32),
        torch.tensor(blocks, dtype=torch.int32).reshape(-1, 3),
    )


def faults(
    local: Sequence[Local], pairs: torch.Tensor, blocks: torch.Tensor, *, block_m: int
) -> Iterator[str]:
    """What is wrong with ``pairs`` and the ``blocks`` that count: a pair that is lost, doubled or misplaced."""
    wanted = dict(local)
    order = pairs.tolist()
    for expert, first, rows in blocks.tolist():
        if not 1 <= rows <= block_m or not 0 <= first <= len(order) - rows:
            yield f"block {(expert, first, rows)} does not fit {len(order)} pairs, {block_m} rows"
            continue
        for pair in order[first : first + rows]:
            home = wanted.pop(pair, None)
            if home is None:
                yield f"pair {pair} is listed twice, or is not local"
            elif home != expert:
                yield f"pair {pair} of {home} is listed under {expert}"
    if wanted:
        yield f"pairs {sorted(wanted)} are lost"
