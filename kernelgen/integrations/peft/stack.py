"""Several adapters, side by side."""

from __future__ import annotations

from typing import Any, Mapping, NamedTuple, Sequence

import torch

from .adapter import (
    Adapter,
    AdapterError,
    ExpertPart,
    ExpertShape,
    Factors,
    LayerBuffers,
    LinearBuffers,
    LinearShape,
    SliceBuffers,
    checked_shape,
)

_MOST = 1 << 20  # adapters, or their rank
_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def stack_adapters(
    adapters: Sequence[Adapter],
    shape: ExpertShape,
    *,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    rank: int | None = None,
    max_loras: int | None = None,
    part: ExpertPart | None = None,
) -> dict[int, LayerBuffers]:
    """The buffers of every layer that some adapter changes; adapter l of ``adapters`` is slot l.

    Smaller ranks are padded with zeros. Where no adapter has an ``a`` of its own for gate and for up (the fused layout),
    both slices share one tensor; where in every adapter all experts share a factor, its buffer has a stride of 0 over E.

    Args:
        shape: the experts of the model.
        dtype: bfloat16 or float16, that of the activations; or float32, float64.
        rank: rank of the buffers; None: the largest of the adapters, rounded up to 8 so that rows stay 16-byte aligned.
        max_loras: slots L; None: as many as adapters. Slots without an adapter are zero and disabled.
        part: what of the experts is here, under expert or tensor parallelism; None: all.

    Raises:
        AdapterError: an adapter has a larger rank than the buffers, or there are more adapters than slots, or an adapter is of
            other experts than ``shape``, or its numbers are too large or too small for ``dtype``.
        ValueError: an argument is none of those named here.
    """
    check_buffers(dtype, device, rank=rank, max_loras=max_loras)
    shape = checked_shape(shape)
    _check_adapters(adapters)
    local = shape if part is None else part.of(shape)
    adapters = [with_experts(adapter, shape, part) for adapter in adapters]
    widest = max((adapter.rank for adapter in adapters), default=0)
    rank, slots = _sizes(widest, len(adapters), rank, max_loras)

    def stack(layer: int, name: str, side: str) -> torch.Tensor:
        sources = {
            slot: getattr(adapter.layers[layer][name], side)
            for slot, adapter in enumerate(adapters)
            if name in adapter.layers.get(layer, {})
        }
        shared = bool(sources) and all(source.stride(0) == 0 for source in sources.values())
        buffer = torch.zeros(
            slots, 1 if shared else local.num_experts, *_size(local.widths(name), side, rank), dtype=dtype, device=device
        )
        for slot, source in sources.items():
            fill(buffer[slot], source[:1] if shared else source, f"{adapters[slot].name}: layer {layer}, {name}, {side}")
        return buffer.expand(-1, local.num_experts, -1, -1)

    def buffers(layer: int) -> LayerBuffers:
        parts = [adapter.layers.get(layer, {}) for adapter in adapters]
        first, *rest = shape.slices
        a = [stack(layer, first, "a")]
        a += a if rest and all(share_first(p) for p in parts) else [stack(layer, name, "a") for name in rest]
        enabled, ranks = (torch.zeros(slots, dtype=torch.int32) for _ in range(2))
        enabled[: len(parts)] = torch.tensor([bool(p) for p in parts], dtype=torch.int32)
        of_adapters = [rank_of(p) for p in parts]
        ranks[: len(parts)] = torch.tensor(of_adapters, dtype=torch.int32)
        return LayerBuffers(
            SliceBuffers(tuple(a), tuple(stack(layer, name, "b") for name in shape.slices)),
            SliceBuffers((stack(layer, "down", "a"),), (stack(layer, "down", "b"),)),
            enabled.to(device),
            ranks.to(device) if any(-(-r // 16) < -(-rank // 16) for r in of_adapters) else None,
        )

    return {
        layer: buffers(layer)
        for layer in sorted({i for adapter in adapters for i in adapter.layers})
    }


def stack_linears(
    adapters: Sequence[Adapter],
    layers: Mapping[str, LinearShape],
    *,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    rank: int | None = None,
    max_loras: int | None = None,
    allow_rest: bool = False,
) -> dict[str, LinearBuffers]:
    """The buffers of every linear layer of ``layers`` that some adapter changes; adapter l of ``adapters`` is slot l.

    Ranks below the largest of a layer are padded with zeros, as are slices that an adapter leaves alone. A slice that all leave
    alone is left out in front of the others and behind them, and between them takes the memory of one slot of second factors.

    Args:
        layers: the layers by their names, each with the modules that adapters know it by.
        dtype, device, max_loras: as for ``stack_adapters``.
        rank: as there, of all layers; None: of each its own.
        allow_rest: whether adapters may have linear layers that are none of these, or convolutions.

    Raises:
        AdapterError: an adapter has a larger rank than the buffers, or there are more adapters than slots, or a linear layer
            that is none of these, or of other sizes, or numbers that are too large or too small for ``dtype``.
        ValueError: an argument is none of those named here.
    """
    check_buffers(dtype, device, rank=rank, max_loras=max_loras)
    _check_adapters(adapters)
    check_layers(layers)
    if not allow_rest:
        for adapter in adapters:
            check_rest(adapter, layers)
    stacked = {}
    for name, shape in layers.items():
        found = [slices_of(adapter, name, shape) for adapter in adapters]
        used = sorted({module for slices in found for module in slices}, key=list(shape.slices).index)
        if used:
            widest = max(factors.a.shape[0] for slices in found for factors in slices.values())
            r, slots = _sizes(widest, len(adapters), rank, max_loras)
            buffers = empty_linear(shape, slots, r, dtype, device, used)
            for slot, slices in enumerate(found):
                for module, factors in slices.items():
                    for side, factor, target in zip("ab", factors, buffers.slot(module, slot), strict=True):
                        fill(target, factor, f"{adapters[slot].name}: {module}, {side}")
            stacked[name] = buffers.buffers
    return stacked


class LinearSlots(NamedTuple):
    """The buffers of a linear layer, and where its modules are in them."""

    buffers: LinearBuffers
    at: Mapping[str, int]

    def slot(self, module: str, slot: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The factors of one adapter."""
        return self.buffers.a[self.at[module]][slot], self.buffers.b[self.at[module]][slot]


def empty_linear(
    shape: LinearShape, slots: int, rank: int, dtype: torch.dtype, device: torch.device | str, used: Sequence[str]
) -> LinearSlots:
    """Buffers of zeros from the first module that is used to the last.

    A module between them that is not has the first factors of its neighbour, and one slot of zeros for all second ones.
    """
    modules = list(shape.slices)
    first, last = modules.index(used[0]), modules.index(used[-1])
    a: list[torch.Tensor] = []
    b: list[torch.Tensor] = []
    for module in modules[first : last + 1]:
        own = module in used
        rows = shape.rows(module)
        a.append(torch.zeros(slots, rank, shape.columns, dtype=dtype, device=device) if own else a[-1])
        b.append(torch.zeros(slots if own else 1, rows, rank, dtype=dtype, device=device).expand(slots, -1, -1))
    start = sum(shape.rows(module) for module in modules[:first])
    at = {module: modules.index(module) - first for module in used}
    return LinearSlots(LinearBuffers(tuple(a), tuple(b), start), at)


def slices_of(adapter: Adapter, name: str, shape: LinearShape) -> dict[str, Factors]:
    """The factors of the modules of a layer that an adapter has, as far as they are here.

    Raises:
        AdapterError: they are of other sizes, or both of the layer as a whole and of its modules.
    """
    whole = adapter.linears.get(name) if name not in shape.slices else None
    found = {module: adapter.linears[module] for module in shape.slices if module in adapter.linears}
    if whole is not None and found:
        raise AdapterError(f"{adapter.name}: got factors of {name} and of {min(found)}, wanted one way")
    if whole is not None:
        _check_linear(adapter, name, whole, shape.inputs, sum(shape.slices.values()))
        parts = torch.split(whole.b, list(shape.slices.values()))
        found = {module: Factors(whole.a, b) for module, b in zip(shape.slices, parts, strict=True)}
    here = {}
    for module, factors in found.items():
        _check_linear(adapter, module, factors, shape.inputs, shape.slices[module])
        here[module] = shape.cut(module, factors)
    return here


def check_rest(adapter: Adapter, layers: Mapping[str, LinearShape]) -> None:
    """Raises AdapterError if it has more than routed experts and these layers: other linear layers, convolutions."""
    known = {*layers, *(module for shape in layers.values() for module in shape.slices)}
    if rest := sorted({*adapter.linears, *adapter.other} - known):
        more = f" and {len(rest) - 1} more" if len(rest) > 1 else ""
        raise AdapterError(
            f"{adapter.name}: got factors of {rest[0]}{more}, wanted those of the layers that are served, such as "
            f"{next(iter(layers), 'none')}\n  hint: allow_rest=True leaves them out"
        )


def with_experts(adapter: Adapter, shape: ExpertShape, part: ExpertPart | None) -> Adapter:
    """An adapter that was checked, with what of its experts is here.

    Raises:
        AdapterError: it is of other experts than ``shape``.
    """
    _check(adapter, shape)
    if part is None:
        return adapter
    layers = {i: {name: part.cut(name, f) for name, f in parts.items()} for i, parts in adapter.layers.items()}
    return Adapter(adapter.name, layers, adapter.other, adapter.linears)


def share_first(parts: Mapping[str, Factors]) -> bool:
    """Whether gate and up of one layer have no first factors of their own."""
    if "gate" in parts and "up" in parts:
        one, other = parts["gate"].a, parts["up"].a
        return one.data_ptr() == other.data_ptr() and one.stride() == other.stride()
    return not parts.keys() & {"gate", "up"}


def rank_of(parts: Mapping[str, Factors]) -> int:
    """The largest rank in a layer, 0 if there is none."""
    return max((factors.a.shape[-2] for factors in parts.values()), default=0)


def fill(target: torch.Tensor, source: torch.Tensor, where: str) -> None:
    """Put factors of one adapter into its slot, the rest of which is zero already.

    Raises:
        AdapterError: a number of them, or all of an expert, is lost in the dtype of ``target``; it begins with ``where``.
    """
    stored = source.detach().to(target.device, target.dtype)
    given, kept = (t if t.dim() == 3 else t[None] for t in (source, stored))
    lost = given.flatten(1).any(1).cpu() & ~kept.flatten(1).any(1).cpu()  # of an expert
    if not stored.isfinite().all() or lost.any():
        largest = given[lost].abs().max() if lost.any() else source.abs().max()
        raise AdapterError(
            f"{where}: got numbers up to {largest:g}, scaling included, wanted numbers that {target.dtype} can hold\n"
            "  hint: torch.bfloat16 has the range of float32"
        )
    target[..., : source.shape[-2], : source.shape[-1]] = stored


def check_buffers(dtype: torch.dtype, device: torch.device | str, **numbers: int | None) -> None:
    """Raises ValueError for what no buffers can be made of; ``numbers`` are above 0, or None."""
    if dtype not in _DTYPES:
        raise ValueError(f"dtype: got {dtype}, wanted bfloat16, float16, float32 or float64")
    for name, number in numbers.items():
        if number is not None and (type(number) is not int or not 0 < number <= _MOST):
            raise ValueError(
                f"{name}: got {number!r}, wanted a whole number from 1 to {_MOST}, or None"
            )
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, TypeError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(
            f"device: got {device!r}, wanted one that torch can use here ({reason})"
        ) from None
    if torch.empty(0, device=device).is_meta:
        raise ValueError("device: got meta, wanted one that holds numbers")


def _size(widths: tuple[int, int], side: str, rank: int) -> tuple[int, int]:
    return (rank, widths[0]) if side == "a" else (widths[1], rank)


def _sizes(widest: int, adapters: int, rank: int | None, max_loras: int | None) -> tuple[int, int]:
    """Rank and slots of buffers for so many adapters."""
    rank = max(8, -(-widest // 8) * 8) if rank is None else rank
    slots = adapters if max_loras is None else max_loras
    if adapters > slots or widest > rank:
        raise AdapterError(
            f"got {adapters} adapters of rank up to {widest}, wanted at most {slots} of rank up to {rank}"
        )
    return rank, slots


def _check_adapters(adapters: Any) -> None:
    if not isinstance(adapters, (list, tuple)) or not all(isinstance(a, Adapter) for a in adapters):
        kinds = [adapters] if not isinstance(adapters, (list, tuple)) else adapters
        found = ", ".join(dict.fromkeys(type(one).__name__ for one in kinds))
        raise ValueError(f"adapters: got {found}, wanted a list of what read_adapter returns")


def check_layers(layers: Any) -> None:
    """Raises ValueError unless every layer is a LinearShape, and every module in one."""
    if not isinstance(layers, Mapping):
        raise ValueError(f"layers: got {type(layers).__name__}, wanted a LinearShape by the name of each layer")
    taken: dict[str, str] = {}
    for name, shape in layers.items():
        if not isinstance(shape, LinearShape):
            raise ValueError(f"layers: {name}: got {type(shape).__name__}, wanted a LinearShape")
        shape.check(name)
        for module in dict.fromkeys((name, *shape.slices)):
            if taken.setdefault(module, name) != name:
                raise ValueError(f"layers: got {module} in {taken[module]} and in {name}, wanted it in one")


def _check_linear(adapter: Adapter, name: str, factors: Any, inputs: int, outputs: int) -> None:
    a, b = _factors_of(f"{adapter.name}: {name}: got", factors)
    r = b.shape[-1] if b.dim() else None
    if (*a.shape, *b.shape) != (r, inputs, outputs, r):
        raise AdapterError(
            f"{adapter.name}: {name}: got factors {list(a.shape)} and {list(b.shape)}, wanted [r, {inputs}] and [{outputs}, r]"
        )


def _check(adapter: Adapter, shape: ExpertShape) -> None:
    """Adapters may be made by hand, too."""
    layers = adapter.layers if isinstance(adapter.layers, Mapping) else {None: adapter.layers}
    for layer, parts in layers.items():
        if type(layer) is not int or not isinstance(parts, Mapping):
            raise AdapterError(
                f"{adapter.name}: layers: got {layer!r}: {type(parts).__name__}, wanted the number of a layer and its parts"
            )
        for name, factors in parts.items():
            where = f"{adapter.name}: layer {layer}, {name}: got"
            if name not in (*shape.slices, "down"):
                raise AdapterError(f"{where} a part that is not known, wanted {', '.join(shape.slices)} or down")
            (a, b), (wide, tall) = _factors_of(where, factors), shape.widths(name)
            r = b.shape[-1] if b.dim() else None
            if (*a.shape, *b.shape) != (shape.num_experts, r, wide, shape.num_experts, tall, r):
                raise AdapterError(
                    f"{where} factors {list(a.shape)} and {list(b.shape)}, wanted those of {shape}"
                )


def _factors_of(where: str, factors: Any) -> Factors:
    found = factors if isinstance(factors, Factors) else (factors,)
    if len(found) != 2 or not all(
        isinstance(factor, torch.Tensor) and factor.is_floating_point() for factor in found
    ):
        kinds = ", ".join(str(getattr(f, "dtype", type(f).__name__)) for f in found)
        raise AdapterError(f"{where} {kinds}, wanted Factors of floating-point numbers")
    made = Factors(*found)
    if made.a.is_meta or made.b.is_meta:
        raise AdapterError(f"{where} factors on meta, wanted numbers")
    return made
