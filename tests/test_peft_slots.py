"""Adapters that come and go in slots: what a batch sees is what was loaded, and nobody else's rows change."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode

from kernelgen.integrations.peft import (
    Adapter,
    AdapterError,
    AdapterFiles,
    AdapterSlots,
    ExpertPart,
    ExpertShape,
    Factors,
    LinearShape,
    stack_adapters,
    stack_linears,
)

SHAPE = ExpertShape(num_experts=4, hidden=32, intermediate=16)
LINEARS = {"o": LinearShape(32, {"o": 32}), "qkv": LinearShape(32, {"q": 16, "k": 16, "v": 16})}
SLOTS, RANK, LAYERS = 3, 24, (0, 2)
STACKED: dict[str, Any] = {"dtype": torch.bfloat16, "rank": RANK}


def adapter(number: int, joined: bool = False) -> Adapter:
    """Of some layers and parts, with ranks of its own."""
    rng, numbers = random.Random(number), torch.Generator().manual_seed(number)

    def factors(wide: int, tall: int, *lead: int) -> Factors:
        rank = rng.randint(1, RANK)
        a, b = torch.randn(*lead, rank, wide, generator=numbers), torch.randn(*lead, tall, rank, generator=numbers)
        return Factors(a, b)

    layers = {}
    for layer in rng.sample(LAYERS, rng.randint(1, len(LAYERS))):
        parts = ["gate", "up", "down"][: 3 if joined else rng.randint(1, 3)]
        layers[layer] = {part: factors(*SHAPE.widths(part), SHAPE.num_experts) for part in parts}
        if joined:
            layers[layer]["gate"] = Factors(layers[layer]["up"].a, torch.randn_like(layers[layer]["up"].b))
    names = {module: (shape.inputs, n) for shape in LINEARS.values() for module, n in shape.slices.items()}
    linears = {module: factors(*names[module]) for module in rng.sample(sorted(names), 2)}
    return Adapter(f"a{number}", layers, tuple(linears), linears)


class Step:
    """A batch of all slots and none through adapters of an MoE layer and a linear one, as a graph can capture it."""

    def __init__(self, slots: AdapterSlots, device: str) -> None:
        import generated as kg

        torch.manual_seed(0)
        self.kg, self.slots = kg, slots
        self.tokens = torch.tensor([*range(SLOTS), -1, SLOTS, 99, -7], dtype=torch.int32, device=device)
        tokens = len(self.tokens)
        self.ids = torch.stack([torch.randperm(SHAPE.num_experts)[:2] for _ in range(tokens)]).to(device, torch.int32)
        sizes = {"x": (tokens, 32), "rows": (tokens, 2, 32), "qkv": (tokens, 48)}
        self.x, self.rows, self.qkv = (torch.randn(size).to(device, torch.bfloat16) for size in sizes.values())
        self.mapping = torch.empty_like(self.tokens)

    def __call__(self) -> tuple[torch.Tensor, torch.Tensor]:
        self.slots.mapping(self.tokens, out=self.mapping)
        return self.run(self.slots.layers[2], self.slots.linears["qkv"], self.mapping)

    def run(self, layer: Any, linear: Any, mapping: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        rows, qkv, loras = self.rows.clone(), self.qkv.clone(), len(layer.adapter_enabled)
        sizes = {"num_experts": SHAPE.num_experts, "max_loras": loras, "adapter_enabled": layer.adapter_enabled}
        self.kg.moe_lora(rows, self.x, *layer.gate_up, self.kg.moe_route(self.ids, mapping, assignment="naive", **sizes))
        route = self.kg.lora_route(mapping, max_loras=loras)
        self.kg.lora(qkv, self.x, linear.a, linear.b, route, offset_start=linear.offset_start)
        return rows, qkv

    def wanted(self, held: dict[int, Adapter]) -> tuple[torch.Tensor, torch.Tensor]:
        """The same batch with these adapters stacked anew."""
        some = [held.get(slot, Adapter("none", {}, ())) for slot in range(SLOTS)]
        device = self.tokens.device
        layers = stack_adapters([*some, full()], SHAPE, device=device, **STACKED)
        linears = stack_linears([*some, full()], LINEARS, device=device, **STACKED)
        mapping = torch.where((self.tokens < 0) | (self.tokens >= SLOTS), -1, self.tokens)
        empty = torch.tensor([slot in held for slot in range(SLOTS)], device=device)
        mapping = torch.where(empty[mapping.clamp(min=0)], mapping, -1)
        return self.run(layers[2], linears["qkv"], mapping)


def full() -> Adapter:
    """It changes everything, so that no buffer is left out where it takes part."""
    new, widths = torch.randn, {part: SHAPE.widths(part) for part in ("gate", "up", "down")}
    parts = {part: Factors(new(4, 1, wide), new(4, tall, 1)) for part, (wide, tall) in widths.items()}
    names = {module: (shape.inputs, n) for shape in LINEARS.values() for module, n in shape.slices.items()}
    linears = {module: Factors(new(1, wide), new(tall, 1)) for module, (wide, tall) in names.items()}
    return Adapter("full", dict.fromkeys(LAYERS, parts), (), linears)


def make(device: str, **options: Any) -> AdapterSlots:
    return AdapterSlots(SHAPE, LAYERS, slots=SLOTS, device=device, linears=LINEARS, **STACKED, **options)


def test_a_hundred_adapters_come_and_go(device: str) -> None:
    """No place but the one that is filled changes; a batch has the bits of a new stack, and rows of others keep theirs."""
    slots, rng = make(device), random.Random(0)
    step = Step(slots, device)
    held: dict[int, Adapter] = {}
    for number in range(100):
        slot, one = rng.randrange(SLOTS), adapter(number)
        kept = {key: buffer.clone() for key, buffer in slots._buffers.items()}
        if slot in held and rng.random() < 0.2:
            slots.drop(slot)
            del held[slot]
        else:
            one = Adapter("empty", {}, ()) if number % 9 == 0 else one
            slots.load(slot, one if number % 2 and one.linears else slots.pack(one, allow_empty=True))
            held[slot] = one
        slots.wait()
        places = slots.mapping(step.tokens).tolist()
        assert [place >= 0 for place in places] == [token in held for token in step.tokens.tolist()]
        for key, buffer in slots._buffers.items():
            others = [place for place in range(len(buffer)) if slot not in held or place != places[slot]]
            assert torch.equal(buffer[others], kept[key][others])
        for index, layer in slots.layers.items():
            parts = [held[slot].layers.get(index, {}) for slot in sorted(held)]
            flags = [(int(layer.adapter_enabled[places[slot]]), int(layer.lora_ranks[places[slot]])) for slot in sorted(held)]
            assert flags == [(bool(of), max((factors.a.shape[-2] for factors in of.values()), default=0)) for of in parts]
    held |= {1: adapter(5)}
    slots.load(1, held[1])
    slots.wait()
    before = step()
    assert all(torch.equal(out, wanted) for out, wanted in zip(before, step.wanted(held), strict=True))
    slots.load(1, full())
    slots.wait()
    for old, new in zip(before, step(), strict=True):
        rest = step.tokens != 1
        assert torch.equal(old[rest], new[rest]) and not torch.equal(old[1], new[1])
    assert [slots.version(slot) for slot in range(SLOTS)] == slots.versions.tolist() and min(slots.versions.tolist()) > 9


def test_a_slot_changes_in_one_write(device: str) -> None:
    """Until the entry of the table is written a slot has its old adapter, whole; the place that it left comes last again."""
    slots = make(device, spare=2)
    first, second = adapter(1), full()
    slots.load(2, first)
    slots.wait()
    tokens = torch.tensor([2], dtype=torch.int32, device=device)
    (old,) = slots.mapping(tokens).tolist()
    kept = slots.layers[2].down.b[0][old].clone()
    seen = []
    point = slots._point
    slots._point = lambda *entry: (seen.append(slots.mapping(tokens).tolist()), point(*entry))  # type: ignore[method-assign, assignment]
    slots.load(2, second)
    slots.load(0, second)
    slots.wait()
    assert seen[0] == [old] and slots.mapping(tokens).tolist() != [old]
    assert torch.equal(slots.layers[2].down.b[0][old], kept)


def test_a_replayed_graph_serves_adapters_that_come_and_go(device: str) -> None:
    if device == "cpu":
        pytest.skip("needs a GPU")
    slots = make(device)
    step, held = Step(slots, device), {}
    for _ in range(2):
        step()
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        outputs = step()
    rng = random.Random(1)
    for number in range(60):
        slot, one = rng.randrange(SLOTS), adapter(number)
        packed = slots.pack(one)
        for _ in range(3):
            graph.replay()  # while it is copied
        slots.load(slot, packed)
        for _ in range(3):
            graph.replay()
        held[slot] = one
        slots.wait()
        graph.replay()
        torch.cuda.synchronize()
        assert all(torch.equal(out, wanted) for out, wanted in zip(outputs, step.wanted(held), strict=True))


class FailsAt(TorchFunctionMode):
    """Inside, what is asked of torch fails when it is asked so many times."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.left = number

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.left -= 1
        if self.left == 0:
            raise RuntimeError("there is no more memory")
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("does", ["load", "replace", "drop"])
def test_what_fails_changes_nothing(does: str) -> None:
    """Wherever it does: slots, versions and places are as before, and adapters that are loaded have their factors."""
    slots, one = make("cpu", spare=2), adapter(3)
    slots.load(1, one)
    slots.load(0, full())
    packed = slots.pack(full())
    act = {
        "load": lambda: slots.load(2, packed),
        "replace": lambda: slots.load(1, packed),
        "drop": lambda: slots.drop(1),
    }[does]

    def state() -> tuple[Any, ...]:
        used = [place for place in slots._places if place >= 0]
        numbers = [buffer[used].tolist() for buffer in slots._buffers.values()]
        free = [place for place, _ in slots._free]
        return slots._places[:], slots._counts[:], free, slots._state.tolist(), slots._flags[..., used].tolist(), numbers

    before, number = state(), 0
    while True:
        number += 1
        try:
            with FailsAt(number):
                act()
        except RuntimeError:
            assert state() == before, f"at call {number}"
        else:
            break
    assert number > 3 and state() != before
    assert sorted([*state()[2], *(place for place in slots._places if place >= 0)]) == [0, 1, 2, 3, 4]


