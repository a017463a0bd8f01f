"""What holds between the variants of moe_lora_expand, and for both products in a row: through the front doors."""

from __future__ import annotations

import dataclasses
import itertools
from types import ModuleType
from typing import Any, Callable, Mapping, NamedTuple, Sequence

import torch

from kernelgen.families.buffers import bits
from kernelgen.families.case import Law, Variant, worst_ratio
from kernelgen.families.lora_inputs import dtype_of
from kernelgen.families.lora_shrink.laws import refuses
from kernelgen.families.moe_lora.laws import route_of
from kernelgen.families.moe_lora.reference import moe_lora
from kernelgen.families.moe_lora_apart import Batch, Case, make
from kernelgen.families.moe_routing import Routing

_CASE = Case(
    "law", "the batch of the laws", tokens=8, loras=3, slices=2, rank=16, routing=Routing("mixed", disabled=(0,))
)


class _Layer(NamedTuple):
    """Operands of a projection."""

    batch: Batch
    x: torch.Tensor
    lora_a: Sequence[torch.Tensor]
    lora_b: Sequence[torch.Tensor]
    out: torch.Tensor
    weights: torch.Tensor | None  # of the routing

    @classmethod
    def of(cls, case: Case, dtype: str, device: str, weighted: bool = False) -> _Layer:
        batch, numbers = make(case, {"dtype": dtype, "schedule": "blocks"}, device), case.generator()
        x, a = batch.make_x(numbers), batch.make_weights(batch.rank, case.k, numbers)
        b = batch.make_weights(case.n, batch.rank, numbers)
        shape = (batch.routed.sizes.tokens, case.top_k, case.offset + case.slices * case.n + 2)
        out = torch.randn(shape, generator=numbers).to(device, dtype_of(batch.tags))
        weights = torch.rand(shape[:2], generator=numbers).to(device) if weighted else None
        return cls(batch, x, a, b, out, weights)

    @property
    def options(self) -> dict[str, Any]:
        routed = {"topk_weights": self.weights, "mul_routed_weight": self.weights is not None}
        return {"offset": self.batch.case.offset, **routed}


def both_products_are_moe_lora(package: ModuleType, variants: Sequence[Variant], device: str) -> None:
    """moe_lora_shrink, then moe_lora_expand: within the bound of the two as one op, for every rank and kind of route."""
    dtypes, routes = sorted({v.tags["dtype"] for v in variants}), ("sorted", "naive", "tables")
    for rank, dtype, assignment, weighted in zip(
        (1, 24, 48, 96, 129, 8), itertools.cycle(dtypes), itertools.cycle(routes), itertools.cycle((True, True, False))
    ):
        case = dataclasses.replace(_CASE, rank=rank, row_a_pair=weighted, offset=5)
        layer = _Layer.of(case, dtype, device, weighted)
        out, route = layer.out.clone(), route_of(package, layer.batch.routed, assignment)
        y = torch.empty((2, layer.batch.num_pairs, rank), device=device)
        package.moe_lora_shrink(y, layer.x, layer.lora_a, route)
        package.moe_lora_expand(out, y, layer.lora_b, route, **layer.options)
        columns = slice(5, 5 + 2 * case.n)
        live, old = layer.batch.routed.live, layer.out[:, :, columns]
        expected = moe_lora(
            *(old, layer.x, layer.lora_a, layer.lora_b, live), topk_weights=layer.weights, add_inputs=True
        )
        rows = layer.batch.rows().view(out.shape[:2])
        try:
            worst_ratio(out[rows][:, columns], expected.out[rows], expected.bound[rows])
        except AssertionError as error:
            raise AssertionError(f"rank {rank}, {dtype}, {assignment}: {error}") from None
        assert torch.equal(out[~rows], layer.out[~rows]), "rows of pairs that are not live changed"
        assert torch.equal(out[..., columns.stop :], layer.out[..., columns.stop :]), "columns behind changed"


