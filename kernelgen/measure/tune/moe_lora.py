"""What the search knows of MoE-LoRA: its problems, which tiles make sense, and where to begin. Imports no torch."""

from __future__ import annotations

import dataclasses
from typing import Hashable, Iterator, Mapping

from kernelgen.measure.tune.family import Problem
from kernelgen.measure.tune.jobs import Sizes
from kernelgen.measure.tune.space import Candidate, Named, Space, products
from kernelgen.measure.workloads import GROUP, Cell

NAIVE = "small_batch"  # needs no sorted tables; the other schedules need them
_NAIVE_PAIRS = 1024  # above, streaming the weights pair by pair cannot win
_SORTED_PAIRS = (
    16  # below, blocks hold single pairs: such a schedule serves only those who bring tables
)
_MAX_RANK = {"one_shot": 128}


class MoeLora:
    """Both projections of an MoE layer; see ``Family``."""

    name = "moe_lora"
    order = ("weighted", "num_experts", "top_k", "k", "n", "slices", "max_loras", "rank", "num_tokens")
    kinds = ((NAIVE,), ("one_shot", "two_kernel"))
    alike = ("site", "rank", "tokens", "add", "quant", "act")

    def problem(self, cell: Cell) -> Problem:
        """What a tuned choice is looked up by."""
        (projection,) = cell.projections
        tags = {
            "add_inputs": "" if cell.add else "set",
            "weight_quant": "" if cell.quant == "none" else f"w8{cell.quant}",
            "act_quant": "" if cell.act == "none" else f"a8{cell.act}",
        }
        sizes = {
            "num_tokens": cell.tokens,
            "top_k": cell.model.top_k,
            "num_experts": cell.model.experts,
            "max_loras": cell.slots,
            "k": projection.k,
            "n": projection.n,
            "slices": projection.slices,
            "rank": cell.rank,
            "weighted": projection.weighted,
        }
        return {**sizes, **{axis: tag for axis, tag in tags.items() if tag}}

    def subject(self, cell: Cell, space: Space, sizes: Sizes) -> Subject:
        """The cell under search in ``space``."""
        return Subject(cell, space, sizes.block_m, sizes.shared_memory)

    def owner(self, cell: Cell) -> Hashable:
        """Cells of one owner share weights."""
        return cell.model, cell.rank, cell.slots


