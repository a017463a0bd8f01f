"""Models of ``transformers``, tiny and random: each is served and equals PEFT, or is refused before anything runs."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import types
from pathlib import Path
from typing import Any, Callable, Mapping, NamedTuple

import pytest
import torch

pytest.importorskip("peft")
pytest.importorskip("transformers")
import transformers
from safetensors.torch import save_file
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from kernelgen.demo import bounds, models
from kernelgen.demo.oracle import PeftModels
from kernelgen.integrations.architectures import ARCHITECTURES, table
from kernelgen.integrations.gates import Activation, activation_of
from kernelgen.integrations.moe_layer import MoeLayer
from kernelgen.integrations.peft import (
    AdapterError,
    ExpertShape,
    Factors,
    LayerBuffers,
    SliceBuffers,
    UngatedShape,
    read_adapter,
    stack_adapters,
    stack_linears,
)
from kernelgen.integrations.transformers import LinearLora, MoeCall, MoeLora, expert_layers, expert_shape, linear_shapes

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # transformers, of itself

SIZES = {
    **{"vocab_size": 64, "hidden_size": 32, "intermediate_size": 24, "moe_intermediate_size": 24, "num_hidden_layers": 1},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64, "pad_token_id": 0},
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_k", "moe_topk"), 2),
}
MLA = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
JAMBA = {
    "num_hidden_layers": 2,
    "attn_layer_period": 2,
    "attn_layer_offset": 1,
    "expert_layer_period": 2,
    "mamba_d_state": 4,
    "mamba_dt_rank": 4,
}
GROUPS = {"num_hidden_layers": 2, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1}
STEP = {"mlp_layer_types": ["sparse"], "swiglu_limits": [1.0], "sliding_window": 8}
CLAMPED, OSS = {"swiglu_limit": 1.0}, {"swiglu_limit": 4.0}


def clamped(gate: bounds.Approx, up: bounds.Approx, dtype: torch.dtype) -> bounds.Approx:
    limit = CLAMPED["swiglu_limit"]
    gate = gate._replace(value=gate.value.clamp(max=limit))
    return bounds.swiglu(gate, up._replace(value=up.value.clamp(-limit, limit)), dtype)


def geglu(gate: bounds.Approx, up: bounds.Approx, dtype: torch.dtype) -> bounds.Approx:
    act = bounds.activation(gate, torch.nn.functional.gelu, 1.13, dtype)  # d gelu(x) / dx is 1.1289 at most
    return bounds.rounded(bounds.product(act, up), dtype)


def reglu(gate: bounds.Approx, up: bounds.Approx, dtype: torch.dtype) -> bounds.Approx:
    return bounds.rounded(bounds.product(bounds.activation(gate, torch.relu, 1.0, dtype), up), dtype)


def relu2(up: bounds.Approx, dtype: torch.dtype) -> bounds.Approx:
    half = bounds.activation(up, torch.relu, 1.0, dtype)
    return bounds.rounded(bounds.product(half, half), dtype)


def behind(gate: bounds.Approx, up: bounds.Approx, dtype: torch.dtype) -> bounds.Approx:
    """That of Step 3.7: clamped behind silu."""
    limit = CLAMPED["swiglu_limit"]
    act = bounds.activation(gate, lambda x: torch.nn.functional.silu(x).clamp(max=limit), 1.1, dtype)
    return bounds.rounded(bounds.product(act, up._replace(value=up.value.clamp(-limit, limit))), dtype)


def oss(gate: bounds.Approx, up: bounds.Approx, dtype: torch.dtype) -> bounds.Approx:
    """That of gpt-oss, op by op."""
    limit, alpha, one = OSS["swiglu_limit"], bounds.exact(torch.tensor(1.702).double()), bounds.exact(torch.tensor(1.0))
    gate, up = gate._replace(value=gate.value.clamp(max=limit)), up._replace(value=up.value.clamp(-limit, limit))
    inside = bounds.rounded(bounds.product(gate, alpha), dtype)
    act = bounds.rounded(bounds.product(gate, bounds.activation(inside, torch.sigmoid, 0.25, dtype)), dtype)
    return bounds.rounded(bounds.product(bounds.rounded(bounds.total(up, one), dtype), act), dtype)


class Row(NamedTuple):
    """A tiny model, and what its refusals say, by the column that refuses."""

    name: str  # of its classes
    config: Mapping[str, Any] = {}
    reader: str | None = None
    torch: str | None = None
    generated: str | None = None
    gate: Callable[..., bounds.Approx] = bounds.swiglu


READ: dict[str, dict[str, Any]] = {"GptOss": {"layout": "interleaved"}, "NemotronH": {"orientation": "in_out"}}
OWN = "got experts with a forward of their own"
ROWS = {
    "Mixtral": Row("Mixtral"),
    "Qwen2Moe": Row("Qwen2Moe", {"shared_expert_intermediate_size": 16}),
    "Qwen3Moe": Row("Qwen3Moe"),
    "Qwen3Next": Row("Qwen3Next", {"shared_expert_intermediate_size": 16, "layer_types": ["full_attention"]}),
    "Qwen3_5Moe": Row("Qwen3_5Moe", {"shared_expert_intermediate_size": 16, "layer_types": ["full_attention"]}),
    "Olmoe": Row("Olmoe"),
    "DeepseekV3": Row("DeepseekV3", {**MLA, **GROUPS, "num_key_value_heads": 4}),
    "Glm4Moe": Row("Glm4Moe", GROUPS),
    "Phimoe": Row("Phimoe"),
    "GraniteMoe": Row("GraniteMoe"),
    "Inkling": Row("Inkling"),
    "Jamba": Row("Jamba", JAMBA),
    "Lfm2Moe": Row("Lfm2Moe", {"layer_types": ["full_attention"], "num_dense_layers": 0}),
    "MiniMaxM2": Row("MiniMaxM2"),
    "Mixtral, GELU": Row("Mixtral", {"hidden_act": "gelu"}, gate=geglu),
    "Mixtral, GELU by tanh": Row("Mixtral", {"hidden_act": "gelu_pytorch_tanh"}, gate=geglu),
    "Mixtral, ReLU": Row("Mixtral", {"hidden_act": "relu"}, generated="the activation ReLU", gate=reglu),
    "DeepseekV4": Row("DeepseekV4", CLAMPED, gate=clamped),
    "MiniMaxM3VL": Row("MiniMaxM3VL", CLAMPED, gate=clamped),
    "HYV4": Row("HYV4", {**CLAMPED, "num_hidden_layers": 2}, gate=clamped),
    "GptOss": Row("GptOss", OSS, gate=oss),
    "AriaText": Row("AriaText"),
    "Llama4": Row("Llama4", {"intermediate_size_mlp": 24}),
    "LongcatFlash": Row(
        "LongcatFlash", {"num_hidden_layers": 2}, torch=f"LongcatFlashExperts: {OWN}", reader="got rank 260, wanted 4"
    ),
    "NemotronH": Row("NemotronH", gate=relu2),
    "Gemma4": Row("Gemma4", {"enable_moe_block": True, "top_k_experts": 2, "hidden_size_per_layer_input": 0}, gate=geglu),
    "GlmMoeDsa": Row("GlmMoeDsa", {**MLA, **GROUPS, "num_key_value_heads": 4}),
    "Step3p7": Row("Step3p7", STEP, generated="a gate of its own", gate=behind),
    "MuseSpark": Row("MuseSpark", {"moe_hidden_size": 32}, torch="a norm behind the experts"),
}


def test_the_table_of_architectures() -> None:
    """It has the models that are tried here, and what they are refused; and it is in the docs."""
    declared = {one.name: one for one in ARCHITECTURES}
    assert declared.keys() == {name for name in ROWS if "," not in name}
    for name, one in declared.items():
        row = ROWS[name]
        refused = bool(row.reader), bool(row.torch), bool(row.torch or row.generated)
        assert (bool(one.reader), bool(one.torch), bool(one.generated)) == refused, name
        assert configured(row).model_type == one.model_type
    page = (Path(__file__).parent.parent / "docs/adapters.md").read_text()
    assert "\n".join(table()) in page, "docs/adapters.md: put in what kernelgen.integrations.architectures.table() gives"


def configured(row: Row) -> Any:
    config = getattr(transformers, f"{row.name}TextConfig", None) or getattr(transformers, f"{row.name}Config", None)
    if config is None:
        pytest.skip(f"transformers {transformers.__version__} has no {row.name}")
    return config(**{**SIZES, **row.config})


def in_halves(rows: torch.Tensor) -> torch.Tensor:
    """Rows of gate and up that are in turns, all of gate first."""
    return torch.cat([rows[:, ::2], rows[:, 1::2]], 1)


def laid_out(experts: Any) -> tuple[Any, ...]:
    """Weights [E, 2 * I, H], gate over up or up alone, and [E, H, I], and their biases or None."""
    pair = getattr(experts, "gate_up_proj", None), experts.down_proj
    if pair[0] is None:
        pair = experts.up_proj, pair[1]
    if getattr(experts, "is_transposed", pair[0].shape[1] == 32):
        pair = pair[0].transpose(1, 2), pair[1].transpose(1, 2)
    if getattr(experts, "is_concatenated", True):
        return *pair, None
    return in_halves(pair[0]), pair[1], (in_halves(experts.gate_up_proj_bias), experts.down_proj_bias)


def make(row: Row) -> Any:
    torch.manual_seed(0)
    kind = getattr(transformers, f"{row.name}ForCausalLM", None) or getattr(transformers, f"{row.name}TextModel")
    model = kind(configured(row))
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


SERVED = [(name, base) for name, row in ROWS.items() for base in ("torch", "generated") if not (row.torch or getattr(row, base))]
REFUSED = [(name, base) for name, row in ROWS.items() for base in ("torch", "generated") if row.torch or getattr(row, base)]


@pytest.mark.slow(keep=8)
@pytest.mark.parametrize("name, base", SERVED)
def test_served_equals_peft(name: str, base: str, device: str, tmp_path: Path) -> None:
    """One layer of experts after the other, for what went into it: tokens with the adapter, and without."""
    import generated as kernels

    original = make(ROWS[name])
    targets = tuple(f"{part}_proj" for part in expert_shape(original).parameters)
    folder = models.save_adapter(original, models.AdapterSpec("a", rank=4, alpha=8, targets=targets), tmp_path)
    model = original.to(device, torch.bfloat16)
    adapter = read_adapter(folder, expert_shape(model), **READ.get(name, {}))
    layers = stack_adapters([adapter], expert_shape(model), dtype=torch.bfloat16, device=device)
    server = MoeLora(model, layers, kernels, base=base)
    mapping = torch.tensor([0, -1, 0, 0, -1, 0], dtype=torch.int32, device=device)
    calls: list[MoeCall] = []
    with torch.no_grad(), server.batch(mapping, calls):
        model(torch.randint(64, (2, 3), device=device))
    assert [call.layer for call in calls] == list(expert_layers(model))
    truth = PeftModels(model, [folder], torch.float64)
    for call in calls:
        experts = model.get_submodule(expert_layers(model)[call.layer])
        of_rows = mapping.repeat(len(call.hidden) // len(mapping))  # Llama 4 has each token once for each expert
        for slot in (-1, 0):
            mine = MoeCall(call.layer, *(tensor[of_rows == slot] for tensor in call[1:]))
            wanted = truth.moe_layer(slot, mine)
            factors = {} if slot < 0 else {n: Factors(*(t.to(device) for t in f)) for n, f in adapter.layers[call.layer].items()}
            *weights, biases = laid_out(experts)
            bound = bounds.moe_layer(mine, *weights, factors, ROWS[name].gate, biases).error
            assert ((mine.out - wanted).abs() <= bound).all()
        effect = (wanted - truth.moe_layer(-1, mine)).abs()
        assert (effect > 2 * bound).any()  # without its adapter a token would be seen


@pytest.mark.parametrize("name", ROWS)
def test_what_peft_saves_is_read(name: str, tmp_path: Path) -> None:
    """For the parameters of its experts, against PEFT's own update, however these lie."""
    from peft import LoraConfig, get_peft_model

    row, shape = ROWS[name], (UngatedShape if name == "NemotronH" else ExpertShape)(4, 32, 24)
    parts = [f"{part}_proj" for part in shape.parameters]
    config = LoraConfig(r=4, init_lora_weights=False, target_modules=[], target_parameters=[f"experts.{part}" for part in parts])
    adapted = get_peft_model(make(row), config)
    adapted.save_pretrained(tmp_path)
    if row.reader:
        with pytest.raises(AdapterError, match=row.reader):
            read_adapter(tmp_path, shape)
        return
    adapter = read_adapter(tmp_path, shape, **READ.get(name, {}))
    checked = 0
    for path, wrapper in adapted.named_modules():
        if (part := getattr(wrapper, "parameter_name", None)) is None:
            continue
        layer = next(int(word) for word in path.split(".") if word.isdecimal())
        factors = [adapter.layers[layer][p] for p in (shape.slices if part != "down_proj" else ("down",))]
        found = torch.cat([f.b.double() @ f.a.double() for f in factors], 1)
        wanted = wrapper.get_delta_weight("default").double()
        wanted = wanted if wanted.shape == found.shape else wanted.transpose(1, 2)
        if name == "GptOss" and part == "gate_up_proj":
            wanted = torch.cat([wanted[:, ::2], wanted[:, 1::2]], 1)
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
        checked += 1
    assert checked == 2 * len(adapter.layers) > 0


