"""What holds between the variants of moe_lora_shrink, and between calls: through the front door, with real routes."""

from __future__ import annotations

import dataclasses
import itertools
from types import ModuleType
from typing import Any, Callable, Mapping, Sequence

import torch

from kernelgen.families.buffers import bits, poison_
from kernelgen.families.case import Law, Variant, worst_ratio
from kernelgen.families.lora_shrink.laws import refuses
from kernelgen.families.moe_lora.laws import other_kind, route_of
from kernelgen.families.moe_lora_apart import Batch, Case, make
from kernelgen.families.moe_lora_shrink.cases import tiles
from kernelgen.families.moe_lora_shrink.reference import moe_lora_shrink
from kernelgen.families.moe_routing import Routing
from kernelgen.families.tiles import CARDS, KS, bare_route, on_card, parts_of_tiles, problem_of

_CASE = Case(
    "law", "the batch of the laws", tokens=8, loras=3, slices=2, k=150, rank=16, routing=Routing("mixed", disabled=(0,))
)


def front_door(package: ModuleType, variants: Sequence[Variant], device: str) -> None:
    """moe_lora_shrink serves every rank, dtype and kind of route, within the bound; pairs that are not live are 0."""
    dtypes = itertools.cycle(sorted({v.tags["dtype"] for v in variants}))
    routes = itertools.cycle(("sorted", "naive", "tables"))
    for rank, dtype, assignment, a_pair in zip(
        (1, 24, 48, 96, 129, 8), dtypes, routes, itertools.cycle((False, True, True)), strict=False
    ):
        batch, x, a, y = _operands(dataclasses.replace(_CASE, rank=rank, row_a_pair=a_pair), dtype, device)
        package.moe_lora_shrink(y, x, a, route_of(package, batch.routed, assignment))
        expected = moe_lora_shrink(x, a, batch.routed.live, num_pairs=batch.num_pairs)
        rows = batch.rows()
        try:
            worst_ratio(y[:, rows], expected.value[:, rows], expected.bound[:, rows])
        except AssertionError as error:
            raise AssertionError(f"rank {rank}, {dtype}, {assignment}: {error}") from None
        assert not y[:, ~rows].any(), f"rank {rank}, {assignment}: y is not 0 where a pair is not live"


