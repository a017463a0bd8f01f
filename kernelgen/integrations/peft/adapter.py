"""What an adapter is once it is read, and once it is stacked with others."""

from __future__ import annotations

import dataclasses
from types import MappingProxyType
from typing import Any, Mapping, NamedTuple

import torch


class AdapterError(ValueError):
    """An adapter that cannot be served as it is written; the message names the folder, what was found and what was wanted."""


class ExpertShape(NamedTuple):
    """The experts of a model: ``hidden`` is the width of x, ``intermediate`` the width of gate and of up."""

    num_experts: int
    hidden: int
    intermediate: int

    @property
    def gated(self) -> bool:
        """Whether there is a gate beside up."""
        return True

    @property
    def slices(self) -> tuple[str, ...]:
        """The parts of the first product."""
        return ("gate", "up") if self.gated else ("up",)

    @property
    def parameters(self) -> tuple[str, str]:
        """The parts that transformers has as fused parameters."""
        return "gate_up" if self.gated else "up", "down"

    def widths(self, part: str) -> tuple[int, int]:
        """(in, out) of "gate", "up", "gate_up" or "down"."""
        if part == "down":
            return self.intermediate, self.hidden
        return self.hidden, self.intermediate * (2 if part == "gate_up" else 1)

    def all_widths(self) -> set[tuple[int, int]]:
        """Those of every projection."""
        return {self.widths(part) for part in (*self.slices, *self.parameters)}


class UngatedShape(ExpertShape):
    """The experts of a model without a gate, as in Nemotron-H: up and down alone."""

    __slots__ = ()

    @property
    def gated(self) -> bool:
        """Whether there is a gate beside up."""
        return False

    def __eq__(self, other: object) -> bool:
        return isinstance(other, UngatedShape) and tuple(self) == tuple(other)

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __hash__(self) -> int:
        return hash((UngatedShape, *self))


def checked_shape(shape: Any) -> ExpertShape:
    """Three sizes as an ExpertShape.

    Raises:
        ValueError: they are something else.
    """
    sizes = tuple(shape) if isinstance(shape, (tuple, list)) else ()
    if len(sizes) != 3 or not all(type(size) is int and 0 < size < 1 << 31 for size in sizes):
        raise ValueError(f"shape: got {shape!r}, wanted an ExpertShape of sizes from 1 to 2^31 - 1")
    return shape if isinstance(shape, ExpertShape) else ExpertShape(*sizes)


class ExpertPart(NamedTuple):
    """What of a layer's experts is here: some of them, or some columns of gate and up, which are rows of down.

    With columns, an adapter's delta is this GPU's part of a sum, as the layer's own output is: first factors of gate and up, and
    second factors of down, are here as a whole.
    """

    experts: range | None = None  # None: all
    intermediate: range | None = None  # None: all

    def of(self, shape: ExpertShape) -> ExpertShape:
        """The sizes that are here.

        Raises:
            ValueError: a range is not of them.
        """
        experts = _checked_range("part: experts", self.experts, shape.num_experts)
        columns = _checked_range("part: intermediate", self.intermediate, shape.intermediate)
        return shape._replace(num_experts=len(experts), intermediate=len(columns))

    def cut(self, part: str, factors: Factors) -> Factors:
        """The factors of "gate", "up" or "down" that are here, as views."""
        a, b = (factor if self.experts is None else factor[_slice(self.experts)] for factor in factors)
        if self.intermediate is not None and part == "down":
            a = a[:, :, _slice(self.intermediate)]
        elif self.intermediate is not None:
            b = b[:, _slice(self.intermediate)]
        return Factors(a, b)


