"""A real scheduler, with adapters, on a CPU: each number that it gives against transformers with merged weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from engine import Engine
from kernelgen_sglang import start
from kernelgen_sglang.backend import Backend
from kernelgen_sglang.kernels import _runtime, _warmup
from kernelgen_sglang.shared.calls import distinct
from tiny import ATTENTION, Model, launched, prompt

LARGEST = 64
# Of PEFT, and as SGLang calls them.
DENSE = (*ATTENTION, "gate_proj", "up_proj", "down_proj", "embed_tokens", "lm_head")
TARGETS = {"llama": DENSE, "qwen3_moe": (*ATTENTION, "experts")}
MODULES = {"qkv_proj", "o_proj", "gate_up_proj", "down_proj"}


@pytest.mark.parametrize(
    ("kind", "dtype", "options"),
    [
        ("llama", torch.bfloat16, {"lora_backend": "csgmv", "enable_mixed_chunk": True}),
        ("qwen3_moe", torch.float16, {"lora_backend": "triton_v2", "moe_runner_backend": "lora_triton"}),
        ("qwen3_moe", torch.float16, {"lora_backend": "triton"}),
        ("qwen3_moe", torch.float16, {"lora_backend": "csgmv", "KERNELGEN_SGLANG_EXPERTS": "0"}),
    ],
    ids=["llama", "experts of the runner for LoRA", "experts", "adapters on SGLang's experts"],
)
def test_serves(
    kind: str, dtype: torch.dtype, options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Continuous batching with prompts in parts and requests that are retracted, more adapters than slots, nothing compiled."""
    options = {"KERNELGEN_SGLANG_EXPERTS": "1", **options}
    monkeypatch.setenv("KERNELGEN_SGLANG_EXPERTS", options.pop("KERNELGEN_SGLANG_EXPERTS"))
    model = Model(tmp_path, kind, dtype)
    for i, name in enumerate("abcd"):
        model.adapter(name, (8, 16, 4, 16)[i], i, TARGETS[kind])
    heads = {"embed_tokens", "lm_head"} if kind == "llama" else set()
    sizes = {"chunked_prefill_size": LARGEST, "max_prefill_tokens": LARGEST, "max_total_tokens": 160}
    engine = Engine(model, MODULES | heads, **sizes, **options)
    assert isinstance(engine.manager.lora_backend, Backend)
    calls = distinct([*start.calls_of(engine.manager)])
    ready = {request.key for request in _warmup.requests(calls, max_tokens=LARGEST)}
    for name in "abc":
        engine.load(name)
    names: dict[str, str | None] = {}

    def ask(name: str | None, length: int) -> None:
        names[label := f"request {len(names)}"] = name
        engine.add(label, prompt(len(names), length), name, max_tokens=5)

    try:
        with launched(_runtime) as keys:
            for i, name in enumerate((*"aba", None, *"cab", None)):
                ask(name, (5, 70, 29, 31)[i % 4])
            for step in range(200):
                busy = engine.step()
                if step == 3:
                    engine.load("d")
                    ask("d", 9)
                of_b = {label for label, name in names.items() if name == "b"}
                if "b" in engine.refs and of_b <= set(engine.finished()):
                    engine.unload("b")
                if not busy and len(engine.finished()) == len(names):
                    break
        assert sorted(engine.finished()) == sorted(names)
        assert "b" not in engine.refs
        assert any(request.retraction_count for request in engine.requests.values())
        for label, name in names.items():
            engine.check(label, name)
        assert keys - ready == set(), [key[:2] for key in keys - ready]
    finally:
        engine.close()
