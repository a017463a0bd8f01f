"""The schedules of moe_route where they are launched: a class each, and of it an object a variant."""

from __future__ import annotations

from typing import Any, NamedTuple

from .. import _runtime as runtime
from .._filling import Filling
from ._held import FILL, check_held
from ._op import (
    CHUNK,
    MAX_PAIRS,
    PACK,
    SORT,
    WIDTH,
    PackProblem,
    Problem,
    check_pack,
    check_sort,
    counters,
    counts_size,
    first_blocks,
)

_TABLES = "pairs_ptr blocks_ptr num_blocks_ptr"
_ROUTING = "topk_ids_ptr token_lora_mapping_ptr adapter_enabled_ptr expert_map_ptr"


class _Sort(Filling):
    """What schedules that sort pairs do."""

    op = SORT
    check = check_sort


def _bounds(problem: Problem) -> dict[str, Any]:
    """The numbers of what reads the routing."""
    return {
        "num_pairs": problem.num_pairs,
        "MAX_LORAS": problem.max_loras,
        "NUM_EXPERTS": problem.num_experts,
        "GLOBAL_EXPERTS": problem.global_experts,
        "TOP_K": problem.top_k,
    }


class _Chunks(NamedTuple):
    """How programs for a chunk of pairs each go through all of them."""

    number: int
    counters: int  # of groups
    constants: dict[str, Any]
    counting: runtime.Options
    placing: runtime.Options


def _chunks(problem: Problem) -> _Chunks:
    """The chunks of the pairs of a batch."""
    size, pdl = counters(problem.num_groups), runtime.traits(problem.device).pdl
    constants = {**_bounds(problem), "BLOCK_M": problem.block_m, "SIZE": size, "CHUNK": CHUNK, "PDL": pdl}
    placing = runtime.Options(4 if size <= 2048 else 8, pdl=pdl)
    return _Chunks(runtime.cdiv(problem.num_pairs, CHUNK), size, constants, runtime.Options(4), placing)


class OneLaunch(_Sort):
    """Launches of one_launch."""

    def __init__(self, kernel: Any) -> None:
        super().__init__(kernel)
        self._kernel = runtime.Launcher(kernel, SORT, f"{_TABLES} {_ROUTING}")

    def scratch_size(self, num_pairs: int, num_groups: int) -> int:
        return 0

    def bind(self, problem: Problem) -> runtime.Call:
        num_pairs = problem.num_pairs
        if num_pairs > MAX_PAIRS:
            runtime.fail(self.name, "pairs", num_pairs, f"at most {MAX_PAIRS}", "use moe_route_three_launch")
        size = max(16, runtime.next_power_of_2(num_pairs))
        options = runtime.Options(4 if size < MAX_PAIRS else 8)
        return self._kernel.bind(1, options, **_bounds(problem), BLOCK_M=problem.block_m, SIZE=size)


class TwoLaunch(_Sort):
    """Launches of two_launch."""

    def __init__(self, count: Any, place: Any) -> None:
        super().__init__(count)
        self._count = runtime.Launcher(count, SORT, f"counts_ptr=scratch {_ROUTING}")
        self._place = runtime.Launcher(place, SORT, f"{_TABLES} counts_ptr=scratch {_ROUTING}")

    def scratch_size(self, num_pairs: int, num_groups: int) -> int:
        return 5 * counters(num_groups) * runtime.cdiv(num_pairs, CHUNK)

    def bind(self, problem: Problem) -> runtime.Call:
        num_chunks, size, constants, counting, placing = _chunks(problem)
        count = self._count.bind(num_chunks, counting, **constants)
        starts = runtime.GIVEN.scratch[size * num_chunks :]
        place = self._place.bind(num_chunks, placing, starts_ptr=starts, num_chunks=num_chunks, **constants)
        return runtime.InOrder((count, place))


