"""The order of launches: no kernel touches what another one, that may run beside it, still writes or reads.

Every front door is called twice, one call right behind the other, as on a GPU that has dependent launch; and LoRA on a second
stream. Then each wait is taken out of a kernel, or the next one is let begin before it, or an event is not waited for: it must
show, as what it is.
"""

from __future__ import annotations

import functools
import re
from pathlib import Path
from typing import Any, Callable, Iterator

import pytest
import torch
import triton
from doors import CLAMPED, GOOD, Batch, Door, forget

import generated as kg
from generated.moe_gemm import _problem as gemm
from kernelgen.prove.memory import Race
from kernelgen.prove.mutate import NO_WAIT, Bench, Mutant, mutants
from kernelgen.prove.order import STILL, launches_of
from kernelgen.prove.testing import Variant

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.skipif(not triton.knobs.runtime.interpret, reason="kernels are compiled, not interpreted")

LAYERS = [(name, tokens) for name in ("fused_moe", "fused_moe fp8") for tokens in (2, 40)]  # pair by pair, and with tables
BASES = [(name, tokens) for name in ("base layer", "base layer fp8") for tokens in (2, 40)]  # without adapters
LANES = [(name, tokens) for name in ("MXFP4", "MXFP4 with adapters") for tokens in (2, 6)]  # layers whose products are in Gluon
CALLS = [(name, 6) for name in GOOD if not re.match("no_tables|quantize|warmup|fused_moe$|fused_moe fp8|.*_workspace", name)]


@pytest.fixture(scope="module")
def bench() -> Iterator[Bench]:
    with Bench(ROOT) as made:
        yield made


