"""The field of 2^61 - 1 over numpy: what exact algebra calculates in. Elements are uint64 below ``P``.

Two formulas that are the same polynomial, or quotient of polynomials, agree on all elements. Two that are not agree on random
ones with a probability of their degree over 2^61 (Schwartz and Zippel).
"""

from __future__ import annotations

import functools
import zlib
from typing import Any

import numpy as np
from numpy.typing import NDArray

Elements = NDArray[np.uint64]

P = 2**61 - 1
_P = np.uint64(P)
_BITS = np.uint64(61)
_LIMB, _LIMBS = 21, 3  # a product is one of numbers of so many bits: exact in float64, as are sums of 512
_LIMB_MASK = np.uint64(2**_LIMB - 1)
_TERMS = 512
_HALF, _LOW = np.uint64(31), np.uint64(2**31 - 1)
_REST, _REST_LOW = np.uint64(30), np.uint64(2**30 - 1)


def _reduced(x: Elements) -> Elements:
    """Any 64-bit numbers, as elements."""
    return _below((x & _P) + (x >> _BITS))


def _below(x: Elements) -> Elements:
    """Numbers below 2 P, as elements: what is below P would wrap, and be large."""
    smaller: Elements = np.minimum(x, x - _P)
    return smaller


def add(x: Elements, y: Elements) -> Elements:
    """x + y."""
    return _below(x + y)


def negative(x: Elements) -> Elements:
    """-x."""
    return np.where(x == 0, x, _P - x)


def subtract(x: Elements, y: Elements) -> Elements:
    """x - y."""
    return _below(x + (_P - y))


def multiply(x: Elements, y: Elements) -> Elements:
    """x * y, by halves: 2^61 is 1, so what is beyond it begins anew below."""
    x_high, x_low, y_high, y_low = x >> _HALF, x & _LOW, y >> _HALF, y & _LOW
    middle = x_high * y_low + x_low * y_high
    ends = ((x_high * y_high) << np.uint64(1)) + (middle >> _REST) + ((middle & _REST_LOW) << _HALF)
    return _below(_reduced(ends) + _reduced(x_low * y_low))


def inverse(x: Elements) -> Elements:
    """1 / x; of 0, which has none, a number of its own."""
    different, place = np.unique(x, return_inverse=True)
    found = [pow(int(each), -1, P) if each else _token(0) for each in different]
    inverses: Elements = np.array(found, np.uint64)[place].reshape(x.shape)
    return inverses


def total(x: Elements, axis: int | tuple[int, ...] | None, keepdims: bool = False) -> Elements:
    """The sum over an axis, or over all."""
    low = (x & _LOW).sum(axis, np.uint64, keepdims=keepdims)
    high = (x >> _HALF).sum(axis, np.uint64, keepdims=keepdims)
    return add(_reduced(np.asarray(low)), _shifted(_reduced(np.asarray(high)), 31))


def product(x: Elements, y: Elements) -> Elements:
    """The product of matrices [..., M, K] and [..., K, N], by limbs in float64."""
    *batch, rows, terms = x.shape
    columns = y.shape[-1]
    whole: Elements = np.zeros((*batch, rows, columns), np.uint64)
    for start in range(0, terms, _TERMS):
        lefts = np.concatenate(_limbs(x[..., start : start + _TERMS]), -2)
        rights = np.concatenate(_limbs(y[..., start : start + _TERMS, :]), -1)
        sums = np.matmul(lefts, rights).reshape(*batch, _LIMBS, rows, _LIMBS, columns).astype(np.uint64)
        for weight in range(2 * _LIMBS - 1):
            places = range(max(0, weight - _LIMBS + 1), min(weight + 1, _LIMBS))
            part = sum(sums[..., i, :, weight - i, :] for i in places)
            whole = add(whole, _shifted(part, _LIMB * weight % 61))
    return whole


def _limbs(x: Elements) -> list[NDArray[np.float64]]:
    return [((x >> np.uint64(_LIMB * i)) & _LIMB_MASK).astype(np.float64) for i in range(_LIMBS)]


def _shifted(x: Elements, bits: int) -> Elements:
    """x * 2^bits of numbers below 2^61, as one of those: the bits go round."""
    return ((x << np.uint64(bits)) & _P) | (x >> np.uint64(61 - bits)) if bits else x


def of_integers(x: NDArray[Any]) -> Elements:
    """Whole numbers as elements."""
    if x.dtype == np.uint64:
        return _reduced(x)
    elements: Elements = (x.astype(np.int64) % np.int64(P)).astype(np.uint64)
    return elements


@functools.lru_cache(2**16)
def of_float(x: float) -> int:
    """A number as it is, a quotient of whole numbers; an infinity and NaN are numbers of their own."""
    if x != x or x in (float("inf"), float("-inf")):
        return _token(zlib.crc32(str(x).encode()))
    numerator, denominator = x.as_integer_ratio()
    return numerator % P * pow(denominator, -1, P) % P


def scrambled(x: Elements) -> Elements:
    """A fixed random function: the last rounds of splitmix64."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return _reduced(x ^ (x >> np.uint64(31)))


def function(name: str, x: Elements) -> Elements:
    """What is no algebra: a random function of this name."""
    return scrambled(x + np.uint64(zlib.crc32(name.encode()) << 32 | 1))


def _token(number: int) -> int:
    return int(scrambled(np.array([number + 2**62], np.uint64))[0])
