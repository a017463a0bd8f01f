"""Serve a batch of mixed LoRA adapters through the mixture-of-experts layers of a ``transformers`` model.

``transformers`` lets an implementation of the experts be registered under a name; ours runs the base experts of each layer and
adds the adapters of the batch with the generated kernels. It serves every model whose experts are fused parameters
``gate_up_proj`` [E, 2 * I, H] and ``down_proj`` [E, H, I], whatever their gate computes: Qwen3-MoE, Mixtral, OLMoE, DeepSeek and
others; also where they are transposed, have gate and up in turns, or biases, as in gpt-oss; or no gate, as in Nemotron-H; and
those of Llama 4 and Step 3.7, which are no implementations of that interface. Every other model is refused before anything runs.

The base experts are plain matrix products, one expert after the other, for checking and for small models: an engine that
has its own adds two calls of ``moe_lora`` and one of ``moe_route`` as ``MoeLora.experts`` does. With ``base="generated"`` they
are generated kernels too (see ``MoeLayer``), for the gates that these compute (see ``activation_of``): models with others are
refused. Rows of weights that are transposed then come to lie one behind the other, once; their shapes and numbers stay.

``LinearLora`` does the same for linear layers and embeddings; both together serve an adapter that changes both.
"""

from __future__ import annotations

import contextlib
import functools
import re
from types import MappingProxyType, ModuleType
from typing import Any, Callable, Iterator, Mapping, NamedTuple, Sequence

import torch

from .embedding import embedding_lora
from .gates import Activation, activation_of, between, has_gate, takes_rows
from .moe_layer import MoeLayer, check_adapters
from .peft import ExpertShape, LayerBuffers, LinearBuffers, LinearShape, UngatedShape

