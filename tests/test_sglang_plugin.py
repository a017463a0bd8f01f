"""The plugin of SGLang, without SGLang: which releases it serves, and that it makes the calls of front doors, to the bit.

Its private parts of SGLang are stood in for; ``integrations/sglang/tests`` serve models with the real ones.
"""

from __future__ import annotations

import enum
import itertools
import logging
import sys
import types
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "integrations" / "sglang"))
from kernelgen_sglang import plugin, versions

L, K, RANK, CAPACITY, DTYPE = 3, 32, 16, 16, torch.bfloat16


@pytest.mark.parametrize(
    ("version", "module"),
    [
        ("0.5.23", "seams_0_5_23"),
        ("0.5.23+cu130", "seams_0_5_23"),
        ("0.5.22", None),
        ("0.5.24", None),
        ("0.5.23.post1", None),
        ("0.5.23rc1", None),
        ("0.5.23.dev7+gabc", None),
        ("dev", None),
    ],
)
def test_releases(version: str, module: str | None) -> None:
    if module is None:
        with pytest.raises(versions.Refused, match=r"served are 0\.5\.23"):
            versions.seams_for(version)
    else:
        assert versions.seams_for(version) == module
        assert (Path(plugin.__file__).parent / f"{module}.py").exists()


@pytest.mark.parametrize(
    ("version", "switch", "said"), [("0.5.24", None, "SGLang 0.5.24 is not known"), ("0.5.23", "0", "KERNELGEN_SGLANG=0")]
)
def test_says_why_it_hooks_nothing(version: str, switch: str | None, said: str, monkeypatch: Any, caplog: Any) -> None:
    sglang, registry = types.ModuleType("sglang"), types.ModuleType("sglang.srt.plugins.hook_registry")
    sglang.__version__ = version  # type: ignore[attr-defined]
    registry.HookRegistry = registry.HookType = None  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "sglang", sglang)
    for name in ("sglang.srt", "sglang.srt.plugins"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, registry.__name__, registry)
    monkeypatch.delenv("KERNELGEN_SGLANG", raising=False)
    if switch is not None:
        monkeypatch.setenv("KERNELGEN_SGLANG", switch)
    with caplog.at_level(logging.WARNING, plugin.log.name):
        plugin.register()
    assert said in caplog.text


class Base:
    """What ``BaseLoRABackend`` of SGLang has for ours."""

    def __init__(self, max_loras_per_batch: int, device: torch.device) -> None:
        self.max_loras_per_batch, self.device = max_loras_per_batch, device
        self.batch_info = self.prefill_cuda_graph_batch_info = None


class Kind(str, enum.Enum):
    LINEAR, EMBEDDING, LM_HEAD = "linear", "embedding", "lm_head"


class Hooks(NamedTuple):
    after_gate_up: Any = None
    after_down: Any = None


def stand_in() -> types.ModuleType:
    """The private parts of SGLang that backend and experts touch, of batches that say their rows."""
    seams = types.ModuleType("kernelgen_sglang.seams_0_5_23")
    parts = {name: type(name, (), {}) for name in ("FusedMoE", "StandardDispatcher", "UnquantizedFusedMoEMethod")}
    parts |= {"BaseLoRABackend": Base, "DenseLoraKind": Kind, "LoRAHooks": Hooks}
    parts |= {"MoELoRABatchInfo": lambda *of: types.SimpleNamespace(adapter_enabled=of[2], token_lora_mapping=of[3])}
    parts |= {"rows_of_requests": lambda batch: batch.rows, "rows_of_logits": lambda batch: batch.logits}
    parts |= {"logits_at_once": lambda: 2, "capturing_lora_graph": lambda: False}
    parts |= {"StandardCombineInput": types.SimpleNamespace, "new_output": lambda rows, width, like: like.new_empty(rows, width)}
    vars(seams).update(parts)
    sys.modules[seams.__name__] = seams
    sys.modules["sglang"] = types.ModuleType("sglang")
    sys.modules["sglang"].__version__ = "0.5.23"  # type: ignore[attr-defined]
    return seams


@pytest.fixture(scope="module")
def modules() -> Any:
    """The modules of backend and experts, over a stand-in for SGLang."""
    stand_in()
    from kernelgen_sglang import backend, experts

    yield backend, experts
    for name in ("sglang", *(f"kernelgen_sglang.{name}" for name in ("seams_0_5_23", "backend", "experts"))):
        del sys.modules[name]
    versions.seams.cache_clear()


