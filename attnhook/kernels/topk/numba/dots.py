"""Logits of the CPU kernel, compiled by numba: queries times keys that are read where the cache has them.

`dot_job` is a C function as `loops.py` describes them.
"""

# mypy: allow-untyped-defs, allow-untyped-calls, allow-incomplete-defs, allow-untyped-decorators, no-check-untyped-defs
from __future__ import annotations

import numpy as np
from numba import carray, cfunc, njit, types
from numba.extending import overload

from attnhook.kernels.topk.numba.blocks import NEXT_UNIT, PART, POOL, ROW, DotWords, signature
from attnhook.kernels.topk.numba.elementary import EXACT, SUMS
from attnhook.kernels.topk.numba.intrinsics import bits_float, fetch_add, pointer
from attnhook.kernels.topk.numba.vectors import (
    LANES,
    TOGETHER,
    queries_times_columns,
    queries_times_keys,
    queries_times_own_keys,
)

f32, i32 = np.float32, np.int32

_NEAR = 1 << 12  # floats of a row's queries that leave room for keys in a core's first cache


def _widen(x):
    raise NotImplementedError


@overload(_widen, inline="always")
def _widen_compiled(x):
    """float32 of a stored key element: float32 itself, or bfloat16 as its bits."""
    if x == types.float32:
        return lambda x: x
    return lambda x: bits_float(i32(x) << i32(16))


@njit(fastmath=SUMS)
def _dot(q, k):
    total = f32(0.0)
    for d in range(len(q)):
        total += q[d] * _widen(k[d])
    return total


@njit(fastmath=EXACT)
def _add_product(z, k, factor):
    for j in range(len(z)):
        z[j] += factor * _widen(k[j])


@njit(fastmath=EXACT)
def _scale(z, factor):
    for j in range(len(z)):
        z[j] *= factor


@njit
def _dots(k, slot_stride, dim_stride, slots, q, z, offset, stride):
    """Logits of one kv head's queries q [G, D] over consecutive slots."""
    group, dim = q.shape
    if dim_stride == 1:
        for j in range(slots):
            key = k[j * slot_stride : j * slot_stride + dim]
            for g in range(group):
                z[offset + g * stride + j] = _dot(q[g], key)
    else:  # slots lie side by side
        for g in range(group):
            row = z[offset + g * stride : offset + g * stride + slots]
            row[:] = 0
            for d in range(dim):
                _add_product(row, k[d * dim_stride : d * dim_stride + slots], q[g, d])


@njit
def _columns(size, q, q_step, group, k, k_step, dim, out, out_step):
    """Products of one kv head's queries and 16 keys that lie side by side; addresses and bytes."""
    g = 0
    while g < group:
        count = min(group - g, 4)
        queries_times_columns(size, count, q + g * q_step, q_step, k, k_step, dim, out + g * out_step, out_step)
        g += count


@cfunc(signature(DotWords, ROW, POOL), cache=True, error_model="numpy")
def dot_job(argument):
    """Logits of rows over paged keys read in place; a unit of work is some keys of one row, for all heads."""
    w = carray(argument, 1)[0].words
    counter = carray(argument, 1).ctypes.data
    rows, heads, kv_heads, dim, parts, z_at = w.rows, w.heads, w.kv_heads, w.dim, w.parts, w.logits
    z = carray(pointer(z_at), w.logit_count, np.float32)
    table = carray(pointer(w.table), rows, ROW)
    q = carray(pointer(w.queries), (rows, heads, dim), np.float32)
    pools = carray(pointer(w.pools), w.layers, POOL)
    scales = carray(pointer(w.scales), (w.layers, kv_heads), np.float32)
    group = heads // kv_heads
    while True:
        unit = fetch_add(counter + NEXT_UNIT)
        if unit >= rows * parts:
            break
        number, part = unit // parts, unit % parts
        row = table[number]
        offset, stride, n, first, request = row.offset, row.stride, row.keys, row.first, row.request
        # parts begin at whole multiples, which are where pages begin
        start = max(first // PART * PART + part * PART - first, 0)
        stop = min((first // PART + part + 1) * PART - first, n)
        if start >= stop:
            continue
        pool = pools[row.layer]
        cache, size, page_size, columns = pool.cache, pool.element_size, pool.page_size, pool.columns
        page_stride, slot_stride = pool.page_stride, pool.slot_stride
        head_stride, dim_stride = pool.head_stride, pool.dim_stride
        pages = carray(pointer(pool.pages), (request + 1) * columns, np.int64)[request * columns :]
        own = q[number].ctypes.data
        vectors = dim_stride == 1 and dim % LANES == 0
        done = start
        while done < stop:
            slot = (first + done) % page_size
            slots = min(page_size - slot, stop - done)
            page = pages[(first + done) // page_size]
            here = cache + size * (page * page_stride + slot * slot_stride)
            at = offset + done
            if vectors:
                # in the order of memory, if the queries that every key meets stay in the core's cache meanwhile
                by_slot = head_stride < slot_stride and heads * dim <= _NEAR
                in_fours = kv_heads // 4 * 4 if group == 1 else 0  # heads whose one query meets its own keys
                step = min(TOGETHER, slots) if by_slot else slots
                for s in range(0, slots, step):
                    some = min(step, slots - s)
                    for h in range(0, in_fours, 4):
                        queries_times_own_keys(
                            size, own + 4 * h * dim, 4 * dim,
                            here + size * (s * slot_stride + h * head_stride), size * slot_stride, size * head_stride,
                            some, dim // LANES, z_at + 4 * (at + h * stride + s), 4 * stride,
                        )  # fmt: skip
                    for h in range(in_fours, kv_heads):
                        k = here + size * (s * slot_stride + h * head_stride)
                        for g in range(h * group, (h + 1) * group, 4):
                            queries_times_keys(
                                size, min((h + 1) * group - g, 4), own + 4 * g * dim, 4 * dim,
                                k, size * slot_stride, some, dim // LANES,
                                z_at + 4 * (at + g * stride + s), 4 * stride,
                            )  # fmt: skip
            else:
                whole = slots // LANES * LANES if slot_stride == 1 and dim_stride != 1 else 0
                for h in range(kv_heads):
                    k, to = here + size * h * head_stride, at + h * group * stride
                    queries = q[number, h * group : (h + 1) * group]
                    for j in range(0, whole, LANES):
                        _columns(
                            size, own + 4 * h * group * dim, 4 * dim, group, k + size * j, size * dim_stride, dim,
                            z_at + 4 * (to + j), 4 * stride,
                        )  # fmt: skip
                    left = slots - whole
                    if left == 0:
                        continue
                    k, to = k + size * slot_stride * whole, to + whole
                    extent = (left - 1) * slot_stride + (dim - 1) * dim_stride + 1
                    steps = slot_stride, dim_stride, left
                    if size == 2:
                        _dots(carray(pointer(k), extent, np.uint16), *steps, queries, z, to, stride)
                    else:
                        _dots(carray(pointer(k), extent, np.float32), *steps, queries, z, to, stride)
            done += slots
        for head in range(heads):
            at = offset + head * stride
            _scale(z[at + start : at + stop], scales[row.layer, head // group])