class ThreeLaunch(_Sort):
    """Launches of three_launch."""

    def __init__(self, count: Any, prefix: Any, place: Any) -> None:
        super().__init__(count)
        self._count = runtime.Launcher(count, SORT, _ROUTING)
        self._prefix = runtime.Launcher(prefix, SORT, "totals_ptr=scratch")
        self._place = runtime.Launcher(place, SORT, f"{_TABLES} totals_ptr=scratch {_ROUTING}")

    def scratch_size(self, num_pairs: int, num_groups: int) -> int:
        return counts_size(num_pairs, num_groups)

    def bind(self, problem: Problem) -> runtime.Call:
        num_chunks, size, constants, counting, placing = _chunks(problem)
        scratch = runtime.GIVEN.scratch
        constants |= {"counts_ptr": scratch[size:], "starts_ptr": scratch[size * (1 + num_chunks) :], "num_chunks": num_chunks}
        count = self._count.bind(num_chunks, counting, **constants)
        prefix = self._prefix.bind(size // WIDTH, counting._replace(pdl=constants["PDL"]), **constants, WIDTH=WIDTH, STEP=64)
        return runtime.InOrder((count, prefix, self._place.bind(num_chunks, placing, **constants)))


class FromTables:
    """Launches of from_tables."""

    def __init__(self, listing: Any, packing: Any) -> None:
        self.name = runtime.variant_of(listing)
        operands = "blocks_ptr num_blocks_ptr expert_ids_ptr num_tokens_post_padded_ptr lora_ids_ptr adapter_enabled_ptr"
        self._list = runtime.Launcher(listing, PACK, operands)
        self._pack = runtime.Launcher(packing, PACK, f"{_TABLES} sorted_token_ids_ptr")

    def launch(self, **arguments: Any) -> None:
        """One call, checked.

        Raises:
            ValueError: something does not fit; nothing was launched.
        """
        given = PACK.given(**arguments)
        self.bind(check_pack(self.name, given)).run(given)

    def bind(self, problem: PackProblem) -> runtime.Call:
        """The two launches for tables of these sizes, ready to be made again and again."""
        list_blocks = self._list.bind(
            1,
            runtime.Options(4),
            row_blocks=problem.row_blocks,
            row_stride=problem.blocks_stride,
            MAX_LORAS=problem.max_loras,
            NUM_EXPERTS=problem.num_experts,
            NUM_LORA_IDS=problem.num_lora_ids,
            LORA_IDS_SIZE=runtime.next_power_of_2(problem.num_lora_ids),
            BLOCK_M=problem.block_m,
            ENTRIES=1024,
        )
        pack_pairs = self._pack.bind(
            problem.max_loras * problem.row_blocks,
            runtime.Options(4),
            num_pairs=problem.num_pairs,
            row_size=problem.row_size,
            row_stride=problem.row_stride,
            BLOCK_M=problem.block_m,
        )
        return runtime.InOrder((list_blocks, pack_pairs))


class Held:
    """Launches of held."""

    _CHUNK = 128  # tokens of a program
    _STEP = 4096  # that it counts at a time, at most

    def __init__(self, kernel: Any) -> None:
        self.name = runtime.variant_of(kernel)
        operands = f"adapters_ptr {_TABLES} token_lora_mapping_ptr valid_tokens_ptr"
        self._kernel = runtime.Launcher(kernel, FILL, operands)

    def launch(self, **arguments: Any) -> None:
        """One call, checked.

        Raises:
            ValueError: something does not fit; nothing was launched.
        """
        given = FILL.given(**arguments)
        self.bind(check_held(self.name, given), given.max_loras).run(given)

    def bind(self, capacity: int, max_loras: int) -> runtime.Call:
        """The launch for tables of these sizes and a mapping of one dtype, ready to be made again and again."""
        return self._kernel.bind(
            max(1, runtime.cdiv(capacity, self._CHUNK)),
            runtime.Options(8),
            num_rows=runtime.Made(len, runtime.GIVEN.token_lora_mapping),
            CAPACITY=capacity,
            MAX_LORAS=max_loras,
            BLOCKS_AT=first_blocks(capacity, max_loras),
            SIZE=max(32, runtime.next_power_of_2(max_loras)),
            CHUNK=self._CHUNK,
            STEP=min(self._STEP, max(self._CHUNK, runtime.next_power_of_2(capacity))),
        )
