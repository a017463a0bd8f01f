"""Adapters that are sharded over two processes: gloo on the CPU, interpreted; NCCL where there are two GPUs.

Both processes make all inputs, cut them, and compare their own columns with the unsharded layer in fp64.
"""

from __future__ import annotations

import concurrent.futures
import datetime
import functools
import threading
from pathlib import Path
from typing import Any, Callable, NamedTuple, Sequence

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing

import generated as kg
from generated._runtime import INTERPRETED
from kernelgen.families.case import worst_ratio
from kernelgen.families.moe_lora import reference
from kernelgen.families.moe_route.reference import Live, live_pairs
from kernelgen.integrations import sharded
from kernelgen.prove import interpreter

if INTERPRETED:
    interpreter.install()  # the processes of a group read no conftest

SHARDS = 2
LORAS, EXPERTS, TOP_K, K, N = 3, 4, 2, 48, 40


class Here(NamedTuple):
    """A process of the group."""

    index: int
    device: str


class Layer(NamedTuple):
    """An MoE layer, with tokens of all adapters and of none; adapter 1 is disabled."""

    x: torch.Tensor
    out: torch.Tensor  # [T, top_k, S * N]
    a: list[torch.Tensor]
    b: list[torch.Tensor]
    ids: torch.Tensor
    mapping: torch.Tensor
    enabled: torch.Tensor
    weights: torch.Tensor

    @property
    def live(self) -> list[Live]:
        limits = {"num_experts": EXPERTS, "max_loras": LORAS, "adapter_enabled": self.enabled.cpu()}
        return live_pairs(self.ids.cpu(), self.mapping.cpu(), **limits)

    def route(self, assignment: str, **options: Any) -> Any:
        limits = {"num_experts": EXPERTS, "max_loras": LORAS, "adapter_enabled": self.enabled}
        return kg.moe_route(self.ids, self.mapping, assignment=assignment, **limits, **options)


def layer(device: str, dtype: torch.dtype, tokens: int, slices: int, rank: int, *, pair_rows: bool) -> Layer:
    generator = torch.Generator().manual_seed(rank + tokens)

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=generator).to(device, dtype)

    ids = torch.stack([torch.randperm(EXPERTS, generator=generator)[:TOP_K] for _ in range(tokens)])
    return Layer(
        normal(tokens * TOP_K if pair_rows else tokens, K),
        normal(tokens, TOP_K, slices * N),
        [normal(LORAS, EXPERTS, rank, K) for _ in range(slices)],
        [normal(LORAS, EXPERTS, N, rank) for _ in range(slices)],
        ids.to(device),
        torch.tensor([0, 2, -1, 1, 2, 0, 2], dtype=torch.int32, device=device)[:tokens],
        torch.tensor([1, 0, 1], dtype=torch.int32, device=device),
        torch.rand((tokens, TOP_K), generator=generator).to(device),
    )


def check(got: torch.Tensor, wanted: reference.Expected, columns: Sequence[int] | slice) -> None:
    worst_ratio(got.cpu(), wanted.out[..., columns], wanted.bound[..., columns])


def poisoned(rows: int, slices: int, rank: int, device: str) -> torch.Tensor:
    memory = sharded.sharded_workspace(max_rows=rows, num_slices=slices, max_rank=rank, device=device)
    return memory.fill_(torch.nan)


def moe_column_parallel(here: Here, assignment: str, dtype: torch.dtype, rank: int) -> None:
    """Gate and up: parts of the rank are gathered, and each process has half of the columns of each slice."""
    full = layer(here.device, dtype, 5, 2, rank, pair_rows=False)
    wanted = reference.moe_lora(
        *(tensor.cpu() for tensor in (full.out, full.x)),
        *([m.cpu() for m in matrices] for matrices in (full.a, full.b)),
        full.live,
        topk_weights=None,
        add_inputs=True,
    )
    half = N // SHARDS
    columns = [s * N + here.index * half + n for s in range(2) for n in range(half)]
    out = full.out[..., columns].contiguous()
    single = out.clone()
    a, b = sharded.column_shard(full.a, full.b, here.index, SHARDS)
    memory = poisoned(5 * TOP_K, 2, rank, here.device)
    route = full.route(assignment)
    sharded.sharded_moe_lora(kg, out, full.x, a, b, route, workspace=memory)
    check(out, wanted, columns)
    y = torch.empty((2, 5 * TOP_K, rank), device=here.device)
    kg.moe_lora_shrink(y, full.x, full.a, route)
    kg.moe_lora_expand(single, y, b, route)
    if assignment == "sorted":
        assert torch.equal(out, single), "not the bits of one GPU"


