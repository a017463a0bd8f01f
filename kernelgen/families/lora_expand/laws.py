"""What holds between the variants of lora_expand, between calls, and for both products as one op (``lora``)."""

from __future__ import annotations

import dataclasses
import itertools
from types import ModuleType
from typing import Any, Callable, Mapping, Sequence

import torch

from kernelgen.families import lora_inputs
from kernelgen.families.buffers import allocate_sparse, bits, poison_
from kernelgen.families.case import Law, Variant, worst_ratio
from kernelgen.families.lora_expand.reference import lora_expand
from kernelgen.families.lora_inputs import Batch, Case
from kernelgen.families.lora_shrink.laws import operands as operands_of_shrink
from kernelgen.families.lora_shrink.laws import refuses
from kernelgen.families.lora_shrink.reference import lora_shrink
from kernelgen.families.tiles import bare_route, measured_tiles, problem_of

_CASE = Case(
    "law", "the batch of the laws", tokens=9, k=600, widths=(70, 33), adapters="mixed", rank=16, offset=3
)


@dataclasses.dataclass(frozen=True)
class _Layer:
    """Operands of a linear layer."""

    x: torch.Tensor
    lora_a: tuple[torch.Tensor, ...]
    lora_b: tuple[torch.Tensor, ...]
    out: torch.Tensor
    batch: Batch

    @classmethod
    def of(cls, case: Case, tags: Mapping[str, str], device: str) -> _Layer:
        x, a, _, batch = operands_of_shrink(case, tags, device)
        numbers, rank = case.generator(), lora_inputs.rank_of(case, tags)
        b = lora_inputs.given(case, lora_inputs.make_weights(case, tags, batch, case.widths, rank, numbers))
        shape = (case.tokens, case.offset + sum(case.widths) + 2)
        out = torch.randn(shape, generator=numbers).to(device, lora_inputs.dtype_of(tags))
        return cls(x, a, b, out, batch)

    def apply(self, package: ModuleType, out: torch.Tensor, chosen: Any = slice(None), **options: Any) -> torch.Tensor:
        """Route and op on some of the tokens."""
        workspace, adds = options.get("workspace"), options.get("add_inputs", True)
        mapping = self.batch.mapping[chosen].contiguous()
        route = package.lora_route(mapping, max_loras=_CASE.loras, workspace=workspace, block_m=options.get("block_m"))
        at = options.get("offset_start", _CASE.offset)
        package.lora(
            *(out, self.x[chosen], self.lora_a, self.lora_b, route), scaling=0.3, offset_start=at, add_inputs=adds
        )
        return out


def measured_tiles_are_found(package: ModuleType, variants: Sequence[Variant], device: str) -> None:
    """Tiles that were measured are chosen, for set too, and multiply FP8 in the rows that keep its order. Nothing runs."""
    for _, key, ((_, tiles), *_) in measured_tiles(package, "lora_expand"):
        tokens, loras, k, n, narrow, slices, rank, _, of_weights = key
        widths = (n - (slices - 1) * narrow, *[narrow] * (slices - 1))
        sizes = {"widths": widths, "rank": rank, "weight_scales": of_weights}
        rule, problem = problem_of(package, "lora_expand", num_tokens=tokens, **sizes)
        found = [rule.choose(problem, bare_route(package, tokens, rows, loras=loras), k) for rows in (16, 32, 64, 128)]
        measured = rule.Config(*tiles)
        assert measured in found, f"{key}: {measured} is not what is chosen"
        assert of_weights is None or measured.rows <= 32, f"{key}: more rows add FP8 in another order"


