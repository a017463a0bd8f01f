"""MXFP4 weights in the registers that a matrix product takes its first operand from, without a way through shared memory.

A lane of such an operand has a part of the columns of a row. Which numbers those are is free, as long as the other operand has
its numbers in the same order. Here they are a group of 32: four words that a lane reads at once, and one scale.
"""

from __future__ import annotations

from typing import Any

from ._gluon import gl, gluon


@gluon.constexpr_function  # type: ignore[untyped-decorator, unused-ignore]
def sums(warps: int) -> Any:
    """The layout of sums [rows of W, rows of x] of products of 16 x 8, of warps one below the other."""
    return gl.NVMMADistributedLayout(version=[2, 0], warps_per_cta=[warps, 1], instr_shape=[16, 8])


@gluon.constexpr_function  # type: ignore[untyped-decorator, unused-ignore]
def by_group(rows: int, warps: int) -> Any:
    """The layout of the words of a step, [rows, groups, 4], as such products take their first operand from lanes."""
    height = rows.bit_length() - 1
    warp = [[16 << i, 0, 0] if i + 4 < height else [0, 0, 0] for i in range(warps.bit_length() - 1)]
    more = [[1 << i, 0, 0] for i in range(4 + len(warp), height)]
    registers = [[0, 0, 1], [0, 0, 2], [8, 0, 0], [0, 4, 0], *more]
    lanes = [[0, 1, 0], [0, 2, 0], [1, 0, 0], [2, 0, 0], [4, 0, 0]]
    return gl.DistributedLinearLayout(registers, lanes, warp, [], [rows, 8, 4])


@gluon.constexpr_function  # type: ignore[untyped-decorator, unused-ignore]
def word_slots(rows: int) -> Any:
    """The layout of words [rows, 32] in shared memory: two rows of four lanes, 16 bytes each, are in different banks."""
    row = [[1 << i, 0] for i in range(rows.bit_length() - 1)]
    row[0] = [1, 16]
    return gl.SharedLinearLayout([*([0, 1 << i] for i in range(5)), *row])


@gluon.constexpr_function  # type: ignore[untyped-decorator, unused-ignore]
def x_slots_of(rows: int) -> Any:
    """The same of rows of x [rows, 256], of which a lane reads 64 bytes, 16 at a time."""
    row, column = [[1 << i, 0] for i in range(rows.bit_length() - 1)], [[0, 1 << i] for i in range(8)]
    row[0], column[6] = [1, 8], [0, 64 + 16]
    return gl.SharedLinearLayout([*column, *row])


@gluon.jit  # type: ignore[untyped-decorator, unused-ignore]
def in_groups(words: gl.tensor, WORDS: gl.constexpr) -> gl.tensor:
    """Words [rows, 32] of a step, as lanes read them from shared memory, as [rows, groups, 4]."""
    return gl.convert_layout(words.reshape([words.shape[0], 8, 4]), WORDS, assert_trivial=True)


@gluon.jit  # type: ignore[untyped-decorator, unused-ignore]
def as_operand(words: gl.tensor, scale: gl.tensor, OPERAND: gl.constexpr) -> gl.tensor:
    """What words [rows, groups, 4] and their scales [rows, groups], in bfloat16, stand for: [rows, 256], numbers i and i + 4 of a
    word side by side."""
    # Sign to bit 15, and the others to 8, 7 and 6, of both halves of a word at once: the number times 2 ** -126, as in _mxfp4.
    ROWS: gl.constexpr = words.shape[0]
    high = words >> 8
    scale = scale[:, :, None]
    first = _numbers(((words & 0x000F000F) * 0x1040) & 0x81C081C0, scale)
    second = _numbers(((words & 0x00F000F0) * 0x0104) & 0x81C081C0, scale)
    third = _numbers(((high & 0x000F000F) * 0x1040) & 0x81C081C0, scale)
    fourth = _numbers(((high & 0x00F000F0) * 0x0104) & 0x81C081C0, scale)
    numbers = gl.join(gl.join(first, third), gl.join(second, fourth))  # [..., low or high, second bit, first bit]
    return gl.convert_layout(numbers.permute((0, 1, 2, 4, 5, 3)).reshape([ROWS, 256]), OPERAND, assert_trivial=True)


@gluon.jit  # type: ignore[untyped-decorator, unused-ignore]
def _numbers(bits: gl.tensor, scale: gl.tensor) -> gl.tensor:
    low = bits.to(gl.uint16).to(gl.bfloat16, bitcast=True)
    high = (bits >> 16).to(gl.uint16).to(gl.bfloat16, bitcast=True)
    return gl.join(low * 8.507059173023462e37 * scale, high * 8.507059173023462e37 * scale)  # 2 ** 126


@gluon.jit  # type: ignore[untyped-decorator, unused-ignore]
def in_order(x: gl.tensor, OPERAND: gl.constexpr) -> gl.tensor:
    """x [256, rows] with its columns in the order of ``as_operand``."""
    ROWS: gl.constexpr = x.shape[1]
    x = x.permute((1, 0)).reshape([ROWS, 32, 2, 4]).permute((0, 1, 3, 2)).reshape([ROWS, 256]).permute((1, 0))
    return gl.convert_layout(x, OPERAND, assert_trivial=True)
