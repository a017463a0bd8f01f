"""What holds for the route of a dense layer, between the variants of lora_shrink, and between calls."""

from __future__ import annotations

import dataclasses
import itertools
from types import ModuleType
from typing import Any, Callable, Iterator, Mapping, Sequence

import torch

from kernelgen.core.model import VOCABULARY
from kernelgen.families import lora_inputs
from kernelgen.families.buffers import allocate_sparse, bits, poison_
from kernelgen.families.case import Law, Variant, worst_ratio
from kernelgen.families.lora_inputs import Batch, Case
from kernelgen.families.lora_shrink.cases import tiles
from kernelgen.families.lora_shrink.reference import lora_shrink
from kernelgen.families.moe_route.reference import Live, faults, moe_route
from kernelgen.families.tiles import CARDS, KS, bare_route, measured_tiles, on_card, problem_of

_CASE = Case("law", "the batch of the laws", tokens=9, k=330, widths=(1, 1), adapters="mixed", rank=16)
_FULL = dataclasses.replace(_CASE, rank="full")


def route_is_the_references(package: ModuleType, variants: Sequence[Variant], device: str) -> None:
    """lora_route makes exactly the tables of the reference, in poisoned workspaces, for few tokens and many."""
    for tokens, block_m in ((0, None), (1, 16), (40, None), (70, 64), (513, 32), (2049, 128)):
        batch = lora_inputs.draw(dataclasses.replace(_CASE, tokens=tokens), device)
        space = package.lora_workspace(max_tokens=max(tokens, 1), max_loras=3, max_rank=16, num_slices=1, device=device)
        poison_(space.tables)
        for workspace in (space, space, None) if tokens < 64 else (space,):
            route = package.lora_route(batch.mapping, max_loras=3, workspace=workspace, block_m=block_m)
            if tokens == 0:
                continue
            live = [Live(t, a, 0) for t, a in enumerate(batch.adapters) if a is not None]
            wanted = moe_route(live, block_m=route.block_m)
            count = int(route.num_blocks)
            pairs, blocks = route.pairs[: len(live)].cpu(), route.blocks[:count].cpu()
            found = list(faults(live, route.pairs.cpu(), blocks, block_m=route.block_m))
            assert not found, f"{tokens} tokens: {found[:3]}"
            assert torch.equal(blocks, wanted.blocks), f"{tokens} tokens: other blocks"
            assert torch.equal(pairs, wanted.pairs), f"{tokens} tokens: not in ascending order"


def front_door(package: ModuleType, variants: Sequence[Variant], device: str) -> None:
    """lora_shrink serves every rank and dtype, within the bound, on a route of lora_route."""
    dtypes = itertools.cycle(sorted({v.tags["dtype"] for v in variants}))
    for rank, dtype in zip((1, 24, 48, 96, 129), dtypes, strict=False):
        case = dataclasses.replace(_CASE, rank=rank, k=600)
        x, a, y, batch = operands(case, {"dtype": dtype}, device)
        expected = lora_shrink(y, x, a, batch.adapters, scaling=0.3)
        before = bits(y).clone()
        route = package.lora_route(batch.mapping, max_loras=case.loras)
        package.lora_shrink(y, x, a, route, scaling=0.3)
        rows = batch.rows().expand(y.shape[:2])
        try:
            worst_ratio(y[rows], expected.value[rows], expected.bound[rows])
        except AssertionError as error:
            raise AssertionError(f"rank {rank}, {dtype}: {error}") from None
        assert torch.equal(bits(y)[~rows], before[~rows]), f"rank {rank}: rows of tokens without an adapter changed"
        again = torch.full_like(y, torch.nan)
        package.lora_shrink(again, x, a, route, scaling=0.3, zero_rest=True)
        assert torch.equal(bits(again), bits(torch.where(rows[..., None], y, 0.0))), f"rank {rank}: no zeros in other rows"


