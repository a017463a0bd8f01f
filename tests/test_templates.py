"""Faults of templates are told like those of specs: where, what and what to do; each once, and nothing is written."""

from __future__ import annotations

import random
import re
import shutil
import sys
from pathlib import Path
from types import ModuleType

import project
import pytest

from kernelgen.core.diagnostics import Diagnostic, Failure
from kernelgen.core.locate import FAMILIES, SPECS, TEMPLATES
from kernelgen.emit import build
from kernelgen.emit.members import installed, members
from kernelgen.emit.outline import outline

KERNEL = "kernels/toy.py.j2"
FRONT = "families/toy/_op.py"
FACE = "package/__init__.py.j2"
SPEC = "specs/toy.yaml"


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KERNELGEN_CACHE_DIR", str(tmp_path_factory.getbasetemp() / "cache"))


def told(
    tmp_path: Path, templates: dict[str, str], path: str = f"templates/{KERNEL}", rooms: dict[str, str] | None = None
) -> list[str]:
    """``line:column code message; hint`` of the faults in ``path``, which are all that there are."""
    with pytest.raises(Failure) as failed:
        build.tree(project.make(tmp_path, templates=templates, rooms=rooms))
    assert {fault.location.path for fault in failed.value.diagnostics} == {path}
    return [line(fault) for fault in failed.value.diagnostics]


def line(fault: Diagnostic) -> str:
    """The fault in one line, with what its caret is under."""
    where = fault.location
    caret = where.text[where.column - 1 : where.column - 1 + where.length]
    return f"{where.line}:{where.column} {fault.code} {fault.message} [{caret}] {fault.hint}".strip()


def test_a_fault_of_a_template_is_told_as_one_of_a_spec(tmp_path: Path) -> None:
    """Its place, the line with a caret, a hint; all of a template at once, and each once for all variants."""
    text = "x = {{ v.rnak }}\n#% if v.sise != small\n#% endif\ny = {{ v.name }}, {{ v.facts }}\nz = {{ w.rank }}\n"
    assert told(tmp_path, {KERNEL: text}) == [
        "1:10 KG022 a variant of toy has no 'rnak' [rnak] did you mean rank?",
        "2:9 KG022 a variant of toy has no 'sise' [sise] did you mean size?",
        "2:17 KG022 'small' is undefined [small]",
        "4:1 KG022 a template may print whole numbers, booleans, None and identifiers, not a Record "
        "[y = {{ v.name }}, {{ v.facts }}]",
        "5:8 KG022 'w' is undefined [w]",
    ]
    shown = str(Failure(build_faults(tmp_path)))
    assert "    1 | x = {{ v.rnak }}\n      |          ^^^^\n  hint: did you mean rank?\n" in shown


def build_faults(tmp_path: Path) -> tuple[Diagnostic, ...]:
    try:
        build.tree(tmp_path / "specs")
    except Failure as failed:
        return failed.diagnostics
    return ()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("#% fro x in v.tags\n#% endfor\n", ["1:4 KG021 Encountered unknown tag 'fro'. [fro] did you mean for?"]),
        ("#% if v.rank\n#% endfor\n", ["2:4 KG021 Encountered unknown tag 'endfor'."]),
        (
            "{{ v._x }}\n{{ v.name.upper() }}{{ v.rank | upper }}\n",
            [
                "1:6 KG021 private attribute _x [_x]",
                "2:11 KG021 only macros can be called; compute it in the model [upper]",
                "2:11 KG021 templates do without the filter upper; compute it in the model [upper]",
            ],
        ),
        ("", ["0:0 KG021 this template is empty [] write it, or remove it"]),
        (" \n\n", ["0:0 KG021 this template is empty [] write it, or remove it"]),
        ("{{ v.name.upper }}\n", ["1:11 KG022 an Identifier has no 'upper' [upper]"]),
        ("{{ v.tags.count }}\n", ["1:11 KG022 a Record has no 'count' [count] known: dtype, rank, size"]),
        ("{{ v.block_rank | length }}\n", ["1:19 KG022 an int has no length [length]"]),
        ("#% for x in v.block_rank\n#% endfor\n", ["1:1 KG022 an int cannot be looped over"]),
        ("#% import v.name as m\n", ["1:1 KG021 an import names its template"]),
        ("#% for x in v.tags recursive\n{{ loop(x) }}\n#% endfor\n", ["1:20 KG021 templates do without loops that", "2:4 KG021"]),
        ("\xff".join("x" * 3) + "\n{{ 1" + "1" * 5000 + " }}\n", ["2:4 KG021 a number of more than 18 digits"]),
    ],
)
def test_what_is_told_of_a_template(text: str, expected: list[str], tmp_path: Path) -> None:
    found = told(tmp_path, {KERNEL: text})
    assert len(found) == len(expected) and all(map(str.startswith, sorted(found), expected)), found