def moe_row_parallel(here: Here, assignment: str, dtype: torch.dtype, rank: int) -> None:
    """Down: sums over parts of K are added up, and each process adds to half of the columns of a full output."""
    full = layer(here.device, dtype, 7, 1, rank, pair_rows=True)
    wanted = reference.moe_lora(
        *(tensor.cpu() for tensor in (full.out, full.x)),
        *([m.cpu() for m in matrices] for matrices in (full.a, full.b)),
        full.live,
        topk_weights=full.weights.cpu(),
        add_inputs=True,
    )
    half, part = N // SHARDS, K // SHARDS
    mine = slice(here.index * half, (here.index + 1) * half)
    x = full.x[:, here.index * part : (here.index + 1) * part].contiguous()
    out = full.out.clone()
    a, b = sharded.row_shard(full.a, full.b, here.index, SHARDS)
    options = {"topk_weights": full.weights, "mul_routed_weight": True, "offset": here.index * half}
    memory = poisoned(7 * TOP_K, 1, rank, here.device)
    sharded.sharded_moe_lora(kg, out, x, a, b, full.route(assignment), workspace=memory, **options)
    check(out[..., mine], wanted, mine)
    others = slice((1 - here.index) * half, (2 - here.index) * half)
    assert torch.equal(out[..., others], full.out[..., others]), "columns of the other process were touched"


def dense(here: Here, form: str, dtype: torch.dtype, rank: int, *, lent: bool = True) -> None:
    """A linear layer of two slices (column-parallel) or one (row-parallel): an MoE of one expert, as far as fp64 is concerned."""
    tokens, slices = 7, 2 if form == "column" else 1
    full = layer(here.device, dtype, tokens, slices, rank, pair_rows=False)
    a, b = ([m[:, 0].contiguous() for m in matrices] for matrices in (full.a, full.b))
    base = full.out[:, 0].contiguous()
    live = [Live(t, adapter, 0) for t, adapter in enumerate(full.mapping.tolist()) if adapter >= 0]
    wanted = reference.moe_lora(
        base[:, None].cpu(),
        full.x.cpu(),
        [m.cpu()[:, None] * 0.5 for m in a],  # scaled, exactly
        [m.cpu()[:, None] for m in b],
        live,
        topk_weights=None,
        add_inputs=True,
    )
    half, part = N // SHARDS, K // SHARDS
    route = kg.lora_route(full.mapping, max_loras=LORAS)
    if form == "column":
        columns = [s * N + here.index * half + n for s in range(slices) for n in range(half)]
        out, x, offset = base[:, columns].contiguous(), full.x, 0
        shards = sharded.column_shard(a, b, here.index, SHARDS)
    else:
        columns = list(range(here.index * half, (here.index + 1) * half))
        out, x, offset = base.clone(), full.x[:, here.index * part : (here.index + 1) * part], columns[0]
        shards = sharded.row_shard(a, b, here.index, SHARDS)
    assert all(part.is_contiguous() for side in shards for part in side), "the memory of the whole is kept"
    memory = poisoned(tokens, slices, rank, here.device) if lent else None
    sharded.sharded_lora(kg, out, x, *shards, route, scaling=0.5, offset=offset, workspace=memory)
    check((out if form == "column" else out[:, columns])[:, None], wanted, columns)
    if form == "row":
        others = [n for n in range(N) if n not in columns]
        assert torch.equal(out[:, others], base[:, others]), "columns of the other process were touched"


