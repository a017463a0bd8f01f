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

from kernelgen.core import names
from kernelgen.prove.exact import Lost
from kernelgen.prove.mutate import Bench
from kernelgen.prove.numerics import receipts
from kernelgen.prove.numerics.tape import taped
from kernelgen.prove.testing import Suite, Variant, text_of
from kernelgen.prove.verify import suites

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.skipif(not triton.knobs.runtime.interpret, reason="terms are of interpreted kernels")


class Change(NamedTuple):
    """Lines of a kernel, what stands there instead, and what the receipt says was and is."""

    kind: str
    variant: str
    lines: tuple[tuple[str, str], ...]
    says: str
    case: str = "exact"


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
        (("tl.dot(x, p[2].T, p[1])", "p[1] + tl.where(live[:, None], tl.dot(x, p[2].T), 0.0)"),),
        r"was .*dot_bf16\(j 64n\.\.64n\+64 by 32.*, is .*sum n\(dot_bf16\(j at 32n in 32",
    ),
    Change(
        "a scale is applied to an operand",
        _GROUPS,
        (("tl.dot(v[s], b.T) * b_scale", "tl.dot((v[s].to(tl.float32) * b_scale).to(tl.bfloat16), b.T)"),),
        r"is .*bf16\(\(.* \* b_scale.*\) \* bf16\(b\[",
    ),
    Change(
        "experts of a token are added from the last to the first",
        "moe_gemm_gemv_bf16_pair_token_weighted",
        (("for j in tl.static_range(TOP_K):", "for i in tl.static_range(TOP_K):\n        j = TOP_K - 1 - i"),),
        r"in topk_weights of .*: was topk_weights\[\., \.\+m\], is topk_weights\[\., \.-m\]",
        "exact_several",
    ),
    Change(
        "a bias goes in front of the delta",
        "moe_gemm_tile_bf16_sorted_pair_plain_lora_bias",
        (
            ("    acc += 0.0\n", "    acc += tl.load(bias_ptr + expert * BIAS_STRIDE + w_row).to(tl.float32)\n"),
            ("acc += bias[None, :]", ""),
        ),
        r"was bf16\(\(dot_bf16\(.*, from dot_bf16\(.* \+ bias\[\., \.\]\)\), is .*, from \(dot_bf16\(.*\) \+ bias\[\., \.\]\)\)",
    ),
    Change(
        "a gate is rounded before it meets up",
        "moe_gemm_tile_bf16_token_sorted_swiglu_plain",
        (("gate / (1.0 + tl.exp(-gate)) * up", "(gate / (1.0 + tl.exp(-gate))).to(tl.bfloat16) * up"),),
        r"is .* \* bf16\(\(t1 / \(exp\(neg\(t1\)\) \+ 1\)\)\)",
    ),
    Change(
        "the chunks of ranks change places",
        "lora_expand_bf16_add_rany",
        (
            ("tl.dot(v_chunks[0], b_chunks[0].T)", "tl.dot(v_chunks[CHUNKS - 1], b_chunks[CHUNKS - 1].T)"),
            (
                "tl.dot(v_chunks[c], b_chunks[c].T, product)",
                "tl.dot(v_chunks[CHUNKS - 1 - c], b_chunks[CHUNKS - 1 - c].T, product)",
            ),
        ),
        r"was dot_bf16\(i by 128: .*, is dot_bf16\(i in 128: .*, from dot_bf16\(i at 128 in 128: ",
    ),
    Change(
        "a product no longer begins at what is added to it",
        "lora_expand_bf16_add_r16",
        (("product = tl.dot(v, b.T)", "product = tl.where(live[:, None], tl.dot(v, b.T), 0.0)"),),
        r"was bf16\(dot_bf16\(i in 16: .*, from out\[\., \.\]\)\), is bf16\(\(dot_bf16\(.*\) \+ out\[\., \.\]\)\)",
    ),
    Change(
        "K is summed from its end",
        "moe_gemm_tile_bf16_sorted_pair_plain_w8tensor_a8tensor",
        (
            (
                "for k0 in tl.range(0, K, BLOCK_K, num_stages=STAGES):",
                "for k1 in tl.range(0, K, BLOCK_K):\n        k0 = K // BLOCK_K * BLOCK_K - k1",
            ),
        ),
        r"is dot_e4m3\(i in 64: .*, from dot_e4m3\(i at 64 in 64: .*, from dot_e4m3\(i at 128 in 64: ",
    ),
    Change(
        "quarters of parts are one chain",
        "lora_shrink_bf16_r16",
        (("            quarter += tl.load", "            total += tl.load"),),
        r"in the whole: was \(sum n\(dot_bf16\(i 64n.* \+ each m\(sum n\(dot_bf16.*, is \(sum n\(dot_bf16\(i 64n.* \+ each",
    ),
    Change(
        "parts are added from the last to the first, by a sum that has three and more",
        "moe_lora_shrink_pairs_bf16_r16",
        (("total += tl.load(parts_ptr + i * next_part", "total += tl.load(parts_ptr + (PARTS - i) * next_part"),),
        r"was y: sum n\(sum\(i at 64n in 64: .*, is y: \(sum n\(sum\(i at 192n in 64: .* \+ each n\(sum\(i at -64n\+128 in 64: ",
        "exact_parts",
    ),
    Change(
        "each tile of K is reduced by itself",
        "moe_shrink_pairs_bf16_token_pair",
        (
            ("acc = tl.zeros([BLOCK_R, BLOCK_K], tl.float32)", "acc = tl.zeros([BLOCK_R], tl.float32)"),
            ("acc += a.to(tl.float32) * x[None, :]", "acc += tl.sum(a.to(tl.float32) * x[None, :], 1)"),
            ("total = tl.sum(acc, 1)", "total = acc"),
        ),
        r"was v: sum\(i in 64: sum n\(.*, is v: sum n\(sum\(i at 64n in 64: ",
        "ragged",
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
    case = next(case for case in suite.exact_cases(variant) if case.name == change.case)
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


def test_every_variant_has_a_receipt() -> None:
    """And no other has one: the lock is whole. Variants that differ in dtype alone round to theirs, and add in one order."""
    known, terms, without = receipts.read(ROOT / receipts.FILE), dict[tuple[Any, ...], set[str]](), set()
    wanted = [(suite, v, case) for suite in suites(ROOT).values() for v in suite.variants for case in suite.exact_cases(v)]
    assert known.keys() == {(v.name, case.name) for _, v, case in wanted}
    for suite, variant, case in wanted:
        told = {term.replace(variant.tags.get("dtype", "T"), "T") for term in known[variant.name, case.name]}
        assert terms.setdefault((suite.family, text_of(variant), case.name), told) == told, variant
    without = {suite.family for suite in suites(ROOT).values() for v in suite.variants if not suite.exact_cases(v)}
    assert without == {"moe_align", "moe_route", "moe_runs"}, "these make whole numbers alone"


def test_cases_come_to_every_sum_of_a_text(bench: Bench) -> None:
    """Of each class of tiles: kernelgen numerics says where none does."""
    suite, variant = _found(bench, "lora_shrink_bf16_r16")
    path = ROOT / names.family_path(variant.family, variant.module)
    first, *rest = [receipts.trace_case(suite, variant, case, path) for case in suite.exact_cases(variant)]
    assert any("s[3] + s[2]" in each.statement for each in first.sums - first.ran)
    assert first.ran.union(*(each.ran for each in rest)) == first.sums


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
