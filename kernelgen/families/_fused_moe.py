"""A whole base MoE layer behind its router: two grouped products, the activation between them, and the weighted sum.

Few tokens take two launches, which stream the weights of their experts pair by pair. More take four: the tables, a product
with the activation in its epilogue, whose rows stay in the order of the tables, a product that puts them back, and the sum;
so do few tokens too, where pairs would read much of the weights again. With FP8 activations there is one more, which makes FP8
of the rows between the two products. A single token of MXFP4 weights does without tables, and has a sum, but where their kernels
in Gluon serve.

With LoRA adapters the layer keeps its products: each takes, behind its own K loop, a few further steps over the ranks of the
adapters in a tile, so that no row is written twice. Their rank vectors are made by a launch in front of it, which runs beside
its K loop; where there are tables, they have the rows of each expert by adapter.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, NamedTuple

import torch

from . import _operands as operands
from . import _runtime as runtime
from ._activation import Alpha, Beta, Layout, Limit
from ._activation import choice as activation_choice
from ._routing import AdapterEnabled, ExpertMap, LoraRanks, TokenLoraMapping, TopkIds
from ._scales import check_x_scale, scale_operand
from .moe_align._op import Fill as Align
from .moe_align._op import (
    Localize,
    MoeTables,
    NumTokensHint,
    ValidTokens,
    bind_local,
    default_block_m,
    experts_hit,
    fail_start,
    max_blocks,
    scratch_size,
)
from .moe_align._op import Problem as AlignProblem
from .moe_align._op import bind as bind_align
from .moe_gemm._op import bind as bind_gemm
from .moe_gemm._op import find_scales, is_tuned
from .moe_gemm._problem import Given as Gemm
from .moe_gemm._problem import lanes_serve
from .moe_gemm._table import VARIANTS as GEMM
from .moe_permute._op import bind as bind_permute
from .moe_permute._problem import Given as Permute
from .moe_quant._op import bind as bind_quant
from .moe_quant._problem import Given as Quant
from .moe_quant._table import QUANT
from .moe_runs._op import Fill as Runs
from .moe_runs._op import MoeRuns, runs_size, split
from .moe_runs._op import Problem as RunsProblem
from .moe_runs._op import bind as bind_runs
from .moe_shrink._op import bind as bind_shrink
from .moe_shrink._op import vector_shape
from .moe_shrink._problem import Given as Shrink
from .moe_shrink._problem import part_count
from .moe_sum._op import bind as bind_sum
from .moe_sum._problem import Given as Sum

__all__ = ["FusedMoeLora", "FusedMoeWorkspace", "fused_moe", "fused_moe_workspace"]

# Up to so many tokens stream weights pair by pair, where tables would cost more than they save: bytes that gemv reads again, and
# FP8 that it has to widen for each pair. Matrix units take pairs of an expert together or side by side, which reads it once; so
# up to so many tokens of FP8, whose pairs are spread over the experts, do.
_FEW_TOKENS, _SPREAD_TOKENS, _AGAIN, _WIDENED = 4, 16, 64 * 2**20, 192 * 2**20


def _factor(name: str, shape: str, count: str) -> operands.Tensor:
    return operands.Tensor(shape, "D", slices="alike", count=count, scaled_by=f"lora.{name}_scale")


def _buffer(dtype: torch.dtype | str, shape: str = "*") -> operands.Tensor:
    return operands.Tensor(shape, dtype, operands.CONTIGUOUS, written=True)


@operands.bundle()
class FusedMoeLora(NamedTuple):
    """The adapters on the experts of a layer, and which token has which; scalings are folded into the second factors.

    Factors are in the dtype of ``hidden``, under an FP8 one in bfloat16; of any rank, those of gate and up of one layout; the
    strides over L and E are free, 0 shares. They are finite: what is not reaches rows of other adapters.

    Factors with scales are FP8 (float8_e4m3fn or float8_e5m2), each of which stands for its number times its scale: one of a
    factor, of a row or of a group, on FP8 weights as these have them. ``hidden`` is bfloat16 or FP8 then.
    """

    token_lora_mapping: TokenLoraMapping  # the adapter of each token; -1, or what is not in [0, L): none
    a13: Annotated[operands.Tensors, _factor("a13", "L, E, rank13, H", "G")]  # of gate and up, or of what there is without a gate
    b13: Annotated[operands.Tensors, _factor("b13", "L, E, I, rank13", "G")]  # likewise
    a2: Annotated[operands.Tensors, _factor("a2", "L, E, rank2, I", "1")]  # one
    b2: Annotated[operands.Tensors, _factor("b2", "L, E, H, rank2", "1")]  # one
    adapter_enabled: AdapterEnabled = None  # 0: tokens with this adapter have none; None: all are enabled
    lora_ranks: LoraRanks = None  # how many ranks of each count: rows of A and columns of B behind them are zero, and hardly read
    # Of each: float32, as many as factors, [L, E]; or [L, E, rows], with a last dimension of 1 or without; or
    # [L, E, ceil(rows / 128), ceil(columns / 128)]. Strides over L and E are free.
    a13_scale: Annotated[operands.Tensors | None, scale_operand(slices="any", count="G")] = None
    b13_scale: Annotated[operands.Tensors | None, scale_operand(slices="any", count="G")] = None
    a2_scale: Annotated[operands.Tensors | None, scale_operand(slices="any", count="1")] = None
    b2_scale: Annotated[operands.Tensors | None, scale_operand(slices="any", count="1")] = None


@operands.bundle()
class FusedMoeWorkspace(NamedTuple):
    """Buffers for the worst case, so that ``fused_moe`` does not allocate; one per stream."""

    pairs: Annotated[torch.Tensor, _buffer(torch.int32)]  # [max_tokens * top_k]
    blocks: Annotated[torch.Tensor, _buffer(torch.int32)]
    num_blocks: Annotated[torch.Tensor, _buffer(torch.int32, "1")]
    inter: Annotated[torch.Tensor, _buffer("D")]  # [max_tokens * top_k * I], the dtype of the layer
    outputs: Annotated[torch.Tensor, _buffer("D")]  # [max_tokens * top_k * H]
    codes: Annotated[torch.Tensor | None, _buffer(torch.uint8)] = None  # [max_tokens * top_k * I], for FP8 activations
    scales: Annotated[torch.Tensor | None, _buffer(torch.float32)] = None  # of those, and of rows of hidden in order
    runs: Annotated[torch.Tensor | None, _buffer(torch.int32)] = None  # for adapters
    vectors: Annotated[torch.Tensor | None, _buffer(torch.float32)] = None  # likewise
    ids: Annotated[torch.Tensor | None, _buffer(torch.int32)] = None  # [max_tokens * top_k], for an expert_map


def fused_moe_workspace(
    *,
    max_tokens: int,
    top_k: int,
    num_experts: int,
    hidden: int,
    intermediate: int,
    dtype: torch.dtype = torch.bfloat16,
    fp8_activations: bool = False,
    max_rank: int = 0,
    device: torch.device | str,
) -> FusedMoeWorkspace:
    """Buffers that serve every batch of up to ``max_tokens`` rows, whatever its routing.

    num_experts: those in the weights. dtype: of ``hidden``; with FP8 activations that of the rows in between, bfloat16.
    max_rank: of the adapters; 0: there are none.

    Raises:
        ValueError: an argument that does not fit.
    """
    layer = (max_tokens, top_k, num_experts, hidden, intermediate)
    _SPACE.check("fused_moe_workspace", _Space(*layer, dtype, fp8_activations, max_rank, device))
    num_pairs = max_tokens * top_k
    # Rank vectors of a pair: of few tokens in parts of float32, else in 16 bits.
    few = max(2 * part_count(hidden), part_count(intermediate)) * min(max_tokens, _SPREAD_TOKENS) * top_k

    def empty(size: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
        return torch.empty(size, dtype=dtype, device=device)

    return FusedMoeWorkspace(
        pairs=empty(num_pairs),
        blocks=empty(3 * (num_experts + num_pairs // 16) + scratch_size(num_pairs, num_experts)),
        num_blocks=empty(1),
        inter=empty(num_pairs * intermediate, dtype),
        outputs=empty(num_pairs * hidden, dtype),
        codes=empty(num_pairs * intermediate, torch.uint8) if fp8_activations else None,
        scales=empty(num_pairs * (_groups(intermediate) + _groups(hidden)), torch.float32) if fp8_activations else None,
        runs=empty(runs_size(num_pairs, num_experts)) if max_rank else None,
        vectors=empty(max(few, num_pairs) * max_rank, torch.float32) if max_rank else None,
        ids=empty(num_pairs),
    )


def fused_moe(
    hidden: torch.Tensor,
    w13: torch.Tensor,
    w2: torch.Tensor,
    topk_ids: torch.Tensor,
    topk_weights: torch.Tensor,
    *,
    activation: str,
    layout: str = "halves",
    apply_router_weight_on_input: bool = False,
    valid_tokens: torch.Tensor | None = None,
    num_tokens_hint: int | None = None,
    local_expert_start: int = 0,
    expert_map: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    workspace: FusedMoeWorkspace | None = None,
    w13_scale: torch.Tensor | None = None,
    w2_scale: torch.Tensor | None = None,
    x_scale: torch.Tensor | None = None,
    h_scale: torch.Tensor | None = None,
    w13_bias: torch.Tensor | None = None,
    w2_bias: torch.Tensor | None = None,
    lora: FusedMoeLora | None = None,
    limit: float | None = None,
    alpha: float | None = None,
    beta: float | None = None,
) -> torch.Tensor:
    """The experts of an MoE layer for T tokens of top_k experts each, on the device only.

    out[t] = sum over j of topk_weights[t, j] * (W2[e] . act(W13[e] . hidden[t] + w13_bias[e]) + w2_bias[e]), for e =
    topk_ids[t, j] - local_expert_start in [0, E): a share of the layer under expert parallelism. Nothing asks the host, so that
    one CUDA graph, captured for the largest batch, stays right for every routing and every ``valid_tokens``. The same call gives
    the same bits.

    Args:
        hidden: [T, H] bfloat16 or float16, last stride 1.
        w13: [E, 2 * I, H] with an activation that has a gate (as ``layout`` says), else [E, I, H]; dtype of ``hidden``.
        w2: [E, H, I], likewise.
        topk_ids: [T, top_k] int32 or int64, global ids; an id may occur twice in a token, and -1 is nowhere.
        topk_weights: [T, top_k] float, applied in fp32 when the experts of a token are summed up.
        layout: how gate and up lie in ``w13``, its scales and its bias: "halves", gate over up; or "interleaved", in turns,
            the rows of gate at even places, as in gpt-oss. Adapters have a factor of each.
        apply_router_weight_on_input: ``topk_weights`` multiply ``hidden`` instead, as in Llama 4. A product is linear, so they
            are applied to its fp32 sums, with what adapters added, in front of the activation: once, where a model rounds its
            scaled input first.
        activation: of the fp32 sums, then rounded once. With a gate "swiglu": silu(gate) * up; "swiglu_clamp": see limit;
            "geglu" and "geglu_tanh": gelu(gate) * up, by erf, and as it is approximated by tanh. Without one "relu2":
            relu(x) ** 2; "silu"; "gelu" and "gelu_tanh".
        valid_tokens: int32 on the device: how many of the T rows are tokens; None: all.
        num_tokens_hint: how many tokens to expect; None: T. It sizes tiles and grids; any number is right.
        local_expert_start: the global id of the first expert of ``w13`` and ``w2``.
        expert_map: [global experts] int32, global to local expert, -1: not here; in place of ``local_expert_start``.
        out: [T, H] in any float dtype, of which rows from ``valid_tokens`` on keep their bytes; None: a new float32
            tensor, in which they are zero.
        workspace: from ``fused_moe_workspace``; None allocates.
        w13_scale, w2_scale: float32 or float8_e8m0fnu (powers of two), for FP8 weights (float8_e4m3fn or float8_e5m2), each of
            which stands for its number times its scale: [E]; or a scale a row, [E, rows]; or a scale a group, [E, ceil(rows /
            128), ceil(columns / 128)]. Gate and up are quantised apart: w13_scale may be [E, 2], and its groups of rows begin
            anew with up, whatever I is: [E, 2 * ceil(I / 128), ceil(H / 128)]. Or uint8 or float8_e8m0fnu, [E, rows, columns /
            32], for MXFP4 weights, uint8 [E, rows, columns / 2] of two numbers a byte, the lower bits first: ``blocks`` of a
            checkpoint with its last two dimensions as one, and its ``scales``. ``hidden`` is bfloat16 then.
        x_scale: likewise, for an FP8 ``hidden``: [1], [T, 1] or [T, ceil(H / 128)], as the scales of the weights; the last may
            lie column by column. A token is made FP8 once for all its experts: of input scales of experts take the largest. The
            activations between the two products are rounded to bfloat16 and then become FP8 too, by ``moe_quant``, with scales
            alike.
        h_scale: their scale where x_scale is [1]: [1], or [E], the input scale of ``w2`` of each expert; other scales are
            found.
        w13_bias, w2_bias: [E, rows] in any float dtype, last stride 1, both or neither, added to the sums in fp32, in front of
            the activation, and before experts are weighted.
        lora: adapters, which add B . round(A . x) to the sums of each product, in fp32: before the activation, and before the
            rounding of the second product. x is what the product has, of an FP8 ``hidden`` the numbers that it stands for; but
            for the second product the activations as they were rounded, before they become FP8. Tokens without an adapter get
            the bits of a call without adapters that uses the same tiles.
        limit, alpha, beta: of "swiglu_clamp", g * sigmoid(alpha * g) * (u + beta), where g is the gate, at most ``limit``, and
            u is up, from -``limit`` to ``limit``; None: alpha is 1, beta 0. gpt-oss has 7, 1.702 and 1, DeepSeek-V4 a limit
            alone. They may change from call to call.

    Raises:
        ValueError: something does not fit, or no variant serves it; nothing was launched.
    """
    layer, scales = (hidden, w13, w2, topk_ids, topk_weights), (w13_scale, w2_scale, x_scale, h_scale)
    zeroes = out is None
    request = (activation, layout, apply_router_weight_on_input, local_expert_start, num_tokens_hint, zeroes)
    more = (w13_bias, w2_bias, workspace, lora, limit, alpha, beta)
    rest = (*layer, valid_tokens, expert_map, *request, *scales, *more)
    if out is None:
        try:
            out = torch.empty(hidden.shape, dtype=torch.float32, device=hidden.device)
        except AttributeError as error:
            OP.refuse(Given(None, *rest), error)  # type: ignore[arg-type]
    (_in_graphs if torch.compiler.is_compiling() else _apply)(out, *rest)
    return out


class _Space(NamedTuple):
    max_tokens: operands.Count
    top_k: operands.Size
    num_experts: operands.Size
    hidden: operands.Size
    intermediate: operands.Size
    dtype: Annotated[torch.dtype, operands.Choice(GEMM.dtypes)]
    fp8_activations: operands.Bool
    max_rank: operands.Count
    device: Annotated[torch.device | str, operands.Device()]


_SPACE = operands.Op("fused_moe_workspace", _Space, launches=False)


class Given(NamedTuple):
    """What fused_moe is given."""

    out: Annotated[
        torch.Tensor, operands.Tensor("T, H", operands.FLOATS, made=True, made_if="zeroes", written=True, asks=("torch_dtype",))
    ]
    hidden: Annotated[torch.Tensor, operands.Tensor("T, H", "D", scaled_by="x_scale")]
    w13: Annotated[torch.Tensor, operands.Tensor("E, G*I, H", "D", scaled_by="w13_scale", packed=True)]
    w2: Annotated[torch.Tensor, operands.Tensor("E, H, I", "D", scaled_by="w2_scale", packed=True)]
    topk_ids: TopkIds
    topk_weights: Annotated[torch.Tensor, operands.Tensor("T, top_k", operands.FLOATS, operands.CONTIGUOUS)]
    valid_tokens: ValidTokens
    expert_map: ExpertMap | None
    activation: Annotated[str, activation_choice(size="G")]
    layout: Layout
    apply_router_weight_on_input: Annotated[bool, operands.Flag(asks=("weighted",))]
    local_expert_start: operands.Count
    num_tokens_hint: NumTokensHint
    zeroes: Annotated[bool, operands.Flag(public=False)]
    w13_scale: Annotated[torch.Tensor | None, scale_operand()]
    w2_scale: Annotated[torch.Tensor | None, scale_operand()]
    x_scale: Annotated[torch.Tensor | None, scale_operand()]
    h_scale: Annotated[torch.Tensor | None, scale_operand()]
    w13_bias: Annotated[torch.Tensor | None, operands.Tensor("E, G*I", operands.FLOATS)]
    w2_bias: Annotated[torch.Tensor | None, operands.Tensor("E, H", operands.FLOATS)]
    workspace: Annotated[FusedMoeWorkspace | None, operands.Bundle(FusedMoeWorkspace, maker="fused_moe_workspace")]
    lora: Annotated[FusedMoeLora | None, operands.Bundle(FusedMoeLora, maker="FusedMoeLora")]
    limit: Limit
    alpha: Alpha
    beta: Beta


OP = operands.Op(
    "fused_moe",
    Given,
    dtypes={"D": GEMM.dtypes},
    fp8=QUANT.elements,
    first=("w2", "w13", "topk_ids"),
    tells=("hidden",),
    aligned=("hidden", "w13", "w2"),
)

# What the two products call their operands here.
_FIRST = runtime.Caller(
    "fused_moe", x="hidden", w="w13", w_scale="w13_scale", bias="w13_bias", lora_b="lora.b13", b_scale="lora.b13_scale"
)
_SECOND = runtime.Caller(
    "fused_moe", x="hidden", codes="hidden", w="w2", w_scale="w2_scale", x_scale="h_scale", scale="h_scale", bias="w2_bias",
    lora_b="lora.b2", b_scale="lora.b2_scale",
)

_SHRINK_X = runtime.Caller("fused_moe", x="hidden", lora_a="lora.a13", a_scale="lora.a13_scale")
_SHRINK_H = runtime.Caller("fused_moe", lora_a="lora.a2", a_scale="lora.a2_scale")


def _bind(given: Given) -> runtime.Call:
    layer = _layer_of(given)
    buffers = given.workspace or layer.buffers(given.hidden.device)
    # Both scales may be one, in some of the calls that look alike: no launch writes such as are given.
    places, given = runtime.paths(given), given._replace(h_scale=_apart(given.h_scale))
    if layer.x_scales is not None and not layer.few:
        layer = _as_tuned(layer, given, buffers)
    # Each launch is bound with its tensors, then told where in those of the layer they lie.
    at = layer.launches(places, places.workspace or runtime.SCRATCH)
    bound = [layer.bind(name, arguments, given) for name, arguments in layer.launches(given, buffers)]
    calls = [call.through(arguments) for call, (_, arguments) in zip(bound, at, strict=True)]
    made = functools.partial(layer.buffers, given.hidden.device) if given.workspace is None else None
    return runtime.InOrder(calls, made)


def _as_tuned(layer: _Layer, given: Given, buffers: FusedMoeWorkspace) -> _Layer:
    """The layer as tuning says: blocks may be taller, the first product may make its rows FP8, and have rows of x in order."""

    def pays(tried: _Layer) -> bool:
        return is_tuned(next(arguments for name, arguments in tried.launches(given, buffers) if name == "first"), _FIRST)

    if layer.block_m == 64 and pays(tried := layer._replace(block_m=128)):
        layer = tried  # of which the other half of warps has rows, too, and the weights are read once
    if given.lora is None and pays(tried := layer._replace(at_once=True)):
        layer = tried
    if layer.x_scales != "tensor" and pays(tried := layer._replace(in_order=True)):
        layer = tried
    return layer


def _view(buffer: Any, *shape: int) -> Any:
    return buffer[: math.prod(shape)].view(shape)


class _Layer(NamedTuple):
    """The sizes of a checked layer."""

    num_tokens: int
    top_k: int
    num_experts: int
    local_expert_start: int
    tokens_hint: int
    block_m: int  # 0: few tokens, without tables
    width: int  # of rows of hidden
    inter: int
    dtype: torch.dtype  # of what has 16 bits
    codes: torch.dtype  # of hidden, and of what is FP8 between the products
    x_scales: str | None
    sums: bool  # experts of a token, in the second product
    at_once: bool  # the first product makes its rows FP8 where tuning says so, but for adapters, which read those of 16 bits
    in_order: bool  # rows of x are put in the order of the tables for the first product, where tuning says so
    scratch_at: int  # of tables, behind blocks; 0: they need none
    max_loras: int  # 0: there are no adapters
    vectors: tuple[tuple[int, ...], ...]  # shapes of the rank vectors of both products
    space: Mapping[str, tuple[int, torch.dtype]]  # of buffers

    @property
    def num_pairs(self) -> int:
        return self.num_tokens * self.top_k

    @property
    def few(self) -> bool:
        return self.block_m == 0

    def buffers(self, device: torch.device) -> FusedMoeWorkspace:
        """All that the call needs."""
        return FusedMoeWorkspace(**{name: torch.empty(n, dtype=kind, device=device) for name, (n, kind) in self.space.items()})

    def launches(self, given: Given, buffers: Any) -> Iterator[tuple[str, Any]]:
        """What each launch of the layer is given, in their order; those of tables only where there are some.

        ``buffers`` is a FusedMoeWorkspace. Of ``runtime.paths``, of all tensors, it tells where each of them lies.
        """
        lora, num_pairs, few = given.lora, self.num_pairs, self.few
        topk_ids, valid_tokens = given.topk_ids, given.valid_tokens
        if given.expert_map is not None:
            out = _view(buffers.ids, self.num_tokens, self.top_k)
            yield "localize", Localize(out, topk_ids, given.expert_map)
            topk_ids = out
        filled, groups = (buffers.pairs, buffers.blocks, buffers.num_blocks), (self.num_experts, self.local_expert_start)
        sizes = (self.num_tokens, self.top_k, *groups, self.tokens_hint, self.block_m)
        tables = MoeTables(topk_ids, valid_tokens, *filled, *sizes)
        x, x_rows, x_scale = given.hidden, "token", given.x_scale
        runs: Any = None
        v: Any = None
        v2: Any = None
        lora_b = b_scale = None
        if lora is not None:
            adapters, run_of_row = (lora.token_lora_mapping, lora.adapter_enabled), None
            if not few:
                run_of_row, runs, scratch = split(buffers.runs, num_pairs)
                written = (*filled, run_of_row, runs, scratch, topk_ids, valid_tokens, *adapters, lora.lora_ranks)
                yield "runs", Runs(*written, *groups, self.max_loras, self.block_m)
            runs = MoeRuns(*adapters, run_of_row, runs, self.max_loras, lora.lora_ranks)
            vectors = buffers.vectors if few else buffers.vectors.view(self.dtype)
            v, v2 = [_view(vectors, *shape) for shape in self.vectors]
            lora_a, a_scale = lora.a13, lora.a13_scale
            yield "shrink_x", Shrink(v, x, lora_a, tables, runs, x_rows, a_scale, x_scale)
            lora_b, b_scale = lora.b13, lora.b13_scale
        elif not few:
            scratch = buffers.blocks[self.scratch_at :] if self.scratch_at else buffers.blocks
            yield "align", Align(*filled, scratch, topk_ids, valid_tokens, *groups, self.block_m)
        if self.in_order:
            # Where the second product writes later; scales behind those of the rows between.
            ordered = _view(buffers.outputs.view(self.codes), num_pairs, self.width)
            of_ordered = buffers.scales[num_pairs * _row_scales(self.x_scales, self.inter) :]
            of_ordered = _view(of_ordered, num_pairs, _row_scales(self.x_scales, self.width))
            yield "permute", Permute(out=ordered, out_scale=of_ordered, x=x, x_scale=x_scale, tables=tables)  # type: ignore[arg-type]
            x, x_rows, x_scale = ordered, "sorted", of_ordered
        on_input, weights = given.apply_router_weight_on_input, given.topk_weights
        order, h = "pair" if few else "sorted", _view(buffers.inter, num_pairs, self.inter)
        codes, scale = h, None  # of the rows between the products
        if self.x_scales is not None:
            codes, scale = _view(buffers.codes.view(self.codes), num_pairs, self.inter), given.h_scale
            if self.x_scales != "tensor":
                scale = _view(buffers.scales, num_pairs, _row_scales(self.x_scales, self.inter))
        out, out_rows, out_scale = (codes, order, scale) if self.at_once else (h, order, None)
        w, w_scale, bias, topk_weights = given.w13, given.w13_scale, given.w13_bias, weights if on_input else None
        first = (topk_weights, x_rows, out_rows, given.activation, given.layout, w_scale, x_scale, v, lora_b, runs, b_scale, bias)
        yield "first", Gemm(out, x, w, tables, *first, given.limit, given.alpha, given.beta, out_scale)
        x, x_rows, x_scale = h, order, None
        if self.x_scales is not None and not self.at_once:
            yield "quant", Quant(codes, scale, x, tables, order)  # type: ignore[arg-type]
        if lora is not None:
            v, lora_a, a_scale = v2, lora.a2, lora.a2_scale
            yield "shrink_h", Shrink(v, x, lora_a, tables, runs, x_rows, a_scale, x_scale)
            lora_b, b_scale = lora.b2, lora.b2_scale
        x, x_scale, topk_weights = codes, scale, None if on_input else weights
        w, w_scale, bias = given.w2, given.w2_scale, given.w2_bias
        second = (None, "halves", w_scale, x_scale, v, lora_b, runs, b_scale, bias, None, None, None, None)
        if self.sums:
            yield "second", Gemm(given.out, x, w, tables, topk_weights, x_rows, "token", *second)
            return
        out = y = _view(buffers.outputs, self.num_tokens, self.top_k, self.width)
        yield "second", Gemm(out, x, w, tables, None, x_rows, "pair", *second)
        request = (*groups, given.num_tokens_hint, given.zeroes, False, None, None, None)
        yield "sum", Sum(given.out, y, topk_ids, topk_weights, valid_tokens, *request)

    def bind(self, name: str, arguments: Any, given: Given) -> runtime.Call:
        """The launch of that name, for calls that look like this one.

        Raises:
            ValueError: something does not fit, or no variant serves it.
        """
        sizes, device = (self.num_pairs, self.top_k, self.num_experts, self.local_expert_start), given.hidden.device
        if name == "localize":
            return bind_local(self.num_pairs, arguments.expert_map.shape[0])
        if name == "align":
            return bind_align(AlignProblem(*sizes, self.block_m, device))
        if name == "runs":
            return bind_runs(RunsProblem(*sizes, self.max_loras, self.block_m, device))
        if name == "permute":
            return bind_permute(arguments, _FIRST)
        if name == "quant":
            return bind_quant(arguments, _SECOND)
        if name == "sum":
            return bind_sum(arguments)
        if name.startswith("shrink"):
            return bind_shrink(arguments, _SHRINK_X if name == "shrink_x" else _SHRINK_H)
        if name == "first":
            return bind_gemm(arguments, follows=given.lora is not None, op=_FIRST)
        return bind_gemm(arguments, zero_rest=self.sums and given.zeroes, follows=True, op=_SECOND)


def _layer_of(given: Given) -> _Layer:
    """The sizes of a call, once everything about the layer as a whole is known to fit.

    Raises:
        ValueError: says which argument does not fit, what it is and what was wanted.
    """
    name, hidden, w13, w2, lora = "fused_moe", given.hidden, given.w13, given.w2, given.lora
    # Beside an FP8 ``hidden`` 16 bits are bfloat16.
    found = OP.check(name, given, D=None if given.x_scale is None else torch.bfloat16)
    if given.expert_map is not None and given.local_expert_start != 0:
        fail_start(name, given.local_expert_start)
    if (given.w13_bias is None) != (given.w2_bias is None):
        there = "w2_bias" if given.w13_bias is None else "w13_bias"
        runtime.fail(name, "w13_bias, w2_bias", there, "both, or neither")
    mode, x_mode = _check_scales(given, found["G"])
    (num_tokens, top_k), (num_experts, width), inter = given.topk_ids.shape, w2.shape[:2], found["I"]
    num_pairs = num_tokens * top_k
    expected = num_tokens if given.num_tokens_hint is None else min(given.num_tokens_hint, num_tokens)
    expert_bytes = (w13.shape[1] * w13.shape[2] + width * w2.shape[2]) * w13.itemsize
    on_units = x_mode is not None or mode == "mx"  # matrix units, also for few tokens
    by_lanes = mode == "mx" and lanes_serve(hidden, (w13, w2), top_k)
    of_weights = (w13.itemsize == 1, on_units, few_tokens(mode, by_lanes, x_mode is not None))
    block_m = layer_block_m(num_tokens, expected, top_k, num_experts, expert_bytes, *of_weights)
    few = block_m == 0
    sums = few and (by_lanes or mode != "mx")
    blocks = 0 if few else 3 * max_blocks(num_tokens, top_k, num_experts, block_m)
    counts = 0 if few or lora is not None else scratch_size(num_pairs, num_experts)  # behind them
    dtype = hidden.dtype if x_mode is None else torch.bfloat16
    vectors = () if lora is None else _vector_shapes(lora, num_tokens, top_k, few)
    of_vectors = max(map(math.prod, vectors), default=0)  # of 16 bits two take one, but for few tokens
    space = {
        "pairs": (num_pairs, torch.int32),
        "blocks": (blocks + counts, torch.int32),
        "num_blocks": (1, torch.int32),
        "inter": (num_pairs * inter, dtype),
        "outputs": (0 if sums else num_pairs * width, dtype),
        "codes": (0 if x_mode is None else num_pairs * inter, torch.uint8),
        "scales": (num_pairs * (_row_scales(x_mode, inter) + (0 if few else _row_scales(x_mode, width))), torch.float32),
        "runs": (0 if few or lora is None else runs_size(num_pairs, num_experts), torch.int32),
        "ids": (0 if given.expert_map is None else num_pairs, torch.int32),
        "vectors": (of_vectors if few else runtime.cdiv(of_vectors, 2), torch.float32),
    }
    if given.workspace is not None:
        _check_workspace(name, given.workspace, space)
    routing = (num_tokens, top_k, num_experts, given.local_expert_start, expected, block_m)
    max_loras = 0 if lora is None else lora.a13[0].shape[0]
    sizes = (*routing, width, inter, dtype, hidden.dtype, x_mode)
    return _Layer(*sizes, sums, False, False, blocks if counts else 0, max_loras, vectors, space)


def _row_scales(x_scales: str | None, columns: int) -> int:
    """Scales of a row, where each has its own."""
    return {"token": 1, "group": _groups(columns)}.get(x_scales or "", 0)


def _groups(columns: int) -> int:
    return runtime.cdiv(columns, QUANT.group_k)


def few_tokens(weight_scales: str | None, by_lanes: bool, fp8_x: bool) -> int:
    """Up to how many tokens a layer may do without tables. ``by_lanes``: whether lanes widen its weights.

    Four bits, which take long to widen, are so once for all pairs of an expert; but where hardly any two are of one.
    """
    if weight_scales != "mx":
        return _SPREAD_TOKENS if fp8_x else _FEW_TOKENS
    return 2 if by_lanes else 1


def layer_block_m(
    num_tokens: int, expected: int, top_k: int, num_experts: int, expert_bytes: int, fp8: bool, on_units: bool, most: int
) -> int:
    """Rows of the blocks of a layer whose weights take ``expert_bytes`` an expert; 0: few tokens, ``most`` at most, which need no
    tables.
    """
    num_pairs = num_tokens * top_k
    again = num_pairs - experts_hit(num_pairs, num_experts)  # how often weights are read pair by pair, beyond once an expert
    if on_units:
        few = num_tokens <= _FEW_TOKENS or 4 * again <= num_pairs
    else:
        few = again * expert_bytes < _AGAIN and not (fp8 and num_pairs * expert_bytes > _WIDENED)
    few = few and num_tokens <= most
    return 0 if few else default_block_m(expected, top_k, num_experts, fp8)


def _vector_shapes(lora: FusedMoeLora, num_tokens: int, top_k: int, few: bool) -> tuple[tuple[int, ...], ...]:
    """Those of the rank vectors of both products; those of the first are read when the others are written."""
    factors = ((lora.a13, "token", lora.a13_scale), (lora.a2, "pair" if few else "sorted", lora.a2_scale))
    return tuple(vector_shape(a, num_tokens, top_k, not few, x_rows, a_scale) for a, x_rows, a_scale in factors)


def _check_scales(given: Given, slices: int) -> tuple[str | None, str | None]:
    """Of what weights and ``hidden`` have a scale each; None: they are of 16 bits."""
    hidden, w2, x_scale, h_scale = given.hidden, given.w2, given.x_scale, given.h_scale
    if (given.w13_scale is None) != (given.w2_scale is None) or (x_scale is not None and given.w13_scale is None):
        there = [name for name in ("w13_scale", "w2_scale", "x_scale") if getattr(given, name) is not None]
        runtime.fail(_FIRST, "scales", there, "w13_scale and w2_scale, or neither; x_scale with them alone")
    of_weights, mode = find_scales(_FIRST, hidden, given.w13, given.w13_scale, x_scale, slices=slices, label="w13_scale")
    find_scales(_FIRST, hidden, w2, given.w2_scale, None, slices=1, label="w2_scale")
    if (h_scale is None) == (mode == "tensor"):
        got = None if h_scale is None else runtime.describe(h_scale)
        runtime.fail(_FIRST, "h_scale", got, "[1] or [E] where x_scale is [1], else None")
    if h_scale is not None:
        check_x_scale(_FIRST, "tensor", hidden, h_scale, QUANT, w2.shape[0], "h_scale")
    return of_weights, mode


def _apart(scale: torch.Tensor | None) -> torch.Tensor | None:
    """One that looks like it, and lies elsewhere."""
    return None if scale is None else torch.empty_strided(scale.shape, scale.stride(), dtype=scale.dtype, device=scale.device)


def _check_workspace(name: str, workspace: FusedMoeWorkspace, space: Mapping[str, tuple[int, torch.dtype]]) -> None:
    for label, (size, kind) in space.items():
        buffer = getattr(workspace, label)
        if size > 0 and (buffer is None or buffer.numel() < size or buffer.dtype != kind):
            got = None if buffer is None else runtime.describe(buffer)
            hint = "make it with fused_moe_workspace for the largest batch"
            runtime.fail(name, f"workspace.{label}", got, f"[>= {size}] {kind}", hint)


_apply = OP.caller(_bind)
_in_graphs = OP.in_graphs(_apply)
