"""Adapters as PEFT and others write them: what is read, what is refused, and what is served, against PEFT itself."""

from __future__ import annotations

import copy
import json
import os
import random
import re
from pathlib import Path
from typing import Any, Callable, Mapping, NamedTuple

import pytest
import torch

pytest.importorskip("peft")
pytest.importorskip("transformers")
from safetensors.torch import save_file

from kernelgen.demo import models
from kernelgen.demo.compare import Comparison
from kernelgen.demo.serve import Request, serve
from kernelgen.integrations.peft import (
    Adapter,
    AdapterError,
    ExpertShape,
    Factors,
    UngatedShape,
    files,
    layouts,
    patterns,
    read_adapter,
    stack_adapters,
)
from kernelgen.integrations.peft.patterns import Patterns
from kernelgen.integrations.peft.settings import read_settings
from kernelgen.integrations.peft.stack import share_first
from kernelgen.integrations.transformers import MoeLora, expert_shape

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),  # transformers, of itself
    pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern"),  # PEFT looks at modules only
]

SHAPE = ExpertShape(num_experts=3, hidden=10, intermediate=6)
RANK = 2
CONFIG = {"peft_type": "LORA", "peft_version": "0.21.2", "r": RANK, "lora_alpha": 8}
SCALING = 4
Tensors = Mapping[str, torch.Tensor]
Pair = tuple[torch.Tensor, torch.Tensor]  # a [E, r, in], b [E, out, r]
Parts = Mapping[str, Pair]


def write(folder: Path, tensors: Tensors, **config: Any) -> Path:
    """An adapter folder as PEFT lays it out."""
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps({**CONFIG, **config}))
    save_file(
        {key: t.clone(memory_format=torch.contiguous_format) for key, t in tensors.items()}, folder / "adapter_model.safetensors"
    )
    return folder


def delta(adapter: Adapter, layer: int, part: str) -> torch.Tensor:
    """[E, out, in] float64, the update of one of the model's two parameters."""
    names = ("gate", "up") if part == "gate_up_proj" else ("down",)
    factors = [adapter.layers[layer][name] for name in names]
    return torch.cat([f.b.double() @ f.a.double() for f in factors], dim=1)


def assert_same_update(adapter: Adapter, layer: int, part: str, wanted: torch.Tensor) -> None:
    """Equal, but for folding the scaling into ``b``: one float32 rounding of each of its elements."""
    names = ("gate", "up") if part == "gate_up_proj" else ("down",)
    factors = [adapter.layers[layer][name] for name in names]
    magnitude = torch.cat([f.b.double().abs() @ f.a.double().abs() for f in factors], dim=1)
    error = (delta(adapter, layer, part) - wanted.double()).abs()
    assert (error <= torch.finfo(torch.float32).eps * magnitude).all()


# What PEFT writes, against what PEFT computes.


@pytest.fixture(scope="module", params=list(models.MODELS))
def model(request: pytest.FixtureRequest) -> Any:
    torch.manual_seed(0)
    return models.MODELS[request.param]()


def peft_model(model: Any, folder: Path) -> Any:
    """The model in float64 with one adapter that PEFT has read."""
    from peft import PeftModel

    return PeftModel.from_pretrained(copy.deepcopy(model).double(), str(folder), autocast_adapter_dtype=False)


def peft_updates(adapted: Any, layer: int) -> dict[str, torch.Tensor]:
    """Parameter name -> the update [E, out, in] that PEFT computes for it."""
    wrapper, updates = adapted.base_model.model.model.layers[layer].mlp.experts, {}
    while hasattr(wrapper, "parameter_name"):
        updates[wrapper.parameter_name] = wrapper.get_delta_weight("default")
        wrapper = wrapper.base_layer
    return updates


@pytest.mark.parametrize("spec", models.ADAPTERS, ids=lambda spec: spec.name)
def test_fused_layout(model: Any, spec: models.AdapterSpec, tmp_path: Path) -> None:
    folder = models.save_adapter(model, spec, tmp_path)
    adapter = read_adapter(folder, expert_shape(model))
    updates = peft_updates(peft_model(model, folder), layer=1)
    assert updates.keys() == set(spec.targets)
    assert adapter.rank == spec.rank and not adapter.other
    for part, wanted in updates.items():
        assert_same_update(adapter, 1, part, wanted)


def test_patterns(model: Any, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=4,
        lora_alpha=6,
        use_rslora=True,
        init_lora_weights=False,
        target_modules=["q_proj"],
        target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
        rank_pattern={"down_proj": 2},
        alpha_pattern={r"layers\.0\.mlp\.experts\.down_proj": 3, "experts.gate_up_proj": 5},
    )
    get_peft_model(copy.deepcopy(model), config).save_pretrained(tmp_path)
    adapter = read_adapter(tmp_path, expert_shape(model))
    assert adapter.other == tuple(f"model.layers.{i}.self_attn.q_proj" for i in (0, 1))
    for layer in (0, 1):
        for part, wanted in peft_updates(peft_model(model, tmp_path), layer).items():
            assert_same_update(adapter, layer, part, wanted)


def test_one_module_per_expert(model: Any, tmp_path: Path) -> None:
    """Written for transformers 4; PEFT converts it to the fused layout, here it is read as it stands, and as PEFT saves it."""
    shape = expert_shape(model)
    mixtral = model.config.model_type == "mixtral"
    block, names = ("block_sparse_moe", W) if mixtral else ("mlp", PROJ)
    tensors = {}
    for layer in (0, 1):
        path = f"base_model.model.model.layers.{layer}.{block}.experts"
        tensors |= single(path, random_parts(shape, rank=4), names)
    targets = list(names.values())
    folder = write(tmp_path / "single", tensors, r=4, target_modules=targets, lora_alpha=10)
    adapter = read_adapter(folder, shape)
    adapted = peft_model(model, folder)
    adapted.save_pretrained(tmp_path / "again")
    again = read_adapter(tmp_path / "again", shape)
    for part, wanted in peft_updates(adapted, layer=1).items():
        assert_same_update(adapter, 1, part, wanted)
        assert_same_update(again, 1, part, wanted)
    assert (adapter.rank, again.rank) == (4, 8)  # PEFT puts gate beside up
    gate_a, up_a = stack_adapters([adapter], shape, dtype=torch.bfloat16)[1].gate_up.a
    assert gate_a is not up_a


