"""Every schedule under NVIDIA's compute-sanitizer: bounds, memory that nothing wrote, races, barriers that not all reach.

What runs is a part of the generated tests in which each kernel's text meets a case: once as it is, which compiles it, and then
in processes under each tool, which find it in Triton's cache. Every tensor has an allocation, so that each is out of the bounds
of all others. A result has hashes of the texts that were checked.
https://docs.nvidia.com/compute-sanitizer
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Callable, Iterator, Mapping, Sequence

from kernelgen.core import names
from kernelgen.core.diagnostics import Diagnostic, failure
from kernelgen.core.model import Location
from kernelgen.core.processes import Fault, Progress, in_processes, no_progress
from kernelgen.core.read import parse_json, read_file
from kernelgen.emit.rooms import serve
from kernelgen.families.case import Case, Variant
from kernelgen.prove import SANITIZERS
from kernelgen.prove.verify import is_named, nothing_named, require_device, start_worker, suites

PROGRAM = "compute-sanitizer"
_NO_TOOL = "no tool"
_Names = tuple[str, str, str]  # of a family, a variant and a case
_Job = tuple[str, int, Sequence[_Names]]  # a tool, which of its processes, and what that one runs


@dataclasses.dataclass(frozen=True)
class Complaint:
    """What a tool said of a kernel, or how a process under it went wrong; ``variant``: empty where it is none of ours.

    ``set_aside``: why it is no fault of the kernel's, where a rule says so.
    """

    tool: str
    variant: str
    text: str
    set_aside: str = ""


@dataclasses.dataclass(frozen=True)
class Result:
    """What ``run`` found out: ``checked`` are hashes of variants' modules, and the cases that they met under every tool."""

    versions: Mapping[str, str]
    tools: Sequence[str]
    checked: Mapping[str, tuple[str, Sequence[str]]]
    complaints: Sequence[Complaint]
    seconds: float

    @property
    def findings(self) -> list[Diagnostic]:
        """What the tools object to."""
        left = [c for c in self.complaints if not c.set_aside]
        return [Diagnostic("KG063", Location(c.variant or PROGRAM), f"{c.tool}: {c.text}") for c in left]

    @property
    def set_aside(self) -> dict[str, list[str]]:
        """Complaints that are no findings, by the reason."""
        found: dict[str, list[str]] = {}
        for c in self.complaints:
            if c.set_aside:
                found.setdefault(c.set_aside, []).append(f"{c.variant}: {c.tool}: {c.text}")
        return found

    def as_json(self) -> dict[str, Any]:
        """The fields of a report, and of a file of results."""
        return {
            "versions": dict(self.versions),
            "tools": list(self.tools),
            "variants": {name: {"sha256": digest, "cases": list(cases)} for name, (digest, cases) in self.checked.items()},
            "findings": [finding.as_json() for finding in self.findings],
            "set_aside": self.set_aside,
        }

    def summary(self) -> str:
        """One line for a reader."""
        cases = sum(len(cases) for _, cases in self.checked.values())
        what = f"{len(self.checked)} variants, {cases} cases under each of {', '.join(self.tools)}"
        aside = sum(map(len, self.set_aside.values()))
        return f"{what} in {self.seconds:.0f} s: {len(self.findings)} complaints" + (f", {aside} set aside" if aside else "")


def run(
    out: Path,
    specs: Path,
    *,
    only: str | None = None,
    tools: Sequence[str] = SANITIZERS,
    device: str = "cuda",
    workers: int = 1,
    progress: Progress = no_progress,
    tell: Callable[[str], Any] = lambda line: None,
) -> Result:
    """Run kernels of the package in ``out`` under each tool.

    Args:
        only: a glob on the names of variants.
        device: "cpu" shows the way there, without a kernel for a tool to look at.
        workers: processes, all on the first GPU.
        tell: gets a line as each process is done, and one for each of its complaints, so that a run that is cut has said them.

    Raises:
        Failure: there is nothing to run, no GPU, no compute-sanitizer, or one that cannot look at this GPU; exit code 2.
    """
    start = time.monotonic()
    require_device(device)
    program = shutil.which(PROGRAM)
    if program is None:
        raise failure("KG061", PROGRAM, "it is not on the PATH", "it comes with the CUDA toolkit")
    _require_sight(program, device)
    pairs = _pairs(out, only)
    tasks: list[_Names] = [(variant.family, variant.name, case.name) for variant, case in pairs]
    known = {variant.name: _module(out, variant) for suite in suites(out).values() for variant in suite.variants}
    families = list(suites(out))
    work = functools.partial(_under, program, out.resolve(), specs.resolve(), device, known, families)
    complaints: list[Complaint] = []

    def keep(job: _Job, found: list[Complaint] | Fault) -> None:
        said = [Complaint(job[0], "", found.reason)] if isinstance(found, Fault) else found
        new = [complaint for complaint in said if complaint not in complaints]
        complaints.extend(new)
        tell(f"{time.monotonic() - start:.0f} s: {len(job[2])} cases under {job[0]}, {len(new)} complaints")
        for complaint in new:
            aside = f" (set aside: {complaint.set_aside})" if complaint.set_aside else ""
            tell(f"{complaint.tool}: {complaint.variant or PROGRAM}: {complaint.text}{aside}")

    for under in ((_NO_TOOL,), tools):
        jobs = [(tool, i, tasks[i::workers]) for tool in under for i in range(min(workers, len(tasks)))]
        in_processes(work, jobs, workers, progress, keep)
    checked: dict[str, tuple[str, list[str]]] = {}
    for variant, case in pairs:
        checked.setdefault(variant.name, (_digest(out, variant), []))[1].append(case.name)
    return Result(_versions(program), tools, checked, complaints, time.monotonic() - start)