def any_batch_any_split_same_bits(package: ModuleType, variants: Sequence[Variant], device: str) -> None:
    """A token has the same bits when a call is repeated, whichever tokens are with it, and however K is shared out."""
    chosen = [7, 1, 4]
    for variant in _first_of(variants):
        x, a, y, batch = operands(_CASE, variant.tags, device)
        launcher, loras = variant.launcher(package), _CASE.loras
        route = package.lora_route(batch.mapping, max_loras=loras, block_m=16)
        part = package.lora_route(batch.mapping[chosen], max_loras=loras, block_m=16)
        made = []
        for parts, together in ((1, 1), (1, 1), (0, 1), (0, 0), (1, 0), (2, 1), (2, 0)):
            config = tiles(launcher, dataclasses.replace(_CASE, parts=parts, together=bool(together)))
            of_all, of_some = y.clone(), y[:, chosen].clone()
            launcher(of_all, x, a, route, scaling=0.3, config=config)
            launcher(of_some, x[chosen], a, part, scaling=0.3, config=config)
            made += [of_all[:, chosen], of_some]
        assert all(torch.equal(bits(made[0]), bits(other)) for other in made), f"{variant.name}: other bits"


def ranks_that_count(package: ModuleType, variants: Sequence[Variant], device: str) -> None:
    """Adapters of lower ranks than their buffers have the bits of whole ones, times their scalings, and zeros behind; no row of A
    there is read, nor one of another adapter where a count is too large, or negative."""
    for variant in (v for v in variants if v.tags["rank"] == "r16" and v.tags["dtype"] == "bf16"):
        case = dataclasses.replace(_CASE, tokens=6, k=1300, rank="part")
        batch, numbers, rank = lora_inputs.draw(case, device), case.generator(), lora_inputs.rank_of(case, variant.tags)
        x = lora_inputs.make_x(case, variant.tags, batch, numbers)
        a = lora_inputs.make_weights(case, variant.tags, batch, [rank] * len(case.widths), case.k, numbers)
        options = {**lora_inputs.scales_of("a_scale", a), **({} if x.scales is None else {"x_scale": x.scales})}
        route = package.lora_route(batch.mapping, max_loras=case.loras)
        whole, part = (lora_inputs.make_y(case, variant.tags, batch, None) for _ in range(2))
        package.lora_shrink(whole, x.tensor, lora_inputs.given(case, a), route, scaling=0.3, **options)
        counts = [rank + 9, rank - 2, -3]
        for weights, (adapter, count) in itertools.product(a, enumerate(counts)):
            behind = weights.tensor[adapter, max(count, 0) :]
            behind.copy_(poison_(torch.empty_like(behind, memory_format=torch.contiguous_format)))
        ranks = torch.tensor(counts, dtype=torch.int32, device=device)
        scalings = torch.tensor([2.0, 0.5, 4.0], device=device)
        options |= {"lora_ranks": ranks, "scalings": scalings}
        package.lora_shrink(part, x.tensor, lora_inputs.given(case, a), route, scaling=0.3, **options)
        for token in batch.live:
            whole[:, token] *= scalings[batch.adapters[token] or 0]
            whole[:, token, max(counts[batch.adapters[token] or 0], 0) :] = 0.0
        assert torch.equal(bits(part), bits(whole)), f"{variant.name}: other bits"


