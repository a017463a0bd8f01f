"""The plugin of vLLM, without vLLM: which releases it serves, and that its wrapper makes the calls of front doors, to the bit.

Its private parts of vLLM are stood in for; ``integrations/vllm/tests`` serve models with the real ones.
"""

from __future__ import annotations

import dataclasses
import importlib
import logging
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "integrations" / "vllm"))
from kernelgen_vllm import plugin, versions

L, T, K, RANK, CAPACITY = 3, 12, 32, 8, 24
DTYPE = torch.bfloat16


@pytest.mark.parametrize(
    ("version", "module"),
    [
        ("0.32.0", "seams_0_32"),
        ("0.33.1+cpu", "seams_0_32"),
        ("0.31.9", None),
        ("0.34.0", None),
        ("1.32.0", None),
        ("0.33.0rc1", None),
        ("0.33.1.dev12+gabc", None),
        ("dev", None),
    ],
)
def test_releases(version: str, module: str | None) -> None:
    if module is None:
        with pytest.raises(versions.Refused, match=r"served are 0\.32, 0\.33"):
            versions.seams_for(version)
    else:
        assert versions.seams_for(version) == module
        assert (Path(plugin.__file__).parent / f"{module}.py").exists()


@pytest.mark.parametrize(
    ("version", "switch", "kind", "interpret", "said"),
    [
        ("0.32.0", "1", "cuda", "0", None),
        ("0.33.0", None, "cpu", "1", None),
        ("0.32.0", "0", "cuda", "0", "KERNELGEN_VLLM=0"),
        ("0.35.0", "1", "cuda", "0", "vLLM 0.35.0 is not known"),
        ("0.32.0", "1", "cpu", "0", "its platform is cpu"),
        ("0.32.0", "1", "xpu", "1", "its platform is xpu"),
    ],
)
def test_registers_or_says_why_not(
    version: str, switch: str | None, kind: str, interpret: str, said: str | None, monkeypatch: Any, caplog: Any
) -> None:
    class Platform:
        device_name = kind

        @classmethod
        def get_punica_wrapper(cls) -> str:
            return "vllm.own"

        is_cuda_alike = staticmethod(lambda: kind == "cuda")
        is_cpu = staticmethod(lambda: kind == "cpu")

    vllm, platforms = types.ModuleType("vllm"), types.ModuleType("vllm.platforms")
    vllm.__version__, platforms.current_platform = version, Platform()  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vllm", vllm)
    monkeypatch.setitem(sys.modules, "vllm.platforms", platforms)
    monkeypatch.setenv("TRITON_INTERPRET", interpret)
    monkeypatch.delenv("KERNELGEN_VLLM", raising=False)
    if switch is not None:
        monkeypatch.setenv("KERNELGEN_VLLM", switch)
    with caplog.at_level(logging.WARNING, "vllm"):  # what is seen before vLLM sets its log up
        plugin.register()
        told = [record.getMessage() for record in caplog.records]
        plugin.register()  # as vLLM may
    if said is None:
        assert Platform.get_punica_wrapper() == plugin.WRAPPER and Platform._kernelgen_own_wrapper() == "vllm.own"
        assert not told
    else:
        assert Platform.get_punica_wrapper() == "vllm.own"
        assert len(told) == 1 and said in told[0]


class Base:
    """What ``PunicaWrapperBase`` of vLLM has for ours."""

    def __init__(self, max_num_batched_tokens: int, max_batches: int, device: Any) -> None:
        self.device, self.indices_len = device, [None] * 4
        for name in ("_token_lora_indices", "_sampler_indices", "_embeddings_indices"):
            setattr(self, name, torch.full((max_num_batched_tokens,), 77))

    def _select_full_linear_output(self, y: Any, own: Any, bias: Any, enabled: Any) -> Any:
        slots = self._sampler_indices[: self.indices_len[1]]
        return torch.where(((slots >= 0) & enabled[slots.clamp_min(0)])[:, None], own.to(y.dtype) + bias[slots.clamp_min(0)], y)