def test_a_template_that_is_no_text_is_told(tmp_path: Path) -> None:
    folder = project.make(tmp_path)
    (tmp_path / "templates" / KERNEL).write_bytes(b"x = 1\ny = '\xff'\n")
    with pytest.raises(Failure) as failed:
        build.tree(folder)
    (fault,) = failed.value.diagnostics
    assert (fault.code, str(fault.location)) == ("KG021", f"templates/{KERNEL}:2:1")


FOREVER = "#% macro f(v)\n{{ g(v) }}\n#% endmacro\n#% macro g(v)\n{{ f(v) }}{{ f(v) }}\n#% endmacro\n"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("#% macro f(v)\nx{{ f(v) }}\n#% endmacro\n{{ f(v) }}\n", "2:1 KG022 more than 32 macros call each other"),
        (FOREVER + "{{ f(v) }}\n", "5:1 KG022 more than 32 macros call each other"),
        (f"#% import '{KERNEL}' as own\n", "1:1 KG021 this import leads back to this template"),
        ("{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}\n", "1:1 KG021 more than 16 brackets"),
        ("{{ " + "(" * 5000 + "\n", "1:1 KG021 more than 16 brackets"),
        ("{{ " + "not " * 5000 + "1 }}\n", "1:1 KG021 more than 200 words and signs"),
        ("{{ v" + ".x" * 5000 + " }}\n", "1:1 KG021 more than 200 words and signs"),
        ("{{ 1" + " if 1 else 1" * 5000 + " }}\n", "1:1 KG021 more than 200 words and signs"),
        ("#% if v.rank\n" * 300 + "#% endif\n" * 300, "17:1 KG021 more than 16 blocks"),
        ("#% for x in range(9)\n" * 300, "17:1 KG021 more than 16 blocks"),
        ("x" * 200_001, "0:0 KG021 more than 200000 characters"),
        ("#% for i in range(1000000000)\nx\n#% endfor\n", "1:13 KG022 a range of 1000000000; at most 10000"),
        ("#% for i in range(10000000000)\nx\n#% endfor\n", "1:13 KG022 a range of 10000000000; at most 10000"),
        ("#% if 'x' in range(10000000000)\n#% endif\n", "1:14 KG022 a range of 10000000000; at most 10000"),
        ("#% for i in range('x')\nx\n#% endfor\n", "1:13 KG022 range wants one to three whole numbers"),
        ("#% for i in range(9999)\n" * 8 + "#% endfor\n" * 8, "8:1 KG022 it takes more steps, or writes more"),
        ("#% for i in range(9999)\n" + "x" * 9999 + "\n#% endfor\n", "1:1 KG022 it takes more steps, or writes more"),
        (
            "".join(f"#% macro f{i}(v)\n{f'{{{{ f{i - 1}(v) }}}}' * 9 if i else 'x'}\n#% endmacro\n" for i in range(12))
            + "{{ f11(v) }}\n",
            "5:1 KG022 it takes more steps, or writes more",
        ),
    ],
)
def test_a_template_without_end_is_stopped(text: str, expected: str, tmp_path: Path) -> None:
    (found,) = told(tmp_path, {KERNEL: text})
    assert found.startswith(expected)


def test_templates_that_import_each_other_are_told(tmp_path: Path) -> None:
    macros = {f"macros/{a}.j2": f"#% import 'macros/{b}.j2' as m\n" for a, b in ("xy", "yx")}
    kernel = "#% import 'macros/x.j2' as x\n" + project.KERNEL
    (found,) = told(tmp_path, {**macros, KERNEL: kernel}, "templates/macros/y.j2")
    assert found.startswith("1:1 KG021 this import leads back to this template")


@pytest.mark.parametrize(
    "text",
    [
        "#% if false\n#% import 'macros/m.j2' as x\n#% endif\n#% for x in v.tags.values\n{{ x.format(v) }}\n#% endfor\n",
        "#% if false\n#% macro x()\n#% endmacro\n#% endif\n#% for x in v.tags.values\n{{ x(v) }}\n#% endfor\n",
        "#% macro m(x)\n{{ x.format(v) }}\n#% endmacro\n#% if false\n#% import 'macros/m.j2' as x\n#% endif\n{{ m('{0._x}') }}\n",
    ],
)
def test_what_is_called_is_a_macro_whatever_its_name(text: str, tmp_path: Path) -> None:
    face = "#% import 'macros/m.j2' as m\n" + project.PACKAGE
    templates = {"macros/m.j2": "#% macro format(v)\n1\n#% endmacro\n", FACE: face}
    found = told(tmp_path, {KERNEL: text, **templates})
    assert found and all(" KG022 a" in fault for fault in found), found