_NAME = "kernelgen_moe_lora"
# Linear layers that engines run as one, and the modules that they are in a model of transformers.
PACKED: Mapping[str, Sequence[str]] = MappingProxyType(
    {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
)


class MoeCall(NamedTuple):
    """What one MoE layer did: T tokens, top_k experts each."""

    layer: int
    hidden: torch.Tensor  # [T, H]
    topk_ids: torch.Tensor  # [T, top_k]
    topk_weights: torch.Tensor  # [T, top_k]
    out: torch.Tensor  # [T, H]


class GeneratedExperts(NamedTuple):
    """The experts of a model, in the words of ``FusedMoeShape``."""

    shape: ExpertShape
    activation: str
    layout: str
    has_bias: bool
    apply_router_weight_on_input: bool


def expert_layers(model: Any) -> dict[int, str]:
    """Decoder layer -> the name of its experts, for the experts that are fused parameters.

    Raises:
        ValueError: some of them are not as this glue runs them.
    """
    if not isinstance(model, torch.nn.Module):
        raise ValueError(f"model: got {type(model).__name__}, wanted a model of transformers")
    names: dict[int, str] = {}
    seen: dict[int, str] = {}
    _check_bare(model)
    for name, module in model.named_modules(remove_duplicate=False):
        if not _has_fused(module) or "shared" in name.rpartition(".")[2]:
            continue
        match = re.search(r"\blayers\.(\d+)\.", name)
        found = "no layers.<i> in its name" if match is None else _unlike_ours(module)
        if found or match is None:
            raise ValueError(
                f"{type(model).__name__}: {name}: {type(module).__name__}: got {found}, wanted experts with {_FUSED}, behind "
                f"transformers' interface of experts\n  hint: {_HINT}"
            )
        if (twin := seen.setdefault(id(module), name)) != name:
            raise ValueError(
                f"{type(model).__name__}: got the same experts as {twin} and {name}, wanted experts of their own in each layer"
            )
        if names.setdefault(int(match[1]), name) != name:
            raise ValueError(
                f"{type(model).__name__}: got {names[int(match[1])]} and {name} in one layer, wanted one decoder\n"
                "  hint: give the part of the model that has one"
            )
    return names


def expert_shape(model: Any) -> ExpertShape:
    """The experts of a model, which must be alike in all of its layers that have any.

    Raises:
        ValueError: it has no experts that can be served, or several kinds of them.
    """
    names = expert_layers(model)
    shapes = {_shape(model.get_submodule(name)): index for index, name in names.items()}
    if len(shapes) != 1:
        found = ", ".join(f"{shape} in layer {index}" for shape, index in shapes.items())
        raise ValueError(
            f"{type(model).__name__}: got {found or 'no fused experts'}, wanted {_FUSED}, the same in all layers"
        )
    return next(iter(shapes))


def generated_experts(model: Any) -> GeneratedExperts:
    """The experts of a model as generated products take them; its weights may be on ``meta``.

    Raises:
        ValueError: generated products do not compute them, or they are not alike in all layers.
    """
    shape, found = expert_shape(model), set()
    for index, name in expert_layers(model).items():
        experts = model.get_submodule(name)
        gate, weights = _generated_gate(model, index, experts), _weights(experts)
        biased, on_input = weights.w13_bias is not None, weights.apply_router_weight_on_input
        found.add(GeneratedExperts(shape, gate.activation, weights.layout, biased, on_input))
    if len(found) != 1:
        raise ValueError(f"{type(model).__name__}: got {' and '.join(sorted(map(str, found)))}, wanted one kind in all layers")
    return found.pop()


def linear_shapes(model: Any, packed: Mapping[str, Sequence[str]] = PACKED) -> dict[str, LinearShape]:
    """The linear layers of a model: of attention, routers, shared experts and heads, and its embeddings, as adapters name them.

    Args:
        packed: the name of a layer -> the modules that are its slices, where all of them are there with the same input; a model
            that has such a layer itself keeps it.
    """
    if not isinstance(model, torch.nn.Module):
        raise ValueError(f"model: got {type(model).__name__}, wanted a model of transformers")
    sizes: dict[str, tuple[int, int]] = {}
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if isinstance(weight, torch.nn.Parameter) and weight.dim() == 2 and type(module).__name__ != "Conv1D":
            height, width = weight.shape
            sizes[name] = (height, width) if isinstance(module, torch.nn.Embedding) else (width, height)
    layers = {}
    for name, (inputs, outputs) in sizes.items():
        parent, _, last = name.rpartition(".")
        whole, group = name, {name: outputs}
        for layer, modules in packed.items():
            path = {module: f"{parent}.{module}".lstrip(".") for module in modules}
            if last in path and all(sizes.get(other, (0, 0))[0] == inputs for other in path.values()):
                whole, group = f"{parent}.{layer}".lstrip("."), {other: sizes[other][1] for other in path.values()}
        layers[whole] = LinearShape(inputs, group)
    return layers


class MoeLora:
    """The adapters of a model, served by a generated package.

    Args:
        model: a ``transformers`` model, bfloat16 or float16; its weights stay as they are.
        layers: from ``stack_adapters``, on the model's device.
        kernels: the generated package, under whatever name it was imported.
        assignment: as in ``moe_route``, which ``base="torch"`` takes.
        base: how the base experts run: "torch", with the model's own gate, or "generated", for models whose gate generated
            kernels compute: silu or GELU of it times up, or both clamped, as in gpt-oss and DeepSeek-V4.
        mxfp4: the tensors of a checkpoint of gpt-oss by their names, of which ``base="generated"`` takes the weights of
            experts as they are there, ``<experts>.gate_up_proj_blocks``, ``_scales`` and so on. Those of the model are not read
            then, and may be on ``meta``; their biases are.

    Raises:
        ValueError: the model's experts are of a kind that this glue does not run, or not with this ``base``, or ``layers``
            or ``mxfp4`` does not fit them.
    """

    def __init__(
        self,
        model: Any,
        layers: Mapping[int, LayerBuffers],
        kernels: ModuleType,
        *,
        assignment: str = "auto",
        base: str = "torch",
        mxfp4: Mapping[str, torch.Tensor] | None = None,
    ) -> None:
        from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

        self._model = model
        self._layers = layers
        self._kernels = kernels
        self._assignment = assignment
        self._base = base
        self._mapping: torch.Tensor | None = None
        self._calls: list[MoeCall] | None = None
        self._ran: set[int] = set()  # layers, in the pass that runs
        if base not in ("torch", "generated"):
            raise ValueError(f'base: got {base!r}, wanted "torch" or "generated"')
        if not isinstance(layers, Mapping):
            raise ValueError(
                f"layers: got {type(layers).__name__}, wanted what stack_adapters returns"
            )
        names = expert_layers(model)
        if not hasattr(model, "set_experts_implementation"):
            raise ValueError(f"model: got {type(model).__name__}, wanted a model of transformers, without a module around it")
        self._experts = {i: model.get_submodule(name) for i, name in names.items()}
        self._of_disk: dict[int, _Weights] = {}
        if mxfp4 is not None:
            if base != "generated" or not isinstance(mxfp4, Mapping):
                found = f'{type(mxfp4).__name__} and base="{base}"'
                raise ValueError(f'mxfp4: got {found}, wanted tensors by name and base="generated"')
            self._of_disk = {i: _mxfp4(name, self._experts[i], mxfp4) for i, name in names.items()}
        if missing := sorted(layers.keys() - self._experts.keys()):
            raise ValueError(
                f"layers: got adapters for layers {missing}, wanted some of {sorted(self._experts)}"
            )
        self._gates: dict[int, Activation] = {}
        for index, experts in self._experts.items():
            if base == "generated":
                self._gates[index] = _generated_gate(model, index, experts)
            weights = self._weights(index, experts)
            dtypes = {w.dtype for w in weights[:4] if w is not None and w.dtype != torch.uint8}
            if dtypes not in ({torch.bfloat16}, {torch.float16}):
                raise ValueError(
                    f"{type(model).__name__}: layer {index}: got weights in {', '.join(map(str, dtypes))}, wanted all in "
                    "bfloat16 or all in float16"
                )
            if index in layers:
                check_adapters(f"layers: layer {index}", layers[index], weights.w2, gated=has_gate(experts))
        if base == "generated":
            for experts in self._experts.values():
                if not self._of_disk:
                    _lay_out(experts)
        ALL_EXPERTS_FUNCTIONS.register(_NAME, _experts_forward)
        with self.batch(torch.empty(0, dtype=torch.int32)):
            pass

    @contextlib.contextmanager
    def batch(
        self, token_lora_mapping: torch.Tensor, calls: list[MoeCall] | None = None
    ) -> Iterator[None]:
        """Inside, forward passes of the model apply these adapters; outside, the model is as it was.

        Args:
            token_lora_mapping: [T] int32, the adapter of each token of the flattened batch, -1: none (padding, too).
            calls: gets what each MoE layer did, in order; None keeps nothing.

        Raises:
            ValueError: the mapping is no tensor, or the model serves a batch already; or, of a pass, it never calls experts that
                have adapters.
        """
        if not isinstance(token_lora_mapping, torch.Tensor):
            raise ValueError(
                f"token_lora_mapping: got {type(token_lora_mapping).__name__}, wanted a tensor [T] int32"
            )
        if any(hasattr(experts, "moe_lora") for experts in self._experts.values()):
            raise ValueError(
                "got batch() inside of a batch() of the same model, wanted one after the other"
            )
        before = self._model.get_experts_implementation()
        self._mapping, self._calls = token_lora_mapping, calls
        self._ran.clear()
        with contextlib.ExitStack() as stack:
            try:
                self._model.set_experts_implementation(_NAME)
                for index, experts in self._experts.items():
                    experts.moe_lora = functools.partial(self.experts, index, experts)
                    if type(experts).__name__ in _EXCHANGED:
                        forward = functools.partial(self._rows, experts) if takes_rows(experts) else experts.moe_lora
                        stack.enter_context(_instead(experts, forward))
                    elif not _asks_us(experts):
                        raise ValueError(
                            f"{type(self._model).__name__}: layer {index}: {type(experts).__name__}: got a forward that does not "
                            f"ask transformers' interface of experts, wanted the class's own\n  hint: {_HINT}"
                        )
                stack.callback(self._model.register_forward_hook(self._check_ran).remove)
                yield
            finally:
                self._mapping = self._calls = None
                for experts in self._experts.values():
                    vars(experts).pop("moe_lora", None)
                self._model.set_experts_implementation(before)

    def _check_ran(self, *_: Any) -> None:
        """Behind a pass of the model: blocks around the experts may have been exchanged for others, which never call them."""
        missing = sorted(self._layers.keys() - self._ran)
        self._ran.clear()
        if missing:
            raise ValueError(
                f"{type(self._model).__name__}: got a pass that did not run the experts of layers {missing}, which have "
                f"adapters, wanted blocks that call their experts\n  hint: {_HINT}"
            )

    def experts(
        self,
        index: int,
        base: Any,
        x: torch.Tensor,
        topk_ids: torch.Tensor,
        topk_weights: torch.Tensor,
    ) -> torch.Tensor:
        """The experts of decoder layer ``index`` with the batch's adapters: x [T, H] -> [T, H].

        Raises:
            ValueError: no batch is being served, or its mapping is not of these T tokens.
        """
        num_tokens, top_k = topk_ids.shape
        if self._mapping is None:
            raise ValueError("got a forward pass outside of batch(), wanted one inside")
        self._ran.add(index)
        copies = _weights(base).w2.shape[0] if takes_rows(base) else 1
        mapping = self._mapping.repeat(copies)
        if mapping.shape != (num_tokens,):
            raise ValueError(
                f"token_lora_mapping: got {list(self._mapping.shape)}, wanted [{num_tokens // copies}]"
            )
        lora = self._layers.get(index)
        x, topk_ids, topk_weights = x.contiguous(), topk_ids.contiguous(), topk_weights.contiguous()
        if self._base == "generated":
            weights = self._weights(index, base)
            layer = MoeLayer(self._kernels, lora=lora, **weights._asdict(), **self._gates[index]._asdict())
            result = layer(x, topk_ids, topk_weights, mapping)
            return self._note(index, x, topk_ids, topk_weights, result)
        expert_of_pair = topk_ids.flatten()
        weights = _weights(base)
        gate_up = _expert_linear(x.repeat_interleave(top_k, 0), weights.w13, expert_of_pair, weights.w13_bias)
        if lora is not None:
            slots, num_experts = lora.down.a[0].shape[:2]
            route = self._kernels.moe_route(
                topk_ids,
                mapping,
                num_experts=num_experts,
                max_loras=slots,
                adapter_enabled=lora.adapter_enabled,
                assignment=self._assignment,
            )
            in_turns = weights.layout == "interleaved"
            if in_turns:  # adapters have a factor of each
                gate_up = torch.cat([gate_up[:, ::2], gate_up[:, 1::2]], 1)
            self._kernels.moe_lora(gate_up.view(num_tokens, top_k, -1), x, *lora.gate_up, route)
            if in_turns:
                gate_up = torch.stack(gate_up.chunk(2, 1), 2).flatten(1)
        inter = between(base, gate_up)
        down = _expert_linear(inter, weights.w2, expert_of_pair, weights.w2_bias).view(num_tokens, top_k, -1)
        out = (down * topk_weights.unsqueeze(-1)).to(x.dtype)
        if lora is not None:
            self._kernels.moe_lora(
                out, inter, *lora.down, route, topk_weights=topk_weights, mul_routed_weight=True
            )
        return self._note(index, x, topk_ids, topk_weights, out.sum(1))

    def _rows(self, base: Any, x: torch.Tensor) -> torch.Tensor:
        """All tokens for each of E experts, weighted, [E * T, H]: a token is zero where it is not for this expert."""
        num_experts = _weights(base).w2.shape[0]
        experts = torch.arange(num_experts, dtype=torch.int32, device=x.device)
        ids = torch.where((x != 0).any(1), experts.repeat_interleave(len(x) // num_experts), -1)
        out: torch.Tensor = base.moe_lora(x, ids.to(torch.int32)[:, None], torch.ones(len(x), 1, device=x.device))
        return out

    def _weights(self, index: int, experts: Any) -> _Weights:
        return self._of_disk.get(index) or _weights(experts)

    def _note(self, index: int, *call: torch.Tensor) -> torch.Tensor:
        if self._calls is not None:
            self._calls.append(MoeCall(index, *call))
        return call[-1]


class LinearLora:
    """The adapters on linear layers and embeddings of a model, served by a generated package.

    Args:
        model: a ``transformers`` model, bfloat16 or float16; its weights stay as they are.
        layers: from ``stack_linears`` with ``linear_shapes(model, packed={})``, or of ``AdapterSlots``; on the model's device.
        kernels: the generated package, under whatever name it was imported.

    Raises:
        ValueError: a layer is not one of the model, or is none whose output could be added to (a router), or does not fit.
    """

    def __init__(self, model: Any, layers: Mapping[str, LinearBuffers], kernels: ModuleType) -> None:
        if not isinstance(model, torch.nn.Module) or not isinstance(layers, Mapping):
            found = f"{type(model).__name__} and {type(layers).__name__}"
            raise ValueError(f"model, layers: got {found}, wanted a model of transformers and what stack_linears returns")
        _check_bare(model)
        self._kernels = kernels
        self._hooked: list[tuple[torch.nn.Module, LinearBuffers, float]] = []
        modules = dict(model.named_modules())
        for name, layer in layers.items():
            module = modules.get(name)
            if not isinstance(module, (torch.nn.Linear, torch.nn.Embedding)) or not _gives_rows(module):
                kind = "no such module" if module is None else type(module).__name__
                raise ValueError(f"layers: {name}: got {kind}, wanted a Linear or an Embedding of the model, which gives rows")
            weight = module.weight
            inputs, outputs = weight.shape if isinstance(module, torch.nn.Embedding) else weight.shape[::-1]
            sides = (*layer.a, *layer.b)
            sizes = [tuple(side.shape[1:]) for side in sides]
            rank = sizes[0][0]
            if sizes != [(rank, inputs), (outputs, rank)] or layer.offset_start:
                found = f"{sizes} from column {layer.offset_start} on"
                raise ValueError(f"layers: {name}: got factors {found}, wanted [r, {inputs}] and [{outputs}, r]")
            kinds = {(side.dtype, side.device) for side in sides}
            if kinds != {(weight.dtype, weight.device)}:
                found = ", ".join(f"{dtype} on {device}" for dtype, device in kinds)
                raise ValueError(f"layers: {name}: got {found}, wanted {weight.dtype} on {weight.device}")
            self._hooked.append((module, layer, _scale_of(module)))
        if len({len(layer.a[0]) for _, layer, _ in self._hooked}) > 1:
            raise ValueError("layers: got different numbers of adapters, wanted as many in each")

    @contextlib.contextmanager
    def batch(self, token_lora_mapping: torch.Tensor) -> Iterator[None]:
        """Inside, forward passes of the model apply these adapters; outside, the model is as it was.

        Args:
            token_lora_mapping: [T] int32, the adapter of each token of the flattened batch, -1: none (padding, too).

        Raises:
            ValueError: the mapping does not fit; or, of a pass, a layer that sees other tokens than these.
        """
        with contextlib.ExitStack() as stack:
            if self._hooked:
                route = self._kernels.lora_route(token_lora_mapping, max_loras=len(self._hooked[0][1].a[0]))
            for module, layer, scale in self._hooked:
                add = functools.partial(self._add, layer, scale, token_lora_mapping, route)
                stack.callback(module.register_forward_hook(add).remove)
            yield

    def _add(
        self,
        layer: LinearBuffers,
        scale: float,
        mapping: torch.Tensor,
        route: Any,
        module: torch.nn.Module,
        arguments: tuple[torch.Tensor, ...],
        out: torch.Tensor,
    ) -> torch.Tensor:
        rows, x = out.reshape(-1, out.shape[-1]), arguments[0]
        if len(rows) != len(mapping):
            raise ValueError(f"token_lora_mapping: got [{len(mapping)}], wanted [{len(rows)}], the tokens of {module}")
        if isinstance(module, torch.nn.Embedding):
            embedding_lora(self._kernels, rows, x.reshape(-1), layer, mapping, route, scale)
        else:
            self._kernels.lora(rows, x.reshape(-1, x.shape[-1]), layer.a, layer.b, route)
        return rows.view(out.shape)


def _check_bare(model: torch.nn.Module) -> None:
    """Raises ValueError if a model, or a part of one, has adapters of PEFT on it."""
    if any(type(module).__module__.partition(".")[0] == "peft" for module in model.modules()):
        raise ValueError(
            f"{type(model).__name__}: got a model with adapters of PEFT on it, which would be added too; wanted the base model"
        )


def _gives_rows(module: torch.nn.Module) -> bool:
    """Whether a Linear or Embedding gives one row for each of its input, to which one can be added; routers give more."""
    weight: Any = module.weight
    if isinstance(module, torch.nn.Embedding):
        row, size = torch.zeros(1, dtype=torch.int64, device=weight.device), weight.shape[1]
    else:
        row, size = torch.zeros(1, weight.shape[1], dtype=weight.dtype, device=weight.device), weight.shape[0]
    try:
        with torch.no_grad():
            out = module(row)
    except (IndexError, RuntimeError, TypeError, ValueError):
        return False
    return isinstance(out, torch.Tensor) and out.shape == (1, size)


def _scale_of(module: torch.nn.Linear | torch.nn.Embedding) -> float:
    """What an embedding multiplies its rows by, rounded as they are; PEFT does so to those of adapters."""
    return float(torch.as_tensor(getattr(module, "embed_scale", 1.0)).to(module.weight.dtype))


@contextlib.contextmanager
def _instead(module: torch.nn.Module, forward: Callable[..., torch.Tensor]) -> Iterator[None]:
    """Inside, a module runs this."""
    before = vars(module).get("forward")
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
        if before is not None:
            module.forward = before


def _experts_forward(
    experts: Any, hidden: torch.Tensor, topk_ids: torch.Tensor, topk_weights: torch.Tensor
) -> torch.Tensor:
    out: torch.Tensor = experts.moe_lora(hidden, topk_ids, topk_weights)
    return out


def _asks_us(experts: Any) -> bool:
    """Whether the forward of experts is that of transformers' interface, and takes the implementation that the model was told."""
    mine, asked = experts.moe_lora, list[bool]()
    experts.moe_lora = lambda *_: asked.append(True)
    try:
        with contextlib.suppress(Exception):  # of forwards of others
            experts.forward(None, None, None)
    finally:
        experts.moe_lora = mine
    return bool(asked)


# Experts whose implementation cannot be chosen by name; what they compute is known.
_EXCHANGED = ("Llama4TextExperts", "Step3p7Experts")
_HINT = "call moe_route and moe_lora between the model's own products, as MoeLora.experts does"
_FUSED = "gate_up_proj [E, 2 * I, H], or up_proj [E, I, H] without a gate, and down_proj [E, H, I]"


def _has_fused(module: torch.nn.Module) -> bool:
    """Whether it has the parameters of fused experts."""

    def has(name: str) -> bool:
        return isinstance(getattr(module, name, None), torch.nn.Parameter)

    return has("gate_up_proj") or (has("up_proj") and has("down_proj"))


def _unlike_ours(experts: Any) -> str:
    """What makes experts other ones than those that this glue runs; "" if nothing does."""
    if not (hasattr(experts, "is_concatenated") or type(experts).__name__ in _EXCHANGED):
        return "experts with a forward of their own, which cannot be exchanged"
    what = {
        "a norm behind the experts": getattr(experts, "has_post_expert_norm", False),
        "experts that are sharded over GPUs": getattr(experts, "_is_expert_parallel", False),
    }
    if not any(what.values()):
        sizes = [tuple(getattr(w, "shape", ())) for w in _weights(experts)[:2]]
        fits = len(sizes[1]) == 3 and sizes[0] == (
            sizes[1][0],
            *reversed(_shape(experts).widths(_shape(experts).parameters[0])),
        )
        what[f"weights of {list(sizes[0])} and {list(sizes[1])}"] = not fits
    return ", ".join(name for name, holds in what.items() if holds)


class _Weights(NamedTuple):
    """The weights of experts as ``MoeLayer`` takes them; views of a model's."""

    w13: torch.Tensor
    w2: torch.Tensor
    w13_bias: torch.Tensor | None
    w2_bias: torch.Tensor | None
    layout: str
    w13_scale: torch.Tensor | None = None
    w2_scale: torch.Tensor | None = None
    apply_router_weight_on_input: bool = False


def _mxfp4(name: str, experts: Any, tensors: Mapping[str, torch.Tensor]) -> _Weights:
    """The weights of a checkpoint of gpt-oss: blocks [E, rows, columns / 32, 16] and scales [E, rows, columns / 32]."""
    plain = _weights(experts)
    if plain.w2_bias is None or plain.layout != "interleaved":
        raise ValueError(f"mxfp4: {name}: got {type(experts).__name__}, wanted experts with biases and gate and up in turns")
    found = []
    for parameter, weight in (("gate_up_proj", plain.w13), ("down_proj", plain.w2)):
        num_experts, rows, columns = weight.shape
        groups = columns // 32
        for kind, size in (("blocks", (num_experts, rows, groups, 16)), ("scales", (num_experts, rows, groups))):
            tensor = tensors.get(f"{name}.{parameter}_{kind}")
            if tensor is not None and kind == "scales" and tensor.dtype == torch.float8_e8m0fnu:
                tensor = tensor.view(torch.uint8)  # the same bytes
            got = None if tensor is None else (tensor.dtype, tuple(tensor.shape))
            if tensor is None or got != (torch.uint8, size) or columns % 32:
                raise ValueError(f"mxfp4: {name}.{parameter}_{kind}: got {got}, wanted uint8 {list(size)}")
            found.append(tensor.to(plain.w2_bias.device).contiguous())
    w13, w13_scale, w2, w2_scale = found
    return plain._replace(w13=w13.flatten(-2), w2=w2.flatten(-2), w13_scale=w13_scale, w2_scale=w2_scale)


def _weights(experts: Any) -> _Weights:
    first = "gate_up_proj" if has_gate(experts) else "up_proj"
    w13, w2 = getattr(experts, first), experts.down_proj
    if _is_transposed(experts) and w13.dim() == w2.dim() == 3:
        w13, w2 = w13.transpose(1, 2), w2.transpose(1, 2)
    layout = "halves" if getattr(experts, "is_concatenated", True) else "interleaved"
    if not getattr(experts, "has_bias", False):
        return _Weights(w13, w2, None, None, layout, apply_router_weight_on_input=takes_rows(experts))
    return _Weights(w13, w2, getattr(experts, f"{first}_bias"), experts.down_proj_bias, layout)


def _is_transposed(experts: Any) -> bool:
    return bool(getattr(experts, "is_transposed", takes_rows(experts)))


def _generated_gate(model: Any, index: int, experts: Any) -> Activation:
    """The activation that generated products have between them; raises ValueError where they do not compute these experts."""
    gate, where = activation_of(experts), f"{type(model).__name__}: layer {index}: {type(experts).__name__}"
    if gate is None:
        raise ValueError(
            f"{where}: got {_gate_of(experts)}, wanted one that the generated kernels compute\n"
            '  hint: base="torch" runs the model\'s own'
        )
    if found := _unlike_kernels(experts, gate):
        raise ValueError(
            f"{where}: got {found}, wanted both or neither, with a gate that is clamped\n"
            '  hint: base="torch" runs the model\'s own products'
        )
    return gate


def _unlike_kernels(experts: Any, gate: Activation) -> str:
    """What the generated kernels have no variant for; "" if nothing is."""
    weights = _weights(experts)
    what = {"gate and up in turns": weights.layout == "interleaved", "biases": weights.w13_bias is not None}
    served = not any(what.values()) or (all(what.values()) and gate.activation == "swiglu_clamp")
    return "" if served else ", ".join(name for name, holds in what.items() if holds)


def _lay_out(experts: Any) -> None:
    """Let the rows of weights that are transposed lie as kernels read them."""
    for weight in (experts.gate_up_proj, experts.down_proj) if _is_transposed(experts) else ():
        if weight.stride(1) != 1:
            weight.data = weight.data.transpose(1, 2).contiguous().transpose(1, 2)


def _gate_of(experts: Any) -> str:
    """What the gate of experts is called."""
    from transformers.integrations import moe

    default = getattr(moe, "_default_apply_gate", None)
    gate: Any = getattr(type(experts), "_apply_gate", default)
    if gate is not default or "_apply_gate" in vars(experts):
        return f"a gate of its own ({gate.__qualname__})"
    act = getattr(experts, "act_fn", None)
    return "no act_fn" if act is None else f"the activation {getattr(act, '__name__', type(act).__name__)}"


def _shape(experts: Any) -> ExpertShape:
    return (ExpertShape if has_gate(experts) else UngatedShape)(*_weights(experts).w2.shape)


def _expert_linear(
    x: torch.Tensor, weight: torch.Tensor, expert_of_row: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """out[p] = x[p] . weight[expert_of_row[p]]^T + bias[expert_of_row[p]]; rows of expert -1 are zero. It asks the host."""
    out = x.new_zeros(x.shape[0], weight.shape[1])
    for expert in torch.unique(expert_of_row[expert_of_row >= 0]).tolist():
        rows = (expert_of_row == expert).nonzero().squeeze(1)
        out[rows] = torch.nn.functional.linear(x[rows], weight[expert], None if bias is None else bias[expert])
    return out