def new(*size: int, dtype: torch.dtype = DTYPE) -> torch.Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(sum(size))).to(dtype)


RANKS, SCALINGS = [8, 0, 16], [2.0, 0.0, 0.5]  # of the slots; the second is of no adapter
BATCHES = [([0, 2, 1], [5, 3, 4]), ([2, 1], [1, 2]), ([1, 1], [1, 1])]


def step(backend: Any, slots: list[int], rows: list[int], **options: Any) -> torch.Tensor:
    """A batch of requests in slots; the slot of each row, -1: none."""
    batch = types.SimpleNamespace(rows=rows, logits=options.pop("logits", None))
    backend.prepare_lora_batch(batch, slots, RANKS, SCALINGS, options.pop("decode", False), options.pop("prefill", False))
    counted = [slot if RANKS[slot] else -1 for slot in slots]
    return torch.repeat_interleave(torch.tensor(counted), torch.tensor(rows)).int()


def test_linear_layers_make_the_calls_of_the_front_doors(modules: Any) -> None:
    """Of batches of every family of graphs, one behind the other, with rows that pad them."""
    kg, backend = modules[0].kg, modules[0].Backend("csgmv", L, torch.device("cpu"), capacity=CAPACITY)
    backend.init_decode_cuda_graph_batch_info(CAPACITY, 1)
    backend.init_prefill_cuda_graph_batch_info(CAPACITY)
    a, b, offsets = new(L, 3 * RANK, K), new(L, 64, RANK), (0, 32, 48, 64)
    of_adapters = {"lora_ranks": torch.tensor(RANKS).int(), "scalings": torch.tensor(SCALINGS), "packed": True}
    views = [a[:, RANK * i : RANK * (i + 1)] for i in range(3)], [b[:, i:j] for i, j in itertools.pairwise(offsets)]
    for (slots, rows), graph in itertools.product(BATCHES, ({}, {"decode": True}, {"prefill": True})):
        mapping = step(backend, slots, rows, **graph)
        held = {"decode": backend._decode, "prefill": backend.prefill_cuda_graph_batch_info}
        assert backend.batch_info is held.get(next(iter(graph), ""), backend._eager)
        for padded in (len(mapping), CAPACITY):
            x, base = new(padded, K), new(padded, 80)
            full = torch.nn.functional.pad(mapping, (0, padded - len(mapping)), value=-1)
            wanted = base.clone()
            kg.lora(wanted, x, *views, kg.lora_route(full, max_loras=L), **of_adapters)
            out = backend.forward_with_base(None, x, base.clone, a, b, None, offsets, all_reduce=lambda out: 2 * out)
            assert torch.equal(out, 2 * wanted)
        assert torch.equal(backend.run_qkv_lora(x, a, b, torch.tensor(offsets), 32, base_output=base.clone(), n_slices=3), wanted)


def test_larger_batches_have_room_for_more(modules: Any) -> None:
    """Of a batch of no graph that is larger than any before: one more row makes no other tables."""
    backend = modules[0].Backend("csgmv", L, torch.device("cpu"), capacity=CAPACITY)
    held = []
    for rows in (CAPACITY, CAPACITY + 1, 2 * CAPACITY, CAPACITY):
        slots = step(backend, [0], [rows])
        assert torch.equal(backend.batch_info.token_slots[:rows], slots)
        held.append(backend.batch_info)
    assert held[0] is not held[1] and held[1] is held[2] is held[3]


