"""The short way to launch passes what Triton's own passes, seen by a driver that records launches instead of running them."""

from __future__ import annotations

import contextlib
import importlib
import itertools
import sys
from types import SimpleNamespace
from typing import Any, Callable, Iterator, NamedTuple

import pytest
import torch
import triton
from doors import Door
from triton.backends.nvidia.driver import CudaLauncher
from triton.runtime.errors import OutOfResources

import generated as kg
from generated import _operands as operands
from generated import _runtime as runtime
from generated.moe_add import _problem as _add_problem
from generated.moe_gemm import _problem as _gemm_problem
from generated.moe_lora import _problem
from kernelgen.compiled.stand_in import Driver
from kernelgen.core.targets import TARGETS

STREAM = 77
TOKENS, TOP_K, EXPERTS, LORAS, N = 6, 2, 4, 2, 48


class Launch(NamedTuple):
    """What reaches the driver; pointers are numbers."""

    x: int
    y: int
    z: int
    stream: int
    function: int
    cooperative: bool
    pdl: bool
    metadata: tuple[int, ...]
    arguments: tuple[Any, ...]


class Recorder(Driver):
    """A driver that notes every launch."""

    def __init__(self, shared_memory: int = 232448) -> None:
        super().__init__(TARGETS["sm_90"])
        self._device = 0
        self.launches: list[Launch] = []
        functions = itertools.count(1000)
        properties = {"max_shared_mem": shared_memory, "multiprocessor_count": 132}
        self.utils = SimpleNamespace(
            load_binary=lambda *binary: (object(), next(functions), 0, 0, 1024),
            unload_module=lambda module: None,
            get_device_properties=lambda device: properties,
        )
        self.launcher_cls = self._launcher

    def get_current_stream(self, device: int) -> int:
        return STREAM

    def _launcher(self, source: Any, metadata: Any) -> CudaLauncher:
        """Triton's own launcher of a kernel, but for the C function that it ends in."""
        launcher = object.__new__(CudaLauncher)
        for name in (
            "num_ctas",
            "global_scratch_size",
            "global_scratch_align",
            "profile_scratch_size",
            "profile_scratch_align",
            "launch_cooperative_grid",
            "launch_pdl",
        ):
            setattr(launcher, name, getattr(metadata, name))
        launcher.gsan_enabled = False
        launcher.arg_annotations = launcher.kernel_signature = None
        kinds = list(source.signature.values())

        def launch(x: int, y: int, z: int, stream: int, function: int, *rest: Any) -> None:
            cooperative, pdl, *rest = rest
            if triton.__version__.startswith("3.6."):
                scratch, (packed, *_), values = rest[:2], rest[2:6], rest[6:]
            else:
                (packed, *_), scratch, values = rest[:4], rest[4:6], rest[8]
            assert scratch == [None, None]
            passed = [
                _plain(value)
                for value, kind in zip(values, kinds, strict=True)
                if kind != "constexpr"
            ]
            where = (x, y, z, stream, function, cooperative, pdl, packed)
            self.launches.append(Launch(*where, tuple(passed)))

        launcher.launch = launch
        return launcher


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(map(_plain, value))
    return value.data_ptr() if isinstance(value, torch.Tensor) else value


@pytest.fixture(scope="module")
def recorder() -> Recorder:
    """One for all tests, since compiled kernels keep the driver that loaded them."""
    return Recorder()


@pytest.fixture
def driver(recorder: Recorder, monkeypatch: pytest.MonkeyPatch) -> Iterator[Recorder]:
    recorder.launches.clear()
    monkeypatch.setattr(triton.runtime.driver, "_active", recorder)
    # CPU tensors stand for those of device 0: what torch would be asked about it.
    monkeypatch.setattr(runtime, "runs_on", lambda device: True)
    monkeypatch.setattr(runtime, "_get_device", lambda: 0)
    monkeypatch.setattr(runtime, "_get_stream", lambda device: STREAM)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.Tensor, "get_device", lambda self: 0)
    _forget_bound_calls()
    yield recorder
    _forget_bound_calls()


def _forget_bound_calls() -> None:
    with runtime.compile_only():
        pass


