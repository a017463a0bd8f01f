"""Tests of this folder compile kernels, for GPUs that need not be there; ``test_compiled.py`` runs them."""

from __future__ import annotations

import os

collect_ignore_glob = ["test_*.py"] if os.environ.get("TRITON_INTERPRET") == "1" else []
