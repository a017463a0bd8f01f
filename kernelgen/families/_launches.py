"""Which variants serve a call, with which tiles: asked where it runs.

    with generated.launches() as taken:
        generated.moe_lora(out, x, lora_a, lora_b, route)
    print(*taken, sep="\\n")

The logger of the package tells the same at DEBUG, once for each kind of call.
"""

from __future__ import annotations

from ._runtime import launches

__all__ = ["launches"]
