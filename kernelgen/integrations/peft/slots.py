"""Adapters that come and go while captured graphs run.

A token says which of L slots its adapter is in. The factors are somewhere else: in one of L + spare places of the buffers, and a
table on the device says in which. ``mapping`` looks it up, as the first thing of a step and inside of its graph; routes and ops
take places for adapters. To load an adapter is to fill a place that no slot points to, on a stream of its own, and then to write
one entry of the table. A step sees the adapter of before or the new one, all of it, and waits for neither; no other place is
written.

A place that was left is filled again when no step can read it any more: its entry was overwritten, and the steps that were
launched until then are done. With one spare place the second of two loads in a row waits on the host for the copy of the first.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import os
import threading
from typing import Any, Iterator, Mapping, Sequence

import torch

from .adapter import (
    Adapter,
    AdapterError,
    ExpertPart,
    ExpertShape,
    LayerBuffers,
    LinearBuffers,
    LinearShape,
    SliceBuffers,
    checked_shape,
)
from .files import AdapterFiles
from .read import read_adapter
from .stack import (
    check_buffers,
    check_layers,
    check_rest,
    empty_linear,
    fill,
    rank_of,
    share_first,
    slices_of,
    with_experts,
)

_NOWHERE = -1
Key = tuple[int | str, str, str]  # layer or name of it, part or module, side


@dataclasses.dataclass(frozen=True)
class PackedAdapter:
    """An adapter as a place of the buffers of some ``AdapterSlots`` has it, on the host; pinned where they are on a GPU."""

    name: str
    layout: object  # of the slots that it was made for
    tensors: Mapping[Key, torch.Tensor]  # of factors that it has; others are zero
    flags: torch.Tensor  # [2, layers] int32: whether it changes a layer, and its rank there


class AdapterSlots:
    """Buffers for L adapters of one model, and which of them hold what.

    Args:
        shape: the routed experts of the model; None: it has none.
        layers: the decoder layers that have routed experts.
        linears: the linear layers that adapters may change, as ``stack_linears`` takes them.
        slots: how many adapters can be served at once (L).
        rank: the largest rank; factors of smaller ones are padded with zeros. A multiple of 8 keeps rows 16-byte aligned.
        dtype: bfloat16 or float16, that of the activations; or float32, float64.
        part: what of the experts is here, as for ``stack_adapters``.
        share_first: whether gate and up share their first factors, as in PEFT's adapters on fused parameters: half of the bytes
            of these; adapters with factors of their own are refused.
        allow_rest: whether adapters may have linear layers that are none of ``linears``, or convolutions.
        spare: places beside those of the slots; with more, loads in a row wait for each other less.
        stream: the CUDA stream that steps run on; None: the current one.

    Raises:
        ValueError: an argument is none of those named here.

    Attributes:
        layers: the buffers by decoder layer, [L + spare, E, ...], at addresses that never change.
        linears: likewise, by name.
        versions: [L] int32 on the device: how many times a slot was changed, written with the table.
    """

    def __init__(
        self,
        shape: ExpertShape | None = None,
        layers: Sequence[int] = (),
        *,
        slots: int,
        rank: int,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        linears: Mapping[str, LinearShape] | None = None,
        part: ExpertPart | None = None,
        share_first: bool = False,
        allow_rest: bool = False,
        spare: int = 1,
        stream: torch.cuda.Stream | None = None,
    ) -> None:
        check_buffers(dtype, device, slots=slots, rank=rank, spare=spare)
        if None in (slots, rank, spare):
            raise ValueError("slots, rank, spare: got None, wanted whole numbers")
        if (shape is None) != (not layers) or not all(type(i) is int and i >= 0 for i in layers):
            found = f"{shape!r} and {layers!r:.60}"
            raise ValueError(f"shape, layers: got {found}, wanted experts and the layers that have them, or neither")
        self._shape = None if shape is None else checked_shape(shape)
        self._shapes = dict(linears or {})
        check_layers(self._shapes)
        self._part, self._allow_rest = part, allow_rest
        self._share_first = share_first and (self._shape is None or self._shape.gated)
        self._rank, self._dtype = rank, dtype
        self._device = torch.empty(0, device=device).device
        places = slots + spare
        self._buffers: dict[Key, torch.Tensor] = {}
        self._indices = sorted(set(layers))
        local = None if self._shape is None else self._shape if part is None else part.of(self._shape)
        # adapter_enabled and lora_ranks of every layer
        self._flags = torch.zeros(2, len(self._indices), places, dtype=torch.int32, device=self._device)
        self.layers = {index: self._experts(row, index, local, places) for row, index in enumerate(self._indices) if local}
        self.linears = {name: self._linear(name, shape, places) for name, shape in self._shapes.items()}
        # Place and version of every slot, between two rows for tokens whose adapter is in none.
        self._state = torch.tensor([[_NOWHERE, 0]] * (slots + 2), dtype=torch.int32, device=self._device)
        self.versions = self._state[1:-1, 1]
        self._places = [_NOWHERE] * slots
        self._counts = [0] * slots
        self._free: collections.deque[tuple[int, torch.cuda.Event | None]] = collections.deque(
            (place, None) for place in range(places)
        )
        self._lock = threading.Lock()
        self._copies = self._steps = None
        if self._device.type == "cuda":
            self._steps = stream or torch.cuda.current_stream(self._device)
            self._copies = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call, unused-ignore]
            self._copies.wait_stream(torch.cuda.current_stream(self._device))

    def mapping(self, token_slots: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """The place of each token's adapter, [T] int32, as routes and ops take it; to be called once a step, inside of its graph.

        Args:
            token_slots: [T] int32, the slot of each token, -1, or any that is not in [0, L): none.
            out: [T] int32; None makes it.

        Raises:
            ValueError: the slots are something else.
        """
        if not isinstance(token_slots, torch.Tensor) or token_slots.dtype != torch.int32 or token_slots.dim() != 1:
            found = getattr(token_slots, "dtype", type(token_slots).__name__)
            raise ValueError(f"token_slots: got {found} {list(getattr(token_slots, 'shape', []))}, wanted [T] torch.int32")
        row = token_slots.clamp(-1, len(self._places)) + 1
        return torch.index_select(self._state[:, 0], 0, row, out=out)

    def version(self, slot: int) -> int:
        """How many times a slot was changed, as far as the host has asked for it."""
        self._check(slot)
        return self._counts[slot]

    def pack(
        self, adapter: Adapter | AdapterFiles | str | os.PathLike[str], *, allow_empty: bool = False, **options: Any
    ) -> PackedAdapter:
        """An adapter as ``load`` copies it. It changes nothing here, so that any thread may do it in advance.

        Args:
            adapter: from ``read_adapter``; or what that reads, with ``options``.
            allow_empty: whether it may have nothing that is served here.

        Raises:
            AdapterError: it does not fit into the buffers.
        """
        if not isinstance(adapter, Adapter):
            adapter = read_adapter(adapter, self._shape, allow_empty=True, **options)
        elif options:
            raise ValueError(f"got {', '.join(options)} with an Adapter, which was read already")
        if not self._allow_rest:
            check_rest(adapter, self._shapes)
        if unknown := sorted(adapter.layers.keys() - set(self._indices)):
            raise AdapterError(f"{adapter.name}: got factors of layers {unknown}, wanted some of {self._indices}")
        if self._shape is not None:
            adapter = with_experts(adapter, self._shape, self._part)
        sources: dict[Key, torch.Tensor] = {}
        pinned = self._copies is not None
        flags = torch.zeros(2, len(self._indices), dtype=torch.int32, pin_memory=pinned)
        for row, index in enumerate(self._indices):
            parts = adapter.layers.get(index, {})
            flags[:, row] = torch.tensor([bool(parts), rank_of(parts)])
            shared = self._share_first and parts.keys() & {"gate", "up"}
            if shared and not share_first(parts):
                raise AdapterError(
                    f"{adapter.name}: layer {index}: got gate and up with first factors of their own, wanted the same\n"
                    "  hint: share_first=False has room for both"
                )
            for name, factors in parts.items():
                sources |= {(index, name, side): factor for side, factor in zip("ab", factors, strict=True)}
            if shared:
                del sources[index, "up", "a"]
        for name, shape in self._shapes.items():
            for module, factors in slices_of(adapter, name, shape).items():
                sources |= {(name, module, side): factor for side, factor in zip("ab", factors, strict=True)}
        if not (sources or allow_empty):
            raise AdapterError(f"{adapter.name}: got nothing that is served here, wanted some, or allow_empty=True")
        widest = max((s.shape[-2 if key[2] == "a" else -1] for key, s in sources.items()), default=0)
        if widest > self._rank:
            raise AdapterError(f"{adapter.name}: got rank {widest}, wanted at most {self._rank}, that of the buffers")
        tensors = {}
        for key, source in sources.items():
            like = self._buffers[key]
            tensors[key] = torch.zeros(like.shape[1:], dtype=self._dtype, pin_memory=pinned)
            where = "" if isinstance(key[0], str) else f"layer {key[0]}, "
            fill(tensors[key], source, f"{adapter.name}: {where}{key[1]}, {key[2]}")
        return PackedAdapter(adapter.name, self, tensors, flags)

    def load(self, slot: int, adapter: PackedAdapter | Adapter | AdapterFiles | str | os.PathLike[str], **options: Any) -> None:
        """Put an adapter into a slot, in the place of what is there; steps that run go on with that until it is copied.

        Not while a graph is captured, in no thread.

        Args:
            adapter: from ``pack``; or what that takes, with ``options``.

        Raises:
            AdapterError: it does not fit into the buffers; the slot is as it was.
            ValueError: there is no such slot.
        """
        self._check(slot)
        packed = adapter if isinstance(adapter, PackedAdapter) else self.pack(adapter, **options)
        if packed.layout is not self:
            raise ValueError(f"{packed.name}: got an adapter that was packed for other slots, wanted one of pack() of these")
        with self._lock:
            place, left = self._free.popleft()
            try:
                if left is not None and self._copies is not None and self._steps is not None:
                    left.synchronize()  # from now on no step begins that reads this place,
                    self._copies.wait_event(self._steps.record_event())  # and those that may are done
                with self._copying():
                    self._fill(place, packed)
                self._point(slot, place)
            except BaseException:
                self._free.appendleft((place, left))
                raise

    def drop(self, slot: int) -> None:
        """Empty a slot: tokens that name it have no adapter.

        Raises:
            ValueError: there is no such slot, or nothing in it.
        """
        self._check(slot)
        with self._lock:
            if self._places[slot] == _NOWHERE:
                raise ValueError(f"slot: got {slot}, which is empty, wanted one with an adapter")
            self._point(slot, _NOWHERE)

    def wait(self) -> None:
        """Wait on the host until all that was asked for is done."""
        if self._copies is not None:
            self._copies.synchronize()

    def _experts(self, row: int, index: int, local: ExpertShape, places: int) -> LayerBuffers:
        def new(name: str, side: str) -> torch.Tensor:
            wide, tall = local.widths(name)
            size = (self._rank, wide) if side == "a" else (tall, self._rank)
            buffer = torch.zeros(places, local.num_experts, *size, dtype=self._dtype, device=self._device)
            return self._buffers.setdefault((index, name, side), buffer)

        first, *rest = local.slices
        a = [new(first, "a")]
        a += a if self._share_first else [new(name, "a") for name in rest]
        gate_up = SliceBuffers(tuple(a), tuple(new(name, "b") for name in local.slices))
        ranks = self._flags[1, row] if self._rank > 16 else None  # kernels read 16 ranks at least
        return LayerBuffers(gate_up, SliceBuffers((new("down", "a"),), (new("down", "b"),)), self._flags[0, row], ranks)

    def _linear(self, name: str, shape: LinearShape, places: int) -> LinearBuffers:
        made = empty_linear(shape, places, self._rank, self._dtype, self._device, list(shape.slices))
        for module, at in made.at.items():
            self._buffers |= {(name, module, "a"): made.buffers.a[at], (name, module, "b"): made.buffers.b[at]}
        return made.buffers

    def _fill(self, place: int, packed: PackedAdapter) -> None:
        for key, buffer in self._buffers.items():
            source = packed.tensors.get(key)
            if source is None:
                buffer[place].zero_()
            else:
                buffer[place].copy_(source, non_blocking=True)
        self._flags[:, :, place].copy_(packed.flags.to(self._device, non_blocking=True))

    def _point(self, slot: int, place: int) -> None:
        """Write an entry of the table behind all copies, and free the place that it had; nothing changes if that fails."""
        version = self._counts[slot] + 1
        entry = torch.tensor([place, version], dtype=torch.int32, pin_memory=self._copies is not None)
        with self._copying():
            self._state[slot + 1].copy_(entry, non_blocking=True)
            left = None if self._copies is None else self._copies.record_event()
        if self._places[slot] != _NOWHERE:
            self._free.append((self._places[slot], left))
        self._places[slot], self._counts[slot] = place, version

    @contextlib.contextmanager
    def _copying(self) -> Iterator[None]:
        with contextlib.nullcontext() if self._copies is None else torch.cuda.stream(self._copies):
            yield

    def _check(self, slot: Any) -> None:
        if type(slot) is not int or not 0 <= slot < len(self._places):
            raise ValueError(f"slot: got {slot!r}, wanted a number from 0 to {len(self._places) - 1}")
