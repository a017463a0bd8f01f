"""The rooms of families: host code as real Python, of which the modules with a leading underscore become part of a package.

``families/<family>/_*.py`` are the modules of one family, ``_op.py`` its front door; ``families/_*.py`` are shared. They import
each other by relative names, which hold where they stand and in the package. Other modules of a room are of the laboratory, and
are found by their names when something is to be proved, compiled, asked or measured.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import sys
from pathlib import Path
from types import ModuleType
from typing import Any, Callable, Iterator, Mapping, NamedTuple, Sequence, TypeVar

from kernelgen import families
from kernelgen.core import names
from kernelgen.core.diagnostics import Diagnostic, Failure, failure
from kernelgen.core.locate import FAMILIES, find_specs, place_in_room, room_folders, room_label
from kernelgen.core.model import Location, Package

_Result = TypeVar("_Result")
_SHIPPED = "_[!_]*.py"
_LIST, _TABLE = (list, tuple), Mapping
# The modules of the laboratory that are asked for, what is to be in them (a number: a function of so many arguments), and where
# that is explained.
_HOLDS: Mapping[str, tuple[Mapping[str, Any], str]] = {
    "cases": ({"CASES": _LIST, "BODY": _LIST, "check": 5}, "kernelgen/families/__init__.py"),
    "laws": ({"LAWS": _LIST}, "kernelgen/families/__init__.py; it may be empty"),
    "call": ({"SIZES": _TABLE, "call": 2}, "kernelgen/families/call.py"),
    "suite": ({"SUITE": object}, "kernelgen/measure/suite.py, as for workload.py"),
    "workload": ({"Workload": 3, "Ours": 2}, "kernelgen/measure/workload.py"),
    "tune": ({"TUNING": object}, "kernelgen/measure/tune/hints.py"),
    "probes": ({"probes": 2}, "kernelgen/families/__init__.py"),
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

    @functools.cached_property
    def families(self) -> list[str]:
        """The names of the families that have a front door."""
        files = (file for folder in self.folders for file in folder.glob(f"*/{_SHIPPED}"))  # links that lead nowhere too
        return sorted({file.parent.name for file in files if file.stem == names.FRONT_DOOR})

    def has(self, family: str) -> bool:
        """Whether a family has a front door."""
        return family in self.families

    def missing(self, package: Package) -> Iterator[Diagnostic]:
        """The families without a front door."""
        for family in package.families:
            if not self.has(family.name):
                message = f"there is no {room_label(f'{family.name}/{names.FRONT_DOOR}')}"
                yield Diagnostic("KG020", family.location, message, "write the front door of the family")

    def _sources(self, below: str) -> list[Source]:
        found: dict[str, Source] = {}
        for folder in self.folders:
            prefix = "kernelgen/" if folder == FAMILIES else ""
            for file in (folder / below).glob(_SHIPPED):
                found.setdefault(file.stem, Source(file.stem, file, prefix + room_label(below + file.stem)))
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


def in_rooms(specs: Path, function: Callable[..., _Result], *arguments: Any, **named: Any) -> _Result:
    """What ``function`` gives, with the rooms that serve ``specs``: for a process that begins."""
    serve(specs)
    return function(*arguments, **named)


def rooms_with(name: str) -> list[str]:
    """The families whose rooms have such a module of the laboratory."""
    if not _served:
        serve(find_specs())
    return sorted({file.parent.name for folder in _served for file in folder.glob(f"*/{name}.py")})


def _room_of(module: str) -> str | None:
    """The family whose room a module is of; None: it is shared."""
    room = ".".join(module.split(".")[:3])
    return room.rpartition(".")[2] if hasattr(sys.modules.get(room), "__path__") else None


def laboratory(family: str, name: str, specs: Path | None = None, kind: type = object) -> ModuleType:
    """A module of the room of a family that is not part of packages.

    Args:
        family: its family.
        name: of ``_HOLDS``.
        specs: the folder whose rooms are meant; None: that which was served last, else the usual one.
        kind: of what is asked for, where ``_HOLDS`` does not know.

    Raises:
        Failure: there is none, it cannot be imported, or it lacks what is asked for; exit code 2.
    """
    if specs is not None or not _served:
        serve(find_specs() if specs is None else specs)
    module, place = f"{families.__name__}.{family}.{name}", room_label(f"{family}/{name}")
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
    for attribute, known in wanted.items():
        if not hasattr(found, attribute):
            raise failure("KG062", place, f"it has no {attribute}", f"see {explained}")
        if reason := _misfit(getattr(found, attribute), kind if known is object else known):
            raise failure("KG062", place, f"its {attribute} {reason}", f"see {explained}")
    return found


def _misfit(value: object, wanted: Any) -> str | None:
    """Why ``value`` is not what ``_HOLDS`` says."""
    if isinstance(wanted, int) and callable(value):
        try:
            inspect.signature(value).bind(*range(wanted))
        except TypeError as error:
            return f"is to take {wanted} arguments: {error}"
    elif isinstance(wanted, int) or not isinstance(value, wanted):
        return f"is of the wrong type: {type(value).__name__}"
    return None


def _place_of(error: BaseException, label: str) -> Location:
    """Where in the file that messages call ``label`` an error is from, as far as it tells."""
    if isinstance(error, SyntaxError) and (error.filename or "").endswith(label):
        return Location(label, error.lineno or 0, error.offset or 1, 1, (error.text or "").rstrip("\n"))
    return place_in_room(error) or Location(label)
