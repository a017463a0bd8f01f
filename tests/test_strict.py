"""``numerics.strict``: every schedule adds in one order, so that they agree bit for bit on tensor cores."""

from __future__ import annotations

import importlib
import shutil
import sys
from pathlib import Path
from typing import Any, Callable, Iterator

import pytest
import torch
from strict_package import build_strict

from kernelgen.prove import verify
from kernelgen.prove.numerics import receipts
from kernelgen.prove.numerics.tape import taped
from kernelgen.prove.numerics.terms import difference

TOKENS, TOP_K, EXPERTS, LORAS, K, N = (
    37,
    3,
    5,
    2,
    1208,
    200,
)  # two whole chunks of K and a ragged one
BUCKETS = {16: "plain_r16", 24: "weighted_r64", 200: "weighted_rany"}


@pytest.fixture(scope="session")
def tensor_cores(device: str) -> str:
    """Asked for in front of ``strict``, which takes seconds."""
    if device != "cuda":
        pytest.skip("the interpreter's products are not a tensor core's")
    return device


@pytest.fixture(scope="module")
def strict(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_strict(tmp_path_factory.mktemp("strict"))


@pytest.mark.slow(keep=1)
@pytest.mark.parametrize("variants", ["rany_w8group", "r64_w8group_a8group", "r64", "r64_w8channel"])
def test_strict_kernels_are_right(strict: Path, device: str, variants: str) -> None:
    """The same cases and bounds as of the default kernels."""
    found = verify.run(strict, only=f"moe_lora_[!e]*_weighted_{variants}", device=device)
    assert found.outcomes and not [outcome for outcome in found.outcomes if outcome.error]


SCALES = [(None, None), ("channel", None), ("group", None), ("channel", "token"), ("group", "group")]
Scales = tuple[str | None, str | None]
Launch = Callable[[], torch.Tensor]


@pytest.mark.parametrize("scales", SCALES)
@pytest.mark.parametrize("rank", BUCKETS)
def test_schedules_agree_bit_for_bit(tensor_cores: str, strict: Path, rank: int, scales: Scales) -> None:
    if scales[1] is not None and rank != 24:
        return  # has no variants
    for tokens in (4, TOKENS):
        results = [launch() for _, launch in _launches(strict, tensor_cores, rank, scales, tokens)]
        assert len(results) >= 2
        assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.slow(keep=1)
@pytest.mark.parametrize("rank, scales", [(16, (None, None)), (24, ("channel", None))])
def test_schedules_have_one_term(strict: Path, device: str, rank: int, scales: Scales) -> None:
    """Every row has the same term, whichever schedule makes it, for how many tokens, in blocks of which height."""
    if device != "cpu":
        pytest.skip("terms are of interpreted kernels")
    found: dict[str, list[str]] = {}
    for tokens in (1, 3):
        for name, launch in _launches(strict, device, rank, scales, tokens=tokens, top_k=1, n=24, k=520):
            with taped() as tape:
                launch()
            for term in receipts.terms(tape, sample=1, tiles=False):
                found.setdefault(term, []).append(f"{name}, {tokens} tokens")
    terms = list(found)
    assert len({name for names in found.values() for name in names}) == 10
    assert len(terms) == 1, f"{found[terms[0]]} and {found[terms[1]]}: {difference(*terms[:2])}\n{terms[0]}\n{terms[1]}"


def _launches(
    strict: Path, device: str, rank: int, scales: Scales, tokens: int = TOKENS, top_k: int = TOP_K, n: int = N, k: int = K
) -> Iterator[tuple[str, Launch]]:
    """One call by each schedule, and in blocks of two heights: its name, and what makes it and returns the result."""
    sys.path.insert(0, str(strict))
    if not (strict / "strictly").exists():
        shutil.copytree(strict / "generated", strict / "strictly")
    kg: Any = importlib.import_module("strictly")
    sys.path.remove(str(strict))

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(size, device=device).bfloat16()

    ids = torch.randint(EXPERTS, (tokens, top_k), device=device).int()
    adapters = torch.randint(0, LORAS, (tokens,), device=device).int()
    weighted = BUCKETS[rank].startswith("weighted")
    x, out = normal(tokens * (top_k if weighted else 1), k), normal(tokens, top_k, 2 * n)
    a = [normal(LORAS, EXPERTS, rank, k) for _ in range(2)]
    b = [normal(LORAS, EXPERTS, n, rank) for _ in range(2)]
    of_weights, of_x = scales
    options: dict[str, Any] = {"topk_weights": normal(tokens, top_k)} if weighted else {}
    if of_weights is not None:
        (a, a_scale), (b, b_scale) = (
            zip(*(kg.quantize_weights(w, of_weights) for w in slices), strict=True)
            for slices in (a, b)
        )
        options |= {"a_scale": a_scale, "b_scale": b_scale}
    if of_x is not None:
        x, options["x_scale"] = kg.quantize_activations(x, of_x)
    sizes = {"num_experts": EXPERTS, "max_loras": LORAS}
    for schedule, assignment, block_m in (
        ("small_batch", "naive", None),
        *(("two_kernel", "sorted", rows) for rows in (16, 64)),
        *(("one_shot", "sorted", rows) for rows in (16, 64)),
    ):
        name = f"{schedule}_bf16_{assignment}_add_{BUCKETS[rank]}"
        name += "".join(f"_{what}8{kind}" for what, kind in zip("wa", scales, strict=True) if kind)
        if f"moe_lora_{name}" not in kg.variants():
            continue
        launcher = getattr(importlib.import_module(f"strictly.moe_lora.{name}"), f"moe_lora_{name}")
        route = kg.moe_route(ids, adapters, assignment=assignment, block_m=block_m, **sizes)

        def launch(launcher: Any = launcher, route: Any = route) -> torch.Tensor:
            result = out.clone()
            launcher(result, x, a, b, route, **options)
            assert not torch.equal(result, out)
            return result

        yield f"{schedule}, blocks of {block_m} rows", launch
