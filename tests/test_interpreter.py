"""Each repair of the interpreter, shown on a kernel that the stock interpreter gets wrong or lets pass."""

from __future__ import annotations

import ast
import importlib
import inspect
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from triton.runtime import interpreter as stock

from kernelgen.families import _repairs
from kernelgen.prove import interpreter
from kernelgen.prove.interpreter import IntegerOverflow, OutOfBounds, Race, WrongHint
from kernelgen.prove.memory import hints_hold

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.skipif(
    not triton.knobs.runtime.interpret, reason="kernels are compiled, not interpreted"
)
FLOAT8 = [torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz]
ALL_FLOAT32 = torch.cat(
    [
        torch.tensor(
            [0.0, -0.0, float("inf"), float("-inf"), float("nan"), 1.96, 127.4, 500.0, 1e30]
        ),
        torch.randn(1000, generator=torch.Generator().manual_seed(0)) * 50,
        torch.logspace(-45, 38, 1015),
    ]
)


@triton.jit
def cast_kernel(out_ptr, x_ptr, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i, mask=i < n, other=0.0)
    tl.store(out_ptr + i, x.to(out_ptr.dtype.element_ty), mask=i < n)


def cast(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    out = torch.empty(x.numel(), dtype=dtype)
    cast_kernel[(triton.cdiv(x.numel(), 1024),)](out, x, x.numel(), BLOCK=1024)
    return out


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    nan = a.float().isnan() & b.float().isnan()
    integer = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    return bool(((a.view(integer) == b.view(integer)) | nan).all())


def test_bfloat16_casts_match_torch() -> None:
    assert same_bits(cast(ALL_FLOAT32, torch.bfloat16), ALL_FLOAT32.bfloat16())
    codes = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    for dtype in (torch.float32, torch.float16, torch.float64):
        assert same_bits(cast(codes, dtype), codes.to(dtype))
    assert same_bits(
        cast(torch.arange(-300, 300), torch.bfloat16), torch.arange(-300, 300).bfloat16()
    )


@pytest.mark.parametrize("dtype", FLOAT8, ids=str)
def test_float8_casts_match_torch_and_saturate(dtype: torch.dtype) -> None:
    largest = torch.finfo(dtype).max
    assert same_bits(cast(ALL_FLOAT32, dtype), ALL_FLOAT32.clamp(-largest, largest).to(dtype))
    codes = torch.arange(256, dtype=torch.uint8).view(dtype)
    assert same_bits(cast(codes, torch.float32), codes.float())


@triton.jit
def matmul_kernel(out_ptr, a_ptr, b_ptr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    m, n, k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    a = tl.load(a_ptr + m[:, None] * K + k[None, :])
    b = tl.load(b_ptr + n[:, None] * K + k[None, :])
    tl.store(out_ptr + m[:, None] * N + n[None, :], tl.dot(a, b.T))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, *FLOAT8], ids=str)
