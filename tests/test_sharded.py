"""Adapters that are sharded over a process group, against fp64 and against the same adapters on one device."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
import torch.multiprocessing

import generated as kg
from kernelgen.cases.base import worst_ratio
from kernelgen.reference.moe_lora import moe_lora
from kernelgen.reference.moe_route import live_pairs
from tests import sharded_worker as worker
from tests.sharded_worker import EXPERTS, LORAS, N, PAIRS, TOKENS, TOP_K, WORLD

LIVE = live_pairs(worker.ids(), worker.mapping(), num_experts=EXPERTS, max_loras=LORAS, adapter_enabled=None, expert_map=None)
ASSIGNMENTS = ("naive", "sorted")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, torch.Tensor]]:
    """What each of two processes made."""
    if os.environ["TRITON_INTERPRET"] == "0" and torch.cuda.device_count() < WORLD:
        pytest.skip("needs as many GPUs as processes")
    backend = "gloo" if os.environ["TRITON_INTERPRET"] == "1" else "nccl"
    folder = tmp_path_factory.mktemp("sharded")
    arguments = (str(folder / "rendezvous"), str(folder), backend)
    torch.multiprocessing.spawn(worker.run, arguments, nprocs=WORLD)
    found = [torch.load(folder / f"{place}.pt") for place in range(WORLD)]
    for _, refused in found:
        assert all(word in refused for word in ("sharded_lora", "got", "wanted")), refused
    return [tensors for tensors, _ in found]


@pytest.mark.parametrize("assignment", ASSIGNMENTS)
def test_a_cut_along_the_rank(made: list[dict[str, torch.Tensor]], assignment: str) -> None:
    whole = worker.moe_operands(2, TOKENS)
    expected = moe_lora(*whole.values(), LIVE, topk_weights=None, add_inputs=True)
    gathered = [m[f"{assignment}_gather"].chunk(2, 2) for m in made]
    out = torch.cat([gathered[place][s] for s in range(2) for place in range(WORLD)], 2)
    worst_ratio(out, expected.out, expected.bound)


def test_a_gather_gives_the_bits_of_one_device(made: list[dict[str, torch.Tensor]], device: str) -> None:
    whole = worker.moe_operands(2, TOKENS)
    out, x, a, b = (v.to(device) if isinstance(v, torch.Tensor) else [w.to(device) for w in v] for v in whole.values())
    ids, mapping = worker.ids().to(device), worker.mapping().to(device)
    route = kg.moe_route(ids, mapping, num_experts=EXPERTS, max_loras=LORAS, assignment="sorted")
    y = torch.empty((2, PAIRS, worker.RANK), device=device)
    kg.moe_lora_shrink(y, x, a, route)
    kg.moe_lora_expand(out, y, b, route)
    for place in range(WORLD):
        columns = torch.cat([worker.part(c, 2, place) for c in out.chunk(2, 2)], 2)
        assert torch.equal(made[place]["sorted_gather"], columns.cpu())


@pytest.mark.parametrize("assignment", ASSIGNMENTS)
def test_a_cut_along_k(made: list[dict[str, torch.Tensor]], assignment: str) -> None:
    """Each device adds its columns; the engine's all-reduce of partial outputs adds nothing but the other's zeros."""
    whole = worker.moe_operands(1, PAIRS)
    weights = worker.normal(5, TOKENS, TOP_K)
    expected = moe_lora(*whole.values(), LIVE, topk_weights=weights, add_inputs=True)
    for place, tensors in enumerate(made):
        own = slice(N * place, N * (place + 1))
        out = tensors[f"{assignment}_reduce"]
        others = torch.ones(out.shape[2], dtype=torch.bool)
        others[own] = False
        start = whole["out"] if place == 0 else torch.zeros_like(out)
        assert torch.equal(out[..., others], start[..., others]), "columns of another device changed"
        if place == 0:
            exact, bound = expected.out, expected.bound
        else:
            exact, bound = moe_lora(start, *list(whole.values())[1:], LIVE, topk_weights=weights, add_inputs=True)
        worst_ratio(out[..., own], exact[..., own], bound[..., own])


@pytest.mark.parametrize("way", ["gather", "reduce"])
def test_a_linear_layer(made: list[dict[str, torch.Tensor]], way: str) -> None:
    """A linear layer is one of a single expert whose adapters' scaling is folded in; 0.5 does so without rounding."""
    whole = worker.dense_operands()
    if way == "reduce":
        whole["out"] = torch.zeros_like(whole["out"])
    live = live_pairs(
        *(torch.zeros((TOKENS, 1), dtype=torch.int32), worker.mapping()),
        num_experts=1,
        max_loras=LORAS,
        adapter_enabled=None,
        expert_map=None,
    )
    a, b = [w[:, None] for w in whole["lora_a"]], [0.5 * w[:, None] for w in whole["lora_b"]]
    expected = moe_lora(whole["out"][:, None], whole["x"], a, b, live, topk_weights=None, add_inputs=True)
    pieces = [m[f"dense_{way}"].chunk(2, 1) for m in made]
    out = torch.cat([pieces[place][s] for s in range(2) for place in range(WORLD)], 1)
    worst_ratio(out[:, None], expected.out, expected.bound)


@pytest.mark.parametrize("assignment", ASSIGNMENTS)
@pytest.mark.parametrize("op", ["experts", "experts_apart"])
def test_experts_of_other_devices(made: list[dict[str, torch.Tensor]], assignment: str, op: str) -> None:
    """Every pair is served by the device of its expert, also where its adapter is in the other's batch alone."""
    whole = worker.moe_operands(1, TOKENS)
    mapping = torch.tensor([0, 1, -1, 2, 0, 5, 1], dtype=torch.int32)
    live = live_pairs(
        *(worker.ids(), mapping), num_experts=EXPERTS, max_loras=LORAS, adapter_enabled=None, expert_map=None
    )
    operands = [torch.zeros_like(whole["out"]), *list(whole.values())[1:]]
    expected = moe_lora(*operands, live, topk_weights=None, add_inputs=True)
    one, other = (m[f"{assignment}_{op}"] for m in made)
    assert not (one.bool() & other.bool()).any(), "a pair is served twice"
    worst_ratio(one + other, expected.out, expected.bound)
