"""Specs that hold, and every way in which a spec can fail: the code, the place, all faults at once, never a traceback."""

from __future__ import annotations

import collections
import json
import os
import re
import signal
import time
from pathlib import Path
from random import Random

import project
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kernelgen.core.diagnostics import CATALOGUE, Failure
from kernelgen.core.model import VOCABULARY
from kernelgen.emit import build
from kernelgen.spec import load
from kernelgen.spec.parse import parse


def faults(tmp_path: Path, *, tuned: str | None = None, **specs: str | bytes) -> list[str]:
    """``path:line:column code`` of each fault of a project with these specs."""
    texts: dict[str, str | bytes] = {f"{name}.yaml": text for name, text in specs.items()}
    if tuned is not None:
        texts["tuned/h200/toy.yaml"] = tuned
    folder = project.make(tmp_path, texts)
    with pytest.raises(Failure) as failed:
        build.package(folder)
    assert failed.value.exit_code == 1
    found = []
    for fault in failed.value.diagnostics:
        where = fault.location
        path = Path(where.path).relative_to(folder).as_posix()
        found.append(f"{path}:{where.line}:{where.column} {fault.code}")
        assert str(fault).isprintable() or "\n" in str(fault)
    return found


def edited(old: str, new: str, text: str = project.SPEC) -> str:
    assert text.count(old) == 1, old
    return text.replace(old, new)


