"""Faults of order, seeded into kernels whose warps have roles: the interpreter of Gluon must show each, and as what it is.

On a GPU most of them are a hang, or wrong once in many runs.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from pathlib import Path
from typing import Any, Iterator

import pytest
import torch
import triton

import generated as kg
from generated import _runtime as runtime
from generated.moe_gemm import _op as gemm_op
from generated.moe_gemm import _problem as gemm
from kernelgen.emit.lint import faults
from kernelgen.families.moe_experts import Experts
from kernelgen.families.moe_gemm.cases import CASES, Case
from kernelgen.families.moe_gemm.laws import fp8_layer
from kernelgen.prove.gluon import Deadlock
from kernelgen.prove.interpreter import MemoryFault, OutOfBounds, Race
from kernelgen.prove.mutate import Bench

ROOT = Path(__file__).parent.parent
FIRST = "moe_gemm_warp_specialised_bf16_token_sorted_swiglu_plain_w8group_a8group"
SECOND = "moe_gemm_warp_specialised_bf16_sorted_pair_plain_w8group_a8group"
FIRST_16, SECOND_16 = (name.removesuffix("_w8group_a8group") for name in (FIRST, SECOND))
ADAPTED, ADAPTED_16 = f"{FIRST}_lora", f"{SECOND_16}_lora"
LANES = "moe_gemm_lanes_bf16_sorted_pair_plain_mxfp4"

pytestmark = pytest.mark.skipif(not triton.knobs.runtime.interpret, reason="kernels are compiled, not interpreted")

# Two tiles a program, of two halves and of one; a ring of three slots for three steps, and some over ranks.
ROLES, OF_LANES = (next(case for case in CASES if case.name == name) for name in ("roles", "lanes"))
CASE: Case = dataclasses.replace(ROLES, n=128, experts=3, rank=24, tiles={"num_stages": 3})

WAIT_FULL = "mbarrier.wait(full.index(slot), phase)\n"
WAIT_NEXT = "mbarrier.wait(full.index(slot), phase, pred=step + 1 < STEPS)\n"
WAIT_EMPTY = "mbarrier.wait(empty.index(slot), phase)\n"
GIVE_BACK = "mbarrier.arrive(empty.index(slot), count=1)\n"
GIVE_BACK_LAST = "mbarrier.arrive(empty.index(_before(slot, 1, STAGES)), count=1)\n"
TURN = "slot, phase = _after(slot, phase, STAGES)\n"

# What is wrong: the variant, what stands there, what is put there, where (0: everywhere, else which), and what it shows as.
FAULTS = {
    "no wait for what is copied": (FIRST, WAIT_FULL, "pass\n", 0, Race),
    "no wait for boxes": (SECOND, WAIT_FULL, "pass\n", 1, Race),
    "no wait for the next step": (FIRST, WAIT_NEXT, "pass\n", 0, Race),
    "a wait behind the last step": (SECOND, WAIT_NEXT, WAIT_FULL, 0, Deadlock),
    "sums that are added while they are made": (SECOND, "sums = warpgroup_mma_wait(0, deps=[sums])\n", "pass\n", 0, MemoryFault),
    "no wait for a free slot": (FIRST, WAIT_EMPTY, "pass\n", 0, MemoryFault),
    "slots that count as copied at first": (FIRST, "phase = gl.to_tensor(0)", "phase = gl.to_tensor(1)", 1, Race),
    "slots that count as full at first": (SECOND, "phase = gl.to_tensor(1)", "phase = gl.to_tensor(0)", 1, Deadlock),
    "slots that are not given back": (FIRST, GIVE_BACK_LAST, "pass\n", 1, Deadlock),
    "slots that a half without rows keeps": (SECOND, GIVE_BACK, "pass\n", 1, Deadlock),
    "slots that are given back while they are read": (
        SECOND,
        f"others = warpgroup_mma_wait(0, deps=[others])\n                {GIVE_BACK_LAST}",
        f"{GIVE_BACK_LAST}                others = warpgroup_mma_wait(0, deps=[others])\n",
        0,
        Race,
    ),
    "half of a slot's readers": (FIRST, "empty.index(i), count=2", "empty.index(i), count=1", 0, MemoryFault),
    "a reader too many": (SECOND, "empty.index(i), count=2", "empty.index(i), count=3", 0, Deadlock),
    "threads that are not counted": (FIRST, "full.index(i), count=2", "full.index(i), count=1", 0, MemoryFault),
    "a barrier without a count": (SECOND, "mbarrier.init(empty.index(i), count=2)", "pass", 0, MemoryFault),
    "fewer bytes than are copied": (SECOND, "+ 64 * 128, pred", ", pred", 0, Race),
    "more bytes than are copied": (FIRST, "2 * 128 * 128)", "3 * 128 * 128)", 0, Deadlock),
    "a ring with a slot more": (FIRST, "slot == STAGES", "slot == STAGES + 1", 0, OutOfBounds),
    "a ring with a slot less": (SECOND, "slot == STAGES", "slot == STAGES - 1", 0, MemoryFault),
    "a phase that does not turn": (SECOND, "phase ^ wraps", "phase", 0, MemoryFault),
    "a role that stands still": (FIRST, TURN, "pass\n", 2, MemoryFault),
    "rows without a fence": (FIRST, "fence_async_shared()\n", "pass\n", 0, Race),
    "a fence in front of the rows": (
        FIRST,
        "wait_rows(BEHIND)\n    fence_async_shared()",
        "fence_async_shared()\n    wait_rows(BEHIND)",
        0,
        Race,
    ),
    "rows that nobody waited for": (FIRST, "wait_rows(BEHIND)", "wait_rows(BEHIND + 1)", 0, Race),
    "rows of another step": (FIRST, "_before(slot, BEHIND, STAGES)", "_before(slot, BEHIND - 1, STAGES)", 0, Deadlock),
    "rows of the last steps, kept": (FIRST, "for _ in range(BEHIND)", "for _ in range(BEHIND - 1)", 0, Deadlock),
    "rows that are handed over before the first": (FIRST, "pred=asked >= BEHIND", "pred=True", 0, MemoryFault),
    "sums that are not waited for": (SECOND, "sums = warpgroup_mma_wait(0, deps=[sums])\n", "pass\n", 0, MemoryFault),
    "sums that are waited for with the next ones": (FIRST, "wait(0, deps=[others]", "wait(1, deps=[others]", 0, MemoryFault),
    "slots that are given back before their products are waited for": (SECOND_16, "wait(1, deps", "wait(2, deps", 0, Race),
    "no slot in front of the first": (FIRST_16, "STAGES * (slot < STEPS)", "0 * (slot < STEPS)", 0, OutOfBounds),
    "a slot that is given back twice": (SECOND_16, "pred=step > 0", "pred=True", 0, Race),
    "the last slot of a tile, kept": (FIRST_16, GIVE_BACK_LAST, "pass\n", 0, Deadlock),
    "the last sums of a tile": (SECOND_16, "acc = warpgroup_mma_wait(0, deps=[acc])\n", "pass\n", 0, MemoryFault),
    "half of the rows of W": (FIRST_16, "slice(128, 128)", "slice(0, 128)", 0, Race),
    "ranks that nobody waits for": (
        ADAPTED,
        "_rank_steps(run_of_row_ptr, first, rows, RANK)\n            for",
        "0, 0\n            for",
        0,
        Deadlock,
    ),
    "ranks that are handed over a step late": (ADAPTED, "wait_rows(BEHIND)", "wait_rows(BEHIND + 1)", 0, Race),
    "ranks that arrive before they are copied": (
        ADAPTED_16,
        "mbarrier.arrive(arrived, count=1)",
        "mbarrier.arrive(arrived, count=2)",
        0,
        MemoryFault,
    ),
    "steps of K that nobody arrives for": (
        ADAPTED_16,
        "mbarrier.arrive(arrived, count=1)  # of what hands over rows in other steps",
        "pass",
        0,
        Deadlock,
    ),
    "ranks of the last steps, kept": (ADAPTED_16, "for _ in range(BEHIND)", "for _ in range(BEHIND - 1)", 0, Deadlock),
    "ranks that are read as FP8": (ADAPTED, "ranks = v_slots", "ranks = x_slots", 0, MemoryFault),
    "ranks of another run": (ADAPTED_16, "(run_high[:, None] == run[None, :]) & ", "", 0, AssertionError),
    "one place for the rows of both halves": (SECOND, "staging.index(HALF)", "staging.index(0)", 0, Race),
    "no wait for copies of threads": (LANES, "wait_rows(STAGES - 2)", "pass", 0, Race),
    "a wait for copies that are older": (LANES, "wait_rows(STAGES - 2)", "wait_rows(STAGES - 1)", 0, Race),
    "copies of no group": (LANES, "commit_rows()", "pass", 0, Race),
    "copies that a tile leaves behind": (LANES, "wait_rows(0)", "pass", 0, Race),
    "copies to the slot that is read": (LANES, "slot - 1 + STAGES * (slot == 0).to(gl.int32)", "slot", 0, Race),
    "copies to no slot": (LANES, "STAGES * (slot == 0)", "0 * (slot == 0)", 0, OutOfBounds),
    "x in another order than W": (LANES, "x = in_order(x, SECOND)", "pass", 0, AssertionError),
    "scales of the step in front": (LANES, "(k0 + 2 * STEP) // 32", "(k0 + STEP) // 32", 0, AssertionError),
    "rows of the other half": (SECOND, "x_slots.index(2 * slot + HALF)", "x_slots.index(2 * slot)", 0, AssertionError),
}


@pytest.fixture(scope="module")
def bench() -> Iterator[Bench]:
    with Bench(ROOT) as found:
        yield found


def replaced(text: str, old: str, new: str, place: int) -> str:
    """With ``old`` replaced, everywhere or in one place, from 1."""
    parts = text.split(old)
    assert len(parts) > max(place, 1), f"{old!r} stands there {len(parts) - 1} times"
    if place == 0:
        return new.join(parts)
    return old.join(parts[:place]) + new + old.join(parts[place:])


@pytest.mark.parametrize("name", FAULTS)
def test_an_order_that_is_wrong_is_shown(name: str, bench: Bench) -> None:
    of, old, new, place, shown = FAULTS[name]
    suite, variant = next(found for found in bench.variants() if found[1].name == of)
    _, changed = bench.place(variant, replaced(bench.source(variant), old, new, place))
    with pytest.raises(shown):
        case = OF_LANES if of == LANES else CASE
        suite.check_launcher(bench.package, changed.launcher(bench.package), variant, case, "cpu")


TRAP = """
from triton.experimental import gluon


