"""What holds for the activation of an MoE layer, through its front door."""

from __future__ import annotations

import random
from types import ModuleType
from typing import Any, Callable, Mapping, Sequence

import torch

from kernelgen.families.activation import Clamp, clamp_of, slices
from kernelgen.families.case import Law, Variant, worst_ratio
from kernelgen.families.moe_act.reference import moe_act
from kernelgen.families.moe_deltas import draw as draw_delta
from kernelgen.families.moe_experts import Experts, draw
from kernelgen.families.moe_gemm.reference import NO_ROWS

_TOKENS, _TOP_K, _EXPERTS, _N = 6, 2, 4, 40


def front_door(package: ModuleType, variants: Sequence[Variant], device: str) -> None:
    """Each activation and dtype finds its variant."""
    for variant in variants:
        operands, routed = _operands(variant.tags, device)
        beside = None
        if variant.tags["delta"] == "lora":
            beside = draw_delta(package, routed, operands["x"], random.Random(0), torch.Generator().manual_seed(1))
        epilogue = variant.tags["epilogue"]
        clamp = clamp_of(epilogue, Clamp(1.5))
        options = {**(beside.arguments if beside else {}), **({"limit": clamp.limit} if clamp else {})}
        interleaved, bias = variant.tags["layout"] == "interleaved", None
        if variant.tags["bias"] == "bias":
            size = (_EXPERTS, operands["x"].shape[2])
            bias = torch.randn(size, generator=torch.Generator().manual_seed(2)).to(device)
        options |= {"layout": "interleaved" if interleaved else "halves", "bias": bias}
        package.moe_act(**operands, num_tokens_hint=1, **options)
        rows = beside.rows if beside else NO_ROWS
        how: dict[str, Any] = {"interleaved": interleaved, "bias": bias, "clamp": clamp}
        exact = moe_act(operands["x"], routed.local, epilogue=epilogue, delta=rows, **how)
        worst_ratio(operands["h"][exact.rows].cpu(), exact.out.cpu(), exact.bound.cpu())
        rest = torch.ones(_TOKENS * _TOP_K, dtype=torch.bool)
        rest[exact.rows] = False
        assert operands["h"][rest.to(device)].isnan().all(), "rows that are not local were written"


def numbers_may_change(package: ModuleType, variants: Sequence[Variant], device: str) -> None:
    """Calls that are alike but for the numbers of their activation each get their own."""
    operands, routed = _operands({"dtype": "bf16", "epilogue": "swiglu_clamp"}, device)
    for clamp in (Clamp(1.5), Clamp(0.5), Clamp(0.5, 1.702), Clamp(2, 1, 1), Clamp(0.0, beta=-1.0)):
        given = {name: number for name, number in clamp.given.items() if number != Clamp._field_defaults.get(name)}
        package.moe_act(**operands, **given)
        exact = moe_act(operands["x"], routed.local, epilogue="swiglu_clamp", clamp=clamp)
        worst_ratio(operands["h"][exact.rows].cpu(), exact.out.cpu(), exact.bound.cpu())
    for limit in (float("nan"), float("inf"), -0.5, "7", True):  # where such a call is known
        try:
            package.moe_act(**operands, limit=limit)
        except ValueError as error:
            assert "limit: got" in str(error), error
        else:
            raise AssertionError(f"limit {limit} is let pass")


def wrong_arguments_are_named(
    package: ModuleType, variants: Sequence[Variant], device: str
) -> None:
    """Arguments that do not fit raise ValueError, with what was given and wanted."""
    right, _ = _operands({"dtype": "bf16", "epilogue": "swiglu"}, device)
    for label, change in _WRONG.items():
        try:
            package.moe_act(**{**right, **change(right)})
        except ValueError as error:
            complete = all(word in str(error) for word in ("moe_act", "got", "wanted"))
            assert complete, f"{label}: {error}"
        else:
            raise AssertionError(f"{label} is let pass")
    assert right["h"].isnan().all(), "h was written"


LAWS = (Law(front_door), Law(numbers_may_change), Law(wrong_arguments_are_named))


def _operands(tags: Mapping[str, str], device: str) -> tuple[dict[str, Any], Any]:
    dtype = torch.bfloat16 if tags["dtype"] == "bf16" else torch.float16
    routed = draw(Experts("mixed", start=1, valid=5), _TOKENS, _TOP_K, _EXPERTS, random.Random(0), device)
    width = _N * slices(tags["epilogue"])
    x = torch.randn(_TOKENS, _TOP_K, width, generator=torch.Generator().manual_seed(0))
    operands = {
        "h": torch.full((_TOKENS * _TOP_K, _N), torch.nan, dtype=dtype, device=device),
        "x": x.to(device, dtype),
        "topk_ids": routed.topk_ids,
        "activation": tags["epilogue"],
        "num_experts": _EXPERTS,
        "local_expert_start": routed.start,
        "valid_tokens": routed.valid_tokens,
    }
    return operands, routed


_Arguments = dict[str, Any]
_OSS = {"activation": "swiglu_clamp", "layout": "interleaved", "limit": 7.0}

_WRONG: Mapping[str, Callable[[_Arguments], _Arguments]] = {
    "an unknown activation": lambda a: {"activation": "swish"},
    "a limit that nothing takes": lambda a: {"limit": 7.0},
    "a clamp without its limit": lambda a: {"activation": "swiglu_clamp", "alpha": 1.702},
    "a limit below 0": lambda a: {"activation": "swiglu_clamp", "limit": -1.0},
    "a layout that no model has": lambda a: {"layout": "interleaved"},
    "an unknown layout": lambda a: {"layout": "turns"},
    "a bias in halves": lambda a: {"bias": a["x"].new_zeros(_EXPERTS, 2 * _N)},
    "a bias of another N": lambda a: {**_OSS, "bias": a["x"].new_zeros(_EXPERTS, _N)},
    "a bias of too few experts": lambda a: {**_OSS, "bias": a["x"].new_zeros(_EXPERTS - 1, 2 * _N)},
    "a bias of integers": lambda a: {**_OSS, "bias": a["x"].new_zeros(_EXPERTS, 2 * _N).int()},
    "a bias with columns apart": lambda a: {**_OSS, "bias": a["x"].new_zeros(2 * _N, _EXPERTS).t()},
    "x in fp32": lambda a: {"x": a["x"].float()},
    "x without its second half": lambda a: {"x": a["x"][..., :_N]},
    "x with columns apart": lambda a: {"x": a["x"].transpose(1, 2).contiguous().transpose(1, 2)},
    "h of another dtype": lambda a: {"h": a["h"].float()},
    "h of too few rows": lambda a: {"h": a["h"][:-1]},
    "ids as a vector": lambda a: {"topk_ids": a["topk_ids"].flatten()},
    "valid tokens in 64 bits": lambda a: {"valid_tokens": a["valid_tokens"].long()},
    "a delta without its route": lambda a: {"delta": torch.zeros_like(a["x"])},
}
