"""Dense LoRA: shrink and expand of the linear layers of a model, with the route made beforehand."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any, Iterator, Literal, Mapping, get_args

from kernelgen.measure.models import LAYERS, Layer
from kernelgen.measure.options import Numbers, Words
from kernelgen.measure.suite import QUANTS, Axis, Quant, Suite, Work, adapters, matrix_bytes
from kernelgen.measure.suite import Cell as AnyCell

Site = Literal["qkv", "o", "gate_up", "down"]
SITES: tuple[Site, ...] = get_args(Site)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cell(AnyCell):
    """One point of the sweep. ``active``, ``slots``: adapters that the batch uses, in turns, and that the weights hold."""

    model: str
    site: Site
    rank: int
    active: int = 4
    slots: int = 4
    quant: Quant = "none"

    @property
    def layer(self) -> Layer:
        """The sizes."""
        return LAYERS[self.model][self.site]

    @property
    def work(self) -> Work:
        """A and B of each adapter that is used are read once, x is read once, ``out`` is read and written."""
        k, width, used = self.layer.k, sum(self.layer.widths), min(self.active, self.tokens)
        a = len(self.layer.widths) * matrix_bytes(self.quant, self.rank, k)
        b = sum(matrix_bytes(self.quant, n, self.rank) for n in self.layer.widths)
        flops = 2.0 * self.tokens * self.rank * (len(self.layer.widths) * k + width)
        return Work(used * (a + b) + 2.0 * self.tokens * (k + 2 * width), flops)


def _span(values: Mapping[str, Any]) -> Iterator[Cell]:
    used = adapters(values["active"], values["slots"])
    sweep = (values["models"], values["sites"], values["ranks"], used, values["tokens"], values["quant"])
    for model, site, rank, (active, slots), tokens, quant in itertools.product(*sweep):
        yield Cell(model=model, site=site, rank=rank, tokens=tokens, active=active, slots=slots, quant=quant)


SUITE = Suite(
    name="lora",
    title="Dense LoRA: shrink and expand of linear layers.",
    cell=Cell,
    axes=(
        Axis("models", Words(tuple(LAYERS)), "Model shapes.", ("llama-3-8b",), tiny=("tiny",)),
        Axis("sites", Words(SITES), "qkv, o, gate_up, down.", SITES, ("qkv", "down")),
        Axis("ranks", Numbers(), "LoRA ranks.", (16, 64), tiny=(16,)),
        Axis("tokens", Numbers(), "Tokens of a batch.", (1, 16, 64, 256, 1024, 4096), (1, 16, 256, 4096), (1, 20)),
        Axis("active", Numbers(), "Adapters that the batch uses.", (4, 1)),
        Axis("slots", Numbers(), "Adapters in the weights: one number for all, or one for each of --active.", (4,)),
        Axis("quant", Words(QUANTS), "FP8 weights with a scale a tensor, channel or group; none: of 16 bits.", ("none",)),
    ),
    span=_span,
    peers=("vllm", "torch"),
    beside=("our 16-bit weights", {"quant": "none"}),
)
