"""The benchmark: suites and their cells, operands, checks, resuming and the report. Timing itself needs a GPU."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import subprocess
import sys
from itertools import zip_longest
from pathlib import Path
from typing import Any, Callable

import pytest

from kernelgen.core.diagnostics import Failure
from kernelgen.measure import document as documents
from kernelgen.measure import models, suites
from kernelgen.measure.models import LAYERS, MODELS, Model
from kernelgen.measure.report import markdown_tables
from kernelgen.measure.suite import Cell
from kernelgen.measure.suites import fused_moe, layer, lora, moe_lora
from kernelgen.measure.summary import geomean, speedups

ROOT = Path(__file__).resolve().parent.parent
MACHINE = {"gpu": "GPU", "sms": 132}
VERSIONS = {"torch": "2", "triton": "3"}
TINY = MODELS["tiny"]

QWEN = {"model_type": "qwen3_moe", "hidden_size": 2048, "intermediate_size": 6144, "moe_intermediate_size": 768,
        "num_experts": 128, "num_experts_per_tok": 8, "hidden_act": "silu"}  # fmt: skip
MIXTRAL = {"model_type": "mixtral", "hidden_size": 4096, "intermediate_size": 14336, "num_local_experts": 8,
           "num_experts_per_tok": 2}  # fmt: skip
DEEPSEEK = {"model_type": "deepseek_v3", "hidden_size": 7168, "intermediate_size": 18432, "moe_intermediate_size": 2048,
            "n_routed_experts": 256, "num_experts_per_tok": 8}  # fmt: skip
NEMOTRON = {"model_type": "nemotron_h", "hidden_size": 2688, "moe_intermediate_size": 1856, "n_routed_experts": 128,
            "num_experts_per_tok": 6, "mlp_hidden_act": "relu2"}  # fmt: skip


@pytest.mark.parametrize(
    ("config", "tp", "expected"),
    [
        (QWEN, 1, Model("qwen3_moe", 2048, 768, 128, 8)),
        (QWEN, 4, Model("qwen3_moe-tp4", 2048, 192, 128, 8)),
        (MIXTRAL, 1, Model("mixtral", 4096, 14336, 8, 2)),
        (DEEPSEEK, 8, Model("deepseek_v3-tp8", 7168, 256, 256, 8)),
        (NEMOTRON, 1, Model("nemotron_h", 2688, 1856, 128, 6, gated=False)),
        ({"model_type": "x", "text_config": QWEN}, 1, Model("x", 2048, 768, 128, 8)),
        ({**QWEN, "_name_or_path": "org/Name"}, 1, Model("Name", 2048, 768, 128, 8)),
    ],
)
def test_model_config(tmp_path: Path, config: dict[str, object], tp: int, expected: Model) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config))
    assert models.model_from_config(path, tp) == expected


@pytest.mark.parametrize(
    ("text", "tp", "says"),
    [
        ("{", 1, "JSON"),
        ("[]", 1, "object"),
        ('{"hidden_size": 8, "intermediate_size": 8}', 1, "num_experts"),
        (json.dumps(QWEN), 5, "do not divide"),
    ],
)
def test_bad_model_config(tmp_path: Path, text: str, tp: int, says: str) -> None:
    path = tmp_path / "config.json"
    path.write_text(text)
    with pytest.raises(Failure, match=says):
        models.model_from_config(path, tp)


def test_projections() -> None:
    w13, w2 = (MODELS["qwen3-30b-a3b"].projection(site) for site in ("w13", "w2"))
    assert (w13.k, w13.n, w13.slices, w13.weighted) == (2048, 768, 2, False)
    assert (w2.k, w2.n, w2.slices, w2.weighted) == (768, 2048, 1, True)
    assert MODELS["nemotron-3-nano"].projection("w13").slices == 1
    assert all(tuple(sites) == lora.SITES for sites in LAYERS.values())


# --- suites ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", suites.NAMES)
@pytest.mark.parametrize("size", ["full", "quick", "tiny"])
def test_sweeps(name: str, size: Any) -> None:
    """Cells are different, rows are told apart by them, and a smaller sweep is smaller."""
    suite = suites.find(name)
    cells = suite.cells({}, size)
    keys = {tuple(cell.columns()[column] for column in suite.columns) for cell in cells}
    assert len(keys) == len(cells) == len(set(cells)) <= len(suite.cells({}))
    assert size != "tiny" or all(cell.columns()["model"] == "tiny" for cell in cells)
    assert all(suite.label(cell.columns()) and isinstance(suite.part(cell.columns()), str) for cell in cells)


def test_a_route_is_there_once_and_twins_share_their_seed() -> None:
    options = {"models": ("tiny",), "sites": ("w13", "route"), "ranks": (16,), "tokens": (1,), "quant": ("none", "channel")}
    cells = moe_lora.SUITE.cells(options)
    assert [(c.site, c.add, c.quant) for c in cells] == [
        *(("w13", add, quant) for add in (True, False) for quant in ("none", "channel")),
        ("route", True, "none"),
    ]
    assert len({c.seed for c in cells if c.site == "w13"}) == 1


def test_a_layer_without_adapters_is_there_once() -> None:
    cells = layer.SUITE.cells({"models": ("tiny",), "ranks": (0, 16), "tokens": (4,)})
    assert [(c.site, c.rank, c.base) for c in cells] == [
        ("layer", 0, 0.0),
        ("layer", 16, 0.0),
        ("layer", 16, 1.0),
        ("w13", 16, 0.0),
    ]


def test_fp8_activations_go_with_fp8_weights() -> None:
    cells = fused_moe.SUITE.cells({"models": ("tiny",), "sites": ("layer", "sum", "quant"), "tokens": (4,)})
    assert [(c.site, c.quant, c.act) for c in cells] == [
        ("layer", "none", "none"),
        ("sum", "none", "none"),
        ("layer", "group", "none"),
        ("layer", "group", "group"),
        ("quant", "group", "group"),
    ]


def test_work_by_hand() -> None:
    model = Model("m", hidden=8, intermediate=4, experts=2, top_k=2)
    cell = moe_lora.Cell(model=model, site="w13", rank=2, tokens=3)
    found = cell.work(groups=5, live_tokens=3, live_pairs=6)
    assert found.bytes == 2 * (5 * 2 * 2 * (8 + 4) + 3 * 8 + 6 * 2 * 4 * 2)
    assert found.flops == 2 * 6 * 2 * 2 * (8 + 4)
    both = dataclasses.replace(cell, site="layer", add=False).work(5, 3, 6)
    assert both.bytes == 2 * (5 * 2 * 2 * 12 + 24 + 48) + 2 * (5 * 2 * 12 + 6 * 4 + 6 * 8)
    assert found.floor_us({"copy_gb_s": 1e-3, "bf16_tflop_s": 1e9}) == pytest.approx(found.bytes)
    fp8 = dataclasses.replace(cell, quant="channel", act="token").work(5, 3, 6)
    assert fp8.bytes == 5 * 2 * (2 * (8 + 4) + 4 * (2 + 4)) + 3 * (8 + 4) + 2 * 6 * 2 * 4 * 2
    assert fp8.flops == found.flops and fp8.fp8
    assert fp8.floor_us({"copy_gb_s": 1e9, "bf16_tflop_s": 1.0, "fp8_tflop_s": 2.0}) == pytest.approx(fp8.flops / 2e6)

    dense = lora.Cell(model="tiny", site="qkv", rank=16, tokens=3, active=2)
    weights, outputs = 2 * 16 * (3 * 128 + 256), 2 * 256
    assert dense.work.bytes == 2 * (weights + 3 * (128 + outputs))
    scales = 4 * 2 * (3 * 16 + 256)
    assert dense.work.bytes - dataclasses.replace(dense, quant="channel").work.bytes == weights - scales

    moe = fused_moe.Cell(model=model, site="layer", tokens=3)
    assert moe.work(hit=2).bytes == 2 * (2 * 3 * 8 * 4 + 2 * 3 * 8) and moe.work(2).flops == 2 * 6 * 3 * 8 * 4
    bare = layer.Cell(model=model, site="layer", tokens=3, **layer.BARE)
    assert bare.work(2, 0) == moe.work(2)
    ranked = dataclasses.replace(bare, rank=2, active=1, slots=1)
    assert ranked.work(2, 2).bytes - bare.work(2, 0).bytes == 2 * 2 * 2 * 3 * (8 + 4)


def test_help_imports_no_torch() -> None:
    code = (
        "import sys, kernelgen.measure.command, kernelgen.measure.report\n"
        "from kernelgen.measure import command, suites\n"
        "for name in suites.NAMES: command.of_suite(name)\n"
        "print([m for m in ('torch', 'triton', 'pydantic', 'black', 'rich') if m in sys.modules])"
    )
    shown = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert shown.stdout.strip() == "[]", shown.stderr


# --- documents and reports ------------------------------------------------------------------------------------------


def _row(cell: Cell, impl: str, us: float | None, failed: str | None = None) -> dict[str, Any]:
    times = {"us": us, "us_p10": us, "us_p90": us, "floor_us": 2.0, "host_us": 9.0, "replays": 9}
    result = {"error": 1e-3, "variant": "v", "config": {}, "note": "", "failed": failed}
    return {**cell.columns(), "impl": impl, **times, **result}


def _document() -> documents.Document:
    cells = moe_lora.SUITE.cells({"models": ("tiny",), "ranks": (16, 64), "tokens": (1, 16, 256)})
    ceilings = {"copy_gb_s": 4200.0, "bf16_tflop_s": 770.0}
    document = documents.Document(moe_lora.SUITE, dict(MACHINE), dict(VERSIONS), ceilings)
    for cell in cells:
        document.add(_row(cell, "kernelgen", 4.0))
        document.add(_row(cell, "vllm" if cell.add else "sglang", 8.0))
    document.rows[1]["failed"] = "wrong"
    return document


def test_document_round_trip_and_resume(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "r.json"
    document = _document()
    document.save(path)
    assert json.loads(path.read_text())["schema_version"] == documents.SCHEMA_VERSION
    again = documents.resume(path, moe_lora.SUITE, dict(MACHINE), {**VERSIONS, "vllm": "1"})
    assert again.rows == document.rows and again.versions["vllm"] == "1"
    cell = moe_lora.Cell(model=TINY, site="w13", rank=16, tokens=1)
    assert again.has(cell, "kernelgen") and not again.has(cell, "torch")
    again.forget(lambda row: row["failed"] is not None)
    assert not again.has(cell, "vllm")
    with pytest.raises(Failure, match="torch"):
        documents.resume(path, moe_lora.SUITE, dict(MACHINE), {**VERSIONS, "torch": "9"})
    with pytest.raises(Failure, match="results of moe_lora, not of lora"):
        documents.resume(path, lora.SUITE, dict(MACHINE), dict(VERSIONS))


_HEAD = '"schema_version": 2, "machine": {}, "versions": {}, "ceilings": {}'


@pytest.mark.parametrize(
    "text",
    ["", "{}", "[]", "[" * 100_000, '{"schema_version": 99}', '{"schema_version": 2}', f'{{{_HEAD}, "suite": "x", "rows": []}}',
     f'{{{_HEAD}, "suite": "lora", "rows": [{{"model": "tiny"}}]}}'],
)  # fmt: skip
def test_bad_document(tmp_path: Path, text: str) -> None:
    path = tmp_path / "r.json"
    path.write_text(text)
    with pytest.raises(Failure, match=r"r\.json: error\[KG072\]"):
        documents.load(path)


@pytest.mark.parametrize(
    "spoilt",
    [{"us": "fast"}, {"us": math.nan}, {"us": True}, {"floor_us": None}, {"tokens": "1"}, {"impl": None}, {"failed": 3}],
)
def test_a_row_that_no_bench_wrote_is_named(tmp_path: Path, spoilt: dict[str, object]) -> None:
    path = tmp_path / "r.json"
    document = _document()
    document.save(path)
    data = json.loads(path.read_text())
    data["rows"][1] |= spoilt
    path.write_text(json.dumps(data))
    with pytest.raises(Failure, match=r"r\.json: error\[KG072\].*row 2"):
        documents.load(path)


def test_a_place_that_cannot_be_written_is_told_before_anything_is_measured(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(Failure, match="KG001"):
        documents.resume(tmp_path / "file/r.json", moe_lora.SUITE, {}, {})


def test_failed_rows_do_not_count() -> None:
    document = _document()
    times = [t for _, t in speedups(moe_lora.SUITE, document.rows, "vllm")]
    assert len(times) == 11 and geomean(times) == pytest.approx(2.0)
    text = markdown_tables(document)
    assert "vllm, add: **2.00 ×**" in text and "| tiny w13 r64 | 4 (0.50) ×2 |" in text
    fp8 = moe_lora.Cell(model=TINY, site="w13", rank=64, tokens=16, add=False, quant="channel", act="token")
    document.add(_row(fp8, "kernelgen", 2.5))
    text = markdown_tables(document)
    assert "- w8channel a8token against our 16-bit operands: **1.60 ×** geomean" in text
    assert "| tiny w13 r64 w8channel a8token | – | 2.5 (0.80) ×1.60 | – |" in text


OTHERS = ("engines", "gpt_oss", "sanitize")  # which no suite writes
RESULTS = sorted(path for path in (ROOT / "benchmarks").glob("*/*.json") if path.stem not in OTHERS)


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_published_results_are_read(path: Path) -> None:
    """Each is what its suite would write, and the same bytes."""
    document = documents.load(path)
    assert document.text() == path.read_text()
    lines = markdown_tables(document).splitlines()
    assert lines[0].startswith("NVIDIA H200, torch 2.11") and sum("| T=1 |" in line for line in lines) >= 1
    assert all(documents.Document.key(document, row) for row in document.rows)


@pytest.mark.parametrize("name", ["moe_lora", "layer"])
def test_report_draws_the_same_bytes_again(name: str, tmp_path: Path, kernelgen) -> None:
    pytest.importorskip("matplotlib")
    result = tmp_path / f"{name}.json"
    drawn = {"moe_lora": ["floor_add", "floor_set", "speedup_sglang_set", "speedup_vllm_add"], "layer": ["beside", "floor"]}[name]
    if name == "moe_lora":
        _document().save(result)
    else:
        result.write_bytes((ROOT / "benchmarks/h200/layer.json").read_bytes())
    for folder in ("a", "b"):
        code, stdout, stderr = kernelgen("report", str(result), "--out", str(tmp_path / folder))
        assert (code, stderr) == (0, "") and stdout.count(".svg") == len(drawn)
    names = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert names == [f"{name}_{part}.svg" for part in drawn]
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


# --- the command ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [
        ["nothing"],
        ["moe_lora", "--models", "nobody"],
        ["moe_lora", "--ranks", "16,x"],
        ["moe_lora", "--tokens", "0"],
        ["moe_lora", "--active", "8", "--slots", "4"],
        ["moe_lora", "--active", "1,2", "--slots", "4,4,4"],
        ["moe_lora", "--base", "1"],
        ["moe_lora", "--base", "2"],
        ["moe_lora", "--tp", "2"],
        ["moe_lora", "--no-ours"],
        ["moe_lora", "--model-config", "nowhere.json"],
        ["--tp", "2"],
        ["lora", "--active", "5"],
        ["lora", "--against", "sglang"],
        ["fused_moe", "--quant", "none", "--act", "group"],
        ["layer", "--ranks", "0", "--sites", "w13"],
    ],
)
def test_bad_options(arguments: list[str], kernelgen) -> None:
    code, stdout, stderr = kernelgen("bench", *arguments)
    assert (code, stdout) == (2, "") and ("error[KG070]" in stderr or "Usage:" in stderr)


@pytest.mark.parametrize("command", [["bench", "lora"], ["bench", "--quick"], ["bench-lora"], ["tune", "moe_lora"]])
def test_without_torch(command: list[str]) -> None:
    """What is missing is said as every failure is."""
    code = (
        "import sys; sys.modules['torch'] = sys.modules['triton'] = None\n"
        f"sys.argv = ['kernelgen', *{command}, '--json']\n"
        "from kernelgen.__main__ import main; main()"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    (error,) = json.loads(done.stdout)["errors"]
    assert (done.returncode, error["code"], error["path"]) == (2, "KG081", "torch"), done.stderr


@pytest.mark.parametrize(("suite", "peer"), [(s, p) for s in suites.NAMES for p in suites.find(s).peers])
def test_a_peer_that_is_not_there(suite: str, peer: str, device: str, kernelgen, monkeypatch: pytest.MonkeyPatch) -> None:
    if peer == "torch":
        return  # is always there
    monkeypatch.setitem(sys.modules, peer, None)
    code, stdout, _ = kernelgen("bench", suite, "--check-only", "--against", peer, "--json")
    (error,) = json.loads(stdout)["errors"]
    assert (code, error["code"], error["path"]) == (2, "KG071", peer) and "PYTHONPATH" in error["hint"]


def _rows(kernelgen, *arguments: str) -> list[dict[str, Any]]:
    code, stdout, stderr = kernelgen("bench", *arguments, "--check-only", "--json")
    assert code == 0, stderr
    rows: list[dict[str, Any]] = json.loads(stdout)["rows"]
    return rows


@pytest.mark.slow(keep=4)
@pytest.mark.parametrize(
    ("arguments", "limit"),
    [
        (["moe_lora", "--tokens", "5", "--add", "--against", "torch"], 0.01),
        (["moe_lora", "--tokens", "5", "--sites", "w2", "--set", "--forms", "one_shot,small_batch,two_kernel"], 0.01),
        (["moe_lora", "--tokens", "3", "--sites", "layer", "--add", "--quant", "group", "--act", "token,group"], 0.01),
        (["lora", "--tokens", "5", "--sites", "qkv", "--quant", "none,tensor,channel,group", "--against", "torch"], 0.01),
        (["fused_moe", "--tokens", "5", "--quant", "none", "--act", "none", "--against", "torch"], 0.01),
        (["fused_moe", "--tokens", "5,2", "--quant", "group", "--act", "group"], 0.04),
        (["fused_moe", "--tokens", "5", "--sites", "layer", "--quant", "tensor", "--act", "tensor"], 0.04),
        (["layer", "--tokens", "5", "--forms", "bare,overlap,separate"], 0.01),
        (["layer", "--tokens", "5", "--forms", "bare", "--quant", "tensor,group", "--act", "tensor,group"], 0.04),
    ],
    ids=lambda value: "_".join(value[::2]) if isinstance(value, list) else "",
)
def test_every_suite_is_right(arguments: list[str], limit: float, device: str, kernelgen) -> None:
    """Tiny problems through the whole program, interpreted: each result is compared with the formula."""
    rows = _rows(kernelgen, *arguments)
    suite = suites.find(arguments[0])
    told = suite.cells({axis.name: _told(axis, arguments) for axis in suite.axes}, "tiny")
    assert {row["site"] for row in rows} == {cell.site for cell in told}
    assert all(row["us"] is None and (row["variant"] or row["site"] == "route") for row in rows)
    assert all(row["error"] is None or 0.0 < row["error"] < limit for row in rows)
    asked = {*(w for o in ("--against", "--forms") if o in arguments for w in arguments[arguments.index(o) + 1].split(","))}
    assert {row["impl"].removeprefix("kernelgen:") for row in rows} == {"kernelgen", *asked}


def _told(axis: Any, arguments: list[str]) -> Any:
    option = f"--{axis.name}"
    if axis.flag:
        return True if "--add" in arguments else False if "--set" in arguments else None
    return axis.kind.convert(arguments[arguments.index(option) + 1], None, None) if option in arguments else None


def test_what_the_spec_leaves_out_gives_no_row(device: str, kernelgen) -> None:
    """A scale a token beside groups."""
    options = ("--sites", "layer", "--tokens", "1", "--add", "--quant", "group", "--act", "token,group")
    (row,) = _rows(kernelgen, "moe_lora", *options)
    assert row["quant"] == row["act"] == "group"


@pytest.mark.slow
def test_check_only_interprets_by_itself(tmp_path: Path) -> None:
    """Where there is no GPU; and what a result file holds is not done again."""
    out = tmp_path / "r.json"
    command = [sys.executable, "-m", "kernelgen", "bench", "lora", "--check-only", "--sites", "o", "--out", str(out)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment.pop("TRITON_INTERPRET")
    for _ in range(2):
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0 and "out of time" not in done.stderr, done.stderr
    assert len(json.loads(out.read_text())["rows"]) == 4


def test_a_run_goes_on_where_it_ended(device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kernelgen) -> None:
    """Rows are saved as they come; what failed is noted, counts in the exit code, and is tried again when told."""
    from kernelgen.measure.workloads import lora as dense

    out = tmp_path / "deep" / "r.json"
    tiny = ("bench", "lora", "--check-only", "--sites", "o", "--active", "1", "--out", str(out))

    def rows() -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = json.loads(out.read_text())["rows"]
        return found

    ops = dense.Ours.ops

    def breaks(self: dense.Ours, case: Any) -> Any:
        if case.cell.tokens == 2:
            return [dataclasses.replace(op, call=lambda: None) for op in ops(self, case)]
        if case.cell.tokens == 3:
            assert [row["tokens"] for row in rows()] == [1, 2]
            raise RuntimeError("this kernel does not compile\nand more")
        if case.cell.tokens == 4:
            raise KeyboardInterrupt
        return ops(self, case)

    with monkeypatch.context() as patch:
        patch.setattr(dense.Ours, "ops", breaks)
        stopped = kernelgen(*tiny, "--tokens", "1,2,3,4")
    assert stopped[0] == 130 and [row["tokens"] for row in rows()] == [1, 2, 3]
    wrong = [row["failed"] for row in rows()]
    assert wrong[0] is None and wrong[1].startswith("relative error")
    assert wrong[2] == "RuntimeError: this kernel does not compile"
    code, _, stderr = kernelgen(*tiny, "--tokens", "1,4", "--seconds", "1e-9")
    assert code == 0 and "out of time" in stderr and len(rows()) == 3
    code, stdout, stderr = kernelgen(*tiny, "--tokens", "1,2,3,4")
    assert code == 1 and [row["tokens"] for row in rows()] == [1, 2, 3, 4]
    assert "2 of 4 rows failed" in stdout
    assert "kernelgen: error[KG073]: tiny o r16, 1 of 4 adapters T=2: relative error" in stderr
    stamp = out.stat().st_mtime_ns
    assert kernelgen(*tiny, "--tokens", "1,4")[0] == 0 and out.stat().st_mtime_ns == stamp
    again = kernelgen(*tiny, "--tokens", "1,2,3,4", "--retry")
    assert again[0] == 0 and [row["failed"] for row in rows()] == [None] * 4


# --- operands, and what is right for them ---------------------------------------------------------------------------


class TestTensors:
    """On the CPU."""

    @pytest.fixture(autouse=True)
    def _one_thread(self) -> None:
        torch = pytest.importorskip("torch")
        pytest.importorskip("triton")
        torch.set_num_threads(1)

    def _case(self, **options: object) -> Any:
        import torch

        from kernelgen.measure import implementations

        fields = {"site": "w13", "rank": 16, "tokens": 12, "base": 0.25, "dtype": "f16", **options}
        return implementations.workload("moe_lora", torch.device("cpu"), 3).case(moe_lora.Cell(model=TINY, **fields))

    def test_batches(self) -> None:
        case = self._case(tokens=64, slots=8)
        for batch in case.batches:
            assert ((batch.mapping < 0).sum() == 16) and batch.mapping.unique().numel() == 5
            assert all(row.unique().numel() == 2 for row in batch.topk_ids)
        assert not case.batches[0].topk_ids.equal(case.batches[1].topk_ids)
        same = self._case(tokens=64, slots=8)
        for a, b in zip(case.batches, same.batches, strict=True):
            assert a.topk_ids.equal(b.topk_ids)
            assert a.operands[0].weights.a[1].equal(b.operands[0].weights.a[1])

    def test_skewed_routing(self) -> None:
        case = self._case(tokens=500, routing="skewed")
        for batch in case.batches:
            count = batch.topk_ids.flatten().bincount(minlength=8).sort(descending=True).values
            assert count[:2].sum() > 0.7 * count.sum()  # two hot experts of eight, without replacement

    @pytest.mark.parametrize("site", ["w13", "w2"])
    @pytest.mark.parametrize("add", [True, False])
    @pytest.mark.parametrize("fault", [None, "unwritten", "touched", "scaled", "one_pair"])
    def test_truth(self, site: str, add: bool, fault: str | None) -> None:
        import torch

        from kernelgen.measure.truth import WrongResult
        from kernelgen.measure.workloads.moe_lora import delta, truth

        case = self._case(site=site, add=add)
        batch = case.batches[0]
        operands = batch.operands[0]
        torch.manual_seed(0)
        known = truth(case.cell, batch, operands)
        pairs = batch.live.nonzero()[:, 0]
        rows = operands.out.flatten(0, 1)
        wanted = delta(batch, operands, pairs, weighted=True)
        if fault == "scaled":
            wanted *= 1.2
        if fault == "one_pair":
            wanted[3] = wanted[4]
        rows[pairs] = (wanted + (known.before[pairs] if add else 0.0)).half()
        if fault == "unwritten":
            rows[pairs[2], 7] = float("nan")
        if fault == "touched":
            rows[(~batch.live).nonzero()[0, 0], 0] = 1.0
        if fault is None:
            assert known.error() < 1e-3
        else:
            with pytest.raises(WrongResult):
                known.error()

    @pytest.mark.parametrize(
        ("quant", "act"),
        [("tensor", "none"), ("channel", "token"), ("group", "group"), ("none", "tensor")],
    )
    def test_delta_of_fp8(self, quant: str, act: str) -> None:
        import torch

        from kernelgen.measure.workloads.moe_lora import Adapters, Operands, delta

        case = self._case(site="w2", rank=160, dtype="bf16", quant=quant, act=act)
        batch = case.batches[0]
        operands = batch.operands[0]
        w = operands.weights
        a = tuple(_plain(c, s, quant) for c, s in zip_longest(w.a, w.a_scale))
        b = tuple(_plain(c, s, quant) for c, s in zip_longest(w.b, w.b_scale))
        same = Operands(operands.projection, _plain(operands.x, operands.x_scale, act), operands.out, Adapters(a, b))
        pairs = batch.live.nonzero()[:, 0]
        torch.testing.assert_close(delta(batch, operands, pairs, True), delta(batch, same, pairs, True))

    @pytest.mark.parametrize("scales", ["tensor", "channel", "group"])
    def test_dense_fp8_is_compared_with_what_it_stands_for(self, scales: str) -> None:
        """As for 16-bit weights that are dequantised by hand; a scale from a wrong place, and no scale, is a wrong result."""
        import torch

        from kernelgen.measure import implementations
        from kernelgen.measure.truth import WrongResult
        from kernelgen.measure.workload import Prepared, check

        workload = implementations.workload("lora", torch.device("cpu"), 1)
        cell = lora.Cell(model="tiny", site="qkv", rank=160, tokens=5, active=2, quant=scales)
        case = workload.case(cell)
        (batch,) = case.batches
        assert batch.a[0].dtype == torch.float8_e4m3fn

        def call(a_scale: Any, b_scale: Any) -> Callable[[], None]:
            def apply() -> None:
                weights = zip(batch.a, a_scale, batch.b, b_scale, strict=True)
                pairs = [(_plain(a, of_a, scales), _plain(b, of_b, scales)) for a, of_a, b, of_b in weights]
                for t, adapter in enumerate(batch.mapping.tolist()):
                    row = torch.cat([b[adapter] @ (a[adapter] @ batch.x[t].double()) for a, b in pairs])
                    batch.out[t] = (batch.out[t].double() + row).bfloat16()

            return apply

        a_scale, b_scale = batch.a_scale, batch.b_scale
        assert 0.0 < check(workload, case, Prepared((call(a_scale, b_scale),))) < 0.01
        for wrong in ([s.roll(1, 0) for s in a_scale], a_scale[::-1], [torch.ones_like(s) for s in a_scale]):
            with pytest.raises(WrongResult, match="relative error"):
                check(workload, case, Prepared((call(wrong, b_scale),)))

    @pytest.mark.parametrize(
        ("suite", "fields"),
        [
            ("lora", {"model": "tiny", "site": "o", "rank": 16}),
            ("fused_moe", {"model": TINY, "site": "layer"}),
            ("fused_moe", {"model": TINY, "site": "sum"}),
            ("fused_moe", {"model": TINY, "site": "quant", "quant": "group", "act": "group"}),
            ("layer", {"model": TINY, "site": "layer", "rank": 16}),
            ("layer", {"model": TINY, "site": "w13", "rank": 16}),
        ],
    )
    def test_what_does_nothing_is_wrong(self, suite: str, fields: dict[str, Any], device: str) -> None:
        import torch

        from kernelgen.measure import implementations
        from kernelgen.measure.truth import WrongResult
        from kernelgen.measure.workload import check

        workload = implementations.workload(suite, torch.device(device), 1)
        case = workload.case(suites.find(suite).cell(tokens=5, **fields))
        prepared = implementations.load(suite, "kernelgen", ROOT / "generated").prepare(case)
        with pytest.raises(WrongResult):
            check(workload, case, dataclasses.replace(prepared, calls=(lambda: None,)))

    def test_tables(self) -> None:
        import torch

        from kernelgen.measure.truth import WrongResult
        from kernelgen.measure.workloads.fused_moe import place_of_pairs
        from kernelgen.measure.workloads.moe_lora import check_blocks

        batch = self._case().batches[0]
        owner = [(int(batch.mapping[p // 2]), int(batch.topk_ids.flatten()[p]), p) for p in range(24)]
        live = sorted(key for key in owner if key[0] >= 0)
        pairs = torch.tensor([p for *_, p in live], dtype=torch.int32)
        blocks = torch.tensor([[a, e, i, 1] for i, (a, e, _) in enumerate(live)], dtype=torch.int32)
        check_blocks(batch, pairs, blocks, torch.tensor([len(live)]))
        blocks[2, 1] += 1
        with pytest.raises(WrongResult):
            check_blocks(batch, pairs, blocks, torch.tensor([len(live)]))

        ids = batch.topk_ids.flatten()
        order = ids.long().argsort(stable=True)
        of_one = torch.stack([ids[order], torch.arange(24), torch.ones(24)], 1).int()
        tables = _Tables(order.int(), of_one.flatten(), torch.tensor([24]))
        assert place_of_pairs(tables, batch.topk_ids)[order].equal(torch.arange(24))
        wrong = of_one.clone()
        wrong[3, 0] += 1
        for broken in (wrong.flatten(), torch.cat([of_one[:5], of_one[:1], of_one[6:]]).flatten()):
            with pytest.raises(WrongResult):
                place_of_pairs(_Tables(order.int(), broken, torch.tensor([24])), batch.topk_ids)

    def test_vllm_tables(self) -> None:
        from kernelgen.measure.peers.vllm import align

        case = self._case(tokens=33)
        batch, block = case.batches[0], 16
        sorted_ids, expert_ids, padded = align(batch, case.cell, block)
        seen = []
        for adapter in range(4):
            assert padded[adapter] % block == 0
            for at in range(int(padded[adapter])):
                pair = int(sorted_ids[adapter, at])
                if pair < 66:
                    assert batch.mapping[pair // 2] == adapter
                    assert batch.topk_ids.flatten()[pair] == expert_ids[adapter, at // block]
                    seen.append(pair)
        assert sorted(seen) == [p for p in range(66) if batch.mapping[p // 2] >= 0]


@dataclasses.dataclass
class _Tables:
    pairs: Any
    blocks: Any
    num_blocks: Any


def _plain(codes: Any, scales: Any, mode: str) -> Any:
    """What codes and scales stand for, worked out in another way."""
    import torch

    assert (codes.element_size() == 1) == (scales is not None) == (mode != "none")
    if scales is None:
        return codes
    rows = 1 if codes.dim() == 2 else 128
    *lead, m, n = codes.shape
    wide = {
        "tensor": lambda: scales.reshape(*lead, 1, 1),
        "channel": lambda: scales.reshape(*lead, m, 1),
        "token": lambda: scales.reshape(m, 1),
        "group": lambda: torch.kron(scales, torch.ones(*[1] * len(lead), rows, 128)),
    }[mode]()
    return codes.double() * wide.double()[..., :m, :n]