def test_a_layer_of_weights_that_lie_otherwise(device: str) -> None:
    """Those that are transposed in the model, laid out for ``MoeLayer``, give what the model's own experts do."""
    import generated as kernels

    model = make(ROWS["AriaText"]).to(device, torch.bfloat16)
    experts = next(module for module in model.modules() if type(module).__name__ == "AriaExperts")
    w13, w2 = (weight.detach().transpose(1, 2).contiguous() for weight in (experts.gate_up_proj, experts.down_proj))
    hidden = torch.randn(5, 32, device=device).to(torch.bfloat16)
    ids = torch.tensor([[0, 1], [3, 2], [0, 1], [3, 2], [1, 3]], device=device)
    weights = torch.rand(5, 2, device=device)
    out = MoeLayer(kernels, w13, w2, None)(hidden, ids, weights, None)
    bound = bounds.moe_layer(MoeCall(0, hidden, ids, weights, out), w13, w2, {})
    assert ((out - bound.value).abs() <= bound.error).all()
    model.set_experts_implementation("eager")
    own = experts.double()(hidden.double(), ids, weights.double())
    assert ((own - bound.value).abs() <= 1e-9 * own.abs().max()).all()


def test_a_layer_whose_inputs_are_weighted(device: str) -> None:
    """That of Llama 4, laid out for ``MoeLayer``, gives what the model's own experts do with inputs that it weighs first."""
    import generated as kernels

    model = make(ROWS["Llama4"]).to(device, torch.bfloat16)
    experts = next(module for module in model.modules() if type(module).__name__ == "Llama4TextExperts")
    w13, w2 = (weight.detach().transpose(1, 2).contiguous() for weight in (experts.gate_up_proj, experts.down_proj))
    hidden = -torch.rand(6, 32, device=device).to(torch.bfloat16)  # a token without a number above zero is one, too
    ids = torch.tensor([[0], [3], [2], [0], [1], [3]], device=device)
    weights = 0.25 + 0.5 * torch.rand(6, 1, device=device)
    scores = torch.zeros(6, 4, device=device, dtype=torch.float64).scatter_(1, ids, weights.double())
    routed = hidden.double().repeat(4, 1) * scores.t().reshape(-1, 1)
    with MoeLora(model, {}, kernels).batch(torch.zeros(6, dtype=torch.int32, device=device)), torch.no_grad():
        assert torch.equal(experts(routed.to(torch.bfloat16)).any(1), routed.any(1))
    wanted = experts.double()(routed).view(4, 6, 32).sum(0)
    for tokens in (slice(0, 3), slice(0, 6)):  # few, and more
        call = (hidden[tokens], ids[tokens], weights[tokens], None)
        out = MoeLayer(kernels, w13, w2, None, apply_router_weight_on_input=True)(*call)
        # As far off as a layer may be that is given the weighted input, rounded, and weighs nothing.
        scaled = (hidden[tokens].double() * weights[tokens]).to(torch.bfloat16)
        like = bounds.moe_layer(MoeCall(0, scaled, ids[tokens], torch.ones_like(weights[tokens]), out), w13, w2, {})
        allowed = (like.value - wanted[tokens]).abs() + like.error
        assert ((out - wanted[tokens]).abs() <= allowed).all()
        assert ((MoeLayer(kernels, w13, w2, None)(*call) - wanted[tokens]).abs() > allowed).any()


