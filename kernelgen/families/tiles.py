"""For laws about the tiles that a rule chooses: they ask it on host integers alone, for many sizes and cards."""

from __future__ import annotations

import contextlib
import importlib
from types import ModuleType
from typing import Any, Iterator
from unittest import mock

import torch

from kernelgen.core.targets import TARGETS, Target

# Columns of K, of layers and of none.
KS = (1, 70, 150, 600, 1000, 2880, 4096, 7168, 8192, 8200, 8448, 9216, 11008, 13824, 14336, 28672, 29568, 53248)


# Of much, some and little shared memory, which is how rules tell cards apart.
CARDS = tuple(TARGETS[name] for name in ("sm_90", "sm_89", "gfx942"))


@contextlib.contextmanager
def on_card(package: ModuleType, card: Target) -> Iterator[None]:
    """Inside, ``package`` chooses and launches for ``card``, without dependent launch."""
    runtime = importlib.import_module(f"{package.__name__}._runtime")
    nvidia = int(card.arch) if card.backend == "cuda" else 0
    traits = runtime.Traits(card.sms, card.program_shared, False, True, *runtime._room(nvidia), card.name, "")
    with mock.patch.object(runtime, "traits", lambda device: traits):
        yield


def measured_tiles(package: ModuleType, family: str) -> Iterator[tuple[str, tuple[Any, ...], Any]]:
    """(target, key, what was fastest for it) of all that was measured; meanwhile rules choose for the device that it was on."""
    runtime = importlib.import_module(f"{package.__name__}._runtime")
    known = runtime.traits(torch.device("cpu"))
    for table in problem_of(package, family)[0].TUNED:
        device = {name: getattr(table, name) for name in ("num_sms", "shared_memory", "target", "label")}
        traits = known._replace(**device)
        with mock.patch.object(runtime, "traits", lambda _, traits=traits: traits):
            for key, fastest in table.fastest.items():
                yield table.target, key, fastest


def problem_of(package: ModuleType, family: str, **sizes: Any) -> tuple[ModuleType, Any]:
    """(the module of the rule of a family, its problem of ``sizes``); what is not given is zero."""
    module = importlib.import_module(f"{package.__name__}.{family}._problem")
    return module, module.Problem(**{**dict.fromkeys(module.Problem._fields, 0), **sizes})


def bare_route(package: ModuleType, tokens: int, block_m: int, *, top_k: int = 1, experts: int = 1, loras: int = 4) -> Any:
    """A route without tables: what a rule asks of one."""
    kinds, sizes = importlib.import_module(f"{package.__name__}.moe_route._op"), (tokens, top_k, experts, loras)
    return kinds.EngineRoute(*(None,) * 4, *sizes, block_m, 1) if block_m else kinds.PairRoute(*(None,) * 5, *sizes)


def parts_of_tiles(k: int, config: Any, where: str) -> None:
    """Raise AssertionError where a tile of ``block_k`` columns would end in the part behind its own, of ``split_k``."""
    whole = config.split_k >= k
    assert whole or config.split_k % config.block_k == 0, f"{where}, K {k}: a tile lies in two parts: {config}"
