"""The rooms of families: host code as real Python, of which the modules with a leading underscore become part of a package.

``families/<family>/_*.py`` are the modules of one family, ``_op.py`` its front door; ``families/_*.py`` are shared. They import
each other by relative names, which hold where they stand and in the package. Other modules of a room are of the laboratory.
"""

from __future__ import annotations

from pathlib import Path
from typing import Iterator, NamedTuple, Sequence

from kernelgen import names
from kernelgen.diagnostics import Diagnostic
from kernelgen.locate import FAMILIES
from kernelgen.model import Package

_SHIPPED = "_[!_]*.py"


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
