"""Triton kernels from keys to head-averaged attention; `kernel.py` tells how they go together."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
# do_not_specialize: scalars that change from call to call must not compile a kernel for 1, one for multiples of 16
# and one for the rest.
from __future__ import annotations

import triton
import triton.language as tl

from attnhook.kernels.topk.triton.rows import (
    extent,
    grow,
    key_logits,
    key_pointers,
    load_queries,
    split_keys,
    store_tiles,
)


@triton.jit(do_not_specialize=["page_size", "window", "requests", "max_keys", "first_kv_head", "splits"])
def logits_kernel(
    q, q_row, q_head, q_dim, cache, k_page, k_slot, k_head, k_dim,
    page_table, table_row, table_column, page_size,
    row_request, row_position, window_rows, window, requests, max_keys,
    scale, k_scale, k_scale_step, alibi_slopes, softcap, selected, selected_step, group,
    logits, split_max, split_sum, first_kv_head, heads, width, splits,
    HEAD_DIM: tl.constexpr, SOFTCAP: tl.constexpr, DOT_TYPE: tl.constexpr, UNIT: tl.constexpr,
    ROWS: tl.constexpr, LANES: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One pass: logits of one row, kv head and key split, kept in scratch; heads count from ``first_kv_head``'s."""
    row, slot, split = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    kv_head = first_kv_head + slot
    request, first, base, end, _ = extent(row, row_request, row_position, window_rows, window, requests, max_keys, UNIT)
    keys = split_keys(base, end, splits, UNIT)
    start = base + split * keys
    stop = tl.minimum(start + keys, end)
    if start >= stop:
        return

    # [G]: the query heads that share this kv head
    g = tl.arange(0, LANES)
    head = kv_head * group + g
    live = g < group
    if selected is not None:
        live = live & (tl.load(selected + request * selected_step + head, mask=live, other=0) != 0)
        if tl.sum(live.to(tl.int32)) == 0:
            return  # nobody averages over these heads: don't read their keys
    factor = scale
    if k_scale is not None:
        factor = scale * tl.load(k_scale + kv_head * k_scale_step).to(tl.float32)
    slope = None
    if alibi_slopes is not None:
        slope = tl.load(alibi_slopes + head, mask=live, other=0).to(tl.float32)

    d = tl.arange(0, BLOCK_D).to(tl.int64)
    q_ptr = q + row * q_row + head.to(tl.int64)[:, None] * q_head + d[None, :] * q_dim
    q_block = load_queries(q_ptr, live, d, HEAD_DIM, DOT_TYPE)
    k_base = cache + kv_head.to(tl.int64) * k_head
    table = page_table + request * table_row
    kept = row * heads + slot * group + g
    out_ptr = logits + kept[:, None] * width - base

    top = tl.full([LANES], -float("inf"), tl.float32)
    total = tl.full([LANES], 0, tl.float32)
    for n in range(start, stop, BLOCK_N):
        s = n + tl.arange(0, BLOCK_N)
        visible = (s >= first) & (s < stop)
        k_ptr = key_pointers(k_base, k_page, k_slot, table, table_column, page_size, s, visible)
        z = key_logits(
            q_ptr, q_block, q_dim, live, k_ptr, k_dim, visible, d, factor, slope, (s - (end - 1))[None, :], softcap,
            HEAD_DIM, SOFTCAP, DOT_TYPE,
        )  # fmt: skip
        shown = live[:, None] & visible[None, :]
        tl.store(out_ptr + s[None, :], z, mask=shown)
        top, total = grow(top, total, tl.where(shown, z, -float("inf")))
    tl.store(split_max + kept * splits + split, top, mask=live)
    tl.store(split_sum + kept * splits + split, total, mask=live)