@pytest.fixture(scope="module")
def punica() -> Any:
    """The module of the wrapper, over a stand-in for vLLM."""
    seams = types.SimpleNamespace(
        PunicaWrapperBase=Base, TritonExperts=Experts, CLASSIFIERS=object, is_hooked=lambda experts, num_tokens: False,
        to_device=lambda host, device: torch.from_numpy(host).to(device), SHARDED=(),
        tensor_model_parallel_all_reduce=lambda y: y + y, tensor_model_parallel_all_gather=lambda y: torch.cat([y, y], -1),
        layers=types.SimpleNamespace(**dict.fromkeys(_LAYERS, object)), check=lambda wrapper: None,
        backend_of_mxfp4_as_loaded=lambda: "as loaded", lora_config=None,
        PADS_ADAPTERS=False,
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(versions, "seams", lambda: seams)
        from kernelgen_vllm import punica

        yield punica
    for name in ("punica", "start", "experts", "mxfp4"):
        sys.modules.pop(f"kernelgen_vllm.{name}", None)


_LAYERS = (
    "FusedMoEWithLoRA",
    "LogitsProcessorWithLoRA",
    "VocabParallelEmbeddingWithLoRA",
    "ClassificationHeadWithLoRA",
    "BaseLayerWithLoRA",
)


def new(*size: int, dtype: torch.dtype = DTYPE) -> torch.Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(sum(size))).to(dtype)


def step(wrapper: Any, tokens: list[int], samples: list[int]) -> None:
    """Slots of tokens and samples, -1: none, as vLLM tells them: adapters 11, 22 and 33 are in slots 2, 0 and 1."""
    adapters = {-1: 0, 0: 22, 1: 33, 2: 11}
    mapping = types.SimpleNamespace(
        index_mapping=tuple(adapters[slot] for slot in tokens),
        prompt_mapping=tuple(adapters[slot] for slot in samples),
        is_prefill=True,
    )
    wrapper.update_metadata(mapping, [22, 33, 11], L, 100)


# Batches one after the other: each leaves stale ids behind the next.
STEPS = {"mixed": [0, 2, -1, 1, 2, 0, -1, 2, 1, 0, 0, 2], "fewer": [1, -1, 1, 1, 0], "base": [-1, -1, -1], "one": [2]}


@pytest.fixture
def wrapper(punica: Any) -> Any:
    return punica.PunicaWrapper(CAPACITY, 4, "cpu", lora_config=types.SimpleNamespace(max_loras=L, lora_dtype=DTYPE))


def route_of(punica: Any, tokens: list[int], rows: int) -> Any:
    return punica.kg.lora_route(torch.tensor((tokens + [-1] * rows)[:rows], dtype=torch.int32), max_loras=L)


def test_linear_layers_make_the_calls_of_the_front_doors(punica: Any, wrapper: Any) -> None:
    """With padded rows, with fewer rows than the batch, and as rows change."""
    kg, widths = punica.kg, (32, 16, 16)
    a, b = [new(L, 1, RANK, K) for _ in widths], [new(L, 1, n, RANK) for n in widths]
    for name, tokens in STEPS.items():
        step(wrapper, tokens, tokens)
        assert wrapper.token_mapping_meta.token_lora_mapping.tolist() == tokens + [-1] * (CAPACITY - len(tokens))
        assert wrapper.token_mapping_meta.no_lora_flag_cpu.item() == (max(tokens) < 0) != wrapper.token_mapping_meta.any
        assert wrapper._embeddings_indices[: len(tokens)].tolist() == [max(slot, 0) * 100 for slot in tokens]
        for rows in {len(tokens), CAPACITY, max(1, len(tokens) - 2)}:
            x, route = new(rows, K), route_of(punica, tokens, rows)
            out, wanted = new(rows, sum(widths)), new(rows, sum(widths))
            wrapper.add_lora_linear(out, x, tuple(a), tuple(b), 1.0, widths)
            kg.lora(wanted, x, a, b, route)
            assert torch.equal(out, wanted), (name, rows)
            y, expected = torch.full((3, rows, RANK), torch.nan), torch.zeros(3, rows, RANK)
            wrapper.add_shrink(y, x, tuple(a), 0.5)
            kg.lora_shrink(expected, x, a, route, scaling=0.5)
            assert torch.equal(y, expected), (name, rows)
            out, wanted = new(rows, 80), new(rows, 80)
            wrapper.add_expand(out, y, tuple(b), widths, offset_start=16)
            kg.lora_expand(wanted, expected, b, route, offset_start=16)
            assert torch.equal(out, wanted), (name, rows)


