"""Adapter folders that are changed by chance: each is read as a second reading of its files says, or refused; nothing else.

The second reading is written on its own and knows less: what it does not know it calls unknown, and then only an error is right.
So a tensor that is left out, overwritten or taken for another shows, as does a setting that passes unseen.
"""

from __future__ import annotations

import json
import os
import random
import re
from pathlib import Path
from typing import Any, Callable

import pytest
import torch

pytest.importorskip("safetensors")
from safetensors.torch import load_file, save_file

from kernelgen.integrations.peft import Adapter, AdapterError, ExpertShape, read_adapter, stack_adapters

SHAPE = ExpertShape(num_experts=2, hidden=6, intermediate=4)
E, H, INTER = SHAPE
R = 2
CONFIG = {
    "peft_type": "LORA",
    "r": R,
    "lora_alpha": 3,
    "use_rslora": False,
    "bias": "none",
    "lora_dropout": 0.0,
    "use_dora": False,
    "rank_pattern": {},
    "alpha_pattern": {"layers.0.mlp.experts.0.up_proj": 5},
    "target_modules": ["up_proj"],
    "modules_to_save": None,
    "init_lora_weights": True,
    "base_model_name_or_path": None,
}
Config = dict[str, Any]
Tensors = dict[str, torch.Tensor]
# (layer, "gate", "up" or "down") -> [E, out, in], and (-1, name) of a linear layer -> [out, in]
Updates = dict[tuple[int, str], torch.Tensor]


# Folders to begin with.


def pair(name: str, a: torch.Tensor, b: torch.Tensor) -> Tensors:
    return {f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b}


def fused() -> Tensors:
    path, new = "base_model.model.model.layers.1.mlp.experts", torch.randn
    return pair(path, new(E * R, INTER), new(H, R * E)) | pair(f"{path}.base_layer", new(E * R, H), new(2 * INTER, R * E))


def single() -> Tensors:
    tensors: Tensors = {}
    for e in range(E):
        for name, (wide, tall) in {"gate_proj": (H, INTER), "up_proj": (H, INTER), "down_proj": (INTER, H)}.items():
            path = f"base_model.model.model.layers.0.mlp.experts.{e}.{name}"
            tensors |= pair(path, torch.randn(R, wide), torch.randn(tall, R))
    return tensors


def stacked() -> Tensors:
    path, new = "base_model.model.model.layers.3.block_sparse_moe.experts", torch.randn
    return pair(f"{path}.w1", new(E, R, H), new(E, INTER, R)) | pair(f"{path}.w2", new(E, R, INTER), new(1, H, R))


def attention() -> Tensors:
    return pair("base_model.model.model.layers.0.self_attn.q_proj", torch.randn(R, H), torch.randn(H, R))


# The second reading.

EVIL = ("(a|a)*b", "(.*)*x", "(a?){50}a{50}z")  # patterns that match no name here
PARTS = {"gate_proj": "gate", "up_proj": "up", "down_proj": "down", "w1": "gate", "w3": "up", "w2": "down"}
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
NAME = re.compile(r"(base_model\.model\.)?(.+)\.lora_([AB])(\.default)?\.weight")
ROUTED = re.compile(r"model\.layers\.(0|[1-9]\d*)\.((?!\w*experts)[a-z_]\w*\.)*?(?:deepspeed_)?(experts.*)")


