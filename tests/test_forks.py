"""Work in other processes: what must not meet in one, a process that ends, and the end of the command that started them."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from kernelgen.core.processes import Fault, in_processes

ROOT = Path(__file__).parent.parent


def test_items_apart_never_meet_in_a_process() -> None:
    items = list(range(8))
    processes = in_processes(lambda item: os.getpid(), items, workers=2, apart=lambda item: item % 2)
    even, odd = set(processes[::2]), set(processes[1::2])
    assert not even & odd


def test_results_are_in_order_and_an_ended_process_is_a_fault() -> None:
    kept = {}

    def work(item: int) -> int:
        if item == 2:
            os._exit(3)
        return 10 * item

    results = in_processes(work, range(5), workers=2, keep=kept.__setitem__, apart=lambda item: item > 3)
    assert [r for i, r in enumerate(results) if i != 2] == [0, 10, 30, 40]
    assert isinstance(results[2], Fault)
    assert kept == dict(enumerate(results))


def test_a_result_that_does_not_pickle_is_a_fault() -> None:
    (result,) = in_processes(lambda item: lambda: item, [1])
    assert isinstance(result, Fault) and "pickle" in result.reason.lower()


# Between 0 and so many seconds: while modules are imported, while processes start, while they work.
COMMANDS = {
    "list": 0.6,
    "build --check": 4,
    "verify -j 2 --only moe_*": 8,
    "compile -j 2 --only moe_act_* --full": 8,
}
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGKILL)
# Each command once, by another signal, then by the others.
STOPS = [(command, SIGNALS[(place + turn) % 3]) for turn in range(3) for place, command in enumerate(COMMANDS)]


@pytest.mark.skipif(sys.platform != "linux", reason="processes are looked up in /proc")
@pytest.mark.slow(keep=3)
@pytest.mark.parametrize(("command", "number"), STOPS, ids=str)
def test_a_command_that_is_stopped_leaves_no_process(command: str, number: signal.Signals, tmp_path: Path) -> None:
    """As a terminal does on ^C, SIGINT goes to the whole group; it ends with 130 and no traceback. Others go to the command."""
    delay = random.Random(command + number.name).uniform(0, COMMANDS[command])
    program = """
import os, signal
signal.signal(signal.SIGINT, lambda *_: os._exit(130))
from kernelgen.core import entry
print("up", flush=True)
entry.run("kernelgen.cli", "commands")
"""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"MARK": str(tmp_path), "PYTHONPATH": str(ROOT)}
    if not command.startswith("verify"):  # what is cached leaves the others little to do
        environment["KERNELGEN_CACHE_DIR"] = str(tmp_path / "cache")
    process = subprocess.Popen(
        [sys.executable, "-c", program, *command.split()],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    assert process.stdout is not None and process.stdout.readline() == b"up\n"
    time.sleep(delay)
    if number == signal.SIGINT:
        os.killpg(process.pid, number)
    else:
        process.send_signal(number)
    _, stderr = process.communicate(timeout=30)
    wanted = 130 if number == signal.SIGINT else -number
    assert (process.returncode, b"Traceback" in stderr) == (wanted, False), (delay, stderr.decode())
    deadline = time.monotonic() + 30  # processes that are killed take a moment to be gone
    while left := _marked(tmp_path):
        assert time.monotonic() < deadline, (delay, left)
        time.sleep(0.05)


def _marked(folder: Path) -> list[str]:
    """The processes whose environment names the folder."""
    found = []
    for process in Path("/proc").iterdir():
        try:
            if process.name.isdigit() and str(folder).encode() in (process / "environ").read_bytes():
                found.append((process / "cmdline").read_bytes().replace(b"\0", b" ").decode())
        except OSError:  # it has ended, or is not ours
            continue
    return found