def compare(out: Path, file: Path, only: str | None = None) -> list[Diagnostic]:
    """Which kernels a file of results does not have as they are now.

    Raises:
        Failure: it is no such file; exit code 2.
    """
    try:
        checked = {name: said["sha256"] for name, said in parse_json(read_file(file))["variants"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        hint = "kernelgen sanitize --result writes one"
        raise failure("KG072", str(file), f"no result of kernelgen sanitize: {type(error).__name__}", hint) from error
    findings = []
    for variant in dict.fromkeys(variant for variant, _ in _pairs(out, only)):
        said = checked.get(variant.name)
        if said != _digest(out, variant):
            what = "was not checked" if said is None else "has another text since it was checked"
            findings.append(Diagnostic("KG064", Location(variant.name), f"it {what}", "run kernelgen sanitize on a GPU"))
    return findings


def complaints_of(log: str, tool: str, known: Mapping[str, Path]) -> Iterator[Complaint]:
    """What a log says, each thing once; ``known``: the modules of variants."""
    said = set()
    names_of_variants = sorted(known, key=len, reverse=True)
    for block in re.split(r"^=========\s*$", log, flags=re.MULTILINE):
        lines = [line.removeprefix("=========").strip() for line in block.splitlines() if line.startswith("=========")]
        lines = [line for line in lines if line and not _NOTE.match(line)]
        if not lines:
            continue
        kernels = _KERNEL.findall("\n".join(lines))
        variant = next((name for kernel in kernels for name in names_of_variants if kernel.startswith(f"{name}_")), "")
        other = next((line.removeprefix("at ") for line in lines if line.startswith("at ")), "")
        text = lines[0] + (f", in {kernels[0] if kernels else other}" if kernels or other else "")
        aside = _HANDOVER if tool == "racecheck" and variant and _is_handover(lines, known[variant]) else ""
        if tool == "initcheck" and other and not variant:
            aside = _BY_TORCH
        complaint = Complaint(tool, variant, text, aside)
        if complaint not in said:
            said.add(complaint)
            yield complaint


# initcheck has to see torch write, and so sees it read what a case leaves undefined beside what it compares. What a kernel of
# ours fails to write is found by the comparison.
_BY_TORCH = "a kernel of torch read it, not one of ours"

# The warps beside a kernel's own learn their roles from Triton through bytes of shared memory. In its PTX the kernel's warps
# store the numbers (st.shared), then all meet at barrier 1, the others load theirs (ld.shared.b8), and all meet there again as
# roles begin and as they end; only then are the next numbers stored, which end the others, who meet there once more before they
# load. So a load is between barriers that no store is between, and racecheck complains all the same. All of this is of the line
# of the kernel's ``def`` or of its call of warp_specialize, and nothing that a template says in a body is.
_HANDOVER = "Triton's own hand-over of roles in warp_specialize, which barriers order"


def _is_handover(lines: Sequence[str], module: Path) -> bool:
    """Whether all accesses are where Triton hands roles over."""
    accesses = [access for line in lines for access in _ACCESS.findall(line)]
    return bool(accesses) and all(file == module.name and int(line or 0) in _handovers(module) for file, line in accesses)


@functools.cache
def _handovers(module: Path) -> frozenset[int]:
    """Lines of functions' ``def`` that call warp_specialize, and of the calls."""
    lines: set[int] = set()
    for function in ast.parse(read_file(module)).body:
        calls = [node.lineno for node in ast.walk(function) if isinstance(node, ast.Call) and _is_split(node.func)]
        lines |= {function.lineno, *calls} if calls else set()
    return frozenset(lines)


def _is_split(function: ast.expr) -> bool:
    return isinstance(function, ast.Attribute) and function.attr == "warp_specialize"


_NOTE = re.compile(r"COMPUTE-SANITIZER|(ERROR|RACECHECK|LEAK) SUMMARY|Target application|Host Frame|Saved host")
_KERNEL = re.compile(r"\b(?:at|in|by|access at) (\w+)(?=\+0x|\(|:)")
_ACCESS = re.compile(r"\b(?:Read|Write) (?:access|Thread \S+) at \w+\S*(?: in (\S+):(\d+))?")


def _pairs(out: Path, only: str | None) -> list[tuple[Variant, Case]]:
    pairs = [pair for suite in suites(out).values() for pair in suite.each_text if is_named(pair[0], only)]
    if not pairs:
        raise nothing_named(out, only)
    return pairs


def _digest(out: Path, variant: Variant) -> str:
    return hashlib.sha256(read_file(_module(out, variant))).hexdigest()


def _module(out: Path, variant: Variant) -> Path:
    return out / names.family_path(variant.family, variant.module)


def _require_sight(program: str, device: str) -> None:
    """Raise Failure where the tool cannot look at the GPU, which it says as soon as a process makes a context there."""
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        command = [program, "--log-file", str(log), sys.executable, "-c", _CONTEXT if device == "cuda" else ""]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        said = log.read_text() if log.exists() else ""
    errors = [line.removeprefix("=========").strip() for line in said.splitlines() if _NO_SIGHT.search(line)]
    if errors or done.returncode:
        why = "; ".join(errors or [*done.stderr.splitlines()[-1:], f"exit code {done.returncode}"])
        raise failure("KG061", PROGRAM, f"it cannot look at this GPU: {why}", "nothing was run; take a machine that lets it")


_CONTEXT = """
import ctypes, os
cuda, context = ctypes.CDLL("libcuda.so.1"), ctypes.c_void_p()
os._exit(cuda.cuInit(0) or cuda.cuDevicePrimaryCtxRetain(ctypes.byref(context), 0) or cuda.cuCtxSetCurrent(context))
"""
_NO_SIGHT = re.compile("Error|not supported")


def _versions(program: str) -> dict[str, str]:
    import torch
    import triton

    shown = subprocess.run([program, "--version"], capture_output=True, text=True, check=False).stdout
    version = re.search(r"[Vv]ersion ([\w.]+)", shown)
    found = {PROGRAM: version[1] if version else "unknown", "torch": torch.__version__, "triton": triton.__version__}
    return found | ({"gpu": torch.cuda.get_device_name(0)} if torch.cuda.is_available() else {})


def _under(
    program: str, out: Path, specs: Path, device: str, known: Mapping[str, Path], families: Sequence[str], job: _Job
) -> list[Complaint]:
    """The complaints of a tool about some pairs, run in a process of their own."""
    tool, number, tasks = job
    command = [sys.executable, "-m", "kernelgen.prove.sanitize", str(out), str(specs), device]
    # Memory that torch keeps for later would be within the bounds of any tensor beside it.
    env = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        options = ["--tool", tool, "--log-file", str(log), "--target-processes", "application-only", "--print-limit", "1000"]
        options += ["--port", str(49152 + 16 * number)]  # it tries ten, which processes beside each other would use up
        if tool != "initcheck":  # which has to see the kernels of torch write, too
            options += [f"--kernel-name=kns={family}_" for family in families]
        if tool != _NO_TOOL:
            command = [program, *options, *command]
        done = subprocess.run(command, input=json.dumps(tasks), capture_output=True, text=True, env=env, check=False)
        found = list(complaints_of(log.read_text() if log.exists() else "", tool, known))
    told = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")]
    found += [Complaint(tool, variant, f"{case}: {error}") for variant, case, error in told if error]
    if len(told) < len(tasks):
        last = (done.stderr.strip().splitlines() or ["nothing more was said"])[-1]
        found.append(
            Complaint(tool, tasks[len(told)][1], f"{tasks[len(told)][2]}: its process ended with {done.returncode}: {last}")
        )
    return found


def _main(out: Path, specs: Path, device: str) -> None:
    """Run the pairs that stdin names; a line for each as it is done."""
    start_worker(out, device)
    serve(specs)
    for family, name, case in json.load(sys.stdin):
        suite = suites(out)[family]
        pair: tuple[Variant, Case] = next(pair for pair in suite.pairs if (pair[0].name, pair[1].name) == (name, case))
        error = ""
        try:
            suite.check(*pair, device)
        except Exception as fault:  # a kernel can fail in any way
            error = f"{type(fault).__name__}: {' '.join(str(fault).split())[:300]}"
        print(json.dumps([name, case, error]), flush=True)


if __name__ == "__main__":
    _main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