@pytest.mark.parametrize(
    ("template", "hint"),
    [
        ("kernels/toys.py.j2", "specs/toys.yaml"),
        ("kernels/toy/large.py.j2", "specs/toy.yaml has no such schedule"),
        ("macros/toy.j2", "remove it"),
    ],
)
def test_a_template_that_nothing_uses_is_told(template: str, hint: str, tmp_path: Path) -> None:
    (found,) = told(tmp_path, {template: "x = 1\n"}, f"templates/{template}")
    assert found.startswith("0:0 KG020 no spec and no template makes use of this template") and hint in found


IMPORT = "import triton.language as tl\n"
LAUNCH = IMPORT + "from .. import _runtime\ndef f(x_ptr, K: tl.constexpr, N: tl.constexpr): ...\n_f = _runtime.Launcher(f)\n"
GIVEN = "from typing import NamedTuple\n\n\nclass G(NamedTuple):\n    a: int\n    b: int = 0\n\n\n"
OP = "from .. import _operands\n" + GIVEN + "O = _operands.Op('toy', G)\nf = O.caller(len)\n\n\n"
BUNDLE = "from .. import _operands\n" + GIVEN + "@_operands.bundle()\nclass C(G, list):\n    pass\n\n\n"
SHAPES = "from .. import _operands as o\n\nX = o.Tensor(('T, mm', 'mm'), None)\nY = o.Tensor('T, m', 'S*m')\n\n\ndef"
DECLARED = """\
from typing import Annotated, NamedTuple

from .. import _operands as o


class G(NamedTuple):
    a: int
    b: Annotated[object, o.Tensor("*", None, o.ROWS, scaled_by="c")]


def"""
SHARED = """\
from typing import Annotated, NamedTuple

from .. import _operands as o


class G(NamedTuple):
    a: Annotated[object, o.Tensor("*", "D")]


O = o.Op("toy", G, dtypes={"D": 0})


def"""
CALLS = "from .._runtime import fail\n\n\ndef g(got, what):\n    fail({})\n\n\ndef"
LOOKED_UP = SHARED + " g(a):\n    x = OF(a)\n    x['KEY']\n\n\ndef"
ASKED = "from .._scales import scale_operand\n\n\nX = scale_operand('ads')\n\n\ndef"
HELD = "def g(a):\n    x = VARIANTS.of(a)\n    x['{}']\n\n\ndef"
LAUNCHES = """\
from .. import _runtime

B = "b_ptr"


class Toy:
    more = f"{B} limit"

    def __init__(self, kernel):
        self._kernel = _runtime.Launcher(kernel, O, f"a_ptrs=a.x {self.more}")


def"""
JIT = IMPORT + "import triton\n\n\n@triton.jit\ndef _f("


