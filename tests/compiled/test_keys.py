"""Compile keys are closed: what changes from step to step makes none that ``warmup`` did not compile.

Tensors are on the ``meta`` device, so no routing, which is data, can enter a key; what is left are sizes: all up to 2048 are
tried, and a share of those behind.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Callable, Iterable, Iterator, Sequence

import pytest
import torch
import triton

import generated as kg
from generated import FusedMoeShape, LoraShape, MoeShape, ShardedMoeShape
from generated import _runtime as runtime
from generated._warmup import ends, requests
from kernelgen.compiled.stand_in import compiling_for
from kernelgen.core.targets import TARGETS

MAX_TOKENS = 8192
# Every small batch, the edges of every power of two, and a stride that meets all residues; or nearly all.
EDGES = {(1 << i) + step for i in range(14) for step in (-1, 0, 1)}
FEW = sorted({*range(130), *EDGES, *range(0, MAX_TOKENS, 61)} & set(range(MAX_TOKENS + 1)))
COUNTS = sorted({*range(2049), *range(2048, MAX_TOKENS, 17), *ends(MAX_TOKENS)})
OF_COUNTS = {"few": FEW, "most": COUNTS}
QWEN3_W13 = MoeShape(k=2048, n=768, slices=2, rank=16, top_k=8, num_experts=128, max_loras=4)
QWEN3_W2 = QWEN3_W13._replace(k=768, n=2048, slices=1, rank=64, mul_routed_weight=True)
MIXTRAL_W13 = MoeShape(
    k=4096, n=14336, slices=2, rank=128, top_k=2, num_experts=8, max_loras=8, dtype=torch.float16
)
LOCAL_EXPERTS = MoeShape(  # a share of DeepSeek-V3's experts, with everything optional given
    k=7168,
    n=2048,
    slices=2,
    rank=200,
    top_k=3,
    num_experts=32,
    max_loras=1,
    add_inputs=False,
    adapter_enabled=True,
    global_experts=256,
    topk_ids_dtype=torch.int64,
)
ALL = ("auto", "naive", "sorted")


@pytest.fixture(autouse=True)
def hopper() -> Iterator[None]:
    with compiling_for(TARGETS["sm_90"]):
        yield


def serve(shape: MoeShape, num_tokens: int, assignment: str, rank: int | None) -> None:
    """One step of an engine: a route of ``num_tokens``, and the op on it."""

    def empty(*size: int, dtype: torch.dtype = shape.dtype) -> torch.Tensor:
        return torch.empty(size, dtype=dtype, device="meta")

    def ints(size: int) -> torch.Tensor:
        return empty(size, dtype=torch.int32)

    loras, experts = shape.max_loras, shape.num_experts
    route = kg.moe_route(
        empty(num_tokens, shape.top_k, dtype=shape.topk_ids_dtype),
        ints(num_tokens),
        num_experts=experts,
        max_loras=loras,
        adapter_enabled=ints(loras + 1) if shape.adapter_enabled else None,
        expert_map=ints(shape.global_experts) if shape.global_experts else None,
        assignment=assignment,
        **({} if rank is None else {"rank": rank}),
    )
    rows = num_tokens * (shape.top_k if shape.mul_routed_weight else 1)
    weighted = shape.mul_routed_weight
    weights = empty(num_tokens, shape.top_k, dtype=torch.float32) if weighted else None
    kg.moe_lora(
        empty(num_tokens, shape.top_k, shape.slices * shape.n),
        empty(rows, shape.k),
        [empty(loras, experts, shape.rank, shape.k)] * shape.slices,
        [empty(loras, experts, shape.n, shape.rank)] * shape.slices,
        route,
        topk_weights=weights,
        add_inputs=shape.add_inputs,
        mul_routed_weight=weighted,
    )


def keys_of(
    shape: MoeShape, counts: Iterable[int], assignments: Sequence[str], rank: int | None = None
) -> set[Any]:
    found = set()
    with runtime.compile_only() as log:
        for num_tokens in counts:
            for assignment in assignments:
                serve(shape, num_tokens, assignment, rank)
            found.update(request.key for request in log)
            log.clear()
    return found


def warm_keys(shape: MoeShape, max_tokens: int = MAX_TOKENS) -> set[Any]:
    return {request.key for request in requests([shape], max_tokens=max_tokens)}


@pytest.mark.slow(keep=1)
@pytest.mark.parametrize("counts", OF_COUNTS.values(), ids=OF_COUNTS)
def test_no_number_of_tokens_makes_another_key(counts: Sequence[int]) -> None:
    known = warm_keys(QWEN3_W13)
    assert keys_of(QWEN3_W13, counts, ("auto",)) == known


@pytest.mark.slow(keep=1)
@pytest.mark.parametrize("shape", [LOCAL_EXPERTS, QWEN3_W2, MIXTRAL_W13], ids=["ep", "w2", "few"])
def test_no_assignment_makes_another_key(shape: MoeShape) -> None:
    shape = shape._replace(assignments=ALL)
    assert keys_of(shape, FEW, ALL) == warm_keys(shape)


@pytest.mark.slow(keep=1)
@pytest.mark.parametrize("rank", [64, 16])
def test_a_route_that_knows_the_rank_makes_no_other_key(rank: int) -> None:
    """It may then go the naive way for longer."""
    shape = QWEN3_W13._replace(rank=rank)
    assert keys_of(shape, range(0, 1025), ("auto",), rank) <= warm_keys(shape)


@pytest.mark.slow(keep=3)
@pytest.mark.parametrize("max_tokens", [0, 3, 511, 1, 100, 512, 513])
def test_warmup_covers_batches_up_to_the_largest(max_tokens: int) -> None:
    shape = QWEN3_W2._replace(rank=24, adapter_enabled=True)
    found = keys_of(shape, range(max_tokens + 1), ("auto",))
    assert found <= warm_keys(shape, max_tokens)


def test_keys_of_a_model_are_few() -> None:
    assert len(warm_keys(QWEN3_W13._replace(assignments=ALL))) <= 64


def test_every_integer_that_is_no_constant_is_not_specialised_on() -> None:
    for shape in (QWEN3_W13, QWEN3_W2, LOCAL_EXPERTS):
        for request in requests([shape._replace(assignments=ALL)], max_tokens=MAX_TOKENS):
            kernel = request.launcher.kernel
            for parameter, argument in zip(kernel.params, request.arguments, strict=False):
                if isinstance(argument, int):
                    assert parameter.do_not_specialize, (kernel.fn.__name__, parameter.name)


def test_arguments_that_need_no_alignment_come_last() -> None:
    """A launcher looks at the alignment of what comes before the first of them."""
    for shape in (QWEN3_W13, QWEN3_W2, LOCAL_EXPERTS):
        for request in requests([shape._replace(assignments=ALL)], max_tokens=MAX_TOKENS):
            launcher = request.launcher
            rest = launcher.kernel.params[launcher.num_aligned : len(request.arguments)]
            for parameter in rest:
                is_free = parameter.do_not_specialize or parameter.do_not_specialize_on_alignment
                assert is_free, (launcher.kernel.fn.__name__, parameter.name)


def test_triton_agrees_that_the_keys_are_equal() -> None:
    """Triton's own cache is the judge: batches of one key share one compiled kernel, other keys do not."""
    shape = QWEN3_W13._replace(rank=16, k=256, n=128)
    by_kernel: dict[Any, set[Any]] = {}
    with runtime.compile_only() as log:
        for num_tokens in (1, 2, 16, 17):  # Triton would specialise on 1 and on multiples of 16
            serve(shape, num_tokens, "naive", rank=None)
    for request in log:
        by_kernel.setdefault(request.launcher.kernel, set()).add(request.key)
        request.compile()
    device = triton.runtime.driver.active.get_current_device()
    assert sum(map(len, by_kernel.values())) < len(log)
    for kernel, keys in by_kernel.items():
        assert len(kernel.device_caches[device][0]) == len(keys), kernel.fn.__name__


