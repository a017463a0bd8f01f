"""Grouped products of a base MoE layer: which tiles make sense."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from kernelgen.families.moe_experts import BY_PAIR
from kernelgen.measure.suite import GROUP
from kernelgen.measure.tune.hints import Hints, Tuning
from kernelgen.measure.tune.space import Candidate

_BITS = {"none": 16, "mxfp4": 4}  # of a number, else 8


@dataclasses.dataclass(frozen=True)
class MoeGemm(Hints):
    """One product. Operands that descriptors cannot read leave box out, so the best tile is kept beside it."""

    KINDS: ClassVar[tuple[tuple[str, ...], ...]] = (
        ("gemv",),
        ("naive",),
        ("diagonal",),
        ("tile",),
        ("box",),
        ("warp_specialised",),
        ("lanes",),
        ("lane_gemv",),
    )

    def accepts(self, candidate: Candidate) -> bool:
        """Whether the tiles can be right, can win and are not the same as others: known without compiling."""
        if not super().accepts(candidate):
            return False
        if candidate.schedule == "warp_specialised":
            return self.size("block_m") == 128
        c, p = self.space.named(candidate), self.problem
        if candidate.schedule == "lanes":
            return self.size("block_m") <= 32 and c["block_n"] >= 16 * c["num_warps"]
        if candidate.schedule == "lane_gemv":
            return True
        k, n, slices, rows = map(self.size, ("k", "n", "slices", "block_m"))
        if c["block_k"] > max(2 * k, 64) or c["block_n"] > max(2 * n, 16):
            return False
        if candidate.schedule == "diagonal":  # a warp group has 64 rows of a tile, each with scales of its own
            high = c["block_n"] * c["block_k"] >= 64 * GROUP * c["num_warps"] // 4
            return high and c["num_stages"] * slices * c["block_n"] * c["block_k"] <= self.sizes.shared_memory - 2**14
        if p.get("weight_quant") == "w8group" and GROUP % c["block_k"]:
            return False  # a tile has one scale
        if candidate.schedule in BY_PAIR:
            return True
        if c["tail"] and rows < 128:
            return False  # only such blocks have a half
        taken = self.sizes.rules[candidate.schedule]
        if not self.size("rank") and any(c[name] != taken[name] for name in ("block_d", "delta_stages")):
            return False  # no kernel without adapters has them
        bits_x, bits_w = (_BITS.get(str(p.get(axis, "none")), 8) for axis in ("act_quant", "weight_quant"))
        stage = c["block_k"] * (bits_x * rows + bits_w * slices * c["block_n"]) // 8
        return c["num_stages"] * stage <= self.sizes.shared_memory


TUNING = Tuning("fused_moe", {"sites": ("w13", "w2"), "quant": ("none",), "act": ("none",)}, hints=MoeGemm)