def second_reading(folder: Path) -> Updates | None:
    """What the two files say, None: unknown."""
    files = folder / "adapter_config.json", folder / "adapter_model.safetensors"
    if not all(os.path.isfile(file) for file in files):
        return None
    try:
        config, tensors = json.loads(files[0].read_text()), load_file(files[1])
    except Exception:
        return None
    targets: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        match = NAME.fullmatch(name)
        if match is None or tensor.dtype not in FLOATS or match[3] in targets.setdefault(match[2], {}):
            return None
        targets[match[2]][match[3]] = tensor.float()
    if not known(config) or any(len(sides) < 2 for sides in targets.values()):
        return None
    updates: Updates = {}
    for target, sides in targets.items():
        if re.search("expert|moe", target) and "shared" not in target:
            match = ROUTED.fullmatch(target)
            if match is None or not (sides["A"].isfinite().all() and sides["B"].isfinite().all()):
                return None
            claims = claimed(match[3], sides["A"].double(), sides["B"].double(), config["r"])
            if claims is None:
                return None
            for part, expert, update in claims:
                whole = updates.setdefault((int(match[1]), part), torch.full_like(update.expand(E, -1, -1), torch.nan))
                rows = slice(None) if expert is None else slice(expert, expert + 1)
                if not whole[rows].isnan().all() or not len(whole[rows]):
                    return None
                named = re.fullmatch(r".*experts(\.base_layer)*", target)
                parameter = "down_proj" if part == "down" else "gate_up_proj"
                whole[rows] = update * scaling(config, f"{target.split('.base_layer')[0]}.{parameter}" if named else target)
        elif sides["A"].dim() == sides["B"].dim() == 2:
            if len(sides["A"]) != config["r"] or sides["B"].shape[1] != config["r"]:
                return None
            updates[-1, target] = sides["B"].double() @ sides["A"].double() * scaling(config, target)
    if not any(layer >= 0 for layer, _ in updates):
        return None
    return {key: update.nan_to_num(nan=0.0) if key[0] >= 0 else update for key, update in updates.items()}


def known(config: Any) -> bool:
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        return False
    numbers = [config.get("r"), config.get("lora_alpha"), *(config.get("alpha_pattern") or {"": 1}).values()]
    if not all(type(number) in (int, float) and abs(number) < 1e36 for number in numbers) or type(numbers[0]) is not int:
        return False
    free = {"r", "lora_alpha", "alpha_pattern", "lora_dropout", "target_modules", "use_rslora", "base_model_name_or_path"}
    neutral = (
        value in (None, False, "", [], {})
        or key in free
        or same(value, CONFIG.get(key))
        or (key, value) == ("rank_pattern", {"x": 1})
        for key, value in config.items()
    )
    return all(neutral) and config.get("use_rslora") in (True, False, None)


def same(value: Any, other: Any) -> bool:
    return type(value) is type(other) and bool(value == other)


def scaling(config: Config, target: str) -> float:
    alpha = config["lora_alpha"]
    for pattern, own in (config.get("alpha_pattern") or {}).items():
        if pattern not in EVIL and re.match(rf"(.*\.)?({pattern})$", target):
            alpha = own
            break
    return float(alpha) / (config["r"] ** 0.5 if config.get("use_rslora") else config["r"])


def claimed(name: str, a: torch.Tensor, b: torch.Tensor, r: int) -> list[tuple[str, int | None, torch.Tensor]] | None:
    """(part, expert or None for all, update) of one pair."""
    if match := re.fullmatch(r"experts\.(?:(0|1)\.)?(w[123]|(?:gate|up|down)_proj)", name):
        part, dims = PARTS[match[2]], 3 if match[1] is None else 2
        wide, tall = (INTER, H) if part == "down" else (H, INTER)
        fits = a.dim() == b.dim() == dims and (a.shape[-2:], b.shape[-2:]) == ((r, wide), (tall, r))
        if not fits or (dims == 3 and not {len(a), len(b)} <= {1, E}):
            return None
        return [(part, None if match[1] is None else int(match[1]), (b @ a).expand(E if dims == 3 else 1, -1, -1))]
    if re.fullmatch(r"experts(\.base_layer)*", name) and a.dim() == b.dim() == 2 and (len(a), b.shape[1]) == (r * E, r * E):
        update = torch.stack([b[:, e::E] @ a[r * e : r * e + r] for e in range(E)])
        update = update if tuple(update.shape[1:]) in ((2 * INTER, H), (H, INTER)) else update.transpose(1, 2)
        if tuple(update.shape[1:]) == (2 * INTER, H):
            return [("gate", None, update[:, :INTER]), ("up", None, update[:, INTER:])]
        if tuple(update.shape[1:]) == (H, INTER):
            return [("down", None, update)]
    return None


