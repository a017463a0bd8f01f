"""What of this environment works: Python and packages, the GPU, the interpreter, the compiler, the specs and what they make.

Building needs neither torch nor triton, running needs no GPU: what is not there but can be done without is a note, no fault.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import os
import platform
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, Callable, Iterator, Literal, Sequence

from kernelgen.core import locate
from kernelgen.core.read import read_file

Status = Literal["ok", "note", "fault"]
_PYTHON = (3, 10)
_TORCH, _TRITON = ((2, 11), None), ((3, 6), (3, 10))  # from, and before which version
_RUN = "pip install 'kernelgen[run]'"
_SECONDS = 120  # for a child process
_ROOT = Path(__file__).resolve().parent.parent
_PINNED = _ROOT / "tools" / "requirements"  # of a checkout: what was tested together
_SHOWN = 6  # packages that are named


@dataclasses.dataclass(frozen=True)
class Check:
    """One thing that was looked at.

    Attributes:
        name: of the thing.
        status: "ok"; "note": something cannot be done here, or is slower; "fault": something is to be mended.
        found: what is there.
        hint: what to do about it.
    """

    name: str
    status: Status
    found: str
    hint: str = ""


def examine(specs: Path, out: Path, jobs: int = 1) -> list[Check]:
    """Look at everything; nothing that is found raises."""
    return list(_checks(specs, out, jobs))


def _checks(specs: Path, out: Path, jobs: int) -> Iterator[Check]:
    yield _python()
    yield _packages()
    if (_PINNED / "base.txt").is_file():
        yield _attempt("pinned", _pinned)
    torch, triton = _version("torch", *_TORCH), _version("triton", *_TRITON)
    yield from (torch, triton)
    if torch.status == "ok":
        yield _child("gpu", _GPU, "note", "tests and demo interpret the kernels; compile and explain work")
    if triton.status == "ok" and torch.status == "ok":
        yield _child("interpreter", _INTERPRETER, "fault", f"{_RUN}, which brings numpy")
        yield _child("compiler", _COMPILER, "fault", f"reinstall triton: {_RUN}")
    yield _attempt("specs", lambda: _specs(specs))
    yield _attempt("generated", lambda: _generated(specs, out, jobs))
    yield _lock(out, triton)
    yield _cache()


def _python() -> Check:
    found = f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    if sys.version_info < _PYTHON:
        return Check("python", "fault", found, "kernelgen needs Python 3.10 or newer")
    return Check("python", "ok", found)


def _packages() -> Check:
    """What kernelgen itself requires."""
    wrong, found = [], []
    for requirement in _requirements():
        name, wanted = re.findall(r"[^\s=<>~!,]+", requirement)[:2]
        version = _installed(name)
        found.append(f"{name} {version or 'missing'}")
        if version is None or ("==" in requirement and version != wanted):
            wrong.append(repr(requirement))
    hint = f"pip install {' '.join(wrong)}" if wrong else ""
    return Check("packages", "fault" if wrong else "ok", ", ".join(found), hint)


def _requirements() -> list[str]:
    """From the metadata of an installed kernelgen, else from the pyproject.toml beside it."""
    try:
        lines = importlib.metadata.requires("kernelgen") or []
        return [line for line in lines if "extra ==" not in line]
    except importlib.metadata.PackageNotFoundError:
        text = (_ROOT / "pyproject.toml").read_text("utf-8")
        block = re.search(r"^dependencies = \[\n(.*?)^\]", text, re.DOTALL | re.MULTILINE)
        return re.findall(r'"([^"]+)"', block[1]) if block else []


def _pinned() -> Check:
    """What is installed, against what was tested together; torch and triton as for this build of torch."""
    from packaging.requirements import Requirement

    files = ["base.txt"]
    if torch := _installed("torch"):
        files.append("cpu.txt" if torch.endswith("+cpu") else "gpu.txt")
    texts = [read_file(_PINNED / file).decode() for file in files]
    lines = [line.rstrip("\\ ") for text in texts for line in text.splitlines() if line[:1].isalnum()]
    pinned = [one for one in map(Requirement, lines) if one.marker is None or one.marker.evaluate()]
    others = []
    for one in pinned:
        version, wanted = _installed(one.name), str(one.specifier).removeprefix("==")
        if version != wanted:
            others.append(f"{one.name} {version or 'missing'}, pinned {wanted}")
    found = f"{len(pinned) - len(others)} of {len(pinned)} packages are as in {_PINNED}"
    if not others:
        return Check("pinned", "ok", found)
    more = [f"{len(others) - _SHOWN} more"] if len(others) > _SHOWN else []
    install = " && ".join(f"pip install --no-deps -r {_PINNED / file}" for file in files)
    hint = f"what was tested is in the .venv that tools/test makes, or: {install}"
    return Check("pinned", "note", "; ".join([found, *others[:_SHOWN], *more]), hint)


def _installed(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _version(name: str, least: tuple[int, ...], below: tuple[int, ...] | None) -> Check:
    """A package that kernels need; the version that Python would import, which need not be the one installed."""
    done = _run(f"import {name}; print({name}.__version__)")
    if done.returncode != 0:
        missing = "No module named" in done.stderr
        found = "not installed" if missing else _last(done.stderr)
        hint = f"to run or compile kernels: {_RUN}"
        return Check(name, "note" if missing else "fault", found, hint)
    found = _last(done.stdout)
    number = tuple(map(int, re.findall(r"\d+", found)[:2]))
    if number < least or (below is not None and number >= below):
        upper = f" and below {'.'.join(map(str, below))}" if below else ""
        wanted = f"{name} {'.'.join(map(str, least))} or newer{upper}"
        return Check(name, "fault", found, f"kernels are tested with {wanted}")
    return Check(name, "ok", found)


_GPU = """
import torch
assert torch.cuda.is_available(), "torch sees none"
for i in range(torch.cuda.device_count()):
    p = torch.cuda.get_device_properties(i)
    print(f"{p.name}, {p.total_memory >> 30} GiB", end="; " if i + 1 < torch.cuda.device_count() else "\\n")
