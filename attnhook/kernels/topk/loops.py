"""The inner loops of the CPU kernel, compiled by numba.

Each loop runs over contiguous float32 so that LLVM turns it into vector instructions; `row_job`, and
`dot_job` of `dots.py`, are C functions that any number of threads may enter at once: they share work by a counter.
A job's one argument is an array of int64 words: two counters, then sizes and addresses as `jobs.py`
writes them. Rows come as a table of int64 columns, described there too.

Exponential, logarithm and tanh follow Cephes (S. L. Moshier, netlib.org/cephes: expf, logf, tanhf):
relative error below 2e-7.
"""

from __future__ import annotations

import math

import numpy as np
from numba import carray, cfunc, njit, types

from attnhook.kernels.topk.intrinsics import bits_float, fetch_add, float_bits, pointer
from attnhook.record.fingerprint import BIN_STARTS, BINS

f32, i32 = np.float32, np.int32

_EXACT = {"contract"}  # fused multiply-add, no other liberty
_SUMS = {"contract", "reassoc", "nsz"}  # sums in any order, which is what vectors need
_CHUNK = 1024  # floats added up in float32 before float64 takes over
_TILE = 16  # keys that one comparison may pass over in the selection
_INFINITY = i32(0x7F800000)
_STARTS = np.array(BIN_STARTS, dtype=np.int64)


@njit(cache=True, fastmath=_EXACT)
def _exp(x):
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


@njit(cache=True, fastmath=_EXACT)
def _log(x):
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


@njit(cache=True, fastmath=_EXACT)
def _tanh(x):
    magnitude = abs(x)
    square = x * x
    p = f32(-5.70498872745e-3)
    p = p * square + f32(2.06390887954e-2)
    p = p * square + f32(-5.37397155531e-2)
    p = p * square + f32(1.33314422036e-1)
    p = p * square + f32(-3.33332819422e-1)
    e = _exp(f32(-2.0) * magnitude)
    far = (f32(1.0) - e) / (f32(1.0) + e)
    return p * square * x + x if magnitude < f32(0.625) else (far if x > f32(0.0) else -far)


@njit(cache=True)
def _ordered(bits):
    """Maps float bits to integers of the same order, and back."""
    return bits ^ ((bits >> i32(31)) & i32(0x7FFFFFFF))


@njit(cache=True)
def _extremes(bits):
    """Smallest and largest of floats, as ordered integers: NaN counts as beyond infinity."""
    low, high = i32(0x7FFFFFFF), i32(-0x80000000)
    for j in range(len(bits)):
        v = bits[j] ^ ((bits[j] >> i32(31)) & i32(0x7FFFFFFF))
        low, high = min(low, v), max(high, v)
    return low, high


@njit(cache=True, fastmath=_EXACT)
def _add_alibi(z, slope):
    for j in range(len(z)):
        z[j] += slope * f32(j - (len(z) - 1))


@njit(cache=True, fastmath=_EXACT)
def _cap(z, softcap):
    for j in range(len(z)):
        z[j] = softcap * _tanh(z[j] / softcap)


@njit(cache=True, fastmath=_SUMS)
def _exponentials(z, most):
    """z becomes e**(z - most); returns the sum."""
    total = f32(0.0)
    for j in range(len(z)):
        e = _exp(z[j] - most)
        z[j] = e
        total += e
    return total


@njit(cache=True, fastmath=_EXACT)
def _set_scaled(a, e, weight):
    for j in range(len(a)):
        a[j] = e[j] * weight


@njit(cache=True, fastmath=_EXACT)
def _add_scaled(a, e, weight):
    for j in range(len(a)):
        a[j] += e[j] * weight


@njit(cache=True, fastmath=_SUMS)
def _part_sum(a):
    total = f32(0.0)
    for j in range(len(a)):
        total += a[j]
    return total


