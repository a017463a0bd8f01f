"""The rooms of families: host code as real Python, of which the modules with a leading underscore become part of a package.

``families/<family>/_*.py`` are the modules of one family, ``_op.py`` its front door; ``families/_*.py`` are shared. They import
each other by relative names, which hold where they stand and in the package. Other modules of a room are of the laboratory, and
are found by their names when something is to be proved, compiled, asked or measured.
"""

from __future__ import annotations

import importlib
import sys
import traceback
from pathlib import Path
from types import ModuleType
from typing import Iterator, Mapping, NamedTuple, Sequence

from kernelgen import families
from kernelgen.core import names
from kernelgen.core.diagnostics import Diagnostic, Failure, failure
from kernelgen.core.locate import FAMILIES, find_specs, room_folders
from kernelgen.core.model import Location, Package

_SHIPPED = "_[!_]*.py"
# The modules of the laboratory that are asked for, what is to be in them, and where that is explained.
_HOLDS: Mapping[str, tuple[Sequence[str], str]] = {
    "cases": (("CASES", "BODY", "check"), "kernelgen/families/__init__.py"),
    "laws": (("LAWS",), "kernelgen/families/__init__.py; it may be empty"),
    "call": (("SIZES", "call"), "kernelgen/families/call.py"),
    "suite": (("SUITE",), "kernelgen/measure/suite.py, as for workload.py"),
    "workload": (("Workload", "Ours"), "kernelgen/measure/workload.py"),
    "tune": (("TUNING",), "kernelgen/measure/tune/hints.py"),
    "probes": (("probes",), "kernelgen/families/__init__.py"),
}


class Source(NamedTuple):
    """A module that is copied: its name, where it is, and what messages call that."""

    stem: str
    file: Path
    label: str


class Rooms:
    """The rooms found in ``folders``, file by file the first that has it."""

    def __init__(self, folders: Sequence[Path]) -> None:
        self.folders = folders

    def shared(self) -> list[Source]:
        """The modules at the top of a package."""
        return self._sources("")

    def modules(self, family: str) -> list[Source]:
        """The modules of a family."""
        return self._sources(f"{family}/")

    def families(self) -> list[str]:
        """The names of the families that have a front door."""
        return sorted({file.parent.name for folder in self.folders for file in folder.glob(f"*/{names.FRONT_DOOR}.py")})

    def has(self, family: str) -> bool:
        """Whether a family has a front door."""
        return family in self.families()

    def missing(self, package: Package) -> Iterator[Diagnostic]:
        """The families without a front door."""
        for family in package.families:
            if not self.has(family.name):
                message = f"there is no {self.label(f'{family.name}/{names.FRONT_DOOR}')}"
                yield Diagnostic("KG020", family.location, message, "write the front door of the family")

    @staticmethod
    def label(place: str) -> str:
        """What messages call a module of a room beside the specs."""
        return f"families/{place}.py"

    def _sources(self, below: str) -> list[Source]:
        found: dict[str, Source] = {}
        for folder in self.folders:
            prefix = "kernelgen/" if folder == FAMILIES else ""
            for file in (folder / below).glob(_SHIPPED):
                found.setdefault(file.stem, Source(file.stem, file, prefix + self.label(below + file.stem)))
        return [found[stem] for stem in sorted(found)]


_served: list[Path] = []  # the folders of rooms, once somebody asked


def serve(specs: Path) -> None:
    """From now on rooms are those that serve the folder ``specs``: beside it first, then those that come with kernelgen."""
    folders = [folder for folder in room_folders(specs) if folder.is_dir()]
    if folders == (_served or [FAMILIES]):
        _served[:] = folders
        return
    _served[:] = folders
    prefix = f"{families.__name__}."
    for module in [module for module in sys.modules if module.startswith(prefix) and _room_of(module) is not None]:
        del sys.modules[module]
    families.__path__ = list(map(str, folders))
    importlib.invalidate_caches()
    for room in sorted({place.name for folder in folders[:-1] for place in folder.glob("[a-z]*/")}):
        package = importlib.import_module(prefix + room)
        package.__path__ = [str(folder / room) for folder in folders if (folder / room).is_dir()]


def rooms_with(name: str) -> list[str]:
    """The families whose rooms have such a module of the laboratory."""
    if not _served:
        serve(find_specs())
    return sorted({file.parent.name for folder in _served for file in folder.glob(f"*/{name}.py")})


def _room_of(module: str) -> str | None:
    """The family whose room a module is of; None: it is shared."""
    room = ".".join(module.split(".")[:3])
    return room.rpartition(".")[2] if hasattr(sys.modules.get(room), "__path__") else None


def laboratory(family: str, name: str, specs: Path | None = None) -> ModuleType:
    """A module of the room of a family that is not part of packages.

    Args:
        family: its family.
        name: of ``_HOLDS``.
        specs: the folder whose rooms are meant; None: that which was served last, else the usual one.

    Raises:
        Failure: there is none, it cannot be imported, or it lacks what is asked for; exit code 2.
    """
    if specs is not None or not _served:
        serve(find_specs() if specs is None else specs)
    module, place = f"{families.__name__}.{family}.{name}", Rooms.label(f"{family}/{name}")
    wanted, explained = _HOLDS[name]
    try:
        found = importlib.import_module(module)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # of somebody's own: it can be wrong in any way, and even exit
        if isinstance(error, ModuleNotFoundError) and f"{module}.".startswith(f"{error.name}."):
            raise failure("KG062", place, "there is no such module", f"write it: {', '.join(wanted)}; see {explained}") from None
        message = error.msg if isinstance(error, SyntaxError) else str(error)
        fault = Diagnostic("KG062", _place_of(error, place), f"it cannot be imported: {type(error).__name__}: {message}")
        raise Failure([fault], exit_code=2) from error
    for attribute in wanted:
        if not hasattr(found, attribute):
            raise failure("KG062", place, f"it has no {attribute}", f"see {explained}")
    return found


def _place_of(error: BaseException, label: str) -> Location:
    """Where in the file that messages call ``label`` an error is from, as far as it tells."""
    if isinstance(error, SyntaxError) and (error.filename or "").endswith(label):
        return Location(label, error.lineno or 0, error.offset or 1, 1, (error.text or "").rstrip("\n"))
    own = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename.endswith(label)]
    return Location(label, own[-1].lineno or 0, 1, 1, own[-1].line or "") if own else Location(label)
