"""The two products of MoE-LoRA as torch sees them."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import generated as kg
from generated.moe_route._op import ROUTE

TOKENS, TOP_K, LORAS, EXPERTS, K, N, RANK = 6, 2, 2, 3, 48, 24, 16
OPS = torch.ops.generated
SIZES = {"num_experts": EXPERTS, "max_loras": LORAS}


class Layer:
    """A projection of two slices, and tokens of both adapters and of none."""

    def __init__(self, device: str) -> None:
        generator = torch.Generator().manual_seed(0)

        def normal(*size: int) -> torch.Tensor:
            return torch.randn(size, generator=generator).to(device, torch.bfloat16)

        self.x, self.out = normal(TOKENS, K), normal(TOKENS, TOP_K, 2 * N)
        self.a = [normal(LORAS, EXPERTS, RANK, K) for _ in range(2)]
        self.b = [normal(LORAS, EXPERTS, N, RANK) for _ in range(2)]
        self.mapping = torch.tensor([0, 1, -1, 1, 0, 0], dtype=torch.int32, device=device)
        self.ids = torch.randint(EXPERTS, (TOKENS, TOP_K), generator=generator).to(device)
        self.weights = torch.rand((TOKENS, TOP_K), generator=generator).to(device)
        self.workspace = kg.moe_workspace(
            max_tokens=64, top_k=TOP_K, max_rank=RANK, num_slices=2, device=device, **SIZES
        )


@pytest.mark.parametrize("assignment", ["naive", "sorted"])
def test_opcheck(device: str, assignment: str) -> None:
    layer = Layer(device)
    route = kg.moe_route(layer.ids, layer.mapping, assignment=assignment, **SIZES)
    y = torch.zeros((2, TOKENS * TOP_K, RANK), device=device)
    torch.library.opcheck(OPS.moe_lora_shrink.default, (y, layer.x, layer.a, *ROUTE.flat(route)))
    torch.library.opcheck(OPS.moe_lora_expand.default, (layer.out, y, layer.b, *ROUTE.flat(route), None, 0, True, False))


@pytest.mark.slow(keep=1)
@pytest.mark.parametrize("with_workspace", [False, True], ids=["allocates", "workspace"])
@pytest.mark.parametrize("assignment", ["auto", "sorted"])
def test_a_compiled_graph_serves_any_number_of_tokens(device: str, assignment: str, with_workspace: bool) -> None:
    """An engine compiles once: no branch of the front doors may look at the number of tokens."""
    layer = Layer(device)
    graphs = CompileCounterWithBackend("aot_eager")
    options = {"assignment": assignment, "workspace": layer.workspace if with_workspace else None}

    def step(out: torch.Tensor, x: torch.Tensor, mapping: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> None:
        route = kg.moe_route(ids, mapping, **SIZES, **options)
        y = torch.empty((2, x.shape[0] * TOP_K, RANK), device=x.device)
        kg.moe_lora_shrink(y, x, layer.a, route)
        kg.moe_lora_expand(out, y, layer.b, route, topk_weights=weights, mul_routed_weight=True)

    compiled = torch.compile(step, fullgraph=True, backend=graphs, dynamic=True)
    for tokens in (2, 3, 5, 6):
        inputs = (layer.x[:tokens], layer.mapping[:tokens], layer.ids[:tokens], layer.weights[:tokens])
        expected, found = layer.out[:tokens].clone(), layer.out[:tokens].clone()
        step(expected, *inputs)
        compiled(found, *inputs)
        assert not torch.equal(expected, layer.out[:tokens])
        assert torch.equal(found, expected)
    assert graphs.frame_count <= 2  # the first sizes may be taken as fixed
