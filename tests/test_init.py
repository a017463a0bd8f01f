"""``kernelgen init``: what a model needs, and a package of just that, which serves it."""

from __future__ import annotations

import functools
import importlib
import json
import sys
from pathlib import Path
from typing import Any, Callable, Iterator, Mapping

import pytest
import torch
import yaml

pytest.importorskip("peft")
pytest.importorskip("transformers")
from test_peft import pair, write

from kernelgen.core.diagnostics import Failure
from kernelgen.core.locate import SPECS
from kernelgen.core.model import Family
from kernelgen.demo import bounds, models
from kernelgen.emit import build
from kernelgen.integrations.peft import Factors, read_adapter, stack_adapters
from kernelgen.integrations.transformers import MoeCall, MoeLora, expert_shape
from kernelgen.measure.init.narrow import chosen, measured, spec
from kernelgen.measure.init.needs import needs
from kernelgen.measure.models import Layer

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

QWEN = {
    **{"model_type": "qwen3_moe", "hidden_size": 2048, "moe_intermediate_size": 768, "num_experts": 128},
    **{"num_experts_per_tok": 8, "hidden_act": "silu", "dtype": "bfloat16", "num_hidden_layers": 4},
}
LLAMA = {"model_type": "llama", "hidden_size": 64, "intermediate_size": 96, "torch_dtype": "float16"}


