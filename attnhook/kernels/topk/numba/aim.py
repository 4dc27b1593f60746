"""What changes from one decoding pass to the next in the jobs of the CPU kernel, compiled by numba.

Some twenty numpy calls do the same; between two passes a model leaves nothing of them in the processor's caches, and
then each costs more than all that it does. `aim_job` is a C function as `loops.py` describes them, for one thread.
"""

# mypy: allow-untyped-defs, allow-untyped-calls, allow-untyped-decorators
from __future__ import annotations

import numpy as np
from numba import carray, cfunc

from attnhook.kernels.topk.numba.blocks import PART, ROW, AimWords, signature
from attnhook.kernels.topk.numba.intrinsics import pointer


@cfunc(signature(AimWords, ROW), cache=True, error_model="numpy")
def aim_job(argument):
    """Clear the results and, where rows are given, write their places and pages.

    Rows are given by positions and one window, or by how many keys each sees and from which on.
    """
    w = carray(argument, 1)[0].words
    rows, layers, heads = w.rows, w.layers, w.heads
    carray(pointer(w.found), w.found_count, np.float32)[:] = 0
    carray(pointer(w.found), w.position_count, np.int32)[:] = -1
    if w.positions == 0 and w.seen == 0:
        return
    given, window = w.seen != 0, w.window
    positions = carray(pointer(w.positions), rows, np.int64)
    seen, firsts = carray(pointer(w.seen), rows, np.int64), carray(pointer(w.first_seen), rows, np.int64)
    table = carray(pointer(w.table), (layers, rows), ROW)
    size = longest = parts = 0
    for number in range(rows):
        if given:
            n, first = seen[number], firsts[number]
        else:
            n = positions[number] + 1
            if window >= 0:
                n = min(n, window)
            first = positions[number] + 1 - n
        for layer in range(layers):
            row = table[layer, number]
            row.offset = size
            row.stride = n
            row.keys = n
            row.first = first
        size += n * heads
        longest = max(longest, n)
        parts = max(parts, (first + n - 1) // PART - first // PART + 1)
    for layer in range(1, layers):
        for number in range(rows):
            table[layer, number].offset += layer * size
    w.size, w.parts, w.longest = size, parts, longest
    if w.pages_from:
        requests, columns, stride = w.requests, w.columns, w.page_stride
        there = carray(pointer(w.pages_from), requests * stride, np.int32)
        pages = carray(pointer(w.pages), (requests, columns), np.int64)
        for request in range(requests):
            for column in range(columns):
                pages[request, column] = there[request * stride + column]
