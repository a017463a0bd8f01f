"""MoE-LoRA: what adapters add to the two projections of an MoE layer, and the tables that they need."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any, Iterator, Literal, Mapping, get_args

import click

from kernelgen.measure.models import Projection
from kernelgen.measure.options import Numbers, Shares, Words
from kernelgen.measure.suite import (
    ACTS,
    QUANTS,
    Act,
    Axis,
    Quant,
    Suite,
    Work,
    adapters,
    expected_groups,
    matrix_bytes,
    misfit,
)
from kernelgen.measure.suites.mixtures import ROUTING, TOKENS, MixtureCell, model_axes, models_of

Site = Literal["w13", "w2", "route", "layer"]
SITES: tuple[Site, ...] = get_args(Site)
# w13 and w2 alone; the route of a batch; route + w13 + w2, what the adapters add to one layer.
PROJECTIONS: dict[str, tuple[Literal["w13", "w2"], ...]] = {
    "w13": ("w13",),
    "w2": ("w2",),
    "route": (),
    "layer": ("w13", "w2"),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cell(MixtureCell):
    """One point of the sweep.

    Attributes:
        active, slots: adapters that the batch uses, in turns over its tokens, and that the weights hold.
        base: the share of tokens without an adapter.
    """

    site: Site
    rank: int
    active: int = 4
    slots: int = 4
    base: float = 0.0
    add: bool = True
    dtype: Literal["bf16", "f16"] = "bf16"
    quant: Quant = "none"
    act: Act = "none"

    @property
    def projections(self) -> tuple[Projection, ...]:
        """The LoRA pairs that this cell runs: none for a route."""
        return tuple(self.model.projection(site) for site in PROJECTIONS[self.site])

    @property
    def groups(self) -> float:
        """(adapter, expert) pairs that a batch hits, on average."""
        return expected_groups(self.active * self.model.experts, self.pairs * (1.0 - self.base))

    def work(self, groups: float, live_tokens: float, live_pairs: float) -> Work:
        """What must move and be computed for a batch that hits so many groups.

        Each A and B of a group is read once, each live row of x once, and each live row of out is written once and with ``add``
        read once; FP8 numbers have their scales beside them. A route reads ids and mapping and writes its tables.
        """
        if not self.projections:
            return Work(4.0 * (self.pairs + self.tokens + live_pairs) + 16.0 * groups, 0.0)
        total_bytes = total_flops = 0.0
        for p in self.projections:
            rows = live_pairs if p.weighted else live_tokens
            outputs = live_pairs * p.slices * p.n * (2 if self.add else 1)
            weights = matrix_bytes(self.quant, self.rank, p.k) + matrix_bytes(self.quant, p.n, self.rank)
            total_bytes += groups * p.slices * weights + matrix_bytes(self.act, rows, p.k, 1) + 2 * outputs
            total_flops += 2.0 * live_pairs * p.slices * self.rank * (p.k + p.n)
        return Work(total_bytes, total_flops, fp8="none" not in (self.quant, self.act))


def _span(values: Mapping[str, Any]) -> Iterator[Cell]:
    """A route depends neither on add nor on what is FP8, so it is there once."""
    if 1.0 in values["base"]:
        raise misfit("the share of base tokens is 1: nothing is left to do")
    works = [
        {"add": add, "quant": quant, "act": act}
        for add in ((True, False) if values["add"] is None else (values["add"],))
        for quant, act in itertools.product(values["quant"], values["act"])
    ]
    sweep = (
        models_of(values),
        adapters(values["active"], values["slots"]),
        values["ranks"],
        values["sites"],
        values["tokens"],
        values["base"],
        values["routing"],
    )
    for model, (active, slots), rank, site, tokens, base, routing in itertools.product(*sweep):
        one = Cell(
            model=model,
            site=site,
            tokens=tokens,
            rank=rank,
            active=active,
            slots=slots,
            base=base,
            routing=routing,
            dtype=values["dtype"],
        )
        yield from [one] if site == "route" else (dataclasses.replace(one, **work) for work in works)


SCHEDULES = ("one_shot", "small_batch", "two_kernel")
SUITE = Suite(
    name="moe_lora",
    title="MoE-LoRA: what adapters add to an MoE layer.",
    cell=Cell,
    axes=(
        *model_axes(("qwen3-30b-a3b", "deepseek-v3", "gpt-oss-120b", "mixtral-8x7b"), ("qwen3-30b-a3b", "mixtral-8x7b")),
        Axis("sites", Words(SITES), "w13, w2; route: the tables alone; layer: route, w13 and w2.", ("w13", "w2"), tiny=SITES),
        Axis("ranks", Numbers(), "LoRA ranks.", (16, 64, 128), (16, 64), (16,)),
        Axis("tokens", Numbers(), "Tokens of a batch.", TOKENS, (1, 16, 256, 4096), (1, 20)),
        Axis("active", Numbers(), "Adapters that the batch uses.", (4,)),
        Axis("slots", Numbers(), "Adapters in the weights, one number for each of --active; as many unless told."),
        Axis("base", Shares(), "Shares of tokens without an adapter.", (0.0,), tiny=(0.25,)),
        ROUTING,
        Axis("add", click.BOOL, "Add to out, or overwrite it; both unless told.", flag="--add/--set"),
        Axis("dtype", click.Choice(["bf16", "f16"]), "Of activations and weights.", "bf16"),
        Axis("quant", Words(QUANTS), "FP8 weights with a scale a tensor, channel or group; none: of --dtype.", ("none",)),
        Axis("act", Words(ACTS), "FP8 activations with a scale a tensor, token or group; none: of --dtype.", ("none",)),
    ),
    span=_span,
    peers=("vllm", "sglang", "torch"),
    forms=(*SCHEDULES, "apart"),
    split=("add", {True: "add", False: "set"}),
    beside=("our 16-bit operands", {"quant": "none", "act": "none"}),
)
