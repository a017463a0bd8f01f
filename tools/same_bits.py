#!/usr/bin/env python3
"""Whether two generated packages give the same bits, on calls of every front door; on a GPU also how long a call takes the host.

    tools/same_bits.py OLD NEW [--device cuda] [--jobs 16] [--only TEXT]

OLD and NEW are folders of packages (a copy of generated/ of another commit, say). Inputs are drawn anew for each call, from its
name, and are the same for both. Exit code 0: all bits agree; 1: some do not, each of which is named; 2: a call failed in one.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib
import itertools
import multiprocessing
import os
import statistics
import sys
import time
import zlib
from pathlib import Path
from types import ModuleType
from typing import Any, Callable, Iterator

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

Call = Callable[[ModuleType], list[torch.Tensor]]
BITS, FP8 = (torch.bfloat16, torch.float16), torch.float8_e4m3fn
EXPERTS, TOP_K, LORAS = 8, 2, 3


class Draw:
    """Random inputs of one call; the same for every package."""

    def __init__(self, name: str, device: str) -> None:
        self.device = device
        self.generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))

    def normal(self, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.randn(shape, generator=self.generator).to(dtype).to(self.device)

    def ids(self, low: int, high: int, *shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
        return torch.randint(low, high, shape, generator=self.generator).to(dtype).to(self.device)

    def weights(
        self, kg: ModuleType, quant: str | None, *shape: int, dtype: torch.dtype
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        plain = self.normal(*shape) * shape[-1] ** -0.5
        return kg.quantize_weights(plain, quant) if quant else (plain.to(dtype), None)

    def rows(
        self, kg: ModuleType, quant: str | None, *shape: int, dtype: torch.dtype
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        plain = self.normal(*shape)
        return kg.quantize_activations(plain, quant) if quant else (plain.to(dtype), None)


def slices(pairs: list[tuple[torch.Tensor, torch.Tensor | None]]) -> tuple[list[torch.Tensor], list[torch.Tensor] | None]:
    """Tensors of slices, and their scales."""
    tensors, scales = zip(*pairs, strict=True)
    return list(tensors), None if scales[0] is None else list(scales)


def moe_lora(
    draw: Draw,
    kg: ModuleType,
    t: int,
    k: int,
    n: int,
    rank: int,
    dtype: torch.dtype,
    adds: bool,
    weighted: bool,
    assignment: str,
    weight_quant: str | None = None,
    act_quant: str | None = None,
) -> list[torch.Tensor]:
    count = 1 if weighted else 2
    x, x_scale = draw.rows(kg, act_quant, t * TOP_K if weighted else t, k, dtype=dtype)
    a, a_scale = slices([draw.weights(kg, weight_quant, LORAS, EXPERTS, rank, k, dtype=dtype) for _ in range(count)])
    b, b_scale = slices([draw.weights(kg, weight_quant, LORAS, EXPERTS, n, rank, dtype=dtype) for _ in range(count)])
    out = draw.normal(t, TOP_K, count * n, dtype=dtype)
    ids, adapters = draw.ids(-1, EXPERTS, t, TOP_K), draw.ids(-1, LORAS, t)
    route = kg.moe_route(ids, adapters, num_experts=EXPERTS, max_loras=LORAS, assignment=assignment)
    weights = {"topk_weights": draw.normal(t, TOP_K), "mul_routed_weight": True} if weighted else {}
    kg.moe_lora(out, x, a, b, route, add_inputs=adds, a_scale=a_scale, b_scale=b_scale, x_scale=x_scale, **weights)
    return [out]


def apart(
    draw: Draw, kg: ModuleType, t: int, k: int, n: int, rank: int, dtype: torch.dtype, assignment: str
) -> list[torch.Tensor]:
    x = draw.normal(t, k, dtype=dtype)
    a, b = (
        [draw.weights(kg, None, LORAS, EXPERTS, *shape, dtype=dtype)[0] for _ in range(2)] for shape in ((rank, k), (n, rank))
    )
    ids, adapters = draw.ids(-1, EXPERTS, t, TOP_K), draw.ids(-1, LORAS, t)
    route = kg.moe_route(ids, adapters, num_experts=EXPERTS, max_loras=LORAS, assignment=assignment)
    y, out = draw.normal(2, t * TOP_K, rank), draw.normal(t, TOP_K, 2 * n, dtype=dtype)
    kg.moe_lora_shrink(y, x, a, route)
    kg.moe_lora_expand(out, y, b, route)
    return [y, out]


def dense(
    draw: Draw,
    kg: ModuleType,
    t: int,
    k: int,
    n: int,
    rank: int,
    dtype: torch.dtype,
    adds: bool,
    count: int,
    weight_quant: str | None = None,
    act_quant: str | None = None,
) -> list[torch.Tensor]:
    x, x_scale = draw.rows(kg, act_quant, t, k, dtype=dtype)
    a, a_scale = slices([draw.weights(kg, weight_quant, LORAS, rank, k, dtype=dtype) for _ in range(count)])
    b, b_scale = slices([draw.weights(kg, weight_quant, LORAS, n, rank, dtype=dtype) for _ in range(count)])
    out = draw.normal(t, count * n, dtype=dtype)
    route = kg.lora_route(draw.ids(-1, LORAS, t), max_loras=LORAS)
    kg.lora(out, x, a, b, route, scaling=0.5, add_inputs=adds, x_scale=x_scale, a_scale=a_scale, b_scale=b_scale)
    return [out]


def layer(
    draw: Draw,
    kg: ModuleType,
    t: int,
    hidden: int,
    inter: int,
    dtype: torch.dtype,
    activation: str,
    valid: int | None,
    weight_quant: str | None = None,
    act_quant: str | None = None,
) -> list[torch.Tensor]:
    gates = 2 if activation == "swiglu" else 1
    x, x_scale = draw.rows(kg, act_quant, t, hidden, dtype=dtype)
    w13, w13_scale = draw.weights(kg, weight_quant, EXPERTS, gates * inter, hidden, dtype=dtype)
    w2, w2_scale = draw.weights(kg, weight_quant, EXPERTS, hidden, inter, dtype=dtype)
    ids, weights = draw.ids(-1, EXPERTS, t, TOP_K, dtype=torch.int64), draw.normal(t, TOP_K)
    tokens = None if valid is None else torch.tensor([valid], dtype=torch.int32, device=draw.device)
    h_scale = torch.ones(1, device=draw.device) if act_quant == "tensor" else None
    scales = {"w13_scale": w13_scale, "w2_scale": w2_scale, "x_scale": x_scale, "h_scale": h_scale}
    return [kg.fused_moe(x, w13, w2, ids, weights, activation=activation, valid_tokens=tokens, **scales)]


def pieces(draw: Draw, kg: ModuleType, t: int, n: int, dtype: torch.dtype) -> list[torch.Tensor]:
    ids = draw.ids(-1, EXPERTS, t, TOP_K)
    rows = draw.normal(t, TOP_K, 2 * n, dtype=dtype)
    h = draw.normal(t * TOP_K, n, dtype=dtype)
    kg.moe_act(h, rows, ids, activation="swiglu", num_experts=EXPERTS)
    total = kg.moe_sum(rows, ids, num_experts=EXPERTS, topk_weights=draw.normal(t, TOP_K))
    tables = kg.moe_align(ids, num_experts=EXPERTS)
    route = kg.moe_route(ids, draw.ids(-1, LORAS, t), num_experts=EXPERTS, max_loras=LORAS, assignment="sorted")
    out = draw.normal(t, TOP_K, n, dtype=dtype)
    kg.moe_add(out, draw.normal(t, TOP_K, n, dtype=dtype), route)
    live = int((ids >= 0).sum())
    blocks = 3 * int(tables.num_blocks)
    found = [h, total, out, tables.pairs[:live], tables.blocks.flatten()[:blocks], tables.num_blocks]
    if dtype == torch.bfloat16:
        codes, scale = draw.normal(t * TOP_K, n).to(FP8), draw.normal(t * TOP_K, 1)
        kg.moe_quant(codes, scale, h, tables)
        found += [codes, scale]
    return found


def calls(big: bool) -> Iterator[tuple[str, Callable[[Draw, ModuleType], list[torch.Tensor]]]]:
    """(name, what it does) of all calls; ``big``: sizes for a GPU, which an interpreter would take hours for."""
    k, n = (512, 384) if big else (96, 48)
    tokens = (1, 17, 130, 1100) if big else (1, 5)
    ranks = (8, 24, 64, 200) if big else (16, 24)

    def named(function: Callable[..., list[torch.Tensor]], *arguments: Any) -> tuple[str, Callable[..., list[torch.Tensor]]]:
        words = ", ".join(str(argument).removeprefix("torch.") for argument in arguments)

        def run(draw: Draw, kg: ModuleType) -> list[torch.Tensor]:
            return function(draw, kg, *arguments)

        return f"{function.__name__}({words})", run

    flags = list(itertools.product((True, False), (True, False)))
    for number, (t, rank, dtype, way) in enumerate(itertools.product(tokens, ranks, BITS, ("naive", "sorted"))):
        yield named(moe_lora, t, k, n, rank, dtype, *flags[number % 4 if dtype == BITS[0] else (number + 2) % 4], way)
        yield named(apart, t, k, n, rank, dtype, way)
    for t, rank, count, dtype in itertools.product(tokens, ranks, (1, 3), BITS):
        yield named(dense, t, k, n, rank, dtype, (t + rank) % 2 == 0, count)
    modes = (
        (None, "tensor"),
        (None, "token"),
        (None, "group"),
        ("tensor", None),
        ("channel", None),
        ("group", None),
        ("channel", "token"),
        ("group", "group"),
    )
    for t, (weights, x) in itertools.product(tokens, modes):
        for weighted, way in flags if big else flags[:1]:
            yield named(moe_lora, t, k, n, 16, BITS[0], True, weighted, "sorted" if way else "naive", weights, x)
        for rank in ranks[:3]:
            yield named(dense, t, k, n, rank, BITS[0], True, 2, weights, x)
    base = (
        (None, None),
        ("tensor", None),
        ("channel", None),
        ("group", None),
        ("tensor", "tensor"),
        ("channel", "token"),
        ("group", "group"),
    )
    for t, valid, (weights, x) in itertools.product(tokens, (None, 3), base):
        if valid is None or valid <= t:
            yield named(layer, t, k, n // 3 * 2, BITS[0], "swiglu", valid, weights, x)
    for t, dtype, activation in itertools.product(tokens, BITS, ("swiglu", "relu2")):
        yield named(layer, t, k, n, dtype, activation, None)
    for t, dtype in itertools.product(tokens, BITS):
        yield named(pieces, t, n, dtype)


@contextlib.contextmanager
def importable(folder: Path) -> Iterator[ModuleType]:
    """The package in a folder, imported under the folder's name beside others."""
    sys.path.insert(0, str(folder.resolve().parent))
    try:
        yield importlib.import_module(folder.name)
    finally:
        sys.path.pop(0)