def test_heads_and_embeddings(modules: Any) -> None:
    kg, backend = modules[0].kg, modules[0].Backend("triton", L, torch.device("cpu"), capacity=CAPACITY)
    a, b = new(L, RANK, K), new(L, 48, RANK)
    of_adapters = {"lora_ranks": torch.tensor(RANKS).int(), "scalings": torch.tensor(SCALINGS)}
    mapping = step(backend, [0, 2, 1], [5, 3, 4], logits=[1, 2, 2])
    kept = torch.tensor([0, 2, 2, -1, -1]).int()
    for info, slots in ((backend.lm_head_batch_info, kept), *zip(backend.lm_head_pass_batch_infos, kept.split(2), strict=True)):
        x, base = new(len(slots), K), new(len(slots), 64)
        wanted = base.clone()
        kg.lora(wanted, x, [a], [b], kg.lora_route(slots, max_loras=L), **of_adapters)
        out = backend.forward_with_base(None, x, base.clone, a, b, None, (0, 48), kind=Kind.LM_HEAD, pruned_batch_info=info)
        assert info.expected_tokens == len(slots) and torch.equal(out, wanted)
    x, stacked, y = new(12, K), new(L, 2 * RANK, K), torch.full((1, 12, 2 * RANK), torch.nan)  # two slices, one behind the other
    ranks, route = 2 * of_adapters["lora_ranks"], kg.lora_route(mapping, max_loras=L)
    kg.lora_shrink(y, x, [stacked], route, zero_rest=True, lora_ranks=ranks)
    assert torch.equal(backend.run_lora_a_sgemm(x, stacked, stack_num=2), y[0].to(DTYPE))
    ids, table = torch.tensor([0, 5, 99, 30, 31, 32, -1, 7, 8, 9, 10, 11]), new(L, RANK, K)
    base, y = new(12, 48), torch.zeros(1, 12, RANK)
    for i, (slot, token) in enumerate(zip(mapping.tolist(), ids.tolist(), strict=True)):
        if slot >= 0 and 0 <= token < K:
            y[0, i] = table[slot, :, token].float() * SCALINGS[slot]
    wanted = base.clone()
    kg.lora_expand(wanted, y, [b], kg.lora_route(mapping, max_loras=L))
    assert torch.equal(backend.forward_with_base(None, ids, base.clone, table, b, None, (0, 48), kind=Kind.EMBEDDING), wanted)


@pytest.mark.parametrize("shared", [False, True])
def test_experts_make_the_calls_of_the_front_doors(shared: bool, modules: Any) -> None:
    """Under SGLang's own layers, where SGLang leaves it to us."""
    (kg, experts), num, inter = (modules[0].kg, modules[1]), 4, 32
    backend = modules[0].Backend("triton", L, torch.device("cpu"), capacity=CAPACITY)
    mapping, outer = step(backend, [0, 2, 1], [5, 3, 4]), 1 if shared else num
    a13, b13, a2, b2 = new(L, outer, 2 * RANK, K), new(L, num, 2 * inter, RANK), new(L, num, RANK, inter), new(L, outer, K, RANK)
    names = ("gate_up_lora_a_weights", "gate_up_lora_b_weights", "down_lora_a_weights", "down_lora_b_weights")
    info = types.SimpleNamespace(seg_indptr=None, has_active_lora=True, token_lora_mapping=backend.batch_info.token_slots)
    vars(info).update(zip(names, (a13, b13, a2, b2), strict=True))
    ids = torch.stack([torch.randperm(num, generator=torch.Generator().manual_seed(t))[:2] for t in range(12)]).int()
    ids[3, 1] = -1  # elsewhere
    weights, x, h = new(12, 2, dtype=torch.float32), new(12, K), new(24, inter)
    gate_up, down = new(12, 2, 2 * inter), new(12, 2, K)
    wanted = gate_up.clone(), down.clone()
    hooks = experts.build_lora_hooks(None, x, info, ids)
    hooks.after_gate_up(x, gate_up, weights, ids)
    hooks.after_down(torch.cat([h, h]), down, weights, ids)  # SGLang has room for more rows
    a13, b2 = a13.expand(-1, num, -1, -1), b2.expand(-1, num, -1, -1)
    route = kg.moe_route(ids, mapping, num_experts=num, max_loras=L, rank=RANK)
    kg.moe_lora(wanted[0], x, a13.chunk(2, 2), b13.chunk(2, 2), route)
    kg.moe_lora(wanted[1], h, [a2], [b2], route, topk_weights=weights, mul_routed_weight=True)
    assert torch.equal(gate_up, wanted[0]) and torch.equal(down, wanted[1])
    info.has_active_lora = False
    assert experts.build_lora_hooks(None, x, info, ids) == Hooks()
    info.seg_indptr = torch.zeros(1)  # a batch of SGLang's own
    assert experts.build_lora_hooks(lambda *of: "own", x, info, ids) == "own"


