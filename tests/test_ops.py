"""The ops as torch sees them: what ``opcheck`` asks of a custom op, and ``torch.compile`` of a whole graph."""

from __future__ import annotations

import importlib
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import generated as kg
from generated.moe_route._op import ROUTE

TOKENS, TOP_K, EXPERTS, LORAS, K, N = 5, 2, 4, 2, 32, 24
OPS = torch.ops.generated


def engine_tables(ids: torch.Tensor, adapters: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Sorted ids, experts of blocks and lengths of every adapter's row, in blocks of 16."""
    rows, experts = [], []
    for adapter in range(LORAS):
        row: list[int] = []
        blocks: list[int] = []
        for expert in range(EXPERTS):
            flat = ids.flatten().tolist()
            mine = [
                pair
                for pair, chosen in enumerate(flat)
                if chosen == expert and adapters[pair // TOP_K] == adapter
            ]
            if mine:
                row += mine + [len(flat)] * (16 - len(mine))
                blocks.append(expert)
        rows.append(row)
        experts.append(blocks)
    width = max(map(len, rows))
    sentinel = TOKENS * TOP_K
    padded = [row + [sentinel] * (width - len(row)) for row in rows]
    of_blocks = [blocks + [-1] * (width // 16 - len(blocks)) for blocks in experts]
    lengths = [len(row) for row in rows]
    return tuple(torch.tensor(t, dtype=torch.int32) for t in (padded, of_blocks, lengths))


class Batch:
    """Inputs of one layer, with tokens of both adapters and of none."""

    def __init__(self, device: str, rank: int = 16) -> None:
        generator = torch.Generator().manual_seed(0)

        def normal(*size: int) -> torch.Tensor:
            return torch.randn(size, generator=generator).to(device, torch.bfloat16)

        self.x = normal(TOKENS, K)
        self.a = [normal(LORAS, EXPERTS, rank, K) for _ in range(2)]
        self.b = [normal(LORAS, EXPERTS, N, rank) for _ in range(2)]
        self.out = normal(TOKENS, TOP_K, 2 * N)
        ids = torch.randint(EXPERTS, (TOKENS, TOP_K), generator=generator).int()
        adapters = torch.tensor([0, 1, -1, 1, 0], dtype=torch.int32)
        self.tables = [table.to(device) for table in engine_tables(ids, adapters)]
        self.ids, self.adapters = ids.to(device), adapters.to(device)

    def route(self, assignment: str) -> kg.MoeRoute:
        sizes = {"num_experts": EXPERTS, "max_loras": LORAS}
        if assignment != "tables":
            return kg.moe_route(self.ids, self.adapters, assignment=assignment, **sizes)
        return kg.MoeRoute.from_tables(
            *self.tables, block_size=16, num_tokens=TOKENS, top_k=TOP_K, **sizes
        )

    def apply(self, assignment: str) -> torch.Tensor:
        """Route and op on a copy of ``out``."""
        out = self.out.clone()
        kg.moe_lora(out, self.x, self.a, self.b, self.route(assignment))
        return out


ASSIGNMENTS = ["naive", "sorted", "tables"]


def test_opcheck_of_the_op(device: str) -> None:
    batch = Batch(device)
    for assignment in ASSIGNMENTS:
        route = batch.route(assignment)
        arguments = (batch.out, batch.x, batch.a, batch.b, *ROUTE.flat(route), None, True, False, None, None, None)
        torch.library.opcheck(OPS.moe_lora.default, arguments)


ROUTE_OPS = {
    "sorted": ("_route_in_graphs", OPS.moe_route),
    "tables": ("_tables_in_graphs", OPS.moe_route_from_tables),
}


@pytest.mark.parametrize("assignment", ROUTE_OPS)
def test_opcheck_of_routes(device: str, monkeypatch: pytest.MonkeyPatch, assignment: str) -> None:
    """On the arguments that the front door passes while a graph is compiled."""
    name, op = ROUTE_OPS[assignment]
    module = sys.modules["generated.moe_route._op"]  # the package shows the function of that name
    seen: list[tuple[Any, ...]] = []
    with monkeypatch.context() as patch:
        patch.setattr(module, name, lambda *arguments: seen.append(arguments))
        patch.setattr(torch.compiler, "is_compiling", lambda: True)
        Batch(device).route(assignment)
    torch.library.opcheck(op.default, seen[0])


@pytest.mark.parametrize("assignment", ASSIGNMENTS)
def test_a_compiled_graph_gives_the_same_bits(device: str, assignment: str) -> None:
    batch = Batch(device)
    compiled = torch.compile(batch.apply, fullgraph=True, backend="aot_eager")
    expected = batch.apply(assignment)
    assert not torch.equal(expected, batch.out)
    assert torch.equal(compiled(assignment), expected)


@pytest.mark.parametrize("compiling", [False, True])
def test_rows_of_blocks_that_a_route_does_not_have_are_refused(
    device: str, compiling: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = Batch(device)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: compiling)
    with pytest.raises(ValueError, match="block_m: got 32, wanted None"):
        sizes = {"num_experts": EXPERTS, "max_loras": LORAS}
        kg.moe_route(batch.ids, batch.adapters, assignment="naive", block_m=32, **sizes)


@pytest.mark.slow(keep=1)
@pytest.mark.parametrize("assignment", ["naive", "sorted", "auto"])
def test_a_compiled_graph_serves_any_number_of_tokens(device: str, assignment: str) -> None:
    """An engine compiles once: no branch of the front doors may look at the number of tokens."""
    batch = Batch(device)
    graphs = CompileCounterWithBackend("aot_eager")
    sizes = {"num_experts": EXPERTS, "max_loras": LORAS}
    workspace = kg.moe_workspace(
        max_tokens=64, top_k=TOP_K, max_rank=16, num_slices=2, device=device, **sizes
    )

    def apply(
        x: torch.Tensor, ids: torch.Tensor, adapters: torch.Tensor, out: torch.Tensor
    ) -> None:
        route = kg.moe_route(ids, adapters, assignment=assignment, workspace=workspace, **sizes)
        kg.moe_lora(out, x, batch.a, batch.b, route)

    compiled = torch.compile(apply, fullgraph=True, backend=graphs, dynamic=True)
    for tokens in (2, 3, 4, 5):
        arguments = batch.x[:tokens], batch.ids[:tokens], batch.adapters[:tokens]
        expected, found = batch.out[:tokens].clone(), batch.out[:tokens].clone()
        apply(*arguments, expected)
        compiled(*arguments, found)
        assert torch.equal(found, expected)
    assert graphs.frame_count <= 2  # the first sizes may be taken as fixed


def test_a_copy_under_another_name_has_ops_of_its_own(tmp_path: Path) -> None:
    """Both live in one process: an op's namespace is the name of its package."""
    shutil.copytree(Path(kg.__file__).parent, tmp_path / "vendored_kernels")
    sys.path.insert(0, str(tmp_path))
    try:
        copy = importlib.import_module("vendored_kernels")
        assert torch.ops.vendored_kernels.moe_lora.default is not OPS.moe_lora.default
        assert copy.variants() == kg.variants()
    finally:
        sys.path.remove(str(tmp_path))


def test_a_workspace_for_tables_of_an_engine(device: str) -> None:
    """Tables of an engine are padded further than those of ``moe_route``, so their size is asked for."""
    wide = torch.full((LORAS, 4000), TOKENS * TOP_K, dtype=torch.int32, device=device)
    tables = (wide, wide[:, :32] * 0 - 1, wide[:, 0] * 0)
    sizes = {"num_experts": EXPERTS, "max_loras": LORAS, "top_k": TOP_K}
    buffers = {"max_tokens": TOKENS, "max_rank": 16, "num_slices": 2, "device": device}
    workspace = kg.moe_workspace(**sizes, **buffers, table_size=wide.numel())
    given = {"block_size": 128, "num_tokens": TOKENS, **sizes}
    route = kg.MoeRoute.from_tables(*(t.contiguous() for t in tables), **given, workspace=workspace)
    assert int(route.num_blocks[0]) == 0
    with pytest.raises(ValueError, match="table_size"):
        too_small = kg.moe_workspace(**sizes, **buffers)
        kg.MoeRoute.from_tables(*(t.contiguous() for t in tables), **given, workspace=too_small)
