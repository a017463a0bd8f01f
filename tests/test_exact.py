"""Exact algebra notices what a kernel does otherwise than its formula, however small, and refuses what it has no rule for."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Iterator, NamedTuple

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from kernelgen.prove.exact import Lost, exact_algebra, field
from kernelgen.prove.mutate import Bench
from kernelgen.prove.testing import Suite

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.skipif(not triton.knobs.runtime.interpret, reason="exact algebra interprets kernels")


class Fault(NamedTuple):
    """A line of a kernel, and what stands there instead; ``hidden``: the bound on rounding lets it pass."""

    kind: str
    variant: str
    case: str
    before: str
    after: str
    hidden: bool = False


_SWIGLU = "moe_gemm_tile_bf16_token_sorted_swiglu_plain_w8group_a8group"
_TILE = "moe_gemm_tile_bf16_token_sorted_swiglu_plain"
_GEMV = "moe_gemm_gemv_bf16_pair_token_weighted_lora"
_TWO = "moe_lora_two_kernel_bf16_sorted_add_weighted_r64_w8channel"
_SHRINK = "lora_shrink_bf16_r16_w8group"
FAULTS = (
    Fault("a term at the end of K is dropped", _SWIGLU, "exact", "(k < columns - k0)", "(k < columns - 1 - k0)"),
    Fault("the scales of gate serve up too", _SWIGLU, "exact", "w_scales + W_SCALE_NEXT + n0", "w_scales + n0"),
    Fault("a scale is applied twice", _SWIGLU, "exact", "gate + tl.dot(x, w.T) * scale", "gate + tl.dot(x, w.T) * scale * scale"),
    Fault("one scale for two groups", _SHRINK, "exact", "tl.load(s[4] + k0 // 128)", "tl.load(s[4] + k0 // 256)"),
    Fault("gate and up change places", _SWIGLU, "exact", "gate / (1.0 + tl.exp(-gate)) * up", "up / (1.0 + tl.exp(-up)) * gate"),
    Fault("a routing weight is off by little", _GEMV, "exact", "(x * weight)", "(x * (weight * 1.000001))", hidden=True),
    Fault("a sum is off by little", _TWO, "exact", "y *= b_scale", "y = y * b_scale + 0.000001", hidden=True),
    Fault(
        "a silu that cancels in its tails",
        _SWIGLU,
        "exact",
        "gate / (1.0 + tl.exp(-gate)) * up",
        "(gate - gate / (1.0 + tl.exp(gate))) * up",
        hidden=True,
    ),
    Fault("the scales of another slice", _TWO, "exact", "slice_of(b_scale_ptrs, s)", "slice_of(b_scale_ptrs, s * 0)"),
    Fault("a tile is lower than its block", _TILE, "exact_tail", "HALF_M, BLOCK_N", "HALF_M // 2, BLOCK_N"),
    Fault("the last part is weighted, not the sum", _TWO, "exact", "v += tl.load(part_rows", "v = 2 * v + tl.load(part_rows"),
)


@pytest.fixture(scope="module")
def bench() -> Iterator[Bench]:
    with Bench(ROOT) as made:
        yield made


@pytest.mark.slow(keep=4)
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.kind)
def test_a_fault_changes_elements(fault: Fault, bench: Bench) -> None:
    suite, variant = next(found for found in bench.variants() if found[1].name == fault.variant)
    case = next(case for case in suite.exact_cases(variant) if case.name == fault.case)
    text = bench.source(variant)
    assert fault.before in text
    changed, mutated = bench.place(variant, text.replace(fault.before, fault.after))
    own = dataclasses.replace(suite, package=changed)
    with pytest.raises(AssertionError, match="exact algebra"):
        own.check_exactly(mutated, case, "cpu")
    if fault.hidden:
        own.check(mutated, case, "cpu")


@triton.jit
def _rooted(x_ptr, y_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(y_ptr + i, tl.sqrt(tl.load(x_ptr + i)))


@triton.jit
def _doubled(x_ptr, y_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    x = tl.load(x_ptr + i)
    tl.store(y_ptr + i, (x + x).to(y_ptr.dtype.element_ty))


def test_a_case_that_compares_nothing_is_told(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    suite, variant = next(found for found in bench.variants() if found[1].name == _TWO)
    monkeypatch.setattr(Suite, "check", lambda *given: 0.0)
    with pytest.raises(AssertionError, match="nothing was compared in exact algebra"):
        suite.check_exactly(variant, suite.exact_cases(variant)[0], "cpu")


def test_what_has_no_rule_is_refused() -> None:
    x, y = torch.rand(8), torch.empty(8)
    with exact_algebra() as algebra:
        with pytest.raises(Lost, match=r"sqrt in line \d+ of test_exact.py"):
            _rooted[(1,)](x, y, N=8)
        with pytest.raises(Lost, match=r"torch\.lgamma"):
            algebra.agree(x, torch.lgamma(x))
        _doubled[(1,)](x, y, N=8)
        algebra.agree(y, 2 * x.double())
        with pytest.raises(AssertionError, match="8 of 8 elements"):
            algebra.agree(y, 2 * x.double() + 2.0**-60)
    assert algebra.compared == 8


def test_memory_is_moved_as_numbers_are() -> None:
    with exact_algebra() as algebra:
        x = torch.rand(3, 4).to(torch.float8_e4m3fn)
        wide, parts = x.double(), [x[:, :2].float(), x[:, 2:].float()]
        algebra.agree(torch.cat(parts, 1).T, wide.T)
        algebra.agree(torch.stack([wide.sum(0), wide[[0, 2]].sum(0) + wide[1]])[1], wide.sum(0))
        wide[:, 1] = 0.5
        algebra.agree((wide @ wide.T)[0], wide @ wide[0])
        with pytest.raises(AssertionError, match="first at"):
            algebra.agree(wide, x.double())


def test_the_field_is_that_of_whole_numbers_modulo_its_prime() -> None:
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, field.P, (2, 40, 600), dtype=np.uint64)
    x[0], y[:, 0] = field.P - 1, field.P - 1
    a, b = x.astype(object), y.astype(object)
    assert (field.add(x, y) == (a + b) % field.P).all()
    assert (field.subtract(x, y) == (a - b) % field.P).all()
    assert (field.negative(x) == -a % field.P).all()
    assert (field.multiply(x, y) == a * b % field.P).all()
    assert (field.total(x, 1) == a.sum(1) % field.P).all()
    assert (field.product(x, y.T) == a @ b.T % field.P).all()
    assert (field.multiply(x[1], field.inverse(x[1])) == 1).all()
    assert field.of_float(-0.75) * 4 % field.P == field.P - 3
