"""The problems that stand for all others when a variant is compiled without a GPU, one function a family.

A probe calls the variant as a user would, on tensors of the ``meta`` device, inside ``compile_only``: so the kernels, tiles and
options are the ones that the launcher itself picks for the target. Rows of the lock are named by it.
"""

from __future__ import annotations

import dataclasses
import importlib
import itertools
from types import ModuleType
from typing import Any, Callable, Iterator, Mapping, Sequence

import torch

from kernelgen.diagnostics import failure
from kernelgen.model import Family, Tuned, TunedEntry, Variant


@dataclasses.dataclass(frozen=True)
class Probe:
    """A problem that a variant is compiled for.

    Attributes:
        name: short; one of its kind a variant.
        sizes: what the problem is, for a reader.
        call: makes the launches; to be called where launches are recorded.
        flops: of the problem.
        bytes: that must move between memory and chip, if every tensor moved once.
        is_tuned: with tiles that were measured: of interest for the primary target and the measured version of Triton only.
    """

    name: str
    sizes: Mapping[str, int]
    call: Callable[[], None]
    flops: float
    bytes: float
    is_tuned: bool = False


@dataclasses.dataclass(frozen=True)
class _MoeLoraSizes:
    """One projection of an MoE layer with adapters, and a batch; block_m None: as the route picks it."""

    num_tokens: int
    k: int
    n: int
    slices: int
    rank: int
    top_k: int = 8
    num_experts: int = 128
    max_loras: int = 5
    block_m: int | None = None


# w13 and w2 of Qwen3-30B-A3B; tokens so that blocks of each size are what a route would pick. With five adapters, which
# nobody tunes for: so tiles are those of the rule, and tuning changes no line of the lock.
_W13 = {"k": 2048, "n": 768, "slices": 2}
_W2 = {"k": 768, "n": 2048, "slices": 1}
_NAIVE_TOKENS = 4
_SORTED_TOKENS = {16: 64, 64: 4096}
_TILED_RANKS = (256, 129)  # a whole number of tiles, and rows that are not aligned


def _moe_lora(package: ModuleType, family: Family, variant: Variant) -> Iterator[Probe]:
    shape = _W2 if variant.weighted else _W13
    for rank in _TILED_RANKS if variant.tiled_rank else (variant.max_rank,):
        suffix = f"_r{rank}" if variant.tiled_rank else ""
        if variant.assignment == "naive":
            sizes = _MoeLoraSizes(_NAIVE_TOKENS, rank=rank, **shape)
            yield _moe_lora_probe(f"naive{suffix}", package, variant, sizes)
        else:
            for block_m, num_tokens in _SORTED_TOKENS.items():
                sizes = _MoeLoraSizes(num_tokens, rank=rank, block_m=block_m, **shape)
                yield _moe_lora_probe(f"m{block_m}{suffix}", package, variant, sizes)


def _moe_lora_tuned(package: ModuleType, family: Family, variant: Variant, tuned: Tuned) -> Iterator[Probe]:
    fields = {field.name for field in dataclasses.fields(_MoeLoraSizes)}
    for entry in _measured(family, variant, tuned):
        choices = (("first", entry.best), ("second", entry.runner_up))
        chosen = [(place, c) for place, c in choices if c is not None and c.schedule == variant.schedule]
        problem = dict(entry.problem)
        if variant.weighted != problem["weighted"]:
            continue
        sizes = _MoeLoraSizes(**{name: problem[name] for name in problem.keys() & fields})
        for place, choice in chosen:
            name = "_".join((place, *_labels(sizes)))
            yield _moe_lora_probe(name, package, variant, sizes, dict(choice.config))


def _labels(sizes: _MoeLoraSizes) -> Iterator[str]:
    yield f"t{sizes.num_tokens}"
    yield f"k{sizes.k}"
    yield f"n{sizes.n}"
    yield f"s{sizes.slices}"
    yield f"r{sizes.rank}"
    yield f"e{sizes.num_experts}"
    yield f"top{sizes.top_k}"
    yield f"l{sizes.max_loras}"


