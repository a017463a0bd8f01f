"""Where the files are that come with kernelgen, in a source checkout and in an installed wheel."""

from __future__ import annotations

import linecache
import os
import re
import traceback
from pathlib import Path
from types import FrameType
from typing import Callable

from kernelgen.core.model import Location

_HERE = Path(__file__).resolve().parent.parent
_CHECKOUT = _HERE.parent
IS_CHECKOUT = (_CHECKOUT / "templates").is_dir() and (_CHECKOUT / "specs").is_dir()
_DATA = _CHECKOUT if IS_CHECKOUT else _HERE / "_data"

SPECS = _DATA / "specs"
TEMPLATES = _DATA / "templates"
FAMILIES = _HERE / "families"  # a room a family; modules with a leading underscore are part of generated packages


def find_specs() -> Path:
    """``specs`` of the current folder where it has one, else those that come with kernelgen."""
    return Path("specs") if Path("specs").is_dir() else SPECS


def default_output(specs: Path) -> Path:
    """The folder that ``generated`` goes to: beside the specs, but never into an installed kernelgen."""
    return Path(".") if specs == SPECS and not IS_CHECKOUT else beside(specs)


def beside(folder: Path) -> Path:
    """The folder that ``folder`` is in, of ``.`` and ``..`` too, which have no parent by their names."""
    return folder / ".." if folder.name in ("", "..") else folder.parent


def template_folders(specs: Path) -> tuple[Path, ...]:
    """Where templates are looked up, file by file: beside the specs first, then those that come with kernelgen.

    Raises:
        OSError: ``templates`` is there, but is no folder that can be read.
    """
    own = beside(specs) / "templates"
    if os.path.lexists(own):
        os.scandir(own).close()
    return tuple(dict.fromkeys([Path(os.path.realpath(own)), TEMPLATES]))


def room_folders(specs: Path) -> tuple[Path, ...]:
    """Where the rooms of families are looked up, file by file: beside the specs first, then those that come with kernelgen."""
    return tuple(dict.fromkeys([Path(os.path.realpath(beside(specs) / "families")), FAMILIES]))


def room_label(place: str) -> str:
    """What messages call a module of a room: ``place`` is its path below the rooms, without the suffix."""
    return f"families/{place}.py"


def place_in_room(error: BaseException) -> Location | None:
    """The innermost line of the laboratory of a room that an exception passed; None: it passed none."""

    def label(frame: FrameType) -> str | None:
        module = re.fullmatch(r"kernelgen\.families\.(\w+)\.(\w+)", str(frame.f_globals.get("__name__")))
        return None if module is None else room_label("/".join(module.groups()))

    return _innermost(error, label)


def place_below(error: BaseException, folder: Path) -> Location | None:
    """The innermost line that an exception passed in a file below ``folder``; None: it passed none."""

    def label(frame: FrameType) -> str | None:
        file = Path(frame.f_code.co_filename)
        return str(file) if folder in file.parents else None

    return _innermost(error, label)


def _innermost(error: BaseException, label: Callable[[FrameType], str | None]) -> Location | None:
    found = None
    for frame, line in traceback.walk_tb(error.__traceback__):
        if (place := label(frame)) is not None:
            text = linecache.getline(frame.f_code.co_filename, line).rstrip()
            inner = text.lstrip()
            found = Location(place, line, len(text) - len(inner) + 1, max(1, len(inner)), text)
    return found


def cache_folder() -> Path:
    """Where results that can be made again are kept between runs; may not exist yet."""
    chosen = os.environ.get("KERNELGEN_CACHE_DIR")
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(chosen or os.path.join(home, "kernelgen"))