def both_products_give_the_same_bits(package: ModuleType, variants: Sequence[Variant], device: str) -> None:
    """lora, for every rank, dtype and flag: the bits of lora_shrink and then lora_expand, which are within the bound."""
    ranks, dtypes = (1, 24, 48, 96, 129), sorted({v.tags["dtype"] for v in variants})
    flags = itertools.cycle((True, True, False))
    for rank, dtype, adds, wide in zip(ranks, itertools.cycle(dtypes), flags, itertools.cycle((False, True)), strict=False):
        case = dataclasses.replace(_CASE, rank=rank)
        layer = _Layer.of(case, {"dtype": dtype}, device)
        if wide:
            layer = dataclasses.replace(layer, out=layer.out.float())
        route = package.lora_route(layer.batch.mapping, max_loras=case.loras)
        y = torch.full((2, case.tokens, rank), torch.nan, device=device)
        package.lora_shrink(y, layer.x, layer.lora_a, route, scaling=0.3)
        rows = layer.batch.rows()
        assert y[:, ~rows].isnan().all(), "rows of tokens without an adapter were written"
        expected = lora_expand(
            layer.out, y, layer.lora_b, layer.batch.adapters, offset_start=case.offset, add_inputs=adds, dtype=layer.x.dtype
        )
        out = layer.out.clone()
        package.lora_expand(out, y, layer.lora_b, route, offset_start=case.offset, add_inputs=adds)
        written = slice(case.offset, case.offset + sum(case.widths))
        worst_ratio(out[rows, written], expected.value[rows, written], expected.bound[rows, written])
        assert torch.equal(out[~rows], layer.out[~rows]), "rows of tokens without an adapter changed"
        one = layer.apply(package, layer.out.clone(), add_inputs=adds)
        assert torch.equal(bits(one), bits(out)), f"rank {rank}, {dtype}: lora has other bits"


def fp8_front_doors(package: ModuleType, variants: Sequence[Variant], device: str) -> None:
    """The front doors find the kind of scales by their shapes; lora gives the bits of the two products, which are right."""
    for weights, x_kind, rank, adds in _SCALES:
        case = dataclasses.replace(_CASE, k=140, rank=rank)
        tags = {"dtype": "bf16", "weight_quant": weights, "act_quant": x_kind}
        batch, numbers = lora_inputs.draw(case, device), case.generator()
        x = lora_inputs.make_x(case, tags, batch, numbers)
        a = lora_inputs.make_weights(case, tags, batch, [rank] * 2, case.k, numbers)
        b = lora_inputs.make_weights(case, tags, batch, case.widths, rank, numbers)
        a_scale, b_scale = lora_inputs.scales_of("a_scale", a), lora_inputs.scales_of("b_scale", b)
        x_scale = {} if x.scales is None else {"x_scale": x.scales}
        given_a, given_b = lora_inputs.given(case, a), lora_inputs.given(case, b)
        route = package.lora_route(batch.mapping, max_loras=case.loras)
        y = torch.full((2, case.tokens, rank), torch.nan, device=device)
        package.lora_shrink(y, x.tensor, given_a, route, scaling=0.3, **a_scale, **x_scale)
        rows, live = batch.rows(), [w.numbers for w in a]
        wanted = lora_shrink(y, x.numbers, live, batch.adapters, scaling=0.3, scaled=True)
        of_rows = rows.expand(y.shape[:2])
        worst_ratio(y[of_rows], wanted.value[of_rows], wanted.bound[of_rows])
        out = torch.ones((case.tokens, sum(case.widths)), dtype=torch.bfloat16, device=device)
        one = out.clone()
        flags: dict[str, Any] = {"offset_start": 0, "add_inputs": adds}
        exact = lora_expand(out, y, [w.numbers for w in b], batch.adapters, **flags, scaled=True)
        package.lora_expand(out, y, given_b, route, **b_scale, **flags)
        worst_ratio(out[rows], exact.value[rows], exact.bound[rows])
        package.lora(one, x.tensor, given_a, given_b, route, scaling=0.3, **a_scale, **b_scale, **x_scale, **flags)
        assert torch.equal(bits(one), bits(out)), f"{weights}, {x_kind}: lora has other bits"
        for name in {**a_scale, **b_scale, **x_scale}:
            lacking = {**a_scale, **b_scale, **x_scale}
            del lacking[name]
            operands = {"out": one, "x": x.tensor, "lora_a": given_a, "lora_b": given_b, "route": route}
            refuses(package.lora, {**operands, **lacking}, "lora", f"{weights}, {x_kind} without {name}")


