"""Receipts of numerics: an order of sums that is changed by hand is told, and rows have one term in every batch."""

from __future__ import annotations

import contextlib
import dataclasses
import re
from pathlib import Path
from typing import Any, Iterator, NamedTuple

import pytest
import torch
import triton
import triton.language as tl

from kernelgen.prove.exact import Lost
from kernelgen.prove.mutate import Bench
from kernelgen.prove.numerics import receipts
from kernelgen.prove.numerics.tape import taped
from kernelgen.prove.testing import Suite, Variant

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.skipif(not triton.knobs.runtime.interpret, reason="terms are of interpreted kernels")


class Change(NamedTuple):
    """Lines of a kernel, what stands there instead, and what the receipt says was and is."""

    kind: str
    variant: str
    lines: tuple[tuple[str, str], ...]
    says: str


_TWO = "moe_lora_two_kernel_bf16_sorted_add_weighted_r16"
_GROUPS = "moe_lora_one_shot_bf16_sorted_add_plain_r16_w8group"
CHANGES = (
    Change(
        "parts are added from the last to the first",
        _TWO,
        (("v += tl.load(part_rows + i * next_part", "v += tl.load(part_rows + (PARTS - i) * next_part"),),
        r"was bf16\(sum n\(dot_bf16\(j 64n\.\.64n\+64 by 32.*, is bf16\(\(sum .*\+ dot_bf16\(j 64\.\.128 by 32",
    ),
    Change(
        "parts are rounded before they are added",
        _TWO,
        (("* next_part, mask=v_mask, other=0.0)", "* next_part, mask=v_mask, other=0.0).to(tl.bfloat16)"),),
        r"is bf16\(\(.*bf16\(dot_bf16\(j",
    ),
    Change(
        "the routing weight is applied before the sum",
        _TWO,
        (("v = v.to(tl.bfloat16)", "v = (v * weight[:, None]).to(tl.bfloat16)"), ("y *= weight[:, None]", "y *= 1.0")),
        r"is .*bf16\(\(bf16\(.*\) \* topk_weights\[\., \.\]\)\) \* b|is .*\* topk_weights.*\* b\[",
    ),
    Change(
        "tiles are summed apart",
        _TWO,
        (("tl.dot(x, p[2].T, p[1])", "p[1] + tl.dot(x, p[2].T)"),),
        r"was .*dot_bf16\(j 64n\.\.64n\+64 by 32.*, is .*sum n\(dot_bf16\(j at 32n in 32",
    ),
    Change(
        "a scale is applied to an operand",
        _GROUPS,
        (("tl.dot(v[s], b.T) * b_scale", "tl.dot((v[s].to(tl.float32) * b_scale).to(tl.bfloat16), b.T)"),),
        r"is .*bf16\(\(.* \* b_scale.*\) \* bf16\(b\[",
    ),
)


@pytest.fixture(scope="module")
def bench() -> Iterator[Bench]:
    with Bench(ROOT) as made:
        yield made


def _found(bench: Bench, name: str) -> tuple[Suite, Variant]:
    return next(found for found in bench.variants() if found[1].name == name)


@pytest.mark.slow(keep=2)
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.kind)
def test_a_change_of_order_is_told(change: Change, bench: Bench) -> None:
    suite, variant = _found(bench, change.variant)
    case = suite.exact_cases(variant)[0]
    text = bench.source(variant)
    for before, after in change.lines:
        assert before in text
        text = text.replace(before, after)
    package, changed = bench.place(variant, text)
    with taped() as tape, contextlib.suppress(AssertionError):  # some are beyond the bound too, which does not say why
        dataclasses.replace(suite, package=package).check(changed, case, "cpu")
    known = receipts.read(ROOT / receipts.FILE)[variant.name, case.name]
    told = "\n".join(receipts.changes(known, receipts.terms(tape)))
    assert re.search(change.says, told), told


_BATCHES = (
    "moe_lora_one_shot_bf16_sorted_add_weighted_r64_w8channel",
    "moe_lora_small_batch_bf16_naive_add_weighted_r16",
    "moe_lora_two_kernel_bf16_sorted_add_weighted_rany",
    "moe_gemm_tile_bf16_sorted_pair_plain",
    "moe_gemm_gemv_bf16_pair_token_weighted",
)


@pytest.mark.slow(keep=1)
@pytest.mark.parametrize("name", _BATCHES)
def test_a_row_has_one_term_in_every_batch_and_shard(name: str, bench: Bench) -> None:
    """All rows that a launch stores have the same term, and have it with more rows beside them, and with fewer; and shards of
    columns, and of what is summed over, have it too: over GPUs, results are added that are each of this term."""
    suite, variant = _found(bench, name)
    case: Any = suite.exact_cases(variant)[0]

    def terms(**sizes: int) -> set[str]:
        with taped() as tape:
            suite.check(variant, dataclasses.replace(case, **sizes), "cpu")
        return {term for term in receipts.terms(tape, sample=None) if not term.endswith(": 0")}

    alone = terms(tokens=1)
    assert len(alone) == 1 and terms(tokens=2) == terms(tokens=5) == alone
    whole = terms(tokens=2, k=512)
    assert len(whole) == 1 and terms(tokens=2, k=256) == whole
    assert not hasattr(case, "n") or terms(tokens=2, k=256, n=case.n // 2) == whole


@triton.jit
def _rooted(x_ptr, y_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(y_ptr + i, tl.sqrt(tl.load(x_ptr + i)) + tl.cumsum(tl.load(x_ptr + i), 0))


def test_what_has_no_rule_is_refused() -> None:
    x, y = torch.rand(8), torch.empty(8)
    with taped(), pytest.raises(Lost, match=r"line \d+ of test_numerics.py"):
        _rooted[(1,)](x, y, N=8)
