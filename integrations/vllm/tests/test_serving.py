"""A real engine, with adapters, on a CPU: each number that it gives against transformers with merged weights."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import ATTENTION, VOCAB, Model, launched, prompt

vllm = pytest.importorskip("vllm")
from kernelgen_vllm import start  # noqa: E402
from kernelgen_vllm.kernels import _runtime, _warmup  # noqa: E402
from kernelgen_vllm.rows import Rows  # noqa: E402
from vllm.distributed import cleanup_dist_env_and_memory  # noqa: E402
from vllm.lora.request import LoRARequest  # noqa: E402

TARGETS = {
    "llama": (*ATTENTION, "gate_proj", "up_proj", "down_proj", "embed_tokens", "lm_head"),
    "qwen3_moe": (*ATTENTION, "experts"),
    "gpt_oss": (*ATTENTION, "experts"),
}
DTYPES = {"llama": torch.bfloat16, "qwen3_moe": torch.float16, "gpt_oss": torch.float16, "gpt_oss_mxfp4": torch.bfloat16}
LARGEST = 64


class Engine:
    """An engine over a tiny model, and all that its kernels were launched with."""

    def __init__(self, model: Model, **options: Any) -> None:
        chosen = {"max_loras": 2, "max_lora_rank": 16, "max_cpu_loras": 4, "max_num_batched_tokens": LARGEST, "max_num_seqs": 8}
        chosen |= {"max_model_len": 64, "enforce_eager": True, "dtype": model.dtype, "seed": 0, "skip_tokenizer_init": True}
        self.model, self.numbers = model, {name: i for i, name in enumerate(sorted(filter(None, model.deltas)), 1)}
        self.llm = vllm.LLM(model.base, enable_lora=True, max_logprobs=VOCAB, **(chosen | options))
        self.engine = self.llm.llm_engine

    def request(self, name: str | None) -> LoRARequest | None:
        return None if name is None else LoRARequest(name, self.numbers[name], str(self.model.folder / name))

    def add(self, label: str, prompt: list[int], name: str | None, max_tokens: int) -> None:
        params = vllm.SamplingParams(temperature=0, max_tokens=max_tokens, logprobs=VOCAB, ignore_eos=True, detokenize=False)
        self.engine.add_request(label, {"prompt_token_ids": prompt}, params, lora_request=self.request(name))

    def step(self) -> dict[str, Any]:
        """The requests that a step finished, by label."""
        return {output.request_id: output for output in self.engine.step() if output.finished}

    def ready(self) -> set[Any]:
        """What warm-up compiles."""
        (manager,) = self.llm.collective_rpc(lambda worker: worker.model_runner.lora_manager._adapter_manager)
        return {r.key for r in _warmup.requests(start.distinct([*start.calls_of(manager)]), max_tokens=LARGEST)}

    def preempted(self) -> int:
        """Requests that wait to be computed again."""
        waiting = self.engine.engine_core.engine_core.scheduler.requests.values()
        return sum(request.num_preemptions for request in waiting)


def check(model: Model, name: str | None, output: Any) -> None:
    """That a finished request is right."""
    answer = output.outputs[0]
    steps = torch.tensor([[step[token].logprob for token in range(VOCAB)] for step in answer.logprobs])
    model.check(output.request_id, name, output.prompt_token_ids, list(answer.token_ids), steps)


def serve(engine: Engine) -> None:
    """A few requests, of the adapters a and b, and of none, all at once."""
    names = dict(zip("0123", ("a", None, "b", "a"), strict=True))
    for label, name in names.items():
        engine.add(label, prompt(int(label), 4 + 5 * int(label)), name, max_tokens=4)
    finished: dict[str, Any] = {}
    while engine.engine.has_unfinished_requests():
        finished |= engine.step()
    for label, name in names.items():
        check(engine.model, name, finished[label])


@pytest.fixture(autouse=True)
def _alone() -> Iterator[None]:
    """Each engine has this process for itself."""
    yield
    torch._dynamo.reset()
    cleanup_dist_env_and_memory()


@pytest.fixture
def traced(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether the model is one graph of torch.compile, which vLLM leaves out on a CPU where there is LoRA."""
    if request.param:
        from vllm.config import CompilationMode
        from vllm.platforms.cpu import CpuPlatform

        own = CpuPlatform.check_and_update_config

        def check_and_update_config(vllm_config: Any) -> None:
            own(vllm_config)
            compilation = vllm_config.compilation_config
            compilation.mode, compilation.backend = CompilationMode.DYNAMO_TRACE_ONCE, "eager"

        monkeypatch.setattr(CpuPlatform, "check_and_update_config", staticmethod(check_and_update_config))
    return bool(request.param)