def test_gpt_oss(tmp_path: Path) -> None:
    """Gate and up take turns, the base weights are transposed, and I = H: PEFT's own update decides."""
    from peft import LoraConfig, get_peft_model
    from transformers import GptOssConfig, GptOssForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_local_experts": 4, "vocab_size": 32}
    heads = {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
    torch.manual_seed(0)
    bare = GptOssForCausalLM(GptOssConfig(**sizes, **heads, num_experts_per_tok=2))
    parameters = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    config = LoraConfig(r=4, lora_alpha=8, init_lora_weights=False, target_parameters=parameters)
    adapted = get_peft_model(copy.deepcopy(bare), config)
    adapted.save_pretrained(tmp_path)
    updates = peft_updates(adapted, layer=0)  # [E, in, out]
    shape = ExpertShape(num_experts=4, hidden=16, intermediate=16)
    adapter = read_adapter(tmp_path, shape, layout="interleaved")
    gate_up = updates["gate_up_proj"].transpose(1, 2)
    assert_same_update(adapter, 0, "gate_up_proj", torch.cat([gate_up[:, ::2], gate_up[:, 1::2]], 1))
    assert_same_update(adapter, 0, "down_proj", updates["down_proj"].transpose(1, 2))


# What others write: random factors, laid out in every form, and read back.


def random_parts(shape: ExpertShape = SHAPE, rank: int = RANK) -> dict[str, Pair]:
    e, h, i = shape
    new = torch.randn
    return {
        "gate": (new(e, rank, h), new(e, i, rank)),
        "up": (new(e, rank, h), new(e, i, rank)),
        "down": (new(e, rank, i), new(e, h, rank)),
    }


def pair(name: str, a: torch.Tensor, b: torch.Tensor, infix: str = "") -> dict[str, torch.Tensor]:
    return {f"{name}.lora_A{infix}.weight": a, f"{name}.lora_B{infix}.weight": b}


def joined(parts: Parts, turns: bool = False) -> Pair:
    """Gate and up under one A: their B in halves, or in turns."""
    gate, up = parts["gate"][1], parts["up"][1]
    return parts["gate"][0], torch.stack([gate, up], 2).flatten(1, 2) if turns else torch.cat([gate, up], 1)


def flat(a: torch.Tensor, b: torch.Tensor, swapped: bool) -> Pair:
    """[E * r, in] and [out, r * E]; swapped, as PEFT wrote them before 0.19.1: [E * r, out] and [in, r * E]."""
    if swapped:
        a, b = b.transpose(1, 2), a.transpose(1, 2)
    return a.flatten(0, 1), b.permute(1, 2, 0).flatten(1)


def fused(path: str, parts: Parts, *, swapped: bool = False, turns: bool = False, infix: str = "") -> Tensors:
    gate_up = pair(f"{path}.base_layer", *flat(*joined(parts, turns), swapped), infix)
    return gate_up | pair(path, *flat(*parts["down"], swapped), infix)


PROJ = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}
W = {"gate": "w1", "up": "w3", "down": "w2"}


def single(path: str, parts: Parts, names: Mapping[str, str] = PROJ) -> dict[str, torch.Tensor]:
    tensors = {}
    for part, (a, b) in parts.items():
        for e in range(len(a)):
            tensors |= pair(f"{path}.{e}.{names[part]}", a[e], b[e])
    return tensors


def listed(path: str, parts: Parts) -> dict[str, torch.Tensor]:
    tensors = {}
    for name, (a, b) in {"gate_up": joined(parts, turns=True), "down": parts["down"]}.items():
        for e in range(len(a)):
            tensors |= pair(f"{path}.{name}_projs.{e}", a[e], b[e])
    return tensors


def stacked(path: str, parts: Parts, names: Mapping[str, str]) -> dict[str, torch.Tensor]:
    return {k: t for part, factors in parts.items() for k, t in pair(f"{path}.{names[part]}", *factors).items()}


def stacked_gate_up(path: str, parts: Parts, outer: bool = False) -> dict[str, torch.Tensor]:
    """With ``outer``, all experts share the factors that face the hidden states."""
    (a, b), (down_a, down_b) = joined(parts), parts["down"]
    if outer:
        a, down_b = a[:1], down_b[:1]
    return pair(f"{path}.gate_up_proj", a, b) | pair(f"{path}.down_proj", down_a, down_b)


class Row(NamedTuple):
    """A layout, and with what it is read."""

    lay_out: Callable[[Parts], Tensors]
    config: Mapping[str, Any] = {}
    arguments: Mapping[str, Any] = {}


DECODER = "base_model.model.model.layers.0"
MLP = f"{DECODER}.mlp.experts"
GPT_OSS = {"base_model_name_or_path": "openai/gpt-oss-20b"}
UNSLOTH = {"base_model_name_or_path": "unsloth/gpt-oss-20b-unsloth-bnb-4bit"}
CLASS = {"base_model_name_or_path": "/models/gpt-oss", "auto_mapping": {"base_model_class": "GptOssForCausalLM"}}
LAYOUTS = {
    "fused": Row(lambda p: fused(MLP, p)),
    "fused, kept version": Row(lambda p: fused(MLP, p), {"peft_version": "0.18.1"}),
    "fused, no version": Row(lambda p: fused(MLP, p), {"peft_version": None}),
    "fused, swapped": Row(lambda p: fused(MLP, p, swapped=True), {"peft_version": "0.19.0"}),
    "fused, given": Row(lambda p: fused(MLP, p, swapped=True), {}, {"orientation": "out_in"}),
    "fused, named": Row(lambda p: fused(MLP, p, infix=".default")),
    "fused, wrapped": Row(lambda p: fused("module.model._orig_mod.layers.0._fsdp_wrapped_module.mlp.experts", p)),
    "fused, no prefix": Row(lambda p: fused("model.layers.0.mlp.experts", p)),
    "fused, bare": Row(lambda p: fused("base_model.model.model.language_model.layers.0.experts", p)),
    "fused, blocks": Row(lambda p: fused("base_model.model.transformer.blocks.0.ffn.experts", p)),
    "fused, gpt-oss": Row(lambda p: fused(MLP, p, turns=True), GPT_OSS),
    "fused, its class": Row(lambda p: fused(MLP, p, turns=True), CLASS),
    "fused, in turns": Row(lambda p: fused(MLP, p, turns=True), {}, {"layout": "interleaved"}),
    "fused, converted": Row(lambda p: fused(MLP, p), GPT_OSS, {"layout": "halves"}),
    "single": Row(lambda p: single(MLP, p)),
    "single, w": Row(lambda p: single(f"{DECODER}.block_sparse_moe.experts", p, W)),
    "single, DeepSpeed": Row(lambda p: single(f"{DECODER}.mlp.deepspeed_moe.experts.deepspeed_experts", p, W)),
    "single, mixer": Row(lambda p: single("backbone.layers.0.mixer.experts", p)),
    "listed": Row(lambda p: listed(MLP, p), UNSLOTH),
    "stacked": Row(lambda p: stacked(MLP, p, PROJ)),
    "stacked, w": Row(lambda p: stacked(MLP, p, W)),
    "stacked, gate_up": Row(lambda p: stacked_gate_up(MLP, p)),
    "stacked, outer": Row(lambda p: stacked_gate_up(MLP, p, outer=True)),
}
ROUTER = pair("base_model.model.model.layers.0.block_sparse_moe.gate", torch.ones(2, 10), torch.ones(3, 2))


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    row, parts = LAYOUTS[name], random_parts()
    tensors = row.lay_out(parts)
    infix = ".default" if name == "fused, named" else ""
    router = {key.replace(".weight", f"{infix}.weight"): t for key, t in ROUTER.items()}
    adapter = read_adapter(write(tmp_path / "x", {**tensors, **router}, **row.config), SHAPE, **row.arguments)
    assert list(adapter.layers) == [0] and adapter.rank == RANK
    assert adapter.other == ("model.layers.0.block_sparse_moe.gate",)
    assert_reads(adapter, effective(tensors, parts))


def effective(tensors: Tensors, parts: Parts) -> Parts:
    """What a file holds of ``parts``: one A where gate and up are one tensor, one factor where it has one for all experts."""
    parts = dict(parts)
    shapes = {t.shape[0] for t in tensors.values() if t.dim() == 3}
    if not any(re.search(r"up_proj\.|w3", key) and "gate_up" not in key for key in tensors):
        parts["up"] = (parts["gate"][0], parts["up"][1])
    if 1 in shapes:
        a = parts["gate"][0][:1].expand(3, -1, -1)
        parts = {
            "gate": (a, parts["gate"][1]),
            "up": (a, parts["up"][1]),
            "down": (parts["down"][0], parts["down"][1][:1].expand(3, -1, -1)),
        }
    return parts


def assert_reads(adapter: Adapter, parts: Parts) -> None:
    wanted = {part: SCALING * (b.double() @ a.double()) for part, (a, b) in parts.items()}
    assert_same_update(adapter, 0, "gate_up_proj", torch.cat([wanted["gate"], wanted["up"]], dim=1))
    assert_same_update(adapter, 0, "down_proj", wanted["down"])


