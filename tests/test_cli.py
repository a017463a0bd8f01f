"""The commands: exit codes, what goes to stdout and stderr, and the same bytes wherever a build runs."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jsonschema
import project
import pytest

from kernelgen.core import names, progress
from kernelgen.core.diagnostics import Failure
from kernelgen.core.entry import SCHEMA_VERSION
from kernelgen.core.locate import SPECS
from kernelgen.emit import build
from kernelgen.spec import schema
from kernelgen.spec.parse import parse

ROOT = Path(__file__).parent.parent


def test_commands_return_their_exit_code() -> None:
    """What exits inside of a command is code of a room, and told as its fault."""
    files = [file for file in (ROOT / "kernelgen").rglob("*.py") if file.name != "entry.py"]
    assert not [str(file) for file in files if re.search(r"sys\.exit\(|SystemExit\(", file.read_text("utf-8"))]


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("KERNELGEN_CACHE_DIR", str(tmp_path / "cache"))
    specs = {"toy.yaml": project.SPEC, "tuned/h200/toy.yaml": project.TUNED}
    project.make(tmp_path / "work", specs)
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "work"


def document(text: str) -> dict:
    found = json.loads(text)
    assert found.pop("schema_version") == SCHEMA_VERSION
    return found


@pytest.mark.parametrize("command", [["list"], ["list", "--json"], ["schema"]])
def test_a_reader_that_stops_reading_is_no_failure(work: Path, command: list[str]) -> None:
    reads, writes = os.pipe()
    os.close(reads)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-m", "kernelgen", *command], env=environment, stdout=writes, stderr=subprocess.PIPE
    )
    os.close(writes)
    assert (done.returncode, done.stderr) == (0, b"")


def test_build_check_and_diff(work: Path, kernelgen) -> None:
    code, stdout, stderr = kernelgen("build", "--check")
    assert (code, stdout) == (1, "") and "generated/toy/__init__.py: error[KG034]" in stderr
    assert not (work / "generated").exists()

    code, stdout, stderr = kernelgen("build")
    assert (code, stdout, stderr) == (0, "", "18 written, 0 removed, 0 unchanged\n")
    assert kernelgen("build", "--check") == (0, "", "0 to write, 0 to remove, 18 unchanged\n")
    assert kernelgen("build", "--diff")[:2] == (0, "")

    (work / "specs/toy.yaml").write_text(project.SPEC.replace("large", "medium"))
    code, stdout, stderr = kernelgen("build", "--diff")
    assert code == 1 and '+    return tl.bfloat16, 16, "medium"\n' in stdout
    assert stderr.endswith("3 to write, 2 to remove, 15 unchanged; run kernelgen build\n")
    code, stdout, stderr = kernelgen("build", "--json")
    changed = document(stdout)
    assert code == 0 and changed["removed"] == [
        "generated/toy/bf16_r16_large.py",
        "generated/toy/bf16_r32_large.py",
    ]


@pytest.mark.parametrize(("words", "is_terminal", "shows"), [("", 1, 1), ("", 0, 0), ("--json", 1, 0), ("-q", 1, 0)])
def test_a_terminal_sees_how_far_a_cold_build_is(
    words: str, is_terminal: int, shows: int, work: Path, kernelgen, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "_SHORT", 0)
    monkeypatch.setattr(progress, "_BAR", 0)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: bool(is_terminal))
    monkeypatch.setenv("TERM", "xterm")
    code, _, stderr = kernelgen("build", *words.split())
    assert code == 0 and all((what in stderr) == shows for what in ("rendering", "formatting")), stderr


def test_a_file_in_the_way_is_2_for_build_and_1_for_check(work: Path, kernelgen) -> None:
    kernelgen("build")
    (work / "generated/__init__.py").write_text("edited")
    code, _, stderr = kernelgen("build")
    assert code == 2 and "generated/__init__.py: error[KG031]" in stderr and "hint: move" in stderr
    assert kernelgen("build", "--check")[0] == 1
    assert (work / "generated/__init__.py").read_text() == "edited"
    (work / "generated/.manifest.json").unlink()
    (work / "generated/.manifest.json").symlink_to("nothing")
    assert "generated/.manifest.json: error[KG030]: not a regular file" in kernelgen("build")[2]


def test_an_interrupted_build_is_a_finding(work: Path, kernelgen) -> None:
    kernelgen("build")
    (work / names.STAGING).mkdir()
    code, _, stderr = kernelgen("build", "--check")
    assert code == 1 and f"{names.STAGING}: error[KG033]" in stderr
    assert kernelgen("build")[0] == 0 and kernelgen("build", "--check")[0] == 0


def test_only_builds_what_matches_beside_what_is_there(work: Path, kernelgen) -> None:
    assert kernelgen("build", "--only", "*_f16_r16_*")[0] == 0
    assert sorted(path.name for path in (work / "generated/toy").iterdir()) == [
        "__init__.py",
        "_op.py",
        "_problem.py",
        "_table.py",
        "_tuned.py",
        "f16_r16_small.py",
    ]
    front = (work / "generated/toy/_table.py").read_text()
    assert "f16_r16_small" in front and "bf16_r16_large" not in front
    code, _, stderr = kernelgen("build", "--only", "*_large")
    assert code == 0 and stderr.startswith("5 written, 0 removed, 10 unchanged")
    front = (work / "generated/toy/_table.py").read_text()
    assert "f16_r16_small" in front and "bf16_r16_large" in front and "bf16_r16_small" not in front
    assert kernelgen("build", "--only", "*_large", "--check")[0] == 0
    (work / "specs/toy.yaml").write_text(project.SPEC.replace("large", "medium"))
    code, _, stderr = kernelgen("build", "--only", "*_r16_medium")
    assert code == 0 and stderr.startswith("4 written, 2 removed"), stderr
    code, _, stderr = kernelgen("build", "--only", "toy_b16*")
    assert code == 2 and "KG040" in stderr
    assert kernelgen("build")[0] == 0 and (work / "generated/toy/bf16_r32_medium.py").exists()


def test_a_faulty_spec_is_1_and_has_a_json_form(work: Path, kernelgen) -> None:
    (work / "specs/toy.yaml").write_text(project.SPEC.replace("r32", "r48"))
    code, stdout, stderr = kernelgen("build")
    assert (code, stdout) == (1, "")
    assert stderr.startswith("specs/toy.yaml:4:15: error[KG015]: axis rank has no tag 'r48'\n")
    for command in (["build"], ["list"], ["show", "x"], ["which"]):
        code, stdout, stderr = kernelgen(*command, "--json")
        (error,) = document(stdout)["errors"]
        assert (code, stderr) == (1, "")
        assert (error["code"], error["line"], error["column"]) == ("KG015", 4, 15)


def test_list_and_show(work: Path, kernelgen) -> None:
    code, stdout, _ = kernelgen("list")
    assert code == 0 and len(stdout.splitlines()) == 6
    assert "toy_f16_r32_small   dtype=f16   rank=r32  size=small" in stdout.splitlines()
    _, stdout, _ = kernelgen("list", "*_f16_*", "--json")
    assert [variant["module"] for variant in document(stdout)["variants"]] == [
        "f16_r16_small",
        "f16_r32_small",
    ]
    _, stdout, _ = kernelgen("show", "toy_f16_r32_small", "--json")
    shown = document(stdout)
    assert shown["axes"] == {"dtype": "f16", "rank": "r32", "size": "small"}
    assert shown["facts"]["torch_dtype"] == "float16" and shown["tunables"] == {
        "block_n": [64, 128]
    }
    kernelgen("build")
    code, stdout, _ = kernelgen("show", "toy_f16_r32_small", "--source")
    assert stdout == (work / shown["path"]).read_text()
    code, _, stderr = kernelgen("show", "toy_f16_r32_smal")
    assert code == 2 and "did you mean toy_f16_r32_small?" in stderr


@pytest.mark.parametrize(
    ("case", "expected"),
    [
        ("--dtype bf16 --rank 20", ["toy_bf16_r32_small", "toy_bf16_r32_large"]),
        ("toy --dtype=bfloat16 --rank r16 --size small", ["toy_bf16_r16_small"]),
        ("--dtype float16 --rank 1", ["toy_f16_r16_small"]),
        ("--rank 64", "KG041 4 add r64 to rank: in this line"),
        ("--rank 999", "KG041 4 add rany to rank: in this line"),
        ("--dtype f16 --size large", "KG041 7 nobody asked"),
        ("--rank 0", "KG015 0 a bucket is"),
        ("--dtype fp8", "KG015 0 activations are"),
        ("--size tiny", "KG015 0 known: small, large"),
        ("boy --rank 1", "KG040 0 did you mean toy?"),
        ("toy --ranks 1", "KG014 0 did you mean rank?"),
    ],
)
def test_which(case: str, expected, work: Path, kernelgen) -> None:
    code, stdout, _ = kernelgen("which", *case.split(), "--json")
    found = document(stdout)
    if isinstance(expected, list):
        assert code == 0 and found["variants"] == expected
        return
    (error,) = found["errors"]
    assert code in (1, 2)
    assert f"{error['code']} {error['line']} {error['hint']}".startswith(expected)


def test_which_knows_what_was_measured(work: Path, kernelgen) -> None:
    _, stdout, _ = kernelgen("which", "--k", "64", "--json")
    (measured,) = document(stdout)["measured"]
    problem = {"k": 64, "weighted": True}
    assert measured == {"problem": problem, "tags": {}, "schedule": "toy", "us": 1.5}
    assert "measured: k=64, weighted=True: toy, 1.5 us" in kernelgen("which", "--k", "64")[1]


def test_what_is_not_as_the_specs_say_is_not_judged(work: Path, kernelgen) -> None:
    kernelgen("build")
    template = work / "templates/kernels/toy.py.j2"
    template.write_text(template.read_text() + "EDITED = 1\n")
    for words in (["verify"], ["compile"], ["explain", "toy_f16_r16_small"], ["show", "toy_f16_r16_small", "--ptx"]):
        code, stdout, stderr = kernelgen(*words)
        assert (code, stdout) == (2, "") and "error[KG034]: differs" in stderr and "hint: run kernelgen build\n" in stderr
        code, _, stderr = kernelgen(*words, "--specs", "specs", "--out", "elsewhere")
        assert code == 2 and "run kernelgen build --specs specs --out elsewhere" in stderr


@pytest.mark.parametrize(("folder", "specs"), [("specs", "."), ("specs/tuned", ".."), ("specs/tuned", "../../specs/tuned/..")])
def test_specs_by_any_name_have_what_is_beside_them(
    folder: str, specs: str, work: Path, kernelgen, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    assert kernelgen("build", "--specs", specs)[0] == 0
    assert (work / "generated/toy/bf16_r16_small.py").is_file() and not [*(work / "specs").rglob("generated")]
    monkeypatch.chdir(work)
    assert kernelgen("build", "--check") == (0, "", "0 to write, 0 to remove, 18 unchanged\n")


def test_what_is_judged_may_be_linked_to(work: Path, kernelgen) -> None:
    kernelgen("build")
    for place, target in (("generated", "kept"), ("kept/toy/__init__.py", "front.py")):
        (work / place).rename(work / target)
        (work / place).symlink_to(work / target)
    build.require_current(Path("specs"), Path("."))
    assert "generated is a symbolic link" in kernelgen("build")[2], "which would not write there"
    for text in ("edited", None):
        (work / "front.py").write_text(text) if text else (work / "front.py").unlink()
        with pytest.raises(Failure, match="generated/toy/__init__"):
            build.require_current(Path("specs"), Path("."))


@pytest.mark.parametrize(
    "arguments",
    [
        ["nothing"],
        ["build", "--nothing"],
        ["build", "-j", "0"],
        ["show"],
        ["which", "--rank"],
        ["which", "a", "b"],
        ["build", "--specs", "nowhere"],
        ["build", "--specs", ""],
        ["build", "--only", "a", "--only", "b"],
        ["build", "-j", "1", "--jobs", "2"],
        ["which", "--rank", "16", "--rank", "32"],
        ["which", "--specs", "specs", "--rank=16", "--specs=specs"],
        ["show", "toy_f16_r16_small", "--source", "--ptx"],
        ["show", "toy_f16_r16_small", "--ptx", "--sass"],
        ["show", "toy_f16_r16_small", "--arch", "sm_90"],
        ["compile", "--check", "--update"],
        ["bench", "--add", "--set"],
        ["bench", "lora", "--check-only", "--seconds", "nan"],
    ],
)
def test_what_cannot_be_done_is_2(arguments: list[str], work: Path, kernelgen) -> None:
    code, stdout, stderr = kernelgen(*arguments)
    assert (code, stdout) == (2, "") and stderr
    code, stdout, stderr = kernelgen(*arguments, "--json")
    assert code == 2 and document(stdout)["errors"] and not stderr


def test_an_interrupt_is_130_and_an_internal_error_2(
    work: Path, kernelgen, monkeypatch: pytest.MonkeyPatch
) -> None:
    for error, expected in ((KeyboardInterrupt(), 130), (RuntimeError("lost"), 2), (OSError(28, "full"), 2)):

        def fail(*_: object, error: BaseException = error) -> None:
            raise error

        monkeypatch.setattr(build, "package", fail)
        code, _, stderr = kernelgen("list")
        assert code == expected and "Traceback" not in stderr
        assert ("KG082" in stderr) == isinstance(error, RuntimeError)


def _imported(*arguments: str) -> set[str]:
    """The modules that a command loads, in a process of its own."""
    program = (
        "import sys; from kernelgen import cli; from kernelgen.core import entry;"
        f"sys.argv = ['kernelgen', *{arguments}];"
        "assert entry.exit_code(cli.commands) == 0; print(*sys.modules)"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", program], check=True, env=environment, capture_output=True
    )
    return set(done.stdout.decode().split())


@pytest.mark.parametrize("words", ["--help", "--version", "explain --help", "bench moe_lora --help", "tune moe_lora --help"])
def test_help_loads_what_it_needs(words: str) -> None:
    assert not {"torch", "triton", "pydantic", "jinja2", "black", "yaml", "rich"} & _imported(*words.split())


def test_building_needs_neither_torch_nor_triton(work: Path) -> None:
    assert not {"torch", "triton"} & _imported("build")
    assert not {"torch", "triton", "black"} & _imported("build", "--check")


def test_the_same_bytes_everywhere(work: Path, tmp_path: Path) -> None:
    """Hash seed, folder, locale, time zone, umask and number of processes do not matter."""
    places = [
        ({"PYTHONHASHSEED": "0", "TZ": "UTC", "LC_ALL": "C"}, 0o022, ["-j1"], work),
        (
            {"PYTHONHASHSEED": "1", "TZ": "Asia/Kathmandu", "LC_ALL": "C.UTF-8"},
            0o077,
            ["-j2"],
            tmp_path,
        ),
        (
            {"PYTHONHASHSEED": "2", "TZ": "America/St_Johns", "PYTHONUTF8": "0"},
            0o000,
            ["-j3"],
            Path("/"),
        ),
    ]
    trees = []
    for i, (variables, umask, jobs, folder) in enumerate(places):
        out = tmp_path / f"out{i}"
        cache = str(tmp_path / f"cache{i}")
        command = [
            sys.executable,
            "-m",
            "kernelgen",
            "build",
            "--specs",
            str(work / "specs"),
            "--out",
            str(out),
        ]
        environment = {
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "KERNELGEN_CACHE_DIR": cache,
            **variables,
        }
        subprocess.run(
            [*command, *jobs],
            check=True,
            cwd=folder,
            env=environment,
            umask=umask,
            capture_output=True,
        )
        trees.append(project.files(out))
    assert len(trees[0]) == 19 and trees[0] == trees[1] == trees[2]


def test_the_schema_is_that_of_the_specs(work: Path, kernelgen) -> None:
    draft7 = schema.json_schema()
    jsonschema.Draft7Validator.check_schema(draft7)
    validator = jsonschema.Draft7Validator(draft7)
    for file in [*SPECS.glob("*.yaml"), work / "specs/toy.yaml"]:
        root, _ = parse(str(file), file.read_bytes())
        validator.validate(root.plain())
    for wrong in ("[r16, r256]", "[]", "r16"):
        root, _ = parse("x", project.SPEC.replace("[r16, r32]", wrong).encode())
        assert not validator.is_valid(root.plain())
    assert kernelgen("schema", "--check", "--specs", str(SPECS))[0] == 0
    code, _, stderr = kernelgen("schema", "--check")
    assert code == 1 and "KG034" in stderr
    _, stdout, _ = kernelgen("schema")
    (work / "specs/kernelgen.schema.json").write_text(stdout)
    assert kernelgen("schema", "--check")[0] == 0
