"""What is measured, as data: model shapes, the sites of a layer, and the cells that they span. Imports no torch."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import zlib
from pathlib import Path
from typing import Any, Iterator, Literal, Sequence, get_args

from kernelgen.diagnostics import failure

Site = Literal["w13", "w2", "route", "layer"]
Routing = Literal["uniform", "skewed"]
Quant = Literal["none", "tensor", "channel", "group"]  # FP8 weights, and of what there is a scale
Act = Literal["none", "tensor", "token", "group"]  # an FP8 x, and of what there is a scale
SITES: tuple[Site, ...] = get_args(Site)
ROUTINGS: tuple[Routing, ...] = get_args(Routing)
QUANTS: tuple[Quant, ...] = get_args(Quant)
ACTS: tuple[Act, ...] = get_args(Act)
GROUP = 128  # rows and columns of a group
# w13 and w2 alone; the route of a batch; route + w13 + w2, what the adapters add to one layer.
PROJECTIONS: dict[Site, tuple[Site, ...]] = {
    "w13": ("w13",),
    "w2": ("w2",),
    "route": (),
    "layer": ("w13", "w2"),
}


@dataclasses.dataclass(frozen=True)
class Projection:
    """Sizes of one LoRA pair of an expert: K inputs, N outputs for each of S slices."""

    k: int
    n: int
    slices: int
    weighted: bool  # a row of x per pair, times the routing weight


@dataclasses.dataclass(frozen=True)
class Model:
    """What MoE-LoRA needs to know of a model."""

    name: str
    hidden: int
    intermediate: int  # of one expert, on one GPU
    experts: int
    top_k: int
    gated: bool = True  # two slices, gate and up

    def projection(self, site: Site) -> Projection:
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
        Model("nemotron-3-nano", 2688, 1856, 128, 6, gated=False),
        Model("tiny", 256, 128, 8, 2),
    )
}
DEFAULT_MODELS = ("qwen3-30b-a3b", "deepseek-v3", "gpt-oss-120b", "mixtral-8x7b")
DEFAULT_SITES: tuple[Site, ...] = ("w13", "w2")
DEFAULT_RANKS = (16, 64, 128)
DEFAULT_TOKENS = (1, 4, 16, 64, 256, 1024, 4096)
QUICK_MODELS = ("qwen3-30b-a3b", "mixtral-8x7b")
QUICK_RANKS = (16, 64)
QUICK_TOKENS = (1, 16, 256, 4096)


@dataclasses.dataclass(frozen=True)
class Cell:
    """One point of the sweep; the same cell always gets the same inputs."""

    model: Model
    site: Site
    rank: int
    tokens: int
    active: int = 4  # adapters that the batch uses
    slots: int = 4  # adapters that the weights hold
    base: float = 0.0  # share of tokens without an adapter
    routing: Routing = "uniform"  # skewed: a quarter of the experts takes 90 % of the pairs
    add: bool = True
    dtype: Literal["bf16", "f16"] = "bf16"
    quant: Quant = "none"
    act: Act = "none"

    def __post_init__(self) -> None:
        if min(self.rank, self.tokens, self.active) < 1:
            raise failure("KG070", "workload", "rank, tokens and active adapters are at least 1")
        if self.active > self.slots:
            raise failure("KG070", "workload", f"{self.active} active adapters do not fit {self.slots} slots")
        if not 0.0 <= self.base < 1.0:
            raise failure("KG070", "workload", f"the share of base tokens is {self.base}, wanted 0 to below 1")

    @property
    def projections(self) -> tuple[Projection, ...]:
        """The LoRA pairs that this cell runs: none for a route."""
        return tuple(self.model.projection(site) for site in PROJECTIONS[self.site])

    def columns(self) -> dict[str, Any]:
        """The cell as the columns of a result row that identify it."""
        model = dataclasses.asdict(self.model)
        sizes = {name: model[name] for name in ("hidden", "intermediate", "experts", "top_k")}
        own = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "model"}
        return {"model": self.model.name, **sizes, **own}

    @property
    def is_fp8(self) -> bool:
        """Whether weights or x are FP8."""
        return (self.quant, self.act) != ("none", "none")

    @property
    def seed(self) -> int:
        """A seed from the cell alone; add and set, FP8 or not, and all implementations see the same routing."""
        free = ("add", "quant", "act")
        columns = {name: value for name, value in self.columns().items() if name not in free}
        return zlib.crc32(json.dumps(columns, sort_keys=True).encode())


@dataclasses.dataclass(frozen=True)
class Selection:
    """Lists of what to span; a route does not depend on add, so it is there once."""

    models: Sequence[Model]
    sites: Sequence[Site] = DEFAULT_SITES
    ranks: Sequence[int] = DEFAULT_RANKS
    tokens: Sequence[int] = DEFAULT_TOKENS
    adapters: Sequence[tuple[int, int]] = ((4, 4),)  # (active, slots)
    bases: Sequence[float] = (0.0,)
    routings: Sequence[Routing] = ("uniform",)
    adds: Sequence[bool] = (True, False)
    dtype: Literal["bf16", "f16"] = "bf16"
    quants: Sequence[tuple[Quant, Act]] = (("none", "none"),)

    def cells(self) -> Iterator[Cell]:
        """All cells, those that share weights next to each other.

        Raises:
            Failure: a combination that cannot be.
        """
        for model, (active, slots), rank, site, tokens, base, routing, add, fp8 in itertools.product(
            self.models,
            self.adapters,
            self.ranks,
            self.sites,
            self.tokens,
            self.bases,
            self.routings,
            self.adds,
            self.quants,
        ):
            if site == "route":
                if add != self.adds[0] or fp8 != self.quants[0]:
                    continue
                add, fp8 = True, ("none", "none")
            yield Cell(model, site, rank, tokens, active, slots, base, routing, add, self.dtype, *fp8)


@dataclasses.dataclass(frozen=True)
class Work:
    """The least that a cell must move and compute."""

    bytes: float
    flops: float

    def floor_us(self, copy_gb_s: float, tflop_s: float) -> float:
        """Microseconds that no kernel can beat by much, at the given ceilings."""
        return max(self.bytes / (copy_gb_s * 1e3), self.flops / (tflop_s * 1e6))


def work(cell: Cell, groups: float, live_tokens: float, live_pairs: float) -> Work:
    """What ``cell`` must move and compute.

    Each A and B of a group, that is of an (adapter, expert) that is hit, is read once, each live row of x once, and each
    live row of out is written once and with ``add`` read once; FP8 numbers have their scales beside them. A route reads
    ids and mapping and writes its tables.
    """
    if not cell.projections:
        pairs = cell.tokens * cell.model.top_k
        return Work(4.0 * (pairs + cell.tokens + live_pairs) + 16.0 * groups, 0.0)
    a_size, x_size = (2 if scales == "none" else 1 for scales in (cell.quant, cell.act))
    total_bytes = total_flops = 0.0
    for p in cell.projections:
        rows = live_pairs if p.weighted else live_tokens
        outputs = live_pairs * p.slices * p.n * (2 if cell.add else 1)
        weights: float = a_size * cell.rank * (p.k + p.n)
        weights += 4 * _count(cell.quant, cell.rank, p.k) + 4 * _count(cell.quant, p.n, cell.rank)
        x = x_size * rows * p.k + 4 * _count(cell.act, rows, p.k, 1)
        total_bytes += groups * p.slices * weights + x + 2 * outputs
        total_flops += 2.0 * live_pairs * p.slices * cell.rank * (p.k + p.n)
    return Work(total_bytes, total_flops)


def scale_shape(scales: Quant | Act, rows: int, columns: int, group_rows: int = GROUP) -> tuple[int, ...]:
    """The shape of the scales of a matrix [rows, columns] of FP8; the groups of x are of one row."""
    shapes = {
        "tensor": (),
        "channel": (rows,),
        "token": (rows, 1),
        "group": (-(-rows // group_rows), -(-columns // GROUP)),
    }
    return shapes[scales]


def _count(scales: Quant | Act, rows: float, columns: int, group_rows: int = GROUP) -> float:
    if scales == "none":
        return 0.0
    return float(math.prod(scale_shape(scales, math.ceil(rows), columns, group_rows)))


def expected_groups(cell: Cell) -> float:
    """How many groups a batch of ``cell`` hits on average, if every group is equally likely."""
    groups = cell.active * cell.model.experts
    pairs = cell.tokens * cell.model.top_k * (1.0 - cell.base)
    return groups * -math.expm1(-pairs / groups)


_HIDDEN = ("hidden_size", "d_model", "n_embd")
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
    "top_k_experts",
)
_ACTIVATION = ("mlp_hidden_act", "hidden_act", "hidden_activation")


def model_from_config(path: Path, tp: int = 1) -> Model:
    """The shapes in a model's ``config.json``, for one of ``tp`` tensor-parallel ranks.

    Raises:
        Failure: not a config, not of a mixture of experts, or not divisible by ``tp``.
    """
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise failure("KG070", str(path), f"cannot be read as JSON: {error}") from error
    if not isinstance(config, dict):
        raise failure("KG070", str(path), "wanted an object, as in a model's config.json")
    # Multimodal models keep the language model's sizes one level down.
    nested = [
        config[key] for key in ("text_config", "llm_config") if isinstance(config.get(key), dict)
    ]
    sources = [*nested, config]

    def size(names: Sequence[str]) -> int:
        for name in names:
            for source in sources:
                value = source.get(name)
                if isinstance(value, list) and value:
                    value = max(value)
                if isinstance(value, int) and value > 0:
                    return value
        raise failure("KG070", str(path), f"none of {', '.join(names)}; is it a mixture of experts?")

    hidden, experts, top_k = size(_HIDDEN), size(_EXPERTS), size(_TOP_K)
    intermediate = size(_INTERMEDIATE)
    if tp < 1 or intermediate % tp:
        raise failure("KG070", str(path), f"{intermediate} columns of an expert do not divide by tp {tp}")
    activation = next((s[n] for s in sources for n in _ACTIVATION if isinstance(s.get(n), str)), "")
    name = str(
        config.get("_name_or_path") or config.get("model_type") or path.parent.name or path.stem
    )
    name = name.rstrip("/").split("/")[-1] + (f"-tp{tp}" if tp > 1 else "")
    return Model(name, hidden, intermediate // tp, experts, top_k, gated="relu2" not in activation)
