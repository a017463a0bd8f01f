"""The pipeline on one screen: specs -> families -> variants -> texts -> tree -> disk."""

from __future__ import annotations

import contextlib
import gc
from pathlib import Path
from typing import Collection, Iterator

from kernelgen.core import names
from kernelgen.core.diagnostics import Diagnostic, Failure, did_you_mean, failure, os_failure
from kernelgen.core.locate import beside, default_output, find_specs, room_folders, template_folders
from kernelgen.core.model import Family, Location, Package, Tree, Variant
from kernelgen.emit import assemble, tree_cache, write
from kernelgen.emit.commit import Change
from kernelgen.emit.render import Renderer
from kernelgen.emit.rooms import Rooms
from kernelgen.spec.expand import expand
from kernelgen.spec.load import load


def package(specs: Path) -> Package:
    """The families of the folder ``specs``, with their variants.

    Raises:
        Failure: with every fault of every spec (exit code 1), or because they cannot be read (2).
    """
    families, faults = load(specs)
    expanded, found = expand(families)
    faults += found
    faults += renderer(specs).missing_templates(expanded)
    faults += rooms(specs).missing(expanded)
    if faults:
        raise Failure(faults)
    return expanded


def renderer(specs: Path) -> Renderer:
    """The templates that serve the folder ``specs``.

    Raises:
        Failure: they cannot be read; exit code 2.
    """
    try:
        return Renderer(template_folders(specs))
    except OSError as error:
        raise os_failure(error, beside(specs) / "templates") from None


def rooms(specs: Path) -> Rooms:
    """The host code that serves the folder ``specs``."""
    return Rooms(room_folders(specs))


def tree(specs: Path, only: str | None = None, jobs: int = 1, present: Collection[str] = ()) -> Tree:
    """The output of ``specs``, in memory.

    Args:
        specs: the folder.
        only: a glob on the names of variants; the tree then has those, those that are there, and what they need.
        jobs: processes to format with.
        present: the paths of the files that are there.
    """
    with _fewer_collections():
        return assemble.assemble(package(specs), renderer(specs), rooms(specs), only, jobs, present)


@contextlib.contextmanager
def _fewer_collections() -> Iterator[None]:
    """Syntax trees come and go by the million, hardly any in cycles: to look for such as often takes a tenth of the time."""
    usual = gc.get_threshold()
    gc.set_threshold(200_000, *usual[1:])
    try:
        yield
    finally:
        gc.set_threshold(*usual)


def _known_tree(specs: Path, out: Path, only: str | None, jobs: int) -> Tree:
    """The tree as an earlier build made it of the same, else a new one."""
    present = () if only is None else sorted(write.present(out))
    key = tree_cache.made_of(specs, only, present)
    known = tree_cache.get(key)
    if known is None:
        known = tree(specs, only, jobs, present)
        if tree_cache.made_of(specs, only, present) == key:  # nothing was edited meanwhile
            tree_cache.put(key, known)
    return known


def build(specs: Path, out: Path, only: str | None = None, jobs: int = 1) -> write.Plan:
    """Bring ``out`` up to date, and return what was done."""
    return write.sync(_known_tree(specs, out, only, jobs), out)


def check(specs: Path, out: Path, only: str | None = None, jobs: int = 1, through_links: bool = False) -> write.Plan:
    """What ``build`` would do; changes nothing. ``through_links``: what links lead to counts, though no build writes there."""
    return write.plan(_known_tree(specs, out, only, jobs), out, through_links)


def require_current(specs: Path, out: Path, only: str | None = None, jobs: int = 1) -> None:
    """Nothing is judged that is not what specs and templates say: a verdict on older text would be taken for one on theirs.

    Args:
        specs: the folder.
        out: what is below it.
        only: a glob on the names of variants: others need not be there.
        jobs: processes to format with.

    Raises:
        Failure: a file differs, or is missing; exit code 2.
    """
    plan = check(specs, out, None, jobs, through_links=True)
    if only is not None and not plan.is_clean:
        plan = check(specs, out, only, jobs, through_links=True)
    if plan.blocked:
        raise Failure(plan.blocked, exit_code=2)
    found = findings(plan)
    if found:
        more = f", and {len(found) - 1} more" if len(found) > 1 else ""
        options = "" if out == default_output(specs) and specs == find_specs() else f" --specs {specs} --out {out}"
        message = f"{found[0].message}{more}: nothing is judged that specs and templates do not say"
        raise failure(found[0].code, found[0].location.path, message, f"run kernelgen build{options}")


def findings(plan: write.Plan) -> list[Diagnostic]:
    """What ``check`` found, as faults of the files."""
    found = list(plan.blocked)
    if plan.interrupted:
        found.append(Diagnostic("KG033", Location(names.STAGING), "a build was interrupted"))
    for change in plan.changes:
        found.append(Diagnostic("KG034", Location(change.path), _difference(change)))
    return found


def _difference(change: Change) -> str:
    if change.text is None:
        return "no spec makes this file any more"
    return "differs from what the specs say" if change.old else "is missing"


def differences(plan: write.Plan, out: Path) -> Iterator[str]:
    """The unified diff from the disk to the tree, line by line."""
    return (line.rstrip("\n") for line in write.differences(plan, out))


def find(package: Package, name: str) -> tuple[Family, Variant]:
    """The variant called ``name``, and its family.

    Raises:
        Failure: there is none; exit code 2.
    """
    for family in package.families:
        for variant in family.variants:
            if variant.name == name:
                return family, variant
    hint = did_you_mean(name, [variant.name for variant in package.variants], "kernelgen list shows the names")
    raise failure("KG040", name, "no such variant", hint)
