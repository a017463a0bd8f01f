"""Every name and path that kernelgen makes is made here; none is ever parsed back."""

from __future__ import annotations

import keyword
import re
from typing import Sequence

MAX_NAME = 40
NAME_PATTERN = rf"^[a-z][a-z0-9_]{{0,{MAX_NAME - 1}}}$"
_PATH_PART = re.compile(r"[A-Za-z0-9_.][A-Za-z0-9_.-]*")
UNNAMED = "none"  # the tag of an axis that does not apply: it is left out of names
# Names that Windows keeps for devices, whatever the extension.
_DEVICES = frozenset(
    ["con", "prn", "aux", "nul", *(f"{d}{i}" for d in ("com", "lpt") for i in range(10))]
)

PACKAGE = "generated"
TESTS = "tests/generated"
MANIFEST = f"{PACKAGE}/.manifest.json"
TYPED = f"{PACKAGE}/py.typed"  # says that the package has annotations, see PEP 561
TUNED = "tuned"  # below the specs: a folder a device that tiles were measured on
STAGING = ".kernelgen-staging"  # beside what it replaces, on the same file system
TEMPLATE_SUFFIX = ".py.j2"


class Symbol(str):
    """A checked name of Python: what a generated module exports."""

    __slots__ = ()

    def __new__(cls, text: str) -> Symbol:
        if not (text.isascii() and text.isidentifier()) or keyword.iskeyword(text):
            raise ValueError(f"{text!r} is not a name of Python")
        return super().__new__(cls, text)


class Identifier(Symbol):
    """A checked lower-case Python identifier: the only text of a spec that a template can print."""

    __slots__ = ()

    def __new__(cls, text: str) -> Identifier:
        fault = identifier_fault(text)
        if fault:
            raise ValueError(f"{text!r} {fault}")
        return str.__new__(cls, text)


def identifier_fault(text: str) -> str | None:
    """Why ``text`` cannot be a name, or None."""
    if not re.fullmatch(NAME_PATTERN[1:-1], text):
        return (
            f"is not a name: wanted a lower-case letter, then up to {MAX_NAME - 1} of a-z, 0-9, _"
        )
    if keyword.iskeyword(text):
        return "is a keyword of Python"
    if text in _DEVICES:
        return "is the name of a device on Windows"
    return None


def path_fault(path: str) -> str | None:
    """Why ``path`` cannot be written below the output folder, or None."""
    parts = path.split("/")
    if not path.startswith((f"{PACKAGE}/", f"{TESTS}/")):
        return f"is outside {PACKAGE}/ and {TESTS}/"
    if not all(_PATH_PART.fullmatch(part) for part in parts) or {".", ".."} & set(parts):
        return "has a part that is not a plain name"
    if any(part.split(".")[0].lower() in _DEVICES for part in parts):
        return "has the name of a device on Windows"
    return None


def module_name(tags: Sequence[str]) -> Identifier:
    """The module of a variant inside its family's package."""
    return _joined(_named(tags))


def variant_name(family: str, tags: Sequence[str]) -> Identifier:
    """The name of a variant, which is also that of its launcher."""
    return _joined((family, *_named(tags)))


def _named(tags: Sequence[str]) -> list[str]:
    return [tag for tag in tags if tag != UNNAMED]


def _joined(parts: Sequence[str]) -> Identifier:
    # Made of checked identifiers, so only the length limit of a single one is lifted.
    return str.__new__(Identifier, "_".join(Identifier(part) for part in parts))


def spec_label(family: str | None = None) -> str:
    """The spec as headers and messages call it; without a family: all of them."""
    return f"specs/{family or '*'}.yaml"


def kernel_template(family: str, schedule: str | None) -> str:
    """The template of a variant; families with an axis ``schedule`` have one template a schedule."""
    return f"kernels/{family}{'' if schedule is None else '/' + schedule}{TEMPLATE_SUFFIX}"


FRONT_DOOR = "_op"  # the module of a room that has what the family exports
OPERANDS = "_operands"  # the module of what ops take
TABLE = "_table"  # the shared module of what a spec decides
TUNED_TABLE = "_tuned"  # of what was measured
CONFIGS = "_problem"  # the shared module with the classes of a family's tiles
KEY = "Key"  # its class of what measured tiles are looked up by


def config_class(schedule: str | None) -> str:
    """The class that holds the tunables of a schedule, or of a family without schedules."""
    return "".join(map(str.capitalize, (schedule or "").split("_"))) + "Config"


FAMILY_TEMPLATE_FOLDER = "family"  # one for each module that is made of the spec of a family alone
PACKAGE_TEMPLATE_FOLDER = "package"
TEST_TEMPLATE = f"tests/test_family{TEMPLATE_SUFFIX}"


def package_path(stem: str) -> str:
    """A module at the top of the generated package."""
    return f"{PACKAGE}/{stem}.py"


def family_path(family: str, stem: str) -> str:
    """A module of a family: shared by its variants, or a variant."""
    return f"{PACKAGE}/{family}/{stem}.py"


def test_path(family: str) -> str:
    """The generated test file of a family."""
    return f"{TESTS}/test_{family}.py"
