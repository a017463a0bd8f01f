"""What the names of tensors mean.

| name, behind that of the decoder layer | of | factors | form |
| --- | --- | --- | --- |
| ``mlp.experts``, ``mlp.experts.base_layer`` | all experts | [E * r, in] and [out, r * E] | fused |
| ``mlp.experts.gate_up_proj`` and so on | all experts | [E, r, in] and [E, out, r], either E may be 1 | stacked |
| ``mlp.experts.0.gate_proj`` and so on | one expert | [r, in] and [out, r] | single |
| ``mlp.experts.gate_up_projs.0`` and so on | one expert | [r, in] and [out, r] | listed |

Fused is what PEFT writes for ``target_parameters`` (of which parameter, the shapes tell), single what it writes for modules;
stacked comes from Megatron-Bridge, SkyRL and tinker, listed from Unsloth. Projections are ``gate_proj``, ``up_proj``,
``down_proj``, ``gate_up_proj``, or ``w1`` (gate), ``w3`` (up), ``w2`` (down). ``mlp`` may be any names or none, ``experts`` may
be ``deepspeed_experts`` or ``local_experts``.
"""

from __future__ import annotations

import re
from typing import Iterable, Mapping, NamedTuple

from .adapter import AdapterError

_LONGEST = 500  # characters of a name
_TARGET, _ADAPTER = r"(?:base_model\.model\.)?(?P<target>[\w.-]+)", r"(?:\.(?P<adapter>[\w-]+))?"
_FACTOR = re.compile(rf"{_TARGET}\.lora_(?P<side>[AB]){_ADAPTER}\.weight", re.ASCII)
_OF_EMBEDDING = re.compile(rf"{_TARGET}\.lora_embedding_(?P<side>[AB]){_ADAPTER}", re.ASCII)
# Parts of names that FSDP, checkpointing, torch.compile, and DDP and DeepSpeed put around modules.
_WRAPPER = re.compile(r"(?:(?<=\.)|^)(?:_fsdp_wrapped_module|_checkpoint_wrapped_module|_orig_mod)\.|^module\.")
_NUMBER = r"(?:0|[1-9][0-9]{0,5})"
# Experts in experts are not known; names like _module are of wrappers, of which nothing is known.
_NAMES = r"(?:(?![\w-]*expert)[A-Za-z][\w-]*\.)*?"
_LAYER = rf"(?P<stack>{_NAMES}(?:layers|layer|blocks|block|h))\.(?P<layer>{_NUMBER})\.(?P<block>{_NAMES})"
_CONTAINER = r"(?:experts|(?:experts\.)?(?:deepspeed_experts|local_experts))"
_FORMS = {
    form: re.compile(rf"{_LAYER}{name}", re.ASCII)
    for form, name in {
        "fused": r"experts(?:\.base_layer)*",
        "single": rf"(?P<container>{_CONTAINER})\.(?P<expert>{_NUMBER})\.(?P<projection>\w+)",
        "listed": rf"experts\.(?P<projection>\w+_proj)s\.(?P<expert>{_NUMBER})",
        "stacked": r"experts\.(?P<projection>\w+)",
    }.items()
}
PARTS = {
    "gate_proj": "gate",
    "w1": "gate",
    "up_proj": "up",
    "w3": "up",
    "down_proj": "down",
    "w2": "down",
    "gate_up_proj": "gate_up",
}
KNOWN = (
    "layers.<i>.<...>.experts or experts.base_layer (all experts), experts.<projection> (3-D, all experts), "
    "experts.<e>.<projection> or experts.<projection>s.<e> (one expert), with projections "
    + ", ".join(PARTS)
)
# The decoder, in front of its layers; what has other names (mtp, vision_tower, draft) counts its layers from 0 again.
_DECODER = {
    "model",
    "language_model",
    "text_model",
    "transformer",
    "backbone",
    "decoder",
    "thinker",
    "llm",
}
_ROUTER = re.compile(r"gate|\w*router\w*|wg|\w*shared\w*")
_OF_A_LAYER = re.compile(r"w[123]|\w*fc_?[12]")  # projections whose number is no expert's
_SAVED = r"(\.base_layer|\b(embed_tokens|embed_in|wte|lm_head|embed_out))\.weight$"
# What a tensor is that is no factor.
_OTHERS = {
    r"\.lora_magnitude_vector": "a magnitude of DoRA, which rescales the base weight",
    r"\.lora_diag": "the singular values of KaSA",
    r"\.trainable_tokens_": "rows that replace some of an embedding (trainable_token_indices)",
    r"\.(modules_to_save|original_module)\.": "a module that replaces one of the base model (modules_to_save)",
    r"\.bias$": "a bias, and the kernels add none",
    _SAVED: "a saved weight of the base model, and no base_weights that it could be compared with",
}


class Pair(NamedTuple):
    """The names of the two factors of one module or parameter."""

    a: str
    b: str


class Place(NamedTuple):
    """Where factors of routed experts belong."""

    layer: int
    stack: str  # what the layer is one of: model.layers
    where: str  # the path to the experts, * for the layer: model.layers.*.mlp
    form: str  # "fused", "stacked", "single" or "listed"
    naming: str  # of experts and projections: experts.*_proj
    part: str | None  # "gate", "up", "gate_up" or "down"; None if fused: the shapes tell
    expert: int | None  # None: all