def assert_same(adapter: Adapter, wanted: Updates) -> None:
    read = {(layer, part): factors for layer, parts in adapter.layers.items() for part, factors in parts.items()}
    read |= {(-1, name): factors for name, factors in adapter.linears.items()}
    assert read.keys() == wanted.keys()
    for key, (a, b) in read.items():
        error = (b.double() @ a.double() - wanted[key]).abs()
        assert (error <= 4 * torch.finfo(torch.float32).eps * (b.double().abs() @ a.double().abs())).all()


# Changes.

RENAMES = """
experts>expert experts>experts.experts experts>shared_experts experts>exprts mlp>moe .0.>.00. .0.>.1. .1.>.2. layers.0>layers.1
gate_proj>w1 up_proj>w3 w1>gate_proj w2>w3 down_proj>up_proj up_proj>gate_up_proj model.layers>mtp.layers layers>stages
base_model.model.> lora_A>lora_a lora_B>lora_A lora_A>lora_embedding_A .weight>.default.weight .weight> .weight>.bias
.base_layer> experts>experts.base_layer experts>deepspeed_experts experts.>experts.1.
"""
VALUES: list[Any] = [None, True, False, 0, 1, -1, 2.5, 1e300, 10**400, "", "x", "(", [], [1], {}, {"x": 1}, {"(": 1}, {"x": None}]
DTYPES = [*FLOATS, torch.int8, torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn, torch.float8_e5m2]


def some(rng: random.Random, tensors: Tensors) -> list[str]:
    """One tensor, its pair, or all."""
    name = rng.choice(sorted(tensors))
    twins = [name, name.replace("lora_B", "lora_A") if "lora_B" in name else name.replace("lora_A", "lora_B")]
    return rng.choice([[name], [t for t in dict.fromkeys(twins) if t in tensors], sorted(tensors)])


def rename(rng: random.Random, config: Config, tensors: Tensors) -> None:
    old, new = rng.choice(RENAMES.split()).split(">")
    for name in some(rng, tensors):
        tensors[name.replace(old, new, 1)] = tensors.pop(name)


def copy(rng: random.Random, config: Config, tensors: Tensors) -> None:
    old, new = rng.choice(RENAMES.split()).split(">")
    for name in some(rng, tensors):
        tensors[name.replace(old, new, 1)] = tensors[name].clone()


def drop(rng: random.Random, config: Config, tensors: Tensors) -> None:
    for name in some(rng, tensors)[: len(tensors) - 1]:
        del tensors[name]


def retype(rng: random.Random, config: Config, tensors: Tensors) -> None:
    dtype = rng.choice(DTYPES)
    for name in some(rng, tensors):
        tensors[name] = (tensors[name].real if tensors[name].is_complex() else tensors[name]).to(dtype)


def reshape(rng: random.Random, config: Config, tensors: Tensors) -> None:
    how = rng.choice(
        [
            lambda t: t.mT.contiguous() if t.dim() > 1 else t,
            lambda t: t[:-1].clone() if t.dim() else t,
            lambda t: t[:1].clone() if t.dim() else t,
            lambda t: torch.cat([t, t]) if t.dim() else t,
            lambda t: t[None].clone(),
            lambda t: t.flatten()[0].clone() if t.numel() else t,
            lambda t: t[:0].clone() if t.dim() else t,
        ]
    )
    for name in some(rng, tensors):
        tensors[name] = how(tensors[name])


def revalue(rng: random.Random, config: Config, tensors: Tensors) -> None:
    value = rng.choice([torch.nan, torch.inf, 3e38, 1e-30, 0.0, -2.0])
    for name in some(rng, tensors):
        tensor = tensors[name]
        if tensor.is_floating_point() and tensor.dtype.itemsize > 1 and tensor.numel():
            tensor.flatten()[rng.randrange(tensor.numel())] = value
            tensor.view(-1)[rng.randrange(tensor.numel())] = value


def trade(rng: random.Random, config: Config, tensors: Tensors) -> None:
    one, two = rng.choice(sorted(tensors)), rng.choice(sorted(tensors))
    tensors[one], tensors[two] = tensors[two], tensors[one]


