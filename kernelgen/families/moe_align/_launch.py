"""The schedules of moe_align where they are launched: a class each, and of it an object a variant."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from .. import _runtime as runtime
from .._filling import Filling
from ._op import (
    CHUNKS,
    FILL,
    LOCALIZE,
    Localize,
    Problem,
    check_fill,
    check_local_ids,
    counters,
    counts_size,
    is_dense,
)

_TABLES = "pairs_ptr blocks_ptr num_blocks_ptr"
_ROUTING = "topk_ids_ptr valid_tokens_ptr"


class Walk(NamedTuple):
    """How programs for one expert each go through all pairs."""

    rows: int  # of a tile, each of pairs side by side
    num_warps: int
    dense: bool  # as ``is_dense``
    counters: int  # of experts


def counted_pairs(num_pairs: int, top_k: int) -> int:
    """Those of so many tokens as the next power of two, so that what depends on them is a short list."""
    return runtime.next_power_of_2(num_pairs // top_k) * top_k


def walk(num_pairs: int, top_k: int, num_experts: int) -> Walk:
    """The walk over so many pairs."""
    most = counted_pairs(num_pairs, top_k)
    chunk = min(4096, max(256, runtime.next_power_of_2(most)))
    dense = is_dense(most // top_k, top_k, num_experts)
    num_warps = 4 if chunk <= 512 else 8 if chunk < 4096 else 16
    return Walk(chunk // 32, num_warps, dense, counters(num_experts) if dense else 1)


class Chunks(NamedTuple):
    """How programs for a chunk of pairs each go through all of them."""

    pairs: int  # of a chunk
    number: int
    rows: int  # of the tile that a chunk is, each of pairs side by side
    counters: int  # of experts
    num_warps: int  # of those that place the pairs


def chunks(num_pairs: int, num_experts: int) -> Chunks:
    """The chunks of so many pairs: of the same size for all numbers of them up to the next power of two."""
    size, pairs = counters(num_experts), max(256, runtime.next_power_of_2(num_pairs) // CHUNKS)
    return Chunks(pairs, max(1, runtime.cdiv(num_pairs, pairs)), 32, size, 4 if size <= 128 else 8)


class _Tables(Filling):
    """What schedules that make tables do."""

    op = FILL
    check = check_fill


class OneLaunch(_Tables):
    """Launches of one_launch."""

    def __init__(self, kernel: Any) -> None:
        super().__init__(kernel)
        self._kernel = runtime.Launcher(kernel, FILL, f"{_TABLES} {_ROUTING}")

    def scratch_size(self, num_pairs: int, num_experts: int) -> int:
        return 0

    def bind(self, problem: Problem) -> runtime.Call:
        over = walk(problem.num_pairs, problem.top_k, problem.num_experts)
        return self._kernel.bind(
            problem.num_experts,
            runtime.Options(over.num_warps),
            num_pairs=problem.num_pairs,
            TOP_K=problem.top_k,
            NUM_EXPERTS=problem.num_experts,
            LOCAL_EXPERT_START=problem.local_expert_start,
            BLOCK_M=problem.block_m,
            DENSE=over.dense,
            SIZE=over.counters,
            ROWS=over.rows,
            PDL=runtime.traits(problem.device).pdl,
        )


class TwoLaunch(_Tables):
    """Launches of two_launch."""

    def __init__(self, count: Any, place: Any) -> None:
        super().__init__(count)
        self._count = runtime.Launcher(count, FILL, f"counts_ptr=scratch {_ROUTING}")
        self._place = runtime.Launcher(place, FILL, f"{_TABLES} counts_ptr=scratch {_ROUTING}")

    def scratch_size(self, num_pairs: int, num_experts: int) -> int:
        return counts_size(num_experts)

    def bind(self, problem: Problem) -> runtime.Call:
        num_pairs, pdl = problem.num_pairs, runtime.traits(problem.device).pdl
        over = chunks(num_pairs, problem.num_experts)
        constants = {
            "num_pairs": num_pairs,
            "num_chunks": over.number,
            "TOP_K": problem.top_k,
            "NUM_EXPERTS": problem.num_experts,
            "LOCAL_EXPERT_START": problem.local_expert_start,
            "CHUNK": over.pairs,
            "SIZE": over.counters,
            "PDL": pdl,
        }
        count = self._count.bind(over.number, runtime.Options(4), **constants)
        options = runtime.Options(over.num_warps, pdl=pdl)
        place = self._place.bind(over.number, options, **constants, BLOCK_M=problem.block_m, ROWS=over.rows)
        return runtime.InOrder((count, place))


class LocalIds:
    """Launches of local_ids."""

    _BLOCK = 512  # pairs of a program

    def __init__(self, kernel: Any) -> None:
        self.name = runtime.variant_of(kernel)
        self._kernel = runtime.Launcher(kernel, LOCALIZE, "out_ptr topk_ids_ptr expert_map_ptr")

    def launch(self, out: Tensor, topk_ids: Tensor, expert_map: Tensor) -> None:
        """One call, checked.

        Raises:
            ValueError: something does not fit; nothing was launched.
        """
        given = Localize(out, topk_ids, expert_map)
        num_pairs = check_local_ids(self.name, given)
        if num_pairs > 0:
            self.bind(num_pairs, expert_map.shape[0]).run(given)

    def bind(self, num_pairs: int, global_experts: int) -> runtime.Call:
        """The launch for so many ids, ready to be made again and again."""
        grid, constants = runtime.cdiv(num_pairs, self._BLOCK), {"GLOBAL_EXPERTS": global_experts, "BLOCK": self._BLOCK}
        return self._kernel.bind(grid, runtime.Options(4), num_pairs=num_pairs, **constants)
