"""The probes that the two products of dense LoRA have in common."""

from __future__ import annotations

import dataclasses
import importlib
from types import ModuleType
from typing import Any, Callable, Iterator, Mapping, NamedTuple, Sequence

import torch

from kernelgen.core.model import TunedEntry, Variant
from kernelgen.families.probe import Probe, launcher_of, meta, ranks

_BLOCK_M = {16: 16, 4096: 128, 16384: 128}  # by tokens: so that K is shared out or not, and the ends of block_m


@dataclasses.dataclass(frozen=True)
class Sizes:
    """A linear layer with adapters, and a batch: the query, key and value of Llama-3-8B; block_m None: as the route picks it.

    With five adapters, which nobody tunes for: so tiles are those of the rule, and tuning changes no line of the lock.
    """

    num_tokens: int
    rank: int
    block_m: int | None = None
    k: int = 4096
    widths: tuple[int, ...] = (4096, 1024, 1024)  # slices of two widths
    max_loras: int = 5

    def describe(self) -> dict[str, int]:
        """What a row of the lock says."""
        sizes = {"num_tokens": self.num_tokens, "k": self.k, "rank": self.rank, "max_loras": self.max_loras}
        return sizes if self.block_m is None else {**sizes, "block_m": self.block_m}


class Operands(NamedTuple):
    """What a product is called on.

    Attributes:
        scales: of FP8 operands, by argument.
        times: how often what is written moves.
        products: that are added up, of all rows.
    """

    written: torch.Tensor
    read: torch.Tensor
    weights: list[torch.Tensor]
    scales: Mapping[str, Any]
    times: int
    products: int


_Make = Callable[[ModuleType, Variant, Sizes], Operands]


def of_rule(package: ModuleType, variant: Variant, make: _Make, tokens: Sequence[int]) -> Iterator[Probe]:
    """The probes with the tiles of the rule, of batches of ``tokens``, keys of _BLOCK_M."""
    for rank in ranks(variant):
        for num_tokens in tokens:
            suffix = f"_r{rank}" if variant.tiled_rank else ""
            sizes = Sizes(num_tokens, rank, _BLOCK_M[num_tokens])
            yield _probe(f"t{num_tokens}{suffix}", package, variant, make, sizes)


def of_measured(package: ModuleType, variant: Variant, make: _Make, entry: TunedEntry) -> Iterator[Probe]:
    """The probe with tiles that were measured."""
    problem = dict(entry.problem)
    narrow, others = problem.get("n_min", 1), problem["slices"] - 1  # the first product does not see widths
    widths = (problem.get("n", 1 + others) - others * narrow, *[narrow] * others)
    layer = {"k": problem["k"], "widths": widths, "max_loras": problem["max_loras"]}
    sizes = Sizes(problem["num_tokens"], problem["rank"], **layer)
    name = "_".join(f"{size}{value}" for size, value in problem.items())
    yield _probe(f"first_{name}", package, variant, make, sizes, dict(entry.config))


def _probe(
    name: str, package: ModuleType, variant: Variant, make: _Make, sizes: Sizes, config: Mapping[str, int] | None = None
) -> Probe:
    operands = make(package, variant, sizes)
    launcher, options = launcher_of(package, variant), dict(operands.scales)
    if config is not None:
        options["config"] = importlib.import_module(launcher.__module__).Config(**config)

    def call() -> None:
        with package._runtime.compile_only():
            route = package.lora_route(meta(sizes.num_tokens), max_loras=sizes.max_loras, block_m=sizes.block_m)
        launcher(operands.written, operands.read, operands.weights, route, **options)

    moved = operands.times * operands.written.nbytes + operands.read.nbytes + sum(w.nbytes for w in operands.weights)
    flops = 2.0 * operands.products
    return Probe(name, sizes.describe(), call, flops, float(moved), is_tuned=config is not None)
