"""Sums over a row's attention, for numba's loops."""

# mypy: allow-untyped-defs, allow-untyped-calls, allow-incomplete-defs, allow-untyped-decorators, no-check-untyped-defs
from __future__ import annotations

import numpy as np
from numba import njit

from attnhook.kernels.topk.numba.elementary import SUMS, exp, log
from attnhook.record.fingerprint import BIN_STARTS, BINS

f32 = np.float32

_CHUNK = 1024  # floats added up in float32 before float64 takes over
_STARTS = np.array(BIN_STARTS, dtype=np.int64)


@njit(fastmath=SUMS)
def _part_exponentials(z, most):
    total = f32(0.0)
    for j in range(len(z)):
        e = exp(z[j] - most)
        z[j] = e
        total += e
    return total


@njit(fastmath=SUMS)
def _part_sum(a):
    total = f32(0.0)
    for j in range(len(a)):
        total += a[j]
    return total


@njit(fastmath=SUMS)
def _part_entropy(a):
    total = f32(0.0)
    for j in range(len(a)):
        total += a[j] * log(max(a[j], f32(1.17549435e-38)))
    return -total


@njit
def exponentials(z, most):
    """z becomes e**(z - most); returns the sum."""
    total = 0.0
    for start in range(0, len(z), _CHUNK):
        total += _part_exponentials(z[start : start + _CHUNK], most)
    return total


@njit
def sum_of(a):
    total = 0.0
    for start in range(0, len(a), _CHUNK):
        total += _part_sum(a[start : start + _CHUNK])
    return total


@njit
def entropy_of(a):
    """-sum a ln a."""
    total = 0.0
    for start in range(0, len(a), _CHUNK):
        total += _part_entropy(a[start : start + _CHUNK])
    return total


@njit
def bin_sums(a, weight, out):
    """``out`` [BINS] becomes the mass at each distance from the last key, times ``weight``; returns their sum."""
    n = len(a)
    mass = 0.0
    for b in range(BINS):
        if _STARTS[b] >= n:
            break
        end = n if b == BINS - 1 else min(_STARTS[b + 1], n)
        part = sum_of(a[n - end : n - _STARTS[b]]) * weight
        out[b] = part
        mass += part
    return mass


@njit
def span_sums(a, weight, bounds, first, out):
    """``out`` [n] becomes the mass in each of ``bounds`` int64 [n, 2], times ``weight``; a[0] is at ``first``."""
    for s in range(len(bounds)):
        low, high = max(bounds[s, 0] - first, 0), min(bounds[s, 1] - first, len(a))
        if low < high:
            out[s] = sum_of(a[low:high]) * weight
