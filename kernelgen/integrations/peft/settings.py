"""``adapter_config.json``: which settings are understood, and what they say of a module's rank and scaling.

Every setting that is not null, false or empty must be known here: it is one that changes no number of a trained adapter, or one
that is computed with, or it is refused by name. So a setting of a later PEFT is refused until someone has read what it does.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import re
from typing import Any, Callable, Generic, Mapping, TypeVar

from .adapter import AdapterError, ExpertShape
from .keys import PARTS
from .patterns import Patterns

# They say what was adapted (the tensors say it again), how it was trained, or how it was initialised.
_CHANGE_NOTHING = {
    "peft_version",
    "revision",
    "task_type",
    "inference_mode",
    "target_modules",
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
    "lora_dropout",
    "loftq_config",
    "eva_config",
    "corda_config",
    "lora_ga_config",
    "velora_config",
    "qalora_group_size",
    "megatron_core",
    "runtime_config",
    "ensure_weight_tying",
}
_READ = {
    "peft_type",
    "r",
    "lora_alpha",
    "rank_pattern",
    "alpha_pattern",
    "use_rslora",
    "bias",
    "init_lora_weights",
    "base_model_name_or_path",
    "auto_mapping",
    "model_type",
    "target_parameters",
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
    "megatron_config": "its factors may be shards",
}
# Initialisations that leave the base weights alone; the others (pissa, olora, corda, loftq, ...) subtract from them.
_PLAIN_INITS = ("gaussian", "eva", "orthogonal", "mica")

# Base models whose gate_up_proj has gate and up in turns, as transformers keeps it: published checkpoints, and classes.
_INTERLEAVED = re.compile(
    r"(openai|unsloth|lmsys)/gpt-oss-(safeguard-)?(20b|120b)(-[\w-]+)?|gpt_oss|GptOss\w*",
    re.IGNORECASE,
)
_LIKE_GPT_OSS = re.compile(r"gpt[-_. ]?oss", re.IGNORECASE)
_WIDTH_OF_GPT_OSS = 2880  # of its hidden states and of its experts; no other model's

_T = TypeVar("_T")


@dataclasses.dataclass(frozen=True)
class _Own(Generic[_T]):
    """What ``rank_pattern`` or ``alpha_pattern`` says of some modules."""

    patterns: Patterns
    values: tuple[_T, ...]

    def of(self, target: str, default: _T) -> _T:
        """That of the first pattern that matches, as PEFT takes it."""
        first = self.patterns.first(target)
        return default if first is None else self.values[first]


@dataclasses.dataclass(frozen=True)
class Settings:
    """What an adapter's configuration says."""

    rank: int
    alpha: float
    rslora: bool
    ranks: _Own[int]
    alphas: _Own[float]
    target_parameters: frozenset[str]  # the last parts of the names of those of experts
    parameters: frozenset[str]  # names, or their last parts, of all that were adapted as parameters
    modules: frozenset[str]  # names, or their last parts, of all modules that were adapted
    module_pattern: Patterns | None  # of whole names of these, where it is said by one that is understood
    base_model: tuple[str, ...]  # names of it and of its class

    def rank_of(self, target: str) -> int:
        """The rank of a module or parameter, by its name in the base model."""
        return self.ranks.of(target, self.rank)

    def name_of(self, target: str) -> str:
        """What patterns call a linear layer: where its weight was adapted as a parameter, by that."""
        weight = f"{target}.weight"
        return weight if self.says(weight, parameter=True) else target

    def says(self, name: str, *, parameter: bool) -> bool:
        """Whether the configuration names a parameter, or a module, as adapted."""
        if not parameter and self.module_pattern is not None and self.module_pattern.first(name) is not None:
            return True
        names = self.parameters if parameter else self.modules
        parts = name.split(".")
        return any(".".join(parts[i:]) in names for i in range(len(parts)))

    def scaling_of(self, target: str, rank: int) -> float:
        """alpha / r, or alpha / sqrt(r) with rsLoRA, of a module or parameter of that rank."""
        return self.alphas.of(target, self.alpha) / (math.sqrt(rank) if self.rslora else rank)

    def gate_up_layout(self, given: str | None, shape: ExpertShape, *, in_lists: bool) -> str:
        """ "halves" or "interleaved": what was given, else what is known of the base model.

        Args:
            in_lists: the file names projections as Unsloth's gpt-oss does (``gate_up_projs.0``).

        Raises:
            AdapterError: it may be gpt-oss, and it is not known whether its tensors are as transformers has them.
        """
        if given is not None:
            return given
        if any(_INTERLEAVED.fullmatch(name) for name in self.base_model):
            return "interleaved"
        clues = [_short(name) for name in self.base_model if _LIKE_GPT_OSS.search(name)]
        clues += ["gate_up_projs"] * in_lists
        clues += [str(shape)] * (shape.hidden == shape.intermediate == _WIDTH_OF_GPT_OSS)
        if clues:
            raise AdapterError(
                f'gate and up in one tensor, and signs of gpt-oss ({clues[0]}): got no layout, wanted layout="interleaved" '
                '(gate is rows ::2, as in transformers) or layout="halves"'
            )
        return "halves"