def a_part_of_the_rank_has_the_bits_of_the_whole(package: ModuleType, variants: Sequence[Variant], device: str) -> None:
    """On a sorted route: so an all-gather gives what one GPU would have given. Few tokens, and a call that is repeated."""
    for rank, parts in ((16, 2), (32, 4)):
        batch, x, a, y = _operands(dataclasses.replace(_CASE, rank=rank, k=600), variants[0].tags["dtype"], device)
        route = route_of(package, batch.routed, "sorted")
        package.moe_lora_shrink(y, x, a, route)
        again = torch.full_like(y, torch.nan)
        for i in range(parts):
            part = slice(i * rank // parts, (i + 1) * rank // parts)
            package.moe_lora_shrink(again[:, :, part], x, [w[:, :, part] for w in a], route)
        assert torch.equal(bits(y.contiguous()), bits(again)), f"rank {rank} in {parts} parts: other bits"


def stale_workspace(package: ModuleType, variants: Sequence[Variant], device: str) -> None:
    """What an earlier, larger batch left in a workspace and in y changes nothing (vLLM #42008, #40038)."""
    space = package.moe_workspace(
        max_tokens=8, top_k=2, num_experts=3, max_loras=3, max_rank=16, num_slices=2, device=device
    )
    for buffer in (space.tables, space.parts):
        poison_(buffer)
    for assignment, tokens in itertools.product(("naive", "sorted"), (8, 3, 0)):
        batch, x, a, y = _operands(dataclasses.replace(_CASE, tokens=tokens, k=600), variants[0].tags["dtype"], device)
        package.moe_lora_shrink(y, x, a, route_of(package, batch.routed, assignment, space))
        other = torch.full_like(y, torch.nan)
        package.moe_lora_shrink(other, x, a, route_of(package, batch.routed, assignment))
        assert torch.equal(bits(y.contiguous()), bits(other.contiguous())), f"{assignment}, {tokens} tokens"


def every_rank_has_a_variant(package: ModuleType, variants: Sequence[Variant], device: str) -> None:
    """Each rank from 1 to 512 finds a variant in each dtype, on both kinds of route; nothing runs."""
    ranks = sorted({1, 200, 512} | {edge + step for edge in (16, 32, 64, 128, 256) for step in (0, 1)})
    for dtype, assignment in itertools.product(sorted({v.tags["dtype"] for v in variants}), ("naive", "sorted")):
        batch, x, a, y = _operands(dataclasses.replace(_CASE, rank=1), dtype, device)
        route = route_of(package, batch.routed, assignment)
        for rank in ranks:
            fits = [w.new_empty((*w.shape[:2], rank, w.shape[3])) for w in a]
            with package._runtime.compile_only() as requests:
                package.moe_lora_shrink(y.new_empty((*y.shape[:2], rank)), x, fits, route)
            assert requests, f"rank {rank}: nothing to launch"


def tiles_end_with_what_they_divide(package: ModuleType, variants: Sequence[Variant], device: str) -> None:
    """A tile ends with its part of K, on every card; and a launcher refuses tiles that do not. Nothing runs."""
    for card, k, rank, slices in itertools.product(CARDS, KS, (8, 100), (1, 2)):
        for tokens, block_m in itertools.product((1, 60, 2000), (0, 16, 128)):
            rule, problem = problem_of(package, "moe_lora_shrink", k=k, rank=rank, slices=slices)
            with on_card(package, card):
                route = bare_route(package, tokens, block_m, top_k=8, experts=128)
                config = rule.choose("blocks" if block_m else "pairs", problem, route)
            where = f"{card.name}, rank {rank}, {slices} slices, {tokens} tokens, blocks of {block_m}"
            parts_of_tiles(k, config, where)
            assert block_m or config.split_k % config.block_k == 0, f"{where}: a part is not of whole tiles: {config}"
    for schedule in ("pairs", "blocks"):
        variant = next(v for v in variants if v.tags["schedule"] == schedule)
        batch, x, a, y = _operands(dataclasses.replace(_CASE, rank=1), variant.tags["dtype"], device)
        launcher, route = variant.launcher(package), route_of(package, batch.routed, "naive" if schedule == "pairs" else "sorted")
        config = tiles(launcher, _CASE)._replace(block_k=64, split_k=96)
        given = {"y": y, "x": x, "lora_a": a, "route": route, "config": config}
        refuses(launcher, given, variant.name, "a tile in two parts")


def wrong_arguments_are_named(package: ModuleType, variants: Sequence[Variant], device: str) -> None:
    """Arguments that do not fit raise ValueError, with what was given and wanted, before anything is written."""
    for schedule in ("pairs", "blocks"):
        variant = next(v for v in variants if v.tags["schedule"] == schedule)
        batch, x, a, y = _operands(_CASE, variant.tags["dtype"], device)
        route = route_of(package, batch.routed, "naive" if schedule == "pairs" else "sorted")
        before = bits(y).clone()
        good = {"y": y, "x": x, "lora_a": a, "route": route}
        for label, (name, change) in _WRONG.items():
            for op, called in ((variant.name, variant.launcher(package)), ("moe_lora_shrink", package.moe_lora_shrink)):
                refuses(called, {**good, name: change(good[name])}, op, label)
        assert torch.equal(bits(y), before), "y was written"
    refuses(variant.launcher(package), {**good, "route": other_kind(route)}, variant.name, "a naive route")


_WRONG: Mapping[str, tuple[str, Callable[[Any], Any]]] = {
    "y in 16 bits": ("y", lambda y: y.bfloat16()),
    "y of another rank": ("y", lambda y: y[..., :-1]),
    "y of too few slices": ("y", lambda y: y[:1]),
    "y of tokens": ("y", lambda y: y[:, ::2]),
    "y with ranks apart": ("y", lambda y: y.transpose(1, 2).contiguous().transpose(1, 2)),
    "x in fp32": ("x", lambda x: x.float()),
    "x of another K": ("x", lambda x: x[:, :-1]),
    "x of too few rows": ("x", lambda x: x[:-1]),
    "x with columns apart": ("x", lambda x: x.t().contiguous().t()),
    "no slice": ("lora_a", lambda a: a[:0]),
    "slices of two shapes": ("lora_a", lambda a: (a[0], a[1][:, :, :-1])),
    "slices of two strides": ("lora_a", lambda a: (a[0], a[1].contiguous())),
    "slices of two dtypes": ("lora_a", lambda a: (a[0], a[1].float())),
    "weights of one expert": ("lora_a", lambda a: tuple(w[:, 0] for w in a)),
    "too few adapters": ("lora_a", lambda a: tuple(w[:-1] for w in a)),
    "too few experts": ("lora_a", lambda a: tuple(w[:, :-1] for w in a)),
    "a route of more tokens": ("route", lambda r: r._replace(num_tokens=r.num_tokens + 1)),
}

LAWS = (
    Law(front_door),
    Law(a_part_of_the_rank_has_the_bits_of_the_whole),
    Law(stale_workspace),
    Law(every_rank_has_a_variant),
    Law(tiles_end_with_what_they_divide),
    Law(wrong_arguments_are_named),
)


def _operands(case: Case, dtype: str, device: str) -> tuple[Batch, torch.Tensor, Sequence[torch.Tensor], torch.Tensor]:
    """(batch, x, lora_a, y)"""
    batch, numbers = make(case, {"dtype": dtype, "schedule": "blocks"}, device), case.generator()
    x = batch.make_x(numbers)
    return batch, x, batch.make_weights(batch.rank, case.k, numbers), batch.make_y()
