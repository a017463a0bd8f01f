"""The rows of each expert by adapter, and the runs of one adapter in every block."""

from __future__ import annotations

from typing import NamedTuple, Sequence

import torch

from kernelgen.families.moe_align.reference import Local, moe_align

Adapters = Sequence["int | None"]  # of each token, None: it has none


class Tables(NamedTuple):
    """Local pairs by (expert, adapter, pair), those without an adapter first, and what the blocks of moe_align hold of them."""

    order: list[Local]
    blocks: torch.Tensor  # [blocks, 3] int32: expert, first, rows
    run_of_row: torch.Tensor  # [local pairs] int32, the run of each row in its block, -1: no adapter
    runs: torch.Tensor  # [local pairs, 2] int32: adapter, first row; those of a block from its first row on, behind them -1


def adapters_of(token_lora_mapping: torch.Tensor, max_loras: int, adapter_enabled: torch.Tensor | None) -> list[int | None]:
    """The adapter of each token that is in [0, max_loras) and enabled."""
    enabled = [1] * max_loras if adapter_enabled is None else adapter_enabled.tolist()
    return [a if 0 <= a < max_loras and enabled[a] else None for a in token_lora_mapping.tolist()]


def moe_runs(local: Sequence[Local], adapters: Adapters, *, top_k: int, block_m: int) -> Tables:
    """The tables of a batch."""

    def adapter(item: Local) -> int:
        found = adapters[item.pair // top_k]
        return -1 if found is None else found

    order = sorted(local, key=lambda item: (item.expert, adapter(item), item.pair))
    blocks = moe_align(local, block_m=block_m).blocks
    run_of_row = torch.full((len(order),), -1, dtype=torch.int32)
    runs = torch.full((len(order), 2), -1, dtype=torch.int32)
    for _, first, rows in blocks.tolist():
        count, last = 0, -1
        for row in range(first, first + rows):
            if adapter(order[row]) > last:
                last = adapter(order[row])
                runs[first + count] = torch.tensor([last, row])
                count += 1
            run_of_row[row] = count - 1
    return Tables(order, blocks, run_of_row, runs)


def with_ranks(runs: torch.Tensor, ranks: Sequence[int]) -> torch.Tensor:
    """Runs as they are where adapters say how many of their ranks count: in sixteens beside the adapter."""
    ranked = runs.clone()
    for row in (runs[:, 0] >= 0).nonzero().flatten().tolist():
        ranked[row, 0] += 4096 * -(-min(max(ranks[int(runs[row, 0])], 0), 65536) // 16)
    return ranked