# what is replaced in the toy spec, by what, and what is found: "line:column code"
EDITS = {
    "unknown key": ("targets:", "target:", ["1:1 KG009", "9:1 KG008"]),
    "unknown key in exclude": ("    why:", "    because:", ["7:5 KG009", "8:5 KG008"]),
    "missing family": ("family: toy\n", "", ["1:1 KG009"]),
    "family of another name": ("family: toy", "family: boy", ["1:9 KG013", "11:3 KG015"]),
    "family in upper case": ("family: toy", "family: Toy", ["1:9 KG012"]),
    "family is a number": ("family: toy", "family: 7", ["1:9 KG010"]),
    "family is nothing": ("family: toy", "family:", ["1:8 KG010"]),
    "axis in upper case": ("  size:", "  Size:", ["5:3 KG012"]),
    "axis is a keyword": ("  size:", "  lambda:", ["5:3 KG012", "7:24 KG014"]),
    "axis is an attribute": ("  size:", "  name:", ["5:3 KG012", "7:24 KG014"]),
    "axis is a fact": ("  size:", "  block_rank:", ["5:3 KG012", "7:24 KG014"]),
    "axis is a decision": ("  size:", "  chunk_k:", ["5:3 KG012", "7:24 KG014"]),
    "axis is dunder": ("  size:", "  __class__:", ["5:3 KG012"]),
    "axis without tags": ("[small, large]", "[]", ["5:9 KG011"]),
    "axis is a text": ("[small, large]", "small", ["5:9 KG010"]),
    "axis is a mapping": ("[small, large]", "{small: 1}", ["5:9 KG010"]),
    "axis has many tags": (
        "[small, large]",
        "[" + ", ".join(f"t{i}" for i in range(65)) + "]",
        ["5:9 KG004"],
    ),
    "tag twice": ("[small, large]", "[small, large, small]", ["5:24 KG016"]),
    "tag is a number": ("[small, large]", "[small, large, 3]", ["5:24 KG010"]),
    "tag is a boolean": ("[small, large]", "[small, large, true]", ["5:24 KG010"]),
    "tag is a device": ("[small, large]", "[small, large, nul]", ["5:24 KG012"]),
    "tag is a keyword": ("[small, large]", "[small, large, in]", ["5:24 KG012"]),
    "tag is code": ("[small, large]", "[small, large, 'x; import os']", ["5:24 KG012"]),
    "tag ends a line": ("[small, large]", '[small, large, "x\\n"]', ["5:24 KG012"]),
    "tag is a path": ("[small, large]", "[small, large, ../up]", ["5:24 KG012"]),
    "tag is empty": ("[small, large]", "[small, large, '']", ["5:24 KG012"]),
    "tag is long": ("[small, large]", f"[small, large, {'x' * 41}]", ["5:24 KG012"]),
    "tag is not ASCII": ("[small, large]", "[small, large, größe]", ["5:24 KG012"]),
    "tag is a look-alike": ("[small, large]", "[small, large, sm\u0430ll]", ["5:24 KG012"]),
    "unknown dtype": ("[bf16, f16]", "[bf16, f16, fp64]", ["3:22 KG015"]),
    "rank above the buckets": ("[r16, r32]", "[r16, r32, r256]", ["4:20 KG015"]),
    "rank between the buckets": ("[r16, r32]", "[r16, r32, r48]", ["4:20 KG015"]),
    "exclude of an unknown axis": ("size: large}", "sise: large}", ["7:24 KG014"]),
    "exclude of an unknown tag": ("size: large}", "size: larg}", ["7:30 KG015"]),
    "exclude of a tag twice": ("size: large}", "size: [large, large]}", ["7:38 KG016"]),
    "exclude without why": ("    why: nobody asked\n", "", ["7:5 KG009"]),
    "exclude with an empty why": ("why: nobody asked", "why: ''", ["8:10 KG011"]),
    "exclude without when": (
        "  - when: {dtype: f16, size: large}\n    why: nobody asked",
        "  - why: nobody asked",
        ["7:5 KG009"],
    ),
    "exclude of nothing": ("{dtype: f16, size: large}", "{}", ["7:11 KG011"]),
    "exclude is a text": (
        "exclude:\n  - when",
        "exclude: all\nx:\n  - when",
        ["6:10 KG010", "7:1 KG008"],
    ),
    "exclude leaves nothing out": (
        "    why: nobody asked\n",
        "    why: nobody asked\n  - when: {size: large, dtype: f16}\n    why: again\n",
        ["9:5 KG017"],
    ),
    "exclude takes all": (
        "{dtype: f16, size: large}",
        "{size: [small, large]}",
        ["3:3 KG018"],
    ),
    "exclude takes a tag": ("{dtype: f16, size: large}", "{size: large}", ["5:17 KG018"]),
    "unknown target": ("[sm_90]", "[sm_91]", ["9:11 KG011"]),
    "target twice": ("[sm_90]", "[sm_90, sm_90]", ["9:18 KG016"]),
    "no target": ("[sm_90]", "[]", ["9:10 KG011"]),
    "unknown intermediate": ("targets:", "numerics: {intermediate: bf8}\ntargets:", ["9:26 KG011"]),
    "intermediate of no kernel": ("targets:", "numerics: {intermediate: float32}\ntargets:", ["9:26 KG011"]),
    "unknown numerics": ("targets:", "numerics: {accumulate: x}\ntargets:", ["9:12 KG008"]),
    "negative spill": ("targets:", "resources: {max_spill_bytes: -1}\ntargets:", ["9:30 KG011"]),
    "fractional spill": ("targets:", "resources: {max_spill_bytes: 1.5}\ntargets:", ["9:30 KG010"]),
    "tunables of an unknown schedule": ("  toy:\n", "  boy:\n", ["11:3 KG015"]),
    "tunable is a text": ("[64, 128]", "[64, wide]", ["12:19 KG010"]),
    "tunable is a boolean": ("[64, 128]", "[64, true]", ["12:19 KG010"]),
    "tunable is huge": ("[64, 128]", "[64, 12800000]", ["12:19 KG011"]),
    "three warps": ("block_n: [64, 128]", "num_warps: [4, 3]", ["12:20 KG011"]),
    "too many warps": ("block_n: [64, 128]", "num_warps: [64]", ["12:17 KG011"]),
    "tunable twice": ("[64, 128]", "[64, 64]", ["12:19 KG016"]),
    "tunable without values": ("[64, 128]", "[]", ["12:14 KG011"]),
    "tunable of a reserved name": ("block_n:", "values:", ["12:5 KG012"]),
    "tunable of a bad name": ("block_n:", "BLOCK_N:", ["12:5 KG012"]),
    "key twice": ("targets: [sm_90]", "targets: [sm_90]\ntargets: [sm_80]", ["10:1 KG007"]),
    "key is a number": ("targets:", "1: x\ntargets:", ["9:1 KG010"]),
    "key is a list": ("targets:", "? [a]\n: x\ntargets:", ["9:3 KG010"]),
    "merge key": ("targets:", "<<: {a: 1}\ntargets:", ["9:1 KG008"]),
    "anchor": ("[sm_90]", "&t [sm_90]", ["9:10 KG006"]),
    "alias": ("[sm_90]", "*t", ["9:10 KG006"]),
    "tag of Python": ("[sm_90]", "!!python/object/apply:os.system [ls]", ["9:10 KG006"]),
    "tag of YAML": ("family: toy", "family: !!str toy", ["1:9 KG006"]),
    "second document": ("targets:", "---\ntargets:", ["9:1 KG006"]),
    "unclosed list": ("[sm_90]", "[sm_90", ["10:9 KG005"]),
    "tab": ("targets: [sm_90]", "targets:\n\t- sm_90", ["10:1 KG005"]),
    "bad indentation": ("  rank:", " rank:", ["4:2 KG005"]),
    "NUL": ("nobody", "no\0body", ["8:12 KG003"]),
    "escape sequence": ("nobody", "no\x1bbody", ["8:12 KG003"]),
    "turned direction": ("nobody", "no\u202ebody", ["8:12 KG003"]),
    "zero width": ("nobody", "no\u200bbody", ["8:12 KG003"]),
    "line separator": ("nobody", "no\u2028body", ["8:12 KG003"]),
    "byte-order mark": ("family: toy", "\ufefffamily: toy", ["1:1 KG003"]),
    "bare carriage return": ("nobody", "no\rbody", ["8:12 KG003"]),
    "long text": ("nobody asked", "x" * 2001, ["8:10 KG004"]),
    "long reason": ("nobody asked", "x" * 501, ["8:10 KG011"]),
    "long number": ("[64, 128]", f"[64, {'1' * 5000}]", ["12:19 KG004"]),
    "infinite number": ("[64, 128]", "[64, 1e999]", ["12:19 KG004"]),
    "octal of old": ("[64, 128]", "[64, 0o100]", ["12:19 KG016"]),
    "deep": ("[64, 128]", "[" * 1000, ["12:27 KG004"]),
    "unknown element": ("targets:", "quant: {elements: [e3m4]}\ntargets:", ["9:20 KG011"]),
    "element twice": ("targets:", "quant: {elements: [e4m3, e4m3]}\ntargets:", ["9:26 KG016"]),
    "group of nothing": ("targets:", "quant: {group_k: 0}\ntargets:", ["9:18 KG011"]),
    "target without the only element": (
        "exclude:\n  - when: {dtype: f16, size: large}\n    why: nobody asked\ntargets: [sm_90]",
        "  act_quant: [none, a8token]\nquant: {elements: [e4m3]}\ntargets: [sm_90, sm_80]",
        ["8:18 KG026"],
    ),
    "two groups in a tile of ranks": (
        "exclude:",
        "  weight_quant: [none, w8group]\nquant: {group_k: 16}\nexclude:",
        ["6:24 KG026"],
    ),
    "two groups in a tile of rows": (
        "exclude:\n  - when: {dtype: f16, size: large}\n    why: nobody asked\ntargets: [sm_90]\ntunables:\n  toy:\n",
        "  weight_quant: [none, w8group]\nquant: {group_n: 24}\ntargets: [sm_90]\n"
        "tunables:\n  toy:\n    shrink_block_r: [8, 16]\n",
        ["6:24 KG026"],
    ),
    "no tile of one group": (
        "exclude:\n  - when: {dtype: f16, size: large}\n    why: nobody asked\ntargets: [sm_90]\ntunables:\n  toy:\n",
        "  act_quant: [none, a8group]\nquant: {group_k: 96}\ntargets: [sm_90]\ntunables:\n  toy:\n    block_k: [64, 128]\n",
        ["6:21 KG026"],
    ),
    "two faults": (
        "targets: [sm_90]\n",
        "targets: [sm_91]\nwhat: 1\nwhich: 2\n",
        ["9:11 KG011", "10:1 KG008", "11:1 KG008"],
    ),
    "faults of shape and of sense": (
        "size: large}",
        "sise: large, dtypes: f16}",
        ["7:24 KG014", "7:37 KG014"],
    ),
}


