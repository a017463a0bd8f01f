"""The ops of a base MoE layer as torch sees them: ``opcheck``, and ``torch.compile`` of a whole graph."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import generated as kg
from generated._fused_moe import OP as FUSED_MOE
from generated.moe_align._op import TABLES
from generated.moe_route._op import ROUTE
from generated.moe_runs._op import RUNS

TOP_K, EXPERTS, WIDTH, INTER, LORAS, RANK = 2, 4, 32, 24, 2, 8
OPS = torch.ops.generated


class Layer:
    """Inputs of one layer; the last token is padding."""

    def __init__(self, device: str, tokens: int = 6) -> None:
        generator = torch.Generator().manual_seed(tokens)

        def normal(*size: int) -> torch.Tensor:
            return torch.randn(size, generator=generator).to(device, torch.bfloat16)

        self.hidden = normal(tokens, WIDTH)
        self.w13, self.w2 = normal(EXPERTS, 2 * INTER, WIDTH), normal(EXPERTS, WIDTH, INTER)
        ids = torch.randint(-1, EXPERTS + 1, (tokens, TOP_K), generator=generator)
        self.ids = ids.to(device, torch.int32)
        self.weights = torch.rand(tokens, TOP_K, generator=generator).to(device)
        self.valid = torch.tensor(tokens - 1, dtype=torch.int32, device=device)
        self.adapters = (torch.arange(tokens) % 3 - 1).to(device, torch.int32)
        self.delta = normal(tokens, TOP_K, 2 * INTER)
        first = [normal(LORAS, EXPERTS, RANK, WIDTH) for _ in "gu"], [normal(LORAS, EXPERTS, INTER, RANK) for _ in "gu"]
        last = [normal(LORAS, EXPERTS, RANK, INTER)], [normal(LORAS, EXPERTS, WIDTH, RANK)]
        enabled = torch.tensor([1, 0], dtype=torch.int32, device=device)
        self.lora = kg.FusedMoeLora(self.adapters, *first, *last, enabled)

    def fused(self, *inputs: torch.Tensor) -> torch.Tensor:
        hidden, ids, weights = inputs or (self.hidden, self.ids, self.weights)
        options = {"activation": "swiglu", "valid_tokens": self.valid}
        return kg.fused_moe(hidden, self.w13, self.w2, ids, weights, **options)

    def adapted(self, *inputs: torch.Tensor) -> torch.Tensor:
        """The fused layer with adapters."""
        hidden, ids, weights, adapters = inputs or (self.hidden, self.ids, self.weights, self.adapters)
        options = {"activation": "swiglu", "valid_tokens": self.valid}
        lora = kg.FusedMoeLora(adapters, *self.lora[1:])
        return kg.fused_moe(hidden, self.w13, self.w2, ids, weights, lora=lora, **options)

    def adapted_steps(self) -> torch.Tensor:
        """The same op by op."""
        tokens, lora = self.ids.shape[0], self.lora
        given = {"valid_tokens": self.valid, "adapter_enabled": lora.adapter_enabled}
        tables, runs = kg.moe_runs(self.ids, self.adapters, num_experts=EXPERTS, max_loras=LORAS, **given)
        v = kg.moe_shrink(self.hidden, lora.a13, tables, runs, x_rows="token")
        h = self.hidden.new_zeros(tokens * TOP_K, INTER)
        first = {"v": v, "lora_b": lora.b13, "runs": runs, "activation": "swiglu"}
        kg.moe_gemm(h, self.hidden, self.w13, tables, x_rows="token", out_rows="sorted", **first)
        v = kg.moe_shrink(h, lora.a2, tables, runs, x_rows="sorted")
        y = self.hidden.new_zeros(tokens, TOP_K, WIDTH)
        kg.moe_gemm(y, h, self.w2, tables, x_rows="sorted", v=v, lora_b=lora.b2, runs=runs)
        return kg.moe_sum(y, self.ids, num_experts=EXPERTS, valid_tokens=self.valid, topk_weights=self.weights)

    def steps(self) -> torch.Tensor:
        """The layer op by op, as one with adapters runs it."""
        tokens = self.ids.shape[0]
        tables = kg.moe_align(self.ids, num_experts=EXPERTS, valid_tokens=self.valid)
        rows = self.hidden.new_zeros(tokens, TOP_K, 2 * INTER)
        kg.moe_gemm(rows, self.hidden, self.w13, tables, x_rows="token")
        route = kg.moe_route(self.ids, self.adapters, num_experts=EXPERTS, max_loras=LORAS)
        kg.moe_add(rows, self.delta, route)
        h = self.hidden.new_zeros(tokens * TOP_K, INTER)
        kg.moe_act(h, rows, self.ids, activation="swiglu", num_experts=EXPERTS)
        y = self.hidden.new_zeros(tokens, TOP_K, WIDTH)
        kg.moe_gemm(y, h, self.w2, tables, x_rows="pair", topk_weights=self.weights)
        return kg.moe_sum(y, self.ids, num_experts=EXPERTS, valid_tokens=self.valid)


@pytest.mark.parametrize("tokens", [3, 6])
def test_opcheck_of_a_layer(device: str, tokens: int) -> None:
    layer = Layer(device, tokens)
    out = torch.empty(tokens, WIDTH, device=device)
    operands = (out, layer.hidden, layer.w13, layer.w2, layer.ids, layer.weights, layer.valid)
    workspace = kg.fused_moe_workspace(
        max_tokens=tokens, top_k=TOP_K, num_experts=EXPERTS, hidden=WIDTH, intermediate=INTER, max_rank=RANK, device=device
    )
    bundles = {operand.name: operand for operand in FUSED_MOE.operands}
    clamped = ("swiglu_clamp", 7.0, 1.702, None)
    for buffers, lora, kind in ((None, layer.lora, PLAIN), (workspace, None, clamped), (workspace, layer.lora, PLAIN)):
        flat = (*bundles["workspace"].flat(buffers), *bundles["lora"].flat(lora))
        biases = (None, None) if kind is PLAIN else (layer.w13[..., 0].contiguous(), layer.w2[..., 0].contiguous())
        how = (kind[0], "halves" if kind is PLAIN else "interleaved", False)
        arguments = (*operands, None, *how, 0, None, True, *(None,) * 4, *biases, *flat, *kind[1:])
        torch.library.opcheck(OPS.fused_moe.default, arguments, test_utils=_UTILS)


# Buffers of a workspace are scratch: what a kernel leaves in them is not compared.
_UTILS = ("test_schema", "test_autograd_registration", "test_faketensor")


PLAIN = ("swiglu", None, None, None)  # an activation, and its numbers


def test_a_map_of_experts_gives_the_bits_of_local_ids(device: str) -> None:
    for tokens in (2, 70):
        layer = Layer(device, tokens)
        expert_map = torch.tensor([-1, 2, 0, -1, 3, 1], dtype=torch.int32, device=device)
        ids = torch.arange(1, tokens * TOP_K + 1, device=device).view(tokens, TOP_K) % 8 - 1
        sizes = {"max_tokens": tokens, "top_k": TOP_K, "num_experts": EXPERTS, "hidden": WIDTH, "intermediate": INTER}
        for lora, rank in ((None, 0), (layer.lora, RANK)):
            options = {"activation": "swiglu", "valid_tokens": layer.valid, "lora": lora}
            inputs = (layer.hidden, layer.w13, layer.w2)
            wanted = kg.fused_moe(*inputs, kg.local_ids(ids, expert_map), layer.weights, **options)
            space = kg.fused_moe_workspace(**sizes, max_rank=rank, device=device)
            for workspace in (None, space):
                found = kg.fused_moe(*inputs, ids, layer.weights, expert_map=expert_map, workspace=workspace, **options)
                assert wanted.any() and torch.equal(found, wanted)


@pytest.mark.parametrize("tokens", [2, 17])
def test_rows_behind_the_valid_ones_keep_their_bytes(device: str, tokens: int) -> None:
    """Of a caller's ``out``, however few tokens there are; with sizes that fill no pair of 16 bits."""
    numbers = torch.Generator().manual_seed(tokens)

    def normal(*size: int) -> torch.Tensor:
        return (torch.randn(size, generator=numbers) / 4).bfloat16().to(device)

    width, inter, rank = 24, 16, 3
    factors = ((LORAS, 1, rank, width), (LORAS, 1, inter, rank), (LORAS, 1, rank, inter), (LORAS, 1, width, rank))
    mapping = torch.arange(tokens, dtype=torch.int32, device=device) % LORAS
    lora = kg.FusedMoeLora(mapping, *[(normal(*size),) for size in factors])
    inputs = (normal(tokens, width), normal(1, inter, width), normal(1, width, inter))
    routing = (torch.zeros(tokens, 1, dtype=torch.int32, device=device), torch.ones(tokens, 1, device=device))
    for adapters in (None, lora):
        whole = kg.fused_moe(*inputs, *routing, activation="relu2", lora=adapters)
        out = torch.full((tokens, width), 7.0, device=device)
        valid = torch.tensor([1], dtype=torch.int32, device=device)
        kg.fused_moe(*inputs, *routing, activation="relu2", lora=adapters, valid_tokens=valid, out=out)
        assert torch.equal(out[0], whole[0]) and out[0].any() and (out[1:] == 7.0).all()


