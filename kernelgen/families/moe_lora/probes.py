"""What the fused products of MoE-LoRA are compiled for."""

from __future__ import annotations

import dataclasses
import importlib
from types import ModuleType
from typing import Iterator, Mapping

import torch

from kernelgen.core.model import TunedEntry, Variant
from kernelgen.families.probe import Probe, meta, ranks, tensors


@dataclasses.dataclass(frozen=True)
class _Sizes:
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


def probes(package: ModuleType, variant: Variant) -> Iterator[Probe]:
    """With the tiles of the rule."""
    shape = _W2 if variant.weighted else _W13
    for rank in ranks(variant):
        suffix = f"_r{rank}" if variant.tiled_rank else ""
        if variant.assignment == "naive":
            sizes = _Sizes(_NAIVE_TOKENS, rank=rank, **shape)
            yield _probe(f"naive{suffix}", package, variant, sizes)
        else:
            for block_m, num_tokens in _SORTED_TOKENS.items():
                sizes = _Sizes(num_tokens, rank=rank, block_m=block_m, **shape)
                yield _probe(f"m{block_m}{suffix}", package, variant, sizes)


def tuned(package: ModuleType, variant: Variant, entry: TunedEntry) -> Iterator[Probe]:
    """With tiles that were measured: the best, and those for other routes."""
    problem = dict(entry.problem)
    if variant.weighted != problem["weighted"]:
        return
    fields = {field.name for field in dataclasses.fields(_Sizes)}
    sizes = _Sizes(**{name: problem[name] for name in problem.keys() & fields})
    for place, choice in (("first", entry.best), ("second", entry.runner_up)):
        if choice is not None and choice.schedule == variant.schedule:
            name = "_".join((place, *_labels(sizes)))
            yield _probe(name, package, variant, sizes, dict(choice.config))


def _labels(sizes: _Sizes) -> Iterator[str]:
    yield f"t{sizes.num_tokens}"
    yield f"k{sizes.k}"
    yield f"n{sizes.n}"
    yield f"s{sizes.slices}"
    yield f"r{sizes.rank}"
    yield f"e{sizes.num_experts}"
    yield f"top{sizes.top_k}"
    yield f"l{sizes.max_loras}"


def _probe(
    name: str,
    package: ModuleType,
    variant: Variant,
    sizes: _Sizes,
    config: Mapping[str, int] | None = None,
) -> Probe:
    module = importlib.import_module(f"{package.__name__}.{variant.family}.{variant.module}")
    num_pairs = sizes.num_tokens * sizes.top_k
    rows = num_pairs if variant.weighted else sizes.num_tokens
    dtype = getattr(torch, variant.torch_dtype)

    def call() -> None:
        with package._runtime.compile_only():
            route = package.moe_route(
                meta(sizes.num_tokens, sizes.top_k),
                meta(sizes.num_tokens),
                num_experts=sizes.num_experts,
                max_loras=sizes.max_loras,
                assignment=variant.assignment,
                block_m=sizes.block_m,
            )
        known = {"T": sizes.num_tokens, "top_k": sizes.top_k, "R": rows, "L": sizes.max_loras, "X": sizes.num_experts}
        layer = {"K": sizes.k, "N": sizes.n, "S": sizes.slices, "rank": sizes.rank}
        options = tensors(package, variant, **known, **layer)
        if config is not None:
            options["config"] = module.Config(**config)
        getattr(module, variant.name)(**options, route=route)

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