def more(rng: random.Random, config: Config, tensors: Tensors) -> None:
    extra = {"model.embed_tokens.lora_embedding_A": torch.ones(2), "lm_head.base_layer.weight": torch.ones(2)}
    extra |= {"model.layers.0.mlp.experts.0.up_proj.lora_magnitude_vector": torch.ones(2), "a": torch.ones(2)}
    choice = rng.choice([extra, single(), stacked(), attention(), attention()])
    tensors |= {rng.choice(sorted(extra)): torch.ones(2)} if choice is extra else choice


def setting(rng: random.Random, config: Config, tensors: Tensors) -> None:
    config[rng.choice([*CONFIG, "lora_bias", "later"])] = rng.choice(VALUES)


def unset(rng: random.Random, config: Config, tensors: Tensors) -> None:
    config.pop(rng.choice([*CONFIG]), None)


def rescale(rng: random.Random, config: Config, tensors: Tensors) -> None:
    own = {rng.choice([*EVIL, "w1", "up_proj", r".*experts\.1\..*", "layers.0.*", "(gate|up)_proj"]): rng.choice([1, 7.5, -2])}
    config |= rng.choice([{"lora_alpha": 7.5}, {"use_rslora": True}, {"alpha_pattern": own}, {"alpha_pattern": None}])


def flip(rng: random.Random, folder: Path) -> None:
    file = folder / rng.choice(["adapter_config.json", "adapter_model.safetensors"])
    data = bytearray(file.read_bytes())
    for _ in range(rng.choice([1, 1, 5])):
        data[rng.randrange(len(data))] = rng.randrange(256)
    file.write_bytes(data[: rng.choice([len(data)] * 3 + [rng.randrange(len(data))])])


def special(rng: random.Random, folder: Path) -> None:
    file = folder / rng.choice(["adapter_config.json", "adapter_model.safetensors"])
    file.unlink()
    rng.choice([lambda: None, lambda: os.mkfifo(file), file.mkdir, file.touch, lambda: file.symlink_to(file)])()


ON_TENSORS: list[Callable[[random.Random, Config, Tensors], None]] = [
    *[rename, rename, rename, copy, drop, retype, reshape, revalue, trade, more, setting, setting, unset, rescale, rescale]
]


def test_hostile_folders(tmp_path: Path) -> None:
    rng = random.Random(0)
    torch.manual_seed(0)
    counts = {"read": 0, "refused": 0}
    for number in range(600):
        folder = tmp_path / str(number)
        folder.mkdir()
        config, tensors = json.loads(json.dumps(CONFIG)), rng.choice([fused, single, stacked])()
        changes = rng.choices(ON_TENSORS, k=rng.choice([0, 1, 1, 2, 3]))
        for change in changes:
            change(rng, config, tensors)
        (folder / "adapter_config.json").write_text(json.dumps(config))
        save_file({name: tensor.clone() for name, tensor in tensors.items()}, folder / "adapter_model.safetensors")
        if not changes or rng.random() < 0.15:
            rng.choice([flip, flip, special])(rng, folder)
        where = f"{number}: {[change.__name__ for change in changes]}: {config}: { {n: t.shape for n, t in tensors.items()} }"
        try:
            adapter = read_adapter(folder, SHAPE)
        except (AdapterError, FileNotFoundError) as error:
            assert str(folder) in str(error), where
            counts["refused"] += 1
            continue
        wanted = second_reading(folder)
        assert wanted is not None, where
        assert_same(adapter, wanted)
        counts["read"] += 1
        try:
            layers = stack_adapters([adapter], SHAPE, dtype=torch.float16)
        except AdapterError:
            continue
        assert all(buffer.isfinite().all() for layer in layers.values() for half in layer[:2] for side in half for buffer in side)
    assert counts["read"] > 100 and counts["refused"] > 200, counts


@pytest.mark.parametrize("make", [fused, single, stacked])
def test_both_readings_of_untouched_folders(make: Callable[[], Tensors], tmp_path: Path) -> None:
    torch.manual_seed(0)
    (tmp_path / "adapter_config.json").write_text(json.dumps(CONFIG))
    save_file(make() | attention(), tmp_path / "adapter_model.safetensors")
    adapter, wanted = read_adapter(tmp_path, SHAPE), second_reading(tmp_path)
    assert wanted is not None and adapter.other == ("model.layers.0.self_attn.q_proj",)
    assert_same(adapter, wanted)
