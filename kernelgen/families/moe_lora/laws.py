"""What holds between the variants of fused MoE-LoRA, and between calls: through the front doors, with real routes."""

from __future__ import annotations

import dataclasses
import itertools
import sys
from types import ModuleType
from typing import Any, Callable, Iterator, Mapping, Sequence

import torch

from kernelgen.core.model import QUANT_AXES, VOCABULARY
from kernelgen.families.buffers import bits, poison_
from kernelgen.families.case import Law, Variant
from kernelgen.families.lora_shrink.laws import refuses
from kernelgen.families.moe_lora.reference import dequantise
from kernelgen.families.moe_lora_inputs import Call, Case, make, tiles
from kernelgen.families.moe_route.cases import engine_tables
from kernelgen.families.moe_routing import SPREAD, Routed, Routing
from kernelgen.families.quant import group, group_of, scales_of
from kernelgen.families.tiles import CARDS, KS, bare_route, measured_tiles, on_card, parts_of_tiles, problem_of

_MIXED = Routing("mixed", disabled=(0,))
_CASE = Case(
    "law", "the batch of the laws", tokens=6, naive_tokens=6, loras=3, slices=2, routing=_MIXED
)
_MEANING = ("dtype", "add_inputs", "routed_weight", *QUANT_AXES)
_ASSIGNMENTS = ("naive", "sorted", "auto", "tables")


def front_door(package: ModuleType, variants: Sequence[Variant], device: str) -> None:
    """moe_lora serves every rank, flag and kind of route, within the bound."""
    dtypes = sorted({v.tags["dtype"] for v in variants})
    ranks = (1, 24, 48, 96, 129)
    flags = itertools.cycle(itertools.product(("add", "set"), ("plain", "weighted")))
    points = itertools.product(_ASSIGNMENTS, ranks)
    turns = zip(points, flags, itertools.cycle(dtypes), strict=False)
    for (assignment, rank), (adds, weight), dtype in turns:
        tags = _tags(dtype, adds, weight)
        call = make(dataclasses.replace(_CASE, rank=rank), tags, device)
        _apply(package, call, route_of(package, call.routed, assignment), tags)
        _about(call.verify, f"rank {rank}, {assignment}, {adds}, {weight}, {dtype}")


def fp8_front_door(package: ModuleType, variants: Sequence[Variant], device: str) -> None:
    """moe_lora finds the kind of scales by their shapes, and serves ranks of any bucket with every kind of route."""
    flags = itertools.cycle((("plain", "add"), ("weighted", "add"), ("plain", "set"), ("weighted", "add"), ("weighted", "set")))
    for scales in _scales(variants):
        for assignment, rank, (weight, adds) in zip(_ASSIGNMENTS, (1, 24, 96, 200), flags, strict=False):
            tags = {**_tags("bf16", adds, weight), **scales}
            call = make(dataclasses.replace(_CASE, rank=rank, k=140), tags, device)
            _apply(package, call, route_of(package, call.routed, assignment), tags)
            _about(call.verify, f"{scales}, rank {rank}, {assignment}, {weight}, {adds}")


def fp8_and_scales_belong_together(
    package: ModuleType, variants: Sequence[Variant], device: str
) -> None:
    """FP8 operands that lack a scale, and scales of 16-bit operands, raise ValueError; nothing is written."""
    case = dataclasses.replace(_CASE, rank=16, k=140)
    sixteen_bit = make(case, _tags("bf16", "add", "plain"), device)
    for scales in _scales(variants):
        call = make(case, {**_tags("bf16", "add", "plain"), **scales}, device)
        lacking = [{k: v for k, v in call.scales.items() if k != name} for name in call.scales]
        wrong = [(call, keywords) for keywords in lacking] + [(sixteen_bit, call.scales)]
        for operands, keywords in wrong:
            route = route_of(package, operands.routed, "sorted")
            try:
                package.moe_lora(*operands.operands, route, **keywords)
            except ValueError as error:
                complete = all(word in str(error) for word in ("moe_lora", "got", "wanted"))
                assert complete, f"{scales}, with {list(keywords)}: {error}"
            else:
                raise AssertionError(f"{scales}: {list(keywords)} are let pass")
            assert not operands.out.changed().any(), f"{scales}: out was written"