@gluon.jit
def consume(slot, phase, empty, full, STEPS):
    old = slot
    for step in range(STEPS):
        wait(full, slot, phase)
        arrive(empty, old)
        {line}
        slot += 1
"""


@pytest.mark.parametrize(
    ("line", "count"), [("old = slot", 1), ("old, now = slot, phase", 1), ("old = slot + 0", 0), ("old = phase", 0)]
)
def test_a_name_that_triton_would_not_carry_around_a_loop_is_refused(line: str, count: int) -> None:
    """``old`` has the value of ``slot`` in front of the loop, and in what Triton takes for its first turn: it stays so, and a
    barrier of another slot waits for ever. As Python it is right, so that no run on the CPU can show it."""
    found = [fault for fault in faults("generated/x/y.py", TRAP.format(line=line)) if "changes later" in fault.message]
    assert len(found) == count


def _fp8_layer(tokens: int) -> tuple[tuple[torch.Tensor, ...], dict[str, Any]]:
    """A layer of two experts, with groups: what fused_moe is given, and what by name."""
    numbers = torch.Generator().manual_seed(0)
    normal = functools.partial(torch.randn, generator=numbers)
    x, x_scale = kg.quantize_activations(normal(tokens, 128), "group")
    (w13, s13), (w2, s2) = (kg.quantize_weights(normal(2, 256, 128) / 8, "group", slices=n) for n in (2, 1))
    layer = (x, w13, w2[:, :128].contiguous(), torch.randint(2, (tokens, 1), generator=numbers), torch.ones(tokens, 1))
    return layer, {"activation": "swiglu", "w13_scale": s13, "w2_scale": s2[:, :1].contiguous(), "x_scale": x_scale}


def _adapters(tokens: int) -> kg.FusedMoeLora:
    """One adapter of rank 16, which two thirds of the tokens do not have."""
    numbers = torch.Generator().manual_seed(1)
    a, b = ((torch.randn(1, 2, *shape, generator=numbers) / 8).bfloat16() for shape in ((16, 128), (128, 16)))
    return kg.FusedMoeLora(torch.arange(tokens, dtype=torch.int32) % 3 - 1, (a, a), (b, b), (a,), (b,))


def test_a_layer_does_what_tuning_says_of_its_first_product(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that become FP8 at once, rows of x in order, or both, with the bits of the layer without; and neither by itself."""
    for module in (gemm, gemm_op):
        monkeypatch.setattr(module, "has_gluon", lambda: True)
    layer, given = _fp8_layer(300)
    for lora in (None, _adapters(300)):
        with runtime.choosing({}) as choices, runtime.launches() as stock:
            wanted = kg.fused_moe(*layer, **given, lora=lora)
        first = next(choice.key for choice in choices if isinstance(choice.key, gemm.Key) and choice.key.reads_token)
        usual = [launch.family for launch in stock]
        for at_once, in_order in itertools.product((False, True), repeat=2):
            asked = itertools.product({False, at_once}, {True, not in_order})
            keys = [first._replace(writes_fp8=writes_fp8, reads_token=by_token) for writes_fp8, by_token in asked]
            forced = {(type(first), key): (("warp_specialised", (2, 1, 1)),) for key in keys}
            with runtime.choosing(forced), runtime.launches() as launches:
                assert torch.equal(kg.fused_moe(*layer, **given, lora=lora), wanted)
            families = [launch.family for launch in launches]
            assert ("moe_permute" in families) == in_order
            assert ("moe_quant" not in families) == (at_once and lora is None)
            assert [f for f in families if f not in ("moe_permute", "moe_quant")] == [f for f in usual if f != "moe_quant"]