@pytest.mark.parametrize("name", EDITS)
def test_a_fault_is_told_with_its_code_and_place(name: str, tmp_path: Path) -> None:
    old, new, expected = EDITS[name]
    found = faults(tmp_path, toy=edited(old, new))
    assert found == [f"toy.yaml:{where}" for where in expected]


def test_a_bucket_that_is_no_tile_is_told_where_a_spec_asks_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ranks = {**VOCABULARY["rank"], "r24": {**VOCABULARY["rank"]["r16"], "block_rank": 24, "max_rank": 24}}
    monkeypatch.setattr(load, "VOCABULARY", {**VOCABULARY, "rank": ranks})
    assert faults(tmp_path, toy=edited("[r16, r32]", "[r16, r24]")) == ["toy.yaml:4:15 KG015"]


WHOLE_FILES: dict[str, tuple[bytes, list[str]]] = {
    "empty": (b"", ["0:0 KG009"]),
    "only a comment": (b"# nothing\n", ["0:0 KG009"]),
    "a list": (b"- 1\n", ["1:1 KG010"]),
    "a text": (b"hello\n", ["1:1 KG010"]),
    "latin-1": (b"family: toy # gr\xf6\xdfe\n", ["1:17 KG002"]),
    "UTF-16": ("family: toy\n".encode("utf-16"), ["1:1 KG002"]),
    "a surrogate": (b"family: \xed\xa0\x80\n", ["1:9 KG002"]),
    "binary": (bytes(range(256)), ["2:118 KG002"]),
    "too large": (b"#" * (5 << 20), ["0:0 KG004"]),
    "too many values": (b"x: [" + b"1," * 60_001 + b"]", ["1:119999 KG004"]),
    "deep by lines": (
        "\n".join(" " * i + "a:" for i in range(1000)).encode(),
        ["17:17 KG004"],
    ),
    "deep in braces": (b"{a: " * 100_000, ["1:65 KG004"]),
    "laughs": (
        b"a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]\n",
        ["1:4 KG006", "2:4 KG006", "2:8 KG006", "2:12 KG006", "3:5 KG006", "3:9 KG006"],
    ),
    "bomb of axes": (
        b"family: toy\ntargets: [sm_90]\naxes:\n"
        + b"".join(b"  a%d: [a, b, c, d, e, f, g, h]\n" % i for i in range(10)),
        ["4:3 KG004"],
    ),
    "a bad tag hides no schedule": (
        b"family: toy\ntargets: [sm_90]\naxes: {schedule: [one, NO]}\ntunables: {one: {a: [1]}}\n",
        ["3:24 KG012"],
    ),
    "tags join to one name": (
        b"family: toy\ntargets: [sm_90]\naxes:\n  a: [x, x_y]\n  b: [z, y_z]\n",
        ["4:3 KG019"],
    ),
}


