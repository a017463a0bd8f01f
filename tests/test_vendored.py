"""A copy of the package in another project's tree, under another name: what the checkers of such projects say of it."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from kernelgen.core import names

ROOT = Path(__file__).resolve().parent.parent
WIDER = "B,C4,E4,E7,E9,F,I,PLE,RUF,SIM,UP,W"  # than what ruff checks unless told

MYPY = """\
[mypy]
python_version = 3.10
strict = true
[mypy-triton.*]
ignore_missing_imports = true
follow_imports = skip
[mypy-{kernels}]
disallow_untyped_decorators = false
disallow_untyped_defs = false
disallow_incomplete_defs = false
"""


def copy_of(folder: Path, sampled: bool = False) -> Path:
    """The copy; ``sampled``: of the variants one of each template and combination of scales, which their texts go by."""
    copy = folder / "vendored"
    shutil.copytree(ROOT / names.PACKAGE, copy, ignore=shutil.ignore_patterns("__pycache__"))
    seen = set()
    for file in sorted(copy.glob("*/[!_]*.py")) if sampled else ():
        template = file.read_text("utf-8").split("\n", 3)[2]
        tags = file.stem.split("_")
        kind = (template, "rany" in tags, *(tag for tag in tags if tag[:2] in ("w8", "a8")))
        if kind in seen:
            file.unlink()
        seen.add(kind)
    return copy


def check(copy: Path, *command: str) -> None:
    arguments = [sys.executable, "-m", *command, copy.name]
    found = subprocess.run(arguments, cwd=copy.parent, capture_output=True, text=True)
    assert found.returncode == 0, found.stdout + found.stderr


@pytest.mark.slow
def test_annotations_are_told_and_hold(tmp_path: Path, pytestconfig: pytest.Config) -> None:
    """Strictly, but for what kernels are made of, which has no annotations: their arguments, and Triton's decorator."""
    copy = copy_of(tmp_path, sampled=True)
    assert (copy / "py.typed").is_file()
    assert pytestconfig.cache is not None
    known = pytestconfig.cache.mkdir("mypy")  # what mypy knows of torch takes most of the time
    kernels = ",".join(f"{copy.name}.{file.parent.name}.{file.stem}" for file in copy.glob("*/[!_]*.py"))
    config = tmp_path / "mypy.ini"
    config.write_text(MYPY.format(kernels=kernels))
    check(copy, "mypy", f"--config-file={config}", f"--cache-dir={known}")


def test_ruff_finds_nothing(tmp_path: Path) -> None:
    check(copy_of(tmp_path), "ruff", "check", "--isolated", "--no-cache", f"--extend-select={WIDER}")
