"""Adapters on linear layers and embeddings, as PEFT saves them: what is read, stacked, sharded, and computed by ``lora``."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("peft")
pytest.importorskip("transformers")
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict

from kernelgen.demo import models
from kernelgen.integrations.embedding import embedding_lora
from kernelgen.integrations.peft import (
    Adapter,
    AdapterError,
    AdapterFiles,
    ExpertShape,
    Factors,
    LinearShape,
    read_adapter,
    stack_adapters,
    stack_linears,
)
from kernelgen.integrations.peft.stack import empty_linear
from kernelgen.integrations.transformers import LinearLora, expert_shape, linear_shapes

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:The following", "ignore:Setting `save_embedding_layers`")

RANKS = {"v_proj": 4, "o_proj": 3, "mlp.gate.weight": 2}
QKV, ROUTER = "model.layers.0.self_attn.qkv_proj", "model.layers.0.mlp.gate"


class Scene:
    """A model with an adapter of PEFT on almost everything, and its folder."""

    def __init__(self, folder: Path) -> None:
        torch.manual_seed(0)
        self.model = models.qwen3_moe()
        config = LoraConfig(
            r=8,
            lora_alpha=6,
            init_lora_weights=False,
            target_modules=["q_proj", "v_proj", "o_proj", "lm_head", "embed_tokens"],
            target_parameters=["mlp.gate.weight", "mlp.experts.down_proj"],
            rank_pattern=RANKS,
            alpha_pattern={"lm_head": 5},
        )
        self.adapted = get_peft_model(copy.deepcopy(self.model), config)
        self.adapted.save_pretrained(folder)
        self.folder = folder
        self.base = self.model.state_dict()

    def read(self, source: Any = None) -> Adapter:
        return read_adapter(self.folder if source is None else source, expert_shape(self.model), base_weights=self.base)

    def delta(self, module: str) -> torch.Tensor:
        """[out, in], PEFT's own update; of an embedding [H, V]."""
        layer = self.adapted.base_model.model.get_submodule(module)
        update = layer.get_delta_weight("default").detach()
        return update.T if module.endswith("embed_tokens") else update


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Scene:
    return Scene(tmp_path_factory.mktemp("linear") / "a")


def test_linear_layers_are_read(scene: Scene) -> None:
    adapter = scene.read()
    attention = [f"model.layers.{i}.self_attn.{name}" for i in (0, 1) for name in ("q_proj", "v_proj", "o_proj")]
    routers = [f"model.layers.{i}.mlp.gate" for i in (0, 1)]
    assert adapter.linears.keys() == {*attention, *routers, "lm_head", "model.embed_tokens"} == set(adapter.other)
    assert adapter.linears["model.layers.1.self_attn.v_proj"].a.shape[0] == 4
    for name, (a, b) in adapter.linears.items():
        torch.testing.assert_close(b.double() @ a.double(), scene.delta(name).double(), rtol=1e-5, atol=1e-6)
    in_memory = AdapterFiles(scene.adapted.peft_config["default"].to_dict(), get_peft_model_state_dict(scene.adapted), "now")
    again = scene.read(in_memory)
    assert again.name == "now" and again.linears.keys() == adapter.linears.keys()
    for name, factors in adapter.linears.items():
        assert all(torch.equal(one, other) for one, other in zip(factors, again.linears[name], strict=True))
    assert torch.equal(again.layers[0]["down"].b, adapter.layers[0]["down"].b)


