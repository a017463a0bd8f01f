"""What each process of a tensor-parallel group does in the tests of sharded adapters."""

from __future__ import annotations

import os
from typing import Any

import torch
import torch.distributed as dist

WORLD = 2
TOKENS, TOP_K, EXPERTS, LORAS, K, N, RANK = 7, 2, 4, 3, 128, 24, 16
PAIRS = TOKENS * TOP_K


device = "cpu"  # of a process


def normal(seed: int, *size: int) -> torch.Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed)).to(device)


def mapping() -> torch.Tensor:
    return torch.tensor([0, 1, -1, 2, 0, 5, 1], dtype=torch.int32, device=device)


def ids() -> torch.Tensor:
    return torch.randint(0, EXPERTS, (TOKENS, TOP_K), generator=torch.Generator().manual_seed(3)).int().to(device)


def moe_operands(slices: int, rows: int) -> dict[str, Any]:
    """A projection of an MoE layer, whole: out, x, lora_a, lora_b."""
    return {
        "out": normal(0, TOKENS, TOP_K, slices * N * WORLD).bfloat16(),
        "x": normal(1, rows, K).bfloat16(),
        "lora_a": [(normal(10 + s, LORAS, EXPERTS, RANK, K) / K**0.5).bfloat16() for s in range(slices)],
        "lora_b": [(normal(20 + s, LORAS, EXPERTS, N * WORLD, RANK) / RANK**0.5).bfloat16() for s in range(slices)],
    }


def dense_operands() -> dict[str, Any]:
    """A linear layer of two slices, whole."""
    return {
        "out": normal(0, TOKENS, 2 * N * WORLD).bfloat16(),
        "x": normal(1, TOKENS, K).bfloat16(),
        "lora_a": [(normal(10 + s, LORAS, RANK, K) / K**0.5).bfloat16() for s in range(2)],
        "lora_b": [(normal(20 + s, LORAS, N * WORLD, RANK) / RANK**0.5).bfloat16() for s in range(2)],
    }


def part(tensor: torch.Tensor, dim: int, place: int) -> torch.Tensor:
    return tensor.chunk(WORLD, dim)[place].contiguous()


def run(place: int, port_file: str, results: str, backend: str) -> None:
    """All of the sharded calls of one process; what they made goes to a file."""
    global device
    torch.set_num_threads(1)
    if os.environ["TRITON_INTERPRET"] == "1":
        from kernelgen import interpreter

        interpreter.install()
    if backend == "nccl":
        device = f"cuda:{place}"
        torch.cuda.set_device(place)
    dist.init_process_group(backend, init_method=f"file://{port_file}", rank=place, world_size=WORLD)
    import generated as kg
    from kernelgen.integrations.sharded import all_gather, sharded_lora, sharded_moe_lora

    made: dict[str, torch.Tensor] = {}
    for assignment in ("naive", "sorted"):
        route = kg.moe_route(ids(), mapping(), num_experts=EXPERTS, max_loras=LORAS, assignment=assignment)
        whole = moe_operands(2, TOKENS)  # w13: columns are sharded
        columns = torch.cat([part(c, 2, place) for c in whole["out"].chunk(2, 2)], 2)
        a = [part(w, 2, place) for w in whole["lora_a"]]
        b = [part(w, 2, place) for w in whole["lora_b"]]
        sharded_moe_lora(kg, columns, whole["x"], a, b, route)
        made[f"{assignment}_gather"] = columns
        whole = moe_operands(1, PAIRS)  # w2: rows are sharded, and the base's partial sums with them
        out = whole["out"] if place == 0 else torch.zeros_like(whole["out"])
        x, a, b = part(whole["x"], 1, place), [part(whole["lora_a"][0], 3, place)], [part(whole["lora_b"][0], 2, place)]
        weights = normal(5, TOKENS, TOP_K)
        sharded_moe_lora(
            *(kg, out, x, a, b, route), offset=N * place, topk_weights=weights, mul_routed_weight=True
        )
        made[f"{assignment}_reduce"] = out

    route = kg.lora_route(mapping(), max_loras=LORAS)
    whole = dense_operands()
    columns = torch.cat([part(c, 1, place) for c in whole["out"].chunk(2, 1)], 1)
    a, b = [part(w, 1, place) for w in whole["lora_a"]], [part(w, 1, place) for w in whole["lora_b"]]
    sharded_lora(kg, columns, whole["x"], a, b, route, scaling=0.5)
    made["dense_gather"] = columns
    a, x = [part(w, 2, place) for w in whole["lora_a"]], part(whole["x"], 1, place)
    sharded_lora(kg, columns := torch.zeros_like(columns), x, a, b, route, scaling=0.5)
    made["dense_reduce"] = columns

    refused = ""
    try:
        sharded_lora(kg, columns, x, [w[:, :3].contiguous() for w in a], b, route)
    except ValueError as error:
        refused = str(error)

    # Expert parallelism: a GPU has half of the experts and, of its own requests, the first tokens or the others. The
    # adapters of the others' tokens are not in its own batch.
    own = mapping()[:4] if place == 0 else torch.tensor([0, 5, 1, -1], dtype=torch.int32, device=device)
    gathered = own.new_empty(WORLD * 4)
    all_gather(gathered, own)
    local = EXPERTS // WORLD
    expert_map = torch.full((EXPERTS,), -1, dtype=torch.int32, device=device)
    expert_map[place * local : (place + 1) * local] = torch.arange(local, dtype=torch.int32, device=device)
    whole = moe_operands(1, TOKENS)
    for assignment in ("naive", "sorted"):
        route = kg.moe_route(
            *(ids(), gathered[:TOKENS].contiguous()), num_experts=local, max_loras=LORAS, expert_map=expert_map, assignment=assignment
        )
        delta = torch.zeros_like(whole["out"])
        here = slice(place * local, (place + 1) * local)
        a, b = ([w[:, here] for w in whole[name]] for name in ("lora_a", "lora_b"))
        kg.moe_lora(delta, whole["x"], a, b, route)
        apart = torch.zeros_like(delta)
        y = torch.empty((1, PAIRS, RANK), device=device)
        kg.moe_lora_shrink(y, whole["x"], a, route)
        kg.moe_lora_expand(apart, y, b, route)
        made[f"{assignment}_experts"], made[f"{assignment}_experts_apart"] = delta, apart

    made = {name: tensor.cpu() for name, tensor in made.items()}
    torch.save((made, refused), os.path.join(results, f"{place}.pt"))
    dist.destroy_process_group()