@pytest.fixture
def fp8_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM's Triton experts in FP8, which it has on GPUs alone, up to the kernels: tokens become FP8 in torch."""
    from vllm.model_executor.layers.fused_moe import utils
    from vllm.model_executor.layers.fused_moe.experts.triton_moe import TritonExperts
    from vllm.platforms.cpu import CpuPlatform

    def per_token_group_quant_fp8(x: torch.Tensor, group_size: int, **more: Any) -> tuple[torch.Tensor, torch.Tensor]:
        groups = x.float().unflatten(-1, (-1, group_size))
        scale = groups.abs().amax(-1).clamp_min(1e-10) / 448
        return (groups / scale[..., None]).to(torch.float8_e4m3fn).view(x.shape), scale

    monkeypatch.setattr(utils, "per_token_group_quant_fp8", per_token_group_quant_fp8)
    monkeypatch.setattr(TritonExperts, "_supports_current_device", staticmethod(lambda: True))
    monkeypatch.setattr(CpuPlatform, "supports_fp8", classmethod(lambda cls: True))


@pytest.mark.usefixtures("fp8_on_a_cpu")
@pytest.mark.parametrize(("kind", "variants", "options"), [
    ("qwen3_moe_fp8", "_w8group_", {"moe_backend": "triton"}),
    ("gpt_oss_mxfp4", "_mxfp4_", {}),  # KERNELGEN_VLLM_MXFP4=1
])  # fmt: skip
def test_serves_quantized_experts(kind: str, variants: str, options: dict[str, Any], tmp_path: Path) -> None:
    model = Model(tmp_path, kind)
    for i, name in enumerate("ab"):
        model.adapter(name, (8, 16)[i], i, TARGETS[kind.rpartition("_")[0]])
    engine = Engine(model, **options)
    ready = engine.ready()
    with launched(_runtime) as keys:
        serve(engine)
    assert keys <= ready
    assert any(variants in f"{_runtime.variant_of(launcher.kernel)}_" for launcher, *_ in keys)


@pytest.mark.parametrize(
    ("kind", "traced"), [("llama", False), ("qwen3_moe", False), ("gpt_oss", False), ("llama", True)], indirect=["traced"]
)
def test_serves(kind: str, traced: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Continuous batching with preemption, more adapters than slots, one unloaded and one loaded in between, nothing compiled."""
    model = Model(tmp_path, kind, DTYPES[kind])
    for i, name in enumerate("abcd"):
        model.adapter(name, (8, 16, 4, 16)[i], i, TARGETS[kind])
    engine = Engine(model, num_gpu_blocks_override=8, block_size=32, enforce_eager=not traced)
    ready = engine.ready()
    names: dict[str, str | None] = {}
    finished, preempted = {}, 0

    def ask(name: str | None, length: int) -> None:
        names[label := f"request {len(names)}"] = name
        engine.add(label, prompt(len(names), length), name, max_tokens=6)

    of, in_graph = Rows.of, []
    monkeypatch.setattr(Rows, "of", lambda handle: in_graph.append(1) or of(handle))
    with launched(_runtime) as keys:
        for i, name in enumerate((*"aba", None, *"cab", None)):
            ask(name, (5, 30, 29, 31)[i % 4])
        for step in range(200):
            finished |= engine.step()
            preempted += engine.preempted()
            if step == 3:
                ask("d", 9)
            if step == 6:
                engine.engine.remove_lora(engine.numbers["c"])
                engine.engine.add_lora(engine.request("d"))
                ask("c", 28)
            if not engine.engine.has_unfinished_requests():
                break
    assert finished.keys() == names.keys() and preempted
    for label, name in names.items():
        check(model, name, finished[label])
    assert keys - ready == set(), [key[:2] for key in keys - ready]
    assert traced == bool(in_graph)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("llama", {"fully_sharded_loras": True}),
        ("qwen3_moe", {"fully_sharded_loras": True}),
        ("gpt_oss", {"fully_sharded_loras": True}),
        ("gpt_oss", {}),
        ("gpt_oss_mxfp4", {}),
        ("qwen3_moe", {"enable_expert_parallel": True}),
    ],
)
def test_serves_on_two_ranks(kind: str, options: dict[str, Any], tmp_path: Path) -> None:
    """Adapters that are cut like the layers under them, and experts that are shared out, over processes and gloo."""
    model = Model(tmp_path, kind, DTYPES[kind])
    for i, name in enumerate("ab"):
        model.adapter(name, (8, 16)[i], i, TARGETS[kind.removesuffix("_mxfp4")])
    engine = Engine(model, tensor_parallel_size=2, distributed_executor_backend="mp", **options)
    serve(engine)
    engine.llm.llm_engine.engine_core.shutdown()
