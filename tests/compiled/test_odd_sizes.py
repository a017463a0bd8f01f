"""Sizes that no tile divides, rows that are not aligned, any rank, any number of slices: what they become on an H200."""

from __future__ import annotations

import importlib
import re
from typing import Iterator, Sequence

import pytest
import torch

import generated as kg
from generated import _runtime as runtime
from kernelgen.compiled.resources import machine_code, usage
from kernelgen.compiled.stand_in import compiling_for
from kernelgen.core.targets import TARGETS

TARGET = TARGETS["sm_90"]
LORAS, EXPERTS, TOP_K = 5, 128, 8


@pytest.fixture(autouse=True)
def hopper() -> Iterator[None]:
    with compiling_for(TARGET):
        yield


@pytest.mark.slow(keep=3)
@pytest.mark.parametrize(
    "variant, k, n, slices, rank, block_m",
    [
        ("one_shot_bf16_sorted_add_plain_r16", 1001, 701, 2, 9, 64),
        ("two_kernel_bf16_sorted_add_plain_rany", 1001, 701, 3, 129, 64),
        ("small_batch_bf16_naive_add_plain_r16", 77, 33, 2, 5, 0),
        ("one_shot_bf16_sorted_add_plain_r64", 2048, 768, 3, 64, 64),
        ("one_shot_bf16_sorted_add_plain_r128", 1001, 701, 2, 101, 64),
        ("one_shot_bf16_sorted_set_weighted_r128", 2880, 2880, 3, 128, 32),
        ("one_shot_bf16_sorted_add_weighted_r32", 7168, 2050, 1, 24, 128),
        ("two_kernel_bf16_sorted_add_plain_r128", 1001, 701, 2, 128, 64),
        ("two_kernel_bf16_sorted_add_plain_r64", 2880, 2880, 3, 48, 16),
        ("two_kernel_bf16_sorted_add_weighted_rany", 2048, 768, 1, 300, 128),
        ("two_kernel_bf16_sorted_set_plain_rany", 2048, 768, 2, 512, 64),
        ("two_kernel_bf16_sorted_set_weighted_rany", 2048, 2048, 1, 4096, 16),
        ("small_batch_bf16_naive_add_plain_rany", 1001, 701, 3, 129, 0),
        ("small_batch_bf16_naive_set_weighted_rany", 2048, 768, 1, 4096, 0),
    ],
)
def test_it_fits_and_spills_nothing(variant: str, k: int, n: int, slices: int, rank: int, block_m: int) -> None:
    requests = launches(variant, k, n, slices, rank, block_m)
    assert requests
    for request in requests:
        used = usage(request.compile(), TARGET)
        name = request.launcher.kernel.fn.__name__
        assert used.spill_bytes == 0, f"{name} spills {used.spill_bytes} bytes"
        assert used.shared_bytes <= TARGET.program_shared, name


@pytest.mark.slow(keep=2)
@pytest.mark.parametrize("scale", [None, "channel"])
@pytest.mark.parametrize("tokens", [16, 300, 4096])
@pytest.mark.parametrize("rank", [129, 512, 1000])
def test_dense_lora_of_any_rank_fits(rank: int, tokens: int, scale: str | None) -> None:
    def empty(*size: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.empty(size, dtype=dtype, device="meta")

    dtype = torch.bfloat16 if scale is None else torch.float8_e4m3fn
    scales = {} if scale is None else {
        "a_scale": [empty(LORAS, rank, dtype=torch.float32)],
        "b_scale": [empty(LORAS, 2048, dtype=torch.float32)],
    }
    with runtime.compile_only() as requests:
        route = kg.lora_route(empty(tokens, dtype=torch.int32), max_loras=LORAS)
        weights = ([empty(LORAS, rank, 1024, dtype=dtype)], [empty(LORAS, 2048, rank, dtype=dtype)])
        kg.lora(empty(tokens, 2048), empty(tokens, 1024), *weights, route, **scales)
    for request in requests:
        used, name = usage(request.compile(), TARGET), request.launcher.kernel.fn.__name__
        assert used.shared_bytes <= TARGET.program_shared, name
        assert used.spill_bytes == 0 or rank > 512, f"{name} spills {used.spill_bytes} bytes"


@pytest.mark.slow(keep=1)
@pytest.mark.parametrize(
    "variant, block_m",
    [
        ("small_batch_bf16_naive_add_weighted_r32_w8channel", 0),
        ("small_batch_bf16_naive_add_plain_r64_w8channel_a8token", 0),
        ("small_batch_bf16_naive_add_plain_rany_w8tensor", 0),
        ("one_shot_bf16_sorted_add_plain_r32_w8tensor", 16),
        ("two_kernel_bf16_sorted_add_plain_r32_w8channel", 64),
    ],
)
def test_no_fp8_of_a_dropped_lane_is_unpacked(variant: str, block_m: int) -> None:
    """ptxas 12.8 and 12.9 make a wrong number of the upper half of a zero that they know (quant.masked zeroes it again)."""
    unpacked = 0
    for request in launches(variant, 40, 24, 1, 20, block_m):
        code = machine_code(request.compile())
        unpacked += len(re.findall(r"\bUNPACK_B\b", code))
        assert not re.findall(r"\bUNPACK_B R\d+, (?:-?\d|RZ).*", code)
    assert unpacked > 0


def launches(variant: str, k: int, n: int, slices: int, rank: int, block_m: int) -> Sequence[runtime.CompileRequest]:
    """What a call of a variant of moe_lora launches, with the tiles that it takes."""
    module = importlib.import_module(f"generated.moe_lora.{variant}")
    weighted, x_scales = "_weighted_" in variant, "a8token" in variant
    of_weights = next((kind for kind in ("tensor", "channel") if f"_w8{kind}" in variant), None)
    tokens = {0: 4, 16: 64, 32: 1024, 64: 4096, 128: 16384}[block_m]

    def empty(*size: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.empty(size, dtype=dtype, device="meta")

    def matrix(rows: int, columns: int, fp8: object) -> torch.Tensor:
        return empty(LORAS, EXPERTS, rows, columns, dtype=torch.float8_e4m3fn if fp8 else torch.bfloat16)

    def scales(*rows: int) -> torch.Tensor:
        return empty(*rows, dtype=torch.float32)

    rows_of_x = tokens * (TOP_K if weighted else 1)
    given = {"topk_weights": scales(tokens, TOP_K)} if weighted else {}
    if of_weights:
        channels = of_weights == "channel"
        given["a_scale"] = [scales(LORAS, EXPERTS, *[rank] * channels)] * slices
        given["b_scale"] = [scales(LORAS, EXPERTS, *[n] * channels)] * slices
    if x_scales:
        given["x_scale"] = scales(rows_of_x, 1)
    with runtime.compile_only() as requests:
        route = kg.moe_route(
            empty(tokens, TOP_K, dtype=torch.int32),
            empty(tokens, dtype=torch.int32),
            num_experts=EXPERTS,
            max_loras=LORAS,
            assignment="sorted" if block_m else "naive",
            block_m=block_m or None,
        )
        requests.clear()
        getattr(module, f"moe_lora_{variant}")(
            empty(tokens, TOP_K, slices * n),
            empty(rows_of_x, k, dtype=torch.float8_e4m3fn if x_scales else torch.bfloat16),
            [matrix(rank, k, of_weights)] * slices,
            [matrix(n, rank, of_weights)] * slices,
            route,
            **given,
        )
    return requests
