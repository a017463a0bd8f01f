"""``kernelgen bench-lora``: its cells, its operands and its rows; times need a GPU."""

from __future__ import annotations

import json

import pytest
import torch
from click.testing import CliRunner

from kernelgen.bench import dense, lora_command
from kernelgen.cli import commands


def test_the_command_knows_what_can_be_measured() -> None:
    assert tuple(dense.MODELS) == lora_command._MODELS
    assert lora_command._SITES == dense.SITES
    assert all(tuple(layers) == dense.SITES for layers in dense.MODELS.values())


def test_the_floor_counts_what_must_move() -> None:
    cell = dense.Cell("tiny", "qkv", rank=16, tokens=3, active=2)
    weights, outputs = 2 * 16 * (3 * 128 + 256), 2 * 256
    assert cell.bytes == 2 * (weights + 3 * (128 + outputs))
    quantised = dense.Cell("tiny", "qkv", rank=16, tokens=3, active=2, scales="channel")
    assert cell.bytes - quantised.bytes == weights


@pytest.mark.parametrize("scales", [None, "channel"])
def test_results_are_compared_with_fp64(device: str, scales: str | None) -> None:
    cells = list(dense.cells(["tiny"], ["qkv"], [16], [5], [(2, 4), (1, 4)], scales))
    rows = list(dense.sweep(cells, "generated", ["torch"], torch.device(device), check_only=True))
    expected = [(2, "kernelgen"), (1, "kernelgen")] + ([] if scales else [(1, "torch")])
    assert [(row["active"], row["impl"]) for row in rows] == expected
    assert all((row["error"] is None) == bool(scales) for row in rows)


def test_a_wrong_result_is_no_time(device: str) -> None:
    mapping, sets = dense.operands(dense.Cell("tiny", "o", 16, 5), torch.device(device), 1)
    with pytest.raises(ValueError, match="a relative error of"):
        dense.check(lambda: None, mapping, sets[0])


def test_command(device: str) -> None:
    options = ["--check-only", "--models", "tiny", "--sites", "o", "--ranks", "16", "--tokens", "3", "--active", "1"]
    result = CliRunner().invoke(commands, ["bench-lora", *options, "--json"])
    assert result.exit_code == 0, result.output
    (row,) = json.loads(result.output)["rows"]
    assert (row["site"], row["impl"], row["tokens"]) == ("o", "kernelgen", 3)
    refused = CliRunner().invoke(commands, ["bench-lora", "--active", "5"])
    assert refused.exit_code == 2 and "do not fit" in refused.output