def expert_parallel(here: Here, assignment: str) -> None:
    """Each process has half of the experts, and tokens of adapters that the other's tokens do not have."""
    full = layer(here.device, torch.bfloat16, 6, 1, 16, pair_rows=False)
    mapping = torch.tensor([0, -1, 0, 2, 2, -1], dtype=torch.int32, device=here.device)
    full = full._replace(out=torch.zeros_like(full.out), mapping=mapping)
    wanted = reference.moe_lora(
        *(tensor.cpu() for tensor in (full.out, full.x)),
        *([m.cpu() for m in matrices] for matrices in (full.a, full.b)),
        full.live,
        topk_weights=None,
        add_inputs=True,
    )
    tokens, experts = 3, EXPERTS // SHARDS
    mine = slice(here.index * tokens, (here.index + 1) * tokens)

    def gathered(rows: torch.Tensor) -> torch.Tensor:
        parts = [torch.empty_like(rows) for _ in range(SHARDS)]
        dist.all_gather(parts, rows.contiguous())
        return torch.cat(parts)

    x, ids, adapters = (gathered(rows[mine]) for rows in (full.x, full.ids, full.mapping))
    local = slice(here.index * experts, (here.index + 1) * experts)
    expert_map = torch.full((EXPERTS,), -1, dtype=torch.int32, device=here.device)
    expert_map[local] = torch.arange(experts, dtype=torch.int32, device=here.device)
    limits = {"num_experts": experts, "max_loras": LORAS, "adapter_enabled": full.enabled, "expert_map": expert_map}
    route = kg.moe_route(ids, adapters, assignment=assignment, **limits)
    out = torch.zeros_like(full.out)
    kg.moe_lora(out, x, [a[:, local] for a in full.a], [b[:, local] for b in full.b], route)
    total = out.float()
    dist.all_reduce(total)  # a pair has one expert, so nothing but zeroes is added
    check(total.to(out.dtype)[mine], reference.Expected(wanted.out[mine], wanted.bound[mine]), slice(None))


def a_graph_serves_other_batches(here: Here) -> None:
    """NCCL alone: a captured call gives the bits of an eager one, with other tokens, adapters and experts."""
    batches = [layer(here.device, torch.bfloat16, tokens, 2, 16, pair_rows=False) for tokens in (7, 7)]
    first, second = batches[0], batches[1]
    second.x.mul_(-0.5)
    second.mapping.copy_(second.mapping.flip(0))
    second.ids.copy_(second.ids.flip(0))
    a, b = sharded.column_shard(first.a, first.b, here.index, SHARDS)
    columns = slice(0, N)
    sizes = {"top_k": TOP_K, "num_experts": EXPERTS, "max_loras": LORAS, "max_rank": 16, "num_slices": 2}
    workspace = kg.moe_workspace(max_tokens=7, device=here.device, **sizes)
    memory = sharded.sharded_workspace(max_rows=14, num_slices=2, max_rank=16, device=here.device)

    def run(batch: Layer, out: torch.Tensor) -> None:
        route = batch.route("sorted", workspace=workspace)
        sharded.sharded_moe_lora(kg, out, batch.x, a, b, route, workspace=memory)

    wanted = [batch.out[..., columns].contiguous() for batch in batches]
    for batch, out in zip(batches, wanted, strict=True):
        run(batch, out)
    out = first.out[..., columns].contiguous()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run(first, out)
    for batch, expected in zip(batches, wanted, strict=True):
        for held, new in zip(first[:2] + first[4:6], batch[:2] + batch[4:6], strict=True):
            held.copy_(new)
        out.copy_(batch.out[..., columns])
        graph.replay()
        assert torch.equal(out, expected)


def a_rank_that_does_not_fit_is_refused(here: Here) -> None:
    full = layer(here.device, torch.bfloat16, 5, 1, 16, pair_rows=False)
    a, _ = sharded.column_shard(full.a, full.b, here.index, SHARDS)
    with pytest.raises(ValueError, match="rank of lora_a: got 8, wanted 48"):
        sharded.sharded_moe_lora(kg, full.out, full.x, a, full.a, full.route("naive"))
    for workspace in (full.x, full.x.new_zeros(4096), poisoned(1, 1, 16, here.device)):
        with pytest.raises(ValueError, match="workspace: got"):
            sharded.sharded_moe_lora(kg, full.out, full.x, full.a, full.b, full.route("naive"), workspace=workspace)
    with pytest.raises(ValueError, match="multiple of 3"):
        sharded.column_shard(full.a, full.b, 0, 3)


CHECKS: tuple[tuple[Callable[..., None], tuple[Any, ...]], ...] = (
    (moe_column_parallel, ("naive", torch.bfloat16, 20)),  # 10 ranks a process
    (moe_column_parallel, ("sorted", torch.float16, 16)),
    (moe_column_parallel, ("sorted", torch.bfloat16, 160)),
    (moe_row_parallel, ("naive", torch.float16, 16)),
    (moe_row_parallel, ("sorted", torch.bfloat16, 20)),
    (dense, ("column", torch.bfloat16, 16)),
    (functools.partial(dense, lent=False), ("column", torch.float16, 20)),
    (dense, ("row", torch.float16, 20)),
    (expert_parallel, ("naive",)),
    (expert_parallel, ("sorted",)),
    (a_rank_that_does_not_fit_is_refused, ()),
)


