"""The Triton kernel that adds the attention of rows up by key.

A program has some keys of one slot, and adds up the rows of that slot in their order: no two programs write to one
place, and the sums depend on no scheduling.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
from __future__ import annotations

import triton
import triton.language as tl

from attnhook.kernels.topk.triton.rows import extent

BLOCK = 128  # keys of a program


@triton.jit(do_not_specialize=["window", "requests", "max_keys", "rows", "heads", "group", "first_group", "keys"])
def by_key_kernel(
    row_request, row_position, window_rows, window, requests, max_keys,
    p, slot, key_mass, rows, heads, group, first_group, groups, keys, width,
    UNIT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Add the mean over each ``group`` of heads of p [rows, heads, width] to key_mass [slots, groups, keys]."""
    mine, own, block = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    s = block * BLOCK + tl.arange(0, BLOCK)
    total = tl.full([BLOCK], 0, tl.float32)
    for row in range(0, rows):
        if tl.load(slot + row) == mine:
            _, first, base, end, _ = extent(
                row, row_request, row_position, window_rows, window, requests, max_keys, UNIT
            )
            visible = (s >= first) & (s < end)
            at = p + (tl.cast(row, tl.int64) * heads + own * group) * width + s - base
            for _h in range(0, group):
                total += tl.load(at, mask=visible, other=0)
                at += width
    out = key_mass + (tl.cast(mine, tl.int64) * groups + first_group + own) * keys + s
    there = s < keys
    tl.store(out, tl.load(out, mask=there, other=0) + total / group, mask=there)
