"""Whole MoE layers with LoRA adapters: what the adapters cost beside the same layer without, and what overlap saves."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any, Iterator, Literal, Mapping, get_args

from kernelgen.measure.options import Numbers, Shares, Words
from kernelgen.measure.suite import ACTS, BASE_QUANTS, OURS, Act, Axis, Quant, Suite, Work, adapters, matrix_bytes, quant_forms
from kernelgen.measure.suites.mixtures import ROUTING, TOKENS, MixtureCell, model_axes, models_of

# layer: all of it; w13: the first product and its adapters, with tables and route made beforehand.
Site = Literal["layer", "w13"]
SITES: tuple[Site, ...] = get_args(Site)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cell(MixtureCell):
    """One point of the sweep.

    Attributes:
        rank: of the adapters; 0: the layer has none.
        active, slots: adapters that the batch uses, in turns over its tokens, and that the weights hold.
        base: the share of tokens without an adapter; 1: adapters are loaded, and no token has one.
        quant, act: the scales of weights and activations that are FP8; adapters are of 16 bits.
    """

    site: Site
    rank: int
    active: int = 4
    slots: int = 4
    base: float = 0.0
    quant: Quant = "none"
    act: Act = "none"

    def work(self, hit: float, groups: float) -> Work:
        """What must move and be computed for a batch that hits so many experts, and (adapter, expert) pairs: a weight once, and
        the rows at both ends of the layer.
        """
        m, live = self.model, self.pairs * (1.0 - self.base if self.rank else 0.0)
        halves = 2 if m.gated else 1
        projections = [(halves, m.hidden, m.intermediate)]
        if self.site == "layer":
            projections.append((1, m.intermediate, m.hidden))
        moved = matrix_bytes(self.act, self.tokens, m.hidden, 1)
        moved += 2.0 * (self.tokens * m.hidden if self.site == "layer" else self.pairs * halves * m.intermediate)
        flops = 0.0
        for slices, k, n in projections:
            moved += slices * (hit * matrix_bytes(self.quant, n, k) + 2.0 * groups * self.rank * (k + n))
            flops += 2.0 * slices * (self.pairs * k * n + live * self.rank * (k + n))
        return Work(moved, flops, self.act != "none")


def _span(values: Mapping[str, Any]) -> Iterator[Cell]:
    """A layer without adapters is the same for all of them, and has no first product with adapters; nor has one of FP8 by itself,
    as its products are for whole layers.
    """
    sweep = (
        models_of(values),
        quant_forms(values),
        values["ranks"],
        adapters(values["active"], values["slots"]),
        values["sites"],
        values["tokens"],
        values["base"],
        values["routing"],
    )
    for model, (quant, act), rank, (active, slots), site, tokens, base, routing in itertools.product(*sweep):
        cell = Cell(model=model, site=site, tokens=tokens, rank=rank, active=active, slots=slots, base=base, routing=routing)
        if rank == 0:
            cell = dataclasses.replace(cell, **BARE)
        if site == "layer" or (rank and base < 1.0 and quant == "none"):
            yield dataclasses.replace(cell, quant=quant, act=act)


BARE: Mapping[str, Any] = {"rank": 0, "active": 0, "slots": 0, "base": 0.0}  # the columns of a layer without adapters
SUITE = Suite(
    name="layer",
    title="Whole MoE layers with adapters, and without.",
    cell=Cell,
    axes=(
        *model_axes(("qwen3-30b-a3b",), ("qwen3-30b-a3b",)),
        Axis("sites", Words(SITES), "layer; w13: the first product and its adapters.", SITES, ("layer",)),
        Axis("ranks", Numbers(0), "LoRA ranks; 0: a layer without adapters.", (0, 16, 64), (0, 16), (0, 16)),
        Axis("tokens", Numbers(), "Tokens of a batch.", TOKENS, (1, 16, 256, 4096), (1, 20)),
        Axis("active", Numbers(), "Adapters that the batch uses.", (4,)),
        Axis("slots", Numbers(), "Adapters in the weights, one number for each of --active; as many unless told."),
        Axis("base", Shares(), "Shares of tokens without an adapter; 1: no token has one.", (0.0, 1.0)),
        ROUTING,
        Axis("quant", Words(BASE_QUANTS), "FP8 weights with a scale for each of these; mx: MXFP4; none: 16 bits.", ("none",)),
        Axis("act", Words(ACTS), "FP8 activations with a scale for each of these; none: 16 bits.", ("none",)),
    ),
    span=_span,
    forms=("bare", "overlap", "separate"),
    usual=("bare", "separate"),
    beside=("the layer without adapters in the same rounds", {"impl": f"{OURS}:bare"}),
)