def _measured(family: Family, variant: Variant, tuned: Tuned) -> Iterator[TunedEntry]:
    """The measurements that are of the tags and the rank of ``variant``; of dtypes the first stands for all."""
    if variant.dtype != next(axis.tags[0] for axis in family.axes if axis.name == "dtype"):
        return
    for entry in tuned.entries:
        if all(getattr(variant, axis) == tag for axis, tag in entry.tags) and _serves_rank(variant, entry.problem.rank):
            yield entry


def _serves_rank(variant: Variant, rank: int) -> bool:
    bucket: int = variant.block_rank
    if variant.tiled_rank:
        return rank > bucket
    return rank <= bucket and (rank > bucket // 2 or bucket == 16)


def _moe_lora_probe(
    name: str,
    package: ModuleType,
    variant: Variant,
    sizes: _MoeLoraSizes,
    config: Mapping[str, int] | None = None,
) -> Probe:
    folder = f"{package.__name__}.{variant.family}"
    module = importlib.import_module(f"{folder}.{variant.module}")
    problem = importlib.import_module(f"{folder}._problem")
    num_pairs = sizes.num_tokens * sizes.top_k
    rows = num_pairs if variant.weighted else sizes.num_tokens
    dtype = getattr(torch, variant.torch_dtype)

    def call() -> None:
        with package._runtime.compile_only():
            route = package.moe_route(
                _meta(sizes.num_tokens, sizes.top_k),
                _meta(sizes.num_tokens),
                num_experts=sizes.num_experts,
                max_loras=sizes.max_loras,
                assignment=variant.assignment,
                block_m=sizes.block_m,
            )
        experts = (sizes.max_loras, sizes.num_experts)
        options: dict[str, Any] = {}
        if variant.weighted:
            options["topk_weights"] = _meta(sizes.num_tokens, sizes.top_k, dtype=_FP32)
        if config is not None:
            options["config"] = module.Config(**config)
        a_shape, b_shape = (*experts, sizes.rank, sizes.k), (*experts, sizes.n, sizes.rank)
        of_weights, of_x, x_shape = dtype, dtype, (rows, sizes.k)
        if variant.weight_scales:
            of_weights = _fp8(package)
            for name, shape in (("a_scale", a_shape), ("b_scale", b_shape)):
                scales = _meta(*problem.scale_shape(variant.weight_scales, shape), dtype=_FP32)
                options[name] = [scales] * sizes.slices
        if variant.x_scales:
            of_x = _fp8(package)
            shape = problem.x_scale_shape(variant.x_scales, x_shape)
            options["x_scale"] = _meta(*shape, dtype=_FP32)
        getattr(module, variant.name)(
            _meta(sizes.num_tokens, sizes.top_k, sizes.slices * sizes.n, dtype=dtype),
            _meta(*x_shape, dtype=of_x),
            [_meta(*a_shape, dtype=of_weights)] * sizes.slices,
            [_meta(*b_shape, dtype=of_weights)] * sizes.slices,
            route,
            **options,
        )

    groups = sizes.max_loras * sizes.num_experts
    hit = groups * (1.0 - (1.0 - 1.0 / groups) ** num_pairs)  # if pairs are spread evenly
    weights = sizes.slices * sizes.rank * (sizes.k + sizes.n)
    outputs = num_pairs * sizes.slices * sizes.n * (2 if variant.adds else 1)
    return Probe(
        name,
        {key: size for key, size in dataclasses.asdict(sizes).items() if size is not None},
        call,
        flops=2.0 * num_pairs * weights,
        bytes=hit * weights * (1 if variant.weight_scales else dtype.itemsize)
        + rows * sizes.k * (1 if variant.x_scales else dtype.itemsize)
        + outputs * dtype.itemsize,
        is_tuned=config is not None,
    )


_ROUTE_TOKENS = {8: 16, 64: 16, 4096: 64}  # both sorts, the first of them small and large; with their block_m


def _moe_route(package: ModuleType, family: Family, variant: Variant) -> Iterator[Probe]:
    """The front door picks the variant by the size of the batch: what it does not pick launches nothing."""
    del family
    sizes = {"top_k": 8, "num_experts": 128, "max_loras": 4}
    for num_tokens, block_m in _ROUTE_TOKENS.items():
        yield Probe(
            f"t{num_tokens}_m{block_m}",
            {"num_tokens": num_tokens, "block_m": block_m, **sizes},
            _route_call(package, variant, num_tokens, block_m, sizes),
            flops=0.0,
            bytes=4.0 * num_tokens * (2 * sizes["top_k"] + 1),
        )


def _route_call(
    package: ModuleType, variant: Variant, num_tokens: int, block_m: int, sizes: Mapping[str, int]
) -> Callable[[], None]:
    enabled = _meta(sizes["max_loras"])

    def sort() -> None:
        ids, adapters = _meta(num_tokens, sizes["top_k"]), _meta(num_tokens)
        counts = {name: sizes[name] for name in ("num_experts", "max_loras")}
        options = {"assignment": "sorted", "block_m": block_m, "adapter_enabled": enabled}
        package.moe_route(ids, adapters, **counts, **options)

    def convert() -> None:
        width = num_tokens * sizes["top_k"]
        package.MoeRoute.from_tables(
            _meta(sizes["max_loras"], width),
            _meta(sizes["max_loras"], width // block_m),
            _meta(sizes["max_loras"]),
            block_size=block_m,
            num_tokens=num_tokens,
            adapter_enabled=enabled,
            lora_ids=_meta(sizes["max_loras"] + 1),
            **sizes,
        )

    return convert if variant.schedule == "from_tables" else sort


# One call of each kind of tile: tokens of Qwen3-30B-A3B whose mean expert makes blocks of that height, and a rank of adapters.
_GEMM_TOKENS = {"gemv": {1: 16, 4: 64}, "tile": {64: 64, 256: 16, 4096: 64}, "box": {1024: 16, 4096: 64}}
_QWEN3 = {"hidden": 2048, "inter": 768, "top_k": 8, "num_experts": 128}


def _moe_gemm(package: ModuleType, family: Family, variant: Variant) -> Iterator[Probe]:
    del family
    for num_tokens, rank in _GEMM_TOKENS[variant.schedule].items():
        yield _moe_gemm_probe(package, variant, num_tokens, rank if variant.adapted else 0)


def _moe_gemm_probe(package: ModuleType, variant: Variant, num_tokens: int, rank: int) -> Probe:
    launcher = _launcher(package, variant)
    problem = importlib.import_module(f"{package.__name__}.{variant.family}._problem")
    scales = importlib.import_module(f"{package.__name__}._scales")
    dtype = getattr(torch, variant.torch_dtype)
    top_k, num_experts = _QWEN3["top_k"], _QWEN3["num_experts"]
    num_pairs = num_tokens * top_k
    k, n = _QWEN3["hidden"], _QWEN3["inter"]
    if not variant.reads_token:
        k, n = n, k
    rows = num_tokens if variant.reads_token else num_pairs
    outputs = num_tokens if variant.sums else num_pairs
    height = variant.slices * n

    def call() -> None:
        with package._runtime.compile_only():
            make = package.no_tables if variant.schedule == "gemv" else package.moe_align
            ids, routing = _meta(num_tokens, top_k), {"num_experts": num_experts, "valid_tokens": _meta(1)}
            tables = make(ids, **routing)
        options: dict[str, Any] = {}
        if variant.weighted:
            options["topk_weights"] = _meta(num_tokens, top_k, dtype=_FP32)
        of_weights, of_x, x_shape, w_shape = dtype, dtype, (rows, k), (num_experts, height, k)
        if variant.weight_scales:
            of_weights = _fp8(package)
            shape = scales.scale_shape(variant.weight_scales, w_shape, problem.QUANT, variant.slices)
            options["w_scale"] = _meta(*shape, dtype=_FP32)
        if variant.x_scales:
            of_x = _fp8(package)
            shape = scales.x_scale_shape(variant.x_scales, x_shape, problem.QUANT)
            options["x_scale"] = _meta(*shape, dtype=_FP32)
        if variant.adapted:
            with package._runtime.compile_only():
                routing["block_m"] = tables.block_m
                tables, options["runs"] = package.moe_runs(ids, _meta(num_tokens), max_loras=5, **routing)
                a = [_meta(5, num_experts, rank, k, dtype=dtype)] * variant.slices
                x_rows = "token" if variant.reads_token else "pair" if variant.schedule == "gemv" else "sorted"
                options["v"] = package.moe_shrink(_meta(*x_shape, dtype=dtype), a, tables, options["runs"], x_rows=x_rows)
            options["lora_b"] = [_meta(5, num_experts, n, rank, dtype=dtype)] * variant.slices
        launcher(
            _meta(outputs, n, dtype=dtype),
            _meta(*x_shape, dtype=of_x),
            _meta(*w_shape, dtype=of_weights),
            tables,
            **options,
        )

    hit = num_experts * (1.0 - (1.0 - 1.0 / num_experts) ** num_pairs)  # if pairs are spread evenly
    sizes = {"num_tokens": num_tokens, "k": k, "n": n, "top_k": top_k, "num_experts": num_experts}
    return Probe(
        f"t{num_tokens}",
        {**sizes, "rank": rank} if rank else sizes,
        call,
        flops=2.0 * num_pairs * height * (k + rank),
        bytes=hit * height * k * (1 if variant.weight_scales else dtype.itemsize)
        + rows * k * (1 if variant.x_scales else dtype.itemsize)
        + outputs * n * dtype.itemsize,
    )


def _moe_quant(package: ModuleType, family: Family, variant: Variant) -> Iterator[Probe]:
    del family
    launcher = _launcher(package, variant)
    scales = importlib.import_module(f"{package.__name__}._scales")
    problem = importlib.import_module(f"{package.__name__}.{variant.family}._problem")
    top_k, num_experts, n = _QWEN3["top_k"], _QWEN3["num_experts"], _QWEN3["inter"]
    for num_tokens in (4, 4096):
        shape = (num_tokens * top_k, n)

        def call(num_tokens: int = num_tokens, shape: tuple[int, int] = shape) -> None:
            with package._runtime.compile_only():
                tables = package.moe_align(_meta(num_tokens, top_k), num_experts=num_experts, valid_tokens=_meta(1))
            scale = scales.x_scale_shape(variant.x_scales, shape, problem.QUANT)
            codes = _meta(*shape, dtype=_fp8(package))
            launcher(codes, _meta(*scale, dtype=_FP32), _meta(*shape, dtype=getattr(torch, variant.torch_dtype)), tables)

        sizes = {"num_tokens": num_tokens, "n": n, "top_k": top_k, "num_experts": num_experts}
        yield Probe(f"t{num_tokens}", sizes, call, flops=0.0, bytes=3.0 * shape[0] * shape[1])


def _moe_align(package: ModuleType, family: Family, variant: Variant) -> Iterator[Probe]:
    del family, variant
    top_k, num_experts = _QWEN3["top_k"], _QWEN3["num_experts"]
    for num_tokens in (16, 256, 4096):
        ids, valid = _meta(num_tokens, top_k), _meta(1)

        def call(ids: torch.Tensor = ids, valid: torch.Tensor = valid) -> None:
            package.moe_align(ids, num_experts=num_experts, valid_tokens=valid)

        sizes = {"num_tokens": num_tokens, "top_k": top_k, "num_experts": num_experts}
        yield Probe(f"t{num_tokens}", sizes, call, flops=0.0, bytes=8.0 * ids.numel())


def _moe_runs(package: ModuleType, family: Family, variant: Variant) -> Iterator[Probe]:
    del family, variant
    top_k, num_experts = _QWEN3["top_k"], _QWEN3["num_experts"]
    for num_tokens in (16, 4096):
        ids = _meta(num_tokens, top_k)

        def call(ids: torch.Tensor = ids) -> None:
            given = {"adapter_enabled": _meta(5), "valid_tokens": _meta(1)}
            package.moe_runs(ids, _meta(ids.shape[0]), num_experts=num_experts, max_loras=5, **given)

        sizes = {"num_tokens": num_tokens, "top_k": top_k, "num_experts": num_experts, "max_loras": 5}
        yield Probe(f"t{num_tokens}", sizes, call, flops=0.0, bytes=20.0 * ids.numel())


def _moe_shrink(package: ModuleType, family: Family, variant: Variant) -> Iterator[Probe]:
    del family
    launcher = _launcher(package, variant)
    dtype, top_k, num_experts = getattr(torch, variant.torch_dtype), _QWEN3["top_k"], _QWEN3["num_experts"]
    slices, k = (2, _QWEN3["hidden"]) if variant.reads_token else (1, _QWEN3["inter"])
    parts = importlib.import_module(f"{package.__name__}.moe_shrink._problem").part_count(k)
    few = variant.schedule == "pairs"
    for num_tokens, rank in {1: 16, 4: 64}.items() if few else {64: 64, 1024: 16, 4096: 64}.items():
        num_pairs = num_tokens * top_k
        x = _meta(num_tokens if variant.reads_token else num_pairs, k, dtype=dtype)
        v = _meta(num_pairs, slices, rank, dtype=dtype)
        if few:
            v = _meta(parts, num_pairs, slices, rank, dtype=_FP32)
        a = [_meta(5, num_experts, rank, k, dtype=dtype)] * slices

        def call(operands: Any = (v, x, a), num_tokens: int = num_tokens) -> None:
            with package._runtime.compile_only():
                sizes = {"num_experts": num_experts, "max_loras": 5, "block_m": 0 if few else None}
                tables, runs = package.moe_runs(_meta(num_tokens, top_k), _meta(num_tokens), **sizes)
            launcher(*operands, tables, runs)

        hit = 1.0 - (1.0 - 1.0 / (5 * num_experts)) ** num_pairs  # if pairs are spread evenly
        moved = x.nbytes + v.nbytes + hit * slices * a[0].nbytes
        sizes = {"num_tokens": num_tokens, "k": k, "rank": rank, "slices": slices, "max_loras": 5}
        flops = 2.0 * num_pairs * slices * rank * k
        yield Probe(f"t{num_tokens}", sizes, call, flops=flops, bytes=moved)


def _moe_sum(package: ModuleType, family: Family, variant: Variant) -> Iterator[Probe]:
    del family
    launcher = _launcher(package, variant)
    dtype = getattr(torch, variant.torch_dtype)
    top_k, width = _QWEN3["top_k"], _QWEN3["hidden"]
    for num_tokens in (16, 4096):
        ids = _meta(num_tokens, top_k)
        out, y = _meta(num_tokens, width, dtype=dtype), _meta(num_tokens, top_k, width, dtype=dtype)
        options: dict[str, Any] = {"num_experts": _QWEN3["num_experts"], "valid_tokens": _meta(1)}
        if variant.weighted:
            options["topk_weights"] = _meta(num_tokens, top_k, dtype=torch.float32)

        def call(arguments: Any = (out, y, ids), options: Any = options) -> None:
            launcher(*arguments, **options)

        sizes = {"num_tokens": num_tokens, "top_k": top_k, "n": width}
        moved = dtype.itemsize * (out.numel() + y.numel())
        yield Probe(f"t{num_tokens}", sizes, call, flops=2.0 * y.numel(), bytes=float(moved))


def _moe_act(package: ModuleType, family: Family, variant: Variant) -> Iterator[Probe]:
    del family
    launcher = _launcher(package, variant)
    dtype = getattr(torch, variant.torch_dtype)
    num_tokens, top_k, width = 1024, _QWEN3["top_k"], _QWEN3["inter"]
    h = _meta(num_tokens * top_k, width, dtype=dtype)
    x = _meta(num_tokens, top_k, variant.slices * width, dtype=dtype)
    options = {"num_experts": _QWEN3["num_experts"], "valid_tokens": _meta(1)}

    def call() -> None:
        launcher(h, x, _meta(num_tokens, top_k), **options)

    sizes = {"num_tokens": num_tokens, "top_k": top_k, "n": width}
    moved = dtype.itemsize * (h.numel() + x.numel())
    yield Probe(f"t{num_tokens}", sizes, call, flops=0.0, bytes=float(moved))


def _moe_add(package: ModuleType, family: Family, variant: Variant) -> Iterator[Probe]:
    del family
    launcher = _launcher(package, variant)
    dtype = getattr(torch, variant.torch_dtype)
    num_tokens, top_k, width = 1024, _QWEN3["top_k"], 2 * _QWEN3["inter"]
    out, delta = (_meta(num_tokens, top_k, width, dtype=dtype) for _ in range(2))
    sizes = {"num_experts": _QWEN3["num_experts"], "max_loras": 4}

    def call() -> None:
        route = package.moe_route(
            _meta(num_tokens, top_k), _meta(num_tokens), assignment="naive", adapter_enabled=_meta(4), **sizes
        )
        launcher(out, delta, route)

    moved = 3.0 * dtype.itemsize * out.numel()
    yield Probe(f"t{num_tokens}", {"num_tokens": num_tokens, "n": width}, call, flops=0.0, bytes=moved)


@dataclasses.dataclass(frozen=True)
class _LoraSizes:
    """A linear layer with adapters, and a batch: the query, key and value of Llama-3-8B; block_m None: as the route picks it."""

    num_tokens: int
    rank: int
    block_m: int | None = None
    k: int = 4096
    widths: tuple[int, ...] = (4096, 1024, 1024)  # slices of two widths
    max_loras: int = 5  # as for MoE-LoRA above

    def describe(self) -> dict[str, int]:
        """What a row of the lock says."""
        sizes = {"num_tokens": self.num_tokens, "k": self.k, "rank": self.rank, "max_loras": self.max_loras}
        return sizes if self.block_m is None else {**sizes, "block_m": self.block_m}


_LORA_TOKENS = {16: 16, 4096: 128, 16384: 128}  # so that K is shared out or not, and the ends of block_m


def _lora_ranks(variant: Variant) -> tuple[int, ...]:
    return _TILED_RANKS if variant.tiled_rank else (variant.max_rank,)


def _lora(package: ModuleType, family: Family, variant: Variant) -> Iterator[Probe]:
    del family
    for rank, (num_tokens, block_m) in itertools.product(_lora_ranks(variant), _LORA_TOKENS.items()):
        if variant.family == "lora_expand" and num_tokens > 4096:
            continue  # the same tiles
        suffix = f"_r{rank}" if variant.tiled_rank else ""
        yield _lora_probe(f"t{num_tokens}{suffix}", package, variant, _LoraSizes(num_tokens, rank, block_m))


def _lora_tuned(package: ModuleType, family: Family, variant: Variant, tuned: Tuned) -> Iterator[Probe]:
    for entry in _measured(family, variant, tuned):
        problem = dict(entry.problem)
        narrow, others = problem.get("n_min", 1), problem["slices"] - 1  # the first product does not see widths
        widths = (problem.get("n", 1 + others) - others * narrow, *[narrow] * others)
        layer = {"k": problem["k"], "widths": widths, "max_loras": problem["max_loras"]}
        sizes = _LoraSizes(problem["num_tokens"], problem["rank"], **layer)
        name = "_".join(f"{size}{value}" for size, value in problem.items())
        yield _lora_probe(f"first_{name}", package, variant, sizes, dict(entry.config))


def _lora_probe(
    name: str, package: ModuleType, variant: Variant, sizes: _LoraSizes, config: Mapping[str, int] | None = None
) -> Probe:
    of_operands = _lora_shrink_operands if variant.family == "lora_shrink" else _lora_expand_operands
    operands, options, times, products = of_operands(package, variant, sizes)
    launcher = _launcher(package, variant)
    if config is not None:
        options["config"] = importlib.import_module(launcher.__module__).Config(**config)

    def call() -> None:
        with package._runtime.compile_only():
            route = package.lora_route(_meta(sizes.num_tokens), max_loras=sizes.max_loras, block_m=sizes.block_m)
        launcher(*operands, route, **options)

    written, read, weights = operands
    moved = times * written.nbytes + read.nbytes + sum(w.nbytes for w in weights)
    is_tuned = config is not None
    return Probe(name, sizes.describe(), call, flops=2.0 * products, bytes=float(moved), is_tuned=is_tuned)


# (what is written, what is read, weights), scales, how often what is written moves, and products
_LoraOperands = tuple[tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]], dict[str, Any], int, int]


