"""The elements that tensors in memory stand for: of each float a shadow, found by its address.

A tensor that nobody wrote to while the mode is on is an input: its elements are random, a function of its memory and the place
in it. Kernels and formulas read and write the same memory, so that a view of it needs no thought.
"""

from __future__ import annotations

import mmap
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from kernelgen.prove.exact import field
from kernelgen.prove.exact.field import Elements
from kernelgen.prove.memory import Lost

_LARGE = 2**24  # bytes; what is larger is sparse, and few of its pages may be touched


class _Storage:
    """The memory of a tensor, and the elements of the floats that begin at its bytes."""

    def __init__(self, memory: torch.UntypedStorage, number: int) -> None:
        self.memory = memory  # kept, so that no other takes its place
        self.first = memory.data_ptr()
        self.seed = field.scrambled(np.array([number], np.uint64)) << np.uint64(1)
        self.written: Elements | None = None  # element + 1, of each byte; 0: none was written
        self.lost = ""  # what made numbers of it without elements

    def read(self, offsets: NDArray[np.uint64]) -> Elements:
        """The elements at these bytes; what was not written is drawn."""
        if self.written is None:
            return field.scrambled(self.seed + offsets)
        found: Elements = self.written[offsets.astype(np.int64)]
        if found.all():
            found -= np.uint64(1)  # of its own: the index copies
            return found
        return np.where(found == 0, field.scrambled(self.seed + offsets), found - np.uint64(1))

    def write(self, offsets: NDArray[np.uint64], elements: Elements) -> None:
        self.cells()[offsets.astype(np.int64)] = elements + np.uint64(1)

    def cells(self) -> Elements:
        if self.written is None:
            self.written = _zeros(self.memory.nbytes())
        return self.written

    def view(self, tensor: torch.Tensor) -> Elements:
        """The cells of a tensor in this memory."""
        size = tensor.element_size()
        strides = [8 * size * stride for stride in tensor.stride()]
        first = 8 * (tensor.data_ptr() - self.first)
        cells: Elements = np.ndarray(tuple(tensor.shape), np.uint64, self.cells(), first, strides)
        return cells


class Memory:
    """All memory that kernels and formulas have touched."""

    def __init__(self) -> None:
        self._storages: dict[int, _Storage] = {}
        self._firsts: NDArray[np.uint64] = np.zeros(0, np.uint64)

    def storage(self, tensor: torch.Tensor) -> _Storage:
        """That of a tensor with elements."""
        memory = tensor.untyped_storage()
        found = self._storages.get(memory.data_ptr())
        if found is None:
            found = self._storages[memory.data_ptr()] = _Storage(memory, len(self._storages))
        return found

    def read_tensor(self, tensor: torch.Tensor) -> Elements:
        """The elements of a tensor of floats."""
        if tensor.numel() == 0:
            return np.zeros(tuple(tensor.shape), np.uint64)
        storage = self.storage(tensor)
        _refuse_lost(storage)
        if storage.written is not None:
            found = storage.view(tensor)
            if found.all():
                return np.asarray(found - np.uint64(1))
        return storage.read(_offsets(tensor) + np.uint64(tensor.data_ptr() - storage.first))

    def write_tensor(self, tensor: torch.Tensor, elements: Elements) -> None:
        """Note them, of the shape of the tensor or one that is broadcast to it."""
        self.storage(tensor).view(tensor)[...] = elements + np.uint64(1)

    def read(self, addresses: NDArray[np.uint64]) -> Elements:
        """The elements of the floats at these addresses."""
        elements = np.empty(addresses.shape, np.uint64)
        for storage, lanes in self._parts(addresses):
            _refuse_lost(storage)
            elements[lanes] = storage.read(addresses[lanes] - np.uint64(storage.first))
        return elements

    def noted(self, addresses: NDArray[np.uint64]) -> Elements:
        """What was written for these addresses, + 1; 0: nothing."""
        notes = np.zeros(addresses.shape, np.uint64)
        for storage, lanes in self._parts(addresses):
            if storage.written is not None:
                notes[lanes] = storage.written[(addresses[lanes] - np.uint64(storage.first)).astype(np.int64)]
        return notes

    def write(self, addresses: NDArray[np.uint64], elements: Elements) -> None:
        """Note them."""
        for storage, lanes in self._parts(addresses):
            storage.write(addresses[lanes] - np.uint64(storage.first), elements[lanes])

    def _parts(self, addresses: NDArray[np.uint64]) -> list[tuple[_Storage, Any]]:
        """The storages that addresses lie in, and which lie in each."""
        if addresses.size == 0:
            return []
        if self._firsts.size != len(self._storages):
            self._firsts = np.array(sorted(self._storages), np.uint64)
        low, high = (
            int(np.searchsorted(self._firsts, end, side="right")) - 1 for end in (addresses.min(), addresses.max())
        )
        if low == high:
            return [(self._at(low, addresses), ...)]
        places = np.searchsorted(self._firsts, addresses, side="right") - 1
        return [(self._at(int(p), addresses[places == p]), places == p) for p in np.unique(places)]

    def _at(self, place: int, addresses: NDArray[np.uint64]) -> _Storage:
        storage = self._storages[int(self._firsts[place])] if place >= 0 else None
        if storage is None or int(addresses.max()) >= storage.first + storage.memory.nbytes():
            raise Lost("an address in no tensor that is known")
        return storage


def _refuse_lost(storage: _Storage) -> None:
    if storage.lost:
        raise Lost(f"{storage.lost}, which exact algebra has no rule for, made what is read")


def _offsets(tensor: torch.Tensor) -> NDArray[np.uint64]:
    """Where elements of a tensor lie behind its first, in bytes."""
    places = np.zeros(tuple(tensor.shape), np.uint64)
    for axis, (size, stride) in enumerate(zip(tensor.shape, tensor.stride(), strict=True)):
        steps = np.arange(size, dtype=np.uint64) * np.uint64(stride * tensor.element_size())
        places += steps.reshape(-1, *[1] * (tensor.dim() - axis - 1))
    return places


def _zeros(count: int) -> Elements:
    if count < _LARGE:
        return np.zeros(count, np.uint64)
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000)
    return np.frombuffer(mmap.mmap(-1, 8 * count, flags=flags), np.uint64)
