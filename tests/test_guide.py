"""The guide to a family from nothing, taken at its word: every file of the page, and every command, in a folder of their own."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs" / "family.md").read_text()
FILES = re.findall(r'^```\w+ title="(.*?)"\n(.*?)^```$', PAGE, re.MULTILINE | re.DOTALL)
COMMANDS = [shlex.split(line)[1:] for line in re.findall(r"^\$ (kernelgen .*)$", PAGE, re.MULTILINE)]
MORE = ("suite.py", "workload.py", "tune.py", "_lora_embedding_shape.py")  # beside what ``new`` writes
COMPILE = ("compile", "explain")  # kernels are compiled by these, and interpreted by the others
WITHOUT_GPU = [["bench", "lora_embedding"], ["tune", "lora_embedding", "--budget", "10m"]]
DRIVER = """
import json, sys
from kernelgen import cli
from kernelgen.core import entry

for arguments in json.loads(sys.argv[1]):
    sys.argv = ["kernelgen", *arguments]
    print("$", *arguments, entry.exit_code(cli.commands), flush=True)
"""

WARMUP = """
import generated
from generated._warmup import requests
from kernelgen.compiled.stand_in import compiling_for
from kernelgen.core.targets import TARGETS

with compiling_for(TARGETS["sm_90"]):
    print(len(requests([generated.LoraEmbeddingShape(99, 80, 16, 4)], max_tokens=64)))
"""


def run(folder: Path, commands: list[list[str]], interpreted: bool) -> list[str]:
    """What the commands printed, each with its exit code in the end."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "KERNELGEN_CACHE_DIR": str(folder / "cache")}
    environment["TRITON_INTERPRET"] = str(int(interpreted))
    command = [sys.executable, "-c", DRIVER, json.dumps(commands)]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=True)
    return done.stdout.splitlines() + done.stderr.splitlines()


def lint(folder: Path) -> None:
    check = [sys.executable, "-m", "ruff", "check", "--config", str(ROOT / "pyproject.toml"), "families"]
    done = subprocess.run(check, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


@pytest.mark.slow
def test_what_new_writes_is_right_as_it_is(tmp_path: Path) -> None:
    commands = [["new", "twice"], ["build"], ["verify", "-j", "1"], ["which", "twice"]]
    (tmp_path / "specs").mkdir()
    printed = run(tmp_path, commands, interpreted=True)
    codes = [line.rsplit(" ", 1)[1] for line in printed if line.startswith("$ ")]
    assert codes == ["0"] * len(commands), "\n".join(printed)
    assert "twice_bf16" in printed
    lint(tmp_path)


def test_a_family_of_the_guide_needs_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "specs").mkdir()
    new, *commands = COMMANDS
    printed = run(tmp_path, [new], interpreted=True)
    assert f"$ {' '.join(new)} 0" in printed, "\n".join(printed)
    written = {path for path in printed if (tmp_path / path).is_file()}
    for path, text in FILES:
        assert path in written or path.rpartition("/")[2] in MORE, path
        (tmp_path / path).write_text(text)
    lint(tmp_path)
    assert written - {path for path, _ in FILES} == {"families/lora_embedding/__init__.py"}
    for interpreted in (True, False):
        own = [command for command in commands if (command[0] not in COMPILE) == interpreted]
        printed = run(tmp_path, own, interpreted)
        for command in own:
            code = 2 if command in WITHOUT_GPU else 0
            assert f"$ {' '.join(command)} {code}" in printed, "\n".join(printed)
        if interpreted:
            assert "26 checks" in "\n".join(printed) and "lora_embedding_bf16_add" in printed
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TRITON_INTERPRET": "0"}
    keys = subprocess.check_output([sys.executable, "-c", WARMUP], cwd=tmp_path, env=environment, text=True)
    assert int(keys) == 1  # for any number of tokens


@pytest.mark.parametrize(
    ("name", "code", "told"),
    [
        ("Twice", "KG012", "is not a name"),
        ("class", "KG012", "is a keyword"),
        ("moe_add", "KG030", "there is such a family"),
        ("case", "KG012", "a module that rooms share"),
        ("taken", "KG030", "it is there already"),
        ("nowhere", "KG001", "there is no folder of specs"),
    ],
)
def test_new_refuses_what_it_cannot_write(name: str, code: str, told: str, kernelgen, tmp_path: Path) -> None:
    specs = tmp_path / "specs"
    if name != "nowhere":
        specs.mkdir()
        (specs / "taken.yaml").write_text("mine")
    status, _, stderr = kernelgen("new", name, "--specs", str(specs))
    assert status == 2 and f"error[{code}]" in stderr and told in stderr
    assert sorted(path.name for path in tmp_path.rglob("*.*")) == ([] if name == "nowhere" else ["taken.yaml"])
