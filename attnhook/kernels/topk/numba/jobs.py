"""What numba's loops are called with: jobs on torch's own threads, and the arrays that layers bring to them."""

from __future__ import annotations

import ctypes
import math
import sys
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Generic

import numpy as np
import torch

from attnhook.kernels.topk.numba import loops
from attnhook.kernels.topk.numba.blocks import POOL, RowWords, W
from attnhook.kernels.topk.types import INTEGERS, Arrays, LayerRows, PagedKeys, Selection, TopK

_SERIAL = 1 << 15  # logits that are not worth waking threads for
_MADV_PAGEOUT = 21  # linux/mman.h; takes nothing away that cannot be read again
_IN_PLACE = (torch.float32, torch.bfloat16)  # keys that the loops read where they lie


def _pool() -> Any:
    """``GOMP_parallel`` of the OpenMP library that torch runs on; None where there is none.

    Its threads are torch's own, so an engine's thread count and core binding hold, and no second pool
    fights the first for the cores.
    """
    try:
        function = ctypes.CDLL(None).GOMP_parallel
    except (OSError, TypeError, AttributeError):  # Windows knows no CDLL(None), other libraries no such symbol
        return None
    function.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
    function.restype = None
    return function


_parallel = _pool()
_SERIAL_CALL = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


def _release_compiler() -> None:
    """Give the pages of LLVM back to the system, where Linux lets us.

    numba loads its compiler to load what it compiled before: about 70 MB of code that nothing runs again. Should
    something compile after all, the pages come back from the file.
    """
    if not sys.platform.startswith("linux"):
        return
    madvise = ctypes.CDLL(None).madvise
    madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    with open("/proc/self/maps", encoding="utf-8") as maps:
        for line in maps:
            span, access, *_ = line.split()
            if "libllvmlite" in line and "w" not in access:
                start, end = (int(part, 16) for part in span.split("-"))
                madvise(start, end - start, _MADV_PAGEOUT)  # a hint: a kernel that does not know it does nothing


_release_compiler()


def threads_for(work: int) -> int:
    return 1 if _parallel is None or work <= _SERIAL else torch.get_num_threads()


class Job(Generic[W]):
    """A compiled job and its words; it may run more than once."""

    def __init__(self, job: Any, words: W) -> None:
        self.words = words
        self._address, self._words_at = job.address, ctypes.addressof(words)
        self._serial = _SERIAL_CALL(job.address)

    def run(self, threads: int) -> None:
        """On so many threads, which the scratch must have room for."""
        self.words.next_unit = self.words.next_thread = 0
        if threads > 1:
            _parallel(self._address, self._words_at, threads, 0)
        else:
            self._serial(self._words_at)


def as_numpy(x: torch.Tensor, dtype: Any) -> np.ndarray:
    return np.ascontiguousarray((x.float() if x.is_floating_point() else x).numpy(), dtype=dtype)


def reads_in_place(keys: PagedKeys) -> bool:
    return keys.cache.dtype in _IN_PLACE and (keys.strides[3] == 1 or keys.strides[1] == 1)


