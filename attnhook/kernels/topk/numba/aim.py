"""What changes from one decoding pass to the next in the jobs of the CPU kernel, compiled by numba.

Some twenty numpy calls do the same; between two passes a model leaves nothing of them in the processor's caches, and
then each costs more than all that it does. `aim_job` is a C function as `loops.py` describes them, for one thread.
"""

# mypy: allow-untyped-defs, allow-untyped-calls, allow-untyped-decorators
from __future__ import annotations

import numpy as np
from numba import carray, cfunc, types

from attnhook.kernels.topk.numba.dots import PART
from attnhook.kernels.topk.numba.intrinsics import pointer

# places in the words: what a call brings, and what it finds
POSITIONS, WINDOW, SEEN, FIRST_SEEN, PAGES_FROM, PAGE_STRIDE = range(7, 13)
SIZE, PARTS, LONGEST = range(18, 21)
WORDS = 19  # after the two counters


@cfunc(types.void(types.CPointer(types.int64)), cache=True, error_model="numpy")
def aim_job(words):
    """Clear the results and, where rows are given, write their places and pages.

    Rows are given by positions int64 [T] and one window, or by how many keys each sees and from which on. Found:
    logits of one layer, units of work of the longest row, keys of the longest row.
    """
    w = carray(words, 21)
    rows, layers, heads, requests, columns = w[2], w[3], w[4], w[5], w[6]
    results = carray(pointer(w[15]), w[16], np.float32)
    results[:] = 0
    carray(pointer(w[15]), w[17], np.int32)[:] = -1  # the positions come first
    if w[7] == 0 and w[9] == 0:
        return
    positions, window = carray(pointer(w[7]), rows, np.int64), w[8]
    seen, firsts = carray(pointer(w[9]), rows, np.int64), carray(pointer(w[10]), rows, np.int64)
    table = carray(pointer(w[13]), (7, layers, rows), np.int64)
    size = longest = parts = 0
    for row in range(rows):
        if w[9]:
            n, first = seen[row], firsts[row]
        else:
            n = positions[row] + 1
            if window >= 0:
                n = min(n, window)
            first = positions[row] + 1 - n
        for layer in range(layers):
            table[0, layer, row] = size
            table[1, layer, row] = table[2, layer, row] = n
            table[3, layer, row] = first
        size += n * heads
        longest = max(longest, n)
        parts = max(parts, (first + n - 1) // PART - first // PART + 1)
    for layer in range(1, layers):
        for row in range(rows):
            table[0, layer, row] += layer * size
    w[18], w[19], w[20] = size, parts, longest
    if w[11]:
        stride = w[12]
        given = carray(pointer(w[11]), requests * stride, np.int32)
        pages = carray(pointer(w[14]), (requests, columns), np.int64)
        for request in range(requests):
            for column in range(columns):
                pages[request, column] = given[request * stride + column]