@njit(cache=True, fastmath=_SUMS)
def _part_entropy(a):
    total = f32(0.0)
    for j in range(len(a)):
        total += a[j] * _log(max(a[j], f32(1.17549435e-38)))
    return -total


@njit(cache=True)
def _sum(a):
    total = 0.0
    for start in range(0, len(a), _CHUNK):
        total += _part_sum(a[start : start + _CHUNK])
    return total


@njit(cache=True)
def _entropy(a):
    total = 0.0
    for start in range(0, len(a), _CHUNK):
        total += _part_entropy(a[start : start + _CHUNK])
    return total


@njit(cache=True)
def _sift(values, where, i, size):
    """Restore the heap whose root is the worst kept key: smallest value, then highest position."""
    v, p = values[i], where[i]
    while True:
        child = 2 * i + 1
        if child >= size:
            break
        other = child + 1
        if other < size and (
            values[other] < values[child] or (values[other] == values[child] and where[other] > where[child])
        ):
            child = other
        if values[child] > v or (values[child] == v and where[child] < p):
            break
        values[i], where[i] = values[child], where[child]
        i = child
    values[i], where[i] = v, p


@njit(cache=True)
def _tile_most(bits, start):
    most = i32(-1)
    for j in range(start, start + _TILE):
        most = max(most, bits[j])
    return most


@njit(cache=True)
def _lanes_most(bits, lanes):
    """lanes[j] becomes the largest of bits[j], bits[j + len(lanes)], ..."""
    width = len(lanes)
    lanes[:] = bits[:width]
    for start in range(width, len(bits), width):
        for j in range(min(width, len(bits) - start)):
            lanes[j] = max(lanes[j], bits[start + j])


@njit(cache=True)
def _count_from(bits, least):
    count = i32(0)
    for j in range(len(bits)):
        count += i32(bits[j] >= least)
    return count


@njit(cache=True)
def _bound(lanes, top_k):
    """A value, as bits, that at least and about ``top_k`` of the lanes reach."""
    low, high = _extremes(lanes)
    high += 1
    while high - low > 1:
        middle = low + (high - low) // 2
        count = _count_from(lanes, i32(middle))
        if count < top_k:
            high = middle
            continue
        low = middle
        if count <= top_k + top_k // 8:
            break
    return i32(low)


@njit(cache=True)
def _candidates(bits, start, least, found):
    """Collect what reaches ``least`` of ``bits[start:]`` as sortable integers; -1 where there is no room."""
    count, j, end = 0, start, len(bits)
    while j < end:
        stop = min(j + _TILE, end)
        if stop - j < _TILE or _tile_most(bits, j) >= least:
            if count + _TILE > len(found):
                return -1
            for s in range(j, stop):
                found[count] = (np.int64(bits[s]) << 32) | (0x7FFFFFFF - s)
                count += np.int64(bits[s] >= least)
        j = stop
    return count


@njit(cache=True)
def _select(bits, start, top_k, values, where, lanes, found):
    """Best k of ``bits[start:]`` (floats >= 0 order like their bits), ties to the lower index, in order.

    k lanes whose largest values reach a bound show that the k best reach it too; it leaves few to sort.
    """
    if len(bits) - start < 2 * len(lanes):
        return _select_by_heap(bits, start, top_k, values, where)
    _lanes_most(bits[start:], lanes)
    count = _candidates(bits, start, _bound(lanes, top_k), found)
    if count < 0:  # more equals than room
        return _select_by_heap(bits, start, top_k, values, where)
    for i in range(1, count):  # descending
        key = found[i]
        j = i - 1
        while j >= 0 and found[j] < key:
            found[j + 1] = found[j]
            j -= 1
        found[j + 1] = key
    for i in range(top_k):
        values[i] = i32(found[i] >> 32)
        where[i] = i32(0x7FFFFFFF - (found[i] & 0x7FFFFFFF))
    return top_k


