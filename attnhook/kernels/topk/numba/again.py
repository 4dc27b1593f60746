"""Decoding again: jobs of the compiled kernel that stay prepared for the next layers, or the next pass.

Where rows are few, as in decoding, preparing the jobs takes longer than running them.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from attnhook.kernels.topk.numba import aim, dots, loops
from attnhook.kernels.topk.numba.jobs import (
    LAYER,
    REQUEST,
    RESULT,
    ROW_RESULTS,
    ROW_SCRATCH,
    ROW_Z,
    Call,
    Job,
    Shared,
    bytes_per_thread,
    pool_of,
    reads_in_place,
    scales_of,
    threads_for,
    width_for,
)
from attnhook.kernels.topk.torch.attention import buffer
from attnhook.kernels.topk.types import Arrays, LayerRows

SINGLE_ELEMENTS = 1 << 22  # logits of single rows computed together: 16 MiB, unless one row needs more
_ROOM = 512  # keys that rows may grow by before the scratch is made anew

# places in the words of `dots.dot_job`
_DOT_Z, _DOT_Q, _DOT_PARTS = 6, 9, 13


class Again:
    """The jobs of layers whose rows lie alike and read their keys in place, all in one call."""

    def __init__(self, shared: Shared, layers: Sequence[LayerRows]) -> None:
        count, rows = len(layers), len(shared.request)
        self._call = call = Call(shared, layers)
        self._table = np.zeros((7, count, rows), np.int64)
        self._table[REQUEST], self._table[LAYER] = shared.request, np.arange(count)[:, None]
        self._table[RESULT] = np.arange(rows) * count + np.arange(count)[:, None]
        self._pages = np.empty(tuple(layers[0].keys.page_table.shape), np.int64)
        self._pools = np.array([pool_of(layer.keys, self._pages) for layer in layers], np.int64)
        self._scales = scales_of(layers)
        self._most = 0  # keys that the scratch has room for
        self._threads = 0
        # what the table is made for
        self._seen: torch.Tensor | None = None
        self._window: int | torch.Tensor = -1
        self._memory, self._lent = call.arrays()
        dim = layers[0].q.shape[2]
        self._products = Job(
            dots.dot_job,
            [
                count * rows, call.heads, layers[0].keys.num_kv_heads, dim, 0, 0, self._table.ctypes.data, 0,
                self._pools.ctypes.data, count, self._scales.ctypes.data, 0,
            ],
        )  # fmt: skip
        self._reduction = Job(loops.row_job, call.words(count * rows, self._table))
        self._reduction.words[ROW_RESULTS] = [x.ctypes.data for x in self._lent]
        self._places = Job(
            aim.aim_job,
            [
                rows, count, call.heads, *self._pages.shape, 0, -1, 0, 0, 0, 0, self._table.ctypes.data,
                self._pages.ctypes.data, self._memory.ctypes.data, self._memory.size, self._lent[0].size, 0, 0, 0,
            ],
        )  # fmt: skip

    def fits(self, layers: Sequence[LayerRows]) -> bool:
        """Whether nothing differs from the layers before but q, positions, pages, and where keys lie."""
        old, first = self._call.layers[0], layers[0]
        if (
            len(layers) != len(self._call.layers)
            or first.q.shape != old.q.shape
            or first.q.dtype != old.q.dtype
            or first.row_position.shape != old.row_position.shape
            or first.keys.page_table.shape != old.keys.page_table.shape
            or first.keys.num_kv_heads != old.keys.num_kv_heads
        ):
            return False
        for new, kept in zip(layers, self._call.layers, strict=True):
            keys, before = new.keys, kept.keys
            if not (
                new.row_position is first.row_position
                and keys.page_table is first.keys.page_table
                and _same(new.window, first.window)
                and (new.scale, new.softcap) == (kept.scale, kept.softcap)
                and new.sinks is kept.sinks
                and new.alibi_slopes is kept.alibi_slopes
                and keys.k_scale is before.k_scale
                and keys.cache.dtype == before.cache.dtype
                and keys.strides == before.strides
                and keys.page_size == before.page_size
            ):
                return False
        return True

    def lend(self, layers: Sequence[LayerRows], place: tuple[np.ndarray, np.ndarray] | None = None) -> Arrays | None:
        """Results ``[T, L, ...]`` of layers that fit, in numpy arrays that the next call fills anew.

        ``place`` has the first key that each row sees and how many it sees, int64 [T] both; without it positions are
        int64 and the window is one number. None where rows see no key, or too many for one call.
        """
        one = layers[0]
        if self._seen is one.row_position and _same(self._window, one.window):
            self._places.at[aim.POSITIONS] = self._places.at[aim.SEEN] = 0
            self._places.run(1)
        elif not self._aim(layers, place):
            return None
        q = one.q if len(layers) == 1 else torch.cat([layer.q for layer in layers])
        q = q.to(torch.float32).contiguous()
        self._pools[:, 0] = [layer.keys.cache.data_ptr() for layer in layers]
        self._products.at[_DOT_Q] = q.data_ptr()
        self._products.run(self._threads)
        self._reduction.run(self._threads)
        return self._lent

    def _aim(self, layers: Sequence[LayerRows], place: tuple[np.ndarray, np.ndarray] | None) -> bool:
        """Point the jobs at other rows of the same requests, and clear the results."""
        self._seen = None  # until all is done
        one, at = layers[0], self._places.at
        pages = one.keys.page_table
        if place is None:
            assert isinstance(one.window, int)
            at[aim.POSITIONS], at[aim.WINDOW], at[aim.SEEN] = one.row_position.data_ptr(), one.window, 0
        else:
            first, seen = place
            at[aim.SEEN], at[aim.FIRST_SEEN] = seen.ctypes.data, first.ctypes.data
        columns, step = pages.stride()
        if pages.dtype == torch.int32 and step == 1:
            at[aim.PAGES_FROM], at[aim.PAGE_STRIDE] = pages.data_ptr(), columns
        else:
            self._pages[:] = pages.numpy()
            at[aim.PAGES_FROM] = 0
        self._places.run(1)
        total = at[aim.SIZE] * len(layers)
        if not 0 < total <= SINGLE_ELEMENTS:
            return False
        z = self._z = buffer("logits", total, one.q, torch.float32)
        for job, word in ((self._products.at, _DOT_Z), (self._reduction.at, ROW_Z)):
            job[word], job[word + 1] = z.data_ptr(), total
        self._products.at[_DOT_PARTS], longest = at[aim.PARTS], at[aim.LONGEST]
        threads = threads_for(total)
        if threads > self._threads or longest > self._most:
            self._most = longest + _ROOM
            width = width_for(self._most)
            part = bytes_per_thread(width, self._call.top_k, self._call.lanes)
            self._scratch = np.empty(max(threads, self._threads) * part, np.uint8)
            self._reduction.words[ROW_SCRATCH] = self._scratch.ctypes.data, part, width
        self._threads = threads
        self._seen, self._window = one.row_position, one.window
        return True


def _same(one: int | torch.Tensor, other: int | torch.Tensor) -> bool:
    return one is other or (isinstance(one, int) and isinstance(other, int) and one == other)


def alike(layers: Sequence[LayerRows]) -> bool:
    """Whether `Again` can compute these layers together."""
    one = layers[0]
    return all(
        layer.row_position is one.row_position
        and layer.keys.page_table is one.keys.page_table
        and _same(layer.window, one.window)
        and reads_in_place(layer.keys)
        for layer in layers
    )
