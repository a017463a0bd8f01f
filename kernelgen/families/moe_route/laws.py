"""What holds for routes as the front doors make them."""

from __future__ import annotations

import itertools
import random
from types import ModuleType
from typing import Any, Callable, Mapping, Sequence

import torch

from kernelgen.families.buffers import poison_
from kernelgen.families.case import Law, Variant
from kernelgen.families.moe_route.cases import engine_tables, groups_of
from kernelgen.families.moe_route.reference import faults
from kernelgen.families.moe_routing import KINDS, SPREAD, Routed, Routing, Sizes, draw

_SIZES = Sizes(tokens=13, top_k=3, experts=5, loras=3)
_MIXED = Routing("mixed", disabled=(1,))


def any_routing_is_complete(package: ModuleType, variants: Sequence[Variant], device: str) -> None:
    """No pair is lost, doubled or misplaced, for random sizes and kinds of routing, in a workspace that is used again."""
    rng = random.Random(0)
    workspace = _workspace(package, device, Sizes(64, 8, 8, 8))
    for kind, _ in itertools.product(KINDS, range(4)):
        sizes = Sizes(*(rng.randint(1, most) for most in (24, 4, 8, 8)))
        disabled = (rng.randrange(sizes.loras),) if rng.random() < 0.5 else ()
        ids_dtype = rng.choice((torch.int32, torch.int64))
        routing = Routing(kind, disabled, rng.random() < 0.3, ids_dtype)
        routed = draw(routing, sizes, rng, device)
        route = _route(package, routed, workspace=workspace, block_m=rng.choice((16, 32)))
        found = list(_faults(routed, route))
        assert not found, f"{sizes}, {routing}: {found[:3]}"


def tables_of_an_engine_give_the_same_groups(
    package: ModuleType, variants: Sequence[Variant], device: str
) -> None:
    """MoeRoute.from_tables and moe_route put the same pairs under each adapter and expert."""
    for routing, names in itertools.product((SPREAD, _MIXED), (True, False)):
        routed = draw(routing, _SIZES, random.Random(1), device)
        tables, lora_ids = engine_tables(routed, 16, names)
        route = package.MoeRoute.from_tables(
            *(table.to(device) for table in tables),
            block_size=16,
            num_tokens=_SIZES.tokens,
            top_k=_SIZES.top_k,
            num_experts=_SIZES.experts,
            max_loras=_SIZES.loras,
            lora_ids=None if lora_ids is None else lora_ids.to(device),
            adapter_enabled=routed.adapter_enabled,
        )
        sorted_route = _route(package, routed, block_m=16)
        assert _groups(route) == _groups(sorted_route), f"{routing}, lora_ids: {names}"


def naive_routes_launch_nothing(
    package: ModuleType, variants: Sequence[Variant], device: str
) -> None:
    """A naive route is the routing itself: no launch, no table."""
    routed = draw(_MIXED, _SIZES, random.Random(1), device)
    with package._runtime.compile_only() as requests:
        route = _route(package, routed, assignment="naive")
    assert not requests and isinstance(route, package.PairRoute)
    assert route.topk_ids is routed.topk_ids


def wrong_arguments_are_named(
    package: ModuleType, variants: Sequence[Variant], device: str
) -> None:
    """Arguments that do not fit raise ValueError, with what was given and wanted."""
    routed = draw(_MIXED, _SIZES, random.Random(1), device)
    right = {**routed.tensors, **routed.arguments, "assignment": "sorted"}
    for name, wrong in _WRONG.items():
        given = {**right, **wrong(right)}
        try:
            package.moe_route(**given)
        except ValueError as error:
            assert all(word in str(error) for word in ("moe_route", "got", "wanted")), error
        else:
            raise AssertionError(f"{name} is let pass")