@pytest.mark.parametrize("anchored", [False, True])
def test_rank_and_alpha_of_each_module(anchored: bool, tmp_path: Path) -> None:
    """As initialisations that hand out ranks leave it: every module by its name, plain or escaped."""
    torch.manual_seed(0)
    parts, tensors, ranks, wanted = random_parts(), {}, {}, {}
    for part, (a, b) in parts.items():
        for e in range(SHAPE.num_experts):
            name = f"model.layers.0.mlp.experts.{e}.{PROJ[part]}"
            rank = ranks[f"^{re.escape(name)}$" if anchored else name] = 1 + (e + len(part)) % RANK
            tensors |= pair(f"base_model.model.{name}", a[e, :rank], b[e, :, :rank])
            wanted[part, e] = 5 * (b[e, :, :rank].double() @ a[e, :rank].double())
    alphas = {key: 5.0 * rank for key, rank in ranks.items()}
    config = {"rank_pattern": ranks, "alpha_pattern": alphas, "init_lora_weights": "eva"}
    adapter = read_adapter(write(tmp_path / "x", tensors, **config), SHAPE)
    for names in (("gate", "up"), ("down",)):
        updates = torch.cat([torch.stack([wanted[name, e] for e in range(3)]) for name in names], dim=1)
        assert_same_update(adapter, 0, "down_proj" if names == ("down",) else "gate_up_proj", updates)


@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.parametrize("shape", [ExpertShape(3, 12, 6), ExpertShape(3, 6, 6)], ids=["2I=H", "I=H"])
def test_ambiguous_widths(shape: ExpertShape, swapped: bool, tmp_path: Path) -> None:
    """A parameter with the widths of both orientations has that of its sibling; alone, it takes an argument."""
    parts = random_parts(shape)
    parts["up"] = (parts["gate"][0], parts["up"][1])
    tensors = fused(MLP, parts, swapped=swapped)
    version = "0.21.0" if swapped else "0.18.0"  # wrong, and not asked
    right, wrong = ("out_in", "in_out") if swapped else ("in_out", "out_in")
    both = write(tmp_path / "both", tensors, peft_version=version)
    assert_reads(read_adapter(both, shape), parts)
    assert_reads(read_adapter(both, shape, orientation=right), parts)
    with pytest.raises(AdapterError, match=f"of orientation {right}, wanted {wrong}"):
        read_adapter(both, shape, orientation=wrong)

    gate_up = shape.hidden != shape.intermediate
    one = {key: t for key, t in tensors.items() if ("base_layer" in key) == gate_up}
    alone = write(tmp_path / "alone", one, peft_version=version)
    with pytest.raises(AdapterError, match=r'fit both orientations.*wanted orientation="in_out"'):
        read_adapter(alone, shape)
    adapter = read_adapter(alone, shape, orientation=right)
    for part in ("gate", "up") if gate_up else ("down",):
        (a, b), (true_a, true_b) = adapter.layers[0][part], parts[part]
        assert torch.equal(a, true_a) and torch.equal(b, SCALING * true_b)


def test_experts_without_a_gate(tmp_path: Path) -> None:
    """Up and down alone; fused, the widths of one are those of the other in the other orientation."""
    torch.manual_seed(0)
    shape, square = UngatedShape(*SHAPE), UngatedShape(3, 6, 6)
    parts = {part: factors for part, factors in random_parts().items() if part != "gate"}
    empty = pair(f"{MLP}.w3", torch.ones(0), torch.ones(0))

    def as_fused(parts: Parts, swapped: bool = False) -> Tensors:
        return pair(f"{MLP}.base_layer", *flat(*parts["up"], swapped)) | pair(MLP, *flat(*parts["down"], swapped))

    up = pair(MLP, *flat(*parts["up"], False))
    named = {"target_parameters": ["experts.up_proj"]}
    as_w = stacked(MLP, parts, {"up": "w1", "down": "w2"})
    read: list[tuple[Tensors, dict[str, Any], dict[str, Any]]] = [
        (as_fused(parts), {}, {"orientation": "in_out"}),
        (as_fused(parts, swapped=True), {}, {"orientation": "out_in"}),
        (up, named, {}),
        (single(MLP, parts), {}, {}),
        (as_w, {}, {}),
        ({**as_w, **empty}, {}, {}),
    ]
    for number, (tensors, config, arguments) in enumerate(read):
        adapter = read_adapter(write(tmp_path / f"{number}", tensors, **config), shape, **arguments)
        for part, (a, b) in adapter.layers[0].items():
            assert torch.equal(a, parts[part][0]) and torch.equal(b, SCALING * parts[part][1])
        gate_up, down, *_ = stack_adapters([adapter], shape, dtype=torch.float32, rank=RANK)[0]
        assert [len(side) for side in (*gate_up, *down)] == [1] * 4 and torch.equal(gate_up.a[0][0], parts["up"][0])
    halves = (torch.ones(0), torch.ones(3, 6, RANK)), (torch.ones(3, RANK, 10), torch.ones(0))
    same = {"up": parts["down"], "down": parts["down"]}
    same = {part: (a, b[:, :6]) for part, (a, b) in same.items()}
    refused: list[tuple[Tensors, dict[str, Any], ExpertShape, str]] = [
        (as_fused(parts), {}, shape, 'up_proj and down_proj, of experts without a gate, wanted orientation="in_out"'),
        (as_fused(same), {"orientation": "in_out"}, square, "up_proj and down_proj in every orientation"),
        (single(MLP, random_parts()), {}, shape, "got factors of a gate, wanted none"),
        (stacked(MLP, random_parts(), W), {}, shape, "w3.lora_A.weight: got factors of a gate"),
        *(({**as_w, **pair(f"{MLP}.w3", *half)}, {}, shape, "w3.lora_A.weight: got factors of a gate") for half in halves),
        (up, {}, SHAPE, "hint: experts without a gate are an UngatedShape"),
    ]
    for number, (tensors, arguments, experts, words) in enumerate(refused):
        with pytest.raises(AdapterError, match=words):
            read_adapter(write(tmp_path / f"bad{number}", tensors, **named if experts is SHAPE else {}), experts, **arguments)
    assert shape != SHAPE and {shape, SHAPE, UngatedShape(*SHAPE)} == {SHAPE, shape}


# What is refused, by name.

GOOD = fused(MLP, random_parts())
DOWN = pair(MLP, torch.ones(6, 6), torch.ones(10, 6))
ONE = pair(f"{MLP}.0.up_proj", torch.ones(2, 10), torch.ones(6, 2))
MTP = {key.replace("model.model.layers", "model.mtp.layers"): t for key, t in GOOD.items()}
FP8 = torch.float8_e4m3fn


def with_a(a: torch.Tensor) -> Tensors:
    return {**DOWN, f"{MLP}.lora_A.weight": a}


