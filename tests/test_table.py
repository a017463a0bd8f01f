"""Tables: aligned where there is room, never cut, never wider than the terminal."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import project
import pytest

from kernelgen import doctor
from kernelgen.core.table import table
from kernelgen.measure import document as documents
from kernelgen.measure.table import results

ROOT = Path(__file__).parent.parent

HEAD = ("variant", "checks", "in case")
ROWS = [("moe_sum_bf16", "12", "the first of many"), ("moe_act_swiglu_f16", "3", "gt_tile")]


def test_where_there_is_room_columns_are_aligned() -> None:
    assert table(ROWS, HEAD) == table(ROWS, HEAD, 45) == [
        "variant             checks  in case",
        "moe_sum_bf16        12      the first of many",
        "moe_act_swiglu_f16  3       gt_tile",
    ]


def test_the_last_column_is_wrapped_in_place() -> None:
    rows = [("ok", "specs", "six hundred variants of twelve families"), ("", "", "hint: none")]
    assert table(rows, width=36) == [
        "ok  specs  six hundred variants of",
        "           twelve families",
        "           hint: none",
    ]


def test_else_cells_follow_one_another_by_name() -> None:
    assert table(ROWS, HEAD, 30) == [
        "moe_sum_bf16  checks: 12",
        "    in case: the first of many",
        "moe_act_swiglu_f16  checks: 3",
        "    in case: gt_tile",
    ]


@pytest.mark.parametrize("width", range(8, 80))
def test_nothing_is_lost_at_any_width(width: int) -> None:
    lines = table(ROWS, HEAD, width)
    assert max(map(len, lines)) <= width
    told = re.sub(r"\s", "", "".join(lines))
    assert all(re.sub(r"\s", "", cell) in told for row in ROWS for cell in row)


@pytest.mark.parametrize("width", [40, 60])
def test_commands_fit_a_narrow_terminal(width: int, tmp_path: Path, kernelgen, monkeypatch: pytest.MonkeyPatch) -> None:
    document = documents.load(ROOT / "benchmarks/h200/lora.json")
    lines = results(document.suite, document.rows[:50], ["vllm"], width)
    told = re.sub(r"\s", "", "".join(lines))
    assert all(re.sub(r"\s", "", f"{row['us']:.2f}") in told and row["impl"] in told for row in document.rows[:50])
    monkeypatch.setattr(doctor, "_run", lambda program: subprocess.CompletedProcess([], 1, "", "No module named 'torch'"))
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setenv("KERNELGEN_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    variant = "toy_bf16_r32_large"
    specs = str(project.make(tmp_path))
    for words in (["list"], ["show", variant], ["doctor"]):
        code, stdout, _ = kernelgen(*words, "--specs", specs)
        assert code in (0, 1) and ("torch" if words == ["doctor"] else variant) in re.sub(r"\s", "", stdout)
        lines += stdout.splitlines()
    assert max(map(len, lines)) <= width


def test_numbers_are_aligned_on_the_right() -> None:
    assert table(ROWS, HEAD, numbers=["checks"])[1:] == [
        "moe_sum_bf16            12  the first of many",
        "moe_act_swiglu_f16       3  gt_tile",
    ]


def test_of_nothing_there_are_no_lines() -> None:
    assert table([]) == []