# Of weights and of x, a rank, and whether is added.
_SCALES = (
    ("w8tensor", "none", 16, False),
    ("w8tensor", "a8tensor", 16, True),
    ("w8channel", "a8token", 200, True),
    ("w8group", "a8group", 24, True),
    ("none", "a8tensor", 16, True),
)


def any_batch_same_bits(package: ModuleType, variants: Sequence[Variant], device: str) -> None:
    """A token has the same bits when a call is repeated, and whichever tokens are with it (vLLM #50059)."""
    chosen = [7, 1, 4]
    for dtype, rank in zip(sorted({v.tags["dtype"] for v in variants}), (16, 129), strict=False):
        layer = _Layer.of(dataclasses.replace(_CASE, rank=rank), {"dtype": dtype}, device)
        first, again = (layer.apply(package, layer.out.clone()) for _ in range(2))
        assert torch.equal(bits(first), bits(again)), "a repeated call gives other bits"
        part = layer.apply(package, layer.out[chosen], chosen)
        assert torch.equal(bits(part), bits(first[chosen])), f"rank {rank}, {dtype}: bits depend on the batch"


def far_tokens_same_bits(package: ModuleType, variants: Sequence[Variant], device: str) -> None:
    """The last of so many tokens that no slice of y is in reach of 32-bit offsets: the bits of it alone."""
    variant = next(v for v in variants if v.tags["rank"] == "rany" and v.tags["weight_quant"] == "none")
    launcher, slices, rank = variant.launcher(package), 3, 512
    case = dataclasses.replace(_CASE, tokens=1, widths=(40,) * slices, rank=rank, adapters="one")
    batch, numbers = lora_inputs.draw(case, device), case.generator()
    b = [w.tensor for w in lora_inputs.make_weights(case, variant.tags, batch, case.widths, rank, numbers)]
    vectors, made = torch.randn(slices, rank, generator=numbers).to(device), []
    for tokens in (1, 2**21):
        y = allocate_sparse((slices, tokens, rank), (tokens * rank, rank, 1), torch.float32, device)
        y[:, -1] = vectors
        out = allocate_sparse((tokens, 40 * slices), (40 * slices, 1), b[0].dtype, device)
        launcher(out, y, b, lora_inputs.lone_route(package, tokens, case.loras, None, device))
        made.append(out[-1].clone())
    assert torch.equal(*map(bits, made)), "other bits"


def an_offset_is_not_remembered(package: ModuleType, variants: Sequence[Variant], device: str) -> None:
    """A second call on the same weights with another offset_start writes there (vLLM's cache of pointers does not)."""
    layer = _Layer.of(_CASE, variants[0].tags, device)
    first = layer.apply(package, layer.out.clone(), add_inputs=False)
    second = layer.apply(package, torch.zeros_like(first), add_inputs=False, offset_start=0)
    rows, width, at = layer.batch.rows(), sum(_CASE.widths), _CASE.offset
    assert torch.equal(second[rows, :width], first[rows, at : at + width])
    assert not second[:, width:].any(), "columns behind the last slice were written"


def stale_workspace(package: ModuleType, variants: Sequence[Variant], device: str) -> None:
    """What an earlier, larger batch left in a workspace changes nothing, and it is large enough (vLLM #42008, #40038)."""
    space = package.lora_workspace(max_tokens=9, max_loras=3, max_rank=16, num_slices=2, device=device)
    for buffer in (space.tables, space.parts):
        poison_(buffer)
    layer = _Layer.of(_CASE, variants[0].tags, device)
    for chosen in (slice(None), slice(3, 7), slice(0, 0)):
        with_space = layer.apply(package, layer.out[chosen].clone(), chosen, workspace=space)
        assert torch.equal(bits(with_space), bits(layer.apply(package, layer.out[chosen].clone(), chosen)))