def test_a_checkpoint_in_mxfp4(device: str, tmp_path: Path) -> None:
    """That of gpt-oss, its blocks and scales as they are on disk, with adapters on attention and experts; against PEFT."""
    from peft import LoraConfig, get_peft_model
    from safetensors.torch import load_file

    import generated as kernels

    bare = make(ROWS["GptOss"]._replace(config={**OSS, "intermediate_size": 32}))
    disk = {name: t.to(torch.bfloat16) for name, t in bare.state_dict().items()}
    for name in [name for name in disk if name.endswith(("gate_up_proj", "down_proj"))]:
        codes, scales = kernels.quantize_mxfp4(disk.pop(name).transpose(1, 2).contiguous())
        disk |= {f"{name}_blocks": codes.unflatten(-1, (-1, 16)), f"{name}_scales": scales}
        bare.get_parameter(name).data = convert_moe_packed_tensors(disk[f"{name}_blocks"], scales)
    save_file(disk, tmp_path / "model.safetensors")
    bare = bare.to(device, torch.bfloat16)
    parameters = ["experts.gate_up_proj", "experts.down_proj"]
    both = LoraConfig(r=4, init_lora_weights=False, target_modules=["q_proj", "o_proj"], target_parameters=parameters)
    get_peft_model(copy.deepcopy(bare), both).save_pretrained(tmp_path / "a")
    truth = PeftModels(bare, [tmp_path / "a"], torch.float64)

    model, tensors = copy.deepcopy(bare), load_file(tmp_path / "model.safetensors")
    scales = "model.layers.0.mlp.experts.down_proj_scales"
    tensors[scales] = tensors[scales].view(torch.float8_e8m0fnu)  # by the name that they have in torch
    experts = model.model.layers[0].mlp.experts
    for name in ("gate_up_proj", "down_proj"):  # what is served is on the disk
        setattr(experts, name, torch.nn.Parameter(getattr(experts, name).to("meta")))
    shape = expert_shape(model)
    adapter = read_adapter(tmp_path / "a", shape, layout="interleaved")
    layers = stack_adapters([adapter], shape, dtype=torch.bfloat16, device=device)
    linears = stack_linears([adapter], linear_shapes(model, packed={}), dtype=torch.bfloat16, device=device)
    server, attention = MoeLora(model, layers, kernels, base="generated", mxfp4=tensors), LinearLora(model, linears, kernels)
    mapping = torch.tensor([0, -1, 0, 0, -1, 0], dtype=torch.int32, device=device)
    calls: list[MoeCall] = []
    with torch.no_grad(), server.batch(mapping, calls), attention.batch(mapping):
        model(torch.randint(64, (2, 3), device=device))
    *weights, biases = laid_out(bare.model.layers[0].mlp.experts)
    for slot in (-1, 0):
        mine = MoeCall(0, *(tensor[mapping == slot] for tensor in calls[0][1:]))
        wanted = truth.moe_layer(slot, mine)
        factors = {} if slot < 0 else {n: Factors(*(t.to(device) for t in f)) for n, f in adapter.layers[0].items()}
        bound = bounds.moe_layer(mine, *weights, factors, oss, biases).error
        assert ((mine.out - wanted).abs() <= bound).all()
    assert ((wanted - truth.moe_layer(-1, mine)).abs() > 2 * bound).any()
    for change, base, words in (
        ({scales: tensors[scales][:, :, :0]}, "generated", r"down_proj_scales: got \(torch.uint8, \(4, 32, 0\)\), wanted uint8"),
        ({"x": tensors.get(scales)}, "torch", 'base="torch", wanted tensors by name'),
        (None, "generated", "gate_up_proj_blocks: got None, wanted uint8"),
    ):
        with pytest.raises(ValueError, match=words):
            MoeLora(model, {}, kernels, base=base, mxfp4={} if change is None else {**tensors, **change})
    with pytest.raises(ValueError, match="got MixtralExperts, wanted experts with biases"):
        MoeLora(make(ROWS["Mixtral"]).to(torch.bfloat16), {}, kernels, base="generated", mxfp4=tensors)