def gathered_or_joined_same_bits(package: ModuleType, variants: Sequence[Variant], device: str) -> None:
    """Parts of the rank as an all-gather leaves them, and side by side, give the same bits."""
    for assignment, (rank, shards) in itertools.product(("naive", "sorted"), ((16, 2), (24, 4), (192, 2))):
        layer = _Layer.of(dataclasses.replace(_CASE, rank=rank), variants[0].tags["dtype"], device)
        numbers = _CASE.generator()
        parts = torch.randn((shards, 2, layer.batch.num_pairs, rank // shards), generator=numbers).to(device)
        route, joined = route_of(package, layer.batch.routed, assignment), parts.permute(1, 2, 0, 3).reshape(2, -1, rank)
        one, other = layer.out.clone(), layer.out.clone()
        package.moe_lora_expand(one, parts, layer.lora_b, route, **layer.options)
        package.moe_lora_expand(other, joined, layer.lora_b, route, **layer.options)
        assert torch.equal(bits(one), bits(other)), f"{assignment}, rank {rank} in {shards} parts: other bits"
        assert not torch.equal(one, layer.out)


def an_offset_is_not_remembered(package: ModuleType, variants: Sequence[Variant], device: str) -> None:
    """A second call on the same operands with another offset writes there."""
    layer = _Layer.of(dataclasses.replace(_CASE, offset=8), variants[0].tags["dtype"], device)
    route, width = route_of(package, layer.batch.routed, "sorted"), 2 * _CASE.n
    y = torch.randn((2, layer.batch.num_pairs, 16), generator=_CASE.generator()).to(device)
    first, second = torch.zeros_like(layer.out), torch.zeros_like(layer.out)
    package.moe_lora_expand(first, y, layer.lora_b, route, offset=8)
    package.moe_lora_expand(second, y, layer.lora_b, route)
    assert torch.equal(second[..., :width], first[..., 8 : 8 + width])
    assert not second[..., width:].any() and not first[..., :8].any(), "other columns were written"


def every_rank_has_a_variant(package: ModuleType, variants: Sequence[Variant], device: str) -> None:
    """Each rank from 1 to 512 finds a variant in each dtype and form, on both kinds of route; nothing runs."""
    ranks = sorted({1, 200, 512} | {edge + step for edge in (16, 32, 64, 128, 256) for step in (0, 1)})
    dtypes = sorted({v.tags["dtype"] for v in variants})
    for dtype, assignment, weighted in itertools.product(dtypes, ("naive", "sorted"), (False, True)):
        layer = _Layer.of(dataclasses.replace(_CASE, rank=1), dtype, device, weighted)
        route = route_of(package, layer.batch.routed, assignment)
        for rank in ranks:
            fits = [w.new_empty((*w.shape[:3], rank)) for w in layer.lora_b]
            y = torch.empty((2, layer.batch.num_pairs, rank), device=device)
            with package._runtime.compile_only() as requests:
                package.moe_lora_expand(layer.out, y, fits, route, **layer.options)
            assert requests, f"rank {rank}: nothing to launch"


def wrong_arguments_are_named(package: ModuleType, variants: Sequence[Variant], device: str) -> None:
    """Arguments that do not fit raise ValueError, with what was given and wanted, before anything is written."""
    for schedule in ("pairs", "blocks"):
        variant = next(v for v in variants if v.tags["schedule"] == schedule and v.tags["routed_weight"] == "weighted")
        layer = _Layer.of(_CASE, variant.tags["dtype"], device, weighted=True)
        out, y = layer.out.clone(), torch.zeros((2, layer.batch.num_pairs, 16), device=device)
        route = route_of(package, layer.batch.routed, "naive" if schedule == "pairs" else "sorted")
        good = {"out": out, "y": y, "lora_b": layer.lora_b, "route": route, "topk_weights": layer.weights, "offset": 0}
        for label, (name, change) in _WRONG.items():
            wrong = {**good, name: change(good[name])}
            refuses(variant.launcher(package), wrong, variant.name, label)
            refuses(package.moe_lora_expand, {**wrong, "mul_routed_weight": True}, "moe_lora_expand", label)
        if all(variant.tags["add_inputs"] == "add" for variant in variants):
            refuses(package.moe_lora_expand, {**good, "add_inputs": False}, "moe_lora_expand", "to overwrite")
        assert torch.equal(out, layer.out), "out was written"


_WRONG: Mapping[str, tuple[str, Callable[[Any], Any]]] = {
    "out in fp32": ("out", lambda out: out.float()),
    "out of too few columns": ("out", lambda out: out[..., :-3]),
    "out of too few rows": ("out", lambda out: out[:-1]),
    "out with rows apart": ("out", lambda out: out.transpose(0, 1).contiguous().transpose(0, 1)),
    "columns behind the end": ("offset", lambda offset: 3),
    "a negative column": ("offset", lambda offset: -1),
    "y of another rank": ("y", lambda y: y[..., :-1]),
    "y of too few slices": ("y", lambda y: y[:1]),
    "y of parts of too many ranks": ("y", lambda y: y[None].expand(2, -1, -1, -1)),
    "y in fp64": ("y", lambda y: y.double()),
    "y with ranks apart": ("y", lambda y: y.transpose(1, 2).contiguous().transpose(1, 2)),
    "no slice": ("lora_b", lambda b: b[:0]),
    "weights of another dtype": ("lora_b", lambda b: tuple(w.float() for w in b)),
    "weights of two ranks": ("lora_b", lambda b: (b[0], b[1][..., :-1])),
    "too few adapters": ("lora_b", lambda b: tuple(w[:-1] for w in b)),
    "no routing weights": ("topk_weights", lambda weights: None),
    "routing weights of tokens": ("topk_weights", lambda weights: weights[:, :1]),
}

LAWS = (
    Law(both_products_are_moe_lora),
    Law(gathered_or_joined_same_bits),
    Law(an_offset_is_not_remembered),
    Law(every_rank_has_a_variant),
    Law(wrong_arguments_are_named),
)