@pytest.mark.parametrize("name", WHOLE_FILES)
def test_a_file_that_is_no_spec(name: str, tmp_path: Path) -> None:
    data, expected = WHOLE_FILES[name]
    start = time.monotonic()
    assert faults(tmp_path, toy=data) == [f"toy.yaml:{where}" for where in expected]
    assert time.monotonic() - start < 5


TUNED_EDITS = {
    "unknown tunable": (
        "config: {block_n: 64}",
        "config: {block_m: 64}",
        ["7:14 KG025", "7:5 KG025"],
    ),
    "value not declared": ("config: {block_n: 64}", "config: {block_n: 65}", ["7:23 KG025"]),
    "unknown schedule": (
        "    schedule: toy\n    config: {block_n: 64}",
        "    schedule: boy\n    config: {block_n: 64}",
        ["6:15 KG025"],
    ),
    "runner-up not declared": ("{block_n: 128}, us: 2}", "{block_n: 12}, us: 2}", ["9:50 KG025"]),
    "same problem twice": ("{k: 128, weighted", "{k: 64, weighted", ["10:5 KG025"]),
    "other sizes": ("{k: 128, weighted", "{n: 128, weighted", ["10:5 KG025"]),
    "bad size": ("{k: 128, weighted", "{k: wide, weighted", ["10:18 KG011"]),
    "bad name of a size": ("{k: 128, weighted", "{K: 128, weighted", ["10:15 KG012"]),
    "no time": ("    us: 1.5\n", "", ["5:5 KG009"]),
    "time of zero": ("us: 1.5", "us: 0", ["8:9 KG011"]),
    "another family": ("family: toy", "family: boy", ["1:9 KG013"]),
    "unknown key": ("device:", "gpu:", ["1:1 KG009", "2:1 KG008"]),
    "unknown target": ("target: sm_90", "target: sm_91", ["2:37 KG011"]),
    "no memory": (", shared_memory: 232448", "", ["2:1 KG009"]),
}


