"""Triton functions that the kernels share: what a row sees, the logits of some keys, how scores are kept."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def extent(row, row_request, row_position, window_rows, window, requests, max_keys, UNIT: tl.constexpr):
    """(request, first visible key, its unit's start, one past the last visible key, whether it fits)."""
    request = tl.load(row_request + row).to(tl.int64)
    position = tl.load(row_position + row).to(tl.int64)
    width = window
    if window_rows is not None:
        width = tl.load(window_rows + row).to(tl.int64)
    fits = (position < 0) | ((position < max_keys) & (request >= 0) & (request < requests))
    end = tl.where(fits & (position >= 0), position + 1, 0).to(tl.int32)
    first = tl.where(width < 0, 0, tl.maximum(end - width, 0)).to(tl.int32)
    base = first // UNIT * UNIT
    # padding rows may name no request; whatever is loaded for them is not used
    return tl.minimum(tl.maximum(request, 0), requests - 1), first, base, end, fits


@triton.jit
def split_keys(base, end, splits, UNIT: tl.constexpr):
    """Keys per split, a multiple of UNIT: every row uses the splits that it fills, from 0 up."""
    units = (end - base + UNIT - 1) // UNIT
    return tl.maximum((units + splits - 1) // splits, 1) * UNIT


@triton.jit
def load_queries(q_ptr, live, d, HEAD_DIM: tl.constexpr, DOT_TYPE: tl.constexpr):
    """[L, D] where the whole head fits a block; else something that `key_logits` does not look at."""
    if d.shape[0] >= HEAD_DIM:
        block = tl.load(q_ptr, mask=live[:, None] & (d < HEAD_DIM)[None, :], other=0).to(DOT_TYPE)
    else:
        block = 0
    return block


@triton.jit
def key_pointers(cache, k_page, k_slot, table, table_column, page_size, s, visible):
    """[N] where the keys at positions s lie; hidden keys, and the pages that hold only those, are never touched."""
    page = tl.load(table + (s // page_size).to(tl.int64) * table_column, mask=visible, other=0).to(tl.int64)
    return cache + page * k_page + (s % page_size).to(tl.int64) * k_slot


@triton.jit
def key_logits(
    q_ptr, q_block, q_dim, live, k_ptr, k_dim, visible, d, factor, slope, distance, softcap,
    HEAD_DIM: tl.constexpr, SOFTCAP: tl.constexpr, DOT_TYPE: tl.constexpr,
):  # fmt: skip
    """[L, N] logits of L query heads at q_ptr [L, D] and N keys at k_ptr [N]; NaN where they are not finite.

    ``slope`` [L] may be None; ``distance`` [L, N] or [1, N] is key minus query position.
    """
    BLOCK_D: tl.constexpr = d.shape[0]
    # [L, N] += [L, D] x [D, N]
    if HEAD_DIM <= BLOCK_D:
        k_mask = (d < HEAD_DIM)[:, None] & visible[None, :]
        k_block = tl.load(k_ptr[None, :] + d[:, None] * k_dim, mask=k_mask, other=0.0).to(DOT_TYPE)
        z = tl.dot(q_block, k_block, input_precision="ieee")
    else:
        z = tl.full([live.shape[0], visible.shape[0]], 0, tl.float32)
        for d0 in range(0, HEAD_DIM, BLOCK_D):
            in_head = d0 + d < HEAD_DIM
            part = tl.load(q_ptr + d0 * q_dim, mask=live[:, None] & in_head[None, :], other=0).to(DOT_TYPE)
            k_mask = in_head[:, None] & visible[None, :]
            k_block = tl.load(k_ptr[None, :] + (d0 + d)[:, None] * k_dim, mask=k_mask, other=0.0).to(DOT_TYPE)
            z = tl.dot(part, k_block, z, input_precision="ieee")
    z = z * factor
    if slope is not None:
        z += slope[:, None] * distance.to(tl.float32)
    # the soft-cap and exp would make an infinity look like a number; a NaN stays in the sum
    z = tl.where(tl.abs(z) < float("inf"), z, float("nan"))
    if SOFTCAP:
        z = softcap * (1 - 2 / (tl.exp(2 * (z / softcap)) + 1))  # tanh, exact at both ends
    return z


@triton.jit
def grow(top, total, z):
    """Running maximum and sum of exponentials [L] with the logits z [L, N], -inf where there is none."""
    new_top = tl.maximum(top, tl.max(z, axis=1))
    # no key so far for this head leaves the maximum at -inf
    shift = tl.where(new_top == -float("inf"), 0, new_top)
    return new_top, total * tl.exp(top - shift) + tl.sum(tl.exp(z - shift[:, None]), axis=1)


@triton.jit
def selection_key(score, index):
    """int64 that orders by score, then by lower index; -1, below all others, for NaN."""
    bits = score.to(tl.int32, bitcast=True).to(tl.int64)
    return tl.where(score >= 0, (bits << 32) | (0x7FFFFFFF - index).to(tl.int64), -1)


@triton.jit
def selected_index(key):
    return (0x7FFFFFFF - (key & 0x7FFFFFFF)).to(tl.int32)


@triton.jit
def store_tiles(tile_mass, tile_entropy, tile_best, tile, kept, a, index, reported, TILE: tl.constexpr):
    """Sums and best key of every TILE of N scores a [R, N] at index [R, N]; tile [R, N / TILE] numbers them."""
    R: tl.constexpr = a.shape[0]
    T: tl.constexpr = tile.shape[1]
    # the clamp keeps 0 ln 0 at 0 and NaN a NaN
    entropy = -a * tl.log(tl.maximum(a, 1.1754944e-38))
    best = tl.where(reported, selection_key(a, index), -1)
    tl.store(tile_mass + tile, tl.sum(tl.reshape(a, [R, T, TILE]), axis=2), mask=kept)
    tl.store(tile_entropy + tile, tl.sum(tl.reshape(entropy, [R, T, TILE]), axis=2), mask=kept)
    tl.store(tile_best + tile, tl.max(tl.reshape(best, [R, T, TILE]), axis=2), mask=kept)
