"""What there is to compile: every kernel that a variant launches on its probes, for every target."""

from __future__ import annotations

import ast
import dataclasses
import functools
import hashlib
import inspect
import textwrap
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any, Iterable, Iterator, Sequence

import triton
from triton._C.libtriton import get_cache_invalidating_env_vars
from triton.runtime.jit import JITFunction

from kernelgen.compiled.lock import Row
from kernelgen.compiled.stand_in import compiling_for, import_package
from kernelgen.core.diagnostics import did_you_mean, failure
from kernelgen.core.locate import room_label
from kernelgen.core.model import Family, Package, Tuned, TunedEntry, Variant
from kernelgen.core.targets import PRIMARY, TARGETS, Target
from kernelgen.emit import build
from kernelgen.emit.assemble import select
from kernelgen.emit.rooms import laboratory, serve
from kernelgen.families.probe import Probe


@dataclasses.dataclass(frozen=True)
class Case:
    """One kernel of one variant, as one probe launches it on one target."""

    family: Family
    variant: Variant
    row: Row
    target: Target
    probe: Probe
    request: Any  # the package's CompileRequest
    digest: str  # of everything that the compiler sees

    def __str__(self) -> str:
        return f"{self.row.variant}: kernel {self.row.kernel} on probe {self.row.probe}"

    @property
    def parameters(self) -> tuple[str, ...]:
        """Of the kernel."""
        return tuple(self.request.launcher.kernel.arg_names)

    def compile(self) -> Any:
        """Triton's compiled kernel; raises what the compiler raises."""
        with compiling_for(self.target):
            return self.request.compile()


def cases(
    specs: Path, out: Path, only: str | None = None, targets: Sequence[str] = ()
) -> list[Case]:
    """The cases of the package in ``out``, by target; ``only`` is a glob on variants, no ``targets`` are all.

    Raises:
        Failure: a spec is at fault (exit code 1), or there is no package, no such variant or no such target (2).
    """
    for name in targets:
        if name not in TARGETS:
            raise failure("KG040", name, "no such target", did_you_mean(name, list(TARGETS)))
    package = build.package(specs)
    serve(specs)
    chosen = select(package, only) if only is not None else package.variants
    return list(_cases(package, import_package(out), chosen, targets or list(TARGETS)))


def cases_of(specs: Path, out: Path, variant: str, target: str) -> list[Case]:
    """The cases of one variant on one target, without those of tuned tiles.

    Raises:
        Failure: no such variant, or the spec does not declare the target; exit code 2.
    """
    package = build.package(specs)
    serve(specs)
    family, found = build.find(package, variant)
    if target not in family.targets:
        declared = ", ".join(family.targets)
        raise failure("KG040", family.spec, f"{target} is not a target of {variant}", declared)
    known = _cases(package, import_package(out), [found], [target])
    return [case for case in known if not case.probe.is_tuned]


def _cases(
    package: Package, generated: ModuleType, variants: Sequence[Variant], targets: Sequence[str]
) -> Iterator[Case]:
    families = {family.name: family for family in package.families}
    for name, target in TARGETS.items():
        if name not in targets:
            continue
        with compiling_for(target):
            for variant in variants:
                family = families[variant.family]
                if name in family.targets:
                    yield from _variant_cases(generated, family, variant, target)


def _variant_cases(
    generated: ModuleType, family: Family, variant: Variant, target: Target
) -> Iterator[Case]:
    tuned = [
        measured
        for measured in family.tuned
        if measured.device.target == target.name == PRIMARY and dict(measured.versions).get("triton") == triton.__version__
    ]
    for probe in _probes(generated, family, variant, tuned):
        with generated._runtime.compile_only() as requests:
            try:
                probe.call()
            except Exception as error:  # a template can be wrong in any way
                message = f"{variant.name} on probe {probe.name}: {type(error).__name__}: {error}"
                raise failure("KG050", family.spec, message, exit_code=1) from error
        for request in requests:
            function = request.launcher.kernel.fn.__name__
            if function.startswith(f"{variant.name}_"):
                row = Row(variant.name, function.removeprefix(f"{variant.name}_"), probe.name)
                yield Case(family, variant, row, target, probe, request, _digest(request, target))


def _probes(generated: ModuleType, family: Family, variant: Variant, tuned: Sequence[Tuned]) -> Iterator[Probe]:
    """The probes of a variant, as its room has them: with the tiles of the rule, and with those that were measured for it."""
    room = laboratory(family.name, "probes")
    yield from _checked(family, room.probes(generated, variant))
    if hasattr(room, "tuned"):
        for measured in tuned:
            for entry in measured.entries:
                if _serves(family, variant, entry):
                    yield from _checked(family, room.tuned(generated, variant, entry))


def _checked(family: Family, probes: object) -> Iterator[Probe]:
    for probe in probes if isinstance(probes, Iterable) else [probes]:
        if not isinstance(probe, Probe):
            place, message = room_label(f"{family.name}/probes"), f"it gives {type(probe).__name__}, wanted Probes"
            raise failure("KG062", place, message, "see kernelgen/families/probe.py")
        yield probe


def _serves(family: Family, variant: Variant, entry: TunedEntry) -> bool:
    """Whether a measurement is of the tags and the rank of a variant; of dtypes the first stands for all."""
    first = [axis.tags[0] for axis in family.axes if axis.name == "dtype"]
    if any(getattr(variant, axis) != tag for axis, tag in entry.tags) or [variant.dtype] * len(first) != first:
        return False
    if "rank" not in variant.tags.names:
        return True
    rank, bucket = entry.problem.rank, variant.block_rank
    if variant.tiled_rank:
        return bool(rank > bucket)
    return bool(rank <= bucket and (rank > bucket // 2 or bucket == 16))


def _digest(request: Any, target: Target) -> str:
    """The same for kernels that differ by their name alone."""
    toolchain = triton.__version__, get_cache_invalidating_env_vars(), target.name
    identity = *toolchain, _text(request.launcher.kernel), request.key[1:]
    return hashlib.sha256(repr(identity).encode()).hexdigest()


def _text(kernel: JITFunction[Any]) -> str:
    return _function_text(kernel.fn, "".join(kernel.raw_src))


@functools.cache
def _function_text(function: FunctionType, source: str) -> str:
    """Its syntax, the functions that it calls and the values that it reads, without its name and comments."""
    tree = ast.parse(textwrap.dedent(source).replace(function.__name__, "kernel"))
    parts = [ast.unparse(tree)]  # the same in every version of Python
    used = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    for name in sorted(used & function.__globals__.keys()):
        value = function.__globals__[name]
        if isinstance(value, JITFunction):
            if not value.fn.__module__.startswith("triton."):
                parts.append(f"{name}: {_text(value)}")
        elif not inspect.ismodule(value) and not callable(value):
            parts.append(f"{name} = {value!r}")
    return "\n".join(parts)
