"""What holds for the runs of adapters through their front door."""

from __future__ import annotations

import importlib
import itertools
import random
from types import ModuleType
from typing import Any, Sequence

import torch

from kernelgen.families.buffers import poison_
from kernelgen.families.case import Law, Variant
from kernelgen.families.moe_adapters import KINDS, Adapters, Drawn
from kernelgen.families.moe_adapters import draw as draw_adapters
from kernelgen.families.moe_experts import Experts, Routed, draw
from kernelgen.families.moe_runs.reference import moe_runs

_TOKENS, _TOP_K, _EXPERTS = 24, 4, 6


def any_batch_is_complete(package: ModuleType, variants: Sequence[Variant], device: str) -> None:
    """For random sizes and kinds of batches, in a workspace that is used again; without tables nothing is made."""
    rng = random.Random(0)
    size = importlib.import_module(f"{package.__name__}.moe_runs._op").run_size(_TOKENS, _TOP_K, _EXPERTS)
    workspace = poison_(torch.empty(size, dtype=torch.int32, device=device))
    for number, (kind, routing) in enumerate(itertools.product(KINDS, ("spread", "mixed", "skewed"))):
        tokens, top_k, experts = (rng.randint(1, most) for most in (_TOKENS, _TOP_K, _EXPERTS))
        how = Experts(routing, rng.choice((0, 5)), rng.choice((None, 0, tokens // 2)))
        routed = draw(how, tokens, top_k, experts, rng, device)
        adapters = draw_adapters(Adapters(kind, 5, (1,) if number % 2 else ()), tokens, rng, device)
        tables, runs = _runs(package, routed, adapters, rng.choice((None, 1, 1000)), workspace=workspace)
        wanted = moe_runs(routed.local, adapters.of_token, top_k=top_k, block_m=tables.block_m)
        count, what = len(wanted.order), f"{tokens} tokens, {routing} experts, {kind} adapters"
        assert tables.pairs[:count].tolist() == [item.pair for item in wanted.order], what
        assert torch.equal(runs.run_of_row[:count].cpu(), wanted.run_of_row), what
        written = wanted.runs >= 0
        assert torch.equal(runs.runs[:count].cpu()[written], wanted.runs[written]), what
    bare, runs = _runs(package, routed, adapters, None, block_m=0)
    assert bare.pairs is None and bare.block_m == 0 and runs.runs is None and runs.max_loras == 5


def graph_replay(package: ModuleType, variants: Sequence[Variant], device: str) -> None:
    """A captured graph makes the runs of whatever routing and adapters it is replayed with."""
    tokens, top_k, experts = 300, 8, 32
    rng = random.Random(1)
    routed = draw(Experts(valid=tokens), tokens, top_k, experts, rng, device)
    adapters = draw_adapters(Adapters(loras=5, disabled=(1,)), tokens, rng, device)
    _runs(package, routed, adapters, 7)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        tables, runs = _runs(package, routed, adapters, 7)
    for kind, valid in itertools.product(KINDS, (0, 150, tokens)):
        other = draw(Experts("mixed", valid=valid), tokens, top_k, experts, rng, device)
        drawn = draw_adapters(Adapters(kind, 5, (2,)), tokens, rng, device)
        pairs: Any = (
            (routed.topk_ids, other.topk_ids),
            (routed.valid_tokens, other.valid_tokens),
            (adapters.token_lora_mapping, drawn.token_lora_mapping),
            (adapters.adapter_enabled, drawn.adapter_enabled),
        )
        for held, new in pairs:
            held.copy_(new)
        graph.replay()
        torch.cuda.synchronize()
        wanted = moe_runs(other.local, drawn.of_token, top_k=top_k, block_m=tables.block_m)
        count = len(wanted.order)
        assert tables.pairs[:count].tolist() == [item.pair for item in wanted.order], kind
        assert torch.equal(runs.run_of_row[:count].cpu(), wanted.run_of_row), kind


LAWS = (Law(any_batch_is_complete), Law(graph_replay, needs_gpu=True))


def _runs(package: ModuleType, routed: Routed, adapters: Drawn, hint: int | None, **given: Any) -> Any:
    return package.moe_runs(
        routed.topk_ids,
        adapters.token_lora_mapping,
        num_experts=routed.num_experts,
        max_loras=adapters.loras,
        adapter_enabled=adapters.adapter_enabled,
        valid_tokens=routed.valid_tokens,
        local_expert_start=routed.start,
        num_tokens_hint=hint,
        **given,
    )