def far_tokens_same_bits(package: ModuleType, variants: Sequence[Variant], device: str) -> None:
    """The last of so many tokens that no slice of y, and no part of it, is in reach of 32-bit offsets: the bits of it alone."""
    variant = next(v for v in variants if v.tags["rank"] == "rany" and v.tags["weight_quant"] == v.tags["act_quant"] == "none")
    launcher, slices, rank, k = variant.launcher(package), 3, 512, 128
    case = dataclasses.replace(_CASE, tokens=1, k=k, widths=(1,) * slices, rank=rank, adapters="one")
    batch, numbers = lora_inputs.draw(case, device), case.generator()
    x = lora_inputs.make_x(case, variant.tags, batch, numbers).tensor
    a = [w.tensor for w in lora_inputs.make_weights(case, variant.tags, batch, [rank] * slices, k, numbers)]
    for parts, together in ((0, True), (1, False)):
        made = []
        for tokens in (1, 2**21):
            rows = allocate_sparse((tokens, k), (k, 1), x.dtype, device)
            rows[-1] = x[0]
            y = allocate_sparse((slices, tokens, rank), (tokens * rank, rank, 1), torch.float32, device)
            space = allocate_sparse((2 * y.numel(),), (1,), torch.float32, device)
            route = lora_inputs.lone_route(package, tokens, case.loras, space, device)
            config = tiles(launcher, dataclasses.replace(case, parts=parts, together=together))
            launcher(y, rows, a, route, scaling=0.3, config=config)
            made.append(y[:, -1].clone())
        assert torch.equal(*map(bits, made)), f"{parts} parts: other bits"


def every_rank_has_a_variant(package: ModuleType, variants: Sequence[Variant], device: str) -> None:
    """Each rank from 1 to 512 finds a variant in each dtype; nothing runs."""
    ranks = sorted({1, 200, 512} | {edge + step for edge in (16, 32, 64, 128, 256) for step in (0, 1)})
    for dtype, rank in itertools.product(sorted({v.tags["dtype"] for v in variants}), ranks):
        x, a, y, batch = operands(dataclasses.replace(_CASE, rank=1), {"dtype": dtype}, device)
        route = package.lora_route(batch.mapping, max_loras=_CASE.loras)
        with package._runtime.compile_only() as requests:
            fits = [w.new_empty((w.shape[0], rank, w.shape[2])) for w in a]
            package.lora_shrink(y.new_empty((*y.shape[:2], rank)), x, fits, route)
        assert requests, f"rank {rank}: nothing to launch"


def tiles_end_with_what_they_divide(package: ModuleType, variants: Sequence[Variant], device: str) -> None:
    """A tile ends with its chunk and its group of scales, it fits a card, and chunks fit a workspace; the order of a sum
    depends on the layer alone. Nothing runs."""
    for variant, k, slices in itertools.product(variants, KS, (1, 2, 3)):
        if variant.tags["dtype"] != "bf16":
            continue
        rank = lora_inputs.rank_of(_FULL, variant.tags)
        of_weights = VOCABULARY["weight_quant"][variant.tags["weight_quant"]]["weight_scales"]
        of_x = VOCABULARY["act_quant"][variant.tags["act_quant"]]["x_scales"]
        sizes = {"k": k, "slices": slices, "rank": rank, "weight_scales": of_weights, "x_scales": of_x}
        scaled, grouped = bool(of_weights or of_x), "group" in (of_weights, of_x)
        orders = set()
        for card, tokens, block_m in itertools.product(CARDS, (1, 2000, 9000), (16, 64, 128)):
            rule, problem = problem_of(package, "lora_shrink", num_tokens=tokens, **sizes)
            with on_card(package, card):
                config = rule.choose(problem, bare_route(package, tokens, block_m))
            where = f"{variant}, {card.name}, K {k}, {slices} slices, {tokens} tokens, blocks of {block_m}: {config}"
            assert config.chunk_k % config.block_k == 0, f"{where}: a tile lies in two chunks"
            assert not grouped or rule.QUANT.group_k % config.block_k == 0, f"{where}: a tile needs the scales of two groups"
            parts = problem.parts(config).number
            assert parts * slices <= rule.max_parts(slices), f"{where}: {parts} parts"
            assert scaled or parts == 1 or tokens <= rule.MAX_TOKENS_IN_PARTS, f"{where}: parts beyond the workspace"
            ranks = min(config.ranks, rank) * (slices if config.together else 1)
            column = (1 if of_x else 2) * min(config.rows, block_m) + (1 if of_weights else 2) * ranks
            assert not scaled or config.rows <= 32, f"{where}: more rows add FP8 in another order"
            assert config.stages * config.block_k * column <= card.program_shared, f"{where}: {column} bytes a column"
            # Scales round what they are applied to: tiles, or parts.
            orders.add((config.chunk_k, config.block_k if grouped else config.parts == 1 if scaled else None))
        assert len(orders) == 1, f"{variant}, K {k}, {slices} slices: a sum in the order of the batch or the card: {orders}"


