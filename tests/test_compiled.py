"""Runs the tests that compile: in two processes of their own, since Triton interprets or compiles, not both."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent / "compiled"
FILES = sorted(FOLDER.glob("test_*.py"))


@pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="kernels compile here: pytest takes them in"
)
@pytest.mark.parametrize("files", [FILES[:2], FILES[2:]], ids=lambda files: "-".join(file.stem for file in files))
def test_compiled(files: list[Path], pytestconfig: pytest.Config) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *map(str, files)]
    command += ["--quick"] if pytestconfig.getoption("--quick") else []
    done = subprocess.run(
        command,
        env={**os.environ, "TRITON_INTERPRET": "0"},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