@pytest.mark.slow(keep=24)
@pytest.mark.parametrize(
    ("template", "old", "new", "expected"),
    [  # of the Python that a template makes
        (KERNEL, IMPORT, IMPORT + "X = tl.zeross\n", "4:8 KG023 triton.language has no 'zeross' [zeross] did you mean zeros?"),
        (KERNEL, IMPORT, IMPORT + "{{ 'X = tl.zeross' }}\n", "4:12 KG023 triton.language has no 'zeross' [zeross] did you"),
        (KERNEL, IMPORT, "import triton.languag as tl\n", "3:15 KG023 triton has no 'languag' [languag] did you mean language?"),
        (KERNEL, IMPORT, IMPORT + "from math import flor\n", "4:18 KG023 math has no 'flor' [flor] did you mean floor?"),
        (KERNEL, IMPORT, IMPORT + "import torch\nX = torch.cuda.sream\n", "5:16 KG023 torch.cuda has no 'sream' [sream] did you"),
        (KERNEL, IMPORT, IMPORT + "from math import *\n", "4:1 KG023 import of *"),
        (KERNEL, IMPORT, IMPORT + "from ._problm import X\n", "4:7 KG023 there is no module toy._problm [_problm]"),
        (KERNEL, IMPORT, IMPORT + "from .._runtime import cidv\n", "4:24 KG023 _runtime has no 'cidv' [cidv] did you mean cdiv?"),
        (KERNEL, IMPORT, IMPORT + "from .. import _runtime as r\nX = r.cidv\n", "5:7 KG023 _runtime has no 'cidv' [cidv]"),
        (KERNEL, "return tl", "return block_m, tl", "13:12 KG023 undefined name 'block_m' [block_m] did you mean block_n?"),
        (KERNEL, "(block_n)", "(block_n: Tensor)", "12:27 KG023 undefined name 'Tensor' [Tensor]"),
        (KERNEL, IMPORT, IMPORT + "#% if v.dtype == 'bf16'\nX = 1\n#% endif\nY = X\n", "7:5 KG023 undefined name 'X' [X]"),
        (KERNEL, IMPORT, IMPORT + "{{ v.name }}{{ v.name }}\n", "4:1 KG023 undefined name 'toy_bf16"),
        (KERNEL, IMPORT, IMPORT + "def f(:\n", "4:7 KG023 not Python"),
        (KERNEL, IMPORT, IMPORT + "X = " + "(" * 5000 + ")" * 5000 + "\n", "4:5 KG023 not Python"),
        (KERNEL, IMPORT, IMPORT + "X = " + "-" * 50_000 + "1\n", "0:0 KG023 not Python"),
        (KERNEL, IMPORT, IMPORT + "return 1\n", "4:1 KG023 not Python: 'return' outside function"),
        (KERNEL, IMPORT, IMPORT + "import requests\n", "4:1 KG023 import of requests"),
        (KERNEL, IMPORT, IMPORT + "from os.path import join\nimport subprocess\n", "5:1 KG023 import of subprocess"),
        (KERNEL, IMPORT, IMPORT + "import kernelgen\n", "4:1 KG023 import of kernelgen"),
        (KERNEL, IMPORT, IMPORT + "X = eval('1')\n", "4:5 KG023 use of eval"),
        (KERNEL, IMPORT, IMPORT + "X = __import__('os')\n", "4:5 KG023 use of __import__"),
        (KERNEL, IMPORT, IMPORT + "with open('x') as f:\n    pass\n", "4:6 KG023 use of open"),
        (KERNEL, IMPORT, IMPORT + "X = '\u202e'\n", "4:1 KG023 a character that cannot be seen"),
        (KERNEL, IMPORT, IMPORT + "X = {1: 2, 1: 3}\n", "4:6 KG023 the key 1 stands twice"),
        (KERNEL, IMPORT, LAUNCH + "_f.bind(1, 0, N=1, K=2, PDL=True)\n", "7:25 KG023 f has no parameter 'PDL' [PDL]"),
        (KERNEL, IMPORT, LAUNCH + "_f.bind(1, 0, N=1)\n", "7:1 KG023 the constant 'K' of f is not given [_f.bind(1, 0, N=1)]"),
        (KERNEL, IMPORT, JIT + "x, y):\n    return x\n", "8:11 KG023 _f does not use 'y' [y] drop it"),
        (KERNEL, IMPORT, JIT + "x):\n    y = x\n    return x\n", "9:5 KG023 _f does not use 'y' [y]"),
        (KERNEL, IMPORT, "import math\n" + JIT + "x):\n    return x\n", "3:8 KG023 'math' is imported and not used [math] drop"),
        (KERNEL, "def {{ v.name }}(", "def launch(", "0:0 KG023 no launcher"),
        (KERNEL, project.KERNEL, "#% if false\n" + project.KERNEL + "#% endif\n", "0:0 KG023 no launcher"),
        (FRONT, "def toy(", "def toyy(", "6:5 KG023 the front door of toy defines no toy [toyy]"),
        (FRONT, "def", "__all__ = ['tyo']\n\n\ndef", "6:13 KG023 __all__ has 'tyo', which is not defined [tyo] did"),
        (FRONT, "def", "__all__ = ['a b']\n\n\ndef", "6:13 KG023 __all__ has 'a b', which is not defined"),
        (FRONT, "def", "__all__: tuple[str, ...] = ('tyo',)\n\n\ndef", "6:30 KG023 __all__ has 'tyo', which is not defined"),
        (FRONT, "def", "__all__ = ['toy']\n__all__ += ['tyo']\n\n\ndef", "7:14 KG023 __all__ has 'tyo', which is not defined"),
        (FRONT, "def", "__all__ = [*'toy']\n\n\ndef", "6:1 KG023 __all__ is not a list of names that are written out"),
        (FRONT, "def", "__all__ = ['toy']\n__all__.append('x')\n\n\ndef", "7:1 KG023 __all__ is not a list of names that are"),
        (FRONT, "def", "from . import toy\n\n\ndef", "6:15 KG023 toy has no 'toy' yet: it imports toy._op, and this leads back"),
        (FRONT, "def", "if True:\n    from . import toy\n\n\ndef", "7:19 KG023 toy has no 'toy' yet: it imports toy._op"),
        (FRONT, "def", "from . import _problem\n\nX = _problem.Confg\n\n\ndef", "8:14 KG023 toy._problem has no 'Confg' [Confg]"),
        (FRONT, "def", "from .. import toy as t\n\nX = t.toy\n\n\ndef", "8:7 KG023 toy has no 'toy' yet: it imports toy._op"),
        (FRONT, "def", "from .. import toy as t\nfrom ..toy import toy\n\n\ndef", "7:19 KG023 toy has no 'toy' yet: it"),
        (FRONT, "def", GIVEN + "X = G()\n\n\ndef", "14:5 KG023 G is given no 'a' [G] its fields are a, b"),
        (FRONT, "def", GIVEN + "X = G(1, c=2)\n\n\ndef", "14:5 KG023 G has no 'c' to be given here [G]"),
        (FRONT, "def", GIVEN + "X = G(1, 2, 3)\n\n\ndef", "14:5 KG023 G is given 3 values, and has 2 [G]"),
        (FRONT, "def", GIVEN + "def g(a, b):\n    G(b, a)\n\n\ndef", "15:5 KG023 G is given 'b' in the place of 'a'"),
        (FRONT, "def", OP + "def g(a, x):\n    y = (x,)\n    f(a, *y)\n\n\ndef", "21:5 KG023 G is given 'x' in the place of"),
        (FRONT, "def", BUNDLE + "def g(a, x):\n    C(a, x)\n\n\ndef", "21:5 KG023 C is given 'x' in the place of 'b'"),
        (FRONT, "def", OP + "def g(a, *y):\n    (f if a else f)(a, *y)\n\n\ndef", "20:5 KG023 G is given *y, of"),
        (FRONT, "def", SHAPES, "8:19 KG029 nothing else has the size 'mm', and no docstring tells it [mm] did you"),
        (FRONT, "def", "X = dict(asks=('ads',))\n\n\ndef", "6:17 KG029 no axis tells 'ads', which this operand asks for"),
        (FRONT, "def", OP + LAUNCHES, "25:18 KG023 a launcher reads 'limit' of G, which has no such field [limit]"),
        (FRONT, "def", DECLARED, "13:65 KG023 b speaks of 'c', and G has no such field"),
        (FRONT, "def", SHARED.replace('"D")', '"E")'), "12:41 KG023 a shares the dtype 'E', which its op does not have [E]"),
        (FRONT, "def", SHARED.replace("0}", "0}, first=('b',)"), "15:45 KG023 an op speaks of 'b', and G has no such field"),
        (FRONT, "def", LOOKED_UP.replace("OF", "O.check"), "20:8 KG029 no operand tells the size 'KEY' [KEY]"),
        (FRONT, "def", LOOKED_UP.replace("OF", "VARIANTS.of"), "20:8 KG029 no axis of toy tells 'KEY' [KEY]"),
        (FRONT, "def", CALLS.format("1, hin=2"), "10:5 KG023 fail has no 'hin' to be given here [fail] its parameters"),
        (FRONT, "def", CALLS.format("got, what, 1, 2"), "10:5 KG023 fail is given 'got' in the place of 'variant'"),
        (FRONT, "def", ASKED, "9:20 KG029 no axis tells 'ads', which this operand asks for"),
        (FRONT, "_table import VARIANTS", "_table import VARIANTZ as VARIANTS", "3:21 KG023 toy._table has no 'VARIANTZ'"),
        (FRONT, "_table import VARIANTS", "_table import VARIANTZ", "8:12 KG023 undefined name 'VARIANTS' [VARIANTS]"),
        (FRONT, "def", "from . import bf16_r16_smal\n\n\ndef", "6:15 KG023 toy has no 'bf16_r16_smal'"),
        (FRONT, "_table import VARIANTS", "_tabel import VARIANTS", "3:7 KG023 there is no module toy._tabel [_tabel]"),
        (FRONT, "VARIANTS.find", "VARIANT.find", "8:12 KG023 undefined name 'VARIANT' [VARIANT] did you mean VARIANTS?"),
        (FACE, "from . import {{ family.name }}", "from .toi import toy", "4:7 KG023 there is no module toi [toi]"),
        (FACE, "from . import {{ family.name }}", "from .toy import tooy", "4:18 KG023 toy has no 'tooy'"),
        (SPEC, "axes:\n", "axes:\n  flavour: [sweet, sour]\n", "3:3 KG029 no template of toy reads the axis flavour"),
        (SPEC, "axes:\n", "axes:\n  epilogue: [relu2]\n", "3:3 KG029 no template of toy reads the axis epilogue"),
        (SPEC, "targets:", "numerics: {strict: true}\ntargets:", "9:12 KG029 numerics.strict makes no difference"),
        (SPEC, "targets:", "numerics: {intermediate: activation}\ntargets:", "9:12 KG029 numerics.intermediate makes no differ"),
        (SPEC, "targets:", "quant: {group_n: 64}\ntargets:", "9:9 KG029 quant.group_n makes no difference"),
        (SPEC, "    block_n:", "    block_k: [1, 2]\n    block_n:", "11:3 KG027 toy has the tunables block_n, in this order"),
        # of the template
        (KERNEL, IMPORT, "{{ v.name\n" + IMPORT, "6:1 KG021 unexpected char '#'"),
        (KERNEL, IMPORT, "{{ 'a' * 1000000000 }}\n", "3:1 KG021 templates do without Mul"),
        (KERNEL, IMPORT, "{{ 9 ** 9 ** 9 ** 9 }}\n", "3:1 KG021 templates do without Pow"),
        (KERNEL, IMPORT, "#% for i in range(10**10)\n#% endfor\n", "3:1 KG021 templates do without Pow"),
        (KERNEL, IMPORT, "{{ '{0.__class__}'.format(v) }}\n", "3:20 KG021 only macros can be called"),
        (KERNEL, IMPORT, "{{ '%s'.format_map(v) }}\n", "3:9 KG021 only macros can be called"),
        (KERNEL, IMPORT, "#% macro m()\n#% endmacro\n#% macro m()\n#% endmacro\n", "5:10 KG021 two macros are called m [m]"),
        (KERNEL, IMPORT, "#% macro m(a)\n{{ a }}\n#% endmacro\n{{ m() }}\n", "3:12 KG022 parameter 'a' was not provided [a]"),
        (KERNEL, IMPORT, "#% if v.rank < 3\n#% endif\n" + IMPORT, "3:1 KG022 '<' not supported"),
        (KERNEL, project.KERNEL, "## nothing\n", None),
    ],
)  # fmt: skip
def test_hostile_templates(template: str, old: str, new: str, expected: str | None, tmp_path: Path) -> None:
    """Each in one fault, in the template, or in the spec where that asks for what the templates do not do."""
    texts = {SPEC: project.SPEC, FRONT: project.FRONT, **project.TEMPLATES}
    assert old in texts[template]
    texts[template] = texts[template].replace(old, new, 1)
    folder = project.make(tmp_path, {"toy.yaml": texts.pop(SPEC)}, rooms={"toy/_op.py": texts.pop(FRONT)}, templates=texts)
    with pytest.raises(Failure) as failed:
        build.build(folder, tmp_path)
    assert failed.value.exit_code == 2 and not project.files(tmp_path)
    faults = failed.value.diagnostics
    paths = {fault.location.path.removeprefix(f"{tmp_path}/").removeprefix("templates/") for fault in faults}
    if expected is not None:
        assert paths == {template} and [line(fault)[: len(expected)] for fault in faults] == [expected]
    else:
        assert template in paths


