"""Work in other processes: what must not meet in one, and a process that ends."""

from __future__ import annotations

import os

from kernelgen.forks import Fault, in_processes


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
