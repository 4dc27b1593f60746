"""What is wanted of each query head by itself, for numba's loops."""

# mypy: allow-untyped-defs, allow-untyped-calls, allow-incomplete-defs, allow-untyped-decorators, no-check-untyped-defs
from __future__ import annotations

import math

from numba import njit

from attnhook.kernels.topk.numba.intrinsics import bits_float
from attnhook.kernels.topk.numba.selection import select
from attnhook.kernels.topk.numba.sums import bin_sums, entropy_of, span_sums


@njit(error_model="numpy")
def reduce_head(h, e, bits, weight, sink, bounds, first, start, results, best):
    """One head's results from its exponentials ``e``, whose bits are ``bits``; times ``weight`` they add up to 1.

    ``sink``: a learned sink has taken some. Keys from place ``start`` on compete in the selection, whose memory is
    ``best``. Each of the results is [heads, ...], or has no heads where it is not wanted.
    """
    n = len(e)
    positions, scores, histogram, entropy, span_mass = results
    if h < len(span_mass):
        span_sums(e, weight, bounds, first, span_mass[h])
    if h < len(histogram):
        mass = bin_sums(e, weight, histogram[h])
        if n > 1:
            # of p = e w: -sum p ln p = -w sum e ln e - ln w sum p
            total = weight * entropy_of(e) - math.log(weight) * mass
            if sink:  # H(p / S) = H(p) / S + ln S; a sink that takes everything leaves 0
                total = total / mass + math.log(mass) if mass > 0 else 0.0
            entropy[h] = total / math.log(n)
    if h < len(positions):
        values, where, lanes, found = best
        size = select(bits, start, positions.shape[1], values, where, lanes, found)
        for j in range(size):
            positions[h, j] = first + where[j]
            scores[h, j] = bits_float(values[j]) * weight