@pytest.fixture
def slow_launches(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The launches that took Triton's own path."""
    taken: list[Any] = []
    launch = runtime.Launcher.launch

    def noted(self: Any, *arguments: Any) -> Any:
        taken.append(self)
        return launch(self, *arguments)

    monkeypatch.setattr(runtime.Launcher, "launch", noted)
    return taken


class Batch:
    """The tensors of one call of ``moe_lora``, which stay where they are."""

    def __init__(self, assignment: str, rank: int, weighted: bool = False, k: int = 64) -> None:
        dtype = torch.bfloat16
        self.assignment, self.rank = assignment, rank
        self.out = torch.zeros(TOKENS, TOP_K, 2 * N, dtype=dtype)
        self.x = torch.zeros(TOKENS * (TOP_K if weighted else 1), k, dtype=dtype)
        self.a = [torch.zeros(LORAS, EXPERTS, rank, k, dtype=dtype) for _ in range(2)]
        self.b = [torch.zeros(LORAS, EXPERTS, N, rank, dtype=dtype) for _ in range(2)]
        self.ids = torch.zeros(TOKENS, TOP_K, dtype=torch.int32)
        self.adapters = torch.zeros(TOKENS, dtype=torch.int32)
        self.weights = torch.zeros(TOKENS, TOP_K) if weighted else None
        self.workspace = kg.moe_workspace(
            max_tokens=TOKENS,
            top_k=TOP_K,
            num_experts=EXPERTS,
            max_loras=LORAS,
            max_rank=rank,
            num_slices=2,
            device="cpu",
        )

    def route(self) -> kg.MoeRoute:
        return kg.moe_route(
            self.ids,
            self.adapters,
            num_experts=EXPERTS,
            max_loras=LORAS,
            assignment=self.assignment,
            workspace=self.workspace,
        )

    def serve(self, variant: Callable[..., None] = kg.moe_lora, **options: Any) -> None:
        if self.weights is not None:
            options |= {"topk_weights": self.weights, "mul_routed_weight": True}
        variant(self.out, self.x, self.a, self.b, self.route(), **options)


CASES = {
    "naive": {"assignment": "naive", "rank": 16},
    "naive_weighted": {"assignment": "naive", "rank": 16, "weighted": True},
    "sorted": {"assignment": "sorted", "rank": 64},
    "sorted_weighted": {"assignment": "sorted", "rank": 64, "weighted": True},
    "tiled_rank": {"assignment": "sorted", "rank": 200},
}


@pytest.mark.parametrize("case", CASES)
def test_the_short_way_passes_the_same(
    driver: Recorder, slow_launches: list[Any], case: str
) -> None:
    batch = Batch(**CASES[case])
    batch.serve()
    first = driver.launches[:]
    assert len(first) == len(slow_launches) >= 2
    assert {launch.stream for launch in first} == {STREAM}
    batch.serve()
    assert len(slow_launches) == len(first), "the second call took Triton's path again"
    assert driver.launches[len(first) :] == first


@pytest.mark.parametrize("name", ["fused_moe", "lora"])
def test_the_short_way_of_a_layer_passes_the_same(
    driver: Recorder, slow_launches: list[Any], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """What launches read lies in what the layer is given, in parts of buffers too."""
    monkeypatch.setattr(operands, "_check_places", lambda *places: None)
    door, calls = Door.of(name, "cpu"), []
    slow_launches.clear()  # of its route
    for _ in range(2):
        driver.launches.clear()
        door()
        calls.append(driver.launches[:])
    assert calls[0] == calls[1] and len(calls[0]) >= 2
    assert len(slow_launches) == len(calls[0]), "the second call took Triton's path again"


@pytest.mark.parametrize("schedule", ["one_shot", "two_kernel"])
def test_the_short_way_of_a_variant_passes_the_same(driver: Recorder, schedule: str) -> None:
    """The launchers of single variants bind anew each time, so what they bind is called twice here."""
    module = importlib.import_module(f"generated.moe_lora.{schedule}_bf16_sorted_add_plain_r64")
    batch = Batch("sorted", 64)
    route = batch.route()
    operands = {"out": batch.out, "x": batch.x, "lora_a": batch.a, "lora_b": batch.b, "route": route}
    given = _problem.OP.given(**operands, add_inputs=True)
    problem = _problem.check(schedule, given, dtype=torch.bfloat16, naive=False, max_rank=64)
    call = module.schedule.bind(problem, route, _problem.choose(schedule, problem, route))
    driver.launches.clear()
    call.run(given)
    first = driver.launches[:]
    call.run(given)
    assert first and driver.launches == 2 * first


def test_a_launch_is_bound_with_the_constants_of_its_kernel(driver: Recorder) -> None:
    kernel = importlib.import_module("generated.moe_add.bf16").schedule._kernel
    given = dict.fromkeys(kernel.constants, 16)
    kernel.bind(1, runtime.Options(), **given)
    kernel.bind(1, runtime.Options(), **given, M=16)
    with pytest.raises(TypeError, match=r"_kernel: .*missing: \['N'\]"):
        kernel.bind(1, runtime.Options(), **{"M" if name == "N" else name: 16 for name in given})
    without = runtime.Launcher(kernel.kernel, _add_problem.OP, "out_ptr=out route_ids_ptr=route.topk_ids")
    with pytest.raises(TypeError, match=r"missing: \['delta_ptr', 'token_lora_mapping_ptr'"):
        without.bind(1, runtime.Options(), **given)
    for slip in ("delta_ptr=detla", "delta_ptr=route.delta", "detla_ptr", "delta_ptr=delta.route"):
        with pytest.raises(TypeError, match=f"_kernel: {slip}: moe_add is given no "):
            runtime.Launcher(kernel.kernel, _add_problem.OP, f"out_ptr {slip}")


def test_a_pointer_that_is_not_aligned_takes_another_kernel(
    driver: Recorder, slow_launches: list[Any]
) -> None:
    batch = Batch("naive", 16)
    batch.serve()
    first = driver.launches[:]
    for elements in (1, 2, 4):
        driver.launches.clear()
        slow_launches.clear()
        batch.x = torch.zeros(batch.x.numel() + elements, dtype=batch.x.dtype)[elements:].view(batch.x.shape)
        assert batch.x.data_ptr() % 16
        batch.serve()
        shrink, expand = driver.launches
        assert len(slow_launches) == 1 and shrink.function != first[0].function
        assert expand == first[1]
    driver.launches.clear()
    batch.x = torch.zeros(batch.x.shape, dtype=batch.x.dtype)
    batch.serve()
    assert [launch.function for launch in driver.launches] == [launch.function for launch in first]


def test_index_tables_need_no_alignment(driver: Recorder, slow_launches: list[Any]) -> None:
    """They are slices of what an engine keeps for its largest batch."""
    batch = Batch("naive", 16)
    batch.serve()
    first = driver.launches[:]
    slow_launches.clear()
    batch.adapters = torch.zeros(TOKENS + 1, dtype=torch.int32)[1:]
    assert batch.adapters.data_ptr() % 16
    batch.serve()
    assert not slow_launches
    assert [launch[:8] for launch in driver.launches[len(first) :]] == [
        launch[:8] for launch in first
    ]
    assert batch.adapters.data_ptr() in driver.launches[-1].arguments


def test_a_profiler_sees_every_launch(driver: Recorder, slow_launches: list[Any]) -> None:
    batch = Batch("sorted", 64)
    batch.serve()
    count = len(slow_launches)

    def hook(metadata: Any) -> None:
        pass

    triton.knobs.runtime.launch_enter_hook.add(hook)
    try:
        batch.serve()
    finally:
        triton.knobs.runtime.launch_enter_hook.remove(hook)
    assert len(slow_launches) == 2 * count
    batch.serve()
    assert len(slow_launches) == 2 * count


def test_another_current_device_takes_the_long_way(
    driver: Recorder, slow_launches: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = Batch("sorted", 64)
    batch.serve()
    count = len(slow_launches)
    monkeypatch.setattr(runtime, "_get_device", lambda: 1)
    batch.serve()
    assert len(slow_launches) == 2 * count


def test_tiles_that_do_not_fit_are_an_error_and_launch_nothing(driver: Recorder) -> None:
    module = importlib.import_module("generated.moe_lora.one_shot_bf16_sorted_add_plain_r128")
    tiles = module.Config(block_n=256, block_k=256, shrink_stages=6, expand_stages=3, num_warps=8)
    batch = Batch("sorted", 128, k=2048)
    batch.route()
    sorting = len(driver.launches)
    with pytest.raises(OutOfResources, match="shared memory"):
        batch.serve(module.moe_lora_one_shot_bf16_sorted_add_plain_r128, config=tiles)
    assert len(driver.launches) == 2 * sorting


@pytest.mark.slow
def test_warps_of_roles_serve_where_gluon_is_found(
    driver: Recorder, slow_launches: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are chosen as measured; a Triton without such Gluon has the others serve, and nobody notices."""
    e4m3, (tokens, experts, k, n) = torch.float8_e4m3fn, (64, 2, 256, 128)
    x, w = torch.zeros(tokens, k).to(e4m3), torch.zeros(experts, 2 * n, k).to(e4m3)
    scales = {"x_scale": torch.ones(tokens, 2), "w_scale": torch.ones(experts, 2, 2)}
    tables = kg.moe_align(torch.zeros(tokens, 1, dtype=torch.int32), num_experts=experts, block_m=128)
    out = torch.zeros(tokens, n, dtype=torch.bfloat16)

    def serve() -> None:
        kg.moe_gemm(out, x, w, tables, x_rows="token", out_rows="sorted", activation="swiglu", **scales)

    with runtime.compile_only(), runtime.choosing({}) as choices:
        serve()
    forced = {(type(choices[0].key), choices[0].key): (("warp_specialised", (2, 1)), ("box", None))}
    with runtime.choosing(forced), runtime.launches() as launches:
        serve()
        taken, count = len(slow_launches), len(driver.launches)
        serve()
        assert len(slow_launches) == taken, "the second call took Triton's path again"
        assert len(driver.launches) == count + 1
    assert [launch.variant.partition("_bf16")[0] for launch in launches] == ["warp_specialised"]
    monkeypatch.delattr(kg, "_gluon")
    monkeypatch.setitem(sys.modules, "generated._gluon", None)
    _gemm_problem.has_gluon.cache_clear()
    with runtime.compile_only(), runtime.choosing(forced), runtime.launches() as launches:
        serve()
    assert [launch.variant.partition("_bf16")[0] for launch in launches] == ["box"]
    _gemm_problem.has_gluon.cache_clear()


@pytest.mark.parametrize(("padding", "gated"), [((0, 0), 1), ((8, 0), 1), ((0, 8), 1), ((8, 8), 1), ((0, 0), 2), ((16, 0), 2)])
def test_what_lies_in_whole_16_bytes_is_read_by_boxes(driver: Recorder, padding: tuple[int, int], gated: int) -> None:
    """Experts as well as rows, and those of a gate side by side; else by pointers, whatever was measured. In bytes too many."""
    experts, k, n = 2, 256, 128
    row = k + padding[1] // 2
    expert = gated * n * row + padding[0] // 2
    w = torch.zeros(experts * expert, dtype=torch.bfloat16).as_strided((experts, gated * n, k), (expert, row, 1))
    how = {"x_rows": "token", "out_rows": "sorted", "activation": "swiglu"} if gated == 2 else {"x_rows": "sorted"}
    x, out = (torch.zeros(64, size, dtype=torch.bfloat16) for size in (k, n))
    tables = kg.moe_align(torch.zeros(64, 1, dtype=torch.int32), num_experts=experts, block_m=64)
    with runtime.choosing({}) as choices:
        kg.moe_gemm(out, x, w, tables, **how)
    forced = {(type(choices[0].key), choices[0].key): (("box", None), ("tile", None))}
    with runtime.choosing(forced), runtime.launches() as launches:
        kg.moe_gemm(out, x, w, tables, **how)
    assert [launch.variant.partition("_bf16")[0] for launch in launches] == ["tile" if any(padding) else "box"]


def test_lanes_widen_mxfp4_where_gluon_is_found(driver: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of few rows an expert, of few tokens without tables; else, and where Triton has no such Gluon, the others serve."""
    k, inter, experts, u8 = 64, 32, 2, torch.uint8
    weights = torch.zeros(experts, 2 * inter, k // 2, dtype=u8), torch.zeros(experts, k, inter // 2, dtype=u8)
    scales = torch.zeros(experts, 2 * inter, k // 32, dtype=u8), torch.zeros(experts, k, inter // 32, dtype=u8)

    def serve(tokens: int) -> list[str]:
        x, ids = torch.zeros(tokens, k, dtype=torch.bfloat16), torch.zeros(tokens, 1, dtype=torch.int32)
        given = {"activation": "swiglu_clamp", "limit": 7.0, "w13_scale": scales[0], "w2_scale": scales[1]}
        with runtime.compile_only(), runtime.launches() as launches:
            kg.fused_moe(x, *weights, ids, torch.ones(tokens, 1), **given)
        return [launch.variant.partition("_bf16")[0] for launch in launches if launch.family == "moe_gemm"]

    assert [serve(tokens) for tokens in (1, 2, 3, 300)] == [["lane_gemv"] * 2] * 2 + [["lanes"] * 2, ["tile"] * 2]
    monkeypatch.setattr(_gemm_problem, "has_gluon", lambda: False)
    assert [serve(tokens) for tokens in (1, 2, 300)] == [["naive"] * 2, ["tile"] * 2, ["tile"] * 2]
