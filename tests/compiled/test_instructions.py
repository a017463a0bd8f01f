"""What makes these kernels fast is in the code: copies that run ahead of the products, and loads of 16 bytes a lane."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Iterator

import pytest
from strict_package import build_strict

from kernelgen.compiled.compile import run
from kernelgen.compiled.requests import Case, cases_of

ROOT = Path(__file__).parent.parent.parent
SORTED = [
    "moe_lora_one_shot_bf16_sorted_add_plain_r16",
    "moe_lora_one_shot_bf16_sorted_set_weighted_r128",
    "moe_lora_two_kernel_bf16_sorted_add_plain_r64",
    "moe_lora_two_kernel_bf16_sorted_add_weighted_rany",
    "moe_lora_one_shot_bf16_sorted_add_plain_r64_w8channel",
]
NAIVE = [
    "moe_lora_small_batch_bf16_naive_add_plain_r16",
    "moe_lora_small_batch_bf16_naive_add_weighted_r64",
    "moe_lora_small_batch_bf16_naive_set_plain_rany",
]
TILE_LOAD = re.compile(r"\btt\.load .*: tensor<\d+x\d+x!tt\.ptr")


def compiled(variant: str) -> Iterator[tuple[Case, Any]]:
    """Kernels of rows that are aligned; others go element by element, and cannot be wide."""
    for case in cases_of(ROOT / "specs", ROOT, variant, "sm_90"):
        if case.probe.sizes["rank"] % 8 == 0:
            yield case, case.compile()


def loops(ttgir: str) -> Iterator[str]:
    """The bodies of the innermost loops, by their indentation."""
    body: list[str] | None = None
    indent = ""
    for line in ttgir.splitlines():
        if "scf.for" in line:
            indent, body = line[: len(line) - len(line.lstrip())], []
        elif body is not None and line.startswith(indent + "}"):
            yield "\n".join(body)
            body = None
        elif body is not None:
            body.append(line)


def constants(case: Case) -> dict[str, Any]:
    names = [
        parameter.name
        for parameter in case.request.launcher.kernel.params
        if parameter.is_constexpr
    ]
    return dict(zip(names, case.request.constants, strict=True))


@pytest.mark.slow(keep=1)
@pytest.mark.parametrize("variant", SORTED)
def test_loops_over_products_copy_ahead(variant: str) -> None:
    for case, kernel in compiled(variant):
        with_products = [
            body for body in loops(kernel.asm["ttgir"]) if re.search(r"\b\w*dot ", body)
        ]
        assert with_products, f"{case}: the loop was unrolled, which undoes its pipeline"
        for body in with_products:
            assert "async_copy_global_to_local" in body, case
            assert not TILE_LOAD.search(body), f"{case}: a tile is loaded where it is used"
        assert "cp.async.cg.shared.global" in kernel.asm["ptx"], f"{case}: no copy is 16 bytes wide"


@pytest.mark.slow(keep=1)
@pytest.mark.parametrize("variant", NAIVE)
def test_weights_of_few_pairs_are_loaded_16_bytes_at_a_time(variant: str) -> None:
    for case, kernel in compiled(variant):
        sizes = constants(case)
        if case.row.kernel == "shrink":
            elements = sizes["BLOCK_R"] * sizes["SPLIT_K"]
        else:
            elements = sizes["BLOCK_N"] * min(sizes["RANK"], 128)
        lanes = 32 * case.request.options.num_warps
        wide = len(re.findall(r"\bld\.global\.\S*v4\.b32", kernel.asm["ptx"]))
        assert wide >= elements * 2 / (lanes * 16), case


@pytest.mark.slow
def test_strict_kernels_compile(tmp_path: Path) -> None:
    """The lock has none of them, and the interpreter takes what the compiler refuses."""
    strict = build_strict(tmp_path)
    for variant in ("one_shot*_r64_w8channel_a8token", "two_kernel*_rany"):
        found = run(strict / "specs", strict, only=f"moe_lora_{variant}", targets=["sm_90"])
        assert found.outcomes and not found.findings