def _scales(variants: Sequence[Variant]) -> Iterator[Mapping[str, str]]:
    """The kinds of scales that there are variants for, none left out."""
    found = {
        (v.tags.get("weight_quant", "none"), v.tags.get("act_quant", "none")) for v in variants
    }
    for weights, x in sorted(found - {("none", "none")}):
        yield {"weight_quant": weights, "act_quant": x}


def every_point_has_a_variant(
    package: ModuleType, variants: Sequence[Variant], device: str
) -> None:
    """Each rank from 1 to 512, with each dtype, flag, kind of route and of scales, finds a variant; nothing runs."""
    compile_only = package._runtime.compile_only
    for scales, adds, weight in itertools.product(_scales(variants), ("add", "set"), ("plain", "weighted")):
        for rank, assignment in itertools.product((17, 129), ("naive", "sorted")):
            of_case = {**_tags("bf16", adds, weight), **scales}
            call = make(dataclasses.replace(_CASE, slices=1, tokens=1, rank=rank), of_case, device)
            with compile_only() as requests:
                _apply(package, call, route_of(package, call.routed, assignment), of_case)
            assert requests, f"{scales}, rank {rank}, {assignment}: nothing to launch"
    near = {edge + step for edge in (16, 32, 64, 128, 256, 512) for step in (-1, 0, 1)}
    ranks = sorted({1, 8, 200, 320, *near} - {513})
    dtypes = sorted({v.tags["dtype"] for v in variants})
    for adds, weight, dtype in itertools.product(("add", "set"), ("plain", "weighted"), dtypes):
        tags = _tags(dtype, adds, weight)
        for assignment in ("naive", "sorted", "tables"):
            call = make(dataclasses.replace(_CASE, slices=1), tags, device)
            route = route_of(package, call.routed, assignment)
            out, x, a, b = call.operands
            for rank in ranks:
                fits = [t.new_empty((*t.shape[:2], rank, t.shape[3])) for t in a]
                fitting = [t.new_empty((*t.shape[:3], rank)) for t in b]
                with compile_only() as requests:
                    _apply_to(package, (out, x, fits, fitting), route, call, tags)
                assert requests, f"rank {rank}, {assignment}: nothing to launch"


def schedules_agree(package: ModuleType, variants: Sequence[Variant], device: str) -> None:
    """All schedules give the same result, within the bound of one and of the other."""
    case = dataclasses.replace(_CASE, rank=16, k=100, spread=6, tokens=3, slices=1, routing=SPREAD)
    found: dict[tuple[str, ...], list[tuple[str, Call]]] = {}
    for variant in _one_a_schedule(variants):
        call = make(case, variant.tags, device)
        _launch(package, variant, call)
        same = tuple(variant.tags.get(axis, "") for axis in _MEANING)
        found.setdefault(same, []).append((variant.name, call))
    for calls in found.values():
        for (name, one), (other_name, other) in itertools.combinations(calls, 2):
            rows = one.live_rows()
            apart = (one.out.view[rows].double() - other.out.view[rows].double()).abs()
            limit = one.expected.bound[rows] + other.expected.bound[rows]
            close = (apart <= limit).all()
            assert close, f"{name} and {other_name} differ by {apart.max():.3g}"


def any_batch_any_time_same_bits(
    package: ModuleType, variants: Sequence[Variant], device: str
) -> None:
    """A pair has the same bits when a call is repeated, and when other tokens are with it in the batch."""
    chosen = [5, 1, 4]
    for variant in _one_a_schedule(variants):
        call, again = (make(_CASE, variant.tags, device) for _ in range(2))
        _launch(package, variant, call)
        _launch(package, variant, again)
        same = torch.equal(bits(call.out.base), bits(again.out.base))
        assert same, f"{variant.name}: a repeated call gives other bits"
        part = _tokens_of(make(_CASE, variant.tags, device), chosen)
        _launch(package, variant, part)
        got, wanted = part.out.view, call.out.view[chosen].contiguous()
        assert torch.equal(bits(got), bits(wanted)), f"{variant.name}: bits depend on the batch"