def read_settings(config: Mapping[str, Any]) -> Settings:
    """Check a configuration, and take what is computed with.

    Raises:
        AdapterError: a setting is not understood, or its value is not.
    """
    if config.get("peft_type") != "LORA":
        raise AdapterError(f"peft_type: got {_short(config.get('peft_type'))}, wanted 'LORA'")
    for setting, value in config.items():
        # To PEFT an empty list of invocation tokens is an aLoRA, too.
        neutral = value is None if setting == "alora_invocation_tokens" else _neutral(value)
        if setting in _REFUSED and not neutral:
            raise AdapterError(f"{setting}={_short(value)} cannot be served: {_REFUSED[setting]}")
        if not (setting in _CHANGE_NOTHING or setting in _READ or neutral):
            raise AdapterError(
                f"{_short(setting)}={_short(value)}: got a setting that is not known here, wanted none, or null\n"
                "  hint: if it changes no number of a trained adapter, take it out of the configuration"
            )
    if config.get("bias") not in ("none", None):
        raise AdapterError(f"bias: got {_short(config['bias'])}, wanted 'none'")
    init = config.get("init_lora_weights")
    if not (init is None or isinstance(init, bool) or init in _PLAIN_INITS):
        raise AdapterError(
            f"init_lora_weights={_short(init)} changed the base weights; save the adapter with PEFT's "
            "path_initial_model_for_weight_conversion"
        )
    rslora = config.get("use_rslora")
    if rslora not in (True, False, None):
        raise AdapterError(f"use_rslora: got {_short(rslora)}, wanted true or false")
    modules, pattern = (frozenset(), None) if config.get("exclude_modules") else _modules(config.get("target_modules"))
    return Settings(
        rank=_rank("r", config.get("r")),
        alpha=_alpha("lora_alpha", config.get("lora_alpha")),
        rslora=bool(rslora),
        ranks=_patterns("rank_pattern", config, _rank),
        alphas=_patterns("alpha_pattern", config, _alpha),
        target_parameters=_last_parts(parameters := _names("target_parameters", config.get("target_parameters"))),
        parameters=frozenset(parameters),
        modules=modules,
        module_pattern=pattern,
        base_model=_base_model(config),
    )


def _neutral(value: Any) -> bool:
    return value is None or value is False or (isinstance(value, (str, list, set, dict)) and not value)


def _rank(name: str, value: Any) -> int:
    if type(value) is not int or value < 1:
        raise AdapterError(f"{name}: got {_short(value)}, wanted a whole number above 0")
    return value


def _alpha(name: str, value: Any) -> float:
    if type(value) in (int, float):
        with contextlib.suppress(OverflowError):
            if math.isfinite(alpha := float(value)):
                return alpha
    raise AdapterError(f"{name}: got {_short(value)}, wanted a finite number")


def _patterns(setting: str, config: Mapping[str, Any], check: Callable[[str, Any], _T]) -> _Own[_T]:
    value = config.get(setting)
    if not isinstance(value, (dict, type(None))):
        raise AdapterError(f"{setting}: got {_short(value)}, wanted an object")
    own = value or {}
    try:
        patterns = Patterns(own)
    except AdapterError as error:
        raise AdapterError(f"{setting}: {error}") from None
    return _Own(patterns, tuple(check(f"{setting}: {_short(key)}", own[key]) for key in own))


def _names(setting: str, names: Any) -> list[str]:
    if names is None:
        return []
    if not isinstance(names, (list, set)) or not all(isinstance(name, str) for name in names):
        raise AdapterError(f"{setting}: got {_short(names)}, wanted a list of names")
    return sorted(names)


def _modules(names: Any) -> tuple[frozenset[str], Patterns | None]:
    """Those of ``target_modules``, or the pattern that it is; neither where it is one that only ``re`` understands."""
    if not isinstance(names, str):
        return frozenset(_names("target_modules", names)), None
    with contextlib.suppress(AdapterError):
        return frozenset(), Patterns([f"^({names})"])
    return frozenset(), None


def _last_parts(names: list[str]) -> frozenset[str]:
    last = {name: name.rpartition(".")[2] for name in names}
    return frozenset(part for name, part in last.items() if part in PARTS or "expert" in name)


def _base_model(config: Mapping[str, Any]) -> tuple[str, ...]:
    mapping = config.get("auto_mapping") or {}
    if not isinstance(mapping, dict):
        raise AdapterError(f"auto_mapping: got {_short(mapping)}, wanted an object or null")
    names = {
        "base_model_name_or_path": config.get("base_model_name_or_path"),
        "model_type": config.get("model_type"),
        "auto_mapping.base_model_class": mapping.get("base_model_class"),
    }
    for setting, name in names.items():
        if not isinstance(name, (str, type(None))):
            raise AdapterError(f"{setting}: got {_short(name)}, wanted a name or null")
    return tuple(name for name in names.values() if name)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
