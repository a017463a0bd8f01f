"""What holds for a layer with adapters: of ``fused_moe``, and of the ops that it is made of."""

from __future__ import annotations

import itertools
import random
from types import ModuleType
from typing import Any, Sequence

import torch

from kernelgen.families.buffers import bits, poison_
from kernelgen.families.case import Law, Variant, worst_ratio
from kernelgen.families.fused_moe import Lora, fused_moe
from kernelgen.families.moe_adapters import Adapters, Factors, factors, live_of
from kernelgen.families.moe_adapters import draw as draw_adapters
from kernelgen.families.moe_experts import Experts
from kernelgen.families.moe_gemm.laws import MODES, Layer, about, fp8_layer, layer, tensors


def with_adapters(
    package: ModuleType,
    call: Layer,
    how: Adapters,
    ranks: tuple[int, int],
    *,
    layout: str = "packed",
    seed: int = 0,
    scales: str | None = None,
) -> Layer:
    """The layer with adapters, whose factors are NaN where no pair has them; in FP8 where there are ``scales``."""
    tokens, top_k = call.routed.topk_ids.shape
    experts, width, inter = (call.numbers[-1] if call.numbers else call.w2).shape  # codes of MXFP4 are two to a byte
    device, slices = str(call.hidden.device), call.w13.shape[1] // inter
    dtype = call.hidden.dtype if call.inner is None else call.inner.dtype
    drawn = draw_adapters(how, tokens, random.Random(seed), device)
    live = live_of(call.routed.local, drawn.of_token, top_k)
    numbers = torch.Generator().manual_seed(seed)

    def make(rows: int, columns: int, count: int) -> Factors:
        return factors((drawn.loras, experts, rows, columns), count, layout, live, numbers, dtype, device, scales)

    shapes = {
        "a13": (ranks[0], width, slices),
        "b13": (inter, ranks[0], slices),
        "a2": (ranks[1], inter, 1),
        "b2": (width, ranks[1], 1),
    }
    made = {name: make(*shape) for name, shape in shapes.items()}
    given = {key: value for name, of in made.items() for key, value in of.named(name, f"{name}_scale").items()}
    lora = package.FusedMoeLora(drawn.token_lora_mapping, **given, adapter_enabled=drawn.adapter_enabled)
    stands_for = None
    if scales is not None:
        stands_for = Lora(drawn.of_token, **{name: of.numbers for name, of in made.items()}, scaled=True)
    return call._replace(lora=lora, adapters=tuple(drawn.of_token), stands_for=stands_for)


_HOW = (Adapters("mixed", 3), Adapters("spread", 4, (0, 2)), Adapters("none"), Adapters("one", 2))
_ROUTINGS = (Experts(), Experts("mixed", start=2), Experts("mixed", start=1, valid=2))


def layers_with_adapters(package: ModuleType, variants: Sequence[Variant], device: str) -> None:
    """fused_moe with adapters is within its bound, in a workspace that is used again and without, whatever the hint; and
    tokens without an adapter have the bits of the layer without adapters."""
    workspace = _workspace(package, device, 22)
    for buffer in (each for each in workspace if each is not None):
        poison_(buffer)
    routings, hints, layouts = itertools.cycle(_ROUTINGS), itertools.cycle((None, 1, 1000)), itertools.cycle(("packed", "shared"))
    of_ranks = itertools.cycle(((5, 16), (24, 7), (80, 33)))
    kinds = itertools.cycle((("swiglu", torch.bfloat16), ("relu2", torch.float16), ("swiglu", torch.float16)))
    for number, tokens in enumerate((1, 6, 3, 22, 4, 6, 22, 22)):
        how = _HOW[number % len(_HOW)]
        routing, hint, ranks, layout = next(routings), next(hints), next(of_ranks), next(layouts)
        activation, dtype = next(kinds)
        base = layer(tokens, routing, device, activation=activation, dtype=dtype)
        call = with_adapters(package, base, how, ranks, layout=layout)
        space = workspace if number % 2 and dtype == torch.bfloat16 else None
        out = call.run(package, num_tokens_hint=hint, workspace=space)
        what = f"{tokens} tokens, {how}, {routing}, ranks {ranks}, {activation}, hint {hint}"
        about(lambda call=call, out=out: call.verify(out), what)  # type: ignore[misc]
        alone = [token for token, adapter in enumerate(call.adapters) if adapter is None]
        plain = base.run(package, num_tokens_hint=hint)
        assert torch.equal(bits(out[alone]), bits(plain[alone])), f"{what}: tokens without an adapter differ"


