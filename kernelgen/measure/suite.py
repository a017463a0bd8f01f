"""What a suite of the benchmark is: the cells that it spans, and who can be measured on them. Imports no torch.

A suite has a module in ``suites``, which says what there is to measure, and one of the same name in ``workloads``, which makes
operands, knows what is right for them and calls the generated package. Whoever else is measured is in ``peers``. A family that is
in no call of these has a suite of its own name in its room: ``suite.py`` and ``workload.py``.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import zlib
from typing import Any, Callable, ClassVar, Iterable, Literal, Mapping, Sequence, get_args

from kernelgen.core.diagnostics import Failure, failure
from kernelgen.measure.models import Model
from kernelgen.measure.options import Kind

Size = Literal["full", "quick", "tiny"]  # of a sweep: what is published, about a minute on a GPU, and what an interpreter can do
Quant = Literal["none", "tensor", "channel", "group", "mx"]  # FP8 weights, and of what there is a scale; mx: MXFP4 ones
Act = Literal["none", "tensor", "token", "group"]  # FP8 activations, and of what there is a scale
BASE_QUANTS: tuple[Quant, ...] = get_args(Quant)  # of experts; adapters are no MXFP4
QUANTS = tuple(quant for quant in BASE_QUANTS if quant != "mx")
ACTS: tuple[Act, ...] = get_args(Act)
GROUP, MX_GROUP = 128, 32  # rows and columns of a group; columns of one of MXFP4
OURS = "kernelgen"


def misfit(message: str, hint: str = "") -> Failure:
    """The failure of a workload that cannot be made."""
    return failure("KG070", "workload", message, hint)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cell:
    """A point of a sweep; the same cell always gets the same operands. Fields with a default are what most sweeps leave alone."""

    model: Model | str
    site: str
    tokens: int

    # What leaves the routing and the numbers that are drawn as they are.
    FREE: ClassVar[tuple[str, ...]] = ("add", "quant", "act")

    def columns(self) -> dict[str, Any]:
        """The cell as the columns of a result row that identify it."""
        own = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        if isinstance(self.model, Model):
            own["model"] = self.model.name
            own |= {name: getattr(self.model, name) for name in _MODEL}
        return own

    @property
    def seed(self) -> int:
        """A seed from the cell alone; add and set, FP8 or not, and all implementations see the same routing."""
        columns = {name: value for name, value in self.columns().items() if name not in self.FREE}
        return zlib.crc32(json.dumps(columns, sort_keys=True).encode())


_MODEL = ("hidden", "intermediate", "experts", "top_k")


@dataclasses.dataclass(frozen=True)
class Axis:
    """One option of a suite, and what it stands for in a sweep of each size: as in ``full`` unless the size has its own."""

    name: str
    kind: Kind
    help: str
    full: Any = None
    quick: Any = None
    tiny: Any = None
    flag: str = ""  # as click spells it, where it takes no value

    def usually(self, value: Any) -> Axis:
        """The same option where ``value`` is spanned unless told; None: as before."""
        return self if value is None else dataclasses.replace(self, full=value)

    def value(self, size: Size) -> Any:
        """What is spanned unless told."""
        own = getattr(self, size)
        return self.full if own is None else own


@dataclasses.dataclass(frozen=True)
class Work:
    """The least that a cell must move and compute, and what it computes with."""

    bytes: float
    flops: float
    fp8: bool = False  # products of FP8 with FP8

    def floor_us(self, ceilings: Mapping[str, float]) -> float:
        """Microseconds that no kernel can beat by much, at the ceilings of a machine: GB/s, and TFLOP/s."""
        rate = ceilings["bf16_tflop_s"]
        if self.fp8:
            rate = ceilings.get("fp8_tflop_s", rate)
        return max(self.bytes / (ceilings["copy_gb_s"] * 1e3), self.flops / (rate * 1e6))


Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Suite:
    """What there is to measure.

    Attributes:
        cell: the class of its cells.
        span: the cells of a value for each axis.
        peers: who else can do the work.
        forms: other ways of the generated package to do it, that can be asked for: rows are of ``kernelgen:FORM`` then.
        usual: of them, those that are timed unless others are asked for.
        split: a column that tables are apart by, with what its values are called.
        beside: what rows are compared with, among our own: words, and the columns in which such a row differs.
    """

    name: str
    title: str
    cell: type[Cell]
    axes: tuple[Axis, ...]
    span: Callable[[Mapping[str, Any]], Iterable[Cell]]
    peers: tuple[str, ...] = ()
    forms: tuple[str, ...] = ()
    usual: tuple[str, ...] = ()
    split: tuple[str, Mapping[Any, str]] | None = None
    beside: tuple[str, Mapping[str, Any]] | None = None

    def cells(self, options: Mapping[str, Any], size: Size = "full") -> list[Cell]:
        """The cells that options ask for, each once; None: as the size says. Those that share weights are next to each other.

        Raises:
            Failure: options that do not go together.
        """
        values = {axis.name: axis.value(size) for axis in self.axes}
        values |= {name: value for name, value in options.items() if name in values and value is not None}
        return list(dict.fromkeys(self.span(values)))

    @property
    def columns(self) -> tuple[str, ...]:
        """What identifies a row, beside who was measured."""
        fields = [field.name for field in dataclasses.fields(self.cell)]
        sizes = _MODEL if any(axis.name == "model_config" for axis in self.axes) else ()
        return ("model", *sizes, *(name for name in fields if name != "model"))

    def label(self, row: Row) -> str:
        """The line of a table that a row is in: all but the tokens, and of what is as in most sweeps nothing."""
        usual = {f.name: f.default for f in dataclasses.fields(self.cell) if f.default is not dataclasses.MISSING}
        words = [row["model"], row["site"], *([f"r{row['rank']}"] if row.get("rank") else []), *quantised(row)]
        more = []
        if (row.get("active"), row.get("slots")) != (usual.get("active"), usual.get("slots")) and row.get("rank"):
            more.append(f"{row['active']} of {row['slots']} adapters")
        if row.get("base"):
            more.append(f"{row['base']:.0%} base tokens")
        more += [str(row[name]) for name in ("routing", "dtype") if name in row and row[name] != usual[name]]
        return ", ".join([" ".join(words), *more])

    def kind(self, row: Row) -> str:
        """What sets a row apart from the one that it is compared with."""
        if self.beside is None or "impl" not in self.beside[1]:
            return " ".join(quantised(row))
        return f"r{row['rank']}" + (f", {row['base']:.0%} base tokens" if row["base"] else "")

    def part(self, row: Row) -> str:
        """Which of the tables that are apart a row is in."""
        return "" if self.split is None else self.split[1][row[self.split[0]]]


def quantised(row: Row) -> list[str]:
    """What is FP8 in ``row``: w8 and a8 with the kind of their scales; or mxfp4."""
    if row.get("quant") == "mx":
        return ["mxfp4"]
    named = (("w8", row.get("quant", "none")), ("a8", row.get("act", "none")))
    return [f"{what}{scales}" for what, scales in named if scales != "none"]


def quant_forms(values: Mapping[str, Any]) -> list[tuple[Quant, Act]]:
    """The scales of weights and activations of base layers; FP8 activations go with FP8 weights alone, and 16 bits with MXFP4.

    Raises:
        Failure: none of those that are asked for go together.
    """
    forms = [(q, a) for q, a in itertools.product(values["quant"], values["act"]) if a == "none" or q not in ("none", "mx")]
    if not forms:
        raise misfit("FP8 activations go with FP8 weights", "give --quant tensor, channel or group too")
    return forms


def adapters(active: Sequence[int], slots: Sequence[int] | None) -> list[tuple[int, int]]:
    """(adapters that a batch uses, adapters that the weights hold), one for each of ``active``.

    Raises:
        Failure: there are other numbers of both, or more active ones than there is room for.
    """
    slots = tuple(slots or active)
    if len(slots) == 1:
        slots *= len(active)
    if len(slots) != len(active):
        raise misfit("--slots wants one number, or one for each of --active")
    for used, held in zip(active, slots, strict=True):
        if used > held:
            raise misfit(f"{used} active adapters do not fit {held} slots")
    return list(zip(active, slots, strict=True))


def expected_groups(groups: int, draws: float) -> float:
    """How many of ``groups`` are hit on average by so many draws, if every one is equally likely."""
    return groups * -math.expm1(-draws / groups)


def scale_shape(scales: Quant | Act, rows: int, columns: int, group_rows: int = GROUP) -> tuple[int, ...]:
    """The shape of the scales of a matrix [rows, columns] of FP8; the groups of x are of one row."""
    shapes = {
        "tensor": (),
        "channel": (rows,),
        "token": (rows, 1),
        "group": (-(-rows // group_rows), -(-columns // GROUP)),
        "mx": (rows, columns // MX_GROUP),
    }
    return shapes[scales]


def matrix_bytes(scales: Quant | Act, rows: float, columns: int, group_rows: int = GROUP) -> float:
    """Of a matrix [rows, columns]: of FP8 or MXFP4 with its scales, else of 16 bits."""
    if scales == "none":
        return 2.0 * rows * columns
    if scales == "mx":
        return rows * columns * (0.5 + 1.0 / MX_GROUP)
    return rows * columns + 4.0 * math.prod(scale_shape(scales, math.ceil(rows), columns, group_rows))
