"""``kernelgen bench-lora``: its cells, its operands and its rows; times need a GPU."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from kernelgen.measure import dense, layers
from kernelgen.measure.implementation import Prepared
from kernelgen.measure.verify import WrongResult

_TINY = ["--check-only", "--models", "tiny", "--sites", "o", "--ranks", "16"]


@pytest.fixture
def bench(kernelgen):
    return lambda *options: kernelgen("bench-lora", *_TINY, *options)


def test_every_model_has_every_site() -> None:
    assert all(tuple(sites) == layers.SITES for sites in layers.MODELS.values())


def test_the_floor_counts_what_must_move() -> None:
    cell = layers.Cell("tiny", "qkv", rank=16, tokens=3, active=2)
    weights, outputs = 2 * 16 * (3 * 128 + 256), 2 * 256
    assert cell.bytes == 2 * (weights + 3 * (128 + outputs))
    quantised = layers.Cell("tiny", "qkv", rank=16, tokens=3, active=2, scales="channel")
    assert cell.bytes - quantised.bytes == weights


@pytest.mark.parametrize("scales", ["tensor", "channel", "group"])
def test_fp8_is_compared_with_what_it_stands_for(device: str, scales: Any) -> None:
    """As for 16-bit weights that are dequantised by hand; a scale from a wrong place, and no scale, is a wrong result."""
    workload = dense.Dense(torch.device(device), 1)
    case = workload.case(layers.Cell("tiny", "qkv", 160, 5, 2, 4, scales))
    (operand,) = case.sets
    assert operand.lora_a[0].dtype == torch.float8_e4m3fn

    def wide(codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        if scales == "group":
            scale = torch.kron(scale, torch.ones(1, 128, 128, device=device))[:, : codes.shape[1], : codes.shape[2]]
        return codes.double() * scale.reshape(*scale.shape, *[1] * (3 - scale.dim())).double()

    def call(a_scale: Any, b_scale: Any) -> Prepared:
        def apply() -> None:
            weights = zip(operand.lora_a, a_scale, operand.lora_b, b_scale, strict=True)
            pairs = [(wide(a, of_a), wide(b, of_b)) for a, of_a, b, of_b in weights]
            for t, adapter in enumerate(case.mapping.tolist()):
                row = torch.cat([b[adapter] @ (a[adapter] @ operand.x[t].double()) for a, b in pairs])
                operand.out[t] = (operand.out[t].double() + row).bfloat16()

        return Prepared((apply,))

    a_scale, b_scale = operand.a_scale, operand.b_scale
    assert 0.0 < workload.check(case, call(a_scale, b_scale)) < 0.005
    for wrong in ([s.roll(1, 0) for s in a_scale], a_scale[::-1], [torch.ones_like(s) for s in a_scale]):
        with pytest.raises(WrongResult, match="a relative error of"):
            workload.check(case, call(wrong, b_scale))


def test_a_wrong_result_is_no_time(device: str) -> None:
    workload = dense.Dense(torch.device(device), 1)
    case = workload.case(layers.Cell("tiny", "o", 16, 5))
    with pytest.raises(WrongResult, match="a relative error of"):
        workload.check(case, Prepared((lambda: None,)))


@pytest.mark.parametrize("scales", [None, "tensor", "channel", "group"])
def test_command(bench, device: str, scales: str | None) -> None:
    options = ["--tokens", "3", "--active", "2,1", "--against", "torch", *(["--scales", scales] if scales else [])]
    code, stdout, stderr = bench(*options, "--json")
    assert code == 0, stderr
    rows = json.loads(stdout)["rows"]
    expected = [(2, "kernelgen"), (1, "kernelgen")] + ([] if scales else [(1, "torch")])
    assert [(row["active"], row["impl"]) for row in rows] == expected
    assert all((row["site"], row["tokens"], row["scales"], row["us"]) == ("o", 3, scales, None) for row in rows)
    assert all(0.0 < row["error"] < 0.01 for row in rows)


def test_refused(bench, kernelgen, tmp_path: Path) -> None:
    code, _, stderr = kernelgen("bench-lora", "--active", "5")
    assert code == 2 and "workload: error[KG070]: 5 active adapters do not fit 4 slots" in stderr
    other = tmp_path / "r.json"
    other.write_text('{"schema_version": 1, "machine": {}, "versions": {}, "ceilings": {}, "rows": [{"model": "tiny"}]}')
    code, stdout, _ = bench("--tokens", "1", "--out", str(other), "--json")
    (error,) = json.loads(stdout)["errors"]
    assert code == 2 and (error["code"], error["path"]) == ("KG072", str(other))


def test_a_run_goes_on_where_it_ended(bench, device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows are saved as they come; what failed is noted, counts in the exit code, and is tried again when told."""
    out = tmp_path / "deep" / "r.json"

    def rows() -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = json.loads(out.read_text())["rows"]
        return found

    prepare = dense.Ours.prepare

    def breaks(self: dense.Ours, case: dense.Case) -> Prepared:
        if case.cell.tokens == 2:
            return dataclasses.replace(prepare(self, case), calls=(lambda: None,))
        if case.cell.tokens == 3:
            assert [row["tokens"] for row in rows()] == [1, 2]
            raise RuntimeError("this kernel does not compile\nand more")
        if case.cell.tokens == 4:
            raise KeyboardInterrupt
        return prepare(self, case)

    options = ["--active", "1", "--out", str(out)]
    with monkeypatch.context() as patch:
        patch.setattr(dense.Ours, "prepare", breaks)
        stopped = bench("--tokens", "1,2,3,4", *options)
    assert stopped[0] == 130 and [row["tokens"] for row in rows()] == [1, 2, 3]
    wrong = [row["failed"] for row in rows()]
    assert wrong[0] is None and wrong[1].startswith("a relative error of")
    assert wrong[2] == "RuntimeError: this kernel does not compile"
    code, _, stderr = bench("--tokens", "1,4", *options, "--seconds", "1e-9")
    assert code == 0 and "out of time" in stderr and len(rows()) == 3
    code, stdout, stderr = bench("--tokens", "1,2,3,4", *options)
    assert code == 1 and [row["tokens"] for row in rows()] == [1, 2, 3, 4]
    assert "T=2 1/4: kernelgen failed: a relative error of" in stdout
    assert "kernelgen: error[KG073]: tiny o r16 T=2: a relative error of" in stderr
    stamp = out.stat().st_mtime_ns
    assert bench("--tokens", "1,4", *options)[0] == 0 and out.stat().st_mtime_ns == stamp
    again = bench("--tokens", "1,2,3,4", *options, "--retry")
    assert again[0] == 0 and [row["failed"] for row in rows()] == [None] * 4
