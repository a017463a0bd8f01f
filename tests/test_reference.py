"""The oracle itself: against plain formulas, and its bound against kernels made of torch that err on purpose."""

from __future__ import annotations

import dataclasses
import functools
import re
from typing import Any, Callable, Mapping

import pytest
import torch

from kernelgen.families.case import worst_ratio
from kernelgen.families.moe_lora.reference import moe_lora
from kernelgen.families.moe_lora_inputs import Call, Case, make
from kernelgen.families.moe_route.reference import (
    Live,
    faults,
    from_padded,
    live_pairs,
    moe_route,
    padded_tables,
)
from kernelgen.families.moe_routing import SPREAD, Routing

CASE = Case("reference", "", tokens=9, slices=2, k=100, n=70, loras=3, routing=Routing("mixed"))
FORMS = [("add", "plain"), ("set", "plain"), ("add", "weighted"), ("set", "weighted")]


def tags_of(adds: str, weight: str, dtype: str = "bf16") -> Mapping[str, str]:
    return {
        "dtype": dtype,
        "add_inputs": adds,
        "routed_weight": weight,
        "assignment": "sorted",
        "rank": "r32",
    }


Round = Callable[[torch.Tensor], torch.Tensor]


def simulated(call: Call, adds: bool, rounding: Round | None = None) -> torch.Tensor:
    """A kernel of torch in fp32: the formula, pair by pair; ``rounding`` is that of the intermediate."""
    out = call.out.view.clone()
    top_k, n = out.shape[1], call.lora_b[0].shape[2]
    for pair, adapter, expert in call.routed.live:
        t, j = divmod(pair, top_k)
        row = call.x[t if call.topk_weights is None else pair].float()
        for s, (a, b) in enumerate(zip(call.lora_a, call.lora_b, strict=True)):
            v = a[adapter, expert].float() @ row
            v = v.to(out.dtype).float() if rounding is None else rounding(v)
            y = b[adapter, expert].float() @ v
            if call.topk_weights is not None:
                y = y * call.topk_weights[t, j].float()
            columns = out[t, j, s * n : (s + 1) * n]
            columns.copy_(y + columns.float() if adds else y)
    return out


def ratio(call: Call, out: torch.Tensor) -> float:
    rows, (exact, bound) = call.live_rows(), call.expected
    return worst_ratio(out[rows], exact[rows], bound[rows])


@pytest.mark.parametrize("dtype", ["bf16", "f16"])
@pytest.mark.parametrize("adds, weight", FORMS)
def test_a_right_kernel_is_within_the_bound(adds: str, weight: str, dtype: str) -> None:
    call = make(CASE, tags_of(adds, weight, dtype), "cpu")
    assert 0.5 < ratio(call, simulated(call, adds == "add")) <= 1  # and the bound is not idle


def test_exactly_the_formula() -> None:
    call = make(CASE, tags_of("add", "weighted"), "cpu")
    out, (exact, bound) = call.out.view, call.expected
    live = {item.pair: item for item in call.routed.live}
    assert 0 < len(live) < call.routed.topk_ids.numel()
    for pair in range(call.routed.topk_ids.numel()):
        t, j = divmod(pair, CASE.top_k)
        if pair not in live:
            assert torch.equal(exact[t, j].isnan(), out[t, j].isnan()) and not bound[t, j].any()
            continue
        _, adapter, expert = live[pair]
        assert call.topk_weights is not None
        for s in range(CASE.slices):
            v = (call.lora_a[s][adapter, expert].double() @ call.x[pair].double()).bfloat16()
            y = call.lora_b[s][adapter, expert].double() @ v.double()
            columns = slice(s * CASE.n, (s + 1) * CASE.n)
            wanted = out[t, j, columns].double() + call.topk_weights[t, j].double() * y
            assert ((exact[t, j, columns] - wanted).abs() <= bound[t, j, columns]).all()


@pytest.mark.parametrize(
    "rounding",
    [
        lambda v: v,
        lambda v: v.to(torch.float8_e4m3fn).float(),
        lambda v: 1.02 * v.bfloat16().float(),
    ],
    ids=["kept in fp32", "in float8", "scaled"],
)
def test_another_intermediate_is_noticed(rounding: Round) -> None:
    call = make(dataclasses.replace(CASE, k=400), tags_of("set", "plain"), "cpu")
    with pytest.raises(AssertionError, match="elements are off"):
        ratio(call, simulated(call, False, rounding))


@pytest.mark.parametrize("term", ["rank", "k", "column", "old", "weight"])
def test_a_lost_term_is_noticed(term: str) -> None:
    adds, weight = ("add", "weighted") if term in ("old", "weight") else ("set", "plain")
    call = make(
        dataclasses.replace(CASE, rank=512, k=300, tokens=3, routing=SPREAD),
        tags_of(adds, weight),
        "cpu",
    )
    wrong = dataclasses.replace(call)
    if term == "rank":
        for b in call.lora_b:
            b[..., -1] = 0
    elif term == "k":
        call.x[:, -1] = 0
    elif term == "weight":
        wrong = dataclasses.replace(call, topk_weights=torch.ones_like(call.topk_weights))  # type: ignore[arg-type]
    out = simulated(wrong, adds == "add" and term != "old")
    if term == "column":
        out[..., -1] = 0
    with pytest.raises(AssertionError, match="elements are off"):
        ratio(call, out)


