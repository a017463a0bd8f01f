"""A whole base MoE layer behind its router: two grouped products, the activation between them, and the weighted sum.

Few tokens take two launches, which stream the weights of their experts pair by pair. More take four: the tables, a product
with the activation in its epilogue, whose rows stay in the order of the tables, a product that puts them back, and the sum;
so do few tokens too, where pairs would read much of the weights again. With FP8 activations there is one more, which makes FP8
of the rows between the two products; few tokens then do without tables, and have a sum. So have those of MXFP4 weights.

With LoRA adapters the layer keeps its products: each takes, behind its own K loop, a few further steps over the ranks of the
adapters in a tile, so that no row is written twice. Their rank vectors are made by a launch in front of it, which runs beside
its K loop; where there are tables, they have the rows of each expert by adapter.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from . import _operands as operands
from . import _runtime as runtime
from ._activation import CLAMP, LAYOUT
from ._activation import choice as activation_choice
from ._scales import check_x_scale, scale_operand
from .moe_align._op import (
    EXPERT_MAP,
    LOCAL_EXPERT_START,
    NUM_TOKENS_HINT,
    TOPK_IDS,
    VALID_TOKENS,
    MoeTables,
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
from .moe_gemm._op import find_scales, writes_fp8
from .moe_gemm._table import VARIANTS as GEMM
from .moe_quant._op import bind as bind_quant
from .moe_quant._table import QUANT
from .moe_runs._op import (
    ADAPTER_ENABLED,
    LORA_RANKS,
    TOKEN_LORA_MAPPING,
    MoeRuns,
    runs_size,
    split,
)
from .moe_runs._op import Problem as RunsProblem
from .moe_runs._op import bind as bind_runs
from .moe_shrink._op import bind as bind_shrink
from .moe_shrink._op import vector_shape
from .moe_shrink._problem import part_count
from .moe_sum._op import bind as bind_sum

__all__ = ["FusedMoeLora", "FusedMoeWorkspace", "fused_moe", "fused_moe_workspace"]

# Up to so many tokens stream weights pair by pair, where tables would cost more than they save: bytes that are read again, and
# FP8 that gemv has to widen for each pair.
_FEW_TOKENS, _AGAIN, _WIDENED = 4, 64 * 2**20, 192 * 2**20
_TALL = 256  # pairs an expert from which on blocks of MXFP4 have 128 rows


@operands.bundle()
class FusedMoeLora(NamedTuple):
    """The adapters on the experts of a layer, and which token has which; scalings are folded into the second factors.

    Factors are in the dtype of ``hidden``, under an FP8 one in bfloat16; of any rank, those of gate and up of one layout; the
    strides over L and E are free, 0 shares. They are finite: what is not reaches rows of other adapters.

    Factors with scales are FP8 (float8_e4m3fn or float8_e5m2), each of which stands for its number times its scale: one of a
    factor, of a row or of a group, on FP8 weights as these have them. ``hidden`` is bfloat16 or FP8 then.
    """

    token_lora_mapping: torch.Tensor  # [T] int32, the adapter of each token; -1, or what is not in [0, L): none
    a13: Sequence[torch.Tensor]  # of gate and up, or of the single half where there is no gate: [L, E, rank, H]
    b13: Sequence[torch.Tensor]  # likewise: [L, E, I, rank]
    a2: Sequence[torch.Tensor]  # one: [L, E, rank, I]
    b2: Sequence[torch.Tensor]  # one: [L, E, H, rank]
    adapter_enabled: torch.Tensor | None = None  # [>= L] int32, 0: tokens with this adapter have none; None: all are enabled
    # [>= L] int32, how many of the ranks of each adapter count: rows of A and columns of B behind them are zero, and hardly read
    lora_ranks: torch.Tensor | None = None
    # Of each: float32, as many as factors, [L, E]; or [L, E, rows], with a last dimension of 1 or without; or
    # [L, E, ceil(rows / 128), ceil(columns / 128)]. Strides over L and E are free.
    a13_scale: Sequence[torch.Tensor] | None = None
    b13_scale: Sequence[torch.Tensor] | None = None
    a2_scale: Sequence[torch.Tensor] | None = None
    b2_scale: Sequence[torch.Tensor] | None = None


@operands.bundle()
class FusedMoeWorkspace(NamedTuple):
    """Buffers for the worst case, so that ``fused_moe`` does not allocate; one per stream."""

    pairs: torch.Tensor  # [max_tokens * top_k] int32
    blocks: torch.Tensor  # [*] int32
    num_blocks: torch.Tensor  # [1] int32
    inter: torch.Tensor  # [max_tokens * top_k * I], the dtype of the layer
    outputs: torch.Tensor  # [max_tokens * top_k * H], likewise
    codes: torch.Tensor | None = None  # [max_tokens * top_k * I] uint8, for FP8 activations
    scales: torch.Tensor | None = None  # [*] float32, likewise
    runs: torch.Tensor | None = None  # [*] int32, for adapters
    vectors: torch.Tensor | None = None  # [*] float32, likewise
    ids: torch.Tensor | None = None  # [max_tokens * top_k] int32, for an expert_map


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
    _SPACE.check("fused_moe_workspace", _SPACE.named(*layer, dtype, fp8_activations, max_rank, device))
    num_pairs = max_tokens * top_k
    # Rank vectors of a pair: of few tokens in parts of float32, else in 16 bits.
    few = max(2 * part_count(hidden), part_count(intermediate)) * min(max_tokens, _FEW_TOKENS) * top_k

    def empty(size: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
        return torch.empty(size, dtype=dtype, device=device)

    return FusedMoeWorkspace(
        empty(num_pairs),
        empty(3 * (num_experts + num_pairs // 16) + scratch_size(num_pairs, num_experts)),
        empty(1),
        empty(num_pairs * intermediate, dtype),
        empty(num_pairs * hidden, dtype),
        empty(num_pairs * intermediate, torch.uint8) if fp8_activations else None,
        empty(num_pairs * runtime.cdiv(intermediate, QUANT.group_k), torch.float32) if fp8_activations else None,
        empty(runs_size(num_pairs, num_experts)) if max_rank else None,
        empty(max(few, num_pairs) * max_rank, torch.float32) if max_rank else None,
        empty(num_pairs),
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
        h_scale: their scale where x_scale is [1]: [1], or [>= E], the input scale of ``w2`` of each expert; other scales are
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
    zeroes, layer = out is None, (hidden, w13, w2, topk_ids, topk_weights, valid_tokens, expert_map)
    sizes = (activation, layout, apply_router_weight_on_input, local_expert_start, num_tokens_hint, zeroes)
    scales, clamp = (w13_scale, w2_scale, x_scale, h_scale, w13_bias, w2_bias), (limit, alpha, beta)
    if out is None:
        try:
            out = torch.empty(hidden.shape, dtype=torch.float32, device=hidden.device)
        except AttributeError as error:
            OP.refuse(OP.named(out, *layer, *sizes, *scales, workspace, lora, *clamp), error)
    (_in_graphs if torch.compiler.is_compiling() else _apply)(out, *layer, *sizes, *scales, workspace, lora, *clamp)
    return out


_SPACE = operands.Op(
    "fused_moe_workspace",
    (
        operands.Int("max_tokens"),
        *(operands.Int(name, 1) for name in ("top_k", "num_experts", "hidden", "intermediate")),
        operands.Choice("dtype", GEMM.dtypes),
        operands.Flag("fp8_activations"),
        operands.Int("max_rank"),
        operands.Device("device"),
    ),
    launches=False,
)


def _buffer(name: str, dtype: torch.dtype | str, optional: bool = False, shape: str = "*") -> operands.Tensor:
    return operands.Tensor(name, shape, dtype, operands.CONTIGUOUS, optional=optional, written=True)


def _factor(name: str, shape: str, count: str) -> operands.Tensor:
    return operands.Tensor(name, shape, "D", slices="alike", count=count, scaled_by=f"lora.{name}_scale")


def _of_factor(name: str, count: str) -> operands.Tensor:
    return dataclasses.replace(scale_operand(f"{name}_scale", slices="any"), count=count)


OP = operands.Op(
    "fused_moe",
    (
        operands.Tensor("out", "T, H", operands.FLOATS, made=True, made_if="zeroes", written=True, asks=("torch_dtype",)),
        operands.Tensor("hidden", "T, H", "D", scaled_by="x_scale"),
        operands.Tensor("w13", "E, G*I, H", "D", scaled_by="w13_scale", packed=True),
        operands.Tensor("w2", "E, H, I", "D", scaled_by="w2_scale", packed=True),
        TOPK_IDS,
        operands.Tensor("topk_weights", "T, top_k", operands.FLOATS, operands.CONTIGUOUS),
        VALID_TOKENS,
        dataclasses.replace(EXPERT_MAP, optional=True),
        activation_choice(size="G"),
        LAYOUT,
        operands.Flag("apply_router_weight_on_input", asks=("weighted",)),
        LOCAL_EXPERT_START,
        NUM_TOKENS_HINT,
        operands.Flag("zeroes", public=False),
        *(scale_operand(name) for name in ("w13_scale", "w2_scale", "x_scale", "h_scale")),
        operands.Tensor("w13_bias", "E, G*I", operands.FLOATS, optional=True),
        operands.Tensor("w2_bias", "E, H", operands.FLOATS, optional=True),
        operands.Bundle(
            "workspace",
            FusedMoeWorkspace,
            (
                *(_buffer(name, torch.int32) for name in ("pairs", "blocks")),
                _buffer("num_blocks", torch.int32, shape="1"),
                *(_buffer(name, "D") for name in ("inter", "outputs")),
                _buffer("codes", torch.uint8, optional=True),
                _buffer("scales", torch.float32, optional=True),
                _buffer("runs", torch.int32, optional=True),
                _buffer("vectors", torch.float32, optional=True),
                _buffer("ids", torch.int32, optional=True),
            ),
            maker="fused_moe_workspace",
            optional=True,
        ),
        operands.Bundle(
            "lora",
            FusedMoeLora,
            (
                TOKEN_LORA_MAPPING,
                _factor("a13", "L, E, rank13, H", "G"),
                _factor("b13", "L, E, I, rank13", "G"),
                _factor("a2", "L, E, rank2, I", "1"),
                _factor("b2", "L, E, H, rank2", "1"),
                ADAPTER_ENABLED,
                LORA_RANKS,
                *(_of_factor(name, count) for name, count in (("a13", "G"), ("b13", "G"), ("a2", "1"), ("b2", "1"))),
            ),
            maker="FusedMoeLora",
            optional=True,
        ),
        *CLAMP,
    ),
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

# (out, hidden, w13, w2, topk_ids, topk_weights, valid_tokens, expert_map, w13_scale, w2_scale, x_scale, h_scale, w13_bias,
# w2_bias, workspace, lora, limit, alpha, beta) of sizes that were checked before
_Call = Callable[..., None]


def _bind(
    out: torch.Tensor,
    hidden: torch.Tensor,
    w13: torch.Tensor,
    w2: torch.Tensor,
    topk_ids: torch.Tensor,
    topk_weights: torch.Tensor,
    valid_tokens: torch.Tensor | None,
    expert_map: torch.Tensor | None,
    activation: str,
    layout: str,
    apply_router_weight_on_input: bool,
    local_expert_start: int,
    num_tokens_hint: int | None,
    zeroes: bool,
    w13_scale: torch.Tensor | None,
    w2_scale: torch.Tensor | None,
    x_scale: torch.Tensor | None,
    h_scale: torch.Tensor | None,
    w13_bias: torch.Tensor | None,
    w2_bias: torch.Tensor | None,
    workspace: FusedMoeWorkspace | None,
    lora: FusedMoeLora | None,
    limit: float | None,
    alpha: float | None,
    beta: float | None,
) -> _Call:
    layer = (out, hidden, w13, w2, topk_ids, topk_weights, valid_tokens, expert_map)
    scales = (w13_scale, w2_scale, x_scale, h_scale)
    sizes = (activation, layout, apply_router_weight_on_input, local_expert_start, num_tokens_hint, zeroes)
    # Beside an FP8 ``hidden`` 16 bits are bfloat16.
    given = OP.named(*layer, *sizes, *scales, w13_bias, w2_bias, workspace, lora, limit, alpha, beta)
    found = OP.check("fused_moe", given, D=None if x_scale is None else torch.bfloat16)
    if expert_map is not None and local_expert_start != 0:
        fail_start("fused_moe", local_expert_start)
    if (w13_bias is None) != (w2_bias is None):
        runtime.fail("fused_moe", "w13_bias, w2_bias", "w2_bias" if w13_bias is None else "w13_bias", "both, or neither")
    mode, x_mode = _check_scales(_FIRST, hidden, w13, w2, *scales, slices=found["G"])
    (num_tokens, top_k), (num_experts, width), inter = topk_ids.shape, w2.shape[:2], found["I"]
    num_pairs = num_tokens * top_k
    expected = num_tokens if num_tokens_hint is None else min(num_tokens_hint, num_tokens)
    expert_bytes = (w13.shape[1] * w13.shape[2] + width * w2.shape[2]) * w13.itemsize
    on_units = x_mode is not None or mode == "mx"  # matrix units, also for few tokens
    of_weights = (w13.itemsize == 1, on_units, mode == "mx")
    block_m = layer_block_m(num_tokens, expected, top_k, num_experts, expert_bytes, *of_weights)
    few = block_m == 0
    sums = few and not on_units  # experts of a token, in the second product
    blocks = 0 if few else 3 * max_blocks(num_tokens, top_k, num_experts, block_m)
    counts = 0 if few or lora is not None else scratch_size(num_pairs, num_experts)  # behind them
    row_scales = 1 if x_mode != "group" else runtime.cdiv(inter, QUANT.group_k)
    dtype = hidden.dtype if x_mode is None else torch.bfloat16
    space = {
        "pairs": (num_pairs, torch.int32),
        "blocks": (blocks + counts, torch.int32),
        "num_blocks": (1, torch.int32),
        "inter": (num_pairs * inter, dtype),
        "outputs": (0 if sums else num_pairs * width, dtype),
        "codes": (0 if x_mode is None else num_pairs * inter, torch.uint8),
        "scales": (0 if x_mode in (None, "tensor") else num_pairs * row_scales, torch.float32),
        "runs": (0 if few or lora is None else runs_size(num_pairs, num_experts), torch.int32),
        "ids": (0 if expert_map is None else num_pairs, torch.int32),
        "vectors": (0 if lora is None else _vector_size(lora, num_tokens, top_k, few), torch.float32),
    }
    routing = (num_tokens, top_k, num_experts, local_expert_start, expected, block_m)

    def use(given: FusedMoeWorkspace | None, like: torch.Tensor) -> Any:
        """A FusedMoeWorkspace with all that the call needs."""
        if given is not None:
            return given
        made = {name: torch.empty(n, dtype=kind, device=like.device) for name, (n, kind) in space.items()}
        return FusedMoeWorkspace(**made)

    if workspace is not None:
        _check_workspace("fused_moe", workspace, space)
    buffers, localize = use(workspace, hidden), None
    if expert_map is not None:
        localize, topk_ids = bind_local(num_pairs, expert_map.shape[0]), buffers.ids[:num_pairs].view(num_tokens, top_k)
    tables = MoeTables(topk_ids, valid_tokens, buffers.pairs, buffers.blocks, buffers.num_blocks, *routing)
    h = buffers.inter[: num_pairs * inter].view(num_pairs, inter)
    rows: torch.Tensor = h
    rows_scale: Any = None
    if x_mode is not None:
        rows = buffers.codes[: num_pairs * inter].view(hidden.dtype).view(num_pairs, inter)
        found = buffers.scales
        rows_scale = h_scale if x_mode == "tensor" else found[: num_pairs * row_scales].view(num_pairs, row_scales)
    of_first: dict[str, Any] = {"layout": layout, "w_scale": w13_scale, "x_scale": x_scale, "bias": w13_bias, "op": _FIRST}
    of_second: dict[str, Any] = {"w_scale": w2_scale, "x_scale": rows_scale, "bias": w2_bias, "op": _SECOND}

    adapters = None
    if lora is not None:
        adapters, like, (of_first["v"], of_second["v"]) = _bind_lora(lora, hidden, x_scale, h, tables, buffers, few)
        of_b = ((of_first, lora.b13, lora.b13_scale), (of_second, lora.b2, lora.b2_scale))
        for options, lora_b, b_scale in of_b:
            options |= {"lora_b": lora_b, "runs": like, "b_scale": b_scale}

    def between(hidden: torch.Tensor, h_scale: torch.Tensor | None, buffers: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Where rows for the second product lie, and their scales."""
        if x_mode is None:
            return buffers.inter, None
        return buffers.codes.view(hidden.dtype), h_scale if x_mode == "tensor" else buffers.scales

    align: Callable[..., None] | None = None
    if few:
        pass
    elif adapters is None:
        align = bind_align(AlignProblem(num_pairs, top_k, num_experts, local_expert_start, block_m, hidden.device))
    else:
        routed = (num_pairs, top_k, num_experts, local_expert_start)
        align = bind_runs(RunsProblem(*routed, adapters.max_loras, block_m, hidden.device))
    order = "pair" if few else "sorted"
    of_first |= {"limit": limit, "alpha": alpha, "beta": beta, "follows": adapters is not None}
    of_second["follows"] = True
    on_input = apply_router_weight_on_input
    of_input, of_output = (topk_weights, None) if on_input else (None, topk_weights)
    of_call, quantise = (hidden, w13, tables, of_input, "token", order, activation), None
    # Where it is worth it the first product writes FP8 rows itself, but for adapters, which read those of 16 bits.
    at_once = x_mode is not None and not few and adapters is None and not _share(h_scale, x_scale)
    if at_once and writes_fp8(rows, *of_call, **of_first, out_scale=rows_scale):
        first = bind_gemm(rows, *of_call, **of_first, out_scale=rows_scale)
    else:
        at_once, first = False, bind_gemm(h, *of_call, **of_first)
        quantise = None if x_mode is None else bind_quant(rows, rows_scale, h, tables, order, _SECOND)
    total: Callable[..., None] | None = None
    if sums:
        second = bind_gemm(out, rows, w2, tables, of_output, "pair", "token", None, zero_rest=zeroes, **of_second)
    else:
        outputs = buffers.outputs[: num_pairs * width].view(num_tokens, top_k, width)
        second = bind_gemm(outputs, rows, w2, tables, None, order, "pair", None, **of_second)
        sizes_of_sum = (num_experts, local_expert_start, num_tokens_hint, zeroes)
        total = bind_sum(out, outputs, topk_ids, of_output, valid_tokens, *sizes_of_sum)

    def call(
        out: torch.Tensor,
        hidden: torch.Tensor,
        w13: torch.Tensor,
        w2: torch.Tensor,
        topk_ids: torch.Tensor,
        topk_weights: torch.Tensor,
        valid_tokens: torch.Tensor | None,
        expert_map: torch.Tensor | None,
        w13_scale: torch.Tensor | None,
        w2_scale: torch.Tensor | None,
        x_scale: torch.Tensor | None,
        h_scale: torch.Tensor | None,
        w13_bias: torch.Tensor | None,
        w2_bias: torch.Tensor | None,
        workspace: FusedMoeWorkspace | None,
        lora: Any,  # a FusedMoeLora where there are adapters
        limit: float | None,
        alpha: float | None,
        beta: float | None,
    ) -> None:
        buffers = use(workspace, hidden)
        if localize is not None:
            ids = buffers.ids[:num_pairs].view(num_tokens, top_k)
            localize(ids, topk_ids, expert_map)
            topk_ids = ids
        ints, h, y = (buffers.pairs, buffers.blocks, buffers.num_blocks), buffers.inter, buffers.outputs
        tables = MoeTables(topk_ids, valid_tokens, *ints, *routing)
        v = b13 = b2 = of_b13 = of_b2 = runs = None
        if adapters is not None:
            of_tokens, run_of_row, of_blocks = (lora.token_lora_mapping, lora.adapter_enabled), None, None
            if align is not None:
                run_of_row, of_blocks, scratch = split(buffers.runs, num_pairs)
                align(*ints, run_of_row, of_blocks, scratch, topk_ids, valid_tokens, *of_tokens, lora.lora_ranks)
            runs = MoeRuns(*of_tokens, run_of_row, of_blocks, adapters.max_loras, lora.lora_ranks)
            v = buffers.vectors if few else buffers.vectors.view(dtype)
            adapters.shrink_x(v, hidden, lora.a13, tables, runs, lora.a13_scale, x_scale)
            b13, b2, of_b13, of_b2 = lora.b13, lora.b2, lora.b13_scale, lora.b2_scale
        elif align is not None:
            align(*ints, buffers.blocks[blocks:] if counts else buffers.blocks, topk_ids, valid_tokens)
        of_input, of_output = (topk_weights, None) if on_input else (None, topk_weights)
        rows_scale: Any  # where there is one
        rows, rows_scale = between(hidden, h_scale, buffers)
        made, of_made = (rows, rows_scale) if at_once else (h, None)
        adapted, clamp = (v, b13, runs, of_b13), (limit, alpha, beta)
        first(made, hidden, w13, tables, of_input, w13_scale, x_scale, *adapted, w13_bias, *clamp, of_made)
        if quantise is not None:
            quantise(rows, rows_scale, h, tables)
        if adapters is not None:
            adapters.shrink_h(v, h, lora.a2, tables, runs, lora.a2_scale, None)
        if total is None:
            second(out, rows, w2, tables, of_output, w2_scale, rows_scale, v, b2, runs, of_b2, w2_bias)
        else:
            second(y, rows, w2, tables, None, w2_scale, rows_scale, v, b2, runs, of_b2, w2_bias)
            total(out, y, topk_ids, of_output, valid_tokens)

    return call


