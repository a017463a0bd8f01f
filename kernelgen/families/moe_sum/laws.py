"""What holds for the sum over the experts of a token, through its front door."""

from __future__ import annotations

import random
from types import ModuleType
from typing import Any, Callable, Mapping, Sequence

import torch

from kernelgen.families.case import Law, Variant, worst_ratio
from kernelgen.families.moe_deltas import draw as draw_delta
from kernelgen.families.moe_experts import Experts, draw
from kernelgen.families.moe_sum.reference import moe_sum

_TOKENS, _TOP_K, _EXPERTS, _N = 6, 3, 4, 72


def front_door(package: ModuleType, variants: Sequence[Variant], device: str) -> None:
    """Into its own buffer zeros and sums, into the caller's the rows of valid tokens and not a byte more."""
    routed = draw(Experts("mixed", start=1, valid=4), _TOKENS, _TOP_K, _EXPERTS, random.Random(0), device)
    for dtype in (torch.bfloat16, torch.float16):
        operands = _operands(dtype, routed, device)
        for weights in (operands["topk_weights"], None):
            given = {**operands, "topk_weights": weights}
            wanted: dict[str, Any] = {"num_tokens": 4, "topk_weights": weights}
            if weights is None:
                beside = draw_delta(package, routed, operands["y"], random.Random(0), torch.Generator().manual_seed(1))
                given |= beside.arguments
                wanted["delta"] = beside.rows
            else:
                given["bias"] = wanted["bias"] = torch.randn(_EXPERTS, _N, generator=torch.Generator().manual_seed(2)).to(device)
            own = package.moe_sum(**given)
            assert own.dtype == torch.float32 and not own[4:].any(), "own rows behind the tokens"
            exact = moe_sum(operands["y"], routed.local, dtype=torch.float32, **wanted)
            worst_ratio(own[:4].cpu(), exact.out.cpu(), exact.bound.cpu())
            out = torch.full((_TOKENS, _N), torch.nan, dtype=dtype, device=device)
            assert package.moe_sum(**given, out=out, num_tokens_hint=1) is out
            exact = moe_sum(operands["y"], routed.local, dtype=dtype, **wanted)
            worst_ratio(out[:4].cpu(), exact.out.cpu(), exact.bound.cpu())
            assert out[4:].isnan().all(), "rows behind the tokens were written"


def empty_batch(package: ModuleType, variants: Sequence[Variant], device: str) -> None:
    """No token: an empty sum."""
    routed = draw(Experts(), 0, _TOP_K, _EXPERTS, random.Random(0), device)
    assert package.moe_sum(**_operands(torch.bfloat16, routed, device)).shape == (0, _N)


def wrong_arguments_are_named(
    package: ModuleType, variants: Sequence[Variant], device: str
) -> None:
    """Arguments that do not fit raise ValueError, with what was given and wanted."""
    routed = draw(Experts(valid=3), _TOKENS, _TOP_K, _EXPERTS, random.Random(0), device)
    right = _operands(torch.bfloat16, routed, device)
    right["out"] = torch.zeros(_TOKENS, _N, device=device)
    for label, change in _WRONG.items():
        try:
            package.moe_sum(**{**right, **change(right)})
        except ValueError as error:
            complete = all(word in str(error) for word in ("moe_sum", "got", "wanted"))
            assert complete, f"{label}: {error}"
        else:
            raise AssertionError(f"{label} is let pass")
    assert not right["out"].any(), "out was written"


LAWS = (Law(front_door), Law(empty_batch), Law(wrong_arguments_are_named))


def _operands(dtype: torch.dtype, routed: Any, device: str) -> dict[str, Any]:
    numbers = torch.Generator().manual_seed(0)
    tokens = routed.topk_ids.shape[0]
    y = torch.full((tokens, _TOP_K, _N), torch.nan, dtype=dtype, device=device)
    weights = torch.full((tokens, _TOP_K), torch.nan, device=device)
    for pair, _ in routed.local:
        y.view(-1, _N)[pair] = torch.randn(_N, generator=numbers).to(y)
        weights.view(-1)[pair] = torch.rand((), generator=numbers).to(weights)
    return {
        "y": y,
        "topk_ids": routed.topk_ids,
        "num_experts": routed.num_experts,
        "local_expert_start": routed.start,
        "topk_weights": weights,
        "valid_tokens": routed.valid_tokens,
    }


_Arguments = dict[str, Any]

_WRONG: Mapping[str, Callable[[_Arguments], _Arguments]] = {
    "y in fp64": lambda a: {"y": a["y"].double()},
    "rows to keep in a new out": lambda a: {"out": None, "keep_empty": True},
    "y of two dimensions": lambda a: {"y": a["y"].flatten(0, 1)},
    "y of fewer experts": lambda a: {"y": a["y"][:, :-1]},
    "y with columns apart": lambda a: {"y": a["y"].transpose(1, 2).contiguous().transpose(1, 2)},
    "out of another N": lambda a: {"out": a["out"][:, :-1]},
    "out of integers": lambda a: {"out": a["out"].int()},
    "weights of another shape": lambda a: {"topk_weights": a["topk_weights"][:, :-1]},
    "weights that are integers": lambda a: {"topk_weights": a["topk_weights"].nan_to_num().int()},
    "ids that are not whole": lambda a: {"topk_ids": a["topk_ids"].float()},
    "valid tokens in 64 bits": lambda a: {"valid_tokens": a["valid_tokens"].long()},
    "a bias of another N": lambda a: {"bias": a["y"].new_zeros(_EXPERTS, _N - 1)},
    "a bias of too few experts": lambda a: {"bias": a["y"].new_zeros(_EXPERTS - 1, _N)},
    "a bias of integers": lambda a: {"bias": a["y"].new_zeros(_EXPERTS, _N).int()},
    "a bias with columns apart": lambda a: {"bias": a["y"].new_zeros(_N, _EXPERTS).t()},
    "a bias of rows that come weighted": lambda a: {"bias": a["y"].new_zeros(_EXPERTS, _N), "topk_weights": None},
    "no experts": lambda a: {"num_experts": 0},
}
