"""The first product of MoE-LoRA as an op of its own: which tiles leave its numbers as they are."""

from __future__ import annotations

from kernelgen.measure.tune.hints import Hints, Tuning
from kernelgen.measure.tune.space import Candidate


class MoeLoraShrink(Hints):
    """The order of a sum is by the layer and the batch alone, so that a GPU that holds a part of the ranks makes the same bits of
    them as one that holds all.
    """

    def accepts(self, candidate: Candidate) -> bool:
        """Whether the tiles add up as the rule's do: of pairs that are streamed, warps share out a sum too."""
        if not super().accepts(candidate):
            return False
        rule, c = self.sizes.rules[candidate.schedule], self.space.named(candidate)
        fixed = ("block_k", "split_k") if candidate.schedule == "blocks" else ("block_r", "block_k", "split_k", "num_warps")
        return all(c[name] == rule[name] for name in fixed)


TUNING = Tuning("moe_lora", {"sites": ("w13", "w2"), "add": True, "ranks": (16, 64)}, form="apart", hints=MoeLoraShrink)