def test_opcheck_of_the_steps(device: str) -> None:
    layer = Layer(device)
    tokens = layer.ids.shape[0]
    tables = kg.moe_align(layer.ids, num_experts=EXPERTS)
    rows = torch.zeros(tokens, TOP_K, 2 * INTER, dtype=torch.bfloat16, device=device)
    product = (rows, layer.hidden, layer.w13, *TABLES.flat(tables), None, "token", "pair", None, "halves", None, None)
    torch.library.opcheck(OPS.moe_gemm.default, (*product, None, None, *RUNS.flat(None), None, None, *PLAIN[1:], None))
    tables, runs = kg.moe_runs(layer.ids, layer.adapters, num_experts=EXPERTS, max_loras=LORAS)
    v = kg.moe_shrink(layer.hidden, layer.lora.a13, tables, runs, x_rows="token")
    flat = (*TABLES.flat(tables), *RUNS.flat(runs))
    torch.library.opcheck(OPS.moe_shrink.default, (v, layer.hidden, layer.lora.a13, *flat, "token", None, None))
    inner = torch.zeros(tokens * TOP_K, INTER, dtype=torch.bfloat16, device=device)
    bias, how = layer.w13[..., 0].contiguous(), ("swiglu_clamp", "interleaved")
    product = (inner, layer.hidden, layer.w13, *TABLES.flat(tables), None, "token", "sorted", *how, None, None)
    adapted = (v, layer.lora.b13, *RUNS.flat(runs), None)
    torch.library.opcheck(OPS.moe_gemm.default, (*product, *adapted, bias, 7.0, 1.702, 1.0, None))
    h = torch.zeros(tokens * TOP_K, INTER, dtype=torch.bfloat16, device=device)
    route = kg.moe_route(layer.ids, layer.adapters, num_experts=EXPERTS, max_loras=LORAS)
    added = (layer.delta, *ROUTE.flat(route))
    act = (h, rows, layer.ids, None, "swiglu", "halves", EXPERTS, 0, None, *added, None)
    torch.library.opcheck(OPS.moe_act.default, (*act, *PLAIN[1:]))
    out = torch.zeros(tokens, 2 * INTER, device=device)
    total = (out, rows, layer.ids, layer.weights, layer.valid, EXPERTS, 0, None, True, False)
    torch.library.opcheck(OPS.moe_sum.default, (*total, *added, layer.w13[:, :, 0].contiguous()))
    torch.library.opcheck(OPS.moe_add.default, (rows, *added))
    buffer = torch.zeros(8192, dtype=torch.int32, device=device)
    torch.library.opcheck(OPS.moe_align.default, (layer.ids, layer.valid, None, EXPERTS, 0, None, None, buffer))
    expert_map = torch.tensor([1, -1, 0, 3], dtype=torch.int32, device=device)
    torch.library.opcheck(OPS.moe_align.default, (layer.ids, layer.valid, expert_map, EXPERTS, 0, None, None, buffer))
    torch.library.opcheck(OPS.local_ids.default, (torch.zeros_like(layer.ids), layer.ids, expert_map))
    table = (layer.ids, layer.valid, layer.adapters, None, None, buffer, EXPERTS, 0, None, None, LORAS)
    torch.library.opcheck(OPS.moe_runs.default, table)


@pytest.mark.parametrize("way", ["fused", "steps", "adapted", "adapted_steps"])
def test_a_compiled_graph_gives_the_same_bits(device: str, way: str) -> None:
    layer = Layer(device)
    run: Any = getattr(layer, way)
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    expected = run()
    assert expected.any()
    assert torch.equal(compiled(), expected)


@pytest.mark.slow(keep=1)
@pytest.mark.parametrize("way", ["adapted", "fused"])
def test_a_compiled_graph_serves_any_number_of_tokens(device: str, way: str) -> None:
    """An engine compiles once: no branch of the front door may look at the number of tokens."""
    layer = Layer(device, 9)
    graphs = CompileCounterWithBackend("aot_eager")
    run = getattr(layer, way)
    compiled = torch.compile(run, fullgraph=True, backend=graphs, dynamic=True)
    for tokens in (2, 3, 4, 5, 9):
        inputs = [t[:tokens] for t in (layer.hidden, layer.ids, layer.weights, layer.adapters)]
        inputs = inputs if way == "adapted" else inputs[:3]
        assert torch.equal(compiled(*inputs), run(*inputs))
    assert graphs.frame_count <= 2  # the first sizes may be taken as fixed