@pytest.mark.parametrize("base", ["torch", "generated"])
def test_shared_factors_are_served(base: str, device: str, tmp_path: Path) -> None:
    """Factors that all experts share are read with a stride of 0 over the experts, by the kernels too."""
    import generated as kernels

    model = make(ROWS["Mixtral"]).to(device, torch.bfloat16)
    experts, path = model.model.layers[0].mlp.experts, "base_model.model.model.layers.0.mlp.experts"
    sizes = {"gate_up_proj": ((1, 4, 32), (4, 48, 4)), "down_proj": ((4, 4, 24), (1, 32, 4))}
    factors = {
        f"{path}.{name}.lora_{side}.weight": torch.randn(*size)
        for name, ab in sizes.items()
        for side, size in zip("AB", ab, strict=True)
    }
    save_file(factors, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 4, "lora_alpha": 1}')
    adapter = read_adapter(tmp_path, expert_shape(model))
    layers = stack_adapters([adapter], expert_shape(model), dtype=torch.bfloat16, device=device)
    assert (layers[0].gate_up.a[0].stride(1), layers[0].down.b[0].stride(1)) == (0, 0)
    calls: list[MoeCall] = []
    mapping = torch.zeros(6, dtype=torch.int32, device=device)
    with torch.no_grad(), MoeLora(model, layers, kernels, base=base).batch(mapping, calls):
        model(torch.randint(64, (2, 3), device=device))
    moved = {name: Factors(*(t.to(device) for t in f)) for name, f in adapter.layers[0].items()}
    wanted = bounds.moe_layer(calls[0], experts.gate_up_proj, experts.down_proj, moved)
    assert ((calls[0].out - wanted.value).abs() <= wanted.error).all()
    bare = bounds.moe_layer(calls[0], experts.gate_up_proj, experts.down_proj, {})
    assert ((wanted.value - bare.value).abs() > 2 * wanted.error).any()


