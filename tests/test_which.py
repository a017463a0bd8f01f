"""Which variant serves a case: the one that a call of the family gets."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import project
import pytest
import torch

import generated as kg
from kernelgen.compiled.served import ask
from kernelgen.compiled.which import which
from kernelgen.core.diagnostics import Failure
from kernelgen.emit import build

SPEC = """\
family: toy
axes:
  rank: [rany, r64, r16]
  dtype: [bf16, f16]
exclude:
  - when: {dtype: f16, rank: [r64, rany]}
    why: nobody asked
targets: [sm_90]
tunables:
  toy:
    block_n: [64]
"""


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory):
    templates = {"kernels/toy.py.j2": "#\n"}
    root: Path = tmp_path_factory.mktemp("which")
    return build.package(project.make(root, {"toy.yaml": SPEC}, templates))


@pytest.mark.parametrize(
    ("case", "served"),
    [
        ({"rank": "1"}, ["r16_bf16", "r16_f16"]),
        ({"rank": "16", "dtype": "f16"}, ["r16_f16"]),
        ({"rank": "17"}, ["r64_bf16"]),  # there is no r32
        ({"rank": "64"}, ["r64_bf16"]),
        ({"rank": "65"}, ["rany_bf16"]),  # nor r128
        ({"rank": "r64"}, ["r64_bf16"]),
        ({"dtype": "bf16"}, ["rany_bf16", "r64_bf16", "r16_bf16"]),
    ],
)
def test_a_rank_goes_to_the_first_bucket_that_has_a_variant(case, served, package) -> None:
    assert [variant.module for variant in which(package, "toy", case).variants] == served


def test_buckets_of_other_variants_do_not_count(package) -> None:
    with pytest.raises(Failure) as failed:
        which(package, "toy", {"rank": "20", "dtype": "f16"})
    (fault,) = failed.value.diagnostics
    assert (fault.code, fault.hint) == ("KG041", "nobody asked")


ROOT = Path(__file__).parent.parent
# A case, and what is called: of tiny sizes, as kernels are interpreted.
T, TOP_K, E, L, K, N, RANK = 3, 2, 4, 2, 64, 48, 8


def _new(*size: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.zeros(size, dtype=dtype)


def _moe_lora(tokens: int, weighted: bool = False, dtype: torch.dtype = torch.bfloat16) -> None:
    ids, adapters = torch.zeros(tokens, TOP_K, dtype=torch.int32), torch.zeros(tokens, dtype=torch.int32)
    route = kg.moe_route(ids, adapters, num_experts=E, max_loras=L, rank=RANK)
    x = _new(tokens * (TOP_K if weighted else 1), K, dtype=dtype)
    options = {"topk_weights": torch.zeros(tokens, TOP_K), "mul_routed_weight": True} if weighted else {}
    a, b = _new(L, E, RANK, K, dtype=dtype), _new(L, E, N, RANK, dtype=dtype)
    kg.moe_lora(_new(tokens, TOP_K, N, dtype=dtype), x, [a], [b], route, **options)


def _lora() -> None:
    route = kg.lora_route(torch.zeros(T, dtype=torch.int32), max_loras=L)
    kg.lora(_new(T, N), _new(T, K), [_new(L, RANK, K)], [_new(L, N, RANK)], route)


def _fused_moe(tokens: int, activation: str = "swiglu") -> None:
    w13, w2 = _new(E, (2 if activation == "swiglu" else 1) * N, K), _new(E, K, N)
    ids, weights = torch.zeros(tokens, TOP_K, dtype=torch.int32), torch.zeros(tokens, TOP_K)
    kg.fused_moe(_new(tokens, K), w13, w2, ids, weights, activation=activation)


_SIZES = f"--top_k {TOP_K} --num_experts {E}"
_PRODUCT = f"{_SIZES} --max_loras {L} --k {K} --n {N} --slices 1 --rank {RANK}"
_LINEAR = f"--num_tokens {T} --max_loras {L} --k {K} --n {N} --rank {RANK}"
_LAYER = f"{_SIZES} --hidden {K} --intermediate {N}"


@pytest.mark.slow(keep=4)
@pytest.mark.parametrize(
    ("case", "call"),
    [
        (f"moe_lora --num_tokens 1 {_PRODUCT}", lambda: _moe_lora(1)),
        (f"moe_lora --num_tokens 70 {_PRODUCT}", lambda: _moe_lora(70)),
        (f"moe_lora --num_tokens 70 {_PRODUCT} --routed-weight weighted", lambda: _moe_lora(70, True)),
        (f"moe_lora --num_tokens 3 {_PRODUCT} --dtype float16", lambda: _moe_lora(3, dtype=torch.float16)),
        (f"moe_route --num_tokens 70 {_SIZES} --max_loras {L} --rank {RANK}", lambda: _moe_lora(70)),
        (f"lora_shrink {_LINEAR}", _lora),
        (f"lora_expand {_LINEAR}", _lora),
        (f"moe_gemm --num_tokens 1 {_LAYER}", lambda: _fused_moe(1)),
        (f"moe_gemm --num_tokens 70 {_LAYER} --epilogue relu2", lambda: _fused_moe(70, "relu2")),
    ],
)
def test_a_call_gets_what_which_says(case: str, call, kernelgen, monkeypatch: pytest.MonkeyPatch) -> None:
    family = case.split()[0]
    launched: list[str] = []

    def noted(self: Any, *arguments: Any) -> None:  # what a kernel computes is not asked
        launched.append(self.kernel.fn.__name__)

    monkeypatch.setattr(kg._runtime.Launcher, "launch", noted)
    with kg._runtime.choosing({}):
        call()
    monkeypatch.undo()
    code, stdout, _ = kernelgen("which", *case.split(), "--specs", str(ROOT / "specs"), "--json")
    served = json.loads(stdout)["served"]
    assert json.loads(stdout)["card"] == "H200"
    said = [kernel["kernel"] for one in served for kernel in one["launches"]]
    assert code == 0 and said
    if "relu2" in case:  # which asks for the first product alone
        launched = [name for name in launched if "relu2" in name]
    assert said == [name for name in launched if name.startswith(f"{family}_")]


@pytest.mark.parametrize(
    ("case", "told"),
    [
        ("moe_lora --rank 16 --schedule one_shot --num-tokens 1", "takes moe_lora_small_batch_bf16_naive_add_plain_r16"),
        ("moe_lora --rank 16 --weighted maybe", "has no axis or size 'weighted'"),
        ("moe_align --hidden 64", "has no axis or size 'hidden'"),
        ("moe_lora --rank 16 --num_tokens 2000000000 --k 2000000000", "a call like this is refused"),
    ],
)
def test_what_no_call_gets_is_an_error(case: str, told: str, kernelgen) -> None:
    code, _, stderr = kernelgen("which", *case.split(), "--specs", str(ROOT / "specs"))
    assert code in (1, 2) and told in stderr


@pytest.mark.parametrize(
    ("case", "variant"),
    [
        ("moe_route --schedule from_tables", "moe_route_from_tables"),
        ("moe_route --schedule held", "moe_route_held"),
        ("moe_gemm --rows pair_pair", "moe_gemm_tile_bf16_pair_pair_plain"),
        ("moe_gemm --rows pair_token --delta lora --num_tokens 2", "moe_gemm_gemv_bf16_pair_token_weighted_lora"),
        ("moe_gemm --rows sorted_pair --weight_quant w8group", "moe_gemm_tile_bf16_sorted_pair_plain_w8group"),
        ("moe_shrink --rows sorted_sorted", "moe_shrink_runs_bf16_sorted_sorted"),
        ("moe_shrink --schedule pairs", "moe_shrink_pairs_bf16_token_pair"),
        ("moe_runs", "moe_runs_one_launch"),
        ("lora_shrink --rank rany", "lora_shrink_bf16_rany"),
    ],
)
def test_what_one_call_gets_is_one_variant(case: str, variant: str, shipped) -> None:
    family, *words = case.split()
    answer = which(shipped, family, dict(zip((word.lstrip("-") for word in words[::2]), words[1::2], strict=True)))
    assert [one.variant.name for one in ask(ROOT, answer) if one.variant in answer.variants] == [variant]


@pytest.fixture(scope="module")
def shipped():
    return build.package(ROOT / "specs")
