"""Decoding again: jobs of the compiled kernel that stay prepared for the next layers, or the next pass.

Where rows are few, as in decoding, preparing the jobs takes longer than running them.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from attnhook.kernels.topk.numba import aim, dots, loops, per_key
from attnhook.kernels.topk.numba.blocks import ROW, AimWords, DotWords
from attnhook.kernels.topk.numba.jobs import (
    Call,
    Job,
    Shared,
    bytes_per_thread,
    point_at_results,
    pools_of,
    reads_in_place,
    scales_of,
    threads_for,
    width_for,
)
from attnhook.kernels.topk.torch.attention import buffer
from attnhook.kernels.topk.types import Arrays, LayerRows

SINGLE_ELEMENTS = 1 << 22  # logits of single rows computed together: 16 MiB, unless one row needs more
_ROOM = 512  # keys that rows may grow by before the scratch is made anew


class Again:
    """The jobs of layers whose rows lie alike and read their keys in place, all in one call."""

    def __init__(self, shared: Shared, layers: Sequence[LayerRows]) -> None:
        count, rows = len(layers), len(shared.request)
        self._call = call = Call(shared, layers)
        self._table = np.zeros((count, rows), ROW)
        self._table["request"], self._table["layer"] = shared.request, np.arange(count)[:, None]
        self._table["result"] = np.arange(rows) * count + np.arange(count)[:, None]
        self._pages = np.empty(tuple(layers[0].keys.page_table.shape), np.int64)
        self._pools = pools_of(layers, [self._pages] * count)
        self._caches = self._pools["cache"]
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
            DotWords(
                rows=count * rows, heads=call.heads, kv_heads=layers[0].keys.num_kv_heads, dim=dim, layers=count,
                table=self._table.ctypes.data, pools=self._pools.ctypes.data, scales=self._scales.ctypes.data,
            ),
        )  # fmt: skip
        self._reduction = Job(loops.row_job, call.words(self._table))
        point_at_results(self._reduction.words, self._lent)
        self._places = Job(
            aim.aim_job,
            AimWords(
                rows=rows, layers=count, heads=call.heads, requests=self._pages.shape[0],
                columns=self._pages.shape[1], window=-1, table=self._table.ctypes.data,
                pages=self._pages.ctypes.data, found=self._memory.ctypes.data, found_count=self._memory.size,
                position_count=self._lent.positions.size + self._lent.head_positions.size,
            ),
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
        # for every layer of every pass: unpacking a tuple is faster than asking it by name
        place, table, window = first.row_position, first.keys.page_table, first.softmax.window
        for (_, keys, own_place, softmax, _), (_, before, _, known, _) in zip(layers, self._call.layers, strict=True):
            scale, softcap, own_window, sinks, slopes, _ = softmax
            old_scale, old_softcap, _, old_sinks, old_slopes, _ = known
            if not (
                own_place is place
                and keys.page_table is table
                and (own_window is window or _same(own_window, window))
                and scale == old_scale
                and softcap == old_softcap
                and sinks is old_sinks
                and slopes is old_slopes
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
        if self._seen is one.row_position and _same(self._window, one.softmax.window):
            self._places.words.positions = self._places.words.seen = 0
            self._places.run(1)
        elif not self._aim(layers, place):
            return None
        slot = self._call.slot
        if slot is not None and not per_key.aim(self._table.reshape(-1), layers, np.tile(slot, len(layers))):
            return None
        q = one.q if len(layers) == 1 else torch.cat([layer.q for layer in layers])
        q = q.to(torch.float32).contiguous()
        self._caches[:] = [layer.keys.cache.data_ptr() for layer in layers]
        self._products.words.queries = q.data_ptr()
        self._products.run(self._threads)
        self._reduction.run(self._threads)
        return self._lent

    def _aim(self, layers: Sequence[LayerRows], place: tuple[np.ndarray, np.ndarray] | None) -> bool:
        """Point the jobs at other rows of the same requests, and clear the results."""
        self._seen = None  # until all is done
        one, places = layers[0], self._places.words
        pages = one.keys.page_table
        if place is None:
            window = one.softmax.window
            assert isinstance(window, int)
            places.positions, places.window, places.seen = one.row_position.data_ptr(), window, 0
        else:
            first, seen = place
            places.seen, places.first_seen = seen.ctypes.data, first.ctypes.data
        columns, step = pages.stride()
        if pages.dtype == torch.int32 and step == 1:
            places.pages_from, places.page_stride = pages.data_ptr(), columns
        else:
            self._pages[:] = pages.numpy()
            places.pages_from = 0
        self._places.run(1)
        total = places.size * len(layers)
        if not 0 < total <= SINGLE_ELEMENTS:
            return False
        z = self._z = buffer("logits", total, one.q, torch.float32)
        products, reduction = self._products.words, self._reduction.words
        products.logits = reduction.logits = z.data_ptr()
        products.logit_count = reduction.logit_count = total
        products.parts, longest = places.parts, places.longest
        threads = threads_for(total)
        if threads > self._threads or longest > self._most:
            self._most = longest + _ROOM
            width = width_for(self._most)
            part = bytes_per_thread(width, self._call.top_k, self._call.lanes)
            self._scratch = np.empty(max(threads, self._threads) * part, np.uint8)
            reduction.scratch, reduction.scratch_bytes = self._scratch.ctypes.data, part
            reduction.scratch_keys = width
        self._threads = threads
        self._seen, self._window = one.row_position, one.softmax.window
        return True


def _same(one: int | torch.Tensor, other: int | torch.Tensor) -> bool:
    return one is other or (isinstance(one, int) and isinstance(other, int) and one == other)


def alike(layers: Sequence[LayerRows]) -> bool:
    """Whether `Again` can compute these layers together."""
    one = layers[0]
    return all(
        layer.row_position is one.row_position
        and layer.keys.page_table is one.keys.page_table
        and _same(layer.softmax.window, one.softmax.window)
        and reads_in_place(layer.keys)
        for layer in layers
    )