def _lora_shrink_operands(package: ModuleType, variant: Variant, sizes: _LoraSizes) -> _LoraOperands:
    scales_of = importlib.import_module(f"{package.__name__}._scales")
    problem = importlib.import_module(f"{package.__name__}.{variant.family}._problem")
    dtype, slices = getattr(torch, variant.torch_dtype), len(sizes.widths)
    of_a = _fp8(package) if variant.weight_scales else dtype
    of_x = _fp8(package) if variant.x_scales else dtype
    a = [_meta(sizes.max_loras, sizes.rank, sizes.k, dtype=of_a)] * slices
    x = _meta(sizes.num_tokens, sizes.k, dtype=of_x)
    y = _meta(slices, sizes.num_tokens, sizes.rank, dtype=_FP32)
    scales: dict[str, Any] = {}
    if variant.weight_scales:
        shape = scales_of.scale_shape(variant.weight_scales, a[0].shape, problem.QUANT)
        scales["a_scale"] = [_meta(*shape, dtype=_FP32)] * slices
    if variant.x_scales:
        scales["x_scale"] = _meta(*scales_of.x_scale_shape(variant.x_scales, x.shape, problem.QUANT), dtype=_FP32)
    return (y, x, a), scales, 1, y.numel() * sizes.k


def _lora_expand_operands(package: ModuleType, variant: Variant, sizes: _LoraSizes) -> _LoraOperands:
    scales_of = importlib.import_module(f"{package.__name__}._scales")
    problem = importlib.import_module(f"{package.__name__}.{variant.family}._problem")
    out = _meta(sizes.num_tokens, sum(sizes.widths), dtype=getattr(torch, variant.torch_dtype))
    y = _meta(len(sizes.widths), sizes.num_tokens, sizes.rank, dtype=_FP32)
    of_b = _fp8(package) if variant.weight_scales else out.dtype
    b = [_meta(sizes.max_loras, width, sizes.rank, dtype=of_b) for width in sizes.widths]
    scales: dict[str, Any] = {}
    if variant.weight_scales:
        shapes = [scales_of.scale_shape(variant.weight_scales, w.shape, problem.QUANT) for w in b]
        scales["b_scale"] = [_meta(*shape, dtype=_FP32) for shape in shapes]
    return (out, y, b), scales, 2 if variant.adds else 1, out.numel() * sizes.rank


