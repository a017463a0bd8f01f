"""Which variant a call gets, with which tiles: the generated package is asked, whose front doors launch nothing then."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import ModuleType
from typing import Any, Callable, Mapping, NamedTuple

import torch

from kernelgen.compiled.stand_in import compiling_for, import_package
from kernelgen.compiled.which import Answer
from kernelgen.core.diagnostics import failure
from kernelgen.core.model import Variant
from kernelgen.core.table import inline
from kernelgen.core.targets import PRIMARY, TARGETS


class Launch(NamedTuple):
    """One kernel that the call launches."""

    kernel: str
    num_warps: int
    num_stages: int


@dataclasses.dataclass(frozen=True)
class Served:
    """What a call gets.

    Attributes:
        variant: what runs.
        tiles: what was chosen for it; empty: it has none to choose.
        problem: what the tiles were looked up by.
        measured: whether they were measured for it; else they are the rule's.
        launches: its kernels, in their order.
    """

    variant: Variant
    tiles: Mapping[str, int]
    problem: Mapping[str, Any]
    measured: bool
    launches: tuple[Launch, ...]

    def as_json(self) -> dict[str, Any]:
        launches = [launch._asdict() for launch in self.launches]
        return {
            "variant": self.variant.name,
            "tiles": dict(self.tiles),
            "problem": {name: str(value) if isinstance(value, torch.dtype) else value for name, value in self.problem.items()},
            "measured": self.measured,
            "launches": launches,
        }

    def rows(self) -> list[tuple[str, str]]:
        """For a reader."""
        rows = [("variant", str(self.variant.name))]
        if self.tiles:
            source = "measured for" if self.measured else "by the rule, as nothing was measured for"
            rows.append(("tiles", inline(self.tiles)))
            rows.append(("why", f"{source} {inline(self.problem)}"))
        return rows + [("kernel", f"{k.kernel}: {k.num_warps} warps, {k.num_stages} stages") for k in self.launches]


def ask(out: Path, answer: Answer) -> tuple[Served, ...]:
    """What a call of the case of ``answer`` gets of its family, of the package in ``out`` on a card like an H200: a variant, or
    those of a layer that calls the family several times, in their order.

    Raises:
        Failure: there is no package (exit code 2), or no call like this (1).
    """
    generated = import_package(out, interpreted=True)
    runtime, inside = generated._runtime, f"{generated.__name__}.{answer.family.name}"
    with compiling_for(TARGETS[PRIMARY]), runtime.choosing({}) as choices, runtime.compile_only() as requests:
        try:
            _call(generated, answer)
        except (ValueError, RuntimeError) as error:  # of torch: sizes that no tensor has
            raise failure("KG041", answer.family.spec, f"a call like this is refused: {error}", exit_code=1) from error
    launches: dict[str, list[Any]] = {}
    for request in requests:
        folder, _, module = request.launcher.kernel.fn.__module__.rpartition(".")
        if folder == inside:
            launches.setdefault(module, []).append(request)
    chosen: dict[str, list[Any]] = {}
    for choice in choices:
        if type(choice.key).__module__.startswith(inside + "."):
            chosen.setdefault(choice.schedule, []).append(choice)
    found = []
    for module, made in launches.items():
        (variant,) = (variant for variant in answer.family.variants if variant.module == module)
        kernels = tuple(dict.fromkeys(map(_launch, made)))
        if not chosen.get(variant.kernel):
            found.append(Served(variant, {}, {}, False, kernels))
            continue
        choice = chosen[variant.kernel].pop(0)
        found.append(Served(variant, choice.config._asdict(), choice.key._asdict(), choice.measured, kernels))
    return tuple(found)


def _launch(request: Any) -> Launch:
    return Launch(request.launcher.kernel.fn.__name__, request.options.num_warps, request.options.num_stages)


def _call(generated: ModuleType, answer: Answer) -> Any:
    """Make the call of the case on tensors of the meta device, those of a layer as warm-up makes them."""
    family, sizes, fact = answer.family.name, answer.sizes, answer.fact
    num_tokens, dtype = sizes["num_tokens"], getattr(torch, str(fact("torch_dtype", "bfloat16")))
    quant: dict[str, Any] = {"weight_scales": fact("weight_scales"), "x_scales": fact("x_scales")}

    def empty(*size: int, of: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(size, dtype=of, device="meta")

    def sized(*names: str) -> list[int]:
        return [sizes.get(name, 1) for name in names]  # 1: what the family does not look at

    if family in ("lora_shrink", "lora_expand"):
        widths, adds = (sizes["n"],) * sizes["slices"], bool(fact("adds", True))
        layer = generated.LoraShape(sizes["k"], widths, *sized("rank", "max_loras"), dtype, add_inputs=adds, **quant)
        return layer.call(num_tokens)
    if family in ("moe_act", "moe_sum"):
        pairs, local = (num_tokens, sizes["top_k"]), {"num_experts": sizes["num_experts"]}
        ids = empty(*pairs, of=torch.int32)
        if family == "moe_sum":
            weights = empty(*pairs, of=torch.float32) if fact("weighted") else None
            out = None if fact("zeroes") else empty(num_tokens, sizes["hidden"])
            return generated.moe_sum(empty(*pairs, sizes["hidden"]), ids, topk_weights=weights, out=out, **local)
        width = sizes["intermediate"]
        x = empty(*pairs, (2 if fact("gated") else 1) * width)
        return generated.moe_act(empty(ids.numel(), width), x, ids, activation=answer.tag("epilogue"), **local)
    if family == "moe_gemm" and len(answer.tags("rows")) == 1 and not any(quant.values()) and not fact("adapted"):
        return _product(generated, answer, empty)
    if family in ("moe_runs", "moe_shrink"):
        return _shrink(generated, answer, empty)
    if family in ("moe_align", "moe_gemm", "moe_quant"):
        activation = "relu2" if fact("squared") else "swiglu"
        layer = sized("hidden", "intermediate", "num_experts", "top_k")
        if fact("adapted"):
            quant |= {"rank": sizes["rank"], "max_loras": sizes["max_loras"]}
        if family == "moe_quant":
            quant["weight_scales"] = {"token": "channel"}.get(quant["x_scales"], quant["x_scales"])
        return generated.FusedMoeShape(*layer, activation, dtype, **quant).call(num_tokens, [num_tokens])
    layer = generated.MoeShape(
        *sized("k", "n", "slices", "rank", "top_k", "num_experts", "max_loras"),
        dtype=dtype,
        mul_routed_weight=bool(fact("weighted")),
        add_inputs=bool(fact("adds", True)),
        assignments=(answer.tag("assignment") or "auto",),
        **quant,
    )
    if family in ("moe_lora_shrink", "moe_lora_expand"):
        return generated.ShardedMoeShape(layer).call(num_tokens)
    if family == "moe_route" and answer.tag("schedule") == "from_tables":
        return _engine_route(generated, answer, empty)
    *_, route = layer.routes(num_tokens)  # as it is made for this rank
    if family == "moe_add":
        width = sizes["slices"] * sizes["n"]
        return generated.moe_add(empty(num_tokens, sizes["top_k"], width), empty(num_tokens, sizes["top_k"], width), route)
    if family == "moe_lora":
        return layer._call(route)


_Empty = Callable[..., torch.Tensor]


def _product(generated: ModuleType, answer: Answer, empty: _Empty) -> None:
    """One product of a base layer, whose rows the case says."""
    sizes, fact = answer.sizes, answer.fact
    num_tokens, top_k, experts = (sizes[name] for name in ("num_tokens", "top_k", "num_experts"))
    k, n = sizes["hidden"], sizes["intermediate"]
    x_rows, _, out_rows = answer.tags("rows")[0].partition("_")
    if x_rows != "token":
        k, n = n, k
    ids, pairs, wide = empty(num_tokens, top_k, of=torch.int32), num_tokens * top_k, 2 if fact("gated") else 1
    by_one = out_rows == "token" or answer.tags("schedule") == ["gemv"]
    by_one |= "sorted" not in (x_rows, out_rows) and "gemv" in answer.tags("schedule") and num_tokens <= _FEW_TOKENS
    tables = (generated.no_tables if by_one else generated.moe_align)(ids, num_experts=experts)
    generated.moe_gemm(
        empty(num_tokens if out_rows == "token" else pairs, n),
        empty(num_tokens if x_rows == "token" else pairs, k),
        empty(experts, wide * n, k),
        tables,
        x_rows=x_rows,
        out_rows=out_rows,
        activation={"none": None}.get(answer.tag("epilogue") or "none", answer.tag("epilogue")),
        topk_weights=empty(num_tokens, top_k, of=torch.float32) if fact("weighted") else None,
    )


def _shrink(generated: ModuleType, answer: Answer, empty: _Empty) -> None:
    """The tables of a batch with adapters, and rank vectors on them."""
    family, sizes = answer.family.name, answer.sizes
    num_tokens, top_k, loras = (sizes[name] for name in ("num_tokens", "top_k", "max_loras"))
    ids, mapping = empty(num_tokens, top_k, of=torch.int32), empty(num_tokens, of=torch.int32)
    by_one = family == "moe_shrink" and (answer.tags("schedule") == ["pairs"] or num_tokens <= _FEW_TOKENS)
    options = {"block_m": 0} if by_one else {}
    tables, runs = generated.moe_runs(ids, mapping, num_experts=sizes["num_experts"], max_loras=loras, **options)
    if family == "moe_runs":
        return
    of_tokens = (answer.tag("rows") or "token").startswith("token")
    x_rows = "token" if of_tokens else "pair" if by_one else "sorted"
    x = empty(num_tokens if of_tokens else ids.numel(), sizes["k"])
    lora_a = [empty(loras, sizes["num_experts"], sizes["rank"], sizes["k"])] * sizes["slices"]
    generated.moe_shrink(x, lora_a, tables, runs, x_rows=x_rows)


def _engine_route(generated: ModuleType, answer: Answer, empty: _Empty) -> None:
    """A route of the tables that an engine has, each pair in a block of its own at most."""
    sizes, block = answer.sizes, 16
    num_tokens, top_k, loras = (sizes[name] for name in ("num_tokens", "top_k", "max_loras"))
    columns = min(num_tokens * top_k, sizes["num_experts"]) + num_tokens * top_k // block
    generated.MoeRoute.from_tables(
        empty(loras, columns * block, of=torch.int32),
        empty(loras, columns, of=torch.int32),
        empty(loras, of=torch.int32),
        block_size=block,
        num_tokens=num_tokens,
        top_k=top_k,
        num_experts=sizes["num_experts"],
        max_loras=loras,
    )


_FEW_TOKENS = 4  # for which a layer does without tables