def wrong_arguments_are_named(package: ModuleType, variants: Sequence[Variant], device: str) -> None:
    """Arguments that do not fit raise ValueError, with what was given and wanted, before anything is written."""
    variant = variants[0]
    layer = _Layer.of(_CASE, variant.tags, device)
    out, y = layer.out.clone(), torch.zeros((2, _CASE.tokens, 16), device=device)
    route = package.lora_route(layer.batch.mapping, max_loras=_CASE.loras)
    good = {"out": out, "y": y, "lora_b": layer.lora_b, "route": route}
    for label, (name, change) in _WRONG.items():
        wrong = {**good, "offset_start": 0, "columns": None, "column_stride": 1}
        wrong[name] = change(wrong[name])
        refuses(variant.launcher(package), wrong, variant.name, label)
        refuses(package.lora_expand, wrong, "lora_expand", label)
        if name != "y":
            whole = {**wrong, "x": layer.x, "lora_a": layer.lora_a}
            del whole["y"]
            refuses(package.lora, whole, "lora", label)
    slices = {**good, "x": layer.x, "lora_a": layer.lora_a[:1]}
    del slices["y"]
    refuses(package.lora, slices, "lora", "slices that lack a partner")
    assert torch.equal(out, layer.out), "out was written"


_WRONG: Mapping[str, tuple[str, Callable[[Any], Any]]] = {
    "out in fp64": ("out", lambda out: out.double()),
    "out of too few columns": ("out", lambda out: out[:, :100]),
    "out of too few rows": ("out", lambda out: out[:-1]),
    "out with columns apart": ("out", lambda out: out.t().contiguous().t()),
    "columns behind the end": ("offset_start", lambda offset: 6),
    "a negative column": ("offset_start", lambda offset: -1),
    "a column of two slices": ("columns", lambda columns: (0, 69)),
    "columns of one slice": ("columns", lambda columns: (0,)),
    "columns apart without a place": ("column_stride", lambda stride: 2),
    "y of another rank": ("y", lambda y: y[..., :-1].contiguous()),
    "y of too few slices": ("y", lambda y: y[:1]),
    "y in fp64": ("y", lambda y: y.double()),
    "y that is not contiguous": ("y", lambda y: y.transpose(0, 1).contiguous().transpose(0, 1)),
    "no slice": ("lora_b", lambda b: b[:0]),
    "weights of another dtype": ("lora_b", lambda b: tuple(w.float() for w in b)),
    "weights of two ranks": ("lora_b", lambda b: (b[0], b[1][..., :-1])),
    "rows of weights apart": ("lora_b", lambda b: tuple(w.transpose(1, 2).contiguous().transpose(1, 2) for w in b)),
    "rows of two strides": ("lora_b", lambda b: (b[0], b[1].contiguous())),
    "too few adapters": ("lora_b", lambda b: tuple(w[:-1] for w in b)),
    "a route of experts": ("route", lambda r: r._replace(num_experts=2)),
}


def graph_replay(package: ModuleType, variants: Sequence[Variant], device: str) -> None:
    """A captured graph stays right when the adapters of the tokens change: the bits of an eager call (vLLM #40038)."""
    before, after = (
        _Layer.of(dataclasses.replace(_CASE, adapters=kind), variants[0].tags, device) for kind in ("one", "spread")
    )
    space = package.lora_workspace(max_tokens=9, max_loras=3, max_rank=16, num_slices=2, device=device)
    out = before.out.clone()
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    with torch.cuda.stream(stream):
        before.apply(package, out, workspace=space)
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        before.apply(package, out, workspace=space)
    for captured, fresh in (
        (before.batch.mapping, after.batch.mapping),
        (before.x, after.x),
        *zip(before.lora_a + before.lora_b, after.lora_a + after.lora_b, strict=True),
        (out, after.out),
    ):
        captured.copy_(fresh)
    graph.replay()
    wanted = after.apply(package, after.out.clone())
    torch.cuda.synchronize()
    assert torch.equal(bits(out), bits(wanted)), "the replay differs from an eager call"


