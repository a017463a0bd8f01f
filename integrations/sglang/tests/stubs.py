"""Packages that SGLang imports and this test calls nothing of, stood in for: those for GPUs, for images, for its server.

A module of them has any name, which is a class that has any name too and that nothing can be made of; so what calls one fails.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import sys
from types import ModuleType
from typing import Any

# Of these SGLang asks for names as it is imported. Those that are installed are not stood in for.
STUBBED = ("torchvision", "sgl_kernel", "IPython")


class _Name(type):
    """A class of a stub."""

    def __getattr__(cls, name: str) -> Any:
        return _name(cls, f"{cls.__module__}.{cls.__qualname__}", name)

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError(f"{cls.__module__}.{cls.__qualname__} is stood in for")


class _Stub(ModuleType):
    __path__: tuple[str, ...] = ()

    def __getattr__(self, name: str) -> Any:
        return _name(self, self.__name__, name)


def _name(owner: Any, module: str, name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(name)
    made = type.__call__(_Name, name, (), {"__module__": module})
    setattr(owner, name, made)
    return made


class Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Of all modules of the packages that are stood in for."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if name.partition(".")[0] not in STUBBED:
            return None
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        return _Stub(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        """A stub has nothing to run."""


def install() -> None:
    """Stand in for what is missing: last, behind all that is installed, and behind what transformers found to be there."""
    from transformers.utils import is_torchvision_available

    is_torchvision_available()
    if not any(isinstance(finder, Finder) for finder in sys.meta_path):
        sys.meta_path.append(Finder())


def unpin() -> None:
    """Have memory that is asked for as pinned be any: there is no GPU that it could be pinned for."""
    import torch

    for name in ("tensor", "empty", "zeros"):
        own = getattr(torch, name)
        setattr(torch, name, lambda *args, _own=own, pin_memory=False, **kwargs: _own(*args, **kwargs))
    torch.Tensor.pin_memory = lambda self, *args: self  # type: ignore[method-assign]


def interpret_experts() -> None:
    """Have the Triton kernels of SGLang's experts run: their tables are made here, as those that it has are of CUDA."""
    import torch
    from sglang.srt.layers.moe.moe_runner.triton_utils import fused_moe, fused_moe_triton_config

    def moe_align_block_size(topk_ids: Any, block_size: int, num_experts: int, *args: Any, **kwargs: Any) -> tuple[Any, Any, Any]:
        pairs, experts, blocks = topk_ids.flatten(), [], []
        for expert in range(num_experts):
            for part in (pairs == expert).nonzero()[:, 0].split(block_size):
                if part.numel():
                    blocks.append(torch.nn.functional.pad(part, (0, block_size - part.numel()), value=pairs.numel()))
                    experts.append(expert)
        return torch.cat(blocks).int(), torch.tensor(experts).int(), torch.tensor([len(blocks) * block_size]).int()

    fused_moe.moe_align_block_size = moe_align_block_size
    fused_moe_triton_config.get_device_name = lambda: "CPU"