def stale_workspace(package: ModuleType, variants: Sequence[Variant], device: str) -> None:
    """What an earlier, larger batch left in a workspace changes nothing (vLLM #42008, #40038)."""
    large = dataclasses.replace(_CASE, tokens=12, routing=SPREAD)
    dtype = variants[0].tags["dtype"]
    for assignment, adds, weight in (
        ("naive", "add", "plain"),
        ("sorted", "set", "weighted"),
        ("tables", "add", "weighted"),
    ):
        tags = _tags(dtype, adds, weight)
        workspace = _workspace(package, device, max_tokens=16)
        if assignment == "tables":  # those of an engine may have more blocks than a sort makes
            workspace = workspace._replace(tables=workspace.tables.new_empty(4096))
        for buffer in (workspace.tables, workspace.parts):
            poison_(buffer)
        for case in (large, dataclasses.replace(_CASE, rank=16)):
            call = make(dataclasses.replace(case, rank=16), tags, device)
            route = route_of(package, call.routed, assignment, workspace)
            _apply(package, call, route, tags)
            _about(call.verify, f"{assignment}, {case.tokens} tokens")


def empty_batch(package: ModuleType, variants: Sequence[Variant], device: str) -> None:
    """No token: nothing happens."""
    for assignment in ("naive", "sorted", "auto"):
        tags = _tags(variants[0].tags["dtype"], "set", "plain")
        call = make(dataclasses.replace(_CASE, tokens=0, rank=16), tags, device)
        _apply(package, call, route_of(package, call.routed, assignment), tags)
        _about(call.verify, assignment)


def tiles_end_with_what_they_divide(package: ModuleType, variants: Sequence[Variant], device: str) -> None:
    """A tile ends with its part of K and its group of scales, and those of groups are alike in all batches: of the rules on
    every card, and of what is tuned. Nothing runs."""
    kinds = sorted({(v.tags["schedule"], v.tags["weight_quant"], v.tags["act_quant"]) for v in variants})
    sizes = list(itertools.product(KS, (8, 100), (1, 2), (16, 128), ((1, 2, 8), (60, 8, 128), (2000, 8, 128))))
    of_groups: dict[str, set[int]] = {card.name: set() for card in CARDS}
    for card, (schedule, weight, act) in itertools.product(CARDS, kinds):
        of_weights, of_x = VOCABULARY["weight_quant"][weight], VOCABULARY["act_quant"][act]
        with on_card(package, card):
            for k, rank, slices, block_m, (tokens, top_k, experts) in sizes:
                rule, problem = problem_of(
                    package, "moe_lora", k=k, n=k, rank=rank, slices=slices, **of_weights, **of_x
                )
                block_m = 0 if schedule == "small_batch" else block_m
                route = bare_route(package, tokens, block_m, top_k=top_k, experts=experts)
                config = rule.choose(schedule, problem, route)
                where = f"{card.name}, {schedule}, rank {rank}, {slices} slices, {tokens} tokens, blocks of {block_m}"
                _tiles_end(schedule, k, (weight, act), config, rule, where)
                if schedule != "small_batch" and "group" in weight + act:
                    of_groups[card.name].add(config.block_k)
    rule, _ = problem_of(package, "moe_lora")
    for target, (tokens, _, _, _, k, *rest, of_weights, of_x), measured in measured_tiles(package, "moe_lora"):
        for schedule, values in measured:
            kinds_of = (f"w8{of_weights}", f"a8{of_x}")
            config = rule.CONFIGS[schedule](*values)
            _tiles_end(schedule, k, kinds_of, config, rule, f"tuned, {tokens} tokens, {rest}")
            if schedule != "small_batch" and "group" in (of_weights, of_x):
                of_groups.setdefault(target, set()).add(config.block_k)
    for card_name, widths in of_groups.items():
        assert len(widths) < 2, f"{card_name}: groups in tiles of {sorted(widths)}: a batch of another size has other bits"


def _tiles_end(schedule: str, k: int, kinds: Sequence[str], config: Any, rule: ModuleType, where: str) -> None:
    if schedule != "one_shot":
        parts_of_tiles(k, config, where)
    if schedule == "small_batch":
        assert config.split_k % config.block_k == 0, f"{where}, K {k}: a part is not of whole tiles: {config}"
        assert "w8group" not in kinds or rule.QUANT.group_n % config.shrink_block_r == 0, f"{where}: scales of two groups"
    elif "w8group" in kinds or "a8group" in kinds:
        assert rule.QUANT.group_k % config.block_k == 0, f"{where}, K {k}: scales of two groups: {config}"


