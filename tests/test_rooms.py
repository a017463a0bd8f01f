"""The rooms of kernelgen stand in the order of the pipeline: each imports from those before it alone."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Iterator, Sequence

import kernelgen

ROOT = Path(kernelgen.__file__).parent
ORDER = ("core", "spec", "emit", "families", "prove", "compiled", "integrations", "measure", "demo", "")
# What a family has for a later room, by the last word of the module: it is found by name from there.
LATER = {
    **dict.fromkeys(("probes", "probe", "call"), "compiled"),
    **dict.fromkeys(("tune", "suite", "workload"), "measure"),
}
EVERYWHERE = ("kernelgen", "kernelgen.__version__", "kernelgen.families")


def room_of(place: Sequence[str]) -> int:
    """Where the room of a module stands, by its place below kernelgen; what is in none is the command line."""
    room = place[0] if place and place[0] in ORDER else ""
    later = (LATER.get(word.split("_")[-1]) for word in place[1:3]) if room == "families" else ()
    return max(ORDER.index(name) for name in (room, *later) if name is not None)


def imports(file: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level == 0 and (node.module or "").split(".")[0] == "kernelgen":
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] == "kernelgen")


def test_rooms_import_in_one_direction() -> None:
    wrong = []
    for file in sorted(ROOT.rglob("*.py")):
        place = file.relative_to(ROOT).with_suffix("").parts
        for name in imports(file):
            if room_of(name.split(".")[1:]) > room_of(place) and name not in EVERYWHERE:
                wrong.append(f"{'/'.join(place)} imports {name}")
    assert not wrong


def test_nothing_stands_outside_of_the_rooms_but_the_command_line() -> None:
    assert {file.stem for file in ROOT.glob("*.py")} == {"__init__", "__main__", "cli", "doctor"}
