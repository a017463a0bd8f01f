"""The ops of a base MoE layer as torch sees them: ``opcheck``, and ``torch.compile`` of a whole graph."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import generated as kg

TOP_K, EXPERTS, WIDTH, INTER, LORAS = 2, 4, 32, 24, 2
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

    def fused(self, *inputs: torch.Tensor) -> torch.Tensor:
        hidden, ids, weights = inputs or (self.hidden, self.ids, self.weights)
        options = {"activation": "swiglu", "valid_tokens": self.valid}
        return kg.fused_moe(hidden, self.w13, self.w2, ids, weights, **options)

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
        max_tokens=tokens, top_k=TOP_K, num_experts=EXPERTS, hidden=WIDTH, intermediate=INTER, device=device
    )
    for buffers in ((None,) * 7, workspace):
        arguments = (*operands, "swiglu", 0, None, True, *(None,) * 4, *buffers)
        torch.library.opcheck(OPS.fused_moe.default, arguments, test_utils=_UTILS)


# Buffers of a workspace are scratch: what a kernel leaves in them is not compared.
_UTILS = ("test_schema", "test_autograd_registration", "test_faketensor")


def test_opcheck_of_the_steps(device: str) -> None:
    layer = Layer(device)
    tokens = layer.ids.shape[0]
    tables = kg.moe_align(layer.ids, num_experts=EXPERTS)
    rows = torch.zeros(tokens, TOP_K, 2 * INTER, dtype=torch.bfloat16, device=device)
    product = (rows, layer.hidden, layer.w13, *tables, None, "token", "pair", None, None, None)
    torch.library.opcheck(OPS.moe_gemm.default, product)
    h = torch.zeros(tokens * TOP_K, INTER, dtype=torch.bfloat16, device=device)
    torch.library.opcheck(OPS.moe_act.default, (h, rows, layer.ids, None, "swiglu", EXPERTS, 0, None))
    out = torch.zeros(tokens, 2 * INTER, device=device)
    total = (out, rows, layer.ids, layer.weights, layer.valid, EXPERTS, 0, None, True)
    torch.library.opcheck(OPS.moe_sum.default, total)
    added = (rows, layer.delta, layer.ids, layer.adapters, None, None, tokens, TOP_K, EXPERTS, LORAS, 0)
    torch.library.opcheck(OPS.moe_add.default, added)
    buffer = torch.zeros(256, dtype=torch.int32, device=device)
    table = (buffer, layer.ids, layer.valid, EXPERTS, 0, None, None)
    torch.library.opcheck(OPS.moe_align.default, table)


@pytest.mark.parametrize("way", ["fused", "steps"])
def test_a_compiled_graph_gives_the_same_bits(device: str, way: str) -> None:
    layer = Layer(device)
    run: Any = getattr(layer, way)
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    expected = run()
    assert expected.any()
    assert torch.equal(compiled(), expected)


def test_a_compiled_graph_serves_any_number_of_tokens(device: str) -> None:
    """An engine compiles once: no branch of the front door may look at the number of tokens."""
    layer = Layer(device, 9)
    graphs = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer.fused, fullgraph=True, backend=graphs, dynamic=True)
    for tokens in (2, 3, 4, 5, 9):
        inputs = layer.hidden[:tokens], layer.ids[:tokens], layer.weights[:tokens]
        assert torch.equal(compiled(*inputs), layer.fused(*inputs))
    assert graphs.frame_count <= 2  # the first sizes may be taken as fixed
