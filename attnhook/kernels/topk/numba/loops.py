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
from attnhook.kernels.topk.numba.elementary import EXACT, extremes, ordered, tanh
from attnhook.kernels.topk.numba.heads import reduce_head
from attnhook.kernels.topk.numba.intrinsics import bits_float, fetch_add, pointer
from attnhook.kernels.topk.numba.selection import select
from attnhook.kernels.topk.numba.sums import bin_sums, entropy_of, exponentials, span_sums
from attnhook.record.fingerprint import BINS

f32, i32 = np.float32, np.int32

_INFINITY = i32(0x7F800000)


@njit(fastmath=EXACT)
def _add_alibi(z, slope):
    for j in range(len(z)):
        z[j] += slope * f32(j - (len(z) - 1))


@njit(fastmath=EXACT)
def _cap(z, softcap):
    for j in range(len(z)):
        z[j] = softcap * tanh(z[j] / softcap)


@njit(fastmath=EXACT)
def _set_scaled(a, e, weight):
    for j in range(len(a)):
        a[j] = e[j] * weight


@njit(fastmath=EXACT)
def _add_scaled(a, e, weight):
    for j in range(len(a)):
        a[j] += e[j] * weight


@njit(error_model="numpy")
def _average(
    z, bits, offset, stride, heads, mask, sinks, slopes, softcap, a, every, place, results, lse, best, sums, group_heads
):  # fmt: skip
    """a becomes the mean attention of one row's selected heads; False where a logit is not finite.

    ``every``: each head's own results are wanted too; see `reduce_head`. Where ``group_heads`` is not 0, the mean over
    so many heads is added to those of each kv head, from a place on: ``sums``.
    """
    n = len(a)
    bounds, position, start = place
    by_key, at = sums
    selected = 0
    for h in range(heads):
        selected += mask[h]
    first = True
    for h in range(heads):
        if not (mask[h] or every):
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
        total = exponentials(row, most)
        if len(sinks):
            total += math.exp(sinks[h] - most)
        if every:
            if h < len(lse):
                lse[h] = most + math.log(total)
            own = bits[here : here + n]
            reduce_head(h, row, own, 1.0 / total, len(sinks) > 0, bounds, position, start, results, best)
            if group_heads:
                _add_scaled(by_key[h // group_heads][at : at + n], row, f32(1.0 / (total * group_heads)))
            if not mask[h]:
                continue
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
    tops, prints, masses, norms = w.head_tops, w.head_prints, w.head_masses, w.head_norms
    key_groups, group_heads = w.key_groups, w.group_heads
    every = tops + prints + masses + norms + group_heads > 0
    head_positions = carray(pointer(w.head_positions), (w.results, tops, w.head_top_k), np.int32)
    head_scores = carray(pointer(w.head_scores), (w.results, tops, w.head_top_k), np.float32)
    head_histogram = carray(pointer(w.head_histogram), (w.results, prints, BINS), np.float32)
    head_entropy = carray(pointer(w.head_entropy), (w.results, prints), np.float32)
    head_span_mass = carray(pointer(w.head_span_mass), (w.results, masses, spans), np.float32)
    head_lse = carray(pointer(w.head_lse), (w.results, norms), np.float32)
    bounds = carray(pointer(w.spans), (w.requests, spans, 2), np.int64)
    masks = carray(pointer(w.masks), (w.requests, heads), np.uint8)
    report_from = carray(pointer(w.report_from), w.requests, np.int64)
    sinks = carray(pointer(w.sinks), (w.layers, w.sink_heads), np.float32)
    slopes = carray(pointer(w.slopes), (w.layers, w.slope_heads), np.float32)
    softcaps = carray(pointer(w.softcaps), w.layers, np.float32)
    width, mine = w.scratch_keys, w.scratch + fetch_add(counter + NEXT_THREAD) * w.scratch_bytes
    scratch = carray(pointer(mine), width, np.float32)
    most = max(top_k, w.head_top_k)
    kept = carray(pointer(mine), width + 2 * most + lane_count, np.int32)
    values, where = kept[width : width + most], kept[width + most : width + 2 * most]
    lanes = kept[width + 2 * most :]
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
        start = min(max(report_from[request] - first, 0), n)
        by_key = carray(pointer(row.key_mass), (key_groups if row.key_mass else 0, row.key_stride), np.float32)
        at = row.key_first
        if not _average(
            z, bits, row.offset, row.stride, heads, masks[request], sinks[layer], slopes[layer], softcaps[layer], a,
            every, (bounds[request], first, start),
            (head_positions[t], head_scores[t], head_histogram[t], head_entropy[t], head_span_mass[t]), head_lse[t],
            (values, where, lanes, found), (by_key, at), group_heads,
        ):  # fmt: skip
            by_key[:, at : at + n] = np.nan
            dense[t, :] = np.nan
            entropy[t] = np.nan
            histogram[t, :] = np.nan
            span_mass[t, :] = np.nan
            continue
        if dense_width:
            dense[t, first : first + n] = a
            continue
        if len(by_key) and not group_heads:
            _add_scaled(by_key[0][at : at + n], a, f32(1.0))
        mass = bin_sums(a, 1.0, histogram[t])
        span_sums(a, 1.0, bounds[request], first, span_mass[t])
        if n > 1:
            total = entropy_of(a)
            if len(sinks[layer]):  # H(a / S) = H(a) / S + ln S; a sink that takes everything leaves 0
                total = total / mass + math.log(mass) if mass > 0 else 0.0
            entropy[t] = total / math.log(n)
        size = select(kept[:n], start, top_k, values, where, lanes, found)
        for j in range(size):
            positions[t, j] = first + where[j]
            scores[t, j] = bits_float(values[j])