@pytest.mark.parametrize("adapted", [False, True])
def test_blocks_are_taller_where_tuning_says_so(adapted: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of some 64 rows an expert, which then have a block each; and nowhere else, nor where no warps have roles."""
    for module in (gemm, gemm_op):
        monkeypatch.setattr(module, "has_gluon", lambda: True)
    given = _fp8_layer(100)
    lora = _adapters(100) if adapted else None
    with runtime.choosing({}) as choices:
        low = kg.fused_moe(*given[0], **given[1], lora=lora)
    first = next(choice.key for choice in choices if isinstance(choice.key, gemm.Key) and choice.key.reads_token)
    assert first.block_m == 64
    forced = {(type(first), first._replace(block_m=128)): (("warp_specialised", (2, 1, 1)),)}
    with runtime.choosing(forced) as choices, runtime.launches() as launches:
        tall = kg.fused_moe(*given[0], **given[1], lora=lora)
    taken = [(choice.key.block_m, choice.schedule) for choice in choices if isinstance(choice.key, gemm.Key)]
    assert {height for height, _ in taken} == {128} and taken[0][1] == "warp_specialised"
    assert launches[0].constants["BLOCK_M"] == 128
    assert torch.equal(tall, low) if lora is None else torch.allclose(tall, low, rtol=0.05, atol=0.05)
    with runtime.choosing({(type(first), first._replace(block_m=128, n=first.n + 128)): forced.popitem()[1]}) as choices:
        kg.fused_moe(*given[0], **given[1], lora=lora)
    assert {choice.key.block_m for choice in choices if isinstance(choice.key, gemm.Key)} == {64}


@pytest.mark.parametrize("tokens", [1, 2, 3, 20])
def test_a_layer_of_mxfp4_goes_through_lanes(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Dispatch takes them on a GPU alone; few tokens do without tables and without a launch that adds up."""
    monkeypatch.setattr(gemm, "has_gluon", lambda: True)
    routing = Experts("mixed", start=1) if tokens == 3 else Experts()
    call = fp8_layer(kg, tokens, routing, "cpu", ("mx", None, "swiglu_clamp"), hidden=160, inter=96)
    with runtime.compile_only():  # what is remembered was bound without
        pass
    with runtime.launches() as launches:
        call.verify(call.run(kg))
    taken = [launch.variant.partition("_bf16")[0] for launch in launches]
    assert taken == ["lane_gemv"] * 2 if tokens < 3 else [name for name in taken if name == "lanes"] == ["lanes"] * 2
    with runtime.compile_only():
        pass


@pytest.mark.parametrize("k, parts, told", [(64, 3, "a divisor of columns = 8"), (64, 16, "a div"), (8224, 2, "parts of")])
def test_parts_of_k_that_no_column_takes_are_refused(k: int, parts: int, told: str) -> None:
    from generated.moe_gemm import lane_gemv_bf16_token_pair_swiglu_clamp_plain_mxfp4 as of_pairs

    x, w, w_scale = (torch.zeros(size, dtype=torch.uint8) for size in ((1, 2 * k), (1, 32, k // 2), (1, 32, k // 32)))
    tables = kg.no_tables(torch.zeros(1, 1, dtype=torch.int32), num_experts=1)
    out, x = torch.zeros(1, 16, dtype=torch.bfloat16), x.view(torch.bfloat16)
    with pytest.raises(ValueError, match=f"parts: got {parts}, wanted {told}"):
        tiles = of_pairs.Config(parts, 1)
        of_pairs.schedule.launch(tiles, out=out, x=x, w=w, tables=tables, w_scale=w_scale, limit=7.0, alpha=1.0, beta=0.0)
