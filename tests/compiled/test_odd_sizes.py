"""Sizes that no tile divides, rows that are not aligned, ranks of any size and any number of slices: what they use on an H200."""

from __future__ import annotations

import importlib
from typing import Iterator

import pytest
import torch

import generated as kg
from generated import _runtime as runtime
from kernelgen.resources import usage
from kernelgen.stand_in import compiling_for
from kernelgen.targets import TARGETS

TARGET = TARGETS["sm_90"]
LORAS, EXPERTS, TOP_K = 5, 128, 8


@pytest.fixture(autouse=True)
def hopper() -> Iterator[None]:
    with compiling_for(TARGET):
        yield


@pytest.mark.parametrize(
    "variant, k, n, slices, rank, block_m",
    [
        ("one_shot_bf16_sorted_add_plain_r16", 1001, 701, 2, 9, 64),
        ("one_shot_bf16_sorted_add_plain_r64", 2048, 768, 3, 64, 64),
        ("one_shot_bf16_sorted_add_plain_r128", 1001, 701, 2, 101, 64),
        ("one_shot_bf16_sorted_set_weighted_r128", 2880, 2880, 3, 128, 32),
        ("one_shot_bf16_sorted_add_weighted_r32", 7168, 2050, 1, 24, 128),
        ("two_kernel_bf16_sorted_add_plain_r128", 1001, 701, 2, 128, 64),
        ("two_kernel_bf16_sorted_add_plain_r64", 2880, 2880, 3, 48, 16),
        ("two_kernel_bf16_sorted_add_plain_rany", 1001, 701, 3, 129, 64),
        ("two_kernel_bf16_sorted_add_weighted_rany", 2048, 768, 1, 300, 128),
        ("two_kernel_bf16_sorted_set_plain_rany", 2048, 768, 2, 512, 64),
        ("two_kernel_bf16_sorted_set_weighted_rany", 2048, 2048, 1, 4096, 16),
        ("small_batch_bf16_naive_add_plain_rany", 1001, 701, 3, 129, 0),
        ("small_batch_bf16_naive_set_weighted_rany", 2048, 768, 1, 4096, 0),
        ("small_batch_bf16_naive_add_plain_r16", 77, 33, 2, 5, 0),
    ],
)
def test_it_fits_and_spills_nothing(
    variant: str, k: int, n: int, slices: int, rank: int, block_m: int
) -> None:
    module = importlib.import_module(f"generated.moe_lora.{variant}")
    weighted = "_weighted_" in variant
    tokens = {0: 4, 16: 64, 32: 1024, 64: 4096, 128: 16384}[block_m]

    def empty(*size: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.empty(size, dtype=dtype, device="meta")

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
        weights = {"topk_weights": empty(tokens, TOP_K, dtype=torch.float32)} if weighted else {}
        getattr(module, f"moe_lora_{variant}")(
            empty(tokens, TOP_K, slices * n),
            empty(tokens * (TOP_K if weighted else 1), k),
            [empty(LORAS, EXPERTS, rank, k)] * slices,
            [empty(LORAS, EXPERTS, n, rank)] * slices,
            route,
            **weights,
        )
    assert requests
    for request in requests:
        used = usage(request.compile(), TARGET)
        name = request.launcher.kernel.fn.__name__
        assert used.spill_bytes == 0, f"{name} spills {used.spill_bytes} bytes"
        assert used.shared_bytes <= TARGET.program_shared, name