def many_tokens_same_bits(package: ModuleType, variants: Sequence[Variant], device: str) -> None:
    """A token of a batch so large that no program shares K has the bits that it has in a batch of few."""
    case = dataclasses.replace(_CASE, tokens=9000, k=2048, widths=(256, 128), adapters="spread", offset=0)
    few = slice(100, 117)
    for rank in (16, 64, 129):
        layer = _Layer.of(dataclasses.replace(case, rank=rank), variants[0].tags, device)
        all_of_them = layer.apply(package, layer.out.clone(), offset_start=0)
        for block_m in (16, 32, 64, 128):
            some = layer.apply(package, layer.out[few].clone(), few, offset_start=0, block_m=block_m)
            assert torch.equal(bits(some), bits(all_of_them[few])), f"rank {rank}: bits depend on the batch"


def a_held_route_serves_every_batch(package: ModuleType, variants: Sequence[Variant], device: str) -> None:
    """One held route, filled with shorter and longer batches: the bits of routes of their own, for fewer rows and for more.

    Routes of the first rows are made once, and x and out end where the rows do.
    """
    case = dataclasses.replace(_CASE, tokens=150, k=48, rank=8)
    layer, loras = _Layer.of(case, variants[0].tags, device), case.loras
    mapping, none = layer.batch.mapping, torch.full_like(layer.batch.mapping, -1)
    held = package.lora_route(mapping[:2].long(), max_loras=loras, capacity=case.tokens)
    firsts = {rows: held.first(rows) for rows in (1, 40, 150)}
    for live, given in ((9, 9), (150, 150), (33, 150), (0, 20)):
        held.refill(mapping[:given], None if live == given else torch.tensor([live], dtype=torch.int32, device=device))
        for rows, route in firsts.items():
            own = package.lora_route(torch.cat((mapping[:live], none))[:rows].clone(), max_loras=loras)
            found, wanted = layer.out[:rows].clone(), layer.out[:rows].clone()
            for out, of in ((found, route), (wanted, own)):
                package.lora(out, layer.x[:rows].clone(), layer.lora_a, layer.lora_b, of, scaling=0.3, offset_start=case.offset)
            assert torch.equal(bits(found), bits(wanted)), f"{live} tokens of {given}, {rows} rows: other bits"
            assert held.first(rows) is route
            in_range = (own.token_lora_mapping >= 0) & (own.token_lora_mapping < loras)
            assert torch.equal(route.token_lora_mapping, torch.where(in_range, own.token_lora_mapping, -1))


def slices_lie_anywhere(package: ModuleType, variants: Sequence[Variant], device: str) -> None:
    """Interleaved columns, slices in another order with gaps between them, and absent ones: the bits of slices side by side."""
    case = dataclasses.replace(_CASE, widths=(33, 33), k=48, rank=8, offset=0)
    layer = _Layer.of(case, variants[0].tags, device)
    route = package.lora_route(layer.batch.mapping, max_loras=case.loras)
    operands = (layer.x, list(layer.lora_a), list(layer.lora_b))
    rows, y = layer.batch.rows(), torch.zeros(2, case.tokens, 8, device=device)
    package.lora_shrink(y, layer.x, layer.lora_a, route, zero_rest=True)
    for adds in (True, False):
        before = torch.randn(case.tokens, 80, generator=case.generator()).to(layer.out)
        for at, stride in (((0, 1), 2), ((40, 3), 1), ((1, 4), 2)):
            places = [torch.arange(begin, begin + 33 * stride, stride) for begin in at]
            packed = torch.cat([before[:, place] for place in places], 1).contiguous()
            package.lora(packed, *operands, route, add_inputs=adds)
            wanted = before.clone()
            for s, place in enumerate(places):
                wanted[:, place] = packed[:, 33 * s : 33 * (s + 1)]
            found, apart, one = before.clone(), before.clone(), before.clone()
            flags = {"columns": at, "column_stride": stride, "add_inputs": adds}
            package.lora(found, *operands, route, **flags)
            package.lora_expand(apart, y, layer.lora_b, route, **flags)
            first = [[factors[0], None] for factors in operands[1:]]
            package.lora(one, layer.x, *first, route, **flags)
            wanted[~rows] = before[~rows]
            assert torch.equal(bits(found), bits(wanted)) and torch.equal(bits(apart), bits(wanted)), f"{at}, {stride} apart"
            wanted[:, places[1]] = before[:, places[1]]
            assert torch.equal(bits(one), bits(wanted)), f"{at}: a slice that is absent"
    untouched = layer.out.clone()
    package.lora(untouched, layer.x, [None, None], [None, None], route, columns=[0, 33])
    assert torch.equal(bits(untouched), bits(layer.out))


