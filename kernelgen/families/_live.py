"""Which rows LoRA writes, for kernels that take what it wrote beside a base product."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from . import _operands as operands
from . import _runtime as runtime
from .moe_route._op import LIVE, MoeRoute, has_routing


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def is_live(
    pair: tl.tensor,
    here: tl.tensor,
    topk_ids_ptr: tl.tensor,
    token_lora_mapping_ptr: tl.tensor,
    adapter_enabled_ptr: tl.tensor | None,
    expert_map_ptr: tl.tensor | None,
    MAX_LORAS: tl.constexpr,
    NUM_EXPERTS: tl.constexpr,
    GLOBAL_EXPERTS: tl.constexpr,
    TOP_K: tl.constexpr,
) -> tl.tensor:
    """Whether each pair that is ``here`` is one of the route: its token has an adapter that counts, and its expert is local."""
    adapter = tl.load(token_lora_mapping_ptr + pair // TOP_K, mask=here, other=-1)
    expert = tl.load(topk_ids_ptr + pair, mask=here, other=-1).to(tl.int64)
    live = (adapter >= 0) & (adapter < MAX_LORAS) & (expert >= 0)
    if adapter_enabled_ptr is not None:
        live &= tl.load(adapter_enabled_ptr + adapter, mask=live, other=0) != 0
    if expert_map_ptr is not None:
        live &= expert < GLOBAL_EXPERTS
        expert = tl.load(expert_map_ptr + expert, mask=live, other=-1).to(tl.int64)
    return live & (expert >= 0) & (expert < NUM_EXPERTS)


# Where launchers find what ``is_live`` asks.
ROUTING = f"route_ids_ptr=route.topk_ids {LIVE}"


class DeltaSizes(NamedTuple):
    """Of a delta beside the rows of a base product, and of its route; all 0 where there is none."""

    stride: int = 0
    max_loras: int = 0
    num_experts: int = 0
    global_experts: int = 0


def check_delta(variant: str, delta: torch.Tensor | None, route: MoeRoute | None) -> DeltaSizes:
    """The sizes of a delta whose shape is known to fit; all 0 where there is none.

    Raises:
        ValueError: one of both is missing, or the route has tables only.
    """
    if delta is None or route is None:
        given = [name for name, value in (("delta", delta), ("route", route)) if value is not None]
        if given:
            runtime.fail(variant, "delta, route", given, "both, or neither", "what moe_lora wrote, on its route")
        return DeltaSizes()
    if not has_routing(route):
        runtime.fail(variant, "route", "tables only", "a route from moe_route")
    return DeltaSizes(delta.stride(1 if route.top_k > 1 else 0), route.max_loras, route.num_experts, route.global_experts)


def delta(shape: str) -> operands.Tensor:
    """The operand of an op that adds a delta of that shape."""
    return operands.Tensor(shape, "D", operands.PAIRS, asks=("adapted",))