def fp8_layers_with_adapters(package: ModuleType, variants: Sequence[Variant], device: str) -> None:
    """Layers with FP8 weights, with and without FP8 activations, and adapters in 16 bits are within their bound, in a workspace
    and without; and tokens without an adapter as they were."""
    modes: list[Any] = [(2, ("group", None, "swiglu")), (7, ("tensor", None, "relu2")), (7, ("channel", None, "swiglu"))]
    modes += [(2, ("group", "group", "swiglu")), (3, ("channel", "token", "swiglu")), (1, ("tensor", "tensor", "relu2"))]
    modes += [(2, ("mx", None, "swiglu_clamp"))]
    modes += [*((7, mode) for mode in MODES if mode[1] or mode[0] in ("group", "mx"))]
    sizes = {"max_tokens": 7, "top_k": 2, "num_experts": 3, "hidden": 144, "intermediate": 136}
    for number, (tokens, mode) in enumerate(modes):
        base = fp8_layer(package, tokens, Experts("mixed"), device, mode, served=number % 3 == 0, experts=3)
        call = with_adapters(package, base, Adapters("mixed"), (24, 16))
        options = {"fp8_activations": mode[1] is not None, "max_rank": 24, "device": device}
        workspace = package.fused_moe_workspace(**sizes, **options) if number % 2 else None
        out = call.run(package, workspace=workspace)
        about(lambda call=call, out=out: call.verify(out), f"{tokens} tokens, scales {mode}")  # type: ignore[misc]
        alone = [token for token, adapter in enumerate(call.adapters) if adapter is None]
        assert torch.equal(bits(out[alone]), bits(base.run(package)[alone])), f"{tokens} tokens, scales {mode}"


def layers_with_fp8_adapters(package: ModuleType, variants: Sequence[Variant], device: str) -> None:
    """Layers of each kind with adapters in FP8 are within their bound, few tokens and many, of factors that all experts share and
    of such that they have each; and tokens without an adapter as they were."""
    modes: list[Any] = [(None, mode) for mode in ("tensor", "channel", "group")]
    modes += [(mode, mode[0]) for mode in MODES if mode[0] == "tensor" or mode[2] == "swiglu"]
    layouts, of_tokens = itertools.cycle(("packed", "shared", "packed")), itertools.cycle((2, 7, 7))
    sizes: dict[str, Any] = {"hidden": 72, "inter": 40, "top_k": 2, "experts": 3}
    for mode, scales in modes:
        tokens = next(of_tokens)
        if mode is None:
            base = layer(tokens, Experts("mixed"), device, **sizes)
        else:
            base = fp8_layer(package, tokens, Experts("mixed"), device, mode, **sizes)
        call = with_adapters(package, base, Adapters("mixed"), (24, 16), layout=next(layouts), scales=scales)
        out = call.run(package)
        what = f"{tokens} tokens, scales {mode}, of adapters {scales}"
        about(lambda call=call, out=out: call.verify(out), what)  # type: ignore[misc]
        alone = [token for token, adapter in enumerate(call.adapters) if adapter is None]
        assert torch.equal(bits(out[alone]), bits(base.run(package)[alone])), what


def a_row_does_not_know_its_batch(package: ModuleType, variants: Sequence[Variant], device: str) -> None:
    """In another order, among other adapters and behind padding a token has the same bits, of one schedule and its tiles."""
    tokens = 12
    for rank, layout in ((24, "packed"), (40, "shared")):
        call = with_adapters(package, layer(tokens, Experts(), device), Adapters("spread", 5), (rank, rank), layout=layout)
        wanted = call.run(package, num_tokens_hint=tokens)
        turn = torch.roll(torch.arange(tokens), 5).to(device)
        others = call.lora.token_lora_mapping[turn].clone()
        others[::3] = -1
        routed = call.routed._replace(topk_ids=call.routed.topk_ids[turn].contiguous())
        turned = call._replace(hidden=call.hidden[turn], topk_weights=call.topk_weights[turn].contiguous(), routed=routed)
        found = turned._replace(lora=call.lora._replace(token_lora_mapping=others)).run(package, num_tokens_hint=tokens)
        kept = others.cpu() >= 0
        assert torch.equal(bits(found[kept]), bits(wanted[turn][kept])), f"rank {rank}"


