"""kernelgen sanitize: what is read off the logs of compute-sanitizer, and the way there without a GPU."""

from __future__ import annotations

import json
import stat
import sys
from pathlib import Path

import pytest

from kernelgen.core.diagnostics import Failure
from kernelgen.prove import SANITIZERS
from kernelgen.prove.sanitize import Complaint, Result, compare, complaints_of, run
from kernelgen.prove.verify import suites

ROOT = Path(__file__).parent.parent
KNOWN = {"moe_sum_bf16": Path("bf16.py"), "moe_sum_bf16_weighted": Path("bf16_weighted.py")}
LOGS = {
    "memcheck": """\
========= COMPUTE-SANITIZER
========= Invalid __global__ read of size 2 bytes
=========     at moe_sum_bf16_weighted_kernel+0x1f0
=========     by thread (32,0,0) in block (3,0,0)
=========     Address 0x7f0 is out of bounds
=========
========= Invalid __global__ read of size 2 bytes
=========     at moe_sum_bf16_weighted_kernel+0x1f0
=========     by thread (33,0,0) in block (3,0,0)
=========
========= ERROR SUMMARY: 2 errors
""",
    "initcheck": """\
========= COMPUTE-SANITIZER
========= Uninitialized __global__ memory read of size 4 bytes
=========     at moe_sum_bf16_kernel+0x80
=========     by thread (0,0,0) in block (0,0,0)
=========
========= ERROR SUMMARY: 1 error
""",
    "racecheck": """\
========= COMPUTE-SANITIZER
========= Error: Race reported between Write access at moe_sum_bf16_kernel+0x150
=========     and Read access at moe_sum_bf16_kernel+0x1a0 [124 hazards]
=========
========= RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)
""",
    "synccheck": """\
========= COMPUTE-SANITIZER
========= Barrier error detected. Divergent thread(s) in block.
=========     at somebody_else+0x10
=========
========= ERROR SUMMARY: 1 error
""",
}
SAID = {
    "memcheck": ("moe_sum_bf16_weighted", "Invalid __global__ read of size 2 bytes, in moe_sum_bf16_weighted_kernel"),
    "initcheck": ("moe_sum_bf16", "Uninitialized __global__ memory read of size 4 bytes, in moe_sum_bf16_kernel"),
    "racecheck": (
        "moe_sum_bf16",
        "Error: Race reported between Write access at moe_sum_bf16_kernel+0x150, in moe_sum_bf16_kernel",
    ),
    "synccheck": ("", "Barrier error detected. Divergent thread(s) in block., in somebody_else"),
}


@pytest.mark.parametrize("tool", SANITIZERS)
def test_a_log_is_read(tool: str) -> None:
    """Each thing is said once, of the variant whose kernel it is in."""
    assert list(complaints_of(LOGS[tool], tool, KNOWN)) == [Complaint(tool, *SAID[tool])]
    assert not list(complaints_of("========= COMPUTE-SANITIZER\n========= ERROR SUMMARY: 0 errors\n", tool, KNOWN))


SPLIT = """\
import triton.experimental.gluon.language as gl


@gluon.jit
def moe_sum_bf16_kernel(out_ptr):
    ring = gl.allocate_shared_memory()
    gl.warp_specialize(
        [(_load, (ring,)), (_store, (ring,))],
    )
"""
RACE = """\
========= COMPUTE-SANITIZER
========= Error: Race reported between Read access at moe_sum_bf16_kernel+0xf0 in bf16.py:{read}
=========     and Write access at moe_sum_bf16_kernel+0x8520 in bf16.py:5 [8 hazards]
=========     and Write access at moe_sum_bf16_kernel+0xea60{write} [2 hazards]
=========
========= RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)
"""
AT_CALL = " in bf16.py:7"
TORCH = "void at::native::vectorized_elementwise_kernel<4, at::native::FillFunctor<float>>(int)+0x80"


OURS = "moe_sum_bf16_kernel+0x80"


@pytest.mark.parametrize("tool, where, aside", [("initcheck", TORCH, 1), ("memcheck", TORCH, 0), ("initcheck", OURS, 0)])
def test_what_torch_reads_is_set_aside(tool: str, where: str, aside: int) -> None:
    """initcheck alone looks at kernels of torch; each is named."""
    (complaint,) = complaints_of(LOGS["initcheck"].replace("moe_sum_bf16_kernel+0x80", where), tool, KNOWN)
    assert (len(Result({}, [tool], {}, [complaint], 1.0).set_aside), where.partition("+")[0] in complaint.text) == (aside, True)