@njit(cache=True)
def _select_by_heap(bits, start, top_k, values, where):
    """`_select` for few or equal values; starts from the last k, where attention is mostly high."""
    size = min(top_k, len(bits) - start)
    rest = len(bits) - size
    for t in range(size):
        values[t], where[t] = bits[rest + t], rest + t
    for t in range(size // 2 - 1, -1, -1):
        _sift(values, where, t, size)
    j = start
    while j < rest:
        end = min(j + _TILE, rest)
        if end - j < _TILE or _tile_most(bits, j) >= values[0]:
            for s in range(j, end):
                if bits[s] > values[0] or (bits[s] == values[0] and s < where[0]):
                    values[0], where[0] = bits[s], s
                    _sift(values, where, 0, size)
        j = end
    for last in range(size - 1, 0, -1):
        v, p = values[0], where[0]
        values[0], where[0] = values[last], where[last]
        values[last], where[last] = v, p
        _sift(values, where, 0, last)
    return size


@njit(cache=True, error_model="numpy")
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
        low, high = _extremes(bits[here : here + n])
        if high >= _INFINITY or low <= _ordered(i32(-0x800000)):
            return False
        most = bits_float(_ordered(high))
        if softcap > 0:
            _cap(row, softcap)
            most = softcap * _tanh(most / softcap)
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


@cfunc(types.void(types.CPointer(types.int64)), cache=True, error_model="numpy")
def row_job(words):
    """Softmax, mean over heads, features and selection of rows whose logits are computed."""
    w = carray(words, 32)
    counters = carray(words, 1).ctypes.data
    rows, heads, top_k, spans, requests, layers, results = w[2], w[3], w[4], w[5], w[6], w[7], w[8]
    z = carray(pointer(w[9]), w[10], np.float32)
    bits = carray(pointer(w[9]), w[10], np.int32)
    table = carray(pointer(w[11]), (7, rows), np.int64)
    positions = carray(pointer(w[12]), (results, top_k), np.int32)
    scores = carray(pointer(w[13]), (results, top_k), np.float32)
    histogram = carray(pointer(w[14]), (results, BINS), np.float32)
    entropy = carray(pointer(w[15]), results, np.float32)
    span_mass = carray(pointer(w[16]), (results, spans), np.float32)
    bounds = carray(pointer(w[17]), (requests, spans, 2), np.int64)
    masks = carray(pointer(w[18]), (requests, heads), np.uint8)
    report_from = carray(pointer(w[19]), requests, np.int64)
    # [L, Hq], or no head where no layer has any
    sinks = carray(pointer(w[20]), (layers, w[21]), np.float32)
    slopes = carray(pointer(w[22]), (layers, w[23]), np.float32)
    softcaps = carray(pointer(w[24]), layers, np.float32)
    mine, width, lane_count = w[25] + fetch_add(counters + 8) * w[26], w[27], w[28]
    scratch = carray(pointer(mine), width, np.float32)
    kept = carray(pointer(mine), width + 2 * top_k + lane_count, np.int32)
    values, where = kept[width : width + top_k], kept[width + top_k : width + 2 * top_k]
    lanes = kept[width + 2 * top_k :]
    found = carray(pointer(mine + 4 * len(kept)), 2 * lane_count, np.int64)
    dense_width = w[30]  # 0: features and selection are wanted; else the attention itself
    dense = carray(pointer(w[29]), (results, dense_width), np.float32)
    while True:
        row = fetch_add(counters)
        if row >= rows:
            break
        offset, stride, n, first = table[0, row], table[1, row], table[2, row], table[3, row]
        request, layer, t = table[4, row], table[5, row], table[6, row]
        a = scratch[:n]
        if not _average(
            z, bits, offset, stride, heads, masks[request], sinks[layer], slopes[layer], softcaps[layer], a
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
        size = _select(kept[:n], start, top_k, values, where, lanes, found)
        for j in range(size):
            positions[t, j] = first + where[j]
            scores[t, j] = bits_float(values[j])