@pytest.mark.parametrize("name", TUNED_EDITS)
def test_a_fault_of_tuned_data(name: str, tmp_path: Path) -> None:
    old, new, expected = TUNED_EDITS[name]
    found = faults(tmp_path, toy=project.SPEC, tuned=edited(old, new, project.TUNED))
    assert sorted(found) == sorted(f"tuned/h200/toy.yaml:{where}" for where in expected)


ADDS = edited("  rank: [r16, r32]\n", "  rank: [r16, r32]\n  add_inputs: [add, set]\n")
TAG_EDITS = {
    "axis that is not measured": ("{dtype: bf16}", ["6:12 KG025"]),
    "tag of no such name": ("{add_inputs: sett}", ["6:24 KG025"]),
    "the tag that holds unless told": ("{add_inputs: add}", ["11:5 KG025"]),
}


@pytest.mark.parametrize("name", TAG_EDITS)
def test_a_fault_of_the_tags_of_tuned_data(name: str, tmp_path: Path) -> None:
    tags, expected = TAG_EDITS[name]
    tuned = edited(
        "weighted: true}\n    schedule: toy\n    config: {block_n: 64}",
        f"weighted: true}}\n    tags: {tags}\n    schedule: toy\n    config: {{block_n: 64}}",
        project.TUNED,
    )
    if name.startswith("the tag"):
        tuned = edited("{k: 128, weighted", "{k: 64, weighted", tuned)
    found = faults(tmp_path, toy=ADDS, tuned=tuned)
    assert found == [f"tuned/h200/toy.yaml:{where}" for where in expected]


def test_all_faults_of_all_specs_are_told_at_once(tmp_path: Path) -> None:
    found = faults(
        tmp_path,
        toy=edited("[r16, r32]", "[r16, r48]"),
        broken=b"family: [",
        other=b"family: other\naxes: {a: [x]}\ntargets: [sm_90]\nexclud: []\n",
    )
    assert found == [
        "broken.yaml:1:10 KG005",
        "other.yaml:4:1 KG008",
        "toy.yaml:4:15 KG015",
    ]


def test_a_family_without_templates_is_a_fault_of_its_spec(tmp_path: Path) -> None:
    spec = b"family: other\naxes: {schedule: [one, two]}\ntargets: [sm_90]\n"
    assert faults(tmp_path, other=spec) == [
        "other.yaml:1:9 KG020",
        "other.yaml:2:19 KG020",
        "other.yaml:2:24 KG020",
    ]


def test_names_of_two_families_do_not_meet(tmp_path: Path) -> None:
    other = b"family: toy_bf16\naxes: {rank: [r16], size: [small]}\ntargets: [sm_90]\n"
    assert "toy_bf16.yaml:1:9 KG019" in faults(tmp_path, toy=project.SPEC, toy_bf16=other)


def test_the_message_shows_the_line_and_a_way_out(tmp_path: Path) -> None:
    folder = project.make(tmp_path, {"toy.yaml": edited("[r16, r32]", "[r16, r256]")})
    with pytest.raises(Failure) as failed:
        build.package(folder)
    assert str(failed.value).splitlines() == [
        f"{folder}/toy.yaml:4:15: error[KG015]: axis rank has no tag 'r256'",
        "    4 |   rank: [r16, r256]",
        "      |               ^^^^",
        "  hint: a bucket is a power of two from r16 to r128; above 128, rany tiles the rank",
    ]


def test_a_long_line_is_shown_in_part(tmp_path: Path) -> None:
    spec = "# " + "x" * 3000 + "\nfamily: toy" + " " * 3000 + "what: \x1b[2J\n"
    folder = project.make(tmp_path, {"toy.yaml": spec})
    with pytest.raises(Failure) as failed:
        build.package(folder)
    assert all(len(line) < 400 and line.isprintable() for line in str(failed.value).splitlines())


