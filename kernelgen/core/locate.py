"""Where the files are that come with kernelgen, in a source checkout and in an installed wheel."""

from __future__ import annotations

import os
from pathlib import Path

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


def cache_folder() -> Path:
    """Where results that can be made again are kept between runs; may not exist yet."""
    chosen = os.environ.get("KERNELGEN_CACHE_DIR")
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(chosen or os.path.join(home, "kernelgen"))
