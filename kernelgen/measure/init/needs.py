"""What a model and its adapters need: the shapes that their calls have, from configurations and the headers of files."""

from __future__ import annotations

import contextlib
import dataclasses
import re
from pathlib import Path
from typing import Any, Mapping, Sequence

from kernelgen.core.diagnostics import failure
from kernelgen.integrations.architectures import ARCHITECTURES
from kernelgen.integrations.peft.adapter import AdapterError, ExpertShape, UngatedShape
from kernelgen.integrations.peft.files import opened
from kernelgen.integrations.peft.keys import PARTS, looks_routed, pairs, place, saved_weight
from kernelgen.integrations.peft.patterns import Patterns
from kernelgen.integrations.peft.settings import read_settings
from kernelgen.integrations.transformers import PACKED, expert_layers, generated_experts
from kernelgen.measure.models import Layer, Model, config_of, has_experts, model_from_config

BASES = ("generated", "foreign")
Scales = tuple[str | None, str | None]  # of what there is one each: weights, activations
DTYPES = {"bf16": "bfloat16", "f16": "float16"}
# What configurations call the activation of a gate, or that of experts without one; and the models whose gates are clamped.
_ACTIVATIONS = {
    **dict.fromkeys(("silu", "swish"), "swiglu"),
    "gelu": "geglu",
    **dict.fromkeys(("gelu_pytorch_tanh", "gelu_new"), "geglu_tanh"),
    "relu2": "relu2",
}
_CLAMPED = {
    *("deepseek_v4", "glm5_next", "glm5_next_text", "hy_v4", "hy_v4_vl", "hy_v4_vl_text", "minimax_m3_vl", "minimax_m3_vl_text"),
}
# What else the calls of a model say, whose experts are of their own kind.
_OSS, _LLAMA4 = {"gpt_oss"}, {"llama4", "llama4_text"}
# Linear layers whose outputs tensor parallelism cuts, and those whose inputs it does; it leaves others whole.
_COLUMNS = {*PACKED, *(module for modules in PACKED.values() for module in modules)}
_ROWS = {"o_proj", "down_proj"}


@dataclasses.dataclass(frozen=True)
class AdapterRanks:
    """What one adapter changes."""

    name: str
    experts: int  # the largest rank on routed experts, 0: none
    outer: bool  # whether all experts share the factors that face the hidden states
    linears: Mapping[str, tuple[int, int, int]]  # module -> inputs, outputs, rank

    @property
    def linear(self) -> int:
        """The largest rank on a linear layer, 0: none."""
        return max((rank for *_, rank in self.linears.values()), default=0)


@dataclasses.dataclass(frozen=True)
class Needs:
    """A model as it is to be served."""

    model: Model | None  # its experts; None: it has none
    dtype: str  # bf16 or f16
    quant: Scales
    rank: int  # of the buffers of experts
    linears: Mapping[Layer, tuple[int, str]]  # rank of its buffers, and the name of one of the layer
    slots: int
    bases: Sequence[str]
    adapters: Sequence[AdapterRanks]
    more: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # of generated products, by what experts are

    def shapes(self) -> list[tuple[str, dict[str, Any]]]:
        """The shapes to warm up: class of the package, and its fields; dtypes by name."""
        found: list[tuple[str, dict[str, Any]]] = []
        dtype = {} if self.dtype == "bf16" else {"dtype": DTYPES[self.dtype]}
        if self.model is not None:
            model = self.model
            routing = {"num_experts": model.experts, "top_k": model.top_k}
            if "generated" in self.bases:
                layer = {"hidden": model.hidden, "intermediate": model.intermediate, **routing, **dtype}
                layer |= self.more
                layer |= {"bias_dtype": DTYPES[self.dtype]} if "layout" in self.more else {}
                scales = {"weight_scales": self.quant[0], "x_scales": self.quant[1]}
                layer |= {name: scale for name, scale in scales.items() if scale is not None}
                adapters = {"rank": self.rank, "max_loras": self.slots, "adapter_enabled": True}
                adapters |= {"lora_ranks": True} if self.rank > 16 else {}
                out = {"out_dtype": DTYPES[self.dtype]}
                found += [("FusedMoeShape", {**layer, **some}) for some in ({}, out, {**out, **adapters})]
                if any(one.experts for one in self.adapters) and all(one.outer for one in self.adapters if one.experts):
                    found.append(("FusedMoeShape", {**layer, **out, **adapters, "shared_outer": True}))
            if "foreign" in self.bases:
                more = {"rank": self.rank, **routing, "max_loras": self.slots, "adapter_enabled": True, **dtype}
                for site in ("w13", "w2"):
                    one = model.projection("w13" if site == "w13" else "w2")
                    weighted = {"mul_routed_weight": True} if one.weighted else {}
                    found.append(("MoeShape", {"k": one.k, "n": one.n, "slices": one.slices, **more, **weighted}))
        for linear, (rank, _) in self.linears.items():
            sizes = {"k": linear.k, "widths": linear.widths, "rank": rank, "max_loras": self.slots}
            found.append(("LoraShape", {**sizes, **dtype}))
        return found

    def padding(self) -> list[tuple[str, str, str]]:
        """Adapter, its ranks, and how much of its slot is zeros."""
        wide = max((rank for rank, _ in self.linears.values()), default=0)
        rows = []
        for one in self.adapters:
            ranks = [("experts", one.experts, self.rank), ("linear layers", one.linear, wide)]
            there = [(what, rank, buffer) for what, rank, buffer in ranks if rank]
            said = ", ".join(f"{what} {rank} of {buffer}" for what, rank, buffer in there)
            waste = ", ".join(f"{100 * (buffer - rank) / buffer:.0f} %" for _, rank, buffer in there)
            rows.append((one.name, said, waste))
        return rows