def served_layer(gated: bool, inter: int, **changed: Any) -> Any:
    """A layer of experts, as SGLang has it, with some things changed: of its runner's configuration, else its own."""
    seams = sys.modules["kernelgen_sglang.seams_0_5_23"]
    config: dict[str, Any] = dict.fromkeys(("gemm1_alpha", "gemm1_clamp_limit", "swiglu_limit", "routed_scaling_factor"))
    config |= {"activation": "silu" if gated else "relu2", "is_gated": gated, "no_combine": False, "num_fused_shared_experts": 0}
    own = {"quant_method": seams.UnquantizedFusedMoEMethod(), "dispatcher": seams.StandardDispatcher(), "hidden_size": K}
    own["dispatcher"].skip_local_expert_mapping = changed.pop("skips", False)
    own |= {"should_fuse_routed_scaling_factor_in_topk": False, "w13_weight": new(4, (1 + gated) * inter, K)}
    own |= {"w2_weight": new(4, K, inter), "moe_runner_config": types.SimpleNamespace(**config)}
    for name, value in changed.items():
        (config if name in config else own).update({name: value})
    own["moe_runner_config"] = types.SimpleNamespace(**config)
    return types.SimpleNamespace(**own)


def test_layers_stay_those_of_sglang_for_a_reason(modules: Any) -> None:
    experts = modules[1]
    assert experts.refusal(served_layer(True, 32)) is experts.refusal(served_layer(False, 32)) is None
    for changed, why in (
        ({"quant_method": None}, "experts are quantised"),
        ({"w13_weight": new(4, 64, K, dtype=torch.float32)}, "experts are of torch.float32"),
        ({"hidden_size": K - 8}, "weights are padded"),
        ({"activation": "swish"}, "no kernel has the activation swish"),
        *(({name: 7.0}, "the gate has a limit") for name in ("gemm1_alpha", "gemm1_clamp_limit", "swiglu_limit")),
        ({"with_bias": True}, "experts have a bias"),
        *(({name: 1}, "the sum is not of routed experts alone") for name in ("no_combine", "num_fused_shared_experts")),
        ({"should_fuse_routed_scaling_factor_in_topk": True}, "the sum is not of routed experts alone"),
        *((some, "tokens are dispatched by global experts") for some in ({"skips": True}, {"dispatcher": None})),
    ):
        assert experts.refusal(served_layer(True, 32, **changed)) == why, changed


@pytest.mark.parametrize(("gated", "factor"), [(False, None), (True, 2.5)])
def test_a_runner_makes_the_layer(gated: bool, factor: float | None, modules: Any) -> None:
    """Of batches with adapters and without, in a graph or not, with the factor of routed experts in its weights."""
    (kg, experts), inter = (modules[0].kg, modules[1]), 32
    layer = served_layer(gated, inter, routed_scaling_factor=factor)
    backend = modules[0].Backend("triton", L, torch.device("cpu"), capacity=CAPACITY)
    backend.init_decode_cuda_graph_batch_info(CAPACITY, 1)
    halves = 1 + gated
    a13, b13, a2, b2 = new(L, 4, halves * RANK, K), new(L, 4, halves * inter, RANK), new(L, 4, RANK, inter), new(L, 4, K, RANK)
    ids = torch.stack([torch.randperm(4, generator=torch.Generator().manual_seed(t))[:2] for t in range(12)]).int()
    weights, x, act = new(12, 2, dtype=torch.float32), new(12, K), {"activation": "swiglu" if gated else "relu2"}
    dispatched = types.SimpleNamespace(hidden_states=x, topk_output=types.SimpleNamespace(topk_ids=ids, topk_weights=weights))
    for slots, decode in itertools.product(([0, 2, 1], [1, 1, 1]), (False, True)):
        mapping = step(backend, slots, [5, 3, 4], decode=decode)
        assert backend.batch_info.has_active_lora == bool((mapping >= 0).any())
        routed = (layer.w13_weight, layer.w2_weight, ids, weights * (factor or 1.0))
        wanted = kg.fused_moe(x, *routed, out=torch.empty_like(x), **act)
        if (mapping >= 0).any():
            deltas = experts.Deltas(ids, mapping, a13, b13, a2, b2)
            experts.experts.layer(wanted, x, *routed, act, deltas.add_first, deltas.add_second)
        found = experts.Runner(layer, backend).over(dispatched, (a13, b13, a2, b2)).hidden_states
        assert torch.equal(found, wanted)