@dataclasses.dataclass(frozen=True)
class Subject:
    """A cell under search, with what the package and the device make of it."""

    cell: Cell
    space: Space
    block_m: int  # rows of a block of its route
    shared_memory: int  # bytes that one program may take

    @property
    def pairs(self) -> int:
        return self.cell.tokens * self.cell.model.top_k

    def schedules(self) -> list[str]:
        """Those that can serve the cell and are worth a measurement."""
        return [
            schedule
            for schedule in self.space.schedules
            if self.cell.rank <= _MAX_RANK.get(schedule, self.cell.rank)
            and (schedule != NAIVE or self.pairs <= _NAIVE_PAIRS)
        ]

    def accepts(self, candidate: Candidate) -> bool:
        """Whether the tiles can be right, can win and are not the same as others: known without compiling."""
        if candidate.schedule not in self.schedules() or not self.space.declares(candidate):
            return False
        c = self.space.named(candidate)
        (p,) = self.cell.projections
        if "split_k" in c and not self._splits_well(candidate.schedule, c):
            return False
        if c["block_k"] > max(2 * p.k, 32) or c["block_n"] > max(2 * p.n, 64):
            return False
        groups = "group" in (self.cell.quant, self.cell.act)
        if groups and candidate.schedule != NAIVE and c["block_k"] != GROUP:
            return False  # a tile has one scale, and is the same in every batch
        rank = self._block_r
        if candidate.schedule == NAIVE:
            return c["split_k"] % c["block_k"] == 0 and c["shrink_block_r"] <= rank
        if c.get("expand_tiles", 1) > -(-p.n // c["block_n"]):
            return False
        of_x, of_weights = (2 if scales == "none" else 1 for scales in (self.cell.act, self.cell.quant))
        column = of_x * self.block_m + of_weights * p.slices * rank
        shrink = column * c["block_k"] * (c["shrink_stages"] - 1)
        expand = of_weights * c["block_n"] * rank * (c["expand_stages"] - 1)
        return max(shrink, expand) <= self.shared_memory

    def _splits_well(self, schedule: str, c: Named) -> bool:
        """Parts are whole tiles, there is scratch for them, and of all ways not to split only the least is taken."""
        (p,) = self.cell.projections
        splits = -(-p.k // c["split_k"])
        if splits == 1:
            return c["split_k"] == self._whole(schedule)
        return c["split_k"] % c["block_k"] == 0 and splits * self.pairs <= self._workspace_parts

    def starts(self, rules: Mapping[str, Named]) -> list[Candidate]:
        """The package's own choice for each schedule, and what is worth a look around it; best guesses first."""
        found = []
        for schedule in self.schedules():
            own = self.space.near(schedule, rules[schedule])
            base = self.space.named(own)
            if base == rules[schedule] or self.accepts(own):
                found.append(own)
            if "split_k" in base:
                base["split_k"] = min(base["split_k"], self._whole(schedule))
            if schedule == NAIVE or self.pairs >= _SORTED_PAIRS:
                around = getattr(self, f"_around_{schedule}")(base)
                found += [candidate for candidate in around if self.accepts(candidate)]
        return list(dict.fromkeys(found))

    def _whole(self, schedule: str) -> int:
        """The least split of K that leaves it in one part."""
        (p,) = self.cell.projections
        declared = self.space.tunables[schedule]["split_k"]
        return next((split for split in declared if split >= p.k), declared[-1])

    @property
    def _block_r(self) -> int:
        return min(128, max(16, 1 << (self.cell.rank - 1).bit_length()))

    @property
    def _workspace_parts(self) -> int:
        """Parts of pairs that ``moe_workspace`` has scratch for; more would make the op allocate."""
        return max(min(self.pairs, 256) * 32, min(self.pairs, 4096) * 8, self.pairs)

    def _around_small_batch(self, base: Named) -> Iterator[Candidate]:
        (p,) = self.cell.projections
        if p.k <= 1024:
            splits: tuple[int, ...] = (256, 512)
        else:
            splits = (512, 1024, 2048) if self.pairs > 64 else (256, 512, 1024)
        shrinks = products(
            [{"shrink_block_r": rows} for rows in (8, 16, 32)], [{"split_k": s} for s in splits]
        )
        tiles = {
            16: ((256, 4), (128, 4), (64, 2), (512, 4)),
            32: ((128, 4), (128, 2), (64, 2), (256, 4)),
            64: ((128, 2), (64, 2), (128, 4)),
            128: ((64, 2), (32, 2), (128, 4)),
        }[self._block_r]
        expands = [{"block_n": columns, "expand_warps": warps} for columns, warps in tiles]
        yield from self.space.grid(NAIVE, base, [*shrinks, *expands])

    def _around_one_shot(self, base: Named) -> Iterator[Candidate]:
        (p,) = self.cell.projections
        pipelines = {
            16: ((128, 3), (128, 4), (64, 4), (64, 3)),
            32: ((128, 3), (64, 4), (64, 3)),
        }.get(self.block_m, ((64, 4), (64, 6), (128, 3)))
        changes = [{"block_k": k, "shrink_stages": stages} for k, stages in pipelines if p.k % k == 0]  # fmt: skip
        if self._block_r == 16 and p.k % 256 == 0:
            wide = 256 if p.n % 256 == 0 else 64
            changes.append({"block_k": 256, "shrink_stages": 3, "block_n": wide})
        yield from self.space.grid("one_shot", base, changes)

    def _around_two_kernel(self, base: Named) -> Iterator[Candidate]:
        (p,) = self.cell.projections
        declared = self.space.tunables["two_kernel"]["split_k"]
        parts = [s for s in declared if s < p.k and p.k % s == 0][::-1]
        splits = [self._whole("two_kernel"), *parts[: 2 if self.cell.tokens >= 256 else 4]]
        tiles = -(-p.n // base["block_n"])
        spans = [t for t in (2, 3, 4, 5, 8) if tiles % t == 0][:3] or [1]
        changes = []
        for split in splits:
            small = split % 128 or self._block_r == 128 or self.block_m >= 64
            changes += products(
                [{"split_k": split, "block_k": 64 if small else 128}],
                [{"expand_tiles": t, "expand_stages": 3 if t > 2 and self.block_m == 16 else 2} for t in spans],
            )  # fmt: skip
        yield from self.space.grid("two_kernel", base, changes)
