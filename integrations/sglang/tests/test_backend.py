"""Layers of SGLang over its own LoRA manager and memory, for every kind of batch, against float64 sums of each row's adapter."""

from __future__ import annotations

import types
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from engine import Engine
from kernelgen_sglang import contract, start
from kernelgen_sglang.backend import Backend
from sglang.srt.environ import envs
from sglang.srt.lora.backend.torch_backend import TorchNativeLoRABackend
from sglang.srt.model_executor.forward_batch_info import ForwardMode
from tiny import ATTENTION, VOCAB, Model

DTYPE, RANKS = torch.bfloat16, {"a": 8, "b": 16, "c": 4, "d": 16}
NEAR = contract.NUMERICS.tolerances["bfloat16"]
# The layers of a model: where they are, and the weights of transformers that they hold.
LAYERS = {
    "qkv": ("self_attn.qkv_proj", ("q_proj", "k_proj", "v_proj")),
    "o": ("self_attn.o_proj", ("o_proj",)),
    "gate_up": ("mlp.gate_up_proj", ("gate_proj", "up_proj")),
    "down": ("mlp.down_proj", ("down_proj",)),
}


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    model = Model(tmp_path_factory.mktemp("model"), "llama", DTYPE)
    targets = (*ATTENTION, "gate_proj", "up_proj", "down_proj", "embed_tokens", "lm_head")
    for i, (name, rank) in enumerate(RANKS.items()):
        model.adapter(name, rank, i, targets)
    made = Engine(model, {"qkv_proj", "o_proj", "gate_up_proj", "down_proj", "embed_tokens", "lm_head"}, lora_backend="csgmv")
    for name in RANKS:
        made.load(name)
    made.manager.init_decode_cuda_graph_batch_info(8, 1)
    made.manager.init_prefill_cuda_graph_batch_info(32, 4)
    yield made
    made.close()