@pytest.mark.parametrize(
    ("tool", "read", "write", "is_aside"),
    [
        ("racecheck", 5, AT_CALL, True),
        ("racecheck", 6, AT_CALL, False),  # the ring is the template's own
        ("racecheck", 5, " in bf16.py:8", False),
        ("racecheck", 5, " in _gluon.py:7", False),
        ("racecheck", 5, "", False),  # at an unknown line
        ("memcheck", 5, AT_CALL, False),
    ],
)
def test_a_handover_of_roles_is_set_aside(tmp_path: Path, tool: str, read: int, write: str, *, is_aside: bool) -> None:
    """Where all accesses are of lines at which Triton, not the template, reads and writes."""
    module = tmp_path / "bf16.py"
    module.write_text(SPLIT)
    (complaint,) = complaints_of(RACE.format(read=read, write=write), tool, {"moe_sum_bf16": module})
    result = Result({}, [tool], {}, [complaint], 1.0)
    assert (len(result.findings), sum(map(len, result.as_json()["set_aside"].values()))) == ((0, 1) if is_aside else (1, 0))
    assert result.summary().endswith("0 complaints, 1 set aside" if is_aside else "1 complaints")


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A stand-in for compute-sanitizer: it runs what it is told to, and writes a log that a file beside it holds."""
    file = tmp_path / "compute-sanitizer"
    file.write_text(f"""#!{sys.executable}
import subprocess, sys
if "--version" in sys.argv:
    print("Version 1.2.3")
    raise SystemExit
at = sys.argv.index({sys.executable!r})
open(sys.argv[sys.argv.index("--log-file") + 1], "w").write(open({str(tmp_path / "log")!r}).read())
raise SystemExit(subprocess.run(sys.argv[at:]).returncode)
""")
    file.chmod(file.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    (tmp_path / "log").write_text("")
    return tmp_path


def test_what_is_said_reaches_the_result(program: Path, tmp_path: Path) -> None:
    """A process under the tool runs the cases; what the tool says of a kernel is told of its variant, and its text hashed."""
    (program / "log").write_text(LOGS["memcheck"].replace("moe_sum_bf16_weighted", "moe_runs_one_launch"))
    told: list[str] = []
    result = run(ROOT, ROOT / "specs", only="moe_runs_one_launch", tools=["memcheck"], device="cpu", tell=told.append)
    assert [line.partition(": ")[2] for line in told] == [
        "1 cases under no tool, 0 complaints",
        "1 cases under memcheck, 1 complaints",
        "moe_runs_one_launch: Invalid __global__ read of size 2 bytes, in moe_runs_one_launch_kernel",
    ]
    assert [(c.tool, c.variant) for c in result.complaints] == [("memcheck", "moe_runs_one_launch")], result.complaints
    assert result.versions["compute-sanitizer"] == "1.2.3" and list(result.checked) == ["moe_runs_one_launch"]

    file, document = tmp_path / "result.json", result.as_json()
    file.write_text(json.dumps(document))
    assert not compare(ROOT, file, "moe_runs_one_launch")
    document["variants"]["moe_runs_one_launch"]["sha256"] = "0" * 64
    file.write_text(json.dumps(document))
    assert [finding.code for finding in compare(ROOT, file, "moe_runs_one_launch")] == ["KG064"]
    file.write_text("[]")
    with pytest.raises(Failure, match="KG072"):
        compare(ROOT, file, "moe_runs_one_launch")


def test_a_tool_that_sees_no_gpu_ends_the_run(program: Path) -> None:
    """In front of all cases, with what it says."""
    (program / "log").write_text("========= COMPUTE-SANITIZER\n========= Error: Device not supported. Please refer to\n")
    with pytest.raises(Failure, match=r"KG061\]: it cannot look at this GPU: Error: Device not supported"):
        run(ROOT, ROOT / "specs", tools=["memcheck"], device="cpu")


def test_each_text_is_met() -> None:
    """Every schedule of every family is among what runs."""
    for suite in suites(ROOT).values():
        met = {mark for variant, _ in suite.each_text for mark in suite.marks(variant)}
        assert met == {mark for variant, case in suite.pairs if not case.needs_gpu for mark in suite.marks(variant)}
