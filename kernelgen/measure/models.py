"""Shapes of models, as far as their adapters and experts go: the mixtures of experts and the linear layers that suites span."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, Mapping, Sequence

from kernelgen.core.diagnostics import failure
from kernelgen.core.read import parse_json, read_file

Projections = Literal["w13", "w2"]


@dataclasses.dataclass(frozen=True)
class Projection:
    """Sizes of one LoRA pair of an expert: K inputs, N outputs for each of S slices."""

    k: int
    n: int
    slices: int
    weighted: bool  # a row of x per pair, times the routing weight


@dataclasses.dataclass(frozen=True)
class Model:
    """The experts of a layer."""

    name: str
    hidden: int
    intermediate: int  # of one expert, on one GPU
    experts: int
    top_k: int
    gated: bool = True  # two slices, gate and up

    def projection(self, site: Projections) -> Projection:
        """The sizes at ``site``, which is w13 or w2."""
        if site == "w13":
            return Projection(self.hidden, self.intermediate, 2 if self.gated else 1, False)
        return Projection(self.intermediate, self.hidden, 1, True)


MODELS = {
    model.name: model
    for model in (
        Model("qwen3-30b-a3b", 2048, 768, 128, 8),
        Model("qwen3-235b-a22b", 4096, 1536, 128, 8),
        Model("qwen3.5-35b-a3b", 2048, 512, 256, 8),
        Model("deepseek-v3", 7168, 2048, 256, 8),
        Model("gpt-oss-20b", 2880, 2880, 32, 4),
        Model("gpt-oss-120b", 2880, 2880, 128, 4),
        Model("mixtral-8x7b", 4096, 14336, 8, 2),
        Model("olmoe-1b-7b", 2048, 1024, 64, 8),
        Model("glm-4.5-air", 4096, 1408, 128, 8),
        Model("nemotron-3-nano", 2688, 1856, 128, 6, gated=False),
        Model("tiny", 256, 128, 8, 2),
    )
}


@dataclasses.dataclass(frozen=True)
class Layer:
    """A linear layer: K inputs, and the outputs of each of its slices."""

    k: int
    widths: tuple[int, ...]


def _layers(hidden: int, keys: int, intermediate: int) -> Mapping[str, Layer]:
    return MappingProxyType(
        {
            "qkv": Layer(hidden, (hidden, keys, keys)),
            "o": Layer(hidden, (hidden,)),
            "gate_up": Layer(hidden, (intermediate, intermediate)),
            "down": Layer(intermediate, (hidden,)),
        }
    )


LAYERS: Mapping[str, Mapping[str, Layer]] = MappingProxyType(
    {
        "llama-3-8b": _layers(4096, 1024, 14336),
        "llama-3-70b": _layers(8192, 1024, 28672),
        "llama-3-70b-tp8": MappingProxyType(
            {
                "qkv": Layer(8192, (1024, 128, 128)),
                "o": Layer(1024, (8192,)),
                "gate_up": Layer(8192, (3584, 3584)),
                "down": Layer(3584, (8192,)),
            }
        ),
        "tiny": _layers(128, 64, 192),
    }
)


_HIDDEN = ("moe_latent_size", "moe_hidden_size", "hidden_size", "d_model", "n_embd")
_INTERMEDIATE = (
    "moe_intermediate_size",
    "moe_ffn_hidden_size",
    "expert_ffn_hidden_size",
    "intermediate_size",
    "ffn_hidden_size",
)
_EXPERTS = ("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts")
_TOP_K = (
    "num_experts_per_tok",
    "num_experts_per_token",
    "experts_per_token",
    "moe_top_k",
    "moe_topk",
    "moe_k",
    "top_k_experts",
)
_ACTIVATION = ("mlp_hidden_act", "hidden_act", "hidden_activation")


def config_of(path: Path) -> list[Mapping[str, Any]]:
    """A model's ``config.json``, behind the parts that multimodal models keep their language model in.

    Raises:
        Failure: it is no such file.
    """
    try:
        config = parse_json(read_file(path))
    except (OSError, ValueError) as error:
        raise failure("KG070", str(path), f"cannot be read as JSON: {error}", "name a model's config.json") from error
    if not isinstance(config, dict):
        raise failure("KG070", str(path), "wanted an object, as in a model's config.json")
    return [*(config[key] for key in ("text_config", "llm_config") if isinstance(config.get(key), dict)), config]


def has_experts(sources: Sequence[Mapping[str, Any]]) -> bool:
    """Whether a config that ``config_of`` read is of a mixture of experts."""
    return any(source.get(name) for name in _EXPERTS for source in sources)


def model_from_config(path: Path, tp: int = 1) -> Model:
    """The shapes in a model's ``config.json``, for one of ``tp`` tensor-parallel ranks.

    Raises:
        Failure: not a config, not of a mixture of experts, sizes that are none, or not divisible by ``tp``.
    """
    sources = config_of(path)
    config = sources[-1]

    def size(names: Sequence[str]) -> int:
        there = {(name, i): source[name] for name in names for i, source in enumerate(sources) if source.get(name)}
        if not there:
            raise failure("KG070", str(path), f"none of {', '.join(names)}; is it a mixture of experts?")
        (name, first), value = next(iter(there.items()))
        if isinstance(value, list):
            if value != value[:1] * len(value):
                raise failure("KG070", str(path), f"{name} is {value!r:.60}, wanted one number: experts of one kind")
            value = value[0]
        if type(value) is not int or not 0 < value < 1 << 31:
            raise failure("KG070", str(path), f"{name} is {value!r:.60}, wanted a whole number from 1 to 2^31 - 1")
        if names in (_EXPERTS, _TOP_K):  # other names of one number, and no other sizes
            for other, i in there:
                said = there[other, i]
                if i == first and (said[0] if isinstance(said, list) else said) != value:
                    message = f"{name} is {value}, and {other} is {said!r:.60}, wanted one number"
                    raise failure("KG070", str(path), message, "leave out the one that this model does not read")
        return value

    hidden, experts, top_k = size(_HIDDEN), size(_EXPERTS), size(_TOP_K)
    if top_k > experts:
        raise failure("KG070", str(path), f"a token has {top_k} of {experts} experts")
    intermediate = size(_INTERMEDIATE)
    if tp < 1 or intermediate % tp:
        raise failure("KG070", str(path), f"{intermediate} columns of an expert do not divide by tp {tp}")
    activation = next((s[n] for s in sources for n in _ACTIVATION if isinstance(s.get(n), str)), "")
    name = str(
        config.get("_name_or_path") or config.get("model_type") or path.parent.name or path.stem
    )
    name = name.rstrip("/").split("/")[-1] + (f"-tp{tp}" if tp > 1 else "")
    return Model(name, hidden, intermediate // tp, experts, top_k, gated="relu2" not in activation)