def test_tuned_data_without_a_spec(tmp_path: Path) -> None:
    strays = ("tuned/toy.yaml", "tuned/h200/boy.yaml", "tuned/H200/toy.yaml")
    folder = project.make(tmp_path, {"toy.yaml": project.SPEC, **dict.fromkeys(strays, project.TUNED)})
    with pytest.raises(Failure) as failed:
        build.package(folder)
    found = {(fault.location.path.removeprefix(f"{folder}/"), fault.code) for fault in failed.value.diagnostics}
    assert found == {("tuned/H200", "KG012"), ("tuned/h200/boy.yaml", "KG013"), ("tuned/toy.yaml", "KG013")}


@pytest.mark.parametrize(
    "prepare",
    [
        lambda root: None,
        lambda root: (root / "specs").mkdir(),
        lambda root: (root / "specs").write_text("x"),
    ],
    ids=["no folder", "no spec", "not a folder"],
)
def test_no_specs_is_not_a_fault_of_a_spec(prepare, tmp_path: Path) -> None:
    prepare(tmp_path)
    with pytest.raises(Failure) as failed:
        build.package(tmp_path / "specs")
    assert failed.value.exit_code == 2


def test_a_folder_called_like_a_spec(tmp_path: Path) -> None:
    folder = project.make(tmp_path)
    (folder / "dir.yaml").mkdir()
    with pytest.raises(Failure) as failed:
        build.package(folder)
    assert [fault.code for fault in failed.value.diagnostics] == ["KG001"]


def test_windows_lines_and_quotes_change_nothing(tmp_path: Path) -> None:
    plain = build.package(project.make(tmp_path / "a"))
    text = project.SPEC.replace("\n", "\r\n").replace("toy\r", "'toy'\r", 1)
    assert build.package(project.make(tmp_path / "b", {"toy.yaml": text})) == plain


def test_words_of_yaml_1_1_are_texts() -> None:
    root, found = parse("x", b"[on, yes, 012, 1_000, 0o17, 0x1F, 1e3, .5, ~, 'no', True, 1:30]")
    assert root is not None and not found
    expected = ["on", "yes", 12, "1_000", 15, 31, 1000.0, 0.5, None, "no", True, "1:30"]
    assert root.plain() == expected


HOSTILE = [
    "'; import os; os.system('id') #",
    '""" + __import__("os") + """',
    "{{ 7 * 7 }}",
    "#% include '/etc/passwd'",
    "x\nimport os",
    "x\\\nimport os",
    "../../etc/passwd",
    "/etc/passwd",
    "con",
    "__import__",
    "x" * 1000,
    "x\0y",
    "\u202e",
    "${HOME}",
    "$(id)",
    "%s%n",
]
PLACES = [
    "family",
    "axis",
    "tag",
    "exclude axis",
    "exclude tag",
    "why",
    "target",
    "kernel",
    "tunable",
]


@pytest.mark.parametrize("place", PLACES)
def test_no_text_of_a_spec_reaches_the_output(place: str, tmp_path: Path) -> None:
    for number, hostile in enumerate(HOSTILE):
        quoted = json.dumps(f"zq{hostile}" if place == "why" else hostile)
        old, new = {
            "family": ("family: toy", f"family: {quoted}"),
            "axis": ("  size:", f"  {quoted}:"),
            "tag": ("[small, large]", f"[small, large, {quoted}]"),
            "exclude axis": ("size: large}", f"{quoted}: large}}"),
            "exclude tag": ("size: large}", f"size: [large, {quoted}]}}"),
            "why": ("nobody asked", quoted),
            "target": ("[sm_90]", f"[{quoted}]"),
            "kernel": ("  toy:\n", f"  {quoted}:\n"),
            "tunable": ("block_n:", f"{quoted}:"),
        }[place]
        folder = project.make(tmp_path / str(number), {"toy.yaml": edited(old, new)})
        try:
            tree = build.tree(folder)
        except Failure as failed:
            assert failed.exit_code == 1
        else:
            assert place == "why" and not any("zq" in text for text in tree.files.values())


PIECES = st.sampled_from(
    [
        *project.SPEC.split(),
        "[",
        "]",
        "{",
        "}",
        ":",
        "- ",
        "\n",
        "\n  ",
        "&a",
        "*a",
        "!!x",
        '"',
        "'",
        "|",
        ">",
        "#",
        "? ",
        "\t",
    ]
)