RANKS, EPILOGUES = "rank: [r16, rany]", "epilogue: [relu2, none]"
REFUSAL = '#% if v.tiled_rank\n{{ refuse("AXIS") }}\n#% endif\nRANK = {{ v.max_rank }}\n'
GATED = '#% if v.gated\nGATED = True\n#% endif\nCASE = "{{ v.epilogue }}"\n'
LAUNCHER = 'DTYPE = {{ v.torch_dtype == "bfloat16" }}\n\n\ndef {{ v.name }}(block_n):\n    return "{{ v.size }}"\n'


@pytest.mark.parametrize(
    ("axis", "kernel", "expected"),
    [
        (RANKS, REFUSAL.replace("AXIS", "rank"), "4:15 KG029 templates/kernels/toy.py.j2:2:1 refuses rank rany [rany]"),
        (RANKS, REFUSAL.replace("AXIS", "rnak"), "2:1 KG022 refuse('rnak'): the family has no such axis"),
        (RANKS, "{{ refuse() }}\n", "1:"),
        (EPILOGUES, GATED, "4:21 KG029 templates/kernels/toy.py.j2 makes the same of epilogue relu2 and none [none]"),
        ("epilogue: [relu2, swiglu]", GATED, None),
        ("epilogue: [relu2]", "# {{ v.epilogue }}\n", "4:3 KG029 no template of toy reads the axis epilogue"),
        ("epilogue: [relu2]", 'CASE = "{{ v.epilogue }}"\n', None),
    ],
)
def test_a_tag_without_an_arm_is_told_at_its_line(axis: str, kernel: str, expected: str | None, tmp_path: Path) -> None:
    spec = project.SPEC.replace("rank: [r16, r32]", axis).partition("tunables")[0]
    front = project.FRONT.replace("rank", axis.partition(":")[0])
    folder = project.make(tmp_path, {"toy.yaml": spec}, {KERNEL: kernel + LAUNCHER}, {"toy/_op.py": front})
    if expected is None:
        build.tree(folder)
        return
    (fault,) = build_faults(tmp_path)
    assert line(fault).startswith(expected)


