"""Tables: aligned where there is room, never cut, never wider than the terminal."""

from __future__ import annotations

import re

import pytest

from kernelgen.table import table

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


def test_of_nothing_there_are_no_lines() -> None:
    assert table([]) == []