@settings(max_examples=400, deadline=2000, suppress_health_check=list(HealthCheck))
@given(
    st.one_of(
        st.binary(max_size=300),
        st.text(max_size=300).map(lambda text: text.encode("utf-8", "surrogatepass")),
        st.lists(PIECES, max_size=60).map(lambda pieces: " ".join(pieces).encode()),
        st.tuples(st.integers(0, len(project.SPEC)), st.integers(0, 40), st.binary(max_size=8)).map(
            lambda edit: project.SPEC.encode()[: edit[0]]
            + edit[2]
            + project.SPEC.encode()[edit[0] + edit[1] :]
        ),
    )
)
def test_whatever_the_bytes_there_is_a_family_or_a_failure(tmp_path_factory, data: bytes) -> None:
    folder = project.make(tmp_path_factory.mktemp("fuzz", numbered=True), {"toy.yaml": data})
    try:
        build.package(folder)
    except Failure as failed:
        assert failed.exit_code == 1 and failed.diagnostics
        assert all(fault.code in CATALOGUE for fault in failed.diagnostics)
        str(failed)


VALUES = ("x", "7", "1e999", "~", "true", "''", "[]", "{}", "[[[[", "{a: {b: 1}}", "9" * 30)
WORDS = (*VALUES, "&a", "*a", "!!str x", "nul", "import", "r16", "bf16")
SIGNS = (*"[]{},:-?|>'\"#&*!%@`\t ", "- ", ": ", "? ", "\n", "\n  ", "---\n", "\\", "\u00e9", "\u202e", "\0", "\r")


def spoilt(text: str, random: Random) -> str:
    """``text`` with a few changes: of a sign, a word, a line, the indentation, or an end that is missing."""
    for _ in range(random.randint(1, 4)):
        lines = text.split("\n")
        at, line = random.randrange(len(text)), random.randrange(len(lines))
        kind = random.randrange(7)
        if kind < 2:
            text = text[:at] + random.choice(SIGNS) + text[at + random.randint(0, 3) :]
        elif kind == 2:
            words = list(re.finditer(r"[\w.]+", text))
            word = random.choice(words)
            text = text[: word.start()] + random.choice((*WORDS, random.choice(words)[0])) + text[word.end() :]
        elif kind == 3:
            lines[line] = " " * random.randint(0, 8) + lines[line].lstrip()
        elif kind == 4:
            lines.insert(random.randrange(len(lines)), lines.pop(line))
        elif kind == 5:
            lines[line:line] = [lines[line]] * random.randint(1, 3)
        else:
            text = text[:at] if random.random() < 0.1 else text[:at] + text[at : at + 40] * 2 + text[at + 40 :]
        text = "\n".join(lines) if kind in (3, 4, 5) else text
    return text


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_spoilt_specs_are_told_in_their_places_and_in_time(seed: int, tmp_path: Path) -> None:
    random = Random(seed)
    whole = {"toy.yaml": project.SPEC, "tuned/h200/toy.yaml": project.TUNED}
    folder = project.make(tmp_path, whole)

    def late(*_: object) -> None:
        raise TimeoutError(f"a spec takes a minute: {texts}")

    old = signal.signal(signal.SIGALRM, late)
    told = collections.Counter[str]()
    try:
        for _ in range(500):
            name = random.choice(list(whole))
            texts = {**whole, name: spoilt(whole[name], random)}
            (folder / name).write_text(texts[name], "utf-8")
            signal.alarm(60)
            try:
                build.package(folder)
            except Failure as failed:
                told.update({fault.code for fault in failed.diagnostics})
                for fault in failed.diagnostics:
                    lines = texts.get(os.path.relpath(fault.location.path, folder), "").split("\n")
                    assert fault.location.line <= len(lines), (fault, texts)
                    assert fault.location.column <= len(lines[fault.location.line - 1]) + 1, (fault, texts)
                assert all(line.isprintable() for line in str(failed).splitlines()), texts
            (folder / name).write_text(whole[name], "utf-8")
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, old)
    assert len(told) > 8 and sum(told.values()) > 300, told