@pytest.fixture(autouse=True, scope="module")
def gluon() -> Iterator[None]:
    """What is launched on a GPU: kernels in Gluon too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gemm, "has_gluon", lambda: True)
        forget()
        yield
    forget()


def door_of(name: str, tokens: int) -> Callable[[], Any]:
    if (name, tokens) in BASES:
        return functools.partial(kg.fused_moe, **{**Batch("cpu", tokens=tokens).layer(fp8="fp8" in name), "lora": None})
    if (name, tokens) not in LANES:
        return Door.of(name, "cpu", tokens=tokens)
    b = Batch("cpu", tokens=tokens, k=64, n=32)
    given = b.layer(fp8=False)
    lora = given.pop("lora") if "adapters" in name else None
    for weights in ("w13", "w2"):
        given[weights], given[f"{weights}_scale"] = kg.quantize_mxfp4(given[weights])
    layer = functools.partial(kg.fused_moe, **{**given, **CLAMPED, "lora": lora})

    def layers() -> None:
        """The second has no token, so that no program has a tile, or waits in front of one."""
        for valid in (given["valid_tokens"], torch.zeros(1, dtype=torch.int32), given["valid_tokens"]):
            layer(valid_tokens=valid)

    return layers


@functools.cache
def dependent(name: str, tokens: int) -> tuple[str, ...]:
    """The kernels of two calls that are launched dependent, each once; none touches what it does not come after."""
    door = door_of(name, tokens)
    with launches_of(kg) as chain:
        door()
        door()
    return tuple(dict.fromkeys(chain.dependent))


@pytest.mark.parametrize(("name", "tokens"), [*LAYERS, *BASES, *LANES, *CALLS])
def test_a_front_door_waits_for_what_it_touches(name: str, tokens: int) -> None:
    assert ("MXFP4" in name) == any("moe_gemm_lane" in kernel for kernel in dependent(name, tokens))


WAIT = re.compile(r"^( +)gdc_wait\(\).*\n(?: +gdc_launch.*\n)?\s*(.*)$", re.MULTILINE)  # and what stands behind it


@pytest.mark.slow
def test_every_wait_is_missed(bench: Bench) -> None:
    """In one kernel for each place that a family waits at: in calls of front doors, or in cases, which sum up parts."""
    found = {variant.name: (suite, variant) for suite, variant in bench.variants() if WAIT.search(bench.source(variant))}

    def places(variant: Variant) -> tuple[str, ...]:
        return variant.family, *(line.partition("=")[0] for _, line in WAIT.findall(bench.source(variant)))

    texts = {places(variant): name for name, (_, variant) in found.items()}
    for name, tokens in [*LAYERS, *BASES, *LANES, *CALLS]:
        for kernel in dependent(name, tokens):
            _, variant = found[kernel.rpartition("_")[0]]
            if texts.pop(places(variant), None):
                door = door_of(name, tokens)
                for mutant in waits_of(bench, variant):
                    swapped = bench.swapped("generated", variant, mutant.text)
                    with swapped, pytest.raises(Race, match=variant.name), launches_of(kg):
                        door()
    for suite, variant in map(found.__getitem__, texts.values()):
        for mutant in waits_of(bench, variant):
            assert bench.fate(suite, variant, mutant, suite.cases_for(variant)[:8]).killer, f"{variant}: {mutant}"


def waits_of(bench: Bench, variant: Variant) -> list[Mutant]:
    return [mutant for mutant in mutants(bench.source(variant), variant.name) if mutant.operator == NO_WAIT]


@pytest.mark.parametrize(("name", "tokens"), LAYERS)
def test_a_launch_that_lets_the_next_begin_before_it_waits_is_shown(name: str, tokens: int, bench: Bench) -> None:
    """Products with adapters read at once what was made before the rank vectors: because these are not begun before it is."""
    shrinks = {v.name: v for _, v in bench.variants() if v.family == "moe_shrink"}
    kernels = [kernel for kernel in dependent(name, tokens) if kernel.rpartition("_")[0] in shrinks]
    door = Door.of(name, "cpu", tokens=tokens)
    for variant in {shrinks[kernel.rpartition("_")[0]] for kernel in kernels}:
        text = re.sub(r"\bgdc_wait\(\)", "gdc_launch_dependents(); gdc_wait()", bench.source(variant))
        swapped = bench.swapped("generated", variant, text)
        with swapped, pytest.raises(Race, match=r"^moe_gemm_.*may not have written yet"), launches_of(kg):
            door()
    assert kernels


class Beside:
    """LoRA of a projection on a second stream, and its sum with the base product."""

    def __init__(self) -> None:
        b = Batch("cpu")
        base = {"out_rows": "pair", "x_rows": "token", "activation": None, "tables": b.tables(), "topk_weights": None}
        self.out, self.delta, self.route = b.normal(6, 2, 24), b.normal(6, 2, 24), b.route()
        self.base = functools.partial(kg.moe_gemm, self.out, b.normal(6, 32), b.normal(4, 24, 32), **base)
        a, second = ([factor[0]] for factor in b.factors(3, 4).values())
        given = {"topk_weights": None, "add_inputs": False, "mul_routed_weight": False}
        self.lora = functools.partial(kg.moe_lora, self.delta, b.normal(6, 32), a, second, self.route, **given)

    def run(self, stream: Any, events: Any) -> None:
        """Two layers, whose buffers are the same."""
        for _ in range(2):
            kg.overlap(self.base, self.lora, stream, events)
            kg.moe_add(self.out, self.delta, self.route)


def test_operands_that_are_still_are_those_that_the_caller_made() -> None:
    """By their names, in all kernels: what one kernel writes and another reads is none of them."""
    names = {name for file in ROOT.glob("generated/*/*.py") for name in re.findall(r"\b\w+_ptrs?\b", file.read_text())}
    of_weights = {f"{tensor}{scale}_ptr" for tensor in "wab" for scale in ("", "_scale")}
    tables = {"adapter_enabled_ptr", "expert_map_ptr", "lora_ranks_ptr", "scalings_ptr"}
    assert {name for name in names if STILL.fullmatch(name)} <= {*of_weights, *(f"{name}s" for name in of_weights), *tables}


def test_behind_a_wait_a_launch_depends_on_more_than_the_last() -> None:
    with launches_of(kg) as chain:
        Door.of("moe_add", "cpu")()
        for wait in (lambda: chain.main.wait_event(chain.event()), lambda: chain.main.wait_stream(chain.stream())):
            chain.main.last = chain.main.last or object()  # type: ignore[assignment]
            wait()
            assert chain.main.last is None


def test_lora_on_a_second_stream_waits_for_what_it_touches() -> None:
    calls = Beside()
    with launches_of(kg) as chain:
        calls.run(chain.stream(), (chain.event(), chain.event()))


@pytest.mark.parametrize(
    ("forgotten", "shown"),
    [
        (0, "_shrink .*reads .*in front of it may not have written yet: nothing that it comes"),
        (1, "^moe_add_.* reads delta_ptr.*moe_lora_.*may not have written yet: nothing that it comes"),
    ],
)
def test_an_event_that_is_not_waited_for_is_shown(forgotten: int, shown: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = Beside()
    with launches_of(kg) as chain:
        events = chain.event(), chain.event()
        monkeypatch.setattr(events[forgotten], "record", lambda stream: None)
        with pytest.raises(Race, match=shown):
            calls.run(chain.stream(), events)