def test_dot_multiplies_values_not_bits(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    a, b = torch.randn(16, 64).to(dtype), torch.randn(32, 64).to(dtype)
    out = torch.empty(16, 32)
    matmul_kernel[(1,)](out, a, b, M=16, N=32, K=64)
    assert torch.equal(out, (a.double() @ b.double().T).float())


def test_a_row_of_a_dot_has_the_same_bits_wherever_it_is() -> None:
    torch.manual_seed(0)
    a, b = torch.randn(16, 128).bfloat16(), torch.randn(32, 128).bfloat16()
    out, rolled = torch.empty(16, 32), torch.empty(16, 32)
    matmul_kernel[(1,)](out, a, b, M=16, N=32, K=128)
    matmul_kernel[(1,)](rolled, a.roll(5, 0), b, M=16, N=32, K=128)
    assert torch.equal(out.roll(5, 0), rolled)


@triton.jit
def arithmetic_kernel(out_ptr, sum_ptr, max_ptr, scan_ptr, a_ptr, b_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    a = tl.load(a_ptr + i)
    b = tl.load(b_ptr + i)
    tl.store(out_ptr + i, tl.where(a < b, a * b + a, -a))
    tl.store(sum_ptr, tl.sum(a))
    tl.store(max_ptr, tl.max(a))
    tl.store(scan_ptr + i, tl.cumsum(a))


def test_bfloat16_arithmetic_and_reductions() -> None:
    torch.manual_seed(0)
    a, b = torch.randn(2, 64).bfloat16()
    out, scan = torch.empty(2, 64, dtype=torch.bfloat16)
    total, most = torch.empty(2, 1, dtype=torch.bfloat16)
    arithmetic_kernel[(1,)](out, total, most, scan, a, b, N=64)
    assert torch.equal(out, torch.where(a < b, a * b + a, -a))
    assert torch.equal(total, a.float().sum().bfloat16()[None])
    assert torch.equal(most, a.max()[None])
    assert torch.allclose(scan.float(), a.float().cumsum(0), rtol=torch.finfo(torch.bfloat16).eps)


def test_a_run_time_loop_bound_is_an_index() -> None:
    out = torch.zeros(1, dtype=torch.int32)
    loop_kernel[(1,)](out, torch.tensor([100], dtype=torch.int32), BLOCK=32)
    assert out.item() == 4


@triton.jit
def loop_kernel(out_ptr, n_ptr, BLOCK: tl.constexpr):
    n = tl.load(n_ptr)
    total = 0
    for _ in range(0, tl.cdiv(n, BLOCK)):
        total += 1
    tl.store(out_ptr, total)


# Memory


@triton.jit
def copy_kernel(out_ptr, x_ptr, offset, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offset + i, mask=i < n, other=0.0)
    tl.store(out_ptr + i, x, mask=i < n)


@triton.jit
def copy_tuple_kernel(out_ptr, x_ptrs, offset, N: tl.constexpr):
    i = tl.arange(0, N)
    for s in tl.static_range(len(x_ptrs)):
        tl.store(out_ptr + s * N + i, tl.load(x_ptrs[s] + offset + i))


@pytest.mark.parametrize(
    "offset, n, size", [(0, 17, 16), (-1, 16, 16), (1, 16, 16), (5, 12, 16), (0, 16, 15)]
)
def test_out_of_bounds_names_the_tensor(offset: int, n: int, size: int) -> None:
    x, out = torch.zeros(16), torch.zeros(64)[:size]
    with pytest.raises(OutOfBounds, match="out_ptr" if size < 16 else "x_ptr"):
        copy_kernel[(1,)](out, x, offset, n, BLOCK=32)
    copy_kernel[(1,)](out, x, 0, 15, BLOCK=32)


def test_bounds_are_those_of_the_view_and_of_each_tensor_of_a_tuple() -> None:
    x = torch.zeros(64)
    with pytest.raises(OutOfBounds):
        copy_kernel[(1,)](torch.zeros(16), x[16:24], 0, 9, BLOCK=32)
    out, slices = torch.empty(32), (torch.randn(16), torch.randn(16))
    copy_tuple_kernel[(1,)](out, slices, 0, N=16)
    assert torch.equal(out, torch.cat(slices))
    with pytest.raises(OutOfBounds, match=r"x_ptrs\[0\]"):
        copy_tuple_kernel[(1,)](out, (x[:16], x[32:48]), 4, N=16)


@triton.jit
def gather_kernel(out_ptr, x_ptr, SHIFT: tl.constexpr, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(out_ptr + i, tl.gather(tl.load(x_ptr + i), i + SHIFT, 0))


def test_a_gather_outside_of_its_source() -> None:
    x, out = torch.arange(16), torch.empty(16, dtype=torch.int64)
    gather_kernel[(1,)](out, x, SHIFT=0, N=16)
    assert torch.equal(out, x)
    with pytest.raises(OutOfBounds, match=r"gather .* -1 to 14 in a tensor of 16"):
        gather_kernel[(1,)](out, x, SHIFT=-1, N=16)


@triton.jit
def undefined_kernel(out_ptr, x_ptr, index_ptr, n, N: tl.constexpr):
    i = tl.arange(0, N)
    x = tl.load(x_ptr + tl.load(index_ptr + i, mask=i < n), mask=i < n)
    tl.store(out_ptr + i, x)


def test_lanes_that_are_off_without_other_are_not_zero() -> None:
    index = torch.arange(16, dtype=torch.int32)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        out = torch.empty(16, dtype=dtype)
        undefined_kernel[(1,)](out, torch.zeros(16, dtype=dtype), index, 9, N=16)
        assert out[9:].isnan().all() and not out[:9].isnan().any()


@triton.jit
def scatter_kernel(out_ptr, index_ptr, BLOCK: tl.constexpr, VALUE: tl.constexpr):
    program = tl.program_id(0)
    i = program * BLOCK + tl.arange(0, BLOCK)
    value = i if VALUE else i * 0
    tl.store(out_ptr + tl.load(index_ptr + i), value)


@pytest.mark.parametrize(
    "index, by", [([0, 1, 1, 2], "programs 0 and 1"), ([0, 0, 1, 2], "two lanes of program 0")]
)
def test_races_of_stores(index: list[int], by: str) -> None:
    out, table = torch.zeros(4, dtype=torch.int32), torch.tensor(index, dtype=torch.int32)
    with pytest.raises(Race, match=by):
        scatter_kernel[(2,)](out, table, BLOCK=2, VALUE=True)
    if "lanes" in by:  # of equal values the order cannot matter
        scatter_kernel[(2,)](out, table, BLOCK=2, VALUE=False)


@triton.jit
def shift_kernel(x_ptr, ATOMIC: tl.constexpr):
    program = tl.program_id(0)
    if ATOMIC:
        tl.atomic_add(x_ptr + 3, 1.0)
    tl.store(x_ptr + program + 1, tl.load(x_ptr + program))


def test_a_load_of_what_another_program_stores_is_a_race() -> None:
    with pytest.raises(Race, match="stored and loaded by programs"):
        shift_kernel[(2,)](torch.zeros(4), ATOMIC=False)
    shift_kernel[(1,)](torch.zeros(4), ATOMIC=False)
    shift_kernel[(2,)](torch.zeros(4), ATOMIC=True)  # an atomic may order the programs


@triton.jit
def handed_on_kernel(x_ptr, y_ptr, BARRIER: tl.constexpr, AGAIN: tl.constexpr, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(x_ptr + i, i * 1.0)
    if BARRIER:
        tl.debug_barrier()
    if AGAIN == "store":
        tl.store(x_ptr + N - 1, 0.0)
    elif AGAIN == "atomic":
        tl.atomic_add(x_ptr + i, 1.0)
    elif AGAIN == "load":
        tl.store(y_ptr + i, tl.load(x_ptr + N - 1 - i))
    else:
        tl.store(y_ptr + i, tl.load(x_ptr + N + i))


@pytest.mark.parametrize("again", ["load", "store", "atomic"])
def test_lanes_hand_on_nothing_without_a_barrier(again: str) -> None:
    x, y = torch.zeros(16), torch.zeros(8)
    with pytest.raises(Race, match=r"^\+\d+ bytes from the start of x_ptr .* since its last tl.debug_barrier"):
        handed_on_kernel[(1,)](x, y, BARRIER=False, AGAIN=again, N=8)
    handed_on_kernel[(1,)](x, y, BARRIER=True, AGAIN=again, N=8)
    handed_on_kernel[(1,)](x, y, BARRIER=False, AGAIN="elsewhere", N=8)


@triton.jit
def overwritten_kernel(x_ptr, BARRIER: tl.constexpr, PLACE: tl.constexpr, N: tl.constexpr):
    i = tl.arange(0, N)
    x = tl.load(x_ptr + i)
    first = tl.load(x_ptr + N)
    if BARRIER:
        tl.debug_barrier()
    if PLACE == "its own":
        tl.store(x_ptr + i, x + first)
    elif PLACE == "half of them":
        tl.store(x_ptr + i, x, mask=i < N // 2)
    elif PLACE == "another lane's":
        tl.store(x_ptr + (N - 1 - i), x)
    elif PLACE == "one number":
        tl.store(x_ptr + N, first + 1.0)


@pytest.mark.parametrize("place", ["another lane's", "one number"])
def test_no_lane_overwrites_what_another_has_yet_to_load(place: str) -> None:
    with pytest.raises(Race, match=r"^\+\d+ bytes from the start of x_ptr .* stores what its lanes loaded since its last"):
        overwritten_kernel[(1,)](torch.zeros(9), BARRIER=False, PLACE=place, N=8)
    overwritten_kernel[(1,)](torch.zeros(9), BARRIER=True, PLACE=place, N=8)
    for own in ("its own", "half of them"):
        overwritten_kernel[(1,)](torch.zeros(9), BARRIER=False, PLACE=own, N=8)


@triton.jit
def offset_kernel(out_ptr, row, STRIDE: tl.constexpr, WIDE: tl.constexpr):
    if WIDE:
        offset = tl.cast(row, tl.int64) * STRIDE
    else:
        offset = row * STRIDE
    tl.store(out_ptr, offset)


def test_32_bit_offsets_that_wrap() -> None:
    out = torch.zeros(1, dtype=torch.int64)
    with pytest.raises(IntegerOverflow, match="multiply gives 3000000000 "):
        offset_kernel[(1,)](out, 3, STRIDE=10**9, WIDE=False)
    offset_kernel[(1,)](out, 3, STRIDE=10**9, WIDE=True)
    assert out.item() == 3 * 10**9


@triton.jit
def divide_kernel(out_ptr, x_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    by = tl.load(x_ptr + i)
    tl.store(out_ptr + i, 7 // by)
    tl.store(out_ptr + N + i, 7 % by)


def test_integers_divided_by_zero_are_not_zero() -> None:
    out = torch.zeros(4, dtype=torch.int32)
    divide_kernel[(1,)](out, torch.tensor([0, 2], dtype=torch.int32), N=2)
    assert out[1::2].tolist() == [3, 1] and min(out[::2].tolist()) > 1000


@triton.jit
def hinted_kernel(out_ptr, RUN: tl.constexpr, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(out_ptr + i, tl.max_constancy(i // 4, [RUN]))


def test_hints_are_held_to() -> None:
    out = torch.zeros(16, dtype=torch.int32)
    hinted_kernel[(1,)](out, RUN=4, N=16)
    with pytest.raises(WrongHint, match="constancy of 8"):
        hinted_kernel[(1,)](out, RUN=8, N=16)
    token = hints_hold.set(False)
    hinted_kernel[(1,)](out, RUN=8, N=16)
    hints_hold.reset(token)


@triton.jit
def dependent_kernel(out_ptr):
    tl.extra.cuda.gdc_wait()
    tl.store(out_ptr, 1.0)
    tl.extra.cuda.gdc_launch_dependents()


def test_dependent_launch_is_a_no_op() -> None:
    out = torch.zeros(1)
    dependent_kernel[(1,)](out)
    assert out.item() == 1


def test_kernels_are_rewritten_as_triton_does(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[ast.Module] = []
    monkeypatch.setattr(stock.FunctionRewriter, "_compile_and_exec", lambda self, tree: made.append(tree))
    module = importlib.import_module("generated.moe_lora.two_kernel_bf16_sorted_add_plain_rany_w8group_a8group")
    kernels = [k for owner in (module, tl.standard) for k in vars(owner).values() if isinstance(k, stock.InterpretedFunction)]
    for rewriter in (kernel.rewriter for kernel in kernels):
        rewriter.rewrite_ast()
        lines, _ = inspect.getsourcelines(rewriter.fn)
        rewriter.def_lineno = rewriter._find_def(lines)
        theirs = rewriter._transform_ast(rewriter._prepare_source(lines))
        assert ast.dump(made.pop(), include_attributes=True) == ast.dump(theirs, include_attributes=True)
    assert len(kernels) > 20


def test_a_triton_without_the_parts_is_named() -> None:
    class Changed:
        def __getattr__(self, name: str) -> Any:
            if name == "ScanOps":
                raise AttributeError(name)
            return getattr(stock, name)

    with pytest.raises(RuntimeError, match=r"has no ScanOps, .* known to fit triton 3\.6 to 3\.9"):
        _repairs.require_parts(Changed(), _repairs._PARTS)


def test_a_copy_of_the_package_repairs_it_by_itself(tmp_path: Path) -> None:
    """The program of the docs, where there is no kernelgen; FP8 and the masks of float16 too; and no kernel is compiled."""
    section = (ROOT / "docs" / "kernels.md").read_text().partition("## On a CPU\n")[2]
    block = section.partition("```python\n")[2].partition("```")[0]
    more = """
        assert not [name for name in sys.modules if name.startswith("kernelgen")]
        (a8, a_scale), (b8, b_scale) = kg.quantize_weights(a), kg.quantize_weights(b)
        again = torch.zeros_like(out)
        kg.lora(again, x, [a8], [b8], kg.lora_route(adapter, max_loras=L), a_scale=[a_scale], b_scale=[b_scale])
        torch.testing.assert_close(again, out, rtol=0.2, atol=4.0)

        w13, w2, half = new(4, 2 * N, H).half() / 16, new(4, H, N).half() / 16, x.half()
        ids = torch.tensor([[e] for e in (0, 1, 2, 3, 0, 1)])
        y = kg.fused_moe(half, w13, w2, ids, torch.ones(T, 1), activation="swiglu")
        gate, up = (w13[ids[:, 0]].double() @ half.double()[:, :, None])[..., 0].chunk(2, 1)
        wanted = w2[ids[:, 0]].double() @ (torch.nn.functional.silu(gate) * up)[:, :, None]
        torch.testing.assert_close(y.double(), wanted[..., 0], rtol=0.01, atol=0.01)
        assert kg.warmup([kg.LoraShape(k=H, widths=(N,), rank=rank, max_loras=L)]) == 0
    """
    (tmp_path / "program.py").write_text("import sys\n" + block + textwrap.dedent(more))
    (tmp_path / "generated").symlink_to(ROOT / "generated")
    environment = {name: value for name, value in os.environ.items() if name not in ("TRITON_INTERPRET", "PYTHONPATH")}
    done = subprocess.run(
        [sys.executable, "program.py"], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_tensors_on_a_cpu_are_refused_where_kernels_are_compiled() -> None:
    program = """
        import pytest, torch
        import generated as kg
        with pytest.raises(ValueError, match="device: got cpu, wanted a GPU"):
            kg.warmup([], device="cpu")
        with pytest.raises(ValueError, match="(?s)cpu.*TRITON_INTERPRET=1"):
            kg.lora_route(torch.zeros(2, dtype=torch.int32), max_loras=1)
    """
    environment = {**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], env=environment, check=False)
    assert done.returncode == 0


def test_install_needs_the_interpreter_and_can_be_repeated() -> None:
    interpreter.install()
    program = """
        import pytest
        from kernelgen.prove import interpreter
        with pytest.raises(RuntimeError, match="set TRITON_INTERPRET=1 before triton is imported"):
            interpreter.install()
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        env={"PYTHONPATH": ":".join(sys.path)},
        check=False,
    )
    assert done.returncode == 0
