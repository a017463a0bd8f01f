"""Dense LoRA on this GPU: what is measured, the operands, what is right for them, and the peers.

Times are medians of CUDA-graph replays over operands that rotate past the L2 cache. Routes and the peers' metadata are made
beforehand, as engines make them once a step for all layers. Every result is compared with fp64 before it is timed.
"""

from __future__ import annotations

import dataclasses
import importlib
import math
import zlib
from pathlib import Path
from typing import Any, Callable, Sequence

import torch

from kernelgen.measure import registry
from kernelgen.measure.document import Columns
from kernelgen.measure.implementation import Implementation, Prepared, Unsupported
from kernelgen.measure.inputs import FP8_SIZE, draw_scales, to_fp8
from kernelgen.measure.layers import Cell
from kernelgen.measure.peers.installed import unavailable, version
from kernelgen.measure.verify import WrongResult, matrices
from kernelgen.measure.workloads import scale_shape

TOUCHED_BYTES = 200e6  # by one replay, four times the L2 of an H200
_MAX_SETS = 32
_LEAST_CALLS = 16  # of a graph
_CHECKED_TOKENS = 16
_ERROR_LIMIT = 0.01
PEERS = ("vllm", "torch")

COLUMNS = Columns(
    (*(field.name for field in dataclasses.fields(Cell)), "impl"), {"us": None, "host_us": None, "failed": None}
)


@dataclasses.dataclass(frozen=True)
class Operands:
    """One call: out [T, sum of widths], x [T, K], S tensors [L, rank, K] and S of [L, N_s, rank]; of FP8, with scales."""

    out: torch.Tensor
    x: torch.Tensor
    lora_a: tuple[torch.Tensor, ...]
    lora_b: tuple[torch.Tensor, ...]
    a_scale: tuple[torch.Tensor, ...] = ()
    b_scale: tuple[torch.Tensor, ...] = ()

    @property
    def scales(self) -> dict[str, Any]:
        """As keywords of the op."""
        return {"a_scale": self.a_scale, "b_scale": self.b_scale} if self.a_scale else {}


