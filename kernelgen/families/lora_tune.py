"""The two products of dense LoRA, in search of tiles: which tiles make sense, and where to begin.

They are timed as ``lora``, with the other product's tiles as the package chooses them: how K is shared out decides what the
second one reads. Rows of a program are few for FP8, which is widened for mma.sync; and a block has no more.
"""

from __future__ import annotations

import dataclasses
import importlib
from typing import Any, ClassVar, Iterator, Mapping

from kernelgen.measure.tune.hints import Hints
from kernelgen.measure.tune.problem import Problem
from kernelgen.measure.tune.space import Candidate, Named, products


@dataclasses.dataclass(frozen=True)
class Product(Hints):
    """One of them."""

    MOST_ROWS: ClassVar[tuple[int, int]]  # of a program: of 16 bits, and of FP8 weights

    @staticmethod
    def facts(package: Any, problem: Problem) -> dict[str, int]:
        """The rows of a block of the route."""
        routes = importlib.import_module(f"{package.__name__}.moe_route._op")
        return {"block_m": routes.default_block_m(int(problem["num_tokens"]), 1, int(problem["max_loras"]), dense=True)}

    def accepts(self, candidate: Candidate) -> bool:
        """Whether the tiles can be right, can win and are not the same as others: known without compiling."""
        if not super().accepts(candidate):
            return False
        c = self.space.named(candidate)
        return c["rows"] <= min(self.sizes.facts["block_m"], self.MOST_ROWS[self._scales is not None]) and self._fits(c)

    def starts(self, rules: Mapping[str, Named]) -> list[Candidate]:
        """The package's own choice, and what is worth a look around it; best guesses first."""
        ((name, rule),) = rules.items()
        own = self.space.near(name, rule)
        base = self.space.named(own)
        around = self.space.grid(name, base, list(self._around(base)))
        found = [own] if base == rule else []
        return list(dict.fromkeys([*found, *filter(self.accepts, [own, *around])]))

    @property
    def _rule(self) -> Named:
        return next(iter(self.sizes.rules.values()))

    @property
    def _scales(self) -> str | None:
        tag = self.problem.get("weight_quant")
        return None if tag is None else str(tag)

    @property
    def _ranks(self) -> int:
        """Of a tile, or of all tiles together where the rank has several."""
        rank = self.size("rank")
        return max(16, 1 << (rank - 1).bit_length()) if rank <= 128 else -(-rank // 128) * 128

    def _fits(self, c: Named) -> bool:
        """Whether the tiles make sense for this product."""
        raise NotImplementedError

    def _around(self, base: Named) -> Iterator[dict[str, int]]:
        """What is worth a look around the rule's tiles."""
        raise NotImplementedError


class Shrink(Product):
    """The first product."""

    MOST_ROWS = (64, 32)

    def _fits(self, c: Named) -> bool:
        rule = self._rule
        if c["chunk_k"] != rule["chunk_k"] or c["chunk_k"] % c["block_k"]:
            return False  # the chunk is part of the numbers
        if self._scales == "w8group" and c["block_k"] != rule["block_k"]:
            return False  # so is the order of groups
        chunks = -(-self.size("k") // c["chunk_k"])
        if self._scales in ("w8tensor", "w8channel") or chunks == 1:
            if c["parts"] != rule["parts"]:
                return False  # so is where a sum is scaled; and a single chunk is a part, a quarter and all
        elif c["parts"] == 2 and chunks <= 4:
            return False  # a quarter is a chunk
        if c["ranks"] > min(128, self._ranks) or (self.size("slices") == 1 and not c["together"]):
            return False
        columns = c["ranks"] * (self.size("slices") if c["together"] else 1)
        stage = c["block_k"] * (2 * c["rows"] + (2 if self._scales is None else 1) * columns)
        return c["block_k"] <= max(2 * self.size("k"), 32) and (c["stages"] - 1) * stage <= self.sizes.shared_memory

    def _around(self, base: Named) -> Iterator[dict[str, int]]:
        def near(name: str) -> list[dict[str, int]]:
            return [{name: value} for value in (base[name], base[name] // 2, 2 * base[name])]

        parts = [{"parts": parts} for parts in dict.fromkeys((base["parts"], 1, 2, 0))]
        together = [{"together": base["together"]}, {"together": 1 - base["together"]}]
        yield from products(parts, together, near("rows"), near("ranks"))


class Expand(Product):
    """The second product."""

    MOST_ROWS = (128, 32)

    def _fits(self, c: Named) -> bool:
        narrow = self.size("n_min")
        if c["block_n"] > max(narrow, 32) or c["tiles"] > -(-narrow // c["block_n"]):
            return False
        if c["tiles"] == 1 and c["stages"] != 2:
            return False  # there is no loop
        of_b = 2 if self._scales is None else 1
        held = 2 * c["rows"] * self._ranks
        return (c["stages"] - 1) * c["block_n"] * (of_b * self._ranks + 2 * c["rows"]) + held <= self.sizes.shared_memory

    def _around(self, base: Named) -> Iterator[dict[str, int]]:
        tiles = [{"tiles": 1, "stages": 2}, {"tiles": 2, "stages": 3}, {"tiles": 4, "stages": 3}, {"tiles": 8, "stages": 3}]
        yield from products(
            [{"rows": base["rows"]}, {"rows": 2 * base["rows"]}],
            [{"block_n": columns, "num_warps": 4 if columns * self._ranks < 256 * 128 else 8} for columns in (64, 128, 256)],
            tiles,
        )