def measured_tiles_keep_the_order(package: ModuleType, variants: Sequence[Variant], device: str) -> None:
    """Tiles that were measured are found, and add up a sum in the order that the rule has for the layer. Nothing runs."""
    for _, key, ((_, tiles_of), *_) in measured_tiles(package, "lora_shrink"):
        tokens, loras, k, slices, rank, of_weights, of_x = key
        sizes = {"k": k, "slices": slices, "rank": rank, "weight_scales": of_weights, "x_scales": of_x}
        rule, problem = problem_of(package, "lora_shrink", num_tokens=tokens, **sizes)
        found = [rule.choose(problem, bare_route(package, tokens, rows, loras=loras)) for rows in (16, 32, 64, 128)]
        measured = rule.Config(*tiles_of)
        assert measured in found, f"{key}: {measured} is not what is chosen"
        scaled, grouped = bool(of_weights or of_x), "group" in (of_weights, of_x)
        for other in found:
            assert measured.chunk_k == other.chunk_k, f"{key}: chunks of {measured.chunk_k}, by the rule of {other.chunk_k}"
            assert not grouped or measured.block_k == other.block_k, f"{key}: groups in tiles of {measured.block_k}"
            assert grouped or not scaled or measured.parts == other.parts == 1, f"{key}: a sum is scaled elsewhere"
        assert measured.chunk_k % measured.block_k == 0, f"{key}: a tile lies in two chunks"
        assert not scaled or measured.rows <= 32, f"{key}: more rows add FP8 in another order"


def scales_are_told_apart(package: ModuleType, variants: Sequence[Variant], device: str) -> None:
    """By the shapes, where a matrix has as many groups of columns as ranks too. Nothing runs."""
    rule, _ = problem_of(package, "lora_shrink")
    groups, experts = torch.empty(3, 32, 32 * rule.QUANT.group_k), torch.empty(3, 1, 32, 32 * rule.QUANT.group_k)
    for weights, shape, wanted in (
        (groups, (3,), "tensor"),
        (groups, (3, 32), "channel"),
        (groups, (3, 1, 32), "group"),
        (experts, (3, 1), "tensor"),
        (experts, (3, 1, 32), "channel"),
        (experts, (3, 1, 1, 32), "group"),
    ):
        found = rule.kind_of_scales("lora", "a_scale", [torch.empty(shape)], [weights], rule.QUANT)
        assert found == wanted, f"scales {shape} of weights {tuple(weights.shape)}: {found}, wanted {wanted}"


def wrong_arguments_are_named(package: ModuleType, variants: Sequence[Variant], device: str) -> None:
    """Arguments that do not fit raise ValueError, with what was given and wanted, before anything is written."""
    variant = variants[0]
    x, a, y, batch = operands(_CASE, variant.tags, device)
    route = package.lora_route(batch.mapping, max_loras=_CASE.loras)
    before = bits(y).clone()
    good = {"y": y, "x": x, "lora_a": a, "route": route}
    for label, (name, change) in _WRONG.items():
        for op, called in ((variant.name, variant.launcher(package)), ("lora_shrink", package.lora_shrink)):
            refuses(called, {**good, name: change(good[name])}, op, label)
    two_chunks = tiles(variant.launcher(package), _CASE)._replace(block_k=64, chunk_k=96)
    refuses(variant.launcher(package), {**good, "config": two_chunks}, variant.name, "a tile in two chunks")
    assert torch.equal(bits(y), before), "y was written"


def refuses(called: Callable[..., None], arguments: Mapping[str, Any], op: str, label: str) -> None:
    """Raise AssertionError unless a call raises a ValueError that says all it should."""
    try:
        called(**arguments)
    except ValueError as error:
        assert all(word in str(error) for word in (op, "got", "wanted")), f"{op}, {label}: {error}"
    else:
        raise AssertionError(f"{op}: {label} is let pass")


