"""The exact best k of a row's attention, for numba's loops."""

# mypy: allow-untyped-defs, allow-untyped-calls, allow-incomplete-defs, allow-untyped-decorators, no-check-untyped-defs
from __future__ import annotations

import numpy as np
from numba import njit

from attnhook.kernels.topk.numba.elementary import extremes

i32 = np.int32

_TILE = 16  # keys that one comparison may pass over


@njit
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


@njit
def _tile_most(bits, start):
    most = i32(-1)
    for j in range(start, start + _TILE):
        most = max(most, bits[j])
    return most


@njit
def _lanes_most(bits, lanes):
    """lanes[j] becomes the largest of bits[j], bits[j + len(lanes)], ..."""
    width = len(lanes)
    lanes[:] = bits[:width]
    for start in range(width, len(bits), width):
        for j in range(min(width, len(bits) - start)):
            lanes[j] = max(lanes[j], bits[start + j])


@njit
def _count_from(bits, least):
    count = i32(0)
    for j in range(len(bits)):
        count += i32(bits[j] >= least)
    return count


@njit
def _bound(lanes, top_k):
    """A value, as bits, that at least and about ``top_k`` of the lanes reach."""
    low, high = extremes(lanes)
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


@njit
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


@njit
def select(bits, start, top_k, values, where, lanes, found):
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


@njit
def _select_by_heap(bits, start, top_k, values, where):
    """`select` for few or equal values; starts from the last k, where attention is mostly high."""
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
