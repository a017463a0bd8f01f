"""The systems to compare with, each called as it calls itself; one module each, named like the peer.

A peer is what is importable under its own name: an installation, or its kernels laid out in a folder on PYTHONPATH.
"""

from __future__ import annotations

import importlib

from kernelgen.measure.implementation import Implementation

NAMES = ("vllm", "sglang", "torch")


def load(name: str) -> Implementation:
    """The peer ``name``.

    Raises:
        Failure: it is not importable here.
    """
    module = importlib.import_module(f"kernelgen.measure.peers.{name}_peer")
    peer: Implementation = module.Peer()
    return peer