def adapters_say_their_ranks_and_scalings(package: ModuleType, variants: Sequence[Variant], device: str) -> None:
    """Ranks, scalings and packed slices on the device: the bits of factors padded with zeros, and of a scaling of each adapter.

    What lies behind a rank is NaN, in A; a rank may be 0, and below it is that, too; one above that of the buffers is theirs.
    """
    for k, rank, ranks in ((48, 8, (3, 8, 5, 0)), (1300, 24, (24, 1, 9, 17))):  # K in one part, and in several
        case = dataclasses.replace(_CASE, k=k, rank=rank, loras=4, tokens=20)
        layer = _Layer.of(case, variants[0].tags, device)
        layer.batch.mapping[layer.batch.mapping == 2] = 3  # so that no block has the number of its adapter
        route = package.lora_route(layer.batch.mapping, max_loras=case.loras)
        padded, gaps = ([a.clone().contiguous() for a in layer.lora_a] for _ in range(2))
        packed = torch.full((case.loras, 2 * rank, k), torch.nan, dtype=layer.x.dtype, device=device)
        for adapter, own in enumerate(ranks):
            for s in range(2):
                padded[s][adapter, own:] = 0
                gaps[s][adapter, own:] = torch.nan
                packed[adapter, s * own : (s + 1) * own] = padded[s][adapter, :own]
        scalings = (0.3, 1.7, 1.1, 2.0)
        wanted = layer.out.clone()
        for adapter, scaling in enumerate(scalings):
            apart = layer.out.clone()
            package.lora(apart, layer.x, padded, layer.lora_b, route, scaling=scaling, offset_start=case.offset)
            of_it = layer.batch.mapping == adapter
            wanted[of_it] = apart[of_it]
        beyond = {0: -(2**20), rank: 2**20}
        of_adapters = {
            "lora_ranks": torch.tensor([beyond.get(own, own) for own in ranks], dtype=torch.int32, device=device),
            "scalings": torch.tensor(scalings, device=device),
        }
        for factors, is_packed in ((gaps, False), ([packed[:, :rank], packed[:, rank:]], True)):
            options = {**of_adapters, "packed": is_packed}
            found, again = layer.out.clone(), layer.out.clone()
            package.lora(found, layer.x, factors, layer.lora_b, route, offset_start=case.offset, **options)
            y = torch.full((2, case.tokens, rank), torch.nan, device=device)
            package.lora_shrink(y, layer.x, factors, route, **options)
            package.lora_expand(again, y, layer.lora_b, route, offset_start=case.offset)
            assert torch.equal(bits(found), bits(wanted)), f"K {k}, packed {is_packed}: lora has other bits"
            assert torch.equal(bits(again), bits(wanted)), f"K {k}, packed {is_packed}: its two products have other bits"


ALSO = ("lora_shrink",)  # whose kernels run here too
LAWS = (
    Law(both_products_give_the_same_bits),
    Law(a_held_route_serves_every_batch),
    Law(slices_lie_anywhere),
    Law(adapters_say_their_ranks_and_scalings),
    Law(measured_tiles_are_found),
    Law(fp8_front_doors),
    Law(any_batch_same_bits),
    Law(far_tokens_same_bits),
    Law(an_offset_is_not_remembered),
    Law(stale_workspace),
    Law(wrong_arguments_are_named),
    Law(graph_replay, needs_gpu=True),
    Law(many_tokens_same_bits, needs_gpu=True),
)
