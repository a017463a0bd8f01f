"""What holds for the products of a base MoE layer through their front door, and for ``fused_moe``, which joins them."""

from __future__ import annotations

import itertools
import random
from types import MappingProxyType, ModuleType
from typing import Any, Callable, Iterator, Mapping, NamedTuple, Sequence

import torch

from kernelgen.core.model import QUANT_AXES
from kernelgen.families import quant
from kernelgen.families.activation import clamp_of, slices
from kernelgen.families.buffers import bits, poison_
from kernelgen.families.case import Law, Variant, worst_ratio
from kernelgen.families.fused_moe import Inner, Lora, Model, fused_moe
from kernelgen.families.moe_experts import Experts, Routed, draw
from kernelgen.families.moe_gemm.cases import Case, make, tiles
from kernelgen.families.moe_lora.reference import dequantise


class Layer(NamedTuple):
    """The operands of one call of fused_moe."""

    hidden: torch.Tensor
    w13: torch.Tensor
    w2: torch.Tensor
    routed: Routed
    topk_weights: torch.Tensor
    activation: str
    scales: Mapping[str, torch.Tensor] = MappingProxyType({})
    numbers: tuple[torch.Tensor, ...] = ()  # what FP8 hidden, w13 and w2 stand for
    inner: Inner | None = None
    lora: Any = None  # a FusedMoeLora
    adapters: tuple[int | None, ...] = ()  # of tokens, with it
    stands_for: Lora | None = None  # what FP8 adapters do
    model: Model = Model()

    def run(self, package: ModuleType, **options: Any) -> torch.Tensor:
        out: torch.Tensor = package.fused_moe(
            self.hidden,
            self.w13,
            self.w2,
            self.routed.topk_ids,
            self.topk_weights,
            activation=self.activation,
            **(clamp.given if (clamp := clamp_of(self.activation)) else {}),
            valid_tokens=self.routed.valid_tokens,
            local_expert_start=self.routed.start,
            **self.scales,
            **self.model.given,
            **{"lora": self.lora, **options},
        )
        return out

    def verify(self, out: torch.Tensor) -> None:
        """Raise AssertionError unless the rows of valid tokens are those of the reference."""
        count = self.routed.num_valid
        numbers = self.numbers or (self.hidden, self.w13, self.w2)
        operands: tuple[Any, ...] = (*numbers, self.routed.local, self.topk_weights)
        sizes: dict[str, Any] = {"num_tokens": count, "dtype": out.dtype, "inner": self.inner}
        if self.lora is not None:
            factors = (self.lora.a13, self.lora.b13, self.lora.a2, self.lora.b2)
            sizes["lora"] = self.stands_for or Lora(self.adapters, *factors)
        exact = fused_moe(*operands, activation=self.activation, clamp=clamp_of(self.activation), model=self.model, **sizes)
        worst_ratio(out[:count].cpu(), exact.out.cpu(), exact.bound.cpu())


def layer(
    tokens: int,
    how: Experts,
    device: str,
    *,
    activation: str = "swiglu",
    dtype: torch.dtype = torch.bfloat16,
    hidden: int = 72,
    inter: int = 40,
    top_k: int = 3,
    experts: int = 4,
    seed: int = 0,
) -> Layer:
    """A layer whose memory is NaN where nothing may be read: padding tokens, and routing weights of pairs that are elsewhere."""
    numbers = torch.Generator().manual_seed(seed)
    routed = draw(how, tokens, top_k, experts, random.Random(seed), device)

    def normal(*size: int) -> torch.Tensor:
        drawn = torch.randn(size, generator=numbers)
        return drawn.mul_(size[-1] ** -0.5)

    x = torch.full((tokens, hidden), torch.nan)
    weights = torch.full((tokens, top_k), torch.nan)
    for pair, _ in routed.local:
        token, j = divmod(pair, top_k)
        x[token] = torch.randn(hidden, generator=numbers)
        weights[token, j] = torch.rand((), generator=numbers)
    rows = slices(activation) * inter
    return Layer(
        x.to(device, dtype),
        normal(experts, rows, hidden).to(device, dtype),
        normal(experts, hidden, inter).to(device, dtype),
        routed,
        weights.to(device),
        activation,
    )


