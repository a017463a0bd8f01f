"""Rules that every generated kernel keeps, read off its text. What each rule is for stands in its docstring."""

from __future__ import annotations

import ast
import functools
import itertools
import re
from pathlib import Path
from typing import Any, Callable, Iterator

import pytest

from kernelgen.emit import outline

PACKAGE = Path(__file__).parent.parent / "generated"
FILES = sorted(file for file in PACKAGE.glob("*/*.py") if re.search(r"@(triton|gluon)\.jit", file.read_text("utf-8")))

# What a product with it can pass 2**31 elements: strides over adapters, experts and rows, ...
WIDE_STRIDES = re.compile(r"(X|W|OUT|Y|H|D|CODES|BIAS)_STRIDE|\w+_STRIDE_[LE]|[XW]_SCALE_STRIDE|row_stride|\w+_stride_l")
# ... and numbers of rows, and how many there are,
ROWS = {
    *("pair", "pairs", "token", "listed", "position", "out_position", "v_position", "x_row", "first", "low", "high"),
    *("num_pairs", "num_tokens", "capacity", "next_part", "next_slice", "next_shard"),
}
# but for a number of a pair, and a scale an expert, which lie side by side.
NEXT_TO_EACH_OTHER = {"expert", "X_SCALE_STRIDE"}
LENGTHS = {"K", "N", "RANK"}


def kernels(module: ast.Module) -> Iterator[ast.FunctionDef]:
    """The functions that Triton compiles."""
    for node in module.body:
        decorators = node.decorator_list if isinstance(node, ast.FunctionDef) else []
        if any(ast.unparse(decorator).startswith(("triton.jit", "gluon.jit")) for decorator in decorators):
            yield node


nodes = functools.lru_cache(maxsize=1)(outline.nodes)  # rule after rule asks for those of one kernel


@functools.lru_cache(maxsize=1)
def calls(kernel: ast.FunctionDef) -> tuple[tuple[str, dict[str, ast.expr]], ...]:
    """(what is called, its keyword arguments)."""
    found = (node for node in nodes(kernel) if isinstance(node, ast.Call))
    return tuple((ast.unparse(call.func), {word.arg: word.value for word in call.keywords if word.arg}) for call in found)


def deciding(value: ast.expr) -> Iterator[str]:
    """Names that an offset is made of, and "int64" for a cast: what is loaded from a place has a width of its own."""
    match value:
        case ast.Name(name):
            yield name
        case ast.BinOp(left, _, right) | ast.IfExp(_, left, right):
            yield from (*deciding(left), *deciding(right))
        case ast.Subscript(of):
            yield from deciding(of)
        case ast.Call(ast.Attribute(of, "to"), [kind]):
            yield from ("int64",) if ast.unparse(kind)[2:] == ".int64" else deciding(of)
        case ast.Call(ast.Attribute(_, name), arguments) if name not in ("load", "arange", "program_id", "num_programs"):
            yield from itertools.chain.from_iterable(map(deciding, arguments))
        case ast.Call(ast.Name("_local")):  # of an expert
            yield "int64"


def wide_names(kernel: ast.FunctionDef) -> set[str]:
    """Variables that are 64-bit wherever they are assigned."""
    values: dict[str, list[ast.expr]] = {}
    for node in nodes(kernel):
        for target in node.targets if isinstance(node, ast.Assign) else ():
            for name in target.elts if isinstance(target, ast.Tuple) and isinstance(node.value, ast.Call) else [target]:
                values.setdefault(ast.unparse(name), []).append(node.value)
    wide = {"int64", "next_part"} if kernel.name.startswith("_") else {"int64"}  # a helper is given products
    while True:
        found = {name for name, of in values.items() if all(wide.intersection(deciding(each)) for each in of)}
        if found < wide:
            return wide
        wide |= found


def no_hint_that_the_interpreter_takes_and_a_compiler_refuses(kernel: ast.FunctionDef) -> None:
    """.cg with an eviction policy is an error of ptxas; warp_specialize makes these kernels slower."""
    for called, words in calls(kernel):
        assert "warp_specialize" not in words, called
        assert not {"cache_modifier", "eviction_policy"} <= words.keys(), called


def no_atomics(kernel: ast.FunctionDef) -> None:
    """A sum in the order of arrival has other bits in every run."""
    assert not [called for called, _ in calls(kernel) if called.startswith(("tl.atomic_", "gl.atomic_"))]


def no_index_wraps_around(kernel: ast.FunctionDef) -> None:
    """``index % N`` hides a missing mask: it reads what is not asked for, and cannot be vectorised.

    Rows of A beyond the rank are dropped afterwards, and read without a mask: they may be its first ones again.
    """
    rows_of_a = {
        id(node.value) for node in nodes(kernel) if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "a_row"
    }
    for node in nodes(kernel):
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mod) and id(node) not in rows_of_a:
            assert ast.unparse(node.right) not in LENGTHS, ast.unparse(node)


