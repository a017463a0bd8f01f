"""Every front door, argument by argument: what does not fit is a ValueError that names both, before anything is launched.

What is tried follows from what each op declares of its arguments; what is written by hand is one good call of each.
"""

from __future__ import annotations

import gc
import importlib
import inspect
import itertools
import math
import re
import weakref
from typing import Annotated, Any, Callable, Iterator, NamedTuple

import pytest
import torch
from doors import BF16, EXPERTS, GOOD, INT32, LORAS, RANK, TOP_K, Arguments, Batch, Door, K, N, T, by_hand, forget

import generated as kg
from generated import _operands as operands
from generated import _runtime as runtime
from generated._operands import OPS, Bundle, Choice, Device, Flag, Int, Number, Op, Several, Tensor
from generated.moe_route._op import EngineRoute, OpenRoute, TableRoute


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What would have been launched; nothing is."""
    log: list[Any] = []
    monkeypatch.setattr(runtime.Launcher, "launch", lambda self, *call: log.append((self, *call)))
    forget()
    yield log
    forget()


def test_every_front_door_is_here() -> None:
    functions = {name for name in kg.__all__ if inspect.isfunction(getattr(kg, name))}
    assert functions - {"variants", "overlap", "launches"} <= {op for op, _ in GOOD.values()} <= set(OPS) | functions
    assert set(OPS) == {op for op, _ in GOOD.values()}


_X = Tensor("T", "D")


@operands.bundle()
class _Pair(NamedTuple):
    a: Annotated[torch.Tensor, _X]
    b: torch.Tensor


@pytest.mark.parametrize(
    ("declared", "more", "expected"),
    [
        (torch.Tensor, {}, "toy: x: not annotated with an operand"),
        (Annotated[torch.Tensor, _X, Int()], {}, "x: annotated with 2 operands: Tensor, Int"),
        (Annotated[torch.Tensor, Tensor("T", "d")], {}, "'d', which is none of D"),
        (Annotated[torch.Tensor, Tensor("T", "D", scaled_by="x_scales")], {}, "'x_scales', which is none of x"),
        (Annotated[torch.Tensor, Tensor("T", "D", made_if="zeros")], {}, "'zeros', which is none of x"),
        (Annotated[torch.Tensor, Tensor("T", "D", only_with="zeros")], {}, "'zeros', which is none of x"),
        (Annotated[_Pair, operands.Bundle(_Pair)], {}, "x.b: not annotated with an operand"),
        (Annotated[str, Device()], {}, "x: a graph of torch.compile takes no Device"),
        (Annotated[torch.Tensor, _X], {"first": ("y",)}, "'y', which is none of x"),
        (Annotated[torch.Tensor, _X], {"tells": ("y",)}, "'y', which is none of x"),
        (Annotated[torch.Tensor, _X], {"aligned": ("y",)}, "'y', which is none of x"),
    ],
)
def test_a_declaration_that_speaks_of_what_there_is_not_is_refused(
    declared: Any, more: dict[str, Any], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(OPS, "toy", None)  # which is taken away again
    op = Op("toy", NamedTuple("Given", [("x", declared)]), dtypes={"D": (BF16,)}, **more)
    with pytest.raises(TypeError, match=re.escape(expected)):
        op.in_graphs(op.caller(lambda given: lambda given: None))


# What is no argument of a kind, whatever else it is: a label and a value that is made of a good one.
_NO_NUMBER = {"a text": "3", "a tensor": torch.ones(1), "a list": [3], "not a number": math.nan}


def _wrong(operand: operands.Operand, good: Any, op: Op) -> Iterator[tuple[str, Any]]:
    """(what is wrong, a value) for an operand, by what it declares."""
    if isinstance(operand, Int):
        yield from {**_NO_NUMBER, "a truth": True, "a float": float(good), "too little": operand.low - 1}.items()
        yield from [] if operand.optional else [("nothing", None)]
        yield "too much", operand.high + 1
        yield from [("none of those", 17)] if operand.one_of else []
    elif isinstance(operand, Flag):
        yield from {**_NO_NUMBER, "nothing": None, "a number": 1, "a float": 1.0}.items()
    elif isinstance(operand, Number):
        yield from {**_NO_NUMBER, "a truth": True, "infinite": math.inf}.items()
        yield from [("nothing", None)] if operand.default is None else []
        yield from [("too little", operand.low - 1)] if operand.low == 0 else []
    elif isinstance(operand, Choice):
        yield from {"a number": 3, "another word": "nonsense", "a list": [good], "a dtype": torch.int64}.items()
        yield from [] if None in operand.words else [("nothing", None)]
    elif isinstance(operand, Device):
        yield from {"nothing": None, "a number": 3, "no device": "nowhere"}.items()
    elif isinstance(operand, Bundle):
        yield from {"a number": 3, "a plain tuple": tuple(good)}.items()
        yield from [] if operand.optional else [("nothing", None)]
        for part in operand.parts_of(good):
            old = getattr(good, part.name)
            for label, value in _wrong(part, old, op) if old is not None else ():
                yield f"{part.name}: {label}", good._replace(**{part.name: value})
    elif isinstance(operand, Several):
        yield from {"a number": 3, "a list of texts": ["a"], "none of them": (), "one more": (*good, 0)}.items()
        for label, value in _wrong(operand.item, good[0], op):
            yield f"the first: {label}", (value, *good[1:])
            yield f"the last: {label}", (*good[:-1], value)
    elif operand.slices:
        yield from {"a number": 3, "a tensor": good[0][None], "no slice": [], "none": (), "a text": "ab"}.items()
        yield "an absent slice", [good[0], None]
        yield from [("a slice less", good[:1])] if len(good) > 1 else []
        for label, value in _wrong_tensor(operand, good[-1], op):
            yield f"a slice: {label}", [*good[:-1], value]
    else:
        yield from {"a number": 3, "a text": "x", "a list": [good]}.items()
        yield from [] if operand.optional or operand.made else [("nothing", None)]
        yield from _wrong_tensor(operand, good, op)


def _wrong_tensor(operand: Tensor, good: torch.Tensor, op: Op) -> Iterator[tuple[str, torch.Tensor]]:
    yield "of 16-bit integers", torch.zeros(good.shape, dtype=torch.int16, device=good.device)
    yield "complex", torch.zeros(good.shape, dtype=torch.complex64, device=good.device)
    if op.launches:
        yield "elsewhere", good.to("meta")
    if good.is_floating_point() and op.launches:
        yield "that requires grad", good.clone().requires_grad_()
    dims = {len(form) for form in operand.forms}
    if dims and good.dim() + 1 not in dims:
        yield "of one dimension more", good[None]
    if good.dim() > 1 and 1 not in dims:
        yield "flat", good.flatten()
    for d in range(good.dim()):
        names = _names(operand, good, d)
        if names is None or any(_is_shared(name, operand, op) for name in names):
            yield f"one less in dimension {d}", good.narrow(d, 0, good.shape[d] - 1).clone()
        if names and any(_is_shared(name, operand, op) or name != "T" for name in names):
            yield f"nothing in dimension {d}", good.narrow(d, 0, 0).clone()
    yield from _wrong_strides(operand, good)


def _names(operand: Tensor, good: torch.Tensor, d: int) -> tuple[str, ...] | None:
    """The sizes in a dimension; (): it is free, None: it is a number."""
    form = next((form for form in operand.forms if len(form) == good.dim()), None)
    if form is None or form[d].text == "*" or form[d].least:
        return () if form is None or not form[d].names else form[d].names
    return form[d].names or None


def _is_shared(size: str, operand: Tensor, op: Op) -> bool:
    """Whether something else has a size, so that it cannot be another."""
    others = [other for other in _parts(op.operands) if other.name != operand.name]
    tensors = [dim for other in others if isinstance(other, Tensor) for form in other.forms for dim in form]
    return any(size in dim.names and not dim.least for dim in tensors) or any(getattr(o, "size", "") == size for o in others)


def _parts(of: tuple[operands.Operand, ...]) -> Iterator[operands.Operand]:
    for operand in of:
        yield from operand.parts.values() if isinstance(operand, Bundle) else (operand,)


def _wrong_strides(operand: Tensor, good: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    if good.dtype in (torch.bfloat16, torch.float16, torch.float32):
        yield "negated lazily", torch._neg_view(good)
    if operand.strides == operands.FREE or good.numel() < 2:
        return
    if good.shape[-1] > 1:
        yield "with columns apart", good.repeat_interleave(2, -1)[..., ::2]
    rows = good.shape[:-1]
    if operand.strides == operands.CONTIGUOUS and math.prod(rows) > 1:
        yield "with rows apart", torch.cat((good, good), -1)[..., : good.shape[-1]]
    if operand.strides == operands.PAIRS and good.dim() == 3:
        yield "with tokens apart", torch.cat((good, good), 1)[:, : good.shape[1]]
    if operand.written and good.dim() > 1:
        row = 1 if good.shape[-1] > 1 else 0
        strides = [good[0].numel() // good[0, ..., 0].numel() for _ in rows]
        for pitch in (0, max(1, strides[0] - 1)) if row else (0,):
            collapsed = [pitch * math.prod(good.shape[d + 1 : -1]) for d in range(len(rows))]
            yield f"with rows {pitch} apart", good.as_strided(good.shape, (*collapsed, 1))


def _written(door: Door) -> list[torch.Tensor]:
    return [tensor for _, operand, tensor in door.tensors if operand.written]


def _refused(door: Door, changed: Arguments, label: str, *names: str) -> None:
    try:
        door(**changed)
    except ValueError as error:
        text = str(error)
        named = text.startswith(f"{door.name}: ") and any(name in text for name in names)
        assert named and "got " in text and "wanted " in text, f"{door.name}, {label}: {error}"
    except Exception as error:
        raise AssertionError(f"{door.name}, {label}: {type(error).__name__}: {error}") from error
    else:
        raise AssertionError(f"{door.name}, {label}: it is let pass")


@pytest.mark.parametrize("known", [False, True], ids=["at first", "behind good calls"])
@pytest.mark.parametrize("name", GOOD)
def test_what_does_not_fit_is_named(name: str, known: bool, device: str, launches: list[Any]) -> None:
    door = Door.of(name, device)
    for _ in range(3 if known else 0):
        door()
    before, number = [tensor.clone() for tensor in _written(door)], len(launches)
    for operand in door.operands:
        good = door.good[operand.name]
        for label, value in _wrong(operand, good, door.op) if good is not None else ():
            _refused(door, {operand.name: value}, f"{operand.name}: {label}", operand.name)
    assert len(launches) == number, "something was launched"
    same = [torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in zip(before, _written(door), strict=True)]
    assert all(same), "something was written"


def _with(good: Arguments, label: str, tensor: torch.Tensor) -> Arguments:
    """The arguments with another tensor: of a slice (``lora_a[0]``), of a bundle (``route.parts``) or by itself."""
    name, _, rest = label.replace("[", ".").partition(".")
    if not rest:
        return {**good, name: tensor}
    if rest[:-1].isdigit():
        return {**good, name: [tensor if f"{i}]" == rest else old for i, old in enumerate(good[name])]}
    return {**good, name: by_hand(good[name], **_with(good[name]._asdict(), label[len(name) + 1 :], tensor))}


def _in_one_place(*tensors: torch.Tensor) -> Iterator[torch.Tensor]:
    """Copies of tensors, of the same bytes where they begin."""
    buffer = torch.zeros(max(t.numel() * t.element_size() for t in tensors), dtype=torch.uint8, device=tensors[0].device)
    for tensor in tensors:
        yield buffer[: tensor.numel() * tensor.element_size()].view(tensor.dtype).view(tensor.shape)


@pytest.mark.parametrize("known", [False, True], ids=["at first", "behind good calls"])
@pytest.mark.parametrize("name", GOOD)
def test_memory_that_is_written_is_not_shared(name: str, known: bool, device: str, launches: list[Any]) -> None:
    """With any other tensor, at the first call and at later ones of the same looks."""
    door = Door.of(name, device)
    if isinstance(door.good.get("runs"), kg.MoeRuns):
        door.good["runs"] = by_hand(door.good["runs"])  # which go with any tables
    found = [item for item in door.tensors if item[2].numel() > 0]
    for _ in range(3 if known else 0):
        door()
    for (label, operand, tensor), (other_label, _, other) in itertools.permutations(found, 2):
        if operand.written:
            one, two = _in_one_place(tensor, other)
            changed = _with(door.good, other_label, two)
            if known:
                door(**changed)
            number = len(launches)
            _refused(door, _with(changed, label, one), f"{label} in {other_label}", label, other_label)
            assert len(launches) == number


# What may be edited: it was nothing that tables were made of.
FREE = {kg.MoeTables: {"tokens_hint"}, TableRoute: {"parts"}, EngineRoute: {"parts"}, kg.MoeRuns: set()}


@pytest.mark.parametrize("known", [False, True], ids=["at first", "behind good calls"])
@pytest.mark.parametrize("name", GOOD)
def test_tables_stay_with_what_they_were_made_of(name: str, known: bool, device: str, launches: list[Any]) -> None:
    """An edited field of a route or of tables is refused by its name, however alike the new value looks."""
    door, other = Door.of(name, device), Door.of(name, device)
    for _ in range(3 if known else 0):
        door()
    number = len(launches)
    for operand in door.operands:
        good = door.good[operand.name]
        if all(getattr(good, table) is None for table in getattr(good, "_tables", ())):
            continue
        for field in sorted(set(good._fields) - FREE[type(good)]) if getattr(good, "_tables", ()) else ():
            old, label = getattr(good, field), f"{operand.name}.{field}"
            if old is None:
                values = [torch.zeros(T, dtype=INT32, device=device)]
            elif isinstance(old, torch.Tensor):
                values = [None, old.clone(), old[:0], getattr(other.good[operand.name], field)]
            else:
                values = [value for value in (None, 0, -1, 2 * (old or 1), old + 1, old - 1, float(old)) if value is not old]
            for value in values:
                edited = good._replace(**{field: value})
                for changed in (edited, edited._replace()):
                    _refused(door, {operand.name: changed}, f"{label} = {value}", label)
        if isinstance(good, kg.MoeRuns):
            _refused(door, {operand.name: other.good[operand.name]}, "runs of other tables", "runs")
    assert len(launches) == number


def _scales(door: Door) -> set[str]:
    return {operand.scaled_by for operand in _parts(door.op.operands) if isinstance(operand, Tensor) and operand.scaled_by}


@pytest.mark.parametrize("name", [name for name in GOOD if name.endswith(" fp8")])
def test_scales_that_lie_otherwise_are_refused_or_read_so(name: str, device: str, launches: list[Any]) -> None:
    """No declaration says how scales lie: a kernel is told of it, or a check refuses it by name."""
    door = Door.of(name, device)

    def told(**changed: Any) -> list[Any]:
        forget()
        launches.clear()
        door(**changed)
        return [(grid, constants, [x for x in given if isinstance(x, int)]) for _, grid, given, constants, _ in launches]

    known, tried = told(), 0
    for label, _, scale in door.tensors:
        if label.partition("[")[0] not in _scales(door) or scale.numel() < 2:
            continue
        apart = torch.cat((scale, scale), -1)[..., : scale.shape[-1]], scale.repeat_interleave(2, -1)[..., ::2]
        for other in (other for other in apart if other.stride() != scale.stride()):
            changed, tried = _with(door.good, label, other), tried + 1
            try:
                found = told(**changed)
            except ValueError as error:
                assert label.partition("[")[0] in str(error), f"{label} {other.stride()}: {error}"
            else:
                assert found != known, f"{label} with strides {other.stride()} is read as one with {scale.stride()}"
    assert tried


@pytest.mark.parametrize("name", GOOD)
def test_no_call_keeps_tensors_alive(name: str, device: str, launches: list[Any]) -> None:
    gc.freeze()  # what lives by now is looked at no more
    door = Door.of(name, device)
    for _ in range(3):
        door()
    given = [weakref.ref(tensor) for *_, tensor in door.tensors]
    launches.clear()
    del door
    gc.collect()
    assert not [i for i, tensor in enumerate(given) if tensor() is not None]


@pytest.mark.parametrize("name", ["a13", "b2"])
def test_a_list_that_is_edited_in_place_is_another(name: str, device: str, launches: list[Any]) -> None:
    """What a bundle looks like, and where it lies, is kept of tuples alone."""
    door = Door.of("fused_moe", device)
    lora = by_hand(door.good["lora"], **{name: list(getattr(door.good["lora"], name))})
    factors = getattr(lora, name)
    for _ in range(3):
        door(lora=lora)
    factors[:] = [torch.cat((of, of), -1)[..., : of.shape[-1]] for of in factors]  # rows further apart
    launches.clear()
    door(lora=lora)
    edited = [(*call[:2], *call[3:]) for call in launches]
    forget()
    launches.clear()
    door(lora=by_hand(lora))
    assert edited == [(*call[:2], *call[3:]) for call in launches]
    factors[:] = [of.contiguous() for of in factors]
    door(lora=lora)
    with pytest.raises(ValueError, match=rf"^fused_moe: out: got memory that lora\.{name}\[0\] lies in"):
        door(lora=lora, out=factors[0].flatten()[: door.good["out"].numel()].view(door.good["out"].shape))


@pytest.mark.parametrize("far", range(2))
def test_rank_vectors_are_less_than_2_31_elements_apart(far: int, launches: list[Any]) -> None:
    with runtime.compile_only():
        door = Door.of("moe_lora_expand", "meta")
        strides = [2**31 if d == far else 1024 for d in range(2)]
        y = torch.empty_strided((2, door.good["y"].shape[0], T * TOP_K, RANK // 2), (*strides, RANK, 1), device="meta")
        _refused(door, {"y": y}, f"dimension {far}", "y")


def test_the_widest_slice_is_below_2_31_elements(launches: list[Any]) -> None:
    with runtime.compile_only():
        door, row = Door.of("lora_expand", "meta"), 2**31 // (2 * N) + 1
        b = [torch.empty_strided((LORAS, n, RANK), (2**40, row, 1), dtype=BF16, device="meta") for n in (N, 2 * N)]
        _refused(door, {"lora_b": b, "out": torch.empty(T, 4 * N, dtype=BF16, device="meta")}, "rows of the second", "lora_b")


@pytest.mark.parametrize("name", ["lora", "lora_shrink"])
def test_packed_slices_lie_one_behind_the_other_in_every_call(name: str, device: str, launches: list[Any]) -> None:
    door = Door.of(name, device)
    one, other = (list(torch.cat([a, a], 1).split(RANK, 1)) for a in door.good["lora_a"])
    padded = list(torch.cat([torch.cat([a, a], 2)[..., : K + 8] for a in one], 1)[..., :K].split(RANK, 1))
    for good in (one, one, one, padded):
        door(packed=True, lora_a=good)
    number = len(launches)
    with pytest.raises(ValueError, match="lora_a: got slices that lie apart, wanted packed ones"):
        door(packed=True, lora_a=[one[0], other[1]])
    assert len(launches) == number


def test_a_refill_reads_no_tables_that_it_writes(device: str, launches: list[Any]) -> None:
    door = Door.of("refill", device)
    for _ in range(3):
        door()
    with runtime.launches() as bound:
        door()
        door(valid_tokens=None)
    assert len(bound) == 2, "what is launched with a pointer, and without it, is one"
    of_route, number = door.function.__self__.first(T), len(launches)
    _refused(door, {"token_lora_mapping": of_route.token_lora_mapping}, "its own adapters", "token_lora_mapping")
    _refused(door, {"valid_tokens": of_route.num_blocks}, "its own count", "valid_tokens")
    assert len(launches) == number


def test_a_held_route_is_that_of_so_many_rows(device: str) -> None:
    held = Door.of("refill", device).function.__self__
    assert [held.first(rows).num_tokens for rows in (6, 1, 0, 15, 6, 0)] == [6, 1, 0, 15, 6, 0]
    for rows in (True, 1.0, -1, 16, None, "1", [1]):  # 1 is known
        with pytest.raises(ValueError, match=r"^HeldRoute\.first: num_tokens: "):
            held.first(rows)


@pytest.mark.parametrize("inside", [runtime.compile_only, runtime.launches, lambda: runtime.choosing({})])
def test_calls_are_worked_out_anew_inside_and_behind(
    inside: Any, device: str, launches: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, traits, door = [], runtime.traits, Door.of("moe_sum adapted", device)
    monkeypatch.setattr(runtime, "traits", lambda of: asked.append(of) or traits(of))

    def number() -> int:
        asked.clear()
        door()
        return len(asked)

    forget()
    often = number()
    assert often > 0 == number()
    with inside():
        assert number() == often
        with inside():
            assert number() == often
        assert number() == often > 0 == number()
    assert number() == often


def test_tiles_that_tuning_forces_are_taken_whole(device: str) -> None:
    """Those of steps over ranks too, which else go by the rule where only layers without adapters were measured."""
    door = Door.of("moe_gemm adapted", device)
    with runtime.choosing({}) as choices:
        door()
    key, schedule, rule = choices[0].key, choices[0].schedule, choices[0].config
    forced = rule._replace(block_d=128, delta_stages=rule.delta_stages + 1)
    with runtime.choosing({(type(key), key): ((schedule, tuple(forced)),)}), runtime.launches() as launches:
        door()
    assert [launches[0].constants[name] for name in ("BLOCK_D", "DELTA_STAGES")] == [forced.block_d, forced.delta_stages]


def test_columns_of_one_buffer_are_memory_of_their_own(device: str, launches: list[Any]) -> None:
    door = Door.of("lora", device)
    both = torch.zeros(T, K + 2 * N + 1, dtype=BF16, device=device)
    for _ in range(4):
        door(x=both[:, :K], out=both[:, K:])
    with pytest.raises(ValueError, match=r"^lora: out: got memory that x lies in"):
        door(x=both[:, :K], out=both[:, K - 1 : -1])


# Arguments that would be ignored, or that lack another: what is changed of a good call, and what the error names.
MISMATCHED: list[tuple[str, Arguments, str]] = [
    ("moe_lora sorted", {"mul_routed_weight": False}, "topk_weights"),
    ("moe_lora sorted", {"topk_weights": None}, "topk_weights"),
    ("moe_lora_expand", {"mul_routed_weight": False}, "topk_weights"),
    ("moe_lora_expand", {"topk_weights": None}, "topk_weights"),
    ("moe_lora fp8", {"a_scale": None}, "a_scale"),
    ("moe_lora fp8", {"a_scale": None, "b_scale": None}, "a_scale"),
    ("moe_lora fp8", {"x_scale": None}, "x_scale"),
    ("lora fp8", {"a_scale": None}, "a_scale"),
    ("lora fp8", {"b_scale": None}, "b_scale"),
    ("lora_shrink fp8", {"x_scale": None}, "x_scale"),
    ("lora_expand fp8", {"b_scale": None}, "b_scale"),
    ("moe_gemm fp8", {"w_scale": None}, "w_scale"),
    ("moe_gemm fp8", {"x_scale": None}, "x_scale"),
    ("moe_gemm adapted", {"v": None}, "v"),
    ("moe_gemm adapted", {"lora_b": None}, "lora_b"),
    ("moe_gemm adapted", {"runs": None}, "runs"),
    ("moe_gemm adapted", {"out_rows": "pair"}, "out_rows"),
    ("moe_shrink fp8", {"x_scale": None}, "x_scale"),
    ("fused_moe fp8", {"w13_scale": None}, "w13_scale"),
    ("fused_moe fp8", {"w2_scale": None}, "w2_scale"),
    ("fused_moe fp8", {"x_scale": None}, "x_scale"),
    ("fused_moe fp8", {"h_scale": torch.ones(1)}, "h_scale"),
    ("moe_route", {"assignment": "naive"}, "block_m"),
    ("quantize_weights", {"group": (16, 16)}, "group"),
    ("quantize_weights", {"scales": "group", "group": (16,)}, "group"),
    ("quantize_activations", {"scales": "token"}, "group_k"),
    ("lora_route held", {"block_m": 16}, "block_m"),
    ("moe_route", {"topk_ids": None}, "topk_ids"),
    ("moe_gemm", {"x_rows": "sorted", "out_rows": "token"}, "x_rows"),
]


@pytest.mark.parametrize(("name", "changed", "named"), MISMATCHED)
def test_what_would_be_ignored_is_refused(
    name: str, changed: Arguments, named: str, device: str, launches: list[Any]
) -> None:
    door, number = Door.of(name, device), len(launches)
    _refused(door, {n: v.to(device) if isinstance(v, torch.Tensor) else v for n, v in changed.items()}, str(changed), named)
    assert len(launches) == number


# What fits by itself, but not with other arguments: what is changed of a good call, and which of them the error names.
RELATED: list[tuple[str, Callable[[Arguments], Arguments], str]] = [
    ("lora", lambda good: {"lora_b": [good["lora_b"][0].transpose(0, 1).contiguous(), good["lora_b"][1]]}, r"lora_b\[0\]: "),
    ("lora", lambda good: _one_more("lora_b", good), r"lora_b\[0\]: .*slots = 3.* as in lora_a"),
    ("lora fp8", lambda good: _one_more("lora_b", good), r"lora_b\[0\]: "),
    ("moe_lora sorted", lambda good: _one_more("lora_b", good), r"lora_b\[0\]: "),
    ("lora_expand", lambda good: {"lora_b": [*_one_more("lora_b", good)["lora_b"][:1], good["lora_b"][1]]}, r"lora_b\[1\]: "),
    ("lora fp8", lambda good: {"b_scale": [scale[:, :5] for scale in good["b_scale"]]}, "b_scale: .* lora_b "),
    ("lora fp8", lambda good: {"x_scale": good["x_scale"][0]}, "a_scale, x_scale: .* with x_scales None or token"),
    ("lora fp8", lambda good: {"out": good["out"].half()}, "out: .* with dtype bfloat16"),
    ("moe_lora fp8", lambda good: {"x_scale": good["x_scale"][0]}, "a_scale, b_scale, x_scale: .* with x_scales None or token"),
    ("moe_lora sorted", lambda good: {"route": OpenRoute(*good["route"][:12], "auto", None, None)}, "route: .* OpenRoute.*"),
    ("moe_gemm", lambda good: {"activation": "swiglu"}, "out: .*N = 12 as in w with activation"),
    ("moe_gemm fp8", lambda good: {"w_scale": good["w_scale"].repeat_interleave(2, 1)[:, ::2]}, "w_scale: .* contiguous behind"),
    ("moe_gemm", lambda good: _mxfp4(good, 1, 16), r"w: got 16 columns, .* wanted a multiple of 32"),
    (
        "moe_shrink fp8",
        lambda good: {"lora_a": [a[:, :1].expand(a.shape) for a in good["lora_a"]], "v": good["v"][:T]},
        r"a_scale: got experts \d+ elements apart",
    ),
    ("moe_gemm", lambda good: _mxfp4(good, 2), r"w_scale: .* wanted \[\d+, \d+, 1\] uint8 or float8_e8m0fnu"),
    ("moe_gemm", lambda good: {**_mxfp4(good, 1), "w_scale": None}, "w: .* MXFP4 numbers need w_scale"),
    ("moe_gemm", lambda good: {**_mxfp4(good, 1), "w": good["w"]}, "w: .* w_scale is given"),
    ("moe_gemm fp8", lambda good: _fp8_rows(good, columns=2), "out_scale: .* a token or a group"),
    ("moe_gemm fp8", lambda good: {**_fp8_rows(good), "out_scale": good["w_scale"].new_ones(1)}, "out_scale: .* as x has them"),
    ("moe_gemm fp8", lambda good: _fp8_rows(good, kind=torch.float8_e8m0fnu), "out_scale: .* it is written"),
    ("moe_gemm fp8", lambda good: _fp8_rows(good, block_m=64), "rows: .* use moe_quant behind it"),
    ("moe_gemm fp8", lambda good: _fp8_rows(good, of_out=BF16), "out: .* float8_e4m3fn or"),
    ("moe_gemm fp8", lambda good: _fp8_rows(good), "out_scale: .* without Gluon use moe_quant"),
    ("moe_gemm fp8", lambda good: _in_order(good), "x_rows, out_rows: .* rows in order are for kernels in Gluon"),
    ("moe_gemm fp8", lambda good: _in_order(good, block_m=64), "rows: .* use x_rows='token'"),
    ("moe_permute", lambda good: {"x_scale": good["x_scale"].new_ones(1)}, "x_scale: .* stays where it is"),
    ("moe_sum", lambda good: {"keep_empty": True, "out": None}, "out: got None"),
    ("moe_gemm adapted", lambda good: {"v": good["v"].float()}, "v: .* make it with moe_shrink"),
    ("moe_gemm adapted", lambda good: _second(good), "v: .* make it with moe_shrink"),
    ("moe_align", lambda good: {"local_expert_start": 1, "expert_map": good["topk_ids"].new_zeros(9)}, "local_expert_start: "),
    ("moe_lora fp8", lambda good: _unlike(good), "a_scale"),
    ("moe_lora_expand", lambda good: {"y": good["y"][None, :, :, :1].contiguous()}, "y: .* rank / shards|y: .*shards"),
    ("moe_quant", lambda good: {"order": "sorted", "tables": _without_blocks(good["tables"])}, "tables: got none"),
    ("moe_shrink", lambda good: {"v": good["v"][:T].clone()}, "lora_a: .* elements apart, wanted 0, for a v of tokens"),
    ("fused_moe", lambda good: {"workspace": good["workspace"]._replace(num_blocks=good["lora"][5])}, "workspace.num_blocks: "),
    ("fused_moe fp8", lambda good: {"w2_scale": good["w2_scale"][:, 0].clone()}, "w2_scale.*: .* with weight_scales channel"),
    ("fused_moe fp8", lambda good: {"w13_scale": good["w13_scale"][:, 0].clone()}, "w13_scale, x_scale: .*scales channel"),
    ("from_tables", lambda good: {"block_size": 32, "expert_ids": good["expert_ids"].repeat(1, 2)}, "block_size = 32"),
    ("moe_route_one_launch", lambda good: _many_pairs(good), "pairs: got 514, wanted at most 512"),
]


def _without_blocks(tables: kg.MoeTables) -> kg.MoeTables:
    return kg.no_tables(tables.topk_ids, num_experts=EXPERTS, valid_tokens=tables.valid_tokens)


def _many_pairs(good: Arguments) -> Arguments:
    repeated = {"topk_ids": good["topk_ids"][:1].repeat(257, 1), "token_lora_mapping": good["token_lora_mapping"][:1].repeat(257)}
    return {**repeated, "pairs": good["pairs"].new_zeros(1024), "blocks": good["blocks"].new_zeros(1024, 4)}


def _mxfp4(good: Arguments, groups: int, columns: int = K) -> Arguments:
    """A product of so many columns, two a byte, and with so many scales a row."""
    codes = good["w"].view(torch.uint8)[..., : columns // 2].contiguous()
    return {"x": good["x"][:, :columns].contiguous(), "w": codes, "w_scale": codes[..., :groups].contiguous()}


def _fp8_rows(
    good: Arguments, columns: int = 1, kind: torch.dtype = torch.float32, block_m: int = 128, of_out: torch.dtype | None = None
) -> Arguments:
    """A first product of 32 columns, to rows of FP8."""
    w, w_scale = kg.quantize_weights(torch.ones(EXPERTS, 64, 128), "group", slices=2)
    x, x_scale = kg.quantize_activations(torch.ones(T, 128), "group")
    out, out_scale = torch.zeros(T * TOP_K, 32, dtype=of_out or x.dtype), torch.ones(T * TOP_K, columns).to(kind)
    given = {"out": out, "x": x, "w": w, "w_scale": w_scale, "x_scale": x_scale, "out_scale": out_scale}
    tables = {name: getattr(good["tables"], name).clone() for name in ("pairs", "blocks", "num_blocks")}
    given |= {"tables": good["tables"]._replace(block_m=block_m, **tables)}
    given |= {"x_rows": "token", "out_rows": "sorted", "activation": "swiglu"}
    return {name: value.to(good["x"].device) if isinstance(value, torch.Tensor) else value for name, value in given.items()}


def _in_order(good: Arguments, block_m: int = 128) -> Arguments:
    """A first product whose rows of x are in the order of the tables."""
    given = _fp8_rows(good, block_m=block_m)
    rows = {name: given[name].repeat_interleave(TOP_K, 0) for name in ("x", "x_scale")}
    return {**given, **rows, "x_rows": "sorted", "out": given["out"].bfloat16(), "out_scale": None}


def _second(good: Arguments) -> Arguments:
    """A second product, whose v has rows of tokens."""
    pairs, rank = good["out"].shape[0], good["v"].shape[2]
    x, w = good["x"].new_zeros(pairs, N), good["w"].new_zeros(EXPERTS, K, N)
    given = {"x": x, "w": w, "out": x.new_zeros(pairs, K), "v": x.new_zeros(T, 1, rank), "activation": None}
    return {**given, "lora_b": [x.new_zeros(LORAS, EXPERTS, K, rank)], "x_rows": "sorted", "out_rows": "pair"}


def _unlike(good: Arguments) -> Arguments:
    """Slices, of which the last has one scale for all experts."""
    *rest, last = good["a_scale"]
    return {"a_scale": [*rest, last[:, :1].expand(last.shape)]}


def _one_more(name: str, good: Arguments) -> Arguments:
    """Slices with a slot for one more adapter."""
    return {name: [factor[[*range(LORAS), 0]] for factor in good[name]]}


@pytest.mark.parametrize(("name", "change", "named"), RELATED)
def test_what_does_not_go_together_is_named(
    name: str, change: Callable[[Arguments], Arguments], named: str, device: str, launches: list[Any]
) -> None:
    door, number = Door.of(name, device), len(launches)
    with pytest.raises(ValueError, match=f"^{re.escape(door.name)}: .*{named}"):
        door(**change(door.good))
    assert len(launches) == number


@pytest.mark.parametrize("rank", [None, 8, 16, 64, 256])
def test_a_route_of_a_graph_settles_as_one_that_is_made(rank: int | None, device: str) -> None:
    """With the rank, too, on which it hangs how many pairs are taken as they come."""
    kinds = set()
    for num_tokens in (1, 2, 3, 5, 8, 13, 24, 40, 72, 130):
        ids, mapping = (torch.zeros(size, dtype=INT32, device=device) for size in ((num_tokens, 2), (num_tokens,)))
        made = kg.moe_route(ids, mapping, num_experts=EXPERTS, max_loras=LORAS, rank=rank)
        sizes = (num_tokens, 2, EXPERTS, LORAS)
        settled = OpenRoute(ids, mapping, None, None, ids, ids, ids, None, *sizes, "auto", rank, None).settled()
        assert (type(settled), settled[-4:]) == (type(made), made[-4:])
        kinds.add((type(settled), getattr(settled, "block_m", None)))
    assert len(kinds) > 1


@pytest.mark.parametrize("name", [name for name in GOOD if name.partition(" ")[2] == "fp8"])
def test_scales_of_what_is_no_fp8_are_refused(name: str, device: str, launches: list[Any]) -> None:
    door, number = Door.of(name, device), len(launches)
    for operand in door.operands:
        if isinstance(operand, Tensor) and door.good.get(operand.scaled_by) is not None:
            good = door.good[operand.name]
            plain = [t.to(BF16) for t in good] if operand.slices else good.to(BF16)
            _refused(door, {operand.name: plain}, f"{operand.name} in 16 bits", operand.scaled_by)
    assert len(launches) == number


def test_overlap_names_what_does_not_fit(device: str) -> None:
    def nothing() -> None: ...

    for arguments, named in (
        ((None, nothing, None, None), "base_fn"),
        ((nothing, 3, None, None), "lora_fn"),
        ((nothing, nothing, "a stream", None), "stream"),
        ((nothing, nothing, None, (1, 2)), "events"),
    ):
        with pytest.raises(ValueError, match=f"^overlap: {named}: got .*, wanted "):
            kg.overlap(*arguments)


def test_overlap_without_a_stream_runs_both_in_turn() -> None:
    ran: list[str] = []
    kg.overlap(lambda: ran.append("base"), lambda: ran.append("lora"), None, None)
    assert ran == ["base", "lora"]


def test_shapes_to_warm_up_are_checked(device: str) -> None:
    moe, dense = kg.MoeShape(K, N, 2, RANK, TOP_K, EXPERTS, LORAS), kg.LoraShape(K, (N,), RANK, LORAS)
    with pytest.raises(ValueError, match=r"^warmup: shapes: got MoeShape, wanted a list"):
        kg.warmup(moe)
    layer = kg.FusedMoeShape(K, N, EXPERTS, TOP_K, "swiglu", rank=RANK)
    for shape in (None, layer, moe._replace(k=0), moe._replace(dtype=torch.int8), moe._replace(assignments=("best",)),
                  dense._replace(widths=()), dense._replace(weight_scales="row"), kg.ShardedMoeShape(dense)):  # fmt: skip
        with pytest.raises(ValueError, match=r"^warmup: shapes\[0\].*: got .*, wanted "):
            kg.warmup([shape])


def test_shapes_take_all_kinds_of_scales() -> None:
    moe, dense = kg.MoeShape(K, N, 2, RANK, TOP_K, EXPERTS, LORAS), kg.LoraShape(K, (N,), RANK, LORAS)
    base = kg.FusedMoeShape(K, N, EXPERTS, TOP_K, "swiglu")
    for shape, weights, of_x in (
        (dense, "tensor channel group", "tensor token group group_by_column"),
        (moe, "tensor channel group", "tensor expert token group group_by_column"),
        (base, "tensor slice channel group", "tensor expert token group group_by_column"),
    ):
        for field, words in {"weight_scales": weights, "x_scales": of_x}.items():
            for word in words.split():
                shape._replace(**{field: word}).check("shape")


@pytest.mark.parametrize("name", [name for name in GOOD if name not in kg.variants()])
def test_launchers_of_variants_name_what_does_not_fit(name: str, device: str, launches: list[Any]) -> None:
    """Of the variants that a good call of the front door launches."""
    door = Door.of(name, device)
    door()
    kernels = [call[0].kernel.fn.__name__ for call in launches]
    variants = [[v for v in kg.variants() if kernel.startswith(f"{v}_")] for kernel in kernels]
    for variant in {max(found, key=len) for found in variants}:
        family = next(f for f in sorted(OPS, key=len, reverse=True) if variant.startswith(f"{f}_"))
        if family != door.op.name or variant in GOOD:
            continue
        module = importlib.import_module(f"generated.{family}.{variant.removeprefix(f'{family}_')}")
        function = getattr(module, variant)
        known = inspect.signature(function).parameters
        launcher = Door(function, variant, door.op, {n: v for n, v in door.good.items() if n in known})
        number = len(launches)
        launcher()
        assert len(launches) > number
        number = len(launches)
        for operand in launcher.operands:
            good = launcher.good[operand.name]
            for label, value in _wrong(operand, good, door.op) if good is not None else ():
                _refused(launcher, {operand.name: value}, f"{operand.name}: {label}", operand.name)
        for operand, is_needed in door.op.hang_on(getattr(module.schedule, "facts", {})):
            assert is_needed == (known.get(operand.name) is not None), operand.name
            if is_needed:
                _refused(launcher, {operand.name: None}, f"{operand.name}: nothing", operand.name)
        if "config" in known:
            _refused(launcher, {"config": (16, 16)}, "another config", "config")
        assert len(launches) == number


def _outcome(door: Door, fresh: list[torch.Tensor], changed: Arguments) -> list[torch.Tensor]:
    """What a call writes and returns, from the same bytes each time."""
    for tensor, before in zip(_written(door), fresh, strict=True):
        tensor.copy_(before)
    result = door(**changed)
    given = result if isinstance(result, tuple) else (result,)
    numbers = torch.tensor([n for n in given if isinstance(n, int)])
    return [t.clone() for t in (*_written(door), *given, numbers) if isinstance(t, torch.Tensor)]


# What may change between two calls whose tensors look alike, and whether the outcome does too.
ALTERNATIVES: dict[str, Callable[[Batch], Arguments]] = {
    "moe_act": lambda b: {"local_expert_start": 1, "num_experts": 2, "valid_tokens": None, "num_tokens_hint": 1},
    "moe_add": lambda b: {"route": b.route("naive")._replace(adapter_enabled=None)},
    "moe_sum": lambda b: {"local_expert_start": 1, "num_experts": 2, "topk_weights": None, "valid_tokens": None, "out": None},
    "moe_quant": lambda b: {"order": "sorted"},
    "moe_align": lambda b: {"local_expert_start": 1, "num_experts": 2, "block_m": 32, "valid_tokens": None},
    "moe_gemm": lambda b: {"topk_weights": None, "x_rows": "sorted"},
    "moe_runs": lambda b: {"adapter_enabled": None, "max_loras": 1, "local_expert_start": 1, "valid_tokens": None},
    "moe_shrink": lambda b: {"runs": by_hand(b.runs()[1], max_loras=1)},
    "moe_route": lambda b: {"block_m": 32, "adapter_enabled": None, "expert_map": None, "max_loras": 2, "num_experts": 2},
    "lora_route": lambda b: {"max_loras": 2, "block_m": 32},
    "from_tables": lambda b: {"lora_ids": None, "adapter_enabled": None, "num_tokens": 3, "max_loras": 2},
    "moe_lora sorted": lambda b: {
        "add_inputs": False,
        "route": by_hand(b.route(), max_loras=1),
        "lora_b": [b.normal(LORAS, EXPERTS, N, RANK) * 2, b.normal(1, EXPERTS, N, RANK).expand(LORAS, -1, -1, -1).clone()],
    },
    "moe_lora naive": lambda b: {"add_inputs": False, "route": b.route("naive")._replace(adapter_enabled=None)},
    "moe_lora_shrink": lambda b: {"route": b.route("naive")._replace(expert_map=None)},
    "moe_lora_expand": lambda b: {"offset": 0, "route": b.route("naive")},
    "lora": lambda b: {"offset_start": 0, "add_inputs": False, "scaling": 1.0},
    "lora_shrink": lambda b: {"scaling": 1.0},
    "lora_expand": lambda b: {"offset_start": 0, "add_inputs": False},
    "lora placed": lambda b: {"columns": (1, 0)},
    "fused_moe": lambda b: {"local_expert_start": 1, "valid_tokens": None, "num_tokens_hint": 1, "out": None, "lora": None},
}
_SAME = ("num_tokens_hint", "route", "runs")  # an outcome may stay the same


@pytest.mark.slow(keep=8)
@pytest.mark.parametrize("name", ALTERNATIVES)
def test_calls_that_look_alike_are_told_apart(name: str, device: str) -> None:
    door = Door.of(name, device)
    for tensor in _written(door):
        tensor.zero_() if tensor.dtype == INT32 else None
    fresh = [tensor.clone() for tensor in _written(door)]
    for argument, value in ALTERNATIVES[name](Batch(device)).items():
        for _ in range(2):
            usual = _outcome(door, fresh, {})
        found = _outcome(door, fresh, {argument: value})
        forget()
        wanted = _outcome(door, fresh, {argument: value})
        pairs = list(zip(found, wanted, strict=True))
        assert all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in pairs), argument
        other = len(found) != len(usual) or not all(map(torch.equal, found, usual))
        assert other or argument in _SAME, f"{argument} changes nothing"


IN_OTHER_WORDS = {"quantize_weights", "warmup"}  # group is rows and columns, shapes are of classes of their own


def test_a_tensor_that_stands_twice_is_known_again() -> None:
    """Without a search among all that was called before, for which torch compares tensors; it takes none twice."""
    calls, (x, y, longer) = runtime.Calls(), (torch.ones(2), torch.ones(2), torch.ones(3))
    calls.put((), (x, y, x), "call")
    assert calls.get((), (x, y, x)) == "call"
    is_alike, _ = calls.recent[()]
    tries = [((x, y, x), True), ((y, x, y), True), ((x, x, y), False), ((x, longer, x), False), ((longer, y, longer), False)]
    assert [is_alike(*tensors) for tensors, _ in tries] == [expected for _, expected in tries]


@pytest.mark.parametrize("name", sorted({name for name in OPS if hasattr(kg, name)} - IN_OTHER_WORDS))
def test_signature_and_docstring_have_what_is_declared(name: str) -> None:
    function = getattr(kg, name)
    parameters = set(inspect.signature(function).parameters)
    declared = [op for op in OPS if op == name or (op, name) == ("lora_route_held", "lora_route")]
    assert parameters == {o.name for op in declared for o in OPS[op].operands if getattr(o, "public", True)}
    _, args, told = inspect.getdoc(function).partition("Args:")
    lines = re.findall(r"(?m)^    ([\w, ]+):", told.partition("\nRaises:")[0])
    names = {word.strip() for line in lines for word in line.split(",")}
    assert not args or parameters <= names
