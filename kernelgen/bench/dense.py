"""Dense LoRA on this GPU: what is measured, the operands, the peers, and the rows that come of it.

Times are medians of CUDA-graph replays over operands that rotate past the L2 cache. Routes and the peers' metadata are made
beforehand, as engines make them once a step for all layers. Every result is compared with fp64 before it is timed.
"""

from __future__ import annotations

import dataclasses
import importlib
import itertools
import math
import zlib
from types import MappingProxyType
from typing import Any, Callable, Iterator, Mapping, Sequence

import torch

from kernelgen.bench.timing import capture, host_us, replay

TOUCHED_BYTES = 200e6  # by one replay, four times the L2 of an H200
_MAX_SETS = 32
_CHECKED_TOKENS = 16
PEERS = ("vllm", "torch")
DEFAULT_RANKS, DEFAULT_TOKENS = (16, 64), (1, 16, 64, 256, 1024, 4096)


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


MODELS: Mapping[str, Mapping[str, Layer]] = MappingProxyType(
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
SITES = ("qkv", "o", "gate_up", "down")


@dataclasses.dataclass(frozen=True)
class Cell:
    """One point of the sweep; the same cell always gets the same operands.

    Attributes:
        active, slots: adapters that the batch uses, in turns over its tokens, and that the weights hold.
        scales: of FP8 weights ("tensor", "channel" or "group"); None: bfloat16.
    """

    model: str
    site: str
    rank: int
    tokens: int
    active: int = 4
    slots: int = 4
    scales: str | None = None

    @property
    def layer(self) -> Layer:
        return MODELS[self.model][self.site]

    @property
    def bytes(self) -> float:
        """That must move, if each byte moved once; ``out`` is read and written."""
        k, width, slices = self.layer.k, sum(self.layer.widths), len(self.layer.widths)
        weights = min(self.active, self.tokens) * self.rank * (slices * k + width)
        return (1.0 if self.scales else 2.0) * weights + 2.0 * self.tokens * (k + 2 * width)


def cells(
    models: Sequence[str],
    sites: Sequence[str] = SITES,
    ranks: Sequence[int] = DEFAULT_RANKS,
    tokens: Sequence[int] = DEFAULT_TOKENS,
    adapters: Sequence[tuple[int, int]] = ((4, 4), (1, 4)),
    scales: str | None = None,
) -> Iterator[Cell]:
    """All cells; ``adapters`` are pairs of active and slots."""
    for model, site, rank, (active, slots), count in itertools.product(models, sites, ranks, adapters, tokens):
        yield Cell(model, site, rank, count, active, slots, scales)


@dataclasses.dataclass(frozen=True)
class Operands:
    """One call: out [T, sum of widths], x [T, K], S tensors [L, rank, K] and S of [L, N_s, rank], and scales of FP8."""

    out: torch.Tensor
    x: torch.Tensor
    lora_a: tuple[torch.Tensor, ...]
    lora_b: tuple[torch.Tensor, ...]
    scales: Mapping[str, Any]


_Call = Callable[[], None]
_Prepare = Callable[[Cell, torch.Tensor, Sequence[Operands]], "list[_Call] | None"]


def sweep(
    wanted: Sequence[Cell],
    package: str,
    peers: Sequence[str],
    device: torch.device,
    *,
    check_only: bool = False,
    copy_gb_s: float = math.inf,
) -> Iterator[dict[str, Any]]:
    """A row for each cell and implementation that serves it: us, host_us and floor_us a call; ``error`` is relative."""
    makers: dict[str, _Prepare] = {"kernelgen": _ours(package)}
    makers.update({name: {"vllm": _vllm, "torch": _torch}[name]() for name in peers})
    for cell in wanted:
        mapping, sets = operands(cell, device, 1 if check_only else None)
        rows: dict[str, dict[str, Any]] = {}
        graphs, calls_of = {}, {}
        for name, prepare in makers.items():
            calls = prepare(cell, mapping, sets)
            if calls is None:
                continue
            row = {**dataclasses.asdict(cell), "impl": name, "floor_us": round(cell.bytes / (copy_gb_s * 1e3), 3)}
            row["error"] = check(calls[0], mapping, sets[0])
            rows[name] = row
            if not check_only:
                calls = calls * max(1, 16 // len(calls))
                graphs[name], calls_of[name] = (capture(calls), len(calls)), calls
        for name, spread in replay(graphs).items():
            rows[name]["us"] = round(spread.median, 3)
            rows[name]["host_us"] = round(host_us(calls_of[name], spread.median), 2)
        yield from rows.values()


def operands(cell: Cell, device: torch.device, sets: int | None = None) -> tuple[torch.Tensor, list[Operands]]:
    """The adapter of each token, and as many operands as pass the L2 cache, or ``sets``."""
    torch.manual_seed(zlib.crc32(repr(cell).encode()))
    k, widths = cell.layer.k, cell.layer.widths
    if sets is None:
        sets = min(_MAX_SETS, max(2, math.ceil(TOUCHED_BYTES / cell.bytes)))

    def normal(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.bfloat16, device=device).normal_(0.0, scale)

    made = []
    for _ in range(sets):
        a = tuple(normal(cell.slots, cell.rank, k, scale=k**-0.5) for _ in widths)
        b = tuple(normal(cell.slots, n, cell.rank, scale=cell.rank**-0.5) for n in widths)
        scales: dict[str, Any] = {}
        if cell.scales:
            quantize = importlib.import_module("generated").quantize_weights
            a, scales["a_scale"] = zip(*(quantize(w, cell.scales) for w in a), strict=True)
            b, scales["b_scale"] = zip(*(quantize(w, cell.scales) for w in b), strict=True)
        made.append(Operands(normal(cell.tokens, sum(widths)), normal(cell.tokens, k), a, b, scales))
    mapping = torch.arange(cell.tokens, dtype=torch.int32, device=device) % cell.active
    return mapping, made


def check(call: _Call, mapping: torch.Tensor, operand: Operands) -> float | None:
    """The relative error of some tokens against fp64, for weights in 16 bits; None where they are FP8."""
    chosen = torch.linspace(0, mapping.numel() - 1, min(_CHECKED_TOKENS, mapping.numel())).long().to(mapping.device)
    before = operand.out[chosen].double()
    call()
    if operand.scales:
        return None
    delta = []
    for a, b in zip(operand.lora_a, operand.lora_b, strict=True):
        adapter = mapping[chosen].long()
        v = torch.einsum("trk,tk->tr", a[adapter].double(), operand.x[chosen].double())
        delta.append(torch.einsum("tnr,tr->tn", b[adapter].double(), v))
    wanted = before + torch.cat(delta, 1)
    error = (operand.out[chosen].double() - wanted).norm() / wanted.norm()
    if not error < 0.01:
        raise ValueError(f"a relative error of {float(error):.2g}")
    return float(error)


def _ours(package: str) -> _Prepare:
    kg = importlib.import_module(package)

    def prepare(cell: Cell, mapping: torch.Tensor, sets: Sequence[Operands]) -> list[_Call]:
        slices = len(cell.layer.widths)
        space = kg.lora_workspace(
            max_tokens=cell.tokens, max_loras=cell.slots, max_rank=cell.rank, num_slices=slices, device=mapping.device
        )
        route = kg.lora_route(mapping, max_loras=cell.slots, workspace=space)

        def call(o: Operands) -> None:
            kg.lora(o.out, o.x, o.lora_a, o.lora_b, route, **o.scales)

        return [lambda o=o: call(o) for o in sets]  # type: ignore[misc]

    return prepare


def _vllm() -> _Prepare:
    """Its shrink and expand with the metadata and the buffer of its Punica wrapper."""
    ops = importlib.import_module("vllm.lora.ops.triton_ops")
    metadata = importlib.import_module("vllm.lora.ops.triton_ops.lora_kernel_metadata")

    def prepare(cell: Cell, mapping: torch.Tensor, sets: Sequence[Operands]) -> list[_Call] | None:
        if cell.scales:
            return None
        meta = metadata.LoRAKernelMeta.make(cell.slots, cell.tokens, mapping.device)
        meta.prepare_tensors(mapping)
        arguments = meta.meta_args(cell.tokens, False)
        y = torch.empty((len(cell.layer.widths), cell.tokens, cell.rank), device=mapping.device)

        def call(o: Operands) -> None:
            ops.lora_shrink(o.x, list(o.lora_a), y, *arguments, 1.0)
            ops.lora_expand(y, list(o.lora_b), o.out, *arguments, offset_start=0, add_inputs=True)

        return [lambda o=o: call(o) for o in sets]  # type: ignore[misc]

    return prepare


def _torch() -> _Prepare:
    """What PyTorch alone does for one adapter."""

    def prepare(cell: Cell, mapping: torch.Tensor, sets: Sequence[Operands]) -> list[_Call] | None:
        if cell.active > 1 or cell.scales:
            return None

        def call(o: Operands) -> None:
            begin = 0
            for a, b in zip(o.lora_a, o.lora_b, strict=True):
                o.out[:, begin : begin + b.shape[1]].addmm_(o.x @ a[0].T, b[0].T)
                begin += b.shape[1]

        return [lambda o=o: call(o) for o in sets]  # type: ignore[misc]

    return prepare