@pytest.fixture(autouse=True)
def _eager(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches are of no graph unless a test says so."""
    monkeypatch.setattr(engine.manager, "_use_cuda_graph_batch", lambda batch: False)
    monkeypatch.setattr(engine.manager, "can_use_prefill_cuda_graph", lambda batch: False)


def prepare(engine: Engine, mode: ForwardMode, requests: list[tuple[str | None, int]], **options: Any) -> list[str | None]:
    """Have a batch of requests, each an adapter and its rows; the adapter of each row."""
    names, rows = (list(of) for of in zip(*requests, strict=True))
    batch = types.SimpleNamespace(
        batch_size=len(names), forward_mode=mode, lora_ids=names, extend_seq_lens_cpu=rows, extend_num_tokens=sum(rows),
        return_logprob=False, spec_info=types.SimpleNamespace(draft_token_num=rows[0]),
    )  # fmt: skip
    vars(batch).update(options)
    engine.manager.fetch_new_loras(set(names))
    engine.manager.prepare_lora_batch(batch)
    return [name for name, count in requests for _ in range(count)]


def delta(engine: Engine, weights: list[str], name: str | None, x: torch.Tensor) -> torch.Tensor:
    """What an adapter adds to a row, float64."""
    if name is None:
        return torch.zeros(sum(engine.model.weights[weight].shape[0] for weight in weights), dtype=torch.float64)
    return torch.cat([engine.model.deltas[name][weight] for weight in weights]).double() @ x.double()


def near(out: torch.Tensor, base: torch.Tensor, wanted: torch.Tensor) -> None:
    """That rows are those of the base layer and what adapters add, within what is promised; without an adapter to the bit."""
    far = (out.double() - base.double() - wanted).abs()
    allowed = NEAR * wanted.abs().amax(-1, keepdim=True) + torch.where(wanted == 0, 0, 2.0**-8 * out.double().abs())
    assert (far <= allowed).all(), (far - allowed).max()
    assert (wanted.abs().amax() > 8 * far.amax()) == bool(wanted.any())


def through(engine: Engine, kind: str, names: list[str | None], rows: int) -> None:
    """A layer on so many rows, those behind the batch without an adapter."""
    path, weights = LAYERS[kind]
    layer = engine.manager.lora_modules[1][f"model.layers.1.{path}"]
    full = [f"model.layers.1.{path.rpartition('.')[0]}.{weight}.weight" for weight in weights]
    x = torch.randn(rows, engine.model.weights[full[0]].shape[1], generator=torch.Generator().manual_seed(rows)).to(DTYPE)
    named = names + [None] * (rows - len(names))
    wanted = torch.stack([delta(engine, full, name, row) for name, row in zip(named, x, strict=True)])
    base = layer.base_layer(x)[0]
    near(layer(x)[0], base, wanted)
    if rows == len(names):
        near(layer.apply_lora(base.clone(), x), base, wanted)


MIXED = [("a", 5), (None, 1), ("b", 9), ("a", 1)]


@pytest.mark.parametrize("kind", LAYERS)
def test_batches(kind: str, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of every kind, one behind the other, so that each finds what another left; ranks 4 to 16, four adapters in two slots."""
    through(engine, kind, prepare(engine, ForwardMode.EXTEND, MIXED), 16)
    through(engine, kind, prepare(engine, ForwardMode.DECODE, [(name, 1) for name in ("b", None, "a", "b", None)]), 5)
    through(engine, kind, prepare(engine, ForwardMode.MIXED, [("c", 1), (None, 3), ("d", 2)]), 6)
    through(engine, kind, prepare(engine, ForwardMode.TARGET_VERIFY, [("a", 3), (None, 3), ("d", 3)]), 9)
    through(engine, kind, prepare(engine, ForwardMode.DECODE, [(None, 1)] * 3), 3)
    monkeypatch.setattr(engine.manager, "_use_cuda_graph_batch", lambda batch: True)
    through(engine, kind, prepare(engine, ForwardMode.DECODE, [("a", 1)] * 8), 8)
    through(engine, kind, prepare(engine, ForwardMode.DECODE, [("d", 1), ("a", 1), (None, 1)]), 8)
    monkeypatch.undo()
    monkeypatch.setattr(engine.manager, "_use_cuda_graph_batch", lambda batch: False)
    through(engine, kind, prepare(engine, ForwardMode.EXTEND, [("b", 20), ("c", 12)]), 32)
    through(engine, kind, prepare(engine, ForwardMode.EXTEND, [("c", 3)]), 32)
    backend = engine.manager.lora_backend
    assert isinstance(backend, Backend) and backend.batch_info is backend.prefill_cuda_graph_batch_info


def test_a_batch_without_adapters_launches_nothing(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    prepare(engine, ForwardMode.DECODE, [(None, 1), (None, 1)])
    monkeypatch.setattr(Backend, "forward_with_base", None)
    layer = engine.manager.lora_modules[0]["model.layers.0.self_attn.o_proj"]
    x = torch.randn(2, 128).to(DTYPE)
    assert torch.equal(layer(x)[0], layer.base_layer(x)[0])


def test_heads(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Embeddings of all rows; logits of the last row of each request, of many of it, in passes, and of all."""
    names, ids = prepare(engine, ForwardMode.EXTEND, MIXED), torch.arange(3, 19)
    embed, head = engine.manager.embed_tokens_module, engine.manager.lm_head_module
    table = {name: deltas["model.embed_tokens.weight"].double() for name, deltas in engine.model.deltas.items() if name}
    wanted = torch.stack([table[name][i] if name else torch.zeros(64).double() for name, i in zip(names, ids, strict=True)])
    near(embed(ids), embed.base_layer(ids), wanted)

    def logits(rows: list[str | None]) -> None:
        x = torch.randn(len(rows), 64, generator=torch.Generator().manual_seed(len(rows))).to(DTYPE)
        wanted = torch.stack([delta(engine, ["lm_head.weight"], name, row) for name, row in zip(rows, x, strict=True)])
        base = torch.nn.functional.linear(x, head.weight)
        full = torch.nn.functional.pad(wanted, (0, base.shape[1] - VOCAB))
        near(head(x), base, full)

    logits([name for name, _ in MIXED])
    prepare(engine, ForwardMode.EXTEND, MIXED, return_logprob=True, extend_logprob_start_lens_cpu=[2, 0, 5, 0])
    kept = ["a"] * 3 + [None] + ["b"] * 4 + ["a"]
    logits(kept)
    with envs.SGLANG_ENABLE_LOGPROB_CHUNK.override(True), envs.SGLANG_LOGPROB_CHUNK_SIZE.override(4):
        prepare(engine, ForwardMode.EXTEND, MIXED, return_logprob=True, extend_logprob_start_lens_cpu=[2, 0, 5, 0])
    for i in range(3):
        head.set_lm_head_pass(i)
        logits(kept[4 * i : 4 * i + 4])
    head.reset_lm_head_pass()
    logits(prepare(engine, ForwardMode.DECODE, [("b", 1), (None, 1)]))


def test_sums_over_gpus_once(engine: Engine) -> None:
    """Two that are alike: what a row-parallel layer reduces has base and delta."""
    names, layer = prepare(engine, ForwardMode.EXTEND, MIXED), engine.manager.lora_modules[0]["model.layers.0.self_attn.o_proj"]
    x, sums = torch.randn(16, 128).to(DTYPE), []

    def all_reduce(out: torch.Tensor) -> torch.Tensor:
        sums.append(out)
        return 2 * out

    base = layer.base_layer(x)[0]
    arguments = (layer, x, base.clone, layer.lora_a, layer.lora_b, layer.output_offset, layer.lora_offsets)
    out = engine.manager.lora_backend.forward_with_base(*arguments, all_reduce=all_reduce)
    weights = ["model.layers.0.self_attn.o_proj.weight"]
    wanted = torch.stack([delta(engine, weights, name, row) for name, row in zip(names, x, strict=True)])
    near(out / 2, base, wanted)
    assert len(sums) == 1


@pytest.mark.parametrize("kind", LAYERS)
def test_is_as_near_to_sglang_as_promised(kind: str, engine: Engine) -> None:
    path, _ = LAYERS[kind]
    layer, manager = engine.manager.lora_modules[0][f"model.layers.0.{path}"], engine.manager
    x = torch.randn(16, layer.lora_a.shape[2], generator=torch.Generator().manual_seed(1)).to(DTYPE)
    zero = torch.zeros(16, layer.lora_b.shape[1], dtype=DTYPE)
    prepare(engine, ForwardMode.EXTEND, MIXED)
    ours, own = layer.apply_lora(zero.clone(), x), manager.lora_backend
    try:
        manager.lora_backend = layer.lora_backend = TorchNativeLoRABackend(manager.max_loras_per_batch, manager.device)
        rows = torch.tensor([count for _, count in MIXED], dtype=torch.int32)
        prepare(engine, ForwardMode.EXTEND, MIXED, extend_seq_lens=rows)
        theirs = layer.apply_lora(zero.clone(), x)
    finally:
        manager.lora_backend = layer.lora_backend = own
    largest = theirs.float().abs().amax(-1, keepdim=True)
    assert ((ours - theirs).float().abs() <= NEAR * largest).all() and largest.max() > 0


def test_nothing_of_an_adapter_stays_in_its_slot(engine: Engine) -> None:
    """Not even what is no number, behind the ranks of the next in its slot."""
    manager, pool = engine.manager, engine.manager.memory_pool
    prepare(engine, ForwardMode.DECODE, [("b", 1), ("d", 1)])
    for factors in (*pool.A_buffer.values(), *pool.B_buffer.values()):
        for factor in factors:
            factor[pool.get_buffer_id("b")] = torch.nan
    prepare(engine, ForwardMode.DECODE, [("d", 1), ("a", 1)])
    names = prepare(engine, ForwardMode.DECODE, [("c", 1), ("a", 1)])  # of a small rank, where b was or d is
    assert "b" not in pool.uid_to_buffer_id and manager.lora_backend.batch_info.num_tokens == 2
    for kind in LAYERS:
        through(engine, kind, names, 2)


@pytest.fixture
def asked(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> Iterator[types.SimpleNamespace]:
    """A manager as it is in front of its layers."""
    own = types.SimpleNamespace(name="csgmv")
    model = types.SimpleNamespace(modules=lambda: [])
    fields = {"dtype": DTYPE, "device": torch.device("cpu"), "target_modules": {"qkv_proj"}, "max_loras_per_batch": 3}
    yield types.SimpleNamespace(lora_backend=own, base_model=model, **fields)


def test_refuses_all_at_once(asked: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    assert contract.refusals(asked) == []
    start.choose(asked)
    assert isinstance(asked.lora_backend, Backend) and asked.lora_backend.name == "csgmv"
    asked.lora_backend = own = types.SimpleNamespace(name="torch_native")
    asked.dtype, asked.target_modules = torch.float32, {"kv_b_proj"}
    inkling = type("InklingBatchDenseMLP", (), {})()
    experts = object.__new__(start._sglang.FusedMoE)
    object.__setattr__(experts, "moe_runner_config", types.SimpleNamespace(apply_router_weight_on_input=True))
    asked.base_model = types.SimpleNamespace(modules=lambda: [inkling, experts])
    features = dict.fromkeys(start._sglang.asked(), True)
    monkeypatch.setattr(start._sglang, "asked", lambda: features)
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    start.choose(asked)
    assert asked.lora_backend is own
    assert len(caplog.records) == 1
    for reason in ("torch_native", "float32", "type cpu", "kv_b_proj", "Inkling", "routing weight"):
        assert reason in caplog.text
    for feature in features:
        assert (f"{getattr(feature, 'value', feature)} is asked for" in caplog.text) == (feature not in contract.FEATURES)
