"""Limits of a YAML text: counted on the text itself, so that no release of a library moves a code or a place."""

from __future__ import annotations

import difflib
import json
from pathlib import Path
from typing import Any

import project
import pytest
import yaml
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from kernelgen.core.diagnostics import Failure
from kernelgen.emit import build
from kernelgen.spec.limits import values
from kernelgen.spec.parse import parse

MANY = 1300  # levels; libraries give up at other numbers, or not
PASSED = {
    "lists": ("[" * MANY, "1:17"),
    "mappings": ("{a: " * MANY, "1:65"),
    "both": ("[{a: " * MANY, "1:41"),
    "pairs without braces": ("[a: " * MANY, "1:33"),
    "lists over lines": ("[\n" * MANY, "17:1"),
    "lists behind a mapping": ("a:\n  b: " + "[" * MANY, "2:20"),
    "lists behind comments and quotes": ('# [[[\na: "[["\nb: \'[[\'\nc: ' + "[" * MANY, "4:19"),
    "lists behind a block": ("a: |\n  [[[\n\n  [[[\nb: " + "[" * MANY, "5:19"),
    "entries in a line": ("- " * MANY, "1:33"),
    "entries over lines": ("\n".join(" " * i + "-" for i in range(MANY)), "17:17"),
    "keys over lines": ("\n".join(" " * i + "a:" for i in range(MANY)), "17:17"),
    "keys with a sign": ("? " * MANY, "1:33"),
    "entries in the column of their key": ("\n".join(f"{' ' * i}a:\n{' ' * i}- b: 1" for i in range(0, MANY, 2)), "16:17"),
    "entries with keys": ("- a:\n" + "".join(f"{' ' * i}- a:\n" for i in range(4, MANY, 4)), "9:33"),
    "after a document": ("a: 1\n---\n" + "[" * MANY, "3:17"),
    "values": ("[" + "1," * 60_001 + "]", "1:120000"),
    "values in lines": ("- 1\n" * 60_001, "60000:3"),
    "absent values": ("-\n" * 60_001, "60000:1"),
    "plain text": ("a: " + "x" * 2001, "1:4"),
    "quoted text": ("a: ['" + "x" * 2001 + "']", "1:5"),
    "text in lines": ("a:\n" + "  x\n" * 1000, "2:3"),
    "text in a block": ("a: |\n" + "  x\n" * 1000, "1:4"),
    "number": ("a: [1, " + "1" * 19 + "]", "1:8"),
    "hexadecimal number": ("a: 0x" + "f" * 17, "1:4"),
    "key": ("x" * 1001 + ": 1", "1:1"),
    "key between brackets": ("{a: 1, " + "x" * 1001 + ": 1}", "1:8"),
}


@pytest.mark.parametrize("name", PASSED)
def test_a_limit_is_told_before_a_library_reads(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object, **options: object) -> None:
        raise AssertionError("a library saw it")

    monkeypatch.setattr(yaml, "parse", refuse)
    text, place = PASSED[name]
    root, (fault,) = parse("x", text.encode())
    assert root is None and fault.code == "KG004"
    assert f"{fault.location.line}:{fault.location.column}" == place


BRACKETS = "[{" * 20
DASHES = "- " * 20
KEPT = {
    "quotes": (f"\"{BRACKETS}\\\"{BRACKETS}\": '{BRACKETS}''{BRACKETS}'", {f'{BRACKETS}"{BRACKETS}': f"{BRACKETS}'{BRACKETS}"}),
    "quotes over lines": (f'a: "x\n  {DASHES}y"\nb: 1', {"a": f"x {DASHES}y", "b": 1}),
    "a comment": (f"a: 1 # {BRACKETS}\n# {BRACKETS}\n  # {DASHES}\nb: 2", {"a": 1, "b": 2}),
    "no comment": (f"a: x#{BRACKETS}", {"a": f"x#{BRACKETS}"}),
    "plain": (f"a: x{BRACKETS} it's \"{BRACKETS}", {"a": f"x{BRACKETS} it's \"{BRACKETS}"}),
    "plain over lines": (f"a: x\n  {BRACKETS}\n\n {DASHES}y\nb: 1", {"a": f"x {BRACKETS}\n{DASHES}y", "b": 1}),
    "a block": (f"a: |\n  {BRACKETS}\n\n    {DASHES}\n  '\nb: 1", {"a": f"{BRACKETS}\n\n  {DASHES}\n'\n", "b": 1}),
    "a block in a list": (f"- >-\n {BRACKETS}\n {DASHES}x\n- 1", [f"{BRACKETS} {DASHES}x", 1]),
    "a block with its indentation": (f"a: |2-\n   {BRACKETS}\n  {DASHES}x", {"a": f" {BRACKETS}\n{DASHES}x"}),
    "entries beside each other": ("- [1]\n" * 40, [[1]] * 40),
    "closed again": ("[" + "[[]], " * 40 + "]", [[[]]] * 40),
    "keys that end": ("a:\n  b:\n  - c:\n    - 1\n  d: 1\n" "e: 1", {"a": {"b": [{"c": [1]}], "d": 1}, "e": 1}),
    "sixteen": ("[" * 16 + "]" * 16, None),
}  # fmt: skip