def test_layers_of_slices_equal_peft(scene: Scene, device: str) -> None:
    """q and v with ranks of their own and no k; a router; an embedding; rows without an adapter keep their bytes."""
    import generated as kg

    adapter = scene.read()
    none = Adapter("none", {}, ())
    shapes = linear_shapes(scene.model)
    assert list(shapes[QKV].slices) == [QKV.replace("qkv", which) for which in "qkv"]
    layers = stack_linears([none, adapter], shapes, dtype=torch.bfloat16, device=device)
    assert layers.keys() == {name for name in shapes if not name.endswith("norm")} - {"model.layers.0.mlp", "model.layers.1.mlp"}
    qkv = layers[QKV]
    assert qkv.a[1] is qkv.a[0] and qkv.b[1].stride(0) == 0 and qkv.a[2].shape == (2, 8, 128)
    mapping = torch.tensor([1, -1, 1, 0, 1], dtype=torch.int32, device=device)
    route = kg.lora_route(mapping, max_loras=2)
    ids = torch.tensor([3, 250, 0, 9, 255], device=device)
    for name in (QKV, ROUTER, "lm_head", "model.embed_tokens"):
        shape, layer = shapes[name], layers[name]
        x = torch.randn(5, shape.inputs, device=device, dtype=torch.bfloat16)
        base = torch.randn(5, sum(shape.slices.values()), device=device, dtype=torch.bfloat16)
        out = base.clone()
        if name == "model.embed_tokens":
            embedding_lora(kg, out, ids, layer, mapping, route)
            x = torch.nn.functional.one_hot(ids, shape.inputs)
        else:
            kg.lora(out, x, layer.a, layer.b, route, offset_start=layer.offset_start)
        none_of_it = torch.zeros(1, shape.inputs)
        updates = [scene.delta(m) if m in adapter.linears else none_of_it.expand(n, -1) for m, n in shape.slices.items()]
        wanted = base.double() + x.double() @ torch.cat(updates).double().T.to(device)
        rows = mapping == 1
        size = (x.double().abs() @ torch.cat(updates).double().abs().T.to(device)).amax() + base.double().abs().amax()
        assert ((out - wanted)[rows].abs() <= size * 2**-6).all() and not torch.equal(out[rows], base[rows])
        assert torch.equal(out[~rows], base[~rows])