def fused_front_door(package: ModuleType, variants: Sequence[Variant], device: str) -> None:
    """fused_moe is within its bound for few tokens and many, with and without padding, whatever the hint; and rows of
    padding are zero in its own buffer, and keep their bytes in the caller's."""
    named = {"bf16": torch.bfloat16, "f16": torch.float16}
    activated = [variant.tags for variant in variants if variant.tags["epilogue"] != "none"]
    kinds = itertools.cycle(dict.fromkeys((tags["epilogue"], named[tags["dtype"]]) for tags in activated))
    routings = (Experts(), Experts("mixed", start=2), Experts("mixed", start=1, valid=2), Experts(valid=0), Experts("away"))
    hints = itertools.cycle(((None, True), (1, False), (1000, True)))
    for tokens, how in itertools.product((1, 4, 5, 22), routings):
        (hint, own), (activation, dtype) = next(hints), next(kinds)
        call = layer(tokens, how, device, activation=activation, dtype=dtype)
        out = None if own else torch.full_like(call.hidden, torch.nan)
        given = call.run(package, num_tokens_hint=hint, out=out)
        what = f"{activation}, {dtype}, {tokens} tokens, {how}, hint {hint}, own buffer {own}"
        about(lambda call=call, given=given: call.verify(given), what)  # type: ignore[misc]
        rest = given[call.routed.num_valid :]
        right = not rest.any() if own else bool(rest.isnan().all())
        assert right and given.dtype == (torch.float32 if own else call.hidden.dtype), what


def of_models(call: Layer, seed: int = 0) -> Layer:
    """A layer as gpt-oss has them where its gate is clamped, else as Llama 4."""
    if not clamp_of(call.activation):
        return call._replace(model=Model(apply_router_weight_on_input=True))
    numbers, dtype = torch.Generator().manual_seed(seed), call.hidden.dtype if call.hidden.itemsize > 1 else torch.bfloat16
    w13_bias, w2_bias = (torch.randn(w.shape[:2], generator=numbers).to(w.device, dtype) for w in (call.w13, call.w2))
    return call._replace(model=Model("interleaved", w13_bias, w2_bias))


def models_front_door(package: ModuleType, variants: Sequence[Variant], device: str) -> None:
    """Layers of gpt-oss and of Llama 4 are within their bound, for few tokens and many, in a workspace and without."""
    workspace = _workspace(package, device, 9)
    kinds = (("swiglu_clamp", torch.bfloat16), ("swiglu_clamp", torch.float16), ("swiglu", torch.bfloat16))
    for i, (tokens, (activation, dtype)) in enumerate(itertools.product((3, 9), kinds)):
        call = of_models(layer(tokens, Experts("mixed", start=1, valid=tokens - 1), device, activation=activation, dtype=dtype))
        given = call.run(package, workspace=workspace if i % 2 and dtype == torch.bfloat16 else None)
        about(lambda call=call, given=given: call.verify(given), f"{tokens} tokens, {activation}, {dtype}")  # type: ignore[misc]
    scaled = (("channel", "token", "swiglu"), ("mx", None, "swiglu_clamp"))
    for tokens, mode in itertools.product((2, 7), scaled):
        call = of_models(fp8_layer(package, tokens, Experts(valid=tokens), device, mode))
        given = call.run(package)
        about(lambda call=call, given=given: call.verify(given), f"{tokens} tokens, scales {mode}")  # type: ignore[misc]


# Scales of weights, scales of activations; an activation that such layers have.
MODES = (
    ("tensor", None, "relu2"),
    ("channel", None, "swiglu"),
    ("group", None, "swiglu"),
    ("tensor", "tensor", "swiglu"),
    ("tensor", "tensor", "relu2"),
    ("channel", "token", "swiglu"),
    ("group", "group", "swiglu"),
    ("group", "group", "swiglu_clamp"),
    ("channel", "token", "geglu_tanh"),
    ("mx", None, "swiglu_clamp"),
)


