"""Which variant serves a case: the one that a call of the family gets."""

from __future__ import annotations

from pathlib import Path

import project
import pytest

from kernelgen import build
from kernelgen.diagnostics import Failure
from kernelgen.which import which

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
    templates = {"kernels/toy.py.j2": "#\n", "dispatch/toy/__init__.py.j2": "#\n"}
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
