"""kernelgen conform: a system that is right has no finding, and one with a fault has it named, with a file that shows it."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import triton

from kernelgen.core.diagnostics import Failure
from kernelgen.measure.conform import run as conform

ROOT = Path(__file__).resolve().parent.parent
VARIANT = "lora_expand_bf16_set_r16"
SYSTEM = """
import torch

def expand(y, weights, out, mapping, offset):
    assert FACTOR
    for s, b in enumerate(weights):
        live = (mapping >= 0).nonzero()[:, 0]
        product = torch.einsum("tnr,tr->tn", b[mapping[live].long()].double(), y[s, live].to(b.dtype).double())
        out[live, offset : offset + b.shape[-2]] = (product * (FACTOR if s else 1)).to(out.dtype)
        offset += b.shape[-2]
"""
ADAPTER = """
import torch
from kernelgen.measure.conform.run import Adapter, adapters_of_tokens, theirs
from kernelgen.measure.workload import Unsupported

def expand(tags, out, y, lora_b, route, offset_start=0):
    if out.untyped_storage().nbytes() > 2**20 or out.dtype != torch.bfloat16 or lora_b[0].dim() != 3:
        raise Unsupported("small calls")
    mapping = adapters_of_tokens(route, out.device)
    theirs("a_system", "expand", y, list(lora_b), out, mapping, offset_start)

ADAPTERS = {"lora_expand": Adapter({"expand": expand}, {"weight_quant": ("none",)})}
"""

pytestmark = pytest.mark.skipif(not triton.knobs.runtime.interpret, reason="kernels are compiled, not interpreted")


def met(folder: Path, monkeypatch: pytest.MonkeyPatch, factor: str) -> conform.Result:
    (folder / "a_system.py").write_text(SYSTEM.replace("FACTOR", factor))
    (folder / "adapter.py").write_text(ADAPTER)
    monkeypatch.delitem(sys.modules, "a_system", raising=False)
    return conform.run(str(folder / "adapter.py"), ROOT, path=folder, only=VARIANT, files=folder / "files")


def test_a_system_that_is_right_has_no_finding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = met(tmp_path, monkeypatch, "1")
    assert not result.found and result.met > 10 and result.unclaimed, result.summary()


@pytest.mark.slow
def test_a_fault_is_named_and_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Slices behind the first are off."""
    result = met(tmp_path, monkeypatch, "1.02")
    assert {"offset", "query_key_value"} <= {finding.case for finding in result.found}
    assert "one" not in {finding.case for finding in result.found}
    finding = next(finding for finding in result.found if finding.case == "offset")
    assert finding.seed and finding.why and result.findings[0].code == "KG073"
    environment = {"TRITON_INTERPRET": "1", "PYTHONPATH": f"{ROOT}:{tmp_path}", "PATH": "/usr/bin:/bin"}
    shown = subprocess.run([sys.executable, finding.file], capture_output=True, text=True, check=True, env=environment).stdout
    found = re.search(r"expand: argument 3 at \((\d+), (\d+)\): got (\S+) wanted (\S+)", shown)
    assert found is not None, shown
    got, wanted = float(found[3]), float(found[4])
    assert int(found[2]) >= 24 + 40 and got == pytest.approx(1.02 * wanted, rel=0.01)


def test_a_check_that_says_nothing_has_its_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = met(tmp_path, monkeypatch, "0")
    assert {finding.error for finding in result.found} == {"AssertionError: a_system.py, line 5: assert 0"}


def test_a_system_that_is_not_there_is_said() -> None:
    with pytest.raises(Failure, match="KG071"):
        conform.run("no/such/file.py", ROOT)