@pytest.mark.slow
def test_a_package_of_what_a_model_needs_serves_it(
    kernelgen: Callable[..., tuple[int, str, str]], device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has a tenth of the whole, and is right, with base experts of its own and between foreign ones."""
    torch.manual_seed(0)
    model = models.qwen3_moe()
    folders = [models.save_adapter(model, spec, tmp_path) for spec in models.ADAPTERS]
    model.config.save_pretrained(tmp_path)
    arguments = [word for folder in folders for word in ("--adapter", str(folder))]
    arguments += ["--from", str(tmp_path / "config.json"), "--specs", str(tmp_path / "own/specs"), "--max-tokens", "64"]
    code, out, err = kernelgen("init", *arguments, "--slots", "3", "--base", "generated", "--base", "foreign", "--json")
    assert code == 0, err
    said = json.loads(out)
    assert [row["zeros"] for row in said["padding"]] == ["50 %", "0 %", "25 %"]
    assert kernelgen("init", *arguments)[0] == 2  # there are specs already
    build.build(tmp_path / "own/specs", tmp_path / "own")
    monkeypatch.syspath_prepend(str(tmp_path / "own"))
    (tmp_path / "own/generated").rename(tmp_path / "own/of_qwen")
    own = importlib.import_module("of_qwen")

    def size(folder: Path, *but: str) -> int:
        return sum(file.stat().st_size for file in folder.rglob("*.py") if file.parent.name not in but)

    assert size(tmp_path / "own/of_qwen", "moe_lora", "moe_route") < size(SPECS.parent / "generated") / 10

    shape, model = expert_shape(model), model.to(device, torch.bfloat16)
    adapters = [read_adapter(folder, shape) for folder in folders]
    layers = stack_adapters(adapters, shape, dtype=torch.bfloat16, device=device)
    mapping = torch.tensor([1, -1], dtype=torch.int32, device=device)
    ids, weights = torch.tensor([[0, 5], [5, 3]], device=device), torch.rand(2, 2, device=device)
    hidden, experts = torch.randn(2, shape.hidden, device=device).to(torch.bfloat16), model.model.layers[1].mlp.experts
    factors = {name: Factors(*(t.to(device) for t in f)) for name, f in adapters[1].layers[1].items()}
    for base in ("torch", "generated"):
        with torch.no_grad(), MoeLora(model, layers, own, base=base).batch(mapping):
            out = experts(hidden, ids, weights)
        for row, held in ((slice(0, 1), factors), (slice(1, 2), {})):
            call = MoeCall(1, hidden[row], ids[row], weights[row], out[row])
            wanted = bounds.moe_layer(call, experts.gate_up_proj, experts.down_proj, held)
            assert ((out[row] - wanted.value).abs() <= wanted.error).all()
    code_of_shapes = [eval(text, {"kg": own, "torch": torch}) for text in said["warmup"]]
    assert own.warmup(code_of_shapes, max_tokens=4, device=device) >= 0
    for name in [name for name in sys.modules if name.startswith("of_qwen")]:
        monkeypatch.delitem(sys.modules, name)


@pytest.fixture
def config(tmp_path: Path) -> Iterator[Callable[..., Path]]:
    def make(base: Mapping[str, Any], **more: Any) -> Path:
        file = tmp_path / "config.json"
        file.write_text(json.dumps({name: value for name, value in {**base, **more}.items() if value is not None}))
        return file

    yield make


ROUTED = {"num_experts": None, "n_routed_experts": 128}
LOCAL = {"num_experts": None, "num_local_experts": 128, "moe_intermediate_size": None, "intermediate_size": 768}
OWN = {"model_type": None}  # of a model that transformers does not know
PLAIN: dict[str, Any] = {"tp": 1, "slots": 4, "rank": None, "dtype": None, "bases": ("generated",)}
BLOCKS = {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}
FLOAT8 = {"type": "float", "num_bits": 8}
TOKENS = {"weights": {**FLOAT8, "strategy": "channel"}, "input_activations": {**FLOAT8, "strategy": "token"}}


def compressed(ignore: Any = (), sparsity: Any = None, **more: Any) -> dict[str, Any]:
    """FP8 by channels and tokens, as compressed-tensors says it; ``more`` of a side is added to it, or None."""
    sides = {name: {**TOKENS[name], **value} for name, value in more.items() if isinstance(value, dict)}
    group = {**TOKENS, **more, **sides}
    said = {"quant_method": "compressed-tensors", "config_groups": {"group_0": group}, "ignore": list(ignore)}
    return {"quantization_config": {**said, "sparsity_config": sparsity or {}}}


@pytest.mark.parametrize(
    ("more", "arguments", "shape"),
    [
        ({}, {}, {"rank": 16, "max_loras": 4}),
        ({}, {"rank": 64, "slots": 9, "tp": 2}, {"rank": 64, "max_loras": 9, "intermediate": 384, "lora_ranks": True}),
        ({"dtype": "float16"}, {}, {"dtype": "float16", "out_dtype": "float16"}),
        ({**ROUTED, "model_type": "nemotron_h", "hidden_act": None}, {}, {"activation": "relu2", "hidden": 2048}),
        ({**OWN, "hidden_act": "relu2", "moe_latent_size": 512}, {}, {"activation": "relu2", "hidden": 512}),
        ({"num_experts_per_tok": None, "moe_k": 6}, {}, {"top_k": 6}),
        ({**OWN, "hidden_activation": "gelu_pytorch_tanh", "hidden_act": None}, {}, {"activation": "geglu_tanh"}),
        ({**ROUTED, "model_type": "deepseek_v4", "swiglu_limit": 10.0}, {}, {"activation": "swiglu_clamp"}),
        ({**LOCAL, "model_type": "aria_text", "moe_num_experts": 128, "hidden_act": "gelu"}, {}, {"intermediate": 768}),
        ({"quantization_config": BLOCKS}, {}, {"weight_scales": "group", "x_scales": "group"}),
        ({**LOCAL, "model_type": "gpt_oss", "swiglu_limit": 7.0}, {}, {"layout": "interleaved", "bias_dtype": "bfloat16"}),
        (
            {**LOCAL, "model_type": "gpt_oss", "quantization_config": {"quant_method": "mxfp4"}},
            {},
            {"activation": "swiglu_clamp", "layout": "interleaved", "weight_scales": "mx"},
        ),
        ({**LOCAL, "model_type": "llama4_text"}, {}, {"apply_router_weight_on_input": True}),
        (
            {"quantization_config": {"quant_method": "fp8", "activation_scheme": "static"}},
            {},
            {"weight_scales": "tensor", "x_scales": "tensor"},
        ),
        ({"quantization_config": {"quant_method": "modelopt", "quant_algo": "FP8"}}, {}, {"x_scales": "tensor"}),
        (compressed(), {}, {"weight_scales": "channel", "x_scales": "token"}),
        (compressed(input_activations=None), {}, {"weight_scales": "channel"}),
        (compressed(ignore=["lm_head", "re:.*mlp.gate$", "model.layers.9.mlp.experts"]), {}, {"x_scales": "token"}),
    ],
)
def test_what_a_config_says(
    more: dict[str, Any], arguments: dict[str, Any], shape: dict[str, Any], config: Callable[..., Path]
) -> None:
    (name, fields) = needs(config(QWEN, **more), [], **{**PLAIN, **arguments}).shapes()[-1]
    assert name == "FusedMoeShape" and fields.items() >= shape.items()
    assert ("x_scales" in fields) == ("x_scales" in shape)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"dtype": "float32"}, "its dtype is float32"),
        ({"hidden_act": "quick_gelu"}, "got the activation QuickGELU"),
        ({**ROUTED, "model_type": "inkling2_text"}, "Inkling2Experts: got a gate of its own"),
        ({**LOCAL, "model_type": "jetmoe"}, "JetMoeModel: got no fused experts"),
        ({"model_type": "mixtral"}, r"sizes \(128, 2048, 768\) by their names, and MixtralModel has \(128, 2048, 14336\)"),
        ({"moe_intermediate_size": [768, 512]}, r"moe_intermediate_size is \[768, 512\], wanted one number"),
        ({**OWN, "hidden_act": "quick_gelu"}, "its experts have the activation quick_gelu"),
        ({**OWN, "hidden_act": None}, "its experts have no activation that it says"),
        ({**OWN, "swiglu_limit": 7.0}, "its experts have a gate that clamps in a way that is not known"),
        ({"quantization_config": {"quant_method": "awq", "bits": 4}}, "its quantization is none that is known"),
        ({"quantization_config": {**BLOCKS, "weight_block_size": [64, 64]}}, r"its quantization is FP8 by blocks of \[64, 64\]"),
        ({"quantization_config": {**BLOCKS, "fmt": "e5m2"}}, "its quantization is FP8 of 'e5m2'"),
        ({"quantization_config": {**BLOCKS, "modules_to_not_convert": ["layers.1.mlp"]}}, r"leaves experts out \(layers.1.mlp\)"),
        ({"quantization_config": {"quant_method": "mxfp4"}}, "MXFP4 of experts that are none of gpt-oss"),
        (compressed(ignore=["re:.*experts.*down_proj"]), "leaves experts out"),
        (compressed(ignore=["*.block_sparse_moe.experts*"]), "leaves experts out"),
        (compressed(targets=["re:.*self_attn.*"]), "one that has other modules than experts"),
        (compressed(sparsity={"format": "sparse-24-bitmask"}), "one of sparse weights"),
        (compressed(weights={"num_bits": 4}), "none of 8-bit floating-point numbers"),
        (compressed(weights={"symmetric": False}), "with zero points"),
        (compressed(weights={"block_structure": [64, 64]}), "of other sizes than 128"),
        (compressed(input_activations={"group_size": 64}), "of other sizes than 128"),
        (compressed(input_activations={"dynamic": False}), "whose scales of tokens are known in advance"),
        (compressed(weights={"strategy": "tensor"}), "FP8 by 'tensor' with activations by 'token'"),
        ({"moe_intermediate_size": "768"}, "moe_intermediate_size is '768', wanted a whole number"),
        ({"num_experts": True}, "num_experts is True, wanted a whole number"),
        ({"hidden_size": 1 << 31}, "hidden_size is 2147483648, wanted a whole number"),
        ({"num_experts_per_tok": 129}, "a token has 129 of 128 experts"),
        ({**OWN, "n_routed_experts": 64}, "num_experts is 128, and n_routed_experts is 64, wanted one number"),
        ({"num_experts": 0}, "is it a mixture of experts"),
    ],
)
def test_what_a_config_cannot_say(more: dict[str, Any], words: str, config: Callable[..., Path]) -> None:
    path = config(QWEN, **more)
    with pytest.raises(Failure, match=words):
        needs(path, [], **PLAIN)


def test_linear_layers_of_adapters(config: Callable[..., Path], tmp_path: Path) -> None:
    """Of a dense model: q, k and v as one layer, k too where v alone is adapted; cut for tensor parallelism."""
    name = "base_model.model.model.layers.{}.{}".format

    def adapter(folder: str, r: int, **sizes: tuple[int, int]) -> Path:
        tensors: dict[str, torch.Tensor] = {}
        for layer in (0, 1):
            for module, (wide, tall) in sizes.items():
                tensors |= pair(name(layer, module.replace("__", ".")), torch.ones(r, wide), torch.ones(tall, r))
        return write(tmp_path / folder, tensors, r=r)

    one = adapter("one", 12, self_attn__q_proj=(64, 64), self_attn__v_proj=(64, 32))
    two = adapter("two", 64, self_attn__o_proj=(64, 64), mlp__up_proj=(64, 96))
    path = config(LLAMA)
    found = needs(path, [one, two], **{**PLAIN, "tp": 2})
    assert {layer: rank for layer, (rank, _) in found.linears.items()} == {
        Layer(64, (32, 16, 16)): 16,
        Layer(32, (64,)): 64,
        Layer(64, (48,)): 64,
    }
    assert {name for name, _ in found.shapes()} == {"LoraShape"} and found.dtype == "f16"
    assert [row[1:] for row in found.padding()] == [("linear layers 12 of 64", "81 %"), ("linear layers 64 of 64", "0 %")]
    for folders, arguments, words in (
        ([], {}, "is it a mixture of experts"),
        ([one], {"tp": 64}, "32 columns do not divide by tp 64"),
        ([two], {"rank": 32}, "got 32, and an adapter has rank 64"),
        ([tmp_path], {}, "not an adapter that can be read"),
        ([one, adapter("three", 4, self_attn__q_proj=(32, 64))], {}, "is 32 to 64 here, and 64 to 64 elsewhere"),
        ([adapter("four", 4, mlp__experts__0__up_proj=(64, 32))], {}, "got factors of routed experts, wanted none"),
    ):
        with pytest.raises(Failure, match=words):
            needs(path, folders, **{**PLAIN, **arguments})


@pytest.mark.parametrize(
    ("name", "sizes", "rank"),
    [
        ("experts", ((128 * 4, 2048), (2 * 768, 4 * 128)), 4),
        ("experts", ((128 * 4, 768), (2048, 4 * 128)), 4),
        ("experts.7.down_proj", ((4, 768), (2048, 4)), 4),
        ("experts.w1", ((1, 4, 2048), (128, 768, 4)), 4),
        ("experts", ((96 * 4, 2048), (2 * 768, 4 * 96)), None),
        ("experts", ((128 * 4, 4096), (2 * 768, 4 * 128)), None),
        ("experts.7.down_proj", ((4, 1024), (2048, 4)), None),
        ("experts.w1", ((4, 2048), (768, 4)), None),
        ("experts.7.down_proj", ((), ()), None),
    ],
)
def test_adapters_are_of_the_model(
    name: str, sizes: tuple[tuple[int, ...], ...], rank: int | None, config: Callable[..., Path], tmp_path: Path
) -> None:
    folder = write(tmp_path / "a", pair(f"model.layers.0.mlp.{name}", *map(torch.ones, sizes)), r=4)
    arguments = {**PLAIN, "tp": 2}
    if rank is not None:
        assert needs(config(QWEN), [folder], **arguments).adapters[0].experts == rank
        return
    with pytest.raises(Failure, match=r"got lora_A .* and lora_B .*, wanted those of ExpertShape"):
        needs(config(QWEN), [folder], **arguments)


@pytest.mark.slow
def test_specs_are_narrowed_exactly(
    kernelgen: Callable[..., tuple[int, str, str]], config: Callable[..., Path], tmp_path: Path
) -> None:
    """Every variant of the narrow specs is one of the whole ones, of FP8 too, and they are taken by a build."""
    specs = tmp_path / "specs"
    code, out, err = kernelgen(
        "init", "--from", str(config(QWEN, quantization_config=BLOCKS)), "--specs", str(specs), "--max-tokens", "12", "--json"
    )
    assert code == 0, err
    narrow = build.tree(specs)
    families = {family.name: family for family in build.package(specs).families}
    there = {path for path in narrow.files if path.startswith("generated/")}
    assert all((SPECS.parent / path).exists() for path in there)
    counts = {name: int(count.split()[0]) for name, count in json.loads(out)["variants"].items()}
    assert {name: len(family.variants) for name, family in families.items()} == counts
    assert counts["moe_quant"] == 2 and any("diagonal" in path for path in narrow.files)


@functools.cache
def family_of(name: str) -> Family:
    return next(found for found in build.package(SPECS).families if found.name == name)


@pytest.mark.parametrize("name", ["moe_quant", "lora_expand"])
def test_a_spec_of_one_variant_has_the_groups_of_its_scales(name: str) -> None:
    family, source = family_of(name), (SPECS / f"{name}.yaml").read_text(encoding="utf-8")
    whole = yaml.safe_load(source)["quant"].keys()
    for tags, variant in {tuple(tag for _, tag in v.tags if tag[:2] in ("w8", "a8")): v for v in family.variants}.items():
        quant = yaml.safe_load(spec(source, family, [variant], "none"))
        of = {"group_n": {"w8group"}, "group_k": {"w8group", "a8group"}}
        wanted = {key for key in whole if tags and (key not in of or of[key] & {*tags})}
        assert quant.get("quant", {}).keys() == wanted, tags


def test_what_was_measured_is_kept_where_all_of_its_sizes_are_asked_for() -> None:
    """Entries of these sizes and schedules, and a second choice only where it is one of them."""
    family = family_of("moe_gemm")
    entries = yaml.safe_load((SPECS / "tuned" / "h200" / "moe_gemm.yaml").read_text(encoding="utf-8"))["entries"]
    k, n = ({entry["problem"][size] for entry in entries} for size in ("k", "n"))
    sizes = {"k": {max(k)}, "n": {min(n), entries[0]["problem"]["n"]}}
    for schedules in ({"tile"}, {str(variant.schedule) for variant in family.variants}):
        variants = [variant for variant in family.variants if variant.schedule in schedules]
        for asked in (sizes, {size: {value} for size, value in entries[0]["problem"].items() if size in sizes}, {}):
            ((_, text),) = list(measured(SPECS, family, variants, asked)) or [("", "")]
            found = (yaml.safe_load(text) or {}).get("entries", [])
            assert {e["problem"][s] in values for e in found for s, values in asked.items()} <= {True}
            assert {e["schedule"] for e in found} | {e["runner_up"]["schedule"] for e in found if "runner_up" in e} <= schedules
            if len(schedules) > 1:
                assert len(found) == sum(all(e["problem"][s] in values for s, values in asked.items()) for e in entries)


def test_a_variant_that_is_needed_is_there_in_every_schedule() -> None:
    """As another device may choose another; of a family that no call launches one stays, of the dtype."""
    family = family_of("moe_lora")
    one = next(variant for variant in family.variants if variant.schedule == "one_shot" and variant.rank == "r16")
    found = {str(variant.module) for variant in chosen(family, {str(one.module)}, "bf16")}
    assert {str(one.module), str(one.module).replace("one_shot", "two_kernel")} <= found
    assert [variant.dtype for variant in chosen(family, set(), "f16")] == ["f16"]