def test_parts_of_experts(device: str) -> None:
    """Some experts, or some columns, are those of the whole."""
    one = adapter(7, joined=True)
    whole = stack_adapters([one], SHAPE, **STACKED)
    part = ExpertPart(range(1, 3), range(8, 16))
    slots = make("cpu", part=part, share_first=True)
    slots.load(0, one)
    stacked = stack_adapters([one], SHAPE, part=part, **STACKED)
    for layer in one.layers:
        for (gate_up, down, *_), slot in ((stacked[layer], 0), (slots.layers[layer], slots.mapping(torch.zeros(1).int()).item())):
            assert gate_up.a[0] is gate_up.a[1]
            for s in (0, 1):
                assert torch.equal(gate_up.a[s][slot], whole[layer].gate_up.a[s][0, 1:3])
                assert torch.equal(gate_up.b[s][slot], whole[layer].gate_up.b[s][0, 1:3, 8:])
            assert torch.equal(down.a[0][slot], whole[layer].down.a[0][0, 1:3, :, 8:])
            assert torch.equal(down.b[0][slot], whole[layer].down.b[0][0, 1:3])
    for bad in (ExpertPart(range(5)), ExpertPart(None, range(8, 8)), ExpertPart(range(0, 4, 2))):
        with pytest.raises(ValueError, match=r"part: .* got range.*, wanted a range of some of"):
            stack_adapters([one], SHAPE, part=bad, **STACKED)


