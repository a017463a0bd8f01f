"""Which pairs are live, and the tables that order them."""

from __future__ import annotations

from typing import Iterator, NamedTuple, Sequence

import torch


class Live(NamedTuple):
    """A pair p = t * top_k + j that has a delta: its adapter and its (local) expert."""

    pair: int
    adapter: int
    expert: int


class Tables(NamedTuple):
    """Live pairs by (adapter, expert), and the blocks that they are cut into."""

    pairs: torch.Tensor  # [live pairs] int32
    blocks: torch.Tensor  # [blocks, 4] int32: adapter, expert, first, rows


def live_pairs(
    topk_ids: torch.Tensor,
    token_lora_mapping: torch.Tensor,
    *,
    num_experts: int,
    max_loras: int,
    adapter_enabled: torch.Tensor | None = None,
    expert_map: torch.Tensor | None = None,
) -> list[Live]:
    """The live pairs in ascending order.

    A pair is live when its adapter is in [0, max_loras) and enabled, and its expert, after ``expert_map``, is in
    [0, num_experts). An expert outside of ``expert_map`` is not here.

    Args:
        topk_ids: [T, top_k], the experts of each token.
        token_lora_mapping: [T], the adapter of each token, -1: none.
        adapter_enabled: [>= max_loras], 0: disabled; None: all are enabled.
        expert_map: [global experts], local expert or -1; None: ids are local.
    """
    top_k = topk_ids.shape[1]
    adapters, experts = token_lora_mapping.tolist(), topk_ids.flatten().tolist()
    enabled = None if adapter_enabled is None else adapter_enabled.tolist()
    local = None if expert_map is None else expert_map.tolist()
    live = []
    for pair, named in enumerate(experts):
        adapter, expert = adapters[pair // top_k], named
        if not 0 <= adapter < max_loras or (enabled is not None and enabled[adapter] == 0):
            continue
        if local is not None:
            expert = local[named] if 0 <= named < len(local) else -1
        if 0 <= expert < num_experts:
            live.append(Live(pair, adapter, expert))
    return live


def moe_route(live: list[Live], *, block_m: int) -> Tables:
    """The tables of a sorted assignment: live pairs by (adapter, expert, pair), cut into blocks of at most ``block_m``."""
    ordered = sorted(live, key=lambda item: (item.adapter, item.expert, item.pair))
    blocks: list[tuple[int, int, int, int]] = []
    for position, (_, adapter, expert) in enumerate(ordered):
        if blocks and blocks[-1][:2] == (adapter, expert) and blocks[-1][3] < block_m:
            blocks[-1] = (*blocks[-1][:3], blocks[-1][3] + 1)
        else:
            blocks.append((adapter, expert, position, 1))
    return _tables([item.pair for item in ordered], blocks)


def by_first_token(tables: Tables) -> Tables:
    """The same blocks, in the order of the first pair of each."""
    firsts = tables.pairs[tables.blocks[:, 2].long()]
    return tables._replace(blocks=tables.blocks[firsts.argsort()])


class PaddedTables(NamedTuple):
    """The tables of an engine: row l lists the pairs of adapter l, each group of an expert padded to whole blocks."""

    sorted_token_ids: torch.Tensor  # [L, EM] int32; padding is >= the number of pairs
    expert_ids: torch.Tensor  # [L, ceil(EM / block_size)] int32, -1: no block
    num_tokens_post_padded: torch.Tensor  # [L] int32


def padded_tables(
    groups: Sequence[tuple[int, int, Sequence[int]]],
    *,
    num_pairs: int,
    max_loras: int,
    row_size: int,
    block_size: int,
) -> PaddedTables:
    """The tables as an engine makes them of ``groups``: (adapter, expert, pairs), in the order of the rows.

    Entries behind those that count name pair 0 and expert 0, as an older batch may have left them.

    Args:
        num_pairs: T * top_k, which is also the padding inside of a group.
        row_size: EM, entries of a row; it may cut off padding of the last block.
    """
    row_blocks = -(-row_size // block_size)
    tokens = torch.zeros((max_loras, row_size), dtype=torch.int32)
    experts = torch.zeros((max_loras, row_blocks), dtype=torch.int32)
    counts = torch.zeros(max_loras, dtype=torch.int32)
    for adapter, expert, pairs in groups:
        first = int(counts[adapter])
        entries = [*pairs, *[num_pairs] * (-len(pairs) % block_size)]
        counts[adapter] = first + len(entries)
        experts[adapter, first // block_size : int(counts[adapter]) // block_size] = expert
        kept = entries[: row_size - first]
        tokens[adapter, first : first + len(kept)] = torch.tensor(kept, dtype=torch.int32)
    return PaddedTables(tokens, experts, counts)


def from_padded(
    tables: PaddedTables,
    *,
    num_pairs: int,
    num_experts: int,
    block_size: int,
    lora_ids: torch.Tensor | None = None,
    adapter_enabled: torch.Tensor | None = None,
) -> list[tuple[int, int, list[int]]]:
    """(adapter, expert, pairs) of every block that counts, in the order of the tables."""
    named = None if lora_ids is None else set(lora_ids.tolist())
    found = []
    for adapter, (row, experts, count) in enumerate(
        zip(*(t.tolist() for t in tables), strict=True)
    ):
        disabled = adapter_enabled is not None and int(adapter_enabled[adapter]) == 0
        if disabled or (named is not None and adapter not in named):
            continue
        for block, expert in enumerate(experts):
            first = block * block_size
            if first < count and 0 <= expert < num_experts:
                entries = row[first : first + block_size]
                found.append((adapter, expert, [p for p in entries if 0 <= p < num_pairs]))
    return found


def faults(
    live: list[Live], pairs: torch.Tensor, blocks: torch.Tensor, *, block_m: int
) -> Iterator[str]:
    """What is wrong with ``pairs`` and the ``blocks`` [n, 4] that count: a pair that is lost, doubled or misplaced."""
    wanted = {item.pair: item for item in live}
    order = pairs.tolist()
    for adapter, expert, first, rows in blocks.tolist():
        if not 0 <= rows <= block_m or not 0 <= first <= len(order) - rows:
            yield f"block {(adapter, expert, first, rows)} does not fit {len(order)} pairs, {block_m} rows"
            continue
        for pair in order[first : first + rows]:
            item = wanted.pop(pair, None)
            if item is None:
                yield f"pair {pair} is listed twice, or is not live"
            elif (item.adapter, item.expert) != (adapter, expert):
                yield f"pair {pair} of {item[1:]} is listed under {(adapter, expert)}"
    if wanted:
        yield f"pairs {sorted(wanted)} are lost"


def _tables(pairs: list[int], blocks: list[tuple[int, int, int, int]]) -> Tables:
    return Tables(
        torch.tensor(pairs, dtype=torch.int32),
        torch.tensor(blocks, dtype=torch.int32).reshape(-1, 4),
    )