def ranks_that_count(package: ModuleType, variants: Sequence[Variant], device: str) -> None:
    """Adapters of lower ranks than their buffers have the bits of factors with zeros; behind the next 16 nothing is read."""
    counts = (16, 0, 7, 100)

    def behind(factor: torch.Tensor, axis: int, unit: int, fill: float) -> torch.Tensor:
        filled = (factor[:, :1] if factor.stride(1) == 0 else factor).clone()
        for adapter, count in enumerate(counts):
            first = min(-(-count // unit) * unit, factor.shape[axis])
            filled[adapter].narrow(axis - 1, first, factor.shape[axis] - first).fill_(fill)
        return filled.expand_as(factor)

    layouts = itertools.cycle(("packed", "shared"))
    for tokens, ranks in ((4, (24, 70)), (22, (33, 64))):
        how, layout = Adapters("spread", len(counts)), next(layouts)
        call = with_adapters(package, layer(tokens, Experts(), device), how, ranks, layout=layout)
        assert call.lora is not None
        factors = call.lora._asdict()
        found = []
        for unit, fill in ((1, 0.0), (16, torch.nan)):
            for name in ("a13", "b13", "a2", "b2"):
                axis = 2 if name.startswith("a") else 3
                factors[name] = [behind(factor, axis, unit, fill) for factor in factors[name]]
            given = None if fill == 0.0 else torch.tensor(counts, dtype=torch.int32, device=device)
            found.append(call._replace(lora=package.FusedMoeLora(**{**factors, "lora_ranks": given})).run(package))
        assert torch.equal(*map(bits, found)), f"{tokens} tokens, ranks {ranks}"


def the_ops_one_by_one(package: ModuleType, variants: Sequence[Variant], device: str) -> None:
    """moe_runs, moe_shrink, moe_gemm and moe_sum make the bits of fused_moe."""
    for tokens in (3, 9):
        call = with_adapters(package, layer(tokens, Experts("mixed", start=1), device), Adapters("mixed"), (12, 20))
        routed, lora = call.routed, call.lora
        few, num_pairs = tokens <= 4, routed.topk_ids.numel()
        routing = {"num_experts": routed.num_experts, "local_expert_start": routed.start}
        options = {"max_loras": lora.a2[0].shape[0], "block_m": 0 if few else None}
        tables, runs = package.moe_runs(routed.topk_ids, lora.token_lora_mapping, **routing, **options)
        between = "pair" if few else "sorted"
        h = call.hidden.new_zeros(num_pairs, call.w2.shape[2])
        v = package.moe_shrink(call.hidden, lora.a13, tables, runs, x_rows="token")
        given = {"v": v, "lora_b": lora.b13, "runs": runs, "activation": "swiglu"}
        package.moe_gemm(h, call.hidden, call.w13, tables, x_rows="token", out_rows=between, **given)
        v = package.moe_shrink(h, lora.a2, tables, runs, x_rows=between)
        out = torch.zeros(call.hidden.shape, device=device)
        given = {"v": v, "lora_b": lora.b2, "runs": runs, "x_rows": between}
        if few:
            package.moe_gemm(out, h, call.w2, tables, out_rows="token", topk_weights=call.topk_weights, **given)
        else:
            y = call.hidden.new_zeros(*routed.topk_ids.shape, out.shape[1])
            package.moe_gemm(y, h, call.w2, tables, **given)
            package.moe_sum(y, routed.topk_ids, topk_weights=call.topk_weights, out=out, **routing)
        assert torch.equal(out, call.run(package)), f"{tokens} tokens"


def one_graph_serves_every_batch(package: ModuleType, variants: Sequence[Variant], device: str) -> None:
    """A captured graph gives the bits of eager calls for all routings, numbers of tokens, and adapters of these."""

    def fp8(tokens: int, how: Experts, device: str, seed: int = 0) -> Layer:
        sizes: dict[str, Any] = {"hidden": 72, "inter": 40, "top_k": 3, "experts": 4}
        return fp8_layer(package, tokens, how, device, ("group", "group", "swiglu"), seed=seed, **sizes)

    make_layer: Any
    for make_layer, tokens, hint in ((layer, 4, None), (layer, 64, None), (layer, 64, 3), (fp8, 4, None), (fp8, 64, 3)):
        first = with_adapters(package, make_layer(tokens, Experts(valid=tokens), device), Adapters("spread", 4, (1,)), (16, 24))
        for a in (*first.lora.a13, *first.lora.b13, *first.lora.a2, *first.lora.b2):
            a.copy_(torch.randn_like(a, dtype=torch.float32) * a.shape[-1] ** -0.5)
        out = torch.zeros_like(first.hidden, dtype=torch.bfloat16)
        options = {"num_tokens_hint": hint, "workspace": _workspace(package, device, tokens, fp8=True), "out": out}
        first.run(package, **options)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            first.run(package, **options)
        for seed, (how, valid) in enumerate(itertools.product(_HOW, (0, 1, tokens))):
            call = make_layer(tokens, Experts("mixed", valid=valid), device, seed=seed)
            drawn = draw_adapters(Adapters(how.kind, 4, (seed % 4,)), tokens, random.Random(seed), device)
            mapping = (first.lora.token_lora_mapping, drawn.token_lora_mapping)
            enabled = (first.lora.adapter_enabled, drawn.adapter_enabled)
            for held, new in (*tensors(first, call), mapping, enabled):
                held.copy_(new)
            out.fill_(torch.nan)
            graph.replay()
            torch.cuda.synchronize()
            now = call._replace(lora=first.lora, adapters=tuple(drawn.of_token))
            about(lambda now=now, out=out: now.verify(out), f"{tokens} tokens, {how}, {valid} valid")  # type: ignore[misc]
            eager = first.run(package, **{**options, "out": torch.full_like(out, torch.nan)})
            assert torch.equal(bits(eager), bits(out)), f"{tokens} tokens, {how}, {valid} valid"


def real_sizes(package: ModuleType, variants: Sequence[Variant], device: str) -> None:
    """The tiles of all batch sizes, at widths of real models: a sample of tokens of each."""
    sizes: dict[str, Any] = {"hidden": 2048, "inter": 768, "top_k": 8, "experts": 128}
    modes = (None, ("channel", "token", "swiglu"), ("group", "group", "swiglu"))
    for tokens, mode in itertools.product((1, 4, 16, 256, 1024, 4096), modes):
        how = Experts(valid=tokens)
        base = layer(tokens, how, device, **sizes) if mode is None else fp8_layer(package, tokens, how, device, mode, **sizes)
        for rank, layout in ((16, "packed"), (24, "shared"), (64, "packed")):
            call = with_adapters(package, base, Adapters("mixed", 4), (rank, rank), layout=layout)
            for factor in (*call.lora.a13, *call.lora.b13, *call.lora.a2, *call.lora.b2):
                # Of two adapters in one tile each is read for the rows of both.
                (factor[:, 0] if layout == "shared" else factor).nan_to_num_()
            out = call.run(package, out=torch.full_like(call.hidden, torch.nan, dtype=torch.bfloat16))
            chosen = sorted({0, 1, tokens // 2, tokens - 1} & set(range(tokens)))
            hidden, w13, w2 = call.numbers or (call.hidden, call.w13, call.w2)
            local = [item for item in call.routed.local if item.pair // 8 in chosen]
            exact = fused_moe(
                hidden,
                w13,
                w2,
                local,
                call.topk_weights,
                activation="swiglu",
                num_tokens=tokens,
                dtype=out.dtype,
                inner=call.inner,
                lora=Lora(call.adapters, call.lora.a13, call.lora.b13, call.lora.a2, call.lora.b2),
            )
            rows = (each[chosen].cpu() for each in (out, exact.out, exact.bound))
            about(lambda rows=rows: worst_ratio(*rows), f"{tokens} tokens, rank {rank}, scales {mode}")  # type: ignore[misc]


ALSO = ("moe_runs", "moe_gemm", "moe_sum")  # whose kernels run here too
LAWS = (
    Law(layers_with_adapters),
    Law(fp8_layers_with_adapters, slow=True),
    Law(layers_with_fp8_adapters, slow=True),
    Law(a_row_does_not_know_its_batch),
    Law(ranks_that_count, slow=True),
    Law(the_ops_one_by_one),
    Law(one_graph_serves_every_batch, needs_gpu=True),
    Law(real_sizes, needs_gpu=True),
)


def _workspace(package: ModuleType, device: str, tokens: int, fp8: bool = False) -> Any:
    sizes = {"max_tokens": tokens, "top_k": 3, "num_experts": 4, "hidden": 72, "intermediate": 40}
    return package.fused_moe_workspace(**sizes, fp8_activations=fp8, max_rank=80, device=device)