def test_sums_in_16_bits_are_noticed() -> None:
    call = make(dataclasses.replace(CASE, rank=256), tags_of("set", "plain"), "cpu")
    out = simulated(call, False)
    n = CASE.n
    for pair, adapter, expert in call.routed.live:
        t, j = divmod(pair, CASE.top_k)
        for s, (a, b) in enumerate(zip(call.lora_a, call.lora_b, strict=True)):
            v = (a[adapter, expert].float() @ call.x[t].float()).bfloat16()
            total = torch.zeros(n, dtype=torch.bfloat16)
            for r in range(v.numel()):
                total = total + b[adapter, expert][:, r] * v[r]
            out[t, j, s * n : (s + 1) * n] = total
    with pytest.raises(AssertionError, match="elements are off"):
        ratio(call, out)


def test_nan_and_infinity() -> None:
    inf, nan = float("inf"), float("nan")
    bound = torch.full((1,), 0.01, dtype=torch.float64)

    def passes(got: float, exact: float) -> bool:
        try:
            worst_ratio(torch.tensor([got]).half(), torch.tensor([exact]).double(), bound)
        except AssertionError:
            return False
        return True

    assert passes(nan, nan) and passes(inf, 1e6) and passes(-inf, -1e6) and passes(1.0, 1.001)
    wrong = [
        (nan, 1.0),
        (1.0, nan),
        (inf, 1.0),
        (-inf, 1e6),
        (65504.0, 1e6),
        (inf, nan),
        (nan, 1e6),
    ]
    assert not any(passes(got, exact) for got, exact in wrong)


def test_an_intermediate_out_of_range_has_no_bound() -> None:
    x, a, b = (
        torch.full((1, 4), 3e4).half(),
        torch.ones(1, 1, 1, 4).half(),
        torch.ones(1, 1, 2, 1).half(),
    )
    out = torch.zeros(1, 1, 2).half()
    with pytest.raises(ValueError, match=r"beyond the range of torch\.float16"):
        moe_lora(out, x, [a], [b], [Live(0, 0, 0)], topk_weights=None, add_inputs=True)


# Routes


def batch(**changes: Any) -> list[Live]:
    given: dict[str, Any] = {
        "topk_ids": torch.tensor([[0, 2], [1, 1], [2, -1], [0, 5], [2, 0]]),
        "token_lora_mapping": torch.tensor([1, 0, 1, -1, 7]),
        "num_experts": 3,
        "max_loras": 2,
    }
    return live_pairs(**{**given, **changes})


def test_live_pairs() -> None:
    everything = [Live(0, 1, 0), Live(1, 1, 2), Live(2, 0, 1), Live(3, 0, 1), Live(4, 1, 2)]
    assert batch() == everything
    assert batch(adapter_enabled=torch.tensor([0, 1, 1])) == [p for p in everything if p.adapter]
    assert batch(num_experts=2) == [p for p in everything if p.expert < 2]
    assert batch(max_loras=1) == [p for p in everything if p.adapter < 1]
    local = torch.tensor([-1, 0, 2])
    assert batch(expert_map=local) == [Live(1, 1, 2), Live(2, 0, 0), Live(3, 0, 0), Live(4, 1, 2)]


def test_tables() -> None:
    tables = moe_route(batch(), block_m=16)
    assert tables.pairs.tolist() == [2, 3, 0, 1, 4]
    assert tables.blocks.tolist() == [[0, 1, 0, 2], [1, 0, 2, 1], [1, 2, 3, 2]]
    cut = moe_route([Live(p, 0, 0) for p in range(35)], block_m=16)
    assert cut.blocks.tolist() == [[0, 0, 0, 16], [0, 0, 16, 16], [0, 0, 32, 3]]
    assert not list(faults(batch(), *tables, block_m=16))


@pytest.mark.parametrize(
    "pairs, blocks, what",
    [
        ([2, 3, 0, 1, 4], [[0, 1, 0, 2], [1, 0, 2, 1]], r"pairs \[1, 4\] are lost"),
        ([2, 2, 0, 1, 4], None, "pair 2 is listed twice"),
        ([2, 3, 1, 0, 4], None, "pair 1 of .* is listed under"),
        ([2, 3, 0, 1, 9], None, "pair 9 is listed twice, or is not live"),
        (None, [[0, 1, 0, 17]], "does not fit"),
        (None, [[0, 1, 4, 2]], "does not fit"),
    ],
)
def test_faults_of_tables(
    pairs: list[int] | None, blocks: list[list[int]] | None, what: str
) -> None:
    right = moe_route(batch(), block_m=16)
    made = torch.tensor(pairs or right.pairs.tolist()), torch.tensor(
        blocks or right.blocks.tolist()
    )
    found = "; ".join(faults(batch(), *made, block_m=16))
    assert re.search(what, found), found


def test_tables_of_an_engine() -> None:
    groups = [(0, 1, [2, 3]), (1, 0, [0]), (1, -1, [7]), (1, 2, [1, 4])]
    tables = padded_tables(groups, num_pairs=10, max_loras=2, row_size=34, block_size=16)
    assert tables.expert_ids.tolist() == [[1, 0, 0], [0, -1, 2]]
    assert tables.num_tokens_post_padded.tolist() == [16, 48]
    assert tables.sorted_token_ids[1].tolist() == [0, *[10] * 15, 7, *[10] * 15, 1, 4]
    read = functools.partial(from_padded, tables, num_pairs=10, num_experts=3, block_size=16)
    here = [groups[0], groups[1], groups[3]]
    assert read() == here
    assert read(lora_ids=torch.tensor([-1, 0])) == here[:1]
    assert read(adapter_enabled=torch.tensor([0, 1])) == here[1:]
