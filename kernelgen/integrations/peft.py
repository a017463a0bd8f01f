"""LoRA adapters of mixture-of-experts layers, from the files that PEFT writes to the buffers that ``moe_lora`` reads.

Two layouts of the experts exist in such files, and both are read:

* fused (transformers 5, ``target_parameters``): one pair of factors for all E experts of a projection. ``lora_A`` is
  [E * r, in], the expert slowest; ``lora_B`` is [out, r * E], the expert *fastest*. Files from before PEFT 0.19 hold the two
  factors in each other's role: ``lora_A`` [E * r, out], ``lora_B`` [in, r * E].
* one module per expert (transformers 4): ``lora_A`` [r, in] and ``lora_B`` [out, r] under ``experts.<e>.gate_proj`` and so on.

Nothing of PEFT itself is needed, only safetensors.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections import defaultdict
from pathlib import Path
from typing import Any, Iterable, Mapping, NamedTuple, Sequence

import torch

_FUSED = re.compile(
    r"(?P<module>.*\blayers\.(?P<layer>\d+)\..*\bexperts)(\.base_layer)*\.lora_(?P<side>[AB])\.weight"
)
_SINGLE = re.compile(
    r"(?P<module>.*\blayers\.(?P<layer>\d+)\..*\bexperts\.(?P<expert>\d+)\.(?P<projection>\w+))"
    r"\.lora_(?P<side>[AB])\.weight"
)
_SLICES = {
    "gate_proj": "gate",
    "w1": "gate",
    "up_proj": "up",
    "w3": "up",
    "down_proj": "down",
    "w2": "down",
}

# Settings under which an adapter is more than x . A^T . B^T * scaling on top of an unchanged base model.
_REFUSED = {
    "use_dora": "its magnitudes rescale the base weight",
    "lora_bias": "the kernels add no bias",
    "fan_in_fan_out": "the factors are transposed",
    "modules_to_save": "it replaces modules of the base model",
    "trainable_token_indices": "it replaces embeddings of the base model",
    "layer_replication": "it changes the layers of the base model",
    "alora_invocation_tokens": "it switches on in the middle of a sequence",
    "use_qalora": "it pools its input",
    "use_bdlora": "its factors are block-diagonal shards",
    "arrow_config": "it routes between adapters",
    "kasa_config": "its factors have singular values between them",
    "monteclora_config": "its factors are sampled",
}
# Initialisations that leave the base weights alone; the others (pissa, olora, corda, loftq, ...) subtract from them.
_PLAIN_INITS = (True, False, None, "gaussian", "eva", "orthogonal")


class AdapterError(ValueError):
    """An adapter that cannot be served as it is written; the message names the folder and the reason."""


class ExpertShape(NamedTuple):
    """The experts of a model: ``hidden`` is the width of x, ``intermediate`` the width of gate and of up."""

    num_experts: int
    hidden: int
    intermediate: int


class Factors(NamedTuple):
    """One low-rank update of E experts, scaling folded into ``b``: delta W[e] = b[e] . a[e]."""

    a: torch.Tensor  # [E, r, in] float32
    b: torch.Tensor  # [E, out, r] float32


@dataclasses.dataclass(frozen=True)
class Adapter:
    """One adapter: ``layers[i]`` maps "gate", "up" and "down" of decoder layer i to their factors, where it has any.

    ``other`` names the tensors that belong to no routed expert (attention, shared experts): they are the caller's to serve.
    """

    name: str
    layers: Mapping[int, Mapping[str, Factors]]
    other: tuple[str, ...]

    @property
    def rank(self) -> int:
        """The largest rank in it, 0 if it has no experts."""
        return max(
            (f.a.shape[1] for layer in self.layers.values() for f in layer.values()), default=0
        )


class SliceBuffers(NamedTuple):
    """``lora_a`` and ``lora_b`` of one ``moe_lora`` call, one tensor a slice."""

    a: tuple[torch.Tensor, ...]  # [L, E, rank, in]
    b: tuple[torch.Tensor, ...]  # [L, E, out, rank]


class LayerBuffers(NamedTuple):
    """All adapters of one decoder layer; slot l of the buffers is adapter l."""

    gate_up: SliceBuffers  # two slices, gate and up
    down: SliceBuffers  # one slice
    adapter_enabled: torch.Tensor  # [L] int32, 0: the adapter leaves this layer alone


def read_adapter(folder: str | Path, shape: ExpertShape) -> Adapter:
    """Read ``adapter_config.json`` and ``adapter_model.safetensors`` of a LoRA adapter.

    Ranks may differ from one projection to another (``rank_pattern``); the scaling is alpha / r, or alpha / sqrt(r) with
    ``use_rslora``, alpha from ``alpha_pattern`` where a pattern matches.

    Raises:
        AdapterError: the adapter is of a kind that the kernels do not compute, or its tensors do not fit ``shape``.
        FileNotFoundError: the folder lacks one of the two files.
    """
    from safetensors.torch import load_file

    folder = Path(folder)
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    _check_config(folder, config)
    tensors = load_file(folder / "adapter_model.safetensors")
    if _version(config) < (0, 19):
        shape_of = {
            "gate_up": (2 * shape.intermediate, shape.hidden),
            "down": (shape.hidden, shape.intermediate),
        }
    else:
        shape_of = {
            "gate_up": (shape.hidden, 2 * shape.intermediate),
            "down": (shape.intermediate, shape.hidden),
        }

    layers: dict[int, dict[str, Factors]] = defaultdict(dict)
    singles: dict[tuple[int, str], dict[int, Factors]] = defaultdict(dict)
    other = []
    for key, a, b in _pairs(folder, tensors):
        name = key.removeprefix("base_model.model.")
        if match := _FUSED.fullmatch(name):
            part = next(
                (p for p, widths in shape_of.items() if widths == (a.shape[1], b.shape[0])), None
            )
            if part is None or a.shape[0] != b.shape[1] or a.shape[0] % shape.num_experts:
                raise AdapterError(
                    f"{folder}: {key}: got lora_A {list(a.shape)} and lora_B {list(b.shape)}, wanted the factors of "
                    f"gate_up_proj or down_proj of {shape}"
                )
            rank = a.shape[0] // shape.num_experts
            scaling = _scaling(config, f"{match['module']}.{part}_proj", rank)
            fused = _fused(a, b, shape.num_experts, scaling, swapped=_version(config) < (0, 19))
            layers[int(match["layer"])].update(_split(part, fused))
        elif match := _SINGLE.fullmatch(name):
            slice_name = _SLICES.get(match["projection"])
            if slice_name is None:
                raise AdapterError(
                    f"{folder}: {key}: got projection {match['projection']}, wanted {', '.join(_SLICES)}"
                )
            scaling = _scaling(config, match["module"], a.shape[0])
            singles[int(match["layer"]), slice_name][int(match["expert"])] = Factors(a, b * scaling)
        else:
            other.append(name.removesuffix(".lora_A.weight"))
    for (layer, slice_name), experts in singles.items():
        layers[layer][slice_name] = _stack_experts(folder, experts, slice_name, shape)
    return Adapter(folder.name, {i: layers[i] for i in sorted(layers)}, tuple(sorted(other)))


def stack_adapters(
    adapters: Sequence[Adapter],
    shape: ExpertShape,
    *,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    rank: int | None = None,
    max_loras: int | None = None,
) -> dict[int, LayerBuffers]:
    """The buffers of every layer that some adapter changes; adapter l of ``adapters`` is slot l.

    Smaller ranks are padded with zeros. Where no adapter has an ``a`` of its own for gate and for up (the fused layout),
    both slices share one tensor.

    Args:
        dtype: bfloat16 or float16, that of the activations.
        rank: rank of the buffers; None: the largest of the adapters, rounded up to 8 so that rows stay 16-byte aligned.
        max_loras: slots L; None: as many as adapters. Slots without an adapter are zero and disabled.

    Raises:
        AdapterError: an adapter has a larger rank than the buffers, or there are more adapters than slots.
    """
    widest = max((adapter.rank for adapter in adapters), default=0)
    rank = rank or max(8, -(-widest // 8) * 8)
    slots = len(adapters) if max_loras is None else max_loras
    if len(adapters) > slots or widest > rank:
        raise AdapterError(
            f"got {len(adapters)} adapters of rank up to {widest}, wanted at most {slots} of rank up to {rank}"
        )

    def stack(layer: int, name: str, side: str) -> torch.Tensor:
        width = {"gate": shape.hidden, "up": shape.hidden, "down": shape.intermediate}[name]
        height = shape.hidden if name == "down" else shape.intermediate
        size = (rank, width) if side == "a" else (height, rank)
        buffer = torch.zeros(slots, shape.num_experts, *size, dtype=dtype, device=device)
        for slot, adapter in enumerate(adapters):
            factors = adapter.layers.get(layer, {}).get(name)
            if factors is not None:
                source = getattr(factors, side)
                buffer[slot, :, : source.shape[1], : source.shape[2]] = source.to(device)
        return buffer

    def buffers(layer: int) -> LayerBuffers:
        parts = [adapter.layers.get(layer, {}) for adapter in adapters]
        shared = all(
            p["gate"].a is p["up"].a if "gate" in p and "up" in p else not p.keys() & {"gate", "up"}
            for p in parts
        )
        gate_a = stack(layer, "gate", "a")
        up_a = gate_a if shared else stack(layer, "up", "a")
        enabled = torch.zeros(slots, dtype=torch.int32)
        enabled[: len(parts)] = torch.tensor([bool(p) for p in parts], dtype=torch.int32)
        return LayerBuffers(
            SliceBuffers((gate_a, up_a), (stack(layer, "gate", "b"), stack(layer, "up", "b"))),
            SliceBuffers((stack(layer, "down", "a"),), (stack(layer, "down", "b"),)),
            enabled.to(device),
        )

    return {
        layer: buffers(layer)
        for layer in sorted({i for adapter in adapters for i in adapter.layers})
    }


def _check_config(folder: Path, config: Mapping[str, Any]) -> None:
    if config.get("peft_type") != "LORA":
        raise AdapterError(f"{folder}: peft_type: got {config.get('peft_type')!r}, wanted 'LORA'")
    for setting, why in _REFUSED.items():
        if config.get(setting):
            raise AdapterError(f"{folder}: {setting}={config[setting]!r} cannot be served: {why}")
    if config.get("bias", "none") != "none":
        raise AdapterError(f"{folder}: bias: got {config['bias']!r}, wanted 'none'")
    if config.get("init_lora_weights", True) not in _PLAIN_INITS:
        raise AdapterError(
            f"{folder}: init_lora_weights={config['init_lora_weights']!r} changed the base weights; save the adapter with "
            "PEFT's path_initial_model_for_weight_conversion"
        )


def _version(config: Mapping[str, Any]) -> tuple[int, int]:
    """(major, minor) of the PEFT that wrote the file; it says so since 0.18."""
    match = re.match(r"(\d+)\.(\d+)", config.get("peft_version") or "0.0")
    return (int(match[1]), int(match[2])) if match else (0, 0)


def _scaling(config: Mapping[str, Any], target: str, rank: int) -> float:
    alpha = config["lora_alpha"]
    for pattern, value in (config.get("alpha_pattern") or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", target):
            alpha = value
            break
    return float(alpha / (math.sqrt(rank) if config.get("use_rslora") else rank))


def _pairs(
    folder: Path, tensors: Mapping[str, torch.Tensor]
) -> Iterable[tuple[str, torch.Tensor, torch.Tensor]]:
    """(name of lora_A, lora_A, lora_B) as float32; every tensor belongs to exactly one such pair."""
    for key in sorted(tensors):
        twin = (
            key.replace("lora_A", "lora_B") if "lora_A" in key else key.replace("lora_B", "lora_A")
        )
        if twin == key or twin not in tensors:
            raise AdapterError(f"{folder}: {key}: got one factor, wanted lora_A and lora_B")
        if "lora_A" in key:
            yield key, tensors[key].float(), tensors[twin].float()


def _fused(
    a: torch.Tensor, b: torch.Tensor, num_experts: int, scaling: float, *, swapped: bool
) -> Factors:
    a = a.view(num_experts, -1, a.shape[1])  # [E, r, in]
    b = b.view(b.shape[0], -1, num_experts).permute(2, 0, 1)  # [E, out, r]
    if swapped:
        a, b = b.transpose(1, 2), a.transpose(1, 2)
    return Factors(a, b * scaling)


def _split(part: str, fused: Factors) -> dict[str, Factors]:
    if part == "down":
        return {"down": fused}
    gate, up = fused.b.chunk(2, dim=1)
    return {"gate": Factors(fused.a, gate), "up": Factors(fused.a, up)}


def _stack_experts(
    folder: Path, experts: Mapping[int, Factors], name: str, shape: ExpertShape
) -> Factors:
    """Experts that an adapter leaves out, and ranks below the largest, are zeros."""
    width, height = (
        (shape.hidden, shape.intermediate) if name != "down" else (shape.intermediate, shape.hidden)
    )
    rank = max(factors.a.shape[0] for factors in experts.values())
    a = torch.zeros(shape.num_experts, rank, width)
    b = torch.zeros(shape.num_experts, height, rank)
    for expert, factors in experts.items():
        r = factors.a.shape[0]
        if (
            expert >= shape.num_experts
            or factors.a.shape != (r, width)
            or factors.b.shape != (height, r)
        ):
            raise AdapterError(
                f"{folder}: {name} of expert {expert}: got lora_A {list(factors.a.shape)} and lora_B "
                f"{list(factors.b.shape)}, wanted the factors of {shape}"
            )
        a[expert, :r], b[expert, :, :r] = factors.a, factors.b
    return Factors(a, b)