def finite(collective: Callable[..., Any]) -> Callable[..., Any]:
    """``collective``, once what this process sends is known to hold no garbage."""

    def checked(*tensors: torch.Tensor, **options: Any) -> Any:
        assert tensors[-1].isfinite().all(), "garbage was sent"
        return collective(*tensors, **options)

    return checked


def process(index: int, meeting: str) -> None:
    """All checks in one process of the group, as a process takes longer to start than they do."""
    torch.set_num_threads(1)
    device = "cpu" if INTERPRETED else f"cuda:{index}"
    if not INTERPRETED:
        torch.cuda.set_device(index)
    if INTERPRETED:  # a captured graph could not look
        sharded._all_gather, dist.all_reduce = finite(sharded._all_gather), finite(dist.all_reduce)
    patience = datetime.timedelta(minutes=4)
    dist.init_process_group(
        "gloo" if INTERPRETED else "nccl", f"file://{meeting}", timeout=patience, rank=index, world_size=SHARDS
    )
    for run, arguments in (() if INTERPRETED else ((a_graph_serves_other_batches, ()),)) + CHECKS:
        try:
            run(Here(index, device), *arguments)
        except Exception as error:
            raise AssertionError(f"{run}{arguments}") from error
    dist.destroy_process_group()


class Turns:
    """What stands for a group in one process: its members are threads, of which one runs at a time, up to its next collective."""

    def __init__(self) -> None:
        self._turn, self._all = threading.Lock(), threading.Barrier(SHARDS, timeout=60)
        self._here = threading.local()
        self._sent: list[torch.Tensor] = [torch.empty(0)] * SHARDS

    def run(self, member: Callable[[int], None]) -> None:
        def turn(index: int) -> None:
            self._here.index = index
            with self._turn:
                try:
                    member(index)
                except BaseException:
                    self._all.abort()  # nobody waits for it
                    raise

        with concurrent.futures.ThreadPoolExecutor(SHARDS) as pool:
            ends = [pool.submit(turn, index) for index in range(SHARDS)]
        errors = [error for end in ends if (error := end.exception())]
        for error in sorted(errors, key=lambda error: isinstance(error.__cause__, threading.BrokenBarrierError)):
            raise error

    def _meet(self, tensor: torch.Tensor) -> torch.Tensor:
        """What all members send, [SHARDS, *]."""
        self._sent[self._here.index] = tensor.clone()
        self._wait()  # all have sent it
        sent = torch.stack(self._sent)
        self._wait()  # and seen it
        return sent

    def _wait(self) -> None:
        self._turn.release()
        try:
            self._all.wait()
        finally:
            self._turn.acquire()

    def all_gather_into_tensor(self, output: torch.Tensor, tensor: torch.Tensor, group: Any = None) -> None:
        output.copy_(self._meet(tensor).view_as(output))

    def all_gather(self, outputs: list[torch.Tensor], tensor: torch.Tensor) -> None:
        for output, sent in zip(outputs, self._meet(tensor), strict=True):
            output.copy_(sent)

    def all_reduce(self, tensor: torch.Tensor, group: Any = None) -> None:
        tensor.copy_(self._meet(tensor).sum(0))


@pytest.mark.skipif(not INTERPRETED, reason="GPUs have processes of their own")
@pytest.mark.parametrize(("run", "arguments"), CHECKS)
def test_two_members(run: Callable[..., None], arguments: tuple[Any, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    turns = Turns()
    monkeypatch.setattr(sharded, "_all_gather", finite(turns.all_gather_into_tensor))
    monkeypatch.setattr(dist, "all_reduce", finite(turns.all_reduce))
    monkeypatch.setattr(dist, "all_gather", turns.all_gather)
    monkeypatch.setattr(dist, "get_world_size", lambda group=None: SHARDS)
    turns.run(lambda index: run(Here(index, "cpu"), *arguments))


@pytest.mark.slow
def test_two_processes(tmp_path: Path) -> None:
    if not INTERPRETED and torch.cuda.device_count() < SHARDS:
        pytest.skip("needs two GPUs, or TRITON_INTERPRET=1")
    torch.multiprocessing.spawn(process, (str(tmp_path / "meeting"),), nprocs=SHARDS)
