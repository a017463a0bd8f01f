"""What holds for rows in the order of tables, through the front door."""

from __future__ import annotations

from types import ModuleType
from typing import Any, Callable, Mapping, Sequence

from kernelgen.families.case import Law, Variant
from kernelgen.families.moe_experts import Experts
from kernelgen.families.moe_permute.cases import Case, make

_CASE = Case("front_door", "", tokens=9, k=200, routing=Experts("mixed", start=1, valid=7))


def front_door(package: ModuleType, variants: Sequence[Variant], device: str) -> None:
    """Each kind of scales finds its variant by the shape of the scales."""
    for variant in variants:
        call = make(package, _CASE, variant.tags, device)
        package.moe_permute(call.out.view, call.out_scale.view, call.x, call.x_scale, call.tables)
        call.verify()


def wrong_arguments_are_named(
    package: ModuleType, variants: Sequence[Variant], device: str
) -> None:
    """Arguments that do not fit raise ValueError, with what was given and wanted."""
    call = make(package, _CASE, {**variants[0].tags, "act_quant": "a8group"}, device)
    right = {"out": call.out.view, "out_scale": call.out_scale.view, "x": call.x, "x_scale": call.x_scale, "tables": call.tables}
    for label, change in _WRONG.items():
        try:
            package.moe_permute(**{**right, **change(right)})
        except ValueError as error:
            complete = all(word in str(error) for word in ("moe_permute", "got", "wanted"))
            assert complete, f"{label}: {error}"
        else:
            raise AssertionError(f"{label} is let pass")
    assert not call.out.changed().any(), "rows were written"


LAWS = (Law(front_door), Law(wrong_arguments_are_named))

_Arguments = dict[str, Any]

_WRONG: Mapping[str, Callable[[_Arguments], _Arguments]] = {
    "x of 16 bits": lambda a: {"x": a["x"].bfloat16()},
    "x of another K": lambda a: {"x": a["x"][:, :-100]},
    "x of too few rows": lambda a: {"x": a["x"][:-1]},
    "out of a row a token": lambda a: {"out": a["out"][: a["x"].shape[0]]},
    "out of 16 bits": lambda a: {"out": a["out"].bfloat16()},
    "a scale for all rows": lambda a: {"x_scale": a["x_scale"][0, :1]},
    "scales of another shape": lambda a: {"x_scale": a["x_scale"][:-1]},
    "scales of out a token": lambda a: {"out_scale": a["out_scale"][:, :1].contiguous()},
    "scales of out in another dtype": lambda a: {"out_scale": a["out_scale"].double()},
    "no tables": lambda a: {"tables": a["tables"]._replace(pairs=None, block_m=0)},
}