def fp8_layer(
    package: ModuleType,
    tokens: int,
    how: Experts,
    device: str,
    mode: tuple[str, str | None, str],
    served: bool = False,
    **sizes: Any,
) -> Layer:
    """A layer of FP8 or MXFP4 weights, and with FP8 activations where the mode has scales for them; ``served``: which are as
    engines have them, powers of two in a byte each, those of tokens column by column, and a scale of h an expert."""
    of_weights, of_x, activation = mode
    sizes = {"hidden": 144, "inter": 136, "top_k": 2, **sizes}
    if of_weights == "mx":  # whole groups
        sizes |= {name: sizes[name] // quant.MX * quant.MX for name in ("hidden", "inter")}
    call = layer(tokens, how, device, activation=activation, **sizes)
    slices = (call.w13.shape[1] // call.w2.shape[2], 1)
    weights = [
        quant.quantize_weights(package, w, of_weights, n) for w, n in zip((call.w13, call.w2), slices, strict=True)
    ]
    if served:
        e8m0 = torch.float8_e8m0fnu
        weights = [(w, scale.view(e8m0) if of_weights == "mx" else scale.to(e8m0)) for w, scale in weights]
    scales = {"w13_scale": weights[0][1], "w2_scale": weights[1][1]}
    numbers = [quant.dequantise_slices(w, scale, of_weights, n) for (w, scale), n in zip(weights, slices, strict=True)]
    hidden, x, inner = call.hidden, call.hidden, Inner(torch.bfloat16)
    if of_x is not None:
        hidden, scales["x_scale"] = quant.quantize_activations(package, call.hidden, of_x)
        if served:
            scales["x_scale"] = scales["x_scale"].to(torch.float8_e8m0fnu)
            scales["x_scale"] = scales["x_scale"].t().contiguous().t() if of_x == "group" else scales["x_scale"]
        x = dequantise(hidden, scales["x_scale"], quant.group_of(of_x, hidden.shape, (1, quant.group()[1])))
        given = None
        if of_x == "tensor":
            given = [2.0 ** (e - 8) for e in range(call.w2.shape[0])] if served else [2.0**-7]
            scales["h_scale"] = torch.tensor(given, device=device)
        width = quant.group()[1] if of_x == "group" else call.w2.shape[2]
        inner = Inner(torch.bfloat16, hidden.dtype, width, given, short=device != "cpu")
    codes = (hidden, weights[0][0], weights[1][0])
    return call._replace(hidden=codes[0], w13=codes[1], w2=codes[2], scales=scales, numbers=(x, *numbers), inner=inner)


def fp8_front_door(package: ModuleType, variants: Sequence[Variant], device: str) -> None:
    """Layers with FP8 weights, with and without FP8 activations, and with MXFP4 weights are within their bound, in a workspace
    and without; and rows of padding are zero."""
    few = [mode for mode in MODES if mode[0] == "mx" or mode[1:] in (("tensor", "swiglu"), ("group", "swiglu"))]
    for i, (tokens, mode) in enumerate([*itertools.product((1,), few), *itertools.product((3, 7), MODES)]):
        inter = 96 if i % 2 else 136  # as many groups of gate and up as if they were one, or more
        call = fp8_layer(package, tokens, Experts(valid=(tokens + 1) // 2), device, mode, served=i % 3 == 0, inter=inter)
        sizes = {"max_tokens": 12, "top_k": 2, "num_experts": 4, "hidden": 144, "intermediate": 136}
        workspace = package.fused_moe_workspace(**sizes, fp8_activations=mode[1] is not None, device=device)
        given = call.run(package, workspace=workspace if i % 2 else None)
        about(lambda call=call, given=given: call.verify(given), f"{tokens} tokens, scales {mode}")  # type: ignore[misc]
        assert not given[call.routed.num_valid :].any(), f"{tokens} tokens, scales {mode}: padding"


def stale_workspace(package: ModuleType, variants: Sequence[Variant], device: str) -> None:
    """What an earlier, larger batch left in a workspace changes nothing, and nothing else is allocated."""
    workspace = _workspace(package, device, 40)
    for buffer in (workspace.pairs, workspace.blocks, workspace.num_blocks, workspace.inter, workspace.outputs):
        poison_(buffer)
    for tokens, how in ((40, Experts()), (6, Experts("mixed", start=1)), (3, Experts(valid=2)), (40, Experts("away"))):
        call = layer(tokens, how, device)
        out = torch.zeros_like(call.hidden)
        assert call.run(package, workspace=workspace, out=out) is out
        about(lambda call=call, out=out: call.verify(out), f"{tokens} tokens, {how}")  # type: ignore[misc]


def same_bits(package: ModuleType, variants: Sequence[Variant], device: str) -> None:
    """A repeated call gives the same bits, and so does one with padding behind its tokens."""
    for tokens in (3, 12):
        call = layer(tokens, Experts("mixed", start=1), device)
        wanted = call.run(package, num_tokens_hint=8)
        assert torch.equal(bits(call.run(package, num_tokens_hint=8)), bits(wanted)), f"{tokens} tokens"
        more = [torch.cat([t, torch.full_like(t, 1)]) for t in (call.hidden, call.routed.topk_ids, call.topk_weights)]
        if tokens > 4:  # below, a larger batch takes another schedule
            valid = torch.tensor([tokens], dtype=torch.int32, device=device)
            routed = call.routed._replace(topk_ids=more[1], valid_tokens=valid)
            padded = call._replace(hidden=more[0], topk_weights=more[2], routed=routed)
            found = padded.run(package, num_tokens_hint=8)[:tokens]
            assert torch.equal(bits(found), bits(wanted)), f"{tokens} tokens with padding"


def few_and_many_agree(package: ModuleType, variants: Sequence[Variant], device: str) -> None:
    """The products on tables and those without give the same rows, within the bound of one and of the other."""
    for rows, epilogue, weight in (("token_pair", "swiglu", "plain"), ("pair_pair", "none", "weighted")):
        tags = {"dtype": "bf16", "rows": rows, "epilogue": epilogue, "routed_weight": weight}
        case = Case("agree", "", tokens=3, routing=Experts("mixed"), k=64, n=48)
        calls = [make(package, case, {**tags, "schedule": s}, device) for s in ("gemv", "tile")]
        for call in calls:
            _launch(package, call, tags)
            call.verify()
        one, other = (call.out.view[call.expected.rows].double() for call in calls)
        limit = 2 * calls[0].expected.bound.to(one)
        assert ((one - other).abs() <= limit).all(), f"{rows}, {epilogue}"


def fp8_rows_have_the_bits_of_two_launches(package: ModuleType, variants: Sequence[Variant], device: str) -> None:
    """Rows that a product makes FP8 are, codes and scales, those that moe_quant makes of what it else writes; also where all of a
    group are zero, infinite or NaN, and where they saturate."""
    known = {tuple(variant.tags.values()): variant for variant in variants}
    for variant in variants:
        other = known.get(tuple({**variant.tags, "out_quant": "none"}.values()))
        if variant.tags["out_quant"] == "none" or other is None:
            continue
        case = Case("bits", "", tokens=70, experts=2, k=128, n=264, block_m=128, routing=Experts("skewed"))
        one, two = (make(package, case, tags, device) for tags in (variant.tags, other.tags))
        for call in (one, two):
            assert call.w_scale is not None
            call.x.view(torch.uint8)[0] = 0
            call.x.view(torch.uint8)[1, 0] = 0x7F  # NaN
            call.w_scale[-1].view(-1)[-1] = torch.inf
            call.w_scale[0].view(-1)[-1] = 2.0**123  # some of a group are infinite, which leave its scale alone
            if call.w_scale.dim() > 1:
                call.w_scale[0].view(-1)[0] = 2.0**-126  # no scale is below what fp32 has in full
            launcher = (variant if call is one else other).launcher(package)
            launcher(*call.operands, config=tiles(launcher), **call.scales)
        assert one.out_scale is not None
        codes, scale = torch.zeros_like(one.out.view), one.out_scale.view
        if scale.dim() > 1:
            scale = torch.zeros_like(scale)
        package.moe_quant(codes, scale, two.out.view, two.tables)
        rows = one.expected.rows.to(scale.device)
        assert torch.equal(bits(one.out.view[rows]), bits(codes[rows])), f"{variant.name}: codes"
        assert scale.dim() == 1 or torch.equal(bits(one.out_scale.view[rows]), bits(scale[rows])), f"{variant.name}: scales"
        last = two.out.view[rows][:, 256:]
        assert scale.dim() == 1 or (last.isinf().any(1) & (last.isfinite() & (last != 0)).any(1)).any()
        found = codes[rows].float()
        assert found.isnan().any() and (found.abs() == torch.finfo(codes.dtype).max).any() and (found == 0).all(1).any()


def every_product_has_a_variant(
    package: ModuleType, variants: Sequence[Variant], device: str
) -> None:
    """What moe_gemm offers finds a variant, on tables and without; nothing runs."""
    runtime = package._runtime
    for variant in variants:
        tags = variant.tags
        alone = tags["rows"] == "sorted_sorted" or (tags["schedule"], tags["rows"]) == ("lane_gemv", "pair_token")
        if tags["out_quant"] != "none" or alone:
            continue  # served where Gluon is alone
        call = make(package, Case("point", "", k=64, n=64), tags, device)
        with runtime.compile_only() as requests:
            _launch(package, call, tags)
        assert len(requests) == 1, f"{variant.name}: {len(requests)} launches"


def wrong_arguments_are_named(
    package: ModuleType, variants: Sequence[Variant], device: str
) -> None:
    """Arguments that do not fit raise ValueError, with what was given and wanted, before anything is written."""
    for variant in _one_a_body(variants):
        call = make(package, Case("wrong", "", k=40, n=24), variant.tags, device)
        operands = dict(zip(("out", "x", "w", "tables"), call.operands, strict=True))
        for label, change in _WRONG.items():
            wrong = {**operands, **_weights(call)}
            if not change(wrong):
                continue
            try:
                variant.launcher(package)(**wrong)
            except ValueError as error:
                complete = all(word in str(error) for word in (variant.name, "got", "wanted"))
                assert complete, f"{variant.name}, {label}: {error}"
            else:
                raise AssertionError(f"{variant.name}: {label} is let pass")
        assert not call.out.changed().any(), f"{variant.name}: out was written"


def wrong_layers_are_named(package: ModuleType, variants: Sequence[Variant], device: str) -> None:
    """The same, of fused_moe."""
    for tokens in (3, 9):
        call = layer(tokens, Experts(valid=2), device)
        right = {
            "hidden": call.hidden,
            "w13": call.w13,
            "w2": call.w2,
            "topk_ids": call.routed.topk_ids,
            "topk_weights": call.topk_weights,
            "activation": "swiglu",
            "valid_tokens": call.routed.valid_tokens,
            "workspace": _workspace(package, device, tokens),
            "out": torch.zeros_like(call.hidden),
        }
        for label, change in _WRONG_LAYER.items():
            try:
                package.fused_moe(**{**right, **change(right)})
            except ValueError as error:
                complete = all(word in str(error) for word in ("got", "wanted"))
                assert complete, f"{label}: {error}"
            else:
                raise AssertionError(f"{label} is let pass")
        assert not right["out"].any(), "out was written"


def one_graph_serves_every_batch(
    package: ModuleType, variants: Sequence[Variant], device: str
) -> None:
    """A graph captured once for the largest batch gives the bits of eager calls, for every routing and valid_tokens."""

    def fp8(tokens: int, how: Experts, device: str, seed: int = 0) -> Layer:
        return fp8_layer(package, tokens, how, device, ("group", "group", "swiglu"), seed=seed, hidden=136, inter=136)

    for make_layer, tokens, hint in ((layer, 4, None), (layer, 64, None), (layer, 64, 3), (fp8, 4, None), (fp8, 64, 3)):
        workspace = _workspace(package, device, tokens)
        first = make_layer(tokens, Experts(valid=tokens), device)
        out = torch.zeros(tokens, first.hidden.shape[1], dtype=torch.bfloat16, device=device)
        options = {"num_tokens_hint": hint, "workspace": workspace, "out": out}
        first.run(package, **options)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            first.run(package, **options)
        for seed, (kind, valid) in enumerate(itertools.product(("spread", "mixed", "skewed"), (0, 1, tokens // 2, tokens))):
            call = make_layer(tokens, Experts(kind, valid=valid), device, seed=seed)
            for held, new in tensors(first, call):
                held.copy_(new)
            out.fill_(torch.nan)
            graph.replay()
            torch.cuda.synchronize()
            about(lambda call=call, out=out: call.verify(out), f"{tokens} tokens, {kind}, {valid} valid")  # type: ignore[misc]
            assert out[valid:].isnan().all(), "rows of padding were written"
            eager = call.run(package, **{**options, "out": torch.full_like(out, torch.nan)})
            assert torch.equal(bits(eager), bits(out)), f"{tokens} tokens, {kind}, {valid} valid"


def real_sizes(package: ModuleType, variants: Sequence[Variant], device: str) -> None:
    """The tiles of all batch sizes, at widths of real models: a sample of tokens of each."""
    for tokens in (1, 4, 16, 256, 1024, 4096):
        call = layer(tokens, Experts(valid=tokens), device, hidden=2048, inter=768, top_k=8, experts=128)
        out = call.run(package, out=torch.full_like(call.hidden, torch.nan))
        assert out.isfinite().all()
        chosen = [0, tokens // 2, tokens - 1]
        routed = call.routed
        local = [item for item in routed.local if item.pair // 8 in chosen]
        part = call._replace(routed=routed._replace(local=local))
        exact = fused_moe(
            part.hidden,
            part.w13,
            part.w2,
            local,
            part.topk_weights,
            activation="swiglu",
            num_tokens=tokens,
            dtype=out.dtype,
        )
        worst_ratio(out[chosen].cpu(), exact.out[chosen].cpu(), exact.bound[chosen].cpu())


LAWS = (
    Law(fused_front_door),
    Law(fp8_front_door),
    Law(models_front_door),
    Law(stale_workspace),
    Law(same_bits),
    Law(few_and_many_agree),
    Law(fp8_rows_have_the_bits_of_two_launches),
    Law(every_product_has_a_variant),
    Law(wrong_arguments_are_named),
    Law(wrong_layers_are_named),
    Law(one_graph_serves_every_batch, needs_gpu=True),
    Law(real_sizes, needs_gpu=True),
)


def _workspace(package: ModuleType, device: str, tokens: int) -> Any:
    return package.fused_moe_workspace(
        max_tokens=tokens, top_k=3, num_experts=4, hidden=136, intermediate=136, fp8_activations=True, device=device
    )


def tensors(to: Layer, source: Layer) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """What a graph holds of a layer, and the same of another."""
    yield from ((to.hidden, source.hidden), (to.w13, source.w13), (to.w2, source.w2))
    yield to.topk_weights, source.topk_weights
    yield to.routed.topk_ids, source.routed.topk_ids
    yield from ((to.scales[name], source.scales[name]) for name in to.scales)
    if to.routed.valid_tokens is not None and source.routed.valid_tokens is not None:
        yield to.routed.valid_tokens, source.routed.valid_tokens


def _launch(package: ModuleType, call: Any, tags: Mapping[str, str]) -> None:
    reads, writes = tags["rows"].split("_")
    package.moe_gemm(
        *call.operands,
        x_rows=reads,
        out_rows=writes,
        activation=None if tags["epilogue"] == "none" else tags["epilogue"],
        layout="halves" if tags.get("layout", "none") == "none" else tags["layout"],
        topk_weights=call.topk_weights,
        **call.scales,
        **call.more,
    )


def about(verify: Callable[[], object], what: str) -> None:
    """Verify; an error tells ``what``."""
    try:
        verify()
    except AssertionError as error:
        raise AssertionError(f"{what}: {error}") from None


def _one_a_body(variants: Sequence[Variant]) -> Iterator[Variant]:
    """Of each schedule, order of rows and kind of scales, one variant."""
    seen = set()
    for variant in variants:
        body = tuple(variant.tags[axis] for axis in ("schedule", "rows", "bias", *QUANT_AXES))
        if body not in seen:
            seen.add(body)
            yield variant


def _weights(call: Any) -> dict[str, Any]:
    weights = {} if call.topk_weights is None else {"topk_weights": call.topk_weights}
    return {**weights, **call.scales, **call.more}


_Operands = dict[str, Any]


def _set(name: str, change: Callable[[Any], Any]) -> Callable[[_Operands], bool]:
    def spoil(operands: _Operands) -> bool:
        if operands.get(name) is None:
            return False
        operands[name] = change(operands[name])
        return True

    return spoil


def _without_tables(operands: _Operands) -> bool:
    needed = operands["tables"].pairs is not None
    operands["tables"] = operands["tables"]._replace(pairs=None, blocks=None, num_blocks=None, block_m=0)
    return needed


_WRONG: Mapping[str, Callable[[_Operands], bool]] = {
    "x of another dtype": _set("x", lambda x: x.float()),
    "x of another K": _set("x", lambda x: x[:, :-1]),
    "x of too few rows": _set("x", lambda x: x[:-1]),
    "x with columns apart": _set("x", lambda x: x.t().contiguous().t()),
    "out of integers": _set("out", lambda out: out.int()),
    "out of another N": _set("out", lambda out: out[..., :-1]),
    "out with columns apart": _set("out", lambda o: o.t().contiguous().t()),
    "weights of another dtype": _set("w", lambda w: w.double()),
    "weights of two dimensions": _set("w", lambda w: w[0]),
    "weights of too few experts": _set("w", lambda w: w[:-1]),
    "weights with columns apart": _set("w", lambda w: w.transpose(1, 2).contiguous().transpose(1, 2)),
    "routing weights of another shape": _set("topk_weights", lambda w: w[:, :-1]),
    "routing weights that are integers": _set("topk_weights", lambda w: w.nan_to_num().int()),
    "no tables": _without_tables,
    "scales in another dtype": _set("w_scale", lambda scale: scale.double()),
    "scales of too few experts": _set("w_scale", lambda scale: scale[:-1]),
    "scales of x in another dtype": _set("x_scale", lambda scale: scale.half()),
    "scales of x of another shape": _set("x_scale", lambda scale: scale[None]),
    "a bias of another N": _set("bias", lambda bias: bias[:, 1:]),
    "a bias of too few experts": _set("bias", lambda bias: bias[:-1]),
    "a bias of integers": _set("bias", lambda bias: bias.nan_to_num().int()),
    "a bias with columns apart": _set("bias", lambda bias: bias.t().contiguous().t()),
}

def _joined_groups(a: _Operands) -> _Operands:
    codes = {name: a[name].to(torch.float8_e4m3fn) for name in ("w13", "w2")}
    shapes = {name: (w.shape[0], *(-(-size // 128) for size in w.shape[1:])) for name, w in codes.items()}
    return {**codes, **{f"{name}_scale": a["topk_weights"].new_ones(shape) for name, shape in shapes.items()}}


_WRONG_LAYER: Mapping[str, Callable[[_Operands], _Operands]] = {
    "an unknown activation": lambda a: {"activation": "swish"},
    "a clamp without its limit": lambda a: {"activation": "swiglu_clamp"},
    "a beta that nothing takes": lambda a: {"beta": 1.0},
    "hidden in fp32": lambda a: {"hidden": a["hidden"].float()},
    "hidden of another width": lambda a: {"hidden": a["hidden"][:, :-1]},
    "w13 without its second half": lambda a: {"w13": a["w13"][:, ::2]},
    "w2 of another dtype": lambda a: {"w2": a["w2"].half()},
    "ids as a vector": lambda a: {"topk_ids": a["topk_ids"].flatten()},
    "weights of another shape": lambda a: {"topk_weights": a["topk_weights"][:, :-1]},
    "valid tokens in 64 bits": lambda a: {"valid_tokens": a["valid_tokens"].long()},
    "scales of one product alone": lambda a: {"w13_scale": a["topk_weights"].new_ones(4)},
    "scales of x alone": lambda a: {"x_scale": a["topk_weights"].new_ones(1)},
    "a scale of h that nothing needs": lambda a: {"h_scale": a["topk_weights"].new_ones(1)},
    "groups of gate and up as if they were one": lambda a: _joined_groups(a),
    "scales of weights that are no FP8": lambda a: dict.fromkeys(("w13_scale", "w2_scale"), a["topk_weights"].new_ones(4)),
    "a hint of nothing": lambda a: {"num_tokens_hint": 0},
    "out of another shape": lambda a: {"out": a["out"][:-1]},
    "an unknown layout": lambda a: {"layout": "turns"},
    "a layout that no such layer has": lambda a: {"layout": "interleaved"},
    "a bias of one product alone": lambda a: {"w2_bias": a["w2"].new_zeros(a["w2"].shape[:2])},
    "a bias of one half": lambda a: {"w13_bias": a["w2"][:, 0].contiguous(), "w2_bias": a["w2"][..., 0].contiguous()},
    "a word where a flag is": lambda a: {"apply_router_weight_on_input": "yes"},
    "weights on the input of a layer that is clamped": lambda a: {
        **{"activation": "swiglu_clamp", "limit": 7.0, "apply_router_weight_on_input": True},
    },
    "a workspace that is too small": lambda a: {
        "workspace": a["workspace"]._replace(inter=a["workspace"].inter[:8])
    },
    "a workspace of another dtype": lambda a: {
        "workspace": a["workspace"]._replace(inter=a["workspace"].inter.half())
    },
}
