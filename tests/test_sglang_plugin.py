"""The plugin of SGLang, without SGLang: which releases it serves, and that it hooks nothing else.

``integrations/sglang/tests`` serve models with the real one.
"""

from __future__ import annotations

import logging
import sys
import types
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "integrations" / "sglang"))
from kernelgen_sglang import plugin, versions


@pytest.mark.parametrize(
    ("version", "module"),
    [
        ("0.5.23", "seams_0_5_23"),
        ("0.5.23+cu130", "seams_0_5_23"),
        ("0.5.22", None),
        ("0.5.24", None),
        ("0.5.23.post1", None),
        ("0.5.23rc1", None),
        ("0.5.23.dev7+gabc", None),
        ("dev", None),
    ],
)
def test_releases(version: str, module: str | None) -> None:
    if module is None:
        with pytest.raises(versions.Refused, match=r"served are 0\.5\.23"):
            versions.seams_for(version)
    else:
        assert versions.seams_for(version) == module
        assert (Path(plugin.__file__).parent / f"{module}.py").exists()


@pytest.mark.parametrize(
    ("version", "switch", "said"), [("0.5.24", None, "SGLang 0.5.24 is not known"), ("0.5.23", "0", "KERNELGEN_SGLANG=0")]
)
def test_says_why_it_hooks_nothing(version: str, switch: str | None, said: str, monkeypatch: Any, caplog: Any) -> None:
    sglang, registry = types.ModuleType("sglang"), types.ModuleType("sglang.srt.plugins.hook_registry")
    sglang.__version__ = version  # type: ignore[attr-defined]
    registry.HookRegistry = registry.HookType = None  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "sglang", sglang)
    for name in ("sglang.srt", "sglang.srt.plugins"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, registry.__name__, registry)
    monkeypatch.delenv("KERNELGEN_SGLANG", raising=False)
    if switch is not None:
        monkeypatch.setenv("KERNELGEN_SGLANG", switch)
    with caplog.at_level(logging.INFO, plugin.log.name):
        plugin.register()
    assert said in caplog.text