@triton.jit(do_not_specialize=["window", "requests", "max_keys", "first_head", "splits"])
def average_kernel(
    row_request, row_position, window_rows, window, requests, max_keys,
    logits, split_max, split_sum, attention, tile_mass, tile_entropy, tile_best,
    sinks, selected, selected_step, first_reported, head_lse, first_head, heads, all_heads, width, splits,
    EVERY: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_ALL: tl.constexpr, BLOCK_S: tl.constexpr, UNIT: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """One pass: adds ``heads`` heads' share to the attention of one row and key split, and sums it up by tiles.

    ``EVERY``: all heads' probabilities take the place of their logits, whether they are selected or not.
    """
    row, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    request, first, base, end, _ = extent(row, row_request, row_position, window_rows, window, requests, max_keys, UNIT)
    keys = split_keys(base, end, splits, UNIT)
    start = base + split * keys
    stop = tl.minimum(start + keys, end)
    if start >= stop:
        return

    # [H]: each head's maximum and normaliser from its splits [H, S]
    h = tl.arange(0, BLOCK_H)
    live = h < heads
    averaged = live
    count = 1.0 * all_heads
    if selected is not None:
        chosen = selected + request * selected_step
        averaged = live & (tl.load(chosen + first_head + h, mask=live, other=0) != 0)
        if not EVERY:
            live = averaged
        every = tl.arange(0, BLOCK_ALL)
        count = tl.sum((tl.load(chosen + every, mask=every < all_heads, other=0) != 0).to(tl.float32))
    j = tl.arange(0, BLOCK_S)
    part = (row * heads + h)[:, None] * splits + j[None, :]
    filled = live[:, None] & (j * keys < end - base)[None, :]
    tops = tl.load(split_max + part, mask=filled, other=-float("inf"))
    sums = tl.load(split_sum + part, mask=filled, other=0)
    top = tl.max(tops, axis=1)
    if sinks is not None:
        sink = tl.load(sinks + first_head + h, mask=live, other=0).to(tl.float32)
        top = tl.maximum(top, sink)
    top = tl.where(live, top, 0)
    total = tl.sum(sums * tl.exp(tops - top[:, None]), axis=1)
    if sinks is not None:
        total += tl.exp(sink - top)
    share = 1 / tl.where(live, total, 1)
    if head_lse is not None:  # noqa: SIM102 - decided when the kernel is compiled, unlike the next
        if split == 0:
            tl.store(head_lse + row * all_heads + first_head + h, top + tl.log(total), mask=live)

    report_from = first
    if first_reported is not None:
        report_from = tl.maximum(first, tl.load(first_reported + request))
    for n in range(start, stop, UNIT):
        # [H, N] -> [1, N]
        s = n + tl.arange(0, UNIT)
        visible = (s >= first) & (s < stop)
        shown = live[:, None] & visible[None, :]
        z_ptr = logits + (row * heads + h)[:, None] * width + (s - base)[None, :]
        z = tl.load(z_ptr, mask=shown, other=-float("inf"))
        p_h = tl.where(shown, tl.exp(z - top[:, None]) * share[:, None], 0)
        if EVERY:
            tl.store(z_ptr, p_h, mask=shown)
            if selected is not None:
                p_h = tl.where(averaged[:, None], p_h, 0)
        # no selected head: 0 / 0, so that the row is seen to be broken
        a = tl.where(visible, tl.sum(p_h, axis=0) / count, 0)
        kept = attention + row * width + (s - base)
        if first_head > 0:
            a += tl.load(kept)
        tl.store(kept, a)
        index = (s - base)[None, :]
        tile = row * (width // TILE) + (n - base) // TILE + tl.arange(0, UNIT // TILE)[None, :]
        reported = (visible & (s >= report_from))[None, :]
        store_tiles(tile_mass, tile_entropy, tile_best, tile, tile >= 0, a[None, :], index, reported, TILE)


@triton.jit
def _tile_of_rows(tile, rows, LANES: tl.constexpr, ROWS: tl.constexpr):
    """Rows [M] of a tile, each lane's row [L], whether they exist, and each lane's head within its kv head."""
    m = tile * ROWS + tl.arange(0, ROWS)
    lane = tl.arange(0, LANES)
    of_lane = tile * ROWS + lane // (LANES // ROWS)
    last = (rows - 1).to(tl.int64)
    there, lane_there = m < rows, of_lane < rows
    return (
        tl.minimum(m.to(tl.int64), last), there,
        tl.minimum(of_lane.to(tl.int64), last), lane_there, lane % (LANES // ROWS),
    )  # fmt: skip


@triton.jit(do_not_specialize=["page_size", "window", "requests", "max_keys", "rows", "splits"])
def norms_kernel(
    q, q_row, q_head, q_dim, cache, k_page, k_slot, k_head, k_dim,
    page_table, table_row, table_column, page_size,
    row_request, row_position, window_rows, window, requests, max_keys,
    scale, k_scale, k_scale_step, alibi_slopes, softcap, selected, selected_step, group,
    split_max, split_sum, rows, heads, splits,
    HEAD_DIM: tl.constexpr, SOFTCAP: tl.constexpr, DOT_TYPE: tl.constexpr, UNIT: tl.constexpr,
    ROWS: tl.constexpr, LANES: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Recompute, first: maximum and sum of exponentials of a tile of rows, one kv head, one key split."""
    kv_head, split = tl.program_id(1), tl.program_id(2)
    row, there, lane_row, lane_there, g = _tile_of_rows(tl.program_id(0), rows, LANES, ROWS)
    request, first, base, end, _ = extent(row, row_request, row_position, window_rows, window, requests, max_keys, UNIT)
    lane_request, lane_first, _, lane_end, _ = extent(
        lane_row, row_request, row_position, window_rows, window, requests, max_keys, UNIT
    )
    head = kv_head * group + g
    live = lane_there & (g < group)
    if selected is not None:
        chosen = selected + lane_request * selected_step
        live = live & (tl.load(chosen + head, mask=live, other=0) != 0)
    factor = scale
    if k_scale is not None:
        factor = scale * tl.load(k_scale + kv_head * k_scale_step).to(tl.float32)
    slope = None
    if alibi_slopes is not None:
        slope = tl.load(alibi_slopes + head, mask=live, other=0).to(tl.float32)
    d = tl.arange(0, BLOCK_D).to(tl.int64)
    q_ptr = q + lane_row[:, None] * q_row + head.to(tl.int64)[:, None] * q_head + d[None, :] * q_dim
    q_block = load_queries(q_ptr, live, d, HEAD_DIM, DOT_TYPE)
    k_base = cache + kv_head.to(tl.int64) * k_head

    top = tl.full([LANES], -float("inf"), tl.float32)
    total = tl.full([LANES], 0, tl.float32)
    # rows of one request share their keys; a tile with rows of several takes them in turn
    pending = (there & (end > 0)).to(tl.int32)
    while tl.sum(pending) > 0:
        m = tl.arange(0, ROWS)
        lead = tl.min(tl.where(pending != 0, m, ROWS))
        now = tl.sum(tl.where(m == lead, request, 0))
        mine = (pending != 0) & (request == now)
        low = tl.min(tl.where(mine, base, 0x7FFFFFFF))
        high = tl.max(tl.where(mine, end, 0))
        keys = split_keys(low, high, splits, UNIT)
        start = low + split * keys
        stop = tl.minimum(start + keys, high)
        table = page_table + now * table_row
        turn = live & (lane_request == now)
        wanted = tl.max(turn.to(tl.int32)) > 0
        for n in range(start, tl.where(wanted, stop, start), BLOCK_N):
            s = n + tl.arange(0, BLOCK_N)
            seen = mine[:, None] & (s[None, :] >= first[:, None]) & (s[None, :] < tl.minimum(end, stop)[:, None])
            visible = tl.max(seen.to(tl.int32), axis=0) > 0
            k_ptr = key_pointers(k_base, k_page, k_slot, table, table_column, page_size, s, visible)
            distance = s[None, :] - (lane_end - 1)[:, None]
            z = key_logits(
                q_ptr, q_block, q_dim, turn, k_ptr, k_dim, visible, d, factor, slope, distance, softcap,
                HEAD_DIM, SOFTCAP, DOT_TYPE,
            )  # fmt: skip
            shown = turn[:, None] & (s[None, :] >= lane_first[:, None]) & (distance <= 0) & (s < stop)[None, :]
            top, total = grow(top, total, tl.where(shown, z, -float("inf")))
        pending = tl.where(mine, 0, pending)
    kept = (lane_row * heads + head) * splits + split
    tl.store(split_max + kept, top, mask=live)
    tl.store(split_sum + kept, total, mask=live)


@triton.jit(do_not_specialize=["splits"])
def merge_kernel(
    split_max, split_sum, sinks, shift, share, heads, splits, BLOCK_H: tl.constexpr, BLOCK_S: tl.constexpr
):  # fmt: skip
    """Recompute, between: shift and factor of each head of one row from its splits."""
    row = tl.program_id(0).to(tl.int64)
    h, j = tl.arange(0, BLOCK_H), tl.arange(0, BLOCK_S)
    part = (row * heads + h)[:, None] * splits + j[None, :]
    # what no row wrote (heads that nobody selects) is read and not used
    filled = (h < heads)[:, None] & (j < splits)[None, :]
    tops = tl.load(split_max + part, mask=filled, other=-float("inf"))
    sums = tl.load(split_sum + part, mask=filled, other=0)
    top = tl.max(tops, axis=1)
    if sinks is not None:
        sink = tl.load(sinks + h, mask=h < heads, other=0).to(tl.float32)
        top = tl.maximum(top, sink)
    # a row without keys
    top = tl.where(top == -float("inf"), 0, top)
    total = tl.sum(sums * tl.exp(tops - top[:, None]), axis=1)
    if sinks is not None:
        total += tl.exp(sink - top)
    tl.store(shift + row * heads + h, top, mask=h < heads)
    tl.store(share + row * heads + h, 1 / total, mask=h < heads)


@triton.jit(do_not_specialize=["page_size", "window", "requests", "max_keys", "rows", "splits"])
def direct_kernel(
    q, q_row, q_head, q_dim, cache, k_page, k_slot, k_head, k_dim,
    page_table, table_row, table_column, page_size,
    row_request, row_position, window_rows, window, requests, max_keys,
    scale, k_scale, k_scale_step, alibi_slopes, softcap, selected, selected_step, group,
    shift, shift_row, shift_head, share, probabilities, attention, tile_mass, tile_entropy, tile_best, first_reported,
    rows, kv_heads, heads, width, splits,
    HEAD_DIM: tl.constexpr, SOFTCAP: tl.constexpr, DOT_TYPE: tl.constexpr, UNIT: tl.constexpr, TILE: tl.constexpr,
    BLOCK_ALL: tl.constexpr,
    ROWS: tl.constexpr, LANES: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Normaliser known: attention of a tile of rows and one key split, averaged over all heads as it is computed.

    ``probabilities`` [rows, heads, width], where given, gets each head's own, whether it is selected or not.
    """
    split = tl.program_id(1)
    row, there, lane_row, lane_there, g = _tile_of_rows(tl.program_id(0), rows, LANES, ROWS)
    request, first, base, end, _ = extent(row, row_request, row_position, window_rows, window, requests, max_keys, UNIT)
    lane_request, lane_first, lane_base, lane_end, _ = extent(
        lane_row, row_request, row_position, window_rows, window, requests, max_keys, UNIT
    )
    count = tl.full([ROWS], 0, tl.float32) + heads
    if selected is not None:
        every = tl.arange(0, BLOCK_ALL)
        of_row = (selected + request * selected_step)[:, None] + every[None, :]
        counted = tl.load(of_row, mask=(every < heads)[None, :] & there[:, None], other=0) != 0
        count = tl.sum(counted.to(tl.float32), axis=1)
    report_from = first
    if first_reported is not None:
        report_from = tl.maximum(first, tl.load(first_reported + request))
    d = tl.arange(0, BLOCK_D).to(tl.int64)

    # rows of one request share their keys; a tile with rows of several takes them in turn
    pending = (there & (end > 0)).to(tl.int32)
    while tl.sum(pending) > 0:
        m = tl.arange(0, ROWS)
        lead = tl.min(tl.where(pending != 0, m, ROWS))
        now = tl.sum(tl.where(m == lead, request, 0))
        mine = (pending != 0) & (request == now)
        low = tl.min(tl.where(mine, base, 0x7FFFFFFF))
        high = tl.max(tl.where(mine, end, 0))
        keys = split_keys(low, high, splits, UNIT)
        start = low + split * keys
        stop = tl.minimum(start + keys, high)
        table = page_table + now * table_row
        for n in range(start, stop, BLOCK_N):
            s = n + tl.arange(0, BLOCK_N)
            seen = mine[:, None] & (s[None, :] >= first[:, None]) & (s[None, :] < end[:, None])
            visible = tl.max(seen.to(tl.int32), axis=0) > 0
            # the same pages for every kv head
            k_rows = key_pointers(cache, k_page, k_slot, table, table_column, page_size, s, visible)
            distance = s[None, :] - (lane_end - 1)[:, None]
            a = tl.full([ROWS, BLOCK_N], 0, tl.float32)
            for kv_head in range(0, kv_heads):
                head = kv_head * group + g
                live = lane_there & (g < group) & (lane_request == now)
                averaged = live
                if selected is not None:
                    chosen = selected + lane_request * selected_step
                    averaged = live & (tl.load(chosen + head, mask=live, other=0) != 0)
                    if probabilities is None:
                        live = averaged
                # no keys of a kv head over whose query heads nobody averages
                wanted = visible & (tl.max(live.to(tl.int32)) > 0)
                factor = scale
                if k_scale is not None:
                    factor = scale * tl.load(k_scale + kv_head * k_scale_step).to(tl.float32)
                slope = None
                if alibi_slopes is not None:
                    slope = tl.load(alibi_slopes + head, mask=live, other=0).to(tl.float32)
                q_ptr = q + lane_row[:, None] * q_row + head.to(tl.int64)[:, None] * q_head + d[None, :] * q_dim
                q_block = load_queries(q_ptr, live, d, HEAD_DIM, DOT_TYPE)
                k_ptr = k_rows + tl.cast(kv_head, tl.int64) * k_head
                z = key_logits(
                    q_ptr, q_block, q_dim, live, k_ptr, k_dim, wanted, d, factor, slope, distance, softcap,
                    HEAD_DIM, SOFTCAP, DOT_TYPE,
                )  # fmt: skip
                most = tl.load(shift + lane_row * shift_row + head * shift_head, mask=live, other=0).to(tl.float32)
                # an infinite normaliser would make numbers of what is none
                most = tl.where(tl.abs(most) < float("inf"), most, float("nan"))
                p_h = tl.exp(z - most[:, None])
                if share is not None:
                    p_h *= tl.load(share + lane_row * heads + head, mask=live, other=0)[:, None]
                shown = live[:, None] & (s[None, :] >= lane_first[:, None]) & (distance <= 0)
                p_h = tl.where(shown, p_h, 0)
                if probabilities is not None:
                    own = probabilities + (lane_row * heads + head)[:, None] * width
                    tl.store(own + s[None, :] - lane_base[:, None], p_h, mask=shown)
                    p_h = tl.where(averaged[:, None], p_h, 0)
                # [L, N] -> [M, N]
                a += tl.sum(tl.reshape(p_h, [ROWS, LANES // ROWS, BLOCK_N]), axis=1)
            # no selected head: 0 / 0, so that the row is seen to be broken
            a = tl.where(seen, a / count[:, None], 0)
            index = s[None, :] - base[:, None]
            kept = mine[:, None] & (index >= 0) & (s[None, :] < end[:, None])
            tl.store(attention + row[:, None] * width + index, a, mask=kept)
            tile = (n - base)[:, None] // TILE + tl.arange(0, BLOCK_N // TILE)[None, :]
            filled = mine[:, None] & (tile >= 0) & (tile * TILE < (end - base)[:, None])
            store_tiles(
                tile_mass, tile_entropy, tile_best, row[:, None] * (width // TILE) + tile, filled,
                a, index, seen & (s[None, :] >= report_from[:, None]), TILE,
            )  # fmt: skip
        pending = tl.where(mine, 0, pending)