# Half of an adapter on w13, or on w2, of Qwen3-30B-A3B over two GPUs: of its rank, or of its columns.
_APART_TOKENS = {"pairs": {4: 0}, "blocks": {64: 16, 4096: 64}}


def _moe_lora_shrink(package: ModuleType, family: Family, variant: Variant) -> Iterator[Probe]:
    del family
    slices, k = 2, 2048
    for rank in _lora_ranks(variant):
        for num_tokens, block_m in _APART_TOKENS[variant.schedule].items():
            num_pairs = num_tokens * _QWEN3["top_k"]
            x = _meta(num_tokens, k, dtype=getattr(torch, variant.torch_dtype))
            a = [_meta(5, _QWEN3["num_experts"], rank, k, dtype=x.dtype)] * slices
            operands = (_meta(slices, num_pairs, rank, dtype=_FP32), x, a)
            yield _apart_probe(package, variant, rank, num_tokens, block_m, operands, 1, slices * rank * k)


def _moe_lora_expand(package: ModuleType, family: Family, variant: Variant) -> Iterator[Probe]:
    del family
    slices, n = (1, 1024) if variant.weighted else (2, 384)
    for rank in _lora_ranks(variant):
        for num_tokens, block_m in _APART_TOKENS[variant.schedule].items():
            num_pairs = num_tokens * _QWEN3["top_k"]
            # what is gathered lies in two parts
            shape = (slices, num_pairs, rank) if variant.weighted or rank % 2 else (2, slices, num_pairs, rank // 2)
            y = _meta(*shape, dtype=_FP32)
            out = _meta(num_tokens, _QWEN3["top_k"], 2 * n, dtype=getattr(torch, variant.torch_dtype))
            b = [_meta(5, _QWEN3["num_experts"], n, rank, dtype=out.dtype)] * slices
            times = 2 if variant.adds else 1
            yield _apart_probe(package, variant, rank, num_tokens, block_m, (out, y, b), times, slices * rank * n)


def _apart_probe(
    package: ModuleType,
    variant: Variant,
    rank: int,
    num_tokens: int,
    block_m: int,
    operands: tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]],
    times: int,
    products: int,
) -> Probe:
    """``operands``: what is written (``times`` it moves), what is read, and weights; ``products``: of one pair."""
    launcher = _launcher(package, variant)
    top_k, num_experts = _QWEN3["top_k"], _QWEN3["num_experts"]
    options: dict[str, Any] = {}
    if getattr(variant.tags, "routed_weight", "plain") == "weighted":
        options["topk_weights"] = _meta(num_tokens, top_k, dtype=_FP32)

    def call() -> None:
        with package._runtime.compile_only():
            route = package.moe_route(
                _meta(num_tokens, top_k),
                _meta(num_tokens),
                num_experts=num_experts,
                max_loras=5,
                assignment="sorted" if block_m else "naive",
                block_m=block_m or None,
            )
        launcher(*operands, route, **options)

    written, read, weights = operands
    groups = 5 * num_experts
    hit = 1.0 - (1.0 - 1.0 / groups) ** (num_tokens * top_k)  # if pairs are spread evenly
    moved = times * written.nbytes + read.nbytes + hit * sum(w.nbytes for w in weights)
    sizes = {"num_tokens": num_tokens, "rank": rank, "block_m": block_m, "max_loras": 5}
    suffix = f"_r{rank}" if variant.tiled_rank else ""
    flops = 2.0 * num_tokens * top_k * products
    return Probe(f"t{num_tokens}{suffix}", sizes, call, flops=flops, bytes=float(moved))


