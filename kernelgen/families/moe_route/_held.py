"""The route of a dense layer that an engine holds: one set of tables for every number of tokens, filled anew each step."""

from __future__ import annotations

from typing import Annotated, Any, NamedTuple, final

import torch

from .. import _operands as operands
from .. import _runtime as runtime
from .._routing import INT32
from ._op import (
    BLOCK_MS,
    MoeRoute,
    MoeWorkspace,
    OpenRows,
    Workspace,
    first_blocks,
    most_blocks,
)
from ._table import VARIANTS

_Capacity = Annotated[int, operands.Int(1, size="capacity")]
_Loras = Annotated[int, operands.Int(1, 1024, size="L")]  # every program counts them all
_Mapping = Annotated[torch.Tensor, operands.Tensor("T", operands.IDS, operands.CONTIGUOUS)]
_ValidTokens = Annotated[torch.Tensor | None, operands.Tensor("1", *INT32)]


class _Held(NamedTuple):
    token_lora_mapping: _Mapping
    valid_tokens: _ValidTokens
    max_loras: _Loras
    capacity: _Capacity
    workspace: Workspace


HELD = operands.Op("lora_route_held", _Held)


class _Refill(NamedTuple):
    tables: Annotated[torch.Tensor, operands.Tensor("*", *INT32, written=True)]
    token_lora_mapping: _Mapping
    valid_tokens: _ValidTokens
    capacity: _Capacity
    max_loras: _Loras


REFILL = operands.Op("lora_route_refill", _Refill)


class Fill(NamedTuple):
    """What the launcher is given that makes the tables of a held route."""

    adapters: Annotated[torch.Tensor, operands.Tensor("capacity", *INT32, written=True)]
    pairs: Annotated[torch.Tensor, operands.Tensor("capacity", *INT32, written=True)]
    blocks: Annotated[torch.Tensor, operands.Tensor("*, 4", *INT32, written=True)]
    num_blocks: Annotated[torch.Tensor, operands.Tensor(str(len(BLOCK_MS)), *INT32, written=True)]
    token_lora_mapping: _Mapping
    valid_tokens: _ValidTokens
    max_loras: _Loras


FILL = operands.Op("moe_route_fill", Fill)


@final
class HeldRoute:
    """Tokens by adapter for every batch of up to ``capacity`` tokens, in tables that stay where they are.

    ``refill`` makes them, once a step and outside of CUDA graphs; ``first(T)`` is the route of the first T rows, and a graph that
    was captured with it reads what the last refill left. Made by ``lora_route`` with a ``capacity``.
    """

    def __init__(self, capacity: int, max_loras: int, device: torch.device, parts: torch.Tensor | None) -> None:
        self.capacity = capacity
        self.max_loras = max_loras
        self._parts = parts
        self._tables = torch.empty(sum(_splits(capacity, max_loras)), dtype=torch.int32, device=device)
        self._num_blocks, self._blocks, self._adapters, self._pairs = _views(self._tables, capacity, max_loras)
        self._begin, self._bytes = self._tables.data_ptr(), self._tables.nbytes
        self._device = self._tables.device
        self._routes: dict[int, MoeRoute] = {}

    def first(self, num_tokens: int) -> MoeRoute:
        """The route of the first ``num_tokens`` rows, for ``lora``, ``lora_shrink`` and ``lora_expand``; the same each time.

        There may be more of them than tokens in the batch, as in a graph for padded batches: rows behind the batch have no
        adapter. There may be fewer: rows behind ``num_tokens`` are neither read nor written. Its ``token_lora_mapping``
        [num_tokens] int32, -1 for no adapter, is what ``moe_route`` and ``FusedMoeLora`` take of the same step.

        Raises:
            ValueError: not a whole number from 0 to ``capacity``.
        """
        if torch.compiler.is_compiling():
            return self._open(num_tokens)
        route = self._routes.get(num_tokens) if num_tokens.__class__ is int else None  # True and 1.0 are as 1
        if route is None:
            operands.Int(0, self.capacity, name="num_tokens").admit("HeldRoute.first", num_tokens, {})
            self._routes[num_tokens] = route = self._open(num_tokens).settled()
        return route

    def refill(self, token_lora_mapping: torch.Tensor, valid_tokens: torch.Tensor | None = None) -> None:
        """Make the tables of another batch, in one launch, on the device only.

        Args:
            token_lora_mapping: contiguous [T] int32 or int64, T at most ``capacity``: the adapter of each token; -1, or any that
                is not in [0, max_loras): none. Rows behind have none.
            valid_tokens: [1] int32 on the device, how many of the T count; those behind, whatever they hold, have no adapter.
                None: all.

        Raises:
            ValueError: a shape, dtype or device that does not fit; nothing was launched.
        """
        if torch.compiler.is_compiling():
            _refill_in_graphs(self._tables, token_lora_mapping, valid_tokens, self.capacity, self.max_loras)
            return
        if not self._fits(token_lora_mapping, valid_tokens):
            _check_refill(_Refill(self._tables, token_lora_mapping, valid_tokens, self.capacity, self.max_loras))
        hint, tables = (self.capacity, self.max_loras, token_lora_mapping.dtype, valid_tokens is None), (self._tables,)
        fill: runtime.Call = _fills.get(hint, tables) or _fills.put(hint, tables, _bind(self.capacity, self.max_loras))
        written = (self._adapters, self._pairs, self._blocks, self._num_blocks)
        fill.run(Fill(*written, token_lora_mapping, valid_tokens, self.max_loras))

    def _open(self, num_tokens: int) -> OpenRows:
        tables = (self._pairs, self._blocks, self._num_blocks, self._parts)
        token_lora_mapping = self._adapters[:num_tokens]
        return OpenRows(token_lora_mapping, *tables, num_tokens, self.max_loras, self.capacity)

    def _fits(self, mapping: torch.Tensor, valid_tokens: torch.Tensor | None) -> bool:
        """Whether a refill is surely right; checks that say what is wrong take longer than all the rest."""
        try:
            return (
                mapping.dtype in operands.IDS
                and mapping.dim() == 1
                and mapping.shape[0] <= self.capacity
                and mapping.is_contiguous()
                and mapping.device == self._device
                and not -mapping.nbytes < mapping.data_ptr() - self._begin < self._bytes
                and (valid_tokens is None or self._counts(valid_tokens))
            )
        except AttributeError:
            return False

    def _counts(self, valid_tokens: torch.Tensor) -> bool:
        return (
            valid_tokens.dtype is torch.int32
            and valid_tokens.shape == (1,)
            and valid_tokens.device == self._device
            and not -4 < valid_tokens.data_ptr() - self._begin < self._bytes
        )