def pairs(names: Iterable[str]) -> Mapping[str, Pair]:
    """Module or parameter of the base model -> its two factors; every name is in one pair.

    Raises:
        AdapterError: a tensor is something else, or its twin is missing.
    """
    found: dict[str, dict[str, str]] = {}
    embeddings: set[str] = set()
    adapters: dict[str | None, str] = {}
    for name in names:
        if len(name) > _LONGEST:
            raise AdapterError(
                f"{name[:60]}...: got a name of {len(name)} characters, wanted at most {_LONGEST}"
            )
        plain = _WRAPPER.sub("", name)
        of_embedding = _OF_EMBEDDING.fullmatch(plain)
        match = of_embedding or _FACTOR.fullmatch(plain)
        if match is None:
            what = next((what for word, what in _OTHERS.items() if re.search(word, plain)), None)
            if what is None and looks_routed(plain):
                raise _unknown(name)
            raise AdapterError(
                f"{name}: got {what or 'a tensor that is no factor'}, wanted lora_A and lora_B"
            )
        adapters.setdefault(match["adapter"], name)
        if len(adapters) > 1:
            raise AdapterError(
                f"got factors of several adapters, {' and '.join(adapters.values())}, wanted one"
            )
        target = match["target"]
        if of_embedding and looks_routed(target):
            raise AdapterError(f"{name}: got the LoRA of an embedding, wanted none on routed experts")
        sides = found.setdefault(target, {})
        if sides and (target in embeddings) != bool(of_embedding):
            raise AdapterError(f"{name}: got it beside {min(sides.values())}, wanted a linear layer or an embedding")
        if match["side"] in sides:
            raise AdapterError(f"{name}: got it twice, beside {sides[match['side']]}, wanted one")
        sides[match["side"]] = name
        if of_embedding:
            embeddings.add(target)
    for sides in found.values():
        if len(sides) == 1:
            raise AdapterError(f"{sides.popitem()[1]}: got one factor, wanted lora_A and lora_B")
    return {target: Pair(sides["A"], sides["B"]) for target, sides in found.items()}


def saved_weight(name: str) -> str | None:
    """Of which parameter of the base model a tensor is a copy, None: of none."""
    plain = _WRAPPER.sub("", name).removeprefix("base_model.model.")
    return plain.replace(".base_layer", "") if re.search(_SAVED, plain) else None


def looks_routed(name: str) -> bool:
    """Whether a name is of experts, or of an MoE block in a layer, and neither of its router nor of what is shared."""
    parts = name.lower().split(".")
    if any("expert" in part and "shared" not in part for part in parts):
        return True
    in_layer = re.sub(rf"^.*\b(?:layers?|blocks?|h)\.{_NUMBER}\.", "", name.lower()).split(".")
    return any(
        re.search(r"(^|_)moe(_|$)", part) and not _ROUTER.fullmatch(behind)
        for part, behind in zip(in_layer, [*in_layer[1:], ""], strict=True)
    )


def looks_numbered(target: str) -> bool:
    """Whether a name is of one of several blocks or projections in a layer, and neither of attention nor of what is shared."""
    match = re.search(rf"\b(?:layers?|blocks?|h)\.{_NUMBER}\.(.+)", target.lower())
    inner = match[1].split(".") if match else []
    return not any(re.search("shared|att", part) for part in inner) and any(
        part[-1:].isdigit() and not _OF_A_LAYER.fullmatch(part) for part in inner
    )


def place(target: str) -> Place:
    """Where a module or parameter belongs whose name looks routed.

    Raises:
        AdapterError: its name is of no known form.
    """
    for form, pattern in _FORMS.items():
        match = pattern.fullmatch(target)
        if match is None:
            continue
        named = match.groupdict()
        projection, expert = named.get("projection"), named.get("expert")
        if projection is not None and projection not in PARTS:
            break
        return Place(
            layer=int(match["layer"]),
            stack=match["stack"],
            where=f"{match['stack']}.*.{match['block']}".rstrip("."),
            form=form,
            naming=f"{named.get('container') or 'experts'}.{'w*' if (projection or '')[:1] == 'w' else '*_proj'}",
            part=None if projection is None else PARTS[projection],
            expert=None if expert is None else int(expert),
        )
    raise _unknown(target)


def in_prefix(place: Place, prefix: str | None) -> bool:
    """Whether it is what was asked for.

    Raises:
        AdapterError: nothing was asked for, and it is not plainly a layer of the decoder.
    """
    if prefix is not None:
        prefix = prefix.removeprefix("base_model.model.").rstrip(".")
        return f"{place.where}.".startswith(f"{prefix}." if prefix else "")
    outer = place.stack.split(".")[:-1]
    if not _DECODER.issuperset(outer):
        raise AdapterError(
            f"{place.where}: got experts that may not be the decoder's, wanted its own, or a prefix\n"
            f"  hint: prefix={place.stack!r} reads these"
        )
    return True


def _unknown(name: str) -> AdapterError:
    return AdapterError(f"{name}: got a name of routed experts that is not known, wanted {KNOWN}")