def test_shards_add_up(scene: Scene) -> None:
    """Outputs of slices on each of two GPUs; inputs, whose products add up."""
    adapter, shape = scene.read(), linear_shapes(scene.model)[QKV]
    whole = stack_linears([adapter], {QKV: shape}, dtype=torch.float32, allow_rest=True)[QKV]
    half = {module: range(n // 2, n) for module, n in shape.slices.items()}
    part = stack_linears([adapter], {QKV: shape._replace(here=half)}, dtype=torch.float32, allow_rest=True)[QKV]
    for one, other, rows in zip(whole.b, part.b, half.values(), strict=True):
        assert torch.equal(one[:, rows.start :], other)
    (last,) = list(shape.slices)[-1:]
    alone = empty_linear(shape._replace(here=half), 1, 16, torch.float16, "cpu", [last]).buffers
    assert alone.offset_start == sum(len(rows) for module, rows in half.items() if module != last)
    columns = shape._replace(inputs_here=range(96, 128))
    part = stack_linears([adapter], {QKV: columns}, dtype=torch.float32, allow_rest=True)[QKV]
    assert torch.equal(whole.a[0][:, :, 96:], part.a[0]) and torch.equal(whole.b[0], part.b[0])


def test_a_layer_that_is_one_in_the_adapter_too() -> None:
    """Factors of the whole are those of each slice, and slices that nobody changes are left out at both ends."""
    a, b = torch.randn(2, 10), torch.randn(12, 2)
    shape = LinearShape(10, {"m.q": 6, "m.k": 2, "m.v": 4})
    whole = stack_linears([Adapter("x", {}, (), {"m.qkv": Factors(a, b)})], {"m.qkv": shape}, dtype=torch.float32)["m.qkv"]
    assert torch.equal(torch.cat([t[0] for t in whole.b])[:, :2], b) and all(torch.equal(t[0, :2], a) for t in whole.a)
    key = Adapter("x", {}, (), {"m.k": Factors(a, b[:2])})
    middle = stack_linears([key], {"m.qkv": shape}, dtype=torch.float32)["m.qkv"]
    assert middle.offset_start == 6 and [t.shape[1] for t in middle.b] == [2]
    both = Adapter("x", {}, (), {"m.qkv": Factors(a, b), "m.k": Factors(a, b[:2])})
    for adapter, layers, words in (
        (both, {"m.qkv": shape}, "of m.qkv and of m.k, wanted one way"),
        (key, {}, "got factors of m.k, wanted those of the layers"),
        (key, {"m.qkv": shape._replace(inputs=9)}, r"m.k: got factors \[2, 10\] and \[2, 2\], wanted \[r, 9\] and \[2, r\]"),
    ):
        with pytest.raises(AdapterError, match=words):
            stack_linears([adapter], layers, dtype=torch.float32)
    for bad, words in (
        ({"m.qkv": shape._replace(slices={})}, "slices: got None"),
        ({"m.qkv": shape._replace(here={"m.k": range(3)})}, r"m.k: got range\(0, 3\), wanted a range of some of 2"),
        ({"m.qkv": shape._replace(here={"k": range(1)})}, "here: got k"),
        ({"m.qkv": shape, "m.k": shape}, "got m.k in m.qkv and in m.k"),
        ({"m.qkv": (10, 12)}, "got tuple, wanted a LinearShape"),
        ([shape], "layers: got list"),
    ):
        with pytest.raises(ValueError, match=words):
            stack_linears([key], bad, dtype=torch.float32)


def test_models_without_experts() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "vocab_size": 32}
    llama = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=1))
    shapes = linear_shapes(llama)
    inputs = {"q_proj": 16, "k_proj": 16, "v_proj": 12}
    apart = torch.nn.ModuleDict({name: torch.nn.Linear(size, 8) for name, size in inputs.items()})
    assert linear_shapes(apart) == {name: LinearShape(module.in_features, {name: 8}) for name, module in apart.items()}
    adapted = get_peft_model(llama, LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
    files = AdapterFiles(adapted.peft_config["default"].to_dict(), get_peft_model_state_dict(adapted))
    adapter = read_adapter(files, None)
    assert stack_linears([adapter], shapes, dtype=torch.float16).keys() == shapes.keys() - {"lm_head", "model.embed_tokens"}
    wrapped = {
        f"module.{name.replace('model.layers.0', '_fsdp_wrapped_module.model._orig_mod.layers.0._checkpoint_wrapped_module')}": t
        for name, t in files.tensors.items()
    }
    again = read_adapter(files._replace(tensors=wrapped), None)
    assert again.linears.keys() == adapter.linears.keys()
    with pytest.raises(AdapterError, match="got it twice"):
        read_adapter(files._replace(tensors={**files.tensors, **wrapped}), None)
    with pytest.raises(AdapterError, match="got nothing for linear layers among 0 modules"):
        read_adapter(files._replace(tensors={}), None)
    expert = {f"model.layers.0.mlp.experts.0.up_proj.lora_{side}.weight": torch.ones(2, 2) for side in "AB"}
    with pytest.raises(AdapterError, match="got factors of routed experts, wanted a shape"):
        read_adapter(files._replace(tensors=expert), None)


class Router(torch.nn.Linear):
    """A Linear that gives more than its product."""

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:  # type: ignore[override]
        return super().forward(x), x


def test_whole_models_equal_peft(device: str) -> None:
    """A batch that mixes two adapters and none, no farther from PEFT in float64 than twice what PEFT in bfloat16 is."""
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding

    import generated as kg

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "vocab_size": 40, "initializer_range": 0.2}
    bare = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=1)).eval()
    bare.model.embed_tokens = Gemma3TextScaledWordEmbedding(40, 32, 0, embed_scale=1.3)  # which scales that of adapters too
    base, adapted, adapters = bare.state_dict(), [], []
    for rank, targets in ((4, "all-linear"), (6, ["v_proj", "embed_tokens", "lm_head", "down_proj"])):
        config = LoraConfig(r=rank, target_modules=targets, init_lora_weights=False)
        adapted.append(get_peft_model(copy.deepcopy(bare), config))
        files = AdapterFiles(adapted[-1].peft_config["default"].to_dict(), get_peft_model_state_dict(adapted[-1]))
        adapters.append(read_adapter(files, None, base_weights=base))
    model = copy.deepcopy(bare).to(device, torch.bfloat16)
    shapes = linear_shapes(model, packed={})
    layers = stack_linears(adapters, shapes, dtype=torch.bfloat16, device=device)
    assert layers.keys() == {name for adapter in adapters for name in adapter.linears}
    server = LinearLora(model, layers, kg)
    ids, slots = torch.randint(40, (3, 4), device=device), (1, -1, 0)
    mapping = torch.tensor(slots, dtype=torch.int32, device=device).repeat_interleave(4)
    with torch.no_grad():
        before = model(ids).logits
        with server.batch(mapping):
            served = model(ids).logits
            with pytest.raises(ValueError, match=r"token_lora_mapping: got \[12\], wanted \[4\]"):
                model(ids[:1])
        assert torch.equal(model(ids).logits, before) and torch.equal(served[1], before[1])
        for row, slot in enumerate(slots):
            one = bare if slot < 0 else adapted[slot]
            dtypes = torch.float64, torch.bfloat16
            truth, rough = (copy.deepcopy(one).to(device, dtype)(ids[row : row + 1]).logits[0] for dtype in dtypes)
            assert (served[row] - truth).abs().max() <= 2 * (rough - truth).abs().max()
            assert slot < 0 or (truth - before[row]).abs().max() > 4 * (rough - truth).abs().max()
    name, layer = next(iter(layers.items()))
    model.router = Router(32, 40).to(model.lm_head.weight)
    for bad, words in (
        ({"router": layers["lm_head"]}, "router: got Router, wanted a Linear or an Embedding of the model, which gives rows"),
        ({"model.x": layer}, "model.x: got no such module"),
        ({"model.norm": layer}, "model.norm: got LlamaRMSNorm, wanted a Linear"),
        ({"lm_head": layer}, r"lm_head: got factors .*, wanted \[r, 32\] and \[40, r\]"),
        ({name: layer._replace(a=(layer.a[0].float(),))}, "got .*torch.float32 on"),
        ({name: layer._replace(offset_start=1)}, "from column 1 on"),
        ([layer], "wanted a model of transformers and what"),
        ({**layers, name: layer._replace(a=(layer.a[0][:1],), b=(layer.b[0][:1],))}, "got different numbers of adapters"),
    ):
        with pytest.raises(ValueError, match=words):
            LinearLora(model, bad, kg)
    with pytest.raises(ValueError, match="adapters of PEFT on it"):
        LinearLora(adapted[0], layers, kg)


