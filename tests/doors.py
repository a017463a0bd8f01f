"""A good call of each front door, with all that it can be given, of any sizes: what tests of dispatch change in one thing."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import itertools
from typing import Any, Callable, Iterator, Sequence

import torch

import generated as kg
from generated import _operands as operands
from generated import _runtime as runtime
from generated._operands import OPS, Bundle, Op, Tensor
from kernelgen.emit.rooms import laboratory, rooms_with

T, TOP_K, EXPERTS, LORAS, K, N, RANK = 6, 2, 4, 3, 32, 24, 16
FP8, INT32, BF16 = torch.float8_e4m3fn, torch.int32, torch.bfloat16
Arguments = dict[str, Any]


class Batch:
    """Inputs of a layer, each drawn once; a token in two has an adapter. ``sizes``: attributes that are others."""

    tokens, top_k, experts, loras, k, n, rank, slices = T, TOP_K, EXPERTS, LORAS, K, N, RANK, 2

    def __init__(self, device: str, **sizes: int) -> None:
        vars(self).update(sizes)
        self.device = device
        self.space = {"max_tokens": self.tokens, "top_k": self.top_k, "num_experts": self.experts, "max_loras": self.loras}
        self.dense_space = {"max_tokens": self.tokens, "max_loras": self.loras}
        for space in (self.space, self.dense_space):
            space |= {"max_rank": self.rank, "num_slices": self.slices, "device": device}
        self.generator = torch.Generator().manual_seed(0)
        ids = self.some(self.tokens * self.top_k, 0, 1, 2, -1, 3, 0, 1, 1, 2, 3, 0, 2)
        self.ids = ids.view(self.tokens, self.top_k)
        self.mapping = self.some(self.tokens, 0, 1, -1, 1, 2, 0)
        self.weights = torch.rand(self.tokens, self.top_k, generator=self.generator).to(device)
        self.valid, self.enabled = self.ints(max(self.tokens - 1, 0)), self.some(self.loras, 1, 0, 1)
        self.expert_map = self.ints(2, -1, 0, 1)
        self.routing = {"topk_ids": self.ids, "num_experts": self.experts, "local_expert_start": 0}
        self.hint = self.tokens // 3 + 1
        self.routing["num_tokens_hint"] = self.hint
        self.routing["valid_tokens"] = self.valid

    @property
    def of_adapters(self) -> Arguments:
        ranks, scalings = self.some(self.loras, 1, self.rank, 5), self.weights.new_ones(self.loras)
        return {"lora_ranks": ranks, "scalings": scalings, "packed": False}

    def ints(self, *values: int) -> torch.Tensor:
        return torch.tensor(values, dtype=INT32, device=self.device)

    def some(self, number: int, *values: int) -> torch.Tensor:
        """So many of these, again and again."""
        return self.ints(*itertools.islice(itertools.cycle(values), number))

    def normal(self, *size: int, dtype: torch.dtype = BF16) -> torch.Tensor:
        if self.device == "meta":
            return torch.empty(size, dtype=dtype, device="meta")
        return torch.randn(size, generator=self.generator).to(self.device, dtype)

    def factors(self, *batch: int) -> Arguments:
        """lora_a and lora_b, a tensor a slice."""
        a, b = (
            [self.normal(*batch, *matrix) for _ in range(self.slices)] for matrix in ((self.rank, self.k), (self.n, self.rank))
        )
        return {"lora_a": a, "lora_b": b}

    def fp8_factors(self, *batch: int) -> Arguments:
        found: Arguments = {}
        for name, slices in self.factors(*batch).items():
            pairs = [kg.quantize_weights(tensor, "channel") for tensor in slices]
            found[name], found[f"{name[-1]}_scale"] = ([pair[i] for pair in pairs] for i in range(2))
        return found

    def route(self, assignment: str = "sorted", workspace: bool = True) -> Any:
        space = kg.moe_workspace(**self.space) if workspace else None
        given = {"adapter_enabled": self.enabled, "expert_map": self.expert_map, "workspace": space}
        sizes = {"num_experts": self.experts, "max_loras": self.loras, "assignment": assignment}
        return kg.moe_route(self.ids, self.mapping, **given, **sizes)

    def dense_route(self, fp8: bool = False) -> Any:
        space = kg.lora_workspace(**self.dense_space, fp8=fp8)
        return kg.lora_route(self.mapping, max_loras=self.loras, workspace=space)

    def held(self) -> Any:
        capacity = 16 * self.tokens + 9
        space = kg.lora_workspace(**{**self.dense_space, "max_tokens": capacity})
        return kg.lora_route(self.mapping, max_loras=self.loras, capacity=capacity, workspace=space)

    def tables(self) -> Any:
        return kg.moe_align(self.ids, num_experts=self.experts, valid_tokens=self.valid)

    def layer(self, fp8: bool) -> Arguments:
        """A base layer, with all that it can be given."""
        hidden, w13, w2 = (
            self.normal(self.tokens, self.k),
            self.normal(self.experts, 2 * self.n, self.k),
            self.normal(self.experts, self.k, self.n),
        )
        sizes = {
            "max_tokens": self.tokens,
            "top_k": self.top_k,
            "num_experts": self.experts,
            "hidden": self.k,
            "intermediate": self.n,
        }
        given = {**self.routing, "topk_weights": self.weights, "activation": "swiglu", "out": self.normal(self.tokens, self.k)}
        given["workspace"] = kg.fused_moe_workspace(**sizes, fp8_activations=fp8, max_rank=self.rank, device=self.device)
        del given["num_experts"]
        given |= {"hidden": hidden, "w13": w13, "w2": w2}
        for name, quantize, kind in (
            ("w13", kg.quantize_weights, "channel"),
            ("w2", kg.quantize_weights, "channel"),
            ("hidden", kg.quantize_activations, "token"),
        ):
            scale = "x_scale" if name == "hidden" else f"{name}_scale"
            given[name], given[scale] = quantize(given[name], kind) if fp8 else (given[name], None)
        return {**given, "h_scale": None, "lora": self.lora()}

    def lora(self) -> Any:
        """Adapters of a layer, of two ranks."""
        first = self.factors(self.loras, self.experts)
        last = [self.normal(self.loras, self.experts, *size) for size in ((self.rank - 1, self.n), (self.k, self.rank - 1))]
        factors = (*map(tuple, first.values()), *((factor,) for factor in last))
        return kg.FusedMoeLora(self.mapping, *factors, self.enabled)

    def runs(self) -> tuple[Any, Any]:
        """Tables by expert and adapter, and the runs in them."""
        given = {"adapter_enabled": self.enabled, "valid_tokens": self.valid}
        return kg.moe_runs(self.ids, self.mapping, num_experts=self.experts, max_loras=self.loras, **given)

    def ranked(self, **more: Any) -> tuple[Any, Any]:
        """The same of adapters with ranks of their own."""
        given = {"num_experts": self.experts, "max_loras": self.loras, "adapter_enabled": self.enabled, **more}
        ranks = self.some(self.loras, 3, self.rank)
        return kg.moe_runs(self.ids, self.mapping, lora_ranks=ranks, num_tokens_hint=self.hint, **given)


def _engine_tables(b: Batch) -> Arguments:
    """Each adapter's row: blocks of expert 0, with the pairs of its tokens."""
    rows = [[p for p in range(b.tokens * b.top_k) if int(b.mapping[p // b.top_k]) == a] for a in range(b.loras)]
    rows_padded = 16 * max(1, -(-max(map(len, rows)) // 16))
    padded = [row + [b.tokens * b.top_k] * (rows_padded - len(row)) for row in rows]
    tables = {"sorted_token_ids": torch.tensor(padded), "expert_ids": torch.zeros(b.loras, rows_padded // 16)}
    tables |= {"num_tokens_post_padded": torch.full((b.loras,), rows_padded), "lora_ids": torch.tensor([2, 1, -1][: b.loras])}
    found = {name: table.to(b.device, INT32) for name, table in tables.items()}
    return {**found, "adapter_enabled": b.enabled, "num_experts": b.experts, "max_loras": b.loras}


def _moe_lora(b: Batch, fp8: bool = False, assignment: str = "sorted") -> Arguments:
    given = b.fp8_factors(b.loras, b.experts) if fp8 else {**b.factors(b.loras, b.experts), "a_scale": None, "b_scale": None}
    given["x"], given["x_scale"] = (
        kg.quantize_activations(b.normal(b.tokens * b.top_k, b.k)) if fp8 else (b.normal(b.tokens * b.top_k, b.k), None)
    )
    given |= {"out": b.normal(b.tokens, b.top_k, b.slices * b.n), "route": b.route(assignment)}
    return {**given, "topk_weights": b.weights, "add_inputs": True, "mul_routed_weight": True}


def _plain(b: Batch) -> Arguments:
    """The first projection of an expert, pair by pair."""
    given = {**_moe_lora(b, assignment="naive"), "x": b.normal(b.tokens, b.k), "topk_weights": None}
    return {**given, "mul_routed_weight": False}


def _few(b: Batch, **changed: Any) -> Arguments:
    """A product of few pairs, which has no tables."""
    tables = kg.no_tables(b.ids, num_experts=b.experts, valid_tokens=b.valid)
    given = {"out": b.normal(b.tokens, b.top_k, b.n), "x": b.normal(b.tokens, b.k), "w": b.normal(b.experts, 2 * b.n, b.k)}
    return {**given, "tables": tables, "x_rows": "token", "out_rows": "pair", "activation": "swiglu", **changed}


def _few_shrink(b: Batch) -> Arguments:
    """Rank vectors of few pairs, likewise."""
    tables = kg.no_tables(b.ids, num_experts=b.experts, valid_tokens=b.valid)
    runs = kg.MoeRuns(b.mapping, b.enabled, None, None, b.loras, None)
    given = {"v": b.normal(1, b.tokens * b.top_k, b.slices, b.rank, dtype=torch.float32), "x": b.normal(b.tokens, b.k)}
    return {**given, "lora_a": b.factors(b.loras, b.experts)["lora_a"], "tables": tables, "runs": runs, "x_rows": "token"}


def _lora(b: Batch, fp8: bool = False) -> Arguments:
    given = b.fp8_factors(b.loras) if fp8 else {**b.factors(b.loras), "a_scale": None, "b_scale": None}
    given["x"], given["x_scale"] = kg.quantize_activations(b.normal(b.tokens, b.k)) if fp8 else (b.normal(b.tokens, b.k), None)
    given |= {"out": b.normal(b.tokens, b.slices * b.n + 1), "route": b.dense_route(fp8)}
    given["y"] = b.normal(b.slices, b.tokens, b.rank, dtype=torch.float32)
    return {**given, "scaling": 0.5, "offset_start": 1, "add_inputs": True, "zero_rest": False, **b.of_adapters}


def _uneven(b: Batch) -> Arguments:
    """Slices of which the last has no whole tiles."""
    given = _lora(b)
    return {**given, "lora_b": [*given["lora_b"][:-1], given["lora_b"][-1][:, :-8]]}


def _placed(b: Batch) -> Arguments:
    """Slices side by side, column by column."""
    return {**_uneven(b), "offset_start": 0, "columns": tuple(range(b.slices)), "column_stride": b.slices}


def _moe_gemm(b: Batch, fp8: bool = False) -> Arguments:
    x, w = b.normal(b.tokens * b.top_k, b.k), b.normal(b.experts, b.n, b.k)
    given: Arguments = {"x": x, "w": w, "x_scale": None, "w_scale": None}
    if fp8:
        given["x"], given["x_scale"] = kg.quantize_activations(x)
        given["w"], given["w_scale"] = kg.quantize_weights(w)
    given |= {"out": b.normal(b.tokens, b.top_k, b.n), "tables": b.tables(), "topk_weights": None if fp8 else b.weights}
    return {**given, "x_rows": "sorted" if fp8 else "pair", "out_rows": "pair", "activation": None}


def _moe_shrink(b: Batch, fp8: bool = False) -> Arguments:
    (tables, runs), a = b.runs(), b.factors(b.loras, b.experts)["lora_a"]
    x, v, of_a = b.normal(b.tokens, b.k), b.normal(b.tokens * b.top_k, len(a), b.rank), None
    codes, scale = kg.quantize_activations(x) if fp8 else (x, None)
    if fp8:
        a, of_a = _fp8(a, "channel")
    given = {"x": codes, "lora_a": a, "tables": tables, "runs": runs, "x_rows": "token", "v": v}
    return {**given, "a_scale": of_a, "x_scale": scale}


def _fp8(factors: Sequence[torch.Tensor], scales: str) -> tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]]:
    codes, made = zip(*(kg.quantize_weights(factor, scales) for factor in factors), strict=True)
    return codes, made


def _adapted_gemm(b: Batch, fp8: bool = False) -> Arguments:
    (tables, runs), factors = b.runs(), b.factors(b.loras, b.experts)
    given = {
        "x": b.normal(b.tokens, b.k),
        "w": b.normal(b.experts, 2 * b.n, b.k),
        "out": b.normal(b.tokens * b.top_k, b.n),
        "tables": tables,
        "runs": runs,
    }
    given |= {"v": b.normal(b.tokens * b.top_k, 2, b.rank), "lora_b": factors["lora_b"], "activation": "swiglu"}
    if fp8:
        given["lora_b"], given["b_scale"] = _fp8(given["lora_b"], "group")
    return {**given, "x_rows": "token", "out_rows": "sorted"}


def _fill_tables(b: Batch) -> Arguments:
    return {
        **{name: value for name, value in b.routing.items() if name != "num_tokens_hint"},
        **_filled(b, "num_blocks"),
        **{"pairs": torch.zeros(b.tokens * b.top_k, dtype=INT32, device=b.device)},
        **{"blocks": torch.zeros(64 + 4 * b.tokens * b.top_k, dtype=INT32, device=b.device), "block_m": 16},
        **{"scratch": torch.zeros(128 * 64, dtype=INT32, device=b.device)},
    }


def _fill_runs(b: Batch) -> Arguments:
    pairs = b.tokens * b.top_k
    sizes: dict[str, tuple[int, ...]] = {"pairs": (pairs,), "blocks": (64 + pairs,), "num_blocks": (1,), "run_of_row": (pairs,)}
    sizes |= {"runs": (pairs, 2), "scratch": (8192 + 2 * pairs,)}
    given = {name: value for name, value in b.routing.items() if name != "num_tokens_hint"}
    given |= {name: torch.zeros(size, dtype=INT32, device=b.device) for name, size in sizes.items()}
    given |= {"token_lora_mapping": b.mapping, "adapter_enabled": b.enabled, "lora_ranks": None}
    return {**given, "max_loras": b.loras, "block_m": 16}


def _filled(b: Batch, *names: str) -> Arguments:
    pairs = b.tokens * b.top_k
    sizes = {"pairs": (48 + 3 * pairs,), "blocks": (64 + pairs, 4), "num_blocks": (1,), "scratch": (4096 + 64 * pairs,)}
    return {name: torch.zeros(sizes[name], dtype=INT32, device=b.device) for name in names}


def _sort(b: Batch) -> Arguments:
    given = {"topk_ids": b.ids, "token_lora_mapping": b.mapping, "adapter_enabled": b.enabled, "expert_map": b.expert_map}
    given |= {"num_experts": b.experts, "max_loras": b.loras, "block_m": 16}
    return {**given, **_filled(b, "pairs", "blocks", "num_blocks", "scratch")}


def _route(b: Batch) -> Arguments:
    space = kg.moe_workspace(**b.space)
    given = {name: value for name, value in _sort(b).items() if name not in ("pairs", "blocks", "num_blocks", "scratch")}
    return {**given, "assignment": "sorted", "rank": b.rank, "workspace": space}


def _from_tables(b: Batch) -> Arguments:
    space = kg.moe_workspace(**b.space, table_size=(16 + b.tokens * b.top_k) * b.loras)
    return {**_engine_tables(b), "block_size": 16, "num_tokens": b.tokens, "top_k": b.top_k, "workspace": space}


def _moe_sum(b: Batch) -> Arguments:
    return {
        **b.routing,
        "y": b.normal(b.tokens, b.top_k, b.n),
        "topk_weights": b.weights,
        "out": b.normal(b.tokens, b.n, dtype=torch.float32),
    }


def _moe_quant(b: Batch) -> Arguments:
    scale, x = torch.ones(b.tokens * b.top_k, 1, device=b.device), b.normal(b.tokens * b.top_k, b.n)
    return {"codes": x.to(FP8), "scale": scale, "x": x, "tables": b.tables(), "order": "pair"}


def _moe_permute(b: Batch) -> Arguments:
    x, x_scale = kg.quantize_activations(b.normal(b.tokens, b.k), "token")
    rows = b.tokens * b.top_k
    out, out_scale = x.new_zeros(rows, b.k), x_scale.new_zeros(rows, 1)
    return {"out": out, "out_scale": out_scale, "x": x, "x_scale": x_scale, "tables": b.tables()}


def _apart(b: Batch, assignment: str) -> Arguments:
    given = {**_moe_lora(b, assignment=assignment), "offset": 1, "out": b.normal(b.tokens, b.top_k, b.slices * b.n + 1)}
    return {**given, "y": b.normal(b.slices, b.tokens * b.top_k, b.rank, dtype=torch.float32)}


def _moe_act(b: Batch) -> Arguments:
    given = {"h": b.normal(b.tokens * b.top_k, b.n), "x": b.normal(b.tokens, b.top_k, 2 * b.n), "activation": "swiglu"}
    return {**b.routing, **given}


CLAMPED = {"activation": "swiglu_clamp", "limit": 7.0, "alpha": 1.702, "beta": 1.0}


def _gpt_oss(b: Batch) -> Arguments:
    """A layer with gate and up in turns, and biases."""
    biases = {"w13_bias": b.normal(b.experts, 2 * b.n), "w2_bias": b.normal(b.experts, b.k, dtype=torch.float32)}
    return {**b.layer(fp8=False), **CLAMPED, **biases, "layout": "interleaved"}


def _biased(b: Batch) -> Arguments:
    return {**_few(b), **CLAMPED, "layout": "interleaved", "bias": b.normal(b.experts, 2 * b.n)}


# A good call of each front door, with all that it can be given; some in more than one way.
GOOD: dict[str, tuple[str, Callable[[Batch], Arguments]]] = {
    "moe_act": ("moe_act", _moe_act),
    "moe_act biased": (
        "moe_act",
        lambda b: {**_moe_act(b), **CLAMPED, "layout": "interleaved", "bias": b.normal(b.experts, 2 * b.n)},
    ),
    "moe_act clamped": ("moe_act", lambda b: {**_moe_act(b), **CLAMPED}),
    "moe_add": (
        "moe_add",
        lambda b: {"out": b.normal(b.tokens, b.top_k, b.n), "delta": b.normal(b.tokens, b.top_k, b.n), "route": b.route("naive")},
    ),
    "moe_sum adapted": (
        "moe_sum",
        lambda b: {
            **_moe_sum(b),
            **{"delta": b.normal(b.tokens, b.top_k, b.n), "route": b.route(), "bias": b.normal(b.experts, b.n)},
        },
    ),
    "moe_act adapted": (
        "moe_act",
        lambda b: {
            **b.routing,
            **{"h": b.normal(b.tokens * b.top_k, b.n), "x": b.normal(b.tokens, b.top_k, 2 * b.n), "activation": "swiglu"},
            **{"delta": b.normal(b.tokens, b.top_k, 2 * b.n), "route": b.route("naive")},
        },
    ),
    "moe_gemm few": ("moe_gemm", _few),
    "moe_lora plain": ("moe_lora", _plain),
    "moe_lora engine": ("moe_lora", lambda b: {**_plain(b), "route": kg.MoeRoute.from_tables(**_from_tables(b))}),
    "moe_shrink few": ("moe_shrink", _few_shrink),
    "moe_sum": ("moe_sum", _moe_sum),
    "moe_permute": ("moe_permute", _moe_permute),
    "moe_quant": ("moe_quant", _moe_quant),
    "moe_align": (
        "moe_align",
        lambda b: {
            **b.routing,
            "block_m": 16,
            "workspace": torch.zeros(8192 + 4 * b.tokens * b.top_k, dtype=INT32, device=b.device),
        },
    ),
    "moe_align mapped": (
        "moe_align",
        lambda b: {
            **{**b.routing, "expert_map": b.expert_map, "block_m": 16},
            "workspace": torch.zeros(8192 + 8 * b.tokens * b.top_k, dtype=INT32, device=b.device),
        },
    ),
    "local_ids": (
        "local_ids",
        lambda b: {
            "topk_ids": b.ids,
            "expert_map": b.expert_map,
            "out": torch.zeros(b.tokens, b.top_k, dtype=INT32, device=b.device),
        },
    ),
    "no_tables": (
        "no_tables",
        lambda b: {name: value for name, value in b.routing.items() if name != "num_tokens_hint"},
    ),
    "moe_gemm": ("moe_gemm", _moe_gemm),
    "moe_gemm fp8": ("moe_gemm", lambda b: _moe_gemm(b, fp8=True)),
    "moe_gemm biased": ("moe_gemm", _biased),
    "moe_gemm adapted": ("moe_gemm", _adapted_gemm),
    "moe_gemm adapted fp8": ("moe_gemm", lambda b: _adapted_gemm(b, fp8=True)),
    "moe_runs": (
        "moe_runs",
        lambda b: {
            **b.routing,
            **{"token_lora_mapping": b.mapping, "adapter_enabled": b.enabled, "max_loras": b.loras},
            **{"block_m": 16, "workspace": torch.zeros(8192 + 16 * b.tokens * b.top_k, dtype=INT32, device=b.device)},
        },
    ),
    "moe_shrink": ("moe_shrink", _moe_shrink),
    "moe_shrink fp8": ("moe_shrink", lambda b: _moe_shrink(b, fp8=True)),
    "moe_route": ("moe_route", _route),
    "lora_route": (
        "lora_route",
        lambda b: {
            "token_lora_mapping": b.mapping,
            "max_loras": b.loras,
            "block_m": 16,
            "workspace": kg.lora_workspace(**b.dense_space),
        },
    ),
    "lora_route held": (
        "lora_route_held",
        lambda b: {
            **{"token_lora_mapping": b.mapping, "valid_tokens": b.valid, "max_loras": b.loras, "capacity": b.tokens + 9},
            "workspace": kg.lora_workspace(**b.dense_space),
        },
    ),
    "refill": ("lora_route_refill", lambda b: {"token_lora_mapping": b.mapping, "valid_tokens": b.valid}),
    "from_tables": ("MoeRoute.from_tables", _from_tables),
    "moe_lora sorted": ("moe_lora", _moe_lora),
    "moe_lora naive": ("moe_lora", lambda b: _moe_lora(b, assignment="naive")),
    "moe_lora fp8": ("moe_lora", lambda b: _moe_lora(b, fp8=True)),
    "moe_lora_shrink": ("moe_lora_shrink", lambda b: _apart(b, "naive")),
    "moe_lora_expand": ("moe_lora_expand", lambda b: _apart(b, "sorted")),
    "lora": ("lora", _lora),
    "lora fp8": ("lora", lambda b: _lora(b, fp8=True)),
    "lora placed": ("lora", _placed),
    "lora_expand placed": ("lora_expand", _placed),
    "lora_shrink": ("lora_shrink", _lora),
    "lora_shrink fp8": ("lora_shrink", lambda b: _lora(b, fp8=True)),
    "lora_expand": ("lora_expand", _lora),
    "lora_expand fp8": ("lora_expand", lambda b: _lora(b, fp8=True)),
    "fused_moe": ("fused_moe", lambda b: b.layer(fp8=False)),
    "fused_moe fp8": ("fused_moe", lambda b: b.layer(fp8=True)),
    "fused_moe of gpt-oss": ("fused_moe", _gpt_oss),
    "fused_moe of Llama 4": (
        "fused_moe",
        lambda b: {**b.layer(fp8=False), "expert_map": b.expert_map, "apply_router_weight_on_input": True},
    ),
    "quantize_weights": (
        "quantize_weights",
        lambda b: {"weights": b.normal(2, 24, b.k), "scales": "channel", "dtype": FP8, "slices": 2},
    ),
    "quantize_mxfp4": ("quantize_mxfp4", lambda b: {"weights": b.normal(2, 24, 64)}),
    "quantize_activations": (
        "quantize_activations",
        lambda b: {"x": b.normal(b.tokens, b.k), "scales": "group", "dtype": FP8, "group_k": 16},
    ),
    "moe_workspace": (
        "moe_workspace",
        lambda b: {**b.space, "table_size": 64},
    ),
    "lora_workspace": (
        "lora_workspace",
        lambda b: {**b.dense_space, "fp8": False},
    ),
    "fused_moe_workspace": (
        "fused_moe_workspace",
        lambda b: {
            **{"max_tokens": b.tokens, "top_k": b.top_k, "num_experts": b.experts, "hidden": b.k, "intermediate": b.n},
            **{"dtype": BF16, "fp8_activations": True, "max_rank": b.rank, "device": b.device},
        },
    ),
    "warmup": ("warmup", lambda b: {"shapes": [kg.MoeShape(b.k, b.n, 2, b.rank, b.top_k, b.experts, b.loras)], "max_tokens": 4}),
    "moe_route_one_launch": ("moe_route_sort", _sort),
    "moe_route_two_launch": ("moe_route_sort", _sort),
    "moe_route_three_launch": ("moe_route_sort", _sort),
    "moe_route_from_tables": (
        "moe_route_pack",
        lambda b: {
            **_engine_tables(b),
            **_filled(b, "pairs", "blocks", "num_blocks"),
            "num_pairs": b.tokens * b.top_k,
            "block_m": 16,
        },
    ),
    "moe_route_held": (
        "moe_route_fill",
        lambda b: {
            **{name: torch.zeros(b.tokens + 9, dtype=INT32, device=b.device) for name in ("adapters", "pairs")},
            "blocks": torch.zeros(40 * b.loras + 2 * b.tokens, 4, dtype=INT32, device=b.device),
            "num_blocks": b.ints(0, 0, 0, 0),
            **{"token_lora_mapping": b.mapping, "valid_tokens": b.valid, "max_loras": b.loras},
        },
    ),
    **dict.fromkeys(("moe_runs_one_launch", "moe_runs_three_launch"), ("moe_runs_fill", _fill_runs)),
    **dict.fromkeys(("moe_align_one_launch", "moe_align_two_launch"), ("moe_align_fill", _fill_tables)),
    "moe_align_local_ids": (
        "local_ids",
        lambda b: {
            **{"topk_ids": b.ids, "expert_map": b.expert_map},
            "out": torch.zeros(b.tokens, b.top_k, dtype=INT32, device=b.device),
        },
    ),
}


def _of_room(family: str) -> tuple[str, Callable[[Batch], Arguments]]:
    return family, lambda b: laboratory(family, "laws").good(b.device)


def _chosen_gemm(b: Batch, scales: str = "", *, adapted: bool = True, **changed: Any) -> Arguments:
    """The first projection in high blocks, whose rows stay in their order; with ``scales`` of FP8."""
    tables, runs = b.ranked(block_m=128, valid_tokens=b.valid)
    x, w = b.normal(b.tokens, b.k), b.normal(b.experts, 2 * b.n, b.k)
    call: Arguments = {"x": x, "w": w, "x_scale": None, "w_scale": None, "tables": tables}
    call |= {"x_rows": "token", "out_rows": "sorted", "out": b.normal(b.tokens * b.top_k, b.n), "activation": "swiglu"}
    if scales:
        call["x"], call["x_scale"] = kg.quantize_activations(x, scales)
        call["w"], call["w_scale"] = kg.quantize_weights(w, scales, slices=2)
    if adapted:
        call |= {"v": b.normal(b.tokens * b.top_k, 2, b.rank), "lora_b": b.factors(b.loras, b.experts)["lora_b"], "runs": runs}
    return {**call, **changed}


def _chosen_pairs(b: Batch, scales: str = "") -> Arguments:
    """The second projection, likewise."""
    first = _chosen_gemm(b, adapted=False)
    x, w = b.normal(b.tokens * b.top_k, b.k), b.normal(b.experts, b.n, b.k)
    call = {**first, "x": x, "w": w, "out": b.normal(b.tokens, b.top_k, b.n), "topk_weights": None}
    if scales:
        call["x"], call["x_scale"] = kg.quantize_activations(x, scales)
        call["w"], call["w_scale"] = kg.quantize_weights(w, scales)
    return {**call, "x_rows": "sorted", "out_rows": "pair", "activation": None}


def _chosen_fp8(b: Batch) -> Arguments:
    """The first projection, whose rows become FP8 at once."""
    call = _chosen_gemm(b, "group", adapted=False)
    call["out"], call["out_scale"] = kg.quantize_activations(call["out"], "group")
    return call


def _mxfp4(w: torch.Tensor) -> Arguments:
    codes, scale = kg.quantize_mxfp4(w)
    return {"w": codes, "w_scale": scale}


def _chosen_lanes(b: Batch, block_m: int | None = 16, **changed: Any) -> Arguments:
    """A projection of MXFP4 weights, in low blocks or pair by pair."""
    routing = {"num_experts": b.experts, "valid_tokens": b.valid}
    tables = kg.no_tables(b.ids, **routing) if block_m is None else kg.moe_align(b.ids, block_m=block_m, **routing)
    call = {"x": b.normal(b.tokens, b.k), **_mxfp4(b.normal(b.experts, 2 * b.n, b.k)), "tables": tables, **CLAMPED}
    call |= {"layout": "interleaved", "bias": b.normal(b.experts, 2 * b.n)}
    return {**call, "out": b.normal(b.tokens * b.top_k, b.n), "x_rows": "token", "out_rows": "sorted", **changed}


def _chosen_sum(b: Batch) -> Arguments:
    """The second projection of few tokens, of MXFP4 weights."""
    call = _chosen_lanes(b, None, x=b.normal(b.tokens * b.top_k, b.k), out=b.normal(b.tokens, b.n), activation=None)
    call |= {"layout": "halves", "bias": b.normal(b.experts, b.n), "limit": None, "alpha": None, "beta": None}
    call |= _mxfp4(b.normal(b.experts, b.n, b.k))
    return {**call, "x_rows": "pair", "out_rows": "token", "topk_weights": b.weights}


def _chosen_layer(b: Batch, scales: str = "", *, adapted: bool = True) -> Arguments:
    """A layer of many tokens, with adapters, in FP8 or not."""
    given = b.layer(fp8=False)
    if not scales:
        return given
    given["hidden"], given["x_scale"] = kg.quantize_activations(given["hidden"], scales)
    for name, slices in (("w13", 2), ("w2", 1)):
        given[name], given[f"{name}_scale"] = kg.quantize_weights(given[name], scales, slices=slices)
    sizes = {"max_tokens": b.tokens, "top_k": b.top_k, "num_experts": b.experts, "hidden": b.k, "intermediate": b.n}
    sizes |= {"max_rank": b.rank if adapted else 0}
    given["workspace"] = kg.fused_moe_workspace(**sizes, fp8_activations=True, device=b.device)
    return {**given, "lora": given["lora"] if adapted else None}


def _chosen_mxfp4(b: Batch) -> Arguments:
    """A layer of few tokens with MXFP4 weights."""
    given = {**_gpt_oss(b), "lora": None}
    for name in ("w13", "w2"):
        given[name], given[f"{name}_scale"] = kg.quantize_mxfp4(given[name])
    return given


def _chosen_shrink(b: Batch, scales: str = "") -> Arguments:
    """Rank vectors of adapters of ranks of their own; with ``scales`` in FP8."""
    tables, runs = b.ranked()
    x, a = b.normal(b.tokens, b.k), b.factors(b.loras, b.experts)["lora_a"]
    call: Arguments = {"x": x, "lora_a": a, "x_scale": None, "a_scale": None}
    if scales:
        call["x"], call["x_scale"] = kg.quantize_activations(x, scales)
        call["lora_a"], call["a_scale"] = _fp8(a, scales)
    return {**call, "tables": tables, "runs": runs, "x_rows": "token", "v": b.normal(b.tokens * b.top_k, len(a), b.rank)}


def _chosen_tokens(b: Batch) -> Arguments:
    """The same of one matrix for all experts, a row a token."""
    shared = [a[:, :1].expand(a.shape) for a in b.factors(b.loras, b.experts)["lora_a"]]
    return {**_chosen_shrink(b), "lora_a": shared, "v": b.normal(b.tokens, len(shared), b.rank)}


def _groups(b: Batch, given: Arguments) -> Arguments:
    """With scales of groups, of operands that have 16 bits."""
    given["x"], given["x_scale"] = kg.quantize_activations(given["x"], "group")
    for name in ("a", "b"):
        given[f"lora_{name}"], given[f"{name}_scale"] = _fp8(given[f"lora_{name}"], "group")
    return given


def _chosen_quant(b: Batch, scales: str) -> Arguments:
    """Rows in the order of tables, to FP8."""
    codes, scale = kg.quantize_activations(x := b.normal(b.tokens * b.top_k, b.n), scales)
    tables = kg.moe_align(b.ids, num_experts=b.experts, valid_tokens=b.valid, num_tokens_hint=b.hint, block_m=32)
    return {"codes": codes, "scale": scale, "x": x, "tables": tables, "order": "sorted"}


_WIDE = {"tokens": 20, "k": 256, "n": 256}
# Further good calls of front doors, of sizes for which more is chosen; they are not run. And the sizes of their batches.
CHOSEN: dict[str, tuple[str, Callable[[Batch], Arguments], dict[str, int]]] = {
    "moe_gemm of boxes": ("moe_gemm", _chosen_gemm, _WIDE),
    "moe_gemm of boxes fp8": ("moe_gemm", lambda b: _chosen_gemm(b, "group"), _WIDE),
    "moe_gemm of boxes of pairs": ("moe_gemm", _chosen_pairs, _WIDE),
    "moe_gemm of boxes of pairs fp8": ("moe_gemm", lambda b: _chosen_pairs(b, "group"), _WIDE),
    "moe_gemm to fp8": ("moe_gemm", _chosen_fp8, _WIDE),
    "moe_gemm of lanes": ("moe_gemm", _chosen_lanes, {"k": 64}),
    "moe_gemm of few lanes": ("moe_gemm", lambda b: _chosen_lanes(b, None, out_rows="pair"), {"k": 64}),
    "moe_gemm of lanes that sum": ("moe_gemm", _chosen_sum, {"k": 64}),
    "moe_gemm of groups": ("moe_gemm", lambda b: _chosen_gemm(b, "group"), {}),
    "moe_shrink ranked": ("moe_shrink", _chosen_shrink, {}),
    "moe_shrink of groups": ("moe_shrink", lambda b: _chosen_shrink(b, "group"), {}),
    "moe_shrink of tokens": ("moe_shrink", _chosen_tokens, {"tokens": 20}),
    "moe_quant of groups": ("moe_quant", lambda b: _chosen_quant(b, "group"), {"tokens": 40, "n": 160}),
    "moe_quant of tokens": ("moe_quant", lambda b: _chosen_quant(b, "token"), {"tokens": 40}),
    "moe_lora of groups": ("moe_lora", lambda b: _groups(b, {**_plain(b), "route": b.route()}), {}),
    "lora held": ("lora", lambda b: {**_uneven(b), "route": b.held().first(b.tokens)}, {"n": 128}),
    "lora of groups": ("lora", lambda b: _groups(b, {**_lora(b), "packed": False}), {}),
    "lora_shrink of groups": ("lora_shrink", lambda b: _groups(b, _lora(b)), {}),
    "lora_expand of groups": ("lora_expand", lambda b: _groups(b, _lora(b)), {}),
    "fused_moe of many": ("fused_moe", _chosen_layer, {"tokens": 256, "k": 64, "n": 64}),
    "fused_moe of many fp8": ("fused_moe", lambda b: _chosen_layer(b, "group"), {"tokens": 256, "k": 128, "n": 128}),
    "fused_moe of many with one scale": (
        "fused_moe",
        lambda b: {**_chosen_layer(b, "tensor", adapted=False), "h_scale": torch.ones(1, device=b.device)},
        {"tokens": 256, "k": 128, "n": 128},
    ),
    "fused_moe of lanes": ("fused_moe", _chosen_mxfp4, {"tokens": 2, "k": 64, "n": 64}),
}


# A family that is not above has its good call in its room.
GOOD |= {name: _of_room(name) for name in sorted(OPS.keys() - {op for op, _ in GOOD.values()}) if name in rooms_with("laws")}


def _function(name: str, op: str, device: str) -> tuple[Callable[..., Any], str]:
    """What is called, and what it calls itself in errors."""
    if name in kg.variants():
        families = ("moe_route", "moe_align", "moe_runs")
        family, module = next((f, name.removeprefix(f"{f}_")) for f in families if name.startswith(f))
        return getattr(importlib.import_module(f"generated.{family}.{module}"), name), name
    if op == "lora_route_held":
        return kg.lora_route, "lora_route"
    if op == "lora_route_refill":
        held = kg.lora_route(torch.zeros(1, dtype=INT32, device=device), max_loras=3, capacity=15)
        return held.refill, "HeldRoute.refill"
    return (kg.MoeRoute.from_tables if op == "MoeRoute.from_tables" else getattr(kg, op)), op


@dataclasses.dataclass
class Door:
    """A front door, what it declares, and the arguments of a good call."""

    function: Callable[..., Any]
    name: str
    op: Op
    good: Arguments

    @staticmethod
    def of(name: str, device: str, **sizes: int) -> Door:
        """What the call is made of may have launched something."""
        op, make, own = (*GOOD[name], {}) if name in GOOD else CHOSEN[name]
        function, called = _function(name, op, device)
        given, known = make(Batch(device, **{**own, **sizes})), inspect.signature(function).parameters
        return Door(function, called, OPS[op], {name: value for name, value in given.items() if name in known})

    def __call__(self, **changed: Any) -> Any:
        return self.function(**{**self.good, **changed})

    @property
    def tensors(self) -> list[tuple[str, Tensor, torch.Tensor]]:
        """(what an error calls it, its declaration, it) of every tensor of a good call."""
        given = [operand for operand in self.operands if isinstance(operand, (Tensor, Bundle))]
        return [found for operand in given for found in operand.tensors(self.good[operand.name])]

    @property
    def operands(self) -> Iterator[operands.Operand]:
        """Those that the caller gives; and gives here."""
        return (operand for operand in self.op.operands if operand.name in self.good)


def forget() -> None:
    """As if nothing had been called yet."""
    with runtime.compile_only():
        pass


def by_hand(bundle: Any, **changed: Any) -> Any:
    """As somebody makes one who has the tables, rather than one that is edited."""
    return type(bundle)(**{**bundle._asdict(), **changed})
