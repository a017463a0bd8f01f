"""What holds for rows that become FP8 numbers, through the front door."""

from __future__ import annotations

from types import ModuleType
from typing import Any, Callable, Mapping, Sequence

import torch

from kernelgen.families import quant
from kernelgen.families.case import Law, Variant
from kernelgen.families.moe_experts import Experts
from kernelgen.families.moe_quant.cases import Case, make

_CASE = Case("front_door", "", tokens=9, n=200, routing=Experts("mixed", start=1, valid=7))


def front_door(package: ModuleType, variants: Sequence[Variant], device: str) -> None:
    """Each kind of scales finds its variant by the shape of the scales."""
    for variant in variants:
        call = make(package, _CASE, variant.tags, device)
        package.moe_quant(call.codes.view, call.scale.view, call.x, call.tables, order=variant.tags["order"])
        call.verify()


def as_in_plain_torch(package: ModuleType, variants: Sequence[Variant], device: str) -> None:
    """The numbers are those of quantize_activations."""
    case = Case("plain", "", tokens=16, top_k=1, n=256)
    for variant in variants:
        call = make(package, case, variant.tags, device)
        if call.given is None:
            package.moe_quant(call.codes.view, call.scale.view, call.x, call.tables, order=variant.tags["order"])
            scales = "group" if variant.tags["act_quant"] == "a8group" else "token"
            codes, scale = quant.quantize_activations(package, call.x, scales)
            assert torch.equal(scale, call.scale.view), variant.name
            assert torch.equal(codes.float(), call.codes.view.float()), variant.name


def wrong_arguments_are_named(
    package: ModuleType, variants: Sequence[Variant], device: str
) -> None:
    """Arguments that do not fit raise ValueError, with what was given and wanted."""
    call = make(package, _CASE, {**variants[0].tags, "order": "sorted", "act_quant": "a8group"}, device)
    right = {"codes": call.codes.view, "scale": call.scale.view, "x": call.x, "tables": call.tables}
    for label, change in _WRONG.items():
        try:
            package.moe_quant(**{**right, **change(right)})
        except ValueError as error:
            complete = all(word in str(error) for word in ("moe_quant", "got", "wanted"))
            assert complete, f"{label}: {error}"
        else:
            raise AssertionError(f"{label} is let pass")
    assert not call.codes.changed().any(), "codes were written"


LAWS = (Law(front_door), Law(as_in_plain_torch), Law(wrong_arguments_are_named))

_Arguments = dict[str, Any]

_WRONG: Mapping[str, Callable[[_Arguments], _Arguments]] = {
    "x in fp32": lambda a: {"x": a["x"].float()},
    "x of another N": lambda a: {"x": a["x"][:, :-100]},
    "x of too few rows": lambda a: {"x": a["x"][:-1]},
    "codes of 16 bits": lambda a: {"codes": a["x"]},
    "codes of another N": lambda a: {"codes": a["codes"][:, :-1]},
    "scales of another shape": lambda a: {"scale": a["scale"][:-1]},
    "scales in another dtype": lambda a: {"scale": a["scale"].double()},
    "an unknown order": lambda a: {"order": "token"},
    "no tables": lambda a: {"tables": a["tables"]._replace(pairs=None, block_m=0)},
}