@pytest.mark.parametrize("seed", range(12))
def test_mutated_copies_of_real_templates(seed: int, tmp_path: Path) -> None:
    """A slip of the pen in a template that comes with kernelgen: its fault is told in a template, and nothing is written."""
    rng = random.Random(seed)
    sources = {f"families/moe_add/{stem}.py": FAMILIES for stem in ("_op", "_problem")}
    source = rng.choice(["templates/kernels/moe_add.py.j2", *sources])
    text = (sources.get(source, TEMPLATES).parent / source).read_text()
    pattern, slip = SLIPS[seed % len(SLIPS)]
    found = rng.choice(list(re.finditer(pattern, text)) or list(re.finditer(r"\bdef (?=\w)", text)))
    text = text[: found.start()] + slip + text[found.end() :]
    specs = {f"{name}.yaml": (SPECS / f"{name}.yaml").read_text() for name in ("moe_add", "moe_route")}
    for name, content in {**{f"specs/{name}": content for name, content in specs.items()}, source: text}.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content)
    with pytest.raises(Failure) as failed:
        build.build(tmp_path / "specs", tmp_path)
    assert failed.value.exit_code == 2 and not project.files(tmp_path)
    paths = {fault.location.path for fault in failed.value.diagnostics}
    assert source in paths and all((SPECS.parent / path).is_file() or (tmp_path / path).is_file() for path in paths)


