"""What holds for every family whose room has a ``good`` call: where a tensor lies in memory does not change what comes out."""

from __future__ import annotations

import importlib
import inspect
from types import ModuleType
from typing import Any, Iterator, Sequence

import torch

from kernelgen.emit.rooms import laboratory
from kernelgen.families.buffers import allocate, bits, row_major
from kernelgen.families.case import Variant

_GAP = 8  # elements between rows


def tensors_lie_anywhere(package: ModuleType, variants: Sequence[Variant], device: str) -> None:
    """Each tensor of a good call in other memory, with NaN between its rows, or columns: the same bits, or it is refused."""
    family = variants[0].family
    given = laboratory(family, "laws").good(device)
    op = importlib.import_module(f"{package.__name__}._operands").OPS[family]
    left_out = [name for name in inspect.signature(getattr(package, family)).parameters if name not in given]
    assert not left_out, f"good of {family} is to give all that there is, and leaves out {', '.join(left_out)}"
    written = [o.name for o in op.operands if getattr(o, "written", False) and given.get(o.name) is not None]

    def results(**changed: Any) -> list[torch.Tensor]:
        own = {name: _again(given[name]) for name in written}
        arguments = {**given, **own, **changed}
        getattr(package, family)(**arguments)
        return [bits(tensor.contiguous()) for name in written for tensor in _listed(arguments[name])]

    expected = results()
    for name, value in given.items():
        for changed in _elsewhere(value):
            strides = [tensor.stride() for tensor in _listed(changed)]
            try:
                found = results(**{name: changed})
            except ValueError as error:
                assert name in str(error), f"{name} with strides {strides} is refused by another name: {error}"
            else:
                same = all(map(torch.equal, found, expected))
                assert same, f"{name} with strides {strides}: other numbers; it is to be read by its strides, or refused"


def _listed(value: Any) -> Sequence[torch.Tensor]:
    items = value if isinstance(value, (list, tuple)) else [value]
    return items if all(isinstance(item, torch.Tensor) for item in items) else []


def _again(value: Any) -> Any:
    """A tensor, or a sequence of such, once more."""
    return [item.clone() for item in value] if isinstance(value, (list, tuple)) else value.clone()


def _elsewhere(value: Any) -> Iterator[Any]:
    """The same numbers, with rows apart and with columns apart; slices all alike."""
    tensors = _listed(value)
    for is_apart in (False, True) if tensors else ():
        made = []
        for tensor in tensors:
            strides = row_major(tensor.shape, row=tensor.shape[-1] + _GAP) if tensor.dim() > 0 else ()
            strides = tuple(2 * stride for stride in strides) if is_apart else strides
            made.append(allocate(tensor.shape, strides, tensor.dtype, str(tensor.device)))
            made[-1].copy_(tensor)
        if any(new.stride() != old.stride() for new, old in zip(made, tensors, strict=True)):
            yield made if isinstance(value, (list, tuple)) else made[0]
