"""The benchmark: workloads, checks, resuming and the report. Timing itself needs a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from itertools import zip_longest
from pathlib import Path

import pytest

from kernelgen.diagnostics import Failure
from kernelgen.measure import document as documents
from kernelgen.measure import workloads
from kernelgen.measure.report import markdown_tables
from kernelgen.measure.summary import geomean, speedups
from kernelgen.measure.workloads import MODELS, Cell, Model, Selection

ROOT = Path(__file__).resolve().parent.parent
MACHINE = {"gpu": "GPU", "sms": 132}
VERSIONS = {"torch": "2", "triton": "3"}

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
    assert workloads.model_from_config(path, tp) == expected


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
        workloads.model_from_config(path, tp)


def test_projections() -> None:
    w13, w2 = (MODELS["qwen3-30b-a3b"].projection(site) for site in ("w13", "w2"))
    assert (w13.k, w13.n, w13.slices, w13.weighted) == (2048, 768, 2, False)
    assert (w2.k, w2.n, w2.slices, w2.weighted) == (768, 2048, 1, True)
    assert MODELS["nemotron-3-nano"].projection("w13").slices == 1


def test_cells_span_the_selection() -> None:
    cells = list(Selection([MODELS["tiny"]], ("w13", "route"), (16, 64), (1, 4)).cells())
    assert len(cells) == 2 * 2 * 2 + 2 * 2  # a route is there once, whatever add
    assert len(set(cells)) == len(cells)
    twins = [c for c in cells if c.site == "w13" and c.rank == 16 and c.tokens == 1]
    assert twins[0].seed == twins[1].seed and twins[0].add != twins[1].add
    quants = (("none", "none"), ("channel", "none"))
    cells = list(Selection([MODELS["tiny"]], ("w13", "route"), (16,), (1,), quants=quants).cells())
    assert [(c.site, c.add, c.quant) for c in cells] == [
        *(("w13", add, quant) for add in (True, False) for quant in ("none", "channel")),
        ("route", True, "none"),
    ]
    assert len({c.seed for c in cells if c.site == "w13"}) == 1
    with pytest.raises(Failure, match="slots"):
        Cell(MODELS["tiny"], "w13", 16, 1, active=5, slots=4)


def test_work_by_hand() -> None:
    model = Model("m", hidden=8, intermediate=4, experts=2, top_k=2)
    cell = Cell(model, "w13", rank=2, tokens=3)
    found = workloads.work(cell, groups=5, live_tokens=3, live_pairs=6)
    assert found.bytes == 2 * (5 * 2 * 2 * (8 + 4) + 3 * 8 + 6 * 2 * 4 * 2)
    assert found.flops == 2 * 6 * 2 * 2 * (8 + 4)
    layer = workloads.work(Cell(model, "layer", 2, 3, add=False), 5, 3, 6)
    assert layer.bytes == 2 * (5 * 2 * 2 * 12 + 24 + 48) + 2 * (5 * 2 * 12 + 6 * 4 + 6 * 8)
    assert found.floor_us(copy_gb_s=1e-3, tflop_s=1e9) == pytest.approx(found.bytes)
    fp8 = workloads.work(Cell(model, "w13", 2, 3, quant="channel", act="token"), 5, 3, 6)
    assert fp8.bytes == 5 * 2 * (2 * (8 + 4) + 4 * (2 + 4)) + 3 * (8 + 4) + 2 * 6 * 2 * 4 * 2
    assert fp8.flops == found.flops


def test_help_imports_no_torch() -> None:
    code = (
        "import sys, kernelgen.measure.command, kernelgen.measure.report\n"
        "print([m for m in ('torch', 'triton', 'pydantic', 'black') if m in sys.modules])"
    )
    shown = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert shown.stdout.strip() == "[]", shown.stderr


def _row(cell: Cell, impl: str, us: float | None, failed: str | None = None) -> dict[str, object]:
    times = {"us": us, "us_p10": us, "us_p90": us, "floor_us": 2.0, "host_us": 9.0, "replays": 9}
    result = {"error": 1e-3, "variant": "v", "config": {}, "note": "", "failed": failed}
    return {**cell.columns(), "impl": impl, **times, **result}


def _document() -> documents.Document:
    cells = list(Selection([MODELS["tiny"]], ("w13", "w2"), (16, 64), (1, 16, 256)).cells())
    document = documents.Document(
        dict(MACHINE), dict(VERSIONS), {"copy_gb_s": 4200.0, "bf16_tflop_s": 770.0}
    )
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
    again = documents.resume(path, dict(MACHINE), {**VERSIONS, "vllm": "1"})
    assert again.rows == document.rows and again.versions["vllm"] == "1"
    old = json.loads(path.read_text())
    for row in old["rows"]:
        del row["quant"], row["act"]  # as they were before FP8
    path.write_text(json.dumps(old))
    assert documents.load(path).rows == document.rows
    cell = Cell(MODELS["tiny"], "w13", 16, 1)
    assert again.has(cell, "kernelgen") and not again.has(cell, "torch")
    again.forget(lambda row: row["failed"] is not None)
    assert not again.has(cell, "vllm")
    with pytest.raises(Failure, match="torch"):
        documents.resume(path, dict(MACHINE), {**VERSIONS, "torch": "9"})


@pytest.mark.parametrize(
    "text", ["", "{}", "[]", '{"schema_version": 99}', '{"schema_version": 1}']
)
def test_bad_document(tmp_path: Path, text: str) -> None:
    path = tmp_path / "r.json"
    path.write_text(text)
    with pytest.raises(Failure, match=r"r\.json"):
        documents.load(path)


def test_failed_rows_do_not_count() -> None:
    document = _document()
    times = [t for _, t in speedups(document.rows, "vllm")]
    assert len(times) == 11 and geomean(times) == pytest.approx(2.0)
    text = markdown_tables(document)
    assert "vllm, add: **2.00 ×**" in text and "| tiny w13 r64 | 4 (0.50) ×2 |" in text
    fp8 = Cell(MODELS["tiny"], "w13", 64, 16, add=False, quant="channel", act="token")
    document.add(_row(fp8, "kernelgen", 2.5))
    text = markdown_tables(document)
    assert "- w8channel a8token against 16-bit operands: **1.60 ×** geomean" in text
    assert "| tiny w13 r64 w8channel a8token | – | 2.5 (0.80) ×1.60 | – |" in text


def test_report_draws_the_same_bytes_again(tmp_path: Path, kernelgen) -> None:
    pytest.importorskip("matplotlib")
    result = tmp_path / "moe_lora.json"
    _document().save(result)
    for folder in ("a", "b"):
        code, stdout, stderr = kernelgen("report", str(result), "--out", str(tmp_path / folder))
        assert (code, stderr) == (0, "") and stdout.count(".svg") == 4
    names = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert names == [
        "moe_lora_floor_add.svg",
        "moe_lora_floor_set.svg",
        "moe_lora_speedup_sglang_set.svg",
        "moe_lora_speedup_vllm_add.svg",
    ]
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


@pytest.mark.parametrize(
    "arguments",
    [
        ["--models", "nobody"],
        ["--ranks", "16,x"],
        ["--tokens", "0"],
        ["--active", "8", "--slots", "4"],
        ["--active", "1,2", "--slots", "4,4,4"],
        ["--tp", "2"],
        ["--no-ours"],
        ["--model-config", "nowhere.json"],
    ],
)
def test_bad_options(arguments: list[str], kernelgen) -> None:
    code, stdout, stderr = kernelgen("bench", *arguments)
    assert (code, stdout) == (2, "") and ("error[KG070]" in stderr or "Usage:" in stderr)


@pytest.mark.parametrize("command", ["bench", "bench-lora", "tune"])
def test_without_torch(command: str) -> None:
    """What is missing is said as every failure is."""
    code = (
        "import sys; sys.modules['torch'] = sys.modules['triton'] = None\n"
        f"sys.argv = ['kernelgen', '{command}', '--json']\n"
        "from kernelgen.__main__ import main; main()"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    (error,) = json.loads(done.stdout)["errors"]
    assert (done.returncode, error["code"], error["path"]) == (2, "KG081", "torch"), done.stderr


class TestTensors:
    """Inputs and checks, on the CPU."""

    @pytest.fixture(autouse=True)
    def _one_thread(self) -> None:
        torch = pytest.importorskip("torch")
        pytest.importorskip("triton")
        torch.set_num_threads(1)

    def _case(self, **options: object):  # type: ignore[no-untyped-def]
        import torch

        from kernelgen.measure.inputs import WeightPool, make_case

        fields = {"site": "w13", "rank": 16, "tokens": 12, "base": 0.25, "dtype": "f16", **options}
        cell = Cell(MODELS["tiny"], **fields)  # type: ignore[arg-type]
        device = torch.device("cpu")
        return make_case(cell, WeightPool(device, 0.0, lambda: None), device, sets=3)

    def test_batches(self) -> None:
        case = self._case(tokens=64, slots=8)
        for batch in case.batches:
            assert ((batch.mapping < 0).sum() == 16) and batch.mapping.unique().numel() == 5
            assert all(row.unique().numel() == 2 for row in batch.topk_ids)
        assert not case.batches[0].topk_ids.equal(case.batches[1].topk_ids)
        same = self._case(tokens=64, slots=8)
        for a, b in zip(case.batches, same.batches, strict=True):
            assert a.topk_ids.equal(b.topk_ids)
            assert a.operands[0].weights.lora_a[1].equal(b.operands[0].weights.lora_a[1])

    def test_skewed_routing(self) -> None:
        case = self._case(tokens=500, routing="skewed")
        for batch in case.batches:
            count = batch.topk_ids.flatten().bincount(minlength=8).sort(descending=True).values
            assert (
                count[:2].sum() > 0.7 * count.sum()
            )  # two hot experts of eight, without replacement

    @pytest.mark.parametrize("site", ["w13", "w2"])
    @pytest.mark.parametrize("add", [True, False])
    @pytest.mark.parametrize("fault", [None, "unwritten", "touched", "scaled", "one_pair"])
    def test_verify(self, site: str, add: bool, fault: str | None) -> None:
        import torch

        from kernelgen.measure.verify import WrongResult, delta, poison, verify

        case = self._case(site=site, add=add)
        batch = case.batches[0]
        operands = batch.operands[0]
        before = poison(operands, add)
        live = (batch.mapping >= 0).repeat_interleave(2)
        pairs = live.nonzero()[:, 0]
        rows = operands.out.flatten(0, 1)
        wanted = delta(batch, operands, pairs, weighted=True)
        if fault == "scaled":
            wanted *= 1.2
        if fault == "one_pair":
            wanted[3] = wanted[4]
        rows[pairs] = (wanted + (before.flatten(0, 1)[pairs] if add else 0.0)).half()
        if fault == "unwritten":
            rows[pairs[2], 7] = float("nan")
        if fault == "touched":
            rows[(~live).nonzero()[0, 0], 0] = 1.0

        def run() -> float:
            rules = {"adds": add, "weighted": True, "keeps_rows": True}
            return verify(case, batch, operands, before, **rules)

        torch.manual_seed(0)
        if fault is None:
            assert run() < 1e-3
        else:
            with pytest.raises(WrongResult):
                run()

    @pytest.mark.parametrize(
        ("quant", "act"),
        [("tensor", "none"), ("channel", "token"), ("group", "group"), ("none", "tensor")],
    )
    def test_delta_of_fp8(self, quant: str, act: str) -> None:
        import torch

        from kernelgen.measure.inputs import Operands, Weights
        from kernelgen.measure.verify import delta

        case = self._case(site="w2", rank=160, dtype="bf16", quant=quant, act=act)
        batch = case.batches[0]
        operands = batch.operands[0]

        def plain(codes: torch.Tensor, scales: torch.Tensor | None, mode: str) -> torch.Tensor:
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

        w = operands.weights
        a = tuple(plain(c, s, quant) for c, s in zip_longest(w.lora_a, w.a_scale))
        b = tuple(plain(c, s, quant) for c, s in zip_longest(w.lora_b, w.b_scale))
        x = plain(operands.x, operands.x_scale, act)
        same = Operands(operands.projection, x, operands.out, Weights(a, b))
        pairs = (batch.mapping >= 0).repeat_interleave(2).nonzero()[:, 0]
        torch.testing.assert_close(delta(batch, operands, pairs, True), delta(batch, same, pairs, True))

    def test_verify_blocks(self) -> None:
        import torch

        from kernelgen.measure.verify import WrongResult, verify_blocks

        batch = self._case().batches[0]
        owner = [
            (int(batch.mapping[p // 2]), int(batch.topk_ids.flatten()[p]), p) for p in range(24)
        ]
        live = sorted(key for key in owner if key[0] >= 0)
        pairs = torch.tensor([p for *_, p in live], dtype=torch.int32)
        blocks = torch.tensor([[a, e, i, 1] for i, (a, e, _) in enumerate(live)], dtype=torch.int32)
        verify_blocks(batch, pairs, blocks, torch.tensor([len(live)]))
        blocks[2, 1] += 1
        with pytest.raises(WrongResult):
            verify_blocks(batch, pairs, blocks, torch.tensor([len(live)]))

    def test_vllm_tables(self) -> None:
        from kernelgen.measure.peers.vllm_peer import align

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


def test_check_only_runs_and_resumes(tmp_path: Path) -> None:
    """The front doors through the whole program, interpreted."""
    pytest.importorskip("triton")
    out = tmp_path / "r.json"

    def run(*more: str) -> subprocess.CompletedProcess[str]:
        command = [
            sys.executable,
            "-m",
            "kernelgen",
            "bench",
            "--models",
            "tiny",
            "--ranks",
            "16",
            "--tokens",
            "1,20",
        ]
        command += [
            "--sites",
            "w13,layer",
            "--add",
            "--dtype",
            "f16",
            "--check-only",
            "--out",
            str(out),
            "--json",
        ]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        environment.pop("TRITON_INTERPRET")
        return subprocess.run(
            [*command, *more], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
        )  # fmt: skip

    first = run()
    assert first.returncode == 0, first.stderr
    rows = json.loads(first.stdout)["rows"]
    assert [(r["site"], r["tokens"]) for r in rows] == [("w13", 1), ("w13", 20), ("layer", 1), ("layer", 20)]  # fmt: skip
    assert all(r["error"] < 2e-3 and r["us"] is None and r["variant"] for r in rows)
    assert "small_batch" in rows[0]["variant"] and rows[0]["config"]["shrink"]["num_warps"] in (
        2,
        4,
    )
    stamp = out.stat().st_mtime_ns
    assert run().returncode == 0 and out.stat().st_mtime_ns == stamp  # nothing was left to do
    fp8 = run("--sites", "layer", "--tokens", "1", "--dtype", "bf16", "--quant", "group", "--act", "token,group")
    assert fp8.returncode == 0, fp8.stderr
    (row,) = json.loads(fp8.stdout)["rows"][4:]  # the spec leaves out a scale a token beside groups
    assert row["quant"] == row["act"] == "group" and row["error"] < 1e-2
