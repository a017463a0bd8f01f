"""The generated package as an implementation: which of its kernels serve a call, and how it is made to take others."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import sys
from pathlib import Path
from typing import Any, Callable, ClassVar, Mapping, Sequence

import torch

import kernelgen
from kernelgen.core.diagnostics import failure
from kernelgen.measure.suite import OURS
from kernelgen.measure.truth import Truth
from kernelgen.measure.workload import Case, Prepared, Unsupported

Call = Callable[[], Any]
# Constants of a kernel that are choices, not sizes.
_TILES = ("BLOCK_", "SPLIT_", "STAGES", "TILES", "PDL")
_NO_VARIANT = "a variant that serves it"  # what a front door wants where the spec leaves a case out


def import_package(folder: Path) -> str:
    """Import the generated package in ``folder``; return the name, the same in all processes.

    Triton's cache on disk goes by the names of modules, among others.

    Raises:
        Failure: there is none.
    """
    found = folder.resolve()
    if not (found / "__init__.py").is_file():
        raise failure("KG001", str(folder), "not a generated package", "run kernelgen build")
    if str(found.parent) not in sys.path:
        sys.path.insert(0, str(found.parent))
    importlib.import_module(found.name)
    return found.name


@dataclasses.dataclass(frozen=True)
class Op:
    """A call on one batch, and how to know whether it was right; without ``truths`` those of the workload."""

    call: Call
    truths: Callable[[], Sequence[Truth]] | None = None
    check: Call | None = None


class Package:
    """The generated package in a folder; ``form``: a way of doing the work that it would not take by itself."""

    SCHEDULES: ClassVar[tuple[str, ...]] = ()  # forms that are schedules of the kernels whose tiles are chosen

    def __init__(self, folder: Path, form: str = "") -> None:
        package = import_package(folder)
        self.form = form
        self.name = f"{OURS}:{form}" if form else OURS
        self.kg = importlib.import_module(package)
        self.runtime = importlib.import_module(f"{package}._runtime")

    def versions(self) -> dict[str, str]:
        """That of kernelgen."""
        return {"kernelgen": kernelgen.__version__}

    def release(self) -> None:
        """Nothing hangs on weights."""

    def ops(self, case: Case[Any]) -> list[Op]:
        """The call of each batch, with what it needs made beforehand.

        Raises:
            Unsupported: the form does not do this work.
        """
        raise NotImplementedError

    def prepare(self, case: Case[Any]) -> Prepared:
        """The calls, with what they launch.

        Raises:
            Unsupported: no variant serves them.
        """
        ops = self.ops(case)
        schedule = self.form if self.form in self.SCHEDULES else ""
        forced = self.of_schedule(ops[0].call, schedule) if schedule else None

        def within() -> Any:
            return contextlib.nullcontext() if forced is None else self.runtime.choosing(forced)

        with within():
            variant, config = self.observe(ops[0].call)
        if schedule and f"_{schedule}_" not in variant:
            raise Unsupported(f"{schedule} does not serve it")
        calls, launches = tuple(op.call for op in ops), bool(variant)
        check = ops[0].check if launches else None
        return Prepared(calls, variant, config, launches=launches, truths=ops[0].truths, check=check, within=within)

    def of_schedule(self, call: Call, schedule: str) -> dict[Any, Any]:
        """What makes a call take ``schedule``, told to ``choosing``: with the tiles that were measured for it, or the rule's."""
        forced = {}
        for choice in self.choices(call):
            module = sys.modules[type(choice.key).__module__]
            device = torch.device("cpu" if self.runtime.INTERPRETED else "cuda")
            known = dict(self.runtime.measured(module.TUNED, choice.key, self.runtime.traits(device)))
            forced[type(choice.key), choice.key] = ((schedule, known.get(schedule)),)
        return forced

    def choices(self, call: Call, forced: Mapping[Any, Any] | None = None) -> list[Any]:
        """What ``call`` would choose, without running it."""
        with self.runtime.compile_only(), self.runtime.choosing(forced or {}) as choices:
            self._try(call)
        return list(choices)

    def observe(self, call: Call) -> tuple[str, dict[str, Any]]:
        """(variants, tiles by kernel) of what ``call`` launches, without running it."""
        with self.runtime.compile_only() as requests:
            self._try(call)
        tiles: dict[str, dict[str, Any]] = {}
        for request in requests:
            kernel = request.launcher.kernel
            function = kernel.fn.__name__
            owners = (v for v in self.kg.variants() if function.startswith(v))
            variant = max(owners, key=len, default=function)
            constants = zip(kernel.arg_names[len(request.arguments) :], request.constants, strict=True)
            chosen = {k.lower(): v for k, v in constants if any(part in k for part in _TILES)}
            chosen["num_warps"] = request.options.num_warps
            part = function.removeprefix(variant).strip("_") or "kernel"
            tiles.setdefault(variant, {})[part] = chosen
        return " + ".join(tiles), tiles[min(tiles)] if len(tiles) == 1 else tiles

    def _try(self, call: Call) -> None:
        try:
            call()
        except ValueError as error:
            if _NO_VARIANT not in str(error):
                raise
            raise Unsupported(str(error)) from error
