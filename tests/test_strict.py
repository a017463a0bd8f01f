"""``numerics.strict``: every schedule adds in one order, so that they agree bit for bit on tensor cores."""

from __future__ import annotations

import importlib
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from strict_package import build_strict

from kernelgen.prove import verify

TOKENS, TOP_K, EXPERTS, LORAS, K, N = (
    37,
    3,
    5,
    2,
    1208,
    200,
)  # two whole chunks of K and a ragged one
BUCKETS = {24: "r64", 200: "rany"}


@pytest.fixture(scope="module")
def strict(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_strict(tmp_path_factory.mktemp("strict"))


@pytest.mark.slow(keep=1)
@pytest.mark.parametrize("variants", ["rany_w8group", "r64_w8group_a8group", "r64", "r64_w8channel"])
def test_strict_kernels_are_right(strict: Path, device: str, variants: str) -> None:
    """The same cases and bounds as of the default kernels."""
    found = verify.run(strict, only=f"moe_lora_[!e]*_weighted_{variants}", device=device)
    assert found.outcomes and not [outcome for outcome in found.outcomes if outcome.error]


@pytest.mark.parametrize("scales", [(None, None), ("channel", None), ("group", None), ("channel", "token"), ("group", "group")])
@pytest.mark.parametrize("rank", BUCKETS)
def test_schedules_agree_bit_for_bit(
    strict: Path, device: str, rank: int, scales: tuple[str | None, str | None]
) -> None:
    if device != "cuda":
        pytest.skip("the interpreter's products are not a tensor core's")
    sys.path.insert(0, str(strict))
    if not (strict / "strictly").exists():
        shutil.copytree(strict / "generated", strict / "strictly")
    kg: Any = importlib.import_module("strictly")
    sys.path.remove(str(strict))

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(size, device=device).bfloat16()

    ids = torch.randint(EXPERTS, (TOKENS, TOP_K), device=device).int()
    adapters = torch.randint(-1, LORAS, (TOKENS,), device=device).int()
    x, out, weights = normal(TOKENS * TOP_K, K), normal(TOKENS, TOP_K, 2 * N), normal(TOKENS, TOP_K)
    a = [normal(LORAS, EXPERTS, rank, K) for _ in range(2)]
    b = [normal(LORAS, EXPERTS, N, rank) for _ in range(2)]
    of_weights, of_x = scales
    options: dict[str, Any] = {}
    if of_weights is not None:
        (a, a_scale), (b, b_scale) = (
            zip(*(kg.quantize_weights(w, of_weights) for w in slices), strict=True)
            for slices in (a, b)
        )
        options |= {"a_scale": a_scale, "b_scale": b_scale}
    if of_x is not None:
        x, options["x_scale"] = kg.quantize_activations(x, of_x)
    sizes = {"num_experts": EXPERTS, "max_loras": LORAS}
    results = []
    for schedule, assignment, block_m in (
        ("small_batch", "naive", None),
        *(("two_kernel", "sorted", rows) for rows in (16, 64)),
        *(("one_shot", "sorted", rows) for rows in (16, 64)),
    ):
        name = f"{schedule}_bf16_{assignment}_add_weighted_{BUCKETS[rank]}"
        name += "".join(f"_{what}8{kind}" for what, kind in zip("wa", scales, strict=True) if kind)
        if f"moe_lora_{name}" not in kg.variants():
            continue
        launch = getattr(importlib.import_module(f"strictly.moe_lora.{name}"), f"moe_lora_{name}")
        route = kg.moe_route(ids, adapters, assignment=assignment, block_m=block_m, **sizes)
        results.append(out.clone())
        launch(results[-1], x, a, b, route, topk_weights=weights, **options)
    if of_x is not None and rank > 128:
        return  # has no variants
    assert len(results) >= 2 and not torch.equal(results[0], out)
    assert all(torch.equal(result, results[0]) for result in results)