_WRONG: Mapping[str, tuple[str, Callable[[Any], Any]]] = {
    "y in 16 bits": ("y", lambda y: y.bfloat16()),
    "y of another rank": ("y", lambda y: y[..., :-1].contiguous()),
    "y of too few slices": ("y", lambda y: y[:1]),
    "y that is not contiguous": ("y", lambda y: y.transpose(0, 1).contiguous().transpose(0, 1)),
    "x in fp32": ("x", lambda x: x.float()),
    "x of another K": ("x", lambda x: x[:, :-1]),
    "x of too few rows": ("x", lambda x: x[:-1]),
    "x with columns apart": ("x", lambda x: x.t().contiguous().t()),
    "no slice": ("lora_a", lambda a: a[:0]),
    "slices of two shapes": ("lora_a", lambda a: (a[0], a[1][:, :-1])),
    "slices of two strides": ("lora_a", lambda a: (a[0], a[1].contiguous())),
    "slices of two dtypes": ("lora_a", lambda a: (a[0], a[1].float())),
    "two experts": ("lora_a", lambda a: tuple(w.unsqueeze(1).expand(-1, 2, -1, -1) for w in a)),
    "too few adapters": ("lora_a", lambda a: tuple(w[:-1] for w in a)),
    "a route of experts": ("route", lambda r: r._replace(num_experts=2)),
    "a route of pairs": ("route", lambda r: r._replace(top_k=2)),
    "a route of more tokens": ("route", lambda r: r._replace(num_tokens=r.num_tokens + 1)),
}


def route_refuses_what_it_cannot_sort(package: ModuleType, variants: Sequence[Variant], device: str) -> None:
    """A mapping or an option that does not fit raises ValueError."""
    mapping = lora_inputs.draw(_CASE, device).mapping
    for label, arguments in {
        "a mapping of two dimensions": {"token_lora_mapping": mapping[None], "max_loras": 3},
        "a mapping in 64 bits": {"token_lora_mapping": mapping.long(), "max_loras": 3},
        "a mapping with gaps": {"token_lora_mapping": mapping[::2], "max_loras": 3},
        "no adapter": {"token_lora_mapping": mapping, "max_loras": 0},
        "another block": {"token_lora_mapping": mapping, "max_loras": 3, "block_m": 24},
    }.items():
        refuses(package.lora_route, arguments, "lora_route", label)


ALSO = ("moe_route",)  # whose kernels run here too
LAWS = (
    Law(route_is_the_references),
    Law(front_door),
    Law(any_batch_any_split_same_bits),
    Law(ranks_that_count),
    Law(far_tokens_same_bits),
    Law(every_rank_has_a_variant),
    Law(tiles_end_with_what_they_divide),
    Law(measured_tiles_keep_the_order),
    Law(scales_are_told_apart),
    Law(wrong_arguments_are_named),
    Law(route_refuses_what_it_cannot_sort),
)


def operands(case: Case, tags: Mapping[str, str], device: str) -> tuple[torch.Tensor, Any, torch.Tensor, Batch]:
    """(x, lora_a, y, batch)"""
    batch, numbers = lora_inputs.draw(case, device), case.generator()
    x = lora_inputs.make_x(case, tags, batch, numbers)
    rank = lora_inputs.rank_of(case, tags)
    a = lora_inputs.make_weights(case, tags, batch, [rank] * len(case.widths), case.k, numbers)
    return x.tensor, lora_inputs.given(case, a), lora_inputs.make_y(case, tags, batch, None), batch


def _first_of(variants: Sequence[Variant]) -> Iterator[Variant]:
    """A 16-bit variant of the smallest and one of the largest rank bucket."""
    plain = [v for v in variants if v.tags["weight_quant"] == v.tags["act_quant"] == "none"]
    yield plain[0]
    yield plain[-1]