def wrong_arguments_are_named(
    package: ModuleType, variants: Sequence[Variant], device: str
) -> None:
    """Arguments that do not fit raise ValueError, with what was given and wanted, before anything is written."""
    for variant in _one_a_schedule(variants):
        call = make(_CASE, variant.tags, device)
        route = route_of(package, call.routed, variant.tags["assignment"])
        operands = dict(zip(("out", "x", "lora_a", "lora_b"), call.operands, strict=True))
        for label, change in _WRONG.items():
            wrong = {**operands, "route": route, **call.keywords}
            if not change(wrong):
                continue
            try:
                variant.launcher(package)(**wrong)
            except ValueError as error:
                complete = all(word in str(error) for word in (variant.name, "got", "wanted"))
                assert complete, f"{variant.name}, {label}: {error}"
            else:
                raise AssertionError(f"{variant.name}: {label} is let pass")
        if variant.tags["schedule"] != "one_shot":
            config = tiles(variant.launcher(package), 16)._replace(block_k=32, split_k=16)
            given = {**operands, "route": route, **call.keywords, "config": config}
            refuses(variant.launcher(package), given, variant.name, "a tile in two parts")
        assert not call.out.changed().any(), f"{variant.name}: out was written"


def graph_replay(package: ModuleType, variants: Sequence[Variant], device: str) -> None:
    """A captured graph stays right when the routing changes: the bits of an eager call (vLLM #40038, SGLang #28371)."""
    dtype = variants[0].tags["dtype"]
    for assignment, weight in itertools.product(("naive", "sorted"), ("plain", "weighted")):
        tags = _tags(dtype, "add", weight)
        before, after, eager = (
            make(dataclasses.replace(_CASE, rank=16, routing=routing), tags, device)
            for routing in (Routing("one_group"), Routing("spread"), Routing("spread"))
        )
        workspace = _workspace(package, device, max_tokens=_CASE.tokens)

        def step(
            call: Call = before, assignment: str = assignment, tags: Any = tags, ws: Any = workspace
        ) -> None:
            _apply(package, call, route_of(package, call.routed, assignment, ws), tags)

        torch.cuda.synchronize()
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        with torch.cuda.stream(stream):
            step()
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
        for captured, fresh in _buffers(before, after):
            captured.copy_(fresh)
        graph.replay()
        _apply(package, eager, route_of(package, eager.routed, assignment), tags)
        torch.cuda.synchronize()
        wanted = bits(eager.out.view.contiguous())
        same = torch.equal(bits(before.out.view.contiguous()), wanted)
        assert same, f"{assignment}, {weight}: the replay differs from an eager call"


def two_streams(package: ModuleType, variants: Sequence[Variant], device: str) -> None:
    """Calls on two streams, with a workspace each, do not disturb each other."""
    tags = _tags(variants[0].tags["dtype"], "add", "plain")
    case = dataclasses.replace(_CASE, rank=16, k=1024, n=512, routing=SPREAD)
    for assignment in ("naive", "sorted"):
        calls = [make(case, tags, device) for _ in range(8)]
        spaces = [_workspace(package, device, max_tokens=case.tokens) for _ in range(2)]
        streams = [torch.cuda.Stream() for _ in range(2)]  # type: ignore[no-untyped-call]
        torch.cuda.synchronize()
        for i, call in enumerate(calls):
            with torch.cuda.stream(streams[i % 2]):
                _apply(
                    package, call, route_of(package, call.routed, assignment, spaces[i % 2]), tags
                )
        torch.cuda.synchronize()
        for call in calls:
            _about(call.verify, assignment)


def fp8_like_torch(package: ModuleType, variants: Sequence[Variant], device: str) -> None:
    """FP8 agrees with what PyTorch makes of the same operands on the GPU, within the bounds of both."""
    case = dataclasses.replace(_CASE, rank=64, k=256, n=144, routing=SPREAD)
    for scales, assignment in itertools.product(_scales(variants), ("naive", "sorted")):
        tags = {**_tags("bf16", "add", "plain"), **scales}
        call = make(case, tags, device)
        old = call.out.view.double()
        _apply(package, call, route_of(package, call.routed, assignment), tags)
        for pair, adapter, expert in call.routed.live:
            at = divmod(pair, case.top_k)
            parts = [
                _of_torch(call, scales, at[0], s, (adapter, expert)) for s in range(case.slices)
            ]
            delta, slack = (torch.cat(of_slices) for of_slices in zip(*parts, strict=True))
            apart = (call.out.view[at].double() - (old[at] + delta)).abs()
            close = (apart <= 2 * call.expected.bound[at] + slack).all()
            assert close, f"{scales}, {assignment}: {apart.max():.3g} apart"