REFUSED_TENSORS = {
    "one factor": ({f"{MLP}.lora_A.weight": torch.ones(6, 6)}, "got one factor"),
    "magnitudes": ({**GOOD, f"{MLP}.lora_magnitude_vector.weight": torch.ones(3)}, "a magnitude of DoRA"),
    "half an embedding": (
        {**GOOD, "base_model.model.model.embed_tokens.lora_embedding_A": torch.ones(2, 9)},
        "embed_tokens.lora_embedding_A: got one factor",
    ),
    "base weights": (
        {**GOOD, "base_model.model.lm_head.base_layer.weight": torch.ones(2, 9)},
        "lm_head.base_layer.weight: got a saved weight of the base model",
    ),
    "an embedding's weight": ({"base_model.model.model.embed_tokens.weight": torch.ones(2)}, "a saved weight"),
    "a saved module": ({"base_model.model.score.modules_to_save.weight": torch.ones(2)}, "modules_to_save"),
    "tokens": ({"a.token_adapter.trainable_tokens_delta": torch.ones(2)}, "trainable_token_indices"),
    "a bias": ({**ONE, f"{MLP}.0.up_proj.lora_B.bias": torch.ones(6)}, "a bias"),
    "no factor": ({**GOOD, "base_model.model.norm.weight": torch.ones(2)}, "norm.weight: got a tensor that is no factor"),
    "columns of A": (pair(MLP, torch.ones(6, 7), torch.ones(10, 6)), r"lora_A \[6, 7\]"),
    "rows of A": (pair(MLP, torch.ones(5, 6), torch.ones(10, 5)), r"lora_A \[5, 6\]"),
    "columns of B": (pair(MLP, torch.ones(6, 6), torch.ones(10, 9)), r"lora_B \[10, 9\]"),
    "rank of the file": (pair(MLP, torch.ones(9, 6), torch.ones(10, 9)), "got rank 3, wanted 2"),
    "rank 0": (pair(MLP, torch.ones(0, 6), torch.ones(10, 0)), "got rank 0, wanted 2"),
    "emptied": ({**GOOD, **pair(f"{DECODER}.q", torch.ones(0), torch.ones(0))}, r"lora_A \[0\] and .*\n.*sharded over GPUs"),
    "flattened": ({**GOOD, **pair(f"{DECODER}.q", torch.ones(9), torch.ones(9))}, r"lora_A \[9\] and .*\n.*sharded over GPUs"),
    "no dimensions": (pair(MLP, torch.tensor(1.0), torch.tensor(1.0)), r"lora_A \[\]"),
    "an expert too many": (pair(f"{MLP}.3.up_proj", torch.ones(2, 10), torch.ones(6, 2)), "expert 3, wanted one of 3"),
    "width of one": (pair(f"{MLP}.0.up_proj", torch.ones(2, 9), torch.ones(6, 2)), r"lora_A \[2, 9\]"),
    "a projection": (pair(f"{MLP}.0.wx", torch.ones(2, 10), torch.ones(6, 2)), r"experts\.0\.wx: got a name.*wanted.*w1"),
    "experts in a list": (pair(f"{MLP}.gate_up_list.0", torch.ones(2, 10), torch.ones(12, 2)), "gate_up_list.0: got a name"),
    "DBRX": (pair("m.transformer.blocks.0.ffn.experts.mlp.w1", torch.ones(2, 10), torch.ones(18, 2)), "experts.mlp.w1: got"),
    "an expert as one": (pair(f"{MLP}.expert_0.up_proj", torch.ones(2, 10), torch.ones(6, 2)), "expert_0.up_proj: got"),
    "a layer of MoE": (
        pair(f"{DECODER}.block_sparse_moe.input_linear", torch.ones(6, 10), torch.ones(12, 6)),
        "input_linear: got",
    ),
    "hidden experts": (
        pair(f"{DECODER}.ffn.all_in", torch.ones(6, 10), torch.ones(12, 6)),
        r"ffn.all_in.lora_A.weight: got lora_A \[6, 10\] .*, as of all experts, whose ranks together are 6",
    ),
    **{
        f"hidden experts, {name}": (
            {**GOOD, **pair(f"{DECODER}.{name}", torch.ones(a), torch.ones(b))},
            rf"{name}.lora_A.weight: got lora_A .*, as of {of} .*not known to be of experts; wanted",
        )
        for name, a, b, of in (
            ("mlp.switch_mlp.up_proj", (3, 2, 10), (3, 6, 2), "several"),
            ("ffn.w1", (1, 2, 10), (3, 6, 2), "several"),
            ("ffn.w1", (5, 10, 2), (5, 2, 6), "several"),
            ("mlp.mlps.1.down_proj", (2, 6), (10, 2), "one"),
            ("mlp.gate_up_projs.0", (2, 10), (12, 2), "one"),
            ("mlp.mlp_0.linear_fc1", (2, 10), (6, 2), "one"),
            ("mlp.ffn0.up_proj", (2, 10), (6, 2), "one"),
            ("mlp.down_proj_0", (2, 6), (10, 2), "one"),
        )
    },
    "a wrapper": (
        {key.replace("mlp.experts", "_module.mlp.experts"): t for key, t in GOOD.items()},
        "_module.mlp.experts.*: got a name of routed experts that is not known",
    ),
    "no .weight": ({f"{MLP}.0.up_proj.lora_A": torch.ones(2, 10)}, "got a name of routed experts that is not known"),
    "no layer": (pair("base_model.model.experts.0.up_proj", torch.ones(2, 10), torch.ones(6, 2)), "experts.0.up_proj: got"),
    "layer of a layer": (pair(f"{DECODER}.x.layers.1.experts", torch.ones(6, 6), torch.ones(10, 6)), "experts: got a name"),
    "2-D of all experts": (pair(f"{MLP}.down_proj", torch.ones(6, 6), torch.ones(10, 6)), r"\[6, 6\].*wanted \[E, r, 6\]"),
    "3-D of two experts": (pair(f"{MLP}.down_proj", torch.ones(2, 2, 6), torch.ones(3, 10, 2)), r"wanted \[E, r, 6\]"),
    "3-D transposed": (pair(f"{MLP}.down_proj", torch.ones(3, 6, 2), torch.ones(3, 2, 10)), r"wanted \[E, r, 6\]"),
    "an empty w3": (
        {**stacked(MLP, random_parts(), W), **pair(f"{MLP}.w3", torch.ones(0), torch.ones(0))},
        "w3.lora_A.weight: got an empty tensor, which stands for a projection that the experts do not have",
    ),
    "two names": ({**ONE, **pair(f"{MLP}.0.w3", torch.ones(2, 10), torch.ones(6, 2))}, "two ways to write experts"),
    "two numbers": ({**ONE, **pair(f"{MLP}.00.up_proj", torch.ones(2, 10), torch.ones(6, 2))}, "experts.00.up_proj: got"),
    "two prefixes": ({**ONE, **pair("model.layers.0.mlp.experts.0.up_proj", torch.ones(2, 10), torch.ones(6, 2))}, "twice"),
    "fused beside single": ({**DOWN, **ONE}, "two ways to write experts"),
    "gate_up beside up": (
        {**ONE, **pair(f"{MLP}.0.gate_up_proj", torch.ones(2, 10), torch.ones(12, 2))},
        "got gate and up as one",
    ),
    "down twice": ({**DOWN, **pair(f"{MLP}.base_layer", torch.ones(6, 6), torch.ones(10, 6))}, "down_proj twice"),
    "two orientations": (
        {**DOWN, **pair(f"{MLP}.base_layer", torch.ones(6, 12), torch.ones(10, 6))},
        "gate_up_proj of orientation out_in and down_proj of orientation in_out, wanted one",
    ),
    "two adapters": ({**pair(MLP, torch.ones(6, 6), torch.ones(10, 6), ".a"), **ONE}, "several adapters"),
    "two decoders": ({**GOOD, **MTP}, "several decoders|may not be the decoder's"),
    "another decoder": (MTP, "may not be the decoder's.*\n.*prefix='mtp.layers'"),
    "two blocks": ({**DOWN, **pair(f"{DECODER}.text_moe.experts", torch.ones(6, 6), torch.ones(10, 6))}, "wanted one of them"),
    "no experts": (pair(f"{DECODER}.self_attn.q_proj", torch.ones(2, 10), torch.ones(10, 2)), "nothing for the routed experts"),
    "no tensors": ({}, "nothing for the routed experts among 0 modules"),
    "NaN": (with_a(torch.full((6, 6), torch.nan)), "NaN or infinity"),
    "infinity": (with_a(torch.full((6, 6), -torch.inf)), "NaN or infinity"),
    "more than float32": (with_a(torch.full((6, 6), 1e300, dtype=torch.float64)), "NaN or infinity"),
    "complex": (with_a(torch.ones(6, 6, dtype=torch.complex64)), "got C64, wanted"),
    "int8": (with_a(torch.ones(6, 6, dtype=torch.int8)), "got I8, wanted"),
    "bool": (with_a(torch.ones(6, 6, dtype=torch.bool)), "got BOOL, wanted"),
    "FP8": (with_a(torch.ones(6, 6).to(FP8)), "got F8_E4M3, without the scales"),
    "int8 elsewhere": ({**DOWN, **pair("a.q_proj", torch.ones(2, 2).bool(), torch.ones(2, 2))}, "got BOOL"),
    "a long name": (pair("a." * 240 + "experts", torch.ones(6, 6), torch.ones(10, 6)), "a name of 501 characters"),
}