def test_heads_and_embeddings(punica: Any, wrapper: Any) -> None:
    """Rows that are sampled from have a route of their own; logits and embeddings may be float32."""
    kg, samples = punica.kg, [2, -1, 0]
    step(wrapper, STEPS["mixed"], samples)
    a, b, route = new(L, 1, RANK, K), new(L, 1, 48, RANK), route_of(punica, samples, 3)
    for dtype in (DTYPE, torch.float32):
        out, wanted, x = new(3, 64, dtype=dtype), new(3, 64, dtype=dtype), new(3, K)
        wrapper.add_lora_logits(out, x, a, b, 1.0)
        kg.lora(wanted, x, [a], [b], route)
        assert torch.equal(out, wanted)
        out, wanted, x = new(T, 48, dtype=dtype), new(T, 48, dtype=dtype), new(T, RANK)
        wrapper.add_lora_embedding(out, x, b)
        kg.lora_expand(wanted, x[None], [b], route_of(punica, STEPS["mixed"], T))
        assert torch.equal(out, wanted)
    y, x, weight, bias = new(3, 6), new(3, K), new(L, 1, 6, K), new(L, 6)
    wanted, enabled = y.clone(), torch.tensor([True, True, False])
    own = torch.zeros(1, 3, 6)
    kg.lora_shrink(own, x, [weight], route)
    wanted[2] = own[0, 2].to(DTYPE) + bias[0]
    wrapper.apply_lora_full_linear(y, x, weight, bias, enabled)
    assert torch.equal(y, wanted)


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("gathered", [False, True])
def test_experts_make_the_calls_of_the_front_doors(punica: Any, wrapper: Any, gathered: bool, sharded: bool) -> None:
    """Of tokens that were gathered from elsewhere too, when no token here has an adapter: that says nothing of them."""
    kg, experts, top_k, inter = punica.kg, 4, 2, 16
    tokens = STEPS["mixed"]
    step(wrapper, STEPS["base"] if gathered else tokens, [])
    ids, weights = torch.stack([torch.randperm(experts)[:top_k] for _ in range(T)]), torch.rand(T, top_k)
    a13, b13 = [new(L, experts, RANK, K)] * 2, [new(L, experts, inter, RANK * (1 + sharded))] * 2
    a2, b2 = [new(L, experts, RANK, inter)], [new(L, experts, K // (1 + 3 * sharded), RANK)]
    enabled, mapping = torch.tensor([1, 0, 1, 0], dtype=torch.int32), torch.tensor(tokens, dtype=torch.int32)
    x, h = new(T, K), new(T * top_k, inter)
    gate_up, down = new(T, top_k, 2 * inter), new(T, top_k, K)
    wanted = gate_up.clone(), down.clone()

    fixed = {"max_loras": L, "adapter_enabled": enabled, "top_k": top_k, "fully_sharded": sharded, "use_tuned_config": False}
    fixed |= {"num_tokens": T, "w1": None, "w2": None, "top_k_num": top_k, "topk_weights": weights}
    route = wrapper.add_lora_w13(
        gate_up, x, a13, b13, ids, expert_map=None, local_num_experts=experts, num_slices=2,
        token_lora_mapping=mapping.long() if gathered else None, **fixed,
    )  # fmt: skip
    wrapper.add_lora_w2(down, h, a2, b2, *[fixed.pop("topk_weights"), *route], tp_rank=2 if sharded else 0, **fixed)

    made = kg.moe_route(ids, mapping, num_experts=experts, max_loras=L, adapter_enabled=enabled, rank=RANK)
    weighted = {"topk_weights": weights, "mul_routed_weight": True}
    if sharded:  # GPUs that are alike: A of gate and up has a half of the rank, B of down the third quarter of the rows
        y = torch.empty(2, T * top_k, RANK)
        kg.moe_lora_shrink(y, x, a13, made)
        kg.moe_lora_expand(wanted[0], torch.cat([y, y], -1), b13, made)
        kg.moe_lora_shrink(y[:1], h, a2, made)
        kg.moe_lora_expand(wanted[1], y[:1] + y[:1], b2, made, offset=K // 4 * 2, **weighted)
    else:
        kg.moe_lora(wanted[0], x, a13, b13, made)
        kg.moe_lora(wanted[1], h, a2, b2, made, **weighted)
    assert torch.equal(gate_up, wanted[0]) and torch.equal(down, wanted[1])


@dataclasses.dataclass
class Context:
    """What ``MoELoRAContext`` has for ours."""

    punica_wrapper: Any
    w13_lora_a_stacked: list[torch.Tensor]
    w13_lora_b_stacked: list[torch.Tensor]
    w2_lora_a_stacked: list[torch.Tensor]
    w2_lora_b_stacked: list[torch.Tensor]
    adapter_enabled: torch.Tensor
    top_k: int = 2
    fully_sharded: bool = False
    local_token_lora_mapping: None = None


class Experts:
    """What ``TritonExperts`` has for ours, with adapters in it."""

    _kernelgen_layer: Any = None
    activation_config = types.SimpleNamespace(clamp_limit=None)

    def __init__(self, wrapper: Any, factors: list[torch.Tensor], num_experts: int) -> None:
        a13, b13, a2, b2 = ([factor] for factor in factors)
        self._fixed = (L, torch.ones(L + 1, dtype=torch.int32)), (num_experts, 2), False, False, (a13, b13), (a2, b2)
        self._lora_context = Context(wrapper, a13, b13, a2, b2, self._fixed[0][1])

    def apply_w13_lora(
        self, context: Any, *, y: Any, x: Any, topk_ids: Any, topk_weights: Any, expert_map: Any, w1: Any, w2: Any,
        num_tokens: int, top_k_num: int,
    ) -> Any:  # fmt: skip
        loras, experts, sharded, tuned, factors, _ = self._fixed
        routing = (topk_ids, topk_weights, expert_map, w1, w2, num_tokens, top_k_num)
        return context.punica_wrapper.add_lora_w13(y, x, *factors, *routing, *loras, *experts, 1, sharded, tuned)

    def apply_w2_lora(
        self, context: Any, *, y: Any, x: Any, topk_weights: Any, sorted_token_ids_lora: Any, expert_ids_lora: Any,
        num_tokens_post_padded_lora: Any, token_lora_mapping: Any, num_tokens: int, w1: Any, w2: Any, top_k_num: int,
    ) -> None:  # fmt: skip
        loras, (_, top_k), sharded, tuned, _, factors = self._fixed
        route = (topk_weights, sorted_token_ids_lora, expert_ids_lora, num_tokens_post_padded_lora, token_lora_mapping)
        context.punica_wrapper.add_lora_w2(
            y, x, *factors, *route, num_tokens, w1, w2, top_k_num, *loras, top_k, sharded, 0, tuned
        )


@pytest.mark.parametrize(
    ("name", "limit", "wanted"),
    [
        ("silu", None, {"activation": "swiglu"}),
        ("silu", 10.0, {"activation": "swiglu_clamp", "limit": 10.0, "alpha": 1.0, "beta": 0.0}),
        ("swigluoai_uninterleave", 7.0, {"activation": "swiglu_clamp", "limit": 7.0, "alpha": 1.5, "beta": 0.5}),
        ("gelu_tanh", None, {"activation": "geglu_tanh"}),
        ("gelu_no_mul", None, {"activation": "gelu"}),
        ("swigluoai", None, {"activation": "swiglu_clamp", "layout": "interleaved", "limit": 7.0, "alpha": 1.702, "beta": 1.0}),
        ("swiglustep", None, None),
        ("situ", None, None),
    ],
)
def test_activations(name: str, limit: float | None, wanted: dict[str, Any] | None, punica: Any) -> None:
    from kernelgen_vllm import experts

    config = types.SimpleNamespace(clamp_limit=limit, alpha=1.5, beta=0.5)
    assert experts.activation_of(types.SimpleNamespace(value=name), config) == wanted
    if wanted is not None:  # and the kernels take it
        inter = 16 if name.endswith("_no_mul") else 32
        h, rows = torch.full((2, 16), torch.nan, dtype=torch.bfloat16), new(2, 1, inter, dtype=torch.bfloat16)
        punica.kg.moe_act(h, rows, torch.zeros(2, 1, dtype=torch.int32), num_experts=1, **wanted)
        assert h.isfinite().all()


@pytest.mark.parametrize("tokens", ["mixed", "base"])
@pytest.mark.parametrize("inside", [True, False])
def test_experts_that_are_shared_out_make_the_layer(inside: bool, tokens: str, punica: Any, wrapper: Any) -> None:
    """Two GPUs with a half of the experts each, under expert parallelism: their outputs add up to that of float64.

    Numbers are whole and small, so that all is exact.
    """
    from kernelgen_vllm import experts

    step(wrapper, STEPS[tokens], [])
    num, top_k, inter, slots = 4, 2, 16, torch.tensor(STEPS[tokens])[:T]
    rows = len(slots)

    def whole(*size: int, share: float = 0.2) -> torch.Tensor:
        generator = torch.Generator().manual_seed(sum(size))
        return (torch.randint(-1, 2, size, generator=generator) * (torch.rand(size, generator=generator) < share)).half()

    x, w1, w2 = whole(rows, K, share=0.6), whole(num, inter, K), whole(num, K, inter)
    a13, b13, a2, b2 = (
        whole(L, num, RANK, K),
        whole(L, num, inter, RANK),
        whole(L, num, RANK, inter, share=0.05),
        whole(L, num, K, RANK),
    )
    bias = torch.zeros(num, K, dtype=torch.half) if inside else whole(num, K)
    ids = torch.stack([torch.randperm(num, generator=torch.Generator().manual_seed(t))[:top_k] for t in range(rows)])
    weights, total = torch.tensor([[1.0, 0.5]]).repeat(rows, 1), torch.zeros(rows, K, dtype=torch.float64)
    act = types.SimpleNamespace(value="relu2_no_mul")
    for first in (0, 2):
        part, expert_map = slice(first, first + 2), torch.full((num,), -1, dtype=torch.int32)
        expert_map[part] = torch.arange(2, dtype=torch.int32)
        layer = Experts(wrapper, [factor[:, part].contiguous() for factor in (a13, b13, a2, b2)], 2)
        options = {} if inside else {"w2_bias": bias[part]}  # of products that are apart
        layer._kernelgen_layer = experts.Layer({"activation": "relu2"}, options, fused=inside, inside=inside)
        out = torch.full((rows, K), torch.nan, dtype=torch.half)
        experts.apply(layer, out, x, w1[part], w2[part], weights, ids, act, num, expert_map, *[None] * 5, False)
        total += out.double()
    wanted = torch.zeros_like(total)
    for t, j in torch.cartesian_prod(torch.arange(rows), torch.arange(top_k)).tolist():
        e, slot, row = ids[t, j], slots[t], x[t].double()
        has = float(slot >= 0)
        h = (w1[e].double() @ row + has * b13[slot, e].double() @ (a13[slot, e].double() @ row)).relu() ** 2
        wanted[t] += weights[t, j] * (bias[e] + w2[e].double() @ h + has * b2[slot, e].double() @ (a2[slot, e].double() @ h))
    assert 2 < wanted.abs().max() < 2048  # whole numbers that float16 has
    assert torch.equal(total, wanted)


MXFP4 = {"is_lora_enabled": True, "moe_backend": "auto", "swiglu_limit": None, "swiglu_alpha": None, "swiglu_beta": None}
MXFP4 |= {"activation": types.SimpleNamespace(value="swigluoai"), "has_bias": True, "in_dtype": torch.bfloat16, "device": "cpu"}
MXFP4 |= {"num_local_experts": 4, "hidden_dim": 64, "intermediate_size_per_partition": 64, "experts_per_token": 2}
LORA = {"lora_dtype": torch.bfloat16, "max_lora_rank": 16, "max_loras": 2, "fully_sharded_loras": False}


@pytest.mark.parametrize(
    ("moe", "lora", "why"),
    [
        ({}, {}, None),
        ({"is_lora_enabled": False}, {}, "there are no adapters"),
        ({"moe_backend": "marlin"}, {}, "moe_backend=marlin was asked for"),
        ({"has_bias": False}, {}, "the layer is not gpt-oss's in bfloat16"),
        ({"activation": types.SimpleNamespace(value="silu")}, {}, "the layer is not gpt-oss's in bfloat16"),
        ({}, {"lora_dtype": torch.float32}, "adapters are of torch.float32, kernels are for bfloat16 and float16"),
        ({}, {"lora_dtype": torch.float16}, "lora.a13[0]: got [2, 4, 16, 64] float16"),
        ({}, {"fully_sharded_loras": True}, "adapters are fully sharded"),
        ({"intermediate_size_per_partition": 48}, {}, "a scale is of columns of two GPUs"),
    ],
)
def test_mxfp4_experts_are_ours_or_it_is_said_why(
    moe: dict[str, Any], lora: dict[str, Any], why: str | None, punica: Any, monkeypatch: Any
) -> None:
    from kernelgen_vllm import early, experts, mxfp4

    monkeypatch.setattr(mxfp4._vllm, "lora_config", lambda: types.SimpleNamespace(**(LORA | lora)))
    config = types.SimpleNamespace(**(MXFP4 | moe))
    module = types.SimpleNamespace(select_mxfp4_moe_backend=lambda moe, key=None: ("own", key))
    early.choose_mxfp4_experts(module)
    chosen = module.select_mxfp4_moe_backend(config, key="a key")
    if why is None:
        assert chosen == ("as loaded", mxfp4.Experts)
        return
    assert chosen == ("own", "a key") and why in config.kernelgen_refusal
    own = types.SimpleNamespace(weight_quant_dtype="mxfp4", moe_config=config)  # of another class
    assert experts.layer_of(own, None, new(1), new(1), None) == f"it has repacked weights in MXFP4, as {config.kernelgen_refusal}"


def test_a_module_is_seen_as_it_is_imported(tmp_path: Path, monkeypatch: Any) -> None:
    from kernelgen_vllm import early

    (tmp_path / "kernelgen_seen.py").write_text("number = 1")
    monkeypatch.syspath_prepend(str(tmp_path))
    seen: list[Any] = []
    early.when_imported("kernelgen_seen", seen.append)
    assert not seen
    module = importlib.import_module("kernelgen_seen")
    assert seen == [module] and module.number == 1
    early.when_imported("kernelgen_seen", seen.append)
    assert seen == [module] * 2
    del sys.modules["kernelgen_seen"]


FP8 = torch.float8_e4m3fn
_DYNAMIC: dict[str, Any] = {"per_act_token_quant": True, "activation_config": types.SimpleNamespace(clamp_limit=2.0)}
# What vLLM has of a layer: the shapes of the scales of both weights and of tokens, and what else it says.
SCHEMES: dict[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], dict[str, Any]]] = {
    "tensor": ((4,), (4,), (1,), {"a2_scale": torch.tensor(0.5)}),
    "tensor, tokens as they come": ((4,), (4,), (1,), {}),
    "channel": ((4, 256, 1), (4, 128, 1), (T, 1), _DYNAMIC),
    "group": ((4, 2, 1), (4, 1, 1), (T, 1), {"block_shape": [128, 128]}),
}


@pytest.mark.parametrize("scheme", SCHEMES)
def test_fp8_experts_are_one_call(scheme: str, punica: Any, wrapper: Any) -> None:
    """With the scales that vLLM keeps, whatever their shape, to the bit as with scales a row that are written out."""
    from kernelgen_vllm import experts

    of_w1, of_w2, of_x, more = SCHEMES[scheme]
    num, width, rows = 4, 128, T
    step(wrapper, STEPS["mixed"], [])
    factors = [new(L, num, RANK, width), new(L, num, 2 * width, RANK), new(L, num, RANK, width), new(L, num, width, RANK)]
    layer, silu = Experts(wrapper, factors, num), types.SimpleNamespace(value="silu")
    scale1, scale2 = (new(*size, dtype=torch.float32).abs() * 0.1 for size in (of_w1, of_w2))
    facts: dict[str, Any] = {"quant_dtype": FP8, "quantization_emulation": False, "block_shape": None, "a2_scale": None}
    facts |= {"w1_scale": scale1, "w2_scale": scale2, "w1_bias": None, "w2_bias": None, **more}
    vars(layer).update(facts)
    x, w1, w2 = new(rows, width).to(FP8), new(num, 2 * width, width).to(FP8), new(num, width, width).to(FP8)
    of_x_scale = new(*of_x, dtype=torch.float32).abs()
    ids, weights = torch.stack([torch.randperm(num)[:2] for _ in range(rows)]), torch.rand(rows, 2)
    for blocks in ([128, 64], [64, 128]) if scheme == "group" else ():
        layer.block_shape = blocks
        assert experts.layer_of(layer, layer._lora_context, w1, w2, silu) == f"blocks of {blocks} share a scale"
    vars(layer).update(facts)
    layer._kernelgen_layer = served = experts.layer_of(layer, layer._lora_context, w1, w2, silu)
    assert isinstance(served, experts.Layer) and served.inside, served
    out, wanted = new(rows, width), new(rows, width)
    experts.apply(layer, out, x, w1, w2, weights, ids, silu, num, None, of_x_scale, facts["a2_scale"], *[None] * 3, False)

    by_row = {"tensor": None, "group": None}.get(scheme, 1)
    scales = {"w13_scale": scale1, "w2_scale": scale2, "x_scale": of_x_scale.reshape(-1, *[1] * (by_row or 0))}
    if scheme == "tensor, tokens as they come":
        scales |= {"w13_scale": scale1[:, None].repeat(1, 2 * width), "w2_scale": scale2[:, None].repeat(1, width)}
        scales["x_scale"] = of_x_scale.repeat(rows)[:, None]
    elif scheme == "tensor":
        scales["h_scale"] = facts["a2_scale"].reshape(1)
    elif scheme == "group":
        scales["x_scale"] = of_x_scale
    lora = punica.kg.FusedMoeLora(
        torch.tensor(STEPS["mixed"], dtype=torch.int32),
        [factors[0]] * 2,
        list(factors[1].chunk(2, 2)),
        [factors[2]],
        [factors[3]],
    )
    act = experts.activation_of(silu, layer.activation_config)
    punica.kg.fused_moe(x, w1, w2, ids, weights, lora=lora, out=wanted, **(act or {}), **scales)
    assert torch.equal(out, wanted)


def test_layers_look_alike_that_make_the_same_calls(punica: Any, monkeypatch: Any) -> None:
    """And on the meta device tensors lie as they do; a switch is on unless it is 0."""
    from kernelgen_vllm import experts
    from kernelgen_vllm.shared import calls, gate

    bias = new(4, 8)
    layers = [experts.Layer({"activation": "swiglu"}, {"w2_bias": bias}, scale) for scale in (None, "token")]
    layers += [dataclasses.replace(layers[0], activation={"activation": "geglu"})]
    for other in (new(4, 8, dtype=torch.float32), new(8, 4).t(), new(4, 9)):
        layers.append(dataclasses.replace(layers[0], options={"w2_bias": other}))
        (moved,) = calls.on_meta([other])
        assert (moved.shape, moved.stride(), moved.dtype) == (other.shape, other.stride(), other.dtype) and moved.is_meta
    layers.append(dataclasses.replace(layers[0], options={"w13_bias": bias}))
    assert len({layer.looks for layer in layers}) == len(layers) and layers[0].looks == layers[0].on_meta().looks
    for value, is_on in ((None, True), ("1", True), ("true", True), ("0", False)):
        monkeypatch.delenv("KERNELGEN_X", raising=False) if value is None else monkeypatch.setenv("KERNELGEN_X", value)
        assert gate.is_on("KERNELGEN_X") is is_on


def test_a_second_factor_that_is_not_finite_stays_with_its_adapter(punica: Any, wrapper: Any) -> None:
    """Of gate and up in one and in turns, with biases, as gpt-oss has them: others keep their bits, and its rows are NaN."""
    from kernelgen_vllm import experts

    num, inter, tokens = 4, 32, STEPS["mixed"]
    step(wrapper, tokens, [])
    factors = [new(L, num, RANK, K), new(L, num, 2 * inter, RANK), new(L, num, RANK, inter), new(L, num, K, RANK)]
    layer, act = Experts(wrapper, factors, num), types.SimpleNamespace(value="swigluoai")
    vars(layer).update(quant_dtype=None, w1_bias=new(num, 2 * inter), w2_bias=new(num, K))
    w1, w2, x = new(num, 2 * inter, K), new(num, K, inter), new(T, K)
    ids, weights = torch.stack([torch.randperm(num)[:2] for _ in range(T)]), torch.rand(T, 2)
    layer._kernelgen_layer = experts.layer_of(layer, layer._lora_context, w1, w2, act)

    def served(weights: torch.Tensor = weights, on_input: bool = False) -> torch.Tensor:
        out = torch.empty(T, K, dtype=DTYPE)
        experts.apply(layer, out, x, w1, w2, weights, ids, act, num, None, *[None] * 5, on_input)
        return out

    assert torch.equal(served(on_input=True), served(torch.ones_like(weights)))
    before, own = served(), torch.tensor(tokens) == 1
    factors[1][1, :, 3], factors[3][1, 2] = torch.nan, torch.inf
    experts.contain(layer._lora_context, 1)
    after = served()
    assert before.isfinite().all() and torch.equal(after[~own], before[~own]) and after[own].isnan().all()


@pytest.mark.slow
def test_one_graph_serves_every_batch(wrapper: Any) -> None:
    """A graph of torch.compile sees one op, which asks for the adapters of the step when it runs."""
    a, b, graphs = (new(L, 1, RANK, K),), (new(L, 1, K, RANK),), []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph

    def layer(x: torch.Tensor) -> torch.Tensor:
        out = x + 1
        wrapper.add_lora_linear(out, x, a, b, 1.0, (K,))
        return out

    compiled = torch.compile(layer, backend=backend, fullgraph=True, dynamic=True)
    for tokens in STEPS.values():
        step(wrapper, tokens, tokens)
        for rows in (CAPACITY, 7):
            x = new(rows, K)
            assert torch.equal(compiled(x), layer(x))
    assert len(graphs) == 1


def test_an_adapter_in_no_slot_is_an_error(punica: Any) -> None:
    slots = {22: 0, 11: 2}
    assert punica.slots_of((11, 0, 22, -3, 11), slots).tolist() == [2, -1, 0, -1, 2]
    assert punica.slots_of((), slots).tolist() == []
    with pytest.raises(KeyError, match="33"):
        punica.slots_of((11, 33), slots)