def _launcher(package: ModuleType, variant: Variant) -> Callable[..., None]:
    module = importlib.import_module(f"{package.__name__}.{variant.family}.{variant.module}")
    launcher: Callable[..., None] = getattr(module, variant.name)
    return launcher


_FP32 = torch.float32


def _fp8(package: ModuleType) -> torch.dtype:
    """What FP8 operands of a probe are made of: e4m3, where the target that is compiled for has it."""
    has_e4m3 = package._runtime.traits(torch.device("meta")).e4m3
    return torch.float8_e4m3fn if has_e4m3 else torch.float8_e5m2


def _meta(*size: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
    return torch.empty(size, dtype=dtype, device="meta")


_Probes = Callable[[ModuleType, Family, Variant], Iterator[Probe]]
_FAMILIES: Mapping[str, _Probes] = {
    "lora_expand": _lora,
    "lora_shrink": _lora,
    "moe_act": _moe_act,
    "moe_add": _moe_add,
    "moe_align": _moe_align,
    "moe_gemm": _moe_gemm,
    "moe_lora": _moe_lora,
    "moe_lora_expand": _moe_lora_expand,
    "moe_lora_shrink": _moe_lora_shrink,
    "moe_quant": _moe_quant,
    "moe_route": _moe_route,
    "moe_runs": _moe_runs,
    "moe_shrink": _moe_shrink,
    "moe_sum": _moe_sum,
}


_TUNED: Mapping[str, Callable[[ModuleType, Family, Variant, Tuned], Iterator[Probe]]] = {
    "lora_expand": _lora_tuned,
    "lora_shrink": _lora_tuned,
    "moe_lora": _moe_lora_tuned,
}


def probes(package: ModuleType, family: Family, variant: Variant, tuned: Sequence[Tuned] = ()) -> list[Probe]:
    """The probes of ``variant``, which launch kernels of the imported generated ``package``; ``tuned``: those of
    these measured tiles as well.

    Raises:
        Failure: the family has no probes; they belong in this module.
    """
    if family.name not in _FAMILIES:
        message = f"{family.name} has no probes, which its kernels are compiled for"
        raise failure("KG050", family.spec, message, "write them in kernelgen/probes.py for the new family")
    found = list(_FAMILIES[family.name](package, family, variant))
    if family.name in _TUNED:
        for measured in tuned:
            found += _TUNED[family.name](package, family, variant, measured)
    return found
