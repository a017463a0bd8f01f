"""What the search knows of the two products of dense LoRA. Imports no torch.

Candidates of one product are timed as ``lora``, with the other's tiles as the package chooses them: how K is shared out decides
what the second product reads. Half of the calls have tokens of all adapters, half of one: a choice serves both, as the host
does not know.
"""

from __future__ import annotations

import dataclasses
from typing import Hashable, Iterator, Mapping

from kernelgen.measure.layers import Cell
from kernelgen.measure.tune.family import Problem, Subject
from kernelgen.measure.tune.jobs import Sizes
from kernelgen.measure.tune.space import Candidate, Named, Space, products

SHRINK, EXPAND = "lora_shrink", "lora_expand"
# Rows of a program: FP8 is widened for mma.sync, which is at its best with few; and a block has no more.
_MOST_ROWS = {(SHRINK, False): 64, (SHRINK, True): 32, (EXPAND, False): 128, (EXPAND, True): 32}


class LoraProduct:
    """One of the two products; see ``Family``."""

    alike = ("site", "rank", "tokens", "scales")

    def __init__(self, name: str) -> None:
        self.name = name
        self.kinds = ((name,),)
        layer = ("k", "slices") if name == SHRINK else ("k", "n", "n_min", "slices")
        self.order = (*layer, "max_loras", "rank", "num_tokens")

    def problem(self, cell: Cell) -> Problem:
        """What a tuned choice is looked up by."""
        widths = cell.layer.widths
        sizes = {
            "num_tokens": cell.tokens,
            "max_loras": cell.slots,
            "k": cell.layer.k,
            "n": sum(widths),
            "n_min": min(widths),
            "slices": len(widths),
            "rank": cell.rank,
        }
        tags = {} if cell.scales is None else {"weight_quant": f"w8{cell.scales}"}
        return {**{name: size for name, size in sizes.items() if name in self.order}, **tags}

    def subject(self, cell: Cell, space: Space, sizes: Sizes) -> Subject:
        """The cell under search in ``space``."""
        return (_Shrink if self.name == SHRINK else _Expand)(cell, space, sizes, self.name)

    def owner(self, cell: Cell) -> Hashable:
        """Cells of one owner share operands: none but the cell itself does."""
        return cell


@dataclasses.dataclass(frozen=True)
class _Product:
    """A cell under search, with what the package and the device make of it."""

    cell: Cell
    space: Space
    sizes: Sizes
    name: str

    def accepts(self, candidate: Candidate) -> bool:
        """Whether the tiles can be right, can win and are not the same as others: known without compiling."""
        if not self.space.declares(candidate):
            return False
        c, scaled = self.space.named(candidate), self.cell.scales is not None
        if c["rows"] > min(self.sizes.block_m, _MOST_ROWS[self.name, scaled]):
            return False
        return self._fits(c)

    def starts(self, rules: Mapping[str, Named]) -> list[Candidate]:
        """The package's own choice, and what is worth a look around it; best guesses first."""
        own = self.space.near(self.name, rules[self.name])
        base = self.space.named(own)
        around = self.space.grid(self.name, base, list(self._around(base)))
        found = [own] if base == rules[self.name] else []
        return list(dict.fromkeys([*found, *filter(self.accepts, [own, *around])]))

    @property
    def _ranks(self) -> int:
        """Of a tile, or of all tiles together where the rank has several."""
        rank = self.cell.rank
        return max(16, 1 << (rank - 1).bit_length()) if rank <= 128 else -(-rank // 128) * 128

    def _fits(self, c: Named) -> bool:
        """Whether the tiles make sense for this product."""
        raise NotImplementedError

    def _around(self, base: Named) -> Iterator[dict[str, int]]:
        """What is worth a look around the rule's tiles."""
        raise NotImplementedError


class _Shrink(_Product):
    def _fits(self, c: Named) -> bool:
        rule, layer = self.sizes.rules[SHRINK], self.cell.layer
        if c["chunk_k"] != rule["chunk_k"] or c["chunk_k"] % c["block_k"]:
            return False  # the chunk is part of the numbers
        if self.cell.scales == "group" and c["block_k"] != rule["block_k"]:
            return False  # so is the order of groups
        chunks = -(-layer.k // c["chunk_k"])
        if self.cell.scales in ("tensor", "channel") or chunks == 1:
            if c["parts"] != rule["parts"]:
                return False  # so is where a sum is scaled; and a single chunk is a part, a quarter and all
        elif c["parts"] == 2 and chunks <= 4:
            return False  # a quarter is a chunk
        if c["ranks"] > min(128, self._ranks) or (len(layer.widths) == 1 and not c["together"]):
            return False
        columns = c["ranks"] * (len(layer.widths) if c["together"] else 1)
        stage = c["block_k"] * (2 * c["rows"] + (2 if self.cell.scales is None else 1) * columns)
        return c["block_k"] <= max(2 * layer.k, 32) and (c["stages"] - 1) * stage <= self.sizes.shared_memory

    def _around(self, base: Named) -> Iterator[dict[str, int]]:
        def near(name: str) -> list[dict[str, int]]:
            return [{name: value} for value in (base[name], base[name] // 2, 2 * base[name])]

        parts = [{"parts": parts} for parts in dict.fromkeys((base["parts"], 1, 2, 0))]
        together = [{"together": base["together"]}, {"together": 1 - base["together"]}]
        yield from products(parts, together, near("rows"), near("ranks"))


class _Expand(_Product):
    def _fits(self, c: Named) -> bool:
        narrow = min(self.cell.layer.widths)
        if c["block_n"] > max(narrow, 32) or c["tiles"] > -(-narrow // c["block_n"]):
            return False
        if c["tiles"] == 1 and c["stages"] != 2:
            return False  # there is no loop
        of_b = 2 if self.cell.scales is None else 1
        held = 2 * c["rows"] * self._ranks
        return (c["stages"] - 1) * c["block_n"] * (of_b * self._ranks + 2 * c["rows"]) + held <= self.sizes.shared_memory

    def _around(self, base: Named) -> Iterator[dict[str, int]]:
        tiles = [{"tiles": 1, "stages": 2}, {"tiles": 2, "stages": 3}, {"tiles": 4, "stages": 3}, {"tiles": 8, "stages": 3}]
        yield from products(
            [{"rows": base["rows"]}, {"rows": 2 * base["rows"]}],
            [{"block_n": columns, "num_warps": 4 if columns * self._ranks < 256 * 128 else 8} for columns in (64, 128, 256)],
            tiles,
        )
