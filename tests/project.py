"""A small family with its templates, in a folder of its own: what the tests of the pipeline work on."""

from __future__ import annotations

from pathlib import Path
from typing import Mapping

SPEC = """\
family: toy
axes:
  dtype: [bf16, f16]
  rank: [r16, r32]
  size: [small, large]
exclude:
  - when: {dtype: f16, size: large}
    why: nobody asked
targets: [sm_90]
tunables:
  toy:
    block_n: [64, 128]
"""
TUNED = """\
family: toy
device: {name: NVIDIA H200, target: sm_90, multiprocessors: 132, shared_memory: 232448}
versions: {torch: 2.11.0, triton: 3.6.0}
entries:
  - problem: {k: 64, weighted: true}
    schedule: toy
    config: {block_n: 64}
    us: 1.5
    runner_up: {schedule: toy, config: {block_n: 128}, us: 2}
  - problem: {k: 128, weighted: true}
    schedule: toy
    config: {block_n: 128}
    us: 2
"""
KERNEL = '''\
"""Kernel {{ v.name }}: {{ v.torch_dtype }}, {{ v.size }}."""

import triton.language as tl

#% if v.tiled_rank
TILES = None
#% else
RANK = {{ v.max_rank }}
#% endif


def {{ v.name }}(block_n):
    return tl.{{ v.torch_dtype }}, {{ v.block_rank }}, "{{ v.size }}"
'''
FRONT = '''\
"""The front door of toy."""

from ._table import VARIANTS


def toy(dtype, rank, size):
    """The variant of these."""
    return VARIANTS.find(torch_dtype=dtype, rank=rank, size=size)
'''
PROBLEM = '''\
"""What the variants of toy share."""

from typing import NamedTuple


class Config(NamedTuple):
    """Tiles of toy."""

    block_n: int


class Key(NamedTuple):
    """What measured tiles are looked up by."""

    k: int
    weighted: bool
'''
PACKAGE = '''\
"""All families."""

#% for family in package.families
from . import {{ family.name }}
#% endfor
'''
TEST = '''\
"""Tests of {{ family.name }}."""

CASES = {{ family.variants | length }}
'''
TEMPLATES = {
    "kernels/toy.py.j2": KERNEL,
    "package/__init__.py.j2": PACKAGE,
    "tests/test_family.py.j2": TEST,
}
ROOMS = {"toy/_op.py": FRONT, "toy/_problem.py": PROBLEM}


def make(
    root: Path,
    specs: Mapping[str, str | bytes] | None = None,
    templates: Mapping[str, str] | None = None,
    rooms: Mapping[str, str] | None = None,
) -> Path:
    """Write a project below ``root`` and return the folder of its specs.

    Args:
        root: the folder.
        specs: file name -> text; by default the toy family.
        templates: what differs from the toy family's templates.
        rooms: what differs from its host code.
    """
    contents: dict[str, str | bytes] = {
        f"specs/{name}": text for name, text in (specs or {"toy.yaml": SPEC}).items()
    }
    for name, template in {**TEMPLATES, **(templates or {})}.items():
        contents[f"templates/{name}"] = template
    for name, module in {**ROOMS, **(rooms or {})}.items():
        contents[f"families/{name}"] = module
    for path, content in contents.items():
        file = root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
    return root / "specs"


def files(out: Path) -> dict[str, bytes]:
    """Every file below ``out`` that a build may touch, by its path."""
    return {
        str(file.relative_to(out)): file.read_bytes()
        for top in ("generated", "tests")
        for file in sorted((out / top).rglob("*"))
        if file.is_file() and "__pycache__" not in file.parts
    }
