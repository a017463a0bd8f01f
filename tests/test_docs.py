"""The papers: what they tell to type works, and every link leads somewhere."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Iterator

import click
import pytest

from kernelgen import cli

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("docs/*.md")), *sorted(ROOT.glob("*/README.md"))]
# What a page takes for granted.
GIVEN = {
    "adapters.md": """
        import json, tempfile, torch
        from pathlib import Path
        from safetensors.torch import save_file
        import generated as kg
        device = "cpu"
        folders = [Path(tempfile.mkdtemp()) for _ in range(2)]
        for folder in folders:
            config = dict(peft_type="LORA", r=4, lora_alpha=8, target_modules=["gate_proj"])
            (folder / "adapter_config.json").write_text(json.dumps(config))
            name = "base_model.model.model.layers.0.mlp.experts.{}.gate_proj.lora_{}.weight"
            sizes = {"A": (4, 64), "B": (48, 4)}
            factors = {name.format(e, side): torch.randn(sizes[side]) for e in range(4) for side in sizes}
            attention = "base_model.model.model.layers.0.self_attn.v_proj.lora_{}.weight"
            factors |= {attention.format(side): torch.randn(size) for side, size in (("A", (4, 64)), ("B", (16, 4)))}
            save_file(factors, folder / "adapter_model.safetensors")
        x, gate_up = torch.randn(3, 64, dtype=torch.bfloat16), torch.zeros(3, 2, 96, dtype=torch.bfloat16)
        topk_ids, adapter_of_token = torch.tensor([[0, 1]] * 3), torch.tensor([0, 1, -1], dtype=torch.int32)
        route = kg.moe_route(topk_ids, adapter_of_token, num_experts=4, max_loras=2)
        out = torch.zeros(3, 96, dtype=torch.bfloat16)
    """
}


_BLOCK = re.compile(r"^```(\w*)( [^\n]*)?\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(page: Path, *languages: str) -> list[str]:
    """The blocks of code of a page, in their order; without those that have a title, which are files."""
    return [block[3] for block in _BLOCK.finditer(page.read_text()) if block[1] in languages and not block[2]]


def commands(page: Path) -> Iterator[list[str]]:
    """Every command of ours in a page: in a block, or in a line."""
    prose = _BLOCK.sub("", page.read_text()).replace("\n", " ")
    lines = re.findall(r"`((?:kernelgen [a-z]|tools/\w)[^`]*)`", prose)
    for line in [*lines, *"".join(blocks(page, "sh", "")).splitlines()]:
        for part in line.split("&&"):
            words = shlex.split(part, comments=True)
            if words and re.fullmatch(r"(\.venv/bin/)?kernelgen|tools/\w+", words[0]):
                yield words


@pytest.mark.slow(keep=2)
def test_programs_run() -> None:
    """Each page is one program, of one process with the others; a GPU is stood in for by the interpreter."""
    programs = {}
    for page in PAGES:
        given = f"import textwrap\nexec(textwrap.dedent({GIVEN.get(page.name, '')!r}))"
        text = "\n".join([given, *blocks(page, "python")])
        programs[page.name] = text.replace('device = "cuda"', 'device = "cpu"')
    every = f"for page, text in {programs}.items():\n    exec(compile(text, page, 'exec'), {{'__name__': '__main__'}})"
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", every], cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_are_understood(page: Path) -> None:
    for first, *words in commands(page):
        if first.startswith("tools/"):
            assert os.access(ROOT / first, os.X_OK), first
            continue
        context, command = click.Context(cli.commands), cli.commands
        while isinstance(command, click.Group) and words:
            words[0] = command.list_commands(context)[0] if words[0].isupper() else words[0]  # SUITE: any
            name, command, words = command.resolve_command(context, words)
            context = click.Context(command, info_name=name, parent=context)
        with contextlib.suppress(click.exceptions.NoArgsIsHelpError, click.MissingParameter):  # only named
            command.make_context(context.info_name, words, parent=context.parent)


def test_every_link_leads_somewhere(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert {page.name for page in (tmp_path / "site").iterdir()} >= {"index.html", *(p.stem for p in ROOT.glob("docs/*.md"))}