def held_route(
    token_lora_mapping: torch.Tensor,
    valid_tokens: torch.Tensor | None,
    max_loras: int,
    capacity: int,
    workspace: MoeWorkspace | None,
) -> HeldRoute:
    """The route that ``lora_route`` makes for a ``capacity``.

    Raises:
        ValueError: an argument that does not fit; nothing was launched.
    """
    if torch.compiler.is_compiling():
        hint = "make it outside of the graph, and take its first(T) inside"
        runtime.fail("lora_route", "capacity", capacity, "None, in a graph of torch.compile", hint)
    HELD.check("lora_route", _Held(token_lora_mapping, valid_tokens, max_loras, capacity, workspace))
    parts = None if workspace is None else workspace.parts
    route = HeldRoute(capacity, max_loras, token_lora_mapping.device, parts)
    route.refill(token_lora_mapping, valid_tokens)
    return route


def check_held(variant: str, given: Fill) -> int:
    """The capacity of the tables, once the arguments of the launcher are known to fit.

    Raises:
        ValueError: says which argument does not, what it is and what was wanted.
    """
    capacity: int = FILL.check(variant, given)["capacity"]
    _check_rows(variant, given.token_lora_mapping, capacity)
    wanted = first_blocks(capacity, given.max_loras)[-1] + most_blocks(capacity, given.max_loras, BLOCK_MS[-1])
    if given.blocks.shape[0] < wanted:
        runtime.fail(variant, "blocks", runtime.describe(given.blocks), f"at least {wanted} rows")
    return capacity


def _check_rows(op: str, token_lora_mapping: torch.Tensor, capacity: int) -> None:
    if token_lora_mapping.shape[0] > capacity:
        runtime.fail(op, "token_lora_mapping", runtime.describe(token_lora_mapping), f"at most {capacity} rows, the capacity")


def _check_refill(given: _Refill) -> None:
    REFILL.check("HeldRoute.refill", given)
    _check_rows("HeldRoute.refill", given.token_lora_mapping, given.capacity)


def _splits(capacity: int, max_loras: int) -> tuple[int, int, int, int]:
    """Elements of num_blocks, blocks, adapters and pairs in one buffer; each starts 16-byte aligned."""
    blocks = first_blocks(capacity, max_loras)[-1] + most_blocks(capacity, max_loras, BLOCK_MS[-1])
    rows = runtime.cdiv(capacity, 4) * 4
    return len(BLOCK_MS), 4 * blocks, rows, rows


def _views(tables: torch.Tensor, capacity: int, max_loras: int) -> tuple[torch.Tensor, ...]:
    num_blocks, blocks, adapters, pairs = tables.split_with_sizes(_splits(capacity, max_loras))
    return num_blocks, blocks.view(-1, 4), adapters[:capacity], pairs[:capacity]


_fills = runtime.Calls()


def _bind(capacity: int, max_loras: int) -> runtime.Call:
    call: runtime.Call = VARIANTS.get("moe_route", schedule="held").bind(capacity, max_loras)
    return call


def _refill(*arguments: Any) -> None:
    given = _Refill(*arguments)
    _check_refill(given)
    num_blocks, blocks, adapters, pairs = _views(given.tables, given.capacity, given.max_loras)
    source = (given.token_lora_mapping, given.valid_tokens, given.max_loras)
    _bind(given.capacity, given.max_loras).run(Fill(adapters, pairs, blocks, num_blocks, *source))


_refill_in_graphs = REFILL.in_graphs(_refill)
