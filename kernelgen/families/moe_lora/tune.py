"""MoE-LoRA: which tiles make sense, and where to begin."""

from __future__ import annotations

import dataclasses
import importlib
from typing import Any, ClassVar, Iterator, Mapping

from kernelgen.measure.suite import GROUP
from kernelgen.measure.tune.hints import Hints, Tuning
from kernelgen.measure.tune.problem import Problem
from kernelgen.measure.tune.space import Candidate, Named, products

NAIVE = "small_batch"  # needs no sorted tables; the other schedules need them
_NAIVE_PAIRS = 1024  # above, streaming the weights pair by pair cannot win
_SORTED_PAIRS = 16  # below, blocks hold single pairs: such a schedule serves only those who bring tables
_MAX_RANK = {"one_shot": 128}


@dataclasses.dataclass(frozen=True)
class MoeLora(Hints):
    """One projection of an MoE layer."""

    KINDS: ClassVar[tuple[tuple[str, ...], ...]] = ((NAIVE,), ("one_shot", "two_kernel"))

    @staticmethod
    def facts(package: Any, problem: Problem) -> dict[str, int]:
        """The rows of a block of its sorted route."""
        routes = importlib.import_module(f"{package.__name__}.moe_route._op")
        tokens, top_k = int(problem["num_tokens"]), int(problem["top_k"])
        return {"block_m": routes.default_block_m(tokens, top_k, int(problem["num_experts"]) * int(problem["max_loras"]))}

    @property
    def pairs(self) -> int:
        """Of a token and one of its experts."""
        return int(self.problem["num_tokens"]) * int(self.problem["top_k"])

    def _has(self, tag: str) -> bool:
        return tag in self.problem.values()

    def schedules(self) -> list[str]:
        """Those that can serve the cell and are worth a measurement."""
        return [
            schedule
            for schedule in self.sizes.rules
            if self.size("rank") <= _MAX_RANK.get(schedule, self.size("rank"))
            and (schedule != NAIVE or self.pairs <= _NAIVE_PAIRS)
        ]

    def accepts(self, candidate: Candidate) -> bool:
        """Whether the tiles can be right, can win and are not the same as others: known without compiling."""
        if candidate.schedule not in self.schedules() or not self.space.declares(candidate):
            return False
        c = self.space.named(candidate)
        if "split_k" in c and not self._splits_well(candidate.schedule, c):
            return False
        if c["block_k"] > max(2 * self.size("k"), 32) or c["block_n"] > max(2 * self.size("n"), 64):
            return False
        groups = self._has("w8group") or self._has("a8group")
        if groups and candidate.schedule != NAIVE and c["block_k"] != GROUP:
            return False  # a tile has one scale, and is the same in every batch
        rank = self._block_r
        if candidate.schedule == NAIVE:
            return c["split_k"] % c["block_k"] == 0 and c["shrink_block_r"] <= rank
        if c.get("expand_tiles", 1) > -(-self.size("n") // c["block_n"]):
            return False
        of_x, of_weights = (1 if axis in self.problem else 2 for axis in ("act_quant", "weight_quant"))
        column = of_x * self.sizes.facts["block_m"] + of_weights * self.size("slices") * rank
        shrink = column * c["block_k"] * (c["shrink_stages"] - 1)
        expand = of_weights * c["block_n"] * rank * (c["expand_stages"] - 1)
        return max(shrink, expand) <= self.sizes.shared_memory

    def _splits_well(self, schedule: str, c: Named) -> bool:
        """Parts are whole tiles, there is scratch for them, and of all ways not to split only the least is taken."""
        splits = -(-self.size("k") // c["split_k"])
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
        declared = self.space.tunables[schedule]["split_k"]
        return next((split for split in declared if split >= self.size("k")), declared[-1])

    @property
    def _block_r(self) -> int:
        return min(128, max(16, 1 << (self.size("rank") - 1).bit_length()))

    @property
    def _workspace_parts(self) -> int:
        """Parts of pairs that ``moe_workspace`` has scratch for; more would make the op allocate."""
        return max(min(self.pairs, 256) * 32, min(self.pairs, 4096) * 8, self.pairs)

    def _around_small_batch(self, base: Named) -> Iterator[Candidate]:
        if self.size("k") <= 1024:
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
        pipelines = {
            16: ((128, 3), (128, 4), (64, 4), (64, 3)),
            32: ((128, 3), (64, 4), (64, 3)),
        }.get(self.sizes.facts["block_m"], ((64, 4), (64, 6), (128, 3)))
        changes = [{"block_k": k, "shrink_stages": stages} for k, stages in pipelines if self.size("k") % k == 0]  # fmt: skip
        if self._block_r == 16 and self.size("k") % 256 == 0:
            wide = 256 if self.size("n") % 256 == 0 else 64
            changes.append({"block_k": 256, "shrink_stages": 3, "block_n": wide})
        yield from self.space.grid("one_shot", base, changes)

    def _around_two_kernel(self, base: Named) -> Iterator[Candidate]:
        declared = self.space.tunables["two_kernel"]["split_k"]
        parts = [s for s in declared if s < self.size("k") and self.size("k") % s == 0][::-1]
        splits = [self._whole("two_kernel"), *parts[: 2 if self.size("num_tokens") >= 256 else 4]]
        tiles = -(-self.size("n") // base["block_n"])
        spans = [t for t in (2, 3, 4, 5, 8) if tiles % t == 0][:3] or [1]
        changes = []
        for split in splits:
            small = split % 128 or self._block_r == 128 or self.sizes.facts["block_m"] >= 64
            changes += products(
                [{"split_k": split, "block_k": 64 if small else 128}],
                [{"expand_tiles": t, "expand_stages": 3 if t > 2 and self.sizes.facts["block_m"] == 16 else 2} for t in spans],
            )  # fmt: skip
        yield from self.space.grid("two_kernel", base, changes)


TUNING = Tuning("moe_lora", {"sites": ("w13", "w2"), "add": True, "ranks": (16, 32, 64, 128)}, hints=MoeLora)