def needs(
    config: Path,
    folders: Sequence[Path],
    *,
    tp: int,
    slots: int,
    rank: int | None,
    dtype: str | None,
    bases: Sequence[str],
) -> Needs:
    """What the model of a ``config.json`` and adapters in these folders need.

    Args:
        tp: tensor-parallel ranks.
        slots: adapters in the buffers.
        rank: of the buffers; None: the largest of the adapters, rounded up to 8, 16 without adapters.
        dtype: None: the configuration's.
        bases: whose products adapters go into: "generated" ones, or between "foreign" ones.

    Raises:
        Failure: a file cannot be read, or asks for what is not served; exit code 2.
    """
    sources = config_of(config)
    model = model_from_config(config, tp) if has_experts(sources) or not folders else None
    kind = ExpertShape if model is None or model.gated else UngatedShape
    shape = None if model is None else kind(model.experts, model.hidden, model.intermediate * tp)
    adapters = [_ranks(folder, shape) for folder in folders]
    if model is None and not any(one.linears for one in adapters):
        raise failure("KG070", str(config), "neither experts nor adapters on linear layers: there is nothing to serve")
    quant: Scales = (None, None)
    more: Mapping[str, Any] = {}
    if model is not None and "generated" in bases:
        made = _made(sources)
        more = _named(config, sources) if made is None else _computed(config, made, model, tp)
        first, end = (_value(sources, name) for name in ("first_k_dense_replace", "num_hidden_layers"))
        layers = range(first if type(first) is int else 0, end if type(end) is int else 1)
        experts = [f"layers.{i}.mlp.experts" for i in layers] if made is None else [*expert_layers(made).values()]
        quant = _quant(config, sources, experts)
    widest = max((one.experts for one in adapters), default=0)
    _check_rank(rank, [max(one.experts, one.linear) for one in adapters])
    of_experts = rank or max(8, -(-widest // 8) * 8) if adapters else rank or 16
    linears = _linears(adapters, tp, rank)
    return Needs(model, dtype or _dtype(config, sources), quant, of_experts, linears, slots, bases, adapters, more)


def _ranks(folder: Path, shape: ExpertShape | None) -> AdapterRanks:
    experts, outer, linears = 0, True, {}
    try:
        with opened(folder) as (config, tensors):
            settings = read_settings(config)
            for target, pair in pairs(name for name in tensors.shapes if saved_weight(name) is None).items():
                a, b = (tensors.shapes[name] for name in pair)
                if looks_routed(target):
                    if shape is None:
                        raise AdapterError(f"{pair.a}: got factors of routed experts, wanted none, as the model has none")
                    if not shape.gated and 0 in a and 0 in b:  # of a gate
                        continue
                    form = place(target).form
                    module = target.partition(".base_layer")[0]
                    names = [f"{module}.{part}_proj" for part in shape.parameters] if form == "fused" else [target]
                    rank = _rank_of(form, a, b, shape)
                    if rank is None or rank not in map(settings.rank_of, names):
                        raise AdapterError(f"{pair.a}: got lora_A {list(a)} and lora_B {list(b)}, wanted those of {shape}")
                    experts = max(experts, rank)
                    outer &= form == "stacked" and 1 in (a[0], b[0])
                elif len(a) == len(b) == 2:
                    linears[target] = (a[1], b[0], a[0])
    except (AdapterError, OSError) as error:
        raise failure("KG070", str(folder), f"not an adapter that can be read: {error}") from error
    return AdapterRanks(folder.resolve().name, experts, outer and experts > 0, linears)


def _rank_of(form: str, a: Sequence[int], b: Sequence[int], shape: ExpertShape) -> int | None:
    """The rank of factors of routed experts, of these sizes; None: they are of others."""
    if len(a) != len(b) or len(a) != (3 if form == "stacked" else 2):
        return None
    widths = shape.all_widths()
    if form == "fused":  # of either orientation
        count, fits = a[0] // shape.num_experts, (a[1], b[0]) in widths or (b[0], a[1]) in widths
        return count if fits and a[0] == b[1] == count * shape.num_experts else None
    return a[-2] if (a[-1], b[-2]) in widths and a[-2] == b[-1] else None


def _check_rank(rank: int | None, ranks: Sequence[int]) -> None:
    if rank is not None and max(ranks, default=0) > rank:
        raise failure("KG070", "--rank", f"got {rank}, and an adapter has rank {max(ranks)}", "leave it out, or raise it")


def _linears(adapters: Sequence[AdapterRanks], tp: int, rank: int | None) -> dict[Layer, tuple[int, str]]:
    """Each kind of linear layer once; modules that engines run as one layer are slices of it."""
    sizes: dict[str, tuple[int, int, int]] = {}
    for adapter in adapters:
        for module, (inputs, outputs, r) in adapter.linears.items():
            known = sizes.setdefault(module, (inputs, outputs, r))
            if known[:2] != (inputs, outputs):
                message = f"{module} is {inputs} to {outputs} here, and {known[0]} to {known[1]} elsewhere"
                raise failure("KG070", adapter.name, message)
            sizes[module] = inputs, outputs, max(r, known[2])
    groups: dict[str, list[str]] = {}
    for module in sizes:
        parent, _, last = module.rpartition(".")
        packed = next((layer for layer, modules in PACKED.items() if last in modules), last)
        groups.setdefault(f"{parent}.{packed}".lstrip("."), []).append(module)
    found: dict[Layer, tuple[int, str]] = {}
    for name, modules in groups.items():
        last = name.rpartition(".")[2]
        order = PACKED.get(last, (last,))
        by_last = {module.rpartition(".")[2]: sizes[module] for module in modules}
        if last == "qkv_proj" and by_last.keys() == {"q_proj", "v_proj"}:
            by_last["k_proj"] = by_last["v_proj"]  # it is between them, and as wide as v
        among = {size[0] for size in by_last.values()}
        if len(among) > 1:
            raise failure("KG070", name, f"its modules have {sorted(among)} inputs, wanted one number")
        widths = tuple(_part(name, by_last[module][1], tp if last in _COLUMNS else 1) for module in order if module in by_last)
        layer = Layer(_part(name, among.pop(), tp if last in _ROWS else 1), widths)
        widest = max(size[2] for size in by_last.values())
        before = found.get(layer, (0, name))
        found[layer] = max(before[0], rank or -(-widest // 8) * 8), before[1]
    return found


def _part(name: str, size: int, tp: int) -> int:
    if size % tp:
        raise failure("KG070", name, f"{size} columns do not divide by tp {tp}")
    return size // tp


def _value(sources: Sequence[Mapping[str, Any]], *names: str) -> Any:
    return next((source[name] for name in names for source in sources if source.get(name) is not None), None)


def _dtype(config: Path, sources: Sequence[Mapping[str, Any]]) -> str:
    said = str(_value(sources, "dtype", "torch_dtype") or "bfloat16").removeprefix("torch.")
    for tag, dtype in DTYPES.items():
        if dtype == said:
            return tag
    message = f"its dtype is {said[:40]}, and kernels are of {' or '.join(DTYPES.values())}"
    raise failure("KG070", str(config), message, "--dtype says another")


def _made(sources: Sequence[Mapping[str, Any]]) -> Any:
    """The model as transformers makes it, without weights; None: it knows none of that kind, or not from these fields."""
    try:
        import torch
        from transformers import AutoConfig, AutoModel
    except ImportError:
        return None
    for source in sources:
        fields = {name: value for name, value in source.items() if name not in ("model_type", "quantization_config")}
        # Configurations of others: what their classes raise for fields that do not fit is up to them.
        with contextlib.suppress(Exception), torch.device("meta"):
            return AutoModel.from_config(AutoConfig.for_model(source["model_type"], **fields))
    return None


def _computed(config: Path, made: Any, model: Model, tp: int) -> Mapping[str, Any]:
    """What shapes say of the experts of a model of transformers; raises Failure where generated products do not compute them."""
    hint = "--base foreign is for engines that run the experts themselves"
    try:
        found = generated_experts(made)
    except ValueError as error:
        raise failure("KG070", str(config), str(error).partition("\n")[0], hint) from error
    read = (model.experts, model.hidden, model.intermediate * tp)
    if read != tuple(found.shape):
        sizes = f"{read} by their names, and {type(made).__name__} has {tuple(found.shape)}"
        message = f"got experts, hidden and intermediate sizes {sizes}"
        raise failure("KG070", str(config), message, "leave out of it the sizes that this model does not read")
    fields: dict[str, Any] = {} if found.activation == "swiglu" else {"activation": found.activation}
    fields |= {"layout": found.layout} if found.has_bias else {}
    return {**fields, "apply_router_weight_on_input": True} if found.apply_router_weight_on_input else fields


def _named(config: Path, sources: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """The same, of models that transformers does not know, by the names of their fields."""
    kinds = {source.get("model_type") for source in sources}
    if kinds & _OSS:
        return {"activation": "swiglu_clamp", "layout": "interleaved"}
    why = next((one.layer for one in ARCHITECTURES if one.model_type in kinds and one.layer), None)
    act = _value(sources, "mlp_hidden_act", "hidden_act", "hidden_activation")
    found = _ACTIVATIONS.get(str(act))
    if why is None and kinds & _CLAMPED:
        found = "swiglu_clamp"
    elif why is None and (_value(sources, "swiglu_limit") or _value(sources, "swiglu_limits")) is not None:
        why = "a gate that clamps in a way that is not known"
    if why is None and found is None:
        why = "no activation that it says" if act is None else f"the activation {str(act)[:40]}"
    if why is not None:
        hint = "--base foreign is for engines that run the experts themselves"
        raise failure("KG070", str(config), f"its experts have {why}, which generated products do not compute", hint)
    fields: dict[str, Any] = {} if found in (None, "swiglu") else {"activation": found}
    return {**fields, "apply_router_weight_on_input": True} if kinds & _LLAMA4 else fields


# Of FP8 weights and activations, as compressed-tensors has it -> what there is a scale each of.
_SCHEMES: Mapping[tuple[object, object], Scales] = {
    ("block", "group"): ("group", "group"),
    ("channel", "token"): ("channel", "token"),
    ("tensor", "tensor"): ("tensor", "tensor"),
    ("block", None): ("group", None),
    ("channel", None): ("channel", None),
    ("tensor", None): ("tensor", None),
}
# Settings that say of which modules the weights stay as they were.
_LEFT_OUT = ("modules_to_not_convert", "ignored_layers", "ignore", "exclude_modules")
_KNOWN = "FP8 by tensor, by channel and token, or by 128 × 128, or MXFP4 of gpt-oss"


def _quant(config: Path, sources: Sequence[Mapping[str, Any]], experts: Sequence[str]) -> Scales:
    """What there is a scale each of in an FP8 checkpoint, or in one of MXFP4.

    Args:
        experts: the names of the modules that are experts.

    Raises:
        Failure: the checkpoint is of another kind.
    """
    said = _value(sources, "quantization_config", "compression_config")
    if said is None:
        return None, None
    found: Scales | str = "none that is known here"
    if isinstance(said, dict):
        if said.get("quant_method") == "mxfp4":
            of_oss = _OSS & {source.get("model_type") for source in sources}
            found = ("mx", None) if of_oss else "MXFP4 of experts that are none of gpt-oss"
        elif said.get("quant_method") == "fp8":
            found = _fp8(said)
        elif (said.get("quant_method"), said.get("quant_algo")) == ("modelopt", "FP8"):
            found = "tensor", "tensor"
        elif said.get("quant_method") == "compressed-tensors":
            found = _compressed(said, experts)
        left_out = [entry for name in _LEFT_OUT for entry in _listed(said.get(name)) if _names(entry, experts)]
        if left_out and not isinstance(found, str):
            found = f"one that leaves experts out ({left_out[0][:60]})"
    if isinstance(found, str):
        message = f"its quantization is {found}, wanted {_KNOWN}"
        raise failure("KG070", str(config), message, "--base foreign is for engines that run the experts themselves")
    return found


def _fp8(said: Mapping[str, Any]) -> Scales | str:
    static, block = said.get("activation_scheme") == "static", said.get("weight_block_size")
    if said.get("fmt") not in (None, "e4m3"):
        return f"FP8 of {said['fmt']!r:.40}"
    if block is None and static:
        return "tensor", "tensor"
    if block == [128, 128] and not static:
        return "group", "group"
    return f"FP8 by blocks of {block!r:.40} with {said.get('activation_scheme')!r:.40} activations"


def _compressed(said: Mapping[str, Any], experts: Sequence[str]) -> Scales | str:
    groups = said.get("config_groups")
    if not isinstance(groups, dict) or len(groups) != 1 or not isinstance(group := next(iter(groups.values())), dict):
        return "one of several groups of modules"
    sparsity = said.get("sparsity_config")
    if sparsity and not (isinstance(sparsity, dict) and sparsity.get("format") == "dense"):
        return "one of sparse weights"
    targets = _listed(group.get("targets") or "Linear")
    if "Linear" not in targets and not any(_names(entry, experts) for entry in targets):
        return "one that has other modules than experts"
    weights, acts = group.get("weights"), group.get("input_activations")
    for side in (weights, *([] if acts is None else [acts])):
        if not isinstance(side, dict) or (side.get("type"), side.get("num_bits")) != ("float", 8):
            return f"none of 8-bit floating-point numbers ({side!r:.60})"
        sizes = side.get("group_size") or 128, side.get("block_structure") or [128, 128]
        if side.get("symmetric") is False or sizes not in ((128, [128, 128]), (128, "128x128")):
            return f"FP8 by {side.get('strategy')!r:.20} of other sizes than 128, or with zero points"
    if acts is not None and not acts.get("dynamic", True) and acts.get("strategy") != "tensor":
        return "FP8 whose scales of tokens are known in advance"
    strategies = tuple(None if side is None else str(side.get("strategy")) for side in (weights, acts))
    return _SCHEMES.get((strategies[0], strategies[1]), f"FP8 by {strategies[0]!r:.20} with activations by {strategies[1]!r:.20}")


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]


def _names(entry: Any, experts: Sequence[str]) -> bool:
    """Whether a module name of a quantization, a part of one, with ``*``, or behind "re:" a pattern, is one of experts."""
    if not isinstance(entry, str) or entry == "Linear":
        return False
    blocks = [name.replace(".mlp.", f".{block}.") for name in experts for block in ("mlp", "block_sparse_moe", "feed_forward")]
    parts = [f"model.{name}.0.{part}" for name in dict.fromkeys(blocks) for part in PARTS]
    if not entry.startswith("re:") and "*" not in entry:
        return any(f".{entry}." in f".{part}." for part in parts)
    pattern = entry.removeprefix("re:") if entry.startswith("re:") else re.escape(entry).replace(r"\*", ".*")
    try:
        patterns = Patterns([f"({pattern}).*"])
        return any(patterns.first(part) is not None for part in parts)
    except AdapterError:  # one that only ``re`` understands
        return "expert" in entry and "shared" not in entry
