"""A sample of the mutants of a variant of each schedule: the cases must kill each. ``kernelgen mutate`` tries all."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Iterator

import pytest
import triton

from kernelgen.prove import mutate, mutate_host
from kernelgen.prove.mutate import Bench, Mutant, mutants

ROOT = Path(__file__).resolve().parent.parent
VARIANTS = [
    "moe_lora_one_shot_bf16_sorted_add_weighted_r16",
    "moe_lora_two_kernel_f16_sorted_add_weighted_r16",
    "moe_lora_small_batch_bf16_naive_add_weighted_r16",
    "moe_route_one_launch",
    "moe_route_from_tables",
]
SOURCE = """
import triton
import triton.language as tl


def not_a_kernel(a, b):
    return a + b


@triton.jit
def toy_kernel(x_ptr, y_ptr, n, N: tl.constexpr, PDL: tl.constexpr):
    i = tl.arange(0, N)
    if PDL:
        wait(n + 1)
    if n < 1:
        return
    x = tl.load(x_ptr + i, mask=i < n, other=0.0)
    x *= 2.0
    tl.store(y_ptr + i, x.to(tl.float16))
"""


def sample(found: list[Mutant], turn: int) -> Iterator[Mutant]:
    """One mutant of every other operator, from the middle."""
    tried = sorted((m for m in found if not mutate.excused(m)), key=lambda m: m.operator)
    groups = [list(group) for _, group in itertools.groupby(tried, lambda mutant: mutant.operator)]
    for members in groups[turn % 2 :: 2]:
        yield members[len(members) // 2]


@pytest.mark.slow(keep=1)
@pytest.mark.skipif(not triton.knobs.runtime.interpret, reason="mutants are interpreted")
@pytest.mark.parametrize("name", VARIANTS)
def test_the_cases_kill_mutants(name: str) -> None:
    with Bench(ROOT) as bench:
        suite, variant = next(found for found in bench.variants() if found[1].name == name)
        chosen = list(sample(mutants(bench.source(variant), name), VARIANTS.index(name)))
        assert len({mutant.operator for mutant in chosen}) >= 8
        fates = [bench.fate(suite, variant, mutant) for mutant in chosen]
    living = [f"{fate.mutant}" for fate in fates if not fate.killer]
    hint = "write a case that kills it, or say in kernelgen/prove/mutate.py why it is harmless"
    assert not living, f"{name}: {hint}:\n" + "\n".join(living)


def test_every_change_is_one_of_a_kernel() -> None:
    found = mutants(SOURCE, "toy")
    assert {mutant.function for mutant in found} == {"kernel"}
    assert [(m.operator, m.before) for m in found if m.line == 17] == [
        ("mask dropped", "tl.load(x_ptr + i, mask=i < n, other=0.0)"),
        *((change, "x_ptr + i") for change in ("right side dropped", "left side dropped", "sign turned")),
        *((change, "i < n") for change in ("bound moved", "comparison turned")),
    ]
    operators = {mutant.operator for mutant in found}
    assert {"update dropped", "store dropped", "cast dropped", "exit dropped"} <= operators
    assert not any("wait" in mutant.statement for mutant in found)
    for mutant in found:
        compile(mutant.text, "mutant", "exec")
        changed = [a != b for a, b in zip(SOURCE.splitlines(), mutant.text.splitlines(), strict=True)]
        assert mutant.text != SOURCE and changed.index(True) == mutant.line - 1


def test_excuses_have_reasons() -> None:
    assert all(excuse.why for excuse in mutate.EQUIVALENT)


HOST = """
LIMIT = 4


def bind(out, x, w, scale=None, hint: int = 1):
    if scale is not None and hint < LIMIT:
        runtime.fail("bind", "scale", scale, None)
    check(x, w)
    key = Key(x.size, min(hint, len(w)))
    launch(a=out, b=x)
    return run(out, x) if hint else [part for part in w if part]
"""


def test_every_change_of_host_code_is_one_place() -> None:
    found = mutate_host.mutants(HOST)
    assert [(m.operator, m.before, m.after) for m in found if m.line in (2, 5)] == [
        ("number changed", "4", "(5)"),
        ("number changed", "1", "(2)"),
    ]
    assert [m.operator for m in found if m.line == 6] == [
        *("condition turned", "or for and, and for or", "side dropped", "side dropped", "bound moved", "bound moved")
    ]
    later = {m.operator for m in found if m.line > 6}
    assert later == {
        *("check dropped", "statement dropped", "operands exchanged", "part fixed", "condition turned", "filter dropped"),
        "least for most, and most for least",
    }
    for mutant in found:
        compile(mutant.text, "mutant", "exec")
        assert mutant.text != HOST
