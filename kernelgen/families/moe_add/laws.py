"""What holds for a LoRA delta that is made beside the base product: through ``overlap`` and ``moe_add``."""

from __future__ import annotations

import dataclasses
from types import ModuleType
from typing import Any, Callable, Mapping, Sequence

import torch

from kernelgen.families.buffers import bits, poison_
from kernelgen.families.case import Law, Variant
from kernelgen.families.moe_lora_inputs import Call, Case, make
from kernelgen.families.moe_routing import Routing

_CASE = Case("overlap", "", tokens=6, naive_tokens=6, loras=3, slices=2, routing=Routing("mixed", disabled=(0,)), layout="packed")


def overlap_is_the_sum(package: ModuleType, variants: Sequence[Variant], device: str) -> None:
    """Base beside LoRA into a poisoned delta, then the sum: LoRA added in place, but for the rounding of the delta."""
    for variant in variants:
        for weight in ("plain", "weighted"):
            for rank in (16, 200):  # above every bucket, too
                scene = _Scene(package, variant.tags["dtype"], weight, rank, device)
                scene.run(_stream(device), _events(device))
                scene.verify(f"{variant.name}, {weight}, rank {rank}")


def wrong_arguments_are_named(
    package: ModuleType, variants: Sequence[Variant], device: str
) -> None:
    """Arguments that do not fit raise ValueError, with what was given and wanted."""
    scene = _Scene(package, "bf16", "plain", 16, device)
    before = scene.out.clone()
    right = {"out": scene.out, "delta": scene.delta, "route": scene.route}
    for label, change in _WRONG.items():
        try:
            package.moe_add(**{**right, **change(right)})
        except ValueError as error:
            complete = all(word in str(error) for word in ("moe_add", "got", "wanted"))
            assert complete, f"{label}: {error}"
        else:
            raise AssertionError(f"{label} is let pass")
    assert torch.equal(bits(scene.out), bits(before)), "out was written"


def overlap_in_a_graph(package: ModuleType, variants: Sequence[Variant], device: str) -> None:
    """A captured overlap gives the bits of one after the other, replay after replay, whatever the delta holds before."""
    for weight in ("plain", "weighted"):
        scene = _Scene(package, "bf16", weight, 16, device, k=2048, n=1024)
        stream, events = _stream(device), _events(device)
        scene.run(stream, events)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            scene.run(stream, events)
        scene.run(None, None)
        torch.cuda.synchronize()
        wanted = scene.out.clone()
        for _ in range(20):
            poison_(scene.delta)
            scene.out.zero_()
            graph.replay()
            torch.cuda.synchronize()
            assert torch.equal(bits(scene.out), bits(wanted)), weight


LAWS = (
    Law(overlap_is_the_sum),
    Law(wrong_arguments_are_named),
    Law(overlap_in_a_graph, needs_gpu=True),
)


class _Scene:
    """A base result, and the adapters of a batch."""

    def __init__(
        self, package: ModuleType, dtype: str, weight: str, rank: int, device: str, **sizes: Any
    ) -> None:
        tags = {"dtype": dtype, "add_inputs": "set", "routed_weight": weight, "assignment": "sorted", "rank": "rany"}
        self.package = package
        self.weighted = weight == "weighted"
        self.call: Call = make(dataclasses.replace(_CASE, rank=rank, **sizes), tags, device)
        routed = self.call.routed
        ids, mapping = routed.topk_ids, routed.token_lora_mapping
        self.route = package.moe_route(ids, mapping, **routed.arguments)
        self.delta = poison_(torch.empty_like(self.call.out.view, memory_format=torch.contiguous_format))
        numbers = torch.Generator().manual_seed(1)
        self.base = torch.randn(self.delta.shape, generator=numbers).to(self.delta)
        self.out = torch.empty_like(self.base)

    def run(self, stream: Any, events: Any) -> None:
        self.package.overlap(lambda: self.out.copy_(self.base), self._lora, stream, events)
        self.package.moe_add(self.out, self.delta, self.route)

    def _lora(self) -> None:
        _, *operands = self.call.operands
        self.package.moe_lora(
            self.delta,
            *operands,
            self.route,
            topk_weights=self.call.topk_weights,
            add_inputs=False,
            mul_routed_weight=self.weighted,
        )

    def verify(self, what: str) -> None:
        rows = self.call.live_rows()
        exact, bound = self.call.expected
        total = self.base.double() + exact
        half_ulp = torch.finfo(self.out.dtype).eps / 2
        limit = bound + (total.abs() + bound) * (half_ulp + 2.0**-23) + 2.0**-24 * half_ulp
        close = (self.out.double() - total).abs() <= limit
        assert close[rows].all(), f"{what}: live rows are off"
        same = torch.equal(bits(self.out[~rows]), bits(self.base[~rows]))
        assert same, f"{what}: rows that LoRA does not write changed"


def _stream(device: str) -> Any:
    return None if device == "cpu" else torch.cuda.Stream()  # type: ignore[no-untyped-call]


def _events(device: str) -> Any:
    return None if device == "cpu" else (torch.cuda.Event(), torch.cuda.Event())  # type: ignore[no-untyped-call]


_Arguments = dict[str, Any]

_WRONG: Mapping[str, Callable[[_Arguments], _Arguments]] = {
    "out in fp32": lambda a: {"out": a["out"].float()},
    "delta of another dtype": lambda a: {"delta": a["delta"].half()},
    "delta of another N": lambda a: {"delta": a["delta"][..., :-1]},
    "out of two dimensions": lambda a: {"out": a["out"].flatten(0, 1)},
    "delta with columns apart": lambda a: {"delta": a["delta"].transpose(1, 2).contiguous().transpose(1, 2)},
    "a route of tables alone": lambda a: {"route": a["route"]._replace(topk_ids=None)},
    "a route of more tokens": lambda a: {"route": a["route"]._replace(num_tokens=7)},
}
