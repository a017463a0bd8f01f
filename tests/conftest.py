"""How kernels run in the tests: compiled where there is a GPU, else interpreted, with the interpreter repaired.

TRITON_INTERPRET=1 interprets on a machine with a GPU too; TRITON_INTERPRET=0 keeps it off without one, for tests that compile.
With --quick tests that are marked slow are left out, and of the generated tests what ``Suite.quick`` leaves out.
"""

from __future__ import annotations

import collections
import gc
import os
import sys
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # a process of pytest-xdist is a core; numpy reads it where it is imported

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

# Triton reads it where a kernel is decorated, so it is set before anything imports triton.
os.environ.setdefault("TRITON_INTERPRET", "0" if torch.cuda.is_available() else "1")
INTERPRETED = os.environ["TRITON_INTERPRET"] == "1"

# Tests of that folder compile kernels, for GPUs that need not be there; test_compiled.py runs them.
collect_ignore_glob = ["compiled/*"] if INTERPRETED else []

gc.disable()  # until the tests are collected: nearly all that is made by then stays
torch.set_num_threads(1)
if INTERPRETED:
    from kernelgen.prove import interpreter

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
    from kernelgen import cli
    from kernelgen.core import entry

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["kernelgen", *arguments])
        code = entry.exit_code(cli.commands)
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return run


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--renew", action="store_true", help="write tests/dispatch.lock anew, instead of a comparison")
    parser.addoption("--quick", action="store_true", help="each kernel text and each kind of case once, and no slow test")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--quick"):
        tests = [item.nodeid.split("[")[0] for item in items]
        all_of, numbers = collections.Counter(tests), collections.Counter[str]()
        kept = []
        for item, test in zip(items, tests, strict=True):
            kept += [item] if is_quick(item, numbers[test], all_of[test]) else []
            numbers[test] += 1
        left = len(items) - len(kept)
        items[:] = kept
        # a process of pytest-xdist tells the one that reports
        getattr(config, "workeroutput", config.stash.setdefault(_OUTPUT, {}))["left"] = left


def pytest_collection_finish() -> None:
    gc.freeze()  # what is imported by now stays: no collection looks at it again
    gc.enable()


def pytest_unconfigure() -> None:
    gc.unfreeze()


_OUTPUT = pytest.StashKey[dict[str, Any]]()


def is_quick(item: pytest.Item, number: int = 0, of: int = 1) -> bool:
    """Whether --quick keeps a test, with the parameters of this ``number`` ``of`` all: those that are kept lie evenly."""
    slow = item.get_closest_marker("slow")
    if slow:
        keep = slow.kwargs.get("keep", 0)
        return bool(number * keep % of < keep)
    suite = getattr(item.module, "SUITE", None)
    given = getattr(item, "callspec", None)
    if suite is None or given is None or "variant" not in given.params:
        return given is None or not getattr(given.params.get("law"), "slow", False)
    kept, case = (suite.quick_exact, "exact") if "exact" in given.params else (suite.quick, "case")
    return (given.params["variant"].name, given.params[case].name) in kept


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    node.config.stash.setdefault(_OUTPUT, {}).update(node.workeroutput)


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    left = config.stash.get(_OUTPUT, {}).get("left")
    if left:
        terminalreporter.write_line(f"{left} tests are left to tools/test --all")
