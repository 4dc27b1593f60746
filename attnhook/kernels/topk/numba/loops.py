"""The inner loops of the CPU kernel, compiled by numba.

Each loop runs over contiguous float32 so that LLVM turns it into vector instructions; `row_job`, and
`dot_job` of `dots.py`, are C functions that any number of threads may enter at once: they share work by a counter.
What they are called with is described in `blocks.py`.
"""

# mypy: allow-untyped-defs, allow-untyped-calls, allow-incomplete-defs, allow-untyped-decorators, no-check-untyped-defs
from __future__ import annotations

import math

import numpy as np
from numba import carray, cfunc, njit

from attnhook.kernels.topk.numba.blocks import NEXT_THREAD, NEXT_UNIT, ROW, RowWords, signature
from attnhook.kernels.topk.numba.elementary import EXACT, SUMS, exp, extremes, log, ordered, tanh
from attnhook.kernels.topk.numba.intrinsics import bits_float, fetch_add, pointer
from attnhook.kernels.topk.numba.selection import select
from attnhook.record.fingerprint import BIN_STARTS, BINS

f32, i32 = np.float32, np.int32

_CHUNK = 1024  # floats added up in float32 before float64 takes over
_INFINITY = i32(0x7F800000)
_STARTS = np.array(BIN_STARTS, dtype=np.int64)


@njit(fastmath=EXACT)
def _add_alibi(z, slope):
    for j in range(len(z)):
        z[j] += slope * f32(j - (len(z) - 1))


@njit(fastmath=EXACT)
def _cap(z, softcap):
    for j in range(len(z)):
        z[j] = softcap * tanh(z[j] / softcap)


@njit(fastmath=SUMS)
def _exponentials(z, most):
    """z becomes e**(z - most); returns the sum."""
    total = f32(0.0)
    for j in range(len(z)):
        e = exp(z[j] - most)
        z[j] = e
        total += e
    return total


@njit(fastmath=EXACT)
def _set_scaled(a, e, weight):
    for j in range(len(a)):
        a[j] = e[j] * weight


@njit(fastmath=EXACT)
def _add_scaled(a, e, weight):
    for j in range(len(a)):
        a[j] += e[j] * weight


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
def _sum(a):
    total = 0.0
    for start in range(0, len(a), _CHUNK):
        total += _part_sum(a[start : start + _CHUNK])
    return total


@njit
def _entropy(a):
    total = 0.0
    for start in range(0, len(a), _CHUNK):
        total += _part_entropy(a[start : start + _CHUNK])
    return total


@njit(error_model="numpy")
def _average(z, bits, offset, stride, heads, mask, sinks, slopes, softcap, a):
    """a becomes the mean attention of one row's selected heads; False where a logit is not finite."""
    n = len(a)
    selected = 0
    for h in range(heads):
        selected += mask[h]
    first = True
    for h in range(heads):
        if not mask[h]:
            continue
        here = offset + h * stride
        row = z[here : here + n]
        if len(slopes):
            _add_alibi(row, slopes[h])
        low, high = extremes(bits[here : here + n])
        if high >= _INFINITY or low <= ordered(i32(-0x800000)):
            return False
        most = bits_float(ordered(high))
        if softcap > 0:
            _cap(row, softcap)
            most = softcap * tanh(most / softcap)
        if len(sinks):
            most = max(most, sinks[h])
        total = 0.0
        for start in range(0, n, _CHUNK):
            total += _exponentials(row[start : start + _CHUNK], most)
        if len(sinks):
            total += math.exp(sinks[h] - most)
        weight = f32(1.0 / (total * selected))
        if first:
            _set_scaled(a, row, weight)
        else:
            _add_scaled(a, row, weight)
        first = False
    return True


@cfunc(signature(RowWords, ROW), cache=True, error_model="numpy")
def row_job(argument):
    """Softmax, mean over heads, features and selection of rows whose logits are computed."""
    w = carray(argument, 1)[0].words
    counter = carray(argument, 1).ctypes.data
    rows, heads, top_k, spans, lane_count = w.rows, w.heads, w.top_k, w.span_count, w.lanes
    z = carray(pointer(w.logits), w.logit_count, np.float32)
    bits = carray(pointer(w.logits), w.logit_count, np.int32)
    table = carray(pointer(w.table), rows, ROW)
    positions = carray(pointer(w.positions), (w.results, top_k), np.int32)
    scores = carray(pointer(w.scores), (w.results, top_k), np.float32)
    histogram = carray(pointer(w.histogram), (w.results, BINS), np.float32)
    entropy = carray(pointer(w.entropy), w.results, np.float32)
    span_mass = carray(pointer(w.span_mass), (w.results, spans), np.float32)
    bounds = carray(pointer(w.spans), (w.requests, spans, 2), np.int64)
    masks = carray(pointer(w.masks), (w.requests, heads), np.uint8)
    report_from = carray(pointer(w.report_from), w.requests, np.int64)
    sinks = carray(pointer(w.sinks), (w.layers, w.sink_heads), np.float32)
    slopes = carray(pointer(w.slopes), (w.layers, w.slope_heads), np.float32)
    softcaps = carray(pointer(w.softcaps), w.layers, np.float32)
    width, mine = w.scratch_keys, w.scratch + fetch_add(counter + NEXT_THREAD) * w.scratch_bytes
    scratch = carray(pointer(mine), width, np.float32)
    kept = carray(pointer(mine), width + 2 * top_k + lane_count, np.int32)
    values, where = kept[width : width + top_k], kept[width + top_k : width + 2 * top_k]
    lanes = kept[width + 2 * top_k :]
    found = carray(pointer(mine + 4 * len(kept)), 2 * lane_count, np.int64)
    dense_width = w.dense_width
    dense = carray(pointer(w.dense), (w.results, dense_width), np.float32)
    while True:
        unit = fetch_add(counter + NEXT_UNIT)
        if unit >= rows:
            break
        row = table[unit]
        n, first, request, layer, t = row.keys, row.first, row.request, row.layer, row.result
        a = scratch[:n]
        if not _average(
            z, bits, row.offset, row.stride, heads, masks[request], sinks[layer], slopes[layer], softcaps[layer], a
        ):
            dense[t, :] = np.nan
            entropy[t] = np.nan
            histogram[t, :] = np.nan
            span_mass[t, :] = np.nan
            continue
        if dense_width:
            dense[t, first : first + n] = a
            continue
        mass = 0.0
        for b in range(BINS):
            if _STARTS[b] >= n:
                break
            end = n if b == BINS - 1 else min(_STARTS[b + 1], n)
            part = _sum(a[n - end : n - _STARTS[b]])
            histogram[t, b] = part
            mass += part
        for s in range(spans):
            low, high = max(bounds[request, s, 0] - first, 0), min(bounds[request, s, 1] - first, n)
            if low < high:
                span_mass[t, s] = _sum(a[low:high])
        if n > 1:
            total = _entropy(a)
            if len(sinks[layer]):  # H(a / S) = H(a) / S + ln S; a sink that takes everything leaves 0
                total = total / mass + math.log(mass) if mass > 0 else 0.0
            entropy[t] = total / math.log(n)
        start = min(max(report_from[request] - first, 0), n)
        size = select(kept[:n], start, top_k, values, where, lanes, found)
        for j in range(size):
            positions[t, j] = first + where[j]
            scores[t, j] = bits_float(values[j])