def test_what_a_kernel_is_compiled_of_is_in_its_key() -> None:
    one, two = requests([QWEN3_W13], max_tokens=1)[:2]
    changed: list[dict[str, Any]] = [{"launcher": two.launcher}, {"constants": (*one.constants[:-1], 5)}]  # no kernel has five
    changed += [{"options": one.options._replace(**{name: 5})} for name in one.options._fields]
    tensors = [i for i, argument in enumerate(one.arguments) if isinstance(argument, torch.Tensor)]
    others = [(one.arguments[:i], other, one.arguments[i + 1 :]) for i in tensors for other in (None, one.arguments[i].double())]
    changed += [{"arguments": (*front, other, *rest)} for front, other, rest in others]
    assert len(tensors) > 2 and all(dataclasses.replace(one, **change).key != one.key for change in changed)


QWEN3_LAYER = FusedMoeShape(hidden=2048, intermediate=768, num_experts=128, top_k=8, out_dtype=torch.bfloat16)
LOCAL_LAYER = FusedMoeShape(  # a share of a layer, with widths that no large tile divides, and everything optional given
    hidden=2880,
    intermediate=352,
    num_experts=12,
    top_k=6,
    activation="relu2",
    dtype=torch.float16,
    valid_tokens=True,
    local_expert_start=36,
    topk_ids_dtype=torch.int64,
)

