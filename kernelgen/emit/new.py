"""``kernelgen new FAMILY``: the empty room of a family, which builds, is right and compiles, and says what to change."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Iterator

from kernelgen.core import names
from kernelgen.core.diagnostics import failure, os_failure
from kernelgen.core.locate import FAMILIES, IS_CHECKOUT, SPECS, beside
from kernelgen.core.write import replace_file

_BLANK = Path(__file__).with_name("blank")
_WORD = "FAMILY"  # stands for the name in the files of that folder
_SPEC, _KERNEL = "spec.yaml", f"kernel{names.TEMPLATE_SUFFIX}"


def new(family: str, specs: Path) -> list[Path]:
    """Write the spec, the template and the room of a new ``family`` of the folder ``specs``; return the files.

    Raises:
        Failure: it cannot be named so, is there already, or there is no such folder; exit code 2, and nothing is written.
    """
    fault = names.identifier_fault(family)
    if fault is not None:
        raise failure("KG012", family[:80], f"{family[:80]!r} {fault}")
    if not specs.is_dir():
        message = "there is no folder of specs here"
        raise failure("KG001", str(specs), message, "make it: mkdir specs; or name another with --specs")
    if (FAMILIES / f"{family}.py").exists():
        raise failure("KG012", family, "a module that rooms share is called so", "choose another name")
    if (FAMILIES / family).exists():
        raise failure("KG030", f"kernelgen/families/{family}", "there is such a family", "choose another name")
    files = dict(_files(family, specs))
    for file in files:
        if file.exists() or file.is_symlink():
            raise failure("KG030", str(file), "it is there already", "choose another name, or move it away")
    made: list[Path] = []
    try:
        for file, text in files.items():
            for folder in reversed([parent for parent in file.parents if not parent.exists()]):
                folder.mkdir()
                made.append(folder)
            replace_file(file, text)
            made.append(file)
    except BaseException as error:
        for path in reversed(made):
            with contextlib.suppress(OSError):
                path.rmdir() if path.is_dir() else path.unlink()
        if not isinstance(error, OSError):
            raise
        raise os_failure(error, file) from error
    return list(files)


def _files(family: str, specs: Path) -> Iterator[tuple[Path, str]]:
    own = IS_CHECKOUT and specs.resolve() == SPECS.resolve()
    rooms = FAMILIES if own else beside(specs) / "families"
    for blank in sorted(_BLANK.iterdir()):
        text = blank.read_text(encoding="utf-8").replace(_WORD, family)
        if blank.stem == _SPEC:
            yield specs / f"{family}.yaml", text
        elif blank.stem == _KERNEL:
            yield beside(specs) / "templates" / names.kernel_template(family, None), text
        else:
            yield rooms / family / blank.stem, text