@pytest.mark.parametrize("name", REFUSED_TENSORS)
def test_refused_tensors(name: str, tmp_path: Path) -> None:
    tensors, words = REFUSED_TENSORS[name]
    with pytest.raises(AdapterError, match=words) as error:
        read_adapter(write(tmp_path / "bad", tensors), SHAPE)
    assert str(error.value).startswith(str(tmp_path / "bad"))


REFUSED_SETTINGS = [
    ({"peft_type": "LOHA"}, "peft_type: got 'LOHA'"),
    ({"peft_type": None}, "peft_type: got None"),
    ({"use_dora": True}, "use_dora=True cannot be served"),
    ({"lora_bias": True}, "lora_bias"),
    ({"bias": "all"}, "bias: got 'all'"),
    ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
    ({"alora_invocation_tokens": []}, "alora_invocation_tokens"),
    ({"init_lora_weights": "pissa_niter_16"}, "changed the base weights"),
    ({"init_lora_weights": {"a": 1}}, "changed the base weights"),
    ({"use_later": True}, "use_later.*a setting that is not known"),
    ({"later_scale": 0.5}, "later_scale"),
    ({"r": 0}, "r: got 0, wanted"),
    ({"r": 2.0}, r"r: got 2\.0"),
    ({"r": True}, "r: got True"),
    ({"r": None}, "r: got None"),
    ({"lora_alpha": None}, "lora_alpha: got None"),
    ({"lora_alpha": "8"}, "lora_alpha: got '8'"),
    ({"lora_alpha": float("nan")}, "NaN"),
    ({"lora_alpha": 10**400}, "lora_alpha: got 1000"),
    ({"lora_alpha": 1e300}, r"scaling of 5e\+299"),
    ({"lora_alpha": 1e-300}, "scaling of 5e-301"),
    ({"use_rslora": "false"}, "use_rslora: got 'false'"),
    ({"rank_pattern": [2]}, r"rank_pattern: got \[2\]"),
    ({"rank_pattern": {"down_proj": 0}}, "rank_pattern: 'down_proj': got 0"),
    ({"rank_pattern": {"down_proj": 4}}, "got rank 2, wanted 4"),
    ({"alpha_pattern": {"(": 4}}, r"alpha_pattern: '\(': got"),
    ({"alpha_pattern": {"(?=x)a": 4}}, "alpha_pattern"),
    ({"target_parameters": ["mlp.experts.w1"]}, "got the widths of gate_up_proj, wanted those of w1"),
    ({"target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj", "router.weight"]}, None),
    ({"base_model_name_or_path": "\ud800gpt-oss" * 99}, r"signs of gpt-oss \('.{76}\.\.\.\): got no layout"),
    ({"alpha_pattern": {"a": "x"}}, "alpha_pattern: 'a': got 'x'"),
    ({"base_model_name_or_path": 3}, "base_model_name_or_path: got 3"),
    ({"base_model_name_or_path": "openai/gpt-oss-20b/merged"}, "signs of gpt-oss"),
    ({"base_model_name_or_path": "/data/my-GPT-OSS-merge"}, "signs of gpt-oss.*layout=.interleaved"),
    ({"auto_mapping": []}, None),
    ({"auto_mapping": [1]}, "auto_mapping"),
    ({"target_parameters": "experts"}, "target_parameters"),
    ({"target_modules": [3]}, "target_modules"),
    ({"target_parameters": ["experts.up_proj", "experts.down_proj"]}, "wanted those of down_proj, up_proj"),
    (
        {"lora_dropout": 0.1, "task_type": "CAUSAL_LM", "later": None, "later_list": [], "eva_config": {"rho": 2.0}},
        None,
    ),
]


@pytest.mark.parametrize("config, words", REFUSED_SETTINGS, ids=lambda value: str(value)[:40])
def test_settings(config: dict[str, Any], words: str | None, tmp_path: Path) -> None:
    folder = write(tmp_path / "x", GOOD, **config)
    if words is None:
        assert read_adapter(folder, SHAPE).rank == RANK
    else:
        with pytest.raises(AdapterError, match=words):
            read_adapter(folder, SHAPE)


def test_both_widths_of_gpt_oss_are_a_sign_of_it() -> None:
    settings = read_settings({"peft_type": "LORA", "r": 2, "lora_alpha": 4})
    for shape in (ExpertShape(4, 2880, 1440), ExpertShape(4, 1440, 2880)):
        assert settings.gate_up_layout(None, shape, in_lists=False) == "halves"
    with pytest.raises(AdapterError, match="signs of gpt-oss"):
        settings.gate_up_layout(None, ExpertShape(4, 2880, 2880), in_lists=False)


def test_what_the_configuration_names_is_there(tmp_path: Path) -> None:
    """An expert, a projection or a parameter that a file lacks is not taken for zero, unless it was left out by name."""
    torch.manual_seed(0)
    parts, both = random_parts(), {"target_parameters": ["mlp.experts.gate_up_proj", "experts.down_proj"]}
    names = {"target_modules": ["q_proj", *PROJ.values(), *W.values()]}
    one, w = single(MLP, parts), single(MLP, parts, W)
    some = {"target_modules": [f"experts.{e}.{name}" for e in (0, 1) for name in PROJ.values()]}

    def without(tensors: Tensors, word: str) -> Tensors:
        return {key: t for key, t in tensors.items() if word not in key}

    for number, (tensors, config, missing) in enumerate(
        (
            (one, names, None),
            (without(one, ".2."), some, None),
            (without(one, ".2."), {"target_modules": r".*experts\.[01]\..*"}, None),
            (without(one, ".2."), {**names, "exclude_modules": ["experts.2.up_proj"]}, None),
            (DOWN, {"target_parameters": both["target_parameters"][1:]}, None),
            (DOWN, {"target_parameters": ["layers.1.mlp.experts.gate_up_proj", "experts.down_proj"]}, None),
            (without(one, ".2."), names, "experts.2.gate_proj"),
            (without(one, ".1.down"), names, "experts.1.down_proj"),
            (without(one, ".2."), {"target_modules": r"(.*\.)?(self_attn|mlp)\..*_proj"}, "experts.2.gate_proj"),
            (without(one, ".2."), {"target_modules": r"(?:.*?text.*?)|(?:\bmodel\.layers\.[\d]{1,}.*)"}, "experts.2.gate_proj"),
            (without(one, ".2."), {"target_modules": r"(?i).*_proj"}, None),  # which only `re` understands
            (without(w, ".w2."), names, "experts.0.w2"),
            (without(stacked(MLP, parts, PROJ), ".up_proj"), names, "experts.up_proj"),
            (without(listed(MLP, parts), "down_projs.1"), {**UNSLOTH, "target_modules": r".*_projs\.\d"}, "experts.down_projs.1"),
            (DOWN, both, "experts.gate_up_proj"),
            (without(GOOD, "experts.lora"), both, "experts.down_proj"),
        )
    ):
        folder = write(tmp_path / f"{number}", tensors, **config)
        if missing is None:
            assert read_adapter(folder, SHAPE).layers
        else:
            with pytest.raises(AdapterError, match=rf": model.layers.0.mlp.{missing}: got no factors, wanted some"):
                read_adapter(folder, SHAPE)