@pytest.mark.parametrize("name, base", REFUSED)
def test_refused(name: str, base: str) -> None:
    row = ROWS[name]
    model = make(row).to(torch.bfloat16)
    with pytest.raises(ValueError, match=row.torch or row.generated) as error:
        if row.torch:
            expert_shape(model)
        MoeLora(model, {}, None, base=base)
    assert type(model).__name__ in str(error.value)
    assert row.torch or 'base="torch"' in str(error.value)


class Clamped(torch.nn.SiLU):
    """A SiLU that is none."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x).clamp(max=0.5)


def set_to(**attributes: Any) -> Callable[[Any], None]:
    return lambda experts: vars(experts).update(attributes)


def swap(experts: Any) -> None:
    experts.gate_up_proj = torch.nn.Parameter(experts.gate_up_proj.transpose(1, 2).contiguous())


CHANGED: dict[str, tuple[Callable[[Any], object], str, str]] = {
    "another activation": (lambda e: setattr(e, "act_fn", torch.nn.ReLU()), "generated", "the activation ReLU"),
    "a limit that is far": (set_to(act_fn=lambda x: torch.nn.functional.silu(x).clamp(max=3e5)), "generated", "<lambda>"),
    "a subclass": (lambda e: setattr(e, "act_fn", Clamped()), "generated", "the activation Clamped"),
    "no activation": (lambda e: delattr(e, "act_fn"), "generated", "no act_fn"),
    "a gate": (set_to(_apply_gate=lambda x: x), "generated", "a gate of its own"),
    "a norm": (set_to(has_post_expert_norm=True), "torch", "a norm behind the experts"),
    "experts elsewhere": (set_to(_is_expert_parallel=True), "torch", "sharded over GPUs"),
    "float32": (lambda e: e.float(), "torch", "weights in torch.float32"),
    "two dtypes": (lambda e: setattr(e, "down_proj", torch.nn.Parameter(e.down_proj.half())), "torch", "weights in torch"),
    "a forward": (set_to(forward=lambda *_: None), "torch", "a forward that does not ask"),
    "a configuration": (lambda e: setattr(e, "config", copy.copy(e.config)), "torch", "a forward that does not ask"),
    "other sizes": (swap, "torch", r"weights of \[4, 32, 48\] and \[4, 32, 24\]"),
}


@pytest.mark.parametrize("name", CHANGED)
def test_refused_when_changed(name: str) -> None:
    change, base, words = CHANGED[name]
    model = make(ROWS["Mixtral"]).to(torch.bfloat16)
    change(model.model.layers[0].mlp.experts)
    with pytest.raises(ValueError, match=words) as error:
        MoeLora(model, {}, None, base=base)
    assert "MixtralForCausalLM" in str(error.value)
    if base == "generated":
        MoeLora(model, {}, None, base="torch")


def test_refused_around_the_experts(tmp_path: Path) -> None:
    from peft import PeftModel

    import generated as kernels

    model = make(ROWS["Mixtral"])
    folder = models.save_adapter(model, models.AdapterSpec("a", rank=4, alpha=8), tmp_path)
    shape = expert_shape(model)
    model = model.to(torch.bfloat16)
    buffers = {
        dtype: stack_adapters([read_adapter(folder, shape)], shape, dtype=dtype) for dtype in (torch.bfloat16, torch.float16)
    }
    other = shape._replace(intermediate=16)
    zeros = torch.zeros(1, 4, 8, 32, dtype=torch.bfloat16), torch.zeros(1, 4, 16, 8, dtype=torch.bfloat16)
    wrong = buffers[torch.bfloat16][0]._replace(gate_up=SliceBuffers((zeros[0],) * 2, (zeros[1],) * 2))
    for layers, words in (
        ({7: None}, r"adapters for layers \[7\], wanted some of \[0\]"),
        (buffers[torch.float16], "gate: got torch.float16 on cpu, wanted torch.bfloat16"),
        ({0: wrong}, rf"gate: got \[1, 4, 8, 32\] and \[1, 4, {other.intermediate}, 8\], wanted adapters of"),
    ):
        with pytest.raises(ValueError, match=words):
            MoeLora(model, layers, None)
    good = buffers[torch.bfloat16][0]
    none = good.down._replace(a=None)
    for bad in (None, "x", good._replace(gate_up=None), good._replace(down=good.gate_up), good._replace(down=none)):
        with pytest.raises(ValueError, match=r"layers: layer 0: got .*, wanted (what stack_adapters returns|SliceBuffers)"):
            MoeLora(model, {0: bad}, None)
    for enabled in (None, torch.tensor(1)):
        with pytest.raises(ValueError, match=r"layers: layer 0: adapter_enabled: got .*, wanted"):
            MoeLora(model, {0: good._replace(adapter_enabled=enabled)}, None)
    for a in (good.down.a[0][0], good.down.a[0][:, :, :4], good.down.a[0].repeat(2, 1, 1, 1)):
        with pytest.raises(ValueError, match=r"layers: layer 0: (gate|down): got .*, wanted adapters of"):
            MoeLora(model, {0: good._replace(down=SliceBuffers((a,), good.down.b))}, None)
    for layers in (None, [good]):
        with pytest.raises(ValueError, match=r"layers: got .*, wanted what stack_adapters returns"):
            MoeLora(model, layers, None)
    with pytest.raises(ValueError, match="model: got NoneType, wanted"):
        MoeLora(None, {}, None)
    with pytest.raises(ValueError, match=r'base: got .*, wanted "torch" or "generated"'):
        MoeLora(model, {}, None, base="mine")
    with pytest.raises(ValueError, match="model: got Sequential, wanted a model of transformers, without"):
        MoeLora(torch.nn.Sequential(model), {}, None)
    seen: list[str] = []
    watched: Any = types.SimpleNamespace(moe_lora=kernels.moe_lora)
    watched.moe_route = lambda *given, **more: seen.append(more["assignment"]) or kernels.moe_route(*given, **more)
    server = MoeLora(model, {0: good}, watched, assignment="sorted")
    with server.batch(torch.zeros(2, dtype=torch.int32)), torch.no_grad():
        model(torch.zeros(1, 2, dtype=torch.int64))
        assert seen == ["sorted"]
        model.model.layers[0].mlp.forward = lambda x: x  # as patches exchange blocks for others, which do not call their experts
        for _ in range(2):
            with pytest.raises(ValueError, match=r"did not run the experts of layers \[0\], which have adapters"):
                model(torch.zeros(1, 2, dtype=torch.int64))
    model.model.layers.append(make(ROWS["Mixtral"]).model.layers[0])
    model.model.layers[1].mlp.experts.gate_up_proj = torch.nn.Parameter(torch.zeros(4, 32, 32))
    model.model.layers[1].mlp.experts.down_proj = torch.nn.Parameter(torch.zeros(4, 32, 16))
    with pytest.raises(ValueError, match=r"intermediate=24.* in layer 0, .*intermediate=16.* in layer 1, wanted .* the same"):
        expert_shape(model)
    model.model.layers[0].second = make(ROWS["Mixtral"]).model.layers[0].mlp
    with pytest.raises(
        ValueError, match=r"got model\.layers\.0\.mlp\.experts and model\.layers\.0\.second\.experts in one layer"
    ):
        expert_layers(model)
    tied = make(ROWS["Mixtral"]._replace(config={"num_hidden_layers": 2}))
    tied.model.layers[1].mlp = tied.model.layers[0].mlp
    with pytest.raises(ValueError, match=r"the same experts as model\.layers\.0\.mlp\.experts and model\.layers\.1\.mlp"):
        expert_layers(tied)
    adapted = PeftModel.from_pretrained(make(ROWS["Mixtral"]), str(folder))
    for part in (adapted, adapted.base_model.model, adapted.base_model.model.model):
        for serve in (MoeLora, LinearLora):
            with pytest.raises(ValueError, match="adapters of PEFT on it"):
                serve(part, {}, None)


def test_one_batch_at_a_time(device: str) -> None:
    """A batch inside of another is refused, and the outer one and the model go on as before."""
    import generated as kernels

    model = make(ROWS["Mixtral"]).to(device, torch.bfloat16)
    ids, mapping = torch.zeros(2, 3, dtype=torch.int64, device=device), torch.zeros(6, dtype=torch.int32, device=device)
    server, other = MoeLora(model, {}, kernels, base="generated"), MoeLora(model, {}, kernels)
    with torch.no_grad():
        with server.batch(mapping):
            for inner in (server, other):
                with pytest.raises(ValueError, match="inside of a batch"), inner.batch(mapping):
                    pass
            model(ids)
            experts, x = model.get_submodule(expert_layers(model)[0]), torch.ones(6, 32, device=device, dtype=torch.bfloat16)
            routed = torch.arange(12, device=device).view(2, 6).t() % 4, torch.rand(2, 6, device=device).t()  # column by column
            found = server.experts(0, experts, x, *routed)
            assert torch.equal(found, server.experts(0, experts, x, *(part.contiguous() for part in routed)))
        model(ids)
    for bad in (None, [0] * 6):
        with pytest.raises(ValueError, match=r"token_lora_mapping: got .*, wanted a tensor"), server.batch(bad):
            pass


@pytest.mark.parametrize(
    "act",
    [
        *map(Activation, ("swiglu", "geglu", "geglu_tanh", "relu2", "silu", "gelu", "gelu_tanh")),
        *(Activation("swiglu_clamp", 7.0, alpha, beta) for alpha in (1.0, 1.702) for beta in (0.0, 1.0)),
        Activation("swiglu_clamp", 2.0**120, 1.0, 0.0),
    ],
)
def test_an_activation_is_told_from_what_is_near(act: Activation) -> None:
    """Also where experts say a limit alone; what differs a little, or by the limit that they say, is none."""
    is_gated = act.activation not in ("relu2", "silu", "gelu", "gelu_tanh")
    said = {"swiglu_limit": act.limit} if act.alpha == 1.0 else {"limit": act.limit, "alpha": act.alpha}
    other = {name: value * (1 + ("limit" in name)) for name, value in said.items() if value is not None}
    for nearly, numbers, found in ((1.0, said, act), (1 + 1e-6, said, None), (1.0, other, None if act.limit else act)):

        def gate(rows: torch.Tensor, nearly: float = nearly) -> torch.Tensor:
            return act.of(*(rows.chunk(2, -1) if is_gated else (rows, rows))) * nearly

        own = {"_apply_gate": gate} if is_gated else {"act_fn": gate, "has_gate": False}
        assert activation_of(types.SimpleNamespace(**numbers, **own)) == found, (nearly, numbers)


LAYER = {"w13": (4, 48, 32), "w2": (4, 32, 24)}
CALL = {"hidden": (5, 32), "topk_ids": (5, 2), "topk_weights": (5, 2)}


def test_layer_of_fp8(device: str) -> None:
    """A layer of FP8 with adapters in bfloat16 is that of the op."""
    import generated as kg

    numbers = torch.Generator().manual_seed(0)

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=numbers).to(device, torch.bfloat16)

    w13, w13_scale = kg.quantize_weights(normal(*LAYER["w13"]), slices=2)
    w2, w2_scale = kg.quantize_weights(normal(*LAYER["w2"]))
    hidden, x_scale = kg.quantize_activations(normal(*CALL["hidden"]))
    gate_up = SliceBuffers((normal(2, 4, 8, 32), normal(2, 4, 8, 32)), (normal(2, 4, 24, 8), normal(2, 4, 24, 8)))
    down = SliceBuffers((normal(2, 4, 8, 24),), (normal(2, 4, 32, 8),))
    lora = LayerBuffers(gate_up, down, torch.ones(2, dtype=torch.int32, device=device))
    ids = torch.tensor([[0, 1], [3, 2], [0, 1], [3, 2], [1, 3]], dtype=torch.int32, device=device)
    mapping = torch.tensor([0, -1, 1, 1, 0], dtype=torch.int32, device=device)
    routed = (ids, torch.rand(CALL["topk_weights"], generator=numbers).to(device))
    scales = {"w13_scale": w13_scale, "w2_scale": w2_scale}
    layer = MoeLayer(kg, w13, w2, lora, **scales)
    out = layer(hidden, *routed, mapping, x_scale=x_scale)
    adapters = kg.FusedMoeLora(mapping, *gate_up, *down, lora.adapter_enabled)
    options = {"activation": "swiglu", "x_scale": x_scale, "out": torch.empty_like(out), **scales}
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, kg.fused_moe(hidden, w13, w2, *routed, lora=adapters, **options))
    assert not torch.equal(out, layer(hidden, *routed, None, x_scale=x_scale))
    for other, got in ((torch.float16, "torch.float16"), ("meta", "torch.bfloat16 on meta")):
        down = SliceBuffers(*([factor.to(other) for factor in side] for side in lora.down))
        with pytest.raises(ValueError, match=rf"down: got {got}.*, wanted torch.bfloat16 on .*, beside weights in torch.float8"):
            MoeLayer(kg, w13, w2, lora._replace(down=down), **scales)


def test_a_layer_hands_on_all_that_it_has() -> None:
    """Fields and arguments, each as that of its name."""
    import generated as kg

    given: dict[str, Any] = {}
    told = inspect.signature(kg.fused_moe)
    kernels: Any = types.SimpleNamespace(
        fused_moe=lambda *args, **more: given.update(told.bind(*args, **more).arguments), FusedMoeLora=kg.FusedMoeLora
    )
    a, b, down_a, down_b = (torch.zeros(2, 4, *size) for size in ((8, 32), (24, 8), (8, 24), (32, 8)))
    flags, ranks, mapping = torch.ones(2), torch.ones(2), torch.zeros(3)
    lora = LayerBuffers(SliceBuffers((a, a), (b, b)), SliceBuffers((down_a,), (down_b,)), flags, ranks)
    fields: dict[str, Any] = {field.name: object() for field in dataclasses.fields(MoeLayer) if field.default is None}
    fields |= {"activation": "an activation", "layout": "a layout", "apply_router_weight_on_input": True}
    assert {"kernels", "w13", "w2", "lora", *fields} == {field.name for field in dataclasses.fields(MoeLayer)}
    weights = {"w13": torch.zeros(4, 48, 32), "w2": torch.zeros(4, 32, 24)}
    call = {name: torch.zeros(3, size) for name, size in {"hidden": 32, "topk_ids": 2, "topk_weights": 2, "out": 32}.items()}
    call |= {"x_scale": object(), "workspace": object()}
    adapters = (mapping, *lora.gate_up, *lora.down, flags, ranks, *[None] * 4)
    left = {field.name: field.default for field in dataclasses.fields(MoeLayer) if field.name in fields}
    for some in (fields, *({name: value} for name, value in fields.items())):  # all of them, and each by itself
        MoeLayer(kernels, **weights, lora=lora, **some)(**call, token_lora_mapping=mapping)
        assert given == {**weights, **call, **left, **some, "lora": adapters}
    for dtype, of_out in ((torch.half, torch.half), (torch.float8_e4m3fn, torch.bfloat16)):
        fp8 = {name: weight.to(torch.float8_e4m3fn) for name, weight in weights.items()}
        call |= {"hidden": call["hidden"].to(dtype), "out": None}
        assert MoeLayer(kernels, **fp8, lora=None)(**call, token_lora_mapping=None).dtype == of_out


@pytest.mark.parametrize("name", [*LAYER, *CALL, "kernels", "dtype", "topk_ids of 1"])
def test_layer_names_what_is_wrong(name: str) -> None:
    import generated as kernels

    layer: dict[str, Any] = {key: torch.zeros(size, dtype=torch.bfloat16) for key, size in LAYER.items()}
    layer |= {"kernels": kernels, "lora": None}
    call: dict[str, Any] = {key: torch.zeros(size) for key, size in CALL.items()} | {"token_lora_mapping": None}
    if name == "dtype":
        layer["w13"] = layer["w13"].half()
    elif name == "topk_ids of 1":
        call["topk_ids"] = torch.zeros(5)
    else:
        (call if name in call else layer)[name] = None
    words = {"dtype": "w13, w2: got torch.float16"}.get(name, f"{name.split()[0]}: got")
    with pytest.raises(ValueError, match=f"{words}.*, wanted"):
        MoeLayer(**layer)(**call)