def layer_block_m(
    num_tokens: int, expected: int, top_k: int, num_experts: int, expert_bytes: int, fp8: bool, fp8_x: bool, mx: bool = False
) -> int:
    """Rows of the blocks of a layer whose weights take ``expert_bytes`` an expert; 0: few tokens, which need no tables.

    Four bits are widened once a program for all of its warps only where it has 64 rows or more, which outweighs empty rows.
    """
    num_pairs = num_tokens * top_k
    again = (num_pairs - experts_hit(num_pairs, num_experts)) * expert_bytes  # read pair by pair, beyond once an expert
    slow = fp8 and not fp8_x and num_pairs * expert_bytes > _WIDENED
    few = num_tokens <= _FEW_TOKENS and again < _AGAIN and not slow
    if mx and not few:
        return 128 if expected * top_k >= _TALL * num_experts else 64
    return 0 if few else default_block_m(expected, top_k, num_experts, fp8)


class _Adapters(NamedTuple):
    """The launches of the adapters of a layer."""

    max_loras: int
    shrink_x: Callable[..., None]
    shrink_h: Callable[..., None]


def _bind_lora(
    lora: FusedMoeLora,
    hidden: torch.Tensor,
    x_scale: torch.Tensor | None,
    inner: torch.Tensor,
    tables: MoeTables,
    buffers: Any,
    few: bool,
) -> tuple[_Adapters, MoeRuns, list[torch.Tensor]]:
    """The launches, and what the products are bound with: runs, and the rank vectors of both, of which those of the first are
    read when the others are written.
    """
    num_pairs, max_loras = inner.shape[0], lora.a13[0].shape[0]
    run_of_row, of_blocks, _ = (None, None, None) if few else split(buffers.runs, num_pairs)
    runs = MoeRuns(lora.token_lora_mapping, lora.adapter_enabled, run_of_row, of_blocks, max_loras, lora.lora_ranks)
    vectors = buffers.vectors if few else buffers.vectors.view(inner.dtype)
    shapes = _vector_shapes(lora, tables.num_tokens, tables.top_k, few)
    v13, v2 = both = [vectors[: math.prod(shape)].view(shape) for shape in shapes]
    shrink_x = bind_shrink(v13, hidden, lora.a13, tables, runs, "token", lora.a13_scale, x_scale, _SHRINK_X)
    between = "pair" if few else "sorted"
    shrink_h = bind_shrink(v2, inner, lora.a2, tables, runs, between, lora.a2_scale, op=_SHRINK_H)
    return _Adapters(max_loras, shrink_x, shrink_h), runs, both


