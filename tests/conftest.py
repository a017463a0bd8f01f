"""How kernels run in the tests: compiled where there is a GPU, else interpreted, with the interpreter repaired.

TRITON_INTERPRET=1 interprets on a machine with a GPU too; TRITON_INTERPRET=0 keeps it off without one, for tests that compile.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

# Triton reads it where a kernel is decorated, so it is set before anything imports triton.
os.environ.setdefault("TRITON_INTERPRET", "0" if torch.cuda.is_available() else "1")
INTERPRETED = os.environ["TRITON_INTERPRET"] == "1"

torch.set_num_threads(1)  # a process of pytest-xdist is a core
if INTERPRETED:
    from kernelgen import interpreter

    interpreter.install()


@pytest.fixture(scope="session")
def device() -> str:
    """Where kernels run: "cuda" compiled, "cpu" interpreted; skips where they can do neither."""
    if INTERPRETED:
        return "cpu"
    if not torch.cuda.is_available():
        pytest.skip("no GPU, and TRITON_INTERPRET=0")
    return "cuda"


@pytest.fixture
def kernelgen(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    """Runs the command line in this process: (exit code, stdout, stderr)."""
    from kernelgen import cli, entry

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["kernelgen", *arguments])
        code = entry.exit_code(cli.commands)
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return run