@pytest.mark.parametrize("name", KEPT)
def test_what_looks_deep_and_is_not(name: str) -> None:
    text, expected = KEPT[name]
    for ending in ("\n", "\r\n"):
        root, found = parse("x", text.replace("\n", ending).encode())
        assert root is not None and not found
        assert expected is None or root.plain() == expected


PIECES = st.sampled_from(
    [
        *("a", "b", *"-?:[]{},|>#%@", "''", '""', "---", "...", "'x, y'", '"q\\"["', "it's", "a#b", "a:b"),
        *("- ", "? ", ": ", ", ", "a: ", "b: ", "k: [", "[x, y]", "{a: b}", "- - ", " # x", "# c [[", "'x\n y'"),
        *("\n", "\n", "\n ", "\n  ", "\n    ", "\n\n", "\n- ", "\n  - ", "\r\n", "|\n", "|2\n", ">-\n", "\t", " "),
    ]
)


@settings(max_examples=400, deadline=None)
@given(st.lists(PIECES, max_size=14).map("".join))
def test_the_scan_sees_what_the_parser_sees(text: str) -> None:
    try:
        events = list(yaml.parse(text, Loader=yaml.CSafeLoader))
    except yaml.YAMLError:
        assume(False)
    seen: list[tuple[str, int]] = []
    absent = 0
    for event in events:
        if isinstance(event, yaml.NodeEvent):
            start = event.start_mark.index
            if isinstance(event, yaml.CollectionStartEvent):
                seen.append(("list" if isinstance(event, yaml.SequenceStartEvent) else "mapping", start))
            elif start != event.end_mark.index:
                seen.append(("scalar", start))
            else:
                absent += 1
    collections = ("list", "mapping")
    found = [value for value in values(text) if value.kind != "key"]
    counted = [(v.kind if v.kind in collections else "scalar", v.start) for v in found if v.kind != "empty"]
    assert sorted(counted) == sorted(seen)
    assert len(found) - len(counted) <= absent + 2  # a block in the column of its key counts twice


def test_only_faults_that_are_shown_have_their_hint_looked_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    looks: list[Any] = []
    monkeypatch.setattr(difflib, "get_close_matches", lambda *given, **options: looks.append(given) or [])
    unknown = iter(f"tag{number}" for number in range(100_000))
    spec = "family: toy\ntargets: [sm_90]\naxes:\n" + "".join(f"  axis{i}: [one]\n" for i in range(12)) + "exclude:\n"
    for _ in range(64):
        when = ", ".join(f"axis{i}: [{', '.join(next(unknown) for _ in range(64))}]" for i in range(12))
        spec += f"- when: {{{when}}}\n  why: no\n"
    with pytest.raises(Failure) as failed:
        build.package(project.make(tmp_path, {"toy.yaml": spec}))
    assert len(failed.value.diagnostics) == 12 * 64 * 64 and not looks
    assert len(str(failed.value)) < 100_000 and len(looks) == 200
    document = failed.value.as_json()
    assert len(document["errors"]) == 200 and document["more_errors"] == 12 * 64 * 64 - 200
    assert len(json.dumps(document)) < 100_000 and len(looks) == 400