def test_prefix(tmp_path: Path) -> None:
    """Two decoders in one file: what was asked for is read, the rest is named."""
    torch.manual_seed(0)
    model, mtp = random_parts(), random_parts()
    paths = {"model.layers": model, "mtp.layers": mtp}
    tensors = {k: t for path, parts in paths.items() for k, t in single(f"{path}.0.mlp.experts", parts).items()}
    folder = write(tmp_path / "x", tensors)
    for prefix, parts in [*paths.items(), ("base_model.model.mtp", mtp), ("model.layers.*.mlp", model)]:
        adapter = read_adapter(folder, SHAPE, prefix=prefix)
        assert_reads(adapter, parts)
        assert len(adapter.other) == 9 and not any(name.startswith(prefix) for name in adapter.other)
    with pytest.raises(AdapterError, match="nothing for the routed experts of mod among 18 modules"):
        read_adapter(folder, SHAPE, prefix="mod")


def test_allow_empty(tmp_path: Path) -> None:
    folder = write(tmp_path / "x", pair(f"{DECODER}.self_attn.q_proj", torch.ones(2, 10), torch.ones(10, 2)))
    adapter = read_adapter(folder, SHAPE, allow_empty=True)
    assert (adapter.rank, adapter.other) == (0, ("model.layers.0.self_attn.q_proj",))
    assert stack_adapters([adapter], SHAPE, dtype=torch.float16) == {}


# Folders that are broken, and worse.


def break_config(text: str | bytes) -> Callable[[Path], None]:
    data = text.encode() if isinstance(text, str) else text
    return lambda folder: (folder / "adapter_config.json").write_bytes(data) and None


def replace(name: str, make: Callable[[Path], object]) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / name).unlink()
        make(folder / name)

    return change


def cut(folder: Path) -> None:
    tensors = folder / "adapter_model.safetensors"
    tensors.write_bytes(tensors.read_bytes()[:-1])


def pickled(folder: Path) -> None:
    (folder / "adapter_model.safetensors").unlink()
    torch.save(dict(GOOD), folder / "adapter_model.bin")


def twice(folder: Path) -> None:
    """One name, written in two ways, for two tensors over the same bytes, of which safetensors takes the last."""
    saved = folder / SAVED
    data = saved.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    name = next(iter(header))
    text = f'{json.dumps(header)[:-1]}, "\\u{ord(name[0]):04x}{name[1:]}": {json.dumps(header[name])}}}'.encode()
    saved.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])