"""
_INTERPRETER = """
import os
os.environ["TRITON_INTERPRET"] = "1"
from kernelgen.prove import interpreter
interpreter.install()
import numpy
print(f"Triton's, repaired; numpy {numpy.__version__}")
"""
_COMPILER = """
import triton
tools = triton.knobs.nvidia
print(f"ptxas {tools.ptxas.version}, cuobjdump {tools.cuobjdump.version}")
"""


def _child(name: str, program: str, otherwise: Status, hint: str) -> Check:
    """What a program prints in a process of its own; ``otherwise``, with the hint, where it fails."""
    done = _run(program)
    if done.returncode == 0:
        return Check(name, "ok", _last(done.stdout))
    return Check(name, otherwise, _last(done.stderr).removeprefix("AssertionError: "), hint)


def _run(program: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", program]
    path = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), str(_ROOT)]))
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    try:
        return subprocess.run(
            command,
            env={**environment, "PYTHONPATH": path},
            capture_output=True,
            text=True,
            timeout=_SECONDS,
        )
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess(command, 1, "", f"no answer in {_SECONDS} s")


def _last(text: str) -> str:
    return next((line for line in reversed(text.splitlines()) if line.strip()), "no answer").strip()


def _attempt(name: str, look: Callable[[], Check]) -> Check:
    from kernelgen.core.diagnostics import Failure

    try:
        return look()
    except Failure as failed:
        count, first = len(failed.diagnostics), str(failed.diagnostics[0]).splitlines()[0]
        return Check(name, "fault", first, f"kernelgen build shows all {count}" if count > 1 else "")
    except ImportError as error:
        return Check(name, "fault", str(error), "install what kernelgen needs: pip install -e .")
    except (OSError, ValueError) as error:
        return Check(name, "fault", f"{type(error).__name__}: {error}")


def _specs(specs: Path) -> Check:
    from kernelgen.emit import build

    families = build.package(specs).families
    variants = sum(len(family.variants) for family in families)
    names = ", ".join(family.name for family in families)
    return Check("specs", "ok", f"{specs}: {variants} variants of {names}")


def _generated(specs: Path, out: Path, jobs: int) -> Check:
    from kernelgen.emit import build

    plan = build.check(specs, out, None, jobs)
    findings = build.findings(plan)
    if not findings:
        return Check("generated", "ok", f"{out / 'generated'} is what the specs say")
    first = findings[0]
    more = f", and {len(findings) - 1} more" if len(findings) > 1 else ""
    blocked = any(finding.code in ("KG030", "KG031") for finding in findings)
    hint = "kernelgen build --diff shows it; move what is in the way" if blocked else "run kernelgen build"
    return Check("generated", "fault", f"{first.location}: {first.message}{more}", hint)


def _lock(out: Path, triton: Check) -> Check:
    from kernelgen.compiled.lock import FILE, Lock

    def look() -> Check:
        versions = sorted(Lock(out / FILE).sections)
        if not versions:
            return Check("lock", "note", f"no {FILE}", "kernelgen compile --update makes it")
        found = f"{FILE} for triton {', '.join(versions)}"
        if triton.status == "ok" and triton.found not in versions:
            return Check("lock", "note", found, f"it says nothing of triton {triton.found}")
        return Check("lock", "ok", found)

    return _attempt("lock", look)


def _cache() -> Check:
    folder = locate.cache_folder()
    place = next(place for place in (folder, *folder.resolve().parents) if place.exists())
    if place.is_dir() and os.access(place, os.W_OK):
        return Check("cache", "ok", str(folder))
    return Check("cache", "note", f"{folder} cannot be written", "set KERNELGEN_CACHE_DIR; without it all is made anew")


def rows(checks: Sequence[Check]) -> Iterator[tuple[str, ...]]:
    """A table for a reader."""
    for check in checks:
        yield check.status, check.name, check.found
        if check.hint:
            yield "", "", f"hint: {check.hint}"


def as_json(checks: Sequence[Check]) -> dict[str, Any]:
    """The fields of a report."""
    return {"checks": [dataclasses.asdict(check) for check in checks]}
