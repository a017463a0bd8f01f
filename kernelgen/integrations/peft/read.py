"""One adapter, read."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Mapping

import torch

from .adapter import Adapter, AdapterError, ExpertShape, Factors, checked_shape
from .files import AdapterFiles, Tensors, opened
from .keys import KNOWN, Pair, in_prefix, looks_numbered, looks_routed, pairs, place, saved_weight
from .layouts import NO_EXPERTS, ORIENTATIONS, Found, Reader
from .settings import read_settings


def read_adapter(
    source: str | os.PathLike[str] | AdapterFiles,
    shape: ExpertShape | None,
    *,
    orientation: str | None = None,
    layout: str | None = None,
    prefix: str | None = None,
    allow_empty: bool = False,
    base_weights: Mapping[str, torch.Tensor] | None = None,
) -> Adapter:
    """Read ``adapter_config.json`` and ``adapter_model.safetensors`` of a LoRA adapter.

    Ranks may differ from one projection to another (``rank_pattern``); the scaling is alpha / r, or alpha / sqrt(r) with
    ``use_rslora``, alpha from ``alpha_pattern`` where a pattern matches. Nothing that belongs to routed experts is left out.

    Args:
        source: the folder, or what it would hold, as ``AdapterFiles``.
        shape: the routed experts of the model; None: it has none.
        orientation: which side of a fused parameter ``lora_A`` is of, "in_out": the input, or "out_in": the output, as in files
            from before PEFT 0.19.1. Needed only where 2 * I or I equals H and no other parameter of the layer tells, and for both
            parameters of experts without a gate.
        layout: how gate and up share a tensor, "halves", or "interleaved": gate is rows ``::2``. None: as transformers has them
            in the base model, interleaved in gpt-oss and halves in all others. Needed where a file may be of gpt-oss and does
            not name the published model or its class.
        prefix: where the experts are, up to a dot: "model.layers", or "mtp.layers". Experts elsewhere are named in ``other``.
            None: all, which must be of one decoder.
        allow_empty: whether an adapter may have nothing for the routed experts; without any, whether it may have nothing.
        base_weights: the base model's state dict, whose tensors those must equal that PEFT saves beside the factors of
            embeddings and heads, number for number in the dtype that they have here. None: saved ones are refused.

    Raises:
        AdapterError: the adapter is of a kind that the kernels do not compute, it is damaged, its tensors do not fit ``shape``
            or an argument, or it leaves open what they mean. It is a ValueError.
        FileNotFoundError: the folder lacks one of the two files.
        ValueError: an argument is none of those named here.
    """
    if not isinstance(source, (str, os.PathLike, AdapterFiles)):
        raise ValueError(f"source: got {source!r}, wanted a path, or AdapterFiles")
    shape = NO_EXPERTS if shape is None else checked_shape(shape)
    if orientation not in (None, *ORIENTATIONS):
        raise ValueError(
            f"orientation: got {orientation!r}, wanted one of {', '.join(ORIENTATIONS)}, or None"
        )
    if layout not in (None, "halves", "interleaved"):
        raise ValueError(f"layout: got {layout!r}, wanted halves, interleaved, or None")
    if not isinstance(prefix, (str, type(None))):
        raise ValueError(f"prefix: got {prefix!r}, wanted a name, or None")
    if not isinstance(base_weights, (Mapping, type(None))):
        raise ValueError(f"base_weights: got {type(base_weights).__name__}, wanted tensors by name, or None")
    where = source if isinstance(source, AdapterFiles) else Path(source)
    try:
        with opened(where) as (config, tensors):
            reader = Reader(tensors, read_settings(config), shape, orientation, layout)
            adapter = _read(where.name, reader, prefix, base_weights)
        nothing = f"the routed experts{f' of {prefix}' if prefix else ''}" if shape.num_experts else "linear layers"
        if not (adapter.layers or allow_empty or (adapter.linears and not shape.num_experts)):
            raise AdapterError(
                f"got nothing for {nothing} among {len(adapter.other)} modules, wanted some, or allow_empty=True"
            )
        return adapter
    except AdapterError as error:
        raise AdapterError(f"{where.name if isinstance(where, AdapterFiles) else source}: {error}") from None


def _read(name: str, reader: Reader, prefix: str | None, base_weights: Mapping[str, torch.Tensor] | None) -> Adapter:
    layers: dict[int, list[Found]] = {}
    stacks: dict[str, str] = {}
    linears: dict[str, Factors] = {}
    other = []
    for target, pair in pairs(_factors(reader.tensors, base_weights)).items():
        for factor in pair:
            reader.tensors.check_dtype(factor)
        found = Found(target, pair, place(target)) if looks_routed(target) else None
        if found is not None and in_prefix(found.place, prefix):
            if not reader.shape.num_experts:
                raise AdapterError(f"{pair.a}: got factors of routed experts, wanted a shape of these, or none of them")
            layers.setdefault(found.place.layer, []).append(found)
            stacks.setdefault(found.place.stack, target)
            continue
        other.append(target)
        if found is None:
            _check_not_fused(target, pair, reader)
            if (factors := reader.linear(target, pair)) is not None:
                linears[target] = factors
    if len(stacks) > 1:
        raise AdapterError(
            f"got experts of several decoders, {' and '.join(stacks.values())}, wanted those of one\n"
            f"  hint: prefix={next(iter(stacks))!r} reads one, and names the rest in `other`"
        )
    return Adapter(name, {i: reader.layer(layers[i]) for i in sorted(layers)}, tuple(sorted(other)), linears)


def _factors(tensors: Tensors, base_weights: Mapping[str, torch.Tensor] | None) -> list[str]:
    """The names of all tensors but those that are the base model's own."""
    names = []
    for name in tensors.shapes:
        copied = None if base_weights is None else saved_weight(name)
        if base_weights is None or copied is None:
            names.append(name)
            continue
        weight = base_weights.get(copied)
        if weight is None:
            raise AdapterError(f"{name}: got a saved weight of the base model, wanted {copied} among base_weights, or none")
        if not isinstance(weight, torch.Tensor) or weight.is_meta or weight.layout != torch.strided:
            looks = f"{weight.layout} on {weight.device}" if isinstance(weight, torch.Tensor) else type(weight).__name__
            raise AdapterError(f"{name}: got {looks} for {copied} in base_weights, wanted a plain tensor with its numbers")
        saved = tensors.stored(name)
        if saved.shape != weight.shape or not torch.equal(saved.to(weight.dtype), weight.detach().cpu()):
            raise AdapterError(
                f"{name}: got a saved weight {list(saved.shape)} that is not the base model's {copied} {list(weight.shape)}, "
                "wanted the same numbers\n  hint: the adapter was trained with other embeddings; put them into the base model"
            )
    return names


def _check_not_fused(target: str, pair: Pair, reader: Reader) -> None:
    """What is not named as experts must not look like the factors of one or of all of them either."""
    a, b = (reader.tensors.shapes[factor] for factor in pair)
    experts = reader.shape.num_experts
    as_of = None
    if len(a) == len(b) == 3:
        convolution = b[1:] == (a[0], 1) and not (a[1] == 1 and {a[0], b[0]} <= {1, experts})
        as_of = None if convolution else "of several experts"
    elif len(a) == len(b) == 2:
        all_ranks = experts * reader.settings.rank_of(reader.settings.name_of(target))
        if experts > 1 and a[0] == b[1] == all_ranks:
            as_of = f"of all experts, whose ranks together are {all_ranks}"
        elif experts and looks_numbered(target) and (a[1], b[0]) in reader.shape.all_widths():
            as_of = "of one expert's projection, with a number in its name"
    if as_of is not None:
        raise AdapterError(
            f"{pair.a}: got lora_A {list(a)} and lora_B {list(b)}, as {as_of}, under a name that is not known to be of experts; "
            f"wanted {KNOWN}"
        )