def _of_torch(
    call: Call, scales: Mapping[str, str], row: int, s: int, who: tuple[int, int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """(x . A^T) . B^T of one row and slice, and how much further than an fp32 sum it may be off: the first product is
    PyTorch's of FP8 where it has one for such scales; else operands are dequantised."""
    of_weights, of_x = scales_of(scales)
    codes, a, b = call.x[row : row + 1], call.lora_a[s][who], call.lora_b[s][who]
    x = codes.double()
    if of_x is not None:
        of_row = call.scales["x_scale"] if of_x == "tensor" else call.scales["x_scale"][row]
        x = dequantise(codes, of_row, group_of(of_x, codes.shape, (1, group()[1])))
    wide_a, wide_b = a.double(), b.double()
    if of_weights is not None:
        a_scale, b_scale = (call.scales[name][s][who] for name in ("a_scale", "b_scale"))
        wide_a = dequantise(a, a_scale, group_of(of_weights, a.shape, group()))
        wide_b = dequantise(b, b_scale, group_of(of_weights, b.shape, group()))
    v, v_slack = (x.float() @ wide_a.float().t()).bfloat16().double(), torch.zeros_like(wide_a[:, 0])
    if (of_weights, of_x) == ("channel", "token"):
        many = codes.expand(128, -1).contiguous()  # as few as one row are not served
        x_scales = call.scales["x_scale"][row].expand(128, 1).contiguous()
        v = torch._scaled_mm(
            many, a.contiguous().t(), x_scales, a_scale.reshape(1, -1), out_dtype=torch.bfloat16
        )[:1].double()
        # FP8 tensor cores keep 13 bits of a sum, which can make v round the other way.
        v_slack = 2.0**-12 * (x.abs() @ wide_a.abs().t())[0] + 2.0**-7 * v.abs()[0]
    return (v @ wide_b.t())[0], wide_b.abs() @ v_slack


LAWS = (
    Law(front_door),
    Law(fp8_front_door),
    Law(fp8_and_scales_belong_together),
    Law(every_point_has_a_variant),
    Law(schedules_agree),
    Law(any_batch_any_time_same_bits, slow=True),
    Law(stale_workspace),
    Law(empty_batch),
    Law(tiles_end_with_what_they_divide),
    Law(wrong_arguments_are_named),
    Law(graph_replay, needs_gpu=True),
    Law(two_streams, needs_gpu=True),
    Law(fp8_like_torch, needs_gpu=True),
)


def route_of(package: ModuleType, routed: Routed, assignment: str, workspace: Any = None) -> Any:
    """A route through the front doors; "tables": from those of an engine."""
    if assignment != "tables":
        ids, mapping = routed.topk_ids, routed.token_lora_mapping
        return package.moe_route(
            ids, mapping, **routed.arguments, assignment=assignment, workspace=workspace
        )
    tables, lora_ids = engine_tables(routed, block_size=16)
    device = routed.topk_ids.device
    return package.MoeRoute.from_tables(
        *(table.to(device) for table in tables),
        block_size=16,
        num_tokens=routed.sizes.tokens,
        top_k=routed.sizes.top_k,
        num_experts=routed.sizes.experts,
        max_loras=routed.sizes.loras,
        lora_ids=None if lora_ids is None else lora_ids.to(device),
        adapter_enabled=routed.adapter_enabled,
        workspace=workspace,
    )


def other_kind(route: Any) -> Any:
    """A route of a kind that a variant does not take which takes this one: tables alone for pairs, pairs for tables."""
    kinds = sys.modules[type(route).__module__]
    if not isinstance(route, kinds.PairRoute):
        return kinds.PairRoute(**{field: getattr(route, field) for field in kinds.PairRoute._fields})
    pairs, blocks, num_blocks = (route.token_lora_mapping.new_zeros(shape) for shape in ((16,), (1, 4), (1,)))
    sizes = (route.num_tokens, route.top_k, route.num_experts, route.max_loras)
    return kinds.EngineRoute(pairs, blocks, num_blocks, route.parts, *sizes, block_m=16, max_blocks=1)


def _workspace(package: ModuleType, device: str, max_tokens: int) -> Any:
    return package.moe_workspace(
        max_tokens=max_tokens,
        top_k=_CASE.top_k,
        num_experts=_CASE.experts,
        max_loras=_CASE.loras,
        max_rank=16,
        num_slices=_CASE.slices,
        device=device,
    )


def _tags(dtype: str, adds: str, weight: str) -> Mapping[str, str]:
    return {
        "dtype": dtype,
        "add_inputs": adds,
        "routed_weight": weight,
        "assignment": "sorted",
        "rank": "r16",
    }


def _apply(package: ModuleType, call: Call, route: Any, tags: Mapping[str, str]) -> None:
    _apply_to(package, call.operands, route, call, tags)


def _apply_to(
    package: ModuleType, operands: Any, route: Any, call: Call, tags: Mapping[str, str]
) -> None:
    package.moe_lora(
        *operands,
        route,
        **call.keywords,
        add_inputs=tags["add_inputs"] == "add",
        mul_routed_weight=tags["routed_weight"] == "weighted",
    )


def _about(verify: Callable[[], object], what: str) -> None:
    try:
        verify()
    except AssertionError as error:
        raise AssertionError(f"{what}: {error}") from None


def _launch(package: ModuleType, variant: Variant, call: Call) -> None:
    """Run a variant on a real route with the tiles of the cases."""
    launcher = variant.launcher(package)
    keywords: dict[str, Any] = {"assignment": variant.tags["assignment"]}
    if variant.tags["assignment"] == "sorted":
        keywords["block_m"] = 16
    ids, mapping = call.routed.topk_ids, call.routed.token_lora_mapping
    route = package.moe_route(ids, mapping, **call.routed.arguments, **keywords)
    config = tiles(launcher, call.lora_a[0].shape[2])
    launcher(*call.operands, route, config=config, **call.keywords)


def _one_a_schedule(variants: Sequence[Variant]) -> Iterator[Variant]:
    """Of each schedule, the 16-bit variants of its first rank bucket and dtype, and one of each kind of scales."""
    first: dict[tuple[str | None, ...], tuple[str, ...]] = {}
    for variant in variants:
        tags = variant.tags
        scales = tuple(tags.get(axis, "none") for axis in QUANT_AXES)
        flags = ("rank", "dtype") if set(scales) == {"none"} else tuple(tags)
        same = tuple(tags[axis] for axis in flags)
        if first.setdefault((tags["schedule"], tags["assignment"], *scales), same) == same:
            yield variant


def _tokens_of(call: Call, chosen: list[int]) -> Call:
    """The same call for some of its tokens, in another order."""
    routed, top_k = call.routed, call.routed.sizes.top_k
    rows = (
        chosen
        if call.topk_weights is None
        else [t * top_k + j for t in chosen for j in range(top_k)]
    )
    weights = None if call.topk_weights is None else call.topk_weights[chosen].contiguous()
    part = routed._replace(
        topk_ids=routed.topk_ids[chosen].contiguous(),
        token_lora_mapping=routed.token_lora_mapping[chosen].contiguous(),
    )
    out = dataclasses.replace(call.out, view=call.out.view[chosen].contiguous())
    x, scales = call.x[rows].contiguous(), dict(call.scales)
    if "x_scale" in scales and scales["x_scale"].dim() > 1:
        scales["x_scale"] = scales["x_scale"][rows]
    return dataclasses.replace(call, out=out, x=x, topk_weights=weights, scales=scales, routed=part)


def _buffers(to: Call, source: Call) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    yield to.out.base, source.out.base
    yield to.x, source.x
    yield from zip(to.lora_a + to.lora_b, source.lora_a + source.lora_b, strict=True)
    yield to.routed.topk_ids, source.routed.topk_ids
    yield to.routed.token_lora_mapping, source.routed.token_lora_mapping
    if to.topk_weights is not None and source.topk_weights is not None:
        yield to.topk_weights, source.topk_weights


# Each spoils one argument, and says whether there is such an argument.

_Operands = dict[str, Any]


def _set(name: str, change: Callable[[Any], Any]) -> Callable[[_Operands], bool]:
    def spoil(operands: _Operands) -> bool:
        if operands.get(name) is None:
            return False
        operands[name] = change(operands[name])
        return True

    return spoil


def _kind_of_route(operands: _Operands) -> bool:
    operands["route"] = other_kind(operands["route"])
    return True


def _mixed_elements(operands: _Operands) -> bool:
    first, second = operands["lora_a"]
    if first.element_size() > 1:
        return False
    operands["lora_a"] = (first, second.view(torch.float8_e5m2))
    return True


_WRONG: Mapping[str, Callable[[_Operands], bool]] = {
    "x of another dtype": _set("x", lambda x: x.float()),
    "x of the other width": _set(
        "x", lambda x: x.to(torch.float8_e5m2 if x.element_size() > 1 else torch.bfloat16)
    ),
    "weights of the other width": _set(
        "lora_b",
        lambda b: tuple(
            t.to(torch.float8_e5m2 if t.element_size() > 1 else torch.bfloat16) for t in b
        ),
    ),
    "x of another K": _set("x", lambda x: x[:, :-1]),
    "x of too few rows": _set("x", lambda x: x[:-1]),
    "x with columns apart": _set("x", lambda x: x.t().contiguous().t()),
    "x as a vector": _set("x", lambda x: x[0]),
    "out of another dtype": _set("out", lambda out: out.float()),
    "out of another N": _set("out", lambda out: out[..., :-1]),
    "out that does not collapse": _set(
        "out",
        lambda o: (
            o.as_strided(o.shape, (o.stride(0) + 8, o.stride(1), 1), o.storage_offset())
            if o.stride(0) == 0
            else o.new_empty(o.shape[0], o.shape[1] + 1, o.shape[2])[:, :-1]
        ),
    ),
    "out with columns apart": _set("out", lambda o: o.transpose(1, 2).contiguous().transpose(1, 2)),
    "out whose rows overlap": _set(
        "out", lambda o: o.as_strided(o.shape, (8 * o.shape[1], 8, 1), o.storage_offset())
    ),
    "no slice": _set("lora_a", lambda a: a[:0]),
    "slices that lack a partner": _set("lora_b", lambda b: b[:-1]),
    "slices of two shapes": _set("lora_a", lambda a: (a[0], a[1][:, :, :-1])),
    "slices of two strides": _set("lora_b", lambda b: (b[0], b[1].contiguous())),
    "weights of two ranks": _set("lora_b", lambda b: tuple(t[..., :-1] for t in b)),
    "weights of another dtype": _set("lora_a", lambda a: tuple(t.double() for t in a)),
    "weights of three dimensions": _set("lora_a", lambda a: tuple(t[0] for t in a)),
    "rows of weights apart": _set(
        "lora_b", lambda b: tuple(t.transpose(2, 3).contiguous().transpose(2, 3) for t in b)
    ),
    "too few adapters": _set("route", lambda r: r._replace(max_loras=r.max_loras + 1)),
    "too few experts": _set("route", lambda r: r._replace(num_experts=r.num_experts + 1)),
    "the wrong kind of route": _kind_of_route,
    "routing weights of another shape": _set("topk_weights", lambda w: w[:, :-1]),
    "routing weights that are integers": _set("topk_weights", lambda w: w.nan_to_num().int()),
    "routing weights left out": _set("topk_weights", lambda w: None),
    "scales of weights in 16 bits": _set("a_scale", lambda s: tuple(t.bfloat16() for t in s)),
    "scales of one slice": _set("b_scale", lambda s: s[:1]),
    "scales of too few adapters": _set("a_scale", lambda s: tuple(t[:1] for t in s)),
    "scales of another kind": _set("b_scale", lambda s: tuple(t.mean(-1) for t in s)),
    "scales of two strides": _set(
        "a_scale", lambda s: (s[0], s[1].repeat(1, 2, *(1,) * (s[1].dim() - 2))[:, : s[1].shape[1]])
    ),
    "scales as a vector": _set("x_scale", lambda s: s.flatten() if s.dim() > 1 else s[0]),
    "scales of x in 16 bits": _set("x_scale", lambda s: s.bfloat16()),
    "scales of x with one more": _set("x_scale", lambda s: torch.cat((s, s))),
    "elements of two types": _mixed_elements,
}
