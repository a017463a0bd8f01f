"""What the cases of all families share."""

from __future__ import annotations

import contextvars
import dataclasses
import importlib
import random
import zlib
from types import ModuleType
from typing import Any, Callable, Mapping, Sequence

import torch

from kernelgen.core.model import VOCABULARY

Tags = Mapping[str, str]  # axis -> tag


@dataclasses.dataclass(frozen=True)
class Case:
    """Inputs with a name.

    Attributes:
        name: by its relation to the tile, or what is special.
        why: the fault that it would show.
        only: axis -> the tags that it makes sense for; other axes are free.
        core: run on half of the variants of each body, not on one; each variant meets some of these, or the only one.
        body: axes, or facts, of which each combination must meet the case; empty: those that the family names as its body.
        needs_gpu: too large to be interpreted.
        card: a target that kernels are launched as for; empty: the usual one.
    """

    name: str
    why: str
    only: Mapping[str, Sequence[str]] = dataclasses.field(default_factory=dict, compare=False)
    core: bool = False
    body: Sequence[str] = ()
    needs_gpu: bool = False
    card: str = ""

    def __str__(self) -> str:
        return self.name

    def fits(self, tags: Tags) -> bool:
        """Whether the case makes sense for a variant; an axis that the variant lacks is free."""
        return all(tags[axis] in wanted for axis, wanted in self.only.items() if axis in tags)

    @property
    def is_far(self) -> bool:
        """Whether something lies so many elements apart that operands span gigabytes."""
        return any(isinstance(size, int) and size >= 2**24 for size in vars(self).values())

    @property
    def seed(self) -> int:
        return zlib.crc32(self.name.encode())

    def random(self) -> random.Random:
        """Whole numbers of this case, the same everywhere."""
        return random.Random(self.seed)

    def generator(self) -> torch.Generator:
        """Real numbers of this case, the same everywhere."""
        return torch.Generator().manual_seed(self.seed)


@dataclasses.dataclass(frozen=True)
class Variant:
    """A variant as the tests see it: ``name`` is that of its launcher, in ``module`` of ``family``."""

    family: str
    name: str
    module: str
    tags: Tags = dataclasses.field(compare=False)

    def __str__(self) -> str:
        return self.name

    def told(self, name: str) -> object:
        """Its tag on an axis, or what that stands for under this name; None: nothing of it has the name."""
        facts = (VOCABULARY.get(axis, {}).get(tag, {}) for axis, tag in self.tags.items())
        return self.tags.get(name, next((of[name] for of in facts if name in of), None))

    def launcher(self, package: ModuleType) -> Callable[..., None]:
        """Its launcher in the generated ``package``."""
        module = importlib.import_module(f"{package.__name__}.{self.family}.{self.module}")
        launcher: Callable[..., None] = getattr(module, self.name)
        return launcher


@dataclasses.dataclass(frozen=True)
class Law:
    """What holds between variants, or between calls.

    Attributes:
        run: gets the generated package, the variants and the device; raises AssertionError.
        needs_gpu: it is about something that only a GPU has.
        slow: it takes seconds, and others meet the same kernels: it is not for a person who waits.
    """

    run: Callable[[ModuleType, Sequence[Variant], str], Any]
    needs_gpu: bool = False
    slow: bool = False

    @property
    def name(self) -> str:
        return self.run.__name__

    def __str__(self) -> str:
        return self.name


# What else must hold between what a kernel made and what it should have made, and raises AssertionError.
also_compare: contextvars.ContextVar[Callable[[torch.Tensor, torch.Tensor], None] | None] = contextvars.ContextVar(
    "also_compare", default=None
)


def compare_exactly(actual: torch.Tensor, exact: torch.Tensor) -> None:
    """Raise AssertionError if exact algebra is on, and a kernel made other elements than its formula."""
    if (compare := also_compare.get()) is not None:
        compare(actual, exact)


def worst_ratio(actual: torch.Tensor, exact: torch.Tensor, bound: torch.Tensor) -> float:
    """The largest error over its bound, at most 1; both fp64 but ``actual``.

    An exact NaN wants a NaN, and nothing else may be one. What is beyond the range of the dtype of ``actual`` by more than
    the bound wants the infinity of its sign; what is beyond it by less may have it. An exact infinity wants itself.

    Raises:
        AssertionError: an element is off; says how many, and which is the worst.
    """
    compare_exactly(actual, exact)
    info = torch.finfo(actual.dtype)
    overflow = info.max * (1 + info.eps / 4)  # rounds to infinity
    value = actual.double()
    error = (value - exact).abs()
    right = torch.where(
        value.isinf(),
        (value.sign() == exact.sign()) & (exact.abs() + bound >= overflow),
        torch.where(exact.isnan(), value.isnan(), (error <= bound) & exact.isfinite()),
    )
    if not right.all():
        ratio = torch.where(right, 0.0, (error / bound).nan_to_num(torch.inf, torch.inf))
        worst = int(ratio.argmax())
        index = tuple(int(i) for i in torch.unravel_index(torch.tensor(worst), ratio.shape))
        raise AssertionError(
            f"{int((~right).sum())} of {right.numel()} elements are off; at {index}: got {float(value[index]):.6g}, "
            f"wanted {float(exact[index]):.6g} within {float(bound[index]):.3g}"
        )
    ratio = (error / bound)[value.isfinite()]
    return float(ratio.max()) if ratio.numel() else 0.0
