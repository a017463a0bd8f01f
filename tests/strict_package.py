"""A package of fewer, strict variants of moe_lora, in a folder of its own."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from kernelgen.emit import build

ROOT = Path(__file__).resolve().parent.parent
NARROW = {
    "weight_quant": "none, w8channel, w8group",
    "act_quant": "none, a8token, a8group",
    "dtype": "bf16",
    "add_inputs": "add",
    "routed_weight": "plain, weighted",
    "rank": "r16, r64, rany",
}
# Of what the narrowed tags can be combined to.
EXCLUDES = """\
exclude:
  - when: {routed_weight: plain, rank: [r64, rany]}
    why: left out
  - when: {routed_weight: weighted, rank: r16}
    why: left out
  - when: {act_quant: [a8token, a8group], rank: [r16, rany]}
    why: left out
  - when: {act_quant: [a8token, a8group], schedule: two_kernel}
    why: left out
  - when: {act_quant: [a8token, a8group], weight_quant: none}
    why: left out
  - when: {weight_quant: w8channel, act_quant: a8group}
    why: left out
  - when: {weight_quant: w8group, act_quant: a8token}
    why: left out
"""


def build_strict(out: Path) -> Path:
    """``out``, with the specs and the generated package in it."""
    shutil.copytree(ROOT / "specs", out / "specs")
    spec = out / "specs/moe_lora.yaml"
    text = spec.read_text("utf-8").replace("  strict: false\n", "  strict: true\n")
    text = re.sub(
        r"^  - when: .*_quant: .*\n.*\n", "", text, flags=re.MULTILINE
    )  # it narrows tags away
    text = text.replace("exclude:\n", EXCLUDES)
    for axis, tags in NARROW.items():
        text = re.sub(rf"^  {axis}: .*$", f"  {axis}: [{tags}]", text, flags=re.MULTILINE)
    spec.write_text(text, "utf-8")
    build.build(out / "specs", out)
    return out
