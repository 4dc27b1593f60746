"""Triton kernels from attention to what a record keeps: masses of ranges, entropy, the exact top k.

They answer from tiles: a histogram bin or a span is a range of whole tiles and two ragged ends, and the top k keys
lie in the k tiles with the best keys, because each of those tiles holds a key better than anything outside them.

A key competes in the selection as one int64, the bits of its score above its negated position: scores are not
negative, so integers order like floats, ties go to the lower position, and the result depends on no scheduling.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
from __future__ import annotations

import triton
import triton.language as tl

from attnhook.kernels.topk.triton.rows import extent, selected_index, selection_key, store_tiles


@triton.jit
def _merge(x, RUN: tl.constexpr, BITS: tl.constexpr):
    """Sort the bitonic runs of 2**RUN in x [2] * BITS: downwards and upwards in turn, a single one upwards."""
    index = tl.reshape(tl.arange(0, 2**BITS), [2] * BITS)
    for bit in tl.static_range(RUN - 1, -1, -1):
        # the partner, whose index differs in this bit: integers wrap, so the difference is exact
        other = tl.sum(x, axis=BITS - 1 - bit, keep_dims=True) - x
        larger = (index >> bit) & 1
        if RUN < BITS:
            larger = larger ^ ((index >> RUN) & 1) ^ 1
        x = tl.where(larger != 0, tl.maximum(x, other), tl.minimum(x, other))
    return x


@triton.jit
def _best_of_both(best, found, K_BITS: tl.constexpr, BITS: tl.constexpr):
    """The 2**K_BITS largest of ``found`` [2**BITS] and ``best`` [2**K_BITS], a bitonic run like the result."""
    x = tl.reshape(found, [2] * BITS)
    for run in tl.static_range(1, K_BITS + 1):
        x = _merge(x, run, BITS)
    # of a run that goes down and one that goes up, the larger of each pair are the best of both, and bitonic
    for j in tl.static_range(BITS - K_BITS):
        x = tl.max(x, axis=BITS - 1 - j - K_BITS)
        x = _merge(x, K_BITS, BITS - 1 - j)
    return tl.maximum(tl.reshape(x, [2**K_BITS]), _downwards(best, K_BITS))


@triton.jit
def _downwards(best, K_BITS: tl.constexpr):
    # bitwise not reverses the order of integers and overflows on none
    return tl.reshape(~_merge(tl.reshape(~best, [2] * K_BITS), K_BITS, K_BITS), [2**K_BITS])


@triton.jit(do_not_specialize=["window", "requests", "max_keys", "tiles"])
def tiles_kernel(
    row_request, row_position, window_rows, window, requests, max_keys,
    attention, tile_mass, tile_entropy, tile_best, first_reported, width, tiles,
    UNIT: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Sums and best keys of the tiles of one row's attention, BLOCK keys of it."""
    row, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    request, first, base, end, _ = extent(row, row_request, row_position, window_rows, window, requests, max_keys, UNIT)
    report_from = first
    if first_reported is not None:
        report_from = tl.maximum(first, tl.load(first_reported + request))
    index = block * BLOCK + tl.arange(0, BLOCK)
    s = base + index
    visible = (s >= first) & (s < end)
    a = tl.load(attention + row * width + index, mask=visible, other=0)
    tile = block * (BLOCK // TILE) + tl.arange(0, BLOCK // TILE)[None, :]
    store_tiles(
        tile_mass, tile_entropy, tile_best, row * tiles + tile, tile < tiles,
        a[None, :], index[None, :], (visible & (s >= report_from))[None, :], TILE,
    )  # fmt: skip


@triton.jit(do_not_specialize=["window", "requests", "max_keys", "span_count", "tiles"])
def masses_kernel(
    row_request, row_position, window_rows, window, requests, max_keys,
    attention, tile_mass, spans, span_request, span_row, span_end, histogram, span_mass, span_count, width, tiles,
    BIN_STARTS: tl.constexpr, RANGES: tl.constexpr, BLOCK: tl.constexpr, UNIT: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    request, first, base, end, _ = extent(row, row_request, row_position, window_rows, window, requests, max_keys, UNIT)
    BINS: tl.constexpr = len(BIN_STARTS)
    # [R]: keys low..high-1 of the bins (part 0) or of some spans; distance d is key end - 1 - d
    i = tl.arange(0, RANGES)
    low = tl.where(i < BINS, first, end)
    high = tl.where(i < BINS, end, 0)
    if part == 0:
        for b in tl.static_range(1, BINS):
            high = tl.where(i == b, end - BIN_STARTS[b], high)
            low = tl.where(i == b - 1, end - BIN_STARTS[b], low)
    out = histogram + row * BINS + i
    kept = i < BINS
    if spans is not None:  # noqa: SIM102 - decided when the kernel is compiled, unlike the next
        if part > 0:
            n = (part - 1) * RANGES + i
            kept = n < span_count
            span = spans + request * span_request + n * span_row
            # clipped before they become int32: an open end may be any number
            low = tl.minimum(tl.maximum(tl.load(span, mask=kept, other=0), 0), end).to(tl.int32)
            high = tl.minimum(tl.maximum(tl.load(span + span_end, mask=kept, other=0), 0), end).to(tl.int32)
            out = span_mass + row * span_count + n
    low = tl.maximum(low, first) - base
    high = tl.minimum(high, end) - base

    # [R, TILE]: a ragged start and a ragged end; in between whole tiles
    low_tile = (low + TILE - 1) // TILE
    high_tile = tl.maximum(high, 0) // TILE
    head_end = tl.minimum(low_tile * TILE, high)
    tail_start = tl.maximum(high_tile * TILE, head_end)
    t = tl.arange(0, TILE)
    head = low[:, None] + t[None, :]
    tail = tail_start[:, None] + t[None, :]
    scores = attention + row * width
    ragged = tl.load(scores + head, mask=head < head_end[:, None], other=0)
    ragged += tl.load(scores + tail, mask=tail < high[:, None], other=0)
    # [R, tiles] in blocks
    whole = tl.full([RANGES, BLOCK], 0, tl.float32)
    used = (end - base) // TILE
    for c in range(0, used, BLOCK):
        tile = c + tl.arange(0, BLOCK)
        mass = tl.load(tile_mass + row * tiles + tile, mask=tile < used, other=0)
        inside = (tile[None, :] >= low_tile[:, None]) & (tile[None, :] < high_tile[:, None])
        whole += tl.where(inside, mass[None, :], 0)
    tl.store(out, tl.sum(ragged, axis=1) + tl.sum(whole, axis=1), mask=kept)


@triton.jit(do_not_specialize=["window", "requests", "max_keys", "top_k", "tiles"])
def select_kernel(
    row_request, row_position, window_rows, window, requests, max_keys,
    attention, tile_mass, tile_entropy, tile_best,
    first_reported, positions, scores, entropy, top_k, width, tiles,
    RENORMALISE: tl.constexpr, UNIT: tl.constexpr, TILE: tl.constexpr,
    K_BITS: tl.constexpr, T_BITS: tl.constexpr, W_BITS: tl.constexpr,
):  # fmt: skip
    K: tl.constexpr = 2**K_BITS
    BLOCK_T: tl.constexpr = 2**T_BITS
    BLOCK_W: tl.constexpr = 2**W_BITS
    row = tl.program_id(0).to(tl.int64)
    request, first, base, end, fits = extent(
        row, row_request, row_position, window_rows, window, requests, max_keys, UNIT
    )
    report_from = first
    if first_reported is not None:
        report_from = tl.maximum(first, tl.load(first_reported + request))

    # [T] -> [K]: the tiles with the best keys
    used = (end - base + TILE - 1) // TILE
    best = tl.full([K], -1, tl.int64)
    masses = tl.full([BLOCK_T], 0, tl.float32)
    entropies = tl.full([BLOCK_T], 0, tl.float32)
    for c in range(0, used, BLOCK_T):
        tile = c + tl.arange(0, BLOCK_T)
        ptr = row * tiles + tile
        masses += tl.load(tile_mass + ptr, mask=tile < used, other=0)
        entropies += tl.load(tile_entropy + ptr, mask=tile < used, other=0)
        found = tl.load(tile_best + ptr, mask=tile < used, other=-1)
        best = _best_of_both(best, found, K_BITS, T_BITS)

    # [K, W] -> [K]: the best keys of those tiles, W columns at a time
    first_key = selected_index(best) // TILE * TILE
    chosen = best >= 0
    best = tl.full([K], -1, tl.int64)
    for w in range(0, TILE, BLOCK_W):
        index = first_key[:, None] + w + tl.arange(0, BLOCK_W)[None, :]
        reported = chosen[:, None] & (index >= report_from - base) & (index < end - base)
        a = tl.load(attention + row * width + index, mask=reported, other=0)
        found = tl.where(reported, selection_key(a, index), -1)
        best = _best_of_both(best, found, K_BITS, K_BITS + W_BITS)
    best = _downwards(best, K_BITS)
    reported = best >= 0
    column = tl.arange(0, K)
    kept = (best >> 32).to(tl.int32).to(tl.float32, bitcast=True)
    tl.store(scores + row * top_k + column, tl.where(reported, kept, 0), mask=column < top_k)
    index = tl.where(reported, selected_index(best) + base, -1)
    tl.store(positions + row * top_k + column, index, mask=column < top_k)

    count = end - first
    spread = tl.sum(entropies)
    if RENORMALISE:  # H(a / S) = H(a) / S + ln S
        mass = tl.sum(masses)
        # a sink that takes everything leaves no distribution to speak of: entropy 0
        spread = tl.where(mass == 0, 0, spread / mass + tl.log(mass))
    # one visible key: 0, or NaN if it is broken
    spread = tl.where(count > 1, spread / tl.log(tl.maximum(count, 2).to(tl.float32)), spread * 0)
    spread = tl.where(count > 0, spread, 0)
    tl.store(entropy + row, tl.where(fits, spread, float("nan")))