SLIPS = [
    (r"(?<=\bdef )\w+(?=\()", "1"),
    (r"(?<=\bv\.)\w+|(?<=\bfamily\.)\w+", "nothing"),
    (r"(?<=\btl\.)\w+|(?<=\btorch\.)\w+", "nothing"),
    (r"\}\}", ""),
    (r"\)\n", "\n"),
    (r"(?m)^ +(?=return )", ""),
]


LITERAL = LAUNCH.replace("N:", "BLOCK_N:") + "_f.bind(1, 0, K=1, BLOCK_N=64)\n"
LITERAL = project.KERNEL.replace(IMPORT, LITERAL).replace("(block_n)", "()")


@pytest.mark.parametrize(
    ("kernel", "problem", "expected"),
    [
        (project.KERNEL.replace("block_n", "x"), project.PROBLEM, "12:5 KG027 toy does not use the tunable block_n [block_n]"),
        (LITERAL, project.PROBLEM, "12:5 KG027 toy does not use the tunable block_n"),
        (project.KERNEL, '"""Nothing."""\n', "11:3 KG027 nothing holds the tunables of toy [toy] write a NamedTuple Config"),
    ],
)
def test_a_tunable_that_nothing_takes_is_told_at_its_line(kernel: str, problem: str, expected: str, tmp_path: Path) -> None:
    (found,) = told(tmp_path, {KERNEL: kernel}, str(tmp_path / SPEC), {"toy/_problem.py": problem})
    assert found.startswith(expected)


@pytest.mark.parametrize(
    ("module", "text", "path", "expected"),
    [
        ("toy/_table", "VARIANTS = {}\n", "families/toy/_table.py", "0:0 KG024 generated/toy/_table.py is made by family"),
        ("toy/_a-b", "X = 1\n", "families/toy/_a-b.py", "0:0 KG024 no module can be called so"),
        ("toy/_more", "X = 1\n", "families/toy/_more.py", "0:0 KG020 no module imports this one [] import it, or remove it"),
        ("_more", "X = 1\n", "families/_more.py", "0:0 KG020 no module imports this one"),
        (
            "toy/_op",
            f"{project.FRONT}\n\nvariants = VARIANTS\n__all__ = ['toy', 'variants']\n",
            "generated/__init__.py",
            "0:0 KG019 toy and the package itself both export variants",
        ),
    ],
)
def test_a_module_of_a_room_takes_the_place_of_nothing(
    module: str, text: str, path: str, expected: str, tmp_path: Path
) -> None:
    (found,) = told(tmp_path, {}, path, {f"{module}.py": text})
    assert found.startswith(expected)


@pytest.mark.parametrize(
    ("text", "exported"),
    [
        ("__all__ = ['a']\n__all__ += ('b',)\n", ("a", "b")),
        ("__all__: list[str] = ['a']\n__all__ = ('b',)\n", ("b",)),
        ("__all__: list[str]\n", None),
        ("__all__ = []\n", ()),
    ],
)
def test_exports_are_those_that_python_finds(text: str, exported: tuple[str, ...] | None) -> None:
    made = outline("generated/x.py", text)
    assert made is not None and made.exports == exported


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("size", "height", [f"{FRONT} 8:21 KG029 no axis of toy tells 'height' [find]", f"{SPEC} 5:3 KG029 the front door of"]),
        (", size=size", "", [f"{FRONT} 8:21 KG029 this asks for no size: variants of toy that differ in size would share"]),
        ("size=size", "**{'torch_dtype': size}", [f"{FRONT} 8:21 KG029 this asks for no size"]),
        ("rank=rank, ", "", [f"{FRONT} 8:21 KG029 this asks for no rank"]),
        ("size=size", "siez=1, size=size", [f"{FRONT} 8:21 KG029 no axis of toy tells 'siez' [find] did you mean size?"]),
        ("size=size", "size='small'", [f"{SPEC} 5:17 KG029 the front door of toy asks for no variant of size large: nothing"]),
        ("size=size", "size='small' if size else 'large'", []),
        ("size=size", "**{'size': size}", []),
        ("size=size", "**size", []),  # nobody knows
        ("size=size", "size=size, weight_scales=None", []),  # of an axis that the spec could have
        ("def", HELD.format("max_rank"), [f"{SPEC} 3:3 KG029 no launcher of toy looks up its torch_dtype"]),
        ("def", HELD.format("torch_dtype"), [f"{SPEC} 4:3 KG029 no launcher of toy looks up its max_rank"]),
    ],
)
def test_a_front_door_chooses_by_every_axis(old: str, new: str, expected: list[str], tmp_path: Path) -> None:
    project.make(tmp_path, rooms={"toy/_op.py": project.FRONT.replace(old, new)})
    found = [f"{fault.location.path.removeprefix(f'{tmp_path}/')} {line(fault)}" for fault in build_faults(tmp_path)]
    assert len(found) == len(expected) and all(map(str.startswith, sorted(found), expected)), found