FP8_LAYER = QWEN3_LAYER._replace(weight_scales="group", x_scales="group")
ADAPTED_LAYER = QWEN3_LAYER._replace(rank=24, max_loras=5, adapter_enabled=True, valid_tokens=True)
BYTES_LAYER = FP8_LAYER._replace(x_scales="group_by_column", scales_dtype=torch.float8_e8m0fnu)
SHARED_LAYER = BYTES_LAYER._replace(rank=16, max_loras=5, adapter_enabled=True, shared_outer=True)


def serve_layer(shape: FusedMoeShape, num_tokens: int, hint: int | None) -> None:
    """One step of an engine on the base experts."""

    def empty(*size: int, dtype: torch.dtype = shape.dtype) -> torch.Tensor:
        return torch.empty(size, dtype=dtype, device="meta")

    rows = shape.intermediate * (2 if shape.activation == "swiglu" else 1)
    kind, scales = shape.dtype, {}
    if shape.weight_scales is not None:
        kind, groups = shape.fp8_dtype, shape.hidden // 128
        scales["w13_scale"] = empty(shape.num_experts, rows // 128, groups, dtype=shape.scales_dtype)
        scales["w2_scale"] = empty(shape.num_experts, groups, shape.intermediate // 128, dtype=shape.scales_dtype)
        scales["x_scale"] = empty(num_tokens, groups, dtype=shape.scales_dtype)
        if shape.x_scales == "group_by_column":  # as a kernel pads it, or not
            scales["x_scale"] = empty(groups, num_tokens + num_tokens % 4, dtype=shape.scales_dtype)[:, :num_tokens].t()
    lora, loras, experts = None, shape.max_loras, shape.num_experts
    if shape.rank:
        mapping, enabled = (empty(size, dtype=torch.int32) for size in (num_tokens, loras + 1))
        outer = 1 if shape.shared_outer else experts
        a13, b2 = (
            empty(loras, outer, *size).expand(-1, experts, -1, -1)
            for size in ((shape.rank, shape.hidden), (shape.hidden, shape.rank))
        )
        a2, b13 = (empty(loras, experts, *size) for size in ((shape.rank, shape.intermediate), (shape.intermediate, shape.rank)))
        lora = kg.FusedMoeLora(mapping, [a13] * 2, [b13] * 2, [a2], [b2], enabled)
    kg.fused_moe(
        empty(num_tokens, shape.hidden, dtype=kind),
        empty(shape.num_experts, rows, shape.hidden, dtype=kind),
        empty(shape.num_experts, shape.hidden, shape.intermediate, dtype=kind),
        empty(num_tokens, shape.top_k, dtype=shape.topk_ids_dtype),
        empty(num_tokens, shape.top_k, dtype=torch.float32),
        activation=shape.activation,
        valid_tokens=empty(1, dtype=torch.int32) if shape.valid_tokens else None,
        num_tokens_hint=hint,
        local_expert_start=shape.local_expert_start,
        out=None if shape.out_dtype is None else empty(num_tokens, shape.hidden, dtype=shape.out_dtype),
        lora=lora,
        **scales,
    )


LAYERS = {"qwen3": QWEN3_LAYER, "share": LOCAL_LAYER, "fp8": FP8_LAYER, "bytes": BYTES_LAYER, "adapters": ADAPTED_LAYER}
LAYERS |= {"shared": SHARED_LAYER}


@pytest.mark.slow(keep=1)
@pytest.mark.parametrize("shape", LAYERS.values(), ids=LAYERS)
def test_no_number_of_tokens_and_no_hint_makes_another_key_of_a_layer(shape: FusedMoeShape) -> None:
    edges = {(1 << i) + step for i in range(13) for step in (-1, 0, 1)}
    found = set()
    with runtime.compile_only() as log:
        for num_tokens in sorted({*range(40), *edges, *range(0, 4096, 61)}):
            for hint in (None, 1, 5, 30, 100, 700, 5000):
                serve_layer(shape, num_tokens, hint)
            found.update(request.key for request in log)
            log.clear()
    known = {request.key for request in requests([shape], max_tokens=4097)}
    assert found <= known and len(known) <= 72  # tables in chunks have three kernels


def test_warm_up_knows_how_scales_are_served() -> None:
    layers = [
        QWEN3_LAYER._replace(weight_scales=weights, x_scales=x)
        for weights, x in (("tensor", "tensor"), ("slice", "tensor"), ("tensor", "expert"))
    ]
    one, by_slice, by_expert = ({request.key for request in requests([layer], max_tokens=64)} for layer in layers)
    assert len(one) == len(by_slice) == len(by_expert)
    first, second = (one - others for others in (by_slice, by_expert))
    assert first and second and not first & second  # scales of w13, and those of what is between the products
    w13 = MoeShape(k=2048, n=768, slices=2, rank=16, top_k=8, num_experts=128, max_loras=5, x_scales="group")
    linear = LoraShape(k=4096, widths=(4096,), rank=16, max_loras=5, x_scales="group")
    for shape in (w13, linear):
        known = {request.key for request in requests([shape], max_tokens=64)}
        for served in ({"x_scales": "group_by_column"}, {"x_scales_dtype": torch.float8_e8m0fnu}):
            keys = {request.key for request in requests([shape._replace(**served)], max_tokens=64)}
            assert len(known) <= len(keys) <= len(known) + 1 and keys != known  # one row may lie either way


def linear(shape: LoraShape, num_tokens: int) -> None:
    """One step of an engine through a linear layer."""

    def empty(*size: int, dtype: torch.dtype = shape.dtype) -> torch.Tensor:
        return torch.empty(size, dtype=dtype, device="meta")

    route = kg.lora_route(empty(num_tokens, dtype=torch.int32), max_loras=shape.max_loras)
    a = [empty(shape.max_loras, shape.rank, shape.k) for _ in shape.widths]
    b = [empty(shape.max_loras, width, shape.rank) for width in shape.widths]
    at = shape.offset_start
    out, x = empty(num_tokens, shape.out_width or at + sum(shape.widths)), empty(num_tokens, shape.k)
    if shape.separate:
        y = empty(len(a), num_tokens, shape.rank, dtype=torch.float32)
        kg.lora_shrink(y, x, a, route, scaling=0.5)
        kg.lora_expand(out, y, b, route, offset_start=at)
    else:
        kg.lora(out, x, a, b, route, offset_start=at, scaling=0.5)


@pytest.mark.slow(keep=1)
@pytest.mark.parametrize("counts", OF_COUNTS.values(), ids=OF_COUNTS)
@pytest.mark.parametrize("separate", [False, True], ids=["one_op", "two_ops"])
def test_no_number_of_tokens_makes_another_key_of_a_linear_layer(separate: bool, counts: Sequence[int]) -> None:
    shape = LoraShape(k=4096, widths=(4096, 1024, 1024), rank=16, max_loras=4, separate=separate)
    found = set()
    with runtime.compile_only() as log:
        for num_tokens in counts:
            linear(shape, num_tokens)
            found.update(request.key for request in log)
            log.clear()
    known = {request.key for request in requests([shape], max_tokens=MAX_TOKENS)}
    assert found == known and len(known) < 40


DENSE = LoraShape(k=384, widths=(256, 128), rank=16, max_loras=4)
SHARDED = ShardedMoeShape(QWEN3_W2._replace(k=384, n=1024), offset=3, out_width=1031)  # no whole 16 bytes
# Shapes with what few of them have.
RARE: dict[str, tuple[Any, Callable[[Any, int], None]]] = {
    "wider out": (DENSE._replace(out_width=515), linear),
    "columns further on": (DENSE._replace(offset_start=5), linear),
    "columns further on of two ops": (DENSE._replace(offset_start=5, out_width=515, separate=True), linear),
    "sharded": (SHARDED, lambda shape, count: serve_sharded(shape, count, "auto")),
    "sharded, to the last column": (SHARDED._replace(out_width=None), lambda shape, count: serve_sharded(shape, count, "auto")),
    "shared factors": (SHARED_LAYER, lambda shape, count: serve_layer(shape, count, None)),
    "a share of a layer": (LOCAL_LAYER, lambda shape, count: serve_layer(shape, count, None)),
}


@pytest.mark.parametrize(("shape", "serve_one"), RARE.values(), ids=RARE)
def test_warm_up_does_what_a_shape_says(shape: Any, serve_one: Callable[[Any, int], None]) -> None:
    with runtime.compile_only() as log:
        for num_tokens in (1, 5, 17, 64):
            serve_one(shape, num_tokens)
        found = {request.key for request in log}
    assert found and found <= {request.key for request in requests([shape], max_tokens=64)}


def test_warm_up_knows_fp8_of_a_linear_layer() -> None:
    shape = LoraShape(k=4096, widths=(4096, 1024), rank=16, max_loras=5)  # which nobody tunes for: tiles of the rule
    quantised = shape._replace(weight_scales="channel", x_scales="token")
    known = {request.key for request in requests([shape], max_tokens=64)}
    keys = {request.key for request in requests([quantised], max_tokens=64)}
    assert len(keys) == len(known)
    assert all("route" in key[0].kernel.__name__ for key in keys & known)  # the sort is the same


def serve_sharded(sharded: ShardedMoeShape, num_tokens: int, assignment: str) -> None:
    """One step of an engine through a projection whose adapters are sharded."""
    shape, parts = sharded.shape, sharded.gathered

    def empty(*size: int, dtype: torch.dtype = shape.dtype) -> torch.Tensor:
        return torch.empty(size, dtype=dtype, device="meta")

    route = kg.moe_route(
        empty(num_tokens, shape.top_k, dtype=shape.topk_ids_dtype),
        empty(num_tokens, dtype=torch.int32),
        num_experts=shape.num_experts,
        max_loras=shape.max_loras,
        assignment=assignment,
    )
    weighted, num_pairs = shape.mul_routed_weight, num_tokens * shape.top_k
    y = empty(shape.slices, num_pairs, shape.rank, dtype=torch.float32)
    experts = (shape.max_loras, shape.num_experts)
    a = [empty(*experts, shape.rank, shape.k)] * shape.slices
    kg.moe_lora_shrink(y, empty(num_pairs if weighted else num_tokens, shape.k), a, route)
    kg.moe_lora_expand(
        empty(num_tokens, shape.top_k, sharded.out_width or sharded.offset + shape.slices * shape.n),
        y if parts == 1 else empty(parts, *y.shape, dtype=torch.float32),
        [empty(*experts, shape.n, shape.rank * parts)] * shape.slices,
        route,
        offset=sharded.offset,
        topk_weights=empty(num_tokens, shape.top_k, dtype=torch.float32) if weighted else None,
        mul_routed_weight=weighted,
    )


@pytest.mark.slow(keep=1)
@pytest.mark.parametrize(
    "shape",
    [
        ShardedMoeShape(QWEN3_W13._replace(n=384, rank=8, assignments=ALL), gathered=2),
        ShardedMoeShape(QWEN3_W2._replace(k=384, n=1024, assignments=ALL), offset=1024, out_width=4096),
    ],
    ids=["gathered", "reduced"],
)
def test_no_number_of_tokens_makes_another_key_of_sharded_adapters(shape: ShardedMoeShape) -> None:
    found = set()
    with runtime.compile_only() as log:
        for num_tokens in FEW:
            for assignment in ALL:
                serve_sharded(shape, num_tokens, assignment)
            found.update(request.key for request in log)
            log.clear()
    known = {request.key for request in requests([shape], max_tokens=MAX_TOKENS)}
    assert found == known and len(known) <= 64
