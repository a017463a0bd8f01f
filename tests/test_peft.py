"""Adapters as PEFT writes them, against PEFT itself: what is read, and what is served."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any, Callable

import pytest
import torch

pytest.importorskip("peft")
pytest.importorskip("transformers")
from safetensors.torch import save_file

from kernelgen.demo import models
from kernelgen.demo.compare import Comparison
from kernelgen.demo.serve import Request, serve
from kernelgen.integrations import peft as reader
from kernelgen.integrations.peft import (
    Adapter,
    AdapterError,
    ExpertShape,
    read_adapter,
    stack_adapters,
)
from kernelgen.integrations.transformers import MoeLora, expert_shape

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),  # transformers, of itself
    pytest.mark.filterwarnings(
        "ignore:The following (rank|alpha)_pattern"
    ),  # PEFT looks at modules only
]

SHAPE = ExpertShape(num_experts=3, hidden=10, intermediate=6)
CONFIG = {"peft_type": "LORA", "peft_version": "0.21.2", "r": 2, "lora_alpha": 8}


def write(folder: Path, tensors: dict[str, torch.Tensor], **config: Any) -> Path:
    """An adapter folder as PEFT lays it out."""
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps({**CONFIG, **config}))
    prefixed = {
        f"base_model.model.model.layers.{key}.weight": t.clone() for key, t in tensors.items()
    }
    save_file(prefixed, folder / "adapter_model.safetensors")
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


@pytest.fixture(scope="module", params=list(models.MODELS))
def model(request: pytest.FixtureRequest) -> Any:
    torch.manual_seed(0)
    return models.MODELS[request.param]()


def peft_model(model: Any, folder: Path) -> Any:
    """The model in float64 with one adapter that PEFT has read."""
    from peft import PeftModel

    return PeftModel.from_pretrained(
        copy.deepcopy(model).double(), str(folder), autocast_adapter_dtype=False
    )


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
    """Written for transformers 4; PEFT converts it to the fused layout, here it is read as it stands."""
    shape = expert_shape(model)
    mixtral = model.config.model_type == "mixtral"
    block, names = (
        ("block_sparse_moe", "w1 w3 w2") if mixtral else ("mlp", "gate_proj up_proj down_proj")
    )
    tensors = {}
    for layer in (0, 1):
        for expert in range(shape.num_experts):
            for name in names.split():
                down = name in ("w2", "down_proj")
                out, width = (
                    (shape.hidden, shape.intermediate)
                    if down
                    else (shape.intermediate, shape.hidden)
                )
                key = f"{layer}.{block}.experts.{expert}.{name}"
                tensors[f"{key}.lora_A"], tensors[f"{key}.lora_B"] = torch.randn(
                    4, width
                ), torch.randn(out, 4)
    folder = write(tmp_path / "single", tensors, r=4, target_modules=names.split(), lora_alpha=10)
    adapter = read_adapter(folder, shape)
    for part, wanted in peft_updates(peft_model(model, folder), layer=1).items():
        assert_same_update(adapter, 1, part, wanted)
    gate_a, up_a = stack_adapters([adapter], shape, dtype=torch.bfloat16)[1].gate_up.a
    assert gate_a is not up_a


@pytest.mark.parametrize(
    "version", [None, "0.17.1", "0.18.0.dev0", "0.19.0", "0.21.2.dev0@abc", "1.0.0"]
)
def test_factors_swapped_before_peft_019(version: str | None, tmp_path: Path) -> None:
    swapped = version is None or version.startswith(("0.17", "0.18"))
    e, h, i = SHAPE
    wide, narrow = (2 * i, h) if swapped else (h, 2 * i)
    a, b = torch.randn(e * 2, wide), torch.randn(narrow, 2 * e)
    folder = write(
        tmp_path / "x", {"0.mlp.experts.lora_A": a, "0.mlp.experts.lora_B": b}, peft_version=version
    )
    # as both versions of PEFT write it: o is what lora_B puts out, i what lora_A takes in
    update = torch.einsum(
        "ore,eri->eio" if swapped else "ore,eri->eoi",
        b.double().view(narrow, 2, e),
        a.double().view(e, 2, wide),
    )
    assert_same_update(read_adapter(folder, SHAPE), 0, "gate_up_proj", 4 * update)


def factors(name: str, a: tuple[int, int], b: tuple[int, int]) -> dict[str, torch.Tensor]:
    return {f"0.mlp.{name}.lora_A": torch.ones(a), f"0.mlp.{name}.lora_B": torch.ones(b)}


GOOD = factors("experts", (6, 6), (10, 6))  # down_proj, rank 2


@pytest.mark.parametrize(
    "config, tensors, words",
    [
        ({"peft_type": "LOHA"}, GOOD, "peft_type: got 'LOHA'"),
        ({"use_dora": True}, GOOD, "use_dora=True cannot be served"),
        ({"lora_bias": True}, GOOD, "lora_bias"),
        ({"bias": "all"}, GOOD, "bias: got 'all'"),
        ({"modules_to_save": ["lm_head"]}, GOOD, "modules_to_save"),
        ({"init_lora_weights": "pissa_niter_16"}, GOOD, "changed the base weights"),
        ({}, {"0.mlp.experts.lora_A": torch.ones(6, 6)}, "one factor"),
        ({}, {**GOOD, "0.mlp.experts.lora_magnitude_vector": torch.ones(3)}, "one factor"),
        ({}, factors("experts", (6, 7), (10, 6)), r"lora_A \[6, 7\]"),
        ({}, factors("experts", (5, 6), (10, 5)), r"lora_A \[5, 6\]"),
        ({}, factors("experts", (6, 6), (10, 9)), r"lora_B \[10, 9\]"),
        ({}, factors("experts.3.up_proj", (2, 10), (6, 2)), "expert 3"),
        ({}, factors("experts.0.up_proj", (2, 9), (6, 2)), r"lora_A \[2, 9\]"),
        ({}, factors("experts.0.wx", (2, 10), (6, 2)), "projection wx"),
    ],
)
def test_refused(
    config: dict[str, Any], tensors: dict[str, torch.Tensor], words: str, tmp_path: Path
) -> None:
    with pytest.raises(AdapterError, match=words) as error:
        read_adapter(write(tmp_path / "bad", tensors, **config), SHAPE)
    assert str(tmp_path / "bad") in str(error.value)


def test_buffers(tmp_path: Path) -> None:
    down = read_adapter(write(tmp_path / "down", GOOD), SHAPE)
    both = factors("experts.base_layer", (9, 10), (12, 9))
    later = {key.replace("0.", "1.", 1): tensor for key, tensor in both.items()}
    wide = read_adapter(write(tmp_path / "wide", {**both, **later}), SHAPE)
    layers = stack_adapters([down, wide], SHAPE, dtype=torch.float16, max_loras=3)
    assert list(layers) == [0, 1]
    assert layers[0].adapter_enabled.tolist() == [1, 1, 0]
    assert layers[1].adapter_enabled.tolist() == [0, 1, 0]
    gate_up, down_proj, _ = layers[0]
    assert gate_up.a[0] is gate_up.a[1] and gate_up.a[0].shape == (3, 3, 8, 10)
    assert gate_up.b[0].shape == gate_up.b[1].shape == (3, 3, 6, 8)
    assert gate_up.a[0].sum(dim=(1, 2, 3)).tolist() == [0, 90, 0]
    assert down_proj.b[0].sum(dim=(1, 2, 3)).tolist() == [4 * 60, 0, 0]  # alpha / r is 4
    with pytest.raises(
        AdapterError, match="got 2 adapters of rank up to 3, wanted at most 1 of rank up to 2"
    ):
        stack_adapters([down, wide], SHAPE, dtype=torch.float16, rank=2, max_loras=1)


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
        requests = [
            Request(slot, torch.randint(models.VOCABULARY, (n,)))
            for slot, n in ((0, 5), (-1, 3), (1, 4), (2, 6))
        ]
        self.served, self.steps = serve(self.model, self.server, requests, 1, lambda: None)
        truth = [read_adapter(folder, shape) for folder in folders]
        self.comparison = Comparison(self.model, truth, folders)

    def agrees(self, slot: int) -> bool:
        return self.comparison.compare(slot, self.served, self.steps, lambda: None).agrees


def fresh(name: str) -> Any:
    torch.manual_seed(0)
    return models.MODELS[name]()


@pytest.mark.parametrize("base", ["torch", "generated"])
@pytest.mark.parametrize("name", list(models.MODELS))
def test_served_equals_peft(name: str, base: str, device: str, tmp_path: Path) -> None:
    scene = Scene(fresh(name), device, tmp_path, base=base)
    results = [
        scene.comparison.compare(s, scene.served, scene.steps, lambda: None) for s in (-1, 0, 1, 2)
    ]
    assert all(result.agrees for result in results), results
    # Without its adapter a request would be off by the effect: the comparison could not have missed that.
    assert all(result.effect > 2 * result.allowed for result in results[1:]), results
    assert scene.comparison.untouched(scene.server, scene.steps)
    assert scene.model.get_experts_implementation()[""] != "kernelgen_moe_lora"


def expert_slowest(
    a: torch.Tensor, b: torch.Tensor, num_experts: int, scaling: float, *, swapped: bool
) -> reader.Factors:
    """The way to misread ``lora_B`` that others have shipped."""
    return reader.Factors(
        a.unflatten(0, (num_experts, -1)),
        b.unflatten(1, (num_experts, -1)).transpose(0, 1) * scaling,
    )


def test_wrong_layout_is_seen(device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = reader._fused

    def restore(adapters: list[Adapter]) -> list[Adapter]:
        monkeypatch.setattr(reader, "_fused", right)
        return adapters

    monkeypatch.setattr(reader, "_fused", expert_slowest)
    scene = Scene(fresh("mixtral"), device, tmp_path, restore)
    assert [scene.agrees(slot) for slot in (-1, 0, 1, 2)] == [True, False, False, False]


def test_wrong_adapter_is_seen(device: str, tmp_path: Path) -> None:
    scene = Scene(
        fresh("mixtral"), device, tmp_path, lambda adapters: [adapters[1], adapters[0], adapters[2]]
    )
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
    with pytest.raises(ValueError, match=r'base: got .*, wanted "torch" or "generated"'):
        MoeLora(model, {}, kernels, base="mine")
    model.model.layers[0].mlp.experts.act_fn = torch.nn.GELU()
    with pytest.raises(ValueError, match="got the activation GELU, wanted SiLU"):
        MoeLora(model, {}, kernels, base="generated")
    with pytest.raises(ValueError, match=r"adapters for layers \[7\]"):
        MoeLora(model, {7: None}, kernels)  # type: ignore[dict-item]