SAVED = "adapter_model.safetensors"
BROKEN: dict[str, tuple[Callable[[Path], None], type[Exception], str]] = {
    "a list": (break_config("[]"), AdapterError, "got list, wanted an object"),
    "no JSON": (break_config("{,}"), AdapterError, "wanted an object of JSON"),
    "cut JSON": (break_config('{"r": 2'), AdapterError, "wanted an object of JSON"),
    "no text": (break_config(b"\xff\xfe{}"), AdapterError, "wanted an object of JSON"),
    "nothing": (break_config(""), AdapterError, "got 0 bytes"),
    "too much": (break_config(" " * (16 << 20) + "{}"), AdapterError, "wanted 1 to"),
    "deep JSON": (break_config('{"a":' * 50_000), AdapterError, "wanted an object of JSON"),
    "a key twice": (break_config('{"r": 2, "r": 4}'), AdapterError, "got 'r' twice"),
    "Infinity": (break_config('{"lora_alpha": Infinity}'), AdapterError, "got Infinity"),
    "digits": (break_config('{"r": ' + "9" * 9999 + "}"), AdapterError, "wanted an object of JSON"),
    "a pipe": (replace("adapter_config.json", os.mkfifo), AdapterError, "got a folder, pipe or device"),
    "a device": (replace("adapter_config.json", lambda p: p.symlink_to("/dev/zero")), AdapterError, "device"),
    "a folder": (replace("adapter_config.json", Path.mkdir), AdapterError, "got a folder, pipe or device"),
    "a loop": (replace("adapter_config.json", lambda p: p.symlink_to(p)), AdapterError, "wanted a file"),
    "no config": (replace("adapter_config.json", lambda p: None), FileNotFoundError, "adapter_config.json"),
    "a dead link": (replace("adapter_config.json", lambda p: p.symlink_to("x")), FileNotFoundError, "not there"),
    "no tensors": (replace(SAVED, lambda p: None), FileNotFoundError, SAVED),
    "empty tensors": (replace(SAVED, Path.touch), AdapterError, "got an empty file"),
    "cut tensors": (cut, AdapterError, "not fully covered, wanted a whole file"),
    "a tensor twice": (twice, AdapterError, "twice in one object, wanted each tensor once"),
    "a pipe of tensors": (replace(SAVED, os.mkfifo), AdapterError, "got a folder, pipe or device"),
    "a loop of tensors": (replace(SAVED, lambda p: p.symlink_to(p)), AdapterError, "wanted a file"),
    "a pickle": (pickled, AdapterError, "adapter_model.bin, a pickle"),
    "a pickle under another name": (replace(SAVED, lambda p: torch.save({}, p)), AdapterError, "wanted a whole file"),
    "tokens beside it": (lambda f: (f / "new_embeddings.safetensors").touch(), AdapterError, "got new_embeddings.safetensors"),
    "shards": (lambda f: (f / f"{SAVED}.index.json").touch(), AdapterError, "an adapter in shards"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_folder(name: str, tmp_path: Path) -> None:
    break_it, kind, words = BROKEN[name]
    folder = write(tmp_path / "x", GOOD)
    break_it(folder)
    with pytest.raises(kind, match=re.escape(words)):
        read_adapter(folder, SHAPE)


def test_a_folder_may_have_more_in_it(tmp_path: Path) -> None:
    """What a trainer leaves beside the tensors is not looked at, a pickle of an older release neither."""
    parts = random_parts()
    folder = write(tmp_path / "x", single(MLP, parts))
    for name in ("adapter_model.bin", "README.md", "optimizer.pt", "training_args.bin", "tokenizer.json"):
        (folder / name).write_bytes(b"x")
    assert_reads(read_adapter(folder, SHAPE), parts)


def test_what_is_read_is_what_was_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that another takes the place of is read to its end; one that is written to is refused."""
    parts = random_parts()
    folder = write(tmp_path / "x", single(MLP, parts))
    check = files._check_header

    def then(change: Callable[[Path], object]) -> None:
        monkeypatch.setattr(files, "_check_header", lambda file: (check(file), change(folder / SAVED)))

    then(replace_by_pipe)
    assert_reads(read_adapter(folder, SHAPE), parts)
    folder = write(tmp_path / "y", single(MLP, parts))
    os.utime(folder / SAVED, ns=(0, 0))  # long ago
    then(lambda file: file.write_bytes(file.read_bytes()))
    with pytest.raises(AdapterError, match="changed while it was read"):
        read_adapter(folder, SHAPE)


def replace_by_pipe(file: Path) -> None:
    file.unlink()
    os.mkfifo(file)


def test_arguments(tmp_path: Path) -> None:
    folder = write(tmp_path / "x", GOOD)
    with pytest.raises(FileNotFoundError, match=r"adapter_config\.json"):
        read_adapter(tmp_path / "nowhere", SHAPE)
    for bad in (folder / "adapter_config.json", "a\0b"):
        with pytest.raises(AdapterError, match="wanted a file"):
            read_adapter(bad, SHAPE)
    for arguments in (
        {"orientation": "x"},
        {"layout": "x"},
        {"shape": (3, 10)},
        {"shape": (3, 10, 0)},
        {"shape": torch.tensor([3, 10, 6])},
        {"shape": (1 << 40, 10, 6)},
        {"source": None},
        {"prefix": 1},
        {"base_weights": 1},
    ):
        with pytest.raises(ValueError, match=f"{next(iter(arguments))}: got .*, wanted"):
            read_adapter(**{"source": folder, "shape": SHAPE, **arguments})


PATTERNS = [
    "down_proj",
    ".*down_proj",
    "experts.down_proj",
    "experts.down",
    "^model.layers.0",
    "^model.*proj",
    r".*\.down_proj",
    r"layers\.(0|1)\.mlp.*",
    r"layers.[0-9]+.mlp.experts.[13579].\w+_proj",
    "(gate|up)_proj",
    "(?:a|down)_pro?j$",
    r"\d{1,2}.mlp.experts.\d{2}.gate_proj",
    ".*",
    ".+x",
    "x*",
    "[^.]+",
    r"(\w+\.)+gate_proj",
    "(layers|model)+.*",
    "model(.layers.(10|1|0)){1}.*",
    ".{3,}?proj",
    "mlp.experts.10.(up|gate)(_proj){0,2}",
    r"(.*?\bup_proj\b)|x",
    r"\bmodel\b.layers\.[\d]{1,}\.mlp\..*?\b",
    r"m\bodel.*",
    "(|x)",
    "()",
    "a|",
    "",
    "^down_proj",
    "^d.wn_proj",
    r"^experts\.down_proj",
    "^model.layers.0.mlp.experts.down_proj",
]
NAMES = [f"model.layers.{i}.mlp.experts.{e}.{name}" for i in (0, 10) for e in (1, 10) for name in ("gate_proj", "down_proj")] + [
    "model.layers.0.mlp.experts.down_proj",
    "down_proj",
    "x",
    "",
]


def test_patterns_are_those_of_re() -> None:
    for pattern in PATTERNS:
        found = [Patterns([pattern]).first(name) is not None for name in NAMES]
        assert found == [bool(re.match(rf"(.*\.)?({pattern})$", name)) for name in NAMES], pattern
    for pattern in (
        "(a",
        "a)",
        "*",
        "a**",
        "a{2}{3}",
        "a{3,2}",
        "(?i)a",
        "(?!a)",
        "\\1",
        "\\Bx",
        "[",
        "[z-a]",
        "(" * 99,
        "a*" * 99_999,
    ):
        with pytest.raises(AdapterError, match="got"):
            Patterns([pattern])


def test_patterns_beside_each_other() -> None:
    """The first that matches, whether it is a name or more than that."""
    rng = random.Random(0)
    for _ in range(300):
        some = rng.sample([*PATTERNS, *NAMES], 6)
        several = Patterns(some)
        for name in NAMES:
            wanted = [i for i, pattern in enumerate(some) if re.match(rf"(.*\.)?({pattern})$", name)]
            assert several.first(name) == min(wanted, default=None), (some, name)


def test_patterns_of_every_module() -> None:
    """A rank for each module of a large model, by its name and by layer: looked up, not tried."""
    names = [f"model.layers.{i}.mlp.experts.{e}.{p}_proj" for i in range(16) for e in range(128) for p in ("gate", "up", "down")]
    for texts, wanted in (
        (names, list(range(len(names)))),
        ([rf"layers\.{i}\..*\.(gate|up|down)_proj" for i in range(16)], [n // 384 for n in range(len(names))]),
    ):
        every = Patterns(texts)
        assert [every.first(name) for name in names] == wanted


@pytest.mark.parametrize(
    "pattern",
    [
        *["(a|a)*b", "(a+)+b", "(.*)*x", "(a?){30}a{30}b", "(.*.*.*.*.*)*=", "(" * 19 + "a*" + ")*" * 19 + "b"],
        *["(((a?){9}){9}){9}b", "((.?){90}){90}=", "((){999999}){999999}b", "(" * 9 + "a*" + "){1,2}" * 9 + "b"],
    ],
)
def test_patterns_that_backtrack(pattern: str) -> None:
    assert Patterns([pattern]).first("a" * 200) is None
    assert Patterns([pattern + "|a*"]).first("a" * 200) == 0


def test_patterns_that_take_long(monkeypatch: pytest.MonkeyPatch) -> None:
    """What cannot be looked up is counted."""
    monkeypatch.setattr(patterns, "_MOST_STEPS", 10_000)
    many = Patterns([rf"(\w+\.?)+{n}" for n in range(99)])
    with pytest.raises(AdapterError, match="got patterns that take more than"):
        for name in NAMES:
            many.first(name)


# Side by side.


def read(folder: Path, parts: Tensors, **config: Any) -> Adapter:
    return read_adapter(write(folder, parts, **config), SHAPE)


def test_buffers(tmp_path: Path) -> None:
    down = read(tmp_path / "down", DOWN)
    both = pair(f"{MLP}.base_layer", torch.ones(9, 10), torch.ones(12, 9))
    later = {key.replace("layers.0", "layers.1"): tensor for key, tensor in both.items()}
    wide = read(tmp_path / "wide", {**both, **later}, r=3)
    layers = stack_adapters([down, wide], SHAPE, dtype=torch.float16, max_loras=3)
    assert list(layers) == [0, 1]
    assert layers[0].adapter_enabled.tolist() == [1, 1, 0]
    assert layers[1].adapter_enabled.tolist() == [0, 1, 0]
    gate_up, down_proj, *_ = layers[0]
    assert layers[0].lora_ranks is None  # of buffers of rank 8
    (_, *others) = stack_adapters([down, wide], SHAPE, dtype=torch.float16, max_loras=3, rank=64).values()
    assert [layer.lora_ranks.tolist() for layer in others] == [[0, 3, 0]]
    assert gate_up.a[0] is gate_up.a[1] and gate_up.a[0].shape == (3, 3, 8, 10)
    assert gate_up.b[0].shape == gate_up.b[1].shape == (3, 3, 6, 8)
    assert gate_up.a[0].sum(dim=(1, 2, 3)).tolist() == [0, 90, 0]
    assert down_proj.b[0].sum(dim=(1, 2, 3)).tolist() == [SCALING * 60, 0, 0]
    for r, rank, ranks in ((1, 16, None), (16, 16, None), (16, 17, [16]), (17, 32, None), (17, 33, [17])):  # one reads sixteen
        one = read(tmp_path / f"{r} of {rank}", pair(f"{MLP}.base_layer", torch.ones(3 * r, 10), torch.ones(12, 3 * r)), r=r)
        found = stack_adapters([one], SHAPE, dtype=torch.float16, rank=rank)[0].lora_ranks
        assert (found if found is None else found.tolist()) == ranks
    with pytest.raises(AdapterError, match="got 2 adapters of rank up to 3, wanted at most 1 of rank up to 2"):
        stack_adapters([down, wide], SHAPE, dtype=torch.float16, rank=2, max_loras=1)


def test_shared_factors_keep_one_copy(tmp_path: Path) -> None:
    """A stride of 0 over the experts, unless some adapter in the mixture has factors of its own for each."""
    torch.manual_seed(0)
    parts = random_parts()
    outer = read(tmp_path / "outer", stacked_gate_up(MLP, parts, outer=True))
    own = read(tmp_path / "own", stacked_gate_up(MLP, parts))
    for adapters, shared in (([outer], True), ([outer, outer], True), ([outer, own], False)):
        gate_up, down, *_ = stack_adapters(adapters, SHAPE, dtype=torch.bfloat16, rank=RANK)[0]
        assert gate_up.a[0] is gate_up.a[1]
        assert [t.stride(1) == 0 for t in (gate_up.a[0], gate_up.b[0], down.a[0], down.b[0])] == [shared, False, False, shared]
        for slot, adapter in enumerate(adapters):
            for part, buffers, s in (("gate", gate_up, 0), ("up", gate_up, 1), ("down", down, 0)):
                for factor, buffer in zip(adapter.layers[0][part], (buffers.a[s], buffers.b[s]), strict=True):
                    assert torch.equal(buffer[slot], factor.to(torch.bfloat16))
    square, b = torch.rand(3, 4, 4), torch.rand(3, 6, 4)
    turned = {"gate": Factors(square, b), "up": Factors(square.transpose(1, 2), b)}
    assert not share_first(turned) and share_first({**turned, "up": turned["gate"]})


WRONG: list[dict[str, Any]] = [
    *({"adapters": value} for value in (None, "x", [None], {})),
    *({"device": value} for value in ("nonsense", "meta", [])),
    *({"shape": value} for value in (None, (3, 10), ExpertShape(3, 0, 6))),
    *[{"rank": 1 << 40}, {"max_loras": 1 << 40}],
]


def test_numbers_that_do_not_fit(tmp_path: Path) -> None:
    large = read(tmp_path / "large", DOWN, lora_alpha=2e5)
    small = read(tmp_path / "small", DOWN, lora_alpha=2e-9)
    rest = torch.ones(10, 6)
    rest[:, 1::3] = 2.5e-9  # of one expert
    part = read(tmp_path / "part", {**DOWN, f"{MLP}.lora_B.weight": rest})
    for adapter, number in ((large, "100000"), (small, "1e-09"), (part, "1e-08")):
        with pytest.raises(AdapterError, match=f"{adapter.name}: layer 0, down, b: got numbers up to {number}.*float16"):
            stack_adapters([adapter], SHAPE, dtype=torch.float16)
        assert stack_adapters([adapter], SHAPE, dtype=torch.bfloat16)[0].down.b[0].isfinite().all()
    other = ExpertShape(3, 12, 6)
    with pytest.raises(AdapterError, match=r"large: layer 0, down: got factors \[3, 2, 6\] and \[3, 10, 2\]"):
        stack_adapters([large], other, dtype=torch.bfloat16)
    for arguments in (
        {"dtype": torch.int32},
        {"dtype": FP8},
        {"rank": 0},
        {"rank": 8.0},
        {"max_loras": 0},
        {"max_loras": True},
        *WRONG,
    ):
        with pytest.raises(ValueError, match=f"{next(iter(arguments))}: got .*, wanted"):
            stack_adapters(**{"adapters": [small], "shape": SHAPE, "dtype": torch.bfloat16, **arguments})


MADE: dict[str, tuple[Any, str]] = {
    "a part": ({0: {"gate_up": Factors(torch.ones(3, 2, 10), torch.ones(3, 12, 2))}}, "gate_up: got a part that is not known"),
    "no factors": ({0: {"down": "ab"}}, "down: got str, wanted Factors"),
    "whole numbers": (
        {0: {"down": Factors(*torch.ones(2, 3, 2, 6).int())}},
        r"down: got torch.int32, torch.int32, wanted Factors",
    ),
    "no dimensions": ({0: {"down": Factors(*torch.ones(2))}}, r"down: got factors \[\] and \[\], wanted those of"),
    "no numbers": ({0: {"down": Factors(torch.ones(3, 2, 6, device="meta"), torch.ones(3, 10, 2))}}, "down: got factors on meta"),
    "no layer": ({"0": {}}, "layers: got '0': dict, wanted the number of a layer"),
    "no layers": (None, "layers: got None: NoneType, wanted"),
}


@pytest.mark.parametrize("name", MADE)
def test_made_by_hand(name: str) -> None:
    layers, words = MADE[name]
    with pytest.raises(AdapterError, match=f"mine: {words}|mine: layer 0, {words}"):
        stack_adapters([Adapter("mine", layers, ())], SHAPE, dtype=torch.bfloat16)


# Served.


class Scene:
    """A batch of mixed adapters, served; and PEFT's answer to it."""

    def __init__(
        self,
        model: Any,
        device: str,
        tmp_path: Path,
        change: Callable[[list[Adapter]], list[Adapter]] = list,
        base: str = "torch",
    ) -> None:
        import generated as kernels

        folders = [models.save_adapter(model, spec, tmp_path) for spec in models.ADAPTERS]
        self.model = model.to(device, torch.bfloat16)
        shape = expert_shape(model)
        adapters = [read_adapter(folder, shape) for folder in folders]
        buffers = stack_adapters(change(adapters), shape, dtype=torch.bfloat16, device=device)
        self.server = MoeLora(self.model, buffers, kernels, base=base)
        requests = [Request(slot, torch.randint(models.VOCABULARY, (n,))) for slot, n in ((0, 5), (-1, 3), (1, 4), (2, 6))]
        self.served, self.steps = serve(self.model, self.server, requests, 1, lambda: None)
        truth = [read_adapter(folder, shape) for folder in folders]
        self.comparison = Comparison(self.model, truth, folders)

    def agrees(self, slot: int) -> bool:
        return self.comparison.compare(slot, self.served, self.steps, lambda: None).agrees


def fresh(name: str) -> Any:
    torch.manual_seed(0)
    return models.MODELS[name]()


@pytest.mark.slow(keep=1)
@pytest.mark.parametrize("name, base", [("qwen3_moe", "torch"), ("mixtral", "generated"), ("mixtral", "torch")])
def test_served_equals_peft(name: str, base: str, device: str, tmp_path: Path) -> None:
    scene = Scene(fresh(name), device, tmp_path, base=base)
    results = [scene.comparison.compare(s, scene.served, scene.steps, lambda: None) for s in (-1, 0, 1, 2)]
    assert all(result.agrees for result in results), results
    # Without its adapter a request would be off by the effect: the comparison could not have missed that.
    assert all(result.effect > 2 * result.allowed for result in results[1:]), results
    assert scene.comparison.untouched(scene.server, scene.steps)
    assert scene.model.get_experts_implementation()[""] != "kernelgen_moe_lora"


def test_wrong_layout_is_seen(device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The way to misread ``lora_B`` that others have shipped, the expert as its slowest index, fails the comparison."""
    right = layouts.expert_fastest

    def restore(adapters: list[Adapter]) -> list[Adapter]:
        monkeypatch.setattr(layouts, "expert_fastest", right)
        return adapters

    monkeypatch.setattr(layouts, "expert_fastest", lambda b, experts: b.unflatten(1, (experts, -1)).transpose(0, 1))
    scene = Scene(fresh("mixtral"), device, tmp_path, restore)
    assert [scene.agrees(slot) for slot in (-1, 0, 1, 2)] == [True, False, False, False]


def test_wrong_adapter_is_seen(device: str, tmp_path: Path) -> None:
    scene = Scene(fresh("mixtral"), device, tmp_path, lambda adapters: [adapters[1], adapters[0], adapters[2]])
    assert [scene.agrees(slot) for slot in (-1, 0, 1, 2)] == [True, False, False, True]


def test_outside_of_a_batch(device: str) -> None:
    model = fresh("mixtral").to(device, torch.bfloat16)
    import generated as kernels

    server = MoeLora(model, {}, kernels)
    ids = torch.tensor([[1, 2, 3]], device=device)
    mapping = torch.tensor([0, 0], dtype=torch.int32, device=device)
    wrong_length = pytest.raises(ValueError, match=r"token_lora_mapping: got \[2\], wanted \[3\]")
    with server.batch(mapping), wrong_length:
        model(ids)
    with pytest.raises(ValueError, match="outside of batch"):
        server.experts(0, None, ids, ids, ids)