def test_what_memory_and_base_weights_hold(scene: Scene) -> None:
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 1}
    name = "m.q.lora_{}.weight"
    good = {name.format("A"): torch.ones(2, 4), name.format("B"): torch.ones(4, 2)}
    for tensors, words in (
        ({**good, name.format("A"): torch.ones(2, 4).to_sparse()}, "got Tensor, torch.sparse_coo, on cpu, wanted a plain tensor"),
        ({**good, name.format("A"): torch.ones(2, 4, device="meta")}, "on meta"),
        ({**good, name.format("A"): [1]}, "got list, wanted a plain"),
        ({**good, name.format("A"): torch.ones(2, 4).int()}, "got int32, wanted one of F64"),
        ({**good, name.format("A"): torch.full((2, 4), torch.nan)}, "NaN"),
        ({**good, name.format("A"): torch.ones(3, 4)}, r"lora_A \[3, 4\] and lora_B \[4, 2\]"),
        ({name.format("A"): torch.ones(3, 4), name.format("B"): torch.ones(4, 3)}, "got rank 3, wanted 2"),
        ({**good, "m.q.lora_embedding_A": torch.ones(2, 4)}, "wanted a linear layer or an embedding"),
        ({f"m.layers.0.mlp.experts.lora_embedding_{s}": torch.ones(2, 4) for s in "AB"}, "none on routed experts"),
        ([good], "tensors: got list"),
    ):
        with pytest.raises(AdapterError, match=f"mine: .*{words}"):
            read_adapter(AdapterFiles(config, tensors, "mine"), None)  # type: ignore[arg-type]
    with pytest.raises(AdapterError, match="configuration: got list"):
        read_adapter(AdapterFiles([], good), None)  # type: ignore[arg-type]
    with pytest.raises(AdapterError, match="a saved weight of the base model, and no base_weights"):
        read_adapter(scene.folder, expert_shape(scene.model))
    for base, words in (
        ({}, "wanted lm_head.weight among base_weights"),
        ({**scene.base, "lm_head.weight": scene.base["lm_head.weight"] + 1}, "that is not the base model's lm_head.weight"),
        ({**scene.base, "lm_head.weight": scene.base["lm_head.weight"].to("meta")}, "on meta for lm_head.weight in base_weights"),
    ):
        with pytest.raises(AdapterError, match=words):
            read_adapter(scene.folder, expert_shape(scene.model), base_weights=base)
    before = read_adapter(AdapterFiles(config, good), None).linears["m.q"]
    for tensor in good.values():  # as a trainer does it
        tensor.mul_(3)
    assert (before.a == 1).all() and (before.b == 0.5).all()
    gate = {f"model.layers.0.mlp.gate.lora_{side}.weight": torch.ones(size) for side, size in (("A", (8, 16)), ("B", (4, 8)))}
    own = {"target_parameters": ["gate.weight"], "rank_pattern": {"gate.weight": 8}}  # 4 experts times 2 it only seems to be
    assert read_adapter(AdapterFiles({**config, **own}, gate), ExpertShape(4, 16, 12), allow_empty=True).linears
    assert stack_adapters([scene.read()], expert_shape(scene.model), dtype=torch.bfloat16).keys() == {0, 1}
