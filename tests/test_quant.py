"""FP8: the helpers that make it, and the bugs of serving engines, each seeded into a kernel that a case must then fail."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import triton
import triton.language as tl

import generated as kg
from generated._mxfp4 import as_bf16, scale_as_bf16
from generated._scales import as_fp32
from kernelgen.families.moe_lora.reference import dequantise
from kernelgen.families.quant import dequantise_mxfp4
from kernelgen.prove.mutate import Bench, Mutant

ROOT = Path(__file__).resolve().parent.parent
DTYPES = [torch.float8_e4m3fn, torch.float8_e5m2]
WEIGHTS = {"tensor": (200, 300), "channel": (1, 300), "group": (128, 128)}
ACTIVATIONS = {"tensor": (200, 300), "token": (1, 300), "group": (1, 128)}


def numbers(*shape: int) -> torch.Tensor:
    """Of magnitudes that differ by rows and by columns."""
    drawn = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    drawn *= 10.0 ** torch.linspace(-2, 2, shape[-2])[:, None]
    return drawn * 10.0 ** torch.linspace(-1, 1, shape[-1])


def check(codes: torch.Tensor, scales: torch.Tensor, exact: torch.Tensor, group) -> None:
    """Codes are as near as their dtype has numbers, and the largest of a group is the largest there is."""
    info = torch.finfo(codes.dtype)
    each = dequantise(torch.ones_like(codes, dtype=torch.float32), scales, group)
    error = (dequantise(codes, scales, group) - exact.double()).abs()
    step = torch.maximum(
        exact.double().abs() * info.eps / 2, each * info.smallest_normal * info.eps / 2
    )
    assert (error <= step * (1 + 2.0**-20)).all()
    peak = codes.float().abs()[..., : group[0], : group[1]].amax((-1, -2))
    assert (peak == info.max).all()
    assert scales.dtype == torch.float32 and scales.is_contiguous()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scales", WEIGHTS)
def test_weights(scales: str, dtype: torch.dtype) -> None:
    exact = numbers(2, 3, 200, 300)
    codes, found = kg.quantize_weights(exact, scales, dtype=dtype)
    shapes = {"tensor": (2, 3), "channel": (2, 3, 200), "group": (2, 3, 2, 3)}
    assert codes.dtype == dtype and codes.shape == exact.shape and found.shape == shapes[scales]
    check(codes, found, exact, WEIGHTS[scales])


@pytest.mark.parametrize("scales", WEIGHTS)
def test_stacked_weights(scales: str) -> None:
    """Slices of a matrix are quantised as if each were one, and their scales follow each other."""
    exact = numbers(3, 160, 300)
    codes, found = kg.quantize_weights(exact, scales, slices=2)
    shapes = {"tensor": (3, 2), "channel": (3, 160), "group": (3, 2, 3)}
    apart = [kg.quantize_weights(part, scales) for part in exact.chunk(2, 1)]
    assert found.shape == shapes[scales] and codes.is_contiguous() and found.is_contiguous()
    assert torch.equal(codes.float(), torch.cat([part.float() for part, _ in apart], 1))
    joined = [each[:, None] if scales == "tensor" else each for _, each in apart]
    assert torch.equal(found, torch.cat(joined, 1))
    with pytest.raises(ValueError, match="slices: got 3, wanted a number that divides the 160 rows"):
        kg.quantize_weights(exact, scales, slices=3)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scales", ACTIVATIONS)
def test_activations(scales: str, dtype: torch.dtype) -> None:
    exact = numbers(200, 300).bfloat16()
    codes, found = kg.quantize_activations(exact, scales, dtype=dtype)
    assert found.shape == {"tensor": (1,), "token": (200, 1), "group": (200, 3)}[scales]
    check(codes, found, exact, ACTIVATIONS[scales])
    assert kg.quantize_activations(exact[:0], scales)[1].shape == (
        (1,) if scales == "tensor" else (0, found.shape[1])
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_numbers_that_are_none(dtype: torch.dtype) -> None:
    """NaN stays where it is, infinities saturate, neither sets the scale; zeros have the scale 1, tiny numbers one above 0."""
    rows = torch.tensor(
        [[torch.nan, 1.0, -2.0], [torch.inf, -torch.inf, 3.0], [0.0, -0.0, 0.0], [1e-44, 0.0, 0.0]]
    )
    codes, scales = kg.quantize_weights(rows, "channel", dtype=dtype)
    largest = torch.finfo(dtype).max
    assert codes[0].isnan().tolist() == [True, False, False]
    assert scales[:3].tolist() == pytest.approx([2 / largest, 3 / largest, 1.0])
    assert codes[1].float().tolist() == [largest, -largest, largest]
    assert (codes[2].float() == 0).all() and scales[3] > 0 and codes[3].float().isfinite().all()


def test_mxfp4() -> None:
    """All codes of numbers that MXFP4 holds, ties to the even one, what is beyond saturates; NaN is one of its group."""
    codes = torch.randint(0, 256, (3, 4, 32), dtype=torch.uint8)
    codes[..., ::16] = 0x7F  # a largest code in each group, so that its scale is found again
    scales = torch.randint(0, 253, (3, 4, 2), dtype=torch.uint8)
    scales[0, 0] = torch.tensor([0, 252])  # the ends
    exact = dequantise_mxfp4(codes, scales)
    found = kg.quantize_mxfp4(exact.float())
    assert torch.equal(found[0], codes) and torch.equal(found[1], scales)
    row = torch.tensor([[5.0, 0.25, 0.75, 1.25, 1.75, 2.5, 3.5, -7.9, torch.inf, -torch.inf, 1e-30, -0.0, *[0.0] * 20]])
    whole = dequantise_mxfp4(*kg.quantize_mxfp4(torch.cat([row, row * torch.nan, torch.zeros(1, 32)])))
    assert whole[0].tolist() == [4.0, 0.0, 1.0, 1.0, 2.0, 2.0, 4.0, -6.0, 6.0, -6.0, *[0.0] * 22]
    assert whole[1].isnan().all() and not whole[2].any()
    with pytest.raises(ValueError, match="in a multiple of 32"):
        kg.quantize_mxfp4(exact[..., :-1].float())


@triton.jit
def _widen_mxfp4(out_ptr, codes_ptr, scales_ptr):
    scale, byte = tl.arange(0, 256), tl.arange(0, 16)
    codes = tl.load(codes_ptr + scale[:, None] * 16 + byte[None, :])
    numbers = as_bf16(codes, scale_as_bf16(tl.load(scales_ptr + scale)[:, None]))
    tl.store(out_ptr + scale[:, None] * 32 + tl.arange(0, 32)[None, :], numbers)


@pytest.mark.skipif(not triton.knobs.runtime.interpret, reason="interpreted")
def test_every_code_with_every_scale() -> None:
    """What bfloat16 cannot hold, no float32 can: nothing is rounded."""
    scales, low = torch.arange(256, dtype=torch.uint8)[:, None], torch.arange(16, dtype=torch.uint8)
    codes, out = (low | (15 - low) << 4).expand(256, 16).contiguous(), torch.empty(256, 32, dtype=torch.bfloat16)
    _widen_mxfp4[(1,)](out, codes, scales)
    assert torch.equal(out.float().nan_to_num(nan=0.25), dequantise_mxfp4(codes, scales).float().nan_to_num(nan=0.25))
    assert out[255].isnan().all() and out[0].count_nonzero() == 28


def test_a_kind_of_scales_that_there_is_not() -> None:
    for quantize in (kg.quantize_weights, kg.quantize_activations):
        with pytest.raises(ValueError, match="scales: got str 'row', wanted \"tensor\" or"):
            quantize(numbers(4, 4), "row")


@triton.jit
def _widen(out_ptr, codes_ptr):
    i = tl.arange(0, 256)
    tl.store(out_ptr + i, as_fp32(tl.load(codes_ptr + i)))


@pytest.mark.skipif(not triton.knobs.runtime.interpret, reason="interpreted")
def test_every_power_of_two() -> None:
    codes, out = torch.arange(256, dtype=torch.uint8), torch.empty(256)
    _widen[(1,)](out, codes)
    exact = codes.view(torch.float8_e8m0fnu).float()
    assert torch.equal(out[:255], exact[:255]) and out[255].isnan() and exact[255].isnan()


class Bug(NamedTuple):
    """A bug of another system, as a change of ours."""

    variant: str
    before: str
    after: str
    case: str


_ONE = "moe_lora_one_shot_bf16_sorted_add_plain_r16"
_SMALL = "moe_lora_small_batch_bf16_naive_add_plain_r16"
_TWO = "moe_lora_two_kernel_bf16_sorted_add_plain_r16"
_AS_E4M3 = ".to(tl.uint8, bitcast=True).to(tl.float8e4nv, bitcast=True)"
BUGS = {
    "vLLM fused_moe_lora_fp8 never reads the scales": Bug(
        f"{_ONE}_w8channel", "products[i][1] * products[i][2]", "products[i][1]", "w8_slices"
    ),
    "vLLM dense FP8 shrink below 128 tokens: one scale covers two groups": Bug(
        f"{_ONE}_w8group", "group = k0 // 128", "group = k0 // 256 * 2", "w8_groups"
    ),
    "the same, on CUDA cores": Bug(
        f"{_SMALL}_w8group", "tl.minimum(k, K - 1) // 128", "k * 0", "w8_groups"
    ),
    "vLLM scales are read past the end of their row": Bug(
        f"{_ONE}_w8channel",
        "mask=None if N % BLOCK_N == 0 else n < N - n0",
        "mask=None",
        "w8_packed",
    ),
    "vLLM per-token scales as a vector: row 0's for all": Bug(
        f"{_ONE}_a8token", "x_scale_ptr + x_row", "x_scale_ptr + x_row * 0", "a8_rows"
    ),
    "vLLM 42007: the delta of raw FP8 numbers": Bug(
        f"{_SMALL}_a8token", "tl.sum(acc, 1) * x_scale", "tl.sum(acc, 1)", "a8_rows"
    ),
    "vLLM FP8 ops read e5m2 as e4m3": Bug(
        f"{_SMALL}_w8channel", "a.to(tl.float32)", f"a{_AS_E4M3}.to(tl.float32)", "w8_slices"
    ),
    "the scales of slice 0 for all slices": Bug(
        f"{_TWO}_w8tensor",
        "slice_of(b_scale_ptrs, s)",
        "b_scale_ptrs[0]",
        "w8_slices",
    ),
    "scales in 16 bits": Bug(
        f"{_TWO}_w8channel",
        "products[i][1] * products[i][2]",
        "products[i][1] * products[i][2].to(tl.bfloat16).to(tl.float32)",
        "w8_slices",
    ),
}


@pytest.mark.skipif(not triton.knobs.runtime.interpret, reason="mutants are interpreted")
@pytest.mark.parametrize("bug", BUGS.values(), ids=BUGS)
def test_a_bug_of_another_system_fails_its_case(bug: Bug) -> None:
    with Bench(ROOT) as bench:
        suite, variant = next(found for found in bench.variants() if found[1].name == bug.variant)
        [case] = [case for case in suite.cases_for(variant) if case.name == bug.case]
        source = bench.source(variant)
        assert bug.before in source
        for text, fails in ((source, False), (source.replace(bug.before, bug.after), True)):
            mutant = Mutant("bug", "kernel", 0, "", bug.before, bug.after, text)
            assert bool(bench.fate(suite, variant, mutant, [case]).killer) is fails


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_scales_are_quotients_to_the_last_bit(dtype: torch.dtype) -> None:
    """And constants, as codes are: no gradient goes through them."""
    x = torch.rand(1000, 1, generator=torch.Generator().manual_seed(0), requires_grad=True)
    codes, scale = kg.quantize_activations(x, dtype=dtype)
    assert torch.equal(scale, (x.detach().double() / torch.finfo(dtype).max).float())
    made = [codes, scale, *kg.quantize_weights(x, dtype=dtype), *kg.quantize_mxfp4(x.view(-1, 1).expand(-1, 32))]
    assert not any(tensor.requires_grad for tensor in made)