def graph_replay(package: ModuleType, variants: Sequence[Variant], device: str) -> None:
    """A captured route stays right when the batch changes, base tokens and all."""
    for tokens in (13, 400):
        sizes = _SIZES._replace(tokens=tokens)
        captured = draw(Routing("one_group", (1,)), sizes, random.Random(1), device)
        workspace = _workspace(package, device, sizes)
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        with torch.cuda.stream(stream):
            _route(package, captured, workspace=workspace, block_m=16)
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            route = _route(package, captured, workspace=workspace, block_m=16)
        for seed, kind in enumerate(KINDS):
            routed = draw(Routing(kind, (1,)), sizes, random.Random(seed), device)
            captured.topk_ids.copy_(routed.topk_ids)
            captured.token_lora_mapping.copy_(routed.token_lora_mapping)
            graph.replay()
            torch.cuda.synchronize()
            found = list(_faults(routed, route))
            assert not found, f"{tokens} tokens, {kind}: {found[:3]}"


LAWS = (
    Law(any_routing_is_complete),
    Law(tables_of_an_engine_give_the_same_groups),
    Law(naive_routes_launch_nothing),
    Law(wrong_arguments_are_named),
    Law(graph_replay, needs_gpu=True),
)


def _route(package: ModuleType, routed: Routed, **options: Any) -> Any:
    ids, mapping = routed.topk_ids, routed.token_lora_mapping
    return package.moe_route(
        ids, mapping, **routed.arguments, **{"assignment": "sorted", **options}
    )


def _blocks(route: Any) -> torch.Tensor:
    count = int(route.num_blocks[0])
    assert 0 <= count <= route.max_blocks, f"{count} blocks, at most {route.max_blocks} fit"
    blocks: torch.Tensor = route.blocks[:count].cpu()
    return blocks


def _faults(routed: Routed, route: Any) -> list[str]:
    return list(faults(routed.live, route.pairs.cpu(), _blocks(route), block_m=route.block_m))


def _groups(route: Any) -> dict[tuple[int, int], list[int]]:
    return groups_of(route.pairs.cpu(), _blocks(route))


def _workspace(package: ModuleType, device: str, sizes: Sizes) -> Any:
    workspace = package.moe_workspace(
        max_tokens=sizes.tokens,
        top_k=sizes.top_k,
        num_experts=sizes.experts,
        max_loras=sizes.loras,
        max_rank=16,
        num_slices=1,
        device=device,
    )
    for buffer in (workspace.tables, workspace.parts):
        poison_(buffer)
    return workspace


_Arguments = dict[str, Any]

_WRONG: Mapping[str, Callable[[_Arguments], _Arguments]] = {
    "ids as a vector": lambda a: {"topk_ids": a["topk_ids"].flatten()},
    "ids that are not whole": lambda a: {"topk_ids": a["topk_ids"].float()},
    "ids with gaps": lambda a: {"topk_ids": a["topk_ids"].repeat(1, 2)[:, ::2]},
    "too few tokens": lambda a: {"token_lora_mapping": a["token_lora_mapping"][:-1]},
    "adapters in 64 bits": lambda a: {"token_lora_mapping": a["token_lora_mapping"].long()},
    "too few flags": lambda a: {"adapter_enabled": a["adapter_enabled"][:1]},
    "flags that are bool": lambda a: {"adapter_enabled": a["adapter_enabled"].bool()},
    "an empty expert_map": lambda a: {"expert_map": a["topk_ids"].new_empty(0)},
    "an expert_map in 64 bits": lambda a: {"expert_map": a["token_lora_mapping"].long()},
    "no experts": lambda a: {"num_experts": 0},
    "no adapters": lambda a: {"max_loras": 0},
    "an unknown assignment": lambda a: {"assignment": "fastest"},
    "a rank of nothing": lambda a: {"rank": 0},
    "ids as a list": lambda a: {"topk_ids": [[0]]},
    "a mapping left out": lambda a: {"token_lora_mapping": None},
    "experts as a text": lambda a: {"num_experts": "4"},
    "a fraction of experts": lambda a: {"num_experts": a["num_experts"] + 1.0},
    "a workspace that is a tensor": lambda a: {"workspace": a["topk_ids"]},
    "a block size that is no power of two": lambda a: {"block_m": 24},
}