def is_number(product: ast.BinOp) -> bool:
    """Whether a product is by a few, or the number of a pair, or one that is rounded to whole tiles."""
    sides = ((product.left, product.right), (product.right, product.left))
    return any(
        isinstance(side, ast.Constant)
        or ast.unparse(side) == "TOP_K"
        or (isinstance(other, ast.BinOp) and isinstance(other.op, ast.FloorDiv) and ast.unparse(side) in ast.unparse(other.right))
        for side, other in sides
    )


def offsets_of_adapter_expert_and_row_are_wide(kernel: ast.FunctionDef) -> None:
    wide = wide_names(kernel)
    ranges = [node for node in nodes(kernel) if isinstance(node, ast.Call) and ast.unparse(node.func) == "tl.range"]
    turns = set(itertools.chain.from_iterable(map(ast.walk, ranges)))
    for node in nodes(kernel):
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult) and node not in turns and not is_number(node):
            of = {*deciding(node.left), *deciding(node.right)}
            is_far = any(WIDE_STRIDES.fullmatch(name) or name in ROWS for name in of) and of != NEXT_TO_EACH_OTHER
            assert not is_far or of & wide, ast.unparse(node)


def a_number_that_changes_from_call_to_call_makes_no_compile_key(kernel: ast.FunctionDef) -> None:
    """Every parameter is a pointer, a constant, or listed in ``do_not_specialize``."""
    decorators = " ".join(ast.unparse(decorator) for decorator in kernel.decorator_list)
    for parameter in kernel.args.args:
        if kernel.name.startswith("_"):
            continue  # a helper has no key of its own
        is_pointer = parameter.arg.endswith(("_ptr", "_ptrs", "_desc"))
        is_constant = parameter.annotation is not None
        assert is_pointer or is_constant or f"'{parameter.arg}'" in decorators, parameter.arg


def every_dot_has_an_accumulator_of_32_bits(kernel: ast.FunctionDef) -> None:
    for called, words in calls(kernel):
        if called == "tl.dot":
            assert "out_dtype" not in words or ast.unparse(words["out_dtype"]) == "tl.float32"
            assert "allow_tf32" not in words


def how_kernels_are_launched_stands_in_the_room(module: ast.Module) -> None:
    """Beside them a module has its ``schedule``, of their names, and the launcher, which calls it and decides nothing."""
    found = {id(kernel) for kernel in kernels(module)}
    host = [node for node in module.body if id(node) not in found and not isinstance(node, (ast.Import, ast.ImportFrom))]
    match host:
        case [ast.Expr(), ast.Assign([ast.Name("schedule")], ast.Call(ast.Name(), taken, [])), ast.FunctionDef(name, body=body)]:
            assert all(isinstance(each, ast.Name) for each in taken), ast.unparse(host[1])
            called_as = {ast.unparse(each).rpartition("_")[0] for each in taken}
            assert called_as == {name}, f"{ast.unparse(host[1])}: kernels are called as their variant and by one word"
            _, *named, called = body
            assert all(isinstance(line, (ast.Assign, ast.AugAssign)) for line in named), [ast.unparse(line) for line in named]
            assert ast.unparse(called).startswith("schedule.launch("), ast.unparse(called)
        case _:
            raise AssertionError([type(node).__name__ for node in host])


def offered(family: str) -> set[str]:
    """What the room of a family launches kernels with, by the names of their parameters."""
    file = PACKAGE / family / "_launch.py"
    tree = ast.parse(file.read_text("utf-8") if file.exists() else "")
    texts = [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    keywords = [node.arg or "" for node in ast.walk(tree) if isinstance(node, ast.keyword)]
    words = {word for text in (*texts, *keywords) for each in text.split() if (word := each.partition("=")[0]).isidentifier()}
    return {word for word in words if word.isupper() or word.endswith(("_ptr", "_ptrs", "_desc"))}


RULES: tuple[Callable[[ast.FunctionDef], None], ...] = (
    no_hint_that_the_interpreter_takes_and_a_compiler_refuses,
    no_atomics,
    no_index_wraps_around,
    offsets_of_adapter_expert_and_row_are_wide,
    a_number_that_changes_from_call_to_call_makes_no_compile_key,
    every_dot_has_an_accumulator_of_32_bits,
)


@pytest.mark.parametrize("family", sorted({file.parent.name for file in FILES}))
def test_kernels_keep_the_rules(family: str) -> None:
    broken = []

    def ask(rule: Callable[[Any], None], what: ast.AST, name: str) -> None:
        try:
            rule(what)
        except AssertionError as error:
            broken.append(f"{name}: {rule.__name__}: {error}")

    idle = offered(family)
    for file in (file for file in FILES if file.parent.name == family):  # each is parsed once
        module = ast.parse(file.read_text("utf-8"))
        ask(how_kernels_are_launched_stands_in_the_room, module, file.stem)
        for kernel, rule in itertools.product(kernels(module), RULES):
            ask(rule, kernel, f"{file.stem}, {kernel.name}")
            idle -= {parameter.arg for parameter in kernel.args.args}
    assert not broken, "\n".join(broken)
    assert not idle, f"{family}: launched with, and taken by no kernel: {idle}"