def test_members_are_those_of_the_installed_releases() -> None:
    for module in ("torch", "torch.cuda", "triton", "triton.language", "triton.language.extra.cuda"):
        public = {name for name in installed(module) if not isinstance(vars(sys.modules[module]).get(name), ModuleType)}
        assert public <= (members(module) or set()), module


def test_a_folder_of_templates_that_is_a_circle_is_told(tmp_path: Path) -> None:
    folder = project.make(tmp_path)
    (tmp_path / "templates/kernels/again").symlink_to(tmp_path / "templates")
    assert build.tree(folder).files
    own = tmp_path / "own"
    (own / "specs").mkdir(parents=True)
    (own / "specs/toy.yaml").write_text(project.SPEC)
    (own / "templates").symlink_to(own / "templates")
    with pytest.raises(Failure) as failed:
        build.build(own / "specs", own)
    (fault,) = failed.value.diagnostics
    assert (failed.value.exit_code, fault.code, fault.location.path) == (2, "KG001", str(own / "templates"))


BIAS = 'asks=("biased",)'
LACKS = "moe_act_bf16_swiglu_clamp_interleaved_bias has bias, which other variants have not, and no fact of it asks for bias"
IN_PLACE = 'bias: Annotated[torch.Tensor | None, operands.Tensor(">=E, S*N", operands.FLOATS)]'


@pytest.mark.slow(keep=4)
@pytest.mark.parametrize(
    ("module", "old", "new", "place", "expected"),
    [
        ("moe_act/_problem.py", "bias: Bias", IN_PLACE, "families/moe_act/_problem.py", LACKS),
        ("_activation.py", BIAS, 'asks=("weighted",)', "families/moe_act/_problem.py", LACKS),
        ("moe_act/_problem.py", ", written=True", "", "moe_act/_problem.py", "stores to h, which is not declared as written"),
        ("moe_act/_problem.py", '"epilogue")', '"epilog")', "moe_act/_problem.py", "no axis tells 'epilog'"),
        ("_activation.py", BIAS, BIAS + ', only_with="biased"', "moe_act/_problem.py", "bias speaks of 'biased', and Given"),
        ("moe_act/_launch.py", "x_ptr delta_ptr", "x_ptr=x.t delta_ptr", "moe_act/_launch.py", "reads 'x.t' of Given, whose 'x'"),
        ("_live.py", "=route.topk_ids", "=rout.topk_ids", "families/_live.py", "reads 'rout' of Given, which has no such field"),
        ("moe_route/_op.py", " expert_map_ptr=route.expert_map", "", "macros/live.j2", "a parameter 'expert_map_ptr' that no"),
        ("kernels/moe_act.py.j2", "h=h,", "y=h,", "kernels/moe_act.py.j2", "a launcher is given 'y', which no call has"),
        ("kernels/moe_act.py.j2", "h=h, x=x", "h=x, x=h", "kernels/moe_act.py.j2", "is given 'x' in the place of 'h'"),
        ("moe_act/_launch.py", "N=problem.n,", "", "templates/kernels/moe_act.py.j2", "has a parameter 'N' that no module"),
    ],
)  # fmt: skip
def test_a_slip_in_a_room(module: str, old: str, new: str, place: str, expected: str, tmp_path: Path) -> None:
    """What a declaration, a launcher and the kernels say of one operand is held against each other, wherever they say it."""
    for family in ("moe_act", "moe_align", "moe_route"):
        (tmp_path / "specs").mkdir(exist_ok=True)
        shutil.copy(SPECS / f"{family}.yaml", tmp_path / "specs")
    source, folder = (TEMPLATES, "templates") if module.endswith(".j2") else (FAMILIES, "families")
    text = (source / module).read_text()
    assert old in text
    (tmp_path / folder / module).parent.mkdir(parents=True)
    (tmp_path / folder / module).write_text(text.replace(old, new, 1))
    with pytest.raises(Failure) as failed:
        build.build(tmp_path / "specs", tmp_path)
    told = [(fault.location.path, fault.message) for fault in failed.value.diagnostics]
    assert any(path.endswith(place) and expected in message for path, message in told), told
