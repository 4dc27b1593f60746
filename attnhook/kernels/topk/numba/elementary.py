"""Functions of single numbers, and the order of their bits, for numba's loops.

Exponential, logarithm and tanh follow Cephes (S. L. Moshier, netlib.org/cephes: expf, logf, tanhf):
relative error below 2e-7.
"""

# mypy: allow-untyped-defs, allow-untyped-calls, allow-incomplete-defs, allow-untyped-decorators, no-check-untyped-defs
from __future__ import annotations

import numpy as np
from numba import njit

from attnhook.kernels.topk.numba.intrinsics import bits_float, float_bits

f32, i32 = np.float32, np.int32

EXACT = {"contract"}  # fused multiply-add, no other liberty
SUMS = {"contract", "reassoc", "nsz"}  # sums in any order, which is what vectors need


@njit(fastmath=EXACT)
def exp(x):
    """e**x for x <= 0 (0 below -87)."""
    y = max(x, f32(-87.0))
    n = i32(y * f32(1.44269504) - f32(0.5))
    whole = f32(n)
    r = y - whole * f32(0.693359375) - whole * f32(-2.12194440e-4)
    p = f32(1.9875691500e-4)
    p = p * r + f32(1.3981999507e-3)
    p = p * r + f32(8.3334519073e-3)
    p = p * r + f32(4.1665795894e-2)
    p = p * r + f32(1.6666665459e-1)
    p = p * r + f32(5.0000001201e-1)
    p = p * r * r + r + f32(1.0)
    e = p * bits_float((n + i32(127)) << i32(23))
    return e if x > f32(-87.0) else f32(0.0)


@njit(fastmath=EXACT)
def log(x):
    """ln x of a positive, normal x."""
    bits = float_bits(x) - i32(0x3F3504F3)  # of sqrt(1/2)
    f = bits_float((bits & i32(0x7FFFFF)) + i32(0x3F3504F3)) - f32(1.0)
    e = f32(bits >> i32(23))
    p = f32(7.0376836292e-2)
    p = p * f + f32(-1.1514610310e-1)
    p = p * f + f32(1.1676998740e-1)
    p = p * f + f32(-1.2420140846e-1)
    p = p * f + f32(1.4249322787e-1)
    p = p * f + f32(-1.6668057665e-1)
    p = p * f + f32(2.0000714765e-1)
    p = p * f + f32(-2.4999993993e-1)
    p = p * f + f32(3.3333331174e-1)
    square = f * f
    return f + (p * f * square + e * f32(-2.12194440e-4) - f32(0.5) * square) + e * f32(0.693359375)


@njit(fastmath=EXACT)
def tanh(x):
    magnitude = abs(x)
    square = x * x
    p = f32(-5.70498872745e-3)
    p = p * square + f32(2.06390887954e-2)
    p = p * square + f32(-5.37397155531e-2)
    p = p * square + f32(1.33314422036e-1)
    p = p * square + f32(-3.33332819422e-1)
    e = exp(f32(-2.0) * magnitude)
    far = (f32(1.0) - e) / (f32(1.0) + e)
    return p * square * x + x if magnitude < f32(0.625) else (far if x > f32(0.0) else -far)


@njit
def ordered(bits):
    """Maps float bits to integers of the same order, and back."""
    return bits ^ ((bits >> i32(31)) & i32(0x7FFFFFFF))


@njit
def extremes(bits):
    """Smallest and largest of floats, as ordered integers: NaN counts as beyond infinity."""
    low, high = i32(0x7FFFFFFF), i32(-0x80000000)
    for j in range(len(bits)):
        v = bits[j] ^ ((bits[j] >> i32(31)) & i32(0x7FFFFFFF))
        low, high = min(low, v), max(high, v)
    return low, high