def compare(folders: tuple[Path, Path], device: str, only: str, share: tuple[int, int]) -> list[tuple[str, str]]:
    """(call, "same", "differs" or the error) for a share of the calls."""
    if device == "cpu":
        from kernelgen.prove import interpreter

        interpreter.install()
    torch.set_num_threads(1)
    found = []
    with importable(folders[0]) as old, importable(folders[1]) as new:
        for number, (name, run) in enumerate(calls(device == "cuda")):
            if number % share[1] != share[0] or only not in name:
                continue
            outcomes: list[Any] = []
            for kg in (old, new):
                try:
                    outcomes.append([tensor.cpu().contiguous().view(torch.uint8) for tensor in run(Draw(name, device), kg)])
                except Exception as error:
                    outcomes.append(f"{type(error).__name__}: {error}")
            if outcomes[0] == outcomes[1] if isinstance(outcomes[0], str) else False:
                verdict = "neither serves it"
            elif any(isinstance(outcome, str) for outcome in outcomes):
                verdict = " | ".join(outcome if isinstance(outcome, str) else "served" for outcome in outcomes)
            else:
                same = all(map(torch.equal, *outcomes))
                verdict = "same" if same else "differs"
            found.append((name, verdict))
    return found


def host(folders: tuple[Path, Path], rounds: int = 2000) -> dict[str, list[float]]:
    """Microseconds of host time of a call, the median of rounds of 100, in each package; the packages take turns."""
    times: dict[str, list[float]] = {}
    with importable(folders[0]) as old, importable(folders[1]) as new:
        for name, prepare in HOST.items():
            ready = [prepare(Draw(name, "cuda"), kg) for kg in (old, new)]
            samples: list[list[float]] = [[], []]
            for _ in range(rounds // 100):
                for call, taken in zip(ready, samples, strict=True):
                    torch.cuda.synchronize()
                    begin = time.perf_counter()
                    for _ in range(100):
                        call()
                    taken.append((time.perf_counter() - begin) * 1e4)
            times[name] = [statistics.median(taken) for taken in samples]
    return times


def _host_moe_lora(rank: int, assignment: str, draw: Draw, kg: ModuleType) -> Callable[[], None]:
    t, dtype = 16, torch.bfloat16
    x, out = draw.normal(t, 512, dtype=dtype), draw.normal(t, TOP_K, 768, dtype=dtype)
    a, b = ([draw.normal(LORAS, EXPERTS, *shape, dtype=dtype) for _ in range(2)] for shape in ((rank, 512), (384, rank)))
    ids, adapters = draw.ids(0, EXPERTS, t, TOP_K), draw.ids(0, LORAS, t)
    workspace = kg.moe_workspace(
        max_tokens=t, top_k=TOP_K, num_experts=EXPERTS, max_loras=LORAS, max_rank=rank, num_slices=2, device="cuda"
    )
    route = kg.moe_route(ids, adapters, num_experts=EXPERTS, max_loras=LORAS, assignment=assignment, workspace=workspace)
    return functools.partial(kg.moe_lora, out, x, a, b, route)


def _host_lora(draw: Draw, kg: ModuleType) -> Callable[[], None]:
    t, dtype = 16, torch.bfloat16
    x, out = draw.normal(t, 512, dtype=dtype), draw.normal(t, 768, dtype=dtype)
    a, b = ([draw.normal(LORAS, *shape, dtype=dtype) for _ in range(2)] for shape in ((16, 512), (384, 16)))
    workspace = kg.lora_workspace(max_tokens=t, max_loras=LORAS, max_rank=16, num_slices=2, device="cuda")
    route = kg.lora_route(draw.ids(0, LORAS, t), max_loras=LORAS, workspace=workspace)
    return functools.partial(kg.lora, out, x, a, b, route)


def _host_layer(t: int, draw: Draw, kg: ModuleType) -> Callable[[], Any]:
    dtype = torch.bfloat16
    x, w13, w2 = (
        draw.normal(t, 512, dtype=dtype),
        draw.normal(EXPERTS, 768, 512, dtype=dtype),
        draw.normal(EXPERTS, 512, 384, dtype=dtype),
    )
    ids, weights, out = draw.ids(0, EXPERTS, t, TOP_K), draw.normal(t, TOP_K), draw.normal(t, 512, dtype=dtype)
    workspace = kg.fused_moe_workspace(
        max_tokens=t, top_k=TOP_K, num_experts=EXPERTS, hidden=512, intermediate=384, device="cuda"
    )
    return functools.partial(kg.fused_moe, x, w13, w2, ids, weights, activation="swiglu", out=out, workspace=workspace)


def _host_route(draw: Draw, kg: ModuleType) -> Callable[[], Any]:
    workspace = kg.moe_workspace(
        max_tokens=16, top_k=TOP_K, num_experts=EXPERTS, max_loras=LORAS, max_rank=16, num_slices=2, device="cuda"
    )
    ids, adapters = draw.ids(0, EXPERTS, 16, TOP_K), draw.ids(0, LORAS, 16)
    sizes = {"num_experts": EXPERTS, "max_loras": LORAS, "assignment": "sorted"}
    return functools.partial(kg.moe_route, ids, adapters, workspace=workspace, **sizes)


HOST: dict[str, Callable[[Draw, ModuleType], Callable[[], Any]]] = {
    "moe_lora, one launch": functools.partial(_host_moe_lora, 16, "sorted"),
    "moe_lora, two launches": functools.partial(_host_moe_lora, 16, "naive"),
    "lora, two launches": _host_lora,
    "fused_moe, two launches": functools.partial(_host_layer, 2),
    "fused_moe, four launches": functools.partial(_host_layer, 16),
    "moe_route": _host_route,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument("--only", default="", metavar="TEXT", help="calls whose name holds it")
    arguments = parser.parse_args()
    os.environ["TRITON_INTERPRET"] = "1" if arguments.device == "cpu" else "0"
    folders = (arguments.old, arguments.new)
    shares = [(number, arguments.jobs) for number in range(arguments.jobs)]
    with multiprocessing.get_context("spawn").Pool(arguments.jobs) as pool:
        work = functools.partial(compare, folders, arguments.device, arguments.only)
        found = [row for rows in pool.imap_unordered(work, shares) for row in rows]
    for name, verdict in sorted(found):
        if verdict != "same":
            print(f"{name}: {verdict}")
    same, differ = (sum(verdict == word for _, verdict in found) for word in ("same", "differs"))
    print(
        f"{len(found)} calls: {same} give the same bits, {differ} others, {len(found) - same - differ} not served"
    )
    if arguments.device == "cuda" and not arguments.only:
        for name, (before, after) in host(folders).items():
            print(f"host, {name:28} {before:6.2f} us {after:6.2f} us")
    failed = any(verdict not in ("same", "differs", "neither serves it") for _, verdict in found)
    return 2 if failed else 1 if differ else 0


if __name__ == "__main__":
    sys.exit(main())