def test_refused() -> None:
    """Nothing that does not fit changes a slot."""
    slots, one = make("cpu"), adapter(3)
    slots.load(1, one)
    kept = {key: buffer.clone() for key, buffer in slots._buffers.items()}
    wide = Adapter("wide", {0: {"down": Factors(torch.ones(4, 25, 16), torch.ones(4, 32, 25))}}, ())
    files = AdapterFiles({"peft_type": "LORA", "r": 2, "lora_alpha": 1}, {}, "files")
    other = make("cpu").pack(one)
    for bad, words in (
        (wide, "wide: got rank 25, wanted at most 24"),
        (Adapter("x", {1: one.layers[min(one.layers)]}, ()), r"got factors of layers \[1\], wanted some of \[0, 2\]"),
        (Adapter("x", {}, (), {"lm_head": Factors(*torch.ones(2, 2, 2))}), "got factors of lm_head, wanted those of the layers"),
        (Adapter("x", {}, (), {"q": Factors(*torch.full((2, 16, 16), 1e39, dtype=torch.float64))}), "x: q: got factors"),
        (Adapter("x", {}, (), {"q": Factors(torch.ones(1, 32) / 0, torch.ones(16, 1))}), "x: q, a: got numbers up to inf"),
        (files, "files: got nothing that is served here"),
        (Adapter("x", {}, ("vision.conv",)), "got factors of vision.conv, wanted those of the layers"),
        (other, "packed for other slots"),
    ):
        with pytest.raises(ValueError, match=words):
            slots.load(1, bad)
    with pytest.raises(AdapterError, match="served: got nothing that is served here"):
        make("cpu", allow_rest=True).pack(Adapter("served", {}, (), {"lm_head": Factors(*torch.ones(2, 2, 2))}))
    with pytest.raises(AdapterError, match="with first factors of their own, wanted the same"):
        make("cpu", share_first=True).pack(full())
    for slot in (-1, SLOTS, True, None):
        with pytest.raises(ValueError, match=rf"slot: got .*, wanted a number from 0 to {SLOTS - 1}"):
            slots.load(slot, one)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="slot: got 0, which is empty"):
        slots.drop(0)
    for tokens in (torch.zeros(2), torch.zeros(2, 2).int(), [0]):
        with pytest.raises(ValueError, match="token_slots: got"):
            slots.mapping(tokens)  # type: ignore[arg-type]
    for options in ({"slots": 0}, {"rank": None}, {"spare": 0}, {"dtype": torch.int32}, {"layers": ()}):
        arguments = {"shape": SHAPE, "layers": LAYERS, "slots": SLOTS, "linears": LINEARS, **STACKED, **options}
        with pytest.raises(ValueError, match=f"{next(iter(options))}.*: got .*, wanted"):
            AdapterSlots(**arguments)
    assert slots.version(1) == 1 and all(torch.equal(buffer, kept[key]) for key, buffer in slots._buffers.items())
    slots.load(1, files, allow_empty=True)
    slots.load(1, full())  # a load that failed lost no place
    slots.load(1, one)