@lru_cache(maxsize=64)
def _neutral(requests: int, heads: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Head masks, spans and first reported positions that change nothing; nobody writes to them."""
    return (
        np.ones((requests, heads), np.uint8),
        np.zeros((requests, 0, 2), np.int64),
        np.zeros(requests, np.int64),
    )


class Shared:
    """What all layers of a step have in common; no argument may change while it lasts."""

    def __init__(self, row_request: torch.Tensor, selection: Selection) -> None:
        top_k, head_mask, spans, first_reported, per_head, per_key = selection
        self.request = as_numpy(row_request, np.int64)
        self.selection = selection
        self.top_k = max(top_k, per_head.top_k)  # the most that are selected at once
        self.lanes = max(128, 1 << (4 * self.top_k - 1).bit_length())
        self.spans = None if spans is None else as_numpy(spans, np.int64)
        self.report_from = None if first_reported is None else as_numpy(first_reported, np.int64)
        self.masks = None if head_mask is None else as_numpy(head_mask, np.uint8)
        self.slot = None if per_key is None else as_numpy(per_key.slot, np.int64)
        #: float32 [T, width] where the rows' attention itself is wanted, of one layer; the results then mean nothing
        self.dense: torch.Tensor | None = None


class Call:
    """Layers that are computed together, in the form that the jobs take."""

    def __init__(self, shared: Shared, layers: Sequence[LayerRows]) -> None:
        self.rows, self.heads, _ = layers[0].q.shape
        self.layers, self.top_k, self.lanes, self.dense = layers, shared.top_k, shared.lanes, shared.dense
        self.selection, self.slot = shared.selection, shared.slot
        kv_heads, per_key = layers[0].keys.num_kv_heads, self.selection.per_key
        by_kv_head = per_key is not None and per_key.kv_heads
        self.key_groups, self.group_heads = (kv_heads, self.heads // kv_heads) if by_kv_head else (1, 0)
        self.requests = requests = layers[0].keys.page_table.shape[0]
        masks, spans, report_from = _neutral(requests, self.heads)
        self.spans = spans if shared.spans is None else shared.spans
        self.report_from = report_from if shared.report_from is None else shared.report_from
        self.masks = masks
        if shared.masks is not None:
            self.masks = np.ascontiguousarray(np.broadcast_to(shared.masks, (requests, self.heads)))
        self.sinks = self._per_head([layer.softmax.sinks for layer in layers], -math.inf)
        self.slopes = self._per_head([layer.softmax.alibi_slopes for layer in layers], 0.0)
        self.softcaps = np.array([layer.softmax.softcap for layer in layers], np.float32)

    def _per_head(self, values: list[torch.Tensor | None], neutral: float) -> np.ndarray:
        """float32 [L, Hq], or [L, 0] where no layer has any; ``neutral`` changes nothing."""
        if all(value is None for value in values):
            return np.zeros((len(values), 0), np.float32)
        absent = torch.full((self.heads,), neutral)
        return np.stack([as_numpy(absent if value is None else value, np.float32) for value in values])

    def empty(self) -> TopK:
        """Results ``[T * L, ...]``, a row's layers one after the other, before anything is computed."""
        _, found = self.arrays()
        found.positions.fill(-1)
        found.head_positions.fill(-1)
        count = self.rows * len(self.layers)
        return TopK(*(torch.from_numpy(x.reshape(count, *x.shape[2:])) for x in found))

    def arrays(self) -> tuple[np.ndarray, Arrays]:
        """One piece of memory, zeroed, and in it numpy arrays ``[T, L, ...]`` for results, integers first."""
        shapes = {name: (self.rows, len(self.layers), *own) for name, own in self.selection.shapes(self.heads).items()}
        order = sorted(shapes, key=lambda name: name not in INTEGERS)
        sizes = [math.prod(shapes[name]) for name in order]
        memory = np.zeros(sum(sizes), np.float32)
        parts = dict(zip(order, np.split(memory, np.cumsum(sizes)[:-1]), strict=True))
        for name in INTEGERS:
            parts[name] = parts[name].view(np.int32)
        return memory, Arrays(**{name: parts[name].reshape(shape) for name, shape in shapes.items()})

    def words(self, table: np.ndarray) -> RowWords:
        """The words of `loops.row_job` for a table's rows; logits, results and scratch are to come."""
        dense = self.dense
        return RowWords(
            rows=table.size, heads=self.heads, requests=self.requests, layers=len(self.layers),
            table=table.ctypes.data,
            sinks=self.sinks.ctypes.data, sink_heads=self.sinks.shape[1],
            slopes=self.slopes.ctypes.data, slope_heads=self.slopes.shape[1], softcaps=self.softcaps.ctypes.data,
            top_k=self.selection.top_k, masks=self.masks.ctypes.data, report_from=self.report_from.ctypes.data,
            spans=self.spans.ctypes.data, span_count=self.spans.shape[1],
            results=self.rows * len(self.layers), lanes=self.lanes,
            key_groups=self.key_groups, group_heads=self.group_heads,
            dense=0 if dense is None else dense.data_ptr(), dense_width=0 if dense is None else dense.shape[1],
        )  # fmt: skip

    def reduce(self, z: torch.Tensor, table: np.ndarray, result: TopK) -> None:
        """Fill the results of a table's rows from their logits z, which it overwrites."""
        threads = threads_for(int(table["keys"].sum()) * self.heads)
        width = width_for(int(table["keys"].max()))
        part = bytes_per_thread(width, self.top_k, self.lanes)
        scratch = np.empty(threads * part, np.uint8)
        words = self.words(table)
        words.logits, words.logit_count = z.data_ptr(), z.numel()
        point_at_results(words, Arrays(*(x.numpy() for x in result)))
        words.scratch, words.scratch_bytes, words.scratch_keys = scratch.ctypes.data, part, width
        Job(loops.row_job, words).run(threads)


def point_at_results(words: RowWords, results: Arrays) -> None:
    """Where results go."""
    words.positions, words.scores = results.positions.ctypes.data, results.scores.ctypes.data
    words.histogram, words.entropy = results.histogram.ctypes.data, results.entropy.ctypes.data
    words.span_mass = results.span_mass.ctypes.data
    *_, words.head_tops, words.head_top_k = results.head_positions.shape
    words.head_prints, words.head_norms = results.head_entropy.shape[-1], results.head_lse.shape[-1]
    words.head_masses = results.head_span_mass.shape[-2]
    words.head_positions, words.head_scores = results.head_positions.ctypes.data, results.head_scores.ctypes.data
    words.head_histogram, words.head_entropy = results.head_histogram.ctypes.data, results.head_entropy.ctypes.data
    words.head_span_mass, words.head_lse = results.head_span_mass.ctypes.data, results.head_lse.ctypes.data


def width_for(keys: int) -> int:
    """Numbers that a thread's scratch holds for a row of so many keys."""
    return -(-keys // 16) * 16


def bytes_per_thread(width: int, top_k: int, lanes: int) -> int:
    """Size of a thread's scratch: whole cache lines, so that no two threads write to one."""
    return -(-(4 * (width + 2 * top_k + lanes) + 8 * 2 * lanes) // 64) * 64


def scales_of(layers: Sequence[LayerRows]) -> np.ndarray:
    """float32 [L, Hkv]: what the product of a query and a stored key is multiplied by."""
    scales = np.empty((len(layers), layers[0].keys.num_kv_heads), np.float32)
    scales.T[:] = [layer.softmax.scale for layer in layers]
    for n, layer in enumerate(layers):
        if layer.keys.k_scale is not None:
            scales[n] *= as_numpy(torch.as_tensor(layer.keys.k_scale), np.float32)
    return scales


def pools_of(layers: Sequence[LayerRows], pages: Sequence[np.ndarray]) -> np.ndarray:
    """POOL [L]: each layer's cache, and its page table int64 [R, columns], which the caller keeps."""
    return np.array([_pool_of(layer.keys, own) for layer, own in zip(layers, pages, strict=True)], POOL)


def _pool_of(keys: PagedKeys, pages: np.ndarray) -> tuple[int, ...]:
    page, slot, head, dim = keys.strides
    pool = {
        "cache": keys.cache.data_ptr(), "element_size": keys.cache.element_size(),
        "page_stride": page, "slot_stride": slot, "head_stride": head, "dim_stride": dim,
        "page_size": keys.page_size, "pages": pages.ctypes.data, "columns": pages.shape[1],
    }  # fmt: skip
    return tuple(pool[name] for name in POOL.names or ())
