"""Memory that host code makes is as large as its launches need, and they read nothing of it that none of them wrote.

Each good call runs with sizes that are no multiples of tiles: once in workspaces that are just as large as their functions say,
full of NaN, and once in memory of the call's own, full of zeros. Both do the same, bit by bit; what lies behind the end of
memory the interpreter tells.
"""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from doors import CHOSEN, GOOD, Door, by_hand, forget

from generated._operands import Tensor

SIZES = {"k": 33, "n": 40, "rank": 17}  # the last token of a batch, and all of its pairs, have an adapter
HIGH = r"((moe_)?lora(_shrink)?|moe_shrink)( plain| sorted)?$"  # whose ranks may be of several tiles
ALONE = "of many|to fp8|lanes that sum|boxes"  # they take Gluon, or minutes, or no memory
OWN = ("workspace", "scratch")  # memory without a meaning behind a call


def outcome(name: str, device: str, sizes: dict[str, int], lent: bool, monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """What a call wrote, with memory that is lent by a workspace or made at the call."""
    made = torch.empty

    def full(*size: Any, **options: Any) -> torch.Tensor:
        memory = made(*size, **options)
        if not memory.is_meta:
            memory.untyped_storage().fill_(255 if lent else 0)
        return memory

    forget()
    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty", full)
        door = Door.of(name, device, **sizes)
        for of, value in door.good.items() if not lent else ():
            if of == "workspace":
                door.good[of] = None
            elif getattr(value, "parts", None) is not None:
                door.good[of] = by_hand(value, parts=None)
        door()
    forget()
    written = (o.name for o in door.operands if isinstance(o, Tensor) and o.written and o.name not in OWN)
    return [door.good[of] for of in written]


@pytest.mark.parametrize("name", [*GOOD, *(name for name in CHOSEN if not re.search(ALONE, name))])
def test_memory_is_as_large_as_launches_need(name: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = SIZES if "lanes" not in name else {"rank": 17}
    found = [outcome(name, device, sizes, lent, monkeypatch) for lent in (True, False)]
    assert all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in zip(*found, strict=True))
    if re.match(HIGH, name):
        outcome(name, device, {**SIZES, "rank": 130, "top_k": 1}, False, monkeypatch)
