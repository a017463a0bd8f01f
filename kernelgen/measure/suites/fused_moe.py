"""The base MoE: whole layers behind their router, their two products, and the launches around these."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any, Iterator, Literal, Mapping, get_args

from kernelgen.measure.options import Numbers, Words
from kernelgen.measure.suite import ACTS, BASE_QUANTS, Act, Axis, Quant, Suite, Work, matrix_bytes, quant_forms
from kernelgen.measure.suites.mixtures import ROUTING, TOKENS, MixtureCell, model_axes, models_of

# layer: all of it, with the routing given and the sum included; w13 (with its activation) and w2: a product, with its tables made
# beforehand; align: the tables; quant: what makes FP8 of the rows between the products; sum: of the experts of a token.
Site = Literal["layer", "w13", "w2", "align", "quant", "sum"]
SITES: tuple[Site, ...] = get_args(Site)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cell(MixtureCell):
    """One point of the sweep."""

    site: Site
    quant: Quant = "none"
    act: Act = "none"

    def work(self, hit: float) -> Work:
        """What must move and be computed for a batch that hits so many experts: a weight once, and the rows at both ends."""
        m = self.model
        halves = 2 if m.gated else 1
        w13 = hit * halves * matrix_bytes(self.quant, m.intermediate, m.hidden)
        w2 = hit * matrix_bytes(self.quant, m.hidden, m.intermediate)
        x = matrix_bytes(self.act, self.tokens, m.hidden, 1)
        h, h_16 = (matrix_bytes(act, self.pairs, m.intermediate, 1) for act in (self.act, "none"))
        y, out = 2.0 * self.pairs * m.hidden, 2.0 * self.tokens * m.hidden
        flops = 2.0 * self.pairs * m.hidden * m.intermediate
        fp8 = "none" not in (self.quant, self.act)
        if self.site == "layer":
            return Work(w13 + w2 + x + out, (halves + 1) * flops, fp8)
        if self.site == "w13":
            return Work(w13 + x + h_16, halves * flops, fp8)
        if self.site == "w2":
            return Work(w2 + h + y, flops, fp8)
        moved = {"align": 4.0 * 2 * self.pairs, "quant": h_16 + h, "sum": y + out}
        return Work(moved[self.site], 0.0)


def _span(values: Mapping[str, Any]) -> Iterator[Cell]:
    """Tables and sums depend neither on weights nor on activations."""
    sweep = (models_of(values), quant_forms(values), values["sites"], values["tokens"], values["routing"])
    for model, (quant, act), site, tokens, routing in itertools.product(*sweep):
        cell = Cell(model=model, site=site, tokens=tokens, routing=routing)
        if site in ("align", "sum"):
            yield cell
        elif site != "quant" or act != "none":
            yield dataclasses.replace(cell, quant=quant, act=act)


_QUANTS = ("none", "group")
SUITE = Suite(
    name="fused_moe",
    title="The base MoE: whole layers, and the parts that they are made of.",
    cell=Cell,
    axes=(
        *model_axes(("qwen3-30b-a3b", "deepseek-v3"), ("qwen3-30b-a3b",)),
        Axis("sites", Words(SITES), "layer; its parts w13, w2, align, quant, sum.", ("layer", "align", "sum"), ("layer",), SITES),
        Axis("tokens", Numbers(), "Tokens of a batch.", TOKENS, (1, 16, 256, 4096), (1, 20)),
        ROUTING,
        Axis("quant", Words(BASE_QUANTS), "FP8 weights with a scale for each of these; mx: MXFP4; none: 16 bits.", _QUANTS),
        Axis("act", Words(ACTS), "FP8 activations with a scale for each of these; none: 16 bits.", _QUANTS),
    ),
    span=_span,
    peers=("vllm", "sglang", "triton_kernels", "deep_gemm", "torch"),
    beside=("our 16-bit layer", {"quant": "none", "act": "none"}),
)
