"""The ops of dense LoRA as torch sees them."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import generated as kg
from generated.moe_route._op import ROUTE

TOKENS, LORAS, K, WIDTHS, RANK = 6, 2, 48, (24, 8), 16
OPS = torch.ops.generated


class Layer:
    """A linear layer of two slices, and tokens of both adapters and of none."""

    def __init__(self, device: str) -> None:
        generator = torch.Generator().manual_seed(0)

        def normal(*size: int) -> torch.Tensor:
            return torch.randn(size, generator=generator).to(device, torch.bfloat16)

        self.x, self.out = normal(TOKENS, K), normal(TOKENS, sum(WIDTHS))
        self.a = [normal(LORAS, RANK, K) for _ in WIDTHS]
        self.b = [normal(LORAS, width, RANK) for width in WIDTHS]
        self.mapping = torch.tensor([0, 1, -1, 1, 0, 0], dtype=torch.int32, device=device)
        self.workspace = kg.lora_workspace(
            max_tokens=64, max_loras=LORAS, max_rank=RANK, num_slices=2, device=device
        )
        self.held = kg.lora_route(self.mapping, max_loras=LORAS, capacity=9, workspace=self.workspace)


def one_op(layer: Layer, out: torch.Tensor, x: torch.Tensor, mapping: torch.Tensor, workspace: Any) -> None:
    route = kg.lora_route(mapping, max_loras=LORAS, workspace=workspace)
    kg.lora(out, x, layer.a, layer.b, route, scaling=0.5)


def two_ops(layer: Layer, out: torch.Tensor, x: torch.Tensor, mapping: torch.Tensor, workspace: Any) -> None:
    route = kg.lora_route(mapping, max_loras=LORAS, workspace=workspace)
    y = torch.zeros((2, x.shape[0], RANK), device=x.device)
    kg.lora_shrink(y, x, layer.a, route, scaling=0.5)
    kg.lora_expand(out, y, layer.b, route)


def held(layer: Layer, out: torch.Tensor, x: torch.Tensor, mapping: torch.Tensor, workspace: Any) -> None:
    layer.held.refill(mapping)
    kg.lora(out, x, layer.a, layer.b, layer.held.first(x.shape[0]), scaling=0.5)


def test_opcheck(device: str) -> None:
    layer = Layer(device)
    tables = torch.zeros_like(layer.held._tables)
    torch.library.opcheck(OPS.lora_route_refill.default, (tables, layer.mapping, None, layer.held.capacity, LORAS))
    route = kg.lora_route(layer.mapping, max_loras=LORAS)
    y = torch.zeros((2, TOKENS, RANK), device=device)
    of_adapters = (torch.tensor([3, RANK], dtype=torch.int32, device=device), torch.rand(LORAS, device=device), False)
    shrink = (y, layer.x, layer.a, *ROUTE.flat(route), 0.5, True, None, None, *of_adapters)
    torch.library.opcheck(OPS.lora_shrink.default, shrink)
    torch.library.opcheck(OPS.lora_expand.default, (layer.out, y, layer.b, *ROUTE.flat(route), 1.0, 0, None, 1, True, None))
    flags = (0.5, 0, [8, 0], 1, True, None, None, None)
    whole = (layer.out, layer.x, layer.a, layer.b, *ROUTE.flat(route), *flags, *of_adapters)
    torch.library.opcheck(OPS.lora.default, whole)


def test_a_refill_beside_its_tables_is_not_checked_at_length() -> None:
    """Allocators put a mapping right in front of the tables, or behind them."""
    for mapping in (torch.zeros(9, dtype=torch.int32), torch.zeros(9, dtype=torch.int64)):
        held = kg.lora_route(mapping, max_loras=LORAS, capacity=9)
        for begin, apart in ((mapping.nbytes, True), (mapping.nbytes - 1, False), (1 - held._bytes, False), (-held._bytes, True)):
            held._begin = mapping.data_ptr() + begin
            assert held._fits(mapping, None) == apart


@pytest.mark.slow(keep=1)
@pytest.mark.parametrize(
    ("apply", "with_workspace"), [(one_op, False), (one_op, True), (two_ops, False), (two_ops, True), (held, True)]
)
def test_a_compiled_graph_serves_any_number_of_tokens(device: str, apply: Any, with_workspace: bool) -> None:
    """An engine compiles once: no branch of the front doors may look at the number of tokens."""
    layer = Layer(device)
    graphs = CompileCounterWithBackend("aot_eager")
    workspace = layer.workspace if with_workspace else None

    def step(out: torch.Tensor, x: torch.Tensor, mapping: torch.Tensor) -> None:
        apply(layer, out, x, mapping, workspace)

    compiled = torch.compile(step, fullgraph=True, backend=graphs, dynamic=True)
    for tokens in (2, 3, 5, 6):
        expected, found = layer.out[:tokens].clone(), layer.out[:tokens].clone()
        step(expected, layer.x[:tokens], layer.mapping[:tokens])
        compiled(found, layer.x[:tokens], layer.mapping[:tokens])
        assert not torch.equal(expected, layer.out[:tokens])
        assert torch.equal(found, expected)
    assert graphs.frame_count <= 2  # the first sizes may be taken as fixed


def test_scales_of_one_group_of_columns_are_not_taken_for_a_scale_a_token(device: str) -> None:
    from generated.lora_shrink.bf16_r16_w8group_a8group import lora_shrink_bf16_r16_w8group_a8group

    layer = Layer(device)
    route = kg.lora_route(layer.mapping, max_loras=LORAS)
    a, a_scale = zip(*(kg.quantize_weights(a, "group") for a in layer.a), strict=True)
    x, x_scale = kg.quantize_activations(layer.x, "group")
    served, wanted = (torch.zeros(len(a), TOKENS, RANK, device=device) for _ in range(2))
    kg.lora_shrink(served, x, a, route, a_scale=a_scale, x_scale=x_scale)
    lora_shrink_bf16_r16_w8group_a8group(wanted, x, a, route, a_scale=a_scale, x_scale=x_scale)
    assert wanted.any() and torch.equal(served, wanted)


def test_parts_that_are_added_up_first_give_the_same_bits(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether the expand adds them, or a launch in front of it, hangs on the number of tokens."""
    layer, results = Layer(device), []
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(TOKENS, 1200, generator=generator).to(device, torch.bfloat16)  # three parts
    a = [torch.randn(LORAS, RANK, 1200, generator=generator).to(device, torch.bfloat16) for _ in WIDTHS]
    route = kg.lora_route(layer.mapping, max_loras=LORAS)
    expand = sys.modules["generated.lora_expand._problem"]
    for many in (0.0, float("inf")):
        monkeypatch.setattr(expand, "_MANY_BYTES", many)
        with kg._runtime.compile_only():  # forgets the calls that were seen
            pass
        results.append(layer.out.clone())
        kg.lora(results[-1], x, a, layer.b, route, scaling=0.3)
    assert torch.equal(*results) and not torch.equal(results[0], layer.out)