class LinearShape(NamedTuple):
    """A linear layer as it is served: modules that adapters know, side by side in its output; or what of it is here.

    An embedding is one from its vocabulary.
    """

    inputs: int
    slices: Mapping[str, int]  # the modules by their names in the base model, in order -> outputs of each
    here: Mapping[str, range] = MappingProxyType({})  # outputs of modules that are on this GPU; of those that are not named: all
    inputs_here: range | None = None  # inputs that are on this GPU, None: all

    @property
    def columns(self) -> int:
        """Inputs that are here."""
        return self.inputs if self.inputs_here is None else len(self.inputs_here)

    def rows(self, module: str) -> int:
        """Outputs of a module that are here."""
        return len(self.here.get(module, range(self.slices[module])))

    def cut(self, module: str, factors: Factors) -> Factors:
        """The factors of a module that are here, as views."""
        a, b = factors
        if self.inputs_here is not None:
            a = a[:, _slice(self.inputs_here)]
        if module in self.here:
            b = b[_slice(self.here[module])]
        return Factors(a, b)

    def check(self, name: str) -> None:
        """Raises ValueError, for a layer of this name, unless its sizes are some, and its ranges are of these."""
        sizes = {"inputs": self.inputs, **self.slices} if isinstance(self.slices, Mapping) and self.slices else {"slices": None}
        for what, size in sizes.items():
            if type(size) is not int or not 0 < size < 1 << 31:
                raise ValueError(f"layers: {name}: {what}: got {size!r}, wanted a size from 1 to 2^31 - 1")
        for what, some in {"inputs_here": self.inputs_here, **self.here}.items():
            if what != "inputs_here" and what not in self.slices:
                raise ValueError(f"layers: {name}: here: got {what}, wanted some of {', '.join(self.slices)}")
            _checked_range(f"layers: {name}: {what}", some, self.inputs if what == "inputs_here" else self.slices[what])


def _checked_range(name: str, some: Any, size: int) -> range:
    if some is None:
        return range(size)
    if not isinstance(some, range) or some.step != 1 or not 0 <= some.start < some.stop <= size:
        raise ValueError(f"{name}: got {some!r}, wanted a range of some of {size}, or None")
    return some


def _slice(some: range) -> slice:
    return slice(some.start, some.stop)


class Factors(NamedTuple):
    """One low-rank update, scaling folded into ``b``: delta W = b . a; of E experts, delta W[e] = b[e] . a[e].

    A factor that all experts share has a stride of 0 over E.
    """

    a: torch.Tensor  # [E, r, in] float32; of a linear layer [r, in]
    b: torch.Tensor  # [E, out, r] float32; of a linear layer [out, r]


@dataclasses.dataclass(frozen=True)
class Adapter:
    """One adapter: ``layers[i]`` maps "gate", "up" and "down" of decoder layer i to their factors, where it has any.

    ``linears`` has the factors of linear layers by their names in the base model: of attention, routers, shared experts and
    heads; of embeddings too, to which a token is a 1 among zeros (``in`` is the vocabulary). ``other`` names these, and what
    else has factors and is no routed expert (convolutions), or one outside of the ``prefix`` that was asked for: that is the
    caller's to serve.
    """

    name: str
    layers: Mapping[int, Mapping[str, Factors]]
    other: tuple[str, ...]
    linears: Mapping[str, Factors] = dataclasses.field(default_factory=dict)

    @property
    def rank(self) -> int:
        """The largest rank in it, 0 if it has no experts."""
        return max(
            (f.a.shape[1] for layer in self.layers.values() for f in layer.values()), default=0
        )


class SliceBuffers(NamedTuple):
    """``lora_a`` and ``lora_b`` of one ``moe_lora`` call, one tensor a slice."""

    a: tuple[torch.Tensor, ...]  # [L, E, rank, in]
    b: tuple[torch.Tensor, ...]  # [L, E, out, rank]


class LayerBuffers(NamedTuple):
    """All adapters of one decoder layer; slot l of the buffers is adapter l."""

    gate_up: SliceBuffers  # two slices, gate and up; of experts without a gate, up
    down: SliceBuffers  # one slice
    adapter_enabled: torch.Tensor  # [L] int32, 0: the adapter leaves this layer alone
    # [L] int32, the largest rank of each adapter in this layer, behind which factors are zero; None: kernels would gain nothing
    lora_ranks: torch.Tensor | None = None


class LinearBuffers(NamedTuple):
    """``lora_a``, ``lora_b`` and ``offset_start`` of one ``lora`` call: all adapters of a linear layer, one tensor a slice."""

    a: tuple[torch.Tensor, ...]  # [L, rank, in]
    b: tuple[torch.Tensor, ...]  # [L, out, rank]
    offset_start: int  # outputs in front of the first slice