@dataclasses.dataclass(frozen=True)
class Case:
    """A cell with the adapter of each token, and operands of which calls take turns."""

    cell: Cell
    mapping: torch.Tensor  # int32 [T]
    sets: tuple[Operands, ...]

    def prepared(self, call: Callable[[Operands], None]) -> Prepared:
        """``call`` on each operands, and again until a graph holds enough of them."""
        calls: list[Callable[[], None]] = [lambda o=o: call(o) for o in self.sets]  # type: ignore[misc]
        return Prepared(tuple(calls * max(1, _LEAST_CALLS // len(calls))))


@dataclasses.dataclass(frozen=True)
class Dense:
    """The workload of ``kernelgen bench-lora``. ``sets``: of operands, None: as many as pass the L2 cache."""

    device: torch.device
    sets: int | None = None

    def case(self, cell: Cell) -> Case:
        """The operands of ``cell``, the same each time."""
        sets, device = self.sets, self.device
        torch.manual_seed(zlib.crc32(repr(cell).encode()))
        k, widths = cell.layer.k, cell.layer.widths
        if sets is None:
            sets = min(_MAX_SETS, max(2, math.ceil(TOUCHED_BYTES / cell.bytes)))

        def normal(*shape: int, scale: float = 1.0) -> torch.Tensor:
            return torch.empty(shape, dtype=torch.bfloat16, device=device).normal_(0.0, scale)

        def weights(sizes: Sequence[tuple[int, int]]) -> tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]]:
            """(codes, scales) of matrices [L, rows, columns]."""
            shapes = [(cell.slots, *size) for size in sizes]
            if cell.scales is None:
                return tuple(normal(*shape, scale=shape[2] ** -0.5) for shape in shapes), ()
            codes = tuple(to_fp8(normal(*shape, scale=FP8_SIZE)) for shape in shapes)
            scales = [(cell.slots, *scale_shape(cell.scales, *size)) for size in sizes]
            drawn = (draw_scales(of, columns**-0.5, device) for of, (_, columns) in zip(scales, sizes, strict=True))
            return codes, tuple(drawn)

        made = []
        for _ in range(sets):
            a, a_scale = weights([(cell.rank, k)] * len(widths))
            b, b_scale = weights([(n, cell.rank) for n in widths])
            made.append(Operands(normal(cell.tokens, sum(widths)), normal(cell.tokens, k), a, b, a_scale, b_scale))
        mapping = torch.arange(cell.tokens, dtype=torch.int32, device=device) % cell.active
        return Case(cell, mapping, tuple(made))

    def describe(self, case: Case, ceilings: dict[str, float]) -> dict[str, Any]:
        """Columns of a row that do not depend on who is measured."""
        row: dict[str, Any] = {"sets": len(case.sets), "bytes": round(case.cell.bytes)}
        if ceilings:
            row["floor_us"] = round(case.cell.bytes / (ceilings["copy_gb_s"] * 1e3), 3)
        return row

    def check(self, case: Case, prepared: Prepared) -> float:
        """The relative error of some tokens against fp64, of FP8 weights as they are dequantised.

        Raises:
            WrongResult: it is above a hundredth.
        """
        operand, mapping = case.sets[0], case.mapping
        chosen = torch.linspace(0, mapping.numel() - 1, min(_CHECKED_TOKENS, mapping.numel())).long().to(mapping.device)
        before = operand.out[chosen].double()
        prepared.calls[0]()
        who, delta = (mapping[chosen].long(),), []
        for s in range(len(operand.lora_a)):
            one = slice(s, s + 1)
            (a,) = matrices(operand.lora_a[one], operand.a_scale[one], who)
            (b,) = matrices(operand.lora_b[one], operand.b_scale[one], who)
            delta.append(b @ (a @ operand.x[chosen].double()[:, :, None]))
        wanted = before + torch.cat(delta, 1)[:, :, 0]
        error = float((operand.out[chosen].double() - wanted).norm() / wanted.norm())
        if not error < _ERROR_LIMIT:
            raise WrongResult(f"a relative error of {error:.2g}")
        return error


def load(name: str, package: Path) -> Implementation:
    """``kernelgen``, or the name of a peer; ``package`` is the folder of the generated package.

    Raises:
        Failure: it cannot be imported here.
    """
    if name == "kernelgen":
        return Ours(registry.import_package(package))
    return Vllm() if name == "vllm" else Torch()


def route_of(package: Any, case: Case) -> Any:
    """The route of a case, in a workspace of its own."""
    cell, device = case.cell, case.mapping.device
    sizes = {"max_rank": cell.rank, "num_slices": len(cell.layer.widths), "fp8": cell.scales is not None}
    space = package.lora_workspace(max_tokens=cell.tokens, max_loras=cell.slots, device=device, **sizes)
    return package.lora_route(case.mapping, max_loras=cell.slots, workspace=space)


class _Stateless:
    def versions(self) -> dict[str, str]:
        """None that the environment does not tell."""
        return {}

    def release(self) -> None:
        """Nothing hangs on operands."""


class Ours(_Stateless):
    """The front door of the generated package."""

    name = "kernelgen"

    def __init__(self, package: str) -> None:
        self._package = importlib.import_module(package)

    def prepare(self, case: Case) -> Prepared:
        kg, route = self._package, route_of(self._package, case)
        return case.prepared(lambda o: kg.lora(o.out, o.x, o.lora_a, o.lora_b, route, **o.scales))


class Vllm(_Stateless):
    """Its shrink and expand with the metadata and the buffer of its Punica wrapper."""

    name = "vllm"

    def __init__(self) -> None:
        try:
            self._ops = importlib.import_module("vllm.lora.ops.triton_ops")
            self._metadata = importlib.import_module("vllm.lora.ops.triton_ops.lora_kernel_metadata")
        except ImportError as error:
            raise unavailable("vllm", error) from error

    def versions(self) -> dict[str, str]:
        return {"vllm": version("vllm")}

    def prepare(self, case: Case) -> Prepared:
        cell, device = case.cell, case.mapping.device
        if cell.scales is not None:
            raise Unsupported("16-bit operands only")
        meta = self._metadata.LoRAKernelMeta.make(cell.slots, cell.tokens, device)
        meta.prepare_tensors(case.mapping)
        arguments = meta.meta_args(cell.tokens, False)
        y = torch.empty((len(cell.layer.widths), cell.tokens, cell.rank), device=device)

        def call(o: Operands) -> None:
            self._ops.lora_shrink(o.x, list(o.lora_a), y, *arguments, 1.0)
            self._ops.lora_expand(y, list(o.lora_b), o.out, *arguments, offset_start=0, add_inputs=True)

        return case.prepared(call)


class Torch(_Stateless):
    """What PyTorch alone does for one adapter."""

    name = "torch"

    def prepare(self, case: Case) -> Prepared:
        if case.cell.active > 1 or case.cell.scales is not None:
            raise Unsupported("one adapter in 16 bits only")

        def call(o: Operands) -> None:
            begin = 0
            for a, b in zip(o.lora_a, o.lora_b, strict=True):
                o.out[:, begin : begin + b.shape[1]].addmm_(o.x @ a[0].T, b[0].T)
                begin += b.shape[1]

        return case.prepared(call)