def _vector_shapes(lora: FusedMoeLora, num_tokens: int, top_k: int, few: bool) -> list[tuple[int, ...]]:
    """Those of the rank vectors of both products."""
    factors = ((lora.a13, "token", lora.a13_scale), (lora.a2, "pair" if few else "sorted", lora.a2_scale))
    return [vector_shape(a, num_tokens, top_k, not few, x_rows, a_scale) for a, x_rows, a_scale in factors]


def _vector_size(lora: FusedMoeLora, num_tokens: int, top_k: int, few: bool) -> int:
    """float32 elements for either, of which two numbers of 16 bits take one."""
    size = max(map(math.prod, _vector_shapes(lora, num_tokens, top_k, few)))
    return size if few else runtime.cdiv(size, 2)


def _check_scales(
    name: str,
    hidden: torch.Tensor,
    w13: torch.Tensor,
    w2: torch.Tensor,
    w13_scale: torch.Tensor | None,
    w2_scale: torch.Tensor | None,
    x_scale: torch.Tensor | None,
    h_scale: torch.Tensor | None,
    *,
    slices: int,
) -> tuple[str | None, str | None]:
    """Of what weights and ``hidden`` have a scale each; None: they are of 16 bits."""
    if (w13_scale is None) != (w2_scale is None) or (x_scale is not None and w13_scale is None):
        named = {"w13_scale": w13_scale, "w2_scale": w2_scale, "x_scale": x_scale}
        given = [label for label, scale in named.items() if scale is not None]
        runtime.fail(name, "scales", given, "w13_scale and w2_scale, or neither; x_scale with them alone")
    of_weights, _, mode, _ = find_scales(name, hidden, w13, w13_scale, x_scale, slices=slices, label="w13_scale")
    find_scales(name, hidden, w2, w2_scale, None, slices=1, label="w2_scale")
    if (h_scale is None) == (mode == "tensor"):
        got = None if h_scale is None else runtime.describe(h_scale)
        runtime.fail(name, "h_scale", got, "[1] or [E] where x_scale is [1], else None")
    if h_scale is not None:
        check_x_scale(name, "tensor", hidden, h_scale, QUANT, w2.shape[0], "h_scale")
    return of_weights, mode


def _share(h_scale: torch.Tensor | None, x_scale: torch.Tensor | None) -> bool:
    """Whether both are one, which a product that takes the first for its own may not read."""
    return h_scale is not None and x_scale is not None and operands.share_memory(h_scale, x_scale)


def _check_workspace(name: str, workspace: FusedMoeWorkspace, space: Mapping[str, tuple[int, torch.dtype]]) -> None:
    for label, (size, kind) in space.items():
        buffer = getattr(workspace, label)
        if size > 0 and (buffer is None or buffer.numel() < size or buffer.dtype != kind):
            got = None if buffer is None else runtime.describe(buffer)
            hint = "make it with fused_moe_workspace for the largest batch"
            runtime.fail(name, f"workspace.{label}", got, f"[>= {size}] {kind}", hint)


_apply = OP.caller(_bind)
_in_graphs = OP.in_graphs(_apply)
